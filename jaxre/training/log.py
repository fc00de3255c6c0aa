"""What a run leaves to read: `log.jsonl` and TensorBoard events."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from tensorboard.summary import DirectoryOutput, Writer


class RunLog:
    """Appends records to `log.jsonl` and scalars to TensorBoard; silent on all processes but the
    first.

    Args:
      folder: of the run.
      step: the run goes on after this step; records of later steps, left by a run that was killed,
        are removed.

    TensorBoard's events are written again from the records that stay, so that no step is there
    twice.
    """

    def __init__(self, folder: Path, step: int, active: bool = True):
        self.active, self.ended = active, False
        if not active:
            return
        path = folder / "log.jsonl"
        kept = []
        if path.is_file():
            kept = [
                line
                for line in path.read_text(encoding="utf-8").splitlines(keepends=True)
                if _belongs(line, step)
            ]
            written = path.with_name("log.jsonl.part")
            written.write_text("".join(kept), encoding="utf-8")
            written.replace(path)
        self.ended = any(json.loads(line)["kind"] == "end" for line in kept)
        self.file = path.open("a", encoding="utf-8")
        shutil.rmtree(folder / "tensorboard", ignore_errors=True)
        self.events = Writer(DirectoryOutput(str(folder / "tensorboard")))
        for line in kept:
            self._draw(**json.loads(line))

    def write(self, kind: str, step: int, values: dict[str, Any]) -> None:
        """One record, such as `{"kind": "train", "step": 10, "loss": 1.2}`; numbers also go to
        TensorBoard as kind/name.
        """
        if not self.active:
            return
        self.file.write(json.dumps({"kind": kind, "step": step, **values}) + "\n")
        self._draw(kind, step, **values)

    def _draw(self, kind: str, step: int, **values: Any) -> None:
        for name, value in values.items():
            if isinstance(value, int | float):
                self.events.add_scalar(f"{kind}/{name}", float(value), step)

    def flush(self) -> None:
        if self.active:
            self.file.flush()
            self.events.flush()

    def close(self) -> None:
        if self.active:
            self.file.close()
            self.events.close()


def _belongs(line: str, step: int) -> bool:
    try:
        record = json.loads(line)
    except json.JSONDecodeError:
        return False  # the line that a kill cut short
    return record["step"] <= step


def read_log(folder: Path) -> list[dict[str, Any]]:
    """The records of a run's `log.jsonl`."""
    return [
        json.loads(line) for line in (folder / "log.jsonl").read_text(encoding="utf-8").splitlines()
    ]
