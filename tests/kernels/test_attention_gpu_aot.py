"""Packed attention compiled ahead of time for an H200 that is not here: registers, spills, shared
memory and memory of a step.
"""

from __future__ import annotations

from pathlib import Path

import pytest
from gpu_compilation import Kernel, marks
from gpu_compilation import compiled as compiled_program
from jaxre_kernels.attention import gpu

pytestmark = marks(gpu.MISSING)

PROGRAM = """
from jaxre_kernels.attention.gpu import packed_attention


def memory(rows, length, heads, kv_heads, channels, both_ways=False):
    def run(q, k, v, dy, until):
        first = until if both_ways else None
        out, back = jax.vjp(lambda q, k, v: packed_attention(q, k, v, until, first), q, k, v)
        return out, back(dy)

    queries, keys = (
        given("bfloat16", rows, length, count, channels) for count in (heads, kv_heads)
    )
    return peak(run, queries, keys, keys, queries, given("int32", rows, length))
"""


def compiled(folder: Path, *shape) -> tuple[int, dict[str, Kernel]]:
    """Bytes of device memory at the peak of forward and backward, and what the compiler says of
    each kernel.
    """
    peak, kernels = compiled_program(folder, PROGRAM, *shape)
    assert set(kernels) == {"attention_forward", "attention_dq", "attention_dkv"}
    return peak, kernels


def together(kernel: Kernel) -> int:
    """Thread blocks of 128 threads that a processor of an H200 holds: 65,536 registers, 228 KiB of
    which each block costs one more.
    """
    return min(65536 // (128 * (-(-kernel.registers // 8) * 8)), 233472 // (kernel.shared + 1024))


def bound(rows: int, length: int, heads: int, kv_heads: int, channels: int) -> float:
    """What a caller has to expect: arguments and results, dO~, statistics twice over, and the
    lists.
    """
    arrays = rows * length * channels * 2 * (5 * heads + 4 * kv_heads)
    blocks = length // gpu.BLOCK
    return arrays + rows * length * heads * 4 * 8 + 4 * rows * blocks**2 * 4 + 2**20


@pytest.mark.parametrize(
    ("heads", "kv_heads", "channels", "blocks"), [(9, 3, 64, 3), (14, 2, 64, 3), (16, 2, 128, 2)]
)
def test_nothing_spills_and_a_processor_holds_several_thread_blocks(
    heads, kv_heads, channels, blocks, tmp_path
):
    """They hide each other's latency. No kernel keeps more than a row's arrays."""
    shape = 1, 8192, heads, kv_heads, channels
    peak, kernels = compiled(tmp_path, *shape)
    assert peak < bound(*shape), peak
    for name, kernel in kernels.items():
        assert kernel.spilled == 0, (name, kernel)
        assert together(kernel) >= blocks, (name, kernel)


@pytest.mark.parametrize(
    "shape", [(3, 1000, 4, 4, 80), (8, 512, 12, 12, 64, True), (1, 4096, 8, 1, 128)], ids=str
)
def test_other_shapes_compile_without_spills(shape, tmp_path):
    """The second one with segments that are seen both ways."""
    for name, kernel in compiled(tmp_path, *shape)[1].items():
        assert kernel.spilled == 0, (name, kernel)
