"""Linear cross-entropy compiled ahead of time for an H200 that is not here: registers, spills,
shared memory, memory of the whole op.

See `gpu_compilation.py`. "Compiles" says nothing of speed, nor that it runs.
"""

from __future__ import annotations

import pytest
from gpu_compilation import compiled, marks
from jaxre_kernels.cross_entropy import gpu

pytestmark = marks(gpu.MISSING)

PROGRAM = """
from jaxre_kernels.cross_entropy import linear_cross_entropy

def memory(tokens, channels, entries, trained):
    def run(x, head, targets, weights):
        def loss(x, head):
            return linear_cross_entropy(x, head, targets, weights, implementation="pallas_gpu")
        return jax.value_and_grad(loss, (0, 1) if trained else (0,))(x, head)

    arrays = given("bfloat16", tokens, channels), given("bfloat16", entries, channels)
    return peak(run, *arrays, given("int32", tokens), given("float32", tokens))
"""

# Tokens, channels, entries: the heads of Qwen2.5-0.5B and 3B, and one where all has to be padded.
HEADS = [(4096, 896, 151936), (4096, 2048, 151936), (1000, 328, 30522)]


def bound(tokens: int, channels: int, entries: int, trained: bool) -> int:
    """Bytes: x, head and their gradients, dx and dhead in f32, E of a chunk, and logits of 128
    tokens to find the largest.
    """
    x, head = tokens * channels, entries * channels
    padded = 3 if channels % 64 or entries % 8 else 1
    each = 2 * min(gpu.TOKENS, tokens + -tokens % 256) + 4 * 128
    return (
        padded * (2 * x + 2 * head)
        + 2 * x
        + 4 * padded * x
        + trained * (2 + 4 * padded) * head
        + each * entries
        + 2**20
    )


@pytest.mark.parametrize("trained", [False, True], ids=["frozen", "trained"])
@pytest.mark.parametrize("shape", HEADS, ids=str)
def test_nothing_spills_and_no_array_of_all_logits_is_formed(shape, trained, tmp_path):
    peak, kernels = compiled(tmp_path, PROGRAM, *shape, trained)
    assert peak < bound(*shape, trained), (peak, bound(*shape, trained))
    (kernel,) = kernels.values()
    assert kernel.spilled == 0
    # A thread block has a processor for itself: three warpgroups, of which two take of the
    # registers of the third.
    assert kernel.registers * 128 * (gpu.MULTIPLIERS + 1) <= 65536
    assert kernel.shared < 232448
