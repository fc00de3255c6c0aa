"""Supervised fine-tuning: a decoder writes the label after the prompt. train.objective=sft.

Prediction scores the labels as answers (`inference/scoring.py`), searches for the best one
(`inference/search.py`) or writes text (`inference/decoding.py`).
"""

from __future__ import annotations

import dataclasses
import functools
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
from transformers import PreTrainedTokenizerBase

from jaxre.config import Config
from jaxre.data.cache import read_note, stored_tokens, write_note
from jaxre.data.dataset import Dataset, Pools, recipe_of, tokenise
from jaxre.data.packing import RowShape
from jaxre.data.rows import Rows
from jaxre.data.template import ChatTemplate
from jaxre.inference.answers import label_answers
from jaxre.inference.model import Model
from jaxre.inference.scoring import ScoringPlan, plan_scoring, run_scoring
from jaxre.models import decoder, sharding
from jaxre.models.architecture import Architecture, check_vocabulary
from jaxre.models.lora import model_of, scale_of
from jaxre.models.ops import ONE_DEVICE, Ops
from jaxre.objectives.validation import PackedLoss, label_figures
from jaxre.relations import labels, leaks, mixtures
from jaxre.relations.mixtures import Count
from jaxre.relations.schema import Example, Schemas, by_dataset

Tree = Any


# ---- data ----------------------------------------------------------------------------------------


def load(config: Config, tokenizer: PreTrainedTokenizerBase, folder: Path) -> Dataset:
    """Reads, renders and tokenises the training and validation data.

    Args:
      folder: of the model, named in messages about its template.

    Raises:
      InputError: the data, the template or the schema cannot be used.
    """
    template = ChatTemplate(tokenizer, config.prompt.date, str(folder))

    @functools.cache
    def pool() -> mixtures.Pool:
        return mixtures.read(
            config.data.train,
            "data.train",
            lambda train_sources: leaks.load_train(config.data, train_sources),
        )

    def examples() -> list[Example]:
        return pool().examples

    def pools() -> Pools:
        return pool().by_dataset

    recipe = recipe_of(config, template)
    note = recipe and read_note(config.data.cache, recipe)
    tokens = note and stored_tokens(config.data.cache, note["digest"])
    stored = (note["digest"], tokens) if tokens else None
    if stored:
        schemas, notices = Schemas.from_json(note["labels"]), note["notices"]
        counts = tuple(Count(*count) for count in note["counts"])
    else:
        schemas, counts = labels.schemas_of(config.data, pools()), pool().counts
        notices = schemas.check(examples(), "data.train", strict=config.prompt.enumerate)
    train = tokenise(config, examples, schemas, template, pools, "data.train", stored)
    train = dataclasses.replace(train, counts=counts)
    # Not stored if a file changed between its digest and its reading.
    if recipe and not stored and recipe == recipe_of(config, template):
        note = {
            "labels": schemas.to_json(),
            "notices": notices,
            "counts": list(map(dataclasses.astuple, counts)),
            "digest": train.digest,
        }
        write_note(config.data.cache, recipe, note)
    validation = None
    if config.data.validation:
        held_out = mixtures.read(config.data.validation, "data.validation")
        schemas = labels.with_given(schemas, config.data, by_dataset(held_out.examples))
        notices = notices + schemas.check(held_out.examples, "data.validation")
        validation = tokenise(
            config, lambda: held_out.examples, schemas, template, pools, "data.validation"
        )
        validation = dataclasses.replace(validation, counts=held_out.counts)
    notices = (*labels.label_source_notices(config.data), *notices)
    return Dataset(train, validation, schemas, template, tokenizer, recipe=recipe, notices=notices)


# ---- loss ----------------------------------------------------------------------------------------


def loss_sum(
    params: Tree,
    adapter: decoder.Adapter | None,
    rows: Rows,
    architecture: Architecture,
    ops: Ops = ONE_DEVICE,
    shape: RowShape | None = None,
    remat: str = "none",
    keys: jax.Array | None = None,
) -> jax.Array:
    """Sums the weighted cross-entropy of a micro-batch; last layer and head run only at supervised
    positions.

    Args:
      ops: operations of the devices that share the rows.
      shape: bounds of attention in the rows; whole rows by default.
      keys: not used; an adapter has its own.
    """
    bounds = {"prefix": shape.prefix, "span": shape.span} if shape else {}
    packed = (rows.tokens, rows.positions, rows.visible_until)
    # B S D
    x = decoder.forward(
        params, *packed, architecture, adapter, ops, chosen=rows.supervised, remat=remat, **bounds
    )
    with jax.named_scope("head"):
        normed, table = decoder.head_factors(params, x, architecture)
        return ops.cross_entropy(normed, table, rows.targets, rows.weights)


# ---- validation ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Scored:
    """Validation examples of a dataset, to be scored with its labels.

    answers: [2, m] int64, numbers of an example and its label, for examples whose answer consists
    of exactly the tokens that training supervises.
    """

    dataset: str
    gold: tuple[str, ...]
    labels: tuple[str, ...]
    plan: ScoringPlan
    answers: np.ndarray


class Validation:
    """The validation split, tokenised and packed once; `run` measures the current weights on it.

    The loss of an answer is minus its score, so the scores of all labels include it. If they lack
    an answer (a gold label outside the schema), a separate pass computes the loss. Each step is
    compiled once, at the first `run`, and takes the weights as arguments.
    """

    def __init__(
        self,
        config: Config,
        dataset: Dataset,
        architecture: Architecture,
        dtype: np.dtype,
        mesh: jax.sharding.Mesh,
    ):
        self.config, self.architecture, self.dtype = config, architecture, dtype
        self.sharding = sharding.row_sharding(mesh, leading=0)
        self.split = dataset.validation
        self.scored = self._scored(dataset)
        self.packed: PackedLoss | None = None
        if sum(scored.answers.shape[1] for scored in self.scored) != len(self.split.tokens):
            self.packed = PackedLoss(config, self.split.tokens, architecture, dtype, mesh, loss_sum)

    def _scored(self, dataset: Dataset) -> list[Scored]:
        questions = dict(
            zip((example.id for example in self.split.examples), self.split.questions, strict=True)
        )
        tokens = self.split.tokens
        supervised = {
            name: tuple(tokens[number][tokens.prompt_lengths[number] :].tolist())
            for number, name in enumerate(tokens.ids)
        }
        scored = []
        for name, examples in by_dataset(self.split.examples).items():
            labels = dataset.schemas.of(name).labels
            prompts, answers = label_answers(
                dataset.template, [questions[example.id] for example in examples], labels
            )
            check_vocabulary(
                max(token for of_labels in answers for answer in of_labels for token in answer),
                self.architecture,
            )
            plan = plan_scoring(
                prompts,
                answers,
                self.architecture,
                batch_tokens=self.config.predict.batch_tokens,
                sharding=self.sharding,
                names=[example.id for example in examples],
            )
            index = {label: number for number, label in enumerate(labels)}
            pairs = [
                (number, index[example.relation])
                for number, example in enumerate(examples)
                if example.relation in index
                and supervised.get(example.id) == tuple(answers[number][index[example.relation]])
            ]
            gold = tuple(example.relation for example in examples)
            gold_answers = np.array(pairs, np.int64).reshape(-1, 2).T
            scored.append(Scored(name, gold, labels, plan, gold_answers))
        return scored

    def run(self, trainable: Tree, base: Tree) -> dict[str, float]:
        """Returns `loss` per supervised token, `f1` (positive-class micro), `accuracy` and
        `collapsed`.

        With several datasets these are unweighted means (`collapsed`: any), and the figures of each
        follow as `f1/NAME` and so on.
        """
        total = self.packed.total(trainable, base) if self.packed else 0.0
        figures = {}
        params, adapter = model_of(trainable, base, self.config, None, self.dtype)
        factors = adapter.factors if adapter else None
        model = Model(params, self.architecture, factors, scale_of(self.config.lora))
        for scored in self.scored:
            scores = run_scoring(model, scored.plan)
            figures[scored.dataset] = label_figures(scored.gold, scores, scored.labels)
            if self.packed is None:
                total -= float(scores[tuple(scored.answers)].sum())
        summary = {"loss": total / int(self.split.tokens.supervised.sum())}
        if len(figures) == 1:
            return summary | figures[self.scored[0].dataset]
        for name in ("f1", "accuracy"):
            summary[name] = float(np.mean([values[name] for values in figures.values()]))
        summary["collapsed"] = any(values["collapsed"] for values in figures.values())
        return summary | {
            f"{name}/{dataset}": value
            for dataset, values in figures.items()
            for name, value in values.items()
        }
