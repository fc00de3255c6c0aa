"""Results of a study: its record (`study.json`, with the test examples beside it), and the table of
all systems by dataset.
"""

from __future__ import annotations

import datetime
import itertools
import platform
from collections import defaultdict
from importlib.metadata import version
from typing import Any

import numpy as np
from rich.table import Table
from rich.text import Text

from jaxre.errors import InputError
from jaxre.evaluation.evaluate import evaluate_rows
from jaxre.evaluation.report.record import (
    RecordedDataset,
    RecordedSystem,
    StudyRecord,
    write_examples,
    write_record,
)
from jaxre.models.weights import parameter_count
from jaxre.relations.benchmarks import open_licence
from jaxre.relations.label_map import read_label_map
from jaxre.study.estimate import device_description, dtype_for, sizes_of
from jaxre.study.grid import System
from jaxre.study.plan import Plan

PACKAGES = ("jaxre", "jax", "jaxlib", "transformers")


def write_study(plan: Plan, without: dict[str, str]) -> StudyRecord:
    """Writes the examples and `study.json` of the steps that are done.

    Args:
      without: step -> the reason why it has no result.
    """
    datasets = tuple(filter(None, (_dataset(plan, name) for name in plan.settings.datasets)))
    readable = {dataset.name for dataset in datasets}
    systems = (_system(plan, system, readable) for system in plan.systems)
    record = StudyRecord(
        name=plan.settings.name,
        folder=plan.settings.folder,
        datasets=datasets,
        systems=tuple(system for system in systems if system.predictions),
        device=device_description(),
        versions={
            "python": platform.python_version(),
            **{name: version(name) for name in PACKAGES},
        },
        date=datetime.datetime.now(datetime.UTC).date().isoformat(),
        without=without,
    )
    write_record(record)
    return record


def _dataset(plan: Plan, name: str) -> RecordedDataset | None:
    """None where its examples cannot be read; the plan says why."""
    try:
        examples, labels = plan.read.test(name), plan.read.labels(name)
    except InputError:
        return None
    path = f"data/{name}.jsonl"
    write_examples(plan.settings.folder / path, examples)
    return RecordedDataset(name, examples[0].domain, labels, path, open_licence(name))


def _system(plan: Plan, system: System, readable: set[str]) -> RecordedSystem:
    steps = {
        name: plan.steps[f"predict.{system.name}.{name}"]
        for name in system.datasets
        if name in readable
    }
    done = {name: step for name, step in steps.items() if plan.state(step) == "done"}
    records = [plan.records[step.name] for step in done.values()]
    notes = [system.note, *(record.get("note") for record in records)]
    costs = [record["cost_usd"] for record in records if record.get("cost_usd") is not None]
    return RecordedSystem(
        name=system.name,
        kind=system.kind,
        model=system.model,
        predictions={
            name: str(plan.predictions(step).relative_to(plan.settings.folder))
            for name, step in done.items()
        },
        regime=system.regime,
        train_shots=system.train_shots,
        prompt_shots=system.prompt_shots,
        enumerated=system.enumerated,
        style=system.style,
        trained_on=system.trained_on,
        common_labels=_common_labels(plan, system, done),
        cost_usd=sum(costs) if costs else None,
        note="; ".join(filter(None, notes)),
        **_footprint(plan, system),
    )


def _common_labels(plan: Plan, system: System, done: dict[str, Any]) -> dict[str, dict[str, str]]:
    """The common labels of each dataset whose cache has a label map."""
    if system.kind != "frontier":
        return {}
    maps = {name: plan.settings.cached(system.name, name).labels for name in done}
    return {name: read_label_map(path).common for name, path in maps.items() if path}


def _footprint(plan: Plan, system: System) -> dict[str, Any]:
    """Parameters, seconds of training (of an adapted model including its language modelling),
    latency, memory, sizes, truncation; empty for systems without a model.
    """
    steps = [step for step in plan.steps.values() if step.system is system and step.architecture]
    if not steps:
        return {}
    runs = sorted(set(system.runs.values()))
    chain = list(runs)
    for run in chain:  # grows while it is read: each run is followed by those that it starts from
        chain += [after] if (after := plan.runs[run].after) else []
    trained = [plan.records.get(f"train.{run}", {}) for run in chain]
    measured = [
        plan.records.get(f"measure.{name}", {}) for name in runs or [f"{system.model}-untuned"]
    ]
    config, architecture = steps[0].config, steps[0].architecture
    lora = config.lora if system.runs and config.train.method == "lora" else None
    latencies = [record["latency_ms"] for record in measured if "latency_ms" in record]
    seconds = [record["seconds"] for record in trained if "seconds" in record]
    return {
        "parameters": parameter_count(architecture),
        "seconds": sum(seconds) if trained and len(seconds) == len(trained) else None,
        "latency_ms": float(np.mean(latencies)) if latencies else None,
        "peak_memory_bytes": max(
            (record["memory_bytes"] for record in trained if "memory_bytes" in record),
            default=None,
        ),
        "sizes": sizes_of(architecture, dtype_for(config).itemsize, lora),
        "truncation": trained[0].get("truncation", {}) if trained else {},
    }


def results_table(record: StudyRecord) -> Table:
    """Positive-class micro-F1 of each system on each dataset, and its mean over the datasets of
    each domain.

    Scores on datasets that a system was not trained on are in brackets and count in its mean only
    where it was trained on no dataset of the domain. Scores in common labels are in no mean.
    """
    domains = defaultdict(list)
    for dataset in record.datasets:
        domains[dataset.domain].append(dataset.name)
    table = Table(title=f"{record.name}: positive-class micro-F1", title_justify="left")
    table.add_column("system", overflow="fold")
    for name in itertools.chain(*domains.values()):
        table.add_column(name, justify="right", overflow="fold")
    for domain in domains:
        table.add_column(f"mean {domain}", justify="right")
    for system in record.systems:
        scores = {
            name: evaluate_rows(record.rows(system, name), system.predictions[name]).f1
            for name in system.predictions
        }
        cells = [_cell(system, name, scores) for name in itertools.chain(*domains.values())]
        means = [_mean(system, names, scores) for names in domains.values()]
        table.add_row(Text(system.name), *cells, *means)
    table.caption = (
        "(x): not trained on this, and not in the mean beside it; *: the mean is not over all"
        " datasets of the domain; †: in labels common with cached answers, in no mean"
    )
    return table


def _cell(system: RecordedSystem, dataset: str, scores: dict[str, float]) -> str:
    if dataset not in scores:
        return ""
    if system.trained_on and dataset not in system.trained_on:
        return f"({scores[dataset]:.3f})"
    return f"{scores[dataset]:.3f}{'†' if dataset in system.common_labels else ''}"


def _mean(system: RecordedSystem, names: list[str], scores: dict[str, float]) -> str:
    """Unweighted mean over the datasets of a domain that a system was trained on, or over all of
    them in brackets.
    """
    comparable = [name for name in names if name in scores and name not in system.common_labels]
    if not comparable:
        return ""
    trained = [name for name in comparable if not system.trained_on or name in system.trained_on]
    averaged = trained or comparable
    mean = f"{np.mean([scores[name] for name in averaged]):.3f}"
    return (mean if trained else f"({mean})") + ("" if len(averaged) == len(names) else "*")
