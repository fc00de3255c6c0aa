"""The log of a run: `log.jsonl` and TensorBoard events."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from tensorboard.summary import DirectoryOutput, Writer


class RunLog:
    """Appends records to `log.jsonl` and scalars to TensorBoard.

    TensorBoard's events are rewritten from the records, so that no step occurs twice.

    Args:
      folder: folder of the run.
      step: the run continues after this step; removes records of later steps, left by a killed
        run. 0 starts an empty log, as a run that starts over writes its records of step 0 again.
      active: False writes nothing, for all processes but the first.
    """

    def __init__(self, folder: Path, step: int, active: bool = True):
        self.active, self.ended = active, False
        if not active:
            return
        path = folder / "log.jsonl"
        lines = []
        if path.is_file():
            lines = [
                line
                for line in path.read_text(encoding="utf-8").splitlines(keepends=True)
                if step and _is_record_until(line, step)
            ]
            partial = path.with_name("log.jsonl.part")
            partial.write_text("".join(lines), encoding="utf-8")
            partial.replace(path)
        records = [json.loads(line) for line in lines]
        self.ended = any(record["kind"] == "end" for record in records)
        self.file = path.open("a", encoding="utf-8")
        shutil.rmtree(folder / "tensorboard", ignore_errors=True)
        self.events = Writer(DirectoryOutput(str(folder / "tensorboard")))
        for record in records:
            self._add_scalars(**record)

    def write(self, kind: str, step: int, values: dict[str, Any]) -> None:
        """Writes a record, such as `{"kind": "train", "step": 10, "loss": 1.2}`; numbers also go to
        TensorBoard as kind/name.
        """
        if not self.active:
            return
        self.file.write(json.dumps({"kind": kind, "step": step, **values}) + "\n")
        self._add_scalars(kind, step, **values)

    def _add_scalars(self, kind: str, step: int, **values: Any) -> None:
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


def _is_record_until(line: str, step: int) -> bool:
    try:
        return json.loads(line)["step"] <= step
    except json.JSONDecodeError:
        return False  # cut short by a kill


def read_log(folder: Path) -> list[dict[str, Any]]:
    """Reads the records of a run's `log.jsonl`."""
    return [
        json.loads(line) for line in (folder / "log.jsonl").read_text(encoding="utf-8").splitlines()
    ]
