"""Promises of the forward pass: packing, shared prefixes, scanning, chosen positions,
one definition under NNX.
"""

from __future__ import annotations

import itertools
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jaxre_kernels.attention import Blocks, Window, attention, blocks_of
from tiny_decoders import our_logits, random_factors, relative, tokens_of

from jaxre.config import Lora
from jaxre.models import decoder
from jaxre.models.architecture import architecture_of
from jaxre.models.decoder import Adapter
from jaxre.models.lora import init_adapter, merge, scale_of
from jaxre.models.module import Decoder, init_weights, plain_weights
from jaxre.models.ops import ONE_DEVICE
from jaxre.models.weights import parameter_count, places, tree_of

# f32 sums in another order: measured up to 1.3e-5 of the largest value, as the activations grow
# with each layer here; a wrong weight, mask or position is off by more than 1e-2.
CLOSE = 5e-5

FIELDS = {
    "model_type": "qwen2",
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 61,
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-6,
    "initializer_range": 0.3,
}
GEMMA3 = {
    "head_dim": 16,
    "query_pre_attn_scalar": 24,
    "sliding_window": 5,
    "sliding_window_pattern": 3,
    "num_key_value_heads": 1,
}
DEPTHS = pytest.mark.parametrize("layers", [1, 4])
KINDS = pytest.mark.parametrize("kind", ["qwen2", "gemma3_text"])


def make(layers: int = 4, kind: str = "qwen2", seed: int = 0):
    """An architecture and random weights in which biases are not 0 and norms not 1."""
    more = GEMMA3 if kind == "gemma3_text" else {}
    architecture = architecture_of(
        {**FIELDS, **more, "num_hidden_layers": layers, "model_type": kind}, "test"
    )
    draw = np.random.default_rng(seed)

    def value(weight, shape):
        return (draw.standard_normal(shape) * 0.3 + (weight.initial == "ones")).astype(np.float32)

    return architecture, tree_of(
        (path, value(weight, shape)) for weight, path, shape, _ in places(architecture)
    )


@DEPTHS
@KINDS
def test_packed_logits_equal_unpacked(layers, kind):
    architecture, params = make(layers, kind)
    # of one length, so that one compilation serves all; test_decoder_parity.py has mixed ones
    lengths = (
        12,
        12,
        12,
    )
    tokens = tokens_of(architecture.vocabulary, 1, 36)
    starts = np.cumsum((0, *lengths))
    positions, visible_until = np.zeros((1, 36), int), np.arange(1, 37)[None]
    for start, end in itertools.pairwise(starts):
        positions[0, start:end] = np.arange(end - start)
        visible_until[0, start:end] = end
    packed = our_logits(architecture, params, tokens, positions, visible_until)
    for start, end in itertools.pairwise(starts):
        alone = our_logits(architecture, params, tokens[:, start:end])
        assert relative(packed[:, start:end], alone) < CLOSE


@KINDS
def test_shared_prefix_equals_a_copy_for_each_example(kind):
    """A tree two levels deep: prefix 6, below it two nodes of 4 and 5, the first with two examples
    of 3 and 2. A window of 5 positions ends within the prefix, or within a node.
    """
    architecture, params = make(4, kind)
    #           prefix      node 1      a            b            node 2
    nodes = {
        "prefix": (0, 6, 20),
        "one": (6, 10, 15),
        "a": (10, 13, 13),
        "b": (13, 15, 15),
        "two": (15, 20, 20),
    }
    tokens = tokens_of(architecture.vocabulary, 1, 20)
    positions, visible_until = np.zeros((1, 20), int), np.zeros((1, 20), int)
    for name, depth in (("prefix", 0), ("one", 6), ("a", 10), ("b", 10), ("two", 6)):
        start, end, until = nodes[name]
        positions[0, start:end] = depth + np.arange(end - start)
        visible_until[0, start:end] = until
    packed = our_logits(architecture, params, tokens, positions, visible_until)
    for path in (("prefix", "one", "a"), ("prefix", "one", "b"), ("prefix", "two")):
        members = np.concatenate([np.arange(*nodes[name][:2]) for name in path])
        assert (
            relative(packed[:, members], our_logits(architecture, params, tokens[:, members]))
            < CLOSE
        )


@KINDS
def test_where_attention_looks_changes_no_hidden_state_and_no_gradient(kind):
    """Five examples of 50 below a prefix of 40: blocks of queries on their near keys and the
    prefix, against a dense row.

    In f64: scores are so large here that f32 gradients are off by 5e-5 whichever way they are
    summed.
    """
    architecture, params = make(3 if kind == "gemma3_text" else 2, kind)
    lora = Lora(rank=3, dropout=0.2)
    factors = random_factors(architecture, lora)
    tokens = tokens_of(architecture.vocabulary, 1, 300)
    positions = np.concatenate(
        [np.arange(40), np.tile(40 + np.arange(50), 5), np.zeros(10)]
    ).astype(np.int32)[None]
    visible_until = np.concatenate(
        [np.full(40, 290), 40 + np.repeat(50 * np.arange(1, 6), 50), np.arange(291, 301)]
    )[None]
    real = (np.arange(300) < 290)[:, None]

    @partial(jax.jit, static_argnames=("prefix", "span"))
    def run(params, factors, **bounds):
        def loss(factors):
            adapter = Adapter(
                factors, scale_of(lora), lora.dropout, jnp.arange(300, dtype=jnp.uint32)[None]
            )
            x = decoder.forward(
                params, tokens, positions, visible_until, architecture, adapter, **bounds
            )
            return (x * real).var(), x

        return jax.value_and_grad(loss, has_aux=True)(factors)

    assert ONE_DEVICE.attention is attention and blocks_of(300, 40, 50) == Blocks(128, 64, 40)
    with jax.enable_x64(True):
        params, factors = jax.tree.map(
            lambda leaf: jnp.asarray(leaf, jnp.float64), (params, factors)
        )
        (_, dense), dense_gradients = run(params, factors)
        (_, bounded), gradients = run(params, factors, prefix=40, span=50)
        assert bounded.dtype == jnp.float64
        assert relative(bounded, dense) < 1e-12
        assert max(jax.tree.leaves(jax.tree.map(relative, gradients, dense_gradients))) < 1e-11


@KINDS
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_layers_keep_for_the_backward_pass_only_what_it_needs(dtype, kind):
    """For each token: two hidden states and their norms, q, k, v, the output of attention, three
    arrays of the MLP, and narrow ones.

    No copy of a weight, no dropout mask, no f32 copy of a narrower array, and nothing T x T.
    """
    architecture, _ = make(4, kind)
    params = tree_of(
        (path, jax.ShapeDtypeStruct(shape, dtype)) for _, path, shape, _ in places(architecture)
    )
    factors = jax.eval_shape(lambda: init_adapter(architecture, Lora(rank=2), jax.random.key(0)))
    rows, keys = (
        jax.ShapeDtypeStruct((2, 640), jnp.int32),
        jax.ShapeDtypeStruct((2, 640), jnp.uint32),
    )

    def loss(factors, params, rows, keys):
        adapter = Adapter(factors, 1.0, 0.1, keys)
        return (
            decoder.forward(params, rows, rows, rows, architecture, adapter, prefix=40, span=100)
            .astype(jnp.float32)
            .sum()
        )

    program = jax.make_jaxpr(jax.grad(loss))(factors, params, rows, keys)
    forward = next(equation for equation in program.eqns if equation.primitive.name == "scan")
    kept = [leaf.aval for leaf in forward.outvars[1:]]  # the first is x itself
    size = architecture.size
    # ranks of the seven projections
    wide = 4 * size("D") + 2 * size("HC") + 2 * size("KC") + 3 * size("F") + 2 * 7
    if architecture.norms_after:  # what enters a norm: two of D behind the blocks, q and k
        wide += 2 * size("D") + size("HC") + size("KC")
    # counters of the four masks, highest score and sum of each head
    other = 4 + 2 * architecture.query_heads
    tokens = 3 * 2 * 640
    assert sum(leaf.size for leaf in kept if leaf.dtype == dtype) <= tokens * (
        wide + (other - 4 if dtype == jnp.float32 else 0)
    )
    windows = 3 if architecture.window else 0  # one number a layer
    assert sum(leaf.size for leaf in kept) <= tokens * (wide + other) + windows


def test_a_token_of_another_example_changes_nothing():
    """Bit for bit: the mask leaves no weight at all, neither forwards nor backwards in the row."""
    architecture, params = make()
    tokens = tokens_of(architecture.vocabulary, 1, 24)
    positions = np.tile(np.arange(12), 2)[None]
    visible_until = np.repeat([12, 24], 12)[None]
    other = tokens.copy()
    other[0, 3] = (other[0, 3] + 1) % architecture.vocabulary
    before, after = (
        our_logits(architecture, params, t, positions, visible_until) for t in (tokens, other)
    )
    assert np.array_equal(before[:, 12:], after[:, 12:])
    assert np.array_equal(before[:, :3], after[:, :3])
    assert not np.array_equal(before[:, 3:12], after[:, 3:12])


@DEPTHS
@pytest.mark.parametrize("kind", ["qwen2", "qwen3", "smollm3", "gemma3_text"])
def test_scanned_layers_equal_unrolled(layers, kind):
    """Every layer called by hand with its own slice of the stack, its own adapter and dropout, in
    order.
    """
    architecture, params = make(layers, kind)
    lora = Lora(rank=3, dropout=0.3)
    factors = random_factors(architecture, lora)
    tokens = jnp.asarray(tokens_of(architecture.vocabulary, 2, 16))
    positions = jnp.broadcast_to(jnp.arange(16), (2, 16))
    visible_until = jnp.full((2, 16), 16)
    adapter = Adapter(
        factors, scale_of(lora), lora.dropout, jnp.arange(32, dtype=jnp.uint32).reshape(2, 16)
    )

    def attend(q, k, v, cache, window):
        near = None if window is None else Window(positions, window)
        return attention(q, k, v, visible_until, window=near), cache

    @jax.jit
    def both(params, factors):
        scanned = decoder.forward(params, tokens, positions, visible_until, architecture, adapter)
        x = params["embed"][tokens] * (architecture.embedding_scale or 1.0)
        angles = decoder.rotary_angles(positions, architecture)
        for layer in range(layers):
            last = layer == layers - 1
            parts = [
                part["last"]
                if last
                else jax.tree.map(lambda leaf, at=layer: leaf[at], part["layers"])
                for part in (params, factors)
            ]
            window = architecture.layer_window(layer)
            one = decoder.Layer(*parts, None, layer, architecture.rotary[layer], window)
            x, _ = decoder.run_layer(one, x, angles, architecture, attend, adapter)
        return scanned, x

    assert relative(*both(params, factors)) < CLOSE


@KINDS
def test_compile_time_does_not_grow_with_depth(kind):
    """The program for 12 layers is as long as that for 3."""
    sizes = []
    rows = jax.ShapeDtypeStruct((1, 8), jnp.int32)
    for layers in (3, 12):
        architecture, _ = make(layers, kind)
        params = tree_of(
            (path, jax.ShapeDtypeStruct(shape, jnp.float32))
            for _, path, shape, _ in places(architecture)
        )
        lowered = jax.jit(decoder.forward, static_argnums=4).lower(
            params, rows, rows, rows, architecture
        )
        sizes.append(lowered.as_text().count("\n"))
    assert sizes[1] <= sizes[0] + 5


@DEPTHS
def test_nnx_module_equals_the_free_functions(layers):
    architecture, _ = make(layers)
    module = Decoder(architecture, rngs=nnx.Rngs(3))
    tokens = tokens_of(architecture.vocabulary, 2, 12)
    assert (
        relative(
            jax.jit(module)(jnp.asarray(tokens)),
            our_logits(architecture, plain_weights(module), tokens),
        )
        < CLOSE
    )
    assert jax.tree.all(
        jax.tree.map(np.array_equal, plain_weights(module), init_weights(architecture, 3))
    )


def test_nnx_module_survives_split_and_merge():
    architecture, _ = make()
    module = Decoder(architecture, rngs=nnx.Rngs(3))
    graph, state = nnx.split(module)
    doubled = jax.tree.map(lambda leaf: leaf * 2, state)
    tokens = tokens_of(architecture.vocabulary, 1, 6)
    plain = jax.tree.map(lambda leaf: leaf * 2, plain_weights(module))
    logits = jax.jit(lambda state: nnx.merge(graph, state)(jnp.asarray(tokens)))(doubled)
    assert relative(logits, our_logits(architecture, plain, tokens)) < CLOSE


@DEPTHS
def test_weights_have_the_shapes_of_the_table(layers):
    architecture, params = make(layers)
    found = {
        tuple(key.key for key in path): leaf.shape
        for path, leaf in jax.tree_util.tree_leaves_with_path(params)
    }
    assert found == {path: shape for _, path, shape, _ in places(architecture)}
    assert parameter_count(architecture) == sum(leaf.size for leaf in jax.tree.leaves(params))


@DEPTHS
@pytest.mark.parametrize("chosen", [[[0, 5, 15, 15], [7, 1, 0, 2]], [list(range(16)), [3] * 16]])
@KINDS
def test_states_at_chosen_positions_equal_those_of_all_positions(layers, chosen, kind):
    """Few positions: the last layer runs there only. Many: everywhere."""
    architecture, params = make(layers, kind)
    tokens = tokens_of(architecture.vocabulary, 2, 16)
    positions = np.array([[*range(6), *range(4, 14)], [*range(16)]])
    visible_until = np.array([[16] * 4 + [6] * 2 + [16] * 10, [9] * 9 + [14] * 5 + [15, 16]])
    given = (params, tokens, positions, visible_until, architecture)
    expected = jnp.take_along_axis(decoder.forward(*given), jnp.asarray(chosen)[..., None], axis=1)
    assert relative(decoder.forward(*given, chosen=jnp.asarray(chosen)), expected) < CLOSE


def test_logits_are_float32_from_bfloat16_weights():
    architecture, params = make(2)
    half = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), params)
    rows = jnp.zeros((1, 8), jnp.int32)
    x = jax.eval_shape(
        lambda params: decoder.forward(params, rows, rows, rows + 8, architecture), half
    )
    assert x.dtype == jnp.bfloat16
    assert (
        jax.eval_shape(lambda params, x: decoder.head(params, x, architecture), half, x).dtype
        == jnp.float32
    )


# ---- adapters ---------------------------------------------------------------------------------


@DEPTHS
def test_a_fresh_adapter_changes_nothing(layers):
    """B is zero; A is uniform in +-1/sqrt(inputs), as PEFT draws it."""
    architecture, params = make(layers)
    lora = Lora(rank=8)
    factors = init_adapter(architecture, lora, jax.random.key(0))
    tokens = tokens_of(architecture.vocabulary, 1, 12)
    with_adapter = our_logits(architecture, params, tokens, factors=factors, scale=scale_of(lora))
    assert np.array_equal(with_adapter, our_logits(architecture, params, tokens))
    for weight, inputs in (("q", 32), ("down", 48)):
        a = np.asarray(factors["last"][weight]["a"])
        assert a.dtype == np.float32
        assert np.abs(a).max() <= 1 / np.sqrt(inputs)
        # Variance of a uniform in +-w is w^2/3; 256 to 384 draws are within a quarter of it (6
        # sigma).
        assert abs(a.var() * 3 * inputs - 1) < 0.25


@pytest.mark.parametrize(
    ("layers", "targets", "rslora"),
    [
        (1, ("q",), True),
        (4, ("v", "o", "down"), False),
        (4, ("q", "k", "v", "o", "gate", "up", "down"), True),
    ],
)
def test_merged_weights_equal_the_adapter_beside_the_base(layers, targets, rslora):
    architecture, params = make(layers)
    lora = Lora(rank=4, alpha=6.0, targets=targets, rslora=rslora)
    factors = random_factors(architecture, lora)
    tokens = tokens_of(architecture.vocabulary, 2, 20)
    beside = our_logits(architecture, params, tokens, factors=factors, scale=scale_of(lora))
    assert (
        relative(our_logits(architecture, merge(params, factors, scale_of(lora)), tokens), beside)
        < CLOSE
    )
    assert relative(beside, our_logits(architecture, params, tokens)) > 1e-2  # the adapter matters


def test_scale_is_alpha_over_rank_or_its_root():
    assert scale_of(Lora(rank=16, alpha=32.0)) == 2.0
    assert scale_of(Lora(rank=16, alpha=32.0, rslora=True)) == 8.0


def test_dropout_of_packed_examples_equals_that_of_each_alone():
    """The mask follows the example, not its place in the row."""
    architecture, params = make()
    params = jax.tree.map(jnp.asarray, params)
    lora = Lora(rank=4, dropout=0.4)
    factors = random_factors(architecture, lora)
    from jaxre_kernels.lora import token_keys

    @jax.jit
    def run(tokens, owner, positions, visible_until, step=5):
        adapter = Adapter(
            factors,
            scale_of(lora),
            lora.dropout,
            token_keys(1, step, owner.astype(jnp.uint32), positions),
        )
        return decoder.forward(params, tokens, positions, visible_until, architecture, adapter)

    tokens = tokens_of(architecture.vocabulary, 1, 20)
    positions = np.concatenate([np.arange(8), np.arange(12)])[None]
    owner = np.repeat(np.array([77, 4_000_000_000], np.uint32), [8, 12])[None]
    packed = run(tokens, owner, positions, np.repeat([8, 20], [8, 12])[None])
    second = run(tokens[:, 8:], owner[:, 8:], positions[:, 8:], np.full((1, 12), 12))
    assert relative(packed[:, 8:], second) < CLOSE
    other_step = run(tokens[:, 8:], owner[:, 8:], positions[:, 8:], np.full((1, 12), 12), step=6)
    assert relative(other_step, second) > 1e-2
