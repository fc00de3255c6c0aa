"""The memory of a process whose devices are CPU cores."""

from __future__ import annotations

import ctypes
import os
import sys
from importlib import metadata
from importlib.util import find_spec

M_ARENA_MAX, M_MMAP_MAX, M_TRIM_THRESHOLD = -8, -4, -1  # glibc's malloc.h


def keep_freed_memory() -> None:
    """Where devices can only be CPU cores, keeps what an update frees for the next one; else every
    page is asked for, and zeroed, again.

    XLA allocates each update's outputs and temporary arrays anew, and glibc gives allocations of
    their size back to the kernel at once. All threads then share malloc's main arena: in another
    one, what is larger than its 64 MiB is never kept. What a process holds stays at its peak. To be
    called before numpy and jax are imported, as a thread keeps the arena that it has.

    MALLOC_ARENA_MAX, MALLOC_MMAP_MAX_ or MALLOC_TRIM_THRESHOLD_ in the environment have the last
    word; with accelerators, and without glibc, nothing is changed.
    """
    if sys.platform != "linux" or not _only_cpu_cores():
        return
    if any(
        name in os.environ
        for name in ("MALLOC_ARENA_MAX", "MALLOC_MMAP_MAX_", "MALLOC_TRIM_THRESHOLD_")
    ):
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(M_ARENA_MAX, 1)
        mallopt(M_MMAP_MAX, 0)
        mallopt(M_TRIM_THRESHOLD, -1)  # no threshold


def _only_cpu_cores() -> bool:
    """Whether JAX is told to use CPU cores, or has no plugin for anything else."""
    if told := os.environ.get("JAX_PLATFORMS"):
        return told == "cpu"
    return not metadata.entry_points(group="jax_plugins") and not any(
        map(find_spec, ("jax_plugins", "libtpu"))
    )
