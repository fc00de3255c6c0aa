"""Not yet run on a Hopper GPU: unverified. `tools/hardware_check --only attention` confirms it.

Packed-sequence attention for Hopper GPUs (Pallas Mosaic GPU), forward and backward. Tested in
Pallas's interpreter and compiled ahead of time for an H200 (sm_90a). The interpreter does not
support a factor in registers, so there these four products are ordinary ones
(`gpu_kernels._accumulated`). Every statement about speed is arithmetic.

The computation and the choice of block pairs: `gpu_vjp.py`, whose letters are used here. GPUs
without `wgmma` and TMA: `gpu_sm80.py`.

Layout. Arrays stay [B, S, H, C], the caller's layout: the copy engine picks [U, C] of a head out
of them. Query heads that share a key head are thread blocks that run at the same time and find its
blocks in the L2 cache.

Memory. A thread block needs this much shared memory, with C channels, besides its barriers:

    forward 640 C + 1,536 bytes        dQ 772 C + 1,536        dK, dV 768 C + 1,536

Roofline of one block pair and query head, in bf16, besides 4,096 exponentials each:

              FLOPs                               bytes read from L2      FLOP a byte
    forward   4 U U C   (S, O)                    4 U C    (K, V)         64
    dQ        6 U U C   (S, dP, dQ)               4 U C    (K, V)         96
    dK, dV    8 U U C   (S, dP, dK, dV)           4 U C    (Q, dO~)       128

An H200 has 989 TFLOP/s and 4.8 TB/s by its datasheet, 206 FLOP a byte of its memory; a block of
keys is read from memory once, and from L2 by the G heads and the blocks of queries that see it.
With 16 and 2 heads of 128 channels, 8,192 tokens in examples of 150 are 14, 21 and 28 GFLOP and 75,
109 and 84 MB: at least 16, 23 and 28 us. That leaves out starting a thread block, waiting for its
first copies and writing its results, which matter because a list of three entries is short.
"""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
from jax.experimental.pallas import mosaic_gpu as plgpu

from jaxre_kernels.attention.gpu_kernels import dkv_kernel, dq_kernel, forward_kernel
from jaxre_kernels.attention.gpu_vjp import (
    BLOCK,
    Kernels,
    attend,
    block_of,
    like,
    statistics_of,
    unsupported,
)
from jaxre_kernels.mosaic_gpu import MISSING

__all__ = ["BLOCK", "MISSING", "block_of", "packed_attention", "unsupported"]


def _forward(call, q, k, *arrays):
    return call.run(
        "attention_forward",
        forward_kernel,
        (q, k, *arrays),
        (like(q), statistics_of(q)),
        [
            *_tiles(call, q, 1, 2, 2),
            _vectors(call, 2, 2, dtype=jnp.int32),
            _vectors(call, 2),
            *_arrivals(1, 3),
        ],
        q,
        k,
        heads=q.shape[2],
    )


def _dq(call, q, k, *arrays):
    B, S, H, C = q.shape
    return call.run(
        "attention_dq",
        dq_kernel,
        (q, k, *arrays),
        (like(q), jax.ShapeDtypeStruct((B, H, S), jnp.float32)),
        [
            *_tiles(call, q, 1, 1, 2, 2),
            _vectors(call, 2, 2, dtype=jnp.int32),
            _vectors(call, 2),
            plgpu.SMEM((C,), jnp.float32),
            *_arrivals(4, 3),
        ],
        q,
        k,
        heads=H,
    )


def _dkv(call, q, k, *arrays):
    return call.run(
        "attention_dkv",
        dkv_kernel,
        (q, k, *arrays),
        (like(k), like(k)),
        [
            *_tiles(call, q, 1, 1, 2, 2),
            _vectors(call, 2, dtype=jnp.int32),
            _vectors(call, 2, 2),
            *_arrivals(3, 3),
        ],
        q,
        k,
        heads=k.shape[2],
    )


packed_attention = partial(attend, Kernels(_forward, _dq, _dkv))


def _tiles(call, q, *slots):
    """[U, C] in shared memory, or [slots, U, C], for each number of slots."""
    return [
        call.tile(*((call.block,) if count == 1 else (count, call.block)), like=q)
        for count in slots
    ]


def _vectors(call, *shape, dtype=jnp.float32):
    """[..., U] in shared memory."""
    return plgpu.SMEM((*shape, call.block), dtype)


def _arrivals(own, slot):
    """Barriers for the copies of the own block, and for those into each of two slots."""
    return plgpu.Barrier(num_arrivals=own), plgpu.Barrier(num_arrivals=slot, num_barriers=2)
