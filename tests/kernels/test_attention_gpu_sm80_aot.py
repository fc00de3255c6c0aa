"""Packed attention compiled ahead of time for an A100 and an RTX 4090 that are not here: registers,
spills, shared memory, results.

What was compiled is run on the CPU, instruction by instruction (`ptx.py`): that takes `mma`,
`ldmatrix`, `cp.async` and how registers are laid out, none of which Pallas's interpreter has.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import NamedTuple

import gpu_compilation
import jax
import jax.numpy as jnp
import numpy as np
import ptx
import pytest
from attention_kernels import in_f64, relative
from gpu_compilation import H200, Kernel, marks, shared_of
from jaxre_kernels.attention import gpu_sm80, gpu_vjp

pytestmark = marks(gpu_sm80.MISSING)


class Device(NamedTuple):
    """By its datasheet and the CUDA programming guide, appendix on compute capabilities; sizes in
    bytes.
    """

    name: str
    major: int
    minor: int
    shared_memory_per_core: int
    shared_memory_per_block_optin: int
    threads_per_core_limit: int
    core_count: int
    fpus_per_core: int
    memory_bandwidth: int
    l2_cache_size: int
    clock_rate_ghz: float
    device_memory_size: int

    def told(self) -> str:
        """As XLA has it, like that of an H200."""
        capability = f"major: {self.major} minor: {self.minor}"
        text = H200.replace(
            "major: 9 minor: 0 feature_extension: ACCELERATED_FEATURES", capability
        ).replace("NVIDIA H200", self.name)
        for field, value in list(self._asdict().items())[3:]:
            text, count = re.subn(
                rf"^  {field}: .*$", f"  {field}: {value}", text, flags=re.MULTILINE
            )
            assert count == 1, field
        return text


A100 = Device(
    "NVIDIA A100",
    8,
    0,
    167936,
    166912,
    2048,
    108,
    64,
    1_555_000_000_000,
    40 * 2**20,
    1.41,
    40 * 2**30,
)
RTX_4090 = Device(
    "NVIDIA RTX 4090",
    8,
    9,
    102400,
    101376,
    1536,
    128,
    128,
    1_008_000_000_000,
    72 * 2**20,
    2.52,
    24 * 2**30,
)

PROGRAM = """
from jaxre_kernels.attention.gpu_sm80 import packed_attention

# Mosaic GPU asks the default device what it compiles for.
jax.config.update("jax_default_device", devices[0])


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


def compiled(folder: Path, device: Device, *shape) -> dict[str, Kernel]:
    """The compiler's report on each kernel."""
    architecture = f"sm_{device.major}{device.minor}"
    _, kernels = gpu_compilation.compiled(
        folder, PROGRAM, *shape, target=device.told(), architecture=architecture
    )
    assert set(kernels) == {"attention_forward", "attention_dq", "attention_dkv"}
    return kernels


def together(kernel: Kernel, device: Device) -> int:
    """Thread blocks of 128 threads that a processor holds: 65,536 registers; each block takes 1 KiB
    of its shared memory besides.
    """
    return min(
        65536 // (128 * (-(-kernel.registers // 8) * 8)),
        device.shared_memory_per_core // (kernel.shared + 1024),
    )


@pytest.mark.parametrize(
    ("device", "shape"),
    [
        (A100, (1, 8192, 9, 3, 64)),
        (A100, (1, 8192, 16, 2, 128)),
        (RTX_4090, (1, 8192, 16, 2, 128)),
        (RTX_4090, (8, 512, 12, 12, 64, True)),
        (RTX_4090, (3, 1000, 4, 4, 80)),
    ],
    ids=lambda value: getattr(value, "name", str(value)),
)
def test_nothing_spills_and_a_processor_holds_two_thread_blocks(shape, device, tmp_path):
    """They hide each other's latency. The fourth shape has segments that are seen both ways."""
    for name, kernel in compiled(tmp_path, device, *shape).items():
        assert kernel.spilled == 0, (name, kernel)
        assert together(kernel, device) >= 2, (name, kernel)
        assert kernel.shared <= device.shared_memory_per_block_optin


def test_it_compiles_for_an_h200_with_copies_of_the_copy_engine(tmp_path):
    """So the hardware check can run products and layouts of registers there."""
    program = PROGRAM.replace(
        "import packed_attention", "import with_copy_engine as packed_attention"
    )
    for name, kernel in gpu_compilation.compiled(tmp_path, program, 1, 1024, 4, 2, 128)[1].items():
        assert kernel.spilled == 0, (name, kernel)


# ---- what was compiled, run -------------------------------------------------------------------

FORWARD = "q k v bounds others total"
BACKWARD = "q k v bounds dsums statistics"
# Parameters have the order in which the kernel first uses them.
ORDER = {
    "attention_forward": "total q others k v bounds out statistics",
    "attention_dq": "total q dsums others v statistics k bounds middles dq slacks",
    "attention_dkv": "total k v others dsums bounds q statistics dk dv",
}


def executed(folder: Path, change=lambda text: text) -> gpu_vjp.Kernels:
    """The kernels as they were compiled to a folder."""

    def call(name, names, arrays, results, heads):
        (file,) = folder.glob(f"{name}_*.ptx")
        B, S, *_ = arrays[0].shape

        def run(*arrays):
            given = dict(zip(names.split(), map(np.asarray, arrays), strict=True))
            empty = {name: np.zeros(result.shape, result.dtype) for name, result in results.items()}
            grid = heads, B * S // gpu_vjp.BLOCK
            left = ptx.run(
                change(file.read_text()),
                shared_of(folder, name),
                ORDER[name].split(),
                grid,
                {**given, **empty},
            )
            assert all(
                np.array_equal(left[name].view(np.uint8), given[name].view(np.uint8))
                for name in given
            )
            return [left[name] for name in results]

        return jax.pure_callback(run, list(results.values()), *arrays)

    def forward(_, q, *arrays):
        results = {"out": gpu_vjp.like(q), "statistics": gpu_vjp.statistics_of(q)}
        return call("attention_forward", FORWARD, (q, *arrays), results, q.shape[2])

    def dq(_, q, *arrays):
        B, S, H, _ = q.shape
        results = {"dq": gpu_vjp.like(q), "slacks": jax.ShapeDtypeStruct((B, H, S), jnp.float32)}
        return call("attention_dq", f"{BACKWARD} middles others total", (q, *arrays), results, H)

    def dkv(_, q, k, *arrays):
        results = {"dk": gpu_vjp.like(k), "dv": gpu_vjp.like(k)}
        return call(
            "attention_dkv", f"{BACKWARD} others total", (q, k, *arrays), results, k.shape[2]
        )

    return gpu_vjp.Kernels(forward, dq, dkv)


def example(rows, length, heads, kv_heads, channels, both_ways=False):
    """q, k, v and the gradient of the output; bounds of examples of 3 to 100 tokens, of those
    behind a prefix of 20 in the last row.
    """
    draw = np.random.default_rng(0)
    arrays = [
        jnp.asarray(draw.standard_normal((rows, length, count, channels)), jnp.bfloat16)
        for count in (heads, kv_heads, kv_heads, heads)
    ]
    first, until = np.empty((2, rows, length), np.int32)
    for row in range(rows):
        ends = np.minimum(np.cumsum(draw.integers(3, 100, length)), length)
        until[row] = ends[np.searchsorted(ends, np.arange(length), side="right")]
        first[row] = np.concatenate([[0], ends])[
            np.searchsorted(ends, np.arange(length), side="right")
        ]
    if not both_ways:
        until[-1, :20] = length
        first[:] = np.arange(length)
    query = np.arange(length)[None, :, None]
    return (
        arrays,
        until,
        first if both_ways else None,
        (first[:, None] <= query) & (query < until[:, None]),
    )


@pytest.mark.parametrize(
    ("device", "shape"),
    [
        (A100, (1, 192, 2, 1, 128)),
        (RTX_4090, (2, 192, 3, 1, 64)),
        (RTX_4090, (1, 192, 1, 1, 64, True)),
    ],
    ids=lambda value: getattr(value, "name", str(value)),
)
def test_what_was_compiled_gives_dense_attention_and_its_gradients(shape, device, tmp_path):
    """Sums are in another order than a GPU's; a sum of 192 products of bf16 is far from both by its
    rounding alone.
    """
    compiled(tmp_path, device, *shape)
    arrays, until, first, mask = example(*shape)
    *inputs, dout = arrays
    out, back = jax.vjp(
        lambda q, k, v: gpu_vjp.attend(executed(tmp_path), q, k, v, until, first), *inputs
    )
    for ours, reference in zip(
        (out, *back(dout)),
        in_f64(*(array.astype(jnp.float32) for array in arrays), mask),
        strict=True,
    ):
        assert relative(ours, reference) < 2**-7


@pytest.mark.parametrize(
    ("name", "words"), [("cp.async.wait_group", "not finite"), ("bar.sync", "without a barrier")]
)
def test_a_missing_wait_or_barrier_is_found(name, words, tmp_path):
    """Of those of the compiled forward kernel."""
    compiled(tmp_path, A100, 1, 64, 1, 1, 64)
    (q, k, v, _), until, first, _ = example(1, 64, 1, 1, 64)
    kernels = executed(tmp_path, lambda text: text.replace(name, f"// {name}"))
    with pytest.raises(Exception, match=words):
        assert np.isfinite(gpu_vjp.attend(kernels, q, k, v, until, first)).all(), "not finite"
