"""Contents of an installed package."""

from __future__ import annotations

import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def test_every_package_is_installed() -> None:
    setuptools = pytest.importorskip(
        "setuptools", reason="not in every environment; .venv of Python 3.11 has it"
    )
    find = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"][
        "find"
    ]
    installed = {
        package
        for where in find["where"]
        for package in setuptools.find_packages(str(ROOT / where), include=find["include"])
    }
    packages = {
        ".".join(file.parent.relative_to(ROOT / where).parts)
        for where, package in ((".", "jaxre"), ("kernels", "jaxre_kernels"))
        for file in (ROOT / where / package).rglob("*.py")
    }
    assert installed == packages and "jaxre.study" in installed
