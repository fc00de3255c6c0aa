"""`jaxre doctor`: versions, devices, and the choices that jaxre makes on this machine."""

from __future__ import annotations

import platform
from importlib.metadata import PackageNotFoundError, version

import jax
from jaxre_kernels.implementations import verdict
from rich.table import Table

from jaxre.checkpoints.source import chosen_dtype
from jaxre.config import data_root, shipped

# Displayed name -> name in the table of implementations.
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
    """Tabulates versions, devices and choices; changes nothing."""
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
    table.add_row("model.dtype=auto", chosen_dtype("auto").why)
    for name, op in OPS.items():
        table.add_row(name, verdict(op, devices[0].device_kind))
    table.add_section()
    root = data_root()
    hint = "" if root.is_dir() else " is not there; set JAXRE_DATA to the folder of the benchmarks"
    table.add_row("benchmarks", f"{root}{hint}")
    for asset in ("corpus", "facts-base"):
        status = "here" if shipped(asset).is_dir() else "missing; install jaxre again"
        table.add_row(f"shipped {asset}", status)
    return table
