"""Atomic writes of report and score files: a reader sees the old file or the complete new one."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

from jaxre.errors import InputError


@contextlib.contextmanager
def replacing(path: Path, fix: str = "name another file") -> Iterator[Path]:
    """Yields a temporary path in the folder of `path`, which is created if missing; the file
    written there replaces `path` on success and is removed otherwise.

    Raises InputError, with `fix` as advice, for a file that cannot be written.
    """
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield partial
        partial.replace(path)
    except OSError as error:
        raise InputError(f"{path}: cannot be written ({error.strerror}); {fix}") from None
    finally:
        with contextlib.suppress(OSError):
            partial.unlink()
