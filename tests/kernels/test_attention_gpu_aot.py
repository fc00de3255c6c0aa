"""Packed attention compiled ahead of time for an H200 that is not here: registers, spills, shared memory and memory of a step.

`tools/test --aot` installs the CUDA plugin of jax (no CUDA libraries) for the second line of jax. The compiler has a process of its own,
and writes what it says of each kernel to a folder. "Compiles" says nothing of speed, nor that it runs.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

import pytest
from jaxre_kernels.attention import gpu

PLUGIN = find_spec("jax_plugins") is not None and find_spec("jax_plugins.xla_cuda13") is not None

pytestmark = [
    pytest.mark.aot,
    pytest.mark.skipif(gpu.MISSING is not None, reason=str(gpu.MISSING)),
    # Where CI is set it fails instead, so that no pipeline is green because nothing was compiled.
    pytest.mark.skipif(not PLUGIN and not os.environ.get("CI"), reason="jax's CUDA plugin is not installed; tools/test --aot installs it"),
]

# What XLA has to know of the device, as it is written where there is one.
H200 = """
gpu_device_info {
  threads_per_block_limit: 1024
  threads_per_warp: 32
  shared_memory_per_block: 49152
  shared_memory_per_core: 233472
  shared_memory_per_block_optin: 232448
  threads_per_core_limit: 2048
  core_count: 132
  fpus_per_core: 128
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
  memory_bandwidth: 4800000000000
  l2_cache_size: 52428800
  clock_rate_ghz: 1.98
  device_memory_size: 151397597184
  cuda_compute_capability { major: 9 minor: 0 feature_extension: ACCELERATED_FEATURES }
  registers_per_core_limit: 65536
  registers_per_block_limit: 65536
  thread_dim_limit_x: 1024
  thread_dim_limit_y: 1024
  thread_dim_limit_z: 64
  device_address_bits: 64
  driver_version: "13.0.0"
  runtime_version: "13.0.0"
  compile_time_toolkit_version: "13.0.0"
  dnn_version: "9.10.0"
  name: "NVIDIA H200"
}
platform_name: "CUDA"
dnn_version_info { major: 9 minor: 10 }
device_description_str: "NVIDIA H200"
"""

PROGRAM = """
import json, sys
import jax, jax.numpy as jnp, numpy as np
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxre_kernels.attention.gpu import packed_attention

config = json.loads(sys.argv[1])
devices = topologies.get_topology_desc("", platform="cuda", target_config=config, topology="1x1x1").devices
mesh = Mesh(np.array(devices).reshape(-1), ("data",))
whole = NamedSharding(mesh, PartitionSpec())

def memory(rows, length, heads, kv_heads, channels, both_ways=False):
    def run(q, k, v, dy, until):
        first = until if both_ways else None
        out, back = jax.vjp(lambda q, k, v: packed_attention(q, k, v, until, first), q, k, v)
        return out, back(dy)

    array = lambda count: jax.ShapeDtypeStruct((rows, length, count, channels), jnp.bfloat16, sharding=whole)
    until = jax.ShapeDtypeStruct((rows, length), jnp.int32, sharding=whole)
    with jax.set_mesh(mesh):
        traced = jax.jit(run).trace(array(heads), array(kv_heads), array(kv_heads), array(heads), until)
        return traced.lower(lowering_platforms=("cuda",)).compile().memory_analysis().peak_memory_in_bytes

shape, options = json.loads(sys.argv[2])
print("PEAK", memory(*shape, **options), flush=True)
"""


class Kernel(NamedTuple):
    registers: int
    spilled: int  # bytes
    shared: int  # bytes, without barriers


def compiled(folder: Path, shape, **options) -> tuple[int, dict[str, Kernel]]:
    """Bytes of device memory at the peak of forward and backward, and what the compiler says of each kernel."""
    flags = {"JAX_PLATFORMS": "cpu", "MOSAIC_GPU_DUMP_TO": str(folder), "PYTHONPATH": str(Path(__file__).parents[2] / "kernels")}
    program = [sys.executable, "-c", PROGRAM, json.dumps(H200), json.dumps((shape, options))]
    done = subprocess.run(program, env=os.environ | flags, capture_output=True, text=True, timeout=1200)
    assert done.returncode == 0, done.stderr[-4000:]
    (peak,) = (int(line.split()[1]) for line in done.stdout.splitlines() if line.startswith("PEAK"))
    kernels = {}
    for said in folder.glob("*.ptxas"):
        words = said.read_text()
        assert "for 'sm_90a'" in words
        spilled = sum(int(count) for count in re.findall(r"(\d+) bytes spill", words))
        (registers,) = re.findall(r"Used (\d+) registers", words)
        (shared,) = re.findall(r"smem_scratch_bytes=(\d+)", said.with_suffix(".resources.txt").read_text())
        kernels[re.sub(r"_\d+$", "", said.stem)] = Kernel(int(registers), spilled, int(shared))
    assert set(kernels) == {"attention_forward", "attention_dq", "attention_dkv"}
    return peak, kernels


def together(kernel: Kernel) -> int:
    """Thread blocks of 128 threads that a processor of an H200 holds: 65,536 registers, 228 KiB of which each block costs one more."""
    return min(65536 // (128 * (-(-kernel.registers // 8) * 8)), 233472 // (kernel.shared + 1024))


def bound(rows: int, length: int, heads: int, kv_heads: int, channels: int) -> float:
    """What a caller has to expect: arguments and results, dO~, statistics twice over, and the lists."""
    arrays = rows * length * channels * 2 * (5 * heads + 4 * kv_heads)
    blocks = length // gpu.BLOCK
    return arrays + rows * length * heads * 4 * 8 + 4 * rows * blocks**2 * 4 + 2**20


@pytest.mark.parametrize(("heads", "kv_heads", "channels", "blocks"), [(9, 3, 64, 3), (14, 2, 64, 3), (16, 2, 128, 2)])
def test_nothing_spills_and_a_processor_holds_several_thread_blocks(heads, kv_heads, channels, blocks, tmp_path):
    """They hide each other's latency. No kernel keeps more than a row's arrays."""
    shape = 1, 8192, heads, kv_heads, channels
    peak, kernels = compiled(tmp_path, shape)
    assert peak < bound(*shape), peak
    for name, kernel in kernels.items():
        assert kernel.spilled == 0, (name, kernel)
        assert together(kernel) >= blocks, (name, kernel)


@pytest.mark.parametrize(
    ("shape", "options"), [((3, 1000, 4, 4, 80), {}), ((8, 512, 12, 12, 64), {"both_ways": True}), ((1, 4096, 8, 1, 128), {})], ids=str
)
def test_other_shapes_compile_without_spills(shape, options, tmp_path):
    for name, kernel in compiled(tmp_path, shape, **options)[1].items():
        assert kernel.spilled == 0, (name, kernel)
