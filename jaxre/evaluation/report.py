"""`jaxre report`: what a study found, as one HTML page and as figures.

written = write_report("runs/study-small", figures="runs/study-small/report/figures")
print(written.page)
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from jaxre.errors import InputError
from jaxre.evaluation.report_data import collect
from jaxre.evaluation.report_figures import draw_figures
from jaxre.evaluation.report_page import render
from jaxre.evaluation.study_record import read_record
from jaxre.evaluation.study_scores import measure

PAGE = "report.html"


@dataclass(frozen=True)
class Written:
    """What `write_report` left. closed: datasets without an open licence whose sentences the page
    shows.
    """

    page: Path
    figures: tuple[Path, ...]
    closed: tuple[str, ...]


def write_report(
    folder: str | Path,
    output: str | Path | None = None,
    figures: str | Path | None = None,
    public: bool = False,
) -> Written:
    """Writes the page, whole or not at all, and the figures.

    Args:
      folder: of a study (study_record).
      output: the page; `report.html` in the study's folder if not given.
      figures: folder of the PNG and PDF files; none are drawn if not given.
      public: leave out the sentences of datasets without an open licence.

    Raises:
      InputError: no study, one that cannot be scored, or a place that cannot be written.
    """
    findings = collect(measure(read_record(folder)), public)
    page = Path(output) if output is not None else Path(folder) / PAGE
    write_text(page, render(findings))
    drawn = draw_figures(findings, Path(figures)) if figures is not None else []
    shown = findings.disagreements.shown if findings.disagreements else ()
    return Written(
        page,
        tuple(drawn),
        tuple(dict.fromkeys(one.dataset for one in shown if not one.open_licence)),
    )


def write_text(path: Path, text: str) -> None:
    """Writes a file whole or not at all. Raises InputError for one that cannot be written."""
    partial = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        # Half a surrogate pair, which JSON can hold, has no UTF-8 form: it is shown as a question
        # mark.
        partial.write_bytes(text.encode("utf-8", "replace"))
        partial.replace(path)
    except OSError as error:
        raise InputError(
            f"{path}: cannot be written ({error.strerror}); name another file with --output"
        ) from None
    finally:
        if partial.is_file():
            partial.unlink()
