"""Cached predictions join exactly or not at all, and reproduce the published figures."""

import csv
import json
import random
from collections import Counter
from dataclasses import replace

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from jaxre.errors import InputError
from jaxre.evaluation.frontier import chatgpt_semeval, gpt_conll04
from jaxre.evaluation.frontier.cache import POSITION, SAME_ANSWER, join_cached
from jaxre.evaluation.frontier.read import FAILED, read_cache
from jaxre.evaluation.metrics.scores import score
from jaxre.relations.conll04 import read_conll04, read_conll04_multihead
from jaxre.relations.schema import Example
from jaxre.relations.semeval import read_semeval

CHATGPT = "frontier_predictions/semeval2010_chatgpt/SemEval_All_ans.json"
GPT = "frontier_predictions/conll04_gpt"
FEW_SHOT = f"{GPT}/output_conll04_seed=42_split=0.json"
CHAIN = f"{GPT}/output_conll04_seed=42_split=0_cot.json"
SURE = f"{GPT}/conll04_test_prior_icl_noentity_gpt4o/output_conll04_seed=42_split=0_sure.json"
LIKELY = (
    f"{GPT}/conll04_test_prior_icl_noentity_gpt4o/output_conll04_seed=42_split=0_sure_likely.json"
)


@pytest.fixture(scope="module")
def semeval(shared_data):
    return read_semeval(shared_data / "semeval2010_task8", "test")


@pytest.fixture(scope="module")
def conll04(shared_data):
    return read_conll04(shared_data / "conll04", "test", negatives=1e6)


def scores(cache):
    return score(
        [answer.gold for answer in cache.answers], [answer.label for answer in cache.answers]
    )


# Joining


def test_equal_keys_join_by_position_only_when_the_lists_are_proven_one():
    keys = [("a",), ("b",), ("b",), ("c",)]
    joined = join_cached(keys, keys, "1234", agree=lambda i, j: keys[i] == keys[j])
    assert joined == {0: (0, "key 1"), 1: (1, POSITION), 2: (2, POSITION), 3: (3, "key 1")}
    # one place disagrees: no proof
    assert set(join_cached(keys, keys, "1234", agree=lambda i, j: i != 3)) == {0, 3}
    turned = keys[::-1]
    # a unique key stands elsewhere: no proof
    assert set(join_cached(keys, turned, "1234", agree=lambda i, j: True)) == {0, 3}
    # other counts: no proof
    assert set(join_cached(keys, keys[:3], "123", agree=lambda i, j: True)) == {0}


def test_equal_keys_with_one_answer_need_no_position():
    keys = [("a",), ("b",), ("b",)]
    same = join_cached(keys[::-1], keys, ["x", "y", "y"], agree=lambda i, j: False)
    assert {i: how for i, (_, how) in same.items()} == {2: "key 1", 0: SAME_ANSWER, 1: SAME_ANSWER}
    assert set(join_cached(keys[::-1], keys, ["x", "y", "z"], agree=lambda i, j: False)) == {2}
    # Three of ours and two cached: which of ours has no answer is unknown, whatever the answers
    # are.
    assert join_cached([("b",)] * 3, [("b",)] * 2, ["y", "y"], agree=lambda i, j: False) == {}


def test_looser_keys_apply_only_to_unjoined_items():
    ours, cached = (
        [("u-boats", "uboats"), ("uboats", "uboats")],
        [("uboats", "uboats"), ("u-boats", "uboats")],
    )
    assert join_cached(ours, cached, "12", agree=lambda i, j: False) == {
        0: (1, "key 1"),
        1: (0, "key 1"),
    }
    assert join_cached([("a.", "a")], [("a", "a")], "1", agree=lambda i, j: False) == {
        0: (0, "key 2")
    }


# ChatGPT on SemEval


def test_every_chatgpt_answer_joins_and_gives_the_published_figures(shared_data, semeval):
    cache = read_cache(shared_data / CHATGPT, semeval)
    assert len(cache.answers) == 2717 and not cache.leftover and not cache.uncovered
    result = scores(cache)
    assert round(result.accuracy, 4) == 0.3905
    assert (round(result.precision, 3), round(result.recall, 3), round(result.f1, 3)) == (
        0.391,
        0.466,
        0.425,
    )
    assert (
        "2,505 by names" in cache.notes[0]
        and "137 more" in cache.notes[0]
        and "75 by their place" in cache.notes[0]
    )
    relation = {example.id: example.relation for example in semeval}
    assert all(
        answer.gold == relation[answer.example_id].split("(")[0].replace("-", " ")
        for answer in cache.answers
    )


def test_joins_do_not_depend_on_the_answers(shared_data, semeval):
    """Every join, also by position, is checked against names that were not used for it."""
    document = json.loads((shared_data / CHATGPT).read_text())
    label = {f"row {j}": entry for j, entry in enumerate(document)}
    marked = [{**entry, "closePred": f"row {j}"} for j, entry in enumerate(document)]
    same = Counter()
    by_id = {example.id: example for example in semeval}
    for answer in chatgpt_semeval.read(marked, semeval, "x").answers:
        entry, example = label[answer.label], by_id[answer.example_id]
        plain = [
            "".join(c for c in name.lower() if c.isalnum())
            for name in (entry["headEntity"], entry["tailEntity"], example.head, example.tail)
        ]
        same[plain[:2] == plain[2:]] += 1
    assert same == {True: 2715, False: 2}  # "acaisson" for caisson, "continuumbath" for bath


def test_a_part_of_the_split_joins_by_keys_alone(shared_data, semeval):
    full = {
        answer.example_id: answer for answer in read_cache(shared_data / CHATGPT, semeval).answers
    }
    part = read_cache(shared_data / CHATGPT, semeval[:1300])
    assert len(part.answers) == 1280 and len(part.uncovered) == 20
    assert all(full[answer.example_id] == answer for answer in part.answers)
    assert sum(map(len, part.leftover.values())) == 2717 - 1280


def test_a_shuffled_cache_loses_positions_but_never_gets_one_wrong(shared_data, semeval):
    document = json.loads((shared_data / CHATGPT).read_text())
    full = {
        answer.example_id: answer.label
        for answer in chatgpt_semeval.read(document, semeval, "x").answers
    }
    random.Random(0).shuffle(document)
    cache = chatgpt_semeval.read(document, semeval, "x")
    assert (
        len(cache.answers) == 2680
        and "38 whose candidates all carry the same answer" in cache.notes[0]
    )
    assert all(full[answer.example_id] == answer.label for answer in cache.answers)


# GPT on CoNLL04


@pytest.mark.parametrize(
    ("name", "f1"), [(FEW_SHOT, 0.369), (CHAIN, 0.358), (SURE, 0.518), (LIKELY, 0.518)]
)
def test_triples_give_the_published_figures(shared_data, name, f1):
    assert (
        round(gpt_conll04.triple_scores(json.loads((shared_data / name).read_text()), name)[2], 3)
        == f1
    )


@pytest.mark.parametrize(
    ("name", "answers", "unparsed"),
    [(FEW_SHOT, 3794, 16), (CHAIN, 3663, 144), (SURE, 3592, 224), (LIKELY, 3816, 0)],
)
def test_every_sentence_of_gpt_joins_and_every_pair_is_answered_or_accounted_for(
    shared_data, conll04, name, answers, unparsed
):
    cache = read_cache(shared_data / name, conll04)
    assert (
        len(conll04) == 3822 == len(cache.answers) + len(cache.uncovered)
        and len(cache.answers) == answers
    )
    reasons = Counter(cache.uncovered.values())
    assert reasons["the reply for its sentence could not be parsed"] == unparsed
    assert (
        reasons["its sentence joins none of the cache"] == 0
        and reasons["the same two names are related otherwise in this sentence"] == 6
    )
    relation = {example.id: example.relation for example in conll04}
    assert all(answer.gold == relation[answer.example_id] for answer in cache.answers)


@pytest.mark.parametrize("name", [FEW_SHOT, SURE])
def test_both_copies_of_conll04_get_the_same_answers(shared_data, conll04, name):
    multihead = read_conll04_multihead(shared_data / "conll04", "test", negatives=1e6)
    assert answers_by_place(read_cache(shared_data / name, conll04), conll04) == answers_by_place(
        read_cache(shared_data / name, multihead), multihead
    )


def answers_by_place(cache, examples):
    """How often each answer was given to a pair; the copies differ in white space, so places are
    counted without it.
    """
    by_id = {example.id: example for example in examples}
    found = Counter()
    for answer in cache.answers:
        example = by_id[answer.example_id]
        places = (
            len("".join(example.text[:start].split()))
            for start, _ in (example.head_span, example.tail_span)
        )
        found["".join(example.text.split()), *places, answer.label] += 1
    return found


def test_a_paraphrase_is_not_joined_without_proof(shared_data, conll04):
    part = [example for example in conll04 if int(example.id.split("/")[2]) < 100]
    cache = read_cache(shared_data / SURE, part)
    assert not cache.answers and set(cache.uncovered.values()) == {
        "its sentence joins none of the cache"
    }
    assert len(cache.leftover["sentences that join none of ours"]) == 288
    assert read_cache(shared_data / FEW_SHOT, part).answers  # the text itself is proof


def pair(number, head, tail, relation, text="AP in Perugia, Italy."):
    spans = f"{number}/{head}/{tail}"
    return Example(f"conll04/test/{spans}", "conll04", "test", text, head, tail, relation)


def case(
    *predicted, true=(("ap:org", "orgbased in", "perugia:loc"),), text="AP in Perugia , Italy ."
):
    return {
        "text": text,
        "true": [list(triple) for triple in true],
        "pred": [list(triple) for triple in predicted],
        "response": "",
    }


def read_one(predicted, pairs):
    return gpt_conll04.read(
        {"correct_cases": {"7": case(*predicted)}, "fail_cases": {}, "error_cases": {}},
        pairs,
        "x.json",
    )


def test_spelling_and_types_do_not_count():
    pairs = [pair(0, "AP", "Perugia", "OrgBased_In"), pair(0, "Italy", "AP", "none")]
    cache = read_one(
        [("a.p.:loc", "Orgbased  In", "Perugia:other"), ("rome:loc", "located in", "italy:loc")],
        pairs,
    )
    assert [(answer.label, answer.gold) for answer in cache.answers] == [
        ("OrgBased_In", "OrgBased_In"),
        ("none", "none"),
    ]
    assert cache.leftover == {
        "predicted triples whose entities are not ours": ("7: rome:loc | located in | italy:loc",)
    }


def test_relations_outside_of_the_schema_are_unchanged_and_two_relations_are_no_answer():
    pairs = [pair(0, "AP", "Perugia", "OrgBased_In"), pair(0, "AP", "Italy", "none")]
    cache = read_one(
        [
            ("ap:org", "born in", "perugia:loc"),
            ("ap:org", "kill", "italy:loc"),
            ("ap:org", "live in", "italy:loc"),
        ],
        pairs,
    )
    assert [answer.label for answer in cache.answers] == ["born in"]
    assert cache.uncovered == {pairs[1].id: "the model gave several relations for the pair"}


def test_a_name_that_is_mentioned_twice_answers_for_the_related_mention():
    related = pair(0, "AP", "Perugia", "OrgBased_In")
    other = replace(related, id="conll04/test/0/9-10/2-3", relation="none")
    cache = read_one([("ap:org", "orgbased in", "perugia:loc")], [related, other])
    assert [answer.example_id for answer in cache.answers] == [related.id]
    assert cache.uncovered == {
        other.id: "the same two names are related otherwise in this sentence"
    }


# The study's long format, and what is none of these


def long_rows():
    setting = {
        "eval_dataset_name": "conll04",
        "gen_type": "gen_constrained",
        "tuned_dataset_name": "frontier",
        "prompt_shot": "0",
    }
    answers = [("Kill", "no", "0123456789ab"), ("NA", 'Live, "In"\nbecause', "ba9876543210")]
    return [
        {
            **setting,
            "relation": gold,
            "model_id": "gpt",
            "generated_relation": label,
            "prompt_hash": prompt_hash,
            "input_tokens": 7,
        }
        for gold, label, prompt_hash in answers
    ]


@pytest.mark.parametrize("suffix", [".csv", ".parquet"])
def test_the_studys_long_format_is_read(tmp_path, suffix):
    path = tmp_path / f"frontier{suffix}"
    table = pa.Table.from_pylist(long_rows())
    if suffix == ".parquet":
        pq.write_table(table, path)
    else:
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, table.column_names)
            writer.writeheader()
            writer.writerows(long_rows())
    answers = read_cache(path).answers
    assert [answer.label for answer in answers] == ["no", 'Live, "In"\nbecause']
    assert (
        answers[0].prompt_hash == "0123456789ab"
        and answers[0].model == "gpt"
        and answers[1].gold == "NA"
    )


def test_the_long_format_is_read_from_the_hub_and_a_failed_request_is_no_answer(
    tmp_path, monkeypatch
):
    """`datasets` loads from a folder what it would load from the hub: a CSV file, as the study
    stored it.
    """
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    failed = {
        **long_rows()[0],
        "prompt_hash": "aaaaaaaaaaaa",
        "generated_relation": "ERROR: max retries exceeded",
    }
    (tmp_path / "hub").mkdir()
    with (tmp_path / "hub" / "all.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, list(failed))
        writer.writeheader()
        writer.writerows([*long_rows(), failed])
    cache = read_cache(f"hub:{tmp_path / 'hub'}")
    assert [
        (one.label, one.prompt_hash, one.prompt_shot, one.input_tokens) for one in cache.answers
    ] == [
        ("no", "0123456789ab", "0", 7),
        ('Live, "In"\nbecause', "ba9876543210", "0", 7),
    ]
    assert cache.leftover == {FAILED: ("aaaaaaaaaaaa",)}
    assert read_cache(tmp_path / "hub" / "all.csv").leftover == cache.leftover


def test_unusable_caches_say_what_was_expected(tmp_path, shared_data, semeval):
    def refused(name, text, examples=semeval):
        (tmp_path / name).write_text(text, encoding="utf-8")
        with pytest.raises(InputError) as error:
            read_cache(tmp_path / name, examples)
        assert name in str(error.value) and "\n" not in str(error.value)
        return str(error.value)

    assert "the cache is empty" in refused("a.json", "[]")
    assert "the cache is empty" in refused("a.json", "{}")
    for document in ('[{"headEntity": "a"}]', '{"correct_cases": {}}', '"text"', "[1, 2]", "7"):
        assert "headEntity, tailEntity, groundTruth, closePred" in refused("b.json", document)
    assert "not a JSON file" in refused("c.json", "{")
    assert "entry 0" in refused(
        "d.json", '[{"headEntity": 1, "tailEntity": "", "groundTruth": "", "closePred": ""}]'
    )
    broken = {"correct_cases": {"7": case(("ap:org", "kill"))}, "fail_cases": {}}
    assert "case '7'" in refused("e.json", json.dumps(broken))
    assert "case '7'" in refused(
        "e.json",
        json.dumps(
            {"correct_cases": {"7": {"text": None, "true": [], "pred": []}}, "fail_cases": {}}
        ),
    )
    assert "case '7'" in refused(
        "e.json", json.dumps({"correct_cases": {"7": []}, "fail_cases": {}})
    )
    assert "give the examples" in refused(
        "f.json", (shared_data / CHATGPT).read_text(), examples=None
    )
    assert "has no rows" in refused("g.csv", "prompt_hash,generated_relation\n")
    assert "prompt_hash or example_id" in refused("h.csv", "relation\nx\n")
    assert "expected" in refused("i.txt", "x")
    with pytest.raises(InputError, match="no such cache"):
        read_cache(tmp_path / "nowhere.json")
