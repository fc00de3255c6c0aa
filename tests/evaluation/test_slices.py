"""Slices show holes that an average hides; small slices are not judged."""

import dataclasses
import json

import pytest
from sklearn.metrics import f1_score
from tiny_study import LABELS, study

from jaxre.evaluation.metrics.attributes import attributes_of
from jaxre.evaluation.report.slices import slices
from jaxre.evaluation.report.study_scores import measure
from jaxre.relations.schema import Example

DATASETS = {"one": "general", "tale": "literary"}


def sliced(folder, answer=None, count=300, system="ours"):
    scores = measure(
        study(folder, DATASETS, {"ours": {"answer": answer, "right": 0.95}}, count=count),
        resamples=500,
    )
    return scores, {(one.dataset, one.level, one.name): one for one in slices(scores, system)}


def test_a_relation_that_is_never_found_is_a_hole_under_a_good_average(tmp_path):
    scores, found = sliced(
        tmp_path,
        lambda one: "none" if (one.relation, one.dataset) == ("works for", "one") else one.relation,
    )
    assert scores.average("ours", "overall").value > 0.9
    holes = {key for key, one in found.items() if one.status == "hole"}
    assert holes == {("one", "relation", "works for")}
    hole = found["one", "relation", "works for"]
    assert (hole.n, hole.positive, hole.measure, hole.value, hole.high) == (60, 60, "F1", 0, 0)
    assert hole.difference == pytest.approx(-hole.whole) and hole.whole == pytest.approx(
        scores.cell("ours", "one").scores.f1
    )


def test_holes_are_found_by_distance_and_type(tmp_path):
    def answer(one):
        return one.relation if len(one.text.split()) < 22 and one.tail_type == "ORG" else "born in"

    _, found = sliced(tmp_path, answer)
    holes = {(level, name) for (_, level, name), one in found.items() if one.status == "hole"}
    assert ("entity types", "PER -> PER") in holes and ("entity types", "PER -> ORG") not in holes
    assert ("entity distance", "20-39 words") in holes and (
        "entity distance",
        "5-9 words",
    ) not in holes


def test_a_whole_dataset_can_be_the_hole(tmp_path):
    _, found = sliced(
        tmp_path,
        lambda one: "none" if one.dataset == "tale" and int(one.id[-1]) % 10 else one.relation,
    )
    # two datasets: the interval over them spans both
    assert found["tale", "dataset", "tale"].status == "fine"
    assert found["", "domain", "literary"].difference < -0.3


def test_values_equal_scikit_learn(tmp_path):
    scores, found = sliced(tmp_path)
    cell = scores.cell("ours", "one")
    per_class = f1_score(cell.gold, cell.predicted, labels=LABELS, average=None)
    for label, f1 in zip(LABELS[:-1], per_class[:-1], strict=True):
        one = found["one", "relation", label]
        assert one.value == pytest.approx(f1) and one.low <= one.value <= one.high and one.n == 60
    negative = found["one", "relation", "none"]
    kept = [
        predicted == "none"
        for gold, predicted in zip(cell.gold, cell.predicted, strict=True)
        if gold == "none"
    ]
    assert negative.measure == "accuracy" and negative.value == pytest.approx(sum(kept) / len(kept))
    members = [
        i for i, row in enumerate(scores.attributes["one"]) if row["entity types"] == "PER -> ORG"
    ]
    part = found["one", "entity types", "PER -> ORG"]
    gold, predicted = ([side[i] for i in members] for side in (cell.gold, cell.predicted))
    assert part.value == pytest.approx(
        f1_score(gold, predicted, labels=LABELS[:-1], average="micro")
    ) and part.n == len(members)


def test_slices_of_each_level_cover_their_dataset(tmp_path):
    _, found = sliced(tmp_path)
    for level in ("relation", "entity types", "sentence length", "entity distance"):
        assert (
            sum(one.n for (dataset, at, _), one in found.items() if (dataset, at) == ("one", level))
            == 300
        )
    json.dumps([one.to_json() for one in found.values()], allow_nan=False)


def test_small_slices_are_called_too_small(tmp_path):
    _, found = sliced(tmp_path, lambda one: "none", count=20)
    assert {one.status for one in found.values() if one.level not in ("domain", "dataset")} == {
        "too small"
    }


def test_a_slice_without_positive_labels_is_judged_by_accuracy(tmp_path):
    # Only the examples of PER -> PER lose their relations; then that slice has no positive label,
    # and every answer in it is wrong.
    record = study(
        tmp_path, {"one": "general"}, {"ours": {}}, count=400, labels=("born in", "none")
    )
    scores = measure(record, resamples=200)
    found = {one.name: one for one in slices(scores, "ours") if one.level == "entity types"}
    # Labels and types both alternate: all PER -> ORG are born in, all PER -> PER are none.
    assert (
        found["PER -> ORG"].measure,
        found["PER -> PER"].measure,
        found["PER -> PER"].positive,
    ) == ("F1", "accuracy", 0)


def test_a_gold_label_beyond_the_schema_is_a_slice_too(tmp_path):
    record = study(
        tmp_path,
        DATASETS,
        {"ours": {"answer": lambda one: one.relation.replace("works for", "none")}},
        count=300,
    )
    known = [
        dataclasses.replace(one, labels=tuple(set(LABELS) - {"works for"}))
        for one in record.datasets
    ]
    table = slices(
        measure(dataclasses.replace(record, datasets=tuple(known)), resamples=300), "ours"
    )
    assert [one.status for one in table if one.name == "works for"] == ["hole", "hole"]
    assert sum(one.n for one in table if (one.level, one.dataset) == ("relation", "one")) == 300


def test_a_domain_is_the_mean_of_what_was_trained_on_where_some_of_it_was(tmp_path):
    def answer(one):
        return one.relation if one.dataset == "one" else "none"

    datasets = {"one": "general", "two": "general", "tale": "literary"}
    scores = measure(
        study(tmp_path, datasets, {"ours": {"answer": answer, "trained_on": ("one",)}}),
        resamples=300,
    )
    found = {(one.level, one.name): one for one in slices(scores, "ours")}
    general, literary = found["domain", "general"], found["domain", "literary"]
    assert (general.value, general.status, general.n) == (1, "fine", 200) and scores.average(
        "ours", "general"
    ).value == 1
    assert (literary.value, literary.status) == (0, "hole") and found[
        "dataset", "two"
    ].status == "hole"


def test_a_system_whose_figures_do_not_compare_is_judged_by_itself(tmp_path):
    def answer(one):
        return (
            (one.relation if one.tail_type == "ORG" else "none")
            if int(one.id.rpartition("/")[2]) < 200
            else None
        )

    _, found = sliced(tmp_path, answer)
    assert (
        found["", "domain", "general"].difference == found["one", "dataset", "one"].difference == 0
    )
    assert found["one", "entity types", "PER -> PER"].status == "hole"


def test_broken_answers_and_systems_that_were_not_asked(tmp_path):
    _, found = sliced(tmp_path, lambda one: "<think>")
    assert (
        found["", "domain", "general"].status == found["one", "dataset", "one"].status == "broken"
    )
    assert sliced(tmp_path, system="nobody")[1] == {}


@pytest.mark.parametrize(
    ("text", "head", "tail", "spans", "distance"),
    [
        ("Ann met Bob.", "Ann", "Bob", (None, None), "1-4 words"),
        ("Bob, Ann", "Ann", "Bob", (None, None), "1-4 words"),  # the comma
        ("Ann Bob", "Ann", "Bob", (None, None), "0 words"),
        ("New York Times", "New York Times", "New York", (None, None), "entities overlap"),
        ("Ann met Bob.", "Eve", "Bob", (None, None), "not found in the text"),
        ("Ann " + "x " * 40 + "Bob", "Ann", "Bob", ((0, 3), (84, 87)), "40 words or more"),
        ("", "Ann", "Bob", (None, None), "not found in the text"),
    ],
)
def test_distance_between_entities(text, head, tail, spans, distance):
    example = Example(
        "i", "d", "test", text, head, tail, "r", head_span=spans[0], tail_span=spans[1]
    )
    assert attributes_of(example)["entity distance"] == distance
    assert attributes_of(example)["entity types"] == "unknown -> unknown"


@pytest.mark.parametrize(
    ("words", "name"),
    [(0, "0-10 words"), (10, "0-10 words"), (11, "11-20 words"), (161, "161 words or more")],
)
def test_length_in_words(words, name):
    assert (
        attributes_of(Example("i", "d", "test", "x " * words, "a", "b", "r"))["sentence length"]
        == name
    )
