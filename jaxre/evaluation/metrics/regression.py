"""Regression of F1 on the number of parameters, with the model family held fixed.

    fit = scale_regression(points)
    fit.per_decade, fit.low, fit.high       # F1 per factor of ten in parameters
    fit.problem                             # reason why there is no estimate, or ""

Least squares of F1 on log10(parameters), with the family and further factors (regime, shots,
dataset) as dummies. Size is identified only by families with several sizes; with one size per
family there is no estimate.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats

from jaxre.errors import InputError
from jaxre.evaluation.metrics.rows import Row
from jaxre.evaluation.metrics.significance import FEW_CLUSTERS

FACTORS = ("regime", "shots", "dataset")
SLOPE = "log10(parameters)"


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
    """A fit. per_decade, low, high, p: of log10(parameters); None if there is a `problem`.

    source: measured or published; excluded: systems left out because their answers are broken.
    carried_by: families with more than one size, which alone separate size from family.
    standard_errors: "clustered by dataset" from five datasets on, else "HC3"; degrees: of freedom
    of the t distribution. coefficients: without those of the dataset dummies. dropped: columns that
    are linear combinations of others.
    """

    source: str
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
    excluded: tuple[str, ...] = ()
    problem: str = ""


def scale_regression(
    points: Sequence[ScalePoint],
    factors: Sequence[str] = FACTORS,
    source: str = "measured",
    excluded: Sequence[str] = (),
) -> ScaleRegression:
    """Fits F1 ~ log10(parameters) + family + factors; `problem` has the reason if it cannot.

    Standard errors are robust to correlation within a dataset (Liang & Zeger 1986, with the usual
    factor G/(G-1) (N-1)/(N-K) and t with G-1 degrees of freedom) or, with few datasets, to unequal
    variance (HC3, MacKinnon & White 1985).

    Args:
      points: one per system and dataset.
      factors: of FACTORS, each a dummy per level; `dataset` compares systems within each dataset.

    Raises:
      InputError: an unknown factor, or a point without parameters.
    """
    _check(points, factors)
    sizes = defaultdict(set)
    for point in points:
        sizes[point.family].add(point.parameters)
    several = tuple(sorted(family for family, values in sizes.items() if len(values) > 1))
    known = {
        "points": len(points),
        "families": tuple(sorted(sizes)),
        "carried_by": several,
        "source": source,
        "excluded": tuple(excluded),
    }
    if len(sizes) < 2:
        return ScaleRegression(
            **known,
            problem=(
                "one model family at most: nothing to control for; add models of another family"
            ),
        )
    if not several:
        return ScaleRegression(
            **known,
            problem=(
                "every family has one size: size cannot be separated from family; add a second size"
                " of one"
            ),
        )

    design, names, dropped = _design(points, factors)
    if SLOPE in dropped:
        return ScaleRegression(
            **known,
            dropped=dropped,
            problem="the other columns determine the size; leave out a factor or add systems",
        )
    if len(points) <= design.shape[1]:
        return ScaleRegression(
            **known,
            dropped=dropped,
            problem=f"{len(points)} points for {design.shape[1]} columns; add systems",
        )
    f1 = np.array([point.f1 for point in points])
    coefficients, covariance, degrees, errors = _fit(
        design, f1, [point.dataset for point in points]
    )
    residual, spread = f1 - design @ coefficients, f1 - f1.mean()
    table = [
        _coefficient(name, float(value), float(error), degrees)
        for name, value, error in zip(
            names, coefficients, np.sqrt(np.diag(covariance)), strict=True
        )
        # Standard errors clustered by dataset are zero for its dummies by construction.
        if not name.startswith("dataset ")
    ]
    slope = next(coefficient for coefficient in table if coefficient.name == SLOPE)
    return ScaleRegression(
        **known,
        per_decade=slope.value,
        low=slope.low,
        high=slope.high,
        p=slope.p,
        r_squared=float(1 - residual @ residual / (spread @ spread)) if spread.any() else None,
        standard_errors=errors,
        degrees=degrees,
        coefficients=tuple(table),
        dropped=dropped,
    )


def _check(points: Sequence[ScalePoint], factors: Sequence[str]) -> None:
    for factor in factors:
        if factor not in FACTORS:
            raise InputError(
                f"scale regression: unknown factor {factor!r}; the factors are {', '.join(FACTORS)}"
            )
    for point in points:
        if point.parameters <= 0:
            raise InputError(
                f"scale regression: {point.name or point.family} has {point.parameters} parameters;"
                " state how many it has"
            )


def _design(
    points: Sequence[ScalePoint], factors: Sequence[str]
) -> tuple[np.ndarray, list[str], tuple[str, ...]]:
    """Linearly independent columns [N, K], their names, and the names of the other columns. The
    size is last, so that it is dropped if the other columns determine it.
    """
    columns = {"intercept": np.ones(len(points))}
    for factor in ("family", *factors):
        values = [getattr(point, factor) for point in points]
        for level in sorted(set(values))[1:]:
            columns[f"{factor} {level}"] = np.array([value == level for value in values], float)
    columns[SLOPE] = np.log10([float(point.parameters) for point in points])
    basis, names, dropped = np.zeros((len(points), 0)), [], []
    for name, column in columns.items():
        # Project twice: after one projection, rounding errors are as large as the tolerance.
        residual = column - basis @ (basis.T @ column)
        residual -= basis @ (basis.T @ residual)
        norm = np.linalg.norm(residual)
        if norm <= 1e-9 * np.linalg.norm(column):
            dropped.append(name)
        else:
            basis = np.concatenate([basis, residual[:, None] / norm], axis=1)
            names.append(name)
    return np.stack([columns[name] for name in names], axis=1), names, tuple(dropped)


def _fit(
    design: np.ndarray, f1: np.ndarray, clusters: Sequence[str]
) -> tuple[np.ndarray, np.ndarray, int, str]:
    """Coefficients [K], their covariance [K, K], degrees of freedom, and the kind of standard
    errors.
    """
    count, columns = design.shape
    bread = np.linalg.inv(design.T @ design)
    coefficients = bread @ design.T @ f1
    scores = design * (f1 - design @ coefficients)[:, None]  # N K
    groups = sorted(set(clusters))
    if len(groups) >= FEW_CLUSTERS:
        member = np.array(clusters)[None] == np.array(groups)[:, None]  # G N
        sums = member @ scores
        factor = len(groups) / (len(groups) - 1) * (count - 1) / (count - columns)
        covariance = factor * bread @ sums.T @ sums @ bread
        return coefficients, covariance, len(groups) - 1, "clustered by dataset"
    leverage = np.einsum("nk,kl,nl->n", design, bread, design)
    # A point with a dummy of its own has no residual and no information on the other columns.
    alone = leverage > 1 - 1e-9
    scores = np.where(alone[:, None], 0, scores / np.where(alone, 1, 1 - leverage)[:, None])
    return coefficients, bread @ scores.T @ scores @ bread, count - columns, "HC3"


def _coefficient(name: str, value: float, error: float, degrees: int) -> Coefficient:
    half = float(stats.t.ppf(0.975, degrees)) * error
    p = 2 * float(stats.t.sf(abs(value) / error, degrees)) if error else float(value == 0)
    return Coefficient(name, value, error, value - half, value + half, p)


def family_of(model: str) -> str:
    """Family of a model: the part of its name before the size (`Qwen/Qwen2.5-0.5B-Instruct` ->
    `Qwen2.5`), or the whole name.
    """
    name = model.rstrip("/").rpartition("/")[2]
    match = re.match(
        r"(.+?)[-_ ](\d+(\.\d+)?[bm]|tiny|small|base|medium|large)(?![a-z0-9])", name, re.IGNORECASE
    )
    return match[1] if match else name
