"""Prediction on several hosts: each process predicts its share, the rows are joined in order.

    rows = join_rows(predict(share_of(examples)))

A process loads the whole model and predicts with the first of its own devices.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Sequence
from dataclasses import asdict
from typing import TypeVar

import jax
import numpy as np
from jax.experimental import multihost_utils

from jaxre.evaluation.predictions import Prediction

Item = TypeVar("Item")


def share_of(items: Sequence[Item]) -> list[Item]:
    """The items of this process: every n-th of n processes, so that long and short ones mix."""
    return list(items[jax.process_index() :: jax.process_count()])


def wait_for_all(event: str) -> None:
    """Returns when every process has reached this event."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(event)


def join_rows(rows: Sequence[Prediction]) -> list[Prediction]:
    """The rows of the shares of all processes, in the order of the items, on every process."""
    if jax.process_count() == 1:
        return list(rows)
    text = json.dumps([asdict(row) for row in rows]).encode("ascii")
    lengths = multihost_utils.process_allgather(np.array([len(text)])).ravel()
    padded = np.zeros(lengths.max(), np.uint8)
    padded[: len(text)] = np.frombuffer(text, np.uint8)
    gathered = multihost_utils.process_allgather(padded)  # processes, bytes
    shares = [
        [Prediction(**row) for row in json.loads(share[:length].tobytes())]
        for share, length in zip(gathered, lengths, strict=True)
    ]
    dealt = itertools.chain.from_iterable(itertools.zip_longest(*shares))
    return [row for row in dealt if row is not None]
