"""Not yet run on a Hopper GPU: unverified. `tools/hardware_check --only lora,nf4` confirms it.

dL and dB of a LoRA projection for Hopper GPUs, from one read of dY (Pallas Mosaic GPU). Tested in
Pallas's interpreter and compiled ahead of time for an H200 (sm_90a). Every statement about speed is
arithmetic.

    dL = c dY B^T,    dB = L^T dY        (see `group.py`)

One is a sum over outputs, the other over tokens. A thread block has a range of outputs and a span
of tokens: B of its range is in shared memory, dB of its range in f32 registers until the span is
over, dL of 128 tokens until they are done. So every range writes partial sums of dL, every span of
dB, in f32, which XLA adds up. (dL of a single range is complete, but registers hold 16 bytes of a
row of bf16 together, half of a memory transaction.) Sums have a fixed order, without atomic
additions.

Roofline. Bytes of memory, for N tokens, O outputs, ranks padded to r of 16 or 32, k ranges and s
spans:

    two products of XLA    4 N O, at least
    this kernel            2 N O + 4 r N (L is transposed first) + 8 r N k (dL written and read) +
        8 r O s (dB, s > 1)

Among cuts into at most 132 thread blocks (the processors of an H200) and ranges that the registers
hold, `panel_of` selects the one that moves fewest bytes, or none where XLA's products move fewer.
For 16,384 tokens that is, as a share of 4 N O,

    rank                                16      32
    0.5B   q, o, down of 896            0.72    0.94
           gate, up of 4,864            0.59    0.69
    3B     k, v of 256                  0.94    -
           q, o, down of 2,048          0.63    0.77
           gate, up of 11,008           0.58    0.65

Rank 64 is left to XLA: dB of 512 outputs spills, and with ranges of 256 the partial sums of dL move
as many bytes as a read of dY. Each pair of bytes of dY takes 4 r FLOPs: 64 a byte with r of 32,
below the 206 of an H200, so memory bounds all of these.

Memory: nothing is saved beyond the call; the partial sums are temporary. Shared memory: 98,304 +
512 r + 256 r pairs bytes.

The kernel. A step is 128 tokens and 128 outputs, two slabs of 64. One warpgroup requests steps from
the copy engine, three slots ahead; two multiply. Each computes 64 tokens and both slabs of dL, and
all 128 tokens and its own slab of dB. Ranks are the narrow side of both products, so few of them
take few registers. Beyond the last output, a range or B repeats the last slab, with zeros for B.
"""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from jaxre_kernels.mosaic_gpu import PROCESSORS, quotient, remainder, shared_tile, transposed

SLAB = 64  # outputs whose dB a warpgroup sums
PAIR = 2 * SLAB  # outputs of a step
TOKENS = 128  # of a step
SLOTS = 3  # steps in flight
# Pairs of a range, by ranks: those that compile without spills. 8 pairs of 16 ranks spill 656
# bytes, 4 of 64 ranks 768, and fewer pairs of 64 move as much as XLA. Not multiples of `SLOTS`: the
# slots of pairs would be constants whose addresses stay in registers.
PAIRS = {16: (1, 2, 4), 32: (1, 2, 4)}
FEEDER = 2  # the warpgroup that feeds; the two before it multiply


class Panel(NamedTuple):
    """The cut of a projection: pairs of slabs of a range, ranges of outputs, spans of tokens. A
    thread block has one range and span.
    """

    pairs: int
    ranges: int
    spans: int


class Ring(NamedTuple):
    """In shared memory, with r ranks: dys [S, 2, TOKENS, SLAB], lows [2, r, TOKENS], bs [pairs, 2,
    r, SLAB]; and their barriers.
    """

    dys: Any
    lows: Any
    bs: Any
    full: Any
    free: Any
    low_full: Any
    low_free: Any
    b_full: Any


def panel_of(tokens: int, outputs: int, rank: int) -> Panel | None:
    """The cut of a projection that moves the fewest bytes; None if XLA's products move fewer."""
    r, steps, pairs = _width(rank), tokens // TOKENS, pl.cdiv(outputs, PAIR)

    def cut(of_range):
        ranges = pl.cdiv(pairs, of_range)
        return Panel(of_range, ranges, max(1, min(steps, PROCESSORS // ranges)))

    def moved(panel):
        partial_sums = 8 * r * tokens * panel.ranges + 8 * r * outputs * panel.spans * (
            panel.spans > 1
        )
        return 2 * tokens * outputs + 4 * r * tokens + partial_sums

    best = min(map(cut, PAIRS.get(r, ())), key=moved, default=None)
    return best if best is not None and moved(best) < 4 * tokens * outputs else None


def narrow_gradients(
    dy: jax.Array, low: jax.Array, b: jax.Array, panel: Panel, scale: float, interpret: Any
) -> tuple[jax.Array, jax.Array]:
    """dL = scale dY B^T and dB = L^T dY of one projection.

    Args:
      dy: [N, O] bf16, N a multiple of 128, O of 64; low: [N, R] and b: [R, O] of its dtype, R up to
        32.
      interpret: as in `pallas_lora_group`.

    Returns:
      [N, R] of that dtype, and [R, O] f32.
    """
    (tokens, outputs), rank, dtype = dy.shape, b.shape[0], dy.dtype
    r, wide = _width(rank), panel.pairs * panel.ranges * PAIR

    dlow, db = plgpu.kernel(
        partial(_kernel, panel=panel, scale=scale),
        out_type=[
            jax.ShapeDtypeStruct((panel.ranges, tokens, r), jnp.float32),
            jax.ShapeDtypeStruct((panel.spans, wide, r), jnp.float32),
        ],
        scratch_types={
            "ring": Ring(
                shared_tile((SLOTS, 2, TOKENS, SLAB), dtype),
                shared_tile((2, r, TOKENS), dtype),
                shared_tile((panel.pairs, 2, r, SLAB), dtype),
                plgpu.Barrier(num_arrivals=2, num_barriers=SLOTS),
                plgpu.Barrier(num_arrivals=2, num_barriers=SLOTS),
                plgpu.Barrier(num_arrivals=1, num_barriers=2),
                plgpu.Barrier(num_arrivals=2, num_barriers=2),
                plgpu.Barrier(num_arrivals=2, num_barriers=panel.pairs),
            )
        },
        grid=(panel.ranges * panel.spans,),
        grid_names=("blocks",),
        num_threads=3,
        thread_name="warpgroup",
        interpret=interpret,
        kernel_name=f"lora_narrow_{r}x{panel.pairs}",
    )(dy, jnp.pad(low.T, ((0, r - rank), (0, 0))), jnp.pad(b, ((0, r - rank), (0, wide - outputs))))
    return _total(dlow)[:, :rank].astype(dtype), _total(db)[:outputs, :rank].T


def _total(parts):
    return parts[0] if parts.shape[0] == 1 else parts.sum(0)


def _width(rank):
    """Ranks padded to the widths of the kernel."""
    return next((width for width in PAIRS if rank <= width), rank)


def _kernel(dy, low, b, dlow, db, *, ring, panel, scale):
    """dy [N, O], low [r, N], b [r, O padded] -> dlow [ranges, N, r], db [spans, O padded, r]."""
    block, warpgroup = lax.axis_index("blocks"), lax.axis_index("warpgroup")
    own, span = remainder(block, panel.ranges), quotient(block, panel.ranges)
    all_steps = dy.shape[0] // TOKENS
    first, end = (quotient((span + i) * all_steps, panel.spans) for i in (0, 1))
    steps, pairs, r = end - first, panel.pairs, low.shape[0]

    # Feeding gets more registers than the 24 of `gpu_kernels.py`: with those its addresses spill.
    @pl.when(warpgroup == FEEDER)
    def _():
        plgpu.set_max_registers(56, action="decrease")
        slab, last = own * (2 * pairs), dy.shape[1] // SLAB - 1

        def feed_b(pair, carry):
            for half in range(2):
                columns = pl.ds((slab + 2 * pair + half) * SLAB, SLAB)
                plgpu.copy_gmem_to_smem(
                    b.at[:, columns], ring.bs.at[pair, half], ring.b_full.at[pair]
                )
            return carry

        def feed_step(step, carry):
            rows, at = pl.ds((first + step) * TOKENS, TOKENS), remainder(step, 2)
            pl.when(step >= 2)(lambda: plgpu.barrier_wait(ring.low_free.at[at]))
            plgpu.copy_gmem_to_smem(low.at[:, rows], ring.lows.at[at], ring.low_full.at[at])

            def feed_pair(pair, carry):
                number = step * pairs + pair
                slot = remainder(number, SLOTS)
                pl.when(number >= SLOTS)(lambda: plgpu.barrier_wait(ring.free.at[slot]))
                for half in range(2):
                    columns = pl.ds(jnp.minimum(slab + 2 * pair + half, last) * SLAB, SLAB)
                    plgpu.copy_gmem_to_smem(
                        dy.at[rows, columns], ring.dys.at[slot, half], ring.full.at[slot]
                    )
                return carry

            return lax.fori_loop(0, pairs, feed_pair, carry)

        lax.fori_loop(0, pairs, feed_b, ())
        lax.fori_loop(0, steps, feed_step, ())

    @pl.when(warpgroup < FEEDER)
    def _():
        plgpu.set_max_registers(224, action="increase")
        half_tokens = pl.ds(warpgroup * (TOKENS // 2), TOKENS // 2)

        def form(*dbs):
            for pair in range(pairs):
                plgpu.barrier_wait(ring.b_full.at[pair])

            def multiply_step(step, carry):
                at = remainder(step, 2)
                # Always zero, unknown to the compiler: otherwise it would keep the addresses of all
                # of B in registers.
                zero = step * quotient(block, 2**20)
                plgpu.barrier_wait(ring.low_full.at[at])

                def form_dlow(total):
                    for pair, sums in enumerate(dbs):
                        number = step * pairs + pair
                        slot = remainder(number, SLOTS)
                        plgpu.barrier_wait(ring.full.at[slot])
                        for half in range(2):
                            plgpu.wgmma(
                                total,
                                ring.dys.at[slot, half, half_tokens],
                                transposed(ring.bs.at[pair + zero, half]),
                            )
                        plgpu.wgmma(
                            sums,
                            transposed(ring.dys.at[slot, warpgroup]),
                            transposed(ring.lows.at[at]),
                        )
                        # meanwhile the other warpgroup multiplies, and memory is slower than both
                        plgpu.wgmma_wait(0)
                        # frees the slot if it is used again
                        pl.when(number + SLOTS < steps * pairs)(
                            lambda slot=slot: plgpu.barrier_arrive(ring.free.at[slot])
                        )
                    pl.when(step + 2 < steps)(lambda: plgpu.barrier_arrive(ring.low_free.at[at]))
                    return total[...]

                total = pl.run_scoped(form_dlow, plgpu.ACC((TOKENS // 2, r), jnp.float32))
                rows = pl.ds((first + step) * TOKENS + half_tokens.start, TOKENS // 2)
                dlow.at[own, rows][...] = total * scale
                return carry

            lax.fori_loop(0, steps, multiply_step, ())
            return [sums[...] for sums in dbs]

        for pair, sums in enumerate(
            pl.run_scoped(form, *[plgpu.ACC((SLAB, r), jnp.float32)] * pairs)
        ):
            db.at[span, pl.ds((own * pairs + pair) * PAIR + warpgroup * SLAB, SLAB)][...] = sums
