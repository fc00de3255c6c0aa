"""Linear cross-entropy compiled ahead of time for TPUs that are not here: it fits their vector
memory, and no logits are formed.

Each chip has a process of its own: libtpu holds what it was started with, and prints to stderr.
"Compiles" says nothing of speed, nor that it runs.
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

PROGRAM = """
import json, sys
import jax, jax.numpy as jnp, numpy as np
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec as P
from jaxre_kernels.cross_entropy import linear_cross_entropy

mesh = Mesh(np.array(topologies.get_topology_desc(sys.argv[1], platform="tpu").devices), ("data",))


def memory(tokens, channels, entries, trained, dtype="bfloat16"):
    def run(x, head, targets, weights):
        def loss(x, head):
            return linear_cross_entropy(x, head, targets, weights, implementation="pallas_tpu")

        value, found = jax.value_and_grad(loss, (0, 1) if trained else (0,))(x, head)
        return (
            jax.lax.psum(value, "data"),
            found[0],
            [jax.lax.psum(one, "data") for one in found[1:]],
        )

    def given(dtype, spec, *shape):
        return jax.ShapeDtypeStruct(shape, jnp.dtype(dtype), sharding=NamedSharding(mesh, spec))

    rows = P("data")
    split = jax.shard_map(
        run,
        mesh=mesh,
        in_specs=(rows, P(), rows, rows),
        out_specs=(P(), rows, P()),
        check_vma=False,
    )
    arrays = (
        given(dtype, rows, mesh.size * tokens, channels),
        given(dtype, P(), entries, channels),
        given("int32", rows, mesh.size * tokens),
        given("float32", rows, mesh.size * tokens),
    )
    return (
        jax.jit(split)
        .trace(*arrays)
        .lower(lowering_platforms=("tpu",))
        .compile()
        .memory_analysis()
        .peak_memory_in_bytes
    )


for case in json.loads(sys.argv[2]):
    print("PEAK", memory(*case), flush=True)
"""

# Tokens a chip, channels, entries, whether the head is trained, and the dtype: the heads of
# Qwen2.5-0.5B, SmolLM2-360M, Llama-3.2-3B.
CASES = [
    (4096, 896, 151936, False, "bfloat16"),
    (4096, 896, 151936, True, "bfloat16"),
    (4000, 960, 49152, True, "bfloat16"),
    (2048, 3072, 128256, False, "bfloat16"),
    (512, 960, 49152, True, "float32"),
]


@pytest.mark.parametrize("chip", CHIPS)
def test_compiles_and_forms_no_logits(chip):
    flags = {"JAX_PLATFORMS": "cpu", "TPU_SKIP_MDS_QUERY": "1", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1"}
    environment = os.environ | flags | {"PYTHONPATH": str(Path(__file__).parents[2] / "kernels")}
    program = [sys.executable, "-c", PROGRAM, CHIPS[chip], json.dumps(CASES)]
    done = subprocess.run(program, env=environment, capture_output=True, text=True, timeout=1200)
    assert done.returncode == 0, done.stderr[-4000:]
    peaks = [int(line.split()[1]) for line in done.stdout.splitlines() if line.startswith("PEAK")]
    assert len(peaks) == len(CASES)
    for (tokens, channels, entries, trained, dtype), peak in zip(CASES, peaks, strict=True):
        bytes_each = 2 if dtype == "bfloat16" else 4
        x, head = tokens * channels, entries * channels
        # x, its gradient, mean, target rows and copies; the head, and where it is trained its
        # gradient, summed in f32, and over devices.
        bound = (
            x * (2 * bytes_each + 4 * 4)
            + head * (bytes_each + (trained and 2 * bytes_each + 2 * 4))
            + 16 * 2**20
        )
        assert peak < bound, (tokens, channels, entries, trained, dtype, peak, bound)
        if not trained:
            assert peak - head * bytes_each < tokens * entries * 4 / 8  # an eighth of the logits
