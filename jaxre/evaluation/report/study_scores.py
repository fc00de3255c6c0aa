"""Scores behind every table of a study: each system on each dataset, read and resampled once.

study = measure(read_record("runs/study-small"))
cell = study.cell("qwen-gentune-2shot", "gids")
cell.scores.f1, cell.interval, cell.flags
study.average("qwen-gentune-2shot", "general")
"""

from __future__ import annotations

import zlib
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from jaxre.errors import InputError
from jaxre.evaluation.evaluate import score_dataset
from jaxre.evaluation.frontier.cache import ENOUGH
from jaxre.evaluation.metrics.attributes import attributes_of
from jaxre.evaluation.metrics.rows import Row
from jaxre.evaluation.metrics.scores import Labels, Scores
from jaxre.evaluation.metrics.significance import (
    RESAMPLES,
    SEED,
    Interval,
    Resamples,
    clustered,
    f1_interval,
    f1_parts,
    resample_ratios,
)
from jaxre.evaluation.predictions import Prediction
from jaxre.evaluation.report.record import RecordedDataset, RecordedSystem, StudyRecord
from jaxre.relations.label_map import LabelMap
from jaxre.relations.schema import NEGATIVES, Example, is_negative, normalise_label

OVERALL = "overall"

# A fault in at least this share of the answers is a fault of the whole cell.
MOST = 0.5


@dataclass(frozen=True, eq=False)
class Cell:
    """One system on one dataset.

    places: [n] int64, indices of the answered examples in the dataset; ids, gold, predicted: of
    these examples; labels: gold and predicted, normalised, as codes. asked: number of examples in
    the dataset. trained: whether the system has seen the dataset's training split; None if it is
    not trained. common: map to the common labels that gold and predicted use, if these are not the
    dataset's own. schema: the allowed labels; classes: these and any other gold labels. flags:
    faults of the answers as a whole; broken: the faults exclude their F1 from averages.
    comparable: scored with the dataset's own labels, on at least the share ENOUGH of its examples,
    with related ones among them. Otherwise the F1 does not compare with that of other systems and
    goes into no average.
    """

    system: str
    dataset: str
    domain: str
    asked: int
    places: np.ndarray
    ids: tuple[str, ...]
    gold: tuple[str, ...]
    predicted: tuple[str, ...]
    labels: Labels
    scores: Scores
    resampled: Resamples
    flags: tuple[str, ...]
    broken: bool
    trained: bool | None
    comparable: bool
    common: LabelMap | None
    schema: tuple[str, ...]
    classes: tuple[str, ...]

    @cached_property
    def parts(self) -> np.ndarray:
        """[n, 2] contribution of each example to the F1 (`f1_parts`)."""
        return f1_parts(self.labels)

    @cached_property
    def positive(self) -> np.ndarray:
        """[n] bool: the gold label is positive."""
        return self.labels.positive[self.labels.gold]

    @cached_property
    def right(self) -> np.ndarray:
        """[n] bool: the label is right (`right_of`)."""
        return right_of(self.labels)

    @cached_property
    def interval(self) -> Interval:
        """Positive-class micro-F1 with its 95% bootstrap interval."""
        return f1_interval(self.resampled)

    def judged(self, index: np.ndarray, common: LabelMap | None) -> tuple[np.ndarray, np.ndarray]:
        """`parts` and `right` of the answers at `index`, in common labels if a map is passed."""
        if common is None or self.common:
            return self.parts[index], self.right[index]
        labels = Labels.of(
            [common.gold(self.gold[i], self.ids[i]) for i in index.tolist()],
            [common.predicted(self.predicted[i]) for i in index.tolist()],
        )
        return f1_parts(labels), right_of(labels)


def right_of(labels: Labels) -> np.ndarray:
    """[n] bool: the label is right; any negative label is right where gold is negative."""
    return labels.right | ~(labels.positive[labels.gold] | labels.positive[labels.predicted])


@dataclass(frozen=True)
class Average(Row):
    """Unweighted mean of F1 over the datasets of a group, with the 95% interval of the bootstrap
    clustered over datasets.

    value, low, high: None if the system has no cell in the group, or one in `broken` (see its
    flags). Published averages have no interval.
    datasets: in the mean; missing: in the group but without answers of this system, so that the
    mean covers fewer datasets than those of other systems.
    untrained: answered, but the system was not trained on them. They are left out if it was trained
    on others of the group, as in the published study (the overall mean of GenTune is over the
    general sets); otherwise the mean is over them alone, a cross-domain mean.
    apart: answered, but not comparable (Cell): in no mean.
    flags: of its cells, each as "dataset: flag".
    """

    value: float | None
    low: float | None = None
    high: float | None = None
    datasets: tuple[str, ...] = ()
    missing: tuple[str, ...] = ()
    untrained: tuple[str, ...] = ()
    apart: tuple[str, ...] = ()
    broken: tuple[str, ...] = ()
    flags: tuple[str, ...] = ()


@dataclass(frozen=True, eq=False)
class StudyScores:
    """Cells by (system name, dataset name), for the pairs that have predictions."""

    record: StudyRecord
    cells: dict[tuple[str, str], Cell]
    resamples: int
    seed: int

    @cached_property
    def groups(self) -> dict[str, tuple[str, ...]]:
        """Domain -> its datasets, then "overall" -> all."""
        domains: dict[str, list[str]] = defaultdict(list)
        for dataset in self.record.datasets:
            domains[dataset.domain].append(dataset.name)
        overall = tuple(dataset.name for dataset in self.record.datasets)
        return {**{domain: tuple(names) for domain, names in domains.items()}, OVERALL: overall}

    @cached_property
    def attributes(self) -> dict[str, list[dict[str, str]]]:
        """Dataset -> slices of each of its examples (`attributes_of`)."""
        return {
            name: [attributes_of(example) for example in examples.values()]
            for name, examples in self.record.examples.items()
        }

    def cell(self, system: str, dataset: str) -> Cell | None:
        return self.cells.get((system, dataset))

    def asked(self, system: str, datasets: Sequence[str]) -> list[Cell]:
        """Cells of a system on these datasets, where it has any."""
        return [self.cells[system, name] for name in datasets if (system, name) in self.cells]

    def average(self, system: str, group: str) -> Average:
        """Average over the datasets of a domain or OVERALL."""
        return self.average_over(system, self.groups[group])

    def average_over(self, system: str, names: Sequence[str]) -> Average:
        """Average over the named datasets."""
        asked = self.asked(system, names)
        cells = at_home(asked)
        broken = tuple(cell.dataset for cell in cells if cell.broken)
        interval = (
            None
            if broken or not cells
            else f1_interval(clustered([cell.resampled for cell in cells], self.seed))
        )
        return Average(
            value=interval and interval.value,
            low=interval and interval.low,
            high=interval and interval.high,
            datasets=tuple(cell.dataset for cell in cells),
            missing=tuple(name for name in names if (system, name) not in self.cells),
            untrained=tuple(cell.dataset for cell in asked if cell.trained is False),
            apart=tuple(cell.dataset for cell in asked if not cell.comparable),
            broken=broken,
            flags=tuple(f"{cell.dataset}: {flag}" for cell in cells for flag in cell.flags),
        )

    def seed_of(self, dataset: str) -> tuple[int, int]:
        """Seed of a dataset's draws, derived from its name: datasets vary independently, whatever
        their order.
        """
        return self.seed, zlib.crc32(dataset.encode())


def at_home(cells: Sequence[Cell]) -> list[Cell]:
    """Comparable cells whose system was trained on the dataset or needs no training; if there are
    none, all comparable cells.
    """
    comparable = [cell for cell in cells if cell.comparable]
    return [cell for cell in comparable if cell.trained is not False] or comparable


def measure(record: StudyRecord, resamples: int = RESAMPLES, seed: int = SEED) -> StudyScores:
    """Reads, checks, scores and resamples every predictions file of a study.

    Rows join the examples by id, otherwise by prompt hash, if a row that joined by id has the same
    hash.

    Raises:
      InputError: a file that cannot be read, a row of an example that the study does not have, a
        gold label that differs from the example's, two answers of a system to one example, two
        systems or datasets with the same name.
    """
    for kind, items in (("systems", record.systems), ("datasets", record.datasets)):
        names = [item.name for item in items]
        if twice := sorted({name for name in names if names.count(name) > 1}):
            raise InputError(f"{record.folder}: two {kind} are called {twice[0]!r}; name each once")
    study = StudyScores(record, {}, resamples, seed)
    for dataset in record.datasets:
        examples = list(record.examples[dataset.name].values())
        for system, answers in _answers(record, dataset, examples):
            study.cells[system.name, dataset.name] = _cell(
                system, dataset, examples, answers, study
            )
    return study


def _answers(
    record: StudyRecord, dataset: RecordedDataset, examples: Sequence[Example]
) -> list[tuple[RecordedSystem, dict[int, str]]]:
    """Answers of each system that has predictions: index of an example -> answer."""
    index_of = {example.id: index for index, example in enumerate(examples)}
    by_hash: dict[str, set[int]] = defaultdict(set)
    by_system: list[tuple[RecordedSystem, dict[int, str]]] = []
    later: list[tuple[RecordedSystem, dict[int, str], Prediction]] = []  # rows without a known id
    texts: dict[str, str] = {}  # one object per answer, not per example
    for system in record.systems:
        if dataset.name not in system.predictions:
            continue
        answers: dict[int, str] = {}
        by_system.append((system, answers))
        for row in record.rows(system, dataset.name):
            if row.example_id not in index_of:
                later.append((system, answers, row))
                continue
            index = index_of[row.example_id]
            _check_gold(row, examples[index], system, dataset)
            answers[index] = texts.setdefault(row.generated_relation, row.generated_relation)
            if row.prompt_hash:
                by_hash[row.prompt_hash].add(index)
    for system, answers, row in later:
        where = f"{system.predictions[dataset.name]}: example {row.example_id!r}"
        if row.prompt_hash not in by_hash:
            raise InputError(
                f"{where} (prompt hash {row.prompt_hash or 'none'}) is not among the test examples"
                f" of {dataset.name}; predict these"
            )
        for index in by_hash[row.prompt_hash]:
            _check_gold(row, examples[index], system, dataset)
            if index in answers:
                raise InputError(f"{where} is a second answer to {examples[index].id!r}; keep one")
            answers[index] = texts.setdefault(row.generated_relation, row.generated_relation)
    return by_system


def _check_gold(
    row: Prediction, example: Example, system: RecordedSystem, dataset: RecordedDataset
) -> None:
    common = _common(system, dataset)
    gold = common.gold(example.relation, example.id) if common else example.relation
    if row.relation != gold and normalise_label(row.relation) != normalise_label(gold):
        raise InputError(
            f"{system.predictions[dataset.name]}: example {row.example_id!r} has the gold label"
            f" {row.relation!r}, in the data of the study it is {gold!r}; predict the study's data"
        )


def _common(system: RecordedSystem, dataset: RecordedDataset) -> LabelMap | None:
    """Map to the common labels of a predictions file; None if it uses the dataset's own labels."""
    common = system.common_labels.get(dataset.name)
    return None if common is None else LabelMap(f"common_labels of {system.name}", common)


def _cell(
    system: RecordedSystem,
    dataset: RecordedDataset,
    examples: list[Example],
    answers: dict[int, str],
    study: StudyScores,
) -> Cell:
    places = np.array(sorted(answers), np.int64)
    common = _common(system, dataset)
    gold = tuple(
        common.gold(examples[i].relation, examples[i].id) if common else examples[i].relation
        for i in places
    )
    predicted = tuple(answers[i] for i in places)
    schema = tuple(sorted(set(common.common.values()))) if common else dataset.labels
    # SemEval's official score is defined for its own labels only.
    scores = score_dataset("" if common else dataset.name, gold, predicted, schema)
    labels = Labels.of(gold, predicted)
    parts = f1_parts(labels)
    flags, broken = _flags(system, schema, predicted, scores, len(examples))
    if common:
        flags += (
            (
                f"scored with {len(schema)} common labels, not with the {len(dataset.labels)} of"
                " the dataset"
            ),
        )
    related = not all(map(is_negative, set(gold)))
    if not related:
        flags += ("no example has a relation: F1 is zero whatever the answers",)
    known = {normalise_label(label) for label in schema}
    return Cell(
        system=system.name,
        dataset=dataset.name,
        domain=dataset.domain,
        asked=len(examples),
        places=places,
        ids=tuple(examples[i].id for i in places),
        gold=gold,
        predicted=predicted,
        labels=labels,
        scores=scores,
        resampled=resample_ratios(
            parts[:, :1], parts[:, 1:], study.resamples, study.seed_of(dataset.name)
        ),
        flags=flags,
        broken=broken,
        trained=dataset.name in system.trained_on if system.trained_on else None,
        comparable=common is None and related and len(places) >= ENOUGH * len(examples),
        common=common,
        schema=schema,
        classes=(
            *schema,
            *sorted({label for label in gold if normalise_label(label) not in known}),
        ),
    )


def _flags(
    system: RecordedSystem,
    schema: Sequence[str],
    predicted: Sequence[str],
    scores: Scores,
    asked: int,
) -> tuple[tuple[str, ...], bool]:
    """Faults of the answers as a whole, and whether their F1 measures a fault and not the model."""
    known = {normalise_label(label) for label in schema} | NEGATIVES
    thinking = _share(predicted, lambda answer: answer.lstrip().lower().startswith("<think>"))
    valid = _share(predicted, lambda answer: normalise_label(answer) in known)
    empty = _share(predicted, lambda answer: not answer.strip())
    broken, flags = [], []
    if thinking >= MOST:
        broken.append(f"reasoning was left on: {thinking:.0%} of the answers begin with <think>")
    if scores.malformed >= MOST:
        broken.append(f"malformed: {scores.malformed:.0%} of the answers are run-on text")
    if valid == 0 and system.enumerated is not False:
        broken.append("no answer is a label of the schema")
    elif valid < MOST:
        flags.append(f"out of schema: {1 - valid:.0%} of the answers")
    if empty >= MOST:
        flags.append(f"empty: {empty:.0%} of the answers")
    if scores.collapsed and system.kind != "baseline":
        flags.append("collapsed: one label for every example")
    if len(predicted) < asked:
        flags.append(f"incomplete: {len(predicted):,} of {asked:,} examples are answered")
    return (*broken, *flags), bool(broken)


def _share(answers: Sequence[str], test: Callable[[str], bool]) -> float:
    """Share of the answers that pass a test; it runs once per distinct answer."""
    passed = {answer: test(answer) for answer in set(answers)}
    return sum(passed[answer] for answer in answers) / len(answers)
