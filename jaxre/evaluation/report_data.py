"""What the report of a study shows: the tables of the statistics, and what the page draws of them.

    findings = collect(measure(read_record("runs/study-small")), public=False)
    findings.headline, findings.comparisons, findings.disagreements

No statistics are computed here: rows are chosen, ordered and cut to a size that a page can show,
and each cut is counted.
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

from jaxre.evaluation.metrics import Confusion, confusion_matrix
from jaxre.evaluation.prompt_effects import PromptSensitivity, prompt_sensitivity
from jaxre.evaluation.regression import ScaleRegression
from jaxre.evaluation.slices import Slice, slices
from jaxre.evaluation.strata import STRATA, error_strata
from jaxre.evaluation.study_contrasts import (
    Difference,
    cross_domain,
    enumerated_effect,
    matched_shots,
    planned_comparisons,
)
from jaxre.evaluation.study_record import RecordedDataset, StudyRecord
from jaxre.evaluation.study_scores import OVERALL, Average, Cell, StudyScores
from jaxre.evaluation.study_tables import (
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

# Disagreements shown per dataset and frontier system; and labels of a confusion matrix, of which
# REBEL alone has 219.
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
    """One example that two systems answer differently, all labels in common ones where the
    frontier's are.

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
    """Of one model with each frontier system. counts: (dataset, frontier) -> (all, shown);
    withheld: datasets left out of a public page.
    """

    model: str
    shown: tuple[Disagreement, ...]
    counts: dict[tuple[str, str], tuple[int, int]]
    withheld: tuple[str, ...]


@dataclass(frozen=True, eq=False)
class Findings:
    """All that the page and the figures show."""

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
        """Domain -> datasets of this study."""
        return {name: names for name, names in self.study.groups.items() if name != OVERALL}

    @property
    def shared(self) -> tuple[str, ...]:
        """The datasets that the paper has too, where these are some of the study's, not all."""
        names = self.headline.groups.get(IN_BOTH, ())
        return names if len(names) < len(self.study.groups[OVERALL]) else ()

    def wanted(self, group: str) -> tuple[str, ...]:
        """The datasets that a mean is over."""
        return self.shared if group == IN_BOTH else self.study.groups[group]

    def average(self, row: HeadlineRow, group: str) -> Average | None:
        """The mean of a row; None where it is over datasets that this study does not have, so that
        it would compare with nothing.
        """
        if (
            row.source == "published"
            and group == OVERALL
            and not self.shared
            and IN_BOTH in row.averages
        ):
            group = IN_BOTH
        found = row.averages[group]
        return found if set(found.datasets) <= set(self.study.groups[OVERALL]) else None

    def whole_average(self, row: HeadlineRow, group: str) -> Average | None:
        """The mean of a row over all datasets of a group; None where it lacks one, so that it would
        not compare with other rows.
        """
        found = self.average(row, group)
        return (
            found
            if found and found.value is not None and set(self.wanted(group)) <= set(found.datasets)
            else None
        )

    @cached_property
    def rows(self) -> tuple[HeadlineRow, ...]:
        """Measured rows, then published ones with a figure for a dataset of this study; in each,
        means of most datasets first.
        """
        names = set(self.study.groups[OVERALL])
        return tuple(
            sorted(
                (
                    row
                    for row in self.headline.rows
                    if row.source == "measured" or names & set(row.cells)
                ),
                key=self._rank,
            )
        )

    @property
    def measured(self) -> tuple[HeadlineRow, ...]:
        return tuple(row for row in self.rows if row.source == "measured")

    @property
    def published(self) -> tuple[HeadlineRow, ...]:
        return tuple(row for row in self.rows if row.source == "published")

    def _rank(self, row: HeadlineRow) -> tuple[bool, int, float, str]:
        group = IN_BOTH if row.source == "published" and self.shared else OVERALL
        average = self.average(row, group)
        if average is None or average.value is None:
            return row.source == "published", len(self.wanted(group)) + 1, 0.0, row.name
        return (
            row.source == "published",
            len(self.wanted(group)) - len(average.datasets),
            -average.value,
            row.name,
        )


def collect(study: StudyScores, public: bool = False) -> Findings:
    """Everything the report shows.

    Args:
      public: sentences of datasets without an open licence are left out.
    """
    best = best_tuned(study)
    # the same weights as another row
    styled = {one.name for one in study.record.systems if one.style}
    return Findings(
        study=study,
        datasets=tuple(_dataset(study, one) for one in study.record.datasets),
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
    """The fine-tuned system with the most datasets and, of these, the highest mean F1; those of the
    style table do not count.
    """
    tuned = [
        one.name
        for one in study.record.systems
        if one.kind in ("tuned", "adapted") and not one.style
    ]
    averages = [(study.average(name, OVERALL), name) for name in tuned]
    ranked = [
        (len(average.datasets), average.value, name)
        for average, name in averages
        if average.value is not None
    ]
    return max(ranked)[2] if ranked else None


def dataset_title(name: str) -> str:
    return DATASET_TITLES.get(name, name)


def scope_title(scope: str) -> str:
    """A domain, a dataset or the overall average as a heading."""
    return {
        OVERALL: "Overall",
        IN_BOTH: "Datasets that the paper has too",
        "general": "General",
        "literary": "Literary",
    }.get(scope) or dataset_title(scope)


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
    """Colour of a share in [0, 1] on a scale that colour-blind readers see alike, and that of text
    on it.
    """
    red, green, blue, _ = colormaps["cividis"](min(max(value, 0.0), 1.0))
    # Relative luminance (WCAG 2.2, with 2.2 for its piecewise exponent); from 0.18 on black
    # contrasts more than white.
    light = 0.2126 * red**2.2 + 0.7152 * green**2.2 + 0.0722 * blue**2.2 > 0.18
    return "#" + "".join(f"{round(255 * part):02x}" for part in (red, green, blue)), (
        "#111" if light else "#fff"
    )


def page_data(findings: Findings) -> dict[str, Any]:
    """What the page's own script draws: the points of the charts, the slices and the confusion
    matrices.
    """
    return {
        "kinds": KIND_TITLES,
        "charts": {"scaling": scaling_points(findings), "cost": cost_points(findings)},
        "slices": _slices_data(findings.slices),
        "confusions": [
            {
                "system": system,
                "dataset": dataset,
                "title": dataset_title(dataset),
                "rows": one.labels,
                "columns": one.columns,
                "counts": [
                    [*cell, int(one.counts[*cell])] for cell in np.argwhere(one.counts).tolist()
                ],
            }
            for (system, dataset), one in findings.confusions.items()
        ],
    }


def _slices_data(tables: dict[str, tuple[Slice, ...]]) -> dict[str, Any]:
    """Rows of SLICE_FIELDS. What recurs is a number into `words`: a study has tens of thousands of
    slices.
    """
    words: dict[str, int] = {}

    def cells(one: Slice) -> list[Any]:
        shown = {name: getattr(one, name) for name in SLICE_FIELDS}
        shown["name"] = scope_title(one.name) if one.level in ("domain", "dataset") else one.name
        shown |= {name: words.setdefault(shown[name], len(words)) for name in SLICE_WORDS}
        return [round(cell, 3) if isinstance(cell, float) else cell for cell in shown.values()]

    systems = {name: [cells(one) for one in table] for name, table in tables.items()}
    return {"fields": SLICE_FIELDS, "worded": SLICE_WORDS, "words": list(words), "systems": systems}


def scaling_points(findings: Findings) -> list[dict[str, Any]]:
    """F1 against parameters, one point per row and group (domains, all, what the paper has too)
    that it has all datasets of.
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
    """Overall F1 against what the answers cost (USD per 1,000), what training took (hours) and how
    long one answer takes (ms).
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


def _strata(cell: Cell) -> StrataRow:
    found = error_strata(cell.gold, cell.predicted, cell.schema)
    counts = {one.name: one.count for one in found.strata}
    return StrataRow(
        cell.system,
        cell.dataset,
        found.examples,
        found.errors,
        tuple(counts[name] for name in STRATA),
    )


def _confusion(study: StudyScores, cell: Cell) -> Confusion:
    """At most CONFUSION_LABELS labels by their frequency in the dataset, the same for every system;
    the others are one row and column.
    """
    labels = cell.classes
    whole = confusion_matrix(cell.gold, cell.predicted, labels)
    if len(labels) <= CONFUSION_LABELS:
        return whole
    gold = (
        cell.gold
        if cell.common
        else [example.relation for example in study.record.examples[cell.dataset].values()]
    )
    support = Counter(map(normalise_label, gold))
    kept = sorted(
        sorted(range(len(labels)), key=lambda i: (-support[normalise_label(labels[i])], labels[i]))[
            :CONFUSION_LABELS
        ]
    )
    place = np.full(len(whole.columns), len(kept))  # the rest takes what is not kept
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
            answers = {
                id: (gold, answer)
                for id, gold, answer in zip(theirs.ids, theirs.gold, theirs.predicted, strict=True)
            }
            translated = (
                [theirs.common.predicted(answer) for answer in ours.predicted]
                if theirs.common
                else ours.predicted
            )
            found = [
                _disagreement(
                    study.record.examples[dataset.name][id],
                    frontier,
                    answer,
                    *answers[id],
                    dataset.open_licence,
                )
                for id, answer in zip(ours.ids, translated, strict=True)
                if id in answers and not _same(answer, answers[id][1])
            ]
            chosen = _in_turns(found)
            counts[dataset.name, frontier] = len(found), len(chosen)
            shown += chosen
    return Disagreements(model, tuple(shown), counts, withheld)


def _in_turns(found: Sequence[Disagreement]) -> list[Disagreement]:
    """At most EXAMPLES, of each kind in turn, within a kind by a draw that hangs on the ids
    alone.
    """
    kinds = [
        sorted((one for one in found if one.right == right), key=lambda one: digest(one.id))
        for right in ("model", "frontier", "neither")
    ]
    turns = itertools.chain.from_iterable(itertools.zip_longest(*kinds))
    return [one for one in turns if one is not None][:EXAMPLES]


def _disagreement(
    example: Example, frontier: str, ours: str, gold: str, theirs: str, open_licence: bool
) -> Disagreement:
    right = "model" if _same(ours, gold) else "frontier" if _same(theirs, gold) else "neither"
    return Disagreement(
        example.id,
        example.dataset,
        frontier,
        segments(example),
        example.head,
        example.tail,
        gold,
        ours,
        theirs,
        right,
        open_licence,
    )


def _same(first: str, second: str) -> bool:
    """Whether two labels are one; all that say "no relation" are."""
    return normalise_label(first) == normalise_label(second) or (
        is_negative(first) and is_negative(second)
    )


def segments(example: Example) -> tuple[Segment, ...]:
    """The text cut where an entity begins or ends, each part with what it belongs to; entities may
    nest or cross.
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
