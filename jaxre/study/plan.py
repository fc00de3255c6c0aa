"""A study's plan: every step with the digest of its inputs, its cost, and whether it is done.

    plan = make_plan(load_study("configs/study/small.yaml"))
    console.print(plan_table(plan))

A step is a training run, the measurement of a model (latency, sizes), or the predictions of one
system for one dataset.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from rich.console import Group
from rich.table import Table
from rich.text import Text

from jaxre.checkpoints.source import check_finished
from jaxre.config import Config
from jaxre.errors import InputError
from jaxre.models import sharding
from jaxre.models.weights import AnyArchitecture
from jaxre.relations import sources
from jaxre.study.digests import Read, digest, file_digest, own_code, run_digest
from jaxre.study.estimate import (
    Load,
    Rates,
    architecture_for,
    device_description,
    dtype_for,
    prediction_load,
    training_load,
)
from jaxre.study.grid import Run, System, grid
from jaxre.study.settings import StudyConfig

NEEDS = "needs"
State = Literal["done", "begun", "to do", "failed", "impossible"]


@dataclass(frozen=True)
class Step:
    """One step. `digest` is None where an input cannot be read; `problem` then says why.

    needs: name of the training run before it. config: of the model that is trained or evaluated,
    None for baselines and cached answers. base: the base weights that are open in memory for it;
    steps of one base run one after another.
    """

    name: str
    kind: Literal["train", "measure", "predict"]
    run: Run | None = None
    system: System | None = None
    dataset: str = ""
    needs: str = ""
    config: Config | None = None
    base: tuple[str, ...] = ()
    digest: str | None = None
    problem: str = ""
    architecture: AnyArchitecture | None = None
    load: Load = field(default_factory=Load)


@dataclass
class Plan:
    """The steps in the order of the grid, with their data, rates and records. `records` are the
    files of `steps/`, by the step's name.
    """

    settings: StudyConfig
    runs: dict[str, Run]
    systems: tuple[System, ...]
    steps: dict[str, Step]
    read: Read
    rates: Rates
    records: dict[str, dict[str, Any]]

    def state(self, step: Step) -> State:
        """The state of a step, by its record and the files that it must have written."""
        if step.digest is None:
            return "impossible"
        record = self.records.get(step.name, {})
        if record.get("digest") == step.digest:
            if "failed" in record:
                return "failed"
            if self._has_output(step):
                return "done"
        begun = step.kind == "train" and (self.run_folder(step.run.name) / "checkpoints").is_dir()
        return "begun" if begun else "to do"

    def _has_output(self, step: Step) -> bool:
        if step.kind == "predict":
            return self.predictions(step).is_file()
        if step.kind == "train":
            try:
                check_finished(self.run_folder(step.run.name), step.run.config)
            except InputError:
                return False
        return True

    def run_folder(self, run: str) -> Path:
        """Folder of a run: its name and its digest, so that another config never meets its
        checkpoints.
        """
        return self.settings.folder / "runs" / f"{run}-{self.steps[f'train.{run}'].digest[:8]}"

    def predictions(self, step: Step) -> Path:
        return self.settings.folder / "predictions" / step.system.name / f"{step.dataset}.parquet"

    def seconds(self, step: Step) -> float:
        """Expected seconds of the whole step."""
        if step.architecture is None:
            return 0.0
        return self.rates.seconds(step.load, step.architecture, dtype_for(step.config))


def make_plan(settings: StudyConfig) -> Plan:
    """Reads the data, counts each step's work on samples, and determines which steps are done.
    Writes nothing but the token cache.

    Raises:
      InputError: settings that make no valid run. Data that cannot be read is reported at the step
        that needs it.
    """
    runs, systems = grid(settings)
    configs = [run.config for run in runs] + [system.config for system in systems if system.config]
    meshes = {config.mesh.model_dump_json(): config.mesh for config in configs}
    if len(meshes) > 1:
        raise InputError(
            f"{settings.name}: its runs have different meshes ({' and '.join(meshes)}); one process"
            " has one: set base.mesh only"
        )
    for mesh in meshes.values():
        sharding.split_cpu(mesh.cpu_devices)
    rates = Rates(sharding.make_mesh(*meshes.values()) if meshes else None)
    read = Read(settings.datasets)
    runs_by_name = {run.name: run for run in runs}
    steps = {step.name: step for step in Planner(settings, runs_by_name, systems, read).steps()}
    records = read_records(settings.folder / "steps")
    for step in steps.values():
        record = records.get(step.name, {})
        if step.architecture and record.get("digest") == step.digest and "seconds" in record:
            rates.add(step.kind, step.architecture, step.load, record["seconds"])
    return Plan(settings, runs_by_name, systems, steps, read, rates, records)


@dataclass
class Planner:
    """Makes the steps of a grid."""

    settings: StudyConfig
    runs: dict[str, Run]
    systems: tuple[System, ...]
    read: Read
    digests: dict[str, str] = field(default_factory=dict)  # of the runs that could be read
    loads: dict[tuple, Load] = field(default_factory=dict)

    def steps(self) -> Iterator[Step]:
        """Cheap steps first, then each run with its predictions, then the untuned models."""
        for system in self.systems:
            if system.kind in ("baseline", "frontier"):
                for dataset in system.datasets:
                    yield self._without_model(system, dataset)
        for run in self.runs.values():
            config = self._config(run)
            yield self._train(run)
            if run.kind != "language-model":
                yield self._measure(run.name, run.name, config)
            for system in self.systems:
                for dataset in system.datasets:
                    if system.runs.get(dataset) == run.name:
                        yield self._predict(system, dataset, run.name, config)
        measured = set()
        for system in self.systems:
            if system.kind == "untuned":
                if system.model not in measured:
                    measured.add(system.model)
                    yield self._measure(f"{system.model}-untuned", "", system.config)
                for dataset in system.datasets:
                    yield self._predict(system, dataset, "", system.config)

    def _config(self, run: Run) -> Config:
        """A run's config with the `model.path` of the first run of its chain: enough wherever the
        weights do not matter.
        """
        if run.after is None:
            return run.config
        first = self._config(self.runs[run.after])
        return run.config.model_copy(
            update={"model": run.config.model.model_copy(update={"path": first.model.path})}
        )

    def _train(self, run: Run) -> Step:
        step = Step(
            f"train.{run.name}",
            "train",
            run,
            needs=run.after or "",
            config=self._config(run),
            base=self._base(run),
        )

        def digest_and_load() -> tuple[str, Load]:
            before = self._digest_of_run(run.after) if run.after else None
            self.digests[run.name] = run_digest(run, self.read, before)
            return self.digests[run.name], training_load(step.config, self.read)

        return _completed(step, digest_and_load)

    def _measure(self, name: str, needs: str, config: Config) -> Step:
        step = Step(
            f"measure.{name}",
            "measure",
            needs=needs,
            config=config,
            base=self._evaluated_base(needs, config),
        )
        return _completed(
            step,
            lambda: (digest("measure", self._model(needs, config), device_description()), Load()),
        )

    def _predict(self, system: System, dataset: str, needs: str, config: Config) -> Step:
        step = Step(
            f"predict.{system.name}.{dataset}",
            "predict",
            system=system,
            dataset=dataset,
            needs=needs,
            config=config,
            base=self._evaluated_base(needs, config),
        )

        def digest_and_load() -> tuple[str, Load]:
            sources_of_dataset, prompt = self.settings.datasets[dataset], system.prompt
            mode = self.settings.evaluation.mode
            examples = self.read.test(dataset)
            shown = sources_of_dataset.train if prompt and prompt.shots else None
            if prompt and prompt.shots and shown is None:
                raise InputError(
                    f"datasets.{dataset} has no train, so there are no demonstrations of it; add"
                    " it, or ask without (shots=0)"
                )
            step_digest = digest(
                "predict",
                self._model(needs, config),
                self.read.digest(sources_of_dataset.test),
                self.read.labels(dataset),
                prompt and prompt.model_dump(mode="json", exclude_defaults=True),
                shown and [self.read.digest(shown), config.seed],
                mode,
                config.predict.max_new_tokens if mode == "generate" else None,
            )
            key = (config.model.path, dataset, prompt and prompt.model_dump_json())
            if key not in self.loads:
                self.loads[key] = prediction_load(
                    config,
                    self.read,
                    prompt,
                    mode,
                    sources_of_dataset.test,
                    len(examples),
                )
            return step_digest, self.loads[key]

        return _completed(step, digest_and_load)

    def _without_model(self, system: System, dataset: str) -> Step:
        """The step of a baseline or of cached answers."""
        step = Step(f"predict.{system.name}.{dataset}", "predict", system=system, dataset=dataset)
        sources_of_dataset = self.settings.datasets[dataset]

        def digest_and_load() -> tuple[str, Load]:
            load = Load(len(self.read.test(dataset)))
            test = self.read.digest(sources_of_dataset.test)
            if system.kind == "baseline":
                train = self.read.digest(sources_of_dataset.train)
                return digest("baseline", system.name, train, test), load
            cached = self.settings.cached(system.name, dataset)
            label_map = cached.labels and file_digest(Path(cached.labels))
            selection = [
                cached.model,
                *(
                    value
                    for value in (cached.enumerate, cached.shots, cached.style)
                    if value is not None
                ),
            ]
            cache = self.read.cache_digest(cached.place)
            return digest("frontier", cache, label_map, selection, test), load

        return _completed(step, digest_and_load)

    def _digest_of_run(self, run: str) -> str:
        if run not in self.digests:
            raise InputError(f"{NEEDS} {run}, which cannot be planned")
        return self.digests[run]

    def _model(self, needs: str, config: Config) -> list[Any]:
        """The evaluated model in a digest: a run, or a model folder with its dtype and
        quantisation.
        """
        if needs:
            return [self._digest_of_run(needs)]
        return [self.read.model(config.model.path), config.model.dtype, config.model.quantise]

    def _base(self, run: Run) -> tuple[str, ...]:
        config = run.config
        return (
            run.after or config.model.path,
            "float32" if config.train.method == "full" else config.model.dtype,
            str(config.model.quantise),
        )

    def _evaluated_base(self, needs: str, config: Config) -> tuple[str, ...]:
        if not needs:
            return config.model.path, config.model.dtype, str(config.model.quantise)
        return (needs,) if config.train.method == "full" else self._base(self.runs[needs])


def _completed(step: Step, digest_and_load: Callable[[], tuple[str, Load]]) -> Step:
    """The step with its digest and load, or with the problem that prevents them."""
    try:
        step_digest, load = digest_and_load()
        architecture = step.config and architecture_for(step.config)
        return replace(step, digest=step_digest, load=load, architecture=architecture)
    except InputError as error:
        return replace(step, problem=str(error))


def in_order(plan: Plan) -> list[Step]:
    """All steps, each after the run that it needs. Of the steps that can come next, one whose base
    is open goes first, else the first of the grid.
    """
    waiting, order, done = list(plan.steps.values()), [], set()
    while waiting:
        ready = [step for step in waiting if not step.needs or step.needs in done]
        base = order[-1].base if order else ()
        step = next((step for step in ready if step.base == base), ready[0])
        order.append(step)
        waiting.remove(step)
        if step.kind == "train":
            done.add(step.run.name)
    return order


def read_records(folder: Path) -> dict[str, dict[str, Any]]:
    """The records of steps, by name; unreadable ones are skipped."""
    records = {}
    for path in sorted(folder.glob("*.json")):
        try:
            records[path.stem] = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            continue
    return records


def plan_table(plan: Plan) -> Group:
    """Cost and state of every run and system, the impossible steps with the reason, and the hours
    left.
    """
    table = Table(title=f"plan of {plan.settings.name}", title_justify="left")
    for column in ("step", "examples", "k tokens", "TFLOP", "hours", "state"):
        table.add_column(
            column, justify="left" if column in ("step", "state") else "right", overflow="fold"
        )
    left, problems = 0.0, {}
    for _, group in itertools.groupby(
        in_order(plan), lambda step: (step.kind, step.run or step.system or step.name)
    ):
        steps = list(group)
        states = [plan.state(step) for step in steps]
        seconds = [plan.seconds(step) for step in steps]
        for step, state, expected in zip(steps, states, seconds, strict=True):
            if state not in ("done", "impossible"):
                left += expected
            if step.problem:
                problem = "" if step.problem.startswith(NEEDS) else step.problem
                problems.setdefault(problem, []).append(step.name)
        if steps[0].kind == "measure":
            continue  # a few seconds each; the next start's plan shows those that failed
        load = sum((step.load for step in steps), Load())
        flops = load.train_flops + load.predict_flops
        table.add_row(
            Text(_title(steps)),
            f"{load.examples:,}" if load.examples else "",
            f"{load.tokens / 1e3:,.0f}" if load.tokens else "",
            f"{flops / 1e12:,.3g}" if flops else "",
            f"{sum(seconds) / 3600:.2f}" if flops else "",
            Text(
                ", ".join(
                    f"{states.count(state)} {state}" if len(steps) > 1 else state
                    for state in dict.fromkeys(states)
                )
            ),
        )
    lines = [f"expected on {device_description()}: {left / 3600:.2f} hours for what is left to do"]
    other_code = [
        name
        for name, step in plan.steps.items()
        if plan.state(step) == "done" and plan.records[name].get("code") != own_code()
    ]
    if other_code:
        lines.append(
            f"{len(other_code)} finished steps were made by other code of jaxre; to make one again,"
            " delete its file in steps/"
        )
    lines += leaks_of(plan)
    after = len(problems.pop("", []))
    lines += [
        f"impossible: {len(names)} steps ({names[0]}, ...): {problem}"
        for problem, names in problems.items()
    ]
    lines += [f"impossible: {after} steps that need one of those"] if after else []
    return Group(table, *map(Text, lines))


def leaks_of(plan: Plan) -> list[str]:
    """A line for each dataset whose test split shares texts with its training split."""
    lines = []
    for name, dataset in plan.settings.datasets.items():
        try:
            test = plan.read.test(name)
            train = plan.read.examples(dataset.train) if dataset.train else []
        except InputError:
            continue  # reported at the steps that need it
        if overlap := sources.overlap(train, test):
            lines.append(
                f"leak: {len(overlap.same_text):,} of {len(test):,} test examples of {name} have a"
                f" text of its training split, {len(overlap.same_pair):,} with the same pair"
            )
    return lines


def _title(steps: list[Step]) -> str:
    first = steps[0]
    if first.run:
        after = f" (after {first.run.after})" if first.run.after else ""
        return f"train {first.run.name}{after}"
    return f"  ask {first.system.name}, {len(steps)} dataset{'s' if len(steps) > 1 else ''}"
