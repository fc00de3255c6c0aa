"""The folder of a run: belongs to one config and is locked by the process that trains in it."""

from __future__ import annotations

import fcntl
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
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

    A run may be resumed with other settings that do not change what it computes (FREE_ON_RESUME):
    place, mesh, kernels, cache, test data, intervals of log and checkpoints, memory policy.

    Raises:
      InputError: the folder holds the config of another run (names the first setting that differs),
        is not a run folder, or another process trains in it.
    """
    run, lock, refusal = config.run_folder, None, None
    if first_process:  # the others would find the config that this process has just written
        try:
            lock = _claim(config, run)
        except InputError as error:
            refusal = error
    if jax.process_count() > 1 and multihost_utils.broadcast_one_to_all(
        np.int32(refusal is not None)
    ):
        raise refusal or InputError(f"{run}: refused by the first process; see its message")
    if refusal:
        raise refusal
    try:
        yield run
    finally:
        if lock:
            lock.close()


def _claim(config: Config, run: Path) -> IO[str]:
    """Locks and checks the folder and writes its `config.yaml`; returns the lock.

    Raises InputError.
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
    with ExitStack() as on_error, _writable(run):
        run.mkdir(parents=True, exist_ok=True)
        lock = on_error.enter_context((run / LOCK).open("a"))
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
        on_error.pop_all()
    return lock


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Makes a folder and locks it until the block ends or the process dies. Raises InputError."""
    with _writable(folder):
        folder.mkdir(parents=True, exist_ok=True)
        lock = (folder / LOCK).open("a")
    with lock:
        _lock(lock, folder)
        yield


@contextmanager
def _writable(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise InputError(
            f"{folder}: cannot be made ({error.strerror}); name a folder that can be written"
            " (output=...)"
        ) from None


def _lock(lock: IO[str], run: Path) -> None:
    try:
        # the kernel releases it however the process ends
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
    """Dotted name and values of the first setting that differs and is not free, or None."""
    if place in FREE_ON_RESUME or old == new:
        return None
    if not (isinstance(old, dict) and isinstance(new, dict)):
        return f"{place} ({old!r}, now {new!r})"
    differences = (
        first_difference(old.get(key), new.get(key), f"{place}.{key}" if place else key)
        for key in {**old, **new}
    )
    return next(filter(None, differences), None)
