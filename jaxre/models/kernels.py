"""The ops of a run: the implementation of each, and how it runs on the mesh.

XLA splits its own implementations over the mesh. A Pallas kernel is the program of a single device:
it runs inside `shard_map` on the rows of the device and whole weights (gathered if they are split),
and gradients of weights are summed over devices. XLA's attention also runs inside `shard_map` if
several devices share the rows; heads are left to XLA.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxre_kernels import attention, cross_entropy, lora
from jaxre_kernels.implementations import HARDWARE, runs_on

from jaxre.config import Kernels
from jaxre.errors import InputError
from jaxre.models import sharding
from jaxre.models.ops import Ops

# v5p, under both its names, and v6e: the compiler of jax 0.10 runs out of vector memory for the
# LoRA kernels.
TOO_SMALL = ("TPU v5", "TPU v5p", "TPU v6 lite")
EVERY_AXIS = (*sharding.ROWS, "tensor")

# Op -> implementations with their reasons in words, unique and in the order of tracing.
Chosen = dict[str, dict[str, None]]


def ops_of(kernels: Kernels, mesh: jax.sharding.Mesh, chosen: Chosen | None = None) -> Ops:
    """The ops of a run on a mesh: the config's implementations, else those that the table of
    measurements lists for the mesh's devices.

    When traced, they raise InputError for arrays that the config's kernel does not support.

    Args:
      chosen: filled with the implementations and reasons when the ops are traced.

    Raises:
      InputError: the config names a kernel that is not for these devices, or on a mesh that splits
        heads and channels.
    """
    check_kernels(kernels, mesh)
    shards = sharding.row_shards(mesh)
    kind = table_kind(mesh)

    def choice(
        op: str, choose: Callable[..., tuple[str, str]], *sizes: object, **options: object
    ) -> str:
        setting = getattr(kernels, op)
        try:
            name, reason = choose(*sizes, implementation=setting, device_kind=kind, **options)
        except ValueError as error:
            raise InputError(f"kernels.{op}={setting}: {error}") from None
        if chosen is not None:
            chosen.setdefault(op, {})[f"{name} ({reason})"] = None
        return name

    def attend(
        q, k, v, visible_until, visible_from=None, window=None, before=None, *, prefix=0, span=None
    ):
        both_ways = visible_from is not None
        heads = attention.Heads(q.shape[0] // shards, q.shape[2], *k.shape[2:], q.dtype)
        name = choice(
            "attention",
            attention.choose,
            q.shape[1],
            prefix,
            span,
            heads=heads,
            both_ways=both_ways,
            window=window is not None,
            before=before is not None,
        )
        op = partial(
            attention.attention, prefix=prefix, span=span, implementation=name, device_kind=kind
        )
        arrays = (q, k, v, visible_until, *((visible_from,) if both_ways else ()))
        if window is not None or before is not None:
            if shards == 1:
                return op(*arrays, window=window, before=before)

            def with_more(q, k, v, visible_until, positions, length, before):
                near = None if positions is None else attention.Window(positions, length)
                return op(q, k, v, visible_until, window=near, before=before)

            positions = length = None
            if window is not None:
                positions, length = window.positions, jnp.asarray(window.length, jnp.int32)
            return _split(with_more, mesh, 5, 2, axes=sharding.ROWS)(
                *arrays, positions, length, before
            )
        if name != "xla":
            return _split(op, mesh, len(arrays))(*arrays)
        # On a CPU the range of XLA's blocks depends on the rows, so each device uses the range of
        # its own. A common range would need a reduction in every layer, and two of them at once
        # can deadlock XLA's threads.
        return (_split(op, mesh, len(arrays), axes=sharding.ROWS) if shards > 1 else op)(*arrays)

    def lora_group(x, weights, factors, words, scale, rate):
        projections = lora.projections_of(x, weights, factors)
        tokens = projections.tokens // shards
        name = choice("lora", lora.choose, projections._replace(tokens=tokens))

        def op(x, words, weights, factors):
            return lora.lora_group(x, weights, factors, words, scale, rate, implementation=name)

        return (op if name == "xla" else _split(op, mesh, 2, 2))(x, words, weights, factors)

    def loss(x, head, targets, weights):
        tokens = (targets.shape[0] // shards, *targets.shape[1:])
        channels = cross_entropy.Channels(x.shape[-1], x.dtype)
        name = choice(
            "cross_entropy", cross_entropy.choose, tokens, head.shape[0], channels=channels
        )
        if name == "xla":
            return cross_entropy.linear_cross_entropy(
                x, head, targets, weights, shards=shards, implementation=name, device_kind=kind
            )

        def op(x, targets, weights, head):  # one loss per device, summed outside
            return cross_entropy.linear_cross_entropy(
                x, head, targets, weights, implementation=name, device_kind=kind
            )[None]

        return _split(op, mesh, 3, 1)(x, targets, weights, head).sum()

    return Ops(sharding.constrain_rows(mesh), attend, lora_group, loss)


def table_kind(mesh: jax.sharding.Mesh) -> str | None:
    """The device kind to look up in the table of measurements; None if only XLA can split the
    ops.
    """
    return mesh.devices.flat[0].device_kind if mesh.shape["tensor"] == 1 else None


def _split(
    op: Callable,
    mesh: jax.sharding.Mesh,
    rows: int,
    whole: int = 0,
    axes: tuple[str, ...] = EVERY_AXIS,
) -> Callable:
    """Wraps `op` in `shard_map` over `axes`: its first `rows` arguments and its results are split
    over rows, the next `whole` arguments are not.

    XLA still splits over the axes that are not named. A kernel needs all of them named: otherwise
    the tensor axis, of size 1 there, would add a sum of gradients.
    """
    split = PartitionSpec(axes)
    specs = (split,) * rows + (PartitionSpec(),) * whole
    # A Pallas call does not declare the axes over which its results vary, so no check is possible.
    return jax.shard_map(
        op, mesh=mesh, in_specs=specs, out_specs=split, axis_names=set(axes), check_vma=False
    )


def check_kernels(kernels: Kernels, mesh: jax.sharding.Mesh) -> None:
    """Raises InputError for a kernel that does not run on the mesh."""
    device = mesh.devices.flat[0]
    for op, name in kernels.model_dump().items():
        if name not in HARDWARE:
            continue
        if not runs_on(name, device):
            raise InputError(
                f"kernels.{op}={name}: is for {HARDWARE[name].description}, this is"
                f" {device.device_kind}; leave it out"
            )
        if (
            (op, name) == ("lora", "pallas_tpu")
            and jax.__version_info__ < (0, 11)
            and device.device_kind in TOO_SMALL
        ):
            raise InputError(
                f"kernels.{op}={name}: jax {jax.__version__} compiles it for a TPU v5e alone, this"
                f" is {device.device_kind}; take jax 0.11 or later (Python 3.12), or leave it out"
            )
        if mesh.shape["tensor"] > 1:
            raise InputError(
                f"kernels.{op}={name}: needs whole heads and channels on a device; set"
                " mesh.tensor=1, or leave it out"
            )
