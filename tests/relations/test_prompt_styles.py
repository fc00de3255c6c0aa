"""The eight styles are a balanced half of 2 x 2 x 4, change only what they name, and their
definitions cover the benchmarks.
"""

from __future__ import annotations

import itertools
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from refusals import refusal

from jaxre.config import Prompt, Source, check_config, load_config, read_definitions, save_config
from jaxre.relations import semeval, sources
from jaxre.relations.prompt_styles import STYLES, styled
from jaxre.relations.prompts import TASK, system_turn


def test_every_pair_of_levels_occurs_equally_often() -> None:
    factors = [("shots", 4), ("task", 2), ("labels", 2)]
    assert (
        len(STYLES) == 8
        and len({(style.shots, style.task, style.labels) for style in STYLES.values()}) == 8
    )
    for (one, levels), (other, more) in itertools.combinations(factors, 2):
        pairs = Counter((getattr(style, one), getattr(style, other)) for style in STYLES.values())
        assert set(pairs.values()) == {8 // (levels * more)} and len(pairs) == levels * more


def test_main_effects_can_be_told_apart() -> None:
    """The design of an additive model has full rank, and its contrasts are orthogonal."""
    rows = [
        [1, *(style.shots == k for k in (2, 4, 8)), style.task, style.labels]
        for style in STYLES.values()
    ]
    assert np.linalg.matrix_rank(np.array(rows, float)) == 6
    task, labels = (
        np.array([1 if getattr(style, name) else -1 for style in STYLES.values()])
        for name in ("task", "labels")
    )
    assert task @ labels == 0


@pytest.mark.parametrize("name", STYLES)
def test_a_style_changes_its_factors_and_nothing_else(name: str) -> None:
    prompt = Prompt(system="S.", user="{text}", demonstrations="stratified", date="2025-01-01")
    changed = styled(prompt, name)
    style = STYLES[name]
    assert style.name == name
    assert (changed.shots, changed.task_definition, changed.enumerate) == (
        style.shots,
        style.task,
        True,
    )
    assert (changed.label_definitions is not None) == style.labels
    factors = {"shots", "task_definition", "enumerate", "label_definitions"}
    assert changed.model_dump(exclude=factors) == prompt.model_dump(exclude=factors)
    said = system_turn(changed, ["NA", *list(read_definitions("gids"))[:-1]], "gids")
    assert (TASK in said, "\n- NA: " in said) == (style.task, style.labels)


def test_an_unknown_style_names_the_nearest() -> None:
    assert "the nearest" in refusal(
        lambda: styled(Prompt(), "shots2")
    ) and "shots2-task" in refusal(lambda: styled(Prompt(), "shots2"))


def test_shipped_definitions_cover_the_labels_of_their_benchmarks() -> None:
    assert set(read_definitions("semeval2010_task8")) == set(semeval.LABELS)
    assert set(read_definitions("facts")) == {
        example.relation for example in sources.load(Source(dataset="facts", split="train"))
    }


def test_shipped_definitions_cover_conll04(
    shared_data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("JAXRE_DATA", str(shared_data))
    examples = sources.load(Source(dataset="conll04", split="train"))
    assert set(read_definitions("conll04")) == {example.relation for example in examples}


def test_shipped_definitions_cover_gids(shared_data: Path) -> None:
    lines = next((shared_data / "gids").rglob("test.tsv")).read_text(encoding="utf-8").splitlines()
    assert set(read_definitions("gids")) == {line.split("\t")[4] for line in lines}


# ---- definitions of a config ---------------------------------------------------------------------


def test_definitions_stand_beside_the_sorted_labels() -> None:
    prompt = Prompt(
        system=None, enumerate=True, label_definitions={"b": "second", "a": "first", "c": "unused"}
    )
    assert (
        system_turn(prompt, ["b", "a"])
        == "The answer is exactly one label from this allowed set:\n- a: first\n- b: second"
    )


def test_a_label_without_definition_is_named() -> None:
    prompt = Prompt(enumerate=True, label_definitions={"a": "first"})
    assert "lack 1 of 2 labels (first 'b')" in refusal(lambda: system_turn(prompt, ["b", "a"]))
    shipped = Prompt(enumerate=True, label_definitions="shipped")
    assert "those shipped for facts lack" in refusal(lambda: system_turn(shipped, ["odd"], "facts"))
    assert "no definitions ship for the dataset mine" in refusal(
        lambda: system_turn(shipped, ["odd"], "mine")
    )


def run(**sections: object) -> dict:
    data = {"train": {"dataset": "facts", "split": "train"}}
    return {
        "name": "run",
        "model": {"path": "m"},
        "data": data,
        "train": {"batch_examples": 1},
        **sections,
    }


def test_a_run_keeps_the_definitions_that_a_file_had(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text("no: nothing is said\n1: the first\n", encoding="utf-8")
    config = check_config(run(prompt={"enumerate": True, "label_definitions": str(path)}), "test")
    path.unlink()
    save_config(config, tmp_path / "config.yaml")
    kept = load_config(tmp_path / "config.yaml").prompt.label_definitions
    assert kept == config.prompt.label_definitions == {"no": "nothing is said", "1": "the first"}
    named = check_config(run(prompt={"enumerate": True, "label_definitions": "conll04"}), "test")
    assert named.prompt.label_definitions == read_definitions("conll04")


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ({"enumerate": True, "label_definitions": "nowhere.yaml"}, "nowhere.yaml cannot be read"),
        (
            {"enumerate": True, "label_definitions": "nowhere"},
            "no definitions ship under this name; write one of conll04, facts, ",
        ),
        ({"enumerate": True, "label_definitions": {}}, "should map each label to its definition"),
        (
            {"enumerate": True, "label_definitions": {"a": ""}},
            "the definition of 'a' should be one line of text",
        ),
        (
            {"enumerate": True, "label_definitions": {"a": "x\ny"}},
            "the definition of 'a' should be one line of text",
        ),
        (
            {"enumerate": True, "label_definitions": {"a": 3}},
            "the definition of 'a' should be one line of text",
        ),
        ({"label_definitions": "facts"}, "set enumerate=true too"),
    ],
)
def test_definitions_that_cannot_be_used_are_refused(prompt: dict, expected: str) -> None:
    message = refusal(lambda: check_config(run(prompt=prompt), "test"))
    assert message.startswith("test: prompt") and expected in message


def test_the_prompt_at_prediction_is_that_of_training_but_for_what_is_given(tmp_path: Path) -> None:
    config = check_config(
        run(
            prompt={"user": "{text}", "shots": 2},
            predict={"prompt": {"enumerate": True, "system": "S."}},
        ),
        "test",
    )
    assert config.prediction_prompt == config.prompt.model_copy(
        update={"enumerate": True, "system": "S."}
    )
    save_config(config, tmp_path / "config.yaml")
    assert load_config(tmp_path / "config.yaml") == config
    assert check_config(run(prompt={"shots": 2}), "test").prediction_prompt == Prompt(shots=2)
    assert "predict.prompt.shots" in refusal(
        lambda: check_config(run(predict={"prompt": {"shots": -1}}), "test")
    )
