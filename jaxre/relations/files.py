"""Text files of a benchmark: finds the file of a split and reads it, with errors that name the
line.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

from jaxre.errors import InputError
from jaxre.relations.marks import is_text


def nearest(name: str, known: Collection[str]) -> str:
    """The most similar of the `known` names, of which there must be at least one."""
    return max(
        sorted(known),
        key=lambda other: difflib.SequenceMatcher(None, name.lower(), other.lower()).ratio(),
    )


def read_text(path: Path) -> str:
    """A whole UTF-8 file, without a byte order mark, line ends as they are.

    Raises:
      InputError: no such file, an unreadable or empty one, bytes that are not UTF-8 (names the
        line).
    """
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        raise InputError(f"{path}: no such file; correct the path") from None
    except OSError as error:
        raise InputError(
            f"{path}: cannot be read: {error.strerror}; give a file that you may read"
        ) from None
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise InputError(
            f"{path}:{line}: byte 0x{content[error.start]:02x} is not UTF-8; save the file as UTF-8"
        ) from None
    if not text.strip():
        raise InputError(f"{path}: the file is empty; give one with records")
    return text


def read_lines(path: Path) -> list[str]:
    """The lines of `read_text` without their LF or CRLF; a final line end adds no line.

    Only LF ends a line: `str.splitlines` would also break at U+2028 or U+0085 inside a sentence.
    """
    lines = [line.removesuffix("\r") for line in read_text(path).split("\n")]
    return lines if lines[-1] else lines[:-1]


Record = tuple[str, dict[str, Any]]  # place for errors, values by name


def json_array(path: Path, kind: str) -> Iterator[Record]:
    """The objects of a JSON array, with the place `path: kind NUMBER` (from 0).

    Raises:
      InputError: as `read_text`; invalid JSON (names the line), no array, an element that is not
        an object or contains half a surrogate pair.
    """
    try:
        array = json.loads(read_text(path))
    except json.JSONDecodeError as error:
        raise InputError(
            f"{path}:{error.lineno}: not valid JSON: {error.msg}; download it again"
        ) from None
    except RecursionError:
        raise InputError(f"{path}: nested too deep; download it again") from None
    if not isinstance(array, list):
        raise InputError(f"{path}: not an array of {kind}s; download it again")
    for number, record in enumerate(array):
        yield _object(f"{path}: {kind} {number}", record)


def json_lines(path: Path) -> Iterator[Record]:
    """The objects of a JSON Lines file, with the place `path:line`. Empty lines are skipped.

    Raises:
      InputError: as `read_text`; a line that is not a JSON object or contains half a surrogate pair
        (names the line).
    """
    for number, line in enumerate(read_lines(path), start=1):
        if line.strip():
            try:
                record = json.loads(line)
            except (json.JSONDecodeError, RecursionError):
                raise InputError(f"{path}:{number}: not valid JSON; download it again") from None
            yield _object(f"{path}:{number}", record)


def _object(place: str, record: Any) -> Record:
    if not isinstance(record, dict):
        raise InputError(f"{place}: not a JSON object; download it again")
    if not is_text(json.dumps(record, ensure_ascii=False)):
        raise InputError(f"{place}: holds half a surrogate pair; correct its escapes")
    return place, record


def nonempty_string(value: object) -> str:
    """Returns the value. Raises TypeError unless it is a string with characters."""
    if not isinstance(value, str) or not value:
        raise TypeError
    return value


def check_split(dataset: str, split: str | None, splits: Collection[str]) -> str:
    """Returns `split`. Raises InputError, listing the splits, if there is no such split."""
    if split not in splits:
        problem = "no split given" if split is None else f"no split {split!r}"
        raise InputError(f"{dataset}: {problem}; choose one of {', '.join(splits)}")
    return split


def split_file(folder: Path, dataset: str, split: str | None, files: Mapping[str, str]) -> Path:
    """The file of a split, at any depth below `folder` (releases unpack to different depths).

    Args:
      folder: where the benchmark was unpacked.
      dataset: its name, for errors.
      split: one of the keys of `files`.
      files: split -> file name.
    Raises:
      InputError: unknown split; no folder; no such file below it, or more than one.
    """
    name = files[check_split(dataset, split, files)]
    check_folder(folder, dataset)
    paths = sorted(folder.rglob(name))
    if len(paths) != 1:
        problem = f"{len(paths)} files {name} below it" if paths else f"no {name} below it"
        raise InputError(
            f"{folder}: {problem} (benchmark {dataset}, split {split}); it must hold exactly one"
        )
    return paths[0]


def check_folder(folder: Path, dataset: str) -> None:
    """Raises InputError if the folder of a benchmark does not exist."""
    if not folder.is_dir():
        raise InputError(
            f"{folder}: no such folder (benchmark {dataset}); set JAXRE_DATA to the folder that"
            f" holds {folder.name}/"
        )
