"""Texts that training and held-out data share: reporting them per benchmark, and leaving them out of training (`data.dedup`)."""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Mapping, Sequence

from jaxre import config
from jaxre.errors import InputError
from jaxre.relations import mixtures, sources
from jaxre.relations.mixtures import Pool
from jaxre.relations.schema import Example


def shared_texts(splits: Mapping[str, Sequence[Example]]) -> dict[tuple[str, str], sources.Overlap]:
    """What each two splits of a benchmark share: (first, second) -> the examples of the second whose text the first has."""
    return {(first, second): sources.overlap(splits[first], splits[second]) for first, second in itertools.combinations(splits, 2)}


def read_train(data: config.Data) -> Pool:
    """What is trained on; with `data.dedup` without the examples whose text occurs in the validation or test data.

    Texts are equal but for white space, whatever pair is marked. How many are left out is logged.

    Raises:
      InputError: as `mixtures.read`; nothing left.
    """
    pool = mixtures.read(data.train, "data.train")
    held_out = {name: mixtures.load(given, f"data.{name}") for name, given in _held_out(data).items()}
    if not held_out:
        return pool
    train = [example for examples in pool.given for example in examples]
    kept, removed = without_texts(train, held_out)
    if not kept:
        raise InputError(f"data.dedup: all {len(train):,} training examples have a text of {' or '.join(held_out)}; set data.dedup=false")
    counts = ", ".join(f"{count:,} in {name}" for name, count in removed.items())
    sources.say(f"data.dedup: {len(train) - len(kept):,} of {len(train):,} training examples left out, for their text occurs ({counts})")
    return pool.only({example.id for example in kept})


def without_texts(train: Sequence[Example], held_out: Mapping[str, Sequence[Example]]) -> tuple[list[Example], dict[str, int]]:
    """The training examples whose text none of the held-out ones has, in order, and how many have a text of each held-out part."""
    shared = {name: set(sources.overlap(examples, train).same_text) for name, examples in held_out.items()}
    left_out = set().union(*shared.values())
    return [example for example in train if example.id not in left_out], {name: len(ids) for name, ids in shared.items()}


def digest_of(data: config.Data) -> str | None:
    """Digest of what `read_train` reads: the training files, with `data.dedup` the held-out ones and their settings too.

    None where a source has no local files to tell by.
    """
    held_out = _held_out(data)
    found = [one for given in (data.train, *held_out.values()) for one in mixtures.digests_of(given)]
    if None in found:
        return None
    return hashlib.sha256(json.dumps([found, [(name, given.model_dump()) for name, given in held_out.items()]]).encode()).hexdigest()


def _held_out(data: config.Data) -> dict[str, config.Source | config.Mixture]:
    given = {name: getattr(data, name) for name in ("validation", "test")} if data.dedup else {}
    return {name: one for name, one in given.items() if one is not None}
