"""Tiny random decoders of each family as transformers builds them, and the logits of both sides.

Weights are drawn large enough that every part matters: projections keep the scale of their
input, biases are far from 0 and norms far from 1. A default initialisation (std 0.02, biases 0,
norms 1) would hide a wrong bias, a swapped norm or a missing rotation.
"""

from __future__ import annotations

import importlib
import sys
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxre.models import decoder
from jaxre.models.architecture import Architecture

SIZES = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 97,
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-5,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 1,
}
_LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
}

# Switches of the five studied decoders, of Qwen3 and of Gemma 3, and corner cases of our layout.
CONFIGS = {
    "qwen2 tied, biases, grouped heads": {"model_type": "qwen2", "tie_word_embeddings": True},
    "qwen2 untied": {"model_type": "qwen2", "tie_word_embeddings": False},
    "llama untied, head_dim given, K=H": {
        "model_type": "llama",
        "head_dim": 12,
        "num_key_value_heads": 4,
    },
    "llama grouped heads, K=1": {
        "model_type": "llama",
        "num_key_value_heads": 1,
        "tie_word_embeddings": True,
    },
    "llama-3 scaled rope": {
        "model_type": "llama",
        "head_dim": 16,
        "rope_parameters": {**_LLAMA3, "original_max_position_embeddings": 32},
        "tie_word_embeddings": True,
    },
    "smollm3, every fourth layer unrotated": {"model_type": "smollm3", "num_hidden_layers": 5},
    "smollm3, list of unrotated layers": {
        "model_type": "smollm3",
        "num_hidden_layers": 3,
        "no_rope_layers": [0, 1, 0],
    },
    "qwen3, norms of q and k": {"model_type": "qwen3", "head_dim": 12, "tie_word_embeddings": True},
    # Seven layers: both kinds among those that are scanned, a global one among them, the last
    # sliding; the window is shorter than any example.
    "gemma3, sliding and global layers": {
        "model_type": "gemma3_text",
        "num_hidden_layers": 7,
        "num_key_value_heads": 1,
        "head_dim": 16,
        "query_pre_attn_scalar": 16,
        "sliding_window": 8,
    },
    "gemma3, last layer global, scaled": {
        "model_type": "gemma3_text",
        "num_hidden_layers": 3,
        "head_dim": 12,
        "query_pre_attn_scalar": 21,
        "sliding_window": 5,
        "layer_types": ["full_attention", "sliding_attention", "full_attention"],
        "rope_parameters": {
            "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 50000.0},
            "sliding_attention": {"rope_type": "default", "rope_theta": 500.0},
        },
    },
    "one layer": {"model_type": "qwen2", "num_hidden_layers": 1, "tie_word_embeddings": True},
}


def ground_truth(name: str):
    """Imports torch or peft; on Python 3.11 they must be there, above it the test is skipped
    (design.md, Versions).
    """
    return (
        importlib.import_module(name) if sys.version_info < (3, 12) else pytest.importorskip(name)
    )


def build(fields: dict, folder: Path, seed: int = 0, dtype: str = "float32", **save):
    """A transformers model with random weights that matter, saved to `folder`; returned in eval
    mode.
    """
    torch = ground_truth("torch")
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.initialization import no_init_weights

    fields = {**SIZES, **fields}
    config = AutoConfig.for_model(**fields)
    with no_init_weights():  # every parameter is drawn below; theirs takes 13 s for 200 million
        model = AutoModelForCausalLM.from_config(
            config, attn_implementation="eager", dtype=torch.float32
        )
    model.tie_weights()
    generator = torch.Generator().manual_seed(seed)
    # model.to() would round the rotary frequencies too
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if name.endswith("norm.weight"):
                centre = 0 if fields["model_type"].startswith("gemma3") else 1
                parameter.copy_(centre + 0.3 * noise)
            elif name.endswith("bias"):
                parameter.copy_(0.5 * noise)
            elif "embed" in name:
                parameter.copy_(noise)
            else:
                parameter.copy_(noise * 1.5 / parameter.shape[1] ** 0.5)
            parameter.data = parameter.to(getattr(torch, dtype))
    model.save_pretrained(folder, **save)
    return model.eval()


def tokens_of(vocabulary: int, rows: int, length: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, vocabulary, (rows, length)).astype(np.int32)


def their_logits(model, tokens: np.ndarray, positions: np.ndarray | None = None) -> np.ndarray:
    torch = ground_truth("torch")
    tokens = torch.tensor(tokens, dtype=torch.long)
    with torch.no_grad():
        given = None if positions is None else torch.tensor(positions, dtype=torch.long)
        # Without a mask, positions that jump are taken for packed sequences where config.json says
        # use_cache=false.
        return (
            model(tokens, attention_mask=torch.ones_like(tokens), position_ids=given)
            .logits.float()
            .numpy()
        )


@partial(jax.jit, static_argnums=(4, 6))
def _logits(params, tokens, positions, visible_until, architecture, factors, scale):
    adapter = None if factors is None else decoder.Adapter(factors, scale)
    x = decoder.forward(params, tokens, positions, visible_until, architecture, adapter)
    return decoder.head(params, x, architecture)


def our_logits(
    architecture: Architecture,
    params: dict,
    tokens: np.ndarray,
    positions=None,
    visible_until=None,
    factors: dict | None = None,
    scale: float = 0.0,
) -> np.ndarray:
    """[B, T, V]; one example a row unless positions and visible_until say otherwise."""
    B, T = tokens.shape
    positions = np.broadcast_to(np.arange(T), (B, T)) if positions is None else positions
    visible_until = np.full((B, T), T) if visible_until is None else visible_until
    return np.asarray(
        _logits(
            params,
            jnp.asarray(tokens),
            jnp.asarray(positions),
            jnp.asarray(visible_until),
            architecture,
            factors,
            scale,
        )
    )


def relative(ours: np.ndarray, reference: np.ndarray) -> float:
    """max|difference| / max|reference|, which is what "relative" means in design.md."""
    assert np.asarray(ours).shape == np.asarray(reference).shape
    wide = [np.asarray(value, np.float64) for value in (ours, reference)]
    assert np.isfinite(wide[0]).all()
    return float(np.abs(wide[0] - wide[1]).max() / np.abs(wide[1]).max())


def random_factors(architecture: Architecture, lora, seed: int = 0) -> dict:
    """Factors with A and B both far from zero, so that a missing or swapped one shows."""
    from jaxre.models.lora import init_adapter

    draw = np.random.default_rng(seed)
    # its form alone: nothing compiles
    fresh = jax.eval_shape(lambda: init_adapter(architecture, lora, jax.random.key(seed)))
    return jax.tree.map(
        lambda leaf: (0.3 * draw.standard_normal(leaf.shape)).astype(np.float32), fresh
    )
