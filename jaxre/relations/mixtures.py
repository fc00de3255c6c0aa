"""Several sources as one training set, deterministically (study: protocol, Training: GenTune,
LitTune, MixTune).

    pool = read(config.data.train, "data.train")
    pool.examples                                   # what is trained on, in order
    [(one.source, one.read, one.used) for one in pool.counts]

- `balance: none` (GenTune, LitTune): the sources are pooled and shuffled with seed 42.
- `balance: domains` (MixTune): the general examples are shuffled with seed 42, the literary ones
  with 43, of both as many are taken as the smaller has, and these are shuffled with 44. (The
  study's published code shuffles each domain twice with its seed.)
- `limit`: where there are more, they are shuffled with seed 42 and the first are taken.

A shuffle is NumPy's `default_rng(seed).permutation`, as that of `datasets.Dataset.shuffle(seed)`.
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
    """A source, how many examples it gave (after its own part and limit), and how many of them are
    used.
    """

    source: str
    domain: str
    read: int
    used: int


@dataclass(frozen=True)
class Pool:
    """What each source gave, and which examples of all, numbered through, are used in which order
    (None: all as they are).

    one: whether the config names a source, not a mixture; then whatever it is called is the run's
    only dataset.
    """

    sources: tuple[Source, ...]
    given: tuple[list[Example], ...]
    order: np.ndarray | None
    one: bool

    @functools.cached_property
    def examples(self) -> list[Example]:
        """What is used, in order."""
        examples = list(itertools.chain.from_iterable(self.given))
        return (
            examples if self.order is None else [examples[place] for place in self.order.tolist()]
        )

    @functools.cached_property
    def by_dataset(self) -> dict[str, list[Example]]:
        """All examples of each dataset, used or not: its labels and demonstrations come from
        these.
        """
        examples = list(itertools.chain.from_iterable(self.given))
        return {ANY: examples} if self.one else by_dataset(examples)

    @property
    def counts(self) -> tuple[Count, ...]:
        """One for each source."""
        sizes = list(map(len, self.given))
        owners = np.repeat(np.arange(len(sizes)), sizes)
        used = np.bincount(
            owners if self.order is None else owners[self.order], minlength=len(sizes)
        ).tolist()
        domains = [
            "+".join(sorted({example.domain for example in examples})) for examples in self.given
        ]
        return tuple(
            itertools.starmap(
                Count, zip(map(told_source, self.sources), domains, sizes, used, strict=True)
            )
        )


def load_all(given: Sequence[Source]) -> list[list[Example]]:
    """The examples of each source. Raises InputError as `sources.load`."""
    return [sources.load(source) for source in given]


def read(
    data: Source | Mixture,
    place: str,
    load: Callable[[Sequence[Source]], list[list[Example]]] = load_all,
) -> Pool:
    """Reads the sources and mixes them.

    Args:
      place: what the config calls it, for errors.
      load: gives the examples of each source.

    Raises:
      InputError: as `sources.load`; an example that two sources have; two files of one name, or a
        file and a benchmark; `balance: domains` without examples of both domains.
    """
    _check_names(sources_of(data), place)
    given = tuple(load(sources_of(data)))
    if isinstance(data, Source):
        return Pool((data,), given, None, one=True)
    twice = [
        name
        for name, count in Counter(e.id for examples in given for e in examples).items()
        if count > 1
    ]
    if twice:
        raise InputError(
            f"{place}: {len(twice)} examples are in two of its sources (first {twice[0]}); take one"
            " of them out, or set part"
        )
    domains = [example.domain for examples in given for example in examples]
    order = (
        _balanced(domains, place) if data.balance == "domains" else _shuffled(len(domains), SEED)
    )
    if data.limit is not None and data.limit < len(order):
        order = order[_shuffled(len(order), SEED)[: data.limit]]
    return Pool(data.sources, given, order, one=False)


def _check_names(given: Sequence[Source], place: str) -> None:
    """Two files of one name, or a file and a benchmark, would be one dataset, with the labels and
    demonstrations of both.
    """
    named: dict[str, Path] = {}
    for path in (
        Path(source.dataset).expanduser()
        for source in given
        if not source.dataset.startswith(PREFIX)
    ):
        first = named.setdefault(path.stem, path)
        if first.resolve() != path.resolve():
            raise InputError(
                f"{place}: {first} and {path} would be one dataset, {path.stem}, as a dataset is"
                " called as its file; rename one"
            )


def _balanced(domains: Sequence[str], place: str) -> np.ndarray:
    """Places of as many examples of each domain, mixed."""
    strange = sorted(set(domains) - set(DOMAINS))
    if strange:
        raise InputError(
            f"{place}: balance=domains: {strange[0]!r} is no domain; write {' or '.join(DOMAINS)}"
        )
    members = [np.flatnonzero(np.array(domains) == domain) for domain in DOMAINS]
    for domain, found in zip(DOMAINS, members, strict=True):
        if not len(found):
            raise InputError(
                f"{place}: balance=domains needs examples of both domains, none is {domain}; add"
                " such a source, or set none"
            )
    count = min(map(len, members))
    drawn = [found[_shuffled(len(found), SEED + n)[:count]] for n, found in enumerate(members)]
    return np.concatenate(drawn)[_shuffled(2 * count, SEED + 2)]


def _shuffled(count: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).permutation(count)


def load(data: Source | Mixture, place: str) -> list[Example]:
    """The examples of a source or mixture, in order. Raises InputError as `read`."""
    return read(data, place).examples


def sources_of(data: Source | Mixture | None) -> tuple[Source, ...]:
    """The sources of what a config gives: none, one or several."""
    if data is None:
        return ()
    return data.sources if isinstance(data, Mixture) else (data,)


def digests_of(data: Source | Mixture | None) -> list[str | None]:
    """`sources.digest_of` each source."""
    return [sources.digest_of(source) for source in sources_of(data)]


def name_of(data: Source | Mixture) -> str:
    """What predictions say that a model was tuned on: the mixture's name, else its datasets."""
    if isinstance(data, Mixture) and data.name:
        return data.name
    return "+".join(dict.fromkeys(source.dataset for source in sources_of(data)))


def told_source(source: Source) -> str:
    """A source for a reader: `gids/train`, or the name of a file."""
    name = Path(source.dataset).name if Path(source.dataset).suffix else source.dataset
    return "/".join(part for part in (name, source.subset, source.split) if part)
