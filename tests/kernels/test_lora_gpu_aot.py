"""The LoRA group compiled ahead of time for an H200 that is not here: registers, spills, shared memory and memory of a step."""

from __future__ import annotations

import pytest
from gpu_compilation import compiled, marks
from jaxre_kernels.lora import gpu

pytestmark = marks(gpu.MISSING)

PROGRAM = """
from jaxre_kernels.lora import Factors, lora_group
from jaxre_kernels.nf4 import NF4Tiles

def memory(tokens, inputs, outputs, ranks, nf4, rate):
    def run(x, weights, factors, words, dys):
        def project(x, factors):
            return lora_group(x, weights, factors, words if rate else None, 2.0, rate, implementation="pallas_gpu")

        ys, back = jax.vjp(project, x, factors)
        return ys, back(dys)

    def weight(o, nf4):
        if nf4:
            return NF4Tiles(given("uint8", inputs // 2, o), given("float32", inputs // 64, o), 64)
        return given("bfloat16", inputs, o)

    factors = [Factors(given("float32", inputs, r), given("float32", r, o)) if r else None for o, r in zip(outputs, ranks)]
    dys = [given("bfloat16", tokens, o) for o in outputs]
    weights = [weight(o, packed) for o, packed in zip(outputs, nf4)]
    return peak(run, given("bfloat16", tokens, inputs), weights, factors, given("uint32", tokens), dys)
"""
