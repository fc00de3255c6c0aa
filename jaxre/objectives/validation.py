"""What the validations of several objectives share."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from jaxre.config import Config
from jaxre.data.packing import plan_by_tokens
from jaxre.data.prefixes import find_prefixes
from jaxre.data.rows import Rows, fill_update
from jaxre.data.tokens import TokenSet
from jaxre.evaluation.metrics.scores import score
from jaxre.models import sharding
from jaxre.models.architecture import Architecture
from jaxre.models.kernels import ops_of
from jaxre.models.lora import model_of

Tree = Any


class PackedLoss:
    """The loss of a decoder on a fixed token set, packed once."""

    def __init__(
        self,
        config: Config,
        tokens: TokenSet,
        architecture: Architecture,
        dtype: np.dtype,
        mesh: jax.sharding.Mesh,
        loss_sum: Callable[..., jax.Array],
    ):
        self.sharding = sharding.row_sharding(mesh, leading=0)
        shards = sharding.row_shards(mesh)
        row_length = config.train.row_length
        pack = functools.partial(
            plan_by_tokens,
            tokens.lengths,
            tokens.supervised,
            find_prefixes(tokens),
            seed=0,
            epochs=1,
            row_length=row_length,
            accumulation=1,
        )
        # Batches of equal size, so that a split of few rows is not padded to a full batch.
        packed, limit = len(pack(rows=1).updates), max(1, config.predict.batch_tokens // row_length)
        rows = -(-packed // -(-packed // limit))
        plan = pack(rows=-(-rows // shards) * shards)
        self.batches = [
            Rows(*(array[0] for array in fill_update(tokens, plan.prefixes, update)))
            for update in plan.updates
        ]
        ops = ops_of(config.kernels, mesh)
        (shape,) = plan.shapes

        def batch_loss(trainable: Tree, base: Tree, rows: Rows) -> jax.Array:
            params, adapter = model_of(trainable, base, config, None, dtype)
            return loss_sum(params, adapter, rows, architecture, ops, shape)

        self.batch_loss = jax.jit(batch_loss, out_shardings=sharding.replicated(mesh))

    def total(self, trainable: Tree, base: Tree) -> float:
        """The loss summed over all supervised tokens."""
        return sum(
            float(self.batch_loss(trainable, base, sharding.put_rows(rows, self.sharding)))
            for rows in self.batches
        )


def label_figures(
    gold: Sequence[str], scores: np.ndarray, labels: Sequence[str]
) -> dict[str, float]:
    """Scores of the most probable labels; scores: [n, N]."""
    result = score(gold, [labels[best] for best in scores.argmax(axis=1)])
    return {"f1": result.f1, "accuracy": result.accuracy, "collapsed": result.collapsed}
