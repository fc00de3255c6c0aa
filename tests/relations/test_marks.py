"""Marks and spans are each other's inverse, and an entity is found where a reader would look."""

import itertools

import pytest

from jaxre.relations.marks import insert_marks, locate, occurrences, strip_marks

TEXT = "ab cd ef"
SPANS = [
    (start, end)
    for start, end in itertools.combinations(range(len(TEXT) + 1), 2)
    if TEXT[start:end] == TEXT[start:end].strip()
]


@pytest.mark.parametrize("head", SPANS)
def test_stripping_gives_back_every_pair_of_spans(head):
    for tail in SPANS:
        assert strip_marks(insert_marks(TEXT, head, tail)) == (TEXT, head, tail)


@pytest.mark.parametrize(
    ("head", "tail", "marked"),
    [
        ((0, 2), (6, 8), "<e1>ab</e1> cd <e2>ef</e2>"),
        ((6, 8), (0, 2), "<e2>ab</e2> cd <e1>ef</e1>"),
        ((0, 8), (3, 5), "<e1>ab <e2>cd</e2> ef</e1>"),
        ((3, 5), (0, 8), "<e2>ab <e1>cd</e1> ef</e2>"),
        ((0, 5), (0, 2), "<e1><e2>ab</e2> cd</e1> ef"),
        ((6, 8), (3, 8), "ab <e2>cd <e1>ef</e1></e2>"),
        ((0, 5), (3, 8), "<e1>ab <e2>cd</e1> ef</e2>"),
        ((0, 2), (0, 2), "<e1><e2>ab</e2></e1> cd ef"),
        ((0, 1), (1, 2), "<e1>a</e1><e2>b</e2> cd ef"),
        ((1, 2), (0, 1), "<e2>a</e2><e1>b</e1> cd ef"),
        (None, (3, 5), "ab <e2>cd</e2> ef"),
        (None, None, TEXT),
    ],
)
def test_nested_crossing_and_adjacent_entities_are_marked(head, tail, marked):
    assert insert_marks(TEXT, head, tail) == marked


def test_white_space_inside_a_tag_stays_in_the_text_and_leaves_the_span():
    assert strip_marks("in <e1> New York </e1>the<e2>\tcity</e2>") == (
        "in  New York the\tcity",
        (4, 12),
        (17, 21),
    )


@pytest.mark.parametrize(
    ("text", "entity", "spans"),
    [
        ("USA and the US", "US", [(12, 14)]),
        ("USA", "US", [(0, 2)]),
        ("us, us.", "us", [(0, 2), (4, 6)]),
        ("C++ (C++)", "C++", [(0, 3), (5, 8)]),
        ("Willowdell, Darke County", "Willowdell , Darke County", [(0, 24)]),
        ("New  York", "New York", [(0, 9)]),
        ("a.c abc", "a.c", [(0, 3)]),
        ("Zoë", "Zoe", []),
        ("paris", "Paris", []),
        ("text", "", []),
    ],
)
def test_occurrences_prefer_whole_words_and_forgive_white_space(text, entity, spans):
    assert occurrences(text, entity) == spans


@pytest.mark.parametrize(
    ("text", "head", "tail", "spans"),
    [
        ("war on war", "war", "war", ((0, 3), (7, 10))),
        ("war", "war", "war", ((0, 3), (0, 3))),
        ("York and New York", "New York", "York", ((9, 17), (0, 4))),
        ("New York", "New York", "York", ((0, 8), (4, 8))),
        ("he left", "Paris", "he", (None, (0, 2))),
    ],
)
def test_two_entities_are_located_apart_where_possible(text, head, tail, spans):
    assert locate(text, head, tail) == spans


def test_a_given_span_is_kept_and_the_other_entity_avoids_it():
    assert locate("war on war", "war", "war", head_span=(7, 10)) == ((7, 10), (0, 3))
    assert locate("war on war", "war", "war", tail_span=(0, 3)) == ((7, 10), (0, 3))
