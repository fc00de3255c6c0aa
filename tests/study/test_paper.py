"""The paper's study as shipped, `configs/study/paper.yaml`, from the download to the page: the hub
is made up, the models tiny.
"""

from __future__ import annotations

import hashlib
import io
import json
from pathlib import Path

import datasets
import numpy as np
import pytest
from rich.console import Console
from tiny import write_tiny_model
from tiny_encoders import write_tiny_encoder

from jaxre.evaluation.report.findings import collect
from jaxre.evaluation.report.published import published
from jaxre.evaluation.report.record import read_record
from jaxre.evaluation.report.study_scores import OVERALL, measure
from jaxre.evaluation.report.write import write_report
from jaxre.relations.benchmarks import COPIES
from jaxre.study.execute import study
from jaxre.study.settings import load_study

CONFIG = Path(__file__).parents[2] / "configs/study/paper.yaml"
FRONTIER = "Despina/frontier-re-generations"
COUNTS = {"train": 24, "validation": 6, "test": 6}
# Of the paper's models one, fewer datasets in one regime, and two updates of each run.
SMALLER = [
    "models={llama-3.2-3b: {model: {path: TINY}, lora: {rank: 4, alpha: 8}}}",
    "base.train.max_steps=2",
    "regimes.gentune.datasets=[semeval2010_task8, tacred]",
    "encoders={roberta-base: {datasets: [gids, tacred], model: {path: ENCODER, dtype: float32}}}",
    "encoders.roberta-base.train={max_steps: 2, batch_examples: 16, row_length: 256}",
    "adaptation.llama-3.2-3b-litbank.train.max_steps=2",
    "adaptation.llama-3.2-3b-litbank.shots=[0]",
    "adaptation.llama-3.2-3b-litbank.train.batch_tokens=1024",
    "base.predict.max_new_tokens=4",
    "shots=[2]",
    "evaluation.shots=[trained]",
    "evaluation.cross_domain=false",
    "untuned=false",
]


def rows(name: str, split: str) -> list[dict]:
    """Sentences with the columns of the study's copies; each pair and text once."""
    labels, people = (
        [f"{name} {verb}" for verb in ("founded", "joined")] + ["none"],
        ("Ada", "Grace", "Alan", "Kim"),
    )
    made = []
    for number in range(COUNTS[split]):
        head, tail = people[number % 4], f"{split.capitalize()}{number}"
        text = f"{head} {('founded', 'joined', 'saw')[number % 3]} {tail} long ago."
        prompt = f"Text: {text}\nEntity 1: {head}\nEntity 2: {tail}\nAnswer:"
        entities = {"entity1": head, "entity2": tail, "entity1Type": "PER", "entity2Type": "ORG"}
        prompts = {f"prompt_{shots}_shot": prompt for shots in (0, 2, 5)}
        made.append({"text": text, **entities, "relation": labels[number % 3], **prompts})
    return made


def answers() -> list[dict]:
    """Answers as the study collected them: of two models, all correct but the first, to which one
    model has no answer.
    """
    return [
        {
            "eval_dataset_name": one.name,
            "prompt_hash": hashlib.md5(row["prompt_0_shot"].encode()).hexdigest()[:12],
            "relation": row["relation"],
            "gen_type": "gen_constrained",
            "model_id": model,
            "tuned_dataset_name": "frontier",
            "model_shot": "n/a",
            "prompt_shot": 0,
            "generated_relation": (
                ("none" if model == "GPT-5.4" else "ERROR: max retries exceeded")
                if place == 0
                else row["relation"]
            ),
            "input_tokens": 70,
            "output_tokens": 3,
        }
        for one in COPIES.values()
        for place, row in enumerate(rows(one.name, "test"))
        for model in ("GPT-5.4", "Claude Sonnet 4.6")
    ]


def hub(name: str, subset: str | None = None) -> datasets.DatasetDict:
    """`datasets.load_dataset`, for what is on the hub."""
    if name == FRONTIER:
        return datasets.DatasetDict({"train": datasets.Dataset.from_list(answers())})
    assert subset == (
        "subsampled" if name in ("Despina/rebel-dataset", "Despina/biographical") else None
    )
    return datasets.DatasetDict(
        {split: datasets.Dataset.from_list(rows(COPIES[name].name, split)) for split in COUNTS}
    )


def write_tacred(folder: Path) -> None:
    """The release as its licence holder has it."""
    folder.mkdir(parents=True)
    for split, file in {
        "train": "train.json",
        "validation": "dev.json",
        "test": "test.json",
    }.items():
        records = []
        for number, row in enumerate(rows("tacred", split)):
            ends = {
                "subj_start": 0,
                "subj_end": 0,
                "subj_type": "PERSON",
                "obj_start": 2,
                "obj_end": 2,
                "obj_type": "ORGANIZATION",
            }
            records.append(
                {
                    "id": f"{split}{number}",
                    "relation": row["relation"],
                    "token": row["text"].split(),
                    **ends,
                }
            )
        (folder / file).write_text(json.dumps(records))


# By hand, as it takes three minutes: pytest -m "aot and slow" tests/study/test_paper.py
@pytest.mark.aot
@pytest.mark.slow
def test_the_papers_study_runs_from_the_hub_to_its_page(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(datasets, "load_dataset", hub)
    monkeypatch.setenv("JAXRE_DATA", str(tmp_path / "data"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    write_tacred(tmp_path / "data" / "tacred")
    (tmp_path / "data" / "litbank").mkdir()
    words = np.random.default_rng(0).choice(
        ["the", "sea", "was", "grey", "and", "still", "she", "said"], 6000
    )
    (tmp_path / "data" / "litbank" / "novel.txt").write_text(" ".join(words))
    paths = {
        "TINY": write_tiny_model(tmp_path / "tiny", max_position_embeddings=2048),
        "ENCODER": tmp_path / "encoder",
    }
    write_tiny_encoder(paths["ENCODER"], "roberta, positions from 2", max_position_embeddings=300)
    changes = [f"output={tmp_path / 'runs'}", f"base.data.cache={tmp_path / 'tokens'}"]
    for change in SMALLER:
        for word, path in paths.items():
            change = change.replace(word, str(path))
        changes.append(change)
    settings, console = load_study(CONFIG, changes), Console(file=io.StringIO(), width=200)
    assert study(settings, console) == 0, console.file.getvalue()[-3000:]

    record = read_record(settings.folder)
    kinds = {
        kind: [one for one in record.systems if one.kind == kind]
        for kind in ("tuned", "adapted", "encoder", "frontier")
    }
    assert len(record.datasets) == 9 and not record.without
    # Three regimes, and one after language modelling; each with the labels listed and not.
    assert [len(kinds[kind]) for kind in ("tuned", "adapted", "encoder")] == [3 * 2, 2, 1]
    assert {(one.regime, len(one.predictions)) for one in kinds["tuned"]} == {
        ("gentune", 2),
        ("littune", 2),
        ("mixtune", 9),
    }
    assert list(kinds["encoder"][0].predictions) == ["gids", "tacred"]
    gpt, claude = kinds["frontier"]
    assert (gpt.model, gpt.enumerated, gpt.prompt_shots, len(gpt.predictions)) == (
        "GPT-5.4",
        True,
        0,
        8,
    )
    assert (
        "5 of 6 test examples have a cached answer" in claude.note
        and len(record.rows(claude, "gids")) == 5
    )
    scores = measure(record, resamples=50)
    assert scores.cell("gpt-5.4", "gids").scores.accuracy == pytest.approx(5 / 6)
    findings = collect(scores)
    assert {one.first for one in findings.comparisons} >= {
        "llama-3.2-3b-gentune-2shot-enumerated-2shot",
        "roberta-base",
    }
    assert {one.second for one in findings.comparisons} == {"gpt-5.4", "claude-sonnet-4.6"}
    mixed = [
        one
        for one in findings.comparisons
        if one.first.startswith("llama-3.2-3b-mixtune") and one.scope == OVERALL
    ]
    assert {len(one.datasets) for one in mixed} == {8}
    assert len(findings.published) == len(published().systems)
    written = write_report(settings.folder)
    assert "GPT-5.4" in written.page.read_text(encoding="utf-8")
