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
from jaxre.evaluation.metrics import score
from jaxre.inference.answers import label_answers
from jaxre.inference.classification import plan_classification, run_classification
from jaxre.inference.model import Model
from jaxre.inference.scoring import ScoringPlan, plan_scoring, run_scoring
from jaxre.models.architecture import Architecture, EncoderArchitecture
from jaxre.models.lora import scale_of
from jaxre.relations.schema import by_dataset
from jaxre.training import sharding
from jaxre.training.initial import check_vocabulary
from jaxre.training.kernels import ops_of
from jaxre.training.step import loss_sum, model_of

Tree = Any


@dataclass(frozen=True)
class Scored:
    """The validation examples of one dataset, to be scored with its labels."""

    dataset: str
    gold: tuple[str, ...]
    labels: tuple[str, ...]
    plan: ScoringPlan


class Validation:
    """The validation split, tokenised and packed once; `run` measures the current weights on it.

    Both steps are compiled once, at the first `run`, and take the weights as arguments.
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
        shards = sharding.row_shards(mesh)
        tokens = self.split.tokens
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
        # Batches of equal size: a split of few rows is not padded to a whole batch.
        packed, most = len(pack(rows=1).updates), max(1, config.predict.batch_tokens // row_length)
        rows = -(-packed // -(-packed // most))
        plan = pack(rows=-(-rows // shards) * shards)
        self.batches = [
            Rows(*(array[0] for array in fill_update(tokens, plan.prefixes, update)))
            for update in plan.updates
        ]
        self.scored = [] if dataset.template is None else self._scored(dataset)
        ops = ops_of(config.kernels, mesh)
        (shape,) = plan.shapes

        def batch_loss(trainable: Tree, base: Tree, rows: Rows) -> jax.Array:
            params, adapter = model_of(trainable, base, config, None, dtype)
            return loss_sum(params, adapter, rows, architecture, ops, shape)

        self.batch_loss = jax.jit(batch_loss, out_shardings=sharding.replicated(mesh))

    def _scored(self, dataset: Dataset) -> list[Scored]:
        asked = dict(
            zip((example.id for example in self.split.examples), self.split.questions, strict=True)
        )
        scored = []
        for name, examples in by_dataset(self.split.examples).items():
            labels = dataset.schemas.of(name).labels
            prompts, answers = label_answers(
                dataset.template, [asked[example.id] for example in examples], labels
            )
            check_vocabulary(
                max(token for given in answers for ids in given for token in ids), self.architecture
            )
            plan = plan_scoring(
                prompts,
                answers,
                self.architecture,
                batch_tokens=self.config.predict.batch_tokens,
                sharding=self.sharding,
                names=[example.id for example in examples],
            )
            scored.append(
                Scored(name, tuple(example.relation for example in examples), labels, plan)
            )
        return scored

    def run(self, trainable: Tree, base: Tree) -> dict[str, float]:
        """`loss` per supervised token and, for relations, `f1` (positive-class micro), `accuracy`
        and `collapsed`.

        Of several datasets these are means, unweighted (`collapsed`: of any), and each has its own
        as `f1/NAME` and so on.
        """
        sums = [
            self.batch_loss(trainable, base, sharding.put_rows(rows, self.sharding))
            for rows in self.batches
        ]
        count = sum(float(rows.weights.sum()) for rows in self.batches)
        measured = {"loss": float(sum(map(float, sums)) / count)}
        if not self.scored:
            return measured
        params, adapter = model_of(trainable, base, self.config, None, self.dtype)
        factors = adapter.factors if adapter else None
        model = Model(params, self.architecture, factors, scale_of(self.config.lora))
        figures = {
            one.dataset: _figures(one.gold, run_scoring(model, one.plan), one.labels)
            for one in self.scored
        }
        if len(figures) == 1:
            return measured | figures[self.scored[0].dataset]
        for name in ("f1", "accuracy"):
            measured[name] = float(np.mean([one[name] for one in figures.values()]))
        measured["collapsed"] = any(one["collapsed"] for one in figures.values())
        return measured | {
            f"{name}/{dataset}": value
            for dataset, one in figures.items()
            for name, value in one.items()
        }


class LabelValidation:
    """The validation split for an encoder: its examples that fit a row (the others are listed in
    the log).
    """

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
        """`loss` per example, `f1` (positive-class micro), `accuracy`, `collapsed`."""
        params, _ = model_of(trainable, base, self.config, None, self.dtype)
        scores = run_classification(params, self.architecture, self.plan)  # n N
        gold, labels = self.plan.tokens.labels, self.architecture.labels
        loss = -float(np.take_along_axis(scores, gold[:, None], axis=1).mean())
        return {"loss": loss} | _figures([labels[number] for number in gold], scores, labels)


def _figures(gold: Sequence[str], scores: np.ndarray, labels: Sequence[str]) -> dict[str, float]:
    """Scores of the most probable labels; scores: [n, N]."""
    found = score(gold, [labels[best] for best in scores.argmax(axis=1)])
    return {"f1": found.f1, "accuracy": found.accuracy, "collapsed": found.collapsed}


def told(validated: dict[str, float]) -> str:
    """What a run prints of a validation; of each dataset's figures the F1."""
    shown = [name for name in validated if "/" not in name or name.startswith("f1/")]
    figures = "  ".join(
        f"validation {name} {validated[name]:.4f}" for name in shown if name != "collapsed"
    )
    collapsed = [
        name.partition("/")[2]
        for name, value in validated.items()
        if name.startswith("collapsed/") and value
    ]
    where = f" of {', '.join(collapsed)}" if collapsed else ""
    return figures + (
        f"  COLLAPSED: one label is predicted for every example{where}"
        if validated.get("collapsed")
        else ""
    )
