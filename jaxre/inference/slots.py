"""Slots: places for the keys and values of the examples in progress, reused as examples end.

A slot holds the own tokens of its prompt (what follows the shared prefix), and a ring of W columns
for the tokens after it. All slots write the column of the same step, so a step changes one column
and nothing is moved; each slot says which columns it sees. It may read a column for W
steps. Waiting prompts come in packed: back to back in one row of fixed length, then each to its
slot.

Letters: S slots, T places in a row of waiting prompts, R prompts that may come at a time, U places
for a prompt's own tokens, W columns, K key/value heads, G = H/K, C head channels, L layers, D
embedding, P prefix places.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxre_kernels.attention import Part, Window, joint_attention

from jaxre.data.packing import choose_lengths
from jaxre.models.architecture import Architecture
from jaxre.models.decoder import (
    Adapter,
    Chosen,
    Prefix,
    Tree,
    attention_at,
    part_of,
    run_layers,
    window_of,
)
from jaxre.models.ops import ONE_DEVICE

OWN_MULTIPLE = 32
SHORT = 128  # own tokens
ROW_MULTIPLE = 128
# T, unless a prompt is longer or all are shorter: enough for full speed, few enough that slots do
# not wait long
ROW = 1024


class Slots(NamedTuple):
    """own: `{"layers": (keys [L-1, S, K, U, C], values), "last": ([S, K, U, C], values)}`; ring:
    the same with W in place of U.

    lengths: [S] int32, own tokens of each.
    positions: [S, W] int32, of the tokens in the ring, where sliding layers ask for them; else
    None.
    """

    own: dict[str, Any]
    ring: dict[str, Any]
    lengths: jax.Array
    positions: jax.Array | None = None


class Arrivals(NamedTuple):
    """Waiting prompts as one packed row.

    tokens, positions, visible_until: [1, T] int32, as in `jaxre.data.rows.Rows`.
    firsts, lengths, slots: [R] int32, where each prompt begins, how long it is and which slot it
    gets; S for a place without a prompt.
    """

    tokens: np.ndarray
    positions: np.ndarray
    visible_until: np.ndarray
    firsts: np.ndarray
    lengths: np.ndarray
    slots: np.ndarray


@dataclass(frozen=True)
class Sizes:
    """The fixed sizes of one program, and the prompts that it is for."""

    slots: int
    own: int
    columns: int
    row: int
    arrivals: int
    members: tuple[int, ...]

    def chunks(self, owns: Mapping[int, Sequence[int]]) -> Iterator[list[int]]:
        """The members in order, as many at a time as fit a row."""
        chunk, load = [], 0
        for member in self.members:
            size = len(owns[member])
            if chunk and (load + size > self.row or len(chunk) == self.arrivals):
                yield chunk
                chunk, load = [], 0
            chunk.append(member)
            load += size
        if chunk:
            yield chunk


def plan_slots(
    groups: Sequence[Mapping[int, Sequence[int]]], columns: int, batch_tokens: int
) -> list[list[Sizes]]:
    """The prompts of each group by length, in at most three sizes, the same for all groups; each
    costs one compilation.

    Args:
      groups: the own tokens of each prompt, group by group. columns: W. batch_tokens: about S x (U
        + W), and T.
    """
    lengths = [np.array([len(own) for own in owns.values()]) for owns in groups]
    # Of one kind are lengths within a factor of two, and all that are short: each size compiles two
    # programs, and ends with idle slots.
    needs = [np.maximum(SHORT, 2 ** np.ceil(np.log2(some)).astype(np.int64)) for some in lengths]
    chosen = np.array(choose_lengths(np.concatenate(needs)))
    kinds = [chosen[np.searchsorted(chosen, need)] for need in needs]
    plans: list[list[Sizes]] = [[] for _ in groups]
    for kind in chosen.tolist():
        inside = [some[fitted == kind] for some, fitted in zip(lengths, kinds, strict=True)]
        own = -(-max(int(some.max(initial=0)) for some in inside) // OWN_MULTIPLE) * OWN_MULTIPLE
        slots = min(max(map(len, inside)), max(1, batch_tokens // (own + columns)))
        row = min(max(min(ROW, batch_tokens), own), max(int(some.sum()) for some in inside))
        row = -(-row // ROW_MULTIPLE) * ROW_MULTIPLE
        # Each prompt is copied out as U places: no more of them than twice the row.
        arrivals = min(slots, max(1, 2 * row // own))
        for plan, owns, fitted in zip(plans, groups, kinds, strict=True):
            members = tuple(np.array(list(owns))[fitted == kind].tolist())
            if members:
                plan.append(Sizes(slots, own, columns, row, arrivals, members))
    return plans


def empty_slots(sizes: Sizes, architecture: Architecture, dtype: np.dtype) -> Slots:
    def caches(places: int) -> dict[str, Any]:
        shape = (sizes.slots, architecture.kv_heads, places, architecture.head_channels)
        stacked = (
            tuple(jnp.zeros((architecture.layers - 1, *shape), dtype) for _ in "kv")
            if architecture.layers > 1
            else None
        )
        return {"layers": stacked, "last": tuple(jnp.zeros(shape, dtype) for _ in "kv")}

    positions = None
    if architecture.window is not None:
        positions = jnp.zeros((sizes.slots, sizes.columns), jnp.int32)
    lengths = jnp.zeros(sizes.slots, jnp.int32)
    return Slots(caches(sizes.own), caches(sizes.columns), lengths, positions)


def arrivals_of(
    chunk: Sequence[int],
    free: Sequence[int],
    owns: Mapping[int, Sequence[int]],
    depth: int,
    sizes: Sizes,
) -> Arrivals:
    """A chunk's prompts, whose own tokens follow a prefix of `depth`, for the first of the free
    slots.
    """
    T, R = sizes.row, sizes.arrivals
    tokens, positions = np.zeros((2, 1, T), np.int32)
    visible_until = np.arange(1, T + 1, dtype=np.int32)[None]
    firsts, lengths, slots = (
        np.zeros(R, np.int32),
        np.ones(R, np.int32),
        np.full(R, sizes.slots, np.int32),
    )
    first = 0
    for place, (member, slot) in enumerate(zip(chunk, free, strict=False)):
        own = owns[member]
        end = first + len(own)
        tokens[0, first:end], positions[0, first:end], visible_until[0, first:end] = (
            own,
            depth + np.arange(len(own)),
            end,
        )
        firsts[place], lengths[place], slots[place] = first, len(own), slot
        first = end
    return Arrivals(tokens, positions, visible_until, firsts, lengths, slots)


def fill_slots(
    params: Tree,
    adapter: Adapter | None,
    prefix: Prefix | None,
    slots: Slots,
    arrivals: Arrivals,
    architecture: Architecture,
) -> tuple[Slots, jax.Array]:
    """Computes the own tokens of arriving prompts and puts their keys and values into the slots.

    Returns:
      The slots, and [R, D], the last hidden state of each prompt.
    """
    U = slots.own["last"][0].shape[2]
    T = arrivals.tokens.shape[1]
    # R U; behind its end a prompt's places hold anything
    place = jnp.minimum(arrivals.firsts[:, None] + jnp.arange(U), T - 1)
    last = (arrivals.firsts + arrivals.lengths - 1)[None]  # 1 R

    def kept(k, v):
        return tuple(array[0, place].transpose(0, 2, 1, 3) for array in (k, v))  # R K U C

    def attend(q, k, v, cache, window):
        near, before = window_of(arrivals.positions, window), part_of(prefix, cache)
        context = ONE_DEVICE.attention(
            q, k, v, arrivals.visible_until, window=near, before=before, span=min(U, T)
        )
        return context, kept(k, v)

    def attend_last(q, k, v, cache, window):
        near, before = window_of(arrivals.positions, window), part_of(prefix, cache)
        context = attention_at(last, q, k, v, arrivals.visible_until, near, before)
        return context, kept(k, v)

    with jax.named_scope("fill"):
        caches = prefix and prefix.caches
        pruned = Chosen(last, attend_last)
        x, fresh = run_layers(
            params,
            arrivals.tokens,
            arrivals.positions,
            architecture,
            attend,
            caches,
            adapter,
            pruned=pruned,
        )

        def put(old: jax.Array, new: jax.Array) -> jax.Array:
            return old.at[..., arrivals.slots, :, :, :].set(new, mode="drop")

        lengths = slots.lengths.at[arrivals.slots].set(arrivals.lengths, mode="drop")
        return slots._replace(own=jax.tree.map(put, slots.own, fresh), lengths=lengths), x[0]


def step_slots(
    params: Tree,
    adapter: Adapter | None,
    prefix: Prefix | None,
    slots: Slots,
    tokens: jax.Array,
    depths: jax.Array,
    seen: jax.Array,
    column: jax.Array,
    architecture: Architecture,
) -> tuple[Slots, jax.Array]:
    """One token of every slot.

    Args:
      tokens: [S] int32; depths: [S] int32, how many tokens come between the prompt and each; seen:
        [S, W] bool, the columns of those.
      column: where the tokens go.

    Returns:
      The slots, and [S, D] hidden states.
    """
    U = slots.own["last"][0].shape[2]
    own_seen = (jnp.arange(U) < slots.lengths[:, None])[:, None, None]  # S 1 1 U
    ring_seen = seen[:, None, None]

    def attend(q, k, v, cache, window):
        before, own, ring = cache
        S, _, H, C = q.shape
        fresh = tuple(array.transpose(0, 2, 1, 3) for array in (k, v))  # S K 1 C
        first = 0 if prefix is None else prefix.length
        parts = [
            *filter(None, [part_of(prefix, before)]),
            Part(*own, own_seen, first + jnp.arange(U)),
            Part(*ring, ring_seen, slots.positions),
            Part(*fresh, jnp.bool_(True), positions[:, None]),
        ]
        if window is not None:
            near = Window(jnp.repeat(positions[:, None], H // k.shape[2], axis=1), window)
            parts = [part.within(near) for part in parts]
        context = joint_attention(q.reshape(S, k.shape[2], -1, C), parts)  # S K G C
        return context.reshape(S, 1, H, C), fresh

    with jax.named_scope("step"):
        shared = prefix.caches if prefix else {"layers": None, "last": None}
        caches = {
            name: (shared[name], slots.own[name], slots.ring[name]) for name in ("layers", "last")
        }
        positions = (
            slots.lengths + depths if prefix is None else prefix.length + slots.lengths + depths
        )
        x, fresh = run_layers(
            params, tokens[:, None], positions[:, None], architecture, attend, caches, adapter
        )
        ring = jax.tree.map(
            lambda old, new: jax.lax.dynamic_update_slice_in_dim(
                old, new, column, axis=old.ndim - 2
            ),
            slots.ring,
            fresh,
        )
        slots = slots._replace(ring=ring)
        if slots.positions is not None:
            columns = jax.lax.dynamic_update_slice_in_dim(
                slots.positions, positions[:, None], column, axis=1
            )
            slots = slots._replace(positions=columns)
        return slots, x[:, 0]
