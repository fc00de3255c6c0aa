"""Prediction on an NF4 base is that on the values it stands for."""

import dataclasses

import numpy as np
import pytest

from jaxre.inference.decoding import decode
from jaxre.inference.scoring import score_labels
from jaxre.inference.search import best_labels
from jaxre.models.lora import merge
from jaxre.models.quantised import is_quantised

V, END = 97, 96


@pytest.mark.slow
@pytest.mark.parametrize(
    ("adapter", "kind"), [(False, "qwen2"), (True, "gemma3_text")], ids=["base", "lora"]
)
def test_an_nf4_base_predicts_as_its_dequantised_values_do(models, adapter, kind):
    exact = models.random_model(V, adapter=adapter, kind=kind)
    model = models.quantised_model(exact)
    dense = dataclasses.replace(model, params=merge(model.params, {"layers": {}, "last": {}}, 1.0))
    assert is_quantised(model.params) and not is_quantised(dense.params)
    random = np.random.default_rng(0)
    start = random.integers(0, V, 70).tolist()
    prompts = [start + random.integers(0, V, length).tolist() for length in (1, 9, 30, 12, 7)]
    answers = [[[5, END], [5, 6, END], [7, 8, 9, END], [7, 8, END]]] * len(prompts)

    # The same products; the compiler may sum them in another order.
    truth = score_labels(dense, prompts, answers)
    scores = score_labels(model, prompts, answers)
    assert models.largest_difference(scores, truth) < 1e-5
    assert models.largest_difference(score_labels(exact, prompts, answers), truth) > 1e-3, (
        "nothing was quantised"
    )
    best, score = best_labels(model, prompts, answers, batch_tokens=300)
    assert best.tolist() == truth.argmax(axis=1).tolist()
    assert models.largest_difference(score, truth.max(axis=1)) < 1e-5
    expected = decode(dense, prompts, {3}, 8, batch_tokens=300)
    found = decode(model, prompts, {3}, 8, batch_tokens=300)
    assert [one.tokens for one in found] == [one.tokens for one in expected]
    assert (
        models.largest_difference(
            np.array([one.score for one in found]), np.array([one.score for one in expected])
        )
        < 1e-5
    )
