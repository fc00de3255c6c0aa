"""The labels of each dataset of a run, from `data.labels` or its training examples, and the labels
and demonstrations of a dataset at prediction.

Labels collected from the test split give a model knowledge that a real task does not have. A config
may name that source, and every command then warns (`label_source_notices`).
"""

from __future__ import annotations

import itertools
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from jaxre.config import Config, Data, Source
from jaxre.errors import InputError
from jaxre.relations import leaks, sources
from jaxre.relations.files import nearest
from jaxre.relations.mixtures import described_source, sources_of
from jaxre.relations.schema import ANY, Example, Schema, Schemas


def schemas_of(data: Data, pools: Mapping[str, Sequence[Example]]) -> Schemas:
    """The schemas of the datasets that a run is trained on.

    Args:
      pools: the training examples of each dataset (`Pool.by_dataset`).

    Raises:
      InputError: `data.labels` names an unknown dataset, or a source that cannot be read.
    """
    if isinstance(data.labels, tuple):
        return Schemas({ANY: _sorted_schema(data.labels)})
    check_names(data, {example.dataset for pool in pools.values() for example in pool})
    schemas = {}
    for name, pool in pools.items():
        # The only dataset of a run on one source is under ANY; data.labels has it under its name.
        configured = given_schema(data, pool[0].dataset)
        schemas[name] = configured or Schema.of(pool, strict=name == ANY)
        if configured:
            schemas[pool[0].dataset] = configured
    return Schemas(schemas)


def with_given(schemas: Schemas, data: Data, names: Iterable[str]) -> Schemas:
    """The schemas, completed by those of `data.labels` for the datasets that have none."""
    missing = [name for name in names if name not in schemas.by_dataset]
    configured = {name: schema for name in missing if (schema := given_schema(data, name))}
    return Schemas({**schemas.by_dataset, **configured})


def given_schema(data: Data, dataset: str) -> Schema | None:
    """The schema of a dataset in `data.labels`, if any; labels collected from a source are not
    strict.
    """
    labels = data.labels.get(dataset) if isinstance(data.labels, dict) else None
    if isinstance(labels, Source):
        return Schema.of(sources.load(labels), strict=False)
    return labels and _sorted_schema(labels)


def _sorted_schema(labels: Sequence[str]) -> Schema:
    return Schema(tuple(sorted(labels)))


def check_names(data: Data, known: set[str]) -> None:
    """Raises InputError for a dataset in `data.labels` that is neither of the run nor a benchmark;
    a misspelt name would otherwise be ignored.
    """
    if not isinstance(data.labels, dict):
        return
    held_out = (*sources_of(data.validation), *sources_of(data.test))
    named = {source.dataset for source in held_out}
    known = known | set(sources.BENCHMARKS) | named | {Path(name).stem for name in named}
    # The name of a hub dataset (OWNER/NAME) is known once it is read.
    unknown = [name for name in data.labels if name not in known and "/" not in name]
    if unknown:
        raise InputError(
            f"data.labels.{unknown[0]}: no such dataset; the nearest is"
            f" {nearest(unknown[0], known)}"
        )


def label_source_notices(
    data: Data, tested: Source | None = None, only: Collection[str] | None = None
) -> list[str]:
    """A warning for each source of labels that is the tested source, or a split named test.

    Args:
      tested: the predicted source; `data.test` if not given.
      only: datasets, by their name in `data.labels` or in a source; all if not given.
    """
    tested = tested or data.test
    labels = data.labels if isinstance(data.labels, dict) else {}
    collected = [(name, source) for name, source in labels.items() if isinstance(source, Source)]
    if not isinstance(data.labels, tuple):
        collected += [
            (source.dataset, source)
            for source in sources_of(data.train)
            if source.dataset not in labels
        ]
    notices = []
    for name, source in collected:
        same = _overlap(source, tested)
        if (only is None or name in only) and (same or (source.split or "").lower() == "test"):
            notices.append(
                f"LABELS FROM THE TEST SPLIT: those of {name} are collected from"
                f" {described_source(source)}, which is"
                f" {'what is tested' if same else 'named test'}; a real task does not know them, so"
                " scores can be too good"
            )
    return list(dict.fromkeys(notices))


def _overlap(first: Source, second: Source | None) -> bool:
    """True if the sources can have examples in common."""
    return (
        second is not None
        and (first.dataset, first.subset, first.split)
        == (second.dataset, second.subset, second.split)
        and max(first.part[0], second.part[0]) < min(first.part[1], second.part[1])
    )


@dataclass(frozen=True)
class DatasetTask:
    """Prediction of one dataset: its schema, training examples to draw demonstrations from, and
    notices about both.
    """

    schema: Schema
    train: list[Example]
    notices: tuple[str, ...] = ()

    @property
    def dataset(self) -> str:
        """Name of the dataset, empty without training examples."""
        return self.train[0].dataset if self.train else ""


def task_of(
    config: Config, source: Source | None = None, dataset: str | None = None, shots: int = 0
) -> DatasetTask:
    """The labels and demonstrations with which a run predicts a dataset: those of its training or,
    where it was not trained on the dataset, the dataset's own.

    Args:
      source: the predicted source; None (a text of the command line) takes the run's only dataset.
      dataset: name of the dataset in the predicted examples, if they are read.
      shots: number of demonstrations that the prompt will have.

    Raises:
      InputError: the run has no such schema; data that cannot be read.
    """
    data = config.data
    if data.train is None:
        raise InputError(
            f"{config.name}: a run without data.train has no schema; predict with a run that was"
            " trained on relations"
        )
    if isinstance(data.train, Source):
        (train,) = leaks.load_train(data, [data.train])
        has_labels = isinstance(data.labels, dict) and dataset in data.labels
        held_out = (*sources_of(data.validation), *sources_of(data.test))
        own = {data.train.dataset, *(source.dataset for source in held_out)}
        # A file may have any name: it is taken for the run's dataset.
        same_dataset = (
            source is None
            or source.dataset in own
            or not {dataset, source.dataset} & set(sources.BENCHMARKS)
        )
        if dataset == train[0].dataset or (same_dataset and not has_labels):
            notices = label_source_notices(data, source, {train[0].dataset, data.train.dataset})
            return DatasetTask(schemas_of(data, {ANY: train}).of(ANY), train, tuple(notices))
    elif source is None:
        names = ", ".join(dict.fromkeys(source.dataset for source in data.train.sources))
        raise InputError(
            f"{config.name}: was trained on several datasets ({names}); say whose labels the text"
            " has with --data NAME"
        )
    else:
        same = [part for part in data.train.sources if part.dataset == source.dataset]
        parts = leaks.load_train(data, same or data.train.sources)
        train = list(itertools.chain.from_iterable(parts))
        dataset = dataset or (train[0].dataset if same else source.dataset)
        train = [example for example in train if example.dataset == dataset]
        if train:
            notices = label_source_notices(data, source, {dataset, source.dataset})
            schema = given_schema(data, dataset) or Schema.of(train, strict=False)
            return DatasetTask(schema, train, tuple(notices))
    return _foreign_task(config, source, dataset or source.dataset, shots)


def _foreign_task(config: Config, source: Source, dataset: str, shots: int) -> DatasetTask:
    """The task of a dataset that the run was not trained on; `notices` name the origin of its
    labels and demonstrations.
    """
    schema, train, notices = given_schema(config.data, dataset), [], []
    if schema is None or shots:
        origin, place = foreign_source(config.data, source, dataset)
        try:
            train = sources.load(origin)
        except InputError as error:
            raise InputError(
                f"{dataset}: the run was not trained on it; {place} is not there ({error}), or set"
                f" data.labels.{dataset}"
            ) from None
        loaded = "demonstrations" if schema else "labels and demonstrations" if shots else "labels"
        notices = [
            f"{dataset}: the run was not trained on it; its {loaded} come from {place}"
            f" ({described_source(origin)})"
        ]
    if schema:
        notices.append(f"{dataset}: its labels come from data.labels.{dataset}")
    notices += label_source_notices(config.data, source, {dataset})
    return DatasetTask(schema or Schema.of(train, strict=False), train, tuple(notices))


def foreign_source(data: Data, tested: Source, dataset: str) -> tuple[Source, str]:
    """The source of labels and demonstrations for a dataset that a run was not trained on, and its
    name in messages.

    It is the dataset's source in `data.labels`, unless that is the tested one; else its own
    training split.

    Raises:
      InputError: a file, which has no other split.
    """
    labels = data.labels.get(dataset) if isinstance(data.labels, dict) else None
    if (
        isinstance(labels, Source)
        and not _overlap(labels, tested)
        and (labels.split or "").lower() != "test"
    ):
        return labels, f"data.labels.{dataset}"
    if tested.split is None:
        raise InputError(
            f"{dataset}: the run was not trained on it, so its labels are not known; give them in"
            f" data.labels.{dataset}"
        )
    return (
        tested.model_copy(update={"split": "train", "part": (0.0, 1.0), "limit": None}),
        "its own training split",
    )
