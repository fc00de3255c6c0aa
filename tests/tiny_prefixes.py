"""Token sets whose prompts share prefixes in several ways, for tests of sharing."""

from __future__ import annotations

import numpy as np

from jaxre.data.template import Encoded
from jaxre.data.tokens import TokenSet


def begin_alike(
    seed: int = 0, vocabulary: int = 97, root: int = 20, deeper: int = 10, branches: int = 4
) -> TokenSet:
    """Prompts of two roots, each with examples that share more than the root, a prompt that occurs
    three times, and an unrelated prompt, in random order.
    """
    draw = np.random.default_rng(seed)

    def some(least: int, most: int) -> list[int]:
        return draw.integers(0, vocabulary, int(draw.integers(least, most + 1))).tolist()

    roots = [some(root, root), some(root // 2, root // 2)]
    encoded = []
    for start in roots:
        for _ in range(2):
            nested = start + some(deeper, deeper)
            for _ in range(branches):
                prompt = nested + some(1, 12)
                encoded.append(Encoded(prompt + some(1, 6), len(prompt)))
            # Prompts that are no more than the beginning of others.
            encoded.append(Encoded(nested + some(1, 3), len(nested)))
        encoded += [
            Encoded(prompt + some(2, 4), len(prompt))
            for prompt in (start + some(3, 9) for _ in range(branches))
        ]
    same = roots[0] + some(9, 9)
    encoded += [Encoded(same + answer, len(same)) for answer in ([5], [5], [6, 7, 8])]
    encoded.append(Encoded([*some(8, 8), 3], 8))
    order = draw.permutation(len(encoded))
    return TokenSet.of([encoded[place] for place in order], [f"example-{place}" for place in order])
