"""The ops of a run: which implementation of each trains it, and how it runs on the mesh.

XLA splits its own implementations over the mesh. A Pallas kernel is the program of one device: it
runs inside of `shard_map`, on the rows that lie there and whole weights (gathered, where they are
split); gradients of weights are summed over the devices. So does XLA's attention where several
devices share the rows; heads are left to XLA.
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
from jaxre.models.ops import Ops
from jaxre.training import sharding

# v5p, by both its names, and v6e: here the compiler of jax 0.10 runs out of vector memory with
# LoRA's kernels.
TOO_SMALL = ("TPU v5", "TPU v5p", "TPU v6 lite")
EVERY_AXIS = (*sharding.ROWS, "tensor")

# Op -> what was chosen and why, each in words once, in the order in which it was met.
Chosen = dict[str, dict[str, None]]


def ops_of(kernels: Kernels, mesh: jax.sharding.Mesh, chosen: Chosen | None = None) -> Ops:
    """The ops of a run on a mesh; what is asked for runs, else what the table of measurements has
    for the mesh's devices.

    They raise InputError, when they are traced, for arrays that a kernel that is asked for does not
    take.

    Args:
      chosen: gets what was chosen when they are traced.

    Raises:
      InputError: a kernel that is not for these devices, or that is asked for where the mesh splits
        heads and channels.
    """
    check_kernels(kernels, mesh)
    shards = sharding.row_shards(mesh)
    kind = table_kind(mesh)

    def choice(
        op: str, choose: Callable[..., tuple[str, str]], *arrays: object, **more: object
    ) -> str:
        asked = getattr(kernels, op)
        try:
            name, reason = choose(*arrays, implementation=asked, **more)
        except ValueError as error:
            raise InputError(f"kernels.{op}={asked}: {error}") from None
        if chosen is not None:
            chosen.setdefault(op, {})[f"{name} ({reason})"] = None
        return name

    def attend(q, k, v, visible_until, visible_from=None, window=None, *, prefix=0, span=None):
        both_ways = visible_from is not None
        heads = attention.Heads(q.shape[0] // shards, q.shape[2], *k.shape[2:], q.dtype)
        name = choice(
            "attention",
            attention.choose,
            q.shape[1],
            prefix,
            span,
            heads=heads,
            device_kind=kind,
            both_ways=both_ways,
            window=window is not None,
        )
        op = partial(
            attention.attention, prefix=prefix, span=span, implementation=name, device_kind=kind
        )
        arrays = (q, k, v, visible_until, *((visible_from,) if both_ways else ()))
        if window is not None:
            if shards == 1:
                return op(*arrays, window=window)

            def windowed(q, k, v, visible_until, positions, length):
                near = attention.Window(positions, length)
                return op(q, k, v, visible_until, window=near)

            return _split(windowed, mesh, 5, 1, axes=sharding.ROWS)(
                *arrays, window.positions, jnp.asarray(window.length, jnp.int32)
            )
        if name != "xla":
            return _split(op, mesh, len(arrays))(*arrays)
        # On a CPU how far XLA's blocks look depends on the rows: where they lie on several devices,
        # each looks at its own. The highest of all would be agreed on in every layer, and two such
        # waits at once can leave XLA's threads waiting for good.
        return (_split(op, mesh, len(arrays), axes=sharding.ROWS) if shards > 1 else op)(*arrays)

    def lora_group(x, weights, factors, words, scale, rate):
        all_tokens = lora.projections_of(x, weights, factors)
        name = choice(
            "lora",
            lora.choose,
            all_tokens._replace(tokens=all_tokens.tokens // shards),
            device_kind=kind,
        )
        if name == "xla":
            return lora.lora_group(x, weights, factors, words, scale, rate, implementation=name)

        def op(x, words, weights, factors):
            return lora.lora_group(x, weights, factors, words, scale, rate, implementation=name)

        return _split(op, mesh, 2, 2)(x, words, weights, factors)

    def loss(x, head, targets, weights):
        tokens, channels = (
            (targets.shape[0] // shards, *targets.shape[1:]),
            cross_entropy.Channels(x.shape[-1], x.dtype),
        )
        name = choice(
            "cross_entropy",
            cross_entropy.choose,
            tokens,
            head.shape[0],
            channels=channels,
            device_kind=kind,
        )
        if name == "xla":
            return cross_entropy.linear_cross_entropy(
                x, head, targets, weights, shards=shards, implementation=name, device_kind=kind
            )

        def op(x, targets, weights, head):  # one loss a device, added up outside
            return cross_entropy.linear_cross_entropy(
                x, head, targets, weights, implementation=name, device_kind=kind
            )[None]

        return _split(op, mesh, 3, 1)(x, targets, weights, head).sum()

    return Ops(sharding.constrain_rows(mesh), attend, lora_group, loss)


def table_kind(mesh: jax.sharding.Mesh) -> str | None:
    """The kind of the devices that the table of measurements is asked about; none where only XLA
    can split the ops.
    """
    return mesh.devices.flat[0].device_kind if mesh.shape["tensor"] == 1 else None


def _split(
    op: Callable,
    mesh: jax.sharding.Mesh,
    rows: int,
    whole: int = 0,
    axes: tuple[str, ...] = EVERY_AXIS,
) -> Callable:
    """`op` on each part of `axes`: its first `rows` arguments and its results are split over rows,
    the `whole` that follow are not.

    XLA goes on to split what it computes over the axes that are not named. A kernel needs all of
    them named: the tensor axis, of one device there, then does not ask for a sum of gradients over
    it.
    """
    split = PartitionSpec(axes)
    specs = (split,) * rows + (PartitionSpec(),) * whole
    # A Pallas call does not say over which axes its results vary, so that cannot be checked.
    return jax.shard_map(
        op, mesh=mesh, in_specs=specs, out_specs=split, axis_names=set(axes), check_vma=False
    )


def check_kernels(kernels: Kernels, mesh: jax.sharding.Mesh) -> None:
    """Raises InputError for a kernel that does not run on such a mesh."""
    device = mesh.devices.flat[0]
    for op, name in kernels.model_dump().items():
        if name not in HARDWARE:
            continue
        if not runs_on(name, device):
            raise InputError(
                f"kernels.{op}={name}: is for {HARDWARE[name].told}, this is {device.device_kind};"
                " leave it out"
            )
        if (
            (op, name) == ("lora", "pallas_tpu")
            and jax.__version_info__ < (0, 11)
            and device.device_kind in TOO_SMALL
        ):
            told = (
                f"jax {jax.__version__} compiles it for a TPU v5e alone, this is"
                f" {device.device_kind}"
            )
            raise InputError(
                f"kernels.{op}={name}: {told}; take jax 0.11 or later (Python 3.12), or leave"
                " it out"
            )
        if mesh.shape["tensor"] > 1:
            raise InputError(
                f"kernels.{op}={name}: takes whole heads and channels on a device; set"
                " mesh.tensor=1, or leave it out"
            )
