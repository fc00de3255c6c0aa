"""Packed-sequence attention: `attention(q, k, v, visible_until, prefix=..., span=...)`."""

from jaxre_kernels.attention.blockwise import Blocks, blockwise_attention
from jaxre_kernels.attention.dispatch import IMPLEMENTATIONS, Heads, attention, blocks_of, choose
from jaxre_kernels.attention.reference import masked_attention, visible_mask

__all__ = [
    "IMPLEMENTATIONS",
    "Blocks",
    "Heads",
    "attention",
    "blocks_of",
    "blockwise_attention",
    "choose",
    "masked_attention",
    "visible_mask",
]
