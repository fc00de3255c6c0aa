"""Record of a study for its report: systems, datasets, and the predictions file of each pair.

    record = read_record("runs/study-small")
    rows = record.rows(record.systems[0], "gids")

The record is `study.json`. Paths in it are relative to its folder, so that the folder can be moved.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, get_args

from jaxre.errors import InputError
from jaxre.evaluation.evaluate import write_json
from jaxre.evaluation.predictions import Prediction, read_predictions
from jaxre.evaluation.writing import replacing
from jaxre.relations.files import read_lines
from jaxre.relations.schema import Example

FILE = "study.json"
Kind = Literal["tuned", "adapted", "encoder", "untuned", "baseline", "frontier"]


@dataclass(frozen=True)
class RecordedDataset:
    """One benchmark: its labels (negative ones included) and the test examples of every system.

    examples: JSONL file of `Example` records, in the study's folder. open_licence: its sentences
    may be published.
    """

    name: str
    domain: str
    labels: tuple[str, ...]
    examples: str
    open_licence: bool = False


@dataclass(frozen=True)
class RecordedSystem:
    """One model in one setting, with a predictions file per dataset.

    kind: tuned (SFT), adapted (language modelling on raw text, then SFT), encoder, untuned (the
    base model), baseline (majority, TF-IDF), frontier (cached answers). regime: choice of training
    data, such as gentune. seconds: training time; cost_usd: of the predictions, where the cache
    states it; latency_ms: of one answer at batch 1. sizes: name -> bytes (base, nf4, adapter,
    merged). truncation: counts of `data.tokens.Truncation` over the training examples; those longer
    than a row were left out. trained_on: datasets whose training split the system has seen; the
    others of `predictions` show transfer. common_labels: dataset -> our label -> common label, for
    datasets whose predictions file has common labels, gold and predicted (label_map).
    """

    name: str
    kind: Kind
    model: str
    predictions: dict[str, str]
    parameters: int | None = None
    regime: str = ""
    train_shots: int | None = None
    prompt_shots: int | None = None
    enumerated: bool | None = None
    style: str = ""
    seconds: float | None = None
    cost_usd: float | None = None
    latency_ms: float | None = None
    peak_memory_bytes: int | None = None
    sizes: dict[str, int] = field(default_factory=dict)
    truncation: dict[str, int] = field(default_factory=dict)
    note: str = ""
    trained_on: tuple[str, ...] = ()
    common_labels: dict[str, dict[str, str]] = field(default_factory=dict)


@dataclass(frozen=True)
class StudyRecord:
    """A whole study, with the `device` and `versions` of the run. without: step -> reason why it
    has no result; its system or dataset may be missing here.
    """

    name: str
    folder: Path
    datasets: tuple[RecordedDataset, ...]
    systems: tuple[RecordedSystem, ...]
    device: str = ""
    versions: dict[str, str] = field(default_factory=dict)
    date: str = ""
    without: dict[str, str] = field(default_factory=dict)

    def rows(self, system: RecordedSystem, dataset: str) -> list[Prediction]:
        """Predictions of a system on a dataset, empty if it has none. Raises InputError."""
        path = system.predictions.get(dataset)
        return read_predictions(self.folder / path) if path else []

    @cached_property
    def examples(self) -> dict[str, dict[str, Example]]:
        """Dataset -> example id -> example."""
        return {
            dataset.name: {
                example.id: example for example in read_examples(self.folder / dataset.examples)
            }
            for dataset in self.datasets
        }


def read_examples(path: Path) -> list[Example]:
    """Reads a file of `write_examples`. Raises InputError."""
    try:
        records = [json.loads(line) for line in read_lines(path)]
        for record in records:
            for name in ("head_span", "tail_span"):
                record[name] = record[name] and tuple(record[name])
        return [Example(**record) for record in records]
    except (ValueError, TypeError, KeyError) as error:
        raise InputError(
            f"{path}: not the examples of a study ({error}); run `jaxre study` again"
        ) from None


def write_examples(path: Path, examples: list[Example]) -> None:
    """Writes one JSON object per example with every field, atomically. Raises InputError."""
    lines = (json.dumps(asdict(example), ensure_ascii=False) + "\n" for example in examples)
    with replacing(path) as partial:
        partial.write_text("".join(lines), encoding="utf-8")


def write_record(record: StudyRecord) -> Path:
    """Writes `study.json` into the study's folder, atomically."""
    path = record.folder / FILE
    write_json(path, {name: value for name, value in asdict(record).items() if name != "folder"})
    return path


def read_record(folder: str | Path) -> StudyRecord:
    """Reads `study.json` of a study's folder. Raises InputError: no such file, or not a record."""
    path = Path(folder) / FILE
    if not path.is_file():
        raise InputError(f"{folder}: no {FILE}; give the folder that `jaxre study` wrote")
    try:
        tree = json.loads(path.read_text(encoding="utf-8"))
        datasets = tuple(
            RecordedDataset(**{**dataset, "labels": tuple(dataset["labels"])})
            for dataset in tree.pop("datasets")
        )
        systems = tuple(_system(system) for system in tree.pop("systems"))
        return StudyRecord(folder=Path(folder), datasets=datasets, systems=systems, **tree)
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise InputError(
            f"{path}: not the record of a study ({error}); run `jaxre study` again"
        ) from None


def _system(tree: dict[str, Any]) -> RecordedSystem:
    system = RecordedSystem(**{**tree, "trained_on": tuple(tree.get("trained_on", ()))})
    if system.kind not in get_args(Kind):
        raise ValueError(f"unknown kind {system.kind!r} of {system.name}")
    return system
