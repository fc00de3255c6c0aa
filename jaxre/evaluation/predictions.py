"""Predictions tables: one row per example, in the study's long format, as both Parquet and CSV.

    write_predictions("runs/x/predictions/test", rows)      # test.parquet and test.csv
    rows = read_predictions("runs/x/predictions/test.csv")

Both files have the same rows. CSV cells are text, so the labels `no`, `NA` and `null` survive;
probabilities are one JSON object per row.
"""

from __future__ import annotations

import csv
import json
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal

import pyarrow as pa
import pyarrow.parquet as pq

from jaxre.errors import InputError

# gen_open: no label list in the prompt; gen_constrained: with it (the study's names).
GenType = Literal["gen_open", "gen_constrained"]


@dataclass(frozen=True, slots=True)
class Prediction:
    """One prediction. `score` is its log-probability; `probabilities` maps each label of the schema
    to its probability.

    `prompt_hash` is that of the example (`Example.prompt_hash`) if it has one, otherwise that of
    `prompt`. With `predict --above P`, `probabilities` are those of generating each label, and the
    other labels have an upper bound in `bounds`. `status` is "truncated" if the limit of new tokens
    ended the answer, "refusal" for refusals of frontier models, otherwise empty. `date`
    (YYYY-MM-DD) and `cost_usd` are known for frontier models only.
    """

    example_id: str
    relation: str  # gold, as the source spells it
    generated_relation: str
    eval_dataset_name: str = ""
    gen_type: str = "gen_constrained"
    model_id: str = ""
    tuned_dataset_name: str = ""  # "frontier" for cached answers of a frontier model
    model_shot: str = "0"
    prompt_shot: str = "0"
    prompt_style: str = ""  # of relations/prompt_styles.py, if any
    prompt: str = ""
    prompt_hash: str = ""
    score: float | None = None
    probabilities: dict[str, float] | None = None
    input_tokens: int | None = None
    output_tokens: int | None = None
    date: str = ""
    cost_usd: float | None = None
    status: str = ""
    bounds: dict[str, float] | None = None


# The study's columns first, in its order.
_ARROW = pa.schema(
    [
        ("eval_dataset_name", pa.string()),
        ("relation", pa.string()),
        ("gen_type", pa.string()),
        ("model_id", pa.string()),
        ("tuned_dataset_name", pa.string()),
        ("model_shot", pa.string()),
        ("prompt_shot", pa.string()),
        ("generated_relation", pa.string()),
        ("prompt", pa.string()),
        ("prompt_hash", pa.string()),
        ("example_id", pa.string()),
        ("prompt_style", pa.string()),
        ("score", pa.float64()),
        ("probabilities", pa.map_(pa.string(), pa.float64())),
        ("input_tokens", pa.int64()),
        ("output_tokens", pa.int64()),
        ("date", pa.string()),
        ("cost_usd", pa.float64()),
        ("status", pa.string()),
        ("bounds", pa.map_(pa.string(), pa.float64())),
    ]
)
COLUMNS = tuple(_ARROW.names)
_REQUIRED = ("example_id", "relation", "generated_relation")
_TEXT = tuple(field.name for field in fields(Prediction) if field.type == "str")


def write_predictions(path: str | Path, rows: Sequence[Prediction]) -> tuple[Path, Path]:
    """Writes `path.parquet` and then `path.csv`; each appears complete or not at all.

    Args:
      path: without suffix (`.parquet` or `.csv` is removed); in an existing folder, the name is
        `predictions`.
      rows: at least one, each example once.

    Returns the two paths. Raises InputError if there is no row or an example occurs twice.
    """
    stem = stem_of(Path(path))
    check_unique(rows, str(stem))
    stem.parent.mkdir(parents=True, exist_ok=True)
    targets = parquet_of(path), stem.with_name(stem.name + ".csv")
    drafts = tuple(target.with_name(f".{target.name}.{os.getpid()}.part") for target in targets)
    try:
        _write_parquet(drafts[0], rows)
        _write_csv(drafts[1], rows)
        for draft, target in zip(drafts, targets, strict=True):
            os.replace(draft, target)
    finally:
        for draft in drafts:
            draft.unlink(missing_ok=True)
    return targets


def read_predictions(path: str | Path) -> list[Prediction]:
    """Reads a predictions file.

    Args:
      path: a .parquet or .csv file, their common name without suffix, or a folder with one
        predictions table.

    Raises:
      InputError: no such file, a column is missing, a cell cannot be read, an example occurs twice,
        no rows.
    """
    path = _existing(Path(path))
    table = read_table(path)
    if missing := [name for name in _REQUIRED if name not in table[0]]:
        advice = "a file that `jaxre predict` wrote has it"
        if missing == ["example_id"] and "prompt_hash" in table[0]:
            advice = (
                "this looks like a cache of frontier predictions; give it as CACHE to `jaxre"
                " compare`"
            )
        raise InputError(
            f"{path}: no column {missing[0]!r} (columns: {', '.join(table[0])}); {advice}"
        )
    rows = [
        _prediction(row, f"{path}:{number}")
        for number, row in enumerate(table, start=2 if path.suffix == ".csv" else 1)
    ]
    check_unique(rows, str(path))
    return rows


def read_table(path: Path) -> list[dict[str, Any]]:
    """Reads a .parquet or .csv file with at least one row as plain dicts; CSV cells are text.
    Raises InputError.
    """
    if not path.is_file():
        raise InputError(
            f"{path}: no such file; give the .parquet or .csv that `jaxre predict` wrote"
        )
    if path.suffix == ".csv":
        rows = _read_csv(path)
    elif path.suffix == ".parquet":
        rows = _read_parquet(path)
    else:
        raise InputError(f"{path}: not a table; give a .parquet or a .csv file")
    if not rows:
        raise InputError(f"{path}: the table has no rows; predict a split that has examples")
    return rows


def check_unique(rows: Sequence[Prediction], place: str) -> None:
    """Raises InputError if there are no rows or two rows have the same example id."""
    if not rows:
        raise InputError(f"{place}: no predictions; was the split empty?")
    seen = set()
    for row in rows:
        if row.example_id in seen:
            raise InputError(
                f"{place}: example {row.example_id!r} occurs twice; keep one prediction per example"
                " (a file is one run)"
            )
        seen.add(row.example_id)


def as_text(value: Any) -> str:
    """A cell as text; null is empty."""
    return "" if value is None else str(value)


def parquet_of(path: Path) -> Path:
    """Path of the Parquet file that `write_predictions` writes."""
    stem = stem_of(Path(path))
    return stem.with_name(stem.name + ".parquet")


def stem_of(path: Path) -> Path:
    """Common stem of both files: the path without .parquet or .csv; in a folder, `predictions`."""
    if path.is_dir():
        return path / "predictions"
    return path.with_suffix("") if path.suffix in (".parquet", ".csv") else path


def _existing(path: Path) -> Path:
    if path.is_dir():
        files = sorted(path.glob("*.parquet")) or sorted(path.glob("*.csv"))
        if len(files) != 1:
            names = ", ".join(file.name for file in files) or "none"
            raise InputError(
                f"{path}: a folder with {len(files)} predictions files ({names}); name one of them"
            )
        return files[0]
    if path.suffix not in (".parquet", ".csv"):
        for suffix in (".parquet", ".csv"):
            if path.with_name(path.name + suffix).is_file():
                return path.with_name(path.name + suffix)
    return path


def _write_parquet(path: Path, rows: Sequence[Prediction]) -> None:
    columns: dict[str, list] = {name: [getattr(row, name) for row in rows] for name in COLUMNS}
    for name in ("probabilities", "bounds"):
        columns[name] = [None if cell is None else list(cell.items()) for cell in columns[name]]
    pq.write_table(pa.table(columns, schema=_ARROW), path, compression="zstd")


def _write_csv(path: Path, rows: Sequence[Prediction]) -> None:
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(COLUMNS)
        for row in rows:
            writer.writerow([_csv_cell(getattr(row, name)) for name in COLUMNS])


def _csv_cell(value: Any) -> str:
    if isinstance(value, dict):
        return json.dumps(value, ensure_ascii=False)
    return repr(value) if isinstance(value, float) else as_text(value)


def _read_csv(path: Path) -> list[dict[str, Any]]:
    # The default of 131,072 is shorter than a long prompt with many demonstrations.
    csv.field_size_limit(sys.maxsize)
    rows = []
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            reader = csv.DictReader(file, strict=True)
            for row in reader:
                if None in row or None in row.values():
                    raise InputError(
                        f"{path}:{reader.line_num}: more or fewer cells than the header has; quote"
                        " cells that hold commas"
                    )
                rows.append(row)
    except (csv.Error, UnicodeDecodeError) as error:
        raise InputError(f"{path}: not a CSV file in UTF-8: {error}; save it as such") from None
    return rows


def _read_parquet(path: Path) -> list[dict[str, Any]]:
    try:
        return pq.read_table(path).to_pylist(maps_as_pydicts="lossy")
    except (pa.ArrowException, OSError) as error:
        raise InputError(
            f"{path}: not a Parquet file: {str(error).splitlines()[0]}; give the .csv beside it, or"
            " predict again"
        ) from None


def _prediction(row: dict[str, Any], place: str) -> Prediction:
    values: dict[str, Any] = {name: as_text(row[name]) for name in _TEXT if name in row}
    if not values["example_id"]:
        raise InputError(f"{place}: empty example_id; every row needs the id of its example")
    for name, read in _OPTIONAL.items():
        values[name] = _cell(row.get(name), read, name, place)
    return Prediction(**values)


def _cell(value: Any, read: Callable[[Any], Any], name: str, place: str) -> Any:
    if value is None or value == "":
        return None
    try:
        return read(value)
    except (TypeError, ValueError, AttributeError):
        raise InputError(
            f"{place}: {name} cannot be read from {str(value)[:60]!r}; correct the cell or leave it"
            " empty"
        ) from None


def _probabilities(value: Any) -> dict[str, float]:
    table = json.loads(value) if isinstance(value, str) else value
    return {str(label): float(probability) for label, probability in table.items()}


_OPTIONAL: dict[str, Callable[[Any], Any]] = {
    "score": float,
    "probabilities": _probabilities,
    "bounds": _probabilities,
    "input_tokens": int,
    "output_tokens": int,
    "cost_usd": float,
}
