"""Vocabulary head and cross-entropy as one op, `linear_cross_entropy(x, head, targets, weights)`,
which never forms all logits.
"""

from jaxre_kernels.cross_entropy.chunked import chunked_cross_entropy
from jaxre_kernels.cross_entropy.dispatch import (
    IMPLEMENTATIONS,
    Channels,
    choose,
    linear_cross_entropy,
    positions_at_once,
)
from jaxre_kernels.cross_entropy.reference import cross_entropy, dense_cross_entropy, logits_of

__all__ = [
    "IMPLEMENTATIONS",
    "Channels",
    "choose",
    "chunked_cross_entropy",
    "cross_entropy",
    "dense_cross_entropy",
    "linear_cross_entropy",
    "logits_of",
    "positions_at_once",
]
