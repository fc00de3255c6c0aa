"""Which implementation of an op runs: where the `choose` of every op begins.

What is asked for by name runs. Else the table says what was fastest on that kind of device for such
arrays, and where it says nothing "xla" runs. The table (`table.json` beside this file) holds
measurements only: `tools/tune_kernels.py` writes it from a run on the device.
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
    """What a kernel is for: JAX's name of the platform, and, of a GPU, the least and the highest
    compute capability.
    """

    told: str
    platform: str
    least: tuple[int, int] = (0, 0)
    most: tuple[int, int] = (99, 0)


HARDWARE = {
    "pallas_tpu": Hardware("a TPU", "tpu"),
    "pallas_gpu": Hardware("a Hopper GPU", "gpu", (9, 0), (9, 0)),
    "pallas_gpu_sm80": Hardware("an Ampere or Ada GPU", "gpu", (8, 0), (8, 9)),
}


def runs_on(name: str, device: jax.Device) -> bool:
    """Whether an implementation was written for such a device; "xla" is for all."""
    if name not in HARDWARE:
        return True
    hardware = HARDWARE[name]
    # of a device that is compiled for and not there
    platform = device.platform.replace("cuda", "gpu")
    capability = tuple(map(int, getattr(device, "compute_capability", "0.0").split(".")))
    return platform == hardware.platform and hardware.least <= capability <= hardware.most


class Entry(NamedTuple):
    """What was fastest and right on one kind of device, for arrays of one dtype whose sizes lie
    within bounds.

    op: as its folder is named. device_kind: as JAX calls it ("NVIDIA H200"). dtype: of the arrays
    that are multiplied. sizes: name -> (least, most), both included; a size that is not named may
    be anything. tiles: tile sizes by name, keyword arguments of the implementation; empty where it
    chooses them itself. date: ISO 8601, of the run. gain: seconds of "xla" with its own tiles over
    those of this, forward and backward. error: max|difference| / max|reference|, the largest of
    results and gradients, against the plain formula in f32.
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
        """What it is about: a second measurement of the same takes its place."""
        return self.op, self.device_kind, self.dtype, tuple(sorted(self.sizes.items()))

    def told(self) -> str:
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
        """The arrays that it is for, in words."""
        bounds = (
            f"{name} {low:,}" + (f" to {high:,}" if high > low else "")
            for name, (low, high) in self.sizes.items()
        )
        return ", ".join([self.dtype, *bounds])


def overlap(one: Entry, other: Entry) -> bool:
    """Whether some arrays fall under both."""
    if (one.op, one.device_kind, one.dtype) != (other.op, other.device_kind, other.dtype):
        return False
    both = one.sizes.keys() & other.sizes.keys()
    return all(
        one.sizes[name][0] <= other.sizes[name][1] and other.sizes[name][0] <= one.sizes[name][1]
        for name in both
    )


def checked(entries: Iterable[Entry]) -> tuple[Entry, ...]:
    """The entries of a table, in order.

    Raises:
      ValueError: bounds that hold nothing, or two entries that the same arrays fall under.
    """
    ordered = tuple(sorted(entries, key=lambda entry: entry.arrays))
    for entry in ordered:
        for name, (low, high) in entry.sizes.items():
            if low > high:
                raise ValueError(
                    f"table of implementations: {entry.op}: no {name} lies between {low} and {high}"
                )
    for one, other in itertools.combinations(ordered, 2):
        if overlap(one, other):
            raise ValueError(
                f"table of implementations: {one.op} on {one.device_kind}: {one.where()} overlaps"
                f" {other.where()}"
            )
    return ordered


@cache
def read_table(path: Path = TABLE) -> tuple[Entry, ...]:
    """Raises ValueError as `checked`."""
    entries = [Entry(**entry) for entry in json.loads(path.read_text(encoding="utf-8"))]
    return checked(
        entry._replace(
            sizes={name: (int(low), int(high)) for name, (low, high) in entry.sizes.items()}
        )
        for entry in entries
    )


def write_table(path: Path, entries: Iterable[Entry]) -> None:
    """Raises ValueError as `checked`, before anything is written."""
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
    """The table's entry for such arrays; None where nothing was measured, or the device is not
    known.

    Args:
      device_kind: of the device that the program is for, from who knows the mesh:
        `device.device_kind`.
      dtype: of the arrays that are multiplied; sizes: their sizes by the names that the op gives
        them.
      entries: the committed table if not given.
    """
    if device_kind is None:
        return None
    for entry in read_table() if entries is None else entries:
        if (entry.op, entry.device_kind, entry.dtype) == (
            op,
            device_kind,
            jnp.dtype(dtype).name,
        ) and all(
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
    """The name of the implementation, and the reason in words; one that is unverified is called so.

    Args:
      op: for the error; there: the names that exist.
      entry: the table's for such arrays. Without one, and with nothing asked for, "xla" runs.
      unsupported: name -> why it does not take such arrays, None if it does. Asked before the
        table's choice is taken, never about one that was asked for: that is refused by who calls
        this.

    Raises:
      ValueError: an implementation that does not exist.
    """
    if implementation is None:
        if entry is not None and entry.implementation in there:
            refusal = unsupported(entry.implementation)
            if refusal is None:
                return entry.implementation, f"the table's: {entry.told()}"
            return "xla", f"the table's {entry.implementation} does not take this: {refusal}"
        opt_in = [name for name in there if name in UNVERIFIED]
        return (
            "xla",
            (
                f"the default; opt-in, unverified: {', '.join(opt_in)}"
                if opt_in
                else "the only implementation there is"
            ),
        )
    if implementation not in there:
        raise ValueError(
            f"{op} implementation {implementation!r} does not exist; there is {', '.join(there)}"
        )
    if entry is not None and entry.implementation == implementation:
        return implementation, f"asked for; {entry.told()}"
    unverified = (
        f"; unverified, {UNVERIFIED[implementation]}" if implementation in UNVERIFIED else ""
    )
    return implementation, f"asked for{unverified}"


def kernels_of(op: str, name: str) -> ModuleType:
    """The module that holds `name`, "pallas_tpu" or "pallas_gpu" (`tpu.py`, `gpu.py`), of an op,
    imported only where it is meant.

    Pallas takes half a second to import, and much of it is experimental: what does not use it must
    not fail with it.
    """
    return importlib.import_module(f"jaxre_kernels.{op}.{name.removeprefix('pallas_')}")


def tiles_of(entry: Entry | None, name: str) -> dict[str, Any]:
    """The tile sizes that the table has for this implementation, to be passed to it; none where it
    chooses them itself.
    """
    return dict(entry.tiles) if entry is not None and entry.implementation == name else {}


def implementations_of(op: str) -> tuple[str, ...]:
    """The names that the dispatch of an op has; one without a dispatch is plain XLA. NF4 weights
    are those of the LoRA projections.
    """
    dispatch = f"jaxre_kernels.{'lora' if op == 'nf4' else op}.dispatch"
    return (
        tuple(importlib.import_module(dispatch).IMPLEMENTATIONS)
        if importlib.util.find_spec(dispatch)
        else ("xla",)
    )


def verdict(op: str, device_kind: str) -> str:
    """What the table says of an op on a kind of device, in words, whatever the arrays."""
    default = ": ".join(named(op, None, implementations_of(op)))
    found = [
        f"{entry.where()}: {entry.told()}"
        for entry in read_table()
        if (entry.op, entry.device_kind) == (op, device_kind)
    ]
    return (
        "; ".join([*found, f"else {default}"])
        if found
        else f"{default}; nothing was measured on {device_kind}"
    )
