"""What the report of a study shows: the tables of the statistics, and what the page draws of them.

    findings = collect(measure(read_record("runs/study-small")), public=False)
    findings.headline, findings.comparisons, findings.disagreements

No statistics are computed here: rows are chosen, ordered and cut to a size that a page can show, and each cut is counted.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from matplotlib import colormaps

from jaxre.evaluation.metrics import Confusion, confusion_matrix
from jaxre.evaluation.regression import ScalePoint, ScaleRegression, family_of, scale_regression
from jaxre.evaluation.slices import Slice, slices
from jaxre.evaluation.strata import STRATA, error_strata
from jaxre.evaluation.study_record import RecordedDataset, RecordedSystem, StudyRecord
from jaxre.evaluation.study_scores import OVERALL, Cell, StudyScores
from jaxre.evaluation.study_tables import (
    Difference,
    FootprintRow,
    Headline,
    HeadlineRow,
    LabelsEffect,
    PromptSensitivity,
    cross_domain,
    enumerated_effect,
    footprint,
    headline,
    labels_effect,
    matched_shots,
    planned_comparisons,
    prompt_sensitivity,
)
from jaxre.relations.draws import digest
from jaxre.relations.marks import locate
from jaxre.relations.schema import Example, is_negative, normalise_label

# Disagreements shown per dataset and frontier system; and labels of a confusion matrix, of which REBEL alone has 219.
EXAMPLES, CONFUSION_LABELS = 12, 24
REST = "(all other labels)"

# As the benchmarks call themselves.
DATASET_TITLES = {
    "facts": "Facts",
    "semeval2010_task8": "SemEval-2010 Task 8",
    "conll04": "CoNLL04",
    "conll04_multihead": "CoNLL04 (multi-head)",
    "nyt11": "NYT11",
    "nyt24": "NYT-24",
    "gids": "GIDS",
    "re_docred": "Re-DocRED",
    "rebel": "REBEL",
    "tacred": "TACRED",
    "biographical": "Biographical",
    "pg_fiction": "PG-Fiction",
}
KIND_TITLES = {
    "tuned": "fine-tuned",
    "adapted": "adapted, then fine-tuned",
    "encoder": "encoder",
    "untuned": "not tuned",
    "baseline": "simple baseline",
    "frontier": "frontier model",
}
REGIME_TITLES = {"gentune": "GenTune", "littune": "LitTune", "mixtune": "MixTune"}

Segment = tuple[str, str]  # text, and what it is: "", "head", "tail" or "head tail"


@dataclass(frozen=True)
class DatasetRow:
    """One benchmark as the first section lists it."""

    name: str
    domain: str
    examples: int
    positive: int
    labels: int
    open_licence: bool
    systems: int  # that were asked


@dataclass(frozen=True)
class StrataRow:
    """The errors of one system on one dataset: counts in the order of STRATA."""

    system: str
    dataset: str
    examples: int
    errors: int
    counts: tuple[int, ...]


@dataclass(frozen=True)
class Disagreement:
    """One example that two systems answer differently. `right`: "model", "frontier" or "neither"."""

    id: str
    dataset: str
    frontier: str
    segments: tuple[Segment, ...]
    head: str
    tail: str
    gold: str
    model_answer: str
    frontier_answer: str
    right: str
    open_licence: bool


@dataclass(frozen=True)
class Disagreements:
    """Of one model with each frontier system. counts: (dataset, frontier) -> (all, shown); withheld: datasets left out of a public page."""

    model: str
    shown: tuple[Disagreement, ...]
    counts: dict[tuple[str, str], tuple[int, int]]
    withheld: tuple[str, ...]


@dataclass(frozen=True)
class Findings:
    """All that the page and the figures show. `best`: the fine-tuned system with the highest overall F1, if any."""

    study: StudyScores
    public: bool
    datasets: tuple[DatasetRow, ...]
    headline: Headline
    best: HeadlineRow | None
    comparisons: tuple[Difference, ...]
    effects: dict[str, tuple[Difference, ...]]
    labels: tuple[LabelsEffect, ...]
    footprint: tuple[FootprintRow, ...]
    styles: tuple[PromptSensitivity, ...]
    regressions: dict[str, ScaleRegression]
    slices: dict[str, tuple[Slice, ...]]
    strata: tuple[StrataRow, ...]
    confusions: dict[tuple[str, str], Confusion]
    disagreements: Disagreements | None

    @property
    def record(self) -> StudyRecord:
        return self.study.record

    @cached_property
    def measured(self) -> tuple[HeadlineRow, ...]:
        """Measured rows, best first."""
        return tuple(row for row in self.headline.rows if row.source == "measured")

    @cached_property
    def published(self) -> tuple[HeadlineRow, ...]:
        return tuple(row for row in self.headline.rows if row.source == "published")

    @cached_property
    def systems(self) -> dict[str, RecordedSystem]:
        return {system.name: system for system in self.record.systems}


def collect(study: StudyScores, public: bool = False) -> Findings:
    """Everything the report shows.

    Args:
      public: sentences of datasets whose licence does not allow to republish them are left out.
    """
    table = headline(study)
    table = Headline(table.groups, tuple(sorted(table.rows, key=_rank)))
    tuned = [row for row in table.rows if row.source == "measured" and row.kind in ("tuned", "adapted") and overall(row) is not None]
    best = tuned[0] if tuned else None
    return Findings(
        study=study,
        public=public,
        datasets=tuple(_dataset(study, one) for one in study.record.datasets),
        headline=table,
        best=best,
        comparisons=planned_comparisons(study),
        effects={
            "Enumerated against generic prompts": enumerated_effect(study),
            "Trained inside against outside of the domain": cross_domain(study),
            "As many demonstrations as in training against another number": matched_shots(study),
        },
        labels=labels_effect(study),
        footprint=footprint(study),
        styles=prompt_sensitivity(study),
        regressions=_regressions(table.rows),
        slices={system.name: tuple(slices(study, system.name)) for system in study.record.systems},
        strata=tuple(_strata(study, cell) for cell in study.cells.values()),
        confusions={key: _confusion(study, cell) for key, cell in study.cells.items()},
        disagreements=None if best is None else _disagreements(study, best.name, public),
    )


def overall(row: HeadlineRow) -> float | None:
    """The average over all datasets of the study that the row has."""
    return row.averages[OVERALL].value if OVERALL in row.averages else None


def dataset_title(name: str) -> str:
    return DATASET_TITLES.get(name, name)


def scope_title(scope: str) -> str:
    """A domain, a dataset or the overall average as a heading."""
    return {OVERALL: "Overall", "general": "General", "literary": "Literary"}.get(scope) or dataset_title(scope)


def setting(row: HeadlineRow) -> str:
    """What tells a row from others of its model, in words."""
    parts = [KIND_TITLES.get(row.kind, row.kind), REGIME_TITLES.get(row.regime, row.regime)]
    if row.kind != "encoder":
        if row.train_shots is not None:
            parts.append(f"trained {row.train_shots}-shot")
        if row.prompt_shots is not None and row.prompt_shots != row.train_shots:
            parts.append(f"asked {row.prompt_shots}-shot")
        if row.enumerated is False:
            parts.append("labels not listed")
    return ", ".join(part for part in (*parts, row.style) if part)


def cividis(value: float) -> tuple[str, str]:
    """Colour of a share in [0, 1] on a scale that colour-blind readers see alike, and that of text on it."""
    red, green, blue, _ = colormaps["cividis"](min(max(value, 0.0), 1.0))
    light = 0.2126 * red + 0.7152 * green + 0.0722 * blue > 0.42
    return "#" + "".join(f"{round(255 * part):02x}" for part in (red, green, blue)), "#111" if light else "#fff"


def page_data(findings: Findings) -> dict[str, Any]:
    """What the page's own script draws: the points of the charts, the slices and the confusion matrices."""
    return {
        "charts": {"scaling": scaling_points(findings), "cost": cost_points(findings)},
        "slices": {
            name: [
                [one.level, one.name, scope_title(one.dataset or one.domain), one.n, one.positive, one.measure]
                + [round(value, 4) for value in (one.value, one.low, one.high, one.whole)]
                + [one.status, one.domain]
                for one in table
            ]
            for name, table in findings.slices.items()
        },
        "confusions": [
            {
                "system": system,
                "dataset": dataset,
                "title": dataset_title(dataset),
                "rows": one.labels,
                "columns": one.columns,
                "counts": [
                    [row, column, int(one.counts[row, column])] for row, column in zip(*map(list, one.counts.nonzero()), strict=True)
                ],
            }
            for (system, dataset), one in findings.confusions.items()
        ],
    }


def scaling_points(findings: Findings) -> list[dict[str, Any]]:
    """F1 against parameters, one point per row and group (domains and overall)."""
    return [
        {
            "name": row.name,
            "x": row.parameters,
            "group": group,
            "kind": row.kind,
            "source": row.source,
            "y": average.value,
            "low": average.low,
            "high": average.high,
        }
        for row in findings.headline.rows
        for group, average in row.averages.items()
        if row.parameters and average.value is not None
    ]


def cost_points(findings: Findings) -> list[dict[str, Any]]:
    """Overall F1 against what the answers cost (USD per 1,000), what training took (hours) and how long one answer takes (ms)."""
    points = []
    for row in findings.measured:
        average, system = row.averages.get(OVERALL), findings.systems[row.name]
        if average is None or average.value is None:
            continue
        answers = sum(len(cell.ids) for (name, _), cell in findings.study.cells.items() if name == row.name)
        found = {
            "dollars": None if system.cost_usd is None or not answers else 1000 * system.cost_usd / answers,
            "hours": None if system.seconds is None else system.seconds / 3600,
            "milliseconds": system.latency_ms,
        }
        points += [
            {
                "name": row.name,
                "x": x,
                "group": group,
                "kind": row.kind,
                "source": row.source,
                "y": average.value,
                "low": average.low,
                "high": average.high,
            }
            for group, x in found.items()
            if x is not None
        ]
    return points


def _rank(row: HeadlineRow) -> tuple[bool, bool, float, str]:
    value = overall(row)
    return row.source == "published", value is None, -(value or 0.0), row.name


def _dataset(study: StudyScores, one: RecordedDataset) -> DatasetRow:
    examples = study.record.examples[one.name].values()
    return DatasetRow(
        one.name,
        one.domain,
        len(examples),
        sum(not is_negative(example.relation) for example in examples),
        len(one.labels),
        one.open_licence,
        sum(dataset == one.name for _, dataset in study.cells),
    )


def _regressions(rows: Iterable[HeadlineRow]) -> dict[str, ScaleRegression]:
    points: dict[str, list[ScalePoint]] = {}
    for row in rows:
        if row.parameters and row.kind == "tuned":
            for dataset, cell in row.cells.items():
                if not cell.broken:
                    point = ScalePoint(
                        cell.f1, row.parameters, family_of(row.model), dataset, row.regime, str(row.train_shots), row.name, row.source
                    )
                    points.setdefault(row.source, []).append(point)
    return {source: scale_regression(found) for source, found in points.items()}


def _labels(study: StudyScores, dataset: str) -> tuple[str, ...]:
    return next(one.labels for one in study.record.datasets if one.name == dataset)


def _strata(study: StudyScores, cell: Cell) -> StrataRow:
    found = error_strata(cell.gold, cell.predicted, _labels(study, cell.dataset))
    counts = {one.name: one.count for one in found.strata}
    return StrataRow(cell.system, cell.dataset, found.examples, found.errors, tuple(counts[name] for name in STRATA))


def _confusion(study: StudyScores, cell: Cell) -> Confusion:
    """At most CONFUSION_LABELS labels by their frequency in the dataset, the same for every system; the others are one row and column."""
    labels = _labels(study, cell.dataset)
    whole = confusion_matrix(cell.gold, cell.predicted, labels)
    if len(labels) <= CONFUSION_LABELS:
        return whole
    support = Counter(normalise_label(example.relation) for example in study.record.examples[cell.dataset].values())
    kept = sorted(sorted(range(len(labels)), key=lambda i: (-support[normalise_label(labels[i])], labels[i]))[:CONFUSION_LABELS])
    place = np.full(
        len(whole.columns), len(kept)
    )  # the rest takes what is not kept
    place[kept] = np.arange(len(kept))
    place[len(labels) :] = len(kept) + 1
    counts = np.zeros((len(kept) + 1, len(kept) + 1 + len(whole.columns) - len(labels)), int)
    np.add.at(counts, (place[: len(labels), None], place[None]), whole.counts)
    names = (*(labels[i] for i in kept), REST)
    return Confusion(names, (*names, *whole.columns[len(labels) :]), counts)


def _disagreements(study: StudyScores, model: str, public: bool) -> Disagreements:
    shown: list[Disagreement] = []
    counts: dict[tuple[str, str], tuple[int, int]] = {}
    withheld = tuple(one.name for one in study.record.datasets if public and not one.open_licence)
    for frontier in (system.name for system in study.record.systems if system.kind == "frontier"):
        for dataset in study.record.datasets:
            ours, theirs = study.cell(model, dataset.name), study.cell(frontier, dataset.name)
            if ours is None or theirs is None or dataset.name in withheld:
                continue
            answers = dict(zip(theirs.ids, theirs.predicted, strict=True))
            found = [
                _disagreement(study.record.examples[dataset.name][id], frontier, answer, answers[id], dataset.open_licence)
                for id, answer in zip(ours.ids, ours.predicted, strict=True)
                if id in answers and normalise_label(answer) != normalise_label(answers[id])
            ]
            chosen = _in_turns(found)
            counts[dataset.name, frontier] = len(found), len(chosen)
            shown += chosen
    return Disagreements(model, tuple(shown), counts, withheld)


def _in_turns(found: Sequence[Disagreement]) -> list[Disagreement]:
    """At most EXAMPLES, of each kind in turn, within a kind by a draw that hangs on the ids alone."""
    kinds = [
        sorted((one for one in found if one.right == right), key=lambda one: digest(one.id)) for right in ("model", "frontier", "neither")
    ]
    turns = itertools.chain.from_iterable(itertools.zip_longest(*kinds))
    return [one for one in turns if one is not None][:EXAMPLES]


def _disagreement(example: Example, frontier: str, ours: str, theirs: str, open_licence: bool) -> Disagreement:
    gold = normalise_label(example.relation)
    right = "model" if normalise_label(ours) == gold else "frontier" if normalise_label(theirs) == gold else "neither"
    return Disagreement(
        example.id,
        example.dataset,
        frontier,
        segments(example),
        example.head,
        example.tail,
        example.relation,
        ours,
        theirs,
        right,
        open_licence,
    )


def segments(example: Example) -> tuple[Segment, ...]:
    """The text cut where an entity begins or ends, each part with what it belongs to; entities may nest or cross."""
    head, tail = locate(example.text, example.head, example.tail, example.head_span, example.tail_span)
    spans = {name: span for name, span in (("head", head), ("tail", tail)) if span is not None}
    cuts = sorted({0, len(example.text), *(place for span in spans.values() for place in span)})
    return tuple(
        (example.text[start:end], " ".join(name for name, span in spans.items() if span[0] <= start and end <= span[1]))
        for start, end in itertools.pairwise(cuts)
    )
