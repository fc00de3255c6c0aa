"""Hub datasets: a folder loaded by `datasets` replaces the hub, which no test may reach."""

import dataclasses
import hashlib
import json

import datasets
import pytest

from jaxre.config import Source
from jaxre.errors import InputError
from jaxre.relations import hub
from jaxre.relations.conll04 import read_conll04
from jaxre.relations.semeval import read_semeval


def read_hub(name, split, labelled=True, **settings):
    return hub.read_hub(Source(dataset=f"hub:{name}", split=split, **settings), labelled).examples


STUDY = {
    "text": ["Ada saw London."] * 2,
    "entity1": ["Ada"] * 2,
    "entity2": ["London"] * 2,
    "relation": ["no", "NA"],
}
STUDY |= {"entity1Type": ["PER", "None"], "entity2Type": ["LOC", None], "prompt_0_shot": ["?", "?"]}


@pytest.fixture(autouse=True)
def private_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def folder_of(tmp_path, **splits):
    """A dataset folder as the hub serves one: a Parquet file per split, features inside."""
    folder = tmp_path / "dataset"
    for split, table in splits.items():
        table = table if isinstance(table, datasets.Dataset) else datasets.Dataset.from_dict(table)
        table.to_parquet(folder / "data" / f"{split}-00000-of-00001.parquet")
    return str(folder)


def test_the_copies_of_the_study_load_without_a_mapping(tmp_path):
    name = folder_of(tmp_path, train=STUDY, test={key: value[:1] for key, value in STUDY.items()})
    examples = read_hub(name, "train")
    assert [(e.head, e.tail, e.relation, e.head_type, e.tail_type) for e in examples] == [
        ("Ada", "London", "no", "PER", "LOC"),
        ("Ada", "London", "NA", None, None),
    ]
    assert [(e.id, e.split, e.head_span, e.tail_span) for e in examples] == [
        (f"{name}/train/1", "train", (0, 3), (8, 14)),
        (f"{name}/train/2", "train", (0, 3), (8, 14)),
    ]
    assert len(read_hub(name, "test")) == 1


def test_the_original_semeval_gives_names_for_numbers_and_spans_for_tags(tmp_path):
    labels = ["Cause-Effect(e1,e2)", "Cause-Effect(e2,e1)", "Other"]
    features = datasets.Features(
        {"sentence": datasets.Value("string"), "relation": datasets.ClassLabel(names=labels)}
    )
    rows = {
        "sentence": ["The <e1>fire</e1> came from a <e2>spark</e2>.", "A <e1>b</e1> <e2>c</e2>"],
        "relation": [1, 2],
    }
    name = folder_of(tmp_path, train=datasets.Dataset.from_dict(rows, features=features))
    first, second = read_hub(name, "train")
    assert (first.text, first.head, first.tail, first.relation) == (
        "The fire came from a spark.",
        "fire",
        "spark",
        "Cause-Effect(e2,e1)",
    )
    assert second.relation == "Other"


def test_a_hidden_class_is_a_missing_label(tmp_path):
    features = datasets.Features(
        {"sentence": datasets.Value("string"), "relation": datasets.ClassLabel(names=["x"])}
    )
    rows = {"sentence": ["A <e1>b</e1> <e2>c</e2>"], "relation": [-1]}
    name = folder_of(tmp_path, test=datasets.Dataset.from_dict(rows, features=features))
    assert read_hub(name, "test", labelled=False)[0].relation == ""
    with pytest.raises(InputError, match='row 1: no "relation"'):
        read_hub(name, "test")


def test_columns_can_be_mapped(tmp_path):
    name = folder_of(tmp_path, train={"s": ["a to b"], "x": ["a"], "y": ["b"], "z": [7]})
    (example,) = read_hub(
        name, "train", columns={"text": "s", "head": "x", "tail": "y", "relation": "z"}
    )
    assert (example.head, example.tail, example.relation) == ("a", "b", "7")
    with pytest.raises(
        InputError, match=r'hub:.*: no column for "text"; the nearest of s, x, y, z is'
    ):
        read_hub(name, "train")


def test_an_entity_in_other_words_than_the_text_is_kept_without_a_span(tmp_path):
    name = folder_of(
        tmp_path,
        train={key: [value[0]] for key, value in (STUDY | {"entity1": ["Miss Lovelace"]}).items()},
    )
    (example,) = read_hub(name, "train")
    assert (example.head, example.head_span, example.tail_span) == ("Miss Lovelace", None, (8, 14))


@pytest.mark.parametrize(
    ("split", "message"),
    [("dev", "no split 'dev'; choose one of train"), (None, "no split given; choose one of train")],
)
def test_an_unknown_split_lists_those_there_are(tmp_path, split, message):
    with pytest.raises(InputError, match=message):
        read_hub(folder_of(tmp_path, train=STUDY), split)


def test_an_unknown_subset_lists_those_there_are(tmp_path):
    with pytest.raises(
        InputError, match=r"cannot be loaded: .*'rare'.*default.*; choose another subset"
    ):
        read_hub(folder_of(tmp_path, train=STUDY), "train", subset="rare")


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (
            ConnectionError("Couldn't reach\nthe Hub"),
            r"hub:o/n: the hub cannot be reached \(Couldn't reach the Hub\); connect",
        ),
        (
            datasets.exceptions.DatasetNotFoundError("Dataset 'o/n' doesn't exist"),
            "hub:o/n: no such dataset, or it is private; check OWNER/NAME",
        ),
        (
            RuntimeError("Dataset scripts are no longer supported"),
            "hub:o/n: cannot be loaded: Dataset scripts",
        ),
        (TimeoutError(), "hub:o/n: cannot be loaded: TimeoutError"),
        (
            ValueError("Config name is missing.\nPick one of ['a']"),
            r"hub:o/n: .*missing. Pick one of \['a'\]; choose another subset",
        ),
    ],
)
def test_what_the_hub_refuses_is_one_line_with_a_fix(monkeypatch, error, message):
    def refuse(*arguments, **settings):
        raise error

    monkeypatch.setattr(datasets, "load_dataset", refuse)
    with pytest.raises(InputError, match=message) as refused:
        read_hub("o/n", "train")
    assert "\n" not in str(refused.value)


def test_code_of_a_dataset_is_never_run(monkeypatch):
    seen = []

    def load(*arguments, **settings):
        seen.append((arguments, settings))
        return {"train": datasets.Dataset.from_dict(STUDY)}

    monkeypatch.setattr(datasets, "load_dataset", load)
    assert read_hub("o/n", "train", subset="subsampled")[0].id == "o/n/subsampled/train/1"
    assert seen == [(("o/n", "subsampled"), {})]


@pytest.mark.parametrize(
    ("split", "file"), [("train", "TRAIN_FILE.TXT"), ("test", "TEST_FILE_FULL.TXT")]
)
def test_semeval_from_the_hub_gives_the_examples_of_its_files(
    shared_data, monkeypatch, split, file
):
    """Ids and dataset name too, so that caches join and the official score is computed."""
    (path,) = (shared_data / "semeval2010_task8").rglob(file)
    items = [
        item.splitlines()
        for item in path.read_text(encoding="utf-8").replace("\r", "").strip().split("\n\n")
    ]
    labels = sorted({item[1] for item in items})
    features = datasets.Features(
        {"sentence": datasets.Value("string"), "relation": datasets.ClassLabel(names=labels)}
    )
    rows = {"sentence": [item[0].partition("\t")[2].strip()[1:-1] for item in items]}
    rows["relation"] = [labels.index(item[1]) for item in items]
    splits = {split: datasets.Dataset.from_dict(rows, features=features)}
    monkeypatch.setattr(datasets, "load_dataset", lambda *arguments: splits)
    assert read_hub("SemEvalWorkshop/sem_eval_2010_task_8", split) == read_semeval(
        shared_data / "semeval2010_task8", split
    )


def test_a_part_of_semeval_on_the_hub_does_not_pass_for_the_benchmark(monkeypatch):
    splits = {
        "test": datasets.Dataset.from_dict(
            {"sentence": ["A <e1>b</e1> <e2>c</e2>"], "relation": ["Other"]}
        )
    }
    monkeypatch.setattr(datasets, "load_dataset", lambda *arguments: splits)
    (example,) = read_hub("SemEvalWorkshop/sem_eval_2010_task_8", "test")
    assert (example.id, example.dataset) == (
        "SemEvalWorkshop/sem_eval_2010_task_8/test/1",
        "SemEvalWorkshop/sem_eval_2010_task_8",
    )


@pytest.fixture
def hub_of(tmp_path, monkeypatch):
    """Lets an id of the hub be a local folder, which `datasets` really loads."""
    real = datasets.load_dataset

    def serve(name, **splits):
        folder = folder_of(tmp_path, **splits)
        monkeypatch.setattr(
            datasets,
            "load_dataset",
            lambda asked, subset=None, **settings: {name: real}[asked](folder, **settings),
        )
        return name

    return serve


@pytest.mark.parametrize(
    ("name", "dataset", "domain"),
    [
        ("Despina/semeval2010_task8", "semeval2010_task8", "general"),
        ("Despina/conll04", "conll04", "general"),
        ("Despina/nyt_11", "nyt11", "general"),
        ("Despina/gids", "gids", "general"),
        ("Despina/re-docred", "re_docred", "general"),
        ("Despina/rebel-dataset", "rebel", "general"),
        ("Despina/tacred", "tacred", "general"),
        ("Despina/biographical", "biographical", "literary"),
        ("Despina/project-gutenberg-fiction-relations", "pg_fiction", "literary"),
    ],
)
def test_a_copy_of_the_study_is_its_benchmark_by_name_and_domain(hub_of, name, dataset, domain):
    """Ids are those of the copy: its rows are not numbered as the original's."""
    hub_of(name, test=STUDY)
    examples = read_hub(name, "test")
    assert {(e.dataset, e.split, e.domain) for e in examples} == {(dataset, "test", domain)}
    assert [e.id for e in examples] == [f"{name}/test/1", f"{name}/test/2"]


def test_the_raw_prompt_of_the_study_is_hashed_as_it_stands(hub_of):
    prompts = [" Text: <b>é\nAnswer: ", "Text: <b>é\nAnswer:"]
    hub_of("Despina/gids", test=STUDY | {"prompt_0_shot": prompts})
    hashes = [example.prompt_hash for example in read_hub("Despina/gids", "test")]
    assert hashes == [hashlib.md5(prompt.encode()).hexdigest()[:12] for prompt in prompts]
    assert hashes[0] != hashes[1]


def test_without_that_prompt_there_is_no_hash(hub_of):
    hub_of(
        "Despina/gids", test={key: value for key, value in STUDY.items() if key != "prompt_0_shot"}
    )
    assert {example.prompt_hash for example in read_hub("Despina/gids", "test")} == {None}


def test_the_original_conll04_gives_the_examples_of_its_files(shared_data, hub_of):
    """The hub names the entities of a relation by their numbers."""
    (path,) = (shared_data / "conll04").rglob("valid.CoNLL04.json")
    rows = {"tokens": [], "entities": [], "relations": [], "orig_id": []}
    for number, one in enumerate(json.loads(path.read_text())):
        numbers = {tuple(entity[:2]): at for at, entity in enumerate(one["entities"])}
        rows["tokens"].append(one["tokens"])
        rows["entities"].append(
            [{"start": start, "end": end, "type": kind} for start, end, kind in one["entities"]]
        )
        rows["relations"].append(
            [
                {"head": numbers[a, b], "tail": numbers[c, d], "type": label}
                for a, b, c, d, label in one["relations"]
            ]
        )
        rows["orig_id"].append(5000 + number)
    hub_of("DFKI-SLT/conll04", validation=rows)
    found = read_hub("DFKI-SLT/conll04", "validation", negatives=1e9)
    assert {e.id.removeprefix("DFKI-SLT/") for e in found} == {
        e.id for e in read_conll04(shared_data / "conll04", "validation", 1e9)
    }
    assert [dataclasses.replace(e, id="") for e in found] == [
        dataclasses.replace(e, id="")
        for e in read_conll04(shared_data / "conll04", "validation", 1e9)
    ]


def test_the_original_gids_is_read_like_its_files(hub_of):
    labels = ["NA", "/people/person/place_of_birth"]
    features = {
        key: datasets.Value("string")
        for key in ("sentence", "subj_id", "obj_id", "subj_text", "obj_text")
    }
    rows = {
        "sentence": ["Ada_Lovelace saw London . ###END###"],
        "subj_id": ["/m/1"],
        "obj_id": ["/m/2"],
        "subj_text": ["Ada_Lovelace"],
    }
    rows |= {"obj_text": ["London"], "relation": [1]}
    table = datasets.Dataset.from_dict(
        rows, features=datasets.Features(features | {"relation": datasets.ClassLabel(names=labels)})
    )
    hub_of("DFKI-SLT/gids", train=table)
    (example,) = read_hub("DFKI-SLT/gids", "train")
    assert (example.dataset, example.text, example.head, example.head_span) == (
        "gids",
        "Ada Lovelace saw London .",
        "Ada Lovelace",
        (0, 12),
    )
    assert (example.id, example.relation) == ("DFKI-SLT/gids/train/1", labels[1])


def test_the_original_re_docred_keeps_its_nested_shape(hub_of):
    mention = {
        "name": "Ada",
        "type": "PER",
        "sent_id": 0,
        "pos": [0, 1],
        "global_pos": [0, 0],
        "index": "0_0",
    }
    place = {
        "name": "London",
        "type": "LOC",
        "sent_id": 0,
        "pos": [2, 3],
        "global_pos": [2, 2],
        "index": "1_0",
    }
    rows = {
        "title": ["Ada"],
        "sents": [[["Ada", "saw", "London"]]],
        "vertexSet": [[[mention], [place]]],
    }
    rows |= {"labels": [[{"r": "P19", "h": 0, "t": 1, "evidence": [0]}]]}
    hub_of("tonytan48/Re-DocRED", test=rows)
    found = read_hub("tonytan48/Re-DocRED", "test", negatives=9)
    assert [(e.dataset, e.head, e.tail, e.relation) for e in found] == [
        ("re_docred", "Ada", "London", "place of birth"),
        ("re_docred", "London", "Ada", "none"),
    ]


def test_the_original_rebel_keeps_its_nested_shape(hub_of):
    sides = {
        "subject": {"surfaceform": "Ada", "boundaries": [0, 3]},
        "object": {"surfaceform": "London", "boundaries": [8, 14]},
    }
    rows = {
        "docid": ["7"],
        "text": ["Ada saw London"],
        "triples": [[{**sides, "predicate": {"surfaceform": "visited", "boundaries": None}}]],
    }
    hub_of("Babelscape/rebel-dataset", train=rows)
    (example,) = read_hub("Babelscape/rebel-dataset", "train")
    assert (example.id, example.dataset, example.tail_span) == (
        "Babelscape/rebel-dataset/train/7/1",
        "rebel",
        (8, 14),
    )


def test_the_original_biographical_is_asked_for_the_file_of_the_split(tmp_path, monkeypatch):
    """Its repository holds several ways of building the set, which the hub would mix."""
    path = tmp_path / "gold.tsv"
    path.write_text(
        "wp_id\tsentence\tP1\tP2\trelation\tANNOTATION\n1\t<e1>1815</e1> saw"
        " <e2>Ada</e2>\te2\te1\tdeathdate\tbirthdate\n"
    )
    real = datasets.load_dataset

    def load(name, subset, data_files):
        assert (name, data_files) == ("plumaj/biographical", {"gold": "en/m2_gold.tsv"})
        return real("csv", data_files={"gold": str(path)}, sep="\t")

    monkeypatch.setattr(datasets, "load_dataset", load)
    (example,) = read_hub("plumaj/biographical", "gold")
    assert (example.head, example.tail, example.relation, example.domain) == (
        "Ada",
        "1815",
        "birthdate",
        "literary",
    )
    with pytest.raises(InputError, match="no split 'validation'; choose one of train, "):
        read_hub("plumaj/biographical", "validation")


def test_the_original_fiction_is_one_split_that_is_divided_by_book(hub_of):
    relation = str(
        [
            {
                "entity1": "Ada",
                "entity2": "Bob",
                "entity1Type": "PER",
                "entity2Type": "PER",
                "relation": "friend of",
            }
        ]
    )
    rows = {
        "book_id": [str(book) for book in range(60)],
        "chunk_id": ["0"] * 60,
        "chunk": ["Ada met Bob."] * 60,
        "relations": [relation] * 60,
    }
    hub_of("Despina/project_gutenberg", train=rows)
    found = {
        split: read_hub("Despina/project_gutenberg", split)
        for split in ("train", "validation", "test")
    }
    assert sum(map(len, found.values())) == 60
    assert {e.split for e in found["test"]} == {"test"}
    assert {e.domain for e in found["train"]} == {"literary"}


def test_an_original_that_is_a_script_says_where_its_files_go(monkeypatch):
    def refuse(*arguments, **settings):
        raise RuntimeError("Dataset scripts are no longer supported, but found rebel-dataset.py")

    monkeypatch.setattr(datasets, "load_dataset", refuse)
    with pytest.raises(
        InputError, match="code is never run; download its files to JAXRE_DATA/rebel and read rebel"
    ):
        read_hub("Babelscape/rebel-dataset", "train")


def test_a_mapping_of_columns_reads_an_original_by_column(hub_of):
    hub_of("DFKI-SLT/gids", train={"s": ["a to b"], "x": ["a"], "y": ["b"], "z": ["l"]})
    (example,) = read_hub(
        "DFKI-SLT/gids", "train", columns={"text": "s", "head": "x", "tail": "y", "relation": "z"}
    )
    assert (example.dataset, example.relation) == ("gids", "l")
