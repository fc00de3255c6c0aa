"""Report of a study as one self-contained HTML page: no network, no second file.

    html = render(findings)

Script and style of the page are in `assets/report`. Its content security policy allows only this
script, by digest, so that nothing in the data can run or be fetched; all data is escaped as well.
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
from jaxre.evaluation.metrics.strata import STRATA
from jaxre.evaluation.report.contrasts import Difference
from jaxre.evaluation.report.findings import (
    CONFUSION_LABELS,
    EXAMPLES,
    KIND_TITLES,
    REST,
    Findings,
    cividis,
    cost_points,
    dataset_title,
    in_units,
    page_data,
    scaling_points,
    scope_title,
    setting,
)
from jaxre.evaluation.report.prompt_effects import PromptSensitivity
from jaxre.evaluation.report.published import published
from jaxre.evaluation.report.slices import Slice
from jaxre.evaluation.report.study_scores import OVERALL
from jaxre.evaluation.report.tables import IN_BOTH, HeadlineRow

NOTHING = "–"
# Characters that are not safe in JSON inside a script element, and the two line ends that
# JavaScript has in addition to JSON's.
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
    """Renders the page."""
    folder = shipped("report")
    script, style, template = (
        (folder / name).read_text(encoding="utf-8") for name in ("page.js", "page.css", "page.html")
    )
    environment = Environment(
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    formats = (f1, points, count, share, parameters, size, duration, decimal, dataset_title)
    environment.filters.update({function.__name__: function for function in formats}, p=p_value)
    functions = (cividis, dataset_title, scope_title, setting, verdict, style_datasets)
    environment.globals.update(
        {function.__name__: function for function in functions},
        OVERALL=OVERALL,
        SHARED=IN_BOTH,
        STRATA=STRATA,
        KIND_TITLES=KIND_TITLES,
        EXAMPLES=EXAMPLES,
        REST=REST,
        nothing=NOTHING,
    )
    scaling = {point["group"] for point in scaling_points(findings)}
    compared = {row.scope for row in findings.comparisons}
    shown = findings.disagreements.shown if findings.disagreements else ()
    return environment.from_string(template).render(
        f=findings,
        script=Markup(script),
        script_digest=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
        style=Markup(style),
        data=Markup(json_text(page_data(findings))),
        sections=SECTIONS,
        closed=list(dict.fromkeys(row.dataset for row in shown if not row.open_licence)),
        glance=at_a_glance(findings),
        glossary=glossary(),
        source=published().source,
        kinds=[kind for kind in KIND_TITLES if any(row.kind == kind for row in findings.rows)],
        best=best_of_columns(findings),
        flagged=[(row, flags) for row in findings.rows if (flags := flags_of(row))],
        cost_panels=COST_PANELS,
        cost_groups={point["group"] for point in cost_points(findings)},
        scaling=[group for group in (OVERALL, *findings.domains, IN_BOTH) if group in scaling],
        hole_rows=[
            (row.name, *holes(table))
            for row in findings.measured
            if (table := findings.slices[row.name])
        ],
        scopes=[scope for scope in (OVERALL, *findings.study.groups[OVERALL]) if scope in compared],
        cut_labels=(
            CONFUSION_LABELS
            if any(REST in matrix.columns for matrix in findings.confusions.values())
            else 0
        ),
        asked=[row.name for row in findings.measured if row.cells],
    )


def at_a_glance(findings: Findings) -> list[str]:
    """Summarises the study in a few sentences: the best fine-tuned system and the best simple
    baseline, whichever wins, and the best frontier model.
    """
    datasets = findings.study.groups[OVERALL]
    over = f"over {len(datasets)} {'dataset' if len(datasets) == 1 else 'datasets'}"
    sentences: list[str] = []
    best: dict[str, HeadlineRow] = {}
    for kinds, words in (
        (("tuned", "adapted"), "fine-tuned system"),
        (("baseline",), "simple baseline"),
        (("frontier",), "frontier model"),
    ):
        rows = [row for row in findings.measured if row.kind in kinds and not row.style]
        full = [row for row in rows if findings.whole_average(row, OVERALL)]
        if not full:
            sentences.append(
                f"No {words} has a mean {over}." if rows else f"This study has no {words}."
            )
            continue
        best[words] = full[0]
        average = full[0].averages[OVERALL]
        interval = f"95% interval {average.low:.3f} to {average.high:.3f}"
        sentences.append(
            f"The best {words} is {full[0].name}: mean F1 {average.value:.3f} {over} ({interval})."
        )
    tuned, simple, frontier = (
        best.get(words) for words in ("fine-tuned system", "simple baseline", "frontier model")
    )
    if tuned and simple:
        ahead = tuned.averages[OVERALL].value - simple.averages[OVERALL].value
        which = "above" if ahead >= 0 else "below"
        sentences.append(
            f"The best fine-tuned system is {abs(ahead):.3f} {which} the best simple baseline."
        )
    tested = sum(row.p_holm is not None for row in findings.comparisons)
    comparisons = f"{tested} {'comparison' if tested == 1 else 'comparisons'}"
    for row in findings.comparisons:
        if (
            tuned
            and frontier
            and (row.first, row.second) == (tuned.name, frontier.name)
            and len(row.datasets) == len(datasets)
            and row.difference is not None
        ):
            sentences.append(
                f"On the same examples: {verdict(row, row.first, row.second)} (difference"
                f" {points(row.difference)}, 95% interval {points(row.low)} to {points(row.high)};"
                f" p {p_value(row.p_holm)} after Holm's correction for {comparisons})."
            )
    return sentences


def best_of_columns(findings: Findings) -> dict[str, str]:
    """Column (a dataset, or a group for its mean) -> name of the measured row with the highest
    value; only means over all datasets of their group count.
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
    """Faults in the answers of a row."""
    flags = (
        f"{dataset_title(name)}: {flag}" for name, cell in row.cells.items() for flag in cell.flags
    )
    return list(dict.fromkeys(flags))


def holes(table: Sequence[Slice]) -> tuple[int, int, Slice | None]:
    """Number of holes, number of slices, and the hole that is furthest below its whole."""
    low = [part for part in table if part.status == "hole"]
    return len(low), len(table), min(low, key=lambda part: part.difference, default=None)


def style_datasets(table: PromptSensitivity) -> list[str]:
    """Datasets of at least one style of a sensitivity table."""
    return list(dict.fromkeys(name for row in table.rows for name in row.f1))


def glossary() -> list[tuple[str, str, str]]:
    """(anchor, word, meaning), in alphabetical order."""
    terms = json.loads((shipped("report") / "glossary.json").read_text(encoding="utf-8"))
    return sorted(
        ((anchor, word, text) for anchor, (word, text) in terms.items()),
        key=lambda term: term[1].lower(),
    )


def json_text(value: Any) -> str:
    """JSON that is safe inside a script element."""
    return json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":")).translate(
        ESCAPES
    )


def f1(value: float | None) -> str:
    """A share in [0, 1], with three digits."""
    return NOTHING if value is None else f"{value:.3f}"


def points(value: float | None) -> str:
    """A difference with its sign; the minus sign is as wide as the plus sign."""
    return NOTHING if value is None else f"{value:+.3f}".replace("-", "\u2212")


def count(value: float | None) -> str:
    return NOTHING if value is None else f"{value:,}"


def share(value: float) -> str:
    return f"{100 * value:.0f}%"


def p_value(value: float | None) -> str:
    return NOTHING if value is None else "< 0.001" if value < 0.001 else f"{value:.3f}"


def parameters(value: float | None) -> str:
    """A number of parameters as in the names of models, such as 1.5B."""
    return NOTHING if value is None else in_units(value, {"B": 1e9, "M": 1e6, "K": 1e3}, ".3g")


def size(value: float | None) -> str:
    """Bytes in decimal units."""
    units = {" GB": 1e9, " MB": 1e6, " kB": 1e3, " B": 1}
    return NOTHING if value is None else in_units(value, units, ".3g")


def duration(seconds: float | None) -> str:
    units = {" h": 3600, " min": 60, " s": 1}
    return NOTHING if seconds is None else in_units(seconds, units, ".1f")


def decimal(value: float | None, digits: int = 2) -> str:
    return NOTHING if value is None else f"{value:,.{digits}f}"


def verdict(difference: Difference, first: str = "first", second: str = "second") -> str:
    """A comparison in words, at the 5% level, by the corrected p value if there is one."""
    p = difference.p if difference.p_holm is None else difference.p_holm
    if difference.difference is None or p is None:
        return "not comparable"
    if p >= 0.05:
        return "no clear difference"
    return f"{first if difference.difference > 0 else second} is better"
