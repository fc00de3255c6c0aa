"""Re-DocRED: all labels of all pairs, negatives that have none, texts that fit a row and hold both
entities.
"""

import json
from collections import Counter

import pytest
from refusals import refusal

from jaxre.data.tokenizer import load_tokenizer
from jaxre.relations.re_docred import GAP, RELATIONS, WORDS, read_re_docred

SPLITS = {"validation": "dev_revised.json", "test": "test_revised.json"}


@pytest.fixture(scope="module")
def documents(shared_data):
    return {
        split: json.loads((shared_data / "re_docred" / name).read_text(encoding="utf-8"))
        for split, name in SPLITS.items()
    }


@pytest.fixture(scope="module")
def everything(shared_data):
    return {split: read_re_docred(shared_data / "re_docred", split).examples for split in SPLITS}


def pair_of(example):
    _, _, document, head, tail, relation = example.id.split("/")
    return int(document), int(head), int(tail), relation


@pytest.mark.parametrize(
    ("split", "labels", "common"),
    [("validation", 17284, (3846, 2739)), ("test", 17448, (4048, 2766))],
)
def test_every_label_is_one_example(documents, everything, split, labels, common):
    expected = Counter(
        (number, one["h"], one["t"], one["r"])
        for number, doc in enumerate(documents[split])
        for one in doc["labels"]
    )
    positives = [example for example in everything[split] if example.relation != "none"]
    assert Counter(map(pair_of, positives)) == expected
    assert len(positives) == labels
    assert all(example.relation == RELATIONS[pair_of(example)[3]] for example in positives)
    counts = Counter(pair_of(example)[3] for example in positives)
    assert (counts["P131"], counts["P17"]) == common
    assert len(counts) == 95


def test_negatives_are_unlabelled_pairs_one_per_label(documents, everything):
    for split, examples in everything.items():
        labelled = {
            (number, one["h"], one["t"])
            for number, doc in enumerate(documents[split])
            for one in doc["labels"]
        }
        negatives = [pair_of(example) for example in examples if example.relation == "none"]
        assert (
            len(negatives)
            == len(set(negatives))
            == sum(len(doc["labels"]) for doc in documents[split])
        )
        assert not labelled & {pair[:3] for pair in negatives}
        assert all(head != tail for _, head, tail, _ in negatives)


def test_heads_and_tails_are_mentions_of_their_entities(documents, everything):
    for split, examples in everything.items():
        for example in examples[::7]:
            number, head, tail, _ = pair_of(example)
            doc = documents[split][number]
            for entity, name, kind, span in (
                (head, example.head, example.head_type, example.head_span),
                (tail, example.tail, example.tail_type, example.tail_span),
            ):
                spelled = {
                    (" ".join(doc["sents"][m["sent_id"]][slice(*m["pos"])]), m["type"])
                    for m in doc["vertexSet"][entity]
                }
                assert (name, kind) in spelled, example.id
                assert example.text[slice(*span)] == name


def test_texts_fit_a_row_of_512_with_room_for_the_prompt(everything, shared_models):
    longest = sorted(
        {example.text for examples in everything.values() for example in examples}, key=len
    )[-50:]
    tokenizer = load_tokenizer(shared_models / "HuggingFaceTB" / "SmolLM2-360M-Instruct")
    assert max(len(ids) for ids in tokenizer(longest)["input_ids"]) <= 400


def test_the_names_are_those_of_the_release(shared_data):
    assert json.loads((shared_data / "re_docred" / "rel_info.json").read_text()) == RELATIONS


def mention(sentence, first, last, kind="PER"):
    return {"name": "?", "type": kind, "sent_id": sentence, "pos": [first, last]}


def made(folder, sentences, entities, labels=(), name="train_revised.json"):
    document = {
        "title": "t",
        "sents": sentences,
        "vertexSet": entities,
        "labels": [dict(zip("rht", one, strict=True)) for one in labels],
    }
    (folder / name).write_text(json.dumps([document]))
    return folder


LETTERS = [[letter, "."] for letter in "abcdefgh"]


@pytest.mark.parametrize(
    ("window", "text"),
    [(0, "c . d . e ."), (1, "b . c . d . e . f ."), (9, "a . b . c . d . e . f . g . h .")],
)
def test_the_text_runs_from_mention_to_mention_with_the_window_around(tmp_path, window, text):
    made(tmp_path, LETTERS, [[mention(2, 0, 1)], [mention(4, 0, 1)]], [("P19", 0, 1)])
    (example,) = read_re_docred(tmp_path, "train", 0, window).examples
    assert (example.text, example.head, example.tail) == (text, "c", "e")


def test_the_nearest_mentions_that_do_not_overlap_are_taken(tmp_path):
    head = [mention(0, 0, 1), mention(5, 0, 2)]
    tail = [mention(5, 0, 1), mention(6, 0, 1)]
    made(tmp_path, LETTERS, [head, tail], [("P19", 0, 1)])
    (example,) = read_re_docred(tmp_path, "train", 0, 0).examples
    assert (example.head, example.tail, example.text) == ("f .", "g", "f . g .")


def test_a_text_that_is_too_long_leaves_out_what_is_farthest_and_shows_the_gap(tmp_path):
    sentences = [["w"] * (WORDS // 5) for _ in range(9)]
    made(tmp_path, sentences, [[mention(0, 0, 1)], [mention(8, 3, 4)]], [("P19", 0, 1)])
    (example,) = read_re_docred(tmp_path, "train", 0, 2).examples
    words = example.text.split()
    assert words.count("w") == WORDS
    assert words.count(GAP) == 1
    assert example.text[slice(*example.tail_span)] == "w"
    assert example.text[: example.tail_span[0]].split().count("w") == WORDS - WORDS // 5 + 3


def test_a_pair_with_several_labels_is_several_examples_and_both_directions_count(tmp_path):
    made(
        tmp_path, LETTERS, [[mention(0, 0, 1)], [mention(0, 1, 2)]], [("P19", 0, 1), ("P20", 0, 1)]
    )
    examples = read_re_docred(tmp_path, "train", 99).examples
    assert [(e.head, e.tail, e.relation) for e in examples] == [
        ("a", ".", "place of birth"),
        ("a", ".", "place of death"),
        (".", "a", "none"),
    ]


@pytest.mark.parametrize(("negatives", "count"), [(0, 0), (0.5, 1), (1, 2), (1e12, 4)])
def test_negatives_are_drawn_per_label(tmp_path, negatives, count):
    made(
        tmp_path, LETTERS, [[mention(at, 0, 1)] for at in range(3)], [("P19", 0, 1), ("P20", 1, 2)]
    )
    assert (
        sum(e.relation == "none" for e in read_re_docred(tmp_path, "train", negatives).examples)
        == count
    )


@pytest.mark.parametrize(
    ("entities", "labels", "message"),
    [
        (
            [[mention(0, 0, 1)], [mention(9, 0, 1)]],
            [],
            r"document 0: a mention [0, 1) is not in its sentence 9",
        ),
        (
            [[mention(0, 0, 1)], [mention(0, 1, 9)]],
            [],
            r"document 0: a mention [1, 9) is not in its sentence 0",
        ),
        ([[mention(0, 0, 1)], []], [], "document 0: an entity without mentions"),
        (
            [[mention(0, 0, 1)]],
            [("P19", 0, 1)],
            "document 0: a label of entities 0 and 1, which are not two of the 1",
        ),
        ([[mention(0, 0, 1)]], [("P19", 0, 0)], "document 0: a label of entities 0 and 0"),
        (
            [[mention(0, 0, 1)], [mention(1, 0, 1)]],
            [("P1", 0, 1)],
            "document 0: 'P1' is not a relation of Re-DocRED",
        ),
        (
            [[mention(0, 0, 1)], [mention(1, 0, 1)]],
            [("P19", 0, 1)] * 2,
            "document 0: a pair has the label P19 twice",
        ),
        ([[{"name": "x"}]], [], "document 0: not a document of Re-DocRED"),
    ],
)
def test_a_broken_document_is_named(tmp_path, entities, labels, message):
    made(tmp_path, LETTERS, entities, labels)
    assert message in refusal(lambda: read_re_docred(tmp_path, "train"))
