"""A study's plan: every step with what it depends on as a digest, what it costs, and whether it is
done.

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

import jax
from rich.console import Group
from rich.table import Table
from rich.text import Text

from jaxre.checkpoints.source import check_finished
from jaxre.config import Config
from jaxre.errors import InputError
from jaxre.models.weights import AnyArchitecture
from jaxre.relations import sources
from jaxre.study.digests import Read, code_digest, digest, file_digest, run_digest
from jaxre.study.estimate import Load, Rates, architecture_for, asked_load, dtype_for, training_load
from jaxre.study.grid import Run, System, grid
from jaxre.study.settings import StudyConfig
from jaxre.training import sharding

NEEDS = "needs"
State = Literal["done", "begun", "to do", "failed", "impossible"]


@dataclass(frozen=True)
class Step:
    """One step. `digest` is None where what it depends on cannot be read, for the `problem` that is
    told.

    needs: name of the training run before it. config: of the model that is trained or asked, None
    for baselines and cached answers. base: what is open in memory for it; steps of one base follow
    one another.
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
    """The steps in the order of the grid, and what is known of them. `records` are those of
    `steps/`, by the step's name.
    """

    settings: StudyConfig
    runs: dict[str, Run]
    systems: tuple[System, ...]
    steps: dict[str, Step]
    read: Read
    rates: Rates
    records: dict[str, dict[str, Any]]

    def state(self, step: Step) -> State:
        """Of a step, by its record and by what it must have left."""
        if step.digest is None:
            return "impossible"
        record = self.records.get(step.name, {})
        if record.get("digest") == step.digest:
            if "failed" in record:
                return "failed"
            if self._left(step):
                return "done"
        begun = step.kind == "train" and (self.run_folder(step.run.name) / "checkpoints").is_dir()
        return "begun" if begun else "to do"

    def _left(self, step: Step) -> bool:
        """Whether what a finished step wrote is still there."""
        if step.kind == "predict":
            return self.predictions(step).is_file()
        if step.kind == "train":
            try:
                check_finished(self.run_folder(step.run.name), step.run.config)
            except InputError:
                return False
        return True

    def run_folder(self, run: str) -> Path:
        """Where a run trains: its name and its digest, so that another config never meets its
        checkpoints.
        """
        return self.settings.folder / "runs" / f"{run}-{self.steps[f'train.{run}'].digest[:8]}"

    def predictions(self, step: Step) -> Path:
        return self.settings.folder / "predictions" / step.system.name / f"{step.dataset}.parquet"

    def seconds(self, step: Step) -> float:
        """Expected of the whole step."""
        return (
            self.rates.seconds(step.load, step.architecture, dtype_for(step.config))
            if step.architecture
            else 0.0
        )


def make_plan(settings: StudyConfig) -> Plan:
    """Reads the data, counts each step's work on samples, and finds what is done. Nothing is
    written but the token cache.

    Raises:
      InputError: settings that make no valid run. What cannot be read is told at the step that
        needs it.
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
    steps = {
        step.name: step
        for step in Planner(settings, {run.name: run for run in runs}, systems, read).steps()
    }
    records = read_records(settings.folder / "steps")
    for step in steps.values():
        record = records.get(step.name, {})
        if step.architecture and record.get("digest") == step.digest and "seconds" in record:
            rates.add(step.kind, step.architecture, step.load, record["seconds"])
    return Plan(settings, {run.name: run for run in runs}, systems, steps, read, rates, records)


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
        """Cheap ones first, then each run followed by what is asked of it, then what is asked of
        the models themselves.
        """
        for system in self.systems:
            if system.kind in ("baseline", "frontier"):
                yield from (self._other(system, dataset) for dataset in system.datasets)
        for run in self.runs.values():
            yield self._train(run)
            if run.kind != "language-model":
                yield self._measure(run.name, run.name, self._config(run))
            for system in self.systems:
                asked = [
                    dataset for dataset in system.datasets if system.runs.get(dataset) == run.name
                ]
                yield from (
                    self._predict(system, dataset, run.name, self._config(run)) for dataset in asked
                )
        measured = set()
        for system in self.systems:
            if system.kind == "untuned":
                if system.model not in measured:
                    measured.add(system.model)
                    yield self._measure(f"{system.model}-untuned", "", system.config)
                yield from (
                    self._predict(system, dataset, "", system.config) for dataset in system.datasets
                )

    def _config(self, run: Run) -> Config:
        """Of a run, with the `model.path` that its chain of runs began with: for what the weights
        do not matter to.
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

        def found() -> tuple[str, Load]:
            self.digests[run.name] = run_digest(run, self.read, self._before(run.after))
            return self.digests[run.name], training_load(step.config, self.read)

        return _tried(step, found)

    def _measure(self, name: str, needs: str, config: Config) -> Step:
        step = Step(
            f"measure.{name}",
            "measure",
            needs=needs,
            config=config,
            base=self._asked_base(needs, config),
        )
        device = f"{jax.device_count()} x {jax.devices()[0].device_kind}"
        return _tried(step, lambda: (digest("measure", self._model(needs, config), device), Load()))

    def _predict(self, system: System, dataset: str, needs: str, config: Config) -> Step:
        step = Step(
            f"predict.{system.name}.{dataset}",
            "predict",
            system=system,
            dataset=dataset,
            needs=needs,
            config=config,
            base=self._asked_base(needs, config),
        )

        def found() -> tuple[str, Load]:
            given, prompt, evaluation = (
                self.settings.datasets[dataset],
                system.prompt,
                self.settings.evaluation,
            )
            examples = self.read.test(dataset)
            shown = given.train if prompt and prompt.shots else None
            if prompt and prompt.shots and shown is None:
                raise InputError(
                    f"datasets.{dataset} has no train, so there are no demonstrations of it; add"
                    " it, or ask without (shots=0)"
                )
            made = digest(
                "predict",
                self._model(needs, config),
                self.read.digest(given.test),
                self.read.labels(dataset),
                prompt and prompt.model_dump(mode="json", exclude_defaults=True),
                shown and [self.read.digest(shown), config.seed],
                evaluation.mode,
                config.predict.max_new_tokens if evaluation.mode == "generate" else None,
            )
            key = (config.model.path, dataset, prompt and prompt.model_dump_json())
            if key not in self.loads:
                self.loads[key] = asked_load(
                    config, self.read, dataset, prompt, evaluation.mode, given.test, len(examples)
                )
            return made, self.loads[key]

        return _tried(step, found)

    def _other(self, system: System, dataset: str) -> Step:
        """Of a baseline or of cached answers."""
        step = Step(f"predict.{system.name}.{dataset}", "predict", system=system, dataset=dataset)
        given = self.settings.datasets[dataset]

        def found() -> tuple[str, Load]:
            count, test = Load(len(self.read.test(dataset))), self.read.digest(given.test)
            if system.kind == "baseline":
                return digest("baseline", system.name, self.read.digest(given.train), test), count
            cached = self.settings.cached(system.name, dataset)
            maps = cached.labels and file_digest(Path(cached.labels))
            asked = [
                cached.model,
                *(one for one in (cached.enumerate, cached.shots, cached.style) if one is not None),
            ]
            return (
                digest("frontier", self.read.cache_digest(cached.place), maps, asked, test),
                count,
            )

        return _tried(step, found)

    def _before(self, run: str | None) -> str | None:
        """Digest of the run that another starts from. Raises InputError where it has none."""
        if run and run not in self.digests:
            raise InputError(f"{NEEDS} {run}, which cannot be planned")
        return self.digests[run] if run else None

    def _model(self, needs: str, config: Config) -> list[Any]:
        """What is asked: a run, or a model with how it is loaded."""
        return (
            [self._before(needs)]
            if needs
            else [self.read.model(config.model.path), config.model.dtype, config.model.quantise]
        )

    def _base(self, run: Run) -> tuple[str, ...]:
        config = run.config
        return (
            run.after or config.model.path,
            "float32" if config.train.method == "full" else config.model.dtype,
            str(config.model.quantise),
        )

    def _asked_base(self, needs: str, config: Config) -> tuple[str, ...]:
        if needs and config.train.method == "full":
            return (needs,)
        return (
            self._base(self.runs[needs])
            if needs
            else (config.model.path, config.model.dtype, str(config.model.quantise))
        )


def _tried(step: Step, found: Callable[[], tuple[str, Load]]) -> Step:
    """The step with its digest and load, or with the problem that keeps it from having them."""
    try:
        made, load = found()
        return replace(
            step, digest=made, load=load, architecture=step.config and architecture_for(step.config)
        )
    except InputError as error:
        return replace(step, problem=str(error))


def in_order(plan: Plan) -> list[Step]:
    """All steps, each after what it needs; of those that may come next, one of the base that is
    open, else the first.
    """
    waiting, order, done = list(plan.steps.values()), [], set()
    while waiting:
        ready = [step for step in waiting if not step.needs or step.needs in done]
        base = order[-1].base if order else ()
        step = next((one for one in ready if one.base == base), ready[0])
        order.append(step)
        waiting.remove(step)
        if step.kind == "train":
            done.add(step.run.name)
    return order


def read_records(folder: Path) -> dict[str, dict[str, Any]]:
    """The records of steps, by name; one that cannot be read is none."""
    found = {}
    for path in sorted(folder.glob("*.json")):
        try:
            found[path.stem] = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            continue
    return found


def plan_table(plan: Plan) -> Group:
    """Every run and system with what it takes, what cannot be done and why, and the hours that are
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
        left += sum(
            one
            for one, state in zip(seconds, states, strict=True)
            if state not in ("done", "impossible")
        )
        for step in steps:
            if step.problem:
                problems.setdefault(
                    "" if step.problem.startswith(NEEDS) else step.problem, []
                ).append(step.name)
        if steps[0].kind == "measure":
            continue  # seconds each; their state is in the next start's plan where they fail
        load = sum((step.load for step in steps), Load())
        flops = load.train_flops + load.predict_flops
        table.add_row(
            Text(_called(steps)),
            f"{load.examples:,}" if load.examples else "",
            f"{load.tokens / 1e3:,.0f}" if load.tokens else "",
            f"{flops / 1e12:,.3g}" if flops else "",
            f"{sum(seconds) / 3600:.2f}" if flops else "",
            Text(
                ", ".join(
                    f"{states.count(one)} {one}" if len(steps) > 1 else one
                    for one in dict.fromkeys(states)
                )
            ),
        )
    devices = f"{jax.device_count()} x {jax.devices()[0].device_kind}"
    lines = [f"expected on {devices}: {left / 3600:.2f} hours for what is left to do"]
    other = [
        name
        for name, step in plan.steps.items()
        if plan.state(step) == "done" and plan.records[name].get("code") != code_digest()
    ]
    if other:
        lines.append(
            f"{len(other)} finished steps were made by other code of jaxre; to make one again,"
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
    """A line for each dataset of which some test examples have a text of its training split."""
    lines = []
    for name, dataset in plan.settings.datasets.items():
        try:
            test, train = (
                plan.read.test(name),
                plan.read.examples(dataset.train) if dataset.train else [],
            )
        except InputError:
            continue  # told at the steps that need it
        if found := sources.overlap(train, test):
            pairs = f"{len(found.same_pair):,} with the same pair"
            lines.append(
                f"leak: {len(found.same_text):,} of {len(test):,} test examples of {name} have a"
                f" text of its training split, {pairs}"
            )
    return lines


def _called(steps: list[Step]) -> str:
    """A run, with the one that it starts from, or a system with its number of datasets."""
    first = steps[0]
    if first.run:
        return f"train {first.run.name}" + (
            f" (after {first.run.after})" if first.run.after else ""
        )
    return f"  ask {first.system.name}, {len(steps)} dataset{'s' if len(steps) > 1 else ''}"
