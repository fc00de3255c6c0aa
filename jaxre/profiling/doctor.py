"""`jaxre doctor`: versions, devices, what would be chosen on this machine and why."""

from __future__ import annotations

import platform
from importlib.metadata import PackageNotFoundError, version

import jax
from jaxre_kernels.implementations import verdict
from rich.table import Table

from jaxre.checkpoints.source import chosen_dtype
from jaxre.config import data_root, shipped

# As they are shown, and as the table of implementations names them.
OPS = {
    "attention": "attention",
    "linear cross-entropy": "cross_entropy",
    "fused LoRA": "lora",
    "NF4": "nf4",
}
PACKAGES = (
    "jaxre",
    "jax",
    "jaxlib",
    "flax",
    "optax",
    "orbax-checkpoint",
    "tensorstore",
    "grain",
    "transformers",
    "tokenizers",
    "safetensors",
)


def diagnose() -> Table:
    """A table of what is here; it changes nothing."""
    table = Table(show_header=False, title="jaxre doctor", title_justify="left")
    table.add_row("python", platform.python_version())
    for package in PACKAGES:
        try:
            table.add_row(package, version(package))
        except PackageNotFoundError:
            table.add_row(package, "not installed")
    table.add_section()
    devices = jax.devices()
    table.add_row("devices", f"{len(devices)} x {devices[0].device_kind} ({jax.default_backend()})")
    table.add_row(
        "model.dtype=auto",
        chosen_dtype("auto").why,
    )
    for shown, op in OPS.items():
        table.add_row(shown, verdict(op, devices[0].device_kind))
    table.add_section()
    root = data_root()
    table.add_row(
        "benchmarks",
        (
            f"{root}"
            if root.is_dir()
            else f"{root} is not there; set JAXRE_DATA to the folder of the benchmarks"
        ),
    )
    for asset in ("corpus", "facts-base"):
        table.add_row(
            f"shipped {asset}",
            "here" if shipped(asset).is_dir() else "missing; install jaxre again",
        )
    return table
