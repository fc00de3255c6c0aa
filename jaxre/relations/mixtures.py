"""Mixes several sources into one training set, deterministically (study: protocol, Training:
GenTune, LitTune, MixTune).

    pool = read(config.data.train, "data.train")
    pool.examples                                   # the training examples, in order
    [(count.source, count.read, count.used) for count in pool.counts]

- `balance: none` (GenTune, LitTune): the sources are pooled and shuffled with seed 42.
- `balance: domains` (MixTune): the general examples are shuffled with seed 42, the literary ones
  with 43; the same number of both, that of the smaller domain, is shuffled with 44. (The study's
  published code shuffles each domain twice with its seed.)
- `limit`: if there are more examples, they are shuffled with seed 42 and the first are taken.

A shuffle is NumPy's `default_rng(seed).permutation`, as in `datasets.Dataset.shuffle(seed)`.
"""

from __future__ import annotations

import functools
import itertools
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from jaxre.config import Mixture, Source
from jaxre.errors import InputError
from jaxre.relations import sources
from jaxre.relations.hub import PREFIX
from jaxre.relations.schema import ANY, Example, by_dataset

SEED = 42
DOMAINS = ("general", "literary")


@dataclass(frozen=True)
class Count:
    """A source, its number of examples (after its own part and limit), and how many of them are
    used.
    """

    source: str
    domain: str
    read: int
    used: int


@dataclass(frozen=True)
class Pool:
    """The examples of each source, and the order in which examples are used, as indices into all of
    them (None: all in their own order).

    one: True if the config names a source, not a mixture; that source is then the run's only
    dataset, regardless of its name.
    """

    sources: tuple[Source, ...]
    given: tuple[list[Example], ...]
    order: np.ndarray | None
    one: bool

    @functools.cached_property
    def examples(self) -> list[Example]:
        """The used examples, in order."""
        examples = list(itertools.chain.from_iterable(self.given))
        return examples if self.order is None else [examples[i] for i in self.order.tolist()]

    @functools.cached_property
    def by_dataset(self) -> dict[str, list[Example]]:
        """All examples of each dataset, used or not, as the origin of labels and demonstrations."""
        examples = list(itertools.chain.from_iterable(self.given))
        return {ANY: examples} if self.one else by_dataset(examples)

    @property
    def counts(self) -> tuple[Count, ...]:
        """The count of each source."""
        sizes = list(map(len, self.given))
        owners = np.repeat(np.arange(len(sizes)), sizes)
        if self.order is not None:
            owners = owners[self.order]
        used = np.bincount(owners, minlength=len(sizes)).tolist()
        return tuple(
            Count(
                described_source(source),
                "+".join(sorted({example.domain for example in examples})),
                len(examples),
                count,
            )
            for source, examples, count in zip(self.sources, self.given, used, strict=True)
        )


def load_all(parts: Sequence[Source]) -> list[list[Example]]:
    """The examples of each source. Raises InputError as `sources.load`."""
    return [sources.load(source) for source in parts]


def read(
    data: Source | Mixture,
    place: str,
    load: Callable[[Sequence[Source]], list[list[Example]]] = load_all,
) -> Pool:
    """Reads the sources and mixes them.

    Args:
      place: config key of the data, for errors.
      load: returns the examples of each source.

    Raises:
      InputError: as `sources.load`; an example that two sources have; two files of one name, or a
        file and a benchmark; `balance: domains` without examples of both domains.
    """
    _check_names(sources_of(data), place)
    given = tuple(load(sources_of(data)))
    if isinstance(data, Source):
        return Pool((data,), given, None, one=True)
    examples = list(itertools.chain.from_iterable(given))
    counts = Counter(example.id for example in examples)
    if repeated := [identity for identity, count in counts.items() if count > 1]:
        raise InputError(
            f"{place}: {len(repeated)} examples are in two of its sources (first {repeated[0]});"
            " take one of them out, or set part"
        )
    if data.balance == "domains":
        order = _balanced([example.domain for example in examples], place)
    else:
        order = _shuffled(len(examples), SEED)
    if data.limit is not None and data.limit < len(order):
        order = order[_shuffled(len(order), SEED)[: data.limit]]
    return Pool(data.sources, given, order, one=False)


def _check_names(parts: Sequence[Source], place: str) -> None:
    """Refuses two files of one name, or a file and a benchmark: they would be one dataset, with the
    labels and demonstrations of both.
    """
    paths: dict[str, Path] = {}
    for source in parts:
        if source.dataset.startswith(PREFIX):
            continue
        path = Path(source.dataset).expanduser()
        first = paths.setdefault(path.stem, path)
        if first.resolve() != path.resolve():
            raise InputError(
                f"{place}: {first} and {path} would be one dataset, {path.stem}, as a dataset has"
                " the name of its file; rename one"
            )


def _balanced(domains: Sequence[str], place: str) -> np.ndarray:
    """Indices of the same number of examples of each domain, mixed."""
    unknown = sorted(set(domains) - set(DOMAINS))
    if unknown:
        raise InputError(
            f"{place}: balance=domains: {unknown[0]!r} is no domain; write {' or '.join(DOMAINS)}"
        )
    members = [np.flatnonzero(np.array(domains) == domain) for domain in DOMAINS]
    for domain, indices in zip(DOMAINS, members, strict=True):
        if not len(indices):
            raise InputError(
                f"{place}: balance=domains needs examples of both domains, none is {domain}; add"
                " such a source, or set none"
            )
    count = min(map(len, members))
    drawn = [
        indices[_shuffled(len(indices), SEED + number)[:count]]
        for number, indices in enumerate(members)
    ]
    return np.concatenate(drawn)[_shuffled(2 * count, SEED + 2)]


def _shuffled(count: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).permutation(count)


def load(data: Source | Mixture, place: str) -> list[Example]:
    """The examples of a source or mixture, in order. Raises InputError as `read`."""
    return read(data, place).examples


def sources_of(data: Source | Mixture | None) -> tuple[Source, ...]:
    """The sources of a config's training, validation or test data; empty for None."""
    if data is None:
        return ()
    return data.sources if isinstance(data, Mixture) else (data,)


def digests_of(data: Source | Mixture | None) -> list[str | None]:
    """`sources.digest_of` each source."""
    return [sources.digest_of(source) for source in sources_of(data)]


def name_of(data: Source | Mixture) -> str:
    """Name of the training data in predictions: the mixture's name, else its datasets."""
    if isinstance(data, Mixture) and data.name:
        return data.name
    return "+".join(dict.fromkeys(source.dataset for source in sources_of(data)))


def described_source(source: Source) -> str:
    """Short description of a source, such as `gids/train` or the name of a file."""
    name = Path(source.dataset).name if Path(source.dataset).suffix else source.dataset
    return "/".join(part for part in (name, source.subset, source.split) if part)
