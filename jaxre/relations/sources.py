"""A `Source` of the config to its examples: a benchmark (`benchmarks`), a file (`tables`) or a hub
dataset (`hub`).
"""

from __future__ import annotations

import contextlib
import contextvars
import dataclasses
import functools
import hashlib
import logging
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from jaxre import config
from jaxre.errors import InputError
from jaxre.relations import hub, tables
from jaxre.relations.benchmarks import BENCHMARKS
from jaxre.relations.draws import draw, fraction
from jaxre.relations.files import nearest
from jaxre.relations.label_map import read_label_map
from jaxre.relations.marks import locate, squeezed
from jaxre.relations.schema import Example, Reading, normalise_label

# The study's seed of every cap (protocol.md).
LIMIT_SEED = 42
FEW = 3  # ids that a report names

UNMAPPED = "examples are left out: the label map does not list their label"
SEVERAL = (
    "examples put a further label on a pair of the same text; each label is an example of its own"
)
ABSENT = "examples name an entity that does not stand in the text, so that no prompt can mark it"

logger = logging.getLogger(__name__)


def load(source: config.Source, labelled: bool = True) -> list[Example]:
    """The examples of a source, in its own order, after `part` and `limit`.

    `part` takes the examples whose id hashes into [start, end): [0, 0.9] and [0.9, 1] divide a
    split. It goes by example, so two pairs of one sentence can land on different sides
    (`overlap` tells). `limit` then draws that many, by seed 42 and id. What the reader left out
    or changed is logged as warnings, each once in a process.

    Args:
      source: what to read.
      labelled: False lets records without a relation through (files and hub; relation "").
    Raises:
      InputError: unknown dataset or split, missing folder or file, a record that cannot be used,
        ids that are not unique, a setting that this dataset does not have, nothing left.
    """
    found = read(source, labelled)
    for line in told(source, found):
        say(line)
    examples = found.examples
    twice = [
        name for name, count in Counter(example.id for example in examples).items() if count > 1
    ]
    if twice:
        raise InputError(
            f"{source.dataset}: id {twice[0]!r} occurs twice; every example needs its own"
        )
    start, end = source.part
    kept = [example for example in examples if start <= fraction(example.id) < end]
    if not kept:
        split = f" split {source.split}" if source.split else ""
        raise InputError(
            f"{source.dataset}:{split} none of its {len(examples)} examples is left after"
            f" part={list(source.part)}; widen it"
        )
    return draw(kept, source.limit, LIMIT_SEED) if source.limit else kept


@functools.cache
def say(line: str) -> None:
    """Logs a line as a warning, once in a process."""
    logger.warning("%s", line)


_kept: contextvars.ContextVar[dict[str, Reading] | None] = contextvars.ContextVar(
    "kept", default=None
)


@contextlib.contextmanager
def remembered() -> Iterator[None]:
    """While this is entered, a source is read once, whatever `part` and `limit` of it are asked
    for; its files must not change.
    """
    token = _kept.set({})
    try:
        yield
    finally:
        _kept.reset(token)


def read(source: config.Source, labelled: bool = True) -> Reading:
    """All examples of a source with their labels mapped, before `part` and `limit`, and what was
    left out or is odd. As `load`.
    """
    kept, key = _kept.get(), f"{labelled} {source.model_dump_json(exclude={'part', 'limit'})}"
    if kept is None:
        return _read_mapped(source, labelled)
    if key not in kept:
        kept[key] = _read_mapped(source, labelled)
    return kept[key]


def _read_mapped(source: config.Source, labelled: bool) -> Reading:
    found = _read(source, labelled)
    examples, account = found.examples, dict(found.account)
    if source.label_map is not None:
        common = read_label_map(source.label_map).common
        # What has no label, as of data to be predicted, stays so.
        mapped = [
            (example, example.relation and common.get(normalise_label(example.relation)))
            for example in examples
        ]
        examples = [
            dataclasses.replace(example, relation=label)
            for example, label in mapped
            if label is not None
        ]
        account[UNMAPPED] = [example.id for example, label in mapped if label is None]
    if source.dataset in BENCHMARKS or source.dataset.startswith(hub.PREFIX):
        account[SEVERAL] = further_labels(examples)
        account[ABSENT] = unlocated(examples)
    return Reading(examples, {reason: items for reason, items in account.items() if items})


def told(source: config.Source, found: Reading) -> list[str]:
    """One line per reason of the account."""
    place = "/".join(part for part in (source.dataset, source.subset, source.split) if part)
    return [
        f"{place}: {len(items):,} {reason}"
        f" ({', '.join(items[:FEW])}{', ...' if len(items) > FEW else ''})"
        for reason, items in found.account.items()
    ]


def further_labels(examples: Iterable[Example]) -> list[str]:
    """Ids of the examples whose text and pair an earlier example has with another label: one
    prompt, several right answers.
    """
    first: dict[tuple, str] = {}
    further = []
    for example in examples:
        pair = (example.text, example.head, example.tail, example.head_span, example.tail_span)
        if first.setdefault(pair, example.relation) != example.relation:
            further.append(example.id)
    return further


def digest_of(source: config.Source) -> str | None:
    """Digest of the bytes of the files that a source is read from; None for the hub, and where one
    cannot be read (`load` says why).
    """
    try:
        files = _files_of(source.dataset)
        return _digest_of_files(
            [*files, Path(source.label_map)] if files and source.label_map else files
        )
    except OSError:
        return None


def _files_of(name: str) -> list[Path]:
    if tables.is_file(name):
        return [Path(name).expanduser()]
    if name in BENCHMARKS:
        return sorted(path for path in BENCHMARKS[name].path.rglob("*") if path.is_file())
    return []


def _digest_of_files(files: list[Path]) -> str | None:
    digest = hashlib.sha256()
    for path in files:
        digest.update(f"{path.name} {path.stat().st_size}\n".encode())
        with path.open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest() if files else None


def _read(source: config.Source, labelled: bool) -> Reading:
    name, split = source.dataset, source.split
    is_hub, is_file = name.startswith(hub.PREFIX), tables.is_file(name)
    if source.subset and not is_hub:
        raise InputError(f"{name}: only a hub dataset has a subset; remove subset={source.subset}")
    if source.columns and not (is_hub or is_file):
        raise InputError(f"{name}: only a file or a hub dataset has columns; remove columns")
    if is_hub:
        return hub.read_hub(source, labelled)
    if is_file:
        if split is not None:
            raise InputError(
                f"{name}: a file has no splits; remove split={split} and give each split its own"
                " file"
            )
        return Reading(
            tables.read_table(
                Path(name).expanduser(), source.columns, labelled=labelled, key=source.columns_key
            )
        )
    if name in BENCHMARKS:
        return BENCHMARKS[name].read(BENCHMARKS[name].path, source)
    if Path(name).exists():
        raise InputError(
            f"{name}: unknown kind of file; convert it to one of {', '.join(tables.SUFFIXES)}"
        )
    raise InputError(
        f"{name}: no such dataset; the nearest is {nearest(name, BENCHMARKS)} "
        f"(or a file ending in {', '.join(tables.SUFFIXES)}, or {hub.PREFIX}OWNER/NAME)"
    )


@dataclass(frozen=True)
class Overlap:
    """What two splits share: ids of the second whose text, or text and pair, the first has too."""

    same_text: tuple[str, ...]
    same_pair: tuple[str, ...]

    def __bool__(self) -> bool:
        return bool(self.same_text)


def overlap(first: Iterable[Example], second: Iterable[Example]) -> Overlap:
    """Examples of `second` whose text occurs in `first`: a leak, if one is trained on and the other
    tested.

    Texts are equal but for white space. Pairs are equal when both entities begin at the same
    places, in the same direction; where a span is unknown, when they are spelled the same.
    """
    by_text = defaultdict(list)
    for example in first:
        by_text[squeezed(example.text)].append(example)
    same_text, same_pair = [], []
    for example in second:
        twins = by_text.get(squeezed(example.text))
        if not twins:
            continue
        same_text.append(example.id)
        if any(_same_pair(example, twin) for twin in twins):
            same_pair.append(example.id)
    return Overlap(tuple(same_text), tuple(same_pair))


def _same_pair(one: Example, other: Example) -> bool:
    places = _pair_places(one), _pair_places(other)
    if None not in places:
        return places[0] == places[1]
    return (squeezed(one.head), squeezed(one.tail)) == (squeezed(other.head), squeezed(other.tail))


def _pair_places(example: Example) -> tuple[int, int] | None:
    """Where head and tail begin, in characters other than white space; None if a span is
    unknown.
    """
    if example.head_span is None or example.tail_span is None:
        return None
    return len(squeezed(example.text[: example.head_span[0]])), len(
        squeezed(example.text[: example.tail_span[0]])
    )


def unlocated(examples: Iterable[Example]) -> list[str]:
    """Ids of examples whose head or tail cannot be found in the text, so that a prompt cannot mark
    it.
    """
    return [
        e.id for e in examples if None in locate(e.text, e.head, e.tail, e.head_span, e.tail_span)
    ]
