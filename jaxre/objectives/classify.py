"""Classification: an encoder reads the marked text and has one head for one schema.
train.objective=classify.

Prediction computes the probabilities of all labels at once (`inference/classification.py`).
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jaxre_kernels.cross_entropy import cross_entropy
from transformers import PreTrainedTokenizerBase

from jaxre.config import Config
from jaxre.data.cache import cached_tokens
from jaxre.data.dataset import Dataset, Split
from jaxre.data.markers import add_markers, encode_marked, marked_digest, marked_text, markers_in
from jaxre.data.packing import RowShape
from jaxre.data.rows import Rows
from jaxre.inference.classification import plan_classification, run_classification
from jaxre.models import encoder, sharding
from jaxre.models.architecture import EncoderArchitecture
from jaxre.models.lora import model_of
from jaxre.models.ops import ONE_DEVICE, Ops
from jaxre.objectives.validation import label_figures
from jaxre.relations import labels, leaks, sources
from jaxre.relations.schema import ANY, Example

Tree = Any


def load(config: Config, tokenizer: PreTrainedTokenizerBase, folder: Path) -> Dataset:
    """Reads, marks and tokenises the examples; adds the entity markers to the tokenizer.

    Raises:
      InputError: the data or the schema cannot be used.
    """
    (train,) = leaks.load_train(config.data, [config.data.train])
    schemas = labels.schemas_of(config.data, {ANY: train})
    schema = schemas.of(ANY)
    schema.check(train, "data.train")
    new_tokens = add_markers(tokenizer, train)
    markers = markers_in(tokenizer)
    number_of = {label: number for number, label in enumerate(schema.labels)}
    held_out = sources.load(config.data.validation) if config.data.validation else None
    if held_out is not None:
        schema.check(held_out, "data.validation")

    def split(examples: list[Example], place: str) -> Split:
        texts = [marked_text(example, markers) for example in examples]
        digest = marked_digest(examples, texts, tokenizer)
        tokens, cached = cached_tokens(
            config.data.cache, digest, lambda: encode_marked(examples, texts, tokenizer)
        )
        numbers = np.array([number_of[example.relation] for example in examples], np.int32)
        fitting, dropped = dataclasses.replace(tokens, labels=numbers).fitting(
            config.train.row_length, config.data.too_long, place
        )
        return Split(fitting, dropped, cached, lambda: examples)

    validation = None if held_out is None else split(held_out, "data.validation")
    notices = tuple(labels.label_source_notices(config.data))
    return Dataset(
        split(train, "data.train"),
        validation,
        schemas,
        None,
        tokenizer,
        new_tokens,
        notices=notices,
    )


def loss_sum(
    params: Tree,
    adapter: None,
    rows: Rows,
    architecture: EncoderArchitecture,
    ops: Ops = ONE_DEVICE,
    shape: RowShape | None = None,
    remat: str = "none",
    keys: jax.Array | None = None,
) -> jax.Array:
    """Sums the weighted cross-entropy of a micro-batch, which supervises each example once, at its
    first token.

    Args:
      shape: not used; attention looks at whole examples.
      keys: [B, T], switch dropout on.
    """
    packed = (rows.tokens, rows.positions, rows.visible_until, rows.supervised)
    logits = encoder.classify(params, *packed, architecture, keys, ops, remat)
    return cross_entropy(logits, rows.targets, rows.weights)  # B S N


class Validation:
    """The validation split of an encoder: examples that fit a row (the log lists the others)."""

    def __init__(
        self,
        config: Config,
        dataset: Dataset,
        architecture: EncoderArchitecture,
        dtype: np.dtype,
        mesh: jax.sharding.Mesh,
    ):
        self.config, self.architecture, self.dtype = config, architecture, dtype
        self.plan = plan_classification(
            dataset.validation.tokens,
            architecture,
            batch_tokens=config.predict.batch_tokens,
            shards=sharding.row_shards(mesh),
            sharding=sharding.row_sharding(mesh, leading=0),
        )

    def run(self, trainable: Tree, base: Tree) -> dict[str, float]:
        """Returns `loss` per example, `f1` (positive-class micro), `accuracy`, `collapsed`."""
        params, _ = model_of(trainable, base, self.config, None, self.dtype)
        scores = run_classification(params, self.architecture, self.plan)  # n N
        gold, labels = self.plan.tokens.labels, self.architecture.labels
        loss = -float(np.take_along_axis(scores, gold[:, None], axis=1).mean())
        return {"loss": loss} | label_figures([labels[number] for number in gold], scores, labels)
