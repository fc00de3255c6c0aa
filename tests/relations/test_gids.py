"""GIDS: names with underscores become words, and spans stay exact."""

import pytest
from refusals import refusal

from jaxre.relations.gids import read_gids

BIRTH = "/people/person/place_of_birth"


def write(folder, *rows, name="dev.tsv"):
    (folder / name).write_text("".join("\t".join(row) + "\n" for row in rows), encoding="utf-8")
    return folder


def row(head, tail, sentence, label=BIRTH):
    return "/m/1", "/m/2", head, tail, label, sentence + " ###END### "


@pytest.mark.parametrize(
    ("given", "text", "head", "tail"),
    [
        (
            ("Ada_King", "Deal,_Kent", "Ada_King left Deal,_Kent ."),
            "Ada King left Deal, Kent .",
            (0, 8),
            (14, 24),
        ),
        (
            ("Boston", "Boston_College", "Boston has Boston_College ."),
            "Boston has Boston College .",
            (0, 6),
            (11, 25),
        ),
        (
            ("Ada", "Deal", "Ada, of Deal: see http://a_b.org/c_d ."),
            "Ada, of Deal: see http://a_b.org/c_d .",
            (0, 3),
            (8, 12),
        ),
        (("Ada", "Deal", "Ada of Deal met Ada ."), "Ada of Deal met Ada .", None, (7, 11)),
        (("Ada", "Deal_Kent", "Ada was born."), "Ada was born.", (0, 3), None),
        (
            ("Zoë_König", "São_Paulo", "In São_Paulo , Zoë_König ."),
            "In São Paulo , Zoë König .",
            (15, 24),
            (3, 12),
        ),
    ],
)
def test_names_are_words_and_spans_those_of_the_sentence(tmp_path, given, text, head, tail):
    (example,) = read_gids(write(tmp_path, row(*given)), "validation").examples
    assert (example.text, example.head_span, example.tail_span) == (text, head, tail)
    assert (example.head, example.tail) == (given[0].replace("_", " "), given[1].replace("_", " "))


def test_the_label_that_the_release_spells_in_two_ways_is_one(tmp_path):
    degree = "/people/person/education./education/education/degree"
    folder = write(tmp_path, row("A", "B", "A B", degree), row("A", "B", "B A", degree + "s"))
    assert {example.relation for example in read_gids(folder, "validation").examples} == {degree}


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([row("A", "B", "A B")[:5]], "dev.tsv:1: 5 columns; a row has 6"),
        (
            [row("A", "B", "A B"), row("A", "B", "A B", "born")],
            "dev.tsv:2: 'born' is not a label of GIDS; the nearest is ",
        ),
        ([row("_", "B", "A B")], "dev.tsv:1: an empty sentence or name"),
        ([row("A", "B", "")], "dev.tsv:1: an empty sentence or name"),
    ],
)
def test_a_broken_row_is_one_line(tmp_path, rows, message):
    assert message in refusal(lambda: read_gids(write(tmp_path, *rows), "validation"))


def test_spans_of_the_real_set_spell_the_names(shared_data):
    for split in ("train_first_release", "validation", "test"):
        examples = read_gids(shared_data / "gids", split).examples
        for one in examples:
            for name, span in ((one.head, one.head_span), (one.tail, one.tail_span)):
                assert span is None or one.text[slice(*span)] == name, one.id
        without = sum(None in (one.head_span, one.tail_span) for one in examples)
        assert without < (0.45 if split == "train_first_release" else 0.06) * len(examples)
