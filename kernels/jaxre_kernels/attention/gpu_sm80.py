"""Not yet run on an Ampere or Ada GPU: unverified. `tools/hardware_check --only attention` confirms
it.

Packed-sequence attention for Ampere and Ada GPUs (Pallas Mosaic GPU), forward and backward. For
A100, RTX 30 and RTX 40 (sm_80, sm_86, sm_89), which have neither `wgmma` nor TMA: products are
`mma` of a warp, copies `cp.async`. Compiled ahead of time for an A100 and an RTX 4090; the compiled
code was run on a CPU, instruction by instruction: its root-mean-square distance to f64 is 0.94 to
1.05 of that of the XLA implementation in bf16. Pallas's interpreter has neither `mma` nor
`cp.async`: there the kernels run with ordinary products and with copies that arrive at barriers
(`_barriers`), in the same order. Every statement about speed is arithmetic.

The computation and the choice of block pairs: `gpu_vjp.py`, whose letters are used here.

Layout. Arrays are viewed as [B, S, H C], which moves nothing: a copy takes [W, C] out of that. The
blocks walked over arrive W tokens at a time: 64, but with 128 channels 32 for dQ and 16 for dK and
dV. So no register is spilled (with 32, four of dK and dV were), and two thread blocks fit a
processor with 100 KiB of shared memory.

Memory. A thread block holds 2 (n U + 2 W) C bytes of shared memory, with n = 1 block of its own
forward, 2 backward:

              C = 64        C = 128
    forward   24 KiB        48 KiB
    dQ        32 KiB        48 KiB
    dK, dV    32 KiB        40 KiB

Roofline of one block pair and query head, as in `gpu.py`: 4, 6 and 8 U U C FLOPs for 4 U C bytes
read from the L2 cache. An RTX 4090 has 165 TFLOP/s in bf16 with f32 sums, 1.0 TB/s of memory and 72
MB of L2 by its datasheet; a multiprocessor needs 4,096 cycles for the products of a block pair
forward at 128 channels, several times what the copy of a block takes to arrive: one slot for
arrivals, filled while the other is used, and a second thread block are enough. An A100 (312
TFLOP/s) needs 1,024.
"""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
from jax.experimental.pallas import mosaic_gpu as plgpu

from jaxre_kernels.attention.gpu_sm80_kernels import dkv_kernel, dq_kernel, forward_kernel
from jaxre_kernels.attention.gpu_vjp import (
    BLOCK,
    CHANNELS,
    Kernels,
    attend,
    block_of,
    like,
    statistics_of,
    unsupported,
)
from jaxre_kernels.mosaic_gpu import MISSING

__all__ = ["BLOCK", "MISSING", "block_of", "packed_attention", "unsupported"]


def _forward(engine, call, q, k, v, *arrays):
    block = call.tile(call.block, like=q)
    out, statistics = call.run(
        "attention_forward",
        forward_kernel,
        (_flat(q), _flat(k), _flat(v), *arrays),
        (like(_flat(q)), statistics_of(q)),
        {
            "queries": block,
            "keys": block,
            "values": block,
            **_barriers(engine, call, own=1, keys=1, values=1),
        },
        q,
        k,
        heads=q.shape[2],
    )
    return out.reshape(q.shape), statistics


def _dq(engine, call, q, k, v, bounds, dsums, *arrays):
    B, S, H, _ = q.shape
    block, piece = call.tile(call.block, like=q), call.tile(call.block // _wide(q), like=q)
    dq, slack = call.run(
        "attention_dq",
        dq_kernel,
        (_flat(q), _flat(k), _flat(v), bounds, _flat(dsums), *arrays),
        (like(_flat(q)), jax.ShapeDtypeStruct((B, H, S), jnp.float32)),
        {
            "queries": block,
            "douts": block,
            "keys": piece,
            "values": piece,
            **_barriers(engine, call, own=2, keys=1, values=1),
        },
        q,
        k,
        heads=H,
    )
    return dq.reshape(q.shape), slack


def _dkv(engine, call, q, k, v, bounds, dsums, *arrays):
    block, piece = call.tile(call.block, like=q), call.tile(call.block // _wide(q) ** 2, like=q)
    dk, dv = call.run(
        "attention_dkv",
        dkv_kernel,
        (_flat(q), _flat(k), _flat(v), bounds, _flat(dsums), *arrays),
        (like(_flat(k)), like(_flat(k))),
        {
            "keys": block,
            "values": block,
            "queries": piece,
            "douts": piece,
            **_barriers(engine, call, own=2, queries=1, douts=1),
        },
        q,
        k,
        heads=k.shape[2],
    )
    return dk.reshape(k.shape), dv.reshape(k.shape)


def _kernels(engine):
    return Kernels(*(partial(kernel, engine) for kernel in (_forward, _dq, _dkv)))


packed_attention = partial(attend, _kernels(engine=False))
# The same kernels with the copy engine, for comparison on later GPUs, where Pallas does not support
# `cp.async`.
with_copy_engine = partial(attend, _kernels(engine=True))


def _flat(array):
    """[B, S, H, C] -> [B, S, H C]."""
    return array.reshape(*array.shape[:2], -1)


def _wide(q):
    """1 with 64 channels, 2 with 128."""
    return q.shape[3] // CHANNELS[0]


def _barriers(engine, call, **copies):
    """Barriers at which copies of the copy engine arrive, by name; `cp.async` needs none."""
    return (
        {f"{name}_arrived": plgpu.Barrier(num_arrivals=count) for name, count in copies.items()}
        if engine or call.interpret
        else {}
    )
