"""Report of one run: a table for the terminal and two pictures for people who did not run it.

print(summary_table(systems))
# summary.png, confusion.png
draw_report(folder, systems, train_loss, validation_loss, confusion)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from rich.table import Table
from rich.text import Text

from jaxre.errors import InputError
from jaxre.evaluation.metrics.scores import Confusion, Scores
from jaxre.evaluation.report.drawing import (
    BLUE,
    GREY,
    INK,
    ORANGE,
    bare,
    draw_confusion,
    plain,
    save,
)

CONFUSION_TITLE = (
    "Which relation is taken for which: a perfect model fills only the diagonal\n(numbers:"
    " examples; shade: share of the row)"
)

Curve = Sequence[tuple[int, float]]  # (step, loss)


@dataclass(frozen=True)
class System:
    """One row of the report. ours: the fine-tuned model; the other systems are for comparison."""

    name: str
    scores: Scores
    ours: bool = False
    note: str = ""


def summary_table(systems: Sequence[System], title: str = "Test split") -> Table:
    """F1, precision, recall, macro-F1 and accuracy of each system; marks the systems that ours does
    not beat.
    """
    table = Table(
        title=title,
        title_justify="left",
        caption="F1 counts correct relations; correct 'no relation' answers do not count.",
    )
    table.add_column("system")
    for column in ("F1", "precision", "recall", "macro-F1", "accuracy"):
        table.add_column(column, justify="right")
    table.add_column("note")
    best = max((system.scores.f1 for system in systems if system.ours), default=None)
    for system in systems:
        s = system.scores
        ahead = best is not None and not system.ours and s.f1 >= best
        flags = (
            "ours does not beat it" if ahead else "",
            "collapsed: one label for all" if s.collapsed else "",
        )
        note = "; ".join(part for part in (system.note, *flags) if part)
        cells = (f"{value:.3f}" for value in (s.f1, s.precision, s.recall, s.macro_f1, s.accuracy))
        table.add_row(Text(system.name), *cells, Text(note), style="bold" if system.ours else "")
    return table


def draw_report(
    folder: str | Path,
    systems: Sequence[System],
    train_loss: Curve,
    validation_loss: Curve = (),
    confusion: Confusion | None = None,
    title: str = "",
) -> list[Path]:
    """Writes `summary.png` (loss curves, F1 per system) and, with `confusion`, `confusion.png`.

    Args:
      folder: created if missing.
      systems: at least one, from the top of the picture down.
      train_loss, validation_loss: (step, mean loss per supervised token); either may be empty.

    Returns the paths. Raises InputError without systems.
    """
    if not systems:
        raise InputError("a report needs at least one system to show; give one")
    folder = Path(folder)
    paths = save(_summary(systems, train_loss, validation_loss, title), folder / "summary.png")
    if confusion is not None:
        paths += save(draw_confusion(confusion, CONFUSION_TITLE), folder / "confusion.png")
    return paths


def _summary(
    systems: Sequence[System], train_loss: Curve, validation_loss: Curve, title: str
) -> Figure:
    figure = Figure(figsize=(11, max(3.6, 1.6 + 0.5 * len(systems))), layout="constrained")
    if title:
        figure.suptitle(plain(title), x=0.01, ha="left", fontweight="bold", color=INK)
    curves, bars = figure.subplots(1, 2)

    bare(curves)
    curves.set_title("Training: the loss should fall", loc="left", fontsize=11, color=INK)
    curves.set_xlabel("step (one update of the weights)")
    curves.set_ylabel("loss per supervised token")
    for curve, name, style in (
        (train_loss, "training", {"color": BLUE}),
        (validation_loss, "validation", {"color": ORANGE, "marker": "o"}),
    ):
        if len(curve):
            steps, losses = zip(*curve, strict=True)
            curves.plot(steps, losses, linewidth=1.8, markersize=4, label=name, **style)
    if len(train_loss) or len(validation_loss):
        curves.set_ylim(bottom=0)
        curves.legend(frameon=False)
    else:
        curves.text(
            0.5, 0.5, "no training in this run", ha="center", color=GREY, transform=curves.transAxes
        )

    bare(bars)
    bars.set_title("F1 on the test split: higher is better", loc="left", fontsize=11, color=INK)
    values = [system.scores.f1 for system in systems]
    places = np.arange(len(systems))
    bars.barh(
        places, values, color=[BLUE if system.ours else GREY for system in systems], height=0.62
    )
    for place, value, system in zip(places, values, systems, strict=True):
        bars.text(
            value + 0.012,
            place,
            f"{value:.3f}",
            va="center",
            color=INK,
            fontweight="bold" if system.ours else "normal",
        )
    bars.set_yticks(places, [plain(system.name) for system in systems])
    bars.invert_yaxis()
    bars.set_xlim(0, 1.12)
    bars.set_xticks([0, 0.25, 0.5, 0.75, 1.0])
    bars.set_xlabel("positive-class micro-F1")
    return figure
