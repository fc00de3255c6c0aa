"""Progress of a prediction: a bar on a terminal, a line a minute elsewhere."""

from __future__ import annotations

import time

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

EVERY = 60.0  # seconds between lines where there is no terminal


class Counter:
    """Counts answered examples; shows their number, the rate since the start and the time that is
    left at that rate.

    Args:
      known: answered before this process.
    """

    def __init__(self, console: Console, total: int, known: int = 0):
        self.console, self.total, self.known = console, total, known
        self.done, self.start = known, time.monotonic()
        self.said = self.start
        columns = (BarColumn(), MofNCompleteColumn(), TextColumn("{task.description}"))
        self.bar = Progress(*columns, console=console, transient=True)

    def __enter__(self) -> Counter:
        self.bar.start()
        self.task = self.bar.add_task("examples", total=self.total, completed=self.known)
        self.start = self.said = time.monotonic()
        return self

    def __exit__(self, *error: object) -> None:
        self.bar.stop()

    def advance(self, examples: int) -> None:
        """Adds examples that have been answered."""
        self.done += examples
        words = self.words(time.monotonic())
        self.bar.update(self.task, completed=self.done, description=words)
        if not self.console.is_terminal and time.monotonic() - self.said >= EVERY:
            self.said = time.monotonic()
            self.console.print(f"{self.done:,} of {self.total:,} {words}", markup=False)

    def words(self, now: float) -> str:
        """Such as "examples, 6.9/s, 5 min 33 s left"."""
        rate = (self.done - self.known) / max(now - self.start, 1e-9)
        left = max(0, round((self.total - self.done) / rate)) if rate else 0
        minutes, seconds = divmod(left, 60)
        return f"examples, {rate:.3g}/s, {f'{minutes} min ' if minutes else ''}{seconds} s left"
