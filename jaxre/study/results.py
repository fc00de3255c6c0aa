"""What a study found: its record (`study.json`, with the test examples beside it), and the table of
all systems by dataset.
"""

from __future__ import annotations

import datetime
import platform
from collections import defaultdict
from importlib.metadata import version
from typing import Any

import jax
import numpy as np
from rich.table import Table
from rich.text import Text

from jaxre.errors import InputError
from jaxre.evaluation.evaluate import evaluate_rows
from jaxre.evaluation.study_record import (
    RecordedDataset,
    RecordedSystem,
    StudyRecord,
    write_examples,
    write_record,
)
from jaxre.models.weights import parameter_count
from jaxre.relations.benchmarks import open_licence
from jaxre.relations.label_map import read_label_map
from jaxre.study.estimate import dtype_for, sizes_of
from jaxre.study.grid import System
from jaxre.study.plan import Plan

PACKAGES = ("jaxre", "jax", "jaxlib", "transformers")


def write_study(plan: Plan, without: dict[str, str]) -> StudyRecord:
    """Writes the examples and `study.json`, of the steps that are done; `without`: step -> why it
    is not.
    """
    folder = plan.settings.folder
    datasets = tuple(one for name in plan.settings.datasets if (one := _dataset(plan, name)))
    known = {one.name for one in datasets}
    record = StudyRecord(
        name=plan.settings.name,
        folder=folder,
        datasets=datasets,
        systems=tuple(
            one for system in plan.systems if (one := _system(plan, system, known)).predictions
        ),
        device=f"{jax.device_count()} x {jax.devices()[0].device_kind}",
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
    """None where its examples cannot be read; the plan told why."""
    try:
        examples, labels = plan.read.test(name), plan.read.labels(name)
    except InputError:
        return None
    path = f"data/{name}.jsonl"
    write_examples(plan.settings.folder / path, examples)
    return RecordedDataset(name, examples[0].domain, labels, path, open_licence(name))


def _system(plan: Plan, system: System, known: set[str]) -> RecordedSystem:
    steps = {
        name: plan.steps[f"predict.{system.name}.{name}"]
        for name in system.datasets
        if name in known
    }
    done = {name: step for name, step in steps.items() if plan.state(step) == "done"}
    notes = [
        system.note,
        *(note for step in done.values() if (note := plan.records[step.name].get("note"))),
    ]
    costs = [
        cost
        for step in done.values()
        if (cost := plan.records[step.name].get("cost_usd")) is not None
    ]
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
    """The label map of each cache that has one: its predictions are in common labels."""
    caches = (
        {name: plan.settings.cached(system.name, name) for name in done}
        if system.kind == "frontier"
        else {}
    )
    return {name: read_label_map(one.labels).common for name, one in caches.items() if one.labels}


def _footprint(plan: Plan, system: System) -> dict[str, Any]:
    """Parameters, seconds of training (of an adapted model with the language modelling before),
    latency, memory, sizes, truncation.
    """
    runs = sorted(set(system.runs.values())) or ([""] if system.config else [])
    if not runs:
        return {}
    chain = list(runs)
    for run in chain:
        chain += [after] if run and (after := plan.runs[run].after) else []
    trained = [plan.records.get(f"train.{run}", {}) for run in chain if run]
    measured = [plan.records.get(f"measure.{run or f'{system.model}-untuned'}", {}) for run in runs]
    steps = [step for step in plan.steps.values() if step.system is system and step.architecture]
    if not steps:
        return {}
    config, architecture = steps[0].config, steps[0].architecture
    lora = config.lora if system.runs and config.train.method == "lora" else None
    latencies = [one["latency_ms"] for one in measured if "latency_ms" in one]
    return {
        "parameters": parameter_count(architecture),
        "seconds": (
            sum(one["seconds"] for one in trained)
            if trained and all("seconds" in one for one in trained)
            else None
        ),
        "latency_ms": float(np.mean(latencies)) if latencies else None,
        "peak_memory_bytes": max(
            (one["memory_bytes"] for one in trained if "memory_bytes" in one), default=None
        ),
        "sizes": sizes_of(architecture, dtype_for(config).itemsize, lora),
        "truncation": trained[0].get("truncation", {}) if trained else {},
    }


def results_table(record: StudyRecord) -> Table:
    """Positive-class micro-F1 of each system on each dataset, and its mean over the datasets of
    each domain.

    What a system was not trained on stands in brackets and is left out of its mean, unless that is
    all of the domain. Figures in common labels are in no mean.
    """
    domains = defaultdict(list)
    for dataset in record.datasets:
        domains[dataset.domain].append(dataset.name)
    table = Table(title=f"{record.name}: positive-class micro-F1", title_justify="left")
    table.add_column("system", overflow="fold")
    for names in domains.values():
        for name in names:
            table.add_column(name, justify="right", overflow="fold")
    for domain in domains:
        table.add_column(f"mean {domain}", justify="right")
    for system in record.systems:
        scores = {
            name: evaluate_rows(record.rows(system, name), system.predictions[name]).f1
            for name in system.predictions
        }
        cells = [_cell(system, name, scores) for names in domains.values() for name in names]
        table.add_row(
            Text(system.name), *cells, *(_mean(system, names, scores) for names in domains.values())
        )
    carried = (
        "(x): not trained on this, and not in the mean beside it; *: the mean is not over all"
        " datasets of the domain"
    )
    table.caption = f"{carried}; †: in labels common with cached answers, in no mean"
    return table


def _cell(system: RecordedSystem, dataset: str, scores: dict[str, float]) -> str:
    if dataset not in scores:
        return ""
    carried = system.trained_on and dataset not in system.trained_on
    return (
        f"({scores[dataset]:.3f})"
        if carried
        else f"{scores[dataset]:.3f}" + ("†" if dataset in system.common_labels else "")
    )


def _mean(system: RecordedSystem, names: list[str], scores: dict[str, float]) -> str:
    """Unweighted, over the datasets of a domain that a system was trained on, or over all of them
    in brackets.
    """
    asked = [name for name in names if name in scores and name not in system.common_labels]
    trained = [name for name in asked if not system.trained_on or name in system.trained_on]
    if not asked:
        return ""
    mean = f"{np.mean([scores[name] for name in trained or asked]):.3f}"
    return (mean if trained else f"({mean})") + ("" if len(trained or asked) == len(names) else "*")
