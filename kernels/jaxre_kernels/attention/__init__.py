"""Packed-sequence attention: `attention(q, k, v, visible_until, prefix=..., span=...)`."""

from jaxre_kernels.attention.blockwise import Blocks, blockwise_attention
from jaxre_kernels.attention.dispatch import IMPLEMENTATIONS, Heads, attention, blocks_of, choose
from jaxre_kernels.attention.parts import Part, joint_attention
from jaxre_kernels.attention.reference import (
    Window,
    both_ways_mask,
    masked_attention,
    visible_mask,
)

__all__ = [
    "IMPLEMENTATIONS",
    "Blocks",
    "Heads",
    "Part",
    "Window",
    "attention",
    "blocks_of",
    "blockwise_attention",
    "both_ways_mask",
    "choose",
    "joint_attention",
    "masked_attention",
    "visible_mask",
]
