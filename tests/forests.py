"""Rows of 37 tokens as forests of prefix trees, for tests of attention.

Nested lists are forests: a node is (tokens of its own, nodes below it).
"""

from __future__ import annotations

import numpy as np
from hypothesis import strategies as st

T = 37

LAYOUTS = {
    "one example": [(37, [])],
    "packed": [(11, []), (9, []), (1, []), (1, []), (15, [])],
    "shared prefix": [(9, [(7, []), (8, []), (1, []), (12, [])])],
    "nested prefixes": [(6, [(4, [(5, []), (3, [])]), (2, [(6, []), (6, [])]), (5, [])])],
    "two roots": [(5, [(8, []), (4, [])]), (3, [(7, []), (6, []), (4, [])])],
    "pads behind": [(4, [(6, []), (3, [])])],
    "all pad": [],
    "tokens of length one": [(1, [])] * 37,
}


def row_of(forest, tokens: int = T) -> np.ndarray:
    """[tokens] `visible_until`; tokens after the forest are pads."""
    until = np.arange(1, tokens + 1)

    def lay(nodes, start):
        for own, below in nodes:
            end = lay(below, start + own)
            until[start : start + own] = end
            start = end
        return start

    assert lay(forest, 0) <= tokens
    return until


def span_of(visible_until: np.ndarray, prefix: int) -> int:
    """The smallest span with which every visible pair has i - j < span or j < prefix."""
    key = np.arange(T)
    return int(np.where(key < prefix, 1, np.atleast_2d(visible_until) - key).max())


def trees(depth: int):
    """Forests of any shape; `fitted` cuts them to the row."""
    below = st.just([]) if depth == 0 else st.lists(trees(depth - 1), max_size=4)
    return st.tuples(st.integers(1, 9), below)


def flat(*lengths: int):
    """Examples without a shared prefix."""
    return [(length, []) for length in lengths]


def fitted(forest, tokens):
    """Cuts a forest to a number of tokens; returns it and the number that is left over."""
    nodes = []
    for own, below in forest:
        if own <= tokens:
            below, tokens = fitted(below, tokens - own)
            nodes.append((own, below))
    return nodes, tokens
