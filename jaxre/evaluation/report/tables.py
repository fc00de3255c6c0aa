"""Tables of a study: headline, size, number of labels, footprint. Comparisons are in contrasts.py.

study = measure(read_record("runs/study-small"))
headline(study)               # systems x datasets with averages, measured and published
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from scipy import stats

from jaxre.evaluation.metrics.regression import (
    ScalePoint,
    ScaleRegression,
    family_of,
    scale_regression,
)
from jaxre.evaluation.metrics.rows import Row
from jaxre.evaluation.metrics.significance import FEW_CLUSTERS
from jaxre.evaluation.report.contrasts import primary
from jaxre.evaluation.report.published import PublishedSystem, published
from jaxre.evaluation.report.record import RecordedSystem
from jaxre.evaluation.report.study_scores import OVERALL, Average, StudyScores, at_home

IN_BOTH = "measured and published"


@dataclass(frozen=True)
class HeadlineCell(Row):
    """F1 with its interval (none for published figures).

    official: SemEval's macro-F1, for SemEval only. macro_f1: over the positive gold labels;
    accuracy: over all classes; valid, malformed: shares of the answers (metrics.Scores). trained,
    comparable: as in study_scores.Cell.
    """

    f1: float
    low: float | None = None
    high: float | None = None
    official: float | None = None
    macro_f1: float | None = None
    accuracy: float | None = None
    valid: float | None = None
    malformed: float | None = None
    answered: int | None = None
    asked: int | None = None
    flags: tuple[str, ...] = ()
    broken: bool = False
    trained: bool | None = None
    comparable: bool = True


@dataclass(frozen=True)
class HeadlineRow(Row):
    """cells: dataset -> figures, for the datasets that the system was evaluated on; averages: of
    each group of `Headline.groups`.
    """

    name: str
    source: Literal["measured", "published"]
    kind: str
    model: str
    parameters: int | None
    regime: str
    train_shots: int | None
    prompt_shots: int | None
    enumerated: bool | None
    style: str
    cells: dict[str, HeadlineCell]
    averages: dict[str, Average]
    note: str = ""


@dataclass(frozen=True)
class Headline(Row):
    """groups: domain -> datasets, then "overall" -> all, in the order of the columns.

    With published rows, IN_BOTH has the datasets that both the study and the paper have, unless
    these are all: the only average in which measured and published rows compare.
    """

    groups: dict[str, tuple[str, ...]]
    rows: tuple[HeadlineRow, ...]


@dataclass(frozen=True)
class LabelsPoint(Row):
    """labels: number of labels in the schema, negative ones included."""

    dataset: str
    labels: int
    f1: float


@dataclass(frozen=True)
class LabelsEffect(Row):
    """F1 of one system against the number of labels: Spearman's rho with its 95% bootstrap
    interval; None, with the reason in `problem`, where it is not defined.
    """

    name: str
    source: Literal["measured", "published"]
    points: tuple[LabelsPoint, ...]
    rho: float | None = None
    low: float | None = None
    high: float | None = None
    problem: str = ""


@dataclass(frozen=True)
class FootprintRow(Row):
    """Bytes, milliseconds, seconds; None where not measured. f1: average over `datasets` datasets.

    left_out: training examples longer than a row; answers_lost: those of them that would have lost
    some or all of their answer if truncated to a row.
    """

    name: str
    source: Literal["measured", "published"]
    kind: str
    parameters: int | None
    base: int | None = None
    nf4: int | None = None
    adapter: int | None = None
    merged: int | None = None
    peak_memory: int | None = None
    latency_ms: float | None = None
    training_seconds: float | None = None
    cost_usd: float | None = None
    f1: float | None = None
    datasets: int = 0
    note: str = ""
    left_out: int | None = None
    answers_lost: int | None = None


def headline(study: StudyScores, with_published: bool = True) -> Headline:
    """Systems x datasets, with unweighted averages per domain and overall."""
    groups = _groups(study, with_published)
    rows = [_measured(study, system, groups) for system in study.record.systems]
    if with_published:
        rows += [_published(system, groups) for system in published().systems]
    return Headline(groups, tuple(rows))


def _groups(study: StudyScores, with_published: bool) -> dict[str, tuple[str, ...]]:
    if not with_published:
        return study.groups
    ours, theirs = study.groups, published().domains
    domains = {
        name: tuple(dict.fromkeys((*ours.get(name, ()), *theirs.get(name, ()))))
        for name in {**ours, **theirs}
        if name != OVERALL
    }
    everything = tuple(name for names in domains.values() for name in names)
    both = tuple(name for name in ours[OVERALL] if any(name in names for names in theirs.values()))
    groups = {**domains, OVERALL: everything}
    if both and len(both) < len(everything):
        groups[IN_BOTH] = both
    return groups


def _measured(
    study: StudyScores, system: RecordedSystem, groups: dict[str, tuple[str, ...]]
) -> HeadlineRow:
    cells = {
        cell.dataset: HeadlineCell(
            f1=cell.interval.value,
            low=cell.interval.low,
            high=cell.interval.high,
            official=cell.scores.semeval_official_f1,
            macro_f1=cell.scores.macro_f1,
            accuracy=cell.scores.accuracy,
            valid=cell.scores.schema_valid,
            malformed=cell.scores.malformed,
            answered=len(cell.ids),
            asked=cell.asked,
            flags=cell.flags,
            broken=cell.broken,
            trained=cell.trained,
            comparable=cell.comparable,
        )
        for cell in study.asked(system.name, groups[OVERALL])
    }
    return HeadlineRow(
        name=system.name,
        source="measured",
        kind=system.kind,
        model=system.model,
        parameters=system.parameters,
        regime=system.regime,
        train_shots=system.train_shots,
        prompt_shots=system.prompt_shots,
        enumerated=system.enumerated,
        style=system.style,
        cells=cells,
        averages={group: study.average_over(system.name, names) for group, names in groups.items()},
        note=system.note,
    )


def _published(system: PublishedSystem, groups: dict[str, tuple[str, ...]]) -> HeadlineRow:
    flags = (system.note,) if system.note else ()
    trained = None if system.kind == "frontier" else True
    return HeadlineRow(
        name=system.name,
        source="published",
        kind=system.kind,
        model=system.model,
        parameters=system.parameters,
        regime=system.regime,
        train_shots=system.shots if system.kind in ("tuned", "adapted") else None,
        prompt_shots=system.shots,
        enumerated=None if system.kind == "encoder" else True,
        style="",
        cells={
            dataset: HeadlineCell(f1, flags=flags, broken=bool(flags), trained=trained)
            for dataset, f1 in system.f1.items()
        },
        averages={group: _published_average(system, names) for group, names in groups.items()},
        note=system.note,
    )


def _published_average(system: PublishedSystem, names: Sequence[str]) -> Average:
    datasets = tuple(name for name in names if name in system.f1)
    broken = datasets if system.note else ()
    scored = datasets and not broken
    return Average(
        value=float(np.mean([system.f1[name] for name in datasets])) if scored else None,
        datasets=datasets,
        missing=tuple(name for name in names if name not in system.f1),
        broken=broken,
        flags=(system.note,) if broken else (),
    )


def scaling(study: StudyScores) -> tuple[ScaleRegression, ...]:
    """Scale regressions: over the tuned systems in the primary setting on the datasets they were
    trained on, and over the published systems.

    Broken systems are excluded and named.
    """
    cells = [
        (system, cell)
        for system in primary(study)
        if system.parameters
        for cell in study.asked(system.name, study.groups[OVERALL])
        if cell.comparable and cell.trained is not False
    ]
    measured = [
        ScalePoint(
            f1=cell.interval.value,
            parameters=system.parameters or 0,
            family=family_of(system.model),
            dataset=cell.dataset,
            regime=system.regime,
            shots=str(system.train_shots),
            name=system.name,
        )
        for system, cell in cells
        if not cell.broken
    ]
    broken = tuple(f"{system.name} on {cell.dataset}" for system, cell in cells if cell.broken)
    tuned = [system for system in published().systems if system.kind == "tuned"]
    theirs = [
        ScalePoint(
            f1=f1,
            parameters=system.parameters or 0,
            family=family_of(system.model),
            dataset=dataset,
            regime=system.regime,
            shots=str(system.shots),
            name=system.name,
            source="published",
        )
        for system in tuned
        if not system.note
        for dataset, f1 in system.f1.items()
    ]
    failed = tuple(system.name for system in tuned if system.note)
    return (
        scale_regression(measured, excluded=broken),
        scale_regression(theirs, source="published", excluded=failed),
    )


def labels_effect(study: StudyScores) -> tuple[LabelsEffect, ...]:
    """Spearman's rho of F1 and number of labels for each system without broken answers, resampling
    datasets and their examples; for published figures, datasets alone.
    """
    effects = []
    labels = {dataset.name: len(dataset.labels) for dataset in study.record.datasets}
    for system in study.record.systems:
        cells = at_home(study.asked(system.name, study.groups[OVERALL]))
        if cells and not any(cell.broken for cell in cells):
            points = [
                LabelsPoint(cell.dataset, labels[cell.dataset], cell.interval.value)
                for cell in cells
            ]
            drawn = np.stack([cell.resampled.drawn[:, 0] for cell in cells])
            effects.append(_labels_effect(system.name, "measured", points, drawn, study.seed))
    for system in published().systems:
        if not system.note:
            points = [
                LabelsPoint(dataset, published().labels[dataset], f1)
                for dataset, f1 in system.f1.items()
            ]
            drawn = np.repeat([[point.f1] for point in points], study.resamples, axis=1)
            effects.append(_labels_effect(system.name, "published", points, drawn, study.seed))
    return tuple(effects)


def _labels_effect(
    name: str,
    source: Literal["measured", "published"],
    points: list[LabelsPoint],
    drawn: np.ndarray,
    seed: int,
) -> LabelsEffect:
    """drawn: [D, R] F1 of each dataset's resamples."""
    counts = np.array([point.labels for point in points])
    f1 = np.array([point.f1 for point in points])
    if len(points) >= FEW_CLUSTERS and len(set(f1.tolist())) < 2:
        problem = "F1 is the same on every dataset"
        return LabelsEffect(name, source, tuple(points), problem=problem)
    if len(points) < FEW_CLUSTERS or len(set(counts.tolist())) < 2:
        problem = (
            f"it takes {FEW_CLUSTERS} datasets that differ in their number of labels; datasets"
            f" here: {len(points)}"
        )
        return LabelsEffect(name, source, tuple(points), problem=problem)
    datasets, resamples = drawn.shape
    # Datasets and their resamples are paired as in significance.clustered.
    chosen = np.random.default_rng(seed).integers(datasets, size=(resamples, datasets))
    resample = (np.arange(resamples)[:, None] + np.arange(datasets)) % resamples
    drawn_rho = _spearman(counts[chosen], drawn[chosen, resample])
    low, high = np.percentile(drawn_rho[np.isfinite(drawn_rho)], [2.5, 97.5])
    rho = _spearman(counts[None], f1[None])[0]
    return LabelsEffect(name, source, tuple(points), float(rho), float(low), float(high))


def _spearman(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Rank correlation along the last axis of [R, D]; nan where one side is constant."""
    ranks = [stats.rankdata(side, axis=1) for side in (first, second)]
    x, y = (side - side.mean(axis=1, keepdims=True) for side in ranks)
    with np.errstate(invalid="ignore"):
        return (x * y).sum(axis=1) / np.sqrt((x**2).sum(axis=1) * (y**2).sum(axis=1))


def footprint(study: StudyScores) -> tuple[FootprintRow, ...]:
    """Resources of each system: bytes by form, memory, batch-1 latency, training time, cost."""
    measured = [
        FootprintRow(
            name=system.name,
            source="measured",
            kind=system.kind,
            parameters=system.parameters,
            base=system.sizes.get("base"),
            nf4=system.sizes.get("nf4"),
            adapter=system.sizes.get("adapter"),
            merged=system.sizes.get("merged"),
            peak_memory=system.peak_memory_bytes,
            latency_ms=system.latency_ms,
            training_seconds=system.seconds,
            cost_usd=system.cost_usd,
            f1=average.value,
            datasets=len(average.datasets),
            note=system.note,
            left_out=system.truncation.get("cut"),
            answers_lost=(
                system.truncation["answer_gone"] + system.truncation["answer_cut"]
                if system.truncation
                else None
            ),
        )
        for system in study.record.systems
        for average in [study.average(system.name, OVERALL)]
    ]
    theirs = [
        FootprintRow(
            name=model.name,
            source="published",
            kind="tuned",
            parameters=model.parameters,
            latency_ms=model.gpu_ms,
            note=(
                f"RTX 4090; {model.cpu_ms:g} ms on its CPU; about {model.gigabytes:g} GB as"
                " deployed"
            ),
        )
        for model in published().footprint
    ]
    return (*measured, *theirs)
