"""A trained run in memory, for repeated predictions from Python.

run = jaxre.load_run("runs/quickstart")
(answer,) = run.predict(["<e1>Ada Lovelace</e1> wrote the <e2>Notes</e2>."])
answer.label, answer.probability
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxre.checkpoints.source import dtype_of, open_model
from jaxre.errors import InputError
from jaxre.evaluation.predictions import Prediction
from jaxre.host_memory import keep_freed_memory
from jaxre.inference.commands import Task, open_config, source_of
from jaxre.inference.predict import Mode
from jaxre.models.activations import activations_for
from jaxre.models.architecture import EncoderArchitecture
from jaxre.relations.columns import read_records, resolve
from jaxre.relations.labels import DatasetTask, task_of
from jaxre.relations.prompt_styles import styled
from jaxre.relations.schema import Example


class Answer(NamedTuple):
    """The answer of a model for one example.

    label: of the schema (with mode "generate": what the model writes). probability: of the label
    among those of the schema; with modes "best" and "generate" and with `above`, that the model
    writes it and nothing else. probabilities: of every label of the schema, in mode "score".
    bounds: with `above`, upper bounds of the labels that have no probability.
    """

    label: str
    probability: float
    probabilities: dict[str, float] | None
    bounds: dict[str, float] | None = None


class Run:
    """A model with its config, loaded once; `load_run` makes it."""

    def __init__(self, model: str, config_path: Path | None):
        self.config, self._prompt, self._folder = open_config(model, config_path, None)
        loaded = open_model(model, dtype_of(self.config).dtype, self.config.model.quantise)
        base = loaded.base
        if not isinstance(loaded.architecture, EncoderArchitecture):
            base = activations_for(base, jax.default_backend())
        base, factors = jax.tree.map(jnp.asarray, (base, loaded.factors))
        self._loaded = dataclasses.replace(loaded, base=base, factors=factors)
        self._tasks: dict[tuple[str | None, int], DatasetTask] = {}

    def predict(
        self,
        examples: Sequence[str | Mapping[str, Any] | Example],
        mode: Mode = "score",
        *,
        above: float | None = None,
        data: str | None = None,
        style: str | None = None,
    ) -> list[Answer]:
        """The answer to each example, in order.

        Args:
          examples: each a text whose entities are marked as `<e1>head</e1>` and `<e2>tail</e2>`, or
            a mapping with `text`, `head` and `tail` (and `head_type`, `tail_type`, `head_span`,
            `tail_span`) as in a JSONL file.
          mode: "score" gives the probability of every label, "best" the most probable one alone,
            "generate" what the model writes.
          above: with "score", only labels that the model writes with a higher probability than
            this, and the best, get their own (not divided by the sum over the labels); the others
            get an upper bound. Faster than all of them where the model is sure.
          data: whose labels, where the run was trained on several datasets.
          style: a prompt style in place of the run's own prompt.

        Raises:
          InputError: no example, or one that cannot be used.
        """
        prompt = styled(self._prompt, style) if style else self._prompt
        dataset_task = self._dataset_task(data, prompt.shots)
        task = Task(self._loaded, self.config, prompt, dataset_task, self._folder)
        rows = task.predict(examples_of(examples, dataset_task.dataset), mode, above)
        return [_answer(row) for row in rows]

    def labels(self, data: str | None = None) -> tuple[str, ...]:
        """The schema; `data` as in `predict`."""
        return tuple(self._dataset_task(data, self._prompt.shots).schema.labels)

    def _dataset_task(self, data: str | None, shots: int) -> DatasetTask:
        """Collecting a schema may read the training data: once for each dataset."""
        if (data, shots) not in self._tasks:
            source = source_of(self.config, data, None) if data else None
            self._tasks[data, shots] = task_of(self.config, source, shots=shots)
        return self._tasks[data, shots]


def load_run(path: str | Path, config: str | Path | None = None) -> Run:
    """Loads a run for `Run.predict`.

    Args:
      path: a run folder, or anything else that `model.path` takes.
      config: a config file with prompt and data, for a model that is no run.

    Raises:
      InputError: nothing that can be opened, an unfinished run, or a model without a config.
    """
    keep_freed_memory()
    return Run(str(path), None if config is None else Path(config))


def examples_of(
    given: Sequence[str | Mapping[str, Any] | Example], dataset: str | None
) -> list[Example]:
    """Examples as `Run.predict` takes them. `dataset` is whose prompts they get, where the run has
    several.
    """
    if isinstance(given, str | Mapping | Example):
        raise InputError("predict takes a list of examples; write [example] for a single one")
    examples: list[Example] = []
    for number, one in enumerate(given, 1):
        if not isinstance(one, Example):
            place = f"example {number}"
            record = {"text": one} if isinstance(one, str) else dict(one)
            column = resolve({}, list(record), place, labelled=False)
            (one,) = read_records([(place, record)], column, "python", "", labelled=False)
            one = dataclasses.replace(one, id=str(number))
        examples.append(dataclasses.replace(one, dataset=dataset) if dataset else one)
    return examples


def _answer(row: Prediction) -> Answer:
    label = row.generated_relation
    probability = row.probabilities[label] if row.probabilities else math.exp(row.score)
    return Answer(label, probability, row.probabilities, row.bounds)
