"""Greedy decoding in batches, with a key/value cache.

    answers = generate(model, prompts, stop_ids, max_new_tokens)

A batch is one compiled call: prefill of all prompts, then a `while_loop` of one token per row and
step, until every row has stopped. A new token goes to the same cache slot P + i in all rows, whatever
the length of their prompts; its position, on which rotary depends, is the row's own.

Letters: B rows, P prompt slots, U = P + new tokens cache slots, K key/value heads, C head channels,
L layers, V vocabulary.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from jaxre_kernels.attention import attention, masked_attention

from jaxre.data.packing import choose_lengths
from jaxre.errors import InputError
from jaxre.inference.model import Model, adapter_of, on_device
from jaxre.models.architecture import Architecture
from jaxre.models.decoder import Tree, head, run_layers

PROMPT_MULTIPLE = 64


@dataclass(frozen=True)
class Generation:
    """New tokens, the stop token included if one was reached, and the sum of their log-probabilities."""

    tokens: list[int]
    score: float


@dataclass(frozen=True)
class Bucket:
    """Prompts of similar length, decoded in batches of one shape [rows, length]."""

    length: int
    rows: int
    members: tuple[int, ...]


def generate(
    model: Model, prompts: Sequence[Sequence[int]], stop_ids: Collection[int], max_new_tokens: int, *, batch_tokens: int = 8192
) -> list[list[int]]:
    """The most probable next token, again and again, until one of `stop_ids` (which is kept) or `max_new_tokens`; see `decode`."""
    return [one.tokens for one in decode(model, prompts, stop_ids, max_new_tokens, batch_tokens=batch_tokens)]


def decode(
    model: Model,
    prompts: Sequence[Sequence[int]],
    stop_ids: Collection[int],
    max_new_tokens: int,
    *,
    batch_tokens: int = 8192,
    names: Sequence[str] | None = None,
    advance: Callable[[int], None] = lambda examples: None,
) -> list[Generation]:
    """Greedy decoding of N prompts.

    Args:
      batch_tokens: about B x U of a batch, prompts and new tokens.
      names: of the prompts, for messages; their numbers if not given.
      advance: told how many prompts each finished batch had.

    Raises:
      InputError: no prompt, an empty one, or one that leaves no room for the new tokens.
    """
    _check(prompts, model.architecture, max_new_tokens, names)
    params, factors = on_device(model)
    stops = jnp.asarray(sorted(stop_ids), jnp.int32)
    results: list[Generation | None] = [None] * len(prompts)
    for bucket in plan_buckets([len(prompt) for prompt in prompts], max_new_tokens, batch_tokens):
        for start in range(0, len(bucket.members), bucket.rows):
            batch = bucket.members[start : start + bucket.rows]
            tokens, lengths = np.zeros((bucket.rows, bucket.length), np.int32), np.zeros(bucket.rows, np.int32)
            for b, member in enumerate(batch):
                lengths[b] = len(prompts[member])
                tokens[b, : lengths[b]] = prompts[member]
            new, counts, scores = (
                np.asarray(array)
                for array in decode_batch(
                    params,
                    factors,
                    tokens,
                    lengths,
                    stops,
                    architecture=model.architecture,
                    scale=model.scale,
                    max_new_tokens=max_new_tokens,
                )
            )
            for b, member in enumerate(batch):
                results[member] = Generation(new[b, : counts[b]].tolist(), float(scores[b]))
            advance(len(batch))
    return results


def plan_buckets(lengths: Sequence[int], max_new_tokens: int, batch_tokens: int) -> list[Bucket]:
    """Prompts by length in at most three buckets; each costs one compilation."""
    need = -(-np.asarray(lengths) // PROMPT_MULTIPLE) * PROMPT_MULTIPLE
    chosen = np.array(choose_lengths(need))
    fitted = chosen[np.searchsorted(chosen, need)]
    buckets = []
    for length in np.unique(fitted).tolist():
        members = np.flatnonzero(fitted == length)
        most = max(1, batch_tokens // (length + max_new_tokens))
        batches = -(-len(members) // most)
        buckets.append(Bucket(length, -(-len(members) // batches), tuple(members.tolist())))
    return buckets


@functools.partial(jax.jit, static_argnames=("architecture", "scale", "max_new_tokens"))
def decode_batch(
    params: Tree,
    factors: Tree | None,
    tokens: jax.Array,
    lengths: jax.Array,
    stops: jax.Array,
    *,
    architecture: Architecture,
    scale: float,
    max_new_tokens: int,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Greedy decoding of one batch.

    Args:
      tokens: [B, P] int32, prompts from the left; lengths: [B] int32, of the prompts, 0 for an unused row.
      stops: [any] int32 tokens that end an answer.

    Returns:
      [B, max_new_tokens] int32 new tokens, [B] int32 how many of them count, [B] f32 their log-probability.
    """
    B, P = tokens.shape
    adapter = adapter_of(factors, scale)
    slots = jnp.arange(P + max_new_tokens)

    def best(x: jax.Array) -> tuple[jax.Array, jax.Array]:  # B 1 D -> token [B], its log-probability [B]
        logits = head(params, x, architecture)[:, 0]  # B V
        return jnp.argmax(logits, axis=-1).astype(jnp.int32), jnp.max(logits, axis=-1) - jax.nn.logsumexp(logits, axis=-1)

    def prefill_attend(q, k, v, _):
        return attention(q, k, v, jnp.full((B, P), P)), (k, v)

    with jax.named_scope("prefill"):
        positions = jnp.broadcast_to(jnp.arange(P), (B, P))
        x, caches = run_layers(params, tokens, positions, architecture, prefill_attend, None, adapter)
        token, score = best(jnp.take_along_axis(x, jnp.maximum(lengths - 1, 0)[:, None, None], axis=1))
        # [L-1, B, P, K, C] and [B, P, K, C] -> U slots.
        caches = jax.tree.map(lambda cache: jnp.pad(cache, [(0, 0)] * (cache.ndim - 3) + [(0, max_new_tokens), (0, 0), (0, 0)]), caches)

    def next_token(state):
        step, token, running, caches, new, counts, scores = state
        slot = P + step - 1
        visible = (slots < lengths[:, None]) | ((slots >= P) & (slots <= slot))  # B U

        def attend(q, k, v, cache):
            keys, values = (jax.lax.dynamic_update_slice_in_dim(old, fresh, slot, axis=1) for old, fresh in zip(cache, (k, v), strict=True))
            # Only the new slot leaves the layer: a whole cache would be copied once more.
            return masked_attention(q, keys, values, visible[:, None]), (k, v)

        x, fresh = run_layers(params, token[:, None], (lengths + step - 1)[:, None], architecture, attend, caches, adapter)
        caches = jax.tree.map(lambda old, one: jax.lax.dynamic_update_slice_in_dim(old, one, slot, axis=old.ndim - 3), caches, fresh)
        return record(step, *best(x), running, caches, new, counts, scores)

    def record(step, token, score, running, caches, new, counts, scores):
        new = jax.lax.dynamic_update_slice_in_dim(new, jnp.where(running, token, 0)[:, None], step, axis=1)
        scores = scores + jnp.where(running, score, 0.0)
        return step + 1, token, running & ~jnp.isin(token, stops), caches, new, counts + running, scores

    def unfinished(state):
        step, _, running, *_ = state
        return (step < max_new_tokens) & running.any()

    new, counts, scores = jnp.zeros((B, max_new_tokens), jnp.int32), jnp.zeros(B, jnp.int32), jnp.zeros(B, jnp.float32)
    with jax.named_scope("decode"):
        state = record(jnp.int32(0), token, score, lengths > 0, caches, new, counts, scores)
        *_, new, counts, scores = jax.lax.while_loop(unfinished, next_token, state)
    return new, counts, scores


def clean_answer(text: str) -> str:
    """A generated text as a label: without a leading `Answer:`, first line only (the study's protocol)."""
    lines = text.strip().removeprefix("Answer:").strip().splitlines()
    return lines[0].strip() if lines else ""


def _check(prompts: Sequence[Sequence[int]], architecture: Architecture, max_new_tokens: int, names: Sequence[str] | None) -> None:
    if not prompts:
        raise InputError("there is no prompt to answer; is the split empty?")
    for number, prompt in enumerate(prompts):
        name = names[number] if names else number
        if not len(prompt):
            raise InputError(f"example {name}: its prompt has no token; the chat template must yield a generation prompt")
        if len(prompt) + max_new_tokens > architecture.max_length:
            raise InputError(
                f"example {name}: a prompt of {len(prompt)} tokens and {max_new_tokens} new ones exceed the "
                f"{architecture.max_length} tokens that the model reads; lower predict.max_new_tokens or shorten the text"
            )
