"""One call for every dataset: dispatch, parts, limits, and overlaps of two splits."""

import itertools
import json
import random
import re

import pytest

from jaxre import config
from jaxre.config import Source
from jaxre.errors import InputError
from jaxre.relations import hub
from jaxre.relations.draws import draw, fraction
from jaxre.relations.schema import Example, Reading
from jaxre.relations.sources import Overlap, load, overlap, unlocated


@pytest.fixture
def data(shared_data, monkeypatch):
    monkeypatch.setenv("JAXRE_DATA", str(shared_data))
    return shared_data


def example(name, text="a b", **fields):
    return Example(
        **{
            "id": name,
            "dataset": "d",
            "split": "s",
            "text": text,
            "head": "a",
            "tail": "b",
            "relation": "r",
            **fields,
        }
    )


def table(folder, count=200, name="mine.jsonl"):
    path = folder / name
    path.write_text(
        "".join(
            json.dumps({"text": f"a{i} to b", "head": f"a{i}", "tail": "b", "relation": "r"}) + "\n"
            for i in range(count)
        )
    )
    return str(path)


@pytest.mark.parametrize(
    ("dataset", "split", "count"),
    [
        ("semeval2010_task8", "train", 8000),
        ("semeval2010_task8", "test", 2717),
        ("conll04", "validation", 2 * 343),
        ("conll04_multihead", "validation", 2 * 353),
    ],
)
def test_each_benchmark_loads_by_name(data, dataset, split, count):
    examples = load(Source(dataset=dataset, split=split))
    assert len(examples) == count
    assert {(e.dataset, e.split) for e in examples} == {(dataset, split)}
    assert len({e.id for e in examples}) == count


def test_the_shipped_corpus_loads_by_name(tmp_path, monkeypatch):
    row = {
        "id": "7",
        "text": "Ada saw London.",
        "head": "Ada",
        "tail": "London",
        "head_span": [0, 3],
        "tail_span": [8, 14],
    }
    row |= {"head_type": "person", "tail_type": "place", "relation": "none"}
    (tmp_path / "train.jsonl").write_text(json.dumps(row))
    (tmp_path / "test.jsonl").write_text(json.dumps(row))
    monkeypatch.setattr(config, "shipped", lambda name: {"corpus": tmp_path}[name])
    (one,) = load(Source(dataset="facts", split="test"))
    assert (one.id, one.dataset, one.split, one.head_span, one.head_type) == (
        "facts/test/7",
        "facts",
        "test",
        (0, 3),
        "person",
    )
    with pytest.raises(InputError, match="facts: no split 'dev'; choose one of test, train"):
        load(Source(dataset="facts", split="dev"))


def test_the_shipped_corpus_missing_is_said(tmp_path, monkeypatch):
    monkeypatch.setattr(config, "shipped", lambda name: tmp_path / name)
    with pytest.raises(InputError, match="corpus is missing; install jaxre again"):
        load(Source(dataset="facts", split="train"))


def test_a_file_loads_by_its_ending_with_its_columns(tmp_path):
    path = tmp_path / "mine.CSV"
    path.write_text("text,h,tail,relation\na b,a,b,no\n")
    (one,) = load(Source(dataset=str(path), columns={"head": "h"}))
    assert (one.id, one.relation) == ("mine/1", "no")


def test_the_hub_gets_name_split_subset_and_columns(monkeypatch):
    seen = []
    monkeypatch.setattr(
        hub, "read_hub", lambda *arguments: seen.append(arguments) or Reading([example("1")])
    )
    source = Source(dataset="hub:o/n", split="test", subset="small", columns={"head": "h"})
    assert load(source) == [example("1")]
    assert seen == [(source, True)]


@pytest.mark.parametrize("split", ["train", "validation", "test"])
def test_a_missing_column_names_the_setting_that_maps_it(tmp_path, split):
    """The setting that the message suggests exists in the run, and fixes it."""
    path = tmp_path / "mine.jsonl"
    path.write_text('{"text": "a b", "subj": "a", "tail": "b", "relation": "no"}\n')
    data = {"train": {"dataset": str(path)}, split: {"dataset": str(path)}}
    tree = {"name": "run", "model": {"path": "m"}, "data": data, "train": {"batch_examples": 1}}
    with pytest.raises(InputError) as error:
        load(getattr(config.check_config(tree, "test").data, split))
    key = re.search(r"map it with ([\w.]+)=NAME", str(error.value)).group(1)
    assert key == f"data.{split}.columns.head"
    data[split]["columns"] = {key.rpartition(".")[2]: "subj"}
    assert len(load(getattr(config.check_config(tree, "test").data, split))) == 1
    data[split]["columns"] = {"hed": "subj"}
    with pytest.raises(
        InputError, match=rf"data\.{split}\.columns\.hed: no such field; the nearest is head"
    ):
        load(getattr(config.check_config(tree, "test").data, split))


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (
            {"dataset": "semeval2010", "split": "train"},
            "no such dataset; the nearest is semeval2010_task8",
        ),
        ({"dataset": "Conll-04", "split": "train"}, "the nearest is conll04 "),
        (
            {"dataset": "conll04", "split": "dev"},
            "no split 'dev'; choose one of train, validation, test",
        ),
        ({"dataset": "conll04"}, "no split given; choose one of train, validation, test"),
        ({"dataset": "semeval2010_task8", "split": "validation"}, "choose one of train, test"),
        (
            {"dataset": "conll04", "split": "test", "columns": {"head": "h"}},
            "only a file or a hub dataset has columns",
        ),
        ({"dataset": "a.jsonl", "subset": "x"}, "only a hub dataset has a subset"),
        ({"dataset": "a.jsonl", "split": "test"}, "a file has no splits; remove split=test"),
        ({"dataset": "nowhere/a.jsonl"}, r"nowhere/a\.jsonl: no such file"),
    ],
)
def test_a_source_that_cannot_be_read_is_one_line(source, message):
    with pytest.raises(InputError, match=message) as error:
        load(Source(**source))
    assert "\n" not in str(error.value)


def test_another_kind_of_file_is_told_what_is_read(tmp_path):
    (tmp_path / "a.tsv").write_text("x")
    with pytest.raises(
        InputError, match=r"unknown kind of file; convert it to one of \.jsonl, \.csv, \.parquet"
    ):
        load(Source(dataset=str(tmp_path / "a.tsv")))


@pytest.mark.parametrize("dataset", ["semeval2010_task8", "conll04", "conll04_multihead"])
def test_missing_benchmarks_name_the_variable(tmp_path, monkeypatch, dataset):
    monkeypatch.setenv("JAXRE_DATA", str(tmp_path / "nowhere"))
    with pytest.raises(
        InputError, match=r"set JAXRE_DATA to the folder that holds (semeval2010_task8|conll04)/"
    ):
        load(Source(dataset=dataset, split="train"))


def test_parts_divide_a_split_without_rest(tmp_path):
    path = table(tmp_path)
    whole = [e.id for e in load(Source(dataset=path))]
    parts = [
        [e.id for e in load(Source(dataset=path, part=part))]
        for part in ((0, 0.25), (0.25, 0.9), (0.9, 1))
    ]
    assert sorted(itertools.chain.from_iterable(parts)) == sorted(whole)
    assert [len(part) / len(whole) for part in parts] == pytest.approx([0.25, 0.65, 0.1], abs=0.06)
    assert parts[0] == [name for name in whole if name in set(parts[0])]


def test_a_part_does_not_change_when_the_file_grows(tmp_path):
    small = {e.id for e in load(Source(dataset=table(tmp_path, 50), part=(0, 0.5)))}
    large = {e.id for e in load(Source(dataset=table(tmp_path, 100), part=(0, 0.5)))}
    assert small == {name for name in large if int(name.split("/")[1]) <= 50}


def test_a_limit_draws_after_the_part_in_the_order_of_the_source(tmp_path):
    path = table(tmp_path)
    names = [e.id for e in load(Source(dataset=path, part=(0, 0.5), limit=20))]
    half = [e.id for e in load(Source(dataset=path, part=(0, 0.5)))]
    assert len(names) == 20
    assert names == [name for name in half if name in set(names)]
    assert names != half[:20]
    assert load(Source(dataset=path, limit=10_000)) == load(Source(dataset=path))


def test_draws_are_the_same_on_every_machine_and_in_any_order():
    # From sha256sum. Stored on purpose: a change of the hash would silently move every split.
    assert fraction("facts/train/1") == 0.9599533932435099
    examples = [example(str(i)) for i in range(10)]
    chosen = {e.id for e in draw(examples, 3, 42)}
    assert chosen == {"0", "1", "6"}
    random.Random(0).shuffle(examples)
    assert {e.id for e in draw(examples, 3, 42)} == chosen
    assert {e.id for e in draw(examples, 3, 43)} != chosen


def test_an_empty_part_is_refused(tmp_path):
    with pytest.raises(
        InputError, match=r"none of its 1 examples is left after part=\[0\.0, 1e-09\]; widen it"
    ):
        load(Source(dataset=table(tmp_path, 1), part=(0, 1e-9)))


def test_one_row_is_enough(tmp_path):
    assert len(load(Source(dataset=table(tmp_path, 1)))) == 1


def test_repeated_ids_are_refused_whatever_the_reader(monkeypatch):
    monkeypatch.setattr(
        hub, "read_hub", lambda *arguments: Reading([example("x"), example("y"), example("x")])
    )
    with pytest.raises(InputError, match="hub:o/n: id 'x' occurs twice"):
        load(Source(dataset="hub:o/n", split="test"))


def test_semeval_test_sentences_in_train_are_found_with_other_pairs(data):
    found = overlap(
        *(load(Source(dataset="semeval2010_task8", split=split)) for split in ("train", "test"))
    )
    assert len(found.same_text) == 16
    assert found.same_pair == ()
    assert "semeval2010_task8/test/8301" in found.same_text


def test_conll04_test_sentences_in_train_are_found(data):
    train, test = (
        load(Source(dataset="conll04", split=split, negatives=1e9)) for split in ("train", "test")
    )
    found = overlap(train, test)
    by_id = {e.id: e for e in test}
    assert len({by_id[name].text for name in found.same_text}) == 20
    verbatim = {e.text for e in train}
    assert len({by_id[name].text for name in found.same_text} & verbatim) == 18
    assert found.same_pair


@pytest.mark.parametrize(
    ("one", "other", "text", "pair"),
    [
        (example("1"), example("2"), 1, 1),
        (example("1"), example("2", head="b", tail="a"), 1, 0),
        (example("1"), example("2", text="a  b "), 1, 1),
        (example("1"), example("2", text="a c b"), 0, 0),
        (
            example("1", "war a war", head_span=(0, 3), tail_span=(4, 5)),
            example("2", "war a war", head_span=(6, 9), tail_span=(4, 5)),
            1,
            0,
        ),
        (
            example("1", "a b", head_span=(0, 1), tail_span=(2, 3)),
            example("2", "a  b", head_span=(0, 1), tail_span=(3, 4)),
            1,
            1,
        ),
        (example("1", "a b", head_span=(0, 1), tail_span=(2, 3)), example("2"), 1, 1),
    ],
)
def test_overlap_tells_same_text_from_same_pair(one, other, text, pair):
    assert overlap([one], [other]) == Overlap(("2",) * text, ("2",) * pair)
    assert bool(overlap([one], [other])) is bool(text)


def test_entities_that_no_prompt_can_mark_are_listed():
    assert unlocated(
        [example("1"), example("2", head="Ada"), example("3", head="Ada", head_span=(0, 1))]
    ) == ["2"]
