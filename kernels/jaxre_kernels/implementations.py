"""Chooses which implementation of an op runs; the basis of every op's `choose`.

An implementation requested by name runs. Otherwise the table selects the fastest one measured on
that kind of device for such arrays, and "xla" runs where it has no entry. The table (`table.json`
beside this file) holds measurements only: `tools/tune_kernels.py` writes it from a run on the
device.
"""

from __future__ import annotations

import importlib
import importlib.util
import itertools
import json
from collections.abc import Callable, Collection, Iterable, Mapping
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

UNVERIFIED = {
    "pallas_tpu": "it has not run on a TPU",
    "pallas_gpu": "it has not run on a GPU",
    "pallas_gpu_sm80": "it has not run on a GPU",
}
TABLE = Path(__file__).with_name("table.json")


class Hardware(NamedTuple):
    """Target of a kernel: JAX's name of the platform, and, for GPUs, the lowest and the highest
    compute capability.
    """

    description: str
    platform: str
    least: tuple[int, int] = (0, 0)
    most: tuple[int, int] = (99, 0)


HARDWARE = {
    "pallas_tpu": Hardware("a TPU", "tpu"),
    "pallas_gpu": Hardware("a Hopper GPU", "gpu", (9, 0), (9, 0)),
    "pallas_gpu_sm80": Hardware("an Ampere or Ada GPU", "gpu", (8, 0), (8, 9)),
}


def runs_on(name: str, device: jax.Device) -> bool:
    """Returns whether an implementation was written for such a device; "xla" is for all."""
    if name not in HARDWARE:
        return True
    hardware = HARDWARE[name]
    # "cuda" is the name of a device that is compiled for but absent
    platform = device.platform.replace("cuda", "gpu")
    capability = tuple(map(int, getattr(device, "compute_capability", "0.0").split(".")))
    return platform == hardware.platform and hardware.least <= capability <= hardware.most


class Entry(NamedTuple):
    """The fastest correct implementation on one kind of device, for arrays of one dtype whose sizes
    lie within bounds.

    op: name of its folder. device_kind: JAX's name ("NVIDIA H200"). dtype: of the arrays that are
    multiplied. sizes: name -> (least, most), both included; other sizes are unrestricted. tiles:
    tile sizes by name, keyword arguments of the implementation; empty for its own choice. date: ISO
    8601, of the run. gain: seconds of "xla" with its own tiles divided by those of this
    implementation, forward and backward. error: max|difference| / max|reference| against the plain
    formula in f32, the largest over results and gradients.
    """

    op: str
    device_kind: str
    dtype: str
    sizes: dict[str, tuple[int, int]]
    implementation: str
    tiles: dict[str, int]
    date: str
    gain: float
    error: float

    @property
    def arrays(self) -> tuple:
        """Identifies the arrays; a new measurement of the same arrays replaces this one."""
        return self.op, self.device_kind, self.dtype, tuple(sorted(self.sizes.items()))

    def described(self) -> str:
        tiles = (
            f" ({', '.join(f'{name} {size}' for name, size in self.tiles.items())})"
            if self.tiles
            else ""
        )
        gain = f"{self.gain:.2f} x xla without the table, error {self.error:.0e}"
        return (
            f"{self.implementation}{tiles}, measured on {self.device_kind} on {self.date}: {gain}"
        )

    def where(self) -> str:
        """The arrays it covers, in words."""
        bounds = (
            f"{name} {low:,}" + (f" to {high:,}" if high > low else "")
            for name, (low, high) in self.sizes.items()
        )
        return ", ".join([self.dtype, *bounds])


def overlap(first: Entry, second: Entry) -> bool:
    """Returns whether some arrays are covered by both entries."""
    if (first.op, first.device_kind, first.dtype) != (second.op, second.device_kind, second.dtype):
        return False
    both = first.sizes.keys() & second.sizes.keys()
    return all(
        first.sizes[name][0] <= second.sizes[name][1]
        and second.sizes[name][0] <= first.sizes[name][1]
        for name in both
    )


def checked(entries: Iterable[Entry]) -> tuple[Entry, ...]:
    """The entries of a table, sorted.

    Raises:
      ValueError: bounds that contain no size, or two entries that cover the same arrays.
    """
    ordered = tuple(sorted(entries, key=lambda entry: entry.arrays))
    for entry in ordered:
        for name, (low, high) in entry.sizes.items():
            if low > high:
                raise ValueError(
                    f"table of implementations: {entry.op}: no {name} lies between {low} and {high}"
                )
    for first, second in itertools.combinations(ordered, 2):
        if overlap(first, second):
            raise ValueError(
                f"table of implementations: {first.op} on {first.device_kind}: {first.where()}"
                f" overlaps {second.where()}"
            )
    return ordered


@cache
def read_table(path: Path = TABLE) -> tuple[Entry, ...]:
    """Reads a table. Raises ValueError as `checked` does."""
    entries = [Entry(**entry) for entry in json.loads(path.read_text(encoding="utf-8"))]
    return checked(
        entry._replace(
            sizes={name: (int(low), int(high)) for name, (low, high) in entry.sizes.items()}
        )
        for entry in entries
    )


def write_table(path: Path, entries: Iterable[Entry]) -> None:
    """Writes a table. Raises ValueError as `checked` does, before anything is written."""
    path.write_text(
        json.dumps([entry._asdict() for entry in checked(entries)], indent=1) + "\n",
        encoding="utf-8",
    )


def measured(
    op: str,
    device_kind: str | None,
    dtype: DTypeLike,
    sizes: Mapping[str, int],
    entries: Collection[Entry] | None = None,
) -> Entry | None:
    """The table's entry for such arrays; None if there is none, or the device is unknown.

    Args:
      device_kind: `device.device_kind` of the target device, known from the mesh.
      dtype: of the arrays that are multiplied; sizes: by the op's names for them.
      entries: the committed table by default.
    """
    if device_kind is None:
        return None
    measurement = op, device_kind, jnp.dtype(dtype).name
    for entry in read_table() if entries is None else entries:
        if (entry.op, entry.device_kind, entry.dtype) == measurement and all(
            name in sizes and low <= sizes[name] <= high
            for name, (low, high) in entry.sizes.items()
        ):
            return entry
    return None


def named(
    op: str,
    implementation: str | None,
    there: Collection[str],
    entry: Entry | None = None,
    unsupported: Callable[[str], str | None] = lambda name: None,
) -> tuple[str, str]:
    """The implementation's name, and the reason in words, which says if it is unverified.

    Args:
      op: for the error; there: the names that exist.
      entry: the table's for such arrays. Without it, and without a requested implementation, "xla"
        runs.
      unsupported: name -> why it does not support such arrays, None if it does. Called for the
        table's choice only; callers refuse unsupported requests themselves.

    Raises:
      ValueError: an implementation that does not exist.
    """
    if implementation is None:
        if entry is not None and entry.implementation in there:
            refusal = unsupported(entry.implementation)
            if refusal is None:
                return entry.implementation, f"the table's: {entry.described()}"
            return "xla", f"the table's {entry.implementation} does not take this: {refusal}"
        if opt_in := [name for name in there if name in UNVERIFIED]:
            return "xla", f"the default; opt-in, unverified: {', '.join(opt_in)}"
        return "xla", "the only implementation there is"
    if implementation not in there:
        raise ValueError(
            f"{op} implementation {implementation!r} does not exist; there is {', '.join(there)}"
        )
    if entry is not None and entry.implementation == implementation:
        return implementation, f"asked for; {entry.described()}"
    unverified = (
        f"; unverified, {UNVERIFIED[implementation]}" if implementation in UNVERIFIED else ""
    )
    return implementation, f"asked for{unverified}"


def kernels_of(op: str, name: str) -> ModuleType:
    """Imports the module of an op's implementation `name`: "pallas_tpu" is `tpu.py`, "pallas_gpu"
    `gpu.py`.

    Imported only on use: Pallas takes half a second to import, and much of it is experimental, so
    callers that do not use it must not fail with it.
    """
    return importlib.import_module(f"jaxre_kernels.{op}.{name.removeprefix('pallas_')}")


def tiles_of(entry: Entry | None, name: str) -> dict[str, Any]:
    """The table's tile sizes for this implementation, as keyword arguments; empty if the
    implementation chooses them itself.
    """
    return dict(entry.tiles) if entry is not None and entry.implementation == name else {}


def implementations_of(op: str) -> tuple[str, ...]:
    """Names of an op's implementations, from its dispatch; an op without a dispatch is plain XLA.
    NF4 weights use those of the LoRA projections.
    """
    dispatch = f"jaxre_kernels.{'lora' if op == 'nf4' else op}.dispatch"
    return (
        tuple(importlib.import_module(dispatch).IMPLEMENTATIONS)
        if importlib.util.find_spec(dispatch)
        else ("xla",)
    )


def verdict(op: str, device_kind: str) -> str:
    """Describes the table's entries for an op on a kind of device, for any arrays."""
    default = ": ".join(named(op, None, implementations_of(op)))
    entries = [
        f"{entry.where()}: {entry.described()}"
        for entry in read_table()
        if (entry.op, entry.device_kind) == (op, device_kind)
    ]
    return (
        "; ".join([*entries, f"else {default}"])
        if entries
        else f"{default}; nothing was measured on {device_kind}"
    )
