"""The answers of one example as a tree of tokens: answers that begin alike share that beginning.

In a packed row the prompt is the trunk and the tree follows it, depth first. The last token of an
answer is only predicted, never read, so it has no place in the row, unless another answer goes on
after it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from jaxre.errors import InputError

Answers = Sequence[Sequence[int]]


@dataclass(frozen=True)
class AnswerTree:
    """The tree of A answers, with N nodes.

    tokens, depths, until: [N] int32, the nodes depth first. A node stands `depths` places after the
    end of the prompt, and its subtree ends before node `until`.
    targets: [N + 1, W] int32. Row 0 lists the tokens that may follow the prompt, row n + 1 those
    that may follow node n, filled up with 0.
    place, child: [A, longest] int32, answer a is predicted by the targets `[place[a, i], child[a,
    i]]`, for those i where `valid` [A, longest] is true.
    """

    tokens: np.ndarray
    depths: np.ndarray
    until: np.ndarray
    targets: np.ndarray
    place: np.ndarray
    child: np.ndarray
    valid: np.ndarray

    def scores(self, log_probabilities: np.ndarray) -> np.ndarray:
        """[N + 1, W or more] log-probabilities of the targets -> [A] f64 of the answers."""
        return np.where(self.valid, log_probabilities[self.place, self.child], 0.0).sum(
            axis=1, dtype=np.float64
        )


def answer_tree(answers: Answers) -> AnswerTree:
    """The tree of answers.

    Raises:
      InputError: no answer, an empty one, or two that are the same.
    """
    if not answers:
        raise InputError("there is no label to score; the schema needs at least one")
    if not all(answers):
        raise InputError(
            f"label {next(i for i, answer in enumerate(answers) if not answer)} of the schema has"
            " no token; a label must not be empty"
        )
    tokens: list[int] = []
    depths: list[int] = []
    until: list[int] = []
    # of the prompt's end, then of each node: token -> place among the targets
    children: list[dict[int, int]] = [{}]
    length = max(len(answer) for answer in answers)
    place, child = np.zeros((2, len(answers), length), np.int32)
    open_nodes: list[int] = []  # the nodes of the previous answer's path
    previous: Sequence[int] = ()
    # Sorted answers visit the tree depth first, and one that begins another comes right before it.
    for number in sorted(range(len(answers)), key=lambda i: tuple(answers[i])):
        answer = answers[number]
        if len(answer) == len(previous) and list(answer) == list(previous):
            raise InputError(
                f"label {number} of the schema has the same tokens as another label; every label"
                " must differ as the model reads it"
            )
        alike = (
            i
            for i, (before, now) in enumerate(zip(previous, answer, strict=False))
            if before != now
        )
        shared = min(next(alike, len(previous)), len(open_nodes))
        for node in open_nodes[shared:]:
            until[node] = len(tokens)
        del open_nodes[shared:]
        for depth in range(shared, len(answer) - 1):
            open_nodes.append(len(tokens))
            tokens.append(answer[depth])
            depths.append(depth)
            until.append(-1)
            children.append({})
        for depth, (parent, token) in enumerate(zip([-1, *open_nodes], answer, strict=True)):
            followers = children[parent + 1]
            place[number, depth] = parent + 1
            child[number, depth] = followers.setdefault(token, len(followers))
        previous = answer
    for node in open_nodes:
        until[node] = len(tokens)
    targets = np.zeros((len(children), max(len(followers) for followers in children)), np.int32)
    for row, followers in enumerate(children):
        targets[row, : len(followers)] = list(followers)
    lengths = np.array([len(answer) for answer in answers])
    nodes = (np.array(values, np.int32) for values in (tokens, depths, until))
    return AnswerTree(*nodes, targets, place, child, np.arange(length) < lengths[:, None])
