"""Figures of a study as PNG and PDF: means, heat map, cost, size, prompt styles, confusion of the
best tuned system.

    paths = draw_figures(findings, Path("figures"))
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

from jaxre.evaluation.report.drawing import (
    BLUE,
    GREEN,
    GREY,
    INK,
    ORANGE,
    PURPLE,
    YELLOW,
    bare,
    draw_confusion,
    plain,
    save,
    slanted_ticks,
)
from jaxre.evaluation.report.findings import (
    KIND_TITLES,
    Findings,
    best_tuned,
    cividis,
    cost_points,
    dataset_title,
    in_units,
    scaling_points,
)
from jaxre.evaluation.report.study_scores import OVERALL
from jaxre.evaluation.report.tables import IN_BOTH

# Colour and marker of each kind: no kind is recognised by its colour alone.
KINDS = {
    "tuned": (BLUE, "o"),
    "adapted": (GREEN, "s"),
    "encoder": (PURPLE, "^"),
    "untuned": (GREY, "D"),
    "baseline": (INK, "X"),
    "frontier": (ORANGE, "v"),
}
# Rows of a figure; the page has all rows.
ROWS = 40


def draw_figures(findings: Findings, folder: Path) -> list[Path]:
    """Draws each figure that the study has data for, as NAME.png and NAME.pdf; returns the paths.
    Raises InputError.
    """
    drawers: dict[str, Callable[[Findings], Figure | None]] = {
        "means": _means,
        "heatmap": _heatmap,
        "cost": _cost,
        "scaling": _scaling,
        "prompts": _prompts,
    }
    figures = {name: draw(findings) for name, draw in drawers.items()}
    best = best_tuned(findings.study)
    for (system, dataset), confusion in findings.confusions.items():
        if system == best:
            name = f"confusion-{re.sub(r'[^A-Za-z0-9_.-]+', '-', dataset)}"
            where = f"{plain(system)} on {plain(dataset_title(dataset))}"
            title = f"{where}: a perfect system fills only the diagonal"
            figures[name] = draw_confusion(confusion, title)
    return [
        path
        for name, figure in figures.items()
        if figure
        for path in save(figure, folder / f"{name}.png", folder / f"{name}.pdf")
    ]


def _means(findings: Findings) -> Figure | None:
    candidates = (row for row in findings.rows if not row.style)
    shown = [
        (row, average)
        for row in candidates
        if (average := findings.average(row, OVERALL)) and average.value is not None
    ]
    # Means over fewer datasets do not compare with the others: they come last.
    rows = sorted(shown, key=lambda pair: (-len(pair[1].datasets), -pair[1].value))[:ROWS]
    if not rows:
        return None
    figure = Figure(figsize=(9, 1.6 + 0.3 * len(rows)), layout="constrained")
    axes = figure.subplots()
    bare(axes)
    for place, (row, average) in enumerate(rows):
        colour, marker = KINDS[row.kind]
        face = _face(row.source, colour)
        if average.low is not None:
            line = average.low, average.high
            axes.plot(line, [place, place], color=colour, linewidth=1.4, alpha=0.7)
        axes.plot(average.value, place, marker, color=colour, markerfacecolor=face, markersize=7)
    count = len(findings.study.groups[OVERALL])
    names = [
        plain(row.name, 48)
        + ("" if len(average.datasets) == count else f" ({len(average.datasets)} of {count})")
        for row, average in rows
    ]
    axes.set_yticks(range(len(rows)), names)
    for label, (row, _) in zip(axes.get_yticklabels(), rows, strict=True):
        label.set_style("italic" if row.source == "published" else "normal")
    axes.invert_yaxis()
    axes.grid(axis="x", color="#e4e4e4")
    axes.set_axisbelow(True)
    axes.set_xlabel("mean F1 over datasets (line: 95% interval, clustered by dataset)")
    more = f"; {len(shown) - ROWS} more on the page" if len(shown) > ROWS else ""
    axes.set_title(f"Which system finds relations best{more}", loc="left", color=INK)
    _legend(figure, [(row.kind, row.source) for row, _ in rows])
    return figure


def _heatmap(findings: Findings) -> Figure | None:
    rows, names = findings.measured[:ROWS], findings.study.groups[OVERALL]
    if not rows or not names:
        return None
    values = np.array(
        [[row.cells[name].f1 if name in row.cells else np.nan for name in names] for row in rows]
    )
    figure = Figure(figsize=(4.5 + 0.85 * len(names), 2.2 + 0.32 * len(rows)), layout="constrained")
    axes = figure.subplots()
    image = axes.imshow(values, cmap="cividis", vmin=0, vmax=1, aspect="auto")
    for (place, column), value in np.ndenumerate(values):
        if not np.isnan(value):
            cell = rows[place].cells[names[column]]
            marks = "!" * cell.broken + "°" * (cell.trained is False) + "*" * (not cell.comparable)
            axes.text(
                column,
                place,
                f"{value:.2f}{marks}",
                ha="center",
                va="center",
                color=cividis(value)[1],
                fontsize=8,
            )
    slanted_ticks(axes, [dataset_title(name) for name in names], 40)
    axes.set_yticks(range(len(rows)), [plain(row.name, 48) for row in rows])
    axes.spines[:].set_visible(False)
    axes.tick_params(length=0, colors=INK)
    axes.set_title("F1 of each system on each dataset", loc="left", color=INK)
    axes.set_xlabel(
        "°: not trained on it; !: broken answers; *: other labels or a part of the examples",
        fontsize=8,
        color=INK,
        loc="left",
    )
    figure.colorbar(image, ax=axes, shrink=0.6, label="F1")
    return figure


def _cost(findings: Findings) -> Figure | None:
    groups = (
        ("dollars", "USD per 1,000 answers"),
        ("hours", "hours of training"),
        ("milliseconds", "milliseconds per answer"),
    )
    panels = [
        (title, points)
        for group, title in groups
        if (points := [point for point in cost_points(findings) if point["group"] == group])
    ]
    if not panels:
        return None
    figure = Figure(figsize=(5 * len(panels), 4.2), layout="constrained")
    figure.subplots(1, len(panels))
    for axes, (title, points) in zip(figure.axes, panels, strict=True):
        _scatter(axes, points, title)
    figure.suptitle(
        "Cost against quality: up is better, left is cheaper", x=0.01, ha="left", color=INK
    )
    _legend(figure, [(point["kind"], point["source"]) for _, points in panels for point in points])
    for axes, (_, points) in zip(figure.axes, panels, strict=True):
        _label(figure, axes, points)
    return figure


def _scaling(findings: Findings) -> Figure | None:
    group = IN_BOTH if findings.shared else OVERALL
    points = [point for point in scaling_points(findings) if point["group"] == group]
    if not points:
        return None
    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.subplots()
    _scatter(axes, points, "parameters")
    title = "F1 against size" + (": datasets that the paper has too" if findings.shared else "")
    axes.set_title(title, loc="left", color=INK)
    _legend(figure, [(point["kind"], point["source"]) for point in points])
    _label(figure, axes, points)
    return figure


def _prompts(findings: Findings) -> Figure | None:
    if not findings.styles:
        return None
    styles = sorted({row.style for table in findings.styles for row in table.rows})
    figure = Figure(figsize=(8, 4.6), layout="constrained")
    axes = figure.subplots()
    bare(axes)
    colours = (BLUE, ORANGE, GREEN, PURPLE, YELLOW, INK)
    for index, table in enumerate(findings.styles):
        rows = [row for row in table.rows if row.average.value is not None]
        # Side by side, so that the intervals of several models can be distinguished.
        places = [
            styles.index(row.style) + 0.12 * (index - (len(findings.styles) - 1) / 2)
            for row in rows
        ]
        means = np.array([row.average.value for row in rows])
        ends = np.array([[row.average.low, row.average.high] for row in rows]).reshape(-1, 2).T
        axes.errorbar(
            places,
            means,
            np.abs(ends - means),
            fmt="os^Dv<>p"[index % 8],
            color=colours[index % len(colours)],
            elinewidth=1.2,
            label=plain(f"{table.model}, {table.setting}", 80),
        )
    slanted_ticks(axes, styles, 30)
    axes.grid(axis="y", color="#e4e4e4")
    axes.set_ylabel("mean F1 (line: 95% interval)")
    axes.set_title("The same question in several wordings", loc="left", color=INK)
    figure.legend(frameon=False, fontsize=8, loc="outside lower center")
    return figure


def _scatter(axes: Axes, points: Sequence[dict[str, Any]], title: str) -> None:
    bare(axes)
    for point in points:
        colour, marker = KINDS[point["kind"]]
        x, face = point["x"], _face(point["source"], colour)
        if point["low"] is not None:
            line = point["low"], point["high"]
            axes.plot([x, x], line, color=colour, linewidth=1.2, alpha=0.5)
        axes.plot(x, point["y"], marker, color=colour, markerfacecolor=face, markersize=8)
    if min(point["x"] for point in points) > 0:
        units = {"B": 1e9, "M": 1e6, "K": 1e3, "": 1}
        axes.set_xscale("log")
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: in_units(x, units, "g")))
        axes.xaxis.set_minor_locator(NullLocator())
        axes.margins(x=0.25)
    axes.grid(axis="y", color="#e4e4e4")
    axes.set_axisbelow(True)
    axes.set_xlabel(title)
    axes.set_ylabel("mean F1")


def _label(figure: Figure, axes: Axes, points: Sequence[dict[str, Any]]) -> None:
    """Writes the names of measured points where there is free space beside them; the page shows all
    names.
    """
    figure.draw_without_rendering()  # computes the layout, and with it the places below
    pixels = figure.dpi / 72  # per typographic point, the unit of all lengths below
    places = axes.transData.transform([(point["x"], point["y"]) for point in points]) / pixels
    taken = [(x - 4, y - 4, x + 4, y + 4) for x, y in places]
    left_end, right_end = axes.bbox.x0 / pixels, axes.bbox.x1 / pixels
    for point, (x, y) in zip(points, places, strict=True):
        if point["source"] != "measured":
            continue
        name = plain(point["name"], 34)
        width = 4.1 * len(name)  # of letters of 7 points
        for up, right in itertools.product((-2, 6, -10), (7, -7 - width)):
            area = (x + right, y + up, x + right + width, y + up + 7)
            crossed = any(
                area[0] < b[2] and b[0] < area[2] and area[1] < b[3] and b[1] < area[3]
                for b in taken
            )
            if not crossed and left_end < area[0] and area[2] < right_end:
                taken.append(area)
                axes.annotate(
                    name,
                    (point["x"], point["y"]),
                    (right, up),
                    textcoords="offset points",
                    fontsize=7,
                    color=INK,
                )
                break


def _legend(figure: Figure, shown: Sequence[tuple[str, str]]) -> None:
    """shown: (kind, source) of each point in the figure."""
    handles = [
        Line2D(
            [],
            [],
            color=colour,
            marker=marker,
            linestyle="none",
            markerfacecolor=_face(source, colour),
            label=f"{KIND_TITLES[kind]}, {source}",
        )
        for kind, (colour, marker) in KINDS.items()
        for source in ("measured", "published")
        if (kind, source) in shown
    ]
    figure.legend(handles=handles, frameon=False, fontsize=8, loc="outside lower center", ncols=3)


def _face(source: str, colour: str) -> str:
    return "white" if source == "published" else colour
