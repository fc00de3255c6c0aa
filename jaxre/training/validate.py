"""Validation during training: loss per supervised token, and F1 of the scored labels."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

from jaxre.config import Config
from jaxre.data.dataset import Dataset
from jaxre.data.packing import plan_by_tokens
from jaxre.data.prefixes import find_prefixes
from jaxre.data.rows import Rows, fill_update
from jaxre.evaluation.metrics.scores import score
from jaxre.inference.answers import label_answers
from jaxre.inference.classification import plan_classification, run_classification
from jaxre.inference.model import Model
from jaxre.inference.scoring import ScoringPlan, plan_scoring, run_scoring
from jaxre.models import sharding
from jaxre.models.architecture import Architecture, EncoderArchitecture, check_vocabulary
from jaxre.models.lora import scale_of
from jaxre.relations.schema import by_dataset
from jaxre.training.kernels import ops_of
from jaxre.training.step import loss_sum, model_of

Tree = Any


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
    an answer (a gold label outside the schema, raw text), a separate pass computes the loss. Each
    step is compiled once, at the first `run`, and takes the weights as arguments.
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
        self.scored = [] if dataset.template is None else self._scored(dataset)
        self.batches: list[Rows] = []
        tokens = self.split.tokens
        if sum(scored.answers.shape[1] for scored in self.scored) == len(tokens):
            return
        shards = sharding.row_shards(mesh)
        row_length = config.train.row_length
        pack = functools.partial(
            plan_by_tokens,
            tokens.lengths,
            tokens.supervised,
            find_prefixes(tokens),
            seed=0,
            epochs=1,
            row_length=row_length,
            accumulation=1,
        )
        # Batches of equal size, so that a split of few rows is not padded to a full batch.
        packed, limit = len(pack(rows=1).updates), max(1, config.predict.batch_tokens // row_length)
        rows = -(-packed // -(-packed // limit))
        plan = pack(rows=-(-rows // shards) * shards)
        self.batches = [
            Rows(*(array[0] for array in fill_update(tokens, plan.prefixes, update)))
            for update in plan.updates
        ]
        ops = ops_of(config.kernels, mesh)
        (shape,) = plan.shapes

        def batch_loss(trainable: Tree, base: Tree, rows: Rows) -> jax.Array:
            params, adapter = model_of(trainable, base, config, None, dtype)
            return loss_sum(params, adapter, rows, architecture, ops, shape)

        self.batch_loss = jax.jit(batch_loss, out_shardings=sharding.replicated(mesh))

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
        """Returns `loss` per supervised token and, for relations, `f1` (positive-class micro),
        `accuracy` and `collapsed`.

        With several datasets these are unweighted means (`collapsed`: any), and the figures of each
        follow as `f1/NAME` and so on.
        """
        total = sum(
            float(self.batch_loss(trainable, base, sharding.put_rows(rows, self.sharding)))
            for rows in self.batches
        )
        figures = {}
        if self.scored:
            params, adapter = model_of(trainable, base, self.config, None, self.dtype)
            factors = adapter.factors if adapter else None
            model = Model(params, self.architecture, factors, scale_of(self.config.lora))
        for scored in self.scored:
            scores = run_scoring(model, scored.plan)
            figures[scored.dataset] = _figures(scored.gold, scores, scored.labels)
            if not self.batches:
                total -= float(scores[tuple(scored.answers)].sum())
        summary = {"loss": total / int(self.split.tokens.supervised.sum())}
        if not figures:
            return summary
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


class LabelValidation:
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
        return {"loss": loss} | _figures([labels[number] for number in gold], scores, labels)


def _figures(gold: Sequence[str], scores: np.ndarray, labels: Sequence[str]) -> dict[str, float]:
    """Scores of the most probable labels; scores: [n, N]."""
    result = score(gold, [labels[best] for best in scores.argmax(axis=1)])
    return {"f1": result.f1, "accuracy": result.accuracy, "collapsed": result.collapsed}


def described_validation(validated: dict[str, float]) -> str:
    """Line on a validation; of each dataset's own figures it has only the F1."""
    line = "  ".join(
        f"validation {name} {value:.4f}"
        for name, value in validated.items()
        if name in ("loss", "f1", "accuracy") or name.startswith("f1/")
    )
    if not validated.get("collapsed"):
        return line
    collapsed = [
        name.removeprefix("collapsed/")
        for name, value in validated.items()
        if name.startswith("collapsed/") and value
    ]
    where = f" of {', '.join(collapsed)}" if collapsed else ""
    return f"{line}  COLLAPSED: one label is predicted for every example{where}"
