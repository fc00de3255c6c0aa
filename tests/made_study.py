"""A made-up study: sentences of the project's own corpus under three names, answers right by a
seeded draw. No model ran.

python tests/made_study.py FOLDER       # to look at its report
"""

from __future__ import annotations

import dataclasses
import random
import sys
from pathlib import Path

from jaxre.config import Source
from jaxre.evaluation.predictions import Prediction, write_predictions
from jaxre.evaluation.report.record import (
    RecordedDataset,
    RecordedSystem,
    StudyRecord,
    write_examples,
    write_record,
)
from jaxre.relations.schema import Example
from jaxre.relations.sources import load

# Name, domain, whether its sentences may be shown, how hard it is.
DATASETS = (
    ("facts", "general", True, 0.0),
    ("conll04", "general", False, 0.05),
    ("pg_fiction", "literary", True, 0.22),
)
STYLES = [
    f"shots{shots}{definitions}"
    for shots, definitions in zip(
        (0, 0, 2, 2, 4, 4, 8, 8), ("", "-task-labels", "-task", "-labels") * 2, strict=True
    )
]
NASTY = '<script>window.broken = 1</script> & "quotes" \u202eמוזר'


def make_study(
    folder: Path,
    nasty: bool = False,
    systems: tuple[str, ...] | None = None,
    per_dataset: int = 133,
) -> StudyRecord:
    """Writes the study and returns its record.

    Args:
      nasty: markup, quotes and right-to-left text in names, sentences and answers.
      systems: names of those to keep; all if not given.
    """
    corpus = load(Source(dataset="facts", split="test"))
    datasets, examples = [], {}
    for index, (name, domain, open_licence, _) in enumerate(DATASETS):
        part = [
            _renamed(one, name, domain)
            for one in corpus[index * per_dataset : (index + 1) * per_dataset]
        ]
        if nasty:
            part = [
                dataclasses.replace(
                    one, text=f"{one.text} {NASTY}</script><b>x</b>", relation=_nasty(one.relation)
                )
                for one in part
            ]
        examples[name] = part
        write_examples(folder / "data" / f"{name}.jsonl", part)
        labels = tuple(sorted({_nasty(one.relation) if nasty else one.relation for one in corpus}))
        datasets.append(RecordedDataset(name, domain, labels, f"data/{name}.jsonl", open_licence))
    recorded = tuple(
        _answered(folder, one, skill, examples, nasty)
        for one, skill in _systems(nasty)
        if systems is None or one.name in systems
    )
    record = StudyRecord(
        name=f"made-up study {NASTY}" if nasty else "made-up study",
        folder=folder,
        datasets=tuple(datasets),
        systems=recorded,
        device="none: answers are drawn at random",
        versions={"jaxre": "0.1.0", "jax": "0.10.2"},
        date="2026-01-31",
    )
    write_record(record)
    return record


def _systems(nasty: bool) -> list[tuple[RecordedSystem, float]]:
    """Each with how often it is right."""
    found = []
    sizes = {
        "SmolLM2-360M": (0.36e9, 0.7),
        "Qwen2.5-0.5B": (0.5e9, 0.77),
        "Qwen2.5-3B": (3.1e9, 0.85),
    }
    for model, (parameters, skill) in sizes.items():
        for shots in (0, 2):
            tuned = RecordedSystem(
                f"{model} MixTune {shots}-shot",
                "tuned",
                model,
                {},
                int(parameters),
                "mixtune",
                shots,
                shots,
                True,
                seconds=parameters / 4e5,
                latency_ms=parameters / 5e7,
                peak_memory_bytes=int(parameters * 3.1),
                sizes={
                    "base": int(2 * parameters),
                    "nf4": int(0.55 * parameters),
                    "adapter": int(0.03 * parameters),
                    "merged": int(2 * parameters),
                },
            )
            found.append((tuned, skill + 0.03 * shots))
    small = found[1][0]
    found.append(
        (
            dataclasses.replace(
                small, name="SmolLM2-360M MixTune 2-shot, generic prompt", enumerated=False
            ),
            0.6,
        )
    )
    for index, style in enumerate(STYLES):
        found.append(
            (
                dataclasses.replace(
                    small, name=f"SmolLM2-360M MixTune {style}", style=style, seconds=None, sizes={}
                ),
                0.62 + 0.02 * index,
            )
        )
    found += [
        (
            RecordedSystem(
                "Qwen2.5-3B LitTune 0-shot",
                "tuned",
                "Qwen2.5-3B",
                {},
                int(3.1e9),
                "littune",
                0,
                0,
                True,
                seconds=5400,
                trained_on=("pg_fiction",),
            ),
            0.9,
        ),
        (
            RecordedSystem(
                "SmolLM2-360M, not tuned",
                "untuned",
                "SmolLM2-360M",
                {},
                int(0.36e9),
                prompt_shots=0,
                enumerated=True,
            ),
            0.3,
        ),
        (
            RecordedSystem(
                "RoBERTa-base",
                "encoder",
                "RoBERTa-base",
                {},
                int(125e6),
                "",
                seconds=1800,
                latency_ms=4.0,
            ),
            0.8,
        ),
        (
            RecordedSystem(
                "always author_of", "baseline", "majority", {}, note="one label for all"
            ),
            -1.0,
        ),
        (
            RecordedSystem(
                "left thinking", "tuned", "SmolLM3-3B", {}, int(3e9), "mixtune", 0, 0, True
            ),
            -2.0,
        ),
        (
            RecordedSystem(
                "Frontier A <b>" if nasty else "Frontier A",
                "frontier",
                "frontier-a",
                {},
                prompt_shots=0,
                enumerated=True,
                cost_usd=1.9,
            ),
            0.72,
        ),
        (
            RecordedSystem(
                "Frontier B",
                "frontier",
                "frontier-b",
                {},
                prompt_shots=0,
                enumerated=True,
                cost_usd=0.4,
            ),
            0.66,
        ),
    ]
    return found


def _answered(
    folder: Path,
    system: RecordedSystem,
    skill: float,
    examples: dict[str, list[Example]],
    nasty: bool,
) -> RecordedSystem:
    paths = {}
    for place, (name, _, _, hardness) in enumerate(DATASETS):
        away = 0.4 if system.trained_on and name not in system.trained_on else 0.0
        draw = random.Random(f"{system.name} {name}")
        rows = [
            Prediction(
                one.id,
                one.relation,
                _answer(one, skill - hardness - away, draw),
                name,
                "gen_constrained",
                system.name,
            )
            for one in examples[name]
        ]
        if nasty and system.kind == "tuned":
            rows = [
                row if place % 3 else dataclasses.replace(row, generated_relation=NASTY)
                for place, row in enumerate(rows)
            ]
        stem = f"predictions/{random.Random(system.name).getrandbits(32)}/{place}"
        write_predictions(folder / stem, rows)
        paths[name] = f"{stem}.parquet"
    return dataclasses.replace(system, predictions=paths)


INVERSE = {
    "author_of": "written_by",
    "parent_of": "child_of",
    "located_in": "contains",
    "founder_of": "founded_by",
}


def _answer(example: Example, skill: float, draw: random.Random) -> str:
    if skill < -1.5:
        return "<think> The user asks about"
    if skill < -0.5:
        return "author_of"
    if (example.head_type, example.tail_type) == ("PLACE", "PLACE"):  # a hole
        skill -= 0.5
    if draw.random() < skill:
        return example.relation
    return draw.choice(
        [INVERSE.get(example.relation, "none"), "none", "educated_at", "is a kind of"]
    )


def _nasty(relation: str) -> str:
    return "<b>educated</b> & 'at'" if relation == "educated_at" else relation


def _renamed(example: Example, dataset: str, domain: str) -> Example:
    return dataclasses.replace(
        example,
        id=f"{dataset}/test/{example.id.rsplit('/', 1)[-1]}",
        dataset=dataset,
        domain=domain,
    )


if __name__ == "__main__":
    make_study(Path(sys.argv[1]), nasty="--nasty" in sys.argv)
