"""Comparisons of two systems of a study on the examples that both answered.

planned_comparisons(study)  # tuned systems, encoders against frontier systems, Holm-corrected
cross_domain(study)         # trained on the other domain against trained on this one
enumerated_effect(study)    # labels listed in the prompt against not listed
matched_shots(study)        # prompt shots = training shots against other prompt shots
"""

from __future__ import annotations

import dataclasses
import itertools
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import reduce
from typing import NamedTuple

import numpy as np

from jaxre.errors import InputError
from jaxre.evaluation.metrics.rows import Row
from jaxre.evaluation.metrics.significance import (
    FEW_CLUSTERS,
    Resamples,
    clustered,
    difference_of,
    holm,
    mcnemar,
    resample_ratios,
)
from jaxre.evaluation.report.record import RecordedSystem
from jaxre.evaluation.report.study_scores import OVERALL, Cell, StudyScores


@dataclass(frozen=True)
class Difference(Row):
    """first - second in F1 on the `examples` that both answered.

    scope: a dataset, a domain, or "overall" (then the unweighted mean over `datasets`, clustered).
    p: two-sided bootstrap; mcnemar_p: over the pooled examples; only_first, only_second: how many
    of these only one side got right. p_holm, mcnemar_p_holm: corrected over the table; None in a
    table without correction. at_floor: p is the smallest that the resamples can show (2 / 10,001),
    so that p_holm of a large table cannot fall below 0.05 either. few_datasets: a clustered
    interval over fewer than five datasets; the true uncertainty is larger. flags: of the cells on
    both sides. All figures are None where an answer file is broken.
    """

    first: str
    second: str
    scope: str
    datasets: tuple[str, ...]
    examples: int
    first_f1: float | None = None
    second_f1: float | None = None
    difference: float | None = None
    low: float | None = None
    high: float | None = None
    p: float | None = None
    mcnemar_p: float | None = None
    only_first: int | None = None
    only_second: int | None = None
    p_holm: float | None = None
    mcnemar_p_holm: float | None = None
    at_floor: bool = False
    few_datasets: bool = False
    flags: tuple[str, ...] = ()


def planned_comparisons(study: StudyScores) -> tuple[Difference, ...]:
    """Compares every tuned system in the primary setting and every encoder with every frontier
    system, on each dataset and overall.

    Covers the datasets that the system was trained on (`cross_domain` has the others). Datasets
    scored in common labels are in no overall row. Both p values are Holm-corrected over the whole
    table.
    """
    systems = study.record.systems
    tuned = [*primary(study), *(system for system in systems if system.kind == "encoder")]
    frontier = [
        system
        for system in systems
        if system.kind == "frontier" and system.enumerated is not False and not system.style
    ]
    rows: list[Difference] = []
    for first, second in itertools.product(tuned, frontier):
        rows += _differences(study, first, second, (OVERALL,), _home(study, first))
    tested = [row for row in rows if row.p is not None]
    p = iter(holm([row.p for row in tested]))
    mcnemar_p = iter(holm([row.mcnemar_p for row in tested]))
    return tuple(
        row
        if row.p is None
        else dataclasses.replace(row, p_holm=next(p), mcnemar_p_holm=next(mcnemar_p))
        for row in rows
    )


def primary(study: StudyScores) -> list[RecordedSystem]:
    """Tuned systems in the primary setting: prompt shots = training shots, no prompt style of the
    sensitivity table, and labels enumerated in the prompt; in a study without enumerated prompts,
    generic prompts.
    """
    tuned = [
        system
        for system in study.record.systems
        if system.kind == "tuned"
        and not system.style
        and system.prompt_shots in (None, system.train_shots)
    ]
    return [system for system in tuned if system.enumerated is not False] or tuned


def cross_domain(study: StudyScores) -> tuple[Difference, ...]:
    """Systems not trained on a dataset (first) against systems trained on it (second), all else but
    the regime equal.

    For example, GenTune against LitTune and MixTune on the literary datasets, and LitTune against
    GenTune and MixTune on the general datasets.
    """
    rows: list[Difference] = []
    for systems in _matched_groups(study, "regime"):
        for first, second in itertools.permutations(systems, 2):
            names = [
                name
                for name in study.groups[OVERALL]
                if name in second.trained_on and name not in _home(study, first)
            ]
            rows += _differences(study, first, second, tuple(study.groups), names)
    return tuple(rows)


def _home(study: StudyScores, system: RecordedSystem) -> list[str]:
    """Datasets that a system was trained on, or all datasets if it is not trained."""
    return [
        name for name in study.groups[OVERALL] if not system.trained_on or name in system.trained_on
    ]


def enumerated_effect(study: StudyScores) -> tuple[Difference, ...]:
    """Schema-enumerated prompts (first) against generic ones, all else equal."""
    return _contrasts(
        study,
        "enumerated",
        lambda system: system.enumerated is True,
        lambda system: system.enumerated is False,
    )


def matched_shots(study: StudyScores) -> tuple[Difference, ...]:
    """Prompt shots = training shots (first) against other prompt shots, all else equal."""

    def has_shots(system: RecordedSystem) -> bool:
        return None not in (system.train_shots, system.prompt_shots)

    return _contrasts(
        study,
        "prompt_shots",
        lambda system: has_shots(system) and system.prompt_shots == system.train_shots,
        lambda system: has_shots(system) and system.prompt_shots != system.train_shots,
    )


def _contrasts(
    study: StudyScores,
    varied: str,
    first: Callable[[RecordedSystem], bool],
    second: Callable[[RecordedSystem], bool],
) -> tuple[Difference, ...]:
    """Compares the systems that satisfy `first` with those that satisfy `second` and differ from
    them in the field `varied` alone.
    """
    rows: list[Difference] = []
    for systems in _matched_groups(study, varied):
        for left, right in itertools.product(filter(first, systems), filter(second, systems)):
            rows += _differences(study, left, right, tuple(study.groups), _home(study, left))
    return tuple(rows)


def _matched_groups(study: StudyScores, varied: str) -> Iterable[list[RecordedSystem]]:
    """Groups of systems that are equal in all fields of their setting but `varied`; excludes rows
    of the style table (prompt_effects.py).
    """
    fields = [
        name
        for name in ("kind", "model", "regime", "train_shots", "prompt_shots", "enumerated")
        if name != varied
    ]
    groups = defaultdict(list)
    for system in study.record.systems:
        if not system.style:
            groups[tuple(getattr(system, name) for name in fields)].append(system)
    return groups.values()


def _differences(
    study: StudyScores,
    first: RecordedSystem,
    second: RecordedSystem,
    groups: Sequence[str],
    names: Sequence[str],
) -> list[Difference]:
    """Differences on each dataset of `names` that both systems answered, then on each group with at
    least two of these datasets.

    Groups with the same datasets make one row, for the last of them in `groups`.
    """
    pairs: dict[str, _Pair] = {}
    for name in names:
        cells = study.cell(first.name, name), study.cell(second.name, name)
        if cells[0] and cells[1] and len(np.intersect1d(cells[0].places, cells[1].places)):
            pairs[name] = _Pair(cells, *joint(study, cells))
    scopes = {name: (name,) for name in pairs}
    # Common labels on one dataset and not on the others: no mean combines them.
    own_labels = {
        name for name, pair in pairs.items() if not any(cell.common for cell in pair.cells)
    }
    members_of = {
        group: tuple(name for name in study.groups[group] if name in own_labels) for group in groups
    }
    last = {members: group for group, members in members_of.items()}
    scopes |= {
        group: members
        for group, members in members_of.items()
        if len(members) > 1 and last[members] == group
    }
    return [
        _difference(study, first.name, second.name, scope, [pairs[name] for name in members])
        for scope, members in scopes.items()
    ]


class _Pair(NamedTuple):
    """Two cells of one dataset on the n examples that both answered; resampled once, for all
    scopes. right: [n, 2] bool.
    """

    cells: tuple[Cell, Cell]
    resampled: Resamples
    right: np.ndarray


def joint(study: StudyScores, cells: Sequence[Cell]) -> tuple[Resamples, np.ndarray]:
    """Resampled F1 of C systems on the n examples of a dataset that all of them answered, with the
    same draws, and [n, C] bool: the answer is right.

    If the answers of one system are in common labels, all are judged in these.

    Raises InputError if no example was answered by all.
    """
    answered = reduce(np.intersect1d, [cell.places for cell in cells])
    if not len(answered):
        raise InputError(
            f"{cells[0].dataset}: no example was answered by"
            f" {' and '.join(cell.system for cell in cells)}; ask them the same ones"
        )
    common = next((cell.common for cell in cells if cell.common), None)
    judged = [cell.judged(np.searchsorted(cell.places, answered), common) for cell in cells]
    parts = np.stack([parts for parts, _ in judged], axis=2)  # n 2 C
    resampled = resample_ratios(
        parts[:, 0], parts[:, 1], study.resamples, study.seed_of(cells[0].dataset)
    )
    return resampled, np.stack([right for _, right in judged], axis=1)


def _difference(
    study: StudyScores, first: str, second: str, scope: str, pairs: Sequence[_Pair]
) -> Difference:
    cells = [cell for pair in pairs for cell in pair.cells]
    row = Difference(
        first=first,
        second=second,
        scope=scope,
        datasets=tuple(pair.cells[0].dataset for pair in pairs),
        examples=sum(len(pair.right) for pair in pairs),
        flags=tuple(
            f"{cell.system}, {cell.dataset}: {flag}" for cell in cells for flag in cell.flags
        ),
    )
    if any(cell.broken for cell in cells):
        return row
    resampled = (
        pairs[0].resampled
        if scope == row.datasets[0]
        else clustered([pair.resampled for pair in pairs], study.seed)
    )
    bootstrap = difference_of(resampled)
    test = mcnemar(*np.concatenate([pair.right for pair in pairs]).T)
    return dataclasses.replace(
        row,
        first_f1=bootstrap.first,
        second_f1=bootstrap.second,
        difference=bootstrap.difference,
        low=bootstrap.low,
        high=bootstrap.high,
        p=bootstrap.p,
        mcnemar_p=test.p,
        only_first=test.only_first,
        only_second=test.only_second,
        at_floor=bootstrap.p <= 2 / (bootstrap.resamples + 1),
        few_datasets=scope in study.groups and len(pairs) < FEW_CLUSTERS,
    )
