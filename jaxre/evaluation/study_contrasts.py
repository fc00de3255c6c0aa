"""Two systems of a study on the examples that both answered: which is better, and by how much.

planned_comparisons(study)    # tuned systems and encoders against frontier systems, Holm-corrected
cross_domain(study)           # trained on the other domain against trained on this one
enumerated_effect(study)      # labels listed in the prompt against not
matched_shots(study)          # prompt shots = training shots against not
"""

from __future__ import annotations

import dataclasses
import itertools
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import reduce

import numpy as np

from jaxre.errors import InputError
from jaxre.evaluation.rows import Row
from jaxre.evaluation.significance import (
    FEW_CLUSTERS,
    Resamples,
    clustered,
    difference_of,
    holm,
    mcnemar,
    resample_ratios,
)
from jaxre.evaluation.study_record import RecordedSystem
from jaxre.evaluation.study_scores import OVERALL, Cell, StudyScores


@dataclass(frozen=True)
class Difference(Row):
    """first - second in F1 on the `examples` that both answered.

    scope: a dataset, a domain, or "overall" (then the unweighted mean over `datasets`, clustered).
    p: two-sided bootstrap; mcnemar_p: over the pooled examples, of which only_first and only_second
    are right on one side alone. p_holm, mcnemar_p_holm: corrected over the table; None where
    nothing is corrected. at_floor: p is the smallest that the resamples can show (2 / 10,001), so
    that p_holm of a large table cannot fall below 0.05 either. few_datasets: a clustered interval
    that rests on fewer than five datasets; the true uncertainty is larger. flags: of the cells on
    either side. All figures are None where an answer file is broken.
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
    """Every tuned system in the primary setting, and every encoder, against every frontier system:
    on each dataset, and overall.

    On the datasets that the system was trained on (`cross_domain` has the others). What is scored
    in common labels is in no overall row. Both p values are Holm-corrected over the whole table.
    """
    tuned = [*primary(study), *(one for one in study.record.systems if one.kind == "encoder")]
    frontier = [
        one
        for one in study.record.systems
        if one.kind == "frontier" and one.enumerated is not False and not one.style
    ]
    rows: list[Difference] = []
    for first, second in itertools.product(tuned, frontier):
        rows += _differences(study, first, second, (OVERALL,), _home(study, first))
    tested = [row for row in rows if row.p is not None]
    corrected = zip(
        holm([row.p for row in tested]), holm([row.mcnemar_p for row in tested]), strict=True
    )
    of = {
        id(row): {"p_holm": p, "mcnemar_p_holm": mcnemar_p}
        for row, (p, mcnemar_p) in zip(tested, corrected, strict=True)
    }
    return tuple(dataclasses.replace(row, **of.get(id(row), {})) for row in rows)


def primary(study: StudyScores) -> list[RecordedSystem]:
    """The tuned systems in the primary setting: prompt shots = training shots, no prompt style of
    the sensitivity table, and labels enumerated in the prompt; a study without enumerated prompts
    has its generic ones instead.
    """
    tuned = [
        one
        for one in study.record.systems
        if one.kind == "tuned" and not one.style and one.prompt_shots in (None, one.train_shots)
    ]
    return [one for one in tuned if one.enumerated is not False] or tuned


def cross_domain(study: StudyScores) -> tuple[Difference, ...]:
    """Not trained on a dataset (first) against trained on it (second), of systems alike in all but
    the regime.

    Such as GenTune against LitTune and MixTune on the literary datasets, and LitTune against
    GenTune and MixTune on the general ones.
    """
    rows: list[Difference] = []
    for alike in _alike(study, "regime"):
        for first, second in itertools.permutations(alike, 2):
            names = [
                name
                for name in study.groups[OVERALL]
                if name in second.trained_on and name not in _home(study, first)
            ]
            rows += _differences(study, first, second, tuple(study.groups), names)
    return tuple(rows)


def _home(study: StudyScores, system: RecordedSystem) -> list[str]:
    """The datasets that it was trained on, or all where it is not trained."""
    return [
        name for name in study.groups[OVERALL] if not system.trained_on or name in system.trained_on
    ]


def enumerated_effect(study: StudyScores) -> tuple[Difference, ...]:
    """Schema-enumerated prompts (first) against generic ones, of systems alike in all else."""
    return _contrasts(
        study, "enumerated", lambda one: one.enumerated is True, lambda one: one.enumerated is False
    )


def matched_shots(study: StudyScores) -> tuple[Difference, ...]:
    """Prompt shots = training shots (first) against other prompt shots, of systems alike in all
    else.
    """
    trained = [
        one for one in study.record.systems if None not in (one.train_shots, one.prompt_shots)
    ]

    def matched(one: RecordedSystem) -> bool:
        return one in trained and one.prompt_shots == one.train_shots

    return _contrasts(
        study, "prompt_shots", matched, lambda one: one in trained and not matched(one)
    )


def _contrasts(
    study: StudyScores,
    varied: str,
    first: Callable[[RecordedSystem], bool],
    second: Callable[[RecordedSystem], bool],
) -> tuple[Difference, ...]:
    rows: list[Difference] = []
    for alike in _alike(study, varied):
        for one, other in itertools.product(filter(first, alike), filter(second, alike)):
            rows += _differences(study, one, other, tuple(study.groups), _home(study, one))
    return tuple(rows)


def _alike(study: StudyScores, varied: str) -> Iterable[list[RecordedSystem]]:
    """The systems in groups that differ in one field of their setting alone; without those asked in
    a prompt style (prompt_effects.py).
    """
    fields = [
        name
        for name in ("kind", "model", "regime", "train_shots", "prompt_shots", "enumerated")
        if name != varied
    ]
    groups = defaultdict(list)
    for system in (one for one in study.record.systems if not one.style):
        groups[tuple(getattr(system, name) for name in fields)].append(system)
    return groups.values()


def _differences(
    study: StudyScores,
    first: RecordedSystem,
    second: RecordedSystem,
    groups: Sequence[str],
    names: Sequence[str],
) -> list[Difference]:
    """On each dataset that both were asked (of `names`), then on each group with at least two of
    them.

    A group that is all there is, is given once, as the last of `groups` that it is.
    """
    pairs = {}
    for name in names:
        cells = study.cell(first.name, name), study.cell(second.name, name)
        if cells[0] and cells[1] and len(np.intersect1d(cells[0].places, cells[1].places)):
            pairs[name] = _Pair(study, cells)
    scopes = {name: (name,) for name in pairs}
    alike = {name for name, pair in pairs.items() if not pair.common}
    wide = {group: tuple(name for name in study.groups[group] if name in alike) for group in groups}
    last = {members: group for group, members in wide.items()}
    scopes |= {
        group: members
        for group, members in wide.items()
        if len(members) > 1 and last[members] == group
    }
    return [
        _difference(study, first.name, second.name, scope, [pairs[name] for name in members])
        for scope, members in scopes.items()
    ]


class _Pair:
    """Two cells of one dataset on the examples that both answered; resampled once, for all scopes.

    common: both are scored in common labels, which the other datasets are not, so that no mean
    takes them together.
    """

    def __init__(self, study: StudyScores, cells: Sequence[Cell]):
        self.cells = cells
        self.common = any(cell.common for cell in cells)
        self.resampled, self.right = joint(study, cells)


def joint(study: StudyScores, cells: Sequence[Cell]) -> tuple[Resamples, np.ndarray]:
    """C systems on the n examples of a dataset that all of them answered, with the same draws:
    their F1, and [n, C] bool who is right.

    Where the answers of one are in common labels, those of all are judged in these.

    Raises InputError when no example was answered by all.
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
    found = difference_of(resampled)
    test = mcnemar(*np.concatenate([pair.right for pair in pairs]).T)
    return dataclasses.replace(
        row,
        first_f1=found.first,
        second_f1=found.second,
        difference=found.difference,
        low=found.low,
        high=found.high,
        p=found.p,
        mcnemar_p=test.p,
        only_first=test.only_first,
        only_second=test.only_second,
        at_floor=found.p <= 2 / (found.resamples + 1),
        few_datasets=scope in study.groups and len(pairs) < FEW_CLUSTERS,
    )
