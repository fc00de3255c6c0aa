"""Which labels each dataset of a run has, `data.labels` or those of its training examples, and how
a dataset is asked at prediction.

Labels that were collected from the split that is tested tell a model what no real task would: they
can be had by writing that source, and every command then says so (`told_tested`).
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
from jaxre.relations.mixtures import sources_of, told_source
from jaxre.relations.schema import ANY, Example, Schema, Schemas


def schemas_of(data: Data, pools: Mapping[str, Sequence[Example]]) -> Schemas:
    """The schemas of the datasets that a run is trained on.

    Args:
      pools: the training examples of each dataset (`Pool.by_dataset`).

    Raises:
      InputError: `data.labels` names a dataset that there is none of, or a source that cannot be
        read.
    """
    if isinstance(data.labels, tuple):
        return Schemas({ANY: _listed(data.labels)})
    check_names(data, {example.dataset for pool in pools.values() for example in pool})
    schemas = {}
    for name, pool in pools.items():
        # The only dataset of a run on one source is under ANY; data.labels has it under its name.
        given = given_schema(data, pool[0].dataset)
        schemas[name] = given or Schema.of(pool, strict=name == ANY)
        if given:
            schemas[pool[0].dataset] = given
    return Schemas(schemas)


def with_given(schemas: Schemas, data: Data, names: Iterable[str]) -> Schemas:
    """The schemas, with those that `data.labels` gives for other datasets."""
    missing = [name for name in names if name not in schemas.by_dataset]
    given = {name: schema for name in missing if (schema := given_schema(data, name))}
    return Schemas({**schemas.by_dataset, **given})


def given_schema(data: Data, dataset: str) -> Schema | None:
    """What `data.labels` says of a dataset by name, if it does; labels that it collects from a
    source are not strict.
    """
    given = data.labels.get(dataset) if isinstance(data.labels, dict) else None
    if isinstance(given, Source):
        return Schema.of(sources.load(given), strict=False)
    return given and _listed(given)


def _listed(labels: Sequence[str]) -> Schema:
    return Schema(tuple(sorted(labels)))


def check_names(data: Data, known: set[str]) -> None:
    """Raises InputError for a dataset in `data.labels` that is neither of the run nor a benchmark;
    a misspelt one would go unseen.
    """
    if not isinstance(data.labels, dict):
        return
    named = {source.dataset for one in (data.validation, data.test) for source in sources_of(one)}
    known = known | set(sources.BENCHMARKS) | named | {Path(name).stem for name in named}
    # The name of a hub dataset (OWNER/NAME) is known once it is read.
    unknown = [name for name in data.labels if name not in known and "/" not in name]
    if unknown:
        raise InputError(
            f"data.labels.{unknown[0]}: no such dataset; the nearest is"
            f" {nearest(unknown[0], known)}"
        )


def told_tested(
    data: Data, tested: Source | None = None, only: Collection[str] | None = None
) -> list[str]:
    """A line for each source that labels are collected from and that is the tested one, or is named
    test.

    Args:
      tested: what is predicted; `data.test` if not given.
      only: of these datasets, as `data.labels` or a source calls them; all if not given.
    """
    tested = tested or data.test
    given = data.labels if isinstance(data.labels, dict) else {}
    collected = [(name, one) for name, one in given.items() if isinstance(one, Source)]
    if not isinstance(data.labels, tuple):
        collected += [
            (one.dataset, one) for one in sources_of(data.train) if one.dataset not in given
        ]
    told = []
    for name, source in collected:
        same = _same(source, tested)
        if (only is None or name in only) and (same or (source.split or "").lower() == "test"):
            told.append(
                f"LABELS FROM THE TEST SPLIT: those of {name} are collected from"
                f" {told_source(source)}, which is {'what is tested' if same else 'named test'}; a"
                " real task does not know them, so scores can be too good"
            )
    return list(dict.fromkeys(told))


def _same(one: Source, other: Source | None) -> bool:
    """Whether they have examples in common."""
    if other is None or (one.dataset, one.subset, one.split) != (
        other.dataset,
        other.subset,
        other.split,
    ):
        return False
    return max(one.part[0], other.part[0]) < min(one.part[1], other.part[1])


@dataclass(frozen=True)
class DatasetTask:
    """What one dataset is asked with: its schema, training examples to draw demonstrations from,
    and what to say of both.
    """

    schema: Schema
    train: list[Example]
    told: tuple[str, ...] = ()

    @property
    def dataset(self) -> str:
        """Its name, if there are training examples."""
        return self.train[0].dataset if self.train else ""


def task_of(
    config: Config, source: Source | None = None, dataset: str | None = None, shots: int = 0
) -> DatasetTask:
    """How a run asks a dataset: as it was trained to or, where it was not trained on it, with that
    one's own labels.

    Args:
      source: what is predicted; None (a text of the command line) takes the run's only dataset.
      dataset: the name that the predicted examples have, if they are read.
      shots: demonstrations that will be asked for.

    Raises:
      InputError: the run has no such schema; anything that cannot be read.
    """
    data = config.data
    if data.train is None:
        raise InputError(
            f"{config.name}: a run without data.train has no schema; predict with a run that was"
            " trained on relations"
        )
    if isinstance(data.train, Source):
        (train,) = leaks.load_train(data, [data.train])
        named = isinstance(data.labels, dict) and dataset in data.labels
        own = {one.dataset for one in (data.train, *sources_of(data.validation), data.test) if one}
        # A file may be called anything: it is taken for the run's dataset.
        like = (
            source is None
            or source.dataset in own
            or not {dataset, source.dataset} & set(sources.BENCHMARKS)
        )
        if dataset == train[0].dataset or (like and not named):
            told = told_tested(data, source, {train[0].dataset, data.train.dataset})
            return DatasetTask(schemas_of(data, {ANY: train}).of(ANY), train, tuple(told))
    elif source is None:
        names = ", ".join(dict.fromkeys(one.dataset for one in data.train.sources))
        raise InputError(
            f"{config.name}: was trained on several datasets ({names}); say whose labels the text"
            " has with --data NAME"
        )
    else:
        likely = [one for one in data.train.sources if one.dataset == source.dataset]
        train = list(
            itertools.chain.from_iterable(leaks.load_train(data, likely or data.train.sources))
        )
        dataset = dataset or (train[0].dataset if likely else source.dataset)
        train = [example for example in train if example.dataset == dataset]
        if train:
            told = told_tested(data, source, {dataset, source.dataset})
            return DatasetTask(
                given_schema(data, dataset) or Schema.of(train, strict=False), train, tuple(told)
            )
    return _foreign_task(config, source, dataset or source.dataset, shots)


def _foreign_task(config: Config, source: Source, dataset: str, shots: int) -> DatasetTask:
    """How a dataset is asked that the run was not trained on; `told` says where its labels and
    demonstrations are from.
    """
    schema, train, told = given_schema(config.data, dataset), [], []
    if schema is None or shots:
        other, place = foreign_source(config.data, source, dataset)
        try:
            train = sources.load(other)
        except InputError as error:
            raise InputError(
                f"{dataset}: the run was not trained on it; {place} is not there ({error}), or set"
                f" data.labels.{dataset}"
            ) from None
        whose = "demonstrations" if schema else "labels and demonstrations" if shots else "labels"
        told = [
            f"{dataset}: the run was not trained on it; its {whose} come from {place}"
            f" ({told_source(other)})"
        ]
    if schema:
        told.append(f"{dataset}: its labels come from data.labels.{dataset}")
    told += told_tested(config.data, source, {dataset})
    return DatasetTask(schema or Schema.of(train, strict=False), train, tuple(told))


def foreign_source(data: Data, tested: Source, dataset: str) -> tuple[Source, str]:
    """Where a dataset that a run was not trained on has its labels and demonstrations from, and how
    to say so.

    It is the source that `data.labels` gives for it, unless that is the tested one; else its own
    training split.

    Raises:
      InputError: a file, which has no other split.
    """
    given = data.labels.get(dataset) if isinstance(data.labels, dict) else None
    if (
        isinstance(given, Source)
        and not _same(given, tested)
        and (given.split or "").lower() != "test"
    ):
        return given, f"data.labels.{dataset}"
    if tested.split is None:
        raise InputError(
            f"{dataset}: the run was not trained on it, so its labels are not known; give them in"
            f" data.labels.{dataset}"
        )
    return (
        tested.model_copy(update={"split": "train", "part": (0.0, 1.0), "limit": None}),
        "its own training split",
    )
