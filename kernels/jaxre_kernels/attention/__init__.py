"""Packed-sequence attention: `attention(q, k, v, visible_until)`."""

from jaxre_kernels.attention.dispatch import IMPLEMENTATIONS, attention, choose
from jaxre_kernels.attention.reference import masked_attention, visible_mask

__all__ = ["IMPLEMENTATIONS", "attention", "choose", "masked_attention", "visible_mask"]
