"""A journal of finished rows, so that a killed prediction continues where it stopped.

    journal = Journal(stem, identity)
    rows = predict_examples(..., answered=journal.rows, record=journal.add)
    write_predictions(stem, rows)
    journal.remove()

A hidden file beside the predictions: one line identifies the model and the request, then one line
per row. A line that a kill cut short is dropped.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from jaxre.errors import InputError
from jaxre.evaluation.predictions import Prediction


def identity_of(folders: Iterable[Path], request: Any) -> str:
    """Digest of a model's files (name, size, modification time) and of the request."""
    files = [
        [file.name, file.stat().st_size, file.stat().st_mtime_ns]
        for folder in folders
        for file in sorted(folder.rglob("*"))
        # Predictions and journals may lie beside the weights.
        if file.is_file() and file.suffix not in (".parquet", ".csv", ".jsonl")
    ]
    return hashlib.sha256(json.dumps([files, request], default=str).encode()).hexdigest()


class Journal:
    """An open journal, which no other process opens meanwhile; `rows` are those of an earlier call,
    by example id. `replaced` is how many rows it held of another prediction.

    Raises:
      InputError: another process writes it, or the folder cannot be written.
    """

    def __init__(self, stem: Path, identity: str):
        self.path = stem.with_name(f".{stem.name}.part.jsonl")
        self.rows: dict[str, Prediction] = {}
        self.replaced = self.added = 0
        try:
            stem.parent.mkdir(parents=True, exist_ok=True)
            self.file = self.path.open("a+b", buffering=0)
            fcntl.flock(self.file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self.file.close()
            raise InputError(
                f"{stem}: another prediction writes there; give this one another --output"
            ) from None
        except OSError as error:
            raise InputError(
                f"{stem}: cannot be written ({error.strerror}); give another --output"
            ) from None
        kept = self._read(identity)
        self.file.truncate(kept)
        if not kept:
            self._write([{"identity": identity}])

    def _read(self, identity: str) -> int:
        """Fills `rows` and returns the bytes of the whole lines; 0 for another prediction."""
        kept = 0
        self.file.seek(0)
        lines = self.file.read().splitlines(keepends=True)
        for number, line in enumerate(lines):
            if not line.endswith(b"\n"):
                break
            try:
                entry = json.loads(line)
                row = Prediction(**entry) if number else None
            except (ValueError, TypeError):
                break
            if row is None:
                if entry != {"identity": identity}:
                    self.replaced = len(lines) - 1
                    return 0
            else:
                self.rows[row.example_id] = row
            kept += len(line)
        return kept

    def add(self, rows: Sequence[Prediction]) -> None:
        """Writes rows that have come; they survive the process."""
        self.added += len(rows)
        self._write([asdict(row) for row in rows])

    def _write(self, entries: list[dict]) -> None:
        text = "".join(json.dumps(entry) + "\n" for entry in entries)
        try:
            self.file.write(text.encode("ascii"))
            os.fsync(self.file.fileno())
        except OSError as error:
            raise InputError(
                f"{self.path}: cannot be written ({error.strerror}); free its disk, and the same"
                " command continues"
            ) from None

    def close(self) -> None:
        """Leaves the rows for the next call; a file without a row is removed."""
        if not self.rows and not self.added:
            self.path.unlink(missing_ok=True)
        self.file.close()

    def remove(self) -> None:
        """Ends a prediction whose rows are in their own files."""
        self.path.unlink(missing_ok=True)
        self.file.close()
