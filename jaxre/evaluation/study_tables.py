"""The tables of a study, from its scores.

study = measure(read_record("runs/study-small"))
headline(study)               # systems x datasets with averages; published rows stand apart
planned_comparisons(study)    # tuned against frontier, Holm-corrected
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from jaxre.evaluation.rows import Row
from jaxre.evaluation.study_scores import Average, StudyScores


@dataclass(frozen=True)
class HeadlineCell(Row):
    """F1 with its interval (none for published figures). official: SemEval's macro-F1, on SemEval only."""

    f1: float
    low: float | None = None
    high: float | None = None
    official: float | None = None
    answered: int | None = None
    asked: int | None = None
    flags: tuple[str, ...] = ()
    broken: bool = False


@dataclass(frozen=True)
class HeadlineRow(Row):
    """cells: dataset -> figures, of the datasets that it was asked; averages: each domain and "overall"."""

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
    """groups: domain -> datasets, then "overall" -> all, in the order of the columns."""

    groups: dict[str, tuple[str, ...]]
    rows: tuple[HeadlineRow, ...]


@dataclass(frozen=True)
class Difference(Row):
    """first - second in F1 on the examples that both answered.

    scope: a dataset, a domain, or "overall" (then the unweighted mean over `datasets`, clustered). p: two-sided bootstrap;
    mcnemar_p: over the pooled examples; p_holm, mcnemar_p_holm: corrected over the table, None where nothing is corrected.
    few_datasets: a clustered interval that rests on fewer than five datasets; read it as a lower bound of the uncertainty.
    flags: of either side. difference, low, high, p are None where a side is broken.
    """

    first: str
    second: str
    scope: str
    datasets: tuple[str, ...]
    examples: int
    first_f1: float | None
    second_f1: float | None
    difference: float | None
    low: float | None
    high: float | None
    p: float | None
    mcnemar_p: float
    only_first: int
    only_second: int
    p_holm: float | None = None
    mcnemar_p_holm: float | None = None
    few_datasets: bool = False
    flags: tuple[str, ...] = ()


@dataclass(frozen=True)
class LabelsPoint(Row):
    dataset: str
    labels: int
    f1: float


@dataclass(frozen=True)
class LabelsEffect(Row):
    """F1 against the number of labels of one system: Spearman's rho with a bootstrap interval; None with fewer than four datasets."""

    name: str
    source: Literal["measured", "published"]
    points: tuple[LabelsPoint, ...]
    rho: float | None
    low: float | None
    high: float | None
    problem: str = ""


@dataclass(frozen=True)
class FootprintRow(Row):
    """Bytes, milliseconds, seconds; None where it was not measured. f1: overall average."""

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
    note: str = ""


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
    """A main effect on F1: mean with - mean without (demonstrations: mean at `level` - mean at 0)."""

    name: str
    value: float
    low: float
    high: float


@dataclass(frozen=True)
class PromptSensitivity(Row):
    """The styles of one model in one setting; effects only where all eight are there, else `problem` says what is missing."""

    model: str
    setting: str
    rows: tuple[StyleRow, ...]
    spread: float | None  # best - worst overall F1
    effects: tuple[Effect, ...]
    problem: str = ""


def headline(study: StudyScores, with_published: bool = True) -> Headline:
    """Systems x datasets, with unweighted averages per domain and over all."""
    raise NotImplementedError


def planned_comparisons(study: StudyScores) -> tuple[Difference, ...]:
    """Every tuned system (labels enumerated, prompt shots = training shots) against every frontier system: datasets, domains, overall."""
    raise NotImplementedError


def cross_domain(study: StudyScores) -> tuple[Difference, ...]:
    """GenTune against LitTune of the same model and shots, on each domain: trained outside of it against trained inside."""
    raise NotImplementedError


def enumerated_effect(study: StudyScores) -> tuple[Difference, ...]:
    """Schema-enumerated prompts against generic ones, of systems alike in all else."""
    raise NotImplementedError


def matched_shots(study: StudyScores) -> tuple[Difference, ...]:
    """Prompt shots = training shots against other prompt shots, of systems alike in all else."""
    raise NotImplementedError


def labels_effect(study: StudyScores, with_published: bool = True) -> tuple[LabelsEffect, ...]:
    raise NotImplementedError


def footprint(study: StudyScores, with_published: bool = True) -> tuple[FootprintRow, ...]:
    raise NotImplementedError


def prompt_sensitivity(study: StudyScores) -> tuple[PromptSensitivity, ...]:
    raise NotImplementedError
