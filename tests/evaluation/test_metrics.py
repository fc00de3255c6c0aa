"""The study's scores: against scikit-learn where it has the metric, against SemEval's official
scorer, and by hand.
"""

import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn import metrics as sk

from jaxre.errors import InputError
from jaxre.evaluation.metrics.scores import confusion_matrix, score, semeval_official_f1, undirected
from jaxre.relations.schema import NEGATIVES, normalise_label
from jaxre.relations.semeval import LABELS

labels = st.sampled_from(
    [
        "Kill",
        "kill",
        "Live_In",
        '"Work_For"',
        "Located  In",
        "none",
        "Other",
        "NA",
        "",
        "no_relation",
        "born in\nbecause",
    ]
)
pairs = st.lists(st.tuples(labels, labels), min_size=1, max_size=60)


@settings(deadline=None)
@given(pairs)
def test_scores_equal_scikit_learn(rows):
    gold, predicted = zip(*rows, strict=True)
    result = score(gold, predicted)

    truth, guess = [normalise_label(x) for x in gold], [normalise_label(x) for x in predicted]
    positives = sorted((set(truth) | set(guess)) - NEGATIVES)
    if positives:
        precision, recall, f1, _ = sk.precision_recall_fscore_support(
            truth, guess, labels=positives, average="micro", zero_division=0
        )
        assert (result.precision, result.recall, result.f1) == pytest.approx(
            (precision, recall, f1)
        )
    else:
        assert (result.precision, result.recall, result.f1) == (0, 0, 0)
    gold_positives = sorted(set(truth) - NEGATIVES)
    macro = (
        sk.f1_score(truth, guess, labels=gold_positives, average="macro", zero_division=0)
        if gold_positives
        else 0
    )
    assert result.macro_f1 == pytest.approx(macro)
    assert result.accuracy == pytest.approx(sk.accuracy_score(truth, guess))

    gold_labels = sorted(set(truth))
    table = sk.precision_recall_fscore_support(truth, guess, labels=gold_labels, zero_division=0)
    ours = {
        normalise_label(row.label): (row.precision, row.recall, row.f1, row.support)
        for row in result.per_class
    }
    assert list(ours) != [] and set(ours) == set(gold_labels)
    for label, *expected in zip(gold_labels, *table, strict=True):
        assert ours[label] == pytest.approx(tuple(expected))


@pytest.mark.filterwarnings("ignore:A single label was found")
@settings(deadline=None)
@given(pairs)
def test_confusion_equals_scikit_learn(rows):
    gold, predicted = ([normalise_label(x) for x in side] for side in zip(*rows, strict=True))
    names = sorted({*gold, *predicted})
    result = confusion_matrix(gold, predicted, names)
    assert result.columns == tuple(names)
    np.testing.assert_array_equal(result.counts, sk.confusion_matrix(gold, predicted, labels=names))


def test_negatives_are_scored_as_in_the_protocol():
    #        hit     false positive  false negative  wrong class (both)  negatives of two spellings
    gold = ["Kill", "Other", "Kill", "Kill", "Other"]
    predicted = ["Kill", "Kill", "none", "Live_In", "no_relation"]
    result = score(gold, predicted)
    assert (result.precision, result.recall, result.f1) == pytest.approx((1 / 3, 1 / 3, 1 / 3))
    assert result.accuracy == pytest.approx(1 / 5)
    assert result.confused[0][2] == 1


def test_confused_pairs_come_most_frequent_first_in_the_spelling_of_the_gold():
    result = score(["A_1", "A_1", "B", "B"], ["b", "b", "a_1", "B"])
    assert result.confused == (("A_1", "B", 2), ("B", "A_1", 1))


def test_malformed_and_schema_valid_rates():
    predicted = ["Kill", "x" * 60, "x" * 61, " KILL\nsince he was shot, " + "x" * 80]
    result = score(["Kill"] * 4, predicted, schema=["Kill", "Live_In"])
    assert result.malformed == 0.25
    assert result.schema_valid == 0.5
    assert [row.label for row in result.per_class] == ["Kill", "Live_In"]
    assert score(["Kill"], ["Kill"]).schema_valid is None


def test_many_distinct_run_on_outputs_cost_no_square_matrix():
    predicted = [f"output {i}" for i in range(50_000)]  # a matrix over them would need 20 GB
    assert score(["Kill"] * 50_000, predicted).f1 == 0
    result = confusion_matrix(["Kill"] * 50_000, predicted)
    assert result.columns == ("Kill", "(outside)") and result.counts.tolist() == [[0, 50_000]]


def test_a_single_class_and_no_positives_at_all():
    assert score(["Kill"] * 3, ["kill"] * 3).f1 == 1
    nothing = score(["none", "NA"], ["none", "NA"])
    assert (nothing.f1, nothing.macro_f1, nothing.accuracy) == (0, 0, 1)


def test_nothing_to_score_is_an_input_error():
    with pytest.raises(InputError, match="empty"):
        score([], [])
    with pytest.raises(InputError, match="1 gold labels but 2"):
        score(["a"], ["a", "b"])
    with pytest.raises(InputError, match="'Kill' is not among"):
        confusion_matrix(["Kill"], ["Kill"], ["Live_In"])


def flip(label):
    return label.translate(str.maketrans("12", "21"))


def official(gold, predicted):
    """The rules of semeval2010_task8_scorer v1.2, evaluation iii, one answer at a time."""
    proposed, right, wrong_direction, answers = {}, {}, {}, {}
    for truth, guess in zip(gold, predicted, strict=True):
        relation, guessed = undirected(truth), undirected(guess)
        answers[relation] = answers.get(relation, 0) + 1
        if truth != guess and relation == guessed:
            wrong_direction[relation] = wrong_direction.get(relation, 0) + 1
            continue
        proposed[guessed] = proposed.get(guessed, 0) + 1
        right[relation] = right.get(relation, 0) + (truth == guess)
    scores = []
    for relation, count in answers.items():
        if relation != "Other":
            hits = right.get(relation, 0)
            precision = hits / max(proposed.get(relation, 0) + wrong_direction.get(relation, 0), 1)
            scores.append(2 * precision * (hits / count) / max(precision + hits / count, 1e-300))
    return sum(scores) / len(scores)


@settings(deadline=None)
@given(
    st.lists(st.tuples(st.sampled_from(LABELS), st.sampled_from(LABELS)), min_size=1, max_size=80)
)
def test_official_semeval_score_follows_the_rules_of_the_scorer(rows):
    gold, predicted = zip(*rows, strict=True)
    if set(gold) == {"Other"}:
        with pytest.raises(InputError, match="besides Other"):
            semeval_official_f1(gold, predicted)
    else:
        assert semeval_official_f1(gold, predicted) == pytest.approx(official(gold, predicted))


@pytest.mark.parametrize(
    ("seed", "printed"), [(1, 30.29), (4, 53.38), (5, 51.16), (9, 56.93), (11, 53.35)]
)
def test_official_semeval_score_equals_the_perl_scorer(seed, printed):
    """`printed` is the output of semeval2010_task8_scorer-v1.2.pl on these answers (it prints two
    decimals).
    """
    draw, pool = random.Random(seed), list(LABELS)
    count = draw.choice([30, 300, 2000])
    pool = pool if seed % 2 else draw.sample(pool, 6)
    gold = [draw.choice(pool) for _ in range(count)]
    predicted = [
        x if draw.random() < 0.5 else (flip(x) if draw.random() < 0.4 else draw.choice(LABELS))
        for x in gold
    ]
    assert 100 * semeval_official_f1(gold, predicted) == pytest.approx(printed, abs=0.0051)


def test_official_semeval_score_of_a_confusion_matrix_worked_out_by_hand():
    """Cause-Effect: 9 hits, 14 proposed in either direction, 15 gold. Component-Whole: 3, 8, 5.
    Other is no relation.
    """
    names = (
        "Cause-Effect(e1,e2)",
        "Cause-Effect(e2,e1)",
        "Component-Whole(e1,e2)",
        "Component-Whole(e2,e1)",
        "Other",
    )
    # rows: gold
    counts = [
        [6, 1, 2, 0, 1],
        [2, 3, 0, 0, 0],
        [1, 0, 2, 1, 0],
        [0, 0, 0, 1, 0],
        [1, 0, 0, 2, 5],
    ]
    pairs = [
        (names[i], names[j])
        for i, row in enumerate(counts)
        for j, count in enumerate(row)
        for _ in range(count)
    ]
    gold, predicted = zip(*pairs, strict=True)
    cause_effect, component_whole = 2 * 9 / (14 + 15), 2 * 3 / (8 + 5)
    assert semeval_official_f1(gold, predicted) == pytest.approx(
        (cause_effect + component_whole) / 2
    )


@pytest.mark.parametrize(
    ("gold", "predicted", "collapsed"),
    [
        (["a", "b", "none"], ["a", "a", "a"], True),
        (["a", "b", "none"], ["none", "None", ""], True),
        (["a", "b", "none"], ["a", "a", "b"], False),
        (["a", "a"], ["a", "a"], False),  # nothing else to predict
        (["a"], ["b"], False),
    ],
)
def test_one_label_for_all_is_flagged_where_the_gold_labels_differ(gold, predicted, collapsed):
    assert score(gold, predicted).collapsed is collapsed


def test_wrong_direction_is_wrong_and_counts_against_precision():
    gold = ["Cause-Effect(e1,e2)", "Cause-Effect(e1,e2)", "Other"]
    predicted = ["Cause-Effect(e1,e2)", "Cause-Effect(e2,e1)", "Other"]
    # 1 of 2 proposed, 1 of 2 gold
    assert semeval_official_f1(gold, predicted) == pytest.approx(0.5)
    assert semeval_official_f1(
        gold, ["Cause-Effect(e1,e2)", "Cause-Effect", "Other"]
    ) == pytest.approx(0.5)
    # 1 of 1 proposed
    assert semeval_official_f1(gold, ["Cause-Effect(e1,e2)", "causes", "Other"]) == pytest.approx(
        2 / 3
    )
    assert score([undirected(x) for x in gold], [undirected(x) for x in predicted]).f1 == 1
