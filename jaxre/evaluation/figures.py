"""What all figures share: colours that stay apart for colour-blind readers and in grey, bare axes,
plain text, saving.

figure = Figure(layout="constrained")
bare(figure.subplots())
save(figure, Path("figure.png"), Path("figure.pdf"))
"""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from jaxre.errors import InputError
from jaxre.evaluation.metrics import Confusion

# Okabe & Ito 2008.
BLUE, ORANGE, GREEN, PURPLE, SKY, YELLOW = (
    "#0072B2",
    "#D55E00",
    "#009E73",
    "#CC79A7",
    "#56B4E9",
    "#E69F00",
)
GREY, INK = "#9A9A9A", "#333333"


def bare(axes: Axes) -> None:
    """No frame on top and at the right."""
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(colors=INK)


def plain(text: str, longest: int = 40) -> str:
    """Text for matplotlib, which reads what stands between two dollar signs as mathematics."""
    text = text.replace("$", r"\$")
    return text if len(text) <= longest else text[: longest - 3] + "..."


def draw_confusion(confusion: Confusion, title: str) -> Figure:
    """Counts as text, each row shaded by its shares."""
    counts = confusion.counts
    rows, columns = counts.shape
    shares = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    cell = min(0.52, 20 / columns)  # inches; a hundred labels still fit a screen when zoomed
    figure = Figure(
        figsize=(max(6.5, 4.0 + cell * columns), 3.0 + cell * rows), layout="constrained"
    )
    axes = figure.subplots()
    axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    for row in range(rows):
        for column in range(columns):
            if counts[row, column]:
                colour = "white" if shares[row, column] > 0.55 else INK
                axes.text(
                    column,
                    row,
                    f"{counts[row, column]}",
                    ha="center",
                    va="center",
                    color=colour,
                    fontsize=15 * cell,
                )
    axes.set_xticks(
        range(columns),
        [plain(label) for label in confusion.columns],
        rotation=45,
        ha="right",
        rotation_mode="anchor",
    )
    axes.set_yticks(range(rows), [plain(label) for label in confusion.labels])
    axes.set_xlabel("predicted")
    axes.set_ylabel("gold")
    axes.set_title(title, fontsize=10, color=INK)
    axes.spines[:].set_visible(False)
    axes.tick_params(length=0)
    return figure


def save(figure: Figure, *paths: Path) -> list[Path]:
    """Writes a figure in the format of each path's suffix, whole or not at all. Raises InputError
    for a place that cannot be written.
    """
    FigureCanvasAgg(figure)  # no display, and no global pyplot state
    for path in paths:
        partial = path.with_name(f".{path.name}.{os.getpid()}.part")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            figure.savefig(partial, dpi=150, format=path.suffix.removeprefix("."))
            partial.replace(path)
        except OSError as error:
            raise InputError(
                f"{path}: cannot be written ({error.strerror}); give another folder"
            ) from None
        finally:
            if partial.is_file():
                partial.unlink()
    return list(paths)
