"""The real run's table says when ours does not win."""

from __future__ import annotations

import importlib.util
from pathlib import Path

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
    assert tool.told_ahead(result, "run") == [
        "run does not beat marked: direction ignored (0.760 against 0.780)"
    ]
    assert tool.told_ahead(result | {"run": {"undirected": 0.9, "directed": 0.9}}, "run") == []
