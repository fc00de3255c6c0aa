"""Shared prompt prefixes: found by comparing tokens, computed once, their keys and values cached.

    (group,) = shared_prefixes(prompts, batch_tokens=8192)
    (prefix,) = prefixes_of(params, factors, (group,), architecture, scale)

System turn, label list and fixed demonstrations are most of an enumerated prompt. Every batch
attends to their keys beside its own tokens, whose positions go on from theirs. Where a dataset has
several such beginnings (mixtures; an example that is itself a demonstration gets another one), each
has a group of its own, if that saves more than its last batch, which is not full, costs.

Letters: L layers, K key/value heads, P prefix places, C head channels.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from jaxre.errors import InputError
from jaxre.inference.model import adapter_of
from jaxre.models.architecture import Architecture
from jaxre.models.decoder import Prefix, Tree, run_layers, window_of
from jaxre.models.ops import ONE_DEVICE

WORTH = 64  # tokens that a prefix must save: a forward pass of its own reads all weights once more
PREFIX_MULTIPLE = 64


@dataclass(frozen=True)
class Group:
    """Examples, and the prefix that all their prompts share (empty where sharing saves nothing)."""

    members: tuple[int, ...]
    tokens: tuple[int, ...]


def check_prompts(prompts: Sequence[Sequence[int]], names: Sequence[str] | None) -> None:
    """Raises InputError for no prompt, or one without a token."""
    if not prompts:
        raise InputError("there is no example to predict; is the split empty?")
    for number, prompt in enumerate(prompts):
        if not len(prompt):
            name = names[number] if names else number
            raise InputError(
                f"example {name}: its prompt has no token; the chat template must yield a"
                " generation prompt"
            )


def shared_prefixes(prompts: Sequence[Sequence[int]], batch_tokens: int) -> tuple[Group, ...]:
    """The groups of N prompts, each of at least one token, in the order of their first members.

    Every prompt keeps at least its last token for itself, and no prefix is longer than
    `batch_tokens`.
    """
    arrays = [np.asarray(prompt, ">u4") for prompt in prompts]
    keys = [array.tobytes() for array in arrays]  # the high byte first: they sort as the tokens do
    order = sorted(range(len(prompts)), key=keys.__getitem__)
    common = np.array(
        [0, *(_in_common(arrays[a], arrays[b]) for a, b in itertools.pairwise(order))]
    )
    lengths = np.array([len(array) for array in arrays])[order]
    owner = _owners(common, lengths, batch_tokens)
    groups = []
    for number in np.unique(owner):
        ranks = np.flatnonzero(owner == number)
        # What the first and the last share in sorted order, all between them do.
        depth = min(
            _in_common(arrays[order[ranks[0]]], arrays[order[ranks[-1]]]),
            int(lengths[ranks].min()) - 1,
            batch_tokens,
        )
        depth = depth if (len(ranks) - 1) * depth >= WORTH else 0
        groups.append(
            Group(
                tuple(sorted(order[rank] for rank in ranks)),
                tuple(int(token) for token in prompts[order[ranks[0]]][:depth]),
            )
        )
    return tuple(sorted(groups, key=lambda group: group.members))


def _owners(common: np.ndarray, lengths: np.ndarray, worth: int) -> np.ndarray:
    """[n] the group of each prompt in sorted order: a run of prompts leaves a group if that saves
    more than `worth` tokens.

    common: [n] tokens that a prompt has in common with the one before it.
    """
    owner = np.zeros(len(lengths), np.int64)
    groups = 1
    runs = [(0, len(lengths), 0, 0)]  # first, last, group, the prefix of that group
    while runs:
        first, last, number, base = runs.pop()
        if (last - first) * (int(lengths[first:last].max()) - base) <= worth:
            continue
        depth = int(common[first + 1 : last].min(initial=int(lengths[first])))
        if first == 0 and last == len(lengths):
            base = depth
        elif (last - first - 1) * (depth - base) - base > worth:
            owner[first:last], number, base, groups = groups, groups, depth, groups + 1
        bounds = [
            first,
            *(first + 1 + np.flatnonzero(common[first + 1 : last] == depth)).tolist(),
            last,
        ]
        runs += [
            (low, high, number, base)
            for low, high in itertools.pairwise(bounds)
            if 1 < high - low < last - first
        ]
    return owner


def _in_common(one: np.ndarray, other: np.ndarray) -> int:
    """Length of the common prefix of two prompts."""
    least = min(len(one), len(other))
    differ = one[:least] != other[:least]
    return int(differ.argmax()) if differ.any() else least


def own_tokens(
    prompts: Sequence[Sequence[int]], groups: Sequence[Group]
) -> list[dict[int, Sequence[int]]]:
    """For each group, the tokens of its prompts after the shared prefix."""
    return [
        {member: prompts[member][len(group.tokens) :] for member in group.members}
        for group in groups
    ]


def padded_length(groups: Sequence[Group]) -> int:
    """P, one for all groups: 0 where none shares a token."""
    return -(-max(len(group.tokens) for group in groups) // PREFIX_MULTIPLE) * PREFIX_MULTIPLE


def prefixes_of(
    params: Tree,
    factors: Tree | None,
    groups: Sequence[Group],
    architecture: Architecture,
    scale: float,
    sharding: NamedSharding | None = None,
) -> Iterator[Prefix | None]:
    """The prefix of each group, computed lazily; None for all where no group has one."""
    P = padded_length(groups)
    for group in groups:
        tokens = np.zeros((1, P), np.int32)
        tokens[0, : len(group.tokens)] = group.tokens
        if not P:
            yield None
            continue
        caches = _prefix_caches(
            params, factors, tokens, architecture=architecture, scale=scale, sharding=sharding
        )
        yield Prefix(caches, np.int32(len(group.tokens)))


@functools.partial(jax.jit, static_argnames=("architecture", "scale", "sharding"))
def _prefix_caches(
    params: Tree,
    factors: Tree | None,
    tokens: jax.Array,
    *,
    architecture: Architecture,
    scale: float,
    sharding: NamedSharding | None,
) -> dict[str, Any]:
    """Keys and values of tokens [1, P]; those behind the prefix come after it and change nothing in
    it.
    """
    P = tokens.shape[1]

    def attend(q, k, v, _, window):
        near = window_of(jnp.arange(P)[None], window)
        context = ONE_DEVICE.attention(q, k, v, jnp.full((1, P), P, jnp.int32), window=near)
        return context, tuple(array[0].transpose(1, 0, 2) for array in (k, v))

    with jax.named_scope("prefix"):
        _, caches = run_layers(
            params,
            tokens,
            jnp.arange(P)[None],
            architecture,
            attend,
            None,
            adapter_of(factors, scale),
        )
    return (
        caches
        if sharding is None
        else jax.lax.with_sharding_constraint(caches, NamedSharding(sharding.mesh, PartitionSpec()))
    )
