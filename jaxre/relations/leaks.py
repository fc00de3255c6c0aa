"""Removes training examples whose texts are also in held-out data (`data.dedup`)."""

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

    Texts are compared without white space, regardless of the marked pair. The number of removed
    examples is logged.

    Raises:
      InputError: as `sources.load`; no example left.
    """
    loaded = load_all(train)
    held_out = {
        name: list(itertools.chain.from_iterable(load_all(parts)))
        for name, parts in _held_out(data).items()
    }
    if not held_out:
        return loaded
    examples = list(itertools.chain.from_iterable(loaded))
    remaining, removed = without_texts(examples, held_out)
    if not remaining:
        raise InputError(
            f"data.dedup: all {len(examples):,} training examples have a text of"
            f" {' or '.join(held_out)}; set data.dedup=false"
        )
    counts = ", ".join(f"{count:,} in {name}" for name, count in removed.items())
    sources.say(
        f"data.dedup: {len(examples) - len(remaining):,} of {len(examples):,} training examples"
        f" left out, for their text occurs ({counts})"
    )
    ids = {example.id for example in remaining}
    return [[example for example in part if example.id in ids] for part in loaded]


def held_out_of(data: config.Data) -> list[config.Source]:
    """The sources that `load_train` reads in addition to the training sources."""
    return list(itertools.chain.from_iterable(_held_out(data).values()))


def without_texts(
    train: Sequence[Example], held_out: Mapping[str, Sequence[Example]]
) -> tuple[list[Example], dict[str, int]]:
    """The training examples whose text is in no held-out part, in order, and for each part the
    number of training examples with one of its texts.
    """
    shared = {
        name: set(sources.overlap(examples, train).same_text) for name, examples in held_out.items()
    }
    left_out = set().union(*shared.values())
    return [example for example in train if example.id not in left_out], {
        name: len(ids) for name, ids in shared.items()
    }


def _held_out(data: config.Data) -> dict[str, tuple[config.Source, ...]]:
    parts = {"validation": sources_of(data.validation), "test": sources_of(data.test)}
    return {name: part for name, part in parts.items() if part and data.dedup}
