"""The settings of a study, typed and checked. One YAML file is one study.

    settings = load_study("configs/study/small.yaml", ["shots=[0]"])

Sections such as `train` and `lora` are those of a run's config (`jaxre/config.py`): `base` for all
runs, what a model adds on top of it under `models`. The study itself says what a run trains on and
what it is called.
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

OWN_DATA = ("cache", "too_long", "dedup")  # of a run's `data`; the rest is the study's
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
                f"has {others[0]}, which the study gives to each run; write it under datasets and"
                " regimes"
            )
        return data

    def tree(self) -> dict[str, Any]:
        """What is given here, to be merged into a run's config."""
        return {
            name: getattr(self, name)
            for name in Sections.model_fields
            if getattr(self, name) not in (None, {})
        }


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
    """What a model is trained on: the training splits of these datasets, mixed
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
    """An encoder, one classifier per dataset. Of `base` it takes seed, data, mesh and predict."""

    datasets: tuple[str, ...] | None = Field(None, description="all of them if not given")


class Adaptation(Sections):
    """Language modelling on raw text from a model of the study, then SFT of each regime and shots
    from there.

    Its sections are those of the language-model run: `train` stands alone, the others come on top
    of the model's.
    """

    of: str = Field(description="name of the model")
    text: Text
    regimes: tuple[str, ...] = Field(min_length=1)
    shots: tuple[Int, ...] = Field(min_length=1)


class Frontier(Settings):
    """Cached answers of another model on the test examples of some datasets; of one name there may
    be several, of other datasets.
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
            "prompt style of the answers; they then stand in the table of prompt sensitivity alone"
        ),
    )

    @property
    def place(self) -> str:
        """What `read_cache` is given."""
        given = Path(self.cache).expanduser()
        return (
            self.cache
            if self.cache.startswith(HUB)
            else str(given if given.exists() else data_root() / self.cache)
        )

    @model_validator(mode="after")
    def _known_style(self) -> Frontier:
        if self.style is not None and self.style not in STYLES:
            raise ValueError(
                f"there is no prompt style {self.style!r}; the nearest is"
                f" {nearest(self.style, STYLES)}"
            )
        return self


class Styles(Settings):
    """Prompt sensitivity: runs that are also asked in each of the prompt styles
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
    """How each system is asked."""

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
        """The cache that a frontier system's answers for a dataset are from."""
        return next(one for one in self.frontier if one.name == name and dataset in one.datasets)

    @field_validator("models", "datasets", "regimes", "encoders", "adaptation")
    @classmethod
    def _file_names(cls, given: dict[str, Any]) -> dict[str, Any]:
        for name in given:
            if not re.match(NAME, name):
                raise ValueError(
                    f"{name!r} becomes part of file names; take letters, digits, `.`, `_` and `-`"
                )
        return given

    @model_validator(mode="after")
    def _named(self) -> StudyConfig:
        for name in dict.fromkeys(one.name for one in self.frontier):
            _one_system(name, [one for one in self.frontier if one.name == name])
        for place, given, known in (
            *(
                (f"regimes.{name}.datasets", one.datasets, self.datasets)
                for name, one in self.regimes.items()
            ),
            *(
                (f"encoders.{name}.datasets", one.datasets or (), self.datasets)
                for name, one in self.encoders.items()
            ),
            *(
                (f"adaptation.{name}.of", (one.of,), self.models)
                for name, one in self.adaptation.items()
            ),
            *(
                (f"adaptation.{name}.regimes", one.regimes, self.regimes)
                for name, one in self.adaptation.items()
            ),
            (
                "evaluation.styles.datasets",
                (self.evaluation.styles and self.evaluation.styles.datasets) or (),
                self.datasets,
            ),
            *(
                (f"frontier.{number}.datasets", one.datasets, self.datasets)
                for number, one in enumerate(self.frontier)
            ),
        ):
            for name in given:
                if name not in known:
                    near = f"; the nearest is {nearest(name, known)}" if known else ""
                    raise ValueError(f"{place}: there is no {name!r} in this study{near}")
            if len(set(given)) < len(given):
                raise ValueError(f"{place}: one is listed twice")
        return self


def _one_system(name: str, caches: Sequence[Frontier]) -> None:
    """Caches of one name are one row of the results. Raises ValueError where they cannot be."""
    datasets = [dataset for one in caches for dataset in one.datasets]
    if len(set(datasets)) < len(datasets):
        raise ValueError(
            f"frontier: {name} has two caches for one dataset; give each model and setting a name"
            " of its own"
        )
    if len({(one.model, one.enumerate, one.shots, one.style) for one in caches}) > 1:
        raise ValueError(
            f"frontier: the caches of {name} differ in model, enumerate, shots or style; give each"
            " a name of its own"
        )


def load_study(path: str | Path, overrides: list[str] | None = None) -> StudyConfig:
    """Reads and checks a study's YAML file, with `key=value` overrides on top, by the rules of
    `config.load_config`.

    Raises:
      InputError: what `load_config` refuses, or a name of a model, dataset or regime that the study
        does not have.
    """
    return check_settings(StudyConfig, load_tree(path, overrides), str(path))
