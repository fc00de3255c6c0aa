"""The real run's table: a SemEval run, the baselines and the cached ChatGPT answers on the same
test items, direction ignored.

    jaxre train configs/semeval-small.yaml
    jaxre predict runs/semeval-small
    python tools/semeval_table.py runs/semeval-small

ChatGPT's cached answers carry no direction, so gold labels and all predictions are collapsed by
configs/labels/semeval-undirected.yaml. The second column counts directions and leaves ChatGPT out.
"""

from __future__ import annotations

import sys
from pathlib import Path

from rich.console import Console
from rich.table import Table

from jaxre.config import data_root, load_config
from jaxre.evaluation.compare import compare_files, comparison_table
from jaxre.evaluation.evaluate import write_json
from jaxre.evaluation.metrics import score
from jaxre.evaluation.predictions import read_predictions, write_predictions
from jaxre.quickstart import BASELINES, baseline_rows
from jaxre.relations.sources import load

LABELS = Path("configs/labels/semeval-undirected.yaml")
CACHE = "frontier_predictions/semeval2010_chatgpt/SemEval_All_ans.json"


def main(folder: str) -> None:
    run, cache = Path(folder), data_root() / CACHE
    config = load_config(run / "config.yaml")
    ours = run / "predictions" / "semeval2010_task8-test-score.parquet"
    # The baselines learn from the whole training split, also from the part on which the run chose
    # its checkpoint.
    train, test = (
        load(config.data.train.model_copy(update={"part": (0.0, 1.0)})),
        load(config.data.test),
    )
    files = {f"{run.name} (this run)": ours}
    for number, (name, (baseline, _)) in enumerate(BASELINES.items(), 1):
        rows = baseline_rows(name, baseline(train, test).labels, test)
        files[name], _ = write_predictions(run / "predictions" / f"baseline-{number}", rows)
    console = Console()
    comparison = compare_files(ours, cache, LABELS)
    console.print(comparison_table(comparison))
    table = Table(
        title=f"SemEval-2010 Task 8, {comparison.joined:,} test items, positive-class micro-F1",
        title_justify="left",
    )
    for column in ("system", "direction ignored", "95% interval", "with direction"):
        table.add_column(column)
    result = {}
    for name, path in files.items():
        found = compare_files(path, cache, LABELS)
        directed = score(
            *zip(
                *((row.relation, row.generated_relation) for row in read_predictions(path)),
                strict=True,
            )
        ).f1
        result[name] = {"undirected": found.ours_f1.value, "directed": directed}
        table.add_row(
            name,
            f"{found.ours_f1.value:.3f}",
            f"{found.ours_f1.low:.3f} to {found.ours_f1.high:.3f}",
            f"{directed:.3f}",
        )
    cached = comparison.cached_f1
    table.add_row(
        "ChatGPT, zero-shot, 2023 (cached)",
        f"{cached.value:.3f}",
        f"{cached.low:.3f} to {cached.high:.3f}",
        "-",
    )
    result["chatgpt"] = {"undirected": cached.value}
    console.print(table)
    for line in told_ahead(result, f"{run.name} (this run)"):
        console.print(line)
    write_json(run / "report" / "semeval.json", result)


def told_ahead(result: dict[str, dict[str, float]], ours: str) -> list[str]:
    """A line for each system that ours does not beat, by either figure; `result` holds the F1 of
    each system by name.
    """
    lines = []
    for name, scores in result.items():
        ahead = [
            f"{what} ({result[ours][key]:.3f} against {scores[key]:.3f})"
            for key, what in (("undirected", "direction ignored"), ("directed", "with direction"))
            if name != ours and key in scores and scores[key] >= result[ours][key]
        ]
        if ahead:
            lines.append(f"{ours} does not beat {name}: {', '.join(ahead)}")
    return lines


if __name__ == "__main__":
    main(*sys.argv[1:])
