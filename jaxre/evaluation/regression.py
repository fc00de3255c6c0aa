"""Does F1 grow with the number of parameters, once the model family is held fixed?

    fit = scale_regression(points)
    fit.per_decade, fit.low, fit.high       # F1 per factor of ten in parameters
    fit.problem                             # why there is no figure, or ""

Least squares of F1 on log10(parameters), with the family and further factors (regime, shots, dataset) as dummies.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from jaxre.evaluation.rows import Row


@dataclass(frozen=True)
class ScalePoint(Row):
    """F1 of one system on one dataset."""

    f1: float
    parameters: int
    family: str
    dataset: str = ""
    regime: str = ""
    shots: str = ""
    name: str = ""
    source: str = "measured"


@dataclass(frozen=True)
class Coefficient(Row):
    """One column of the regression; low, high: 95% interval by Student's t."""

    name: str
    value: float
    error: float
    low: float
    high: float
    p: float


@dataclass(frozen=True)
class ScaleRegression(Row):
    """The fit; `per_decade`, `low`, `high`, `p` are of log10(parameters) and None with a `problem`.

    standard_errors: "clustered by dataset" or "HC3"; degrees: of freedom of the t distribution; carried_by: the families with more
    than one size, which alone tell size from family; dropped: factors with one level, and columns that others determine.
    """

    points: int
    families: tuple[str, ...]
    carried_by: tuple[str, ...]
    per_decade: float | None = None
    low: float | None = None
    high: float | None = None
    p: float | None = None
    r_squared: float | None = None
    standard_errors: str = ""
    degrees: int = 0
    coefficients: tuple[Coefficient, ...] = ()
    dropped: tuple[str, ...] = ()
    problem: str = ""


def scale_regression(points: Sequence[ScalePoint], factors: Sequence[str] = ("regime", "shots", "dataset")) -> ScaleRegression:
    """Fits F1 ~ log10(parameters) + family + factors; says in `problem` why it cannot. Raises InputError: an unknown factor."""
    raise NotImplementedError


def family_of(model: str) -> str:
    """The family in a model's name: what stands before its size (`Qwen/Qwen2.5-0.5B-Instruct` -> `Qwen2.5`)."""
    raise NotImplementedError
