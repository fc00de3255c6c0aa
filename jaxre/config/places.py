"""Folders of the shipped files and of the real benchmarks."""

from __future__ import annotations

import os
from importlib import resources
from pathlib import Path


def shipped(name: str) -> Path:
    """Path of a shipped file or folder, such as "corpus", "facts-base" or "published.json"."""
    return Path(str(resources.files("jaxre"))) / "assets" / name


def data_root() -> Path:
    """Folder of the real benchmarks: JAXRE_DATA, else ../shared/data."""
    return Path(os.environ.get("JAXRE_DATA", "../shared/data"))
