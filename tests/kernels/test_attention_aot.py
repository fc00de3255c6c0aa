"""Packed attention compiled ahead of time for TPUs that are not here: it fits their vector memory,
and its memory is bounded.

`tools/test --aot` installs libtpu for each line of jax. Each chip has a process of its own: libtpu
holds what it was started with, and prints to stderr. "Compiles" says nothing of speed, nor that it
runs.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

pytestmark = [
    pytest.mark.aot,
    # Where CI is set it fails instead, so that no pipeline is green because nothing was compiled.
    pytest.mark.skipif(
        find_spec("libtpu") is None and not os.environ.get("CI"),
        reason="libtpu is not installed; tools/test --aot installs it",
    ),
]

CHIPS = {"v5e": "v5e:2x2", "v5p": "v5p:2x2x1", "v6e": "v6e:2x2"}
# Query heads, key heads, channels.
HEADS = [(9, 3, 64), (14, 2, 64), (16, 2, 128)]

PROGRAM = """
import json, sys
import jax, jax.numpy as jnp, numpy as np
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxre_kernels.attention.tpu import packed_attention

mesh = Mesh(np.array(topologies.get_topology_desc(sys.argv[1], platform="tpu").devices), ("data",))
rows = NamedSharding(mesh, PartitionSpec("data"))


def memory(length, heads, kv_heads, channels, dtype="bfloat16", span=None, both_ways=False):
    def run(q, k, v, dy, until):
        first = until if both_ways else None
        out, back = jax.vjp(
            lambda q, k, v: packed_attention(q, k, v, until, first, span=span), q, k, v
        )
        return out, back(dy)

    array = lambda count: jax.ShapeDtypeStruct(
        (mesh.size, length, count, channels), jnp.dtype(dtype), sharding=rows
    )
    until = jax.ShapeDtypeStruct((mesh.size, length), jnp.int32, sharding=rows)
    split = jax.shard_map(
        run,
        mesh=mesh,
        in_specs=PartitionSpec("data"),
        out_specs=PartitionSpec("data"),
        check_vma=False,
    )
    arrays = array(heads), array(kv_heads), array(kv_heads), array(heads), until
    return (
        jax.jit(split)
        .trace(*arrays)
        .lower(lowering_platforms=("tpu",))
        .compile()
        .memory_analysis()
        .peak_memory_in_bytes
    )


for case in json.loads(sys.argv[2]):
    print("PEAK", memory(*case[0], **case[1]), flush=True)
"""


def peaks(chip: str, cases) -> list[int]:
    """Bytes a chip at the peak of forward and backward over one row a chip; `cases` are
    (positional, keyword) arguments of `memory`.
    """
    flags = {"JAX_PLATFORMS": "cpu", "TPU_SKIP_MDS_QUERY": "1", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1"}
    environment = os.environ | flags | {"PYTHONPATH": str(Path(__file__).parents[2] / "kernels")}
    program = [sys.executable, "-c", PROGRAM, CHIPS[chip], json.dumps(cases)]
    done = subprocess.run(program, env=environment, capture_output=True, text=True, timeout=1200)
    assert done.returncode == 0, done.stderr[-4000:]
    return [int(line.split()[1]) for line in done.stdout.splitlines() if line.startswith("PEAK")]


def bound(length: int, heads: int, kv_heads: int, channels: int, bytes_each: int = 2) -> float:
    """What a caller has to expect: arguments and results, each once more as it is laid out for the
    kernels, and one more of dO and O.

    Of queries q, dO, O and dQ, of keys K, V, dK and dV. Channels of 64 take the room of 128 where
    they are the last axis (arguments and results may be stored so), not in the kernels' layout. 2
    MiB for lists and small things.
    """
    wide = max(channels, 128)
    stored = 4 * (heads + kv_heads) * wide
    laid_out = (6 * heads + 4 * kv_heads) * wide
    return length * (stored + laid_out) * bytes_each + length * heads * 4 * 8 + 2 * 2**20


@pytest.mark.parametrize("chip", CHIPS)
@pytest.mark.parametrize(("heads", "kv_heads", "channels"), HEADS)
def test_compiles_and_memory_grows_with_the_row_alone(chip, heads, kv_heads, channels):
    lengths = (1024, 2048, 8192) if chip == "v5e" else (8192,)
    found = peaks(chip, [((length, heads, kv_heads, channels), {}) for length in lengths])
    for length, peak in zip(lengths, found, strict=True):
        assert peak < bound(length, heads, kv_heads, channels), (length, peak)
        # a quarter of the scores of one row
        assert peak < heads * length * length * 4 / 4 or length < 8192


@pytest.mark.parametrize("chip", CHIPS)
def test_other_blocks_dtypes_and_widths_compile(chip):
    cases = [
        ((8192, 9, 3, 64), {"span": 200}),
        ((2048, 4, 4, 80), {}),
        ((2048, 9, 3, 64), {"dtype": "float32"}),
        ((1000, 16, 16, 64), {"both_ways": True}),
        ((4096, 32, 1, 128), {}),
    ]
    for (shape, options), peak in zip(cases, peaks(chip, cases), strict=True):
        assert peak < bound(*shape, bytes_each=4 if options.get("dtype") == "float32" else 2), (
            shape,
            peak,
        )
