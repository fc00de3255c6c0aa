"""Which prompt prefixes are computed once."""

import numpy as np
import pytest

from jaxre.inference.prefix import shared_prefixes


def grouped(prompts, batch_tokens=8192):
    return [(group.members, len(group.tokens)) for group in shared_prefixes(prompts, batch_tokens)]


def tails(count, seed=0):
    """Prompts' ends that begin differently."""
    random = np.random.default_rng(seed)
    return [[number, *random.integers(0, 50, 5).tolist()] for number in range(count)]


def test_the_longest_common_prefix_is_shared():
    start = list(range(100, 180))
    assert grouped([start + tail for tail in tails(9)]) == [(tuple(range(9)), 80)]
    assert grouped([[*start, 7, *tail] for tail in tails(9)]) == [(tuple(range(9)), 81)]


def test_every_prompt_keeps_its_last_token():
    start = list(range(100))
    assert grouped([start, [*start, 1], start]) == [((0, 1, 2), 99)]
    assert grouped([start] * 4) == [((0, 1, 2, 3), 99)]


@pytest.mark.parametrize(
    "prompts",
    [[[1] * 500], [[1], [1], [1, 2]], [[1, 2, 3], [4, 5, 6]], [[1] * 10 + [2], [1] * 10 + [3]]],
)
def test_a_prefix_that_saves_next_to_nothing_is_not_shared(prompts):
    assert grouped(prompts) == [(tuple(range(len(prompts))), 0)]


def test_a_prefix_is_no_longer_than_a_batch():
    assert grouped([[1] * 300 + tail for tail in tails(3)], batch_tokens=256) == [((0, 1, 2), 256)]


def test_each_dataset_of_a_mixture_has_its_own_prefix():
    one, other = ([9, first, *range(100, 200)] for first in (1, 2))
    prompts = [start + tail for tail in tails(12) for start in (one, other)]
    assert grouped(prompts, batch_tokens=512) == [
        (tuple(range(0, 24, 2)), 102),
        (tuple(range(1, 24, 2)), 102),
    ]
    # Where the second prefix would not save a batch, the few tokens that all share are all that is
    # shared.
    assert grouped(prompts, batch_tokens=4096) == [(tuple(range(24)), 0)]


def test_an_example_of_another_beginning_does_not_cost_the_others_their_prefix():
    prompts = [[9, *range(100, 200), *tail] for tail in tails(12)]
    prompts.insert(5, [9, 100, 7, 7, 7])
    assert grouped(prompts, batch_tokens=512) == [((*range(5), *range(6, 13)), 101), ((5,), 0)]


def test_sentences_that_begin_alike_stay_in_one_group():
    prompts = [[9] * 60 + [number % 3, *tail] for number, tail in enumerate(tails(300))]
    assert grouped(prompts) == [(tuple(range(300)), 60)]
