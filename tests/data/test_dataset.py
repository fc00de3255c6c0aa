"""From a config to tokens and a plan: nothing is dropped in silence, the cache follows what the
tokens depend on.
"""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import tensorstore as ts
from refusals import refusal
from rich.console import Console
from tiny import TEMPLATE, tiny_config
from transformers import PreTrainedTokenizerBase

from jaxre.config import Config, Prompt, Source, Text
from jaxre.data.dataset import ask, make_plan
from jaxre.data.template import ChatTemplate, Encoded
from jaxre.data.tokenizer import load_tokenizer
from jaxre.data.tokens import (
    TokenSet,
    Truncation,
    demonstrator,
    encode_texts,
    read_texts,
    texts_digest,
)
from jaxre.objectives import load_dataset
from jaxre.relations.labels import task_of
from jaxre.relations.prompts import by_label, choose_demonstrations
from jaxre.relations.schema import ANY, Schema, Schemas
from jaxre.relations.sources import load
from jaxre.training.preview import leak_notice, preview


def written(
    folder: Path, relations: list[str], texts: list[str] | None = None, ids: list[str] | None = None
) -> Path:
    """A JSONL file of our own format."""
    lines = []
    for number, relation in enumerate(relations):
        text = texts[number] if texts else f"Ada met Bob on day {number}."
        record = {
            "id": ids[number] if ids else f"n{number}",
            "text": text,
            "head": "Ada",
            "tail": "Bob",
            "relation": relation,
        }
        lines.append(json.dumps(record))
    path = folder / "data.jsonl"
    path.write_text("\n".join(lines), encoding="utf-8")
    return path


def made(folder: Path) -> Path:
    folder.mkdir()
    return folder


def run_on(folder: Path, model: Path, path: Path, **changes: dict) -> Config:
    data = {"train": {"dataset": str(path)}, "validation": None, "labels": None} | changes.pop(
        "data", {}
    )
    return tiny_config(folder, model, data=data, **changes)


def preview_of(config: Config, model: Path) -> str:
    """The output of `jaxre prepare`."""
    console = Console(width=200)
    with console.capture() as printed:
        console.print(preview(config, model))
    return printed.get()


# ---- what is trained on ------------------------------------------------------------------------


def test_supervised_is_the_label_and_what_the_template_adds(
    tiny_model: Path, tmp_path: Path
) -> None:
    dataset = load_dataset(
        tiny_config(tmp_path, tiny_model, prompt={"shots": 2}, train={"row_length": 512}),
        tiny_model,
    )
    for split in (dataset.train, dataset.validation):
        tokens = split.tokens
        assert tokens.ids == tuple(example.id for example in split.examples)
        for number, (example, question) in enumerate(
            zip(split.examples, split.questions, strict=True)
        ):
            prompt = tokens.prompt_lengths[number]
            assert (
                dataset.tokenizer.decode(tokens[number][prompt:]) == f"{example.relation}<|im_end|>"
            )
            assert dataset.tokenizer.decode(tokens[number][:prompt]) == dataset.template.render(
                question, generation=True
            )
            assert [turn["role"] for turn in question] == ["user", "assistant"] * 2 + ["user"]


@pytest.mark.parametrize("demonstrations", ["fixed", "per_example"])
def test_demonstrations_are_those_of_the_relations_room(demonstrations: str) -> None:
    """`demonstrator` draws fixed ones once; an example among them still never sees itself."""
    train = load(Source(dataset="facts", split="train", limit=200))
    prompt = Prompt(shots=3, demonstrations=demonstrations)
    chosen, grouped = demonstrator(train, prompt, seed=1), by_label(train)
    for example in train:
        found = chosen(example)
        assert found == choose_demonstrations(grouped, prompt, 1, example)
        assert len(found) == 3 and example.text not in {one.text for one in found}
    asked = replace(
        found[0], id="as another release writes it", text=found[0].text.replace(" ", "  ")
    )
    assert found[0] not in chosen(asked)


# ---- too long ----------------------------------------------------------------------------------


def too_long(folder: Path) -> tuple[Path, list[str]]:
    texts = [f"Ada met Bob on day {n}." + " and on" * (400 if n in (2, 5) else 0) for n in range(8)]
    return written(folder, ["met", "saw"] * 4, texts), ["n2", "n5"]


def test_examples_longer_than_a_row_are_dropped_and_listed_and_no_answer_is_cut(
    tiny_model: Path, tmp_path: Path
) -> None:
    path, long = too_long(tmp_path)
    config = run_on(tmp_path, tiny_model, path)
    split = load_dataset(config, tiny_model).train
    assert [name[-2:] for name in split.dropped] == long
    assert len(split.examples) == 8 and len(split.tokens) == 6
    kept = {
        example.id: example.relation
        for example in split.examples
        if example.id not in split.dropped
    }
    tokenizer = load_tokenizer(tiny_model)
    for number, name in enumerate(split.tokens.ids):
        assert (
            tokenizer.decode(split.tokens[number][split.tokens.prompt_lengths[number] :])
            == f"{kept[name]}<|im_end|>"
        )
    assert split.tokens.lengths.max() <= config.train.row_length
    shown = preview_of(config, tiny_model)
    assert "2 examples are longer than a row and left out" in shown and all(
        name in shown for name in split.dropped
    )
    assert (
        split.truncation.examples,
        split.truncation.cut,
        split.truncation.answer_gone,
        split.truncation.answer_cut,
    ) == (8, 2, 2, 0)
    assert (
        f"cut at {config.train.row_length} tokens, 2 would lose their answer, 0 a part of it"
        in shown
    )


def test_truncation_counts_the_answers_that_it_would_lose() -> None:
    # tokens:           fits  exactly  last token lost  answer gone  prompt cut too
    prompts, totals = [10, 1020, 1020, 1024, 2000], [14, 1024, 1025, 1026, 2004]
    starts = np.concatenate([[0], np.cumsum(totals)])
    tokens = TokenSet(
        np.zeros(starts[-1], np.int32), starts, np.array(prompts, np.int32), tuple("abcde")
    )
    assert tokens.truncation(1024) == Truncation(
        1024, examples=5, cut=3, answer_gone=2, answer_cut=1, longest=2004
    )
    for limit in (1, 11, 1021, 3000):
        kept = [list(range(total))[:limit] for total in totals]
        answers = [
            sum(token >= prompt for token in row) for row, prompt in zip(kept, prompts, strict=True)
        ]
        found = tokens.truncation(limit)
        assert found.answer_gone == sum(count == 0 for count in answers)
        pieces = zip(answers, prompts, totals, strict=True)
        assert found.answer_cut == sum(
            0 < count < total - prompt for count, prompt, total in pieces
        )


def test_too_long_can_be_an_error(tiny_model: Path, tmp_path: Path) -> None:
    path, _ = too_long(tmp_path)
    config = run_on(tmp_path, tiny_model, path, data={"too_long": "error"})
    message = refusal(lambda: load_dataset(config, tiny_model))
    assert message.startswith(
        "data.train: 2 of 8 examples are longer than a row of 256 tokens (longest "
    )
    assert "n2" in message and message.endswith("raise train.row_length")


def test_a_row_that_holds_no_example_is_an_error(tiny_model: Path, tmp_path: Path) -> None:
    config = run_on(
        tmp_path,
        tiny_model,
        written(tmp_path, ["met"]),
        train={"row_length": 8, "batch_tokens": 64},
    )
    assert "1 of 1 examples are longer than a row of 8 tokens" in refusal(
        lambda: load_dataset(config, tiny_model)
    )


# ---- bad input ---------------------------------------------------------------------------------


def test_duplicate_ids_are_refused(tiny_model: Path, tmp_path: Path) -> None:
    path = written(tmp_path, ["met", "met"], ids=["same", "same"])
    message = refusal(lambda: load_dataset(run_on(tmp_path, tiny_model, path), tiny_model))
    assert "same" in message and str(path) in message


def test_a_label_outside_the_schema_is_refused(tiny_model: Path, tmp_path: Path) -> None:
    path = written(tmp_path, ["met", "saw"])
    config = run_on(tmp_path, tiny_model, path, data={"labels": ["met"]})
    message = refusal(lambda: load_dataset(config, tiny_model))
    assert (
        message.startswith("data.train: example ")
        and "'saw'" in message
        and "data.labels" in message
    )
    config = tiny_config(
        tmp_path, tiny_model, data={"train": {"dataset": str(path)}, "labels": None}
    )
    assert refusal(lambda: load_dataset(config, tiny_model)).startswith("data.validation: example ")


@pytest.mark.parametrize("content", ["", "\n\n"])
def test_an_empty_split_is_refused(tiny_model: Path, tmp_path: Path, content: str) -> None:
    path = tmp_path / "data.jsonl"
    path.write_text(content)
    assert str(path) in refusal(
        lambda: load_dataset(run_on(tmp_path, tiny_model, path), tiny_model)
    )


def test_a_part_that_leaves_nothing_is_refused(tiny_model: Path, tmp_path: Path) -> None:
    path = written(tmp_path, ["met"])
    config = run_on(
        tmp_path, tiny_model, path, data={"train": {"dataset": str(path), "part": [0.0, 1e-9]}}
    )
    assert "none of its 1 examples is left after part=" in refusal(
        lambda: load_dataset(config, tiny_model)
    )


def test_a_tokenizer_without_chat_template_is_refused(tiny_model: Path, tmp_path: Path) -> None:
    folder = tmp_path / "base"
    shutil.copytree(tiny_model, folder)
    (folder / "chat_template.jinja").unlink()
    assert refusal(lambda: load_dataset(tiny_config(tmp_path, folder), folder)).startswith(
        f"{folder}: the tokenizer has no chat template"
    )


def test_a_faulty_template_leaves_no_cache_entry(tiny_model: Path, tmp_path: Path) -> None:
    folder = tmp_path / "faulty"
    shutil.copytree(tiny_model, folder)
    (folder / "chat_template.jinja").write_text(TEMPLATE.replace("assistant\\n", "Assistant\\n"))
    config = tiny_config(tmp_path, folder)
    assert "not a prefix" in refusal(lambda: load_dataset(config, folder))
    assert not list(Path(config.data.cache).glob("*"))


def test_a_run_without_training_data_has_no_schema(tiny_model: Path, tmp_path: Path) -> None:
    config = tiny_config(
        tmp_path,
        tiny_model,
        data={"train": None, "text": {"paths": ["x"]}},
        train={"objective": "lm"},
    )
    assert "has no schema" in refusal(lambda: task_of(config))


def test_rows_that_the_devices_cannot_share_are_refused(tiny_model: Path, tmp_path: Path) -> None:
    config = run_on(tmp_path, tiny_model, written(tmp_path, ["met"] * 4))
    tokens = load_dataset(config, tiny_model).train.tokens
    assert "8 rows, which 3 devices" in refusal(lambda: make_plan(config, tokens, shards=3))


# ---- the cache follows what tokens depend on -----------------------------------------------------


def entries(config: Config) -> set[str]:
    return {path.name for path in Path(config.data.cache).iterdir()}


def test_a_second_load_comes_from_the_cache_and_is_equal(tiny_model: Path, tmp_path: Path) -> None:
    config = tiny_config(tmp_path, tiny_model)
    first, second = load_dataset(config, tiny_model), load_dataset(config, tiny_model)
    assert not first.train.from_cache and second.train.from_cache and second.validation.from_cache
    np.testing.assert_array_equal(first.train.tokens.tokens, second.train.tokens.tokens)
    assert first.train.tokens.ids == second.train.tokens.ids
    assert make_plan(config, first.train.tokens, 1) == make_plan(config, second.train.tokens, 1)


CHANGES = {
    "user turn": {"prompt": {"user": "{text}\nAnswer:"}},
    "system turn": {"prompt": {"system": "Answer."}},
    "listed labels": {"prompt": {"enumerate": True}},
    "shots": {"prompt": {"shots": 1}},
    "date": {"prompt": {"date": "2026-01-02"}},
    "row length": {"train": {"row_length": 512}},
    "data": {"data": {"train": {"dataset": "facts", "split": "train", "limit": 95}}},
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_change_that_tokens_depend_on_makes_a_new_entry(
    tiny_model: Path, tmp_path: Path, change: str
) -> None:
    config = tiny_config(tmp_path, tiny_model)
    load_dataset(config, tiny_model)
    before = entries(config)
    changed = load_dataset(tiny_config(tmp_path, tiny_model, **CHANGES[change]), tiny_model)
    assert not changed.train.from_cache and len(entries(config)) > len(before)


def test_another_tokenizer_or_template_makes_a_new_entry(tiny_model: Path, tmp_path: Path) -> None:
    load_dataset(tiny_config(tmp_path, tiny_model), tiny_model)
    template, tokenizer = tmp_path / "template", tmp_path / "tokenizer"
    for folder in (template, tokenizer):
        shutil.copytree(tiny_model, folder)
    (template / "chat_template.jinja").write_text(
        TEMPLATE.replace("<|im_end|>", "<|im_end|>\\n"), encoding="utf-8"
    )
    tree = json.loads((tokenizer / "tokenizer.json").read_text(encoding="utf-8"))
    tree["model"]["merges"].pop()
    (tokenizer / "tokenizer.json").write_text(json.dumps(tree), encoding="utf-8")
    for folder in (template, tokenizer):
        assert not load_dataset(tiny_config(tmp_path, folder), folder).train.from_cache
        assert load_dataset(tiny_config(tmp_path, folder), folder).train.from_cache


@pytest.mark.parametrize(
    "change",
    [
        {"name": "other"},
        {"lora": {"rank": 2}},
        {"train": {"learning_rate": 1.0}},
        {"train": {"prompt_weight": 0.5}},
    ],
)
def test_a_change_that_tokens_do_not_depend_on_reads_the_cache(
    tiny_model: Path, tmp_path: Path, change: dict
) -> None:
    load_dataset(tiny_config(tmp_path, tiny_model), tiny_model)
    assert load_dataset(tiny_config(tmp_path, tiny_model, **change), tiny_model).train.from_cache


def test_real_prompts_of_smollm3_hold_the_configs_date(
    qwen: PreTrainedTokenizerBase, smollm3_template: str, tmp_path: Path
) -> None:
    """The pinned date reaches the tokens from the config, with demonstrations, thinking off."""
    folder = tmp_path / "smollm3"
    qwen.save_pretrained(folder)
    (folder / "chat_template.jinja").write_text(smollm3_template, encoding="utf-8")
    config = tiny_config(
        tmp_path, folder, prompt={"shots": 2, "date": "2019-05-06"}, train={"row_length": 512}
    )
    dataset = load_dataset(config, folder)
    tokens = dataset.train.tokens
    for number, example in enumerate(dataset.train.examples[:5]):
        prompt = dataset.tokenizer.decode(tokens[number][: tokens.prompt_lengths[number]])
        assert "Today Date: 06 May 2019" in prompt and prompt.count("<think>\n\n</think>\n") == 3
        assert (
            dataset.tokenizer.decode(tokens[number][tokens.prompt_lengths[number] :])
            == f"{example.relation}<|im_end|>\n"
        )


# ---- the token set -------------------------------------------------------------------------------


def test_a_subset_keeps_whole_examples_with_their_ids() -> None:
    draw = np.random.default_rng(0)
    encoded = [
        Encoded(draw.integers(0, 99, int(draw.integers(1, 9))).tolist(), 1) for _ in range(30)
    ]
    whole = TokenSet.of(encoded, [f"n{n}" for n in range(30)])
    for chosen in (np.zeros(30, bool), np.ones(30, bool), draw.random(30) < 0.5):
        part = whole.subset(chosen)
        places = np.flatnonzero(chosen)
        assert part.ids == tuple(f"n{n}" for n in places)
        assert [part[i].tolist() for i in range(len(part))] == [encoded[n].tokens for n in places]
        assert (part.tokens.dtype, part.starts.dtype, part.prompt_lengths.dtype) == (
            np.int32,
            np.int64,
            np.int32,
        )
        np.testing.assert_array_equal(part.owners, whole.owners[chosen])
    assert len(TokenSet.of([], [])) == 0 and TokenSet.of([], []).starts.tolist() == [0]


# ---- raw text ------------------------------------------------------------------------------------


def test_documents_are_cut_into_pieces_and_every_token_stays(tiny_model: Path) -> None:
    tokenizer = load_tokenizer(tiny_model)
    documents = [("long", "The cat sat on the mat. " * 40), ("short", "Hello."), ("empty", "")]
    pieces = encode_texts(documents, tokenizer, 64)
    assert pieces.lengths.max() == 64 and set(pieces.prompt_lengths.tolist()) == {1}
    for name, text in documents[:2]:
        chosen = [pieces[i] for i, one in enumerate(pieces.ids) if one.startswith(name)]
        assert tokenizer.decode(np.concatenate(chosen)) == text + tokenizer.eos_token
    assert not any(one.startswith("empty") for one in pieces.ids)


def test_held_out_pieces_share_no_sentence_with_the_rest(tmp_path: Path, tiny_model: Path) -> None:
    """Sentences are repeated; their repeats must land on one side."""
    text = Text(
        sources=({"dataset": "facts", "split": "train", "limit": 300},),
        repeat_sources=3,
        holdout=0.2,
    )
    pieces = encode_texts(read_texts(text), load_tokenizer(tiny_model), 256)
    rest, held = pieces.held_out(0.2)
    assert len(rest) + len(held) == len(pieces) == 900 and 100 < len(held) < 260
    assert not {one.rpartition("#")[0] for one in held.ids} & {
        one.rpartition("#")[0] for one in rest.ids
    }


def test_text_that_cannot_be_read_is_refused(tmp_path: Path) -> None:
    assert "no such text file" in refusal(
        lambda: read_texts(Text(paths=(str(tmp_path / "none.txt"),)))
    )
    (tmp_path / "bad.txt").write_bytes(b"\xff\xfe\xfa")
    assert "cannot be read as UTF-8" in refusal(lambda: read_texts(Text(paths=(str(tmp_path),))))
    assert "neither paths nor sources" in refusal(lambda: read_texts(Text()))


def test_a_tokenizer_without_end_of_text_is_refused(tiny_model: Path) -> None:
    tokenizer = load_tokenizer(tiny_model)
    tokenizer.eos_token = None
    assert "no end-of-text token" in refusal(lambda: encode_texts([("a", "b")], tokenizer, 64))


def test_the_digest_of_texts_follows_documents_tokenizer_and_length(
    tiny_model: Path, smollm2: PreTrainedTokenizerBase
) -> None:
    tiny = load_tokenizer(tiny_model)
    given = [("a", "text")]
    before = texts_digest(given, tiny, 64)
    tiny(["text"])
    assert texts_digest(given, tiny, 64) == before
    others = {
        texts_digest(given, tiny, 65),
        texts_digest(given, smollm2, 64),
        texts_digest([("a", "Text")], tiny, 64),
    }
    assert len(others | {before}) == 4


# ---- shown
# -----------------------------------------------------------------------------------------


def test_prepare_shows_counts_lengths_packing_and_marked_examples(
    tiny_model: Path, tmp_path: Path
) -> None:
    config = tiny_config(tmp_path, tiny_model)
    shown = preview_of(config, tiny_model)
    tokens = load_dataset(config, tiny_model).train.tokens
    assert f"{tokens.tokens.size:,}" in shown and f"{int(tokens.lengths.max())}" in shown
    assert "fill " in shown and "% of the tokens supervised" in shown
    assert shown.count("⟦") == 6  # three titles, three answers
    lines = [line for line in shown.splitlines() if "█" in line]
    assert sum(int(line.strip("│ ").split()[-1].replace(",", "")) for line in lines) == len(tokens)


def test_prepare_and_train_tell_the_sentences_that_splits_share(
    tiny_model: Path, tmp_path: Path
) -> None:
    train = written(tmp_path, ["met", "saw"], ["Ada met Bob.", "Ada saw Bob."])
    test = written(
        made(tmp_path / "test"),
        ["met", "saw", "saw"],
        ["Ada  met Bob.", "Ada heard Bob.", "Bob saw Ada."],
    )
    config = run_on(
        tmp_path,
        tiny_model,
        train,
        data={"test": {"dataset": str(test)}, "validation": {"dataset": str(train)}},
    )
    shown = preview_of(config, tiny_model)
    assert (
        "validation: 2 examples have a text of train, 2 also the same pair (data/n0, data/n1)"
        in shown
    )
    assert "test: 1 examples have a text of train, 1 also the same pair (data/n0)" in shown
    assert re.search(r"│ test +│ +3 │", shown)
    dataset = load_dataset(config, tiny_model)
    start = (
        "examples whose text also occurs in train: 2 of 2 in validation (2 with the same pair), "
    )
    assert leak_notice(config, dataset) == start + "1 of 3 in test (1 with the same pair)"
    test.unlink()  # training does not need it
    assert leak_notice(config, dataset).startswith(start + "test not read (")


def test_ids_with_brackets_are_shown_as_they_are(tiny_model: Path, tmp_path: Path) -> None:
    path = written(tmp_path, ["met", "saw"], ids=["[red]a", "[/b]"])
    shown = preview_of(run_on(tmp_path, tiny_model, path), tiny_model)
    assert "[red]a" in shown and "[/b]" in shown


def test_questions_do_not_hang_on_the_gold_label() -> None:
    examples = load(Source(dataset="facts", split="train", limit=50))
    schema = Schema.of(examples)
    config = tiny_config(Path("unused"), Path("unused"), prompt={"shots": 0})
    hidden = [replace(example, relation=schema.labels[0]) for example in examples]
    schemas = Schemas({ANY: schema})
    assert ask(config, examples, schemas, {ANY: examples}) == ask(
        config, hidden, schemas, {ANY: examples}
    )


def test_prompts_of_a_dataset_are_rendered_by_its_own_template(
    tiny_model: Path, tmp_path: Path
) -> None:
    dataset = load_dataset(tiny_config(tmp_path, tiny_model), tiny_model)
    assert isinstance(dataset.template, ChatTemplate) and dataset.template.date == "2026-01-01"


# ---- a second start -----------------------------------------------------------------------------


def test_a_second_start_reads_no_training_example(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Reading 200,000 examples takes longer than everything else; later access reads the same
    examples.
    """
    config = run_on(tmp_path, tiny_model, written(tmp_path, ["met", "none", "met"]))
    first = load_dataset(config, tiny_model)
    examples, questions = first.train.examples, first.train.questions

    def never(*_: object) -> list:
        raise AssertionError("read again")

    with monkeypatch.context() as patched:
        patched.setattr("jaxre.data.dataset.sources.load", never)
        second = load_dataset(config, tiny_model)
        assert second.train.from_cache and not first.train.from_cache
        assert second.schema == first.schema
        np.testing.assert_array_equal(second.train.tokens.tokens, first.train.tokens.tokens)
        with pytest.raises(AssertionError, match="read again"):
            second.train.examples  # noqa: B018
    assert (second.train.examples, second.train.questions) == (examples, questions)


def test_a_file_that_changes_while_it_is_read_is_not_remembered(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else the next start would take the labels and tokens of the other content for those of this
    one.
    """
    path = written(tmp_path, ["met", "none"])
    config = run_on(tmp_path, tiny_model, path)
    before = path.read_bytes()

    def changed(*given: object) -> list:
        written(tmp_path, ["met", "left"])
        return load(*given)

    with monkeypatch.context() as patched:
        patched.setattr("jaxre.data.dataset.sources.load", changed)
        assert load_dataset(config, tiny_model).schema.labels == ("left", "met")
    path.write_bytes(before)
    assert load_dataset(config, tiny_model).schema.labels == ("met", "none")


def test_a_cache_that_has_the_tokens_need_not_be_writable(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = run_on(tmp_path, tiny_model, written(tmp_path, ["met", "none"]))
    load_dataset(config, tiny_model)
    for note in Path(config.data.cache).rglob("note.json"):
        note.unlink()

    class ReadOnly:
        def __init__(self, store: object):
            self.read = store.read

        def write(self, *_: object) -> None:
            raise ValueError("PERMISSION_DENIED")

    opened = ts.KvStore.open
    monkeypatch.setattr(
        "jaxre.data.cache.ts.KvStore.open",
        lambda *given: SimpleNamespace(result=lambda: ReadOnly(opened(*given).result())),
    )
    assert load_dataset(config, tiny_model).train.from_cache


def test_leaks_are_told_at_every_start_and_counted_once(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    held = made(tmp_path / "held")
    data = {"test": {"dataset": str(written(held, ["met"], ["Ada met Bob on day 1."]))}}
    config = run_on(tmp_path, tiny_model, written(tmp_path, ["met", "none"]), data=data)
    line = leak_notice(config, load_dataset(config, tiny_model))
    assert "1 of 1 in test" in line
    with monkeypatch.context() as patched:
        patched.setattr("jaxre.relations.sources.overlap", lambda *_: pytest.fail("counted again"))
        assert leak_notice(config, load_dataset(config, tiny_model)) == line
    written(held, ["met"], ["Ada met Bob elsewhere."])
    assert "0 of 1 in test" in leak_notice(config, load_dataset(config, tiny_model))


def test_whatever_the_tokens_hang_on_is_read_again(tiny_model: Path, tmp_path: Path) -> None:
    path = written(tmp_path, ["met", "none", "met"])
    config = run_on(tmp_path, tiny_model, path)
    load_dataset(config, tiny_model)
    asked = run_on(tmp_path, tiny_model, path, prompt={"system": "Which one?"})
    assert not load_dataset(asked, tiny_model).train.from_cache
    # as many bytes of another content would do: the content counts
    written(tmp_path, ["met", "none", "none"])
    changed = load_dataset(config, tiny_model)
    assert not changed.train.from_cache
    assert [example.relation for example in changed.train.examples] == ["met", "none", "none"]
    labelled = run_on(tmp_path, tiny_model, path, data={"labels": ["met"]})
    assert "none" in refusal(lambda: load_dataset(labelled, tiny_model))


def test_what_is_known_of_tokens_that_are_gone_makes_them_again(
    tiny_model: Path, tmp_path: Path
) -> None:
    config = run_on(tmp_path, tiny_model, written(tmp_path, ["met", "none"]))
    first = load_dataset(config, tiny_model).train
    shutil.rmtree(Path(config.data.cache) / first.digest)
    again = load_dataset(config, tiny_model).train
    assert not again.from_cache
    np.testing.assert_array_equal(again.tokens.tokens, first.tokens.tokens)
    for note in Path(config.data.cache).rglob("note.json"):
        note.write_text(note.read_text(encoding="utf-8").replace("none", "nine"), encoding="utf-8")
    assert load_dataset(config, tiny_model).schema.labels == ("met", "none")
