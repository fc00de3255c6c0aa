"""Not yet run on a TPU: unverified. `tools/hardware_check --only lora,nf4` confirms it.

The two Pallas kernels of a LoRA group on TPUs; a step computes a block of tokens and a part of the
wide axis. Their formulas: `tpu.py`.

The grid is (spans of tokens, parts, blocks of a span). Ranks are padded to 16 and are rows: a
[R, I], b [R, O], low [R, tokens]. Lists have an entry for each projection, None in `bs` and `dbs`
where LoRA does not target it and in `values` where it is dense.
"""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from jaxre_kernels.lora.dropout import is_kept
from jaxre_kernels.mosaic_tpu import product
from jaxre_kernels.nf4.tpu_kernels import decode
from jaxre_kernels.nf4.weight import BLOCK


def forward_kernel(
    words_ref, x_ref, a_ref, weights, bs, ys, low_ref, values, lows, *, scale, rate, chunk
):
    """x [n, I], weights [I, o], bs [r, o] -> ys [n, o] of a part of the outputs; low [R, n] of all
    outputs.

    `lows` [blocks of a span, R, n] stores the narrow product of the span's tokens, dropout
    included; it is computed with the first part of the outputs. `values` [I, o] stores the decoded
    part of an NF4 weight, computed with the first tokens.
    """
    part, step = pl.program_id(1), pl.program_id(2)
    _decode_all(step == 0, weights, values)
    if a_ref is not None:

        @pl.when(part == 0)
        def _():
            low_ref[...] = (_low(words_ref, x_ref, a_ref, rate, chunk) * scale).astype(
                low_ref.dtype
            )
            lows[step] = low_ref[...]

        low = lows[step]
    first = 0
    for weight, value, b, y in zip(weights, values, bs, ys, strict=True):
        total = product(x_ref[...], (weight if value is None else value)[...], 1, 0)  # n o
        if b is not None:
            total += product(low[first : first + b.shape[0]], b[...], 0, 0)
            first += b.shape[0]
        y[...] = total.astype(y.dtype)


def backward_kernel(
    words_ref,
    x_ref,
    a_ref,
    low_ref,
    weights,
    bs,
    dys,
    dx_ref,
    da_ref,
    dbs,
    values,
    dlows,
    *,
    scale,
    rate,
    chunk,
):
    """dys [n, O], weights [i, O], bs [r, O], x [n, i] -> dx [n, i] and da [1, R, i] of a part of
    the inputs, dbs [1, r, O].

    da and dbs are summed over the tokens of a span, dbs with its first part. `dlows` and `values`
    are stored as in the forward kernel.
    """
    part, step = pl.program_id(1), pl.program_id(2)
    _decode_all(step == 0, weights, values, part)
    if a_ref is not None:
        targeted = [(b, dy, db) for b, dy, db in zip(bs, dys, dbs, strict=True) if b is not None]

        @pl.when((part == 0) & (step == 0))
        def _():
            for _, _, db in targeted:
                db[...] = jnp.zeros_like(db)

        @pl.when(part == 0)
        def _():
            first = 0
            for b, dy, db in targeted:
                rows = slice(first, first + b.shape[0])
                # r n
                dlows[step, rows] = (product(b[...], dy[...], 1, 1) * scale).astype(dlows.dtype)
                db[0] += product(low_ref[rows], dy[...], 1, 0)
                first += b.shape[0]

        @pl.when(step == 0)
        def _():
            da_ref[...] = jnp.zeros_like(da_ref)

        dlow = dlows[step]
        words = _column(words_ref) if rate else None

    def add(at, start, carry):
        dx = 0.0
        for weight, value, dy in zip(weights, values, dys, strict=True):
            dx += product(dy[...], (weight if value is None else value)[at, :], 1, 1)  # n chunk
        if a_ref is not None:
            x, low = x_ref[:, at], product(dlow, a_ref[:, at], 0, 0)
            if rate:
                kept = _kept(words, part * dx_ref.shape[1] + start, x.shape[1], rate)
                x, low = _where(kept, x), _where(kept, low)
            da_ref[0, :, at] += product(dlow, x, 1, 0)
            dx += low
        dx_ref[:, at] = dx.astype(dx_ref.dtype)
        return carry

    _over_chunks(dx_ref.shape[1], chunk, add, 0)


def _low(words_ref, x_ref, a_ref, rate, chunk):
    """[R, n] f32: a times x with dropped channels set to 0, some channels at a time."""
    if not rate:
        return product(a_ref[...], x_ref[...], 1, 1)
    words = _column(words_ref)

    def add(at, start, total):
        x = x_ref[:, at]
        return total + product(a_ref[:, at], _where(_kept(words, start, x.shape[1], rate), x), 1, 1)

    return _over_chunks(
        x_ref.shape[1], chunk, add, jnp.zeros((a_ref.shape[0], x_ref.shape[0]), jnp.float32)
    )


def _over_chunks(width, chunk, body, carry):
    """`body(slice, its start, carry)` for each chunk of an axis; the last may be shorter."""

    def whole(i, carry):
        start = pl.multiple_of(i * chunk, chunk)
        return body(pl.ds(start, chunk), start, carry)

    rest = width % chunk
    if width > rest:
        carry = jax.lax.fori_loop(0, width // chunk, whole, carry)
    return body(pl.ds(width - rest, rest), width - rest, carry) if rest else carry


def _decode_all(now, weights, values, part=0):
    """Decodes NF4 weights if `now`. `part` is a part of the inputs; absmax cover all inputs."""
    for weight, value in zip(weights, values, strict=True):
        if value is not None:
            first = part * (value.shape[0] // BLOCK)
            pl.when(now)(partial(decode, weight.codes, weight.absmax, value, first))


def _column(words_ref):
    """[1, n] int32 -> [n, 1] uint32. Tokens lie along the lanes in memory: a column would be stored
    as [n, 128].
    """
    words = words_ref[...]
    return jnp.broadcast_to(words, (8, words.shape[1])).T[:, :1].astype(jnp.uint32)


def _kept(words, start, channels, rate):
    """[n, channels] bool, for channels from `start` on."""
    channel = jax.lax.broadcasted_iota(jnp.int32, (1, channels), 1) + start
    return is_kept(words, channel.astype(jnp.uint32), rate)


def _where(kept, x):
    """Selects in f32: the masks are of 32-bit words, and not every TPU selects 16-bit values."""
    return jnp.where(kept, x.astype(jnp.float32), 0.0).astype(x.dtype)
