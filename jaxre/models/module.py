"""Decoder and encoder as Flax NNX modules, which initialise the weights and wrap the forward pass.

Training never sees a module: `plain_weights` extracts a plain pytree once.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx

from jaxre.models import decoder, encoder
from jaxre.models.architecture import Architecture, EncoderArchitecture
from jaxre.models.weights import AnyArchitecture, places, tree_of

_CONSTANTS = {"zeros": jnp.zeros, "ones": jnp.ones}


class _Weights(nnx.Module):
    """Random weights of the weight table."""

    def __init__(
        self, architecture: AnyArchitecture, *, rngs: nnx.Rngs, dtype: jnp.dtype = jnp.float32
    ):
        self.architecture = architecture

        def value(weight, shape):
            if weight.initial == "normal":
                return architecture.initializer_range * jax.random.normal(
                    rngs.params(), shape, dtype
                )
            return _CONSTANTS[weight.initial](shape, dtype)

        self.weights = nnx.data(
            tree_of(
                (path, nnx.Param(value(weight, shape)))
                for weight, path, shape, _ in places(architecture)
            )
        )


class Decoder(_Weights):
    """A decoder with random weights: `Decoder(architecture, rngs=nnx.Rngs(0))`."""

    architecture: Architecture

    def __call__(
        self,
        tokens: jax.Array,
        positions: jax.Array | None = None,
        visible_until: jax.Array | None = None,
    ) -> jax.Array:
        """[B, T] int32 tokens -> [B, T, V] f32 logits; one example a row by default."""
        B, T = tokens.shape
        positions = jnp.broadcast_to(jnp.arange(T), (B, T)) if positions is None else positions
        visible_until = jnp.full((B, T), T) if visible_until is None else visible_until
        params = plain_weights(self)
        x = decoder.forward(params, tokens, positions, visible_until, self.architecture)
        return decoder.head(params, x, self.architecture)


class Encoder(_Weights):
    """An encoder with random weights: `Encoder(architecture, rngs=nnx.Rngs(0))`."""

    architecture: EncoderArchitecture

    def __call__(self, tokens: jax.Array) -> jax.Array:
        """[B, T] int32 tokens, one example a row -> [B, N] f32 label logits."""
        B, T = tokens.shape
        positions, visible_until = jnp.broadcast_to(jnp.arange(T), (B, T)), jnp.full((B, T), T)
        first = jnp.zeros((B, 1), jnp.int32)
        return encoder.classify(
            plain_weights(self), tokens, positions, visible_until, first, self.architecture
        )[:, 0]


def plain_weights(module: Decoder | Encoder) -> dict:
    """Nested dicts of the weights, in the form of `weights.py`."""
    return jax.tree.map(
        lambda param: param[...], module.weights, is_leaf=lambda leaf: isinstance(leaf, nnx.Param)
    )


def init_weights(architecture: AnyArchitecture, seed: int, dtype: jnp.dtype = jnp.float32) -> dict:
    """Draws random base weights as a plain pytree."""
    kind = Encoder if isinstance(architecture, EncoderArchitecture) else Decoder
    return plain_weights(kind(architecture, rngs=nnx.Rngs(seed), dtype=dtype))
