"""One table of several SemEval runs, the baselines and the cached ChatGPT answers on the same test
items.

    jaxre train configs/semeval.yaml
    jaxre predict runs/semeval
    python tools/semeval_table.py runs/semeval runs/encoder-semeval untuned.parquet

Takes runs with predictions of the test split, and files of predictions. ChatGPT's cached answers
have no direction: one column ignores directions, in the gold labels too
(configs/labels/semeval-undirected.yaml); the others leave ChatGPT out.
"""

from __future__ import annotations

import sys
from pathlib import Path

from rich.console import Console
from rich.table import Table

from jaxre.config import data_root, load_config
from jaxre.evaluation.compare import compare_files, comparison_table
from jaxre.evaluation.evaluate import evaluate_rows, write_json
from jaxre.evaluation.predictions import read_predictions, write_predictions
from jaxre.quickstart import BASELINES, baseline_rows
from jaxre.relations.sources import load

LABELS = Path("configs/labels/semeval-undirected.yaml")
COLUMNS = {
    "official": "official macro-F1",
    "directed": "positive micro-F1",
    "accuracy": "accuracy",
    "undirected": "micro-F1, direction ignored",
}
CACHE = "frontier_predictions/semeval2010_chatgpt/SemEval_All_ans.json"


def main(*paths: str) -> None:
    run, cache = Path(paths[0]), data_root() / CACHE
    config = load_config(run / "config.yaml")
    # The baselines learn from the whole training split.
    train = load(config.data.train.model_copy(update={"part": (0.0, 1.0), "limit": None}))
    test = load(config.data.test)
    # Runs are named by their folder, files by their path: files of several runs share a name.
    files = {
        Path(path).name if Path(path).is_dir() else path: predictions_of(Path(path))
        for path in paths
    }
    if len(files) < len(paths):
        raise SystemExit("two of the runs have the same name; pass their prediction files")
    for number, (name, (baseline, _)) in enumerate(BASELINES.items(), 1):
        rows = baseline_rows(name, baseline(train, test).labels, test)
        files[name], _ = write_predictions(run / "predictions" / f"baseline-{number}", rows)
    console = Console()
    ours = next(iter(files))
    comparison = compare_files(files[ours], cache, LABELS)
    console.print(comparison_table(comparison))
    table = Table(
        title=f"SemEval-2010 Task 8, {comparison.joined:,} test items", title_justify="left"
    )
    for column in ("system", *COLUMNS.values(), "95% interval"):
        table.add_column(column)
    result = {}
    for name, path in files.items():
        undirected = compare_files(path, cache, LABELS).ours_f1
        scores = evaluate_rows(read_predictions(path), str(path))
        result[name] = {
            "official": scores.semeval_official_f1,
            "directed": scores.f1,
            "accuracy": scores.accuracy,
            "undirected": undirected.value,
        }
        table.add_row(
            name,
            *(f"{result[name][column]:.3f}" for column in COLUMNS),
            f"{undirected.low:.3f} to {undirected.high:.3f}",
        )
    cached = comparison.cached_f1
    result["chatgpt"] = {"undirected": cached.value}
    table.add_row(
        "ChatGPT, zero-shot, 2023 (cached)",
        *("-" for _ in range(len(COLUMNS) - 1)),
        f"{cached.value:.3f}",
        f"{cached.low:.3f} to {cached.high:.3f}",
    )
    console.print(table)
    for line in described_better(result, ours):
        console.print(line)
    write_json(run / "report" / "semeval.json", result)


def predictions_of(path: Path) -> Path:
    """The file of a run's predictions on the test split, or `path` itself if it is a file."""
    if path.is_file():
        return path
    files = sorted((path / "predictions").glob("semeval2010_task8-test-*.parquet"))
    if not files:
        raise SystemExit(f"{path}: has no predictions of the test split; run jaxre predict {path}")
    if len(files) > 1:
        names = ", ".join(map(str, files))
        raise SystemExit(f"{path}: has several predictions of the test split; name one of {names}")
    return files[0]


def described_better(result: dict[str, dict[str, float]], ours: str) -> list[str]:
    """A line for each system that has a figure at least as good as ours; `result` holds the figures
    of each system by name.
    """
    lines = []
    for name, scores in result.items():
        ahead = [
            f"{words} ({result[ours][key]:.3f} against {scores[key]:.3f})"
            for key, words in COLUMNS.items()
            if name != ours and key in scores and scores[key] >= result[ours][key]
        ]
        if ahead:
            lines.append(f"{ours} does not beat {name}: {', '.join(ahead)}")
    return lines


if __name__ == "__main__":
    if len(sys.argv) < 2:
        raise SystemExit(__doc__)
    main(*sys.argv[1:])
