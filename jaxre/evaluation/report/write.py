"""`jaxre report`: the results of a study as one HTML page and as figures.

written = write_report("runs/study-small", figures="runs/study-small/report/figures")
print(written.page)
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from jaxre.evaluation.report.figures import draw_figures
from jaxre.evaluation.report.findings import collect
from jaxre.evaluation.report.page import render
from jaxre.evaluation.report.record import read_record
from jaxre.evaluation.report.study_scores import measure
from jaxre.evaluation.writing import replacing

PAGE = "report.html"


@dataclass(frozen=True)
class Written:
    """Output of `write_report`. closed: datasets without an open licence whose sentences the page
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
    """Writes the page, atomically, and the figures.

    Args:
      folder: of a study (record.py).
      output: path of the page; None is `report.html` in the study's folder.
      figures: folder of the PNG and PDF files; None draws no figures.
      public: leave out the sentences of datasets without an open licence.

    Raises:
      InputError: no study, a study that cannot be scored, or a path that cannot be written.
    """
    findings = collect(measure(read_record(folder)), public)
    page = Path(output) if output is not None else Path(folder) / PAGE
    # Half a surrogate pair, which JSON can hold, has no UTF-8 form and becomes a question mark.
    html = render(findings).encode("utf-8", "replace")
    with replacing(page, "name another file with --output") as partial:
        partial.write_bytes(html)
    drawn = draw_figures(findings, Path(figures)) if figures is not None else []
    shown = findings.disagreements.shown if findings.disagreements else ()
    return Written(
        page,
        tuple(drawn),
        tuple(dict.fromkeys(example.dataset for example in shown if not example.open_licence)),
    )
