"""Shared by all tests: environment, marks, and the real data and models beside the repository.

A test that needs absent data or models is skipped with the reason; if the variable CI is set it
fails, so that no pipeline is green because nothing was tested.
"""

from __future__ import annotations

import atexit
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

# Before JAX is imported. The tests of a run share a compilation cache (many train the same tiny
# model), separate from the user's.
if "PYTEST_XDIST_WORKER" not in os.environ:
    os.environ["JAX_COMPILATION_CACHE_DIR"] = tempfile.mkdtemp(prefix="jaxre-tests-")
    atexit.register(shutil.rmtree, os.environ["JAX_COMPILATION_CACHE_DIR"], ignore_errors=True)
# Nothing is measured, and ground truth is f32.
os.environ["JAXRE_CPU_DTYPE"] = "float32"
# Most of the time goes to compiling programs that run on little data.
os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_backend_optimization_level=1"
# XLA's older code generator for CPU fusions takes two thirds of the time; jax 0.12 lacks it.
if version("jaxlib").startswith("0.10."):
    os.environ["XLA_FLAGS"] += " --xla_cpu_use_fusion_emitters=false"


# Folders and files without array programs: testing them on another JAX shows nothing new.
WITHOUT_ARRAYS = {
    "relations",
    "data",
    "evaluation",
    "study",
    "profiling",
    "tools",
    "test_config.py",
    "test_quickstart.py",
}
# Files in these folders that run packed rows through a model.
WITH_ARRAYS = {"test_packed_gradients.py", "test_shared_gradients.py"}


# Runs first, so that `-m` knows the mark.
@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Puts the longest files first, so that no processor idles at the end, and marks tests without
    arrays as `once`.
    """
    for item in items:
        if (
            item.path.relative_to(ROOT / "tests").parts[0] in WITHOUT_ARRAYS
            and item.path.name not in WITH_ARRAYS
        ):
            item.add_marker("once")
        if (
            item.get_closest_marker("slow")
            and not item.get_closest_marker("aot")
            and hasattr(item.module, "torch")
        ):
            raise pytest.UsageError(
                f"{item.nodeid}: slow tests run on the second jax line, where torch is not, so this"
                " one ran nowhere"
            )
    items.sort(key=lambda item: "training" not in item.path.parts)
    if config.getoption("--one-case"):
        _deselect_further_cases(config, items)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--one-case",
        action="store_true",
        help="run each parametrised test function on its first case; slow ones on all",
    )


def _deselect_further_cases(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Keeps one case of each test function: what another JAX changes shows in any of them."""
    seen: set[str] = set()
    further = []
    for item in items:
        function = item.nodeid.partition("[")[0]
        if function in seen and not item.get_closest_marker("slow"):
            further.append(item)
        seen.add(function)
    if further:
        config.hook.pytest_deselected(items=further)
        items[:] = [item for item in items if item not in set(further)]


@pytest.fixture(scope="module", autouse=True)
def _programs_are_dropped() -> Iterator[None]:
    """Drops compiled programs after each file: each takes several memory mappings, Linux allows a
    process 65,530, and whole runs without this came to 53,000.
    """
    yield
    if "jax" in sys.modules:
        sys.modules["jax"].clear_caches()


def _shared(name: str, variable: str) -> Path:
    folder = Path(os.environ.get(variable) or ROOT.parent / "shared" / name)
    if not folder.is_dir():
        reason = f"{folder} is not there; set {variable} to the folder of the real {name}"
        if os.environ.get("CI"):
            pytest.fail(reason, pytrace=False)
        pytest.skip(reason)
    return folder


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Folder of the real benchmarks: JAXRE_DATA, else ../shared/data beside the repository."""
    return _shared("data", "JAXRE_DATA")


@pytest.fixture(scope="session")
def shared_models() -> Path:
    """Folder of real tokenizers and weights: JAXRE_MODELS, else ../shared/models beside the
    repository.
    """
    return _shared("models", "JAXRE_MODELS")
