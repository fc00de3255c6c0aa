"""Which data `jaxre predict` reads, and how."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from refusals import refusal

from jaxre.checkpoints.source import Loaded
from jaxre.config import Config, check_config
from jaxre.evaluation.predictions import Prediction
from jaxre.inference import commands
from jaxre.inference.commands import load_source

MAPPING = {"text": "sentence", "head": "subj", "tail": "obj", "relation": "label"}


def written(path: Path, **fields: str) -> str:
    """A file of one record, by default with the columns of MAPPING."""
    record = {"sentence": "Ada saw Bob.", "subj": "Ada", "obj": "Bob", "label": "met"} | fields
    path.write_text(
        json.dumps({name: value for name, value in record.items() if value}) + "\n",
        encoding="utf-8",
    )
    return str(path)


def run_on(folder: Path, **data: dict) -> Config:
    train = {"dataset": written(folder / "train.jsonl"), "columns": MAPPING}
    return check_config(
        {
            "name": "run",
            "model": {"path": "m"},
            "data": {"train": train, **data},
            "train": {"batch_examples": 1},
        },
        "test",
    )


def test_another_file_with_the_columns_of_the_run_needs_no_mapping(tmp_path: Path) -> None:
    source, (example,) = load_source(
        run_on(tmp_path), written(tmp_path / "new.jsonl", subj="Bob", obj="Ada"), None
    )
    assert (example.head, example.tail, example.relation, example.id) == (
        "Bob",
        "Ada",
        "met",
        "new/1",
    )
    assert source.columns == MAPPING


def test_a_file_without_labels_takes_the_rest_of_the_mapping(tmp_path: Path) -> None:
    _, (example,) = load_source(run_on(tmp_path), written(tmp_path / "new.jsonl", label=""), None)
    assert (example.head, example.relation) == ("Ada", "")


def test_labels_that_the_run_hides_in_its_own_test_file_are_read_in_another(tmp_path: Path) -> None:
    test = {"dataset": "test.jsonl", "columns": MAPPING | {"relation": ""}}
    path = tmp_path / "new.jsonl"
    path.write_text(
        json.dumps({"sentence": "Ada saw Bob.", "subj": "Ada", "obj": "Bob", "relation": "met"})
        + "\n",
        encoding="utf-8",
    )
    assert load_source(run_on(tmp_path, test=test), str(path), None)[1][0].relation == "met"


def test_a_record_that_the_mapping_cannot_read_is_named(tmp_path: Path) -> None:
    """Marked texts need no columns of the entities; a text without marks does, and is not hidden by
    advice for the whole file.
    """
    mapping = {"text": "body", "relation": "label"}
    path = tmp_path / "new.jsonl"
    path.write_text(
        '{"body": "<e1>Ada</e1> saw <e2>Bob</e2>."}\n{"body": "Ada saw Bob."}\n', encoding="utf-8"
    )
    config = run_on(tmp_path, train={"dataset": str(tmp_path / "train.jsonl"), "columns": mapping})
    message = refusal(lambda: load_source(config, str(path), None))
    assert (
        f'{path}:2: no column for "head"' in message
        and "in it data.test.columns.head=NAME" in message
    )


def test_a_mapping_for_marked_texts_does_not_hide_the_next_one(tmp_path: Path) -> None:
    marked = {"dataset": "marked.jsonl", "columns": {"text": "sentence", "relation": "label"}}
    path = written(tmp_path / "new.jsonl", label="")
    source, (example,) = load_source(run_on(tmp_path, test=marked), path, None)
    assert (example.head, example.tail, source.columns["head"]) == ("Ada", "Bob", "subj")


def test_the_first_source_whose_columns_are_there_gives_the_mapping(tmp_path: Path) -> None:
    """Test before train; the columns of a hub dataset say nothing of a file's."""
    other = {"dataset": "other.csv", "columns": MAPPING | {"head": "obj", "tail": "subj"}}
    hub = {"dataset": "hub:o/n", "columns": MAPPING | {"head": "obj", "tail": "subj"}}
    path = written(tmp_path / "new.jsonl")
    assert load_source(run_on(tmp_path, test=other), path, None)[1][0].head == "Bob"
    assert load_source(run_on(tmp_path, test=hub), path, None)[1][0].head == "Ada"
    other["columns"]["tail"] = "nowhere"
    assert load_source(run_on(tmp_path, test=other), path, None)[1][0].head == "Ada"


def test_a_file_with_the_usual_columns_needs_no_mapping(tmp_path: Path) -> None:
    path = tmp_path / "new.jsonl"
    path.write_text('{"text": "Ada saw Bob.", "head": "Ada", "tail": "Bob"}\n')
    source, (example,) = load_source(run_on(tmp_path), str(path), None)
    assert (example.head, example.tail, source.columns) == ("Ada", "Bob", {})


def test_a_file_with_other_columns_is_told_what_predict_can_do(tmp_path: Path) -> None:
    path = tmp_path / "new.jsonl"
    path.write_text('{"words": "Ada saw Bob.", "from": "Ada", "to": "Bob"}\n')
    message = refusal(lambda: load_source(run_on(tmp_path), str(path), None))
    assert (
        'no column for "text"' in message
        and "map it with --config CONFIG, in it data.test.columns.text=NAME" in message
    )
    mapped = {"dataset": str(path), "columns": {"text": "words", "head": "from", "tail": "to"}}
    # the config that was told of
    assert load_source(run_on(tmp_path, test=mapped), str(path), None)[1][0].head == "Ada"


def test_data_without_a_name_is_refused(tmp_path: Path) -> None:
    assert refusal(lambda: load_source(run_on(tmp_path), "", None)).startswith("--data: ")


@pytest.mark.parametrize("fields", [{"subj": "Dora"}, {"sentence": "Bob."}])
def test_a_record_that_cannot_be_used_is_named_whatever_the_mapping(
    tmp_path: Path, fields: dict
) -> None:
    assert refusal(
        lambda: load_source(run_on(tmp_path), written(tmp_path / "new.jsonl", **fields), None)
    ).startswith(f"{tmp_path / 'new.jsonl'}:1: ")


@pytest.mark.parametrize("mode", ["best", "generate"])
def test_a_single_answer_is_shown_with_its_own_probability(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mode: str
) -> None:
    """A model that writes "met" with the probability that these modes know, e^-0.5."""
    config = tmp_path / "run.yaml"
    config.write_text(
        json.dumps(
            run_on(tmp_path).model_dump(mode="json", exclude_unset=True)
            | {"model": {"path": "facts-base"}}
        )
    )
    row = Prediction("text", "", "met", score=-0.5)
    monkeypatch.setattr(commands, "open_model", lambda *given: Loaded(tmp_path, "m", None, {}))
    monkeypatch.setattr(
        commands, "predict_examples", lambda *given, **more: [row] if more["mode"] == mode else []
    )
    table = commands.predict_text("facts-base", "<e1>Ada</e1> saw <e2>Bob</e2>.", mode, config)
    assert [[str(cell) for cell in column.cells] for column in table.columns] == [
        ["met"],
        ["0.6065"],
    ]
    assert "--mode score" in table.caption


def test_a_bound_is_shown_as_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = tmp_path / "run.yaml"
    config.write_text(
        json.dumps(
            run_on(tmp_path).model_dump(mode="json", exclude_unset=True)
            | {"model": {"path": "facts-base"}}
        )
    )
    row = Prediction(
        "text", "", "met", score=-0.1, probabilities={"met": 0.9}, bounds={"saw": 0.01, "no": 0.05}
    )
    monkeypatch.setattr(commands, "open_model", lambda *given: Loaded(tmp_path, "m", None, {}))
    monkeypatch.setattr(
        commands, "predict_examples", lambda *given, above, **more: [row][: above > 0]
    )
    text = "<e1>Ada</e1> saw <e2>Bob</e2>."
    table = commands.predict_text("facts-base", text, "score", config, above=0.1)
    assert [[str(cell) for cell in column.cells] for column in table.columns] == [
        ["met", "no", "saw"],
        ["0.9000", "at most 0.05", "at most 0.01"],
    ]
    assert "not shares of their sum" in table.caption
