"""Biographical in the format of its release, with rows of our own: who is the subject, and whose
label counts.
"""

import pytest
from refusals import refusal

from jaxre.relations.biographical import DISAGREE, UNJUDGED, read_biographical

HEADER = ("wp_id", "sentence", "P1", "P2", "relation", "ANNOTATION")
BORN = "<e1>Ada King</e1> was born in <e2>London</e2>."


def write(folder, *rows, name="m2_gold.tsv", header=HEADER):
    path = folder / "en" / name
    path.parent.mkdir(exist_ok=True)
    path.write_text("".join("\t".join(row) + "\n" for row in (header, *rows)), encoding="utf-8")
    return folder


@pytest.mark.parametrize(
    ("one", "other", "head", "tail"),
    [
        ("e1", "e2", "Ada King", "London"),
        ("e2", "e1", "London", "Ada King"),
        ("<e2>", "<e1>", "London", "Ada King"),
    ],
)
def test_the_subject_is_the_head_whichever_tag_it_has(tmp_path, one, other, head, tail):
    (example,) = read_biographical(
        write(tmp_path, ("7", BORN, one, other, "bplace_name", "bplace_name")), "gold"
    ).examples
    assert (example.text, example.head, example.tail) == (
        "Ada King was born in London.",
        head,
        tail,
    )
    assert (example.text[slice(*example.head_span)], example.text[slice(*example.tail_span)]) == (
        head,
        tail,
    )
    assert (example.id, example.domain, example.dataset) == (
        "biographical/gold/1",
        "literary",
        "biographical",
    )


def test_the_human_label_counts_in_gold_and_the_distant_one_elsewhere(tmp_path):
    rows = [("1", BORN, "e1", "e2", "bplace_name", human) for human in ("bplace_name", "Other", "")]
    write(tmp_path, *rows)
    gold, distant = (read_biographical(tmp_path, split) for split in ("gold", "gold_distant"))
    assert [e.relation for e in gold.examples] == ["bplace_name", "Other"]
    assert gold.account == {DISAGREE: ["biographical/gold/2"], UNJUDGED: ["biographical/gold/3"]}
    assert [e.relation for e in distant.examples] == ["bplace_name"] * 3
    assert distant.account == {}


@pytest.mark.parametrize(
    ("split", "name"),
    [
        ("train", "m2_train.tsv"),
        ("test_coref", "m2_coref_test.tsv"),
        ("train_skip", "m2_skip_train.tsv"),
    ],
)
def test_each_way_of_building_the_set_is_a_split(tmp_path, split, name):
    """They need neither judgements nor tags of the subject."""
    write(tmp_path, ("1", BORN, "birthplace"), name=name, header=("wp_id", "text", "relation"))
    (example,) = read_biographical(tmp_path, split).examples
    assert (example.head, example.relation, example.split) == ("Ada King", "birthplace", split)


def test_quotes_of_a_table_are_taken_off(tmp_path):
    write(
        tmp_path,
        (
            "1",
            '"<e1>Ada ""Countess"" King</e1> saw <e2>London</e2>."',
            "e1",
            "e2",
            "Other",
            "Other",
        ),
    )
    (example,) = read_biographical(tmp_path, "gold").examples
    assert example.head == 'Ada "Countess" King'


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (
            ("1", "Ada in London", "e1", "e2", "Other", "Other"),
            "m2_gold.tsv:2: no columns with <e1>..</e1> and <e2>..</e2>",
        ),
        (("1", BORN, "e1", "e1", "Other", "Other"), "m2_gold.tsv:2: P1 is 'e1' and P2 'e1'"),
        (("1", BORN, "x", "e1", "Other", "Other"), "m2_gold.tsv:2: P1 is 'x'"),
        (("1", BORN, "e1", "e2", "Other"), "m2_gold.tsv:2: 5 cells under 6 columns"),
        (("1", BORN + "<e1>", "e1", "e2", "Other", "Other"), "m2_gold.tsv:2: <e1> occurs twice"),
        (("1", '"' + BORN, "e1", "e2", "Other", "Other"), "not a table between tabs"),
    ],
)
def test_a_broken_row_is_named(tmp_path, row, message):
    assert message in refusal(lambda: read_biographical(write(tmp_path, row), "gold"))


def test_a_row_without_a_label_is_named(tmp_path):
    write(tmp_path, ("1", BORN, "e1", "e2", "", "Other"))
    assert 'm2_gold.tsv:2: no "relation"' in refusal(
        lambda: read_biographical(tmp_path, "gold_distant")
    )
