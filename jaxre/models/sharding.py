"""The device mesh (data, fsdp, tensor) and the sharding of every array on it.

Rows are split over data x fsdp. Weights are split as the weight table says, except for dimensions
that the mesh axis does not divide.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any, TypeVar

import jax
import numpy as np
import optax
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from jaxre.config import Lora, Mesh
from jaxre.errors import InputError
from jaxre.models.architecture import Architecture
from jaxre.models.lora import adapter_axes
from jaxre.models.quantised import is_nf4
from jaxre.models.weights import places, tree_of

Tree = Any
Batch = TypeVar("Batch", bound=tuple)
ROWS = ("data", "fsdp")


def join_processes() -> None:
    """Joins the processes of a run on several hosts, if the environment names a coordinator.

    `JAX_COORDINATOR_ADDRESS=HOST:PORT` needs `JAX_NUM_PROCESSES` and `JAX_PROCESS_ID`; with
    `JAX_COORDINATOR_ADDRESS=auto` JAX detects them (Slurm, Cloud TPU, Open MPI, Kubernetes).

    Raises:
      InputError: an address without the two numbers.
    """
    address = os.environ.get("JAX_COORDINATOR_ADDRESS")
    if not address or jax.distributed.is_initialized():
        return
    if address == "auto":
        del os.environ["JAX_COORDINATOR_ADDRESS"]
        jax.distributed.initialize()
        return
    try:
        count, number = (int(os.environ[name]) for name in ("JAX_NUM_PROCESSES", "JAX_PROCESS_ID"))
    except (KeyError, ValueError):
        raise InputError(
            "JAX_COORDINATOR_ADDRESS is set; set JAX_NUM_PROCESSES and JAX_PROCESS_ID to numbers"
            " too, or the address to auto"
        ) from None
    jax.distributed.initialize(address, count, number)


def split_cpu(count: int | None) -> None:
    """Splits the CPU into `count` devices, ideally one per core.

    Small products use two cores better as two devices: LoRA on the shipped base, 1,024 tokens an
    update, two cores: 3,000 tokens/s as two devices, 2,200 as one (2026-11-20).

    Raises:
      InputError: JAX has already started with another number.
    """
    if count is None or jax.config.jax_num_cpu_devices == count:
        return
    try:
        jax.config.update("jax_num_cpu_devices", count)
    except RuntimeError:
        raise InputError(
            f"mesh.cpu_devices={count}: JAX has started already with another number of devices; use"
            " a new process"
        ) from None


def make_mesh(mesh: Mesh, devices: list | None = None) -> jax.sharding.Mesh:
    """Makes the mesh over all devices. Raises InputError if the axes do not use all of them."""
    devices = jax.devices() if devices is None else devices
    data = mesh.data or max(1, len(devices) // (mesh.fsdp * mesh.tensor))
    if data * mesh.fsdp * mesh.tensor != len(devices):
        raise InputError(
            f"mesh {data} x {mesh.fsdp} x {mesh.tensor} (data x fsdp x tensor) does not fit"
            f" {len(devices)} devices; correct mesh.data, mesh.fsdp, mesh.tensor"
        )
    return jax.make_mesh(
        (data, mesh.fsdp, mesh.tensor),
        ("data", "fsdp", "tensor"),
        axis_types=(AxisType.Auto,) * 3,
        devices=devices,
    )


def row_shards(mesh: jax.sharding.Mesh) -> int:
    """Number of devices that share the rows of a batch."""
    return mesh.shape["data"] * mesh.shape["fsdp"]


def _named(
    mesh: jax.sharding.Mesh, shape: tuple[int, ...], axes: tuple[str | None, ...]
) -> NamedSharding:
    divided = (
        axis if axis and length % mesh.shape[axis] == 0 else None
        for length, axis in zip(shape, axes, strict=True)
    )
    return NamedSharding(mesh, PartitionSpec(*divided))


def base_shardings(architecture: Architecture, mesh: jax.sharding.Mesh) -> Tree:
    """Shardings of the base weights, as a pytree of the same form."""
    return tree_of(
        (path, _named(mesh, shape, axes)) for _, path, shape, axes in places(architecture)
    )


def quantised_shardings(base: Tree, shardings: Tree, mesh: jax.sharding.Mesh) -> Tree:
    """`shardings` of a dense base, with the NF4 projections of `base` replicated on every device.

    At four bits the largest of the models takes 1.5 GB; split projections would be gathered,
    dequantised, in every layer and pass.
    """

    def sharding_of(leaf: Any, dense: NamedSharding) -> Any:
        return jax.tree.map(lambda _: replicated(mesh), leaf) if is_nf4(leaf) else dense

    return jax.tree.map(sharding_of, base, shardings, is_leaf=is_nf4)


def adapter_shardings(
    architecture: Architecture, lora: Lora, factors: Tree, mesh: jax.sharding.Mesh
) -> Tree:
    """Shardings of LoRA factors (arrays or shapes), as a pytree of the same form."""
    axes = adapter_axes(architecture, lora)
    return jax.tree.map(lambda leaf, names: _named(mesh, leaf.shape, names), factors, axes)


def optimiser_shardings(
    optimiser: optax.GradientTransformation, shapes: Tree, shardings: Tree, mesh: jax.sharding.Mesh
) -> Tree:
    """Shards moments like their parameters and replicates counters."""
    return optax.tree_map_params(
        optimiser,
        lambda _, sharding: sharding,
        shapes,
        shardings,
        transform_non_params=lambda _: replicated(mesh),
    )


def replicated(mesh: jax.sharding.Mesh) -> NamedSharding:
    return NamedSharding(mesh, PartitionSpec())


def row_sharding(mesh: jax.sharding.Mesh, leading: int = 1) -> NamedSharding:
    """Sharding over rows of arrays [A, B, ...] (leading=1) or [B, ...] (leading=0)."""
    return NamedSharding(mesh, PartitionSpec(*(None,) * leading, ROWS))


def constrain_rows(mesh: jax.sharding.Mesh) -> Callable[[jax.Array], jax.Array]:
    """Keeps [B, T, D] activations split over rows, so that weights move between devices, not
    activations.
    """
    sharding = NamedSharding(mesh, PartitionSpec(ROWS, None, None))
    return lambda x: jax.lax.with_sharding_constraint(x, sharding)


def put(tree: Tree, shardings: Tree) -> Tree:
    """Puts host arrays on the mesh. Every process holds the whole array and supplies the parts of
    its devices.
    """
    if jax.process_count() == 1:
        return jax.device_put(tree, shardings)

    def place(array: np.ndarray, sharding: NamedSharding) -> jax.Array:
        return jax.make_array_from_callback(
            np.shape(array), sharding, lambda index: np.asarray(array)[index]
        )

    return jax.tree.map(place, tree, shardings)


def put_rows(rows: Batch, sharding: NamedSharding | None) -> Batch:
    """Puts a named tuple of host arrays on the mesh; returns it unchanged without a sharding."""
    return rows if sharding is None else put(rows, type(rows)(*(sharding,) * len(rows)))
