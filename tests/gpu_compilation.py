"""Ahead-of-time compilation for an absent H200, in a separate process, with the compiler's report
on each Mosaic GPU kernel.

`tools/test --aot` installs the CUDA plugin of jax (no CUDA libraries) for the second line of jax.
"Compiles" says nothing of speed, nor that it runs.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import pytest

PLUGIN = find_spec("jax_plugins") is not None and find_spec("jax_plugins.xla_cuda13") is not None


def marks(missing: str | None) -> list[pytest.MarkDecorator]:
    """Marks of a test that compiles; `missing` is the kernels' message on what this jax lacks."""
    return [
        pytest.mark.aot,
        pytest.mark.skipif(missing is not None, reason=str(missing)),
        # Where CI is set it fails instead, so that no pipeline is green because nothing was
        # compiled.
        pytest.mark.skipif(
            not PLUGIN and not os.environ.get("CI"),
            reason="jax's CUDA plugin is not installed; tools/test --aot installs it",
        ),
    ]


# XLA's description of the device, as it prints it on a machine with one.
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


# `given` describes an array on the device; `peak` compiles for it and returns the bytes of device
# memory in use at the peak.
BEGIN = """
import json, sys
import jax, jax.numpy as jnp, numpy as np
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec

devices = topologies.get_topology_desc(
    "", platform="cuda", target_config=json.loads(sys.argv[1]), topology="1x1x1"
).devices
mesh = Mesh(np.array(devices).reshape(-1), ("data",))


def given(dtype, *shape):
    return jax.ShapeDtypeStruct(
        shape, jnp.dtype(dtype), sharding=NamedSharding(mesh, PartitionSpec())
    )


def peak(run, *arrays):
    with jax.set_mesh(mesh):
        compiled = jax.jit(run).trace(*arrays).lower(lowering_platforms=("cuda",)).compile()
    return compiled.memory_analysis().peak_memory_in_bytes
"""
END = """

print("PEAK", memory(*json.loads(sys.argv[2])), flush=True)
"""


class Kernel(NamedTuple):
    registers: int
    spilled: int  # bytes
    shared: int  # bytes, without barriers


def compiled(
    folder: Path, program: str, *arguments: Any, target: str = H200, architecture: str = "sm_90a"
) -> tuple[int, dict[str, Kernel]]:
    """Returns `memory(*arguments)` of a program, bytes at the peak, and the compiler's report on
    each kernel, by name.

    Args:
      folder: an empty folder for the reports.
    """
    flags = {
        "JAX_PLATFORMS": "cpu",
        "MOSAIC_GPU_DUMP_TO": str(folder),
        "PYTHONPATH": str(Path(__file__).parents[1] / "kernels"),
    }
    command = [
        sys.executable,
        "-c",
        BEGIN + program + END,
        json.dumps(target),
        json.dumps(arguments),
    ]
    done = subprocess.run(
        command, env=os.environ | flags, capture_output=True, text=True, timeout=1200
    )
    assert done.returncode == 0, done.stderr[-4000:]
    (peak,) = (int(line.split()[1]) for line in done.stdout.splitlines() if line.startswith("PEAK"))
    kernels = {}
    for report in folder.glob("*.ptxas"):
        words, name = report.read_text(), re.sub(r"_\d+$", "", report.stem)
        # wgmma one by one, which ptxas warns of
        assert f"for '{architecture}'" in words and "serialized" not in words
        spilled = sum(int(count) for count in re.findall(r"(\d+) bytes spill", words))
        (registers,) = re.findall(r"Used (\d+) registers", words)
        kernels[name] = Kernel(int(registers), spilled, shared_of(folder, name))
    return peak, kernels


def shared_of(folder: Path, name: str) -> int:
    """Bytes of shared memory of a kernel, without barriers. jax 0.12 numbers this file otherwise
    than those of the compiler.
    """
    # several if a program has the kernel more than once
    reports = [path.read_text() for path in folder.glob(f"{name}_*.resources.txt")]
    (shared,) = {
        int(size) for text in reports for size in re.findall(r"smem_scratch_bytes=(\d+)", text)
    }
    return shared
