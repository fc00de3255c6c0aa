"""Not yet run on a Hopper GPU: unverified. `tools/hardware_check --only lora,nf4` confirms it.

The Mosaic GPU kernels of a LoRA group for Hopper. Their formulas: `gpu.py`.

A thread block computes one tile of a result, tokens and `width` channels, in three warpgroups. One
feeds: it keeps a ring of slots filled, each with a step of the sum, 64 channels of both factors.
Two compute, for half of the tokens each, with the sums in registers until the end:

    feeding      wait until the slot is free -> request both factors from the copy engine (TMA);
        decode the weight itself if it is NF4
    computing    wait until the slot is full -> start its product -> wait for the product before
        that -> free the slot of that product

So copies, decoding and products overlap. A slot is full after two arrivals: two copies, or one and
the decoder's own.

Where dropout follows the low-rank product, in the gradient of x, that product cannot join the sum:
its steps stay in the ring until the sum is done. Then it is computed 32 channels at a time, masked
and added, while these are rounded and written.

Letters: N tokens, I inputs, O outputs, R the ranks side by side, each padded to 64, S slots.
"""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from jaxre_kernels.lora.dropout import is_kept
from jaxre_kernels.mosaic_gpu import TILE, remainder, transposed
from jaxre_kernels.nf4 import NF4Tiles
from jaxre_kernels.nf4.tiles import levels

STEP = 64  # channels of a step of a sum, what a rank is padded to, and the rows of a half of NF4
FEEDER = 2  # the warpgroup that feeds; those before it compute
CHUNK = 32  # channels that are written at a time
# Tiles of tokens that share the same weights: with 12 tiles of weights they occupy the 132
# processors.
SNAKE = 11


class Ring(NamedTuple):
    """Slots in shared memory: lhs [S, tokens, 64] and rhs [S, 64, width] or [S, width, 64]; their
    barriers, full and free.
    """

    lhs: Any
    rhs: Any
    full: Any
    free: Any


class Packed(NamedTuple):
    """Two slots for NF4: codes [2, 64, n], absmax [2, 2, n] of their two halves, and the barrier
    for their arrival.
    """

    codes: Any
    absmax: Any
    came: Any


def low_kernel(x, a, words, low, *, ring, staged, scale, rate):
    """L = scale mask(x) A. x [N, I], a [I, R], words [N] uint32 -> low [N, R]. A tile has all of R.

    The warpgroups that multiply by x first drop its channels in the slot.
    """
    rows, steps = _tile(lax.axis_index("tiles"), ring.lhs.shape[1]), x.shape[1] // STEP
    everything = pl.ds(0, low.shape[1])

    def feed():
        _feed(ring, 0, steps, lambda step: x.at[rows, _step(step)], lambda step: a.at[_step(step)])

    def compute():
        token_words = _own_words(words, ring, rows)

        def drop(step, x_slot):
            kept = _kept(token_words, step * STEP, x_slot.shape, rate)
            x_slot[...] = jnp.where(
                kept, plgpu.load(x_slot, layout=TILE).astype(jnp.float32), 0.0
            ).astype(x_slot.dtype)
            plgpu.commit_smem()

        total = _summed(ring, steps, 0, lambda rhs: rhs, drop)
        _write(total * scale, staged, low, rows, everything)

    _in_roles([(True, feed, compute)], None)


def forward_kernel(x, low, weights, bs, *ys, ring, staged, packed):
    """Yi = x Wi + Li Bi. x [N, I], low [N, R] or None, weights [I, O] or `NF4Tiles`, bs [Ri, O] or
    None -> ys [N, O].

    All tiles are of one grid; a thread block finds the projection of its tile.
    """
    width, steps = ring.rhs.shape[2], x.shape[1] // STEP
    rows, column = _place(ring, x, sum(y.shape[1] for y in ys) // width)

    def part(weight, b, y, first, rank):
        """The part of one projection, whose tiles begin at `first`, and whose rank begins at step
        `rank`.
        """
        own, ranks = _tile(column - first, width), _ranks(b)

        def feed():
            def x_at(step):
                return x.at[rows, _step(step)]

            def codes_at(tile):
                return weight.codes.at[_step(tile), own], weight.absmax.at[_tile(tile, 2), own]

            if isinstance(weight, NF4Tiles):
                _feed_packed(ring, packed, 0, steps, x_at, codes_at)
            else:
                _feed(ring, 0, steps, x_at, lambda step: weight.at[_step(step), own])
            if ranks:
                _feed(
                    ring,
                    steps,
                    ranks,
                    lambda step: low.at[rows, _step(rank + step)],
                    lambda step: b.at[_step(step), own],
                )

        def compute():
            total = _summed(ring, steps + ranks, 0, lambda rhs: rhs)
            _write(total, staged, y, rows, own)

        return (first <= column) & (column < first + y.shape[1] // width), feed, compute

    parts, first, rank = [], 0, 0
    for weight, b, y in zip(weights, bs, ys, strict=True):
        parts.append(part(weight, b, y, first, rank))
        first, rank = first + y.shape[1] // width, rank + _ranks(b)
    _in_roles(parts, packed)


def backward_kernel(dys, dlow, a, words, weights, dx, *, ring, staged, packed, rate):
    """dx = sum_i dYi Wi^T + mask (dL A^T).

    dys [N, O], dlow [N, R] and a [I, R] or None, words [N] uint32 or None without dropout, weights
    as in the forward kernel -> dx [N, I].
    """
    width = ring.rhs.shape[1]
    rows, column = _place(ring, dx, dx.shape[1] // width)
    own = _tile(column, width)
    steps, ranks = sum(dy.shape[1] for dy in dys) // STEP, 0 if a is None else a.shape[1] // STEP

    def feed():
        first = 0
        for dy, weight in zip(dys, weights, strict=True):
            _feed_outputs(ring, packed, first, dy, weight, rows, column)
            first += dy.shape[1] // STEP
        if ranks:
            _feed(
                ring,
                first,
                ranks,
                lambda step: dlow.at[rows, _step(step)],
                lambda step: a.at[own, _step(step)],
            )

    def compute():
        if words is None:
            _write(_summed(ring, steps + ranks, 0, transposed), staged, dx, rows, own)
            return
        total = _summed(ring, steps, ranks, transposed)
        token_words = _own_words(words, ring, rows)
        for step in range(steps, steps + ranks):
            plgpu.barrier_wait(ring.full.at[step % ring.lhs.shape[0]])
        _write(
            total,
            staged,
            dx,
            rows,
            own,
            partial(_masked, ring, steps, ranks, token_words, column * width, rate),
        )

    _in_roles([(True, feed, compute)], packed)


# ---- positions of thread blocks and warpgroups ------------------------------------------------


def _place(ring, like, columns):
    """The tokens of a thread block's tile, and the index of its tile of channels."""
    tokens = ring.lhs.shape[1]
    row, column = plgpu.planar_snake(
        lax.axis_index("tiles"), (like.shape[0] // tokens, columns), 0, SNAKE
    )
    return _tile(row, tokens), column


def _in_roles(parts, packed):
    """Runs the parts of this thread block in their warpgroups. A part is (condition that it belongs
    to this thread block, its feeding, its computation).

    Threads start with 168 registers each, a third of a processor's 504 for three warpgroups; the
    computing warpgroups take registers from the feeding one.
    """
    warpgroup = lax.axis_index("warpgroup")
    feeding, computing = (24, 240) if packed is None else (88, 208)

    @pl.when(warpgroup == FEEDER)
    def _():
        plgpu.set_max_registers(feeding, action="decrease")
        for here, feed, _ in parts:
            pl.when(here)(feed)

    @pl.when(warpgroup < FEEDER)
    def _():
        plgpu.set_max_registers(computing, action="increase")
        for here, _, compute in parts:
            pl.when(here)(compute)


def _own_tokens(ring):
    """Tokens of the tile that this warpgroup computes."""
    return _tile(lax.axis_index("warpgroup"), ring.lhs.shape[1] // FEEDER)


def _ranks(b):
    """Steps of the low-rank product of a projection."""
    return 0 if b is None else b.shape[0] // STEP


def _tile(number, size):
    return pl.ds(number * size, size)


def _step(step):
    return _tile(step, STEP)


def _within(outer, inner):
    return pl.ds(outer.start + inner.start, inner.size)


# ---- feeding ----------------------------------------------------------------------------------


def _feed(ring, first, steps, lhs_at, rhs_at):
    """Feeds `steps` steps, numbered from `first`, from the places `lhs_at(step)` and
    `rhs_at(step)`.
    """

    def feed_step(step, carry):
        slot = _freed(ring, first + step)
        plgpu.copy_gmem_to_smem(lhs_at(step), ring.lhs.at[slot], ring.full.at[slot])
        plgpu.copy_gmem_to_smem(rhs_at(step), ring.rhs.at[slot], ring.full.at[slot])
        return carry

    lax.fori_loop(0, steps, feed_step, ())


def _feed_outputs(ring, packed, first, dy, weight, rows, column):
    """Feeds the backward steps of one projection, over its outputs."""
    width, steps = ring.rhs.shape[1], dy.shape[1] // STEP

    def dy_at(step):
        return dy.at[rows, _step(step)]

    def codes_at(tile):
        return (
            weight.codes.at[_step(column), _step(tile)],
            weight.absmax.at[_tile(column, 2), _step(tile)],
        )

    if isinstance(weight, NF4Tiles):
        _feed_packed(ring, packed, first, steps, dy_at, codes_at)
    else:
        _feed(ring, first, steps, dy_at, lambda step: weight.at[_tile(column, width), _step(step)])


def _feed_packed(ring, packed, first, steps, lhs_at, packed_at):
    """Feeds steps of a weight in NF4, `packed_at(tile)` -> codes, absmax. The next tile is copied
    while this one is decoded.

    A tile holds two halves of 64 inputs: the weights of two steps forwards, where a step is of
    inputs, both of one step backwards.
    """
    tile_steps = 2 * STEP // ring.rhs.shape[1]

    def fetch(tile, slot):
        codes, absmax = packed_at(tile)
        plgpu.copy_gmem_to_smem(codes, packed.codes.at[slot], packed.came.at[slot])
        plgpu.copy_gmem_to_smem(absmax, packed.absmax.at[slot], packed.came.at[slot])

    def feed_tile(tile, carry):
        slot = remainder(tile, 2)
        pl.when(tile + 1 < steps // tile_steps)(lambda: fetch(tile + 1, 1 - slot))
        plgpu.barrier_wait(packed.came.at[slot])
        for at in range(tile_steps):
            target = _freed(ring, first + tile_steps * tile + at)
            plgpu.copy_gmem_to_smem(
                lhs_at(tile_steps * tile + at), ring.lhs.at[target], ring.full.at[target]
            )
            for half in range(at, 2, tile_steps):
                values = ring.rhs.at[target, pl.ds((half - at) * STEP, STEP)]
                _decode(
                    packed.codes.at[slot], packed.absmax.at[slot, half], values, shift=4 - 4 * half
                )
            # orders the decoded values before their product, and reads before the next copy
            plgpu.commit_smem()
            plgpu.barrier_arrive(ring.full.at[target])
        return carry

    fetch(0, 0)
    lax.fori_loop(0, steps // tile_steps, feed_tile, ())


def _decode(codes, absmax, values, shift):
    """codes [64, n] uint8, absmax [n] f32 -> values [64, n], each rounded once from f32; eight
    columns at a time, to use few registers.
    """
    for start in range(0, values.shape[1], STEP):
        decoded = []
        for column in range(start, start + STEP, 8):
            codes_of_columns = (
                plgpu.load(codes.at[:, pl.ds(column, 8)], layout=TILE, optimized=False).astype(
                    jnp.int32
                )
                >> shift
            )
            scale = plgpu.load(absmax.at[pl.ds(column, 8)], layout=TILE.reduce(0))
            decoded.append(
                (
                    levels(codes_of_columns)
                    * lax.broadcast_in_dim(scale, codes_of_columns.shape, [1])
                ).astype(values.dtype)
            )
        values.at[:, pl.ds(start, STEP)][...] = jnp.concatenate(decoded, axis=1)


def _freed(ring, number):
    """The slot of a step, once its previous contents have been computed with."""
    slots = ring.lhs.shape[0]
    slot = remainder(number, slots)
    pl.when(number >= slots)(lambda: plgpu.barrier_wait(ring.free.at[slot]))
    return slot


# ---- computing --------------------------------------------------------------------------------


def _summed(ring, steps, behind, as_factor, prepare=None):
    """[tokens of a warpgroup, width] f32, the sum of the products of the first `steps` steps;
    `behind` more are fed.

    `as_factor` orients rhs for the product; `prepare(step, lhs)` modifies lhs in its slot.
    """
    slots, tokens = ring.lhs.shape[0], _own_tokens(ring)
    width = max(ring.rhs.shape[1:])

    def free(step):
        """Frees the slot of a completed step if it is used again."""
        reused = (step >= 0) & (step + slots < steps + behind)
        pl.when(reused)(lambda: plgpu.barrier_arrive(ring.free.at[remainder(step + slots, slots)]))

    def form(sums):
        def multiply_step(step, carry):
            slot = remainder(step, slots)
            plgpu.barrier_wait(ring.full.at[slot])
            if prepare is not None:
                prepare(step, ring.lhs.at[slot, tokens])
            plgpu.wgmma(sums, ring.lhs.at[slot, tokens], as_factor(ring.rhs.at[slot]))
            plgpu.wgmma_wait(1)
            free(step - 1)
            return carry

        lax.fori_loop(0, steps, multiply_step, ())
        return sums[...]

    total = pl.run_scoped(form, plgpu.ACC((tokens.size, width), jnp.float32))
    free(steps - 1)
    return total


def _masked(ring, steps, ranks, words, first, rate, channels):
    """mask (dL A^T) of some channels of the tile, [tokens of a warpgroup, n] f32. `first` is the
    first channel of the tile.
    """
    tokens = _own_tokens(ring)

    def form(sums):
        for step in range(steps, steps + ranks):
            slot = step % ring.lhs.shape[0]
            plgpu.wgmma(sums, ring.lhs.at[slot, tokens], transposed(ring.rhs.at[slot, channels]))
        return sums[...]

    low = pl.run_scoped(form, plgpu.ACC((tokens.size, channels.size), jnp.float32))
    return jnp.where(_kept(words, first + channels.start, low.shape, rate), low, 0.0)


def _own_words(words, ring, rows):
    return plgpu.load(
        words.at[_within(rows, _own_tokens(ring))], layout=TILE.reduce(1), optimized=False
    )


def _kept(words, first, shape, rate):
    """[tokens, channels] bool, for channels from `first` on."""
    channel = plgpu.broadcasted_iota(jnp.uint32, shape, 1, layout=TILE) + first.astype(jnp.uint32)
    return is_kept(lax.broadcast_in_dim(words, shape, [0]), channel, rate)


def _write(total, staged, out, rows, columns, added=None):
    """Rounds and writes a tile, 32 channels at a time: the next part is computed while one is
    copied. `added(channels)` is added.
    """
    warpgroup = lax.axis_index("warpgroup")
    tokens = _tile(warpgroup, total.shape[0])
    for number, start in enumerate(range(0, total.shape[1], CHUNK)):
        channels = pl.ds(start, CHUNK)
        part = total[:, start : start + CHUNK]
        part = part if added is None else part + added(channels)
        buffer = staged.at[warpgroup, number % 2]
        plgpu.wait_smem_to_gmem(1, wait_read_only=True)
        buffer[...] = part.astype(out.dtype)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(buffer, out.at[_within(rows, tokens), _within(columns, channels)])
    plgpu.wait_smem_to_gmem(0)
