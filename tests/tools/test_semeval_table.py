"""The real run's table says when ours does not win."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

TOOL = Path(__file__).resolve().parents[2] / "tools" / "semeval_table.py"


def test_a_result_below_a_baseline_is_said_to_be_so() -> None:
    spec = importlib.util.spec_from_file_location("semeval_table", TOOL)
    tool = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tool)
    result = {
        "run": {"undirected": 0.76, "directed": 0.74},
        "TF-IDF": {"undirected": 0.70, "directed": 0.70},
        "marked": {"undirected": 0.78, "directed": 0.70},
        "chatgpt": {"undirected": 0.42},
    }
    assert tool.described_better(result, "run") == [
        "run does not beat marked: micro-F1, direction ignored (0.760 against 0.780)"
    ]
    assert (
        tool.described_better(result | {"run": {"undirected": 0.9, "directed": 0.9}}, "run") == []
    )


def test_the_predictions_of_a_run_are_found_or_asked_for(tmp_path: Path) -> None:
    spec = importlib.util.spec_from_file_location("semeval_table", TOOL)
    tool = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tool)
    predictions = tmp_path / "run" / "predictions"
    predictions.mkdir(parents=True)
    with pytest.raises(SystemExit, match="has no predictions of the test split"):
        tool.predictions_of(tmp_path / "run")
    first = predictions / "semeval2010_task8-test-best.parquet"
    first.touch()
    assert tool.predictions_of(tmp_path / "run") == tool.predictions_of(first) == first
    (predictions / "semeval2010_task8-test-score.parquet").touch()
    with pytest.raises(SystemExit, match=r"several predictions .*best.*score"):
        tool.predictions_of(tmp_path / "run")
