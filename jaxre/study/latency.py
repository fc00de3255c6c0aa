"""Latency of one answer at batch 1, as in the study: a prompt of 150 tokens and 5 new ones."""

from __future__ import annotations

import dataclasses
import time

import jax
import numpy as np

from jaxre.checkpoints.source import Loaded
from jaxre.data.tokens import TokenSet
from jaxre.inference.classification import plan_classification, run_classification
from jaxre.inference.decoding import decode
from jaxre.inference.model import on_device
from jaxre.inference.predict import model_of
from jaxre.models.architecture import EncoderArchitecture

PROMPT, NEW, TRIES = 150, 5, 5


def latency_ms(loaded: Loaded) -> float:
    """Milliseconds of an answer: the median of 5, after one that compiles. An encoder classifies
    the 150 tokens. Adapters are not merged.
    """
    architecture = loaded.architecture
    tokens = (np.arange(PROMPT) % architecture.vocabulary).astype(np.int32)
    if isinstance(architecture, EncoderArchitecture):
        starts, prompt_lengths = np.array([0, PROMPT], np.int64), np.array([PROMPT], np.int32)
        prompt = TokenSet(tokens, starts, prompt_lengths, ("latency",), np.zeros(1, np.int32))
        plan = plan_classification(prompt, architecture, batch_tokens=PROMPT)
        params = jax.tree.map(jax.numpy.asarray, loaded.base)

        def answer() -> object:
            return run_classification(params, architecture, plan)

    else:
        model = model_of(loaded)
        params, factors = on_device(model)  # once, so that no answer transfers the weights
        model = dataclasses.replace(model, params=params, factors=factors)

        def answer() -> object:
            return decode(model, [tokens.tolist()], (), NEW, batch_tokens=PROMPT + NEW)

    answer()
    times = []
    for _ in range(TRIES):
        began = time.perf_counter()
        answer()
        times.append(time.perf_counter() - began)
    return 1e3 * float(np.median(times))
