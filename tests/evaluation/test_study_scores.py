"""Cells and averages of a study, with faults like those of the published study."""

import dataclasses
import json

import numpy as np
import pytest
from sklearn.metrics import f1_score
from tiny_study import LABELS, study

from jaxre.errors import InputError
from jaxre.evaluation.predictions import Prediction, write_predictions
from jaxre.evaluation.report.record import write_examples
from jaxre.evaluation.report.study_scores import OVERALL, measure
from jaxre.evaluation.report.tables import headline

DATASETS = {"one": "general", "two": "general", "tale": "literary"}


def measured(folder, **systems):
    return measure(study(folder, DATASETS, systems), resamples=500)


def test_cells_and_averages_equal_scikit_learn(tmp_path):
    scores = measured(tmp_path, good={}, poor={"right": 0.4})
    values = {}
    for (system, dataset), cell in scores.cells.items():
        f1 = f1_score(cell.gold, cell.predicted, labels=LABELS[:-1], average="micro")
        assert cell.scores.f1 == pytest.approx(f1) and cell.interval.value == pytest.approx(f1)
        assert cell.interval.low < f1 < cell.interval.high and cell.flags == () and not cell.broken
        values[system, dataset] = f1
    for group, names in (
        ("general", ["one", "two"]),
        ("literary", ["tale"]),
        (OVERALL, ["one", "two", "tale"]),
    ):
        average = scores.average("poor", group)
        assert average.value == pytest.approx(np.mean([values["poor", name] for name in names]))
        assert average.low < average.value < average.high and average.datasets == tuple(names)
    assert scores.groups == {
        "general": ("one", "two"),
        "literary": ("tale",),
        OVERALL: ("one", "two", "tale"),
    }


def test_answers_that_are_only_thinking_are_flagged_and_not_averaged(tmp_path):
    scores = measured(
        tmp_path, good={}, thinking={"answer": lambda one: f"<think>\nOkay, {one.relation}"}
    )
    cell = scores.cell("thinking", "one")
    assert (cell.scores.f1, cell.scores.schema_valid, cell.broken) == (0, 0, True)
    assert cell.flags[0] == "reasoning was left on: 100% of the answers begin with <think>"
    average = scores.average("thinking", OVERALL)
    assert average.value is average.low is None and average.broken == tuple(DATASETS)
    assert "tale: reasoning was left on: 100% of the answers begin with <think>" in average.flags
    row = next(row for row in headline(scores).rows if row.name == "thinking")
    assert row.averages["general"].value is None and row.cells["one"].broken
    assert scores.average("good", OVERALL).value > 0.7


def test_one_broken_dataset_withholds_the_average_that_it_is_part_of(tmp_path):
    def answer(one):
        return one.relation + " because the text says that the two of them are so related" * (
            one.dataset == "two"
        )

    scores = measured(tmp_path, runon={"answer": answer})
    assert scores.average("runon", "general").value is None and scores.average(
        "runon", "general"
    ).broken == ("two",)
    assert scores.average("runon", "literary").value == 1
    assert "malformed: 100%" in scores.cell("runon", "two").flags[0]


def half(one):
    return one.relation if int(one.id.rpartition("/")[2]) % 2 else None


@pytest.mark.parametrize(
    ("fields", "flag", "broken"),
    [
        ({"answer": lambda one: "lives in"}, "no answer is a label of the schema", True),
        (
            {"answer": lambda one: "lives in", "enumerated": False},
            "out of schema: 100%",
            False,
        ),  # its prompts did not list the labels
        (
            {"answer": lambda one: one.relation if int(one.id[-1]) < 2 else "lives in"},
            "out of schema: 80%",
            False,
        ),
        ({"answer": lambda one: "born in"}, "collapsed", False),
        ({"answer": lambda one: ""}, "empty: 100%", False),
        ({"answer": half}, "incomplete: 100 of 200 examples", False),
    ],
)
def test_faults_are_flagged(tmp_path, fields, flag, broken):
    cell = measured(tmp_path, system=fields).cell("system", "one")
    assert any(one.startswith(flag) for one in cell.flags) and cell.broken is broken


def fewer(share):
    return lambda one: one.relation if int(one.id.rpartition("/")[2]) < 200 * share else None


def test_cells_with_common_labels_or_a_part_of_the_examples_are_in_no_mean(tmp_path):
    place = {
        "born in": "born in",
        "works for": "works for",
        "place of birth": "place",
        "place of death": "place",
        "none": "none",
    }
    scores = measured(
        tmp_path,
        cached={
            "kind": "frontier",
            "common_labels": {"one": place},
            "answer": lambda one: one.relation.replace("birth", "death"),
        },
        part={"kind": "frontier", "answer": fewer(0.9)},
        nearly={"kind": "frontier", "answer": fewer(0.96)},
    )
    common, own = scores.cell("cached", "one"), scores.cell("cached", "two")
    assert set(common.gold) == {"born in", "works for", "place", "none"} and (
        common.scores.f1,
        common.comparable,
    ) == (1, False)
    assert (
        own.scores.f1 == 0.75
        and own.comparable
        and "4 common labels, not with the 5" in common.flags[0]
    )
    average = scores.average("cached", "general")
    assert (average.value, average.datasets, average.apart) == (0.75, ("two",), ("one",))
    assert scores.average("part", OVERALL).value is None and scores.average(
        "part", OVERALL
    ).apart == tuple(DATASETS)
    assert (
        scores.average("nearly", OVERALL).value == 1
        and scores.average("nearly", OVERALL).apart == ()
    )
    assert [cell.comparable for cell in headline(scores).rows[0].cells.values()] == [
        False,
        True,
        True,
    ]


def test_common_labels_are_checked_against_the_gold_labels_and_have_no_official_score(tmp_path):
    labels = ("Cause-Effect(e1,e2)", "Cause-Effect(e2,e1)", "Other")
    common = {
        "cause-effect(e1,e2)": "Cause Effect",
        "cause-effect(e2,e1)": "Cause Effect",
        "other": "Other",
    }
    cached = {"kind": "frontier", "common_labels": {"semeval2010_task8": common}}
    record = study(tmp_path, {"semeval2010_task8": "general"}, {"cached": cached}, labels=labels)
    with pytest.raises(
        InputError,
        match=r"gold label 'Cause-Effect\(e1,e2\)', in the data of the study it is 'Cause Effect'",
    ):
        measure(record, resamples=10)
    rows = [
        dataclasses.replace(row, relation=common[row.relation.lower()])
        for row in record.rows(record.systems[0], "semeval2010_task8")
    ]
    write_predictions(tmp_path / "predictions/cached/semeval2010_task8", rows)
    assert (
        measure(record, resamples=10).cell("cached", "semeval2010_task8").scores.semeval_official_f1
        is None
    )


def test_a_dataset_without_related_examples_is_in_no_mean(tmp_path):
    record = study(tmp_path, DATASETS, {"good": {"answer": lambda one: one.relation}}, count=30)
    path = tmp_path / "data/two.jsonl"
    unrelated = [
        dataclasses.replace(one, relation="none") for one in record.examples["two"].values()
    ]
    write_examples(path, unrelated)
    write_predictions(
        tmp_path / "predictions/good/two", [Prediction(one.id, "none", "none") for one in unrelated]
    )
    scores = measure(dataclasses.replace(record), resamples=10)
    assert scores.average("good", "general").value == 1 and scores.average(
        "good", "general"
    ).apart == ("two",)
    assert scores.cell("good", "two").flags == (
        "no example has a relation: F1 is zero whatever the answers",
    )


def test_a_majority_baseline_is_no_fault(tmp_path):
    assert (
        measured(tmp_path, majority={"kind": "baseline", "answer": lambda one: "born in"})
        .cell("majority", "one")
        .flags
        == ()
    )


def test_a_mean_over_fewer_datasets_says_which_are_missing(tmp_path):
    scores = measured(tmp_path, general={"datasets": ["one", "two"]})
    assert scores.average("general", OVERALL).missing == ("tale",)
    nothing = scores.average("general", "literary")
    assert nothing.value is None and nothing.missing == ("tale",) and nothing.flags == ()
    assert scores.cell("general", "tale") is None


def test_rows_join_by_the_hash_of_a_prompt_where_the_id_is_another(tmp_path):
    record = study(
        tmp_path, {"one": "general"}, {"ours": {}, "cached": {"kind": "frontier"}}, count=10
    )
    rows = record.rows(record.systems[0], "one")
    write_predictions(
        tmp_path / "predictions/ours/one",
        [dataclasses.replace(row, prompt_hash=f"h{n}") for n, row in enumerate(rows)],
    )
    cached = [
        Prediction(f"item {n}", row.relation, row.relation, prompt_hash=f"h{n}")
        for n, row in enumerate(rows)
    ]
    write_predictions(tmp_path / "predictions/cached/one", cached)
    assert measure(record, resamples=10).cell("cached", "one").scores.f1 == 1
    write_predictions(
        tmp_path / "predictions/cached/one",
        [*cached, dataclasses.replace(cached[0], example_id="again")],
    )
    with pytest.raises(InputError, match="'again' is a second answer to 'one/test/0'"):
        measure(record, resamples=10)
    write_predictions(
        tmp_path / "predictions/cached/one", [dataclasses.replace(cached[0], prompt_hash="h99")]
    )
    with pytest.raises(InputError, match=r"'item 0' .*not among the test examples"):
        measure(record, resamples=10)


def test_another_gold_label_and_a_name_given_twice_are_refused(tmp_path):
    record = study(tmp_path, {"one": "general"}, {"ours": {}}, count=5)
    rows = record.rows(record.systems[0], "one")
    with pytest.raises(InputError, match="two systems are called 'ours'"):
        measure(dataclasses.replace(record, systems=record.systems * 2))
    write_predictions(
        tmp_path / "predictions/ours/one", [dataclasses.replace(rows[0], relation="works for")]
    )
    with pytest.raises(
        InputError, match="gold label 'works for', in the data of the study it is 'born in'"
    ):
        measure(record, resamples=10)


def test_the_order_of_systems_and_datasets_changes_no_interval(tmp_path):
    record = study(tmp_path, DATASETS, {"good": {}, "poor": {"right": 0.4}}, count=60)
    turned = dataclasses.replace(
        record, datasets=record.datasets[::-1], systems=record.systems[::-1]
    )
    first, second = (measure(one, resamples=200) for one in (record, turned))
    assert {key: cell.interval for key, cell in first.cells.items()} == {
        key: cell.interval for key, cell in second.cells.items()
    }
    json.dumps(first.average("good", OVERALL).to_json(), allow_nan=False)


def test_only_the_cell_of_semeval_has_the_official_score(tmp_path):
    labels = ("Cause-Effect(e1,e2)", "Cause-Effect(e2,e1)", "Message-Topic(e1,e2)", "Other")
    scores = measure(
        study(
            tmp_path,
            {"semeval2010_task8": "general", "one": "general"},
            {"good": {}},
            labels=labels,
        ),
        resamples=50,
    )
    row = headline(scores, with_published=False).rows[0]
    assert 0.5 < row.cells["semeval2010_task8"].official < 1 and row.cells["one"].official is None
