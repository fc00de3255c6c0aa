"""A study's grid: the runs it trains, and the systems it asks.

    runs, systems = grid(settings)

Nothing is read here: a grid follows from the settings alone.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from jaxre.config import Config, Mixture, Prompt, Source, check_config, check_settings
from jaxre.errors import InputError
from jaxre.evaluation.study_record import Kind
from jaxre.relations.files import nearest
from jaxre.relations.prompt_styles import STYLES, styled
from jaxre.study.settings import Adaptation, Encoder, Regime, StudyConfig

PRIMARY = "trained"


@dataclass(frozen=True)
class Run:
    """One training run. `config` is whole but for the name of its folder and, where it starts
    `after` another run, `model.path`.

    kind: language-model, or that of the systems which ask it. datasets: it trains on these.
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
    """One row of the study's results: a model asked in one way for several datasets.

    runs: dataset -> the run that is asked (an encoder has one for each); empty for what is not
    trained. model: as it is called in the study, of cached answers as their cache calls it.
    prompt_shots, enumerated: of the prompt, where they are known. config: of a model that is no
    run, None for baselines and cached answers.
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
    """All runs, those after their own start; all systems in the order of the table.

    Raises:
      InputError: settings that make no valid run (named), two runs or systems of one name, a
        dataset without training split that is trained on.
    """
    runs = list(_runs(settings))
    systems = [
        system
        for run in runs
        if run.kind in ("tuned", "adapted")
        for system in _asked(settings, run)
    ]
    systems += list(_styled(settings, runs))
    systems += (
        list(_encoders(settings, runs))
        + list(_untuned(settings))
        + list(_baselines(settings))
        + list(_frontier(settings))
    )
    for kind, given in (("runs", runs), ("systems", systems)):
        twice = [name for name, count in Counter(one.name for one in given).items() if count > 1]
        if twice:
            raise InputError(
                f"{settings.name}: two {kind} would be called {twice[0]}; rename a model, regime or"
                " prompt"
            )
    if not systems:
        raise InputError(
            f"{settings.name}: there is nothing to do; name models with regimes, encoders,"
            " baselines or frontier"
        )
    return tuple(runs), tuple(systems)


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
                yield tuned(settings, adaptation.of, regime, shots, after=first.name, called=name)
    for name, encoder in settings.encoders.items():
        for dataset in encoder.datasets or settings.datasets:
            yield classifier(settings, name, encoder, dataset)


def tuned(
    settings: StudyConfig,
    model: str,
    regime: str,
    shots: int,
    after: str | None = None,
    called: str | None = None,
) -> Run:
    """SFT of a model in a regime, with so many demonstrations; `after` a language-model run, of the
    adaptation `called` so.
    """
    name = f"{called or model}-{regime}-{shots}shot"
    mixed = settings.regimes[regime]
    sections = [
        settings.base.tree(),
        settings.models[model].tree(),
        {"prompt": {"shots": shots}, "data": _mixture(settings, regime, mixed)},
    ]
    if after:
        sections.append({"model": {"path": after}})
    return Run(
        name,
        "adapted" if after else "tuned",
        model,
        _config(name, *sections),
        regime,
        shots,
        mixed.datasets,
        after,
    )


def language_model(settings: StudyConfig, name: str, adaptation: Adaptation) -> Run:
    """Language modelling on raw text: the first half of an adaptation."""
    base, model, own = (
        settings.base.tree(),
        settings.models[adaptation.of].tree(),
        adaptation.tree(),
    )
    shared = merged(
        *(
            {key: value for key, value in tree.items() if key != "train"}
            for tree in (base, model, own)
        )
    )
    called = f"{name}-text"
    given = {
        "train": adaptation.train | {"objective": "lm"},
        "data": {"text": adaptation.text.model_dump()},
    }
    return Run(called, "language-model", adaptation.of, _config(called, shared, given))


def classifier(settings: StudyConfig, name: str, encoder: Encoder, dataset: str) -> Run:
    """An encoder as the classifier of one dataset."""
    base = {
        key: value
        for key, value in settings.base.tree().items()
        if key in ("seed", "data", "mesh", "predict")
    }
    given = settings.datasets[dataset]
    data = {
        "train": _train(settings, dataset),
        "validation": given.validation,
        "labels": {dataset: given.schema_source},
    }
    called = f"{name}-{dataset}"
    own = {"train": {"objective": "classify", "method": "full"}, "data": _dumped(data)}
    return Run(
        called, "encoder", name, _config(called, base, encoder.tree(), own), datasets=(dataset,)
    )


def _mixture(settings: StudyConfig, regime: str, mixed: Regime) -> dict[str, Any]:
    """`data.train`, `data.validation` and `data.labels` of a regime."""
    train = Mixture(
        sources=tuple(_train(settings, name) for name in mixed.datasets),
        balance=mixed.balance,
        limit=mixed.limit,
        name=f"re_{regime}",
    )
    held_out = tuple(one for name in mixed.datasets if (one := settings.datasets[name].validation))
    validation = Mixture(sources=held_out, limit=mixed.validation_limit) if held_out else None
    labels = {name: settings.datasets[name].schema_source for name in mixed.datasets}
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
    """Settings as plain values, for a config to be made of."""
    if isinstance(tree, dict):
        return {name: _dumped(value) for name, value in tree.items()}
    return tree.model_dump(mode="json") if hasattr(tree, "model_dump") else tree


def _config(name: str, *sections: dict[str, Any]) -> Config:
    """Sections merged into a run's config. Raises InputError, with the run's name in front."""
    return check_config(merged(*sections, {"name": name}), name)


def merged(*trees: dict[str, Any]) -> dict[str, Any]:
    """The mappings on top of one another, the last one uppermost; what is no mapping is replaced
    whole.
    """
    result: dict[str, Any] = {}
    for tree in trees:
        for name, value in tree.items():
            both = isinstance(value, dict) and isinstance(result.get(name), dict)
            result[name] = merged(result[name], value) if both else value
    return result


def _asked(settings: StudyConfig, run: Run) -> Iterator[System]:
    """A tuned model with every prompt."""
    datasets = tuple(settings.datasets) if settings.evaluation.cross_domain else run.datasets
    for ending, prompt in _prompts(settings, run.config.prediction_prompt, run.shots):
        yield _system(run, f"{run.name}-{ending}", datasets, prompt)


def _styled(settings: StudyConfig, runs: list[Run]) -> Iterator[System]:
    """The runs whose sensitivity to the prompt is measured, in each style."""
    given, known = (
        settings.evaluation.styles,
        {run.name: run for run in runs if run.kind in ("tuned", "adapted")},
    )
    for name in given.runs if given else ():
        if name not in known:
            near = f"; the nearest is {nearest(name, known)}" if known else ""
            raise InputError(
                f"{settings.name}: evaluation.styles.runs: there is no run {name!r} that has a"
                f" prompt{near}"
            )
        for style in given.names or STYLES:
            prompt = styled(known[name].config.prediction_prompt, style)
            yield _system(
                known[name],
                f"{name}-style-{style}",
                given.datasets or known[name].datasets,
                prompt,
                style,
            )


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
    """(end of a system's name, prompt) for each way of asking."""
    for name, changes in settings.evaluation.prompts.items():
        for shots in dict.fromkeys(
            trained if one == PRIMARY else one for one in settings.evaluation.shots
        ):
            tree = merged(prompt.model_dump(), changes, {"shots": shots})
            yield (
                f"{name}-{shots}shot",
                check_settings(Prompt, tree, f"{settings.name}: evaluation.prompts.{name}"),
            )


def _encoders(settings: StudyConfig, runs: list[Run]) -> Iterator[System]:
    for name in settings.encoders:
        own = {
            run.datasets[0]: run.name for run in runs if run.kind == "encoder" and run.model == name
        }
        yield System(
            name,
            "encoder",
            name,
            tuple(own),
            runs=own,
            trained_on=tuple(own),
            note="one classifier per dataset",
        )


def _untuned(settings: StudyConfig) -> Iterator[System]:
    if not settings.untuned:
        return
    # The data is not used: a config must have some, and the regimes may be none.
    data = {"train": _dumped(next(iter(settings.datasets.values())).test)}
    for model, sections in settings.models.items():
        config = _config(f"{model}-untuned", settings.base.tree(), sections.tree(), {"data": data})
        asked = {
            name: prompt
            for shots in settings.shots
            for name, prompt in _prompts(settings, config.prediction_prompt, shots)
        }
        for ending, prompt in asked.items():
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
    datasets = tuple(name for name, one in settings.datasets.items() if one.train)
    if settings.baselines:
        for name, note in (
            ("majority", "always the most frequent label"),
            ("tfidf", "logistic regression on words and their place"),
        ):
            yield System(name, "baseline", name, datasets, trained_on=datasets, note=note)


def _frontier(settings: StudyConfig) -> Iterator[System]:
    for name in dict.fromkeys(one.name for one in settings.frontier):
        caches = [one for one in settings.frontier if one.name == name]
        first, datasets = caches[0], tuple(dataset for one in caches for dataset in one.datasets)
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
