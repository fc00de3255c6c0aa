"""The report of a study as one HTML page that needs nothing else: no network, no second file.

    html = render(findings)

The page's own script and style stand in `assets/report`. The policy in its head allows this script
alone, by its digest, so that nothing that got into the data could run or be fetched; and all data
is escaped besides.
"""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Sequence
from typing import Any

from jinja2 import Environment, StrictUndefined
from markupsafe import Markup

from jaxre.config import shipped
from jaxre.evaluation.published import published
from jaxre.evaluation.report_data import (
    CONFUSION_LABELS,
    EXAMPLES,
    KIND_TITLES,
    REST,
    Findings,
    cividis,
    cost_points,
    dataset_title,
    page_data,
    scaling_points,
    scope_title,
    setting,
)
from jaxre.evaluation.slices import Slice
from jaxre.evaluation.strata import STRATA
from jaxre.evaluation.study_contrasts import Difference
from jaxre.evaluation.study_scores import OVERALL
from jaxre.evaluation.study_tables import IN_BOTH, HeadlineRow

NOTHING = "–"
# What JSON may not hold inside of a script element, and the two line ends that JavaScript knows
# besides JSON's.
ESCAPES = {ord(character): f"\\u{ord(character):04x}" for character in "<>&\u2028\u2029"}

SECTIONS = {
    "glance": "At a glance",
    "data": "Data",
    "results": "Results",
    "heatmap": "Heat map",
    "cost": "Cost",
    "scaling": "Size",
    "prompts": "Prompts",
    "slices": "Slices",
    "significance": "Significance",
    "errors": "Errors",
    "confusion": "Confusion",
    "examples": "Examples",
    "footprint": "Footprint",
    "glossary": "Glossary",
}
# Group of `cost_points`, heading, axis.
COST_PANELS = (
    ("dollars", "What answers cost", "USD per 1,000 answers"),
    ("hours", "What training takes", "hours of training on this device"),
    ("milliseconds", "How long an answer takes", "milliseconds per answer"),
)


def render(findings: Findings) -> str:
    """The whole page."""
    folder = shipped("report")
    script, style, template = (
        (folder / name).read_text(encoding="utf-8") for name in ("page.js", "page.css", "page.html")
    )
    environment = Environment(
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    formats = (f1, points, count, share, parameters, size, duration, decimal, dataset_title)
    environment.filters.update({one.__name__: one for one in formats}, p=p_value)
    environment.globals.update(
        {
            one.__name__: one
            for one in (cividis, dataset_title, scope_title, setting, verdict, style_datasets)
        },
        **{
            "OVERALL": OVERALL,
            "SHARED": IN_BOTH,
            "STRATA": STRATA,
            "KIND_TITLES": KIND_TITLES,
            "EXAMPLES": EXAMPLES,
            "REST": REST,
        },
        nothing=NOTHING,
    )
    scaling, cost = (
        {point["group"] for point in found}
        for found in (scaling_points(findings), cost_points(findings))
    )
    shown = findings.disagreements.shown if findings.disagreements else ()
    return environment.from_string(template).render(
        f=findings,
        script=Markup(script),
        script_digest=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
        style=Markup(style),
        data=Markup(json_text(page_data(findings))),
        sections=SECTIONS,
        closed=list(dict.fromkeys(one.dataset for one in shown if not one.open_licence)),
        glance=at_a_glance(findings),
        glossary=glossary(),
        source=published().source,
        kinds=[kind for kind in KIND_TITLES if any(row.kind == kind for row in findings.rows)],
        best=best_of_columns(findings),
        flagged=[(row, found) for row in findings.rows if (found := flags_of(row))],
        cost_panels=COST_PANELS,
        cost_groups=cost,
        scaling=[group for group in (OVERALL, *findings.domains, IN_BOTH) if group in scaling],
        hole_rows=[
            (row.name, *holes(table))
            for row in findings.measured
            if (table := findings.slices[row.name])
        ],
        scopes=[
            scope
            for scope in (OVERALL, *findings.study.groups[OVERALL])
            if any(row.scope == scope for row in findings.comparisons)
        ],
        cut_labels=(
            CONFUSION_LABELS
            if any(REST in one.columns for one in findings.confusions.values())
            else 0
        ),
        asked=[row.name for row in findings.measured if row.cells],
    )


def at_a_glance(findings: Findings) -> list[str]:
    """The study in two or three sentences."""
    whole = findings.study.groups[OVERALL]
    sentences, best = [], []
    for kinds, words in (
        (("tuned", "adapted"), "fine-tuned system"),
        (("frontier",), "frontier model"),
    ):
        rows = [row for row in findings.measured if row.kind in kinds and not row.style]
        full = [row for row in rows if findings.whole_average(row, OVERALL)]
        over = f"over {len(whole)} {'dataset' if len(whole) == 1 else 'datasets'}"
        if not full:
            sentences.append(
                f"No {words} has a mean {over}." if rows else f"This study has no {words}."
            )
            continue
        best.append(full[0].name)
        average = full[0].averages[OVERALL]
        interval = f"95% interval {average.low:.3f} to {average.high:.3f}"
        sentences.append(
            f"The best {words} is {full[0].name}: mean F1 {average.value:.3f} {over} ({interval})."
        )
    tested = sum(row.p_holm is not None for row in findings.comparisons)
    comparisons = f"{tested} {'comparison' if tested == 1 else 'comparisons'}"
    for row in findings.comparisons:
        if (
            [row.first, row.second] == best
            and len(row.datasets) == len(whole)
            and row.difference is not None
        ):
            sentences.append(
                f"On the same examples: {verdict(row, *best)} (difference {points(row.difference)},"
                f" 95% interval {points(row.low)} to {points(row.high)}; p {p_value(row.p_holm)}"
                f" after Holm's correction for {comparisons})."
            )
    return sentences


def best_of_columns(findings: Findings) -> dict[str, str]:
    """Column (a dataset, or a group for its mean) -> the measured row with its highest value; means
    of all their datasets alone count.
    """
    best: dict[str, tuple[float, str]] = {}
    for row in findings.measured:
        values = {
            name: cell.f1 for name, cell in row.cells.items() if cell.comparable and not cell.broken
        }
        for group in (*findings.study.groups, *((IN_BOTH,) if findings.shared else ())):
            if average := findings.whole_average(row, group):
                values[group] = average.value
        for column, value in values.items():
            best[column] = max(best.get(column, (-1.0, "")), (value, row.name))
    return {column: name for column, (_, name) in best.items()}


def flags_of(row: HeadlineRow) -> list[str]:
    """What is wrong with the answers of a row."""
    return list(
        dict.fromkeys(
            f"{dataset_title(name)}: {flag}"
            for name, cell in row.cells.items()
            for flag in cell.flags
        )
    )


def holes(table: Sequence[Slice]) -> tuple[int, int, Slice | None]:
    """How many slices are holes, of how many, and the one that lies deepest below its whole."""
    found = [one for one in table if one.status == "hole"]
    return len(found), len(table), min(found, key=lambda one: one.difference, default=None)


def style_datasets(table) -> list[str]:
    """The datasets that any style of a sensitivity table was asked."""
    return list(dict.fromkeys(name for row in table.rows for name in row.f1))


def glossary() -> list[tuple[str, str, str]]:
    """(anchor, word, what it means), in the order of the alphabet."""
    terms = json.loads((shipped("report") / "glossary.json").read_text(encoding="utf-8"))
    return sorted(
        ((anchor, word, text) for anchor, (word, text) in terms.items()),
        key=lambda one: one[1].lower(),
    )


def json_text(value: Any) -> str:
    """JSON that can stand inside of a script element."""
    return json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":")).translate(
        ESCAPES
    )


def f1(value: float | None) -> str:
    """A share of one: three digits."""
    return NOTHING if value is None else f"{value:.3f}"


def points(value: float | None) -> str:
    """A difference with its sign; the minus is as wide as the plus."""
    return NOTHING if value is None else f"{value:+.3f}".replace("-", "\u2212")


def count(value: float | None) -> str:
    return NOTHING if value is None else f"{value:,}"


def share(value: float) -> str:
    return f"{100 * value:.0f}%"


def p_value(value: float | None) -> str:
    return NOTHING if value is None else "< 0.001" if value < 0.001 else f"{value:.3f}"


def parameters(value: float | None) -> str:
    """Millions and billions as model names have them."""
    if value is None:
        return NOTHING
    return (
        f"{value / 1e9:.3g}B"
        if value >= 1e9
        else f"{value / 1e6:.3g}M"
        if value >= 1e6
        else f"{value / 1e3:.3g}K"
    )


def size(value: float | None) -> str:
    """Bytes in decimal units."""
    if value is None:
        return NOTHING
    for unit, factor in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if value >= factor:
            return f"{value / factor:.3g} {unit}"
    return f"{value:.0f} B"


def duration(seconds: float | None) -> str:
    if seconds is None:
        return NOTHING
    return (
        f"{seconds / 3600:.1f} h"
        if seconds >= 3600
        else f"{seconds / 60:.1f} min"
        if seconds >= 60
        else f"{seconds:.1f} s"
    )


def decimal(value: float | None, digits: int = 2) -> str:
    return NOTHING if value is None else f"{value:,.{digits}f}"


def verdict(difference: Difference, first: str = "first", second: str = "second") -> str:
    """A comparison in words, at the 5% level, by the corrected p value where there is one."""
    p = difference.p if difference.p_holm is None else difference.p_holm
    if difference.difference is None or p is None:
        return "not comparable"
    if p >= 0.05:
        return "no clear difference"
    return f"{first if difference.difference > 0 else second} is better"
