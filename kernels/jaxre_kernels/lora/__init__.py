"""LoRA projection and its counter-based dropout."""

from jaxre_kernels.lora.dropout import hash_words, keep_mask, token_keys
from jaxre_kernels.lora.reference import lora_linear, low_rank_term

__all__ = ["hash_words", "keep_mask", "lora_linear", "low_rank_term", "token_keys"]
