"""`model.dtype=auto` on a CPU follows measured rates, which are measured once."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

import jaxre.product_rates
from jaxre.checkpoints import source
from jaxre.checkpoints.source import chosen_dtype, dtype_of
from jaxre.config import Config, Model
from jaxre.errors import InputError
from jaxre.product_rates import Rates, processor, product_rates

FAST, SLOW = Rates(191e9, 372e9), Rates(191e9, 172e9)


def test_rates_are_measured_once_for_a_processor(tmp_path: Path):
    cache, calls = tmp_path / "below" / "products.json", []

    def measure() -> Rates:
        calls.append(1)
        return FAST

    assert product_rates(cache, measure) == product_rates(cache, measure) == FAST
    assert len(calls) == 1
    assert list(json.loads(cache.read_text())) == [processor()]
    assert "jaxlib" in processor()


@pytest.mark.parametrize("text", ["", "[]", '{"here": [1]}', '{"here": "there"}'])
def test_a_broken_cache_is_as_good_as_none(tmp_path: Path, text: str):
    cache = tmp_path / "products.json"
    cache.write_text(text)
    assert product_rates(cache, lambda: FAST) == FAST
    assert processor() in json.loads(cache.read_text())


@pytest.mark.parametrize(
    ("rates", "expected"), [(FAST, "bfloat16"), (SLOW, "float32"), (Rates(100e9, 110e9), "float32")]
)
def test_auto_follows_the_rates(monkeypatch: pytest.MonkeyPatch, rates: Rates, expected: str):
    monkeypatch.delenv(source.CPU_DTYPE)
    monkeypatch.setattr(source, "product_rates", lambda: rates)
    chosen = chosen_dtype("auto")
    assert chosen.dtype.name == expected and chosen.why == rates.words()


def test_the_reason_names_both_rates():
    assert FAST.words() == "bfloat16 products 372 GFLOP/s, float32 191: bfloat16"


def test_nothing_is_measured_where_a_dtype_is_given(monkeypatch: pytest.MonkeyPatch):
    def never() -> Rates:
        raise AssertionError("measured")

    monkeypatch.setattr(jaxre.product_rates, "measured_rates", never)
    monkeypatch.setattr(source, "product_rates", never)
    assert chosen_dtype("auto").dtype == np.float32  # tests/conftest.py says so
    assert chosen_dtype("bfloat16").dtype.name == "bfloat16"
    monkeypatch.setenv(source.CPU_DTYPE, "bfloat16")
    assert chosen_dtype("auto").dtype.name == "bfloat16"
    for model, train in (
        ({}, {"method": "full"}),
        ({"quantise": "nf4"}, {}),
    ):
        config = Config.model_construct(
            model=Model(path="facts-base", **model),
            train=Config.model_fields["train"].annotation(batch_examples=8, **train),
        )
        chosen = dtype_of(config)
        assert chosen.dtype == np.float32 and chosen.why.startswith("float32: ")
    monkeypatch.setenv(source.CPU_DTYPE, "float16")
    with pytest.raises(InputError, match="float16"):
        chosen_dtype("auto")
