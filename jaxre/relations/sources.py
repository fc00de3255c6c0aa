"""A `Source` of the config to its examples: the one place that knows which dataset is read how."""

from __future__ import annotations

import hashlib
from collections import Counter, defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from jaxre import config
from jaxre.errors import InputError
from jaxre.relations import conll04, hub, semeval, tables
from jaxre.relations.draws import draw, fraction
from jaxre.relations.files import nearest, split_file
from jaxre.relations.marks import locate
from jaxre.relations.schema import Example

FACTS = "facts"
BENCHMARKS = (FACTS, semeval.NAME, conll04.UNIFIED, conll04.MULTIHEAD)

# The study's seed of every cap (protocol.md).
LIMIT_SEED = 42


def load(source: config.Source, labelled: bool = True) -> list[Example]:
    """The examples of a source, in its own order, after `part` and `limit`.

    `part` takes the examples whose id hashes into [start, end): [0, 0.9] and [0.9, 1] divide a
    split. It goes by example, so two pairs of one sentence can land on different sides
    (`overlap` tells). `limit` then draws that many, by seed 42 and id.

    Args:
      source: what to read.
      labelled: False lets records without a relation through (files and hub; relation "").
    Raises:
      InputError: unknown dataset or split, missing folder or file, a record that cannot be used,
        ids that are not unique, a setting that this dataset does not have, nothing left.
    """
    examples = _read(source, labelled)
    twice = [name for name, count in Counter(example.id for example in examples).items() if count > 1]
    if twice:
        raise InputError(f"{source.dataset}: id {twice[0]!r} occurs twice; every example needs its own")
    start, end = source.part
    kept = [example for example in examples if start <= fraction(example.id) < end]
    if not kept:
        split = f" split {source.split}" if source.split else ""
        raise InputError(f"{source.dataset}:{split} none of its {len(examples)} examples is left after part={list(source.part)}; widen it")
    return draw(kept, source.limit, LIMIT_SEED) if source.limit else kept


def digest_of(source: config.Source) -> str | None:
    """Digest of the bytes of the files that a source is read from; None for the hub, and where one cannot be read (`load` says why)."""
    try:
        return _digest_of_files(_files_of(source.dataset))
    except OSError:
        return None


def _files_of(name: str) -> list[Path]:
    if Path(name).suffix.lower() in tables.SUFFIXES:
        return [Path(name).expanduser()]
    if name == FACTS:
        return sorted(config.shipped("corpus").glob("*.jsonl"))
    if name in BENCHMARKS:
        folder = config.data_root() / (semeval.NAME if name == semeval.NAME else conll04.UNIFIED)
        return sorted(path for path in folder.rglob("*") if path.is_file())
    return []


def _digest_of_files(files: list[Path]) -> str | None:
    digest = hashlib.sha256()
    for path in files:
        digest.update(f"{path.name} {path.stat().st_size}\n".encode())
        with path.open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest() if files else None


def _read(source: config.Source, labelled: bool) -> list[Example]:
    name, split = source.dataset, source.split
    is_hub, is_file = name.startswith(hub.PREFIX), Path(name).suffix.lower() in tables.SUFFIXES
    if source.subset and not is_hub:
        raise InputError(f"{name}: only a hub dataset has a subset; remove subset={source.subset}")
    if source.columns and not (is_hub or is_file):
        raise InputError(f"{name}: only a file or a hub dataset has columns; remove columns")
    if is_hub:
        return hub.read_hub(name.removeprefix(hub.PREFIX), split, source.subset, source.columns, labelled, source.columns_key)
    if is_file:
        if split is not None:
            raise InputError(f"{name}: a file has no splits; remove split={split} and give each split its own file")
        return tables.read_table(Path(name).expanduser(), source.columns, labelled=labelled, key=source.columns_key)
    if name == FACTS:
        folder = config.shipped("corpus")
        files = {path.stem: path.name for path in sorted(folder.glob("*.jsonl"))}
        if not files:
            raise InputError(f"{folder}: the shipped corpus is missing; install jaxre again")
        return tables.read_table(split_file(folder, FACTS, split, files), dataset=FACTS, split=split)
    if name == semeval.NAME:
        return semeval.read_semeval(config.data_root() / semeval.NAME, split)
    if name == conll04.UNIFIED:
        return conll04.read_conll04(config.data_root() / conll04.UNIFIED, split, source.negatives)
    if name == conll04.MULTIHEAD:
        return conll04.read_conll04_multihead(config.data_root() / conll04.UNIFIED, split, source.negatives)
    if Path(name).exists():
        raise InputError(f"{name}: unknown kind of file; convert it to one of {', '.join(tables.SUFFIXES)}")
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
    """Examples of `second` whose text occurs in `first`: a leak, if one is trained on and the other tested.

    Texts are equal but for white space. Pairs are equal when both entities begin at the same
    places, in the same direction; where a span is unknown, when they are spelled the same.
    """
    by_text = defaultdict(list)
    for example in first:
        by_text[_squeezed(example.text)].append(example)
    same_text, same_pair = [], []
    for example in second:
        twins = by_text.get(_squeezed(example.text))
        if not twins:
            continue
        same_text.append(example.id)
        if any(_same_pair(example, twin) for twin in twins):
            same_pair.append(example.id)
    return Overlap(tuple(same_text), tuple(same_pair))


def _squeezed(text: str) -> str:
    return "".join(text.split())


def _same_pair(one: Example, other: Example) -> bool:
    places = _pair_places(one), _pair_places(other)
    if None not in places:
        return places[0] == places[1]
    return (_squeezed(one.head), _squeezed(one.tail)) == (_squeezed(other.head), _squeezed(other.tail))


def _pair_places(example: Example) -> tuple[int, int] | None:
    """Where head and tail begin, in characters other than white space; None if a span is unknown."""
    if example.head_span is None or example.tail_span is None:
        return None
    return len(_squeezed(example.text[: example.head_span[0]])), len(_squeezed(example.text[: example.tail_span[0]]))


def unlocated(examples: Iterable[Example]) -> list[str]:
    """Ids of examples whose head or tail cannot be found in the text, so that a prompt cannot mark it."""
    return [e.id for e in examples if None in locate(e.text, e.head, e.tail, e.head_span, e.tail_span)]
