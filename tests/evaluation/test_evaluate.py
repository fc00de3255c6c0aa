"""`jaxre evaluate` shows the official score of SemEval, and marks a run that predicts one class."""

import io
import json

import pytest
from rich.console import Console

from jaxre.evaluation.evaluate import evaluate_file, evaluation_table
from jaxre.evaluation.metrics.scores import semeval_official_f1
from jaxre.evaluation.predictions import Prediction, write_predictions
from jaxre.evaluation.report.run_report import System, summary_table
from jaxre.relations.semeval import NAME

GOLD = ["Cause-Effect(e1,e2)", "Cause-Effect(e2,e1)", "Message-Topic(e1,e2)", "Other"]


def evaluated(tmp_path, predicted, dataset=NAME, gold=GOLD):
    rows = [
        Prediction(str(n), one, other, dataset)
        for n, (one, other) in enumerate(zip(gold, predicted, strict=True))
    ]
    return evaluate_file(write_predictions(tmp_path / "test", rows)[0])


def printed(table) -> str:
    console = Console(file=io.StringIO(), width=160)
    console.print(table)
    return console.file.getvalue()


def test_only_semeval_has_the_official_score(tmp_path):
    predicted = ["Cause-Effect(e1,e2)", "Cause-Effect(e1,e2)", "Message-Topic(e1,e2)", "Other"]
    found = evaluated(tmp_path, predicted)
    assert (
        found.semeval_official_f1
        == semeval_official_f1(GOLD, predicted)
        == pytest.approx((0.5 + 1) / 2)
    )
    assert "official SemEval macro-F1" in printed(evaluation_table(found)) and "0.7500" in printed(
        evaluation_table(found)
    )
    assert json.loads(json.dumps(found.to_json()))["semeval_official_f1"] == pytest.approx(0.75)
    other = evaluated(tmp_path, predicted, "facts")
    assert other.semeval_official_f1 is None and "SemEval" not in printed(evaluation_table(other))


def test_a_split_of_other_alone_has_no_official_score(tmp_path):
    assert (
        evaluated(
            tmp_path, ["Other", "Cause-Effect(e1,e2)"], gold=["Other", "Other"]
        ).semeval_official_f1
        is None
    )


def test_a_run_that_predicts_one_class_is_flagged_as_collapsed(tmp_path):
    found = evaluated(tmp_path, ["Other"] * 4)
    assert found.to_json()["collapsed"] is True
    assert "COLLAPSED" in printed(evaluation_table(found)) and "collapsed" in printed(
        summary_table([System("ours", found, ours=True)])
    )
    fine = evaluated(tmp_path, GOLD)
    assert fine.to_json()["collapsed"] is False and "COLLAPSED" not in printed(
        evaluation_table(fine)
    )
