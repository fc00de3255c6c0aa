"""The tables of a study, from its scores.

study = measure(read_record("runs/study-small"))
headline(study)               # systems x datasets with averages; published rows stand apart
planned_comparisons(study)    # tuned systems and encoders against frontier systems, Holm-corrected
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from scipy import stats

from jaxre.evaluation.published import PublishedSystem, published
from jaxre.evaluation.regression import ScalePoint, ScaleRegression, family_of, scale_regression
from jaxre.evaluation.rows import Row
from jaxre.evaluation.significance import FEW_CLUSTERS
from jaxre.evaluation.study_contrasts import primary
from jaxre.evaluation.study_record import RecordedSystem
from jaxre.evaluation.study_scores import OVERALL, Average, StudyScores, at_home

IN_BOTH = "measured and published"


@dataclass(frozen=True)
class HeadlineCell(Row):
    """F1 with its interval (none for published figures). official: SemEval's macro-F1, on SemEval
    only. macro_f1: over the positive gold labels; accuracy: over all classes; valid, malformed:
    shares of the answers (metrics.Scores).

    trained: whether the system has seen the dataset's training split; None where it is not trained.
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
    """cells: dataset -> figures, of the datasets that it was asked; averages: each domain and
    "overall".
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

    With published rows, "measured and published" holds the datasets of the study that both have,
    where these are not all: the one average that compares measured with published rows.
    """

    groups: dict[str, tuple[str, ...]]
    rows: tuple[HeadlineRow, ...]


@dataclass(frozen=True)
class LabelsPoint(Row):
    """labels: of the schema, the negative ones too."""

    dataset: str
    labels: int
    f1: float


@dataclass(frozen=True)
class LabelsEffect(Row):
    """F1 against the number of labels of one system: Spearman's rho with a bootstrap interval; None
    with fewer than five datasets.
    """

    name: str
    source: Literal["measured", "published"]
    points: tuple[LabelsPoint, ...]
    rho: float | None
    low: float | None
    high: float | None
    problem: str = ""


@dataclass(frozen=True)
class FootprintRow(Row):
    """Bytes, milliseconds, seconds; None where it was not measured. f1: overall average, over so
    many `datasets`.

    left_out: training examples longer than a row; answers_lost: those of them that would have lost
    their answer or a part of it, had they been cut to a row.
    """

    name: str
    source: Literal["measured", "published"]
    kind: str
    parameters: int | None
    base: int | None
    nf4: int | None
    adapter: int | None
    merged: int | None
    peak_memory: int | None
    latency_ms: float | None
    training_seconds: float | None
    cost_usd: float | None
    f1: float | None
    datasets: int = 0
    note: str = ""
    left_out: int | None = None
    answers_lost: int | None = None


def headline(study: StudyScores, with_published: bool = True) -> Headline:
    """Systems x datasets, with unweighted averages per domain and over all."""
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
    return {
        **domains,
        OVERALL: everything,
        **({IN_BOTH: both} if both and len(both) < len(everything) else {}),
    }


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
    return Average(
        value=(
            float(np.mean([system.f1[name] for name in datasets]))
            if datasets and not broken
            else None
        ),
        low=None,
        high=None,
        datasets=datasets,
        missing=tuple(name for name in names if name not in system.f1),
        untrained=(),
        apart=(),
        broken=broken,
        flags=(system.note,) if broken else (),
    )


def scaling(study: StudyScores, with_published: bool = True) -> tuple[ScaleRegression, ...]:
    """The scale regression over the tuned systems in the primary setting on what they were trained
    on, and over the published ones.

    Broken systems are left out and named.
    """
    tuned = [one for one in primary(study) if one.parameters]
    asked = [(one, cell) for one in tuned for cell in study.asked(one.name, study.groups[OVERALL])]
    cells = [(one, cell) for one, cell in asked if cell.comparable and cell.trained is not False]
    points = [
        ScalePoint(
            f1=cell.interval.value,
            parameters=one.parameters or 0,
            family=family_of(one.model),
            dataset=cell.dataset,
            regime=one.regime,
            shots=str(one.train_shots),
            name=one.name,
        )
        for one, cell in cells
        if not cell.broken
    ]
    excluded = dict.fromkeys(f"{one.name} on {cell.dataset}" for one, cell in cells if cell.broken)
    fits = [scale_regression(points, excluded=tuple(excluded))]
    if with_published:
        theirs = [one for one in published().systems if one.kind == "tuned"]
        points = [
            ScalePoint(
                f1,
                one.parameters or 0,
                family_of(one.model),
                dataset,
                one.regime,
                str(one.shots),
                one.name,
                "published",
            )
            for one in theirs
            if not one.note
            for dataset, f1 in one.f1.items()
        ]
        fits.append(
            scale_regression(
                points, source="published", excluded=tuple(one.name for one in theirs if one.note)
            )
        )
    return tuple(fits)


def labels_effect(study: StudyScores, with_published: bool = True) -> tuple[LabelsEffect, ...]:
    """Of each system without broken answers: Spearman's rho of F1 and number of labels, resampling
    datasets and their examples.
    """
    found = []
    labels = {one.name: len(one.labels) for one in study.record.datasets}
    for system in study.record.systems:
        cells = at_home(study.asked(system.name, study.groups[OVERALL]))
        if cells and not any(cell.broken for cell in cells):
            points = [
                LabelsPoint(cell.dataset, labels[cell.dataset], cell.interval.value)
                for cell in cells
            ]
            drawn = np.stack([cell.resampled.drawn[:, 0] for cell in cells])
            found.append(_labels_effect(system.name, "measured", points, drawn, study.seed))
    if with_published:
        for one in published().systems:
            if not one.note:
                points = [
                    LabelsPoint(dataset, published().labels[dataset], f1)
                    for dataset, f1 in one.f1.items()
                ]
                # Of published figures, datasets alone can be resampled.
                drawn = np.repeat([[point.f1] for point in points], study.resamples, axis=1)
                found.append(_labels_effect(one.name, "published", points, drawn, study.seed))
    return tuple(found)


def _labels_effect(
    name: str, source, points: list[LabelsPoint], drawn: np.ndarray, seed: int
) -> LabelsEffect:
    """drawn: [D, R] F1 of each dataset's resamples."""
    counts, f1 = (
        np.array([point.labels for point in points]),
        np.array([point.f1 for point in points]),
    )
    if len(points) >= FEW_CLUSTERS and len(set(f1.tolist())) < 2:
        return LabelsEffect(
            name, source, tuple(points), None, None, None, "F1 is the same on every dataset"
        )
    if len(points) < FEW_CLUSTERS or len(set(counts.tolist())) < 2:
        problem = (
            f"it takes {FEW_CLUSTERS} datasets that differ in their number of labels; datasets"
            f" here: {len(points)}"
        )
        return LabelsEffect(name, source, tuple(points), None, None, None, problem)
    datasets, resamples = drawn.shape
    chosen = np.random.default_rng(seed).integers(datasets, size=(resamples, datasets))
    place = (
        np.arange(resamples)[:, None] + np.arange(datasets)
    ) % resamples  # as in significance.clustered
    rho = _spearman(counts[chosen], drawn[chosen, place])
    low, high = np.percentile(rho[np.isfinite(rho)], [2.5, 97.5])
    whole = _spearman(counts[None], f1[None])[0]
    return LabelsEffect(name, source, tuple(points), float(whole), float(low), float(high))


def _spearman(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Rank correlation along the last axis of [R, D]; nan where one side is constant."""
    ranks = [stats.rankdata(side, axis=1) for side in (first, second)]
    one, other = (side - side.mean(axis=1, keepdims=True) for side in ranks)
    with np.errstate(invalid="ignore"):
        return (one * other).sum(axis=1) / np.sqrt((one**2).sum(axis=1) * (other**2).sum(axis=1))


def footprint(study: StudyScores, with_published: bool = True) -> tuple[FootprintRow, ...]:
    """What each system takes: bytes by form, memory, batch-1 latency, training time, cost."""
    rows = [
        FootprintRow(
            name=one.name,
            source="measured",
            kind=one.kind,
            parameters=one.parameters,
            base=one.sizes.get("base"),
            nf4=one.sizes.get("nf4"),
            adapter=one.sizes.get("adapter"),
            merged=one.sizes.get("merged"),
            peak_memory=one.peak_memory_bytes,
            latency_ms=one.latency_ms,
            training_seconds=one.seconds,
            cost_usd=one.cost_usd,
            f1=average.value,
            datasets=len(average.datasets),
            note=one.note,
            left_out=one.truncation.get("cut"),
            answers_lost=(
                one.truncation["answer_gone"] + one.truncation["answer_cut"]
                if one.truncation
                else None
            ),
        )
        for one in study.record.systems
        for average in [study.average(one.name, OVERALL)]
    ]
    if with_published:
        for one in published().footprint:
            note = f"RTX 4090; {one.cpu_ms:g} ms on its CPU; about {one.gigabytes:g} GB as deployed"
            nothing = dict.fromkeys(
                (
                    "base",
                    "nf4",
                    "adapter",
                    "merged",
                    "peak_memory",
                    "training_seconds",
                    "cost_usd",
                    "f1",
                )
            )
            latency, parameters = one.gpu_ms, one.parameters
            rows.append(
                FootprintRow(
                    one.name,
                    "published",
                    "tuned",
                    parameters,
                    latency_ms=latency,
                    note=note,
                    **nothing,
                )
            )
    return tuple(rows)
