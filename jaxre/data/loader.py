"""Updates prepared and put on the device ahead by a Grain thread. Resume needs only the step
number.
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
    ahead: int = 2,
) -> Iterator[Rows]:
    """Rows of the updates `first`, `first + 1`, ... of the plan.

    Args:
      put: host arrays to where the update reads them; called by the thread, so that a step waits
        for no transfer.
      ahead: updates prepared and put before they are asked for.
    """
    steps = grain.MapDataset.range(first, len(plan.updates)).map(
        lambda step: put(fill_update(examples, plan.prefixes, plan.updates[step], prompt_weight))
    )
    return iter(steps.to_iter_dataset(grain.ReadOptions(num_threads=1, prefetch_buffer_size=ahead)))
