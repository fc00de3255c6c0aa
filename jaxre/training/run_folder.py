"""The folder of a run: whose it is, and that one process at a time trains in it."""

from __future__ import annotations

import fcntl
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from jaxre.config import Config, load_config, save_config
from jaxre.errors import InputError

LOCK = ".lock"
FREE_ON_RESUME = {
    *("output", "mesh", "kernels", "data.cache", "data.test", "predict"),
    *("train.log_every", "train.keep", "train.checkpoint_every", "train.remat", "train.memory_gb"),
}


@contextmanager
def run_folder(config: Config, first_process: bool) -> Iterator[Path]:
    """The run folder with its `config.yaml`, locked until the block ends or the process dies.

    A run may go on with what does not change what it computes (FREE_ON_RESUME): another place,
    mesh, kernel, cache, test data, log or checkpoint interval, memory policy.

    Raises:
      InputError: the folder holds another run's config (names the first setting that differs), is
        no run folder, or another process trains in it.
    """
    run, lock, refused = config.run_folder, None, None
    if first_process:  # the others would meet what this one has just written
        try:
            lock = _claim(config, run)
        except InputError as error:
            refused = error
    if jax.process_count() > 1 and multihost_utils.broadcast_one_to_all(
        np.int32(refused is not None)
    ):
        raise refused or InputError(f"{run}: refused by the first process; see what that one says")
    if refused:
        raise refused
    try:
        yield run
    finally:
        if lock:
            lock.close()


def _claim(config: Config, run: Path) -> IO[str]:
    """Locks the folder, checks it and writes its `config.yaml`; returns the lock. Raises
    InputError.
    """
    saved = run / "config.yaml"
    if (
        run.exists()
        and not saved.is_file()
        and not (run.is_dir() and all(path.name == LOCK for path in run.iterdir()))
    ):
        raise InputError(
            f"{run}: exists and is not a run folder; remove it or name another (output=...,"
            " name=...)"
        )
    lock = None
    try:
        run.mkdir(parents=True, exist_ok=True)
        lock = (run / LOCK).open("a")
        _lock(lock, run)
        differing = saved.is_file() and first_difference(
            load_config(saved).model_dump(), config.model_dump()
        )
        if differing:
            raise InputError(
                f"{run}: holds a run with another {differing}; remove it, or give this one another"
                " name (name=...)"
            )
        save_config(config, saved)
    except (InputError, OSError) as error:
        if lock:
            lock.close()
        if isinstance(error, InputError):
            raise
        raise InputError(
            f"{run}: cannot be made ({error.strerror}); name a folder that can be written"
            " (output=...)"
        ) from None
    return lock


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """A folder, made if it is not there, for one process until the block ends or the process dies.
    Raises InputError.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = (folder / LOCK).open("a")
    except OSError as error:
        raise InputError(
            f"{folder}: cannot be made ({error.strerror}); name a folder that can be written"
            " (output=...)"
        ) from None
    with lock:
        _lock(lock, folder)
        yield


def _lock(lock: IO[str], run: Path) -> None:
    try:
        # the kernel gives it back however the process ends
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise InputError(
            f"{run}: another process trains in it; wait for it, or give this one another name"
            " (name=...)"
        ) from None
    except OSError as error:
        raise InputError(
            f"{run}: cannot be locked ({error.strerror}); name a folder on another file system"
            " (output=...)"
        ) from None


def first_difference(old: Any, new: Any, place: str = "") -> str | None:
    """Dotted name of the first setting that differs and may not, or None."""
    if place in FREE_ON_RESUME or old == new:
        return None
    if not (isinstance(old, dict) and isinstance(new, dict)):
        return f"{place} ({old!r}, now {new!r})"
    parts = (
        first_difference(old.get(key), new.get(key), f"{place}.{key}" if place else key)
        for key in {**old, **new}
    )
    return next((part for part in parts if part), None)
