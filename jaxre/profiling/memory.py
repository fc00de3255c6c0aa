"""Peak memory of a device, or of this process where the device is the CPU."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import jax


def peak_memory(device: jax.Device) -> int:
    """Peak memory of the device in bytes; on a CPU the peak resident size of this process."""
    stats = device.memory_stats() or {}
    return stats["peak_bytes_in_use"] if "peak_bytes_in_use" in stats else resident_peak()


def resident_peak() -> int:
    """Peak resident size of this process in bytes, since `reset_resident_peak` (Linux, proc(5))."""
    _, _, rest = Path("/proc/self/status").read_text().partition("VmHWM:")
    return int(rest.split()[0]) * 1024


def reset_resident_peak() -> None:
    """Resets the peak resident size of this process to its current size (Linux, proc(5))."""
    Path("/proc/self/clear_refs").write_text("5")
