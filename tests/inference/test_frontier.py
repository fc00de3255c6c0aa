"""What is asked of a frontier model comes back exactly: every answer to its examples, nothing
counted that was not said.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from fake_provider import answer_files, result, take
from hypothesis import given, settings
from hypothesis import strategies as st
from refusals import refusal

from jaxre.config import Prompt, Source, check_config
from jaxre.evaluation.compare import compare_files
from jaxre.evaluation.frontier import requests as frontier_requests
from jaxre.evaluation.frontier.requests import (
    Ask,
    Limits,
    build_manifest,
    custom_id,
    read_manifest,
    write_requests,
)
from jaxre.evaluation.predictions import read_predictions, write_predictions
from jaxre.inference.frontier import check_file, export_requests, import_results
from jaxre.relations.prompts import TASK, turns
from jaxre.relations.schema import Example, hash_prompt

PROVIDERS = ("openai", "anthropic", "openrouter")
QUOTED, UNICODE = 'is "also" called', "作者"
LABELS = ["author_of", "none", QUOTED, UNICODE]

# text -> (gold labels of the examples that have it, what the model says, row label and status or
# None)
CASES = {
    "Ada wrote right.": (["author_of"], [("author_of", "stop")], ("author_of", "")),
    "Ada wrote more.": (
        ["author_of"],
        [("Answer: author_of\nBecause she did.", "stop")],
        ("author_of", ""),
    ),
    "Ada wrote quotes.": ([QUOTED], [(QUOTED, "stop")], (QUOTED, "")),
    "Ada wrote \u2028 ünï 关系.": ([UNICODE], [(UNICODE, "stop")], (UNICODE, "")),
    "Ada wrote alike.": (["author_of", "none"], [("none", "stop")], ("none", "")),
    "Ada wrote refused.": (
        ["none"],
        [("I will not.", "refusal")],
        ("(refusal) I will not.", "refusal"),
    ),
    "Ada wrote silent.": (["none"], [("", "refusal")], ("(refusal)", "refusal")),
    "Ada wrote empty.": (["none"], [("", "stop")], ("", "")),
    "Ada wrote cut.": (
        ["none"],
        [("author_of because", "cut")],
        ("author_of because", "truncated"),
    ),
    "Ada wrote thinking.": (["none"], [("", "cut")], None),
    "Ada wrote failed.": (["none"], [("", "error")], None),
    "Ada wrote late.": (["author_of"], [("", "expired")], None),
    "Ada wrote lost.": (["author_of"], [None], None),
    "Ada wrote again.": (["author_of"], [("", "error"), ("author_of", "stop")], ("author_of", "")),
    "Ada wrote twice.": (
        ["author_of"],
        [("author_of", "stop"), ("author_of", "stop")],
        ("author_of", ""),
    ),
    "Ada wrote both.": (["author_of"], [("none", "stop"), ("author_of", "stop")], ("none", "")),
}


def model(question: str):
    return CASES[question.partition("Text: ")[2].partition("\n")[0]][1]


@pytest.fixture
def config(tmp_path):
    records = [
        {
            "id": f"{text} {number}",
            "text": text,
            "head": "Ada",
            "tail": text.split()[2].strip("."),
            "relation": gold,
        }
        for text, (golds, _, _) in CASES.items()
        for number, gold in enumerate(golds)
    ]
    train = [
        {"id": str(i), "text": f"Bob {i}.", "head": "Bob", "tail": str(i), "relation": label}
        for i, label in enumerate(LABELS)
    ]
    for name, rows in (("train", train), ("test", records)):
        (tmp_path / f"{name}.jsonl").write_text(
            "".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8"
        )
    tree = {
        "name": "x",
        "model": {"path": "nowhere"},
        "data": {name: {"dataset": str(tmp_path / f"{name}.jsonl")} for name in ("train", "test")},
        "prompt": {"user": "Text: {text}\nHead: {head}\nAnswer:", "enumerate": True, "shots": 1},
        "train": {"batch_examples": 2},
    }
    return check_config(tree, "test")


def exported(config, tmp_path, provider, **settings):
    return export_requests(
        config, Ask(provider, "big-1", **settings), None, None, tmp_path / "asked.jsonl"
    )


@pytest.mark.parametrize("provider", PROVIDERS)
def test_every_answer_comes_back_to_its_examples(config, tmp_path, provider):
    written = exported(config, tmp_path, provider)
    asked = [request for file in written.files for request in take(provider, file)]
    assert len(asked) == len(CASES) and all(
        turn["content"] for _, chat, _ in asked for turn in chat
    )
    limit = "max_completion_tokens" if provider == "openai" else "max_tokens"
    assert all(body == {"model": "big-1", "temperature": 0.0, limit: 64} for _, _, body in asked)

    results = answer_files(provider, written.files, tmp_path, model)
    done = import_results(written.manifest, results, tmp_path / "cache", price=(1.0, 10.0))
    rows = {row.example_id: row for row in read_predictions(tmp_path / "cache.csv")}
    assert list(rows.values()) == read_predictions(tmp_path / "cache.parquet") == done.rows
    expected = {
        f"test/{text} {number}": (gold, *said)
        for text, (golds, _, said) in CASES.items()
        if said is not None
        for number, gold in enumerate(golds)
    }
    assert {
        name: (row.relation, row.generated_relation, row.status) for name, row in rows.items()
    } == expected
    # in the order of the export, though the results were shuffled
    assert list(rows) == list(expected)
    one = rows["test/Ada wrote right. 0"]
    assert (one.tuned_dataset_name, one.model_shot, one.prompt_shot, one.gen_type) == (
        "frontier",
        "n/a",
        "1",
        "gen_constrained",
    )
    assert (one.eval_dataset_name, one.model_id, one.input_tokens, one.output_tokens) == (
        "test",
        "big-1",
        100,
        5,
    )
    assert one.prompt_hash == hash_prompt(one.prompt) and json.loads(one.prompt)[-1][
        "content"
    ].startswith("Text: Ada wrote right.")
    assert one.date == (
        read_manifest(written.manifest).date if provider == "anthropic" else "2026-01-01"
    )

    price = 0.25 if provider == "openrouter" else 150e-6  # its own cost, or 100 tokens in and 5 out
    assert one.cost_usd == pytest.approx(price) and rows[
        "test/Ada wrote alike. 1"
    ].cost_usd == pytest.approx(price / 2)
    s = done.summary
    # 12 requests with a row, two of them answered twice, and one that was cut before its first word
    paid = 15
    assert s["cost_usd"] == pytest.approx(paid * price) and (
        s["input_tokens"],
        s["output_tokens"],
    ) == (paid * 100, paid * 5)
    assert (s["requests"], s["examples"], s["answered_requests"], s["answered_examples"]) == (
        16,
        17,
        12,
        13,
    )
    assert sum(s["errors"].values()) == 3 and any(
        "cut before the first word" in reason for reason in s["errors"]
    )
    assert (s["missing"], s["refusals"], s["truncated"], s["empty"]) == (1, 2, 1, 1)
    assert (
        s["repeated"] == 1
        and len(s["contradicted_ids"]) == 1
        and s["unknown_ids"] == []
        and s["without_cost"] == 0
    )
    assert s["outside_schema_rows"] == {"author_of because": 1} and s["models_reported"] == {
        "big-1-0901": 12
    }
    assert s["unanswered_ids"] == [
        f"test/Ada wrote {name}. 0" for name in ("thinking", "failed", "late", "lost")
    ]
    assert json.loads((tmp_path / "cache.summary.json").read_text(encoding="utf-8")) == s


def test_importing_again_gives_the_same_bytes_and_a_failed_import_leaves_them(config, tmp_path):
    written = exported(config, tmp_path, "openai")
    results = answer_files("openai", written.files, tmp_path, model)
    import_results(written.manifest, results, tmp_path / "out" / "cache.parquet")
    before = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    assert set(before) == {"cache.parquet", "cache.csv", "cache.summary.json"}
    shuffled = answer_files("openai", written.files, tmp_path, model, seed=1)
    import_results(written.manifest, shuffled, tmp_path / "out" / "cache")
    assert {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()} == before
    with results[0].open("a") as file:
        file.write('{"custom_id": "half')
    assert f"{results[0]}:{len(results[0].read_text().splitlines())}: not valid JSON" in refusal(
        lambda: import_results(written.manifest, results, tmp_path / "out" / "cache")
    )
    (tmp_path / "errors.jsonl").write_text(results[1].read_text(), encoding="utf-8")
    assert "no request has an answer" in refusal(
        lambda: import_results(
            written.manifest, [tmp_path / "errors.jsonl"], tmp_path / "out" / "cache"
        )
    )
    assert {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()} == before


def test_a_kill_while_writing_leaves_the_earlier_cache(config, tmp_path, monkeypatch):
    written = exported(config, tmp_path, "anthropic")
    results = answer_files("anthropic", written.files, tmp_path, model)
    import_results(written.manifest, results, tmp_path / "out/cache")
    before = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    monkeypatch.setattr(
        "jaxre.evaluation.predictions._write_csv", lambda *_: (_ for _ in ()).throw(SystemExit(143))
    )
    with pytest.raises(SystemExit):
        import_results(written.manifest, results, tmp_path / "out/cache", price=(1.0, 1.0))
    assert {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()} == before


def test_other_forms_of_the_same_answers_are_read(config, tmp_path):
    """Completions with the id beside their fields, in a JSON array, with the answer in parts; ids
    of other exports are counted.
    """
    written = exported(config, tmp_path, "openrouter")
    name = read_manifest(written.manifest).requests[0].custom_id
    flat = result("openrouter", name, ("author_of", "stop"))["response"] | {"custom_id": name}
    flat["choices"][0]["message"]["content"] = [
        {"type": "text", "text": "author"},
        {"type": "text", "text": "_of"},
    ]
    flat["usage"] = None
    path = tmp_path / "array.json"
    path.write_text(json.dumps([flat, result("openai", "other-1", ("none", "stop"))]))
    done = import_results(written.manifest, [path], tmp_path / "cache")
    assert [row.generated_relation for row in done.rows] == ["author_of"] and done.rows[
        0
    ].cost_usd is None
    assert done.summary["unknown_ids"] == ["other-1"] and done.summary["missing"] == len(CASES) - 1
    assert done.summary["without_token_counts"] == 1 and done.summary["cost_usd"] is None
    filtered = result("openrouter", name, ("author_of", "stop"))
    filtered["response"]["choices"][0]["finish_reason"] = "content_filter"
    path.write_text(json.dumps([filtered]))
    assert (
        import_results(written.manifest, [path], tmp_path / "cache").rows[0].generated_relation
        == "(refusal) author_of"
    )


@pytest.mark.parametrize(
    ("record", "reason"),
    [
        ({"response": None, "error": None}, "no response"),
        ({"response": {"status_code": 200, "body": {"choices": []}}}, "no choice"),
        ({"response": {"status_code": 200, "body": "gateway"}}, "no JSON object"),
        (
            {
                "response": {
                    "status_code": 429,
                    "body": {"error": {"code": None, "type": "tokens", "message": "x"}},
                }
            },
            "status 429: tokens",
        ),
        ({"response": {"error": {"code": 502, "message": "x"}}}, "502"),
        (
            {
                "response": {
                    "choices": [
                        {
                            "finish_reason": "error",
                            "error": {"code": 500},
                            "message": {"content": "no"},
                        }
                    ]
                }
            },
            "500",
        ),
        ({"error": "Incorrect API key provided: sk-pr****abcd"}, "error without a name"),
        ({"error": "rate_limited"}, "rate_limited"),
        ({"result": {"type": "canceled"}}, "canceled"),
        ({"result": {"type": "succeeded", "message": None}}, "no message"),
    ],
)
def test_what_is_no_answer_is_an_error_with_its_reason(config, tmp_path, record, reason):
    written = exported(config, tmp_path, "openai")
    first, second = (request.custom_id for request in read_manifest(written.manifest).requests[:2])
    path = tmp_path / "results.jsonl"
    path.write_text(
        "".join(
            json.dumps(one) + "\n"
            for one in ({"custom_id": first} | record, result("openai", second, ("none", "stop")))
        )
    )
    done = import_results(written.manifest, [path], tmp_path / "cache")
    assert len(done.rows) == 1 and reason in next(iter(done.summary["errors"]))


def test_files_that_are_no_results_are_refused(config, tmp_path):
    written = exported(config, tmp_path, "openai")

    def refused(text):
        (tmp_path / "r.jsonl").write_text(text, encoding="utf-8")
        return refusal(
            lambda: import_results(written.manifest, [tmp_path / "r.jsonl"], tmp_path / "cache")
        )

    assert "is a request and no answer" in refusal(
        lambda: import_results(written.manifest, written.files, tmp_path / "cache")
    )
    assert "no custom_id" in refused('{"response": {}}\n')
    assert "not a JSON object" in refused("7\n")
    assert "none of its 1 records (such as 'a') belongs to the manifest" in refused(
        json.dumps(result("openai", "a", ("x", "stop")))
    )
    assert "empty" in refused("")
    assert "is given twice" in refusal(
        lambda: import_results(written.manifest, written.files * 2, tmp_path / "cache")
    )
    copy = tmp_path / "copy.jsonl"
    copy.write_bytes(written.files[0].read_bytes())
    assert f"also as {written.files[0]}" in refusal(
        lambda: import_results(written.manifest, [*written.files, copy], tmp_path / "cache")
    )
    assert "not a manifest" in refusal(lambda: read_manifest(written.files[0]))
    tree = json.loads(written.manifest.read_text(encoding="utf-8"))
    tree["requests"][0]["prompt"] = tree["requests"][1]["prompt"]
    written.manifest.write_text(json.dumps(tree))
    assert "changed after its export" in refusal(lambda: read_manifest(written.manifest))
    assert not list(tmp_path.glob("cache*"))


KEY = "sk-" + "proj-0123456789abcdefgh"  # no key: in two parts, so that no scanner takes it for one


def test_keys_are_refused_and_never_quoted(config, tmp_path, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    written = exported(config, tmp_path, "openai")
    results = answer_files("openai", written.files, tmp_path, model)
    import_results(written.manifest, results, tmp_path / "clean")
    assert all(KEY not in path.read_bytes().decode("latin-1") for path in tmp_path.iterdir())
    lines = results[0].read_text(encoding="utf-8").splitlines()
    for field, value in (
        ("note", f"used {KEY}"),
        ("headers", {"Authorization": "x"}),
        ("h", "Bearer abcdefgh01234567"),
        ("api_key", "x"),
    ):
        results[0].write_text(
            "\n".join([*lines, json.dumps(json.loads(lines[0]) | {field: value})]), encoding="utf-8"
        )
        message = refusal(lambda: import_results(written.manifest, results, tmp_path / "cache"))
        assert (
            f"{results[0]}:{len(lines) + 1}: " in message
            and KEY not in message
            and "take" in message
        )
    assert not list(tmp_path.glob("cache*"))
    assert refusal(lambda: ask_for(tmp_path, KEY)).startswith("--model: ")
    assert "the prompt of example e" in refusal(
        lambda: ask_for(tmp_path, "m", f"The key is {KEY}.")
    )
    assert not list(tmp_path.glob("c*.manifest.json"))


def ask_for(tmp_path, name, text="x"):
    example = Example("e", "d", "test", text, "x", "x", "none")
    chat = turns(example, Prompt(), ["none"])
    manifest = build_manifest(
        [example],
        [chat],
        Ask("openai", name),
        dataset="d",
        gen_type="gen_open",
        prompt_shot="0",
        labels=["none"],
        date="2026-01-01",
    )
    return write_requests(tmp_path / "c", manifest)


@pytest.mark.parametrize("provider", PROVIDERS)
def test_files_stay_below_the_limits_of_the_provider(config, tmp_path, monkeypatch, provider):
    monkeypatch.setitem(frontier_requests.LIMITS, provider, Limits(requests=5, bytes=2200))
    written = exported(config, tmp_path, provider)
    sizes = [file.stat().st_size for file in written.files]
    numbers = [len(take(provider, file)) for file in written.files]
    assert (
        sum(numbers) == len(CASES) and max(numbers) <= 5 and max(sizes) <= 2200 and len(sizes) > 3
    )
    assert [file.stem for file in written.files] == [
        f"asked-{number}" for number in range(1, len(sizes) + 1)
    ]
    results = answer_files(provider, written.files, tmp_path, model)
    assert len(import_results(written.manifest, results, tmp_path / "cache").rows) == 13
    monkeypatch.setitem(frontier_requests.LIMITS, provider, Limits(requests=5, bytes=300))
    message = refusal(
        lambda: export_requests(config, Ask(provider, "m"), None, None, tmp_path / "small")
    )
    assert "more than a file" in message and not list(tmp_path.glob("small*"))


def test_an_export_never_replaces_a_manifest(config, tmp_path):
    written = exported(config, tmp_path, "openai")
    before = written.manifest.read_bytes()
    assert "exists" in refusal(lambda: exported(config, tmp_path, "openai", max_tokens=8))
    assert written.manifest.read_bytes() == before
    written.manifest.unlink()
    assert "exists" in refusal(lambda: exported(config, tmp_path, "openai"))
    assert len(list(tmp_path.glob("asked*"))) == 1


def test_models_that_refuse_a_temperature_get_none(config, tmp_path):
    for provider in PROVIDERS:
        written = exported(config, tmp_path / provider, provider, temperature=None)
        assert all(
            "temperature" not in body
            for file in written.files
            for _, _, body in take(provider, file)
        )


@settings(max_examples=60, deadline=None)
@given(
    st.lists(
        st.text(st.characters(codec="utf-8"), min_size=1), min_size=1, max_size=6, unique=True
    ),
    st.text(min_size=1, max_size=80),
)
def test_any_ids_texts_and_models_map_back(tmp_path_factory, names, name):
    """Every id of the wire is allowed and leads to the examples it came from; texts that differ
    never share one.
    """
    folder = tmp_path_factory.mktemp("ids")
    examples = [
        Example(f"d/{one}", "d", "test", f"Text {one[:1]}.", "Text", "Text", one) for one in names
    ]
    chats = [turns(one, Prompt(), ["none"]) for one in examples]
    ask = Ask("anthropic", name.encode("utf-8", "replace").decode() if name.strip() else "m")
    manifest = build_manifest(
        examples,
        chats,
        ask,
        dataset="d",
        gen_type="gen_open",
        prompt_shot="0",
        labels=["none"],
        date="2026-01-01",
    )
    files, path = write_requests(folder / "r", manifest)
    back = read_manifest(path)
    assert back == replace(manifest, files=tuple(file.name for file in files))
    owners = {request.custom_id: request for request in back.requests}
    seen = []
    for wire, chat, _ in take("anthropic", files[0]):
        seen += [example.example_id for example in owners[wire].examples]
        assert json.loads(owners[wire].prompt) == chat and wire == custom_id(
            ask, owners[wire].prompt
        )
    assert sorted(seen) == sorted(example.id for example in examples)
    assert len(owners) == len({json.dumps(chat) for chat in chats})
    for file in Path(folder).iterdir():
        file.unlink()


def test_a_frontier_model_is_asked_in_a_prompt_style(config, tmp_path):
    """Its rows state the style, and the check of a cache compares the prompts of that style,
    whatever the config's own are.
    """
    written = export_requests(
        config, Ask("openai", "big-1"), None, None, tmp_path / "asked.jsonl", "shots2-task"
    )
    for _, chat, _ in take("openai", *written.files):
        assert TASK in chat[0]["content"] and [turn["role"] for turn in chat[1:]] == [
            "user",
            "assistant",
        ] * 2 + ["user"]
    done = import_results(
        written.manifest, answer_files("openai", written.files, tmp_path, model), tmp_path / "cache"
    )
    rows = read_predictions(tmp_path / "cache.csv")
    assert {(row.prompt_style, row.prompt_shot) for row in rows} == {
        ("shots2-task", "2")
    } and done.summary["prompt_style"] == "shots2-task"
    found = check_file(done.path, config, None, None, None, None, 0.7)
    assert not found.problems and found.settings[0].prompts_checked == 13

    ours, _ = write_predictions(
        tmp_path / "ours", [replace(row, prompt_style="shots2-labels") for row in rows]
    )
    assert (
        "prompt_style differs: ours 'shots2-labels', the cache 'shots2-task'"
        in compare_files(ours, done.path).notes
    )
    assert "no such style" in refusal(
        lambda: export_requests(config, Ask("openai", "m"), None, None, tmp_path / "x", "shots3")
    )


def test_labels_from_the_test_split_are_said(config, tmp_path):
    labels = {"test": Source(dataset=str(tmp_path / "test.jsonl"))}
    changes = {
        "data": config.data.model_copy(update={"labels": labels}),
        "prompt": config.prompt.model_copy(update={"shots": 0}),
    }
    flagged = config.model_copy(update=changes)
    written = exported(flagged, tmp_path, "openai")
    assert [
        line
        for line in written.notices
        if line.startswith("LABELS FROM THE TEST SPLIT: those of test")
    ]
    done = import_results(
        written.manifest, answer_files("openai", written.files, tmp_path, model), tmp_path / "cache"
    )
    assert set(written.notices) <= set(
        check_file(done.path, flagged, None, None, None, None, 0.7).notes
    )
    assert exported(config, tmp_path / "plain", "openai").notices == ()


def test_an_import_is_compared_and_checked(config, tmp_path):
    """export -> answers -> import -> check -> compare, and the same cache against other prompts and
    other data.
    """
    written = exported(config, tmp_path, "openai")
    done = import_results(
        written.manifest, answer_files("openai", written.files, tmp_path, model), tmp_path / "cache"
    )
    found = check_file(done.path, config, None, None, None, None, 0.7)
    (one,) = found.settings
    assert not found.problems and (
        one.answered,
        one.examples,
        one.prompts_checked,
        one.refusals,
        one.truncated,
    ) == (13, 17, 13, 2, 1)
    # A refusal is outside the schema, an empty answer is none: as the study scores them.
    assert one.outside == {"(refusal) i will not.": 1, "(refusal)": 1, "author_of because": 1}
    assert (
        "answers 13 of 17 examples (76.5%), less than 95%"
        in check_file(done.path, config, None, None, None, None, 0.95).problems[0]
    )
    other = config.model_copy(
        update={"prompt": config.prompt.model_copy(update={"user": "{text} {head}? Answer:"})}
    )
    assert (
        "another prompt in 13 cases"
        in check_file(done.path, other, None, None, None, None, 0.7).problems[0]
    )

    rows = [
        replace(row, tuned_dataset_name="mine", model_id="small", generated_relation=row.relation)
        for row in done.rows
    ]
    ours, _ = write_predictions(tmp_path / "ours", rows)
    result = compare_files(ours, done.path)
    assert result.join_rate == 1 and not result.warnings and result.ours.f1 == 1
    assert any("2 cached answers are refusals" in note for note in result.notes)
    assert result.cached.accuracy == pytest.approx(8 / 13)
