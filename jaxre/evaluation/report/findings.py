"""Contents of a study's report: the tables of the statistics, and the data that the page draws.

    findings = collect(measure(read_record("runs/study-small")), public=False)
    findings.headline, findings.comparisons, findings.disagreements

This module computes no statistics. It selects and orders rows, limits them to a size that a page
can show, and counts what it leaves out.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from matplotlib import colormaps
from matplotlib.colors import to_hex

from jaxre.evaluation.metrics.regression import ScaleRegression
from jaxre.evaluation.metrics.scores import Confusion, confusion_matrix
from jaxre.evaluation.metrics.strata import error_strata
from jaxre.evaluation.report.contrasts import (
    Difference,
    cross_domain,
    enumerated_effect,
    matched_shots,
    planned_comparisons,
)
from jaxre.evaluation.report.prompt_effects import PromptSensitivity, prompt_sensitivity
from jaxre.evaluation.report.record import RecordedDataset, StudyRecord
from jaxre.evaluation.report.slices import Slice, slices
from jaxre.evaluation.report.study_scores import OVERALL, Average, Cell, StudyScores
from jaxre.evaluation.report.tables import (
    IN_BOTH,
    FootprintRow,
    Headline,
    HeadlineRow,
    LabelsEffect,
    footprint,
    headline,
    labels_effect,
    scaling,
)
from jaxre.relations.draws import digest
from jaxre.relations.marks import locate
from jaxre.relations.schema import Example, is_negative, normalise_label

# Disagreements shown per dataset and frontier system; labels shown in a confusion matrix (REBEL has
# 219).
EXAMPLES, CONFUSION_LABELS = 12, 24
REST = "(all other labels)"

# The names that the benchmarks use themselves.
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

SLICE_FIELDS = (
    "level",
    "name",
    "domain",
    "dataset",
    "n",
    "measure",
    "value",
    "low",
    "high",
    "whole",
    "status",
)
SLICE_WORDS = ("level", "domain", "dataset", "measure", "status")

Segment = tuple[str, str]  # text and role: "", "head", "tail" or "head tail"


@dataclass(frozen=True)
class DatasetRow:
    """One benchmark in the table of datasets. systems: how many were evaluated on it."""

    name: str
    domain: str
    examples: int
    positive: int
    labels: int
    open_licence: bool
    systems: int


@dataclass(frozen=True)
class StrataRow:
    """Errors of one system on one dataset; counts are in the order of STRATA."""

    system: str
    dataset: str
    examples: int
    errors: int
    counts: tuple[int, ...]


@dataclass(frozen=True)
class Disagreement:
    """One example that two systems answer differently. All labels are common labels where those of
    the frontier system are.

    right: "model", "frontier" or "neither".
    """

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
    """Disagreements of one model with each frontier system.

    counts: (dataset, frontier) -> (all, shown); withheld: datasets left out of a public page.
    """

    model: str
    shown: tuple[Disagreement, ...]
    counts: dict[tuple[str, str], tuple[int, int]]
    withheld: tuple[str, ...]


@dataclass(frozen=True, eq=False)
class Findings:
    """Data of the page and the figures."""

    study: StudyScores
    datasets: tuple[DatasetRow, ...]
    headline: Headline
    comparisons: tuple[Difference, ...]
    effects: dict[str, tuple[Difference, ...]]
    labels: tuple[LabelsEffect, ...]
    footprint: tuple[FootprintRow, ...]
    styles: tuple[PromptSensitivity, ...]
    regressions: tuple[ScaleRegression, ...]
    slices: dict[str, tuple[Slice, ...]]
    strata: tuple[StrataRow, ...]
    confusions: dict[tuple[str, str], Confusion]
    disagreements: Disagreements | None

    @property
    def record(self) -> StudyRecord:
        return self.study.record

    @property
    def domains(self) -> dict[str, tuple[str, ...]]:
        """Domain -> its datasets in this study."""
        return {name: names for name, names in self.study.groups.items() if name != OVERALL}

    @property
    def shared(self) -> tuple[str, ...]:
        """Datasets that the paper also has; empty if these are all datasets of the study."""
        names = self.headline.groups.get(IN_BOTH, ())
        return names if len(names) < len(self.study.groups[OVERALL]) else ()

    def wanted(self, group: str) -> tuple[str, ...]:
        """Datasets that the mean of a group covers."""
        return self.shared if group == IN_BOTH else self.study.groups[group]

    def average(self, row: HeadlineRow, group: str) -> Average | None:
        """Mean of a row; None if it covers datasets that this study does not have, because nothing
        here compares with it.
        """
        if (
            row.source == "published"
            and group == OVERALL
            and not self.shared
            and IN_BOTH in row.averages
        ):
            group = IN_BOTH
        average = row.averages[group]
        return average if set(average.datasets) <= set(self.study.groups[OVERALL]) else None

    def whole_average(self, row: HeadlineRow, group: str) -> Average | None:
        """Mean of a row over all datasets of a group; None if one is missing, because the mean
        would not compare with other rows.
        """
        average = self.average(row, group)
        if average is None or average.value is None:
            return None
        return average if set(self.wanted(group)) <= set(average.datasets) else None

    @cached_property
    def rows(self) -> tuple[HeadlineRow, ...]:
        """Measured rows, then published rows with a figure for a dataset of this study; in both
        parts, means over the most datasets come first.
        """
        names = set(self.study.groups[OVERALL])
        rows = (
            row for row in self.headline.rows if row.source == "measured" or names & set(row.cells)
        )
        return tuple(sorted(rows, key=self._rank))

    @property
    def measured(self) -> tuple[HeadlineRow, ...]:
        return tuple(row for row in self.rows if row.source == "measured")

    @property
    def published(self) -> tuple[HeadlineRow, ...]:
        return tuple(row for row in self.rows if row.source == "published")

    def _rank(self, row: HeadlineRow) -> tuple[bool, int, float, str]:
        published = row.source == "published"
        group = IN_BOTH if published and self.shared else OVERALL
        average = self.average(row, group)
        if average is None or average.value is None:
            return published, len(self.wanted(group)) + 1, 0.0, row.name
        missing = len(self.wanted(group)) - len(average.datasets)
        return published, missing, -average.value, row.name


def collect(study: StudyScores, public: bool = False) -> Findings:
    """Collects everything that the report shows.

    Args:
      public: leave out sentences of datasets without an open licence.
    """
    best = best_tuned(study)
    # Rows of the style table have the same weights as another row.
    styled = {system.name for system in study.record.systems if system.style}
    return Findings(
        study=study,
        datasets=tuple(_dataset(study, dataset) for dataset in study.record.datasets),
        headline=headline(study),
        comparisons=planned_comparisons(study),
        effects={
            "Labels listed in the prompt (first) against not listed": enumerated_effect(study),
            "Trained on the other domain (first) against on this one": cross_domain(study),
            "As many demonstrations as in training (first) against another number": matched_shots(
                study
            ),
        },
        labels=labels_effect(study),
        footprint=tuple(row for row in footprint(study) if row.name not in styled),
        styles=prompt_sensitivity(study),
        regressions=scaling(study),
        slices={system.name: slices(study, system.name) for system in study.record.systems},
        strata=tuple(_strata(cell) for cell in study.cells.values()),
        confusions={key: _confusion(study, cell) for key, cell in study.cells.items()},
        disagreements=None if best is None else _disagreements(study, best, public),
    )


def best_tuned(study: StudyScores) -> str | None:
    """Name of the fine-tuned system with the most datasets and, among these, the highest mean F1;
    ignores rows of the style table.
    """
    ranked = [
        (len(average.datasets), average.value, system.name)
        for system in study.record.systems
        if system.kind in ("tuned", "adapted") and not system.style
        if (average := study.average(system.name, OVERALL)).value is not None
    ]
    return max(ranked)[2] if ranked else None


def dataset_title(name: str) -> str:
    return DATASET_TITLES.get(name, name)


def scope_title(scope: str) -> str:
    """Heading for a domain, a dataset or the overall average."""
    return {
        OVERALL: "Overall",
        IN_BOTH: "Datasets that the paper has too",
        "general": "General",
        "literary": "Literary",
    }.get(scope) or dataset_title(scope)


def setting(row: HeadlineRow) -> str:
    """Description of the setting that distinguishes a row from others of its model."""
    parts = [KIND_TITLES.get(row.kind, row.kind), REGIME_TITLES.get(row.regime, row.regime)]
    if row.kind != "encoder":
        if row.train_shots is not None:
            parts.append(f"trained {row.train_shots}-shot")
        if row.prompt_shots is not None and row.prompt_shots != row.train_shots:
            parts.append(f"prompted {row.prompt_shots}-shot")
        if row.enumerated is False:
            parts.append("labels not listed")
    return ", ".join(part for part in (*parts, row.style) if part)


def in_units(value: float, units: dict[str, float], form: str) -> str:
    """Formats a value in the first unit that it reaches, otherwise in the last. units: name ->
    factor, in descending order.
    """
    unit = next((unit for unit, factor in units.items() if value >= factor), list(units)[-1])
    return f"{value / units[unit]:{form}}{unit}"


def cividis(value: float) -> tuple[str, str]:
    """Background colour for a share in [0, 1], safe for colour-blind readers, and a legible text
    colour on it.
    """
    red, green, blue, _ = colormaps["cividis"](min(max(value, 0.0), 1.0))
    # Relative luminance (WCAG 2.2, with 2.2 for its piecewise exponent); from 0.18 on black
    # contrasts more than white.
    light = 0.2126 * red**2.2 + 0.7152 * green**2.2 + 0.0722 * blue**2.2 > 0.18
    return to_hex((red, green, blue)), "#111" if light else "#fff"


def page_data(findings: Findings) -> dict[str, Any]:
    """Data that the page's script draws: chart points, slices and confusion matrices."""
    return {
        "kinds": KIND_TITLES,
        "charts": {"scaling": scaling_points(findings), "cost": cost_points(findings)},
        "slices": _slices_data(findings.slices),
        "confusions": [
            {
                "system": system,
                "dataset": dataset,
                "title": dataset_title(dataset),
                "rows": matrix.labels,
                "columns": matrix.columns,
                "counts": [
                    [*cell, int(matrix.counts[*cell])]
                    for cell in np.argwhere(matrix.counts).tolist()
                ],
            }
            for (system, dataset), matrix in findings.confusions.items()
        ],
    }


def _slices_data(tables: dict[str, tuple[Slice, ...]]) -> dict[str, Any]:
    """Rows of SLICE_FIELDS, with SLICE_WORDS as indices into `words`: a study has tens of thousands
    of slices.
    """
    words: dict[str, int] = {}

    def cells(part: Slice) -> list[Any]:
        row = {name: getattr(part, name) for name in SLICE_FIELDS}
        row["name"] = scope_title(part.name) if part.level in ("domain", "dataset") else part.name
        row |= {name: words.setdefault(row[name], len(words)) for name in SLICE_WORDS}
        return [round(cell, 3) if isinstance(cell, float) else cell for cell in row.values()]

    systems = {name: [cells(part) for part in table] for name, table in tables.items()}
    return {"fields": SLICE_FIELDS, "worded": SLICE_WORDS, "words": list(words), "systems": systems}


def scaling_points(findings: Findings) -> list[dict[str, Any]]:
    """F1 against parameters: one point per row and group (domains, overall, shared with the paper)
    in which the row has all datasets.
    """
    return [
        _point(row, average, group, row.parameters)
        for row in findings.rows
        for group in (*findings.study.groups, *((IN_BOTH,) if findings.shared else ()))
        if row.parameters
        and not row.style
        and (average := findings.whole_average(row, group)) is not None
    ]


def cost_points(findings: Findings) -> list[dict[str, Any]]:
    """Overall F1 against the cost of answers (USD per 1,000), training time (hours) and time per
    answer (ms).
    """
    systems = {system.name: system for system in findings.record.systems}
    points = []
    for row in (row for row in findings.measured if not row.style):
        average, system = findings.whole_average(row, OVERALL), systems[row.name]
        if average is None:
            continue
        answers = sum(
            len(cell.ids) for cell in findings.study.asked(row.name, findings.study.groups[OVERALL])
        )
        prices = {
            "dollars": (
                None if system.cost_usd is None or not answers else 1000 * system.cost_usd / answers
            ),
            "hours": None if system.seconds is None else system.seconds / 3600,
            "milliseconds": system.latency_ms,
        }
        points += [
            _point(row, average, group, price)
            for group, price in prices.items()
            if price is not None
        ]
    return points


def _point(row: HeadlineRow, average: Average, group: str, x: float) -> dict[str, Any]:
    place = {"x": x, "y": average.value, "low": average.low, "high": average.high}
    return {"name": row.name, "group": group, "kind": row.kind, "source": row.source, **place}


def _dataset(study: StudyScores, dataset: RecordedDataset) -> DatasetRow:
    examples = study.record.examples[dataset.name].values()
    return DatasetRow(
        name=dataset.name,
        domain=dataset.domain,
        examples=len(examples),
        positive=sum(not is_negative(example.relation) for example in examples),
        labels=len(dataset.labels),
        open_licence=dataset.open_licence,
        systems=sum(name == dataset.name for _, name in study.cells),
    )


def _strata(cell: Cell) -> StrataRow:
    errors = error_strata(cell.gold, cell.predicted, cell.schema)
    return StrataRow(
        cell.system,
        cell.dataset,
        errors.examples,
        errors.errors,
        tuple(stratum.count for stratum in errors.strata),
    )


def _confusion(study: StudyScores, cell: Cell) -> Confusion:
    """Confusion of the CONFUSION_LABELS labels that are most frequent in the dataset (the same for
    every system); all others share one row and one column.
    """
    labels = cell.classes
    full = confusion_matrix(cell.gold, cell.predicted, labels)
    if len(labels) <= CONFUSION_LABELS:
        return full
    gold = (
        cell.gold
        if cell.common
        else [example.relation for example in study.record.examples[cell.dataset].values()]
    )
    support = Counter(map(normalise_label, gold))
    by_support = sorted(
        range(len(labels)), key=lambda i: (-support[normalise_label(labels[i])], labels[i])
    )
    frequent = sorted(by_support[:CONFUSION_LABELS])
    column_of = np.full(len(full.columns), len(frequent))  # REST, unless set below
    column_of[frequent] = np.arange(len(frequent))
    column_of[len(labels) :] = len(frequent) + 1  # "(outside)", if there is such a column
    outside = full.columns[len(labels) :]
    counts = np.zeros((len(frequent) + 1, len(frequent) + 1 + len(outside)), int)
    np.add.at(counts, (column_of[: len(labels), None], column_of[None]), full.counts)
    names = (*(labels[i] for i in frequent), REST)
    return Confusion(names, (*names, *outside), counts)


def _disagreements(study: StudyScores, model: str, public: bool) -> Disagreements:
    shown: list[Disagreement] = []
    counts: dict[tuple[str, str], tuple[int, int]] = {}
    withheld = tuple(
        dataset.name for dataset in study.record.datasets if public and not dataset.open_licence
    )
    for frontier in (system.name for system in study.record.systems if system.kind == "frontier"):
        for dataset in study.record.datasets:
            ours, theirs = study.cell(model, dataset.name), study.cell(frontier, dataset.name)
            if ours is None or theirs is None or dataset.name in withheld:
                continue
            their_labels = zip(theirs.gold, theirs.predicted, strict=True)
            labels = dict(zip(theirs.ids, their_labels, strict=True))  # id -> (gold, answer)
            our_answers = (
                [theirs.common.predicted(answer) for answer in ours.predicted]
                if theirs.common
                else ours.predicted
            )
            disagreements = [
                _disagreement(
                    study.record.examples[dataset.name][id],
                    frontier,
                    answer,
                    *labels[id],
                    dataset.open_licence,
                )
                for id, answer in zip(ours.ids, our_answers, strict=True)
                if id in labels and not _same(answer, labels[id][1])
            ]
            sample = _sample(disagreements)
            counts[dataset.name, frontier] = len(disagreements), len(sample)
            shown += sample
    return Disagreements(model, tuple(shown), counts, withheld)


def _sample(disagreements: Sequence[Disagreement]) -> list[Disagreement]:
    """At most EXAMPLES, alternating over who is right; the draw depends on the ids alone."""
    drawn = sorted(disagreements, key=lambda disagreement: digest(disagreement.id))
    by_right = [
        [disagreement for disagreement in drawn if disagreement.right == right]
        for right in ("model", "frontier", "neither")
    ]
    turns = itertools.chain.from_iterable(itertools.zip_longest(*by_right))
    return [disagreement for disagreement in turns if disagreement is not None][:EXAMPLES]


def _disagreement(
    example: Example, frontier: str, ours: str, gold: str, theirs: str, open_licence: bool
) -> Disagreement:
    right = "model" if _same(ours, gold) else "frontier" if _same(theirs, gold) else "neither"
    return Disagreement(
        id=example.id,
        dataset=example.dataset,
        frontier=frontier,
        segments=segments(example),
        head=example.head,
        tail=example.tail,
        gold=gold,
        model_answer=ours,
        frontier_answer=theirs,
        right=right,
        open_licence=open_licence,
    )


def _same(first: str, second: str) -> bool:
    """True for equal labels, and for two labels that both mean "no relation"."""
    return normalise_label(first) == normalise_label(second) or (
        is_negative(first) and is_negative(second)
    )


def segments(example: Example) -> tuple[Segment, ...]:
    """Splits the text where an entity begins or ends; each part has its roles. Entities may nest or
    overlap.
    """
    head, tail = locate(
        example.text, example.head, example.tail, example.head_span, example.tail_span
    )
    spans = {name: span for name, span in (("head", head), ("tail", tail)) if span is not None}
    cuts = sorted({0, len(example.text), *(place for span in spans.values() for place in span)})
    return tuple(
        (
            example.text[start:end],
            " ".join(name for name, span in spans.items() if span[0] <= start and end <= span[1]),
        )
        for start, end in itertools.pairwise(cuts)
    )
