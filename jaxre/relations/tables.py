"""Reads any JSON Lines, CSV or Parquet file as examples, with a column mapping (see `columns`).

    dataset: data/dev.csv
    columns: {head: entity1, tail: entity2, relation: label}

Values stay as written: "no", "NA", "null" and 1 are labels; no value becomes missing or a boolean.
A file is one split. CSV has a header and commas; quotes as in RFC 4180.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterator
from pathlib import Path

from jaxre.errors import InputError
from jaxre.relations.columns import KEY, Columns, read_records, resolve
from jaxre.relations.files import Record, read_lines, read_text
from jaxre.relations.schema import Example

SUFFIXES = (".jsonl", ".csv", ".parquet")


def is_file(dataset: str) -> bool:
    """True if the dataset of a config is a file."""
    return Path(dataset).suffix.lower() in SUFFIXES


def read_table(
    path: Path,
    columns: Columns | None = None,
    dataset: str | None = None,
    split: str = "",
    labelled: bool = True,
    key: str = KEY,
) -> list[Example]:
    """Reads the records of a file, in order.

    Args:
      path: a .jsonl, .csv or .parquet file.
      columns: our field -> column, where the names differ.
      dataset: name for the examples; the file's name without suffix if not given.
      split: split for the examples.
      labelled: False accepts a file without relations (relation ""), for prediction.
      key: config key of `columns`, for errors.
    Raises:
      InputError: missing, empty or broken file, or an unusable record (`columns`); names the line
        (Parquet: the row) and the fix.
    """
    records = read_rows(path)
    names = dict.fromkeys(name for _, record in records for name in record)
    column = resolve(columns or {}, names, str(path), labelled, key)
    return read_records(records, column, dataset or path.stem, split, labelled, key=key)


def read_rows(path: Path) -> list[Record]:
    """The records of a file by column name, with their places. Raises InputError: missing, empty or
    broken file.
    """
    kind = path.suffix.lower()
    if kind == ".jsonl":
        records = list(_json_lines(path))
    elif kind == ".csv":
        records = list(_csv(path))
    elif kind == ".parquet":
        records = _parquet(path)
    else:
        raise InputError(
            f"{path}: unknown kind of file; convert it to one of {', '.join(SUFFIXES)}"
        )
    if not records:
        raise InputError(f"{path}: the file has no records; give one with at least one")
    return records


def _json_lines(path: Path) -> Iterator[Record]:
    # Numbers stay text: a label 1.0 or 1e3 keeps its spelling. One decoder for all lines:
    # json.loads with these options would construct one per line.
    decode = json.JSONDecoder(parse_float=str, parse_int=str, parse_constant=str).decode
    for number, line in enumerate(read_lines(path), start=1):
        if not line.strip():
            continue
        try:
            record = decode(line)
        except json.JSONDecodeError as error:
            raise InputError(
                f"{path}:{number}: not valid JSON (character {error.pos + 1}: {error.msg}); write"
                " one object per line"
            ) from None
        except RecursionError:
            raise InputError(
                f"{path}:{number}: nested too deep; write one flat object per line"
            ) from None
        if not isinstance(record, dict):
            raise InputError(f"{path}:{number}: not a JSON object; write one object per line")
        yield f"{path}:{number}", record


def _csv(path: Path) -> Iterator[Record]:
    # newline="" as the csv module requires: CRLF ends a record, and quoted line ends are preserved.
    rows = csv.reader(io.StringIO(read_text(path), newline=""), strict=True)
    header: list[str] | None = None
    line = 1
    limit = csv.field_size_limit(2**31 - 1)  # long documents exceed the default of 128 KiB
    try:
        for cells in rows:
            place, line = f"{path}:{line}", rows.line_num + 1
            if not cells:
                continue
            if header is None:
                header = cells
                if len(set(header)) != len(header):
                    raise InputError(
                        f"{place}: the header names a column twice; rename one of them"
                    )
                continue
            if len(cells) != len(header):
                raise InputError(
                    f"{place}: {len(cells)} cells under {len(header)} columns; quote a text that"
                    " has a comma, quote or line end"
                )
            yield place, dict(zip(header, cells, strict=True))
    except csv.Error as error:
        raise InputError(
            f"{path}:{line}: not valid CSV: {error}; double a quote inside a quoted text"
        ) from None
    finally:
        csv.field_size_limit(limit)


def _parquet(path: Path) -> list[Record]:
    import pyarrow
    import pyarrow.parquet

    if not path.is_file():
        raise InputError(f"{path}: no such file; correct the path")
    try:
        rows = pyarrow.parquet.read_table(path).to_pylist()
    except (pyarrow.ArrowException, OSError) as error:
        raise InputError(
            f"{path}: not a readable Parquet file: {str(error).splitlines()[0]}; write it again, or"
            " give JSONL or CSV"
        ) from None
    return [(f"{path}: row {number}", row) for number, row in enumerate(rows, start=1)]
