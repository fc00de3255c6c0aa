"""The scores behind every table of a study: each system on each dataset, read and resampled once.

study = measure(read_record("runs/study-small"))
cell = study.cell("qwen-gentune-2shot", "gids")
cell.scores.f1, cell.interval, cell.flags
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from jaxre.evaluation.metrics import Scores
from jaxre.evaluation.rows import Row
from jaxre.evaluation.significance import RESAMPLES, SEED, Interval
from jaxre.evaluation.study_record import StudyRecord

OVERALL = "overall"


@dataclass(frozen=True)
class Cell:
    """One system on one dataset.

    ids, gold, predicted: of the answered examples, in the dataset's order; asked: its number of examples.
    flags: what is wrong with the answers as a whole; broken: so wrong that their F1 must not go into an average.
    """

    system: str
    dataset: str
    domain: str
    asked: int
    ids: tuple[str, ...]
    gold: tuple[str, ...]
    predicted: tuple[str, ...]
    scores: Scores
    interval: Interval
    flags: tuple[str, ...]
    broken: bool


@dataclass(frozen=True)
class Average(Row):
    """Unweighted mean of F1 over the datasets of a group, with the 95% interval of the bootstrap clustered over datasets.

    value, low, high are None where nothing was asked, and where a dataset is `broken`: its flags say why.
    datasets: in the mean; missing: of the group, not asked of this system, so that the mean is of fewer datasets than others' are.
    flags: of its cells, each as "dataset: flag".
    """

    value: float | None
    low: float | None
    high: float | None
    datasets: tuple[str, ...]
    missing: tuple[str, ...]
    broken: tuple[str, ...]
    flags: tuple[str, ...]


@dataclass(frozen=True)
class StudyScores:
    """Cells by (system name, dataset name); a system has none where it was not asked."""

    record: StudyRecord
    cells: dict[tuple[str, str], Cell]
    resamples: int
    seed: int

    @cached_property
    def groups(self) -> dict[str, tuple[str, ...]]:
        """Domain -> its datasets, then "overall" -> all."""
        raise NotImplementedError

    def cell(self, system: str, dataset: str) -> Cell | None:
        return self.cells.get((system, dataset))

    def average(self, system: str, group: str) -> Average:
        """Over the datasets of a domain or OVERALL."""
        raise NotImplementedError


def measure(record: StudyRecord, resamples: int = RESAMPLES, seed: int = SEED) -> StudyScores:
    """Reads, checks, scores and resamples every predictions file of a study.

    Rows are joined to the examples by id, else by prompt hash. Raises InputError: a file that cannot be read, a row of an example that
    the study does not have, a gold label that differs from the example's, two systems of one name.
    """
    raise NotImplementedError
