"""Bootstrap and McNemar against a plain resampling loop, scipy, and known cases."""

import itertools
import time

import numpy as np
import pytest
from scipy import stats

from jaxre.errors import InputError
from jaxre.evaluation.metrics.scores import score
from jaxre.evaluation.metrics.significance import (
    bootstrap_f1,
    clustered,
    difference_of,
    f1_interval,
    holm,
    mcnemar,
    paired_bootstrap,
    resample_f1,
    resample_ratios,
)


def systems(count, right_first, right_second, seed=0):
    draw = np.random.default_rng(seed)
    names = np.array(["none", "a", "b", "c"])
    gold = names[draw.integers(0, 4, count)]
    sides = [
        np.where(draw.random(count) < right, gold, names[draw.integers(0, 4, count)])
        for right in (right_first, right_second)
    ]
    return gold.tolist(), sides[0].tolist(), sides[1].tolist()


def f1(gold, predicted, chosen):
    gold, predicted = np.array(gold)[chosen], np.array(predicted)[chosen]
    hits = ((gold == predicted) & (gold != "none")).sum()
    return 2 * hits / ((gold != "none").sum() + (predicted != "none").sum())


def test_bootstrap_has_the_distribution_of_resampled_examples():
    gold, first, second = systems(300, 0.7, 0.6)
    draw, differences = np.random.default_rng(1), []
    for _ in range(3000):
        chosen = draw.integers(0, 300, 300)
        differences.append(f1(gold, first, chosen) - f1(gold, second, chosen))
    result = paired_bootstrap(gold, first, second)
    # The standard error of a 2.5% quantile from 3,000 draws is about 0.05 standard deviations; 4 of
    # them.
    tolerance = 0.2 * np.std(differences)
    assert (result.low, result.high) == pytest.approx(
        np.percentile(differences, [2.5, 97.5]), abs=tolerance
    )
    assert result.difference == pytest.approx(score(gold, first).f1 - score(gold, second).f1)
    assert result.low < result.difference < result.high


def test_equal_systems_do_not_differ_and_opposite_ones_do():
    gold, first, _ = systems(500, 0.7, 0.6)
    same = paired_bootstrap(gold, first, first)
    assert (same.difference, same.low, same.high, same.p) == (0, 0, 0, 1)
    better = paired_bootstrap(gold, gold, first)
    assert better.low > 0 and better.p == pytest.approx(2 / 10_001)
    worse = paired_bootstrap(gold, first, gold)
    assert worse.difference == -better.difference and worse.high < 0


def test_p_value_is_calibrated_under_no_difference():
    p = [paired_bootstrap(*systems(400, 0.6, 0.6, seed), resamples=500).p for seed in range(300)]
    # 5% of 300 is 15; the binomial standard deviation is 3.8; 4 of them.
    assert sum(x < 0.05 for x in p) < 15 + 4 * 3.8


def test_single_interval_covers_the_score_and_shrinks_with_examples():
    few, many = (bootstrap_f1(*systems(count, 0.7, 0.6)[:2]) for count in (200, 20_000))
    assert few.low < few.value < few.high
    # The width goes with 1/sqrt(N): a tenth, within sampling error.
    assert (many.high - many.low) / (few.high - few.low) == pytest.approx(0.1, rel=0.35)


def test_seed_fixes_the_result():
    case = systems(300, 0.7, 0.6)
    assert paired_bootstrap(*case) == paired_bootstrap(*case)
    assert paired_bootstrap(*case, seed=1).low != paired_bootstrap(*case).low


def test_ten_thousand_resamples_of_semevals_size_take_less_than_two_seconds():
    case = systems(2717, 0.7, 0.6)
    start = time.monotonic()
    paired_bootstrap(*case)
    assert time.monotonic() - start < 2


def test_no_positives_give_zero_not_a_division_by_zero():
    result = paired_bootstrap(["none"] * 3, ["none"] * 3, ["na"] * 3)
    assert (result.difference, result.p) == (0, 1)


def test_no_examples_or_unpaired_lists_are_input_errors():
    with pytest.raises(InputError):
        paired_bootstrap([], [], [])
    with pytest.raises(InputError):
        paired_bootstrap(["a"], ["a"], ["a", "b"])


def test_clustered_bootstrap_has_the_distribution_of_resampled_datasets_and_examples():
    cases = [
        systems(count, right, right - 0.1, seed)
        for seed, (count, right) in enumerate([(60, 0.9), (150, 0.5), (40, 0.7)])
    ]
    draw, differences = np.random.default_rng(1), []
    for _ in range(3000):
        means = []
        for number in draw.integers(0, 3, 3):
            gold, first, second = cases[number]
            chosen = draw.integers(0, len(gold), len(gold))
            means.append((f1(gold, first, chosen), f1(gold, second, chosen)))
        differences.append(np.mean(means, axis=0))
    drawn = clustered([resample_f1(*case, seed=(42, number)) for number, case in enumerate(cases)])
    # As above: 4 standard errors of a 2.5% quantile.
    for ours, theirs in (
        (f1_interval(drawn), np.array(differences)[:, 0]),
        (difference_of(drawn), np.subtract(*np.array(differences).T)),
    ):
        assert (ours.low, ours.high) == pytest.approx(
            np.percentile(theirs, [2.5, 97.5]), abs=0.2 * np.std(theirs)
        )
    assert f1_interval(drawn).value == pytest.approx(
        np.mean([score(gold, first).f1 for gold, first, _ in cases])
    )
    assert difference_of(drawn).second == pytest.approx(
        np.mean([score(gold, second).f1 for gold, _, second in cases])
    )


def test_clustering_over_one_dataset_is_its_own_bootstrap():
    alone = resample_f1(*systems(300, 0.7, 0.6))
    assert difference_of(clustered([alone])) == difference_of(alone)


def test_a_dataset_drawn_twice_brings_two_independent_samples():
    # Of 20 equal datasets the mean varies as 1 / sqrt(20) of one; were each resample one draw for
    # all, it would vary as much as one.
    case = systems(400, 0.7, 0.6)[:2]
    one = resample_f1(*case, seed=(42, 0))
    many = clustered([resample_f1(*case, seed=(42, number)) for number in range(20)])
    assert many.drawn.std() / one.drawn.std() == pytest.approx(1 / np.sqrt(20), rel=0.1)
    same = clustered([one] * 20)
    assert same.drawn.std() / one.drawn.std() == pytest.approx(1 / np.sqrt(20), rel=0.1)


def test_systems_resampled_together_share_their_draws():
    gold, first, _ = systems(300, 0.7, 0.6)
    similar = [label if index % 10 else "none" for index, label in enumerate(first)]
    both = resample_f1(gold, first, first, similar)
    np.testing.assert_array_equal(both.drawn[:, 0], both.drawn[:, 1])
    # drawn apart, it is below 0.04
    assert np.corrcoef(both.drawn[:, 0], both.drawn[:, 2])[0, 1] > 0.5


def test_many_systems_and_chunks_of_resamples_have_the_same_distribution():
    draw = np.random.default_rng(0)
    # 3 ** 90 is no int64, and each example is a kind of its own
    above = draw.integers(0, 3, (1000, 45))
    made = resample_ratios(above, np.full_like(above, 2), resamples=5000)
    np.testing.assert_allclose(made.whole, above.mean(axis=0) / 2)
    np.testing.assert_allclose(made.drawn.mean(axis=0), made.whole, atol=0.003)
    np.testing.assert_allclose(
        made.drawn.std(axis=0), above.std(axis=0) / 2 / np.sqrt(1000), rtol=0.1
    )


@pytest.mark.parametrize("seed", range(5))
def test_holm_is_the_closed_test_with_bonferroni(seed):
    """Marcus, Peritz & Gabriel 1976: a hypothesis falls when every intersection that holds it
    falls.
    """
    p = np.random.default_rng(seed).random(6) ** 3
    p[1] = p[0]
    closed = [
        max(
            min(1, len(some) * p[list(some)].min())
            for size in range(1, 7)
            for some in itertools.combinations(range(6), size)
            if one in some
        )
        for one in range(6)
    ]
    assert holm(p.tolist()) == pytest.approx(closed)
    assert holm([]) == [] and holm([0.04]) == [0.04]


def discordant(only_first, only_second):
    first = np.array([True] * only_first + [False] * only_second + [True] * 5)
    return first, np.array([False] * only_first + [True] * only_second + [True] * 5)


@pytest.mark.parametrize(("only_first", "only_second"), [(0, 1), (3, 9), (12, 12), (24, 0)])
def test_mcnemar_is_the_exact_binomial_test_below_25(only_first, only_second):
    result = mcnemar(*discordant(only_first, only_second))
    assert result.exact and (result.only_first, result.only_second) == (only_first, only_second)
    lower = min(only_first, only_second)
    assert result.p == pytest.approx(
        min(1.0, 2 * stats.binom.cdf(lower, only_first + only_second, 0.5))
    )


@pytest.mark.parametrize(("only_first", "only_second"), [(20, 5), (30, 12), (400, 310)])
def test_mcnemar_is_chi_square_with_continuity_correction_from_25(only_first, only_second):
    result = mcnemar(*discordant(only_first, only_second))
    half = (only_first + only_second) / 2
    # The same statistic as a goodness-of-fit test with the observed counts moved by one half.
    shift = 0.5 * np.sign(only_first - only_second)
    expected = stats.chisquare([only_first - shift, only_second + shift], [half, half]).pvalue
    assert not result.exact and result.p == pytest.approx(expected)


def test_mcnemar_without_discordant_pairs_finds_nothing():
    assert mcnemar(*discordant(0, 0)).p == 1
    assert mcnemar(*discordant(15, 15)).p == 1
