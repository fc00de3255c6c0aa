"""Not yet run on a Hopper GPU: unverified. `tools/hardware_check --only cross_entropy` confirms it.

Linear cross-entropy for Hopper GPUs (Pallas Mosaic GPU): logits stay on the chip. Tested in
Pallas's interpreter and compiled ahead of time for an H200 (sm_90a). Every statement about speed is
arithmetic.

Formulas. The logit of the target is a product of two rows, known before any other: it is the
reference of the exponentials, in place of the largest logit, which is known only at the end. For a
chunk of n tokens, with z_n = x_n . head_target,

    E_nv = exp(x_n . head_v - z_n),    t_n = sum_v E_nv,    loss = sum_n w_n log t_n
    G = E but G_n,target = 1 - t_n,    s_n = w_n / t_n
    dx_n = s_n (G head)_n,    dhead = G' (s x)

One kernel computes tiles of logits, sums E in f32 and writes it to memory in bf16, where one number
of each token is then overwritten; the two wide products are XLA's. Rounding: bf16 has the exponents
of f32, so each E keeps 8 bits whatever the reference is, and with t_n of at least 1 nothing that
matters underflows. G of a target is a difference in f32: it keeps its digits where the target has
nearly all of the softmax. Most of dx may be the target's row, so the rounding error of that factor
is added in f32. For dhead s x is rounded, too. z_n is not summed in the order of the logits: t_n
carries the difference, of the order of f32's rounding of z_n.

Where a loss is above 66 (t_n above 2^96) a sum of E could overflow: such a chunk computes its
largest logits with XLA, 128 tokens at a time, and runs the kernel again with these for z, at about
twice the time. That is decided once a chunk, on the host.

Why E goes through memory. As in attention, one sweep could sum dx on the chip: D f32 numbers a
token, 64 tokens of 896 channels fill the registers of a processor. Computing the logits a second
time would cost 6 N V D FLOPs in place of 4 N V D.

Memory: E of a chunk, 2 n V bytes (n is 2,048 at most: 594 MiB with 151,936 entries, as f32 logits
of 1,024 tokens), losses [N] and dx [N, D] in f32, and where the head is trained dhead [V, D] in
f32. No array of [N, V].

Roofline of a chunk, in bf16:

              FLOPs       bytes of memory, at least              FLOP a byte, D = 896, n = 2,048
    kernel    2 n V D     2 V D (head), 2 n V (E)                620
    dx        2 n V D     2 V D, 2 n V                           620
    dhead     2 n V D     8 V D (added to, f32), 2 n V           330

An H200 has 989 TFLOP/s and 4.8 TB/s by its datasheet, 206 FLOP a byte: products bound all three.
FLOPs and bytes are those of the bare products with logits in bf16. Besides these there are n V
exponentials, 16 a clock and processor: for a tile of 128 tokens and 256 entries 2,048 clocks, where
its product takes 16 D, 14,336 for 896 channels. Without overlap that is 14% of the kernel, 7% of a
frozen head's op.

The kernel. A thread block of 128 tokens walks over tiles of 256 entries. One of its warpgroups
requests 64 channels of both at a time from the copy engine, four steps ahead, into a ring in shared
memory; two multiply 64 tokens each, and start the next product before they wait for the last. The
ring continues from tile to tile, and one warpgroup begins two steps behind the other: each computes
its exponentials while the other multiplies. Two thread blocks, a cluster, walk over the same
entries and each copy half of them for both: a step brings 32 KiB from the L2 cache for 4.2 MFLOP,
128 FLOP a byte.

Sharding: inside `shard_map(..., check_vma=False)`, tokens split, not under automatic partitioning.
"""

from __future__ import annotations

import math
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.typing import DTypeLike

from jaxre_kernels.cross_entropy.gradients import with_gradients
from jaxre_kernels.cross_entropy.reference import logits_of
from jaxre_kernels.mosaic_gpu import (
    LOG2_E,
    MISSING,
    PROCESSORS,
    TILE,
    quotient,
    remainder,
    shared_tile,
    transposed,
)

TOKENS = 2048  # at a time, at most; not measured on a GPU
MULTIPLIERS = 2  # warpgroups that multiply; one more copies
PAIR = 2  # thread blocks of a cluster, which share the tiles of the head
SLOTS = 4  # of the ring; tiles of E on their way out have two more
LEAD = 2  # steps of the ring that the first warpgroup is ahead
LIMIT = 2.0**96  # of a sum of exponentials: products of them with rows of the head stay finite


class Tiling(NamedTuple):
    """Static choices: tokens at a time; tokens of a warpgroup, entries and channels of a tile; the
    device's processors.
    """

    at_most: int = TOKENS
    tokens: int = 64
    entries: int = 256
    channels: int = 64
    processors: int = PROCESSORS
    interpret: Any = None

    @property
    def block(self) -> int:
        """Tokens of a thread block."""
        return MULTIPLIERS * self.tokens

    @property
    def pair(self) -> int:
        """Tokens of a pair of thread blocks."""
        return PAIR * self.block


def pallas_cross_entropy(
    x: jax.Array,
    head: jax.Array,
    targets: jax.Array,
    weights: jax.Array,
    *,
    at_most: int = TOKENS,
    tiling: Tiling | None = None,
) -> jax.Array:
    """Weighted sum of the cross-entropy of the tokens on one device; differentiable in x, head and
    weights.

    Args:
      x: [..., D] bf16; head: [V, D] of x's dtype. Copied if D is not a multiple of 64 or V not one
        of 8.
      targets: [...] int32 in [0, V), arbitrary where the weight is 0. weights: [...] f32.
      at_most: tokens at a time, whose V exponentials are in memory as bf16.
      tiling: of the kernel, for Pallas's interpreter, which supports f32 too; on a GPU use the
        default.

    Returns:
      [] f32.

    Raises:
      ValueError: what `unsupported` says.
    """
    tiling = (tiling or Tiling())._replace(at_most=at_most)
    refusal = unsupported(x.shape[-1], jnp.bfloat16 if tiling.interpret else x.dtype)
    if refusal is not None:
        raise ValueError(f"linear cross-entropy for GPUs does not run here: {refusal}")
    return _op(x, head, targets, weights, tiling)


def unsupported(channels: int, dtype: DTypeLike) -> str | None:
    """Why `pallas_cross_entropy` does not support such arrays, in words; None if it does."""
    if MISSING is not None:
        return MISSING
    dtype = jnp.dtype(dtype)
    return None if dtype == jnp.dtype(jnp.bfloat16) else f"it takes bfloat16, not {dtype.name}"


# ---- the op -----------------------------------------------------------------------------------


def _sums(x, head, targets, weights, tiling, wanted):
    """The loss and its gradients; see `with_gradients`."""
    want_x, want_head = wanted
    shape, (V, D), N = x.shape, head.shape, math.prod(x.shape[:-1])
    n = _rounded_up(pl.cdiv(N, pl.cdiv(N, tiling.at_most)), tiling.pair)
    channels = (0, -D % tiling.channels)
    entries = jnp.pad(head, ((0, -V % 8), channels))

    def cut(array):
        """[N, ...] -> [chunks, n, ...]; padded with zeros at the end, so with weight 0."""
        return jnp.pad(array, ((0, -N % n), *[(0, 0)] * (array.ndim - 1))).reshape(
            -1, n, *array.shape[1:]
        )

    def chunk(dhead, part):
        x, targets, weights = part  # n D, n, n
        rows = entries[targets].astype(jnp.float32)  # n D
        own = jnp.sum(x.astype(jnp.float32) * rows, axis=-1)
        run = partial(_exponentials, x, entries, V, tiling, want_x or want_head)
        reference, total, shares = _finite(own, run, partial(_largest, x, head, tiling.block))
        scale = (weights / total)[:, None]
        dx = None
        if shares is not None:
            of_targets = jnp.exp(own - reference) - total
            rounded = of_targets.astype(shares.dtype)
            shares = shares.at[jnp.arange(n), targets].set(
                rounded, indices_are_sorted=True, unique_indices=True
            )
        if want_x:
            # Most of dx may be the target's row, so the rounding error of its factor is added.
            left = (of_targets - rounded.astype(jnp.float32))[:, None] * rows
            dx = scale * (jnp.dot(shares, entries, preferred_element_type=jnp.float32) + left)
        if want_head:
            dhead += jnp.einsum(
                "nv,nd->vd", shares, (scale * x).astype(x.dtype), preferred_element_type=jnp.float32
            )
        return dhead, (dx, jnp.log(total) + (reference - own))

    start = jnp.zeros(entries.shape, jnp.float32) if want_head else None
    flat_targets = jnp.clip(targets, 0, V - 1).reshape(N)
    flat_weights = weights.reshape(N).astype(jnp.float32)
    flat = jnp.pad(x.reshape(N, D), ((0, 0), channels))
    dhead, (dx, losses) = lax.scan(chunk, start, (cut(flat), cut(flat_targets), cut(flat_weights)))
    losses = losses.reshape(-1)[:N]
    dx = dx.reshape(-1, entries.shape[1])[:N, :D].reshape(shape) if want_x else None
    return (
        jnp.sum(flat_weights * losses),
        dx,
        dhead[:V, :D] if want_head else None,
        losses.reshape(shape[:-1]),
    )


_op = with_gradients(_sums)


def _finite(own, run, largest):
    """`reference` [n], and what `run` returns for it: the targets' logits (`own`), or the largest
    logits if those overflow.
    """
    total, shares = run(own)

    def again():
        reference = largest()
        return reference, *run(reference)

    return lax.cond(jnp.all(total < LIMIT), lambda: (own, total, shares), again)


def _largest(x: jax.Array, head: jax.Array, block: int) -> jax.Array:
    """The largest logit of each token, one block at a time: [n, D], [V, D] -> [n]."""
    few = x[:, : head.shape[1]].reshape(-1, block, head.shape[1])
    return lax.map(lambda x: logits_of(x, head).max(axis=-1), few).reshape(-1)


def _rounded_up(number: int, multiple: int) -> int:
    return -(-number // multiple) * multiple


# ---- the kernel -------------------------------------------------------------------------------


def _exponentials(
    x: jax.Array, head: jax.Array, entries: int, tiling: Tiling, store: bool, reference: jax.Array
) -> tuple[jax.Array, jax.Array | None]:
    """t [n] f32 and E [n, V] of x's dtype (None without `store`); rows of the head from `entries`
    on do not count.
    """
    n, V = x.shape[0], head.shape[0]
    blocks, tiles = n // tiling.block, pl.cdiv(V, tiling.entries)
    tiles_each = tiles_of_a_split(blocks, tiles, tiling.processors)
    splits = pl.cdiv(tiles, tiles_each)
    # Steps are as wide as the swizzle: 128 bytes on a GPU.
    shared = partial(shared_tile, dtype=x.dtype, swizzle=tiling.channels * x.dtype.itemsize)
    ring = [shared((SLOTS, rows, tiling.channels)) for rows in (tiling.block, tiling.entries)]
    sums, *shares = plgpu.kernel(
        partial(_kernel, entries=entries, tiles_each=tiles_each, tiling=tiling, store=store),
        out_type=[
            jax.ShapeDtypeStruct((splits, n), jnp.float32),
            *[jax.ShapeDtypeStruct((n, V), x.dtype)] * store,
        ],
        scratch_types=[
            *ring,
            shared((MULTIPLIERS, 2, tiling.tokens, tiling.channels)),
            plgpu.Barrier(num_arrivals=len(ring), num_barriers=SLOTS),
            plgpu.ClusterBarrier(
                collective_axes=("pair",), num_arrivals=MULTIPLIERS, num_barriers=SLOTS
            ),
            plgpu.Barrier(),
        ],
        grid=(splits, blocks // PAIR),
        grid_names=("splits", "pairs"),
        cluster=(PAIR,),
        cluster_names=("pair",),
        num_threads=MULTIPLIERS + 1,
        thread_name="warpgroup",
        compiler_params=plgpu.CompilerParams(approx_math=True),
        interpret=tiling.interpret,
        kernel_name="cross_entropy_exponentials",
    )(x, head, reference)
    return sums.sum(axis=0), shares[0] if store else None


def tiles_of_a_split(blocks: int, tiles: int, processors: int = PROCESSORS) -> int:
    """Tiles of entries per thread block, chosen so that `blocks` of tokens leave few processors
    idle at the end.
    """

    def rounds(size: int) -> int:
        """Tiles that a processor computes one after another."""
        return size * pl.cdiv(blocks * pl.cdiv(tiles, size), processors)

    # Several thread blocks in sequence on a processor even out a remainder.
    return min(
        (pl.cdiv(tiles, max(1, processors * waves // blocks)) for waves in range(1, 5)), key=rounds
    )


class _Walk(NamedTuple):
    """The work of a thread block: its first token and tile of entries, its number of tiles, and the
    steps of each tile, by channels.
    """

    start: jax.Array
    first: jax.Array
    tiles: jax.Array
    steps: int
    tiling: Tiling

    @property
    def all_steps(self) -> jax.Array:
        return self.tiles * self.steps


def _kernel(x, head, reference, sums, *refs, entries, tiles_each, tiling, store):
    """Writes sums [splits, n] of the exponentials over a split of the entries, and the exponentials
    themselves (`shares` [n, V]).

    Shared memory: `tokens` [SLOTS, 128, 64] and `rows` [SLOTS, 256, 64] of the head, the ring;
    `leaving` [2, 2, 64, 64], two slots of each warpgroup that multiplies. A slot of the ring has
    `arrived`, and is `free` once both thread blocks of the pair have multiplied it.
    """
    shares, (tokens, rows, leaving, arrived, free, ahead) = (
        (refs[0], refs[1:]) if store else (None, refs)
    )
    split, warpgroup = lax.axis_index("splits"), lax.axis_index("warpgroup")
    walk = _Walk(
        start=lax.axis_index("pairs") * tiling.pair + lax.axis_index("pair") * tiling.block,
        first=split * tiles_each,
        tiles=jnp.minimum(tiles_each, pl.cdiv(head.shape[0], tiling.entries) - split * tiles_each),
        steps=x.shape[1] // tiling.channels,
        tiling=tiling,
    )

    @pl.when(warpgroup == MULTIPLIERS)
    def _():
        plgpu.set_max_registers(40, action="decrease")
        _bring(walk, x, head, tokens, rows, arrived, free)

    @pl.when(warpgroup < MULTIPLIERS)
    def _():
        plgpu.set_max_registers(232, action="increase")
        mine = pl.ds(warpgroup * tiling.tokens, tiling.tokens)
        here = pl.ds(walk.start + warpgroup * tiling.tokens, tiling.tokens)
        base = plgpu.load(reference.at[here], layout=TILE.reduce(1), optimized=False) * LOG2_E
        pl.when(warpgroup > 0)(lambda: plgpu.barrier_wait(ahead))

        def tile_of(tile, total):
            logits = _logits(
                walk, tile, tokens.at[:, mine], rows, arrived, free, ahead, warpgroup == 0
            )
            tile_shares = jnp.exp2(logits * LOG2_E - lax.broadcast_in_dim(base, logits.shape, [0]))
            start = (walk.first + tile) * tiling.entries
            if entries % tiling.entries:
                tile_shares = _within(tile_shares, entries - start)
            if store:
                _write(
                    tile_shares.astype(leaving.dtype), leaving.at[warpgroup], shares, here, start
                )
            return total + tile_shares.sum(1)

        nothing = plgpu.layout_cast(jnp.zeros(tiling.tokens, jnp.float32), TILE.reduce(1))
        sums.at[split, here][...] = lax.fori_loop(0, walk.tiles, tile_of, nothing)
        plgpu.wait_smem_to_gmem(0)


def _bring(walk, x, head, tokens, rows, arrived, free):
    """Requests the data of each step as soon as its slot is free, until everything has been
    multiplied.
    """
    E, C = walk.tiling.entries, walk.tiling.channels

    def fetch(step, _):
        slot, channels = remainder(step, SLOTS), pl.ds(remainder(step, walk.steps) * C, C)
        pl.when(step >= SLOTS)(lambda: plgpu.barrier_wait(free.at[slot]))

        @pl.when(step < walk.all_steps)
        def _():
            entries = pl.ds((walk.first + quotient(step, walk.steps)) * E, E)
            plgpu.copy_gmem_to_smem(
                x.at[pl.ds(walk.start, walk.tiling.block), channels],
                tokens.at[slot],
                arrived.at[slot],
            )
            plgpu.copy_gmem_to_smem(
                head.at[entries, channels], rows.at[slot], arrived.at[slot], collective_axes="pair"
            )

    lax.fori_loop(0, walk.all_steps + SLOTS, fetch, None)


def _logits(walk, tile, tokens, rows, arrived, free, ahead, leads):
    """[64, 256] of a warpgroup. A slot is freed once the next product has started; the warpgroup
    that leads signals the other when to begin.
    """
    before = tile * walk.steps
    lead = jnp.minimum(LEAD, walk.all_steps) - 1

    def multiply(sums):
        def step_of(step, _):
            slot = remainder(before + step, SLOTS)
            plgpu.barrier_wait(arrived.at[slot])
            plgpu.wgmma(sums, tokens.at[slot], transposed(rows.at[slot]))
            plgpu.wgmma_wait(1)  # for all products but this one
            pl.when(step > 0)(
                lambda: plgpu.barrier_arrive(free.at[remainder(before + step - 1, SLOTS)])
            )
            pl.when(leads & (before + step == lead))(lambda: plgpu.barrier_arrive(ahead))

        lax.fori_loop(0, walk.steps, step_of, None)
        return sums[...]

    logits = pl.run_scoped(
        multiply, plgpu.ACC((walk.tiling.tokens, walk.tiling.entries), jnp.float32)
    )
    plgpu.barrier_arrive(free.at[remainder(before + walk.steps - 1, SLOTS)])
    return logits


def _within(shares, columns):
    """Zeroes columns from `columns` on: behind the last entry the copy engine reads zeros, whose
    exponentials must not count.
    """

    def cut():
        column = plgpu.broadcasted_iota(jnp.int32, shares.shape, 1, layout=TILE)
        return jnp.where(column < columns, shares, 0.0)

    return lax.cond(columns < shares.shape[1], cut, lambda: shares)


def _write(tile, slots, shares, here, start):
    """Writes a tile to memory through two slots in turn; columns behind the last entry are not
    written.
    """
    C = slots.shape[2]
    for i in range(tile.shape[1] // C):
        slot = slots.at[i % 2]
        # the copy before the last has read its slot
        plgpu.wait_smem_to_gmem(1, wait_read_only=True)
        slot[...] = tile[:, i * C : (i + 1) * C]
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(slot, shares.at[here, pl.ds(start + i * C, C)])
