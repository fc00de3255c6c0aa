"""Exact label scoring: the log-probability of every label of the schema in one packed forward pass.

    prompts, answers = label_answers(template, questions, labels)
    scores = score_labels(model, prompts, answers)      # [N, labels] log-probabilities
    shares = probabilities(scores)                      # [N, labels], each row sums to 1

The score of a label is the sum of the log-probabilities of its tokens and of the end-of-turn token
after them, as tokenised inside the chat template; so a label that begins another one
is distinguished by its end. Prompt and labels of an example are one tree (`trees.py`): the prompt
is computed once for all labels, a beginning that labels share once for those. Several trees are
packed in a row without the prefix that all their prompts share, which is computed once
(`prefix.py`).
For the best label alone see `search.py`.

Letters: B rows, T tokens in a row, S predicting positions in a row, W targets of a position,
D embedding, V vocabulary, N examples.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from jaxre.config import Kernels
from jaxre.inference.answers import label_answers
from jaxre.inference.model import Model, adapter_of, on_device
from jaxre.inference.prefix import prefixes_of
from jaxre.inference.tree_rows import ScoringPlan, TreeRows, fill_trees, plan_scoring
from jaxre.inference.trees import Answers
from jaxre.models.architecture import Architecture
from jaxre.models.decoder import Prefix, Tree, forward, head
from jaxre.models.kernels import ops_of
from jaxre.models.ops import ONE_DEVICE
from jaxre.models.sharding import put_rows

__all__ = [
    "Model",
    "ScoringPlan",
    "label_answers",
    "plan_scoring",
    "probabilities",
    "run_scoring",
    "score_labels",
]

HEAD_BYTES = 1 << 28  # of f32 logits alive at once


def score_labels(
    model: Model,
    prompts: Sequence[Sequence[int]],
    answers: Sequence[Answers],
    *,
    batch_tokens: int = 8192,
    sharding: NamedSharding | None = None,
) -> np.ndarray:
    """Log-probability of every label for every example; `plan_scoring` and `run_scoring` in one.

    Args:
      prompts: N lists of token ids.
      answers: for each example the token ids of every label, up to and including the end-of-turn
        token.
      batch_tokens: about B x T; no example may need more.
      sharding: of [B, ...] arrays over a mesh, if the weights are on one.

    Returns:
      [N, labels] f64.

    Raises:
      InputError: no example, an empty prompt or label, labels that are the same, an example that is
        too long.
    """
    plan = plan_scoring(
        prompts, answers, model.architecture, batch_tokens=batch_tokens, sharding=sharding
    )
    return run_scoring(model, plan)


def probabilities(scores: np.ndarray) -> np.ndarray:
    """[N, labels] log-probabilities -> the same normalised over the labels, f64."""
    shares = np.exp(scores - scores.max(axis=1, keepdims=True))
    return shares / shares.sum(axis=1, keepdims=True)


def run_scoring(
    model: Model,
    plan: ScoringPlan,
    *,
    on_results: Callable[[dict[int, np.ndarray]], None] = lambda scores: None,
) -> np.ndarray:
    """Runs a plan: [N, labels] f64 log-probabilities. One compilation serves every batch and every
    later run.

    Args:
      on_results: called with example -> [labels] log-probabilities after each batch.
    """
    params, factors = on_device(model)
    scores = np.zeros((len(plan.prompts), len(plan.trees[0].valid)))

    def collect(batch: Sequence[Sequence[int]], result: jax.Array) -> None:
        values = np.asarray(result)  # B S W
        for b, row in enumerate(batch):
            first = 0
            for example in row:
                tree = plan.trees[example]
                scores[example] = tree.scores(values[b, first : first + len(tree.targets)])
                first += len(tree.targets)
        on_results({example: scores[example] for row in batch for example in row})

    waiting = None
    computed = prefixes_of(
        params, factors, plan.groups, model.architecture, model.scale, plan.sharding
    )
    prefix, owner = None, -1
    for number, batch in enumerate(plan.batches):
        if plan.owners[number] != owner:
            prefix, owner = next(computed), plan.owners[number]
        rows = put_rows(fill_trees(plan, number), plan.sharding)
        result = target_log_probabilities(
            params,
            factors,
            rows,
            prefix,
            architecture=model.architecture,
            scale=model.scale,
            span=plan.span,
            sharding=plan.sharding,
        )
        if waiting:  # the device works on this batch while the last one is read
            collect(*waiting)
        waiting = batch, result
    collect(*waiting)
    return scores


@functools.partial(
    jax.jit, static_argnames=("architecture", "scale", "span", "sharding", "head_bytes")
)
def target_log_probabilities(
    params: Tree,
    factors: Tree | None,
    rows: TreeRows,
    prefix: Prefix | None,
    *,
    architecture: Architecture,
    span: int,
    scale: float = 1.0,
    sharding: NamedSharding | None = None,
    head_bytes: int = HEAD_BYTES,
) -> jax.Array:
    """[B, S, W] f32 log-probabilities of a batch's targets: target logit minus log-sum-exp.

    The head runs on a part of the S positions at a time, so that its [B, part, V] f32 logits take
    at most `head_bytes`. span: no token of a row sees one so many places before it, or more.
    """
    ops = ONE_DEVICE if sharding is None else ops_of(Kernels(), sharding.mesh)
    B, S, W = rows.targets.shape
    # B S D
    x = forward(
        params,
        rows.tokens,
        rows.positions,
        rows.visible_until,
        architecture,
        adapter_of(factors, scale),
        ops,
        chosen=rows.supervised,
        before=prefix,
        span=span,
    )
    part = min(S, max(1, head_bytes // (4 * B * architecture.vocabulary)))
    parts = -(-S // part)

    def split(array: jax.Array) -> jax.Array:  # B S ... -> parts B part ...
        padded = jnp.pad(array, ((0, 0), (0, parts * part - S)) + ((0, 0),) * (array.ndim - 2))
        return jnp.moveaxis(padded.reshape(B, parts, part, *array.shape[2:]), 1, 0)

    def log_probabilities(one: tuple[jax.Array, jax.Array]) -> jax.Array:
        chosen, targets = one
        logits = head(params, chosen, architecture)  # B part V
        return jnp.take_along_axis(logits, targets, axis=-1) - jax.nn.logsumexp(
            logits, axis=-1, keepdims=True
        )

    with jax.named_scope("target_log_probabilities"):
        result = jax.lax.map(log_probabilities, (split(x), split(rows.targets)))  # parts B part W
        result = jnp.moveaxis(result, 0, 1).reshape(B, parts * part, W)[:, :S]
    return (
        result
        if sharding is None
        else jax.lax.with_sharding_constraint(result, NamedSharding(sharding.mesh, PartitionSpec()))
    )
