"""Checks of a cache against the data that it should cover, for each setting."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest
from refusals import refusal
from rich.console import Console

from jaxre.config import Source, shipped
from jaxre.evaluation.compare import compare, compare_files, comparison_table
from jaxre.evaluation.frontier.cache import Answer, Cache, same_dataset
from jaxre.evaluation.frontier.check import check_cache, check_table
from jaxre.evaluation.frontier.credentials import refuse_credentials
from jaxre.evaluation.frontier.read import read_cache
from jaxre.evaluation.predictions import Prediction, write_predictions
from jaxre.relations.benchmarks import COPIES
from jaxre.relations.label_map import LabelMap
from jaxre.relations.schema import Example, hash_prompt
from jaxre.relations.sources import load

# The columns of `Despina/frontier-re-generations` (protocol.md), and no others.
PUBLISHED = (
    *(
        "eval_dataset_name",
        "relation",
        "gen_type",
        "model_id",
        "tuned_dataset_name",
        "model_shot",
        "prompt_shot",
    ),
    *("generated_relation", "prompt_hash", "input_tokens", "output_tokens"),
)


def example(number: int, relation: str, **fields: str) -> Example:
    return Example(
        f"d/test/{number}", "d", "test", f"Text {number}.", "Text", str(number), relation, **fields
    )


def answer(number: int, label: str, gold: str = "", **fields: str) -> Answer:
    return Answer(label, gold, example_id=f"d/test/{number}", **fields)


def checked(examples: list[Example], *answers: Answer, **settings: object):
    return check_cache(Cache("c.csv", answers), examples, ["a", "b", "none"], **settings)


def test_each_fault_of_a_cache_is_a_problem_with_its_ids():
    examples = [example(number, "a") for number in range(10)]
    good = [answer(number, "a", "a") for number in range(10)]
    assert not checked(examples, *good).problems
    few = checked(examples, *good[:9])
    assert (
        few.problems == ("the cache answers 9 of 10 examples (90.0%), less than 95%",)
        and few.settings[0].coverage == 0.9
    )
    assert not checked(examples, *good[:9], least=0.9).problems
    twice = checked(examples, *good, answer(3, "b", "a"), answer(4, "A", "a"), least=0.9)
    assert (
        "different answers for one example in 1 cases (d/test/3)" in twice.problems[0]
        and len(twice.problems) == 1
    )
    assert (
        "another gold label in 1 cases (d/test/3)"
        in checked(examples, *good[:3], answer(3, "a", "b"), *good[4:]).problems[0]
    )
    assert (
        "unknown gen_type 'open'"
        in checked(examples, *(answer(n, "a", gen_type="open") for n in range(10))).problems[0]
    )
    assert (
        "unknown prompt_shot 'two'"
        in checked(examples, *(answer(n, "a", prompt_shot="two") for n in range(10))).problems[0]
    )
    assert checked(examples, *good, answer(99, "a")).settings[0].strangers == 1


def test_labels_outside_of_the_schema_and_refusals_are_counted_and_no_problem():
    said = ["a", "B", "Other", "c", "c", "x" * 61, "(refusal)"]
    answers = [
        answer(n, label, "a", status="refusal" if n == 6 else "") for n, label in enumerate(said)
    ]
    check = checked([example(n, "a") for n in range(7)], *answers)
    (one,) = check.settings
    assert not check.problems and one.outside == {"c": 2, "other": 1, "x" * 61: 1, "(refusal)": 1}
    assert (one.malformed, one.refusals) == (1, 1)
    console = Console(width=200, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(check_table(check))
    assert "outside the schema: 'c' 2" in console.export_text()


def test_each_model_and_setting_is_checked_on_its_own():
    examples = [example(number, "a") for number in range(2)]
    both = [
        answer(n, "a", model=model, gen_type="gen_open", prompt_shot="0")
        for n in range(2)
        for model in ("x", "y")
    ]
    check = checked(examples, *both[:3])
    assert [(one.model, one.answered) for one in check.settings] == [("x", 2), ("y", 1)]
    assert check.problems == ("y, gen_open, 0-shot answers 1 of 2 examples (50.0%), less than 95%",)


def test_prompts_must_be_those_of_the_config_or_of_the_source():
    prompts = {f"d/test/{n}": f"prompt {n}" for n in range(2)}
    asked = {"gen_type": "gen_open", "prompt_shot": "0"}
    answers = [answer(n, "a", prompt_hash=hash_prompt(f"prompt {n}"), **asked) for n in range(2)]
    examples = [example(n, "a") for n in range(2)]
    right = checked(examples, *answers, prompts=prompts, setting=("gen_open", "0"))
    assert not right.problems and right.settings[0].prompts_checked == 2
    wrong = checked(
        examples, *answers, prompts=prompts | {"d/test/1": "another"}, setting=("gen_open", "0")
    )
    assert "another prompt in 1 cases (d/test/1)" in wrong.problems[0]
    # In another setting other prompts are asked, which are not known here.
    other = checked(
        examples, *answers, prompts=dict.fromkeys(prompts, "x"), setting=("gen_constrained", "0")
    )
    assert (
        not other.problems
        and "the config asks gen_constrained, 0-shot, so its prompts are not compared"
        in other.notes[0]
    )
    stated = [example(n, "a", prompt_hash=hash_prompt("the source's own")) for n in range(2)]
    assert "another prompt in 2 cases" in checked(stated, *answers).problems[0]


def test_one_prompt_with_several_gold_labels_agrees_with_any_of_them():
    examples = [example(0, "a", prompt_hash="h"), example(1, "b", prompt_hash="h")]
    assert not checked(examples, Answer("a", "b", prompt_hash="h")).problems
    assert (
        "another gold label in 2 cases"
        in checked(examples, Answer("a", "none", prompt_hash="h")).problems[0]
    )


def test_a_label_map_brings_the_spellings_together():
    label_map = LabelMap("m", {"a(e1,e2)": "A", "none": "none"})
    check = check_cache(
        Cache("c", (answer(0, "A", "A"),)),
        [example(0, "a(e1,e2)")],
        ["a(e1,e2)", "none"],
        label_map=label_map,
    )
    assert not check.problems and not check.settings[0].outside


def test_a_cache_of_other_data_is_refused_and_names_of_one_benchmark_are_one():
    two = [answer(0, "a", dataset="conll04"), answer(0, "a", dataset="nyt_11")]
    assert "holds no answer for 'd' (but for conll04, nyt_11)" in refusal(
        lambda: checked([example(0, "a")], *two)
    )
    assert checked([example(0, "a")], two[0]).notes == (
        "dataset differs: ours 'd', the cache 'conll04'",
    )
    for one, other in (
        *((copy, benchmark.name) for copy, benchmark in COPIES.items()),
        ("re-docred", "re_docred"),
        ("Despina/rebel-dataset/subsampled", "rebel"),
        ("project-gutenberg-fiction-relations", "pg_fiction"),
        ("hub:Despina/conll04", "conll04"),
    ):
        assert same_dataset(one, other) and not same_dataset(one, "facts")


@pytest.mark.parametrize(
    "text",
    [
        "risk-assessment-0123456789abc",
        "the task-0123456789abcdef01",
        "the standard bearer internationalisation",
        "Authorization: see 12",
    ],
)
def test_plain_text_is_not_a_key(text):
    refuse_credentials({"text": [text]}, "x")


@pytest.mark.parametrize(
    "text",
    [
        "sk-" + "ant-api03-abcdefgh01234567",
        "Bearer abc.def.0123456789",
        "x-api-key: 0123456789",
        "Authorization: Basic dXNlcjpw",
    ],
)
def test_a_key_is_refused_everywhere(text):
    for value in (text, [{"a": {"b": f"it is {text}!"}}], {text: 1}):
        assert text not in refusal(lambda value=value: refuse_credentials(value, "file:3"))
    assert "'X-Api-Key'" in refusal(lambda: refuse_credentials([{"X-Api-Key": "short"}], "file:3"))


# The study's published shape, on the project's own corpus


@pytest.fixture
def copy(tmp_path: Path) -> tuple[Path, list[dict]]:
    """The corpus's test split as a file in the form of the study's hub copies, and its records."""
    lines = (shipped("corpus") / "test.jsonl").read_text(encoding="utf-8").splitlines()[:60]
    records = []
    for number, line in enumerate(lines):
        one = json.loads(line)
        prompt = f"Relation between '{one['head']}' and '{one['tail']}' in: {one['text']}\n"
        records.append(
            {
                "text": one["text"],
                "entity1": one["head"],
                "entity2": one["tail"],
                "entity1Type": one["head_type"],
                "entity2Type": "None",
                "relation": one["relation"],
                "prompt_0_shot": prompt if number else "  " + prompt,
                "prompt_2_shot": "not used",
                "prompt_5_shot": "not used",
            }
        )
    records.append(records[3])  # an example twice: one prompt, one published answer
    path = tmp_path / "facts.jsonl"
    path.write_text("".join(json.dumps(one) + "\n" for one in records), encoding="utf-8")
    return path, records


def published(path: Path, records: list[dict], models: dict[str, str]) -> Path:
    """A cache of `models` (name -> what it says, empty for the right label) in the exact published
    shape, equal prompts once.
    """
    prompts = {one["prompt_0_shot"]: one for one in records}
    rows = [
        (
            "facts",
            one["relation"],
            gen_type,
            model,
            "frontier",
            "n/a",
            shot,
            said or one["relation"],
            hash_prompt(prompt),
            50,
            3,
        )
        for model, said in models.items()
        for gen_type in ("gen_open", "gen_constrained")
        for shot in ("0", "2")
        for prompt, one in prompts.items()
    ]
    rows += [
        ("conll04", "Kill", "gen_open", model, "frontier", "n/a", "0", "Kill", "0" * 12, 50, 3)
        for model in models
    ]
    with path.open("w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows([PUBLISHED, *rows])
    return path


def predictions_on(path: Path, **fields: str) -> list[Prediction]:
    """Right predictions, as `jaxre predict` makes them: with the hash of the source's own
    prompt.
    """
    return [
        Prediction(
            one.id,
            one.relation,
            one.relation,
            one.dataset,
            prompt="rendered",
            prompt_hash=one.prompt_hash or "",
            **fields,
        )
        for one in load(Source(dataset=str(path)))
    ]


def test_the_published_shape_is_joined_by_the_hash_of_the_raw_prompt(tmp_path, copy):
    path, records = copy
    examples = load(Source(dataset=str(path)))
    assert [one.prompt_hash for one in examples] == [
        hash_prompt(one["prompt_0_shot"]) for one in records
    ]
    cache = published(tmp_path / "published.csv", records, {"gpt": "", "claude": "none"})
    check = check_cache(read_cache(cache), examples, sorted({one.relation for one in examples}))
    assert not check.problems and len(check.settings) == 8
    assert {(one.rows, one.answered, one.prompts_checked) for one in check.settings} == {
        (60, 61, 61)
    }

    ours, _ = write_predictions(
        tmp_path / "ours", predictions_on(path, gen_type="gen_open", prompt_shot="2")
    )
    result = compare_files(ours, cache, model="gpt")
    assert (result.joined, result.cached.f1, result.difference.difference) == (
        61,
        1,
        0,
    ) and not result.warnings
    worse = compare_files(ours, cache, model="claude")
    assert worse.cached.f1 == 0 and worse.ours.f1 == 1


def test_a_cache_that_covers_little_or_has_other_gold_labels_warns_or_stops(tmp_path, copy):
    path, records = copy
    rows = predictions_on(path)
    part = read_cache(published(tmp_path / "part.csv", records[:50], {"gpt": ""}))
    result = compare(rows, part)
    assert result.warnings == (
        "the cache answers 51 of 61 predictions (83.6%); all figures are of these alone",
    )
    console = Console(width=200, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(comparison_table(result))
    assert console.export_text().startswith("WARNING: the cache answers 51")
    assert "(83.6%), less than --coverage 0.9" in refusal(lambda: compare(rows, part, coverage=0.9))
    assert compare(rows, part, coverage=0.8).warnings == ()
    other = [
        one | {"relation": "none"} if number in (4, 5) else one
        for number, one in enumerate(records)
    ]
    result = compare(rows, read_cache(published(tmp_path / "gold.csv", other, {"gpt": "none"})))
    assert "gold labels differ for" in result.warnings[0]


def test_numbers_are_read_as_other_tools_write_them(tmp_path):
    path = tmp_path / "c.csv"
    rows = [
        "prompt_hash,generated_relation,prompt_shot,input_tokens,cost_usd",
        "h,a,0.0,7.0,0.5",
        "i,a,2-shot,nan,",
        "j,a,5,,x",
        "k,a,few,7,1e-3",
    ]
    path.write_text("\n".join(rows) + "\n")
    answers = read_cache(path).answers
    assert [answer.prompt_shot for answer in answers] == ["0", "2", "5", "few"]
    assert [answer.input_tokens for answer in answers] == [7, None, None, 7]
    assert [answer.cost_usd for answer in answers] == [0.5, None, None, 0.001]
