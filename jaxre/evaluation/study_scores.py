"""The scores behind every table of a study: each system on each dataset, read and resampled once.

study = measure(read_record("runs/study-small"))
cell = study.cell("qwen-gentune-2shot", "gids")
cell.scores.f1, cell.interval, cell.flags
study.average("qwen-gentune-2shot", "general")
"""

from __future__ import annotations

import zlib
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from jaxre.errors import InputError
from jaxre.evaluation.attributes import attributes_of
from jaxre.evaluation.cache import ENOUGH
from jaxre.evaluation.evaluate import score_dataset
from jaxre.evaluation.metrics import Labels, Scores, score
from jaxre.evaluation.predictions import Prediction
from jaxre.evaluation.rows import Row
from jaxre.evaluation.significance import (
    RESAMPLES,
    SEED,
    Interval,
    Resamples,
    clustered,
    f1_interval,
    f1_parts,
    resample_ratios,
)
from jaxre.evaluation.study_record import RecordedDataset, RecordedSystem, StudyRecord
from jaxre.relations.label_map import LabelMap
from jaxre.relations.schema import NEGATIVES, Example, is_negative, normalise_label

OVERALL = "overall"

# From this share of answers on, a fault of the answers is one of the whole cell.
MOST = 0.5


@dataclass(frozen=True, eq=False)
class Cell:
    """One system on one dataset.

    places: [n] int64, the answered examples, as indices into the dataset's; ids, gold, predicted:
    of these; asked: how many it has. labels: the same, normalised, as codes. trained: whether the
    system has seen the dataset's training split; None where it is not trained. common: the map to
    the common labels that gold and predicted are in, if they are not in the dataset's own. schema:
    the labels that were allowed; classes: these, and the gold labels beyond them. flags: what is
    wrong with the answers as a whole; broken: so wrong that their F1 must not go into an average.
    comparable: scored with the dataset's own labels, on ENOUGH of its examples, related ones among
    them. The F1 of another cell does not
      compare with that of other systems, and goes into no average.
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
        """[n, 2] what each example adds to the F1 (`f1_parts`)."""
        return f1_parts(self.labels)

    @cached_property
    def positive(self) -> np.ndarray:
        """[n] bool: the gold label is positive."""
        return self.labels.positive[self.labels.gold]

    @cached_property
    def right(self) -> np.ndarray:
        """[n] bool: the label is right; a negative answer to a negative gold is, however
        spelled.
        """
        return right_of(self.labels)

    @cached_property
    def interval(self) -> Interval:
        """Positive-class micro-F1 with its 95% bootstrap interval."""
        return f1_interval(self.resampled)

    def judged(self, index: np.ndarray, common: LabelMap | None) -> tuple[np.ndarray, np.ndarray]:
        """`parts` and `right` of some of the answers, in common labels where they are given."""
        if common is None or self.common:
            return self.parts[index], self.right[index]
        labels = Labels.of(
            [common.gold(self.gold[i], self.ids[i]) for i in index.tolist()],
            [common.predicted(self.predicted[i]) for i in index.tolist()],
        )
        return f1_parts(labels), right_of(labels)


def right_of(labels: Labels) -> np.ndarray:
    """[n] bool: the label is right; a negative answer to a negative gold is, however spelled."""
    return labels.right | ~(labels.positive[labels.gold] | labels.positive[labels.predicted])


@dataclass(frozen=True)
class Average(Row):
    """Unweighted mean of F1 over the datasets of a group, with the 95% interval of the bootstrap
    clustered over datasets.

    value, low, high are None where nothing was asked, and where a dataset is `broken`: its flags
    say why. Published ones have no interval. datasets: in the mean; missing: of the group, not
    asked of this system, so that the mean is of fewer datasets than others' are. untrained: asked,
    but the system was not trained on them. They are left out where it was trained on others of the
    group, as the study
      has it (the overall mean of GenTune is that of the general sets); else the mean is of them
      alone, a cross-domain one.
    apart: asked, but not comparable (Cell): in no mean.
    flags: of its cells, each as "dataset: flag".
    """

    value: float | None
    low: float | None
    high: float | None
    datasets: tuple[str, ...]
    missing: tuple[str, ...]
    untrained: tuple[str, ...]
    apart: tuple[str, ...]
    broken: tuple[str, ...]
    flags: tuple[str, ...]


@dataclass(frozen=True, eq=False)
class StudyScores:
    """Cells by (system name, dataset name); a system has none where it was not asked."""

    record: StudyRecord
    cells: dict[tuple[str, str], Cell]
    resamples: int
    seed: int

    @cached_property
    def groups(self) -> dict[str, tuple[str, ...]]:
        """Domain -> its datasets, then "overall" -> all."""
        domains = dict.fromkeys(one.domain for one in self.record.datasets)
        found = {
            domain: tuple(one.name for one in self.record.datasets if one.domain == domain)
            for domain in domains
        }
        return {**found, OVERALL: tuple(one.name for one in self.record.datasets)}

    @cached_property
    def attributes(self) -> dict[str, list[dict[str, str]]]:
        """Dataset -> slices that each of its examples falls into (`attributes_of`)."""
        return {
            name: [attributes_of(one) for one in examples.values()]
            for name, examples in self.record.examples.items()
        }

    def cell(self, system: str, dataset: str) -> Cell | None:
        return self.cells.get((system, dataset))

    def asked(self, system: str, datasets: Sequence[str]) -> list[Cell]:
        """The cells that a system has on these datasets."""
        return [self.cells[system, name] for name in datasets if (system, name) in self.cells]

    def average(self, system: str, group: str) -> Average:
        """Over the datasets of a domain or OVERALL."""
        return self.average_over(system, self.groups[group])

    def average_over(self, system: str, names: Sequence[str]) -> Average:
        """Over the datasets named."""
        asked = self.asked(system, names)
        cells = at_home(asked)
        broken = tuple(cell.dataset for cell in cells if cell.broken)
        shown = (
            None
            if broken or not cells
            else f1_interval(clustered([cell.resampled for cell in cells], self.seed))
        )
        datasets = tuple(cell.dataset for cell in cells)
        return Average(
            value=shown and shown.value,
            low=shown and shown.low,
            high=shown and shown.high,
            datasets=datasets,
            missing=tuple(name for name in names if (system, name) not in self.cells),
            untrained=tuple(cell.dataset for cell in asked if cell.trained is False),
            apart=tuple(cell.dataset for cell in asked if not cell.comparable),
            broken=broken,
            flags=tuple(f"{cell.dataset}: {flag}" for cell in cells for flag in cell.flags),
        )

    def seed_of(self, dataset: str) -> tuple[int, int]:
        """The seed of a dataset's draws: of its own, so that datasets vary independently, whatever
        their order.
        """
        return self.seed, zlib.crc32(dataset.encode())


def at_home(cells: Sequence[Cell]) -> list[Cell]:
    """Those comparable that the system was trained on, or need no training; all that are comparable
    if there are none.
    """
    comparable = [cell for cell in cells if cell.comparable]
    return [cell for cell in comparable if cell.trained is not False] or comparable


def measure(record: StudyRecord, resamples: int = RESAMPLES, seed: int = SEED) -> StudyScores:
    """Reads, checks, scores and resamples every predictions file of a study.

    Rows are joined to the examples by id, else by the hash of a prompt that another system of the
    study was asked for one.

    Raises:
      InputError: a file that cannot be read, a row of an example that the study does not have, a
        gold label that differs from the example's, two answers of a system to one example, two
        systems or datasets of one name.
    """
    for what, names in (
        ("systems", [one.name for one in record.systems]),
        ("datasets", [one.name for one in record.datasets]),
    ):
        if twice := sorted({name for name in names if names.count(name) > 1}):
            raise InputError(f"{record.folder}: two {what} are called {twice[0]!r}; name each once")
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
    """Of each system that was asked: place of an example -> its answer."""
    place = {example.id: index for index, example in enumerate(examples)}
    by_hash: dict[str, set[int]] = defaultdict(set)
    found: list[tuple[RecordedSystem, dict[int, str]]] = []
    later: list[tuple[RecordedSystem, dict[int, str], Prediction]] = []
    texts: dict[str, str] = {}  # one object per answer, not per example
    for system in record.systems:
        if dataset.name not in system.predictions:
            continue
        answers: dict[int, str] = {}
        found.append((system, answers))
        for row in record.rows(system, dataset.name):
            if row.example_id not in place:
                later.append((system, answers, row))
                continue
            index = place[row.example_id]
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
    return found


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
    """The map to the common labels that a predictions file is in, if it is not in the dataset's
    own.
    """
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
    # SemEval's official score is of its own labels alone.
    scores = (
        score(gold, predicted, schema)
        if common
        else score_dataset(dataset.name, gold, predicted, schema)
    )
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
    """What is wrong with the answers as a whole, and whether their F1 is one of a fault, not of a
    model.
    """
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


def _share(answers: Sequence[str], holds) -> float:
    verdicts = {answer: holds(answer) for answer in set(answers)}
    return sum(verdicts[answer] for answer in answers) / len(answers)
