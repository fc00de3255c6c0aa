"""An NF4 base in the backward pass, by what is compiled."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import pytest
from jaxre_kernels.nf4 import NF4Weight, forms

from jaxre.config import Lora
from jaxre.models import decoder
from jaxre.models.architecture import architecture_of
from jaxre.models.lora import init_adapter
from jaxre.models.weights import places, table, tree_of


@pytest.mark.slow
def test_backward_pass_keeps_no_dense_copy_of_the_base():
    """Beyond a step on a dense base, it needs memory for the matrices of a layer or two, of twelve;
    the quantised base is not copied.
    """
    fields = {
        "model_type": "llama",
        "hidden_size": 256,
        "intermediate_size": 1024,
        "num_hidden_layers": 12,
        "num_attention_heads": 4,
    }
    fields |= {
        "num_key_value_heads": 2,
        "vocab_size": 64,
        "max_position_embeddings": 64,
        "rms_norm_eps": 1e-5,
    }
    architecture = architecture_of(fields, "test")
    dense = tree_of(
        (path, jax.ShapeDtypeStruct(shape, jnp.float32))
        for _, path, shape, _ in places(architecture)
    )
    matrices = {
        weight.name: weight.shape(architecture) for weight in table(architecture) if weight.lora
    }
    quantised = {**dense, "layers": dict(dense["layers"]), "last": dict(dense["last"])}
    for part, stack in (("layers", (11,)), ("last", ())):
        for name, (inputs, outputs) in matrices.items():
            arrays = {
                field: jax.ShapeDtypeStruct(*form)
                for field, form in forms((outputs, inputs), stack).items()
            }
            quantised[part][name] = NF4Weight(**arrays, shape=(outputs, inputs))
    factors = jax.eval_shape(
        lambda: init_adapter(architecture, Lora(rank=4, alpha=10.0, dropout=0.0), jax.random.key(0))
    )
    rows = jax.ShapeDtypeStruct((1, 8), jnp.int32)

    def loss(factors, params, tokens):
        return decoder.forward(
            params, tokens, tokens, tokens + 8, architecture, decoder.Adapter(factors, 1.0)
        ).sum()

    def temporary(params):
        return (
            jax.jit(jax.grad(loss))
            .lower(factors, params, rows)
            .compile()
            .memory_analysis()
            .temp_size_in_bytes
        )

    layer = 4 * sum(math.prod(shape) for shape in matrices.values())
    assert temporary(quantised) < temporary(dense) + 2 * layer  # measured: 0.8 of a layer
