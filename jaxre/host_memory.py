"""The memory of a process whose devices are CPU cores."""

from __future__ import annotations

import ctypes
import os
import sys
import time
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import Any

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


# Bytes of temporary arrays from which updates wait for each other's; smaller ones take so little
# time that a wait of milliseconds would show.
WORTH_WAITING = 1 << 26
SETTLING = 4  # updates
PATIENCE = 0.05  # seconds; 3 to 8 ms were needed (2026-11-30)


class _Mallinfo2(ctypes.Structure):
    _fields_ = tuple(
        (name, ctypes.c_size_t)
        for name in (
            "arena",
            "ordblks",
            "smblks",
            "hblks",
            "hblkhd",
            "usmblks",
            "fsmblks",
            "uordblks",
            "fordblks",
            "keepcost",
        )
    )


class TemporaryMemory:
    """Keeps a process on CPU cores to one update's temporary arrays at a time.

    XLA frees these some milliseconds after an update's results are there, and what is begun before
    that allocates its own beside them; freed memory is kept (`keep_freed_memory`), so a process
    whose updates need 2,051 MiB grew to 6,603 in three of them (135M parameters, 2,048 tokens,
    bf16), and stays at 1,307 where it grew to 2,277 (6 layers of it; 2026-11-30).
    """

    def __init__(self, temporary: int, platform: str, devices: int = 1):
        """To be made before the first update. temporary: bytes of an update on all `devices`."""
        self.less_than_one = temporary // (2 * devices)
        self.waits = platform == "cpu" and temporary >= WORTH_WAITING
        self.before = allocated()
        self.most = resident() + temporary + temporary // 4
        self.waited = 0

    def wait(self, results: Any) -> None:
        """Waits for an update that gives `results`, and until its temporary arrays are freed."""
        if not self.waits:
            return
        import jax

        jax.block_until_ready(results)
        if self.before is None:
            return
        until = time.perf_counter() + PATIENCE
        while (now := allocated()) > self.before + self.less_than_one:
            if time.perf_counter() > until:  # something else has come to stay
                self.before = now - self.less_than_one
                return
            time.sleep(0.001)
        # Aligning an array takes more than the array: where something small has come to lie beside
        # a place that is free again, the next array goes behind it. All free pages are given back
        # while places settle, and later when more is held than an update needs; asking for them
        # again takes an eighth of an update.
        self.waited += 1
        if self.waited <= SETTLING or resident() > self.most:
            ctypes.CDLL(None).malloc_trim(0)


def allocated() -> int | None:
    """Bytes that malloc has given out; None where that is not known (glibc before 2.33, others)."""
    if sys.platform != "linux":
        return None
    mallinfo2 = getattr(ctypes.CDLL(None), "mallinfo2", None)
    if mallinfo2 is None:
        return None
    mallinfo2.restype = _Mallinfo2
    found = mallinfo2()
    return found.uordblks + found.hblkhd


def resident() -> int:
    """Bytes of this process that are in memory now; 0 where that is not known (not on Linux)."""
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
    except OSError:
        return 0
    return pages * os.sysconf("SC_PAGE_SIZE")


def _only_cpu_cores() -> bool:
    """Whether JAX is told to use CPU cores, or has no plugin for anything else."""
    if told := os.environ.get("JAX_PLATFORMS"):
        return told == "cpu"
    return not metadata.entry_points(group="jax_plugins") and not any(
        map(find_spec, ("jax_plugins", "libtpu"))
    )
