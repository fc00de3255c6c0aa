"""LoRA projections of one input as one op, `lora_group(x, weights, factors, ...)`, with
counter-based dropout.
"""

from jaxre_kernels.lora.dispatch import choose, lora_group, nf4_form, stored
from jaxre_kernels.lora.dropout import group_words, hash_words, keep_mask, token_keys
from jaxre_kernels.lora.group import Factors, Projections, projections_of

__all__ = [
    "Factors",
    "Projections",
    "choose",
    "group_words",
    "hash_words",
    "keep_mask",
    "lora_group",
    "nf4_form",
    "projections_of",
    "stored",
    "token_keys",
]
