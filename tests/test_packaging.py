"""What is installed, where it is not from this folder itself."""

from __future__ import annotations

import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def test_every_room_is_installed() -> None:
    setuptools = pytest.importorskip(
        "setuptools", reason="not in every environment; .venv of Python 3.11 has it"
    )
    find = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"][
        "find"
    ]
    found = {
        package
        for where in find["where"]
        for package in setuptools.find_packages(str(ROOT / where), include=find["include"])
    }
    rooms = {
        ".".join(file.parent.relative_to(ROOT / where).parts)
        for where, package in ((".", "jaxre"), ("kernels", "jaxre_kernels"))
        for file in (ROOT / where / package).rglob("*.py")
    }
    assert found == rooms and "jaxre.study" in found
