"""`jaxre study`: plans a grid of runs, shows the plan, executes the steps that are left, and writes
the record of the study.

    failed = study(load_study("configs/study/small.yaml"), Console())

A killed study resumes: a run from its last checkpoint, everything else from the last finished step.
A step that fails is recorded and reported; the others continue, and the next start retries it.
"""

from __future__ import annotations

import dataclasses
import datetime
import gc
import time
import traceback
from pathlib import Path
from typing import Any, get_args

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console
from rich.progress import Progress

from jaxre import __version__
from jaxre.checkpoints.peft import load_adapter
from jaxre.checkpoints.source import Loaded, open_model
from jaxre.compilation_cache import use_compilation_cache
from jaxre.config import Config, Prompt, Source
from jaxre.data.tokens import demonstrator
from jaxre.errors import InputError
from jaxre.evaluation.baselines import majority, tfidf_marked
from jaxre.evaluation.compare import ALL_PAIRS, join_answers
from jaxre.evaluation.evaluate import write_json
from jaxre.evaluation.frontier.cache import gold_differs
from jaxre.evaluation.predictions import GenType, Prediction, write_predictions
from jaxre.inference.predict import predict_examples
from jaxre.relations import sources
from jaxre.relations.label_map import read_label_map
from jaxre.relations.schema import Example
from jaxre.study.digests import own_code
from jaxre.study.estimate import dtype_for
from jaxre.study.grid import System
from jaxre.study.latency import latency_ms
from jaxre.study.plan import Plan, Step, in_order, make_plan, plan_table
from jaxre.study.results import results_table, write_study
from jaxre.study.settings import StudyConfig
from jaxre.training.log import read_log
from jaxre.training.loop import train
from jaxre.training.run_folder import locked

BASELINES = {"majority": majority, "tfidf": tfidf_marked}


def study(settings: StudyConfig, console: Console, plan_only: bool = False) -> int:
    """Plans a study; without `plan_only` also executes the steps that are left and writes
    `study.json`. Returns the number of steps without a result.

    Raises:
      InputError: settings that make no valid run, a folder that cannot be written, another process
        that runs this study.
    """
    with sources.remembered():
        plan = make_plan(settings)
        console.print(plan_table(plan))
        if plan_only:
            return 0
        use_compilation_cache(lambda *line: console.print(*line, markup=False))
        with locked(settings.folder):
            return Execution(plan, console).everything()


class Execution:
    """State of a running study: its plan, the open base weights, and the model on the device."""

    def __init__(self, plan: Plan, console: Console):
        self.plan, self.console = plan, console
        self.settings, self.folder = plan.settings, plan.settings.folder
        self.base: tuple[tuple[str, ...], Loaded] | None = None  # by `Step.base`
        self.on_device: tuple[str, Loaded] | None = None  # by `Step.needs`

    def everything(self) -> int:
        """Executes all steps that are not done and writes the record; returns the number of steps
        without a result.
        """
        order = in_order(self.plan)
        without: dict[str, str] = {}
        for number, step in enumerate(order, 1):
            if self.plan.state(step) == "done":
                continue
            self.console.rule(f"{number} of {len(order)}: {step.name}", characters="-")
            if problem := self.attempt(step):
                without[step.name] = problem
                self.console.print(
                    f"FAILED {step.name}: {problem}",
                    style="bold red",
                    markup=False,
                    highlight=False,
                )
        record = write_study(self.plan, without)
        self.console.print(results_table(record))
        self.console.print(f"{record.folder / 'study.json'}", markup=False, highlight=False)
        if without:
            self.console.print(
                f"{len(without)} steps have no result; the same command tries them again:",
                markup=False,
            )
            for name, problem in without.items():
                self.console.print(
                    f"  {name}: {problem}", markup=False, highlight=False, soft_wrap=True
                )
        return len(without)

    def attempt(self, step: Step) -> str | None:
        """Executes a step and records it, done or failed; returns the reason of a failure."""
        if step.digest is None:
            return step.problem
        if step.needs and self.plan.state(self.plan.steps[f"train.{step.needs}"]) != "done":
            return f"needs {step.needs}, which has no result"
        began = time.perf_counter()
        execute = {"train": self.train, "measure": self.measure, "predict": self.predict}[step.kind]
        try:
            result = execute(step)
        # Out of memory or a bug in one run must not end the other runs of a study that takes days.
        except Exception as error:  # noqa: BLE001
            reason = (
                str(error)
                if isinstance(error, InputError)
                else "".join(traceback.format_exception_only(error)).strip()
            )
            self.record(step, {"failed": reason, "traceback": traceback.format_exc()})
            return reason.splitlines()[0]
        self.record(step, {"seconds": time.perf_counter() - began, **result})
        return None

    def record(self, step: Step, result: dict[str, Any]) -> None:
        """Writes `steps/NAME.json` atomically."""
        now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
        record = {
            "digest": step.digest,
            "kind": step.kind,
            **result,
            "finished": now,
            "version": __version__,
            "code": own_code(),
        }
        write_json(self.folder / "steps" / f"{step.name}.json", record)
        self.plan.records[step.name] = record

    # ---- training ---------------------------------------------------------------------------
    def train(self, step: Step) -> dict[str, Any]:
        """Trains or resumes a run; the seconds are those of its updates, over all processes that
        took part.
        """
        self.on_device = None
        # Drops the programs of earlier runs: each takes several memory mappings, and Linux allows a
        # process 65,530.
        jax.clear_caches()
        config = self.config(step)
        folder = train(
            config,
            self.console,
            opened=None if config.model.architecture else self.opened(step.base, config),
        )
        records = {record["kind"]: record for record in read_log(folder)}
        truncation = records.get("truncation", {})
        return {
            "seconds": trained_seconds(folder),
            "memory_bytes": records["end"]["memory_bytes"],
            "folder": folder.name,
            "truncation": {
                name: count for name, count in truncation.items() if name not in ("kind", "step")
            },
        }

    def config(self, step: Step) -> Config:
        """A run's config with its folder, and the folder of the run that it starts from."""
        run, folder = step.run, self.plan.run_folder(step.run.name)
        changes: dict[str, Any] = {"name": folder.name, "output": str(folder.parent)}
        if run.after:
            changes["model"] = _with_path(run.config, self.plan.run_folder(run.after)).model
        return run.config.model_copy(update=changes)

    def opened(self, base: tuple[str, ...], config: Config) -> Loaded:
        """The base weights on the host; they stay open until another base is opened."""
        if self.base is None or self.base[0] != base:
            self.base = self.on_device = None
            gc.collect()
            dtype = np.dtype(np.float32) if config.train.method == "full" else dtype_for(config)
            self.base = base, open_model(config.model.path, dtype, config.model.quantise)
        return self.base[1]

    # ---- models -----------------------------------------------------------------------------
    def model(self, step: Step) -> Loaded:
        """The model that a step evaluates, on the device: untuned, or the result of a run."""
        if (
            self.on_device is None
            or self.on_device[0] != step.needs
            or self.base is None
            or self.base[0] != step.base
        ):
            self.on_device = None
            loaded = self._load(step)
            self.on_device = (
                step.needs,
                dataclasses.replace(loaded, base=jax.tree.map(jnp.asarray, loaded.base)),
            )
        return self.on_device[1]

    def _load(self, step: Step) -> Loaded:
        if not step.needs:
            return self.opened(step.base, step.config)
        folder = self.plan.run_folder(step.needs)
        config = self.config(self.plan.steps[f"train.{step.needs}"])
        if config.train.method == "full":
            return self.opened(step.base, _with_path(config, folder))
        base = self.opened(step.base, config)
        lora, factors = load_adapter(folder / "adapter", base.architecture)
        return dataclasses.replace(base, lora=lora, factors=factors, kind="run")

    def measure(self, step: Step) -> dict[str, Any]:
        """Latency of one answer."""
        return {"latency_ms": latency_ms(self.model(step))}

    # ---- predictions ------------------------------------------------------------------------
    def predict(self, step: Step) -> dict[str, Any]:
        """Writes the predictions of a system for a dataset atomically."""
        extra: dict[str, Any] = {}
        if step.system.kind == "baseline":
            rows = self.baseline(step)
        elif step.system.kind == "frontier":
            rows, extra = self.frontier(step)
        else:
            rows = self.answers(step)
        write_predictions(self.plan.predictions(step), rows)
        return {"examples": len(rows), **extra}

    def answers(self, step: Step) -> list[Prediction]:
        """The predictions of a model."""
        system, config, prompt = step.system, step.config, step.system.prompt or Prompt()
        examples = self.plan.read.test(step.dataset)
        train_source = self.settings.datasets[step.dataset].train
        train_examples = self.plan.read.examples(train_source) if prompt.shots else []
        model = self.model(step)
        with Progress(console=self.console, transient=True) as bar:
            task = bar.add_task(f"{len(examples):,} examples", total=len(examples))
            rows = predict_examples(
                dataclasses.replace(model, name=system.model),
                examples,
                self.plan.read.labels(step.dataset),
                prompt,
                config.predict,
                mode="score" if system.kind == "encoder" else self.settings.evaluation.mode,
                demonstrations=demonstrator(train_examples, prompt, config.seed),
                tuned_dataset_name=(
                    f"re_{system.regime}"
                    if system.regime
                    else step.dataset
                    if system.kind == "encoder"
                    else "none"
                ),
                model_shot="n/a" if system.train_shots is None else str(system.train_shots),
                record=lambda rows: bar.advance(task, len(rows)),
            )
        return [dataclasses.replace(row, prompt_style=system.style) for row in rows]

    def baseline(self, step: Step) -> list[Prediction]:
        """The predictions of a baseline, trained here on the dataset's training split."""
        train_examples = self.plan.read.examples(self.settings.datasets[step.dataset].train)
        examples = self.plan.read.test(step.dataset)
        fitted = BASELINES[step.system.name](train_examples, examples)
        return [
            Prediction(
                example.id,
                example.relation,
                label,
                step.dataset,
                model_id=step.system.name,
                tuned_dataset_name=step.dataset,
                model_shot="n/a",
                prompt_shot="n/a",
                probabilities=dict(zip(fitted.classes, row, strict=True)),
            )
            for example, label, row in zip(
                examples, fitted.labels, fitted.probabilities.tolist(), strict=True
            )
        ]

    def frontier(self, step: Step) -> tuple[list[Prediction], dict[str, Any]]:
        """The cached answers that join a test example, and the note and cost of the record; with a
        label map gold and predicted labels are the common ones.
        """
        cached = self.settings.cached(step.system.name, step.dataset)
        source = self.settings.datasets[step.dataset].test
        examples = self.plan.read.test(step.dataset)
        full_split = Source(
            dataset=source.dataset, split=source.split, subset=source.subset, negatives=ALL_PAIRS
        )
        cache = self.plan.read.cache(cached.place, lambda: self.plan.read.examples(full_split))
        label_map = read_label_map(cached.labels) if cached.labels else None
        unanswered = [_unanswered(example, step.system) for example in examples]
        joined, missing, notes = join_answers(unanswered, cache, cached.model)
        if mismatches := [note for note in notes if not note.startswith("dataset")]:
            raise InputError(
                f"{cached.place}: {mismatches[0]}; correct frontier, or name another cache"
            )
        if not joined:
            raise InputError(
                f"{cached.place}: none of its answers is of a test example of {step.dataset};"
                " correct frontier or the test split"
            )
        differ = gold_differs(joined, label_map)
        if 2 * len(differ) > len(joined):
            row, answer = differ[0]
            raise InputError(
                f"{cached.place}: gold labels differ: {row.relation!r} here, {answer.gold!r} there"
                f" (example {row.example_id}); give frontier a label map (labels: ...), or"
                " correct it"
            )
        rows = [
            Prediction(
                row.example_id,
                label_map.gold(row.relation, row.example_id) if label_map else row.relation,
                label_map.cached(answer.label) if label_map else answer.label,
                step.dataset,
                model_id=answer.model or cached.name,
                tuned_dataset_name="frontier",
                model_shot="n/a",
                prompt_shot=answer.prompt_shot or "n/a",
                prompt_style=answer.prompt_style,
                prompt=answer.prompt,
                prompt_hash=answer.prompt_hash,
                input_tokens=answer.input_tokens,
                output_tokens=answer.output_tokens,
                cost_usd=answer.cost_usd,
                status=answer.status,
            )
            for row, answer in joined
        ]
        parts = [
            f"{len(rows):,} of {len(examples):,} test examples have a cached answer",
            *(f"{len(ids):,} {reason}" for reason, ids in missing.items()),
            *notes,
        ]
        if cached.labels:
            parts.append(f"scored with the common labels of {cached.labels}")
        costs = [row.cost_usd for row in rows if row.cost_usd is not None]
        return rows, ({"cost_usd": sum(costs)} if costs else {}) | {"note": "; ".join(parts)}


def _with_path(config: Config, path: Path) -> Config:
    """The config with another `model.path`."""
    return config.model_copy(update={"model": config.model.model_copy(update={"path": str(path)})})


def _unanswered(example: Example, system: System) -> Prediction:
    """An example with the prompt settings that the study states for a system with cached
    answers.
    """
    return Prediction(
        example.id,
        example.relation,
        "",
        example.dataset,
        gen_type="" if system.enumerated is None else get_args(GenType)[system.enumerated],
        prompt_shot="" if system.prompt_shots is None else str(system.prompt_shots),
        prompt_style=system.style,
        prompt_hash=example.prompt_hash or "",
    )


def trained_seconds(folder: Path) -> float:
    """Seconds of a run's updates without pauses, summed over the processes that trained it."""
    total = before = 0.0
    for record in read_log(folder):
        if record["kind"] == "speed":
            total += record["seconds"] - (before if record["seconds"] > before else 0.0)
            before = record["seconds"]
    return total
