"""Prepares updates ahead of time and puts them on the device in a Grain thread. Resuming needs only
the step number.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import grain

from jaxre.data.packing import Plan
from jaxre.data.rows import Rows, fill_update
from jaxre.data.tokens import TokenSet


def updates(
    examples: TokenSet,
    plan: Plan,
    first: int = 0,
    prompt_weight: float = 0.0,
    put: Callable[[Rows], Rows] = lambda rows: rows,
) -> Iterator[Rows]:
    """Rows of the updates `first`, `first + 1`, ... of the plan, prepared two updates ahead.

    Args:
      put: transfers host arrays to the devices; the thread calls it, so that no step waits for a
        transfer.
    """
    steps = grain.MapDataset.range(first, len(plan.updates)).map(
        lambda step: put(fill_update(examples, plan.prefixes, plan.updates[step], prompt_weight))
    )
    return iter(steps.to_iter_dataset(grain.ReadOptions(num_threads=1, prefetch_buffer_size=2)))
