"""Rows of a prediction as they come, so that one that was killed goes on where it stopped.

    journal = Journal(stem, identity)
    rows = predict_examples(..., answered=journal.rows, record=journal.add)
    write_predictions(stem, rows)
    journal.remove()

The file lies hidden beside the predictions: a line that says what is asked of which model, then a
line a row. A line that a kill cut short is dropped.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from jaxre.evaluation.predictions import Prediction

FORMAT = 1


def identity_of(folders: Iterable[Path], asked: Any) -> str:
    """Digest of a model's files (name, size and time of change) and of what is asked."""
    files = [
        [file.name, file.stat().st_size, file.stat().st_mtime_ns]
        for folder in folders
        for file in sorted(folder.rglob("*"))
        if file.is_file()
    ]
    return hashlib.sha256(json.dumps([FORMAT, files, asked], default=str).encode()).hexdigest()


class Journal:
    """An open journal; `rows` are those of an earlier call, by example id."""

    def __init__(self, stem: Path, identity: str):
        stem.parent.mkdir(parents=True, exist_ok=True)
        self.path = stem.with_name(f".{stem.name}.part.jsonl")
        self.rows: dict[str, Prediction] = {}
        kept = 0
        if self.path.is_file():
            kept = self._read(identity)
        self.file = self.path.open("r+b" if kept else "wb")
        self.file.seek(kept)
        self.file.truncate()
        if not kept:
            self._write([{"identity": identity}])

    def _read(self, identity: str) -> int:
        """Fills `rows` and returns the bytes of the whole lines; 0 for another prediction."""
        kept = 0
        with self.path.open("rb") as file:
            for number, line in enumerate(file):
                if not line.endswith(b"\n"):
                    break
                try:
                    entry = json.loads(line)
                    row = Prediction(**entry) if number else None
                except (ValueError, TypeError):
                    break
                if row is None:
                    if entry != {"identity": identity}:
                        return 0
                else:
                    self.rows[row.example_id] = row
                kept += len(line)
        return kept

    def add(self, rows: Sequence[Prediction]) -> None:
        """Writes rows that have come; they survive the process."""
        self._write([asdict(row) for row in rows])

    def _write(self, entries: list[dict]) -> None:
        text = "".join(json.dumps(entry, ensure_ascii=False) + "\n" for entry in entries)
        self.file.write(text.encode("utf-8", "surrogatepass"))
        self.file.flush()
        os.fsync(self.file.fileno())

    def close(self) -> None:
        self.file.close()

    def remove(self) -> None:
        """Ends a prediction whose rows are in their own files."""
        self.close()
        self.path.unlink(missing_ok=True)
