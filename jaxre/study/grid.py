"""A study's grid: the runs it trains, and the systems it evaluates.

    runs, systems = grid(settings)

No data is read: a grid follows from the settings alone.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from jaxre.config import Config, Mixture, Prompt, Source, check_config, check_settings
from jaxre.errors import InputError
from jaxre.evaluation.report.record import Kind
from jaxre.relations.files import nearest
from jaxre.relations.prompt_styles import STYLES, styled
from jaxre.study.settings import Adaptation, Encoder, StudyConfig


@dataclass(frozen=True)
class Run:
    """One training run. `config` lacks only the name of its folder and, where the run starts
    `after` another one, `model.path`.

    kind: language-model, or the kind of the systems that use the run. datasets: the ones that it
    trains on.
    """

    name: str
    kind: str
    model: str
    config: Config
    regime: str = ""
    shots: int | None = None
    datasets: tuple[str, ...] = ()
    after: str | None = None


@dataclass(frozen=True)
class System:
    """One row of the study's results: a model with one prompt, evaluated on several datasets.

    runs: dataset -> the run that predicts it (an encoder has a run per dataset); empty for systems
    without training. model: its name in the study, or the cache's name for it. prompt_shots,
    enumerated: of the prompt, where known. config: of an untuned model, else None.
    """

    name: str
    kind: Kind
    model: str
    datasets: tuple[str, ...]
    prompt: Prompt | None = None
    runs: dict[str, str] = field(default_factory=dict)
    regime: str = ""
    train_shots: int | None = None
    trained_on: tuple[str, ...] = ()
    style: str = ""
    prompt_shots: int | None = None
    enumerated: bool | None = None
    config: Config | None = None
    note: str = ""


def grid(settings: StudyConfig) -> tuple[tuple[Run, ...], tuple[System, ...]]:
    """All runs, each after the run that it starts from; all systems in the order of the table.

    Raises:
      InputError: settings that make no valid run (names it), two runs or systems with one name,
        training on a dataset without training split.
    """
    runs = tuple(_runs(settings))
    systems = (
        *_prompted(settings, runs),
        *_styled(settings, runs),
        *_encoders(settings, runs),
        *_untuned(settings),
        *_baselines(settings),
        *_frontier(settings),
    )
    for kind, members in (("runs", runs), ("systems", systems)):
        counts = Counter(member.name for member in members)
        if repeated := [name for name, count in counts.items() if count > 1]:
            raise InputError(
                f"{settings.name}: two {kind} would be called {repeated[0]}; rename a model, regime"
                " or prompt"
            )
    if not systems:
        raise InputError(
            f"{settings.name}: there is nothing to do; name models with regimes, encoders,"
            " baselines or frontier"
        )
    return runs, systems


def _runs(settings: StudyConfig) -> Iterator[Run]:
    for model in settings.models:
        for regime, mixed in settings.regimes.items():
            for shots in mixed.shots or settings.shots:
                yield tuned(settings, model, regime, shots)
    for name, adaptation in settings.adaptation.items():
        first = language_model(settings, name, adaptation)
        yield first
        for regime in adaptation.regimes:
            for shots in adaptation.shots:
                yield tuned(settings, adaptation.of, regime, shots, name, after=first.name)
    for name, encoder in settings.encoders.items():
        for dataset in encoder.datasets or settings.datasets:
            yield classifier(settings, name, encoder, dataset)


def tuned(
    settings: StudyConfig,
    model: str,
    regime: str,
    shots: int,
    adaptation: str | None = None,
    after: str | None = None,
) -> Run:
    """SFT of a model in a regime with `shots` demonstrations; in an adaptation `after` its
    language-model run.
    """
    name = f"{adaptation or model}-{regime}-{shots}shot"
    config = _config(
        name,
        settings.base.tree(),
        settings.models[model].tree(),
        {"prompt": {"shots": shots}, "data": _mixture(settings, regime)},
        {"model": {"path": after}} if after else {},
    )
    kind, datasets = "adapted" if after else "tuned", settings.regimes[regime].datasets
    return Run(name, kind, model, config, regime, shots, datasets, after)


def language_model(settings: StudyConfig, name: str, adaptation: Adaptation) -> Run:
    """Language modelling on raw text: the first half of an adaptation."""
    sections = merged(
        settings.base.tree(), settings.models[adaptation.of].tree(), adaptation.tree()
    )
    sections["train"] = adaptation.train | {"objective": "lm"}
    run = f"{name}-text"
    config = _config(run, sections, {"data": {"text": adaptation.text.model_dump()}})
    return Run(run, "language-model", adaptation.of, config)


def classifier(settings: StudyConfig, name: str, encoder: Encoder, dataset: str) -> Run:
    """An encoder as the classifier of one dataset."""
    base = {
        key: value
        for key, value in settings.base.tree().items()
        if key in ("seed", "data", "mesh", "predict")
    }
    data = {
        "train": _train(settings, dataset),
        "validation": settings.datasets[dataset].validation,
        "labels": {dataset: settings.datasets[dataset].schema_source},
    }
    run = f"{name}-{dataset}"
    required = {"train": {"objective": "classify", "method": "full"}, "data": _dumped(data)}
    config = _config(run, base, encoder.tree(), required)
    return Run(run, "encoder", name, config, datasets=(dataset,))


def _mixture(settings: StudyConfig, name: str) -> dict[str, Any]:
    """`data.train`, `data.validation` and `data.labels` of a regime."""
    regime = settings.regimes[name]
    datasets = {dataset: settings.datasets[dataset] for dataset in regime.datasets}
    train = Mixture(
        sources=tuple(_train(settings, dataset) for dataset in datasets),
        balance=regime.balance,
        limit=regime.limit,
        name=f"re_{name}",
    )
    held_out = tuple(sources.validation for sources in datasets.values() if sources.validation)
    validation = Mixture(sources=held_out, limit=regime.validation_limit) if held_out else None
    labels = {dataset: sources.schema_source for dataset, sources in datasets.items()}
    return _dumped({"train": train, "validation": validation, "labels": labels})


def _train(settings: StudyConfig, dataset: str) -> Source:
    source = settings.datasets[dataset].train
    if source is None:
        raise InputError(
            f"{settings.name}: datasets.{dataset} is trained on, but has no train; add it, or take"
            " it out of regimes and encoders"
        )
    return source


def _dumped(tree: Any) -> Any:
    """Settings as plain values, the input of a config."""
    if isinstance(tree, dict):
        return {name: _dumped(value) for name, value in tree.items()}
    return tree.model_dump(mode="json") if hasattr(tree, "model_dump") else tree


def _config(name: str, *sections: dict[str, Any]) -> Config:
    """Sections merged into a run's config. Raises InputError, with the run's name in front."""
    return check_config(merged(*sections, {"name": name}), name)


def merged(*trees: dict[str, Any]) -> dict[str, Any]:
    """Deep merge of mappings, in which later ones win; values that are not mappings are replaced
    whole.
    """
    result: dict[str, Any] = {}
    for tree in trees:
        for name, value in tree.items():
            both = isinstance(value, dict) and isinstance(result.get(name), dict)
            result[name] = merged(result[name], value) if both else value
    return result


def _prompted(settings: StudyConfig, runs: tuple[Run, ...]) -> Iterator[System]:
    """The tuned models with every prompt."""
    for run in runs:
        if run.kind in ("tuned", "adapted"):
            cross_domain = settings.evaluation.cross_domain
            datasets = tuple(settings.datasets) if cross_domain else run.datasets
            for ending, prompt in _prompts(settings, run.config.prediction_prompt, run.shots):
                yield _system(run, f"{run.name}-{ending}", datasets, prompt)


def _styled(settings: StudyConfig, runs: tuple[Run, ...]) -> Iterator[System]:
    """The runs whose prompt sensitivity is measured, in each style."""
    styles = settings.evaluation.styles
    if styles is None:
        return
    with_prompt = {run.name: run for run in runs if run.kind in ("tuned", "adapted")}
    for name in styles.runs:
        if name not in with_prompt:
            near = f"; the nearest is {nearest(name, with_prompt)}" if with_prompt else ""
            raise InputError(
                f"{settings.name}: evaluation.styles.runs: there is no run {name!r} that has a"
                f" prompt{near}"
            )
        run = with_prompt[name]
        for style in styles.names or STYLES:
            prompt = styled(run.config.prediction_prompt, style)
            datasets = styles.datasets or run.datasets
            yield _system(run, f"{name}-style-{style}", datasets, prompt, style)


def _system(
    run: Run, name: str, datasets: tuple[str, ...], prompt: Prompt, style: str = ""
) -> System:
    return System(
        name=name,
        kind=run.kind,
        model=run.model,
        datasets=datasets,
        prompt=prompt,
        runs=dict.fromkeys(datasets, run.name),
        regime=run.regime,
        train_shots=run.shots,
        trained_on=run.datasets,
        style=style,
        prompt_shots=prompt.shots,
        enumerated=prompt.enumerate,
        note=f"after language modelling ({run.after})" if run.after else "",
    )


def _prompts(settings: StudyConfig, prompt: Prompt, trained: int) -> Iterator[tuple[str, Prompt]]:
    """(end of a system's name, prompt) for each prompt and number of demonstrations of the
    evaluation; `trained` is the number in training.
    """
    for name, changes in settings.evaluation.prompts.items():
        for shots in dict.fromkeys(
            trained if shots == "trained" else shots for shots in settings.evaluation.shots
        ):
            tree = merged(prompt.model_dump(), changes, {"shots": shots})
            yield (
                f"{name}-{shots}shot",
                check_settings(Prompt, tree, f"{settings.name}: evaluation.prompts.{name}"),
            )


def _encoders(settings: StudyConfig, runs: tuple[Run, ...]) -> Iterator[System]:
    for name in settings.encoders:
        classifiers = {
            run.datasets[0]: run.name for run in runs if run.kind == "encoder" and run.model == name
        }
        yield System(
            name,
            "encoder",
            name,
            tuple(classifiers),
            runs=classifiers,
            trained_on=tuple(classifiers),
            note="one classifier per dataset",
        )


def _untuned(settings: StudyConfig) -> Iterator[System]:
    if not settings.untuned:
        return
    # A config needs data.train, which is not used here, and there may be no regimes.
    data = {"train": _dumped(next(iter(settings.datasets.values())).test)}
    for model, sections in settings.models.items():
        config = _config(f"{model}-untuned", settings.base.tree(), sections.tree(), {"data": data})
        prompts = {
            name: prompt
            for shots in settings.shots
            for name, prompt in _prompts(settings, config.prediction_prompt, shots)
        }
        for ending, prompt in prompts.items():
            yield System(
                f"{model}-untuned-{ending}",
                "untuned",
                model,
                tuple(settings.datasets),
                prompt,
                prompt_shots=prompt.shots,
                enumerated=prompt.enumerate,
                config=config,
            )


def _baselines(settings: StudyConfig) -> Iterator[System]:
    datasets = tuple(name for name, dataset in settings.datasets.items() if dataset.train)
    if settings.baselines:
        for name, note in (
            ("majority", "always the most frequent label"),
            ("tfidf", "logistic regression on words and their place"),
        ):
            yield System(name, "baseline", name, datasets, trained_on=datasets, note=note)


def _frontier(settings: StudyConfig) -> Iterator[System]:
    for name in dict.fromkeys(cache.name for cache in settings.frontier):
        caches = [cache for cache in settings.frontier if cache.name == name]
        datasets = tuple(dataset for cache in caches for dataset in cache.datasets)
        first = caches[0]
        style = first.style or ""
        yield System(
            name,
            "frontier",
            first.model or name,
            datasets,
            style=style,
            prompt_shots=STYLES[style].shots if style else first.shots,
            enumerated=True if style else first.enumerate,
        )
