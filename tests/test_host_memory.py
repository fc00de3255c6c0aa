"""What is freed stays with the process."""

from __future__ import annotations

import ctypes
import io
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from rich.console import Console

from jaxre import cli, host_memory
from jaxre.config import load_config
from jaxre.profiling import prepared
from jaxre.study import execute
from jaxre.training import loop
from jaxre.training.loop import train

QUICKSTART = Path(__file__).resolve().parents[1] / "configs" / "quickstart.yaml"
SCRIPT = """
import ctypes, os
from pathlib import Path
from jaxre.host_memory import keep_freed_memory
keep_freed_memory()
libc = ctypes.CDLL(None)
libc.malloc.restype = ctypes.c_void_p
resident = lambda: int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
before, size = resident(), 1 << 28
for _ in range(2):
    held = ctypes.c_void_p(libc.malloc(ctypes.c_size_t(size)))
    ctypes.memset(held, 1, size)
    libc.free(held)
print((resident() - before) / size)
"""


@pytest.mark.skipif(
    sys.platform != "linux" or not hasattr(ctypes.CDLL(None), "mallopt"), reason="memory is kept where malloc is glibc's, on Linux"
)
@pytest.mark.parametrize("setting, kept", [({}, True), ({"MALLOC_TRIM_THRESHOLD_": "131072"}, False)], ids=["alone", "told otherwise"])
def test_what_is_freed_stays_with_the_process(setting, kept):
    others = {name: value for name, value in os.environ.items() if not name.startswith("MALLOC_")}
    done = subprocess.run([sys.executable, "-c", SCRIPT], env=others | {"JAX_PLATFORMS": "cpu"} | setting, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert (float(done.stdout) > 0.9) == kept


class Reached(Exception):
    """Raised in place of what is asked for."""


def train_quickstart() -> None:
    train(load_config(QUICKSTART, ["mesh.cpu_devices=null"]))


def prepare_quickstart() -> None:
    prepared.prepare(load_config(QUICKSTART, ["mesh.cpu_devices=null"]))


def predict_text() -> None:
    cli.app(["predict", "facts-base", "--text", "<e1>a</e1> <e2>b</e2>"], standalone_mode=False)


def start_study() -> None:
    execute.study(SimpleNamespace(), Console(file=io.StringIO()))


@pytest.mark.parametrize(
    ("module", "start"),
    [(loop, train_quickstart), (prepared, prepare_quickstart), (host_memory, predict_text), (execute, start_study)],
    ids=["train", "profile", "predict", "study"],
)
def test_training_profiling_prediction_and_studies_keep_it(module, start, monkeypatch):
    def reached():
        raise Reached

    monkeypatch.setattr(execute, "make_plan", lambda settings: None)
    monkeypatch.setattr(execute, "plan_table", lambda plan: "")
    monkeypatch.setattr(module, "keep_freed_memory", reached)
    with pytest.raises(Reached):
        start()
