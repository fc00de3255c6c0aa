"""Greedy decoding in slots that are filled again as answers end.

    answers = generate(model, prompts, stop_ids, max_new_tokens)

Their shared prefix is computed once (`prefix.py`). A fixed number of slots (`slots.py`) decode
together; when as many are done as waiting prompts fit a packed row, those take their places, in the
same two compiled programs: one fills slots, one is a `while_loop` of a token per slot and
step. What a slot computes between its end and the next prompt counts for nothing.

Greedy means the most probable token, whatever a model's generation_config.json says of sampling or
of a repetition penalty (that of Qwen2.5-0.5B-Instruct is 1.1, and transformers' `generate` applies
it to greedy decoding too): only its stop tokens count (`predict.py`).

Letters: S slots, W columns of new tokens, R arriving prompts, N new tokens at most, V vocabulary.
"""

from __future__ import annotations

import functools
from collections import deque
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxre.errors import InputError
from jaxre.inference.model import Model, adapter_of, on_device
from jaxre.inference.prefix import check_prompts, own_tokens, prefixes_of, shared_prefixes
from jaxre.inference.slots import (
    Arrivals,
    Slots,
    arrivals_of,
    empty_slots,
    fill_slots,
    plan_slots,
    step_slots,
)
from jaxre.models.architecture import Architecture
from jaxre.models.decoder import Prefix, Tree, head


@dataclass(frozen=True)
class Generation:
    """New tokens, the stop token included if one was reached, and the sum of their
    log-probabilities.
    """

    tokens: list[int]
    score: float


class State(NamedTuple):
    """The state that decoding carries from step to step.

    step: int32, of all slots, which says the column; token: [S] int32, the last one of each; new:
    [S, N] int32, counts: [S] int32 and scores: [S] f32 of the answers so far; running: [S] bool,
    whose answer goes on.
    """

    slots: Slots
    step: jax.Array
    token: jax.Array
    new: jax.Array
    counts: jax.Array
    scores: jax.Array
    running: jax.Array


def generate(
    model: Model,
    prompts: Sequence[Sequence[int]],
    stop_ids: Collection[int],
    max_new_tokens: int,
    *,
    batch_tokens: int = 8192,
) -> list[list[int]]:
    """The most probable next token, again and again, until one of `stop_ids` (which is kept) or
    `max_new_tokens`; see `decode`.
    """
    return [
        one.tokens
        for one in decode(model, prompts, stop_ids, max_new_tokens, batch_tokens=batch_tokens)
    ]


def decode(
    model: Model,
    prompts: Sequence[Sequence[int]],
    stop_ids: Collection[int],
    max_new_tokens: int,
    *,
    batch_tokens: int = 8192,
    names: Sequence[str] | None = None,
    on_results: Callable[[dict[int, Generation]], None] = lambda answers: None,
) -> list[Generation]:
    """Greedy decoding of n prompts.

    Args:
      batch_tokens: about the tokens that all slots hold, new ones included.
      names: of the prompts, for messages; their numbers if not given.
      on_results: called with prompt -> answer of those that have just ended.

    Raises:
      InputError: no prompt, an empty one, or one that leaves no room for the new tokens.
    """
    _check(prompts, model.architecture, max_new_tokens, names)
    params, factors = on_device(model)
    stops = jnp.asarray(sorted(stop_ids), jnp.int32)
    results: list[Generation | None] = [None] * len(prompts)
    groups = shared_prefixes(prompts, batch_tokens)
    every = own_tokens(prompts, groups)
    # the last new token is not read, so it has no column
    plans = plan_slots(every, max(1, max_new_tokens - 1), batch_tokens)
    computed = prefixes_of(params, factors, groups, model.architecture, model.scale)
    run = {"architecture": model.architecture, "scale": model.scale}
    for group, owns, plan, prefix in zip(groups, every, plans, computed, strict=True):
        depth = len(group.tokens)
        for sizes in plan:
            state = _start(
                empty_slots(sizes, model.architecture, params["embed"].dtype), max_new_tokens
            )
            waiting = deque(sizes.chunks(owns))
            active: dict[int, int] = {}  # slot -> prompt
            while waiting or active:
                free = [slot for slot in range(sizes.slots) if slot not in active]
                if waiting and len(waiting[0]) <= len(free):
                    chunk = waiting.popleft()
                    active |= dict(zip(free, chunk, strict=False))
                    state = fill(
                        params,
                        factors,
                        prefix,
                        state,
                        arrivals_of(chunk, free, owns, depth, sizes),
                        stops,
                        **run,
                    )
                    if waiting and len(waiting[0]) <= sizes.slots - len(active):
                        continue
                left = sizes.slots - len(waiting[0]) if waiting else 0
                state = decode_until(params, factors, prefix, state, stops, np.int32(left), **run)
                new, counts, scores, running = (
                    np.asarray(array)
                    for array in (state.new, state.counts, state.scores, state.running)
                )
                done = [slot for slot in active if not running[slot]]
                answers = {
                    active.pop(slot): Generation(
                        new[slot, : counts[slot]].tolist(), float(scores[slot])
                    )
                    for slot in done
                }
                for prompt, answer in answers.items():
                    results[prompt] = answer
                on_results(answers)
    return results


def _start(slots: Slots, max_new_tokens: int) -> State:
    S = slots.lengths.shape[0]
    token, counts = jnp.zeros((2, S), jnp.int32)
    new = jnp.zeros((S, max_new_tokens), jnp.int32)
    return State(
        slots, jnp.int32(0), token, new, counts, jnp.zeros(S, jnp.float32), jnp.zeros(S, bool)
    )


@functools.partial(jax.jit, static_argnames=("architecture", "scale"), donate_argnames="state")
def fill(
    params: Tree,
    factors: Tree | None,
    prefix: Prefix | None,
    state: State,
    arrivals: Arrivals,
    stops: jax.Array,
    *,
    architecture: Architecture,
    scale: float,
) -> State:
    """Arriving prompts take their slots and get their first token; stops: [any] int32 tokens that
    end an answer.
    """
    slots, x = fill_slots(
        params, adapter_of(factors, scale), prefix, state.slots, arrivals, architecture
    )
    token, score = best(params, x, architecture)  # R
    new = jnp.zeros((len(token), state.new.shape[1]), jnp.int32).at[:, 0].set(token)
    running = ~jnp.isin(token, stops) & (state.new.shape[1] > 1)
    fresh = {
        "token": token,
        "new": new,
        "counts": jnp.ones_like(token),
        "scores": score,
        "running": running,
    }
    put = {
        name: getattr(state, name).at[arrivals.slots].set(values, mode="drop")
        for name, values in fresh.items()
    }
    return state._replace(slots=slots, **put)


@functools.partial(jax.jit, static_argnames=("architecture", "scale"), donate_argnames="state")
def decode_until(
    params: Tree,
    factors: Tree | None,
    prefix: Prefix | None,
    state: State,
    stops: jax.Array,
    left: jax.Array,
    *,
    architecture: Architecture,
    scale: float,
) -> State:
    """A token of every running slot, again and again, until no more than `left` slots run."""
    adapter = adapter_of(factors, scale)
    N, W = state.new.shape[1], state.slots.ring["last"][0].shape[2]

    def next_token(state: State) -> State:
        read = state.counts - 1  # tokens before the one that is read now: those of the last steps
        age = (state.step - 1 - jnp.arange(W)) % W
        slots, x = step_slots(
            params,
            adapter,
            prefix,
            state.slots,
            state.token,
            read,
            age < read[:, None],
            state.step % W,
            architecture,
        )
        token, score = best(params, x, architecture)
        here = (jnp.arange(N) == state.counts[:, None]) & state.running[:, None]
        counts = state.counts + state.running
        return State(
            slots,
            state.step + 1,
            jnp.where(state.running, token, state.token),
            jnp.where(here, token[:, None], state.new),
            counts,
            state.scores + jnp.where(state.running, score, 0.0),
            state.running & ~jnp.isin(token, stops) & (counts < N),
        )

    return jax.lax.while_loop(lambda state: state.running.sum() > left, next_token, state)


def best(params: Tree, x: jax.Array, architecture: Architecture) -> tuple[jax.Array, jax.Array]:
    """[S, D] -> the most probable tokens, [S] int32, and their log-probabilities, [S] f32."""
    logits = head(params, x, architecture)  # S V
    return jnp.argmax(logits, axis=-1).astype(jnp.int32), jnp.max(
        logits, axis=-1
    ) - jax.nn.logsumexp(logits, axis=-1)


def clean_answer(text: str) -> str:
    """A generated text as a label: without a leading `Answer:`, first line only (the study's
    protocol).
    """
    lines = text.strip().removeprefix("Answer:").strip().splitlines()
    return lines[0].strip() if lines else ""


def _check(
    prompts: Sequence[Sequence[int]],
    architecture: Architecture,
    max_new_tokens: int,
    names: Sequence[str] | None,
) -> None:
    check_prompts(prompts, names)
    for number, prompt in enumerate(prompts):
        if len(prompt) + max_new_tokens > architecture.max_length:
            name = names[number] if names else number
            raise InputError(
                f"example {name}: a prompt of {len(prompt)} tokens and {max_new_tokens} new ones"
                f" exceed the {architecture.max_length} tokens that the model reads; lower"
                " predict.max_new_tokens or shorten the text"
            )
