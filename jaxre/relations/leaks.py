"""Texts that training and held-out data share (`sources.overlap`), left out of training
(`data.dedup`).
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence

from jaxre import config
from jaxre.errors import InputError
from jaxre.relations import sources
from jaxre.relations.mixtures import load_all, sources_of
from jaxre.relations.schema import Example


def load_train(data: config.Data, train: Sequence[config.Source]) -> list[list[Example]]:
    """The examples of training sources; with `data.dedup` without those whose text occurs in the
    validation or test data.

    Texts are equal but for white space, whatever pair is marked. How many are left out is logged.

    Raises:
      InputError: as `sources.load`; nothing left.
    """
    given = load_all(train)
    held_out = {
        name: list(itertools.chain.from_iterable(load_all(read)))
        for name, read in _held_out(data).items()
    }
    if not held_out:
        return given
    together = list(itertools.chain.from_iterable(given))
    kept, removed = without_texts(together, held_out)
    if not kept:
        raise InputError(
            f"data.dedup: all {len(together):,} training examples have a text of"
            f" {' or '.join(held_out)}; set data.dedup=false"
        )
    counts = ", ".join(f"{count:,} in {name}" for name, count in removed.items())
    sources.say(
        f"data.dedup: {len(together) - len(kept):,} of {len(together):,} training examples left"
        f" out, for their text occurs ({counts})"
    )
    ids = {example.id for example in kept}
    return [[example for example in examples if example.id in ids] for examples in given]


def held_out_of(data: config.Data) -> list[config.Source]:
    """What `load_train` reads beside the training sources."""
    return list(itertools.chain.from_iterable(_held_out(data).values()))


def without_texts(
    train: Sequence[Example], held_out: Mapping[str, Sequence[Example]]
) -> tuple[list[Example], dict[str, int]]:
    """The training examples whose text none of the held-out ones has, in order, and how many have a
    text of each held-out part.
    """
    shared = {
        name: set(sources.overlap(examples, train).same_text) for name, examples in held_out.items()
    }
    left_out = set().union(*shared.values())
    return [example for example in train if example.id not in left_out], {
        name: len(ids) for name, ids in shared.items()
    }


def _held_out(data: config.Data) -> dict[str, tuple[config.Source, ...]]:
    given = (
        {name: sources_of(getattr(data, name)) for name in ("validation", "test")}
        if data.dedup
        else {}
    )
    return {name: found for name, found in given.items() if found}
