"""Prompt sensitivity: a table over prompt styles, and the main effects of the factors they vary.

    for table in prompt_sensitivity(study):
        table.spread, table.effects

The styles are a fraction of all combinations of three factors (relations/prompt_styles.py), in
which every level of a factor occurs equally often with every level of each other factor. The mean
over one level minus the mean over another is therefore a main effect.
"""

from __future__ import annotations

import itertools
import re
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from jaxre.errors import InputError
from jaxre.evaluation.metrics.rows import Row
from jaxre.evaluation.metrics.significance import Resamples, clustered, f1_interval
from jaxre.evaluation.report.contrasts import joint
from jaxre.evaluation.report.record import RecordedSystem
from jaxre.evaluation.report.study_scores import OVERALL, Average, StudyScores


@dataclass(frozen=True)
class StyleRow(Row):
    """One prompt style of one model: F1 overall and per dataset."""

    style: str
    task_definition: bool
    label_definitions: bool
    demonstrations: int
    system: str
    average: Average
    f1: dict[str, float]


@dataclass(frozen=True)
class Effect(Row):
    """A main effect on F1: mean with - mean without the factor (demonstrations: mean at a level -
    mean at the lowest level).
    """

    name: str
    value: float
    low: float
    high: float


@dataclass(frozen=True)
class PromptSensitivity(Row):
    """Styles of one model in one setting. Effects need all eight styles; otherwise `problem` has
    the reason.

    The eight are half of the 16 combinations; each factor is balanced against each other factor.
    The contrast of demonstrations 0 and 4 against 2 and 8 is confounded with an interaction of the
    two definitions.
    """

    model: str
    setting: str
    rows: tuple[StyleRow, ...]
    spread: float | None  # best - worst overall F1, if all styles have the same datasets
    effects: tuple[Effect, ...]
    problem: str = ""


def prompt_sensitivity(study: StudyScores) -> tuple[PromptSensitivity, ...]:
    """Prompt sensitivity of each model in each training setting that has prompt styles."""
    settings: dict[tuple, list[RecordedSystem]] = defaultdict(list)
    for system in study.record.systems:
        if system.style:
            settings[system.kind, system.model, system.regime, system.train_shots].append(system)
    return tuple(_sensitivity(study, key, systems) for key, systems in settings.items())


def _sensitivity(
    study: StudyScores, key: tuple, systems: list[RecordedSystem]
) -> PromptSensitivity:
    kind, model, regime, shots = key
    rows = []
    for system in sorted(systems, key=lambda system: style_factors(system.style)):
        demonstrations, task, labels = style_factors(system.style)
        f1 = {
            cell.dataset: cell.interval.value
            for cell in study.asked(system.name, study.groups[OVERALL])
        }
        rows.append(
            StyleRow(
                system.style,
                task,
                labels,
                demonstrations,
                system.name,
                study.average(system.name, OVERALL),
                f1,
            )
        )
    averages = [row.average for row in rows if row.average.value is not None]
    same_datasets = len({average.datasets for average in averages}) == 1
    values = [average.value for average in averages]
    problem = _incomplete(rows)
    return PromptSensitivity(
        model=model,
        setting=", ".join(
            part
            for part in (kind, regime, "" if shots is None else f"trained on {shots} shots")
            if part
        ),
        rows=tuple(rows),
        spread=max(values) - min(values) if same_datasets and len(values) > 1 else None,
        effects=() if problem else _effects(study, rows),
        problem=problem,
    )


def style_factors(style: str) -> tuple[int, bool, bool]:
    """(demonstrations, task defined, labels defined) from the name of a prompt style, such as
    `shots2-task`. Raises InputError for another form.
    """
    match = re.fullmatch(r"shots(\d+)(-task)?(-labels)?", style)
    if not match:
        raise InputError(
            f"prompt style {style!r}: not of the form shots2-task; predict with a style that `jaxre"
            " predict --help` lists"
        )
    return int(match[1]), bool(match[2]), bool(match[3])


def _incomplete(rows: Sequence[StyleRow]) -> str:
    """Reason why there are no main effects; empty if there are."""
    factors = [_factors(row) for row in rows]
    if len(set(factors)) < len(factors):
        return "a style occurs twice; run each style once"
    levels = [sorted(set(column)) for column in zip(*factors, strict=True)]
    if any(len(values) < 2 for values in levels):
        return "a factor has one level only; run all eight styles"
    for first, second in itertools.combinations(range(3), 2):
        counts = Counter((row[first], row[second]) for row in factors)
        if len({counts[pair] for pair in itertools.product(levels[first], levels[second])}) > 1:
            return "the styles are not balanced, an effect would mix with another; run all eight"
    if broken := [row.style for row in rows if row.average.broken]:
        return f"the answers in style {broken[0]} are broken"
    if len({row.average.datasets for row in rows}) > 1:
        return "the styles were not asked of the same datasets"
    return "" if rows[0].average.datasets else "no dataset was evaluated"


def _effects(study: StudyScores, rows: Sequence[StyleRow]) -> tuple[Effect, ...]:
    demonstrations, task, labels = np.array([_factors(row) for row in rows]).T  # styles
    lowest, *levels = sorted(set(demonstrations.tolist()))
    contrasts = {
        "task definition": _contrast(task == 1, task == 0),
        "label definitions": _contrast(labels == 1, labels == 0),
        **{
            f"{level} demonstrations": _contrast(demonstrations == level, demonstrations == lowest)
            for level in levels
        },
    }
    weights = np.stack(list(contrasts.values()), axis=1)  # styles effects
    datasets = []
    for name in rows[0].average.datasets:
        styles, _ = joint(study, [study.cells[row.system, name] for row in rows])
        datasets.append(Resamples(styles.whole @ weights, styles.drawn @ weights))
    averaged = clustered(datasets, study.seed)
    intervals = [f1_interval(averaged, index) for index in range(len(contrasts))]
    return tuple(
        Effect(name, interval.value, interval.low, interval.high)
        for name, interval in zip(contrasts, intervals, strict=True)
    )


def _contrast(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Weights for the mean over `first` minus the mean over `second` (bool masks)."""
    return first / first.sum() - second / second.sum()


def _factors(row: StyleRow) -> tuple[int, bool, bool]:
    return row.demonstrations, row.task_definition, row.label_definitions
