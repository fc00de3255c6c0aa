"""Prediction with bf16 weights on a CPU: it runs, behind shared prefixes too, and is near f32."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxre.inference.decoding import decode
from jaxre.inference.scoring import score_labels
from jaxre.inference.search import best_labels
from jaxre.models.activations import activations_for

V = 97


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "shared"), [("qwen2", 70), ("gemma3_text", 0)], ids=["behind a prefix", "alone"]
)
def test_scores_best_labels_and_answers_are_near_those_of_f32(models, kind, shared):
    exact = models.random_model(V, adapter=True, kind=kind)
    params = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.bfloat16), exact.params)
    rounded = dataclasses.replace(exact, params=activations_for(params, "cpu"))
    draw = np.random.default_rng(0)
    start = draw.integers(0, V, shared).tolist()
    prompts = [start + draw.integers(0, V, length).tolist() for length in range(3, 19)]
    labels = [((5, 6, 1), (5, 7, 1), (8, 1))] * len(prompts)
    truth, found = (score_labels(model, prompts, labels) for model in (exact, rounded))
    # Logits of up to 5 that are rounded to 8 bits, three tokens a label.
    assert np.abs(found - truth).max() < 0.5 and np.abs(found - truth).max() > 0
    best, scores = best_labels(rounded, prompts, labels)
    assert best.tolist() == found.argmax(axis=1).tolist()
    np.testing.assert_allclose(scores, found.max(axis=1), atol=0.05)
    answers = [decode(model, prompts, {1}, 4) for model in (exact, rounded)]
    same = [one.tokens == other.tokens for one, other in zip(*answers, strict=True)]
    assert sum(same) >= len(prompts) / 2
