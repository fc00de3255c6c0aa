"""Packed attention compiled ahead of time for an A100 and an RTX 4090 that are not here: registers, spills, shared memory."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest
from gpu_compilation import BEGIN, END, H200, Kernel, marks
from jaxre_kernels.attention import gpu_sm80

pytestmark = marks(gpu_sm80.MISSING)


class Device(NamedTuple):
    """By its datasheet and the CUDA programming guide, appendix on compute capabilities; sizes in bytes."""

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
        text = H200.replace("major: 9 minor: 0 feature_extension: ACCELERATED_FEATURES", capability).replace("NVIDIA H200", self.name)
        for field, value in list(self._asdict().items())[3:]:
            text, count = re.subn(rf"^  {field}: .*$", f"  {field}: {value}", text, flags=re.MULTILINE)
            assert count == 1, field
        return text


A100 = Device("NVIDIA A100", 8, 0, 167936, 166912, 2048, 108, 64, 1_555_000_000_000, 40 * 2**20, 1.41, 40 * 2**30)
RTX_4090 = Device("NVIDIA RTX 4090", 8, 9, 102400, 101376, 1536, 128, 128, 1_008_000_000_000, 72 * 2**20, 2.52, 24 * 2**30)

PROGRAM = """
from jaxre_kernels.attention.gpu_sm80 import packed_attention

# Mosaic GPU asks the default device what it compiles for.
jax.config.update("jax_default_device", devices[0])

def memory(rows, length, heads, kv_heads, channels, both_ways=False):
    def run(q, k, v, dy, until):
        first = until if both_ways else None
        out, back = jax.vjp(lambda q, k, v: packed_attention(q, k, v, until, first), q, k, v)
        return out, back(dy)

    queries, keys = (given("bfloat16", rows, length, count, channels) for count in (heads, kv_heads))
    return peak(run, queries, keys, keys, queries, given("int32", rows, length))
"""


def compiled(folder: Path, device: Device, *shape) -> dict[str, Kernel]:
    """What the compiler says of each kernel."""
    flags = {"JAX_PLATFORMS": "cpu", "MOSAIC_GPU_DUMP_TO": str(folder), "PYTHONPATH": str(Path(__file__).parents[2] / "kernels")}
    program = [sys.executable, "-c", BEGIN + PROGRAM + END, json.dumps(device.told()), json.dumps(shape)]
    done = subprocess.run(program, env=os.environ | flags, capture_output=True, text=True, timeout=1200)
    assert done.returncode == 0, done.stderr[-4000:]
    kernels = {}
    for said in folder.glob("*.ptxas"):
        words = said.read_text()
        assert f"for 'sm_{device.major}{device.minor}'" in words
        spilled = sum(int(count) for count in re.findall(r"(\d+) bytes spill", words))
        (registers,) = re.findall(r"Used (\d+) registers", words)
        (shared,) = re.findall(r"smem_scratch_bytes=(\d+)", said.with_suffix(".resources.txt").read_text())
        kernels[re.sub(r"_\d+$", "", said.stem)] = Kernel(int(registers), spilled, int(shared))
    assert set(kernels) == {"attention_forward", "attention_dq", "attention_dkv"}
    return kernels


def together(kernel: Kernel, device: Device) -> int:
    """Thread blocks of 128 threads that a processor holds: 65,536 registers; each block takes 1 KiB of its shared memory besides."""
    return min(65536 // (128 * (-(-kernel.registers // 8) * 8)), device.shared_memory_per_core // (kernel.shared + 1024))


@pytest.mark.parametrize("device", [A100, RTX_4090], ids=lambda device: device.name)
@pytest.mark.parametrize("shape", [(1, 8192, 9, 3, 64), (1, 8192, 16, 2, 128), (8, 512, 12, 12, 64, True), (3, 1000, 4, 4, 80)], ids=str)
def test_nothing_spills_and_a_processor_holds_two_thread_blocks(shape, device, tmp_path):
    """They hide each other's latency. The third shape has segments that are seen both ways."""
    for name, kernel in compiled(tmp_path, device, *shape).items():
        assert kernel.spilled == 0, (name, kernel)
        assert together(kernel, device) >= 2, (name, kernel)
        assert kernel.shared <= device.shared_memory_per_block_optin
