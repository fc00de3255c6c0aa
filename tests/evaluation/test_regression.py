"""The scale regression against statsmodels 0.15.0 (its figures), and against a plain least-squares
solution.
"""

import dataclasses

import numpy as np
import pytest

from jaxre.errors import InputError
from jaxre.evaluation.metrics.regression import SLOPE, ScalePoint, family_of, scale_regression
from jaxre.evaluation.report.published import published

SMALL = [
    ScalePoint(f1, int(size), family, dataset)
    for f1, size, family, dataset in [
        (0.41, 1e8, "A", "x"),
        (0.55, 1e9, "A", "x"),
        (0.62, 3e9, "A", "x"),
        (0.50, 1e9, "B", "x"),
        (0.71, 7e9, "B", "x"),
        (0.30, 1e8, "A", "y"),
        (0.49, 1e9, "A", "y"),
        (0.52, 3e9, "A", "y"),
        (0.35, 1e9, "B", "y"),
        (0.69, 7e9, "B", "y"),
        (0.40, 2e9, "C", "y"),
    ]
]


def published_points():
    tuned = [one for one in published().systems if one.kind == "tuned" and not one.note]
    return [
        ScalePoint(f1, one.parameters, family_of(one.model), dataset, one.regime, str(one.shots))
        for one in tuned
        for dataset, f1 in one.f1.items()
    ]


def test_clustered_errors_equal_statsmodels():
    """OLS(...).fit(cov_type="cluster", cov_kwds={"groups": dataset}, use_t=True) on the published
    figures.
    """
    found = scale_regression(published_points())
    assert (found.points, found.standard_errors, found.degrees) == (164, "clustered by dataset", 8)
    assert (found.per_decade, found.low, found.high) == pytest.approx(
        (0.05225631930800834, 0.00272079, 0.10179185), abs=1e-8
    )
    assert (found.p, found.r_squared) == pytest.approx((0.04103138961895284, 0.7525333021430267))
    errors = {one.name: (one.value, one.error) for one in found.coefficients}
    assert errors["family SmolLM2"] == pytest.approx((-0.12477783434952376, 0.03204755529988758))
    assert errors["regime mixtune"] == pytest.approx((-0.01916186870871915, 0.007637867464882342))
    assert errors["shots 2"] == pytest.approx((0.07175603943737792, 0.021133219034782685))
    assert found.carried_by == ("Qwen2.5",)


def test_hc3_errors_equal_statsmodels():
    """OLS(...).fit(cov_type="HC3", use_t=True)."""
    found = scale_regression(SMALL)
    assert (found.standard_errors, found.degrees, found.carried_by) == ("HC3", 6, ("A", "B"))
    assert (found.per_decade, found.low, found.high) == pytest.approx(
        (0.19082231987625495, 0.08152761, 0.30011703), abs=1e-8
    )
    assert (found.p, found.r_squared) == pytest.approx((0.0052505528777981895, 0.8740581829198167))
    assert {one.name: one.error for one in found.coefficients}["family B"] == pytest.approx(
        0.0639465695323601
    )


def test_coefficients_equal_least_squares_and_ignore_the_order_of_points():
    points = SMALL[::-1]
    found = scale_regression(points, ())
    columns = [
        [1, point.family == "B", point.family == "C", np.log10(point.parameters)]
        for point in points
    ]
    solution = np.linalg.lstsq(
        np.array(columns, float), np.array([point.f1 for point in points]), rcond=None
    )[0]
    assert [one.value for one in found.coefficients] == pytest.approx(solution)
    assert found.per_decade == pytest.approx(scale_regression(SMALL, ()).per_decade)


@pytest.mark.parametrize(
    ("chosen", "problem"),
    [
        (lambda point: False, "one model family"),
        (lambda point: point.family == "A", "one model family"),
        (
            lambda point: (
                (point.family, point.parameters)
                in {("A", 10**9), ("B", 7 * 10**9), ("C", 2 * 10**9)}
            ),
            "one size",
        ),
        (
            lambda point: (
                point.dataset == "x" and (point.family == "B" or point.parameters == 10**9)
            ),
            "3 points for 3 columns",
        ),
    ],
)
def test_unidentified_effects_have_no_estimate_and_a_reason(chosen, problem):
    found = scale_regression([point for point in SMALL if chosen(point)])
    assert problem in found.problem
    assert found.per_decade is found.low is found.p is None and not found.coefficients


def test_a_factor_that_determines_the_size_leaves_no_estimate():
    points = [dataclasses.replace(point, regime=str(point.parameters)) for point in SMALL]
    found = scale_regression(points)
    assert (
        "determine the size" in found.problem
        and SLOPE in found.dropped
        and found.per_decade is None
    )


def test_collinear_factors_are_dropped_and_named():
    points = [dataclasses.replace(point, regime=f"of {point.dataset}") for point in SMALL]
    found = scale_regression(points)
    assert found.dropped == ("dataset y",)
    assert found.per_decade == pytest.approx(scale_regression(SMALL).per_decade)


def test_faulty_input_is_named():
    with pytest.raises(InputError, match="'size'"):
        scale_regression(SMALL, ("size",))
    with pytest.raises(InputError, match="0 parameters"):
        scale_regression([ScalePoint(0.5, 0, "A")])


@pytest.mark.parametrize(
    ("model", "family"),
    [
        ("HuggingFaceTB/SmolLM2-360M-Instruct", "SmolLM2"),
        ("Qwen/Qwen2.5-0.5B-Instruct", "Qwen2.5"),
        ("Qwen2.5-3B", "Qwen2.5"),
        ("SmolLM3-3B", "SmolLM3"),
        ("models/Llama-3.2-3B-Instruct/", "Llama-3.2"),
        ("roberta-large", "roberta"),
        ("GPT-5.4", "GPT-5.4"),
    ],
)
def test_the_family_precedes_the_size_in_a_name(model, family):
    assert family_of(model) == family
