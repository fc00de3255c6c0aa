"""`jaxre quickstart`: the whole job on a small real model, with a report a newcomer can read.

Fine-tunes SmolLM2-135M (or the tiny base that jaxre ships) on the shipped corpus, predicts the test
split, evaluates the predictions beside three baselines, compares them example by example with the
strongest baseline, and exports for transformers and PEFT.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from jaxre.checkpoints.convert import convert
from jaxre.checkpoints.packaged import PACKAGED, packaged_file
from jaxre.config import Config, load_config
from jaxre.errors import InputError
from jaxre.evaluation.baselines import majority, tfidf_marked, tfidf_sentence
from jaxre.evaluation.compare import compare_files, comparison_table
from jaxre.evaluation.evaluate import evaluate_rows, write_json
from jaxre.evaluation.metrics.scores import confusion_matrix
from jaxre.evaluation.predictions import Prediction, write_predictions
from jaxre.evaluation.report.run_report import System, draw_report, summary_table
from jaxre.inference.commands import predict_data
from jaxre.relations import mixtures, sources
from jaxre.relations.schema import Example
from jaxre.training.log import read_log
from jaxre.training.loop import train

CONFIG, TINY = Path("configs/quickstart.yaml"), Path("configs/quickstart-tiny.yaml")
BASELINES = {
    "majority label": (majority, "always the most frequent label"),
    "TF-IDF + logistic regression": (tfidf_sentence, "words of the sentence"),
    "TF-IDF + logistic regression, marked": (
        tfidf_marked,
        "words with their place about head and tail",
    ),
}


def chosen_config(tiny: bool, console: Console) -> Path:
    """The config of the real base, or of the tiny one with `tiny` or where the real base is not
    installed, which is printed.
    """
    if tiny:
        return TINY
    base = load_config(CONFIG).model.path
    try:
        packaged_file(base)
    except InputError as error:
        console.print(
            f"{error}\nuntil then this fine-tunes the tiny base that jaxre ships (as --tiny does)",
            markup=False,
            soft_wrap=True,
        )
        return TINY
    return CONFIG


def quickstart(run: Path, console: Console, config_path: Path) -> dict:
    """Runs the whole job and returns the contents of `report/summary.json`.

    Raises:
      InputError: not started in a clone of the project, or `run` is not an earlier quickstart.
    """
    config = _config(config_path, run)
    packaged = PACKAGED.get(config.model.path)
    base = packaged.about if packaged else f"base {config.model.path}"
    clear(run, config, console)

    console.rule("1 of 5: fine-tune")
    train(config, console)
    console.rule("2 of 5: predict the test split")
    ours = predict_data(str(run), None, None, "score", None, None, console)
    console.print(ours.summary)
    untuned = predict_data(
        config.model.path,
        None,
        None,
        "score",
        run / "predictions" / "untuned-base",
        config_path,
        console,
    )

    console.rule("3 of 5: evaluate, beside the baselines")
    examples, test = mixtures.load(config.data.train, "data.train"), sources.load(config.data.test)
    systems = [System("fine-tuned (LoRA)", evaluate_rows(ours.rows, "test"), ours=True, note=base)]
    baseline_files = {}
    for number, (name, (baseline, note)) in enumerate(BASELINES.items(), 1):
        rows = baseline_rows(name, baseline(examples, test).labels, test)
        path = run / "predictions" / f"baseline-{number}"
        baseline_files[name], _ = write_predictions(path, rows)
        systems.append(System(name, evaluate_rows(rows, name), note=note))
    strongest = max(systems[1:], key=lambda system: system.scores.f1).name
    untuned_scores = evaluate_rows(untuned.rows, "untuned")
    systems.append(System("base, not fine-tuned", untuned_scores, note="the same scoring"))

    console.rule("4 of 5: compare, example by example")
    comparison = compare_files(ours.path, baseline_files[strongest])
    console.print(comparison_table(comparison))
    write_json(run / "report" / "comparison.json", comparison.to_json())

    console.rule("5 of 5: export")
    console.print(str(convert(str(run), run / "merged", "hf", merge=True)), markup=False)
    console.print(f"the PEFT adapter is in {run / 'adapter'}", markup=False)

    summary = summarise(run, systems)
    curves = {
        kind: [
            (record["step"], record["loss"])
            for record in read_log(run)
            if record["kind"] == kind and "loss" in record
        ]
        for kind in ("train", "validation")
    }
    pictures = draw_report(
        run / "report",
        systems,
        curves["train"],
        curves["validation"],
        confusion_matrix(
            [row.relation for row in ours.rows], [row.generated_relation for row in ours.rows]
        ),
        title=f"{run.name}: {len(test)} test examples",
    )
    write_json(run / "report" / "summary.json", summary)

    console.rule("result")
    console.print(
        summary_table(
            systems,
            title=f"F1 on {len(test)} test examples with entities and phrasings unseen in training",
        )
    )
    console.print(f"picture     {pictures[0]}\nrun folder  {run}\n", markup=False)
    console.print(
        "next, your own data (JSONL, CSV or Parquet with text, head, tail, relation):\n "
        f" {typed_command()} train {config_path} name=mine data.train.dataset=train.jsonl"
        " data.train.split=null data.validation=null data.test=null",
        soft_wrap=True,
    )
    return summary


def typed_command() -> str:
    """The command that runs this environment's `jaxre`: its name if the shell finds it, else its
    path.
    """
    script = Path(sys.executable).with_name("jaxre")
    if not script.is_file() or shutil.which("jaxre") == str(script):
        return "jaxre"
    return str(script.relative_to(Path.cwd()) if script.is_relative_to(Path.cwd()) else script)


def _config(path: Path, run: Path) -> Config:
    """The config with `run` as its run folder."""
    return load_config(path, [f"output={run.parent}", f"name={json.dumps(run.name)}"])


def clear(run: Path, config: Config, console: Console) -> None:
    """Removes an earlier quickstart, so that every figure is of this run. Raises InputError for any
    other folder.
    """
    if not run.exists():
        return
    saved = run / "config.yaml"
    quickstarts = [config, *(_config(path, run) for path in (CONFIG, TINY) if path.is_file())]
    if not saved.is_file() or load_config(saved) not in quickstarts:
        raise InputError(
            f"{run}: exists and is not an earlier quickstart; remove it or give another folder with"
            " --output"
        )
    console.print(f"{run}: an earlier quickstart is removed", markup=False)
    # Renamed first, so that an interrupted removal leaves no folder that looks like a run.
    shutil.rmtree(run.rename(run.with_name(f".{run.name}.removed-{os.getpid()}")))


def baseline_rows(name: str, labels: Sequence[str], test: Sequence[Example]) -> list[Prediction]:
    """A baseline's labels as prediction rows."""
    return [
        Prediction(
            example.id,
            example.relation,
            label,
            example.dataset,
            "gen_constrained",
            name,
            "baseline",
            "n/a",
        )
        for example, label in zip(test, labels, strict=True)
    ]


def summarise(run: Path, systems: Sequence[System]) -> dict:
    """Scores and the run's own figures from its log, for scripts.

    `f1` is the fine-tuned model's, `baselines` maps the name of each other system to its F1.
    `rows` lists the shapes of the packed rows: [rows, tokens of a row, supervised positions of a
    row] each. The shares are of all tokens (pad) and of real ones (supervised).
    """
    records = {record["kind"]: record for record in read_log(run)}
    end = records["end"]
    return {
        "f1": systems[0].scores.f1,
        "baselines": {system.name: system.scores.f1 for system in systems[1:]},
        "train_seconds": end["train_seconds"],
        "real_tokens_per_second": end["tokens_per_second"],
        "rows": end["rows"],
        "pad_share": end["pad_share"],
        "supervised_share": end["supervised_share"],
    }
