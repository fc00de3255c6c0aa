"""Hub datasets: what `datasets` loads from a folder stands in for the hub, which no test may reach."""

import datasets
import pytest

from jaxre.config import Source
from jaxre.errors import InputError
from jaxre.relations import hub
from jaxre.relations.semeval import read_semeval


def read_hub(name, split, labelled=True, **settings):
    return hub.read_hub(Source(dataset=f"hub:{name}", split=split, **settings), labelled).examples


STUDY = {"text": ["Ada saw London."] * 2, "entity1": ["Ada"] * 2, "entity2": ["London"] * 2, "relation": ["no", "NA"]}
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
    features = datasets.Features({"sentence": datasets.Value("string"), "relation": datasets.ClassLabel(names=labels)})
    rows = {"sentence": ["The <e1>fire</e1> came from a <e2>spark</e2>.", "A <e1>b</e1> <e2>c</e2>"], "relation": [1, 2]}
    name = folder_of(tmp_path, train=datasets.Dataset.from_dict(rows, features=features))
    first, second = read_hub(name, "train")
    assert (first.text, first.head, first.tail, first.relation) == ("The fire came from a spark.", "fire", "spark", "Cause-Effect(e2,e1)")
    assert second.relation == "Other"


def test_a_hidden_class_is_a_missing_label(tmp_path):
    features = datasets.Features({"sentence": datasets.Value("string"), "relation": datasets.ClassLabel(names=["x"])})
    rows = {"sentence": ["A <e1>b</e1> <e2>c</e2>"], "relation": [-1]}
    name = folder_of(tmp_path, test=datasets.Dataset.from_dict(rows, features=features))
    assert read_hub(name, "test", labelled=False)[0].relation == ""
    with pytest.raises(InputError, match='row 1: no "relation"'):
        read_hub(name, "test")


def test_columns_can_be_mapped(tmp_path):
    name = folder_of(tmp_path, train={"s": ["a to b"], "x": ["a"], "y": ["b"], "z": [7]})
    (example,) = read_hub(name, "train", columns={"text": "s", "head": "x", "tail": "y", "relation": "z"})
    assert (example.head, example.tail, example.relation) == ("a", "b", "7")
    with pytest.raises(InputError, match=r'hub:.*: no column for "text"; the nearest of s, x, y, z is'):
        read_hub(name, "train")


def test_an_entity_in_other_words_than_the_text_is_kept_without_a_span(tmp_path):
    name = folder_of(tmp_path, train={key: [value[0]] for key, value in (STUDY | {"entity1": ["Miss Lovelace"]}).items()})
    (example,) = read_hub(name, "train")
    assert (example.head, example.head_span, example.tail_span) == ("Miss Lovelace", None, (8, 14))


@pytest.mark.parametrize(
    ("split", "message"), [("dev", "no split 'dev'; choose one of train"), (None, "no split given; choose one of train")]
)
def test_an_unknown_split_lists_those_there_are(tmp_path, split, message):
    with pytest.raises(InputError, match=message):
        read_hub(folder_of(tmp_path, train=STUDY), split)


def test_an_unknown_subset_lists_those_there_are(tmp_path):
    with pytest.raises(InputError, match=r"cannot be loaded: .*'rare'.*default.*; choose another subset"):
        read_hub(folder_of(tmp_path, train=STUDY), "train", subset="rare")


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (ConnectionError("Couldn't reach\nthe Hub"), r"hub:o/n: the hub cannot be reached \(Couldn't reach the Hub\); connect"),
        (
            datasets.exceptions.DatasetNotFoundError("Dataset 'o/n' doesn't exist"),
            "hub:o/n: no such dataset, or it is private; check OWNER/NAME",
        ),
        (RuntimeError("Dataset scripts are no longer supported"), "hub:o/n: cannot be loaded: Dataset scripts"),
        (TimeoutError(), "hub:o/n: cannot be loaded: TimeoutError"),
        (ValueError("Config name is missing.\nPick one of ['a']"), r"hub:o/n: .*missing. Pick one of \['a'\]; choose another subset"),
    ],
)
def test_what_the_hub_refuses_is_one_line_with_a_mend(monkeypatch, error, message):
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


@pytest.mark.parametrize(("split", "file"), [("train", "TRAIN_FILE.TXT"), ("test", "TEST_FILE_FULL.TXT")])
def test_semeval_from_the_hub_gives_the_examples_of_its_files(shared_data, monkeypatch, split, file):
    """Ids and dataset name too, so that caches join and the official score is computed."""
    (path,) = (shared_data / "semeval2010_task8").rglob(file)
    items = [item.splitlines() for item in path.read_text(encoding="utf-8").replace("\r", "").strip().split("\n\n")]
    labels = sorted({item[1] for item in items})
    features = datasets.Features({"sentence": datasets.Value("string"), "relation": datasets.ClassLabel(names=labels)})
    rows = {"sentence": [item[0].partition("\t")[2].strip()[1:-1] for item in items]}
    rows["relation"] = [labels.index(item[1]) for item in items]
    splits = {split: datasets.Dataset.from_dict(rows, features=features)}
    monkeypatch.setattr(datasets, "load_dataset", lambda *arguments: splits)
    assert read_hub("SemEvalWorkshop/sem_eval_2010_task_8", split) == read_semeval(shared_data / "semeval2010_task8", split)


def test_a_part_of_semeval_on_the_hub_does_not_pass_for_the_benchmark(monkeypatch):
    splits = {"test": datasets.Dataset.from_dict({"sentence": ["A <e1>b</e1> <e2>c</e2>"], "relation": ["Other"]})}
    monkeypatch.setattr(datasets, "load_dataset", lambda *arguments: splits)
    (example,) = read_hub("SemEvalWorkshop/sem_eval_2010_task_8", "test")
    assert (example.id, example.dataset) == ("SemEvalWorkshop/sem_eval_2010_task_8/test/1", "SemEvalWorkshop/sem_eval_2010_task_8")
