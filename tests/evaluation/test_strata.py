"""Error strata: every error counted once."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxre.errors import InputError
from jaxre.evaluation.metrics.scores import score
from jaxre.evaluation.metrics.strata import RIGHT, STRATA, error_strata, near, strata_of
from jaxre.relations.schema import NEGATIVES, normalise_label
from jaxre.relations.semeval import LABELS as SEMEVAL

SCHEMA = ("Cause-Effect(e1,e2)", "Cause-Effect(e2,e1)", "Message-Topic(e1,e2)", "Other")
anything = st.sampled_from(
    [*SCHEMA, "other", "none", "", "cause-effect(e1,e2)\nbecause", "<think>", "Born In", "NA"]
)


@pytest.mark.parametrize(
    ("gold", "predicted", "expected"),
    [
        ("Cause-Effect(e1,e2)", " cause-effect(E1,e2)", RIGHT),
        (
            "Other",
            "none",
            RIGHT,
        ),  # another spelling of no relation, which the F1 does not punish either
        ("Other", "Message-Topic(e1,e2)", "over-prediction"),
        ("Message-Topic(e1,e2)", "Other", "under-prediction"),
        ("Message-Topic(e1,e2)", "", "under-prediction"),
        ("Cause-Effect(e1,e2)", "Cause-Effect(e2,e1)", "near neighbour"),
        ("Cause-Effect(e1,e2)", "Message-Topic(e1,e2)", "confusion"),
        ("Cause-Effect(e1,e2)", "<think>\nThe text says", "out of schema"),
        ("Other", "There is no relation between the two entities", "out of schema"),
    ],
)
def test_each_error_has_its_stratum(gold, predicted, expected):
    assert strata_of([gold], [predicted], SCHEMA).tolist() == [expected]


@settings(deadline=None)
@given(st.lists(st.tuples(st.sampled_from(SCHEMA), anything), min_size=1, max_size=50))
def test_strata_add_up_to_all_errors(rows):
    gold, predicted = zip(*rows, strict=True)
    found = error_strata(gold, predicted, SCHEMA)
    assert [one.name for one in found.strata] == list(STRATA)
    assert sum(one.count for one in found.strata) == found.errors
    assert sum(one.share for one in found.strata) == pytest.approx(1 if found.errors else 0)
    pairs = [(normalise_label(one), normalise_label(other)) for one, other in rows]
    assert found.errors == sum(
        one != other and not {one, other} <= NEGATIVES for one, other in pairs
    )


def test_run_on_answers_are_counted_out_of_schema():
    gold = ["Message-Topic(e1,e2)"] * 6 + ["Other"] * 4
    predicted = (
        ["Message-Topic(e1,e2) and also a Cause-Effect"] * 5
        + ["Message-Topic(e1,e2)"] * 4
        + ["Other"]
    )
    found = {one.name: one for one in error_strata(gold, predicted, SCHEMA).strata}
    assert found["out of schema"].count == 5 and found["out of schema"].examples == (0, 1, 2, 3, 4)
    assert found["over-prediction"].count == 3 and found["out of schema"].share == pytest.approx(
        5 / 8
    )


@pytest.mark.parametrize(
    ("schema", "first", "second", "close"),
    [
        (SEMEVAL, "Entity-Origin(e1,e2)", "Entity-Destination(e1,e2)", True),
        (SEMEVAL, "Component-Whole(e1,e2)", "Product-Producer(e1,e2)", False),
        (
            ("/people/person/religion", "/people/person/place_lived"),
            "/people/person/religion",
            "/people/person/place_lived",
            True,
        ),
        (("/a/b/contains", "/c/d/contains"), "/a/b/contains", "/c/d/contains", True),
        (
            ("/people/person/religion", "/location/x/contains"),
            "/people/person/religion",
            "/location/x/contains",
            False,
        ),
        (("place of birth", "date of birth"), "place of birth", "date of birth", True),
        (("located in", "born in"), "located in", "born in", False),  # a function word
        (("per:title", "per:age"), "per:title", "per:age", False),  # what stands before a colon
        # "part" is in half of the labels or more: it tells nothing apart.
        (("part one", "part two", "part three", "sea"), "part one", "part two", False),
        (("part one", "part two", "lake", "sea", "hill"), "part one", "part two", True),
    ],
)
def test_near_neighbours_have_similar_names(schema, first, second, close):
    assert near(schema)(first, second) is near(schema)(second, first) is close


def test_no_predictions_are_an_input_error():
    with pytest.raises(InputError):
        error_strata([], [], SCHEMA)


def test_the_strata_count_what_the_scores_count():
    gold, predicted = (
        ["Other", "Message-Topic(e1,e2)", "Other"],
        ["Other", "<think>", "Message-Topic(e1,e2)"],
    )
    assert score(gold, predicted).accuracy == pytest.approx(
        1 - error_strata(gold, predicted, SCHEMA).errors / 3
    )
