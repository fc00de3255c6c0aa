"""Language modelling: a decoder reads plain text and predicts each token. train.objective=lm.

Nothing is predicted with such a run; it is the base of another (`jaxre.training.initial`).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import numpy as np
from transformers import PreTrainedTokenizerBase

from jaxre.config import Config
from jaxre.data.cache import cached_tokens
from jaxre.data.dataset import Dataset, Split
from jaxre.data.tokens import encode_texts, read_texts, texts_digest
from jaxre.models.architecture import Architecture
from jaxre.objectives.sft import loss_sum
from jaxre.objectives.validation import PackedLoss

__all__ = ["Validation", "load", "loss_sum"]

Tree = Any


def load(config: Config, tokenizer: PreTrainedTokenizerBase, folder: Path) -> Dataset:
    """Cuts the text into pieces of a row's length and holds a share of them out for validation.

    Raises:
      InputError: the text cannot be used.
    """
    text, row_length = config.data.text, config.train.row_length
    documents = read_texts(text)
    digest = texts_digest(documents, tokenizer, row_length)
    tokens, cached = cached_tokens(
        config.data.cache, digest, lambda: encode_texts(documents, tokenizer, row_length)
    )
    train, held_out = tokens.held_out(text.holdout)
    validation = Split(held_out, [], cached) if len(held_out) else None
    return Dataset(Split(train, [], cached), validation, None, None, tokenizer)


class Validation:
    """The text that was held out, packed once."""

    def __init__(
        self,
        config: Config,
        dataset: Dataset,
        architecture: Architecture,
        dtype: np.dtype,
        mesh: jax.sharding.Mesh,
    ):
        tokens = dataset.validation.tokens
        self.supervised = int(tokens.supervised.sum())
        self.packed = PackedLoss(config, tokens, architecture, dtype, mesh, loss_sum)

    def run(self, trainable: Tree, base: Tree) -> dict[str, float]:
        """Returns the `loss` per token."""
        return {"loss": self.packed.total(trainable, base) / self.supervised}
