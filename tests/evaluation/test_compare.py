"""A comparison joins, maps labels, and lists what it cannot use."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console

from jaxre.errors import InputError
from jaxre.evaluation.compare import compare, compare_files, comparison_table, join_answers
from jaxre.evaluation.frontier.cache import Answer, Cache
from jaxre.evaluation.metrics.scores import score
from jaxre.evaluation.predictions import Prediction, write_predictions
from jaxre.relations.conll04 import read_conll04
from jaxre.relations.label_map import LabelMap, read_label_map
from jaxre.relations.schema import normalise_label
from jaxre.relations.semeval import LABELS, read_semeval

UNDIRECTED = Path(__file__).parents[2] / "configs/labels/semeval-undirected.yaml"


def ours(*rows, **settings):
    return [
        Prediction(
            f"facts/test/{i}",
            gold,
            label,
            eval_dataset_name="facts",
            model_id="m",
            prompt_hash=f"h{i}",
            **settings,
        )
        for i, (gold, label) in enumerate(rows)
    ]


def cache(*answers, **parts):
    return Cache("cache.csv", tuple(answers), **parts)


def by_id(number, label, gold="", **settings):
    return Answer(
        label,
        gold,
        example_id=f"facts/test/{number}",
        model=settings.pop("model", "gpt"),
        **settings,
    )


def test_rows_join_by_id_and_by_hash_and_the_rest_is_listed():
    predictions = ours(("a", "a"), ("a", "b"), ("b", "b"), ("b", "b"), ("b", "a"))
    answers = [by_id(0, "a"), Answer("a", "", prompt_hash="h1"), by_id(2, "a"), by_id(2, "b")]
    result = compare(
        predictions,
        cache(*answers, uncovered={"facts/test/3": "unparsed"}, leftover={"strange": ("x",)}),
    )
    assert result.joined == 2 and result.join_rate == 2 / 5
    assert result.not_joined == {
        "the cache holds different answers for it": ("facts/test/2",),
        "unparsed": ("facts/test/3",),
        "not in the cache": ("facts/test/4",),
    }
    assert result.leftover == {"strange": ("x",)}
    found, missing, _ = join_answers(
        predictions, cache(*answers, uncovered={"facts/test/3": "unparsed"})
    )
    assert [row.example_id for row, _ in found] == [
        "facts/test/0",
        "facts/test/1",
    ] and missing == result.not_joined
    assert result.ours.accuracy == 0.5 and result.cached.accuracy == 1


def test_one_prompt_answers_all_examples_that_share_it():
    predictions = [replace(row, prompt_hash="same") for row in ours(("a", "a"), ("b", "b"))]
    result = compare(
        predictions, cache(Answer("a", "", prompt_hash="same"), Answer("A", "", prompt_hash="same"))
    )
    assert result.joined == 2 and result.cached.accuracy == 0.5


def test_who_was_right_where():
    result = compare(
        ours(("a", "a"), ("a", "b"), ("a", "a"), ("b", "a")),
        cache(by_id(0, "a"), by_id(1, "a"), by_id(2, "b"), by_id(3, "a")),
    )
    found = {(q.ours_right, q.cached_right): (q.count, q.ids) for q in result.quadrants}
    assert found == {
        (True, True): (1, ("facts/test/0",)),
        (False, True): (1, ("facts/test/1",)),
        (True, False): (1, ("facts/test/2",)),
        (False, False): (1, ("facts/test/3",)),
    }
    assert (result.mcnemar.only_first, result.mcnemar.only_second) == (1, 1)


def test_negatives_of_both_sides_are_one_label():
    result = compare(
        ours(("Other", "Other"), ("a", "a")), cache(by_id(0, "no_relation"), by_id(1, "NA"))
    )
    assert result.cached.accuracy == 0.5 and result.quadrants[0].count == 1


def test_a_gold_label_outside_of_the_map_is_refused_and_a_prediction_outside_counts_as_wrong():
    label_map = LabelMap("map.yaml", {"a": "A", "b": "B"})
    with pytest.raises(
        InputError, match=r"map.yaml: no entry for the label 'c' \(example facts/test/1\)"
    ):
        compare(ours(("a", "a"), ("c", "a")), cache(by_id(0, "A"), by_id(1, "A")), label_map)
    result = compare(ours(("a", "a"), ("a", "c")), cache(by_id(0, "A"), by_id(1, "A")), label_map)
    assert (
        result.ours.accuracy == 0.5
        and "1 of our predictions are not in map.yaml" in result.notes[-1]
    )


def test_labels_spelled_differently_are_refused_with_the_fix_not_scored_as_wrong():
    rows = ours(("Cause-Effect(e1,e2)", "Cause-Effect(e1,e2)"))
    answers = cache(by_id(0, "Cause Effect", gold="Cause Effect"))
    with pytest.raises(InputError, match="--labels"):
        compare(rows, answers)
    assert compare(rows, answers, read_label_map(UNDIRECTED)).cached.f1 == 1


def test_a_cached_label_that_is_common_already_is_not_mapped_again():
    chain = LabelMap("map.yaml", {"a": "b", "b": "c"})
    assert compare(ours(("a", "a")), cache(by_id(0, "b")), chain).cached.accuracy == 1
    assert compare(ours(("a", "a")), cache(by_id(0, "A")), chain).cached.accuracy == 1


def test_predictions_without_gold_are_refused():
    with pytest.raises(InputError, match="'facts/test/1'"):
        compare(ours(("a", "a"), ("", "a")), cache(by_id(0, "a"), by_id(1, "a")))


def test_single_gold_labels_that_differ_are_noted():
    rows = ours(*[("a", "a")] * 4)
    result = compare(rows, cache(*(by_id(i, "a", gold="a" if i else "b") for i in range(4))))
    assert "gold labels differ for 1 joined examples (facts/test/0)" in result.warnings[0]


def test_nothing_joined_shows_both_sides():
    with pytest.raises(InputError) as error:
        compare(ours(("a", "a")), cache(Answer("a", "", prompt_hash="ffff")))
    message = str(error.value)
    assert (
        "'facts/test/0'" in message
        and "h0" in message
        and "ffff" in message
        and "--split" in message
        and "\n" not in message
    )
    with pytest.raises(InputError, match="no answer for the split"):
        compare(ours(("a", "a")), cache())


def test_several_models_or_settings_need_a_choice():
    two = cache(by_id(0, "a"), by_id(0, "b", model="claude"))
    with pytest.raises(InputError, match="claude, gpt, and none was chosen; name one with --model"):
        compare(ours(("a", "a")), two)
    with pytest.raises(InputError, match="not 'gpt-5'"):
        compare(ours(("a", "a")), two, model="gpt-5")
    assert compare(ours(("a", "a")), two, model="claude").cached.f1 == 0
    shots = cache(by_id(0, "a", prompt_shot="0"), by_id(0, "b", prompt_shot="2"))
    assert compare(ours(("a", "a")), shots).cached.f1 == 1
    assert compare(ours(("a", "a"), prompt_shot="2"), shots).cached.f1 == 0
    with pytest.raises(InputError, match="prompt_shot 0, 2"):
        compare(ours(("a", "a"), prompt_shot="5"), shots)
    other = compare(ours(("a", "a"), prompt_shot="5"), cache(by_id(0, "a", prompt_shot="0")))
    assert other.notes == ("prompt_shot differs: ours '5', the cache '0'",)


def test_the_table_shows_the_result_and_escapes_markup():
    rows = ours(("[bold]a", "[bold]a"), ("b", "b"))
    result = compare(rows, cache(by_id(0, "x"), by_id(1, "b"), uncovered={}))
    console = Console(width=140, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(comparison_table(result))
    text = console.export_text()
    assert (
        "2 of 2 predictions joined (100.0%)" in text
        and "[bold]a" in text
        and "McNemar p 1.000, exact" in text
    )
    assert json.loads(json.dumps(result.to_json()))["join_rate"] == 1


def test_the_semeval_map_covers_the_schema_and_only_drops_directions():
    label_map = read_label_map(UNDIRECTED)
    assert set(label_map.common) == {normalise_label(label) for label in LABELS}
    assert {label: label_map.gold(label, "") for label in LABELS} == {
        label: label.split("(")[0].replace("-", " ") for label in LABELS
    }


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("m.yaml", "no: none\nA,B: x\n1: y\n"),
        ("m.json", '{"no": "none", "A,B": "x", "1": "y"}'),
        ("m.csv", 'no,none\n"A,B",x\n\n1,y\n'),
    ],
)
def test_label_maps_read_labels_as_text(tmp_path, name, text):
    (tmp_path / name).write_text(text)
    assert read_label_map(tmp_path / name).common == {"no": "none", "a,b": "x", "1": "y"}


def test_broken_label_maps_are_refused(tmp_path):
    cases = {
        "a.yaml": "- x",
        "b.yaml": "x: [1]",
        "c.yaml": "",
        "d.csv": "a,b,c",
        "e.yaml": "X: a\nx: b",
        "f.yaml": "x: {",
        "g.yaml": "null: x",
    }
    for name, text in cases.items():
        (tmp_path / name).write_text(text)
        with pytest.raises(InputError, match=name):
            read_label_map(tmp_path / name)
    with pytest.raises(InputError, match="no such label map"):
        read_label_map(tmp_path / "nowhere.yaml")


# From files, on the real caches


def test_gold_predictions_against_chatgpt(tmp_path, shared_data, monkeypatch):
    monkeypatch.setenv("JAXRE_DATA", str(shared_data))
    examples = read_semeval(shared_data / "semeval2010_task8", "test")
    rows = [Prediction(e.id, e.relation, e.relation, eval_dataset_name=e.dataset) for e in examples]
    path, _ = write_predictions(tmp_path / "p", rows)
    chatgpt = shared_data / "frontier_predictions/semeval2010_chatgpt/SemEval_All_ans.json"
    result = compare_files(path, chatgpt, UNDIRECTED)
    assert result.join_rate == 1 and result.ours.f1 == 1
    assert (round(result.cached.f1, 3), round(result.cached.accuracy, 4)) == (0.425, 0.3905)
    assert result.cached_name == "ChatGPT (2023, zero-shot)"

    # the examples of the whole split are loaded, so all 50 join
    path, _ = write_predictions(tmp_path / "part", rows[:50])
    assert compare_files(path, chatgpt, UNDIRECTED).joined == 50

    path, _ = write_predictions(
        tmp_path / "q", [Prediction("mine/1", "a", "a", eval_dataset_name="semeval2010_task8")]
    )
    with pytest.raises(InputError, match="'mine/1' does not say which"):
        compare_files(path, chatgpt, UNDIRECTED)


def test_predictions_on_the_training_split_do_not_join(tmp_path, shared_data, monkeypatch):
    monkeypatch.setenv("JAXRE_DATA", str(shared_data))
    examples = read_conll04(shared_data / "conll04", "train")
    path, _ = write_predictions(
        tmp_path / "p",
        [Prediction(e.id, e.relation, e.relation, eval_dataset_name=e.dataset) for e in examples],
    )
    gpt4o = next((shared_data / "frontier_predictions/conll04_gpt").rglob("*_sure.json"))
    with pytest.raises(InputError, match="no prediction joins"):
        compare_files(path, gpt4o)


@pytest.mark.parametrize("negatives", [1.0, 3.0])
def test_any_draw_of_negatives_joins_gpt_on_conll04(tmp_path, shared_data, monkeypatch, negatives):
    monkeypatch.setenv("JAXRE_DATA", str(shared_data))
    examples = read_conll04(shared_data / "conll04", "test", negatives)
    path, _ = write_predictions(
        tmp_path / "p",
        [Prediction(e.id, e.relation, "none", eval_dataset_name=e.dataset) for e in examples],
    )
    result = compare_files(
        path, next((shared_data / "frontier_predictions/conll04_gpt").rglob("*likely.json"))
    )
    assert result.joined + sum(map(len, result.not_joined.values())) == len(examples)
    assert set(result.not_joined) == {"the same two names are related otherwise in this sentence"}
    assert result.ours.f1 == 0 and result.cached.f1 > 0.7
    assert result.difference.high < 0


def test_scores_of_a_comparison_are_those_of_the_joined_rows():
    rows = ours(("a", "a"), ("b", "a"), ("none", "b"), ("a", "a"))
    result = compare(rows, cache(*(by_id(i, "a") for i in range(3))))
    assert (
        result.ours.f1 == score(["a", "b", "none"], ["a", "a", "b"]).f1 == result.difference.first
    )


def test_predictions_without_a_dataset_are_refused(tmp_path):
    row = replace(ours(("a", "a"))[0], example_id="/test/1", eval_dataset_name="")
    (tmp_path / "cache.json").write_text(
        json.dumps([{"headEntity": "a", "tailEntity": "b", "groundTruth": "a", "closePred": "a"}])
    )
    predictions, _ = write_predictions(tmp_path / "ours", [row])
    with pytest.raises(InputError, match="does not say which"):
        compare_files(predictions, tmp_path / "cache.json")


@pytest.mark.parametrize("content", [None, "{broken", "[]"])
def test_a_cache_that_cannot_be_read_is_blamed_and_not_the_predictions(tmp_path, content):
    predictions, _ = write_predictions(
        tmp_path / "ours", [replace(row, example_id="elsewhere") for row in ours(("a", "a"))]
    )
    path = tmp_path / "cache.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(InputError) as error:
        compare_files(predictions, path)
    assert str(error.value).startswith(f"{path}: ") and "; " in str(error.value)
