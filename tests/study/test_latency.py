"""The latency of an answer excludes the transfer of the weights."""

from pathlib import Path

import jax
import numpy as np
import pytest

from jaxre.checkpoints.source import Loaded
from jaxre.models.architecture import architecture_of
from jaxre.models.module import init_weights
from jaxre.study import latency

CONFIG = {
    "model_type": "llama",
    "num_hidden_layers": 1,
    "hidden_size": 8,
    "num_attention_heads": 1,
    "num_key_value_heads": 1,
    "intermediate_size": 8,
    "vocab_size": 16,
    "max_position_embeddings": 256,
    "rope_theta": 10000.0,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": True,
}


def test_no_answer_brings_the_weights_to_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """An opened model has its weights on the host."""
    architecture = architecture_of(CONFIG, "test")
    loaded = Loaded(
        Path(), "tiny", architecture, jax.tree.map(np.asarray, init_weights(architecture, 0))
    )
    asked = []
    monkeypatch.setattr(latency, "decode", lambda model, *given, **more: asked.append(model))
    latency.latency_ms(loaded)
    assert len(asked) == 1 + latency.TRIES
    assert all(
        isinstance(leaf, jax.Array) for model in asked for leaf in jax.tree.leaves(model.params)
    )
