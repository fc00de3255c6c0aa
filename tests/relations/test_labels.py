"""Schemas: each dataset its own, the test split's flagged, and how a dataset is asked that a run
was not trained on.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from refusals import refusal

from jaxre.config import Config, Data, Source, check_config
from jaxre.relations import mixtures, sources
from jaxre.relations.labels import label_source_notices, schemas_of, task_of, with_given
from jaxre.relations.schema import ANY, Schemas


def table(folder: Path, name: str, relations: str) -> dict:
    rows = [
        {"id": str(n), "text": f"Ada {n} Bob.", "head": "Ada", "tail": "Bob", "relation": label}
        for n, label in enumerate(relations)
    ]
    path = folder / f"{name}.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return {"dataset": str(path)}


def run(train: dict, **data: object) -> Config:
    tree = {
        "name": "run",
        "model": {"path": "m"},
        "data": {"train": train, **data},
        "train": {"batch_examples": 1},
    }
    return check_config(tree, "test")


def collected(data: Data) -> Schemas:
    return schemas_of(data, mixtures.read(data.train, "data.train").by_dataset)


def labels_of(schemas: Schemas, name: str) -> str:
    return "".join(schemas.of(name).labels)


def test_each_dataset_of_a_mixture_has_its_own_labels(tmp_path: Path) -> None:
    a, b, c = table(tmp_path, "a", "xyx"), table(tmp_path, "b", "zx"), table(tmp_path, "c", "pq")
    data = run(
        {"sources": [a, b], "limit": 1},
        labels={"b": ["z", "x", "w"]},
        validation={"sources": [a, c]},
    ).data
    schemas = collected(data)
    # of all examples, whatever the limit leaves
    assert (labels_of(schemas, "a"), labels_of(schemas, "b")) == (
        "xy",
        "wxz",
    )
    assert "c: not a dataset of data.train" in refusal(
        lambda: schemas.of("c")
    ) and "data.labels.c" in refusal(lambda: schemas.of("c"))
    given = run({"sources": [a, b]}, labels={"c": c}, validation={"sources": [a, c]}).data
    assert labels_of(with_given(collected(given), given, ["a", "c"]), "c") == "pq"


def test_listed_labels_are_strict_and_collected_ones_are_told(tmp_path: Path) -> None:
    a, b = table(tmp_path, "a", "xyv"), table(tmp_path, "b", "zx")
    examples = mixtures.load(run({"sources": [a, b]}).data.train, "data.train")
    listed = run({"sources": [a, b]}, labels={"a": ["x"]}).data
    assert "data.train: example a/" in refusal(
        lambda: collected(listed).check(examples, "data.train")
    )
    taken = run({"sources": [a, b]}, labels={"a": table(tmp_path, "other", "x")}).data
    notices = collected(taken).check(examples, "data.train")
    assert notices == ["data.train: 2 of 3 examples of a have labels outside of its schema (v, y)"]
    assert "is not in the schema (x)" in refusal(
        lambda: collected(taken).check(examples, "data.train", strict=True)
    )


def test_a_run_on_one_source_has_one_schema_for_all_files(tmp_path: Path) -> None:
    a = table(tmp_path, "a", "xy")
    schemas = collected(run(a).data)
    assert labels_of(schemas, "whatever") == "xy" and schemas.of("dev").strict
    assert labels_of(collected(run(a, labels=["q"]).data), "a") == "q"
    assert labels_of(collected(run(a, labels={"a": ["q"]}).data), "dev") == "q"


def test_schemas_survive_json(tmp_path: Path) -> None:
    schemas = collected(
        run({"sources": [table(tmp_path, "a", "xy"), table(tmp_path, "b", "z")]}).data
    )
    assert Schemas.from_json(json.loads(json.dumps(schemas.to_json()))) == schemas


def test_a_misspelt_dataset_in_data_labels_is_refused(tmp_path: Path) -> None:
    data = run({"sources": [table(tmp_path, "alpha", "xy")]}, labels={"alfa": ["x", "y"]}).data
    assert (
        refusal(lambda: collected(data))
        == "data.labels.alfa: no such dataset; the nearest is alpha"
    )


# ---- labels of the test split, which the study's prompts had
# ----------------------------------------


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (
            {"labels": {"facts": {"dataset": "facts", "split": "test"}}},
            "facts are collected from facts/test, which is named test",
        ),
        (
            {
                "labels": {"facts": {"dataset": "facts", "split": "validation"}},
                "test": {"dataset": "facts", "split": "validation"},
            },
            "facts are collected from facts/validation, which is what is tested",
        ),
        (
            {"train": {"dataset": "facts", "split": "test"}},
            "facts are collected from facts/test, which is named test",
        ),
        (
            {"test": {"dataset": "facts", "split": "train"}},
            "facts are collected from facts/train, which is what is tested",
        ),
        (
            {
                "test": {"dataset": "facts", "split": "train", "part": [0.9, 1.0]},
                "train": {"part": [0.0, 0.9]},
            },
            None,
        ),
        ({"test": {"dataset": "facts", "split": "test"}}, None),
        ({"labels": {"facts": ["born_in"]}, "test": {"dataset": "facts", "split": "train"}}, None),
        ({"labels": ["born_in"], "train": {"dataset": "facts", "split": "test"}}, None),
    ],
)
def test_labels_of_the_tested_split_are_flagged(data: dict, expected: str | None) -> None:
    data = {**data, "train": {"dataset": "facts", "split": "train", **data.get("train", {})}}
    lines = label_source_notices(run(**data).data)
    assert len(lines) == (expected is not None)
    assert expected is None or (
        lines[0].startswith("LABELS FROM THE TEST SPLIT: ") and expected in lines[0]
    )


# ---- prediction ----------------------------------------------------------------------------------


def test_a_dataset_of_a_mixture_is_asked_with_its_own_labels_and_examples(tmp_path: Path) -> None:
    a, b = table(tmp_path, "a", "xy"), table(tmp_path, "b", "zw")
    asked = task_of(run({"sources": [a, b]}), Source(**b), "b")
    assert (asked.schema.labels, asked.dataset) == (("w", "z"), "b")
    assert "b.jsonl, which is what is tested" in asked.notices[0]  # the file that it was trained on
    assert {example.dataset for example in asked.train} == {"b"} and not asked.schema.strict
    # for a text, no example is read
    assert task_of(run({"sources": [a, b]}), Source(**b)).dataset == "b"
    assert "several datasets" in refusal(lambda: task_of(run({"sources": [a, b]})))


def test_labels_of_what_is_predicted_are_flagged_there_too() -> None:
    config = run(
        {"sources": [{"dataset": "facts", "split": "train"}]},
        labels={"facts": {"dataset": "facts", "split": "validation"}},
    )
    assert not task_of(config, Source(dataset="facts", split="test"), "facts").notices
    (line,) = task_of(config, Source(dataset="facts", split="validation"), "facts").notices
    assert "which is what is tested" in line


@pytest.mark.parametrize("train", ["mixture", "single"])
def test_a_benchmark_that_a_run_was_not_trained_on_is_asked_with_its_own_training_split(
    tmp_path: Path, train: str
) -> None:
    a = table(tmp_path, "a", "xy")
    config = run({"sources": [a]} if train == "mixture" else a)
    asked = task_of(config, Source(dataset="facts", split="test", limit=3), "facts", shots=2)
    truth = sources.load(Source(dataset="facts", split="train"))
    assert asked.train == truth and asked.schema.labels == tuple(
        sorted({example.relation for example in truth})
    )
    assert asked.notices == (
        (
            "facts: the run was not trained on it; its labels and demonstrations come from its own"
            " training split (facts/train)"
        ),
    )


def test_data_labels_comes_before_a_benchmarks_own_training_split(tmp_path: Path) -> None:
    a = table(tmp_path, "a", "xy")
    source = Source(dataset="facts", split="test")
    listed = run({"sources": [a]}, labels={"facts": ["born_in", "none"]})
    asked = task_of(listed, source, "facts")
    assert asked.schema.labels == ("born_in", "none") and not asked.train
    assert asked.notices == ("facts: its labels come from data.labels.facts",)
    # The tested split may give labels, flagged, but never demonstrations: they would show answers
    # of the test.
    taken = run({"sources": [a]}, labels={"facts": {"dataset": "facts", "split": "test"}})
    asked = task_of(taken, source, "facts", shots=1)
    assert {example.split for example in asked.train} == {"train"}
    assert any(line.startswith("LABELS FROM THE TEST SPLIT") for line in asked.notices)


def test_a_file_of_a_mixture_without_labels_is_refused(tmp_path: Path) -> None:
    config = run({"sources": [table(tmp_path, "a", "xy")]})
    assert "data.labels.c" in refusal(
        lambda: task_of(config, Source(**table(tmp_path, "c", "x")), "c")
    )
    # A run on one source takes any file for its own dataset.
    single = task_of(run(table(tmp_path, "a", "xy")), Source(**table(tmp_path, "c", "x")), "c")
    assert single.schema.labels == ("x", "y")
    assert ANY in collected(run(table(tmp_path, "a", "xy")).data).by_dataset
