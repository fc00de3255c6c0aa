"""The settings of a study, typed and checked. One YAML file is one study.

    settings = load_study("configs/study/small.yaml", ["shots=[0]"])

Sections such as `train` and `lora` are those of a run's config (`jaxre/config/settings.py`): `base`
holds for all runs, `models` adds the sections of each model. The study itself sets the data and the
name of each run.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from jaxre.config import (
    DatasetLabels,
    Flag,
    Int,
    Settings,
    Source,
    Text,
    check_settings,
    data_root,
    load_tree,
)
from jaxre.relations.files import nearest
from jaxre.relations.hub import PREFIX as HUB
from jaxre.relations.prompt_styles import STYLES

OWN_DATA = ("cache", "too_long", "dedup")  # keys of a run's `data` that the study does not set
NAME = r"^[A-Za-z0-9][A-Za-z0-9._-]*$"


class Sections(Settings):
    """Sections of a run's config; they are checked when they are merged into one."""

    seed: Int | None = None
    model: dict[str, Any] = Field(default_factory=dict)
    data: dict[str, Any] = Field(default_factory=dict, description="cache, too_long and dedup only")
    prompt: dict[str, Any] = Field(default_factory=dict)
    lora: dict[str, Any] = Field(default_factory=dict)
    train: dict[str, Any] = Field(default_factory=dict)
    mesh: dict[str, Any] = Field(default_factory=dict)
    kernels: dict[str, Any] = Field(default_factory=dict)
    predict: dict[str, Any] = Field(default_factory=dict)

    @field_validator("data")
    @classmethod
    def _own_data(cls, data: dict[str, Any]) -> dict[str, Any]:
        if others := [name for name in data if name not in OWN_DATA]:
            raise ValueError(
                f"has {others[0]}, which the study sets for each run; write it under datasets and"
                " regimes"
            )
        return data

    def tree(self) -> dict[str, Any]:
        """The sections that are not empty, to be merged into a run's config."""
        sections = {name: getattr(self, name) for name in Sections.model_fields}
        return {name: section for name, section in sections.items() if section not in (None, {})}


class StudyDataset(Settings):
    """One benchmark; its name is the `dataset` of its examples."""

    train: Source | None = Field(
        None,
        description="needed where a regime, an encoder, a baseline or a demonstration takes it",
    )
    validation: Source | None = None
    test: Source
    labels: DatasetLabels | None = Field(
        None,
        description="the schema, or the source it is collected from; that of `train` if not given",
    )

    @model_validator(mode="after")
    def _schema(self) -> StudyDataset:
        if self.train is None and self.labels is None:
            raise ValueError("has neither train nor labels, so it has no schema; give one of them")
        return self

    @property
    def schema_source(self) -> tuple[str, ...] | Source:
        """Labels, or the source they are collected from."""
        return self.labels or self.train


class Regime(Settings):
    """Training data of a model: the training splits of several datasets, mixed
    (`config.Mixture`).
    """

    datasets: tuple[str, ...] = Field(min_length=1)
    balance: Literal["none", "domains"] = "none"
    shots: tuple[Int, ...] | None = Field(
        None, min_length=1, description="those of the study if not given"
    )
    limit: Int | None = Field(None, ge=1, description="at most this many training examples")
    validation_limit: Int | None = Field(
        None, ge=1, description="at most this many validation examples"
    )


class Encoder(Sections):
    """An encoder, one classifier per dataset; inherits seed, data, mesh and predict of `base`."""

    datasets: tuple[str, ...] | None = Field(None, description="all of them if not given")


class Adaptation(Sections):
    """Language modelling on raw text from a model of the study, then SFT of each regime and shots
    from there.

    Its sections are those of the language-model run: `train` replaces the model's, the others are
    merged into the model's.
    """

    of: str = Field(description="name of the model")
    text: Text
    regimes: tuple[str, ...] = Field(min_length=1)
    shots: tuple[Int, ...] = Field(min_length=1)


class Frontier(Settings):
    """Cached answers of another model on the test examples of some datasets. Several entries may
    share a name if their datasets differ.
    """

    name: str = Field(pattern=NAME)
    datasets: tuple[str, ...] = Field(min_length=1)
    cache: str = Field(
        description="file, also below the data folder (JAXRE_DATA), or hub:OWNER/NAME"
    )
    labels: str | None = Field(
        None,
        description="label map, ours -> common; the scores are then those of the common labels",
    )
    model: str | None = Field(None, description="which model of a cache that holds several")
    enumerate: Flag | None = Field(
        None,
        description=(
            "answers to prompts that list the labels (true), or do not, of a cache with both"
        ),
    )
    shots: Int | None = Field(
        None,
        ge=0,
        description="demonstrations in the prompt, of a cache that holds several numbers",
    )
    style: str | None = Field(
        None,
        description=(
            "prompt style of the answers; they are then only in the table of prompt sensitivity"
        ),
    )

    @property
    def place(self) -> str:
        """The cache's file or hub id, the argument of `read_cache`."""
        if self.cache.startswith(HUB):
            return self.cache
        path = Path(self.cache).expanduser()
        return str(path if path.exists() else data_root() / self.cache)

    @model_validator(mode="after")
    def _known_style(self) -> Frontier:
        if self.style is not None and self.style not in STYLES:
            raise ValueError(
                f"there is no prompt style {self.style!r}; the nearest is"
                f" {nearest(self.style, STYLES)}"
            )
        return self


class Styles(Settings):
    """Prompt sensitivity: runs that are also evaluated in each of the prompt styles
    (`relations/prompt_styles.py`).
    """

    runs: tuple[str, ...] = Field(
        min_length=1, description="names of runs of the study, such as MODEL-REGIME-0shot"
    )
    names: tuple[str, ...] | None = Field(None, description="of the styles; all if not given")
    datasets: tuple[str, ...] | None = Field(
        None, description="those that the run trains on if not given"
    )


class Evaluation(Settings):
    """Prompts, demonstrations and datasets of the evaluation of each system."""

    prompts: dict[str, dict[str, Any]] = Field(
        default_factory=lambda: {
            "generic": {"enumerate": False},
            "enumerated": {"enumerate": True},
        },
        min_length=1,
        description="name -> prompt settings on top of those of training",
    )
    shots: tuple[Literal["trained"] | Int, ...] = Field(
        ("trained",),
        min_length=1,
        description="demonstrations in a prompt: as many as in training, or a number",
    )
    mode: Literal["score", "best", "generate"] = Field(
        "score", description="of prediction, as `jaxre predict` has it"
    )
    styles: Styles | None = None
    cross_domain: Flag = Field(
        True, description="ask also for the datasets that a regime does not train on"
    )


class StudyConfig(Settings):
    name: str = Field(pattern=NAME, description="the study's folder is output/name")
    output: str = "runs"
    base: Sections = Sections()
    models: dict[str, Sections] = Field(default_factory=dict)
    datasets: dict[str, StudyDataset] = Field(min_length=1)
    regimes: dict[str, Regime] = Field(default_factory=dict)
    shots: tuple[Int, ...] = Field(
        (0,), min_length=1, description="demonstrations in the prompts of training"
    )
    encoders: dict[str, Encoder] = Field(default_factory=dict)
    adaptation: dict[str, Adaptation] = Field(default_factory=dict)
    untuned: Flag = Field(False, description="ask the models themselves too")
    baselines: Flag = Field(
        False,
        description="majority label, and TF-IDF with logistic regression, trained on each dataset",
    )
    frontier: tuple[Frontier, ...] = ()
    evaluation: Evaluation = Evaluation()

    @property
    def folder(self) -> Path:
        return Path(self.output) / self.name

    def cached(self, name: str, dataset: str) -> Frontier:
        """The cache with the answers of a frontier system for a dataset."""
        return next(
            cache for cache in self.frontier if cache.name == name and dataset in cache.datasets
        )

    @field_validator("models", "datasets", "regimes", "encoders", "adaptation")
    @classmethod
    def _file_names(cls, entries: dict[str, Any]) -> dict[str, Any]:
        for name in entries:
            if not re.match(NAME, name):
                raise ValueError(
                    f"{name!r} becomes part of file names; take letters, digits, `.`, `_` and `-`"
                )
        return entries

    @model_validator(mode="after")
    def _references(self) -> StudyConfig:
        for name in dict.fromkeys(cache.name for cache in self.frontier):
            _check_caches(name, [cache for cache in self.frontier if cache.name == name])
        for name, regime in self.regimes.items():
            _check_names(f"regimes.{name}.datasets", regime.datasets, self.datasets)
        for name, encoder in self.encoders.items():
            _check_names(f"encoders.{name}.datasets", encoder.datasets or (), self.datasets)
        for name, adaptation in self.adaptation.items():
            _check_names(f"adaptation.{name}.of", (adaptation.of,), self.models)
            _check_names(f"adaptation.{name}.regimes", adaptation.regimes, self.regimes)
        if styles := self.evaluation.styles:
            _check_names("evaluation.styles.datasets", styles.datasets or (), self.datasets)
        for number, cache in enumerate(self.frontier):
            _check_names(f"frontier.{number}.datasets", cache.datasets, self.datasets)
        return self


def _check_names(place: str, names: Sequence[str], known: dict[str, Any]) -> None:
    """Raises ValueError for a name that is unknown or listed twice."""
    for name in names:
        if name not in known:
            near = f"; the nearest is {nearest(name, known)}" if known else ""
            raise ValueError(f"{place}: there is no {name!r} in this study{near}")
    if len(set(names)) < len(names):
        raise ValueError(f"{place}: one is listed twice")


def _check_caches(name: str, caches: Sequence[Frontier]) -> None:
    """Raises ValueError where the caches of one name cannot be one row of the results."""
    datasets = [dataset for cache in caches for dataset in cache.datasets]
    if len(set(datasets)) < len(datasets):
        raise ValueError(
            f"frontier: {name} has two caches for one dataset; give each model and setting a name"
            " of its own"
        )
    if len({(cache.model, cache.enumerate, cache.shots, cache.style) for cache in caches}) > 1:
        raise ValueError(
            f"frontier: the caches of {name} differ in model, enumerate, shots or style; give each"
            " a name of its own"
        )


def load_study(path: str | Path, overrides: list[str] | None = None) -> StudyConfig:
    """Reads and checks a study's YAML file, with `key=value` overrides on top, by the rules of
    `config.load_config`.

    Raises:
      InputError: as `load_config`; a name of a model, dataset or regime that the study does not
        have.
    """
    return check_settings(StudyConfig, load_tree(path, overrides), str(path))
