"""The LoRA group compiled ahead of time for an H200 that is not here: registers, spills, shared
memory and memory of a step.
"""

from __future__ import annotations

import pytest
from gpu_compilation import Kernel, compiled, marks
from jaxre_kernels.lora import gpu
from jaxre_kernels.lora.gpu_narrow import panel_of

pytestmark = marks(gpu.MISSING)

PROGRAM = """
from jaxre_kernels.lora import Factors, lora_group
from jaxre_kernels.nf4 import NF4Tiles


def memory(tokens, inputs, outputs, ranks, nf4, rate):
    def run(x, weights, factors, words, dys):
        def project(x, factors):
            return lora_group(
                x, weights, factors, words if rate else None, 2.0, rate, implementation="pallas_gpu"
            )

        ys, back = jax.vjp(project, x, factors)
        return ys, back(dys)

    def weight(o, nf4):
        if nf4:
            return NF4Tiles(given("uint8", inputs // 2, o), given("float32", inputs // 64, o), 64)
        return given("bfloat16", inputs, o)

    factors = [
        Factors(given("float32", inputs, r), given("float32", r, o)) if r else None
        for o, r in zip(outputs, ranks)
    ]
    dys = [given("bfloat16", tokens, o) for o in outputs]
    weights = [weight(o, packed) for o, packed in zip(outputs, nf4)]
    return peak(
        run, given("bfloat16", tokens, inputs), weights, factors, given("uint32", tokens), dys
    )
"""


# Inputs, outputs, ranks, which are NF4, dropout: some projections of Qwen2.5-0.5B and 3B
# (`test_step_aot.py` compiles all of them), and of SmolLM2-360M's 960 channels.
CASES = [
    (896, (896, 128, 128), (32, 32, 32), (False, False, False), 0.05),
    (2048, (11008, 11008), (64, 64), (False, False), 0.05),
    (960, (960, 320, 320), (16, 0, 16), (False, False, False), 0.0),
    (2048, (11008, 11008), (64, 64), (True, True), 0.05),
    (2048, (11008, 11008), (32, 32), (False, True), 0.05),
    (2048, (2048, 256, 256), (64, 64, 64), (True, False, True), 0.05),
]
TOKENS = 4096


@pytest.mark.parametrize("case", CASES, ids=str)
def test_nothing_spills_and_nothing_wide_is_formed(case, tmp_path):
    inputs, outputs, ranks, nf4, rate = case
    peak, kernels = compiled(tmp_path, PROGRAM, TOKENS, *case)
    forward, backward = (
        (198656, 189440) if any(nf4) else (196608,) * 2 if inputs == 960 else (229376,) * 2
    )
    expected = {"lora_forward": Kernel(168, 0, forward), "lora_backward": Kernel(168, 0, backward)}
    if rate:
        expected["lora_low"] = Kernel(168, 0, 81920 + 512 * 64 * len(ranks))
    partial_sums = 0
    for o, rank in zip(outputs, ranks, strict=True):
        panel, r = panel_of(TOKENS, o, rank), max(rank, 16)  # ranks of the cases are not padded
        if rank and panel is not None:
            expected[f"lora_narrow_{r}x{panel.pairs}"] = Kernel(
                168, 0, 98304 + 512 * r + 256 * r * panel.pairs
            )
            partial_sums += 4 * r * (panel.ranges * TOKENS + panel.spans * (o + 1024))
    assert kernels == expected
    passing = 4 * TOKENS * (inputs + sum(outputs))  # x, dx, y and dY
    weights = sum(
        inputs * o * (9 / 16 if packed else 2) for o, packed in zip(outputs, nf4, strict=True)
    )
    # x' once at a time, and L and dL, padded.
    narrow = 2 * TOKENS * (inputs + 6 * 64 * len(outputs))
    # Of A and B: masters, their cast and padded form, gradients padded and cut.
    factors = 24 * 64 * sum(inputs + o for o in outputs)
    assert peak < passing + weights + narrow + factors + partial_sums + 2**20, (
        peak,
        passing,
        weights,
        narrow,
        factors,
        partial_sums,
    )
