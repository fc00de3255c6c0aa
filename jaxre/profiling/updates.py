"""Runs the updates of a run in an endless loop, to time them."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from jaxre.data.packing import Update
from jaxre.data.rows import Rows
from jaxre.host_memory import TemporaryMemory
from jaxre.training.setup import SetUp
from jaxre.training.step import Metrics


class Updates:
    """`run` updates on the rows that `next_rows` returned; the plan repeats after its last update.

    done: number of updates run.
    state: after these updates.
    """

    def __init__(self, setup: SetUp):
        self.setup = setup
        self.state = setup.take_state()
        self.done = 0
        device = setup.mesh.devices.flat[0]
        self._memory = TemporaryMemory(setup.temporary_bytes, device.platform, setup.mesh.size)
        self._metrics: Metrics | None = None
        self._rows: Iterator[Rows] = iter(())

    def next_rows(self) -> Rows:
        """The rows of the next update, on the devices."""
        for rows in self._rows:
            return rows
        self._rows = self.setup.rows(0, len(self.setup.plan.updates))
        return next(self._rows)

    def run(self, rows: Rows) -> Metrics:
        """Waits for the devices only where the training loop does."""
        plan, compiled = self.setup.plan, self.setup.compiled
        shape = plan.updates[self.done % len(plan.updates)].shape
        self._memory.wait(self._metrics)
        self.state, self._metrics = compiled.updates[shape](
            self.state, self.setup.initial.base, rows
        )
        self.done += 1
        return self._metrics

    def upcoming(self, count: int) -> np.ndarray:
        """The examples of the next `count` updates, in the order of their rows."""
        updates = self.setup.plan.updates
        return np.concatenate(
            [members(updates[n % len(updates)]) for n in range(self.done, self.done + count)]
        )


def members(update: Update) -> np.ndarray:
    """The examples of an update, in the order of its rows."""
    return np.fromiter(
        (example for rows in update.micro for row in rows for example in row), np.int64
    )
