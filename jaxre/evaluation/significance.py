"""Whether one system is better than another on the same examples: paired bootstrap and McNemar's test.

A resample only asks how often each *kind* of example was drawn: gold positive or not, each
system's prediction positive or not and right or not. There are at most 12 kinds, so drawing N examples with
replacement is one multinomial draw over kinds. That is the bootstrap's distribution exactly,
in memory [resamples, 12] for any N (10,000 resamples of 2,717 examples: 30 ms).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats

from jaxre.evaluation.metrics import Labels

RESAMPLES = 10_000
SEED = 42


@dataclass(frozen=True)
class Interval:
    """A score with its 95% percentile interval."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class PairedBootstrap:
    """Positive-class micro-F1 of two systems on the same examples; `difference` is first - second."""

    first: float
    second: float
    difference: float
    low: float  # 95% percentile interval of the difference
    high: float
    p: float  # two-sided: twice the smaller share of resamples on either side of zero
    resamples: int


@dataclass(frozen=True)
class McNemar:
    """`only_first`, `only_second`: examples that just one of two systems got right."""

    only_first: int
    only_second: int
    p: float
    exact: bool  # exact binomial test; otherwise chi-square with continuity correction


def bootstrap_f1(gold: Sequence[str], predicted: Sequence[str], resamples: int = RESAMPLES, seed: int = SEED) -> Interval:
    """Positive-class micro-F1 of N predictions with its 95% percentile interval. Raises InputError for no examples."""
    parts = _f1_parts(Labels.of(gold, predicted))  # N 2
    drawn = _resample(parts, resamples, seed)  # resamples 2
    low, high = np.percentile(_f1(drawn), [2.5, 97.5])
    return Interval(float(_f1(parts.sum(axis=0))), float(low), float(high))


def paired_bootstrap(
    gold: Sequence[str], first: Sequence[str], second: Sequence[str], resamples: int = RESAMPLES, seed: int = SEED
) -> PairedBootstrap:
    """Difference of positive-class micro-F1 of two systems, resampling examples.

    Args:
      gold, first, second: N labels each; first and second are predictions for the same examples.
      resamples, seed: the study uses 10,000 and 42.

    Returns the difference first - second, its 95% percentile interval and the two-sided p value
    (Efron & Tibshirani 1993, ch. 13 and 16; the added 1 keeps p above zero, Davison & Hinkley 1997, 4.2.1).

    Raises:
      InputError: no examples, or lists of different length.
    """
    parts = np.concatenate([_f1_parts(Labels.of(gold, first)), _f1_parts(Labels.of(gold, second))], axis=1)  # N 4
    drawn = _resample(parts, resamples, seed)  # resamples 4
    differences = _f1(drawn[:, :2]) - _f1(drawn[:, 2:])
    low, high = np.percentile(differences, [2.5, 97.5])
    tail = min((differences <= 0).sum(), (differences >= 0).sum())
    whole = parts.sum(axis=0)
    f1_first, f1_second = float(_f1(whole[:2])), float(_f1(whole[2:]))
    return PairedBootstrap(
        first=f1_first,
        second=f1_second,
        difference=f1_first - f1_second,
        low=float(low),
        high=float(high),
        p=float(min(1.0, 2 * (tail + 1) / (resamples + 1))),
        resamples=resamples,
    )


def mcnemar(first_right: np.ndarray, second_right: np.ndarray) -> McNemar:
    """McNemar's test (1947) on N paired bools: do two systems err equally often?

    The exact binomial test below 25 discordant pairs, else chi-square with Edwards' continuity correction.
    """
    first_right, second_right = np.asarray(first_right, bool), np.asarray(second_right, bool)
    only_first = int((first_right & ~second_right).sum())
    only_second = int((second_right & ~first_right).sum())
    discordant = only_first + only_second
    if discordant < 25:
        p = stats.binomtest(only_first, discordant, 0.5).pvalue if discordant else 1.0
        return McNemar(only_first, only_second, float(p), exact=True)
    statistic = max(abs(only_first - only_second) - 1, 0) ** 2 / discordant
    return McNemar(only_first, only_second, float(stats.chi2.sf(statistic, df=1)), exact=False)


def _f1_parts(labels: Labels) -> np.ndarray:
    """What each example adds to numerator and denominator of the micro-F1: [N, 2], int64."""
    gold, predicted = labels.positive[labels.gold], labels.positive[labels.predicted]
    return np.stack([2 * (labels.right & gold), gold.astype(np.int64) + predicted], axis=1)


def _f1(parts: np.ndarray) -> np.ndarray:
    return parts[..., 0] / np.maximum(parts[..., 1], 1)


def _resample(parts: np.ndarray, resamples: int, seed: int) -> np.ndarray:
    """Sums of `parts` ([N, C]) over N examples drawn with replacement: [resamples, C]."""
    kinds, counts = np.unique(parts, axis=0, return_counts=True)  # K C, K
    drawn = np.random.default_rng(seed).multinomial(len(parts), counts / len(parts), size=resamples)  # resamples K
    return drawn @ kinds
