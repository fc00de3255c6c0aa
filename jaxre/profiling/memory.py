"""Peak memory of a device, or of this process where the device is the CPU."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import jax


def peak_memory(device: jax.Device) -> int:
    """Bytes: peak of the device's memory, or on a CPU the peak resident size of this process."""
    stats = device.memory_stats() or {}
    return stats["peak_bytes_in_use"] if "peak_bytes_in_use" in stats else resident_peak()


def resident_peak() -> int:
    """Bytes: peak resident size of this process, since `reset_resident_peak` (Linux, proc(5))."""
    (line,) = (
        line
        for line in Path("/proc/self/status").read_text().splitlines()
        if line.startswith("VmHWM")
    )
    return int(line.split()[1]) * 1024


def reset_resident_peak() -> None:
    """Sets the peak resident size of this process back to what it is now (Linux, proc(5))."""
    Path("/proc/self/clear_refs").write_text("5")
