"""A study's settings and its grid: runs, systems, and refused settings."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest
from refusals import refusal
from tiny_grid import study_of, study_tree

from jaxre.study.grid import grid
from jaxre.study.settings import load_study

CONFIGS = Path(__file__).parents[2] / "configs" / "study"


@pytest.fixture
def tree(tmp_path: Path) -> dict:
    return study_tree(tmp_path, tmp_path / "model")


def test_the_papers_grid_is_thirty_runs_with_its_settings() -> None:
    runs, systems = grid(load_study(CONFIGS / "paper.yaml"))
    counts = Counter(run.kind for run in runs)
    assert counts == {"tuned": 5 * 3 * 2, "encoder": 2 * 9, "language-model": 1, "adapted": 2}
    run = next(run for run in runs if run.name == "qwen2.5-0.5b-mixtune-2shot")
    config = run.config
    assert (config.lora.rank, config.lora.alpha, config.lora.dropout, config.model.quantise) == (
        32,
        64,
        0.05,
        "nf4",
    )
    assert (
        config.train.batch_examples,
        config.train.row_length,
        config.train.learning_rate,
        config.train.epochs,
    ) == (8, 1024, 1e-4, 2)
    assert (config.data.train.balance, config.data.train.limit, config.data.validation.limit) == (
        "domains",
        200_000,
        20_000,
    )
    assert (
        config.prompt.shots == 2
        and len(run.datasets) == 9
        and set(config.data.labels) == set(run.datasets)
    )
    text = next(run for run in runs if run.kind == "language-model").config
    assert (
        text.train.objective,
        text.train.method,
        text.train.batch_tokens,
        text.model.quantise,
    ) == ("lm", "full", 16 * 1024, None)
    adapted = next(run for run in runs if run.kind == "adapted")
    assert adapted.after == "llama-3.2-3b-litbank-text" and adapted.config.model.quantise == "nf4"
    # Models trained on 2-shot prompts are asked with 2 and with 0, each with and without the list
    # of labels, for all nine datasets.
    asked = [system for system in systems if "qwen2.5-0.5b-mixtune-2shot" in system.runs.values()]
    assert {(one.prompt.shots, one.prompt.enumerate) for one in asked} == {
        (2, True),
        (2, False),
        (0, True),
        (0, False),
    }
    assert all(len(one.datasets) == 9 for one in asked)


def test_a_model_with_points_in_its_name_can_be_overridden() -> None:
    changed = load_study(
        CONFIGS / "paper.yaml",
        ["models.qwen2.5-0.5b.model.path=mine", "models.qwen2.5-0.5b.seed=7"],
    )
    assert (
        changed.models["qwen2.5-0.5b"].model == {"path": "mine"}
        and changed.models["qwen2.5-0.5b"].seed == 7
    )
    assert list(changed.models) == list(load_study(CONFIGS / "paper.yaml").models)


def test_the_small_grid_has_each_kind_of_system_but_adapted_ones() -> None:
    _, systems = grid(load_study(CONFIGS / "small.yaml"))
    assert {system.kind for system in systems} == {
        "tuned",
        "encoder",
        "untuned",
        "baseline",
        "frontier",
    }
    assert {system.style for system in systems} == {"", "shots0", "shots2-task"}


def test_a_regime_is_asked_for_what_it_does_not_train_on_where_that_is_wanted(tree: dict) -> None:
    tree["regimes"] = {"facts": {"datasets": ["facts"]}}
    _, (system, *_) = grid(study_of(tree))
    assert system.datasets == ("facts", "verbs") and system.trained_on == ("facts",)
    tree["evaluation"]["cross_domain"] = False
    _, (system, *_) = grid(study_of(tree))
    assert system.datasets == ("facts",)


def test_shots_of_a_regime_go_before_those_of_the_study(tree: dict) -> None:
    tree["shots"] = [0, 2]
    tree["regimes"]["facts"] = {"datasets": ["facts"], "shots": [4]}
    runs, _ = grid(study_of(tree))
    assert [run.name for run in runs] == ["tiny-both-0shot", "tiny-both-2shot", "tiny-facts-4shot"]
    assert [run.config.prompt.shots for run in runs] == [0, 2, 4]


@pytest.mark.parametrize(
    ("place", "value", "parts"),
    [
        ("regmes", {}, ["regmes: unknown key", "regimes"]),
        ("datasets.facts.trian", {}, ["datasets.facts.trian: unknown key", "datasets.train"]),
        ("base.trian", {}, ["base.trian: unknown key", "base.train"]),
        ("base.lora.rnak", 3, ["lora.rnak: unknown key", "lora.rank"]),
        ("models.tiny.train", {"epochs": "two"}, ["tiny-both-0shot: train.epochs", "whole number"]),
        (
            "base.data.train",
            {"dataset": "facts"},
            ["base.data", "has train", "datasets and regimes"],
        ),
        (
            "regimes.both.datasets",
            ["facts", "verb"],
            ["regimes.both.datasets", "'verb'", "the nearest is verbs"],
        ),
        ("regimes.both.datasets", ["facts", "facts"], ["listed twice"]),
        ("datasets.facts.train", None, ["datasets.facts", "neither train nor labels"]),
        ("models.a/b", {}, ["'a/b'", "file names"]),
        (
            "evaluation.styles",
            {"runs": ["tiny-both-1shot"]},
            ["evaluation.styles.runs", "tiny-both-0shot"],
        ),
        (
            "evaluation.prompts",
            {"odd": {"shot": 1}},
            ["evaluation.prompts.odd", "shot: unknown key", "shots"],
        ),
        ("evaluation.mode", "guess", ["evaluation.mode"]),
        ("models", {"tiny": {}}, ["model: missing"]),
    ],
)
def test_what_cannot_be_is_refused_with_its_place(
    tree: dict, place: str, value: object, parts: list[str]
) -> None:
    *sections, last = place.split(".")
    node = tree
    for section in sections:
        node = node[section]
    node[last] = value
    said = refusal(lambda: grid(study_of(tree)))
    for part in parts:
        assert part in said, said


def test_a_dataset_without_training_split_is_asked_but_not_trained_on(tree: dict) -> None:
    tree["datasets"]["verbs"]["train"] = None
    assert "datasets.verbs is trained on" in refusal(lambda: grid(study_of(tree)))
    tree["regimes"]["both"]["datasets"] = ["facts"]
    _, systems = grid(study_of(tree))
    assert [system.datasets for system in systems] == [("facts", "verbs"), ("facts",), ("facts",)]


def test_two_runs_of_one_name_are_refused(tree: dict) -> None:
    tree["models"] = {"tiny": tree["models"]["tiny"], "tiny-both": tree["models"]["tiny"]}
    tree["regimes"] = {"both-x": {"datasets": ["facts"]}, "x": {"datasets": ["facts"]}}
    assert "two runs would be called tiny-both-x-0shot" in refusal(lambda: grid(study_of(tree)))
