"""Reads the examples of a config's `Source`: a benchmark (`benchmarks`), a file (`tables`) or a hub
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

# Seed of every limit in the study (protocol.md).
LIMIT_SEED = 42
FEW = 3  # ids listed in a notice

UNMAPPED = "examples are left out: the label map does not list their label"
SEVERAL = (
    "examples put a further label on a pair of the same text; each label is an example of its own"
)
ABSENT = "examples name an entity that is not in the text, so that no prompt can mark it"

logger = logging.getLogger(__name__)


def load(source: config.Source, labelled: bool = True) -> list[Example]:
    """The examples of a source, in its own order, after `part` and `limit`.

    `part` takes the examples whose id hashes into [start, end): [0, 0.9] and [0.9, 1] divide a
    split. It divides by example, so two pairs of one sentence can be in different parts
    (`overlap` counts them). `limit` then draws that many, by seed 42 and id. The reader's account
    of what it left out or changed is logged as warnings, each once in a process.

    Args:
      labelled: False accepts records without a relation (files and hub; relation "").
    Raises:
      InputError: unknown dataset or split, missing folder or file, an unusable record, ids that
        are not unique, a setting that this dataset does not have, no examples left.
    """
    reading = read(source, labelled)
    for line in notices(source, reading):
        say(line)
    examples = reading.examples
    counts = Counter(example.id for example in examples)
    if repeated := [identity for identity, count in counts.items() if count > 1]:
        raise InputError(
            f"{source.dataset}: id {repeated[0]!r} occurs twice; every example needs its own"
        )
    start, end = source.part
    selected = [example for example in examples if start <= fraction(example.id) < end]
    if not selected:
        split = f" split {source.split}" if source.split else ""
        raise InputError(
            f"{source.dataset}:{split} none of its {len(examples)} examples is left after"
            f" part={list(source.part)}; widen it"
        )
    return draw(selected, source.limit, LIMIT_SEED) if source.limit else selected


@functools.cache
def say(line: str) -> None:
    """Logs a line as a warning, once in a process."""
    logger.warning("%s", line)


_readings: contextvars.ContextVar[dict[str, Reading] | None] = contextvars.ContextVar(
    "readings", default=None
)


@contextlib.contextmanager
def remembered() -> Iterator[None]:
    """Context in which each source is read once, for every `part` and `limit` of it; its files must
    not change.
    """
    token = _readings.set({})
    try:
        yield
    finally:
        _readings.reset(token)


def read(source: config.Source, labelled: bool = True) -> Reading:
    """All examples of a source with mapped labels, before `part` and `limit`, and an account of
    left-out and unusual ones. As `load`.
    """
    readings = _readings.get()
    if readings is None:
        return _read_mapped(source, labelled)
    key = f"{labelled} {source.model_dump_json(exclude={'part', 'limit'})}"
    if key not in readings:
        readings[key] = _read_mapped(source, labelled)
    return readings[key]


def _read_mapped(source: config.Source, labelled: bool) -> Reading:
    reading = _read(source, labelled)
    examples, account = reading.examples, dict(reading.account)
    if source.label_map is not None:
        common = read_label_map(source.label_map).common
        # Examples without a label, as in data to be predicted, stay without.
        labels = [
            example.relation and common.get(normalise_label(example.relation))
            for example in examples
        ]
        pairs = list(zip(examples, labels, strict=True))
        account[UNMAPPED] = [example.id for example, label in pairs if label is None]
        examples = [
            dataclasses.replace(example, relation=label)
            for example, label in pairs
            if label is not None
        ]
    if source.dataset in BENCHMARKS or source.dataset.startswith(hub.PREFIX):
        account[SEVERAL] = further_labels(examples)
        account[ABSENT] = unlocated(examples)
    return Reading(examples, {reason: items for reason, items in account.items() if items})


def notices(source: config.Source, reading: Reading) -> list[str]:
    """One line per reason of the account."""
    place = "/".join(part for part in (source.dataset, source.subset, source.split) if part)
    return [
        f"{place}: {len(items):,} {reason}"
        f" ({', '.join(items[:FEW])}{', ...' if len(items) > FEW else ''})"
        for reason, items in reading.account.items()
    ]


def further_labels(examples: Iterable[Example]) -> list[str]:
    """Ids of the examples with the text and pair of an earlier example but another label: one
    prompt has several correct answers.
    """
    first: dict[tuple, str] = {}
    further = []
    for example in examples:
        pair = (example.text, example.head, example.tail, example.head_span, example.tail_span)
        if first.setdefault(pair, example.relation) != example.relation:
            further.append(example.id)
    return further


def digest_of(source: config.Source) -> str | None:
    """Digest of the bytes of a source's files; None for the hub, and if a file cannot be read
    (`load` reports the reason).
    """
    digest = hashlib.sha256()
    try:
        files = _files_of(source.dataset)
        if files and source.label_map:
            files.append(Path(source.label_map))
        for path in files:
            digest.update(f"{path.name} {path.stat().st_size}\n".encode())
            with path.open("rb") as file:
                digest.update(hashlib.file_digest(file, "sha256").digest())
    except OSError:
        return None
    return digest.hexdigest() if files else None


def _files_of(name: str) -> list[Path]:
    if tables.is_file(name):
        return [Path(name).expanduser()]
    if name in BENCHMARKS:
        return sorted(path for path in BENCHMARKS[name].path.rglob("*") if path.is_file())
    return []


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
    """Ids of the examples of a second split whose text, or text and pair, is in the first too."""

    same_text: tuple[str, ...]
    same_pair: tuple[str, ...]

    def __bool__(self) -> bool:
        return bool(self.same_text)


def overlap(first: Iterable[Example], second: Iterable[Example]) -> Overlap:
    """Examples of `second` whose text occurs in `first`: a leak between training and test data.

    White space in texts is ignored. Pairs are equal when both entities begin at the same places, in
    the same direction; where a span is unknown, when they are spelled the same.
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


def _same_pair(first: Example, second: Example) -> bool:
    places = _pair_places(first), _pair_places(second)
    if None not in places:
        return places[0] == places[1]
    return squeezed(first.head) == squeezed(second.head) and squeezed(first.tail) == squeezed(
        second.tail
    )


def _pair_places(example: Example) -> list[int] | None:
    """Start of head and tail in characters other than white space; None if a span is unknown."""
    spans = example.head_span, example.tail_span
    if None in spans:
        return None
    return [len(squeezed(example.text[:start])) for start, _ in spans]


def unlocated(examples: Iterable[Example]) -> list[str]:
    """Ids of the examples whose head or tail is not in the text, so that no prompt can mark it."""
    return [
        e.id for e in examples if None in locate(e.text, e.head, e.tail, e.head_span, e.tail_span)
    ]
