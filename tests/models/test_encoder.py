"""Our encoder's logits against transformers', on random layouts and on real pretrained weights;
what it promises of itself.
"""

from __future__ import annotations

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jaxre_kernels.cross_entropy import cross_entropy
from jaxre_kernels.lora import token_keys
from tiny_decoders import ground_truth, relative
from tiny_encoders import (
    CONFIGS,
    LABELS,
    build,
    fields_of,
    minilm,
    our_logits,
    their_logits,
    tokens_of,
)

from jaxre.checkpoints.huggingface import hf_tensors, load_base
from jaxre.models import encoder
from jaxre.models.architecture import architecture_of
from jaxre.models.encoder import classify, for_task
from jaxre.models.module import Encoder, init_weights, plain_weights
from jaxre.models.weights import parameter_count, places, tree_of

# The design's promise for f32. Measured: 1e-6 at most, which sums in another order account for.
PARITY = 1e-4
LENGTHS = (13, 20, 1, 7)  # of the examples in a packed row of 48; 7 places are pads


@pytest.fixture(scope="module", params=CONFIGS)
def pair(request, tmp_path_factory):
    """(transformers' classifier, our architecture, our weights) of one layout."""
    ground_truth("torch")
    folder = tmp_path_factory.mktemp("encoder")
    model = build(fields_of(request.param), folder)
    return model, *load_base(folder)


def random_encoder(name: str = "bert, two token types", **changes):
    architecture = architecture_of(fields_of(name, **changes), "test")
    draw = np.random.default_rng(0)

    def value(weight, shape):
        return (draw.standard_normal(shape) * 0.3 + (weight.initial == "ones")).astype(np.float32)

    return architecture, tree_of(
        (path, value(weight, shape)) for weight, path, shape, _ in places(architecture)
    )


def test_logits_equal_transformers(pair):
    model, architecture, params = pair
    tokens = tokens_of(architecture, 2, architecture.max_length - 5)
    assert architecture.labels == LABELS
    assert (
        relative(our_logits(architecture, params, tokens)[:, 0], their_logits(model, tokens))
        < PARITY
    )


def test_the_longest_example_equals_transformers(pair):
    """The last row of the position table is that of the last token."""
    model, architecture, params = pair
    tokens = tokens_of(architecture, 1, architecture.max_length)
    assert (
        architecture.max_length
        == 64 - {"bert": 0, "roberta": model.config.pad_token_id + 1}[architecture.kind]
    )
    assert (
        relative(our_logits(architecture, params, tokens)[:, 0], their_logits(model, tokens))
        < PARITY
    )


def test_packed_rows_equal_transformers_one_by_one(pair):
    model, architecture, params = pair
    tokens = tokens_of(architecture, 2, 48)
    packed = our_logits(architecture, params, tokens, LENGTHS)
    for number, (start, end) in enumerate(itertools.pairwise(np.cumsum((0, *LENGTHS)))):
        assert relative(packed[:, number], their_logits(model, tokens[:, start:end])) < PARITY


def test_logits_equal_transformers_on_real_pretrained_weights():
    """all-MiniLM-L6-v2, stored without prefix and without head, on SemEval-like text; the head is
    ours on both sides.
    """
    torch = ground_truth("torch")
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    folder = minilm()
    architecture, params = load_base(folder)
    assert architecture.labels == () and parameter_count(architecture) == 22_713_216
    tokenizer = AutoTokenizer.from_pretrained(folder)
    architecture, params, fresh = for_task(architecture, params, len(tokenizer), {}, LABELS, seed=0)
    assert fresh == ("classifier", "classifier_bias")
    theirs = AutoModelForSequenceClassification.from_pretrained(
        folder, num_labels=len(LABELS), attn_implementation="eager"
    ).eval()
    with torch.no_grad():
        theirs.classifier.weight.copy_(torch.tensor(params["classifier"].T))
        theirs.classifier.bias.copy_(torch.tensor(params["classifier_bias"]))
    texts = [
        "The most common audits were about waste and recycling.",
        "It was a bright cold day in April. " * 55,
    ]
    for text in texts:
        tokens = np.array([tokenizer(text)["input_ids"]], np.int32)
        assert (
            relative(our_logits(architecture, params, tokens)[:, 0], their_logits(theirs, tokens))
            < PARITY
        )
    assert tokens.shape[1] > 400


def test_gradients_equal_transformers(pair):
    """Gradients of every weight for the cross-entropy of one example a row, without dropout."""
    torch = ground_truth("torch")
    model, architecture, params = pair
    tokens, targets = tokens_of(architecture, 3, 20), np.array([0, 4, 2])
    rows = (
        jnp.broadcast_to(jnp.arange(20), (3, 20)),
        jnp.full((3, 20), 20),
        jnp.zeros((3, 1), jnp.int32),
    )

    @jax.jit
    def gradient(params):
        def loss(params):
            logits = classify(params, jnp.asarray(tokens), *rows, architecture)[:, 0]
            return cross_entropy(logits, jnp.asarray(targets), jnp.ones(3))

        return jax.grad(loss)(params)

    model.zero_grad()
    logits = model(
        torch.tensor(tokens, dtype=torch.long), attention_mask=torch.ones(tokens.shape)
    ).logits
    torch.nn.functional.cross_entropy(logits, torch.tensor(targets), reduction="sum").backward()
    theirs = {name: parameter.grad.numpy() for name, parameter in model.named_parameters()}
    ours = dict(hf_tensors(architecture, gradient(jax.tree.map(jnp.asarray, params))))
    assert set(ours) == set(theirs)
    for name, value in ours.items():
        if "key.bias" in name:  # shifts all scores of a query equally: rounding
            assert max(np.abs(value).max(), np.abs(theirs[name]).max()) < 1e-5
        elif not name.endswith("word_embeddings.weight"):
            assert relative(value, theirs[name]) < PARITY, name
    # transformers never moves the pad token's row; it does not occur here.
    embed = next(name for name in ours if name.endswith("word_embeddings.weight"))
    assert relative(ours[embed][8:], theirs[embed][8:]) < PARITY


# ---- packing ----------------------------------------------------------------------------------


def test_a_token_of_another_example_changes_nothing():
    """Bit for bit: the mask leaves no weight at all, neither forwards nor backwards in the row."""
    architecture, params = random_encoder()
    tokens = tokens_of(architecture, 1, 24)
    other = tokens.copy()
    other[0, 3] += 1
    before, after = (our_logits(architecture, params, one, (12, 10)) for one in (tokens, other))
    assert np.array_equal(before[:, 1], after[:, 1])
    assert not np.array_equal(before[:, 0], after[:, 0])
    pad = tokens.copy()
    pad[0, 23] += 1
    assert np.array_equal(before, our_logits(architecture, params, pad, (12, 10)))


def test_a_token_sees_the_later_tokens_of_its_example():
    architecture, params = random_encoder()
    tokens = tokens_of(architecture, 1, 24)
    other = tokens.copy()
    other[0, 11] += 1
    before, after = (our_logits(architecture, params, one, (12, 12)) for one in (tokens, other))
    assert relative(after[:, 0], before[:, 0]) > 1e-3


def test_compile_time_does_not_grow_with_depth():
    sizes = []
    rows = jax.ShapeDtypeStruct((1, 8), jnp.int32)
    for layers in (3, 12):
        architecture = architecture_of(
            fields_of("bert, two token types", num_hidden_layers=layers), "test"
        )
        params = tree_of(
            (path, jax.ShapeDtypeStruct(shape, jnp.float32))
            for _, path, shape, _ in places(architecture)
        )
        lowered = jax.jit(classify, static_argnums=5).lower(
            params, rows, rows, rows, rows, architecture
        )
        sizes.append(lowered.as_text().count("\n"))
    assert sizes[1] <= sizes[0] + 5


def test_nnx_module_equals_the_free_functions():
    architecture, _ = random_encoder()
    module = Encoder(architecture, rngs=nnx.Rngs(3))
    tokens = tokens_of(architecture, 2, 12)
    expected = our_logits(architecture, plain_weights(module), tokens)[:, 0]
    assert relative(jax.jit(module)(jnp.asarray(tokens)), expected) < 1e-5
    assert jax.tree.all(
        jax.tree.map(np.array_equal, plain_weights(module), init_weights(architecture, 3))
    )


# 0.02 measured; bf16 keeps 8 bits
def test_logits_are_float32_from_bfloat16_weights():
    architecture, params = random_encoder()
    half = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.bfloat16), params)
    tokens = tokens_of(architecture, 2, 24)
    logits = our_logits(architecture, half, tokens)
    assert logits.dtype == np.float32
    assert relative(logits, our_logits(architecture, params, tokens)) < 0.05


# ---- new tokens and labels --------------------------------------------------------------------


def test_new_tokens_start_where_transformers_starts_them():
    """`resize_token_embeddings` draws them from the mean of the old rows with a billionth of their
    covariance.
    """
    torch = ground_truth("torch")
    torch.manual_seed(0)
    model = build(fields_of("bert, two token types"))
    embed = model.bert.embeddings.word_embeddings.weight.detach().numpy().copy()
    model.resize_token_embeddings(len(embed) + 4)
    theirs = model.bert.embeddings.word_embeddings.weight.detach().numpy()
    architecture, params = random_encoder()
    fitted, grown, fresh = for_task(
        architecture,
        params | {"embed": embed},
        len(embed) + 4,
        dict.fromkeys(range(len(embed), len(embed) + 4), ()),
        LABELS,
        0,
    )
    assert fitted.vocabulary == len(embed) + 4 and fresh == ()
    assert np.array_equal(grown["embed"][: len(embed)], embed)
    # five times the standard deviation of their noise
    np.testing.assert_allclose(grown["embed"], theirs, atol=3e-4)
    np.testing.assert_allclose(
        grown["embed"][len(embed) :], np.tile(embed.mean(axis=0), (4, 1)), atol=1e-6
    )


def test_spare_rows_of_the_embeddings_serve_new_tokens():
    """A tokenizer of 90 tokens beside 97 rows: the four markers take rows 90 to 93, and nothing
    grows.
    """
    architecture, params = random_encoder()
    fitted, grown, _ = for_task(
        architecture, params, 94, dict.fromkeys(range(90, 94), ()), LABELS, 0
    )
    assert fitted.vocabulary == 97
    assert np.array_equal(
        np.delete(grown["embed"], range(90, 94), axis=0),
        np.delete(params["embed"], range(90, 94), axis=0),
    )
    np.testing.assert_allclose(
        grown["embed"][90:94], np.tile(params["embed"].mean(axis=0), (4, 1)), atol=1e-6
    )


@pytest.mark.parametrize("kind", ["bert", "roberta"])
def test_hidden_states_are_dropped_where_transformers_drops_them(kind, monkeypatch):
    """After the embeddings, after each layer's attention and MLP, before the last map; RoBERTa's
    head drops its input too.
    """
    fields = fields_of(
        "bert, one layer",
        model_type=kind,
        pad_token_id=1,
        hidden_dropout_prob=0.1,
        classifier_dropout=0.3,
    )
    architecture = architecture_of(fields, "test")
    places, keep = [], encoder.keep_mask

    def recorded(keys, layer, place, channels, rate):
        places.append((int(layer), place, rate))
        return keep(keys, layer, place, channels, rate)

    monkeypatch.setattr(encoder, "keep_mask", recorded)
    params, tokens = init_weights(architecture, 0), jnp.asarray(tokens_of(architecture, 2, 8))
    at, until, first = (
        jnp.broadcast_to(jnp.arange(8), (2, 8)),
        jnp.full((2, 8), 8),
        jnp.zeros((2, 1), jnp.int32),
    )
    classify(
        params,
        tokens,
        at,
        until,
        first,
        architecture,
        token_keys(0, jnp.int32(0), at.astype(jnp.uint32), at),
    )
    head = [(2, 0, 0.3)] * (kind == "roberta") + [(2, 1, 0.3)]
    assert places == [(1, 0, 0.1), (0, 0, 0.1), (0, 1, 0.1), *head]


def test_a_described_token_starts_at_the_mean_of_its_description():
    architecture, params = random_encoder()
    _, grown, _ = for_task(architecture, params, 99, {97: [3], 98: [5, 7]}, LABELS, 0)
    old = params["embed"].astype(np.float64)
    np.testing.assert_allclose(grown["embed"][97:], [old[3], (old[5] + old[7]) / 2], atol=1e-7)


@pytest.mark.parametrize("name", ["bert, two token types", "roberta, positions from 2"])
def test_a_head_is_reused_for_its_own_labels_and_drawn_for_others(name):
    architecture, params = random_encoder(name)
    same = for_task(architecture, params, 0, {}, LABELS, 0)
    assert same[2] == () and np.array_equal(same[1]["classifier"], params["classifier"])
    fitted, drawn, fresh = for_task(architecture, params, 0, {}, ("a", "b"), 0)
    assert fresh == ("classifier", "classifier_bias") and fitted.labels == ("a", "b")
    assert drawn["classifier"].shape == (32, 2) and not drawn["classifier_bias"].any()
    assert np.array_equal(drawn["dense"], params["dense"])
    bare = dataclasses.replace(architecture, labels=(), dense=False)
    body = {
        key: value for key, value in params.items() if not key.startswith(("dense", "classifier"))
    }
    _, whole, fresh = for_task(bare, body, 0, {}, ("a", "b"), 0)
    assert fresh == ("dense", "dense_bias", "classifier", "classifier_bias")
    # Normal with the model's own 0.1: 1,024 draws are within a tenth of it (4 sigma).
    assert abs(whole["dense"].std() / architecture.initializer_range - 1) < 0.1
