"""How much the prompt does: a table over prompt styles, and the main effects of what the styles
vary.

    for table in prompt_sensitivity(study):
        table.spread, table.effects

The styles are a fraction of all combinations of three factors (relations/prompt_styles.py), in
which every level of a factor meets every level of each other factor equally often. Then the mean
over one level minus the mean over another is a main effect.
"""

from __future__ import annotations

import itertools
import re
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from jaxre.errors import InputError
from jaxre.evaluation.rows import Row
from jaxre.evaluation.significance import Resamples, clustered, f1_interval
from jaxre.evaluation.study_contrasts import joint
from jaxre.evaluation.study_record import RecordedSystem
from jaxre.evaluation.study_scores import OVERALL, Average, StudyScores


@dataclass(frozen=True)
class StyleRow(Row):
    """One prompt style of one model: overall F1 and per dataset."""

    style: str
    task_definition: bool
    label_definitions: bool
    demonstrations: int
    system: str
    average: Average
    f1: dict[str, float]


@dataclass(frozen=True)
class Effect(Row):
    """A main effect on F1: mean with - mean without (demonstrations: mean at `level` - mean at
    0).
    """

    name: str
    value: float
    low: float
    high: float


@dataclass(frozen=True)
class PromptSensitivity(Row):
    """The styles of one model in one setting; effects only where all eight are there, else
    `problem` says what is missing.

    The eight are half of the 16 combinations, in which each factor is balanced against each other
    one. What the demonstrations 0 and 4 share against 2 and 8 cannot be told from an interaction of
    the two definitions.
    """

    model: str
    setting: str
    rows: tuple[StyleRow, ...]
    # best - worst overall F1 of the styles, where all were asked of the same datasets
    spread: float | None
    effects: tuple[Effect, ...]
    problem: str = ""


def prompt_sensitivity(study: StudyScores) -> tuple[PromptSensitivity, ...]:
    """Each model and training with the styles that it was asked in."""
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
    for system in sorted(systems, key=lambda one: style_factors(one.style)):
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
    sound = [row.average for row in rows if row.average.value is not None]
    values = [one.value for one in sound] if len({one.datasets for one in sound}) == 1 else []
    problem = _incomplete(rows)
    return PromptSensitivity(
        model=model,
        setting=", ".join(
            part
            for part in (kind, regime, "" if shots is None else f"trained on {shots} shots")
            if part
        ),
        rows=tuple(rows),
        spread=max(values) - min(values) if len(values) > 1 else None,
        effects=() if problem else _effects(study, rows),
        problem=problem,
    )


def style_factors(style: str) -> tuple[int, bool, bool]:
    """(demonstrations, task defined, labels defined) of the name of a prompt style, such as
    `shots2-task`.
    """
    found = re.fullmatch(r"shots(\d+)(-task)?(-labels)?", style)
    if not found:
        raise InputError(
            f"prompt style {style!r}: not of the form shots2-task; predict with a style that `jaxre"
            " predict --help` lists"
        )
    return int(found[1]), bool(found[2]), bool(found[3])


def _incomplete(rows: Sequence[StyleRow]) -> str:
    """Why there are no main effects, or nothing."""
    given = [_factors(row) for row in rows]
    if len(set(given)) < len(given):
        return "a style was asked twice; ask each once"
    levels = [sorted({row[factor] for row in given}) for factor in range(3)]
    if any(len(found) < 2 for found in levels):
        return "a factor has one level only; ask all eight styles"
    for one, other in itertools.combinations(range(3), 2):
        met = Counter((row[one], row[other]) for row in given)
        if len({met[pair] for pair in itertools.product(levels[one], levels[other])}) > 1:
            return "the styles are not balanced, an effect would mix with another; ask all eight"
    if broken := [row.style for row in rows if row.average.broken]:
        return f"the answers in style {broken[0]} are broken"
    if len({row.average.datasets for row in rows}) > 1:
        return "the styles were not asked of the same datasets"
    return "" if rows[0].average.datasets else "no dataset was asked"


def _effects(study: StudyScores, rows: Sequence[StyleRow]) -> tuple[Effect, ...]:
    factors = np.array([_factors(row) for row in rows])  # styles 3: demonstrations, task, labels
    first, *more = sorted(set(factors[:, 0].tolist()))
    contrasts = {
        "task definition": _contrast(factors[:, 1] == 1, factors[:, 1] == 0),
        "label definitions": _contrast(factors[:, 2] == 1, factors[:, 2] == 0),
        **{
            f"{level} demonstrations": _contrast(factors[:, 0] == level, factors[:, 0] == first)
            for level in more
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
        Effect(name, one.value, one.low, one.high)
        for name, one in zip(contrasts, intervals, strict=True)
    )


def _contrast(those: np.ndarray, others: np.ndarray) -> np.ndarray:
    """Weights that give the mean over `those` minus the mean over `others`."""
    return those / those.sum() - others / others.sum()


def _factors(row: StyleRow) -> tuple[int, bool, bool]:
    return row.demonstrations, row.task_definition, row.label_definitions
