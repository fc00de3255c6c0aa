"""Errors by what kind they are, and what truncation would have done to the answers.

    errors = error_strata(gold, predicted, schema=labels)
    [(one.name, one.count, one.share) for one in errors.strata]      # the counts add up to errors.errors

Each error belongs to the first stratum that it fits, in this order:
1. out of schema: the prediction is neither a label of the schema nor a spelling of "no relation" (run-on text, `<think>`);
2. over-prediction: a positive label where gold has no relation;
3. under-prediction: no relation where gold is positive;
4. near neighbour: a wrong positive label whose name is close to that of the gold label (`near`);
5. confusion: any other wrong positive label.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from jaxre.evaluation.rows import Row

RIGHT = "right"
STRATA = ("out of schema", "over-prediction", "under-prediction", "near neighbour", "confusion")


@dataclass(frozen=True)
class Stratum(Row):
    """share: of all errors, in [0, 1]; examples: indices of the first few."""

    name: str
    count: int
    share: float
    examples: tuple[int, ...]


@dataclass(frozen=True)
class ErrorStrata(Row):
    """All errors of one system on one dataset; `strata` are in the order of STRATA, empty ones too."""

    examples: int
    errors: int
    strata: tuple[Stratum, ...]


@dataclass(frozen=True)
class Truncation(Row):
    """What cutting each example after `limit` tokens does to its answer.

    examples: in all; cut: longer than the limit; answer_gone: no token of the answer is left; answer_cut: some are left, not all;
    longest: tokens of the longest example.
    """

    dataset: str
    limit: int
    examples: int
    cut: int
    answer_gone: int
    answer_cut: int
    longest: int


def error_strata(gold: Sequence[str], predicted: Sequence[str], schema: Sequence[str]) -> ErrorStrata:
    """The errors of N predictions by stratum. Raises InputError: no examples, or lists of different length."""
    raise NotImplementedError


def strata_of(gold: Sequence[str], predicted: Sequence[str], schema: Sequence[str]) -> np.ndarray:
    """The stratum of each of N predictions, RIGHT or one of STRATA: [N] str."""
    raise NotImplementedError


def truncation(prompt_lengths: np.ndarray, lengths: np.ndarray, limit: int = 1024, dataset: str = "") -> Truncation:
    """Counts the answers that truncation on the right loses.

    Args:
      prompt_lengths: [N] tokens before the answer; lengths: [N] tokens of prompt and answer (with its end-of-turn).
    """
    raise NotImplementedError
