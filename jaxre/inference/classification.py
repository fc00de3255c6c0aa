"""An encoder's label probabilities for many examples, packed.

    plan = plan_classification(tokens, row_length=128, batch_tokens=8192)
    scores = run_classification(params, architecture, plan)      # [n, N] log-probabilities

Letters: B rows, S first tokens of examples in a row, N labels, n examples.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from jaxre.data.packing import Update, plan_by_tokens
from jaxre.data.prefixes import Prefixes, find_prefixes
from jaxre.data.rows import Rows, fill_rows
from jaxre.data.tokens import TokenSet
from jaxre.errors import InputError
from jaxre.models.architecture import EncoderArchitecture
from jaxre.models.encoder import Tree, classify
from jaxre.models.ops import Ops
from jaxre.models.sharding import put_rows

ROW_MULTIPLE = 64


@dataclass(frozen=True)
class ClassificationPlan:
    """The assignment of examples to rows and batches of one shape; a plan can run repeatedly."""

    tokens: TokenSet
    batches: tuple[Update, ...]
    prefixes: Prefixes
    sharding: NamedSharding | None


def plan_classification(
    tokens: TokenSet,
    architecture: EncoderArchitecture,
    *,
    batch_tokens: int,
    shards: int = 1,
    sharding: NamedSharding | None = None,
) -> ClassificationPlan:
    """Packs the examples, which must have labels (any, where they are not known), into batches of
    about `batch_tokens`.

    Args:
      sharding: of [B, ...] arrays over a mesh, if the weights are on one, whose rows `shards`
        devices share.

    Raises:
      InputError: no example, or one that is longer than the model reads.
    """
    if not len(tokens):
        raise InputError("there is no example to classify; is the split empty?")
    longest = int(tokens.lengths.max())
    if longest > architecture.max_length:
        over = [
            name
            for name, length in zip(tokens.ids, tokens.lengths, strict=True)
            if length > architecture.max_length
        ]
        raise InputError(
            f"{len(over)} of {len(tokens)} examples take more than the {architecture.max_length}"
            f" tokens that the model reads (up to {longest}):"
            f" {', '.join(over[:5])}{', ...' if over[5:] else ''}; shorten or leave them out"
        )
    row_length = -(-longest // ROW_MULTIPLE) * ROW_MULTIPLE
    prefixes = find_prefixes(tokens)

    def pack(rows: int) -> tuple[Update, ...]:
        plan = plan_by_tokens(
            tokens.lengths,
            tokens.supervised,
            prefixes,
            seed=0,
            epochs=1,
            row_length=row_length,
            rows=rows,
            accumulation=1,
        )
        return plan.updates

    # Batches of equal size: a split of few rows is not padded to a whole batch.
    packed, most = len(pack(1)), max(1, batch_tokens // row_length)
    rows = -(-packed // -(-packed // most))
    return ClassificationPlan(tokens, pack(-(-rows // shards) * shards), prefixes, sharding)


def run_classification(
    params: Tree,
    architecture: EncoderArchitecture,
    plan: ClassificationPlan,
    on_results: Callable[[dict[int, np.ndarray]], None] = lambda scores: None,
) -> np.ndarray:
    """Log-probability of every label for every example, [n, N] f64.

    Args:
      on_results: called with example -> [N] log-probabilities after each batch.
    """
    scores = np.zeros((len(plan.tokens), len(architecture.labels)))
    for batch in plan.batches:
        (packed,) = batch.micro
        rows = put_rows(fill_rows(plan.tokens, plan.prefixes, packed, batch.shape), plan.sharding)
        # B S N
        found = np.asarray(
            log_probabilities(params, rows, architecture=architecture, sharding=plan.sharding)
        )
        for b, row in enumerate(packed):
            scores[list(row)] = found[b, : len(row)]
        on_results({example: scores[example] for row in packed for example in row})
    return scores


@functools.partial(jax.jit, static_argnames=("architecture", "sharding"))
def log_probabilities(
    params: Tree,
    rows: Rows,
    *,
    architecture: EncoderArchitecture,
    sharding: NamedSharding | None = None,
) -> jax.Array:
    """[B, S, N] f32 log-softmax of the label logits at the rows' supervised positions."""
    ops = (
        Ops() if sharding is None else Ops(lambda x: jax.lax.with_sharding_constraint(x, sharding))
    )
    logits = classify(
        params,
        rows.tokens,
        rows.positions,
        rows.visible_until,
        rows.supervised,
        architecture,
        ops=ops,
    )
    result = jax.nn.log_softmax(logits, axis=-1)
    return (
        result
        if sharding is None
        else jax.lax.with_sharding_constraint(result, NamedSharding(sharding.mesh, PartitionSpec()))
    )
