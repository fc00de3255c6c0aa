"""The dtype of a decoder's activations, which is the dtype of its norms and biases.

On an accelerator all weights share it. On a CPU bf16 products run at twice the rate of f32 if their
results are f32 (`jaxre_kernels.linear`). So projections, embeddings and head are bf16, norms and
biases f32, and with them everything between the products: residual stream, norms, rotation, SwiGLU,
and their gradients.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxre.models.quantised import is_nf4, is_quantised

Tree = dict[str, Any]


def activations_for(params: Tree, platform: str) -> Tree:
    """Casts the norms and biases of a bf16 decoder to f32 on a CPU.

    Returns the weights unchanged for any other platform or dtype, and for NF4 projections: those
    are dequantised to the dtype of the activations, so nothing would be multiplied in bf16.
    """
    if platform != "cpu" or params["embed"].dtype != jnp.bfloat16 or is_quantised(params):
        return params

    def widened(path: tuple, leaf: Any) -> Any:
        vector = str(path[-1].key).endswith(("norm", "bias"))
        return leaf.astype(np.float32) if vector else leaf

    return jax.tree_util.tree_map_with_path(widened, params, is_leaf=is_nf4)
