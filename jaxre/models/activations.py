"""The dtype of a decoder's activations: that of its norms and biases.

On an accelerator it is that of all weights. On a CPU products of bf16 run at twice the rate of f32
where their results are f32 (`jaxre_kernels.linear`): beside projections, embeddings and head in
bf16 norms and biases are f32, and with them what lies between the products: residual stream, norms,
rotation, SwiGLU, and all of their gradients.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxre.models.quantised import is_nf4, is_quantised

Tree = dict[str, Any]


def activations_for(params: Tree, platform: str) -> Tree:
    """A decoder's weights with the norms and biases in f32 where it runs on a CPU in bf16.

    As they are for any other platform or dtype, and where projections are NF4: those are
    dequantised to the dtype of the activations, so nothing would be multiplied in bf16.
    """
    if platform != "cpu" or params["embed"].dtype != jnp.bfloat16 or is_quantised(params):
        return params

    def widened(path: tuple, leaf: Any) -> Any:
        vector = str(path[-1].key).endswith(("norm", "bias"))
        return leaf.astype(np.float32) if vector else leaf

    return jax.tree_util.tree_map_with_path(widened, params, is_leaf=is_nf4)
