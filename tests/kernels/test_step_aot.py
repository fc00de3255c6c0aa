"""The whole LoRA and QLoRA update, kernels on and sharded, compiled ahead of time for chips that
are not here: bytes a chip at its peak.

`tools/test --aot` installs the compilers. "Compiles" says nothing of speed, nor that it runs.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import jax
import pytest
from gpu_compilation import H200, PLUGIN

# Where CI is set they fail instead, so that no pipeline is green because nothing was compiled.
needs_libtpu = pytest.mark.skipif(
    find_spec("libtpu") is None and not os.environ.get("CI"),
    reason="libtpu is not installed; tools/test --aot installs it",
)
needs_plugin = pytest.mark.skipif(
    not PLUGIN and not os.environ.get("CI"),
    reason="jax's CUDA plugin is not installed; tools/test --aot installs it",
)
needs_mosaic_gpu = pytest.mark.skipif(
    jax.__version_info__ < (0, 11), reason="kernels for GPUs need jax 0.11"
)
pytestmark = pytest.mark.aot

ROOT = Path(__file__).parents[2]
FIELDS = {
    "model_type": "qwen2",
    "hidden_act": "silu",
    "vocab_size": 151936,
    "max_position_embeddings": 32768,
    "rms_norm_eps": 1e-6,
}
FIELDS |= {"rope_theta": 1e6, "num_key_value_heads": 2, "tie_word_embeddings": True}
MODELS = {
    "0.5B": (
        FIELDS
        | {
            "hidden_size": 896,
            "intermediate_size": 4864,
            "num_hidden_layers": 24,
            "num_attention_heads": 14,
        }
    ),
    "3B": (
        FIELDS
        | {
            "hidden_size": 2048,
            "intermediate_size": 11008,
            "num_hidden_layers": 36,
            "num_attention_heads": 16,
        }
    ),
}
RANKS = {"0.5B": 32, "3B": 64}  # the study's
OPS = ("attention", "lora", "cross_entropy")
LENGTH, SUPERVISED = 4096, 512


def compiled_step(
    target: str, model: str, quantise: str | None, rows: int, kernel: str, mesh: dict[str, int]
) -> dict:
    """What `step_program.step` finds; each in a process of its own, for libtpu holds what it was
    started with.
    """
    settings = {
        "name": "step",
        "model": {"path": "none", "quantise": quantise},
        "data": {"train": {"dataset": "facts"}},
        "lora": {"rank": RANKS[model], "alpha": 2 * RANKS[model]},
        "train": {"row_length": LENGTH, "batch_tokens": LENGTH * rows, "remat": "block"},
        "mesh": mesh,
        "kernels": dict.fromkeys(OPS, kernel),
    }
    case = {
        "target": target,
        "model": MODELS[model],
        "rows": rows,
        "length": LENGTH,
        "supervised": SUPERVISED,
        "settings": settings,
    }
    flags = {"JAX_PLATFORMS": "cpu", "TPU_SKIP_MDS_QUERY": "1", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1"}
    environment = os.environ | flags | {"PYTHONPATH": f"{ROOT}:{ROOT / 'kernels'}"}
    program = [sys.executable, Path(__file__).with_name("step_program.py"), json.dumps([case])]
    done = subprocess.run(program, env=environment, capture_output=True, text=True, timeout=1800)
    assert done.returncode == 0, done.stderr[-4000:]
    (found,) = (
        json.loads(line.removeprefix("STEP "))
        for line in done.stdout.splitlines()
        if line.startswith("STEP ")
    )
    print(
        f"{target[:8]} {model} {quantise}: {found['peak'] / 2**20:,.0f} MiB at the peak,"
        f" {found['arguments'] / 2**20:,.0f} of arguments"
    )
    assert set(found["kernels"]) == set(OPS)
    assert all(told.startswith(kernel) for chosen in found["kernels"].values() for told in chosen)
    return found


# MiB a chip, measured (jax 0.12.0.1): one row of 4,096 on each of eight chips, weights split over
# them, but NF4 weights whole on each.
TPU_PEAKS = {("0.5B", None): 1162, ("0.5B", "nf4"): 1266, ("3B", None): 3602, ("3B", "nf4"): 4292}


def cases(peaks: dict) -> list:
    """The smallest and the largest; what lies between in `pytest -m aot` alone, for each takes
    minutes.
    """
    return [
        pytest.param(
            *case, marks=[] if case in (("0.5B", None), ("3B", "nf4")) else pytest.mark.slow
        )
        for case in peaks
    ]


@needs_libtpu
@pytest.mark.parametrize(("model", "quantise"), cases(TPU_PEAKS))
def test_a_sharded_update_fits_a_v5e_with_every_kernel_on(model, quantise):
    if jax.__version_info__ < (0, 11) and (model, quantise) != ("0.5B", None):
        pytest.skip("one of these is enough for the first jax line; the second has all")
    found = compiled_step("v5e:2x4", model, quantise, 8, "pallas_tpu", {"fsdp": 8})
    assert found["peak"] < 1.05 * TPU_PEAKS[model, quantise] * 2**20


# MiB, measured: eight rows of 4,096. jax 0.12.0.1; the oldest for Python 3.12, 0.11.2, takes 5,311
# for the first.
GPU_PEAKS = {("0.5B", None): 4884, ("0.5B", "nf4"): 4394, ("3B", None): 16929, ("3B", "nf4"): 13126}


@needs_mosaic_gpu
@needs_plugin
@pytest.mark.parametrize(("model", "quantise"), cases(GPU_PEAKS))
def test_an_update_fits_an_h200_with_every_kernel_on(tmp_path, model, quantise):
    (tmp_path / "h200").write_text(H200)
    found = compiled_step(str(tmp_path / "h200"), model, quantise, 8, "pallas_gpu", {})
    room = 1.05 if jax.__version_info__ >= (0, 12) else 1.1
    assert found["peak"] < room * GPU_PEAKS[model, quantise] * 2**20
