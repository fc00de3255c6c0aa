"""The New York Times sets: every label kept and counted, exact spans, judgements that say what they
say.
"""

import json
from collections import Counter

import pytest
from refusals import refusal

from jaxre.config import Source
from jaxre.relations import sources
from jaxre.relations.nyt import OPEN, REPEATED, SETTLED, read_hoffmann, read_nyt11, read_nyt24

LIVED, BORN = "/people/person/place_lived", "/people/person/place_of_birth"


def nyt24(folder, text, *triples):
    mentions = [{"em1Text": head, "em2Text": tail, "label": label} for head, tail, label in triples]
    path = folder / "nyt24_exact" / "train.json"
    path.parent.mkdir(parents=True)
    path.write_text(json.dumps({"sentText": text, "relationMentions": mentions}) + "\n")
    return folder


def nyt11(folder, text, *triples):
    relations = [
        {"em1": head, "em2": tail, "rtext": label, "tags": tags}
        for head, tail, label, tags in triples
    ]
    (folder / "train.json").write_text(json.dumps({"sentext": text, "relations": relations}) + "\n")
    return folder


def test_nyt24_keeps_every_label_and_counts_the_second_ones(shared_data, monkeypatch):
    monkeypatch.setenv("JAXRE_DATA", str(shared_data))
    lines = (
        (shared_data / "nyt" / "nyt24_exact" / "valid.json")
        .read_text(encoding="utf-8")
        .splitlines()
    )
    triples = [
        (number, one["em1Text"], one["em2Text"], one["label"])
        for number, line in enumerate(lines, 1)
        for one in mentions_of(line)
    ]
    found = sources.read(Source(dataset="nyt24", split="validation"))
    assert [
        (int(e.id.split("/")[2]), e.head, e.tail, e.relation) for e in found.examples
    ] == triples
    assert len(triples) == 7985
    assert len({e.id.split("/")[2] for e in found.examples}) == 5000
    assert len({e.relation for e in found.examples}) == 22
    assert len(found.account[sources.SEVERAL]) == 1172
    share = sum(e.relation == "/location/location/contains" for e in found.examples) / len(triples)
    assert share == pytest.approx(0.48, abs=0.005)


def mentions_of(line):
    return json.loads(line)["relationMentions"]


def test_a_second_label_of_a_pair_is_an_example_of_its_own(tmp_path, monkeypatch):
    nyt24(
        tmp_path / "nyt",
        "Ada left Deal .",
        ("Ada", "Deal", LIVED),
        ("Ada", "Deal", BORN),
        ("Deal", "Ada", LIVED),
    )
    monkeypatch.setenv("JAXRE_DATA", str(tmp_path))
    found = sources.read(Source(dataset="nyt24", split="train"))
    assert [e.relation for e in found.examples] == [LIVED, BORN, LIVED]
    assert found.account == {sources.SEVERAL: ["nyt24/train/1/2"]}


def test_an_entity_that_stands_once_has_a_span_and_one_that_stands_twice_has_none(tmp_path):
    (example,) = read_nyt24(
        nyt24(tmp_path, "Ada met Ada in Deal .", ("Ada", "Deal", LIVED)), "train"
    ).examples
    assert (example.head_span, example.tail_span) == (None, (15, 19))


@pytest.mark.parametrize(
    ("tags", "head_span"),
    [
        ([0, 0, 4, 1, 0, 5, 0], (8, 16)),
        ([4, 1, 0, 0, 0, 5, 0], None),  # marks "Ada met", not the head
        ([0] * 7, None),
        ([4], None),
        ([4, 0, 4, 1, 0, 5, 0], None),
    ],
)
def test_tags_of_nyt11_say_which_occurrence_is_meant(tmp_path, tags, head_span):
    text = "Ada met Ada King in Deal . Ada King"
    tags = [*tags, 0, 0] if len(tags) == 7 else tags
    (example,) = read_nyt11(
        nyt11(tmp_path, text, ("Ada King", "Deal", LIVED, tags)), "train"
    ).examples
    assert (example.id, example.head_span, example.tail_span) == (
        "nyt11/train/1/1",
        head_span,
        (20, 24),
    )


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"sentext": "a"}, "train.json:1: not a sentence of nyt11; it has sentext and relations"),
        ({"sentText": "a b", "relationMentions": []}, "not a sentence of nyt11"),
        (
            {"sentext": "a b", "relations": [{"em1": "a", "em2": "b", "rtext": ""}]},
            "not a sentence of nyt11",
        ),
        (
            {"sentext": "a b", "relations": [{"em1": "a", "em2": None, "rtext": "r"}]},
            "not a sentence of nyt11",
        ),
    ],
)
def test_a_broken_sentence_is_named(tmp_path, record, message):
    (tmp_path / "train.json").write_text(json.dumps(record))
    assert message in refusal(lambda: read_nyt11(tmp_path, "train"))


def judged(folder, *rows):
    (folder / "sentential.txt").write_text(
        "".join("\t".join(row) + "\n" for row in rows), encoding="utf-8"
    )
    return folder


def row(judgement, marked, names=("Ada", "Deal"), relation=LIVED):
    return (
        "g1",
        "g2",
        "0",
        relation,
        judgement,
        marked,
        *names,
        marked.replace("[", "").replace("]1", "").replace("]2", ""),
    )


def test_every_judgement_is_an_example_or_accounted_for(shared_data):
    lines = (
        (shared_data / "nyt" / "nyt11_hoffmann_annotations" / "sentential.txt")
        .read_text(encoding="utf-8")
        .splitlines()
    )
    stated = Counter(line.split("\t")[4] for line in lines)
    assert stated == {"y": 254, "n": 567, "indirect": 60, "": 125}
    found = read_hoffmann(shared_data / "nyt", "test")
    left_out = {reason: len(ids) for reason, ids in found.account.items()}
    assert len(found.examples) + sum(left_out.values()) == 1006
    assert left_out[OPEN] == 185
    relations = {line.split("\t")[3] for line in lines}
    assert len(relations) == 22
    assert sum(line.split("\t")[3] == "/location/location/contains" for line in lines) == 455
    assert {e.relation for e in found.examples} <= relations | {"none"}
    repeated = Counter(
        lines[int(name.rpartition("/")[2]) - 1].split("\t")[4] for name in found.account[REPEATED]
    )
    assert sum(e.relation != "none" for e in found.examples) == stated["y"] - repeated["y"]
    pairs = Counter((e.text, e.head, e.tail) for e in found.examples if e.relation == "none")
    assert max(pairs.values()) == 1
    assert not set(pairs) & {
        (e.text, e.head, e.tail) for e in found.examples if e.relation != "none"
    }


def test_spans_of_the_judged_sentences_spell_the_names(shared_data):
    found = read_hoffmann(shared_data / "nyt", "test").examples
    assert all(
        span is None or e.text[slice(*span)] == name
        for e in found
        for span, name in ((e.head_span, e.head), (e.tail_span, e.tail))
    )
    assert sum(None in (e.head_span, e.tail_span) for e in found) < 20
    assert not any(e.text.startswith('"') and e.text.endswith('"') for e in found)


@pytest.mark.parametrize(
    ("rows", "labels", "account"),
    [
        (["y"], [LIVED], {}),
        (["n"], ["none"], {}),
        (["n", "n"], ["none"], {REPEATED: ["nyt11_hoffmann/test/2"]}),
        (["n", "y"], [LIVED], {SETTLED: ["nyt11_hoffmann/test/1"]}),
        (
            ["n", "indirect"],
            [],
            {SETTLED: ["nyt11_hoffmann/test/1"], OPEN: ["nyt11_hoffmann/test/2"]},
        ),
        (["", "y"], [LIVED], {OPEN: ["nyt11_hoffmann/test/1"]}),
    ],
)
def test_no_relation_is_said_only_where_people_said_it(tmp_path, rows, labels, account):
    found = read_hoffmann(
        judged(tmp_path, *(row(judgement, "[Ada]1 left [Deal]2 .") for judgement in rows)), "test"
    )
    assert [e.relation for e in found.examples] == labels
    assert found.account == account


@pytest.mark.parametrize(
    ("marked", "names", "text", "spans"),
    [
        ('"[Ada]1 left [Deal]2 ."', ("Ada", "Deal"), "Ada left Deal .", ((0, 3), (9, 13))),
        ("[[Ada]2 King]1 met Ada", ("Ada King", "Ada"), "Ada King met Ada", ((0, 8), (0, 3))),
        (
            "Ada and [Ada]1 left [Deal]2",
            ("Ada", "Deal"),
            "Ada and Ada left Deal",
            ((8, 11), (17, 21)),
        ),
        ("[Ada]1 left", ("Ada", "Deal"), "Ada left", ((0, 3), None)),
    ],
)
def test_marks_of_judgements_become_spans(tmp_path, marked, names, text, spans):
    (example,) = read_hoffmann(judged(tmp_path, row("y", marked, names)), "test").examples
    assert (example.text, (example.head_span, example.tail_span)) == (text, spans)


@pytest.mark.parametrize(
    ("cells", "message"),
    [
        (row("y", "[Ada]1")[:8], "sentential.txt:1: 8 columns; a judgement has 9"),
        (row("?", "[Ada]1"), "'?' is not a judgement"),
    ],
)
def test_a_broken_judgement_is_named(tmp_path, cells, message):
    assert message in refusal(lambda: read_hoffmann(judged(tmp_path, cells), "test"))
