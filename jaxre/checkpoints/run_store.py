"""The checkpoints of a run: Orbax, written in the background, the best and the latest kept.

A checkpoint that was being written when the process died is never finalised and never restored.
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
      keep: how many of the latest are kept, beside the best.
      best: "f1" (highest) or "loss" (lowest), among the checkpoints that were validated.
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
        """Step of the latest whole checkpoint."""
        return self.manager.latest_step()

    @property
    def best_step(self) -> int | None:
        """Step of the best checkpoint; the latest if none was validated."""
        best = self.manager.best_step()
        return self.latest if best is None else best

    def save(self, step: int, state: Any, metrics: dict[str, float] | None) -> None:
        """Starts writing; returns once the state is copied off the devices, so that it may be
        donated.

        On CPU nothing is copied: the writer holds the buffers, and XLA does not reuse a held buffer
        that is donated.
        """
        self.manager.save(step, args=ocp.args.StandardSave(_stored(state)), metrics=metrics)

    def restore(self, step: int, like: Any) -> Any:
        """The state of `step`, in the shapes, dtypes and shardings of `like` (arrays or shapes),
        whatever mesh it was saved from.
        """
        leaves, form = jax.tree.flatten(shapes_of(like))
        restored = iter(
            jax.tree.leaves(
                self.manager.restore(
                    step, args=ocp.args.StandardRestore(_stored(form.unflatten(leaves)))
                )
            )
        )
        return form.unflatten(next(restored) if leaf.size else _empty(leaf) for leaf in leaves)

    def wait(self) -> None:
        """Returns when everything is on disk."""
        self.manager.wait_until_finished()

    def close(self) -> None:
        self.manager.close()


def shapes_of(state: Any) -> Any:
    """Shapes, dtypes and shardings of a state, without its arrays."""
    return jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding), state
    )


def _stored(state: Any) -> Any:
    """TensorStore holds no empty array: the stack of a model of one layer is left out."""
    return jax.tree.map(lambda leaf: leaf if leaf.size else None, state)


def _empty(leaf: jax.ShapeDtypeStruct) -> jax.Array:
    return jax.make_array_from_callback(
        leaf.shape, leaf.sharding, lambda index: np.zeros(leaf.shape, leaf.dtype)[index]
    )
