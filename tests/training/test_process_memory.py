"""What a process that trains on CPU cores holds: its base once, one update's temporary arrays."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = """
import json, sys
from jaxre.host_memory import keep_freed_memory, resident
keep_freed_memory()
import jax, numpy as np
from jaxre.config import load_config
from jaxre.profiling.memory import reset_resident_peak, resident_peak
from jaxre.profiling.prepared import prepare
from jaxre.training.loop import temporary_bytes
run = prepare(load_config(sys.argv[1], sys.argv[2:]))
jax.block_until_ready(run.initial.state)
held, base = resident(), sum(leaf.nbytes for leaf in jax.tree.leaves(run.initial.base))
arrays = sum(array.nbytes for array in jax.live_arrays())
expected = held + temporary_bytes(run.compiled, run.mesh)
reset_resident_peak()
for _ in range(6):
    metrics = run.update(run.next_rows())
jax.block_until_ready(metrics)
print(json.dumps({
    "held": held, "base": base, "arrays": arrays, "expected": expected, "peak": resident_peak(),
    "temporary": expected - held,
}))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_process_peaks_at_what_is_printed_and_holds_its_base_once(tmp_path: Path):
    """Six updates whose temporary arrays are most of what the process takes: with two updates'
    at a time, or three, the peak is 1.5 or more of what is printed.
    """
    settings = [
        "data.train.limit=300",
        f"data.cache={tmp_path}",
        "train.batch_tokens=8192",
        "train.row_length=512",
        "mesh.cpu_devices=1",
    ]
    config = Path(__file__).resolve().parents[2] / "configs" / "quickstart-tiny.yaml"
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(config), *settings],
        env=os.environ | {"JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["temporary"] > 1 << 26, found
    assert found["arrays"] < 1.6 * found["base"], found
    assert found["peak"] <= 1.15 * found["expected"], found
