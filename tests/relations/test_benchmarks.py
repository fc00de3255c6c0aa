"""The table of benchmarks: each loads by name, and its counts are the published ones."""

import pytest
from refusals import refusal

from jaxre.config import Source
from jaxre.evaluation.report.record import RecordedDataset
from jaxre.relations import sources
from jaxre.relations.benchmarks import BENCHMARKS, COPIES, ORIGINALS, open_licence
from jaxre.relations.schema import label_counts

STUDIED = {
    "tacred",
    "semeval2010_task8",
    "conll04",
    "nyt11",
    "gids",
    "re_docred",
    "rebel",
    "biographical",
    "pg_fiction",
}


def test_all_nine_benchmarks_of_the_study_have_a_reader_and_a_copy():
    assert set(BENCHMARKS) >= STUDIED
    assert {one.name for one in COPIES.values()} == STUDIED
    assert {one.name for one in BENCHMARKS.values() if one.domain == "literary"} == {
        "biographical",
        "pg_fiction",
    }
    assert not set(COPIES) & set(ORIGINALS)


def test_only_what_is_licensed_so_may_be_shown():
    assert {name for name in BENCHMARKS if open_licence(name)} == {"facts", "semeval2010_task8"}
    assert not open_licence("hub:Despina/semeval2010_task8")
    assert not RecordedDataset("x", "general", (), "x.jsonl").open_licence


@pytest.mark.parametrize("name", sorted(set(BENCHMARKS) - {"facts"}))
def test_a_missing_benchmark_names_the_folder_and_an_unknown_split_those_there_are(
    tmp_path, monkeypatch, name
):
    monkeypatch.setenv("JAXRE_DATA", str(tmp_path / "nowhere"))
    one = BENCHMARKS[name]
    for split in one.splits:
        message = refusal(lambda split=split: sources.load(Source(dataset=name, split=split)))
        assert f"set JAXRE_DATA to the folder that holds {one.folder}/" in message
    assert f"{name}: no split 'dev'; choose one of {', '.join(one.splits)}" in refusal(
        lambda: sources.load(Source(dataset=name, split="dev"))
    )


@pytest.mark.parametrize(
    ("split", "labels"),
    [
        (
            "test",
            {
                "institution": 1365,
                "NA": 1356,
                "place_of_birth": 1032,
                "place_of_death": 1016,
                "degree": 894,
            },
        ),
        (
            "validation",
            {
                "institution": 439,
                "NA": 447,
                "place_of_death": 365,
                "place_of_birth": 323,
                "degree": 290,
            },
        ),
        (
            "train_first_release",
            {
                "NA": 831,
                "institution": 202,
                "place_of_death": 66,
                "place_of_birth": 64,
                "degree": 55,
            },
        ),
    ],
)
def test_gids_has_the_published_counts(shared_data, monkeypatch, split, labels):
    monkeypatch.setenv("JAXRE_DATA", str(shared_data))
    examples = sources.load(Source(dataset="gids", split=split))
    assert {
        label.rpartition("/")[2]: count for label, count in label_counts(examples).items()
    } == labels


def test_a_report_names_the_split_the_count_and_the_first_ids(tmp_path, caplog):
    path = tmp_path / "map.yaml"
    path.write_text("no: none\nYES: positive\n")
    table = tmp_path / "told.csv"
    table.write_text("text,head,tail,relation\na b,a,b,no\na b,a,b,maybe\na b,b,a,yes\n")
    source = Source(dataset=str(table), label_map=str(path))
    assert [(e.id, e.relation) for e in sources.load(source)] == [
        ("told/1", "none"),
        ("told/3", "positive"),
    ]
    sources.load(source)
    assert [record.message for record in caplog.records] == [
        f"{table}: 1 {sources.UNMAPPED} (told/2)"
    ]


def test_a_label_map_is_part_of_the_digest(tmp_path):
    path, table = tmp_path / "map.yaml", tmp_path / "a.csv"
    table.write_text("text,head,tail,relation\na b,a,b,no\n")
    source = Source(dataset=str(table), label_map=str(path))
    found = {sources.digest_of(Source(dataset=str(table))), sources.digest_of(source)}
    assert None in found
    for content in ("no: a\n", "no: b\n"):
        path.write_text(content)
        found.add(sources.digest_of(source))
    assert len(found) == 4


def test_a_label_map_leaves_data_without_labels_alone(tmp_path):
    path, table = tmp_path / "map.yaml", tmp_path / "a.csv"
    path.write_text("no: none\n")
    table.write_text("text,head,tail\na b,a,b\n")
    (one,) = sources.load(Source(dataset=str(table), label_map=str(path)), labelled=False)
    assert one.relation == ""


def test_a_label_map_that_lists_nothing_is_refused(tmp_path):
    path, table = tmp_path / "map.yaml", tmp_path / "a.csv"
    path.write_text("other: none\n")
    table.write_text("text,head,tail,relation\na b,a,b,no\n")
    assert "none of its 0 examples" in refusal(
        lambda: sources.load(Source(dataset=str(table), label_map=str(path)))
    )
