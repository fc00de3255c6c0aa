"""Texts that training and held-out data share: reporting them per benchmark, and leaving them out of training (`data.dedup`)."""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Callable, Mapping, Sequence

from jaxre import config
from jaxre.errors import InputError
from jaxre.relations import sources
from jaxre.relations.schema import Example


def shared_texts(splits: Mapping[str, Sequence[Example]]) -> dict[tuple[str, str], sources.Overlap]:
    """What each two splits of a benchmark share: (first, second) -> the examples of the second whose text the first has."""
    return {(first, second): sources.overlap(splits[first], splits[second]) for first, second in itertools.combinations(splits, 2)}


def load_train(data: config.Data, load: Callable[[config.Source], list[Example]] = sources.load) -> list[Example]:
    """The training examples; with `data.dedup` without those whose text occurs in the validation or test data.

    Texts are equal but for white space, whatever pair is marked. How many are left out is logged.

    Args:
      load: a source of the config to its examples.
    Raises:
      InputError: as `load`; nothing left.
    """
    train = load(data.train)
    held_out = {name: load(source) for name, source in _held_out(data).items()}
    if not held_out:
        return train
    kept, removed = without_texts(train, held_out)
    if not kept:
        raise InputError(f"data.dedup: all {len(train):,} training examples have a text of {' or '.join(held_out)}; set data.dedup=false")
    counts = ", ".join(f"{count:,} in {name}" for name, count in removed.items())
    sources.say(f"data.dedup: {len(train) - len(kept):,} of {len(train):,} training examples left out, for their text occurs ({counts})")
    return kept


def without_texts(train: Sequence[Example], held_out: Mapping[str, Sequence[Example]]) -> tuple[list[Example], dict[str, int]]:
    """The training examples whose text none of the held-out ones has, in order, and how many have a text of each held-out part."""
    shared = {name: set(sources.overlap(examples, train).same_text) for name, examples in held_out.items()}
    left_out = set().union(*shared.values())
    return [example for example in train if example.id not in left_out], {name: len(ids) for name, ids in shared.items()}


def digest_of(data: config.Data, digest: Callable[[config.Source], str | None] = sources.digest_of) -> str | None:
    """Digest of what `load_train` reads: that of the training files, with `data.dedup` of the held-out ones and their settings too.

    None where a source has no local files to tell by.
    """
    held_out = _held_out(data)
    found = [digest(data.train), *(digest(source) for source in held_out.values())]
    if None in found or not held_out:
        return found[0] if not held_out else None
    settings = [(name, source.model_dump()) for name, source in held_out.items()]
    return hashlib.sha256(json.dumps([found, settings]).encode()).hexdigest()


def _held_out(data: config.Data) -> dict[str, config.Source]:
    given = {name: getattr(data, name) for name in ("validation", "test")} if data.dedup else {}
    return {name: source for name, source in given.items() if source is not None}
