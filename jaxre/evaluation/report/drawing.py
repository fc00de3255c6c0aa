"""Drawing functions shared by all figures: bare axes, plain text, saving, and colours that are
distinct for colour-blind readers and in grey.

    figure = Figure(layout="constrained")
    bare(figure.subplots())
    save(figure, Path("figure.png"), Path("figure.pdf"))
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from jaxre.evaluation.metrics.scores import Confusion
from jaxre.evaluation.writing import replacing

# Okabe & Ito 2008.
BLUE, ORANGE, GREEN = "#0072B2", "#D55E00", "#009E73"
PURPLE, YELLOW = "#CC79A7", "#E69F00"
GREY, INK = "#9A9A9A", "#333333"


def bare(axes: Axes) -> None:
    """Removes the frame at the top and at the right."""
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(colors=INK)


def plain(text: str, longest: int = 40) -> str:
    """Shortens text and escapes `$`: matplotlib reads text between two of them as mathematics."""
    text = text.replace("$", r"\$")
    return text if len(text) <= longest else text[: longest - 3] + "..."


def slanted_ticks(axes: Axes, names: Sequence[str], degrees: float) -> None:
    """Labels the ticks 0, 1, ... of the x axis with slanted names."""
    slanted = {"rotation": degrees, "ha": "right", "rotation_mode": "anchor"}
    axes.set_xticks(range(len(names)), [plain(name) for name in names], **slanted)


def draw_confusion(confusion: Confusion, title: str) -> Figure:
    """Draws the counts as text and shades each cell by its share of the row."""
    counts = confusion.counts
    rows, columns = counts.shape
    shares = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    cell = min(0.52, 20 / columns)  # inches; a hundred labels still fit a screen when zoomed
    figure = Figure(
        figsize=(max(6.5, 4.0 + cell * columns), 3.0 + cell * rows), layout="constrained"
    )
    axes = figure.subplots()
    axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    centred = {"ha": "center", "va": "center", "fontsize": 15 * cell}
    for row, column in np.argwhere(counts):
        colour = "white" if shares[row, column] > 0.55 else INK
        axes.text(column, row, f"{counts[row, column]}", color=colour, **centred)
    slanted_ticks(axes, confusion.columns, 45)
    axes.set_yticks(range(rows), [plain(label) for label in confusion.labels])
    axes.set_xlabel("predicted")
    axes.set_ylabel("gold")
    axes.set_title(title, fontsize=10, color=INK)
    axes.spines[:].set_visible(False)
    axes.tick_params(length=0)
    return figure


def save(figure: Figure, *paths: Path) -> list[Path]:
    """Writes a figure in the format of each path's suffix, each file atomically. Raises InputError
    for a path that cannot be written.
    """
    FigureCanvasAgg(figure)  # no display, and no global pyplot state
    for path in paths:
        with replacing(path, "give another folder") as partial:
            figure.savefig(partial, dpi=150, format=path.suffix.removeprefix("."))
    return list(paths)
