"""A mixture as tokens: every example with the labels and demonstrations of its own dataset, also
from the cache.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from refusals import refusal
from rich.console import Console
from tiny import tiny_config

from jaxre.config import Config, Source
from jaxre.objectives import load_dataset
from jaxre.relations.sources import load
from jaxre.training.preview import data_notices, leak_notice, preview


def table(folder: Path, name: str, labels: list[str], count: int = 6, start: int = 0) -> dict:
    rows = [
        {
            "id": f"n{n}",
            "text": f"{name} {n} met Bob.",
            "head": name,
            "tail": "Bob",
            "relation": labels[n % len(labels)],
        }
        for n in range(start, start + count)
    ]
    path = folder / f"{name}.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return {"dataset": str(path)}


def mixed(folder: Path, model: Path, data: dict | None = None, **changes: object) -> Config:
    """Ada (met, left), Eve (saw, none, heard) and, validated alone, Zoe."""
    data = dict(data or {})
    if "train" not in data:
        data["train"] = {
            "sources": [
                table(folder, "Ada", ["met", "left"]),
                table(folder, "Eve", ["saw", "none", "heard"]),
            ]
        }
    data = {"validation": {"sources": data["train"]["sources"]}, "labels": None, **data}
    changes = {
        "prompt": {"enumerate": True, "shots": 2, "demonstrations": "stratified"},
        "train": {"row_length": 512},
    } | changes
    return tiny_config(folder, model, data=data, **changes)


LABELS = {"Ada": "left, met", "Eve": "heard, none, saw"}


def test_an_example_is_asked_with_the_labels_and_demonstrations_of_its_own_dataset(
    tiny_model: Path, tmp_path: Path
) -> None:
    dataset = load_dataset(mixed(tmp_path, tiny_model), tiny_model)
    for split in (dataset.train, dataset.validation):
        assert split.tokens.ids == tuple(example.id for example in split.examples)
        assert sorted({example.dataset for example in split.examples}) == ["Ada", "Eve"]
        for number, (example, question) in enumerate(
            zip(split.examples, split.questions, strict=True)
        ):
            assert question[0]["content"].endswith(f"allowed set: {LABELS[example.dataset]}")
            shown = [turn["content"] for turn in question if turn["role"] == "user"]
            assert len(shown) == 3 and all(example.dataset in text for text in shown)
            prompt = split.tokens.prompt_lengths[number]
            assert dataset.tokenizer.decode(
                split.tokens[number][:prompt]
            ) == dataset.template.render(question, generation=True)
            assert (
                dataset.tokenizer.decode(split.tokens[number][prompt:])
                == f"{example.relation}<|im_end|>"
            )


def test_a_second_start_reads_no_training_example_and_says_the_same(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train = {
        "sources": [table(tmp_path, "Ada", ["met", "left"]), table(tmp_path, "Eve", ["saw"])],
        "limit": 5,
    }
    config = mixed(
        tmp_path,
        tiny_model,
        {"train": train, "validation": None, "labels": {"Eve": table(tmp_path, "list", ["heard"])}},
        prompt={},
    )
    first = load_dataset(config, tiny_model)
    assert first.notices[0].startswith("data.train: ") and first.notices[0].endswith(
        "of Eve have labels outside of its schema (saw)"
    )
    monkeypatch.setattr("jaxre.relations.sources.load", lambda *_: pytest.fail("read again"))
    second = load_dataset(config, tiny_model)
    assert second.train.from_cache and not first.train.from_cache
    assert (second.schemas, second.notices, second.train.counts) == (
        first.schemas,
        first.notices,
        first.train.counts,
    )
    assert data_notices(config, second) == data_notices(config, first)
    np.testing.assert_array_equal(second.train.tokens.tokens, first.train.tokens.tokens)


@pytest.mark.parametrize("change", ["source", "labels", "limit", "order"])
def test_whatever_the_mixture_hangs_on_is_read_again(
    tiny_model: Path, tmp_path: Path, change: str
) -> None:
    train = {"sources": [table(tmp_path, "Ada", ["met", "left"]), table(tmp_path, "Eve", ["saw"])]}
    data = {"train": train, "validation": None, "labels": {"Eve": table(tmp_path, "list", ["saw"])}}
    load_dataset(mixed(tmp_path, tiny_model, data, prompt={}), tiny_model)
    if change == "source":
        table(tmp_path, "Eve", ["saw", "met"])
    elif change == "labels":
        table(tmp_path, "list", ["saw", "none"])
    else:
        train = train | ({"limit": 3} if change == "limit" else {"sources": train["sources"][::-1]})
    again = load_dataset(
        mixed(tmp_path, tiny_model, data | {"train": train}, prompt={}, name="again"), tiny_model
    )
    if change == "labels":
        assert again.schemas.of("Eve").labels == ("none", "saw")  # the tokens may be the same
    else:
        assert not again.train.from_cache


def test_prepare_and_the_log_show_the_sources_and_flag_labels_of_the_test_split(
    tiny_model: Path, tmp_path: Path
) -> None:
    facts = {"dataset": "facts", "split": "train", "limit": 9}
    data = {
        "train": {"sources": [facts, table(tmp_path, "Ada", ["met"], 4)], "limit": 12},
        "validation": None,
        "labels": {"facts": {"dataset": "facts", "split": "test"}},
    }
    config = mixed(tmp_path, tiny_model, data, prompt={})
    dataset = load_dataset(config, tiny_model)
    used = {count.source: count.used for count in dataset.train.counts}
    assert sum(used.values()) == 12
    sources_line, flag = data_notices(config, dataset)
    assert (
        sources_line
        == f"train: {used['facts/train']} of 9 of facts/train (general), {used['Ada.jsonl']} of 4"
        " of Ada.jsonl (general)"
    )
    assert flag.startswith(
        "LABELS FROM THE TEST SPLIT: those of facts are collected from facts/test"
    )
    console = Console(width=250)
    with console.capture() as captured:
        console.print(preview(config, tiny_model))
    shown = captured.get()
    assert flag in shown and "sources of train" in shown and "labels of Ada" in shown
    assert leak_notice(config, dataset) == ""


def test_prepare_says_of_each_dataset_what_leaks(tiny_model: Path, tmp_path: Path) -> None:
    """Validation is Ada, which is trained on, and the facts, which are not in train but for one
    sentence.
    """
    texts = load(Source(dataset="facts", split="validation"))
    (tmp_path / "more.jsonl").write_text(
        json.dumps(
            {
                "id": "0",
                "text": texts[0].text,
                "head": texts[0].head,
                "tail": texts[0].tail,
                "relation": "met",
            }
        )
        + "\n"
    )
    ada, more = table(tmp_path, "Ada", ["met", "left"]), {"dataset": str(tmp_path / "more.jsonl")}
    facts = {"dataset": "facts", "split": "validation"}
    data = {
        "train": {"sources": [ada, more]},
        "validation": {"sources": [ada, facts]},
        "labels": {"facts": facts},
    }
    console = Console(width=250)
    with console.capture() as captured:
        console.print(preview(mixed(tmp_path, tiny_model, data, prompt={}), tiny_model))
    shown = captured.get()
    count = sum(one.text == texts[0].text for one in texts)
    assert f"validation, facts: {count} examples have a text of train" in shown
    assert "validation, Ada: 6 examples have a text of train" in shown


def test_validation_of_a_dataset_without_schema_or_demonstrations_is_refused(
    tiny_model: Path, tmp_path: Path
) -> None:
    zoe = {"validation": {"sources": [table(tmp_path, "Zoe", ["met"])]}}
    assert "data.labels.Zoe" in refusal(
        lambda: load_dataset(mixed(tmp_path, tiny_model, zoe), tiny_model)
    )
    listed = zoe | {"labels": {"Zoe": ["met", "left"]}}
    assert "no demonstrations" in refusal(
        lambda: load_dataset(mixed(tmp_path, tiny_model, listed), tiny_model)
    )
    plain = load_dataset(mixed(tmp_path, tiny_model, listed, prompt={"shots": 0}), tiny_model)
    assert plain.schemas.of("Zoe").labels == ("left", "met")
    wrong = zoe | {"labels": {"Zoe": ["left"]}}
    assert refusal(
        lambda: load_dataset(mixed(tmp_path, tiny_model, wrong, prompt={}), tiny_model)
    ).startswith("data.validation: example Zoe/")


def test_a_listed_prompt_that_lacks_the_answer_is_refused(tiny_model: Path, tmp_path: Path) -> None:
    data = {"validation": None, "labels": {"Eve": table(tmp_path, "list", ["saw", "none"])}}
    message = refusal(lambda: load_dataset(mixed(tmp_path, tiny_model, data), tiny_model))
    assert message.startswith("data.train: example Eve/") and "'heard'" in message
