"""Checkpoints of a run, written by Orbax in the background; the best and the latest are retained.

A checkpoint that was incomplete when the process died is never restored.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from orbax.checkpoint.checkpoint_managers import preservation_policy


class RunStore:
    """Checkpoints under `folder`.

    Args:
      keep: number of latest checkpoints to retain, beside the best.
      best: "f1" (highest) or "loss" (lowest), among the validated checkpoints.
    """

    def __init__(self, folder: Path, keep: int, best: str):
        self.best = best
        policy = preservation_policy.AnyPreservationPolicy(
            [
                preservation_policy.LatestN(keep),
                preservation_policy.BestN(
                    get_metric_fn=self._score, n=1, keep_checkpoints_without_metrics=False
                ),
            ]
        )
        options = ocp.CheckpointManagerOptions(
            preservation_policy=policy,
            best_fn=self._score,
            best_mode="max",
            enable_async_checkpointing=True,
            cleanup_tmp_directories=True,
        )
        self.manager = ocp.CheckpointManager(folder.absolute(), options=options)

    def _score(self, metrics: dict[str, float]) -> float:
        return metrics["f1"] if self.best == "f1" and "f1" in metrics else -metrics["loss"]

    @property
    def latest(self) -> int | None:
        """Step of the latest complete checkpoint."""
        return self.manager.latest_step()

    @property
    def best_step(self) -> int | None:
        """Step of the best checkpoint; the latest if none was validated."""
        best = self.manager.best_step()
        return self.latest if best is None else best

    def save(self, step: int, state: Any, metrics: dict[str, float] | None) -> None:
        """Starts writing; returns once the state is copied off the devices and may be donated.

        On CPU nothing is copied: the writer holds the buffers, and XLA does not reuse a donated
        buffer that is held.
        """
        self.manager.save(step, args=ocp.args.StandardSave(_without_empty(state)), metrics=metrics)

    def restore(self, step: int, like: Any) -> Any:
        """The state of `step`, in the shapes, dtypes and shardings of `like` (arrays or shapes),
        whatever mesh it was saved from.
        """
        leaves, structure = jax.tree.flatten(shapes_of(like))
        target = _without_empty(structure.unflatten(leaves))
        state = self.manager.restore(step, args=ocp.args.StandardRestore(target))
        restored = iter(jax.tree.leaves(state))
        return structure.unflatten(next(restored) if leaf.size else _empty(leaf) for leaf in leaves)

    def wait(self) -> None:
        """Waits until everything is on disk."""
        self.manager.wait_until_finished()

    def close(self) -> None:
        self.manager.close()


def shapes_of(state: Any) -> Any:
    """Shapes, dtypes and shardings of a state, without its arrays."""
    return jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding), state
    )


def _without_empty(state: Any) -> Any:
    """Omits empty arrays (the stack of a one-layer model), which TensorStore cannot store."""
    return jax.tree.map(lambda leaf: leaf if leaf.size else None, state)


def _empty(leaf: jax.ShapeDtypeStruct) -> jax.Array:
    return jax.make_array_from_callback(
        leaf.shape, leaf.sharding, lambda index: np.zeros(leaf.shape, leaf.dtype)[index]
    )
