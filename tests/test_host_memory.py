"""On a CPU, freed memory stays with the process."""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys
from importlib import metadata
from importlib.util import find_spec

import pytest

SCRIPT = """
import ctypes, os, threading
from pathlib import Path
from jaxre.host_memory import keep_freed_memory
keep_freed_memory()
libc = ctypes.CDLL(None)
libc.malloc.restype = ctypes.c_void_p
resident = lambda: int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
before, size = resident(), 1 << 28
def use():
    held = ctypes.c_void_p(libc.malloc(ctypes.c_size_t(size)))
    ctypes.memset(held, 1, size)
    libc.free(held)
thread = threading.Thread(target=use)  # as XLA does it
thread.start()
thread.join()
print((resident() - before) / size)
"""


ON_GLIBC = pytest.mark.skipif(
    sys.platform != "linux" or not hasattr(ctypes.CDLL(None), "mallopt"),
    reason="memory is kept where malloc is glibc's, on Linux",
)


@ON_GLIBC
@pytest.mark.parametrize(
    ("setting", "kept"),
    [
        ({"JAX_PLATFORMS": "cpu"}, True),
        ({"JAX_PLATFORMS": "cuda,cpu"}, False),
        ({"JAX_PLATFORMS": "cpu", "MALLOC_TRIM_THRESHOLD_": "131072"}, False),
    ],
    ids=["cpu", "accelerator", "set otherwise"],
)
def test_freed_memory_stays_with_the_process(setting, kept):
    done = run_script(setting)
    assert 0.9 < done < 1.1 if kept else done < 0.1


@ON_GLIBC
def test_a_plugin_for_an_accelerator_leaves_memory_as_it_is(tmp_path):
    (tmp_path / "jax_plugins").mkdir()
    path = os.pathsep.join([str(tmp_path), *filter(None, [os.environ.get("PYTHONPATH")])])
    assert run_script({"PYTHONPATH": path, "JAX_PLATFORMS": ""}) < 0.1


@ON_GLIBC
@pytest.mark.skipif(
    bool(
        metadata.entry_points(group="jax_plugins")
        or find_spec("jax_plugins")
        or find_spec("libtpu")
    ),
    reason="JAX has plugins here",
)
def test_without_plugins_nothing_has_to_be_said():
    assert 0.9 < run_script({"JAX_PLATFORMS": ""}) < 1.1


def run_script(setting: dict[str, str]) -> float:
    others = {name: value for name, value in os.environ.items() if not name.startswith("MALLOC_")}
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT], env=others | setting, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return float(done.stdout)


STARTS = """
import sys
from jaxre import cli


class Reached(Exception):
    pass


def reached():
    raise Reached


cli.keep_freed_memory = reached
for command in (
    ["quickstart"],
    ["train", "a.yaml"],
    ["profile", "a.yaml"],
    ["predict", "a"],
    ["study", "a.yaml"],
):
    try:
        cli.app(command, standalone_mode=False)
    except Reached:
        print(command[0], *({"jax", "numpy"} & set(sys.modules)))
"""


def test_commands_that_compute_keep_memory_before_there_are_threads():
    done = subprocess.run([sys.executable, "-c", STARTS], capture_output=True, text=True)
    assert done.stdout.split("\n") == [
        "quickstart",
        "train",
        "profile",
        "predict",
        "study",
        "",
    ], done.stderr
