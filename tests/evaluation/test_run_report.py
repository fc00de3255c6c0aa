"""Table and pictures show each system, mark when ours loses, and accept unusual input."""

import pytest
from matplotlib.image import imread
from rich.console import Console

from jaxre.errors import InputError
from jaxre.evaluation.metrics.scores import confusion_matrix, score
from jaxre.evaluation.report.run_report import System, draw_report, summary_table

GOOD, BAD = score(["a", "b"], ["a", "b"]), score(["a", "b"], ["a", "a"])


def printed(table):
    console = Console(width=140, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(table)
    return console.export_text()


def test_a_result_below_a_baseline_is_marked():
    text = printed(
        summary_table(
            [System("[red]majority", GOOD, note="on train"), System("tuned", BAD, ours=True)]
        )
    )
    assert "[red]majority" in text and "on train; ours does not beat it" in text and "0.500" in text
    assert "does not beat" not in printed(
        summary_table([System("majority", BAD), System("tuned", GOOD, ours=True)])
    )


@pytest.mark.parametrize("curves", [([(1, 2.0), (2, 1.0)], [(2, 1.5)]), ([], []), ([(1, 2.0)], ())])
def test_pictures_are_drawn(tmp_path, curves):
    systems = [System("majority", BAD), System("price $5 to $6 " * 5, GOOD, ours=True)]
    confusion = confusion_matrix(["a", "b", "$x$"], ["a", "elsewhere", "$x$"])
    paths = draw_report(tmp_path / "report", systems, *curves, confusion, title="A $ title")
    assert [path.name for path in paths] == ["summary.png", "confusion.png"]
    for path in paths:
        height, width, _ = imread(path).shape
        assert 400 < height < 4000 and 900 < width < 4000


def test_a_hundred_labels_still_make_a_picture_of_reasonable_size(tmp_path):
    labels = [f"label {i}" for i in range(100)]
    path = draw_report(tmp_path, [System("x", GOOD)], [], [], confusion_matrix(labels, labels))[1]
    assert max(imread(path).shape) < 5000


def test_a_report_without_systems_is_refused(tmp_path):
    with pytest.raises(InputError, match="at least one system"):
        draw_report(tmp_path / "report", [], [])
    assert not (tmp_path / "report").exists()


def test_a_place_that_cannot_be_written_is_refused(tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(InputError, match="cannot be written"):
        draw_report(tmp_path / "file", [System("x", GOOD)], [], [])
