"""The report of a study as one HTML page that needs nothing else: no network, no second file.

    html = render(findings)

The page's own script and style stand in `assets/report`. The policy in its head allows this script alone, by its digest, so that
nothing that got into the data could run or be fetched; and all data is escaped besides.
"""

from __future__ import annotations

import base64
import hashlib
import json
from typing import Any

from jinja2 import Environment, StrictUndefined
from markupsafe import Markup

from jaxre.config import shipped
from jaxre.evaluation.report_data import (
    EXAMPLES,
    KIND_TITLES,
    REST,
    Findings,
    cividis,
    dataset_title,
    overall,
    page_data,
    scope_title,
    setting,
)
from jaxre.evaluation.strata import STRATA
from jaxre.evaluation.study_scores import OVERALL

NOTHING = "–"
# What JSON may not hold inside of a script element, and the two line ends that JavaScript knows besides JSON's.
ESCAPES = {ord(character): f"\\u{ord(character):04x}" for character in "<>&\u2028\u2029"}


def render(findings: Findings) -> str:
    """The whole page."""
    folder = shipped("report")
    script, style, template = ((folder / name).read_text(encoding="utf-8") for name in ("page.js", "page.css", "page.html"))
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters.update(
        f1=f1, points=points, count=count, share=share, p=p_value, parameters=parameters, size=size, duration=duration, decimal=decimal
    )
    environment.globals.update(
        cividis=cividis, dataset_title=dataset_title, scope_title=scope_title, setting=setting, overall=overall, verdict=verdict, nothing=NOTHING
    )
    return environment.from_string(template).render(
        f=findings,
        script=Markup(script),
        script_digest=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
        style=Markup(style),
        data=Markup(json_text(page_data(findings))),
        OVERALL=OVERALL,
        STRATA=STRATA,
        KIND_TITLES=KIND_TITLES,
        EXAMPLES=EXAMPLES,
        REST=REST,
    )


def json_text(value: Any) -> str:
    """JSON that can stand inside of a script element."""
    return json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":")).translate(ESCAPES)


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
    return f"{value / 1e9:.3g}B" if value >= 1e9 else f"{value / 1e6:.3g}M" if value >= 1e6 else f"{value / 1e3:.3g}K"


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
    return f"{seconds / 3600:.1f} h" if seconds >= 3600 else f"{seconds / 60:.1f} min" if seconds >= 60 else f"{seconds:.1f} s"


def decimal(value: float | None, digits: int = 2) -> str:
    return NOTHING if value is None else f"{value:,.{digits}f}"


def verdict(difference) -> str:
    """A comparison in words, at the 5% level, by the corrected p value where there is one."""
    p = difference.p if difference.p_holm is None else difference.p_holm
    if difference.difference is None or p is None:
        return "not comparable"
    if p >= 0.05:
        return "no clear difference"
    return "first is better" if difference.difference > 0 else "second is better"
