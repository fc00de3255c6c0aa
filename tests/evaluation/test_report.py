"""The report shows every study, escapes its data, and withholds sentences that are not open."""

from __future__ import annotations

import dataclasses
import json
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from made_study import DATASETS, NASTY, make_study
from matplotlib.image import imread
from typer.testing import CliRunner

from jaxre import cli
from jaxre.errors import InputError
from jaxre.evaluation.predictions import Prediction, write_predictions
from jaxre.evaluation.report.figures import draw_figures
from jaxre.evaluation.report.findings import (
    CONFUSION_LABELS,
    EXAMPLES,
    REST,
    Findings,
    collect,
    segments,
)
from jaxre.evaluation.report.page import (
    SECTIONS,
    at_a_glance,
    best_of_columns,
    json_text,
    render,
    verdict,
)
from jaxre.evaluation.report.record import RecordedSystem, read_record, write_record
from jaxre.evaluation.report.study_scores import OVERALL, measure
from jaxre.evaluation.report.write import write_report
from jaxre.relations.schema import Example

RESAMPLES = 100
SOME = ("SmolLM2-360M MixTune 2-shot", "Frontier A", "RoBERTa-base", "left thinking")


def found(folder: Path, public: bool = False) -> Findings:
    return collect(measure(read_record(folder), resamples=RESAMPLES), public)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A study of a few systems."""
    path = tmp_path_factory.mktemp("study")
    make_study(path, systems=SOME)
    return path


@pytest.fixture(scope="module")
def findings(folder) -> Findings:
    return found(folder)


class Page(HTMLParser):
    """Parses a page: its elements, the text of each section, and its data."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.sections: dict[str, str] = {}
        self.tags: list[tuple[str, dict]] = []
        self.section, self.inside = "", ""
        self.data = ""
        self.feed(html)
        self.data = json.loads(self.data)

    def handle_starttag(self, tag, attrs):
        attributes = dict(attrs)
        self.tags.append((tag, attributes))
        self.inside = attributes.get("type", tag) if tag == "script" else tag
        if tag == "section":
            self.section = attributes["id"]

    def handle_data(self, data):
        if self.inside == "application/json":
            self.data += data
        elif self.section:
            self.sections[self.section] = self.sections.get(self.section, "") + data

    def handle_endtag(self, tag):
        self.inside = ""


def test_every_section_has_a_heading_and_an_explanation(findings):
    page = Page(render(findings))
    assert list(page.sections) == list(SECTIONS)
    for name in SECTIONS.keys() - {"glance", "glossary"}:
        assert "How to read it:" in page.sections[name], name
    for name in SOME:
        for section in ("results", "heatmap", "slices", "errors", "confusion", "footprint"):
            assert name in page.sections[section], (name, section)
    ids = [attributes["id"] for _, attributes in page.tags if "id" in attributes]
    assert len(ids) == len(set(ids))
    targets = [attributes["href"].removeprefix("#") for tag, attributes in page.tags if tag == "a"]
    assert set(targets) <= set(ids)


def test_the_figures_shown_are_those_of_the_statistics(findings):
    page = render(findings)
    for row in findings.measured:
        for cell in row.cells.values():
            assert f"<b>{cell.f1:.3f}</b>" in page
    points = Page(page).data["charts"]["scaling"]
    tuned = next(one for one in points if one["name"] == SOME[0] and one["group"] == "general")
    assert tuned["y"] == findings.study.average(SOME[0], "general").value
    # broken answers have no mean
    assert not [one for one in points if one["name"] == "left thinking"]


def test_published_rows_are_marked_by_a_word_and_a_style(findings):
    page = Page(render(findings))
    rows = [
        attributes for tag, attributes in page.tags if tag == "tr" and "data-source" in attributes
    ]
    assert {row["data-source"] for row in rows} == {"measured", "published"}
    for row in rows:
        assert row["data-source"] in row["class"].split()
    tags = [
        attributes["class"]
        for tag, attributes in page.tags
        if tag == "span" and attributes.get("class", "").startswith("tag ")
    ]
    assert tags.count("tag published") >= len(findings.published) > 10
    assert set(best_of_columns(findings).values()) <= set(SOME)


def test_a_published_mean_over_other_datasets_is_not_shown_beside_ours(findings):
    for row in findings.published:
        for group in (*findings.study.groups, "measured and published"):
            average = findings.average(row, group)
            assert average is None or set(average.datasets) <= {name for name, *_ in DATASETS}


def test_slices_survive_the_encoding_of_the_page(findings):
    data = Page(render(findings)).data["slices"]
    for system, table in findings.slices.items():
        for row, one in zip(data["systems"][system], table, strict=True):
            shown = dict(zip(data["fields"], row, strict=True))
            shown |= {name: data["words"][shown[name]] for name in data["worded"]}
            assert (shown["level"], shown["dataset"], shown["measure"], shown["status"]) == (
                one.level,
                one.dataset,
                one.measure,
                one.status,
            )
            assert (shown["n"], shown["value"], shown["whole"]) == (
                one.n,
                round(one.value, 3),
                round(one.whole, 3),
            )


def test_a_chart_has_only_means_over_the_same_datasets(tmp_path):
    make_study(tmp_path, systems=("Qwen2.5-3B LitTune 0-shot", SOME[0]))
    page = Page(render(found(tmp_path)))
    # Two datasets, their mean, and how to read it; the overall mean is of the one that it was
    # trained on.
    assert page.sections["results"].count("not trained on") == 4
    points = page.data["charts"]["scaling"]
    groups = {
        group
        for one in points
        if one["name"] == "Qwen2.5-3B LitTune 0-shot"
        for group in [one["group"]]
    }
    assert "literary" in groups and "overall" not in groups
    assert {one["group"] for one in points if one["name"] == SOME[0]} >= {"literary", "overall"}


def test_data_is_escaped_everywhere(tmp_path):
    make_study(tmp_path, nasty=True, systems=(SOME[0], "Frontier A <b>"))
    html = render(found(tmp_path))
    page = Page(html)
    assert f"{NASTY}</script><b>x</b>" in page.sections["examples"]
    assert "<b>educated</b> & 'at'" in page.data["confusions"][0]["rows"]
    assert (
        "<script>window" not in html
        and "</script><b>" not in html
        and "A <b>" not in html
        and "<b>educated" not in html
    )
    assert [attributes.get("type") for tag, attributes in page.tags if tag == "script"] == [
        "application/json",
        None,
    ]
    assert "Frontier A <b>" in page.data["slices"]["systems"]


@pytest.mark.parametrize(
    "text", ["</script><script>alert(1)</script>", "<!--", "&lt;", "\u2028\u2029", '"', "\u202eמ"]
)
def test_data_in_the_script_element_survives(text):
    written = json_text({text: text})
    assert json.loads(written) == {text: text}
    assert not set(written) & set("<>&\u2028\u2029")


def test_a_page_makes_no_network_request(findings):
    html = render(findings)
    policy = re.search(r'http-equiv="Content-Security-Policy" content="([^"]+)"', html)[1]
    assert (
        "default-src 'none'" in policy
        and "sha256-" in policy
        and "script-src 'unsafe" not in policy
    )
    references = [
        value
        for _, attributes in Page(html).tags
        for name, value in attributes.items()
        if name in ("src", "href", "action")
    ]
    assert all(value.startswith(("#", "data:")) for value in references)
    assert "url(" not in html and "@import" not in html


def test_a_public_page_has_no_sentence_without_an_open_licence(folder):
    closed = [one.text for one in read_record(folder).examples["conll04"].values()]
    local, public = found(folder), found(folder, public=True)
    page = Page(render(local))
    assert any(
        one.text in page.sections["examples"].replace("HEAD", "").replace("TAIL", "")
        for one in _examples(folder, "conll04")
    )
    assert "Do not publish" in render(local) and "do not publish" in page.sections["examples"]
    html = render(public)
    assert {one.dataset for one in public.disagreements.shown} == {"facts", "pg_fiction"}
    assert not [text for text in closed if text[:40] in html] and "Do not publish" not in html
    assert "CoNLL04" in Page(html).sections["examples"]


def _examples(folder: Path, dataset: str) -> list[Example]:
    return list(read_record(folder).examples[dataset].values())


def test_disagreements_are_limited_and_counted(findings):
    shown = findings.disagreements
    assert shown.model == SOME[0]
    for (dataset, frontier), (every, count) in shown.counts.items():
        ours, theirs = (
            findings.study.cell(name, dataset).predicted for name in (shown.model, frontier)
        )
        assert every == sum(a != b for a, b in zip(ours, theirs, strict=True)) > count == EXAMPLES
        assert sum(one.dataset == dataset for one in shown.shown) == count
    assert {one.right for one in shown.shown} == {"model", "frontier", "neither"}
    for one in shown.shown:
        assert {
            "model": one.model_answer == one.gold,
            "frontier": one.frontier_answer == one.gold,
        }.get(one.right, True)


@pytest.mark.parametrize(
    ("head", "tail", "expected"),
    [
        ((0, 3), (8, 11), [("Ann", "head"), (" met ", ""), ("Bob", "tail"), (".", "")]),
        ((8, 11), (0, 11), [("Ann met ", "tail"), ("Bob", "head tail"), (".", "")]),
        ((0, 7), (4, 11), [("Ann ", "head"), ("met", "head tail"), (" Bob", "tail"), (".", "")]),
    ],
    ids=["apart", "nested", "crossing"],
)
def test_entities_are_marked_in_the_text(head, tail, expected):
    text = "Ann met Bob."
    example = Example(
        "1",
        "d",
        "test",
        text,
        text[slice(*head)],
        text[slice(*tail)],
        "r",
        head_span=head,
        tail_span=tail,
    )
    assert [one for one in segments(example) if one[0]] == expected


def test_rare_labels_share_a_row_and_no_answer_is_lost(tmp_path):
    record = make_study(tmp_path, systems=SOME[:1])
    labels = (*record.datasets[0].labels, *(f"label {number:03}" for number in range(60)))
    write_record(
        dataclasses.replace(
            record,
            datasets=tuple(dataclasses.replace(one, labels=labels) for one in record.datasets),
        )
    )
    findings = found(tmp_path)
    for (system, dataset), confusion in findings.confusions.items():
        cell = findings.study.cell(system, dataset)
        assert len(confusion.labels) == CONFUSION_LABELS + 1 and confusion.labels[-1] == REST
        assert confusion.counts.sum() == len(cell.gold)
        hits = np.trace(confusion.counts[:CONFUSION_LABELS, :CONFUSION_LABELS])
        assert hits == sum(a == b for a, b in zip(cell.gold, cell.predicted, strict=True))
    assert REST in Page(render(findings)).sections["confusion"]


@pytest.mark.parametrize(
    "systems", [(SOME[0],), ("Frontier A",), ("always author_of",), ("left thinking",), ()]
)
def test_a_study_that_lacks_something_says_so(tmp_path, systems):
    make_study(tmp_path, systems=systems)
    findings = found(tmp_path)
    page = Page(render(findings))
    assert list(page.sections) == list(SECTIONS)
    assert "No comparison: it takes a tuned system" in page.sections["significance"]
    assert "No examples: it takes" in page.sections["examples"]
    assert (
        "No model of this study was asked in more than one prompt style."
        in page.sections["prompts"]
    )
    if not findings.measured or findings.measured[0].name == "left thinking":
        draw_figures(findings, tmp_path / "figures")  # without data, or without a mean


def test_systems_without_answers_on_a_dataset_are_reported(tmp_path):
    record = make_study(tmp_path, systems=SOME[:2])
    first, second = record.systems
    partial = dataclasses.replace(second, predictions={"facts": second.predictions["facts"]})
    nothing = RecordedSystem("asked nothing", "untuned", "base", {}, 1000)
    write_record(dataclasses.replace(record, systems=(first, partial, nothing)))
    page = Page(render(found(tmp_path)))
    assert "1 of 3 sets" in page.sections["results"] and "asked nothing" in page.sections["results"]
    assert "No frontier model has a mean over 3 datasets." in page.sections["glance"]


def test_figures_that_do_not_compare_have_no_star_and_no_rank(tmp_path):
    """Cached answers, all of them right, but on one dataset in common labels and on another to a
    few of the examples.
    """
    record = make_study(tmp_path, systems=SOME[:2])
    ours, system = record.systems
    examples = list(record.examples["facts"].values())
    common = {label: f"any {label.rpartition('_')[2]}" for label in record.datasets[0].labels}
    rows = [
        Prediction(one.id, common[one.relation], common[one.relation], "facts") for one in examples
    ]
    write_predictions(tmp_path / "cached", rows)
    part = [
        Prediction(one.id, one.relation, one.relation, "conll04")
        for one in list(record.examples["conll04"].values())[:30]
    ]
    write_predictions(tmp_path / "part", part)
    cached = dataclasses.replace(
        system,
        predictions={"facts": "cached.parquet", "conll04": "part.parquet"},
        common_labels={"facts": common},
    )
    write_record(dataclasses.replace(record, systems=(ours, cached)))
    findings = found(tmp_path)
    page = Page(render(findings))
    assert {"facts", "conll04"} <= set(
        best_of_columns(findings)
    ) and system.name not in best_of_columns(findings).values()
    # two cells in two tables, and how to read them
    assert page.sections["results"].count("not comparable") == 5
    assert (
        "scored with" in page.sections["results"]
        and "No frontier model has a mean" in page.sections["glance"]
    )
    (row,) = [row for row in findings.comparisons if row.scope == "facts"]
    ours = findings.study.cell(SOME[0], "facts")
    right = [common.get(a) == common[b] for a, b in zip(ours.predicted, ours.gold, strict=True)]
    assert (row.only_first, row.only_second) == (0, len(right) - sum(right))
    shown = [one for one in findings.disagreements.shown if one.dataset == "facts"]
    assert shown and all(one.gold in common.values() and one.right == "frontier" for one in shown)
    assert findings.disagreements.counts["facts", system.name][0] == len(right) - sum(right)
    draw_figures(findings, tmp_path / "figures")


def test_steps_without_a_result_are_listed(tmp_path):
    record = make_study(tmp_path, systems=SOME[:2])
    assert "without a result" not in Page(render(found(tmp_path))).sections["results"]
    write_record(
        dataclasses.replace(
            record, without={"predict.other.facts": "needs <b>other</b>, which has no result"}
        )
    )
    page = Page(render(found(tmp_path)))
    assert "1 step of the study without a result" in page.sections["results"]
    # as text, not as an element
    assert (
        "predict.other.facts: needs <b>other</b>, which has no result" in page.sections["results"]
    )


def test_every_measured_cell_has_its_further_measures(findings):
    page = render(findings)
    table = page[
        page.index('id="measures"') : page.index("</details>", page.index('id="measures"'))
    ]
    assert table.count("<tr") - 1 == sum(len(row.cells) for row in findings.measured)
    row = findings.measured[0]
    name, one = next(iter(row.cells.items()))
    scores = findings.study.cell(row.name, name).scores
    assert (one.macro_f1, one.accuracy, one.valid, one.malformed) == (
        scores.macro_f1,
        scores.accuracy,
        scores.schema_valid,
        scores.malformed,
    )
    assert f"{scores.macro_f1:.3f}</td>" in table and f"{scores.accuracy:.3f}</td>" in table


def test_a_gold_label_that_the_schema_lacks_is_a_row_of_the_confusion(tmp_path):
    record = make_study(tmp_path, systems=SOME[:1])
    gold = next(one.relation for one in record.examples["facts"].values() if one.relation != "none")
    labels = tuple(label for label in record.datasets[0].labels if label != gold)
    write_record(
        dataclasses.replace(
            record,
            datasets=tuple(dataclasses.replace(one, labels=labels) for one in record.datasets),
        )
    )
    findings = found(tmp_path)
    confusion = findings.confusions[SOME[0], "facts"]
    assert confusion.labels == (*labels, gold) and confusion.counts.sum() == len(
        record.examples["facts"]
    )
    assert [one for one in findings.slices[SOME[0]] if one.name == gold and one.n]


def test_the_summary_counts_only_tested_comparisons(findings):
    glance = Page(render(findings)).sections["glance"]
    # One tuned system has broken answers: its four rows are tested and corrected for nothing.
    assert len(findings.comparisons) == 12 and "Holm's correction for 8 comparisons" in glance


@pytest.mark.parametrize("wins", [True, False])
def test_the_summary_names_best_baseline_and_best_fine_tuned_system_whichever_wins(tmp_path, wins):
    make_study(tmp_path, systems=("SmolLM2-360M MixTune 2-shot", "always author_of"))
    findings = found(tmp_path)
    names = {row.kind: row.name for row in findings.measured}
    if not wins:  # each has the answers of the other
        kinds = {"tuned": "baseline", "baseline": "tuned"}
        rows = tuple(
            dataclasses.replace(row, kind=kinds.get(row.kind, row.kind))
            for row in findings.headline.rows
        )
        headline = dataclasses.replace(findings.headline, rows=rows)
        findings = dataclasses.replace(findings, headline=headline)
        names = {kinds[kind]: name for kind, name in names.items()}
    means = {row.name: row.averages[OVERALL].value for row in findings.measured}
    apart = abs(means[names["tuned"]] - means[names["baseline"]])
    glance = at_a_glance(findings)
    assert glance[0].startswith(f"The best fine-tuned system is {names['tuned']}: mean F1")
    assert glance[1].startswith(f"The best simple baseline is {names['baseline']}: mean F1")
    which = "above" if wins else "below"
    assert f"The best fine-tuned system is {apart:.3f} {which} the best simple baseline." in glance


def test_figures_are_drawn_as_png_and_pdf(findings, tmp_path):
    paths = draw_figures(findings, tmp_path / "figures")
    names = {path.name for path in paths}
    assert {
        "means.png",
        "means.pdf",
        "heatmap.pdf",
        "cost.png",
        "scaling.png",
        "confusion-facts.png",
    } <= names
    assert sorted(names) == sorted(path.name for path in (tmp_path / "figures").iterdir())
    for path in paths:
        assert path.read_bytes().startswith(b"%PDF" if path.suffix == ".pdf" else b"\x89PNG")
    height, width, _ = imread(tmp_path / "figures" / "means.png").shape
    assert 300 < height < 4000 and 800 < width < 4000


@pytest.mark.parametrize(
    ("difference", "p", "p_holm", "said"),
    [
        (0.1, 0.01, 0.2, "no clear difference"),
        (0.1, 0.01, 0.04, "first is better"),
        (-0.1, 0.01, None, "second is better"),
        (None, None, None, "not comparable"),
    ],
)
def test_a_verdict_uses_the_corrected_p_value(difference, p, p_holm, said):
    from jaxre.evaluation.report.contrasts import Difference

    assert (
        verdict(
            Difference("a", "b", "overall", ("d",), 10, difference=difference, p=p, p_holm=p_holm)
        )
        == said
    )


def test_the_command_writes_the_page_and_says_what_not_to_publish(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(
        "jaxre.evaluation.report.write.measure", lambda record: measure(record, resamples=RESAMPLES)
    )
    output = tmp_path / "deep" / "page.html"
    result = CliRunner().invoke(cli.app, ["report", str(folder), "--output", str(output)])
    assert result.exit_code == 0, result.output
    assert (
        str(output) in result.stdout
        and "do not publish" in result.output
        and "conll04" in result.output
    )
    assert (
        output.read_text(encoding="utf-8").startswith("<!doctype html>")
        and output.stat().st_size < 3e6
    )
    assert [path.name for path in output.parent.iterdir()] == ["page.html"]
    result = CliRunner().invoke(
        cli.app, ["report", str(folder), "--output", str(output), "--public"]
    )
    assert result.exit_code == 0 and "do not publish" not in result.output


def test_unwritable_paths_and_folders_without_a_study_are_refused(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(
        "jaxre.evaluation.report.write.measure", lambda record: measure(record, resamples=RESAMPLES)
    )
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(InputError, match="cannot be written"):
        write_report(folder, tmp_path / "file" / "page.html")
    with pytest.raises(InputError, match=r"no study\.json"):
        write_report(tmp_path)
