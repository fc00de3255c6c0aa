"""What a study leaves for its report: systems, datasets, and where the predictions of each on each
are.

    record = read_record("runs/study-small")
    rows = record.systems[0].rows("gids")

`study.json` holds it. Its paths are relative to its folder, so that the folder can be moved.
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
from jaxre.relations.files import read_lines
from jaxre.relations.schema import Example

FILE = "study.json"
Kind = Literal["tuned", "adapted", "encoder", "untuned", "baseline", "frontier"]


@dataclass(frozen=True)
class RecordedDataset:
    """One benchmark: its labels (with the negative ones), and the test examples that every system
    was asked.

    examples: JSONL file of `Example` records, in the study's folder. open_licence: whether its
    sentences may be shown in public.
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
    base itself), baseline (majority, TF-IDF), frontier (cached answers). regime: of the training
    data, such as gentune. seconds: of training; cost_usd: of the predictions, where the cache
    states it. latency_ms: of one answer at batch 1. sizes: name -> bytes (base, nf4, adapter,
    merged). truncation: of the training examples, the counts of `data.tokens.Truncation`; those
    longer than a row were left out. trained_on: datasets whose training split it has seen; the
    others of `predictions` show how it carries over. common_labels: dataset -> our label -> common
    label, of those datasets whose predictions file has common labels, gold and predicted
    (label_map).
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
    """A whole study; `device` and `versions` say where it was run. without: step -> why it has no
    result, so that a system or a dataset of it may be missing here.
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
        """The predictions of a system on a dataset; none where it was not asked. Raises
        InputError.
        """
        path = system.predictions.get(dataset)
        return read_predictions(self.folder / path) if path else []

    @cached_property
    def examples(self) -> dict[str, dict[str, Example]]:
        """Dataset -> example id -> example, of every dataset."""
        return {
            one.name: {e.id: e for e in read_examples(self.folder / one.examples)}
            for one in self.datasets
        }


def read_examples(path: Path) -> list[Example]:
    """Examples as `write_examples` wrote them, ids and all. Raises InputError."""
    try:
        records = [json.loads(line) for line in read_lines(path)]
        return [
            Example(
                **{
                    **one,
                    **{name: one[name] and tuple(one[name]) for name in ("head_span", "tail_span")},
                }
            )
            for one in records
        ]
    except (ValueError, TypeError, KeyError) as error:
        raise InputError(
            f"{path}: not the examples of a study ({error}); run `jaxre study` again"
        ) from None


def write_examples(path: Path, examples: list[Example]) -> None:
    """One JSON object per line, every field of `Example`; whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(
        "".join(json.dumps(asdict(one), ensure_ascii=False) + "\n" for one in examples),
        encoding="utf-8",
    )
    partial.replace(path)


def write_record(record: StudyRecord) -> Path:
    """Writes `study.json` into the study's folder, whole or not at all."""
    path = record.folder / FILE
    write_json(path, {name: value for name, value in asdict(record).items() if name != "folder"})
    return path


def read_record(folder: str | Path) -> StudyRecord:
    """Reads a study's folder. Raises InputError: no such file, or one that is no record of a
    study.
    """
    path = Path(folder) / FILE
    if not path.is_file():
        raise InputError(f"{folder}: no {FILE}; give the folder that `jaxre study` wrote")
    try:
        tree = json.loads(path.read_text(encoding="utf-8"))
        datasets = tuple(
            RecordedDataset(**{**one, "labels": tuple(one["labels"])})
            for one in tree.pop("datasets")
        )
        systems = tuple(_system(one) for one in tree.pop("systems"))
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
