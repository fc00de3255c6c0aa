"""Greedy decoding equals transformers' `generate(do_sample=False)`, token for token in f32."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxre.errors import InputError
from jaxre.inference.decoding import clean_answer, decode, decode_until, fill, generate
from jaxre.inference.prefix import shared_prefixes
from jaxre.inference.scoring import score_labels

V = 97


def greedy(truth, prompts, stop_ids, max_new_tokens):
    """transformers, one prompt at a time: new tokens and the sum of their log-probabilities."""
    torch = pytest.importorskip("torch")
    results = []
    for prompt in prompts:
        ids = torch.tensor([prompt])
        settings = {
            "do_sample": False,
            "num_beams": 1,
            "max_new_tokens": max_new_tokens,
            "eos_token_id": sorted(stop_ids) or None,
            "pad_token_id": 0,
        }
        found = truth.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            output_logits=True,
            return_dict_in_generate=True,
            **settings,
        )
        new = found.sequences[0, len(prompt) :].tolist()
        score = sum(
            torch.log_softmax(logits[0].double(), -1)[token].item()
            for token, logits in zip(new, found.logits, strict=True)
        )
        results.append((new, score))
    return results


def some_prompts(lengths, seed=0):
    random = np.random.default_rng(seed)
    return [random.integers(0, V, length).tolist() for length in lengths]


def check(models, model, prompts, stop_ids, max_new_tokens, **settings):
    truth = greedy(models.in_transformers(model), prompts, stop_ids, max_new_tokens)
    found = decode(model, prompts, stop_ids, max_new_tokens, **settings)
    assert [one.tokens for one in found] == [tokens for tokens, _ in truth]
    assert (
        models.largest_difference(
            np.array([one.score for one in found]), np.array([score for _, score in truth])
        )
        < 1e-5
    )
    return found


@pytest.mark.parametrize("adapter", [False, True], ids=["base", "lora"])
def test_pretrained_model_writes_what_transformers_writes(models, shared_models, adapter):
    model = models.stories_model(shared_models, adapter=adapter)
    once = [1, 403, 407, 261, 378]
    check(models, model, [[1], once, once[:3], once * 20, [1, 300, 301]], {2}, 40)


@pytest.mark.parametrize("kind", ["qwen2", "gemma3_text"])
@pytest.mark.parametrize("adapter", [False, True], ids=["base", "lora"])
def test_a_random_model_writes_what_transformers_writes(models, adapter, kind):
    model = models.random_model(V, adapter=adapter, kind=kind)
    check(models, model, some_prompts([1, 5, 64, 65, 128, 33]), set(), 30)


def test_rows_stop_one_by_one_at_any_stop_token(models):
    model = models.random_model(V, adapter=True)
    prompts = some_prompts([4, 9, 30, 12, 7, 50], seed=1)
    free = generate(model, prompts, set(), 24)
    stops = {free[0][3], free[1][10], free[2][0]}
    found = check(models, model, prompts, stops, 24)
    assert len({len(one.tokens) for one in found}) > 2
    assert found[2].tokens == [free[2][0]]


def test_one_new_token_and_one_prompt(models):
    model = models.random_model(V, adapter=False)
    check(models, model, some_prompts([7]), set(), 1)


@pytest.mark.parametrize(
    ("shared", "lengths"),
    [(70, [1, 9, 30, 12, 7, 3, 22, 140, 5, 6]), (99, [0, 3])],
    ids=["more prompts than slots, lengths far apart", "a prompt that is the prefix"],
)
@pytest.mark.parametrize("kind", ["qwen2", "gemma3_text"])
def test_a_shared_prefix_changes_no_token(models, shared, lengths, kind):
    start = some_prompts([shared], seed=7)[0]
    model = models.random_model(V, adapter=True, kind=kind)
    prompts = [start + own for own in some_prompts(lengths, seed=8)]
    stops = set(range(0, V, 9))  # answers end at any step, some at the first
    found = check(models, model, prompts, stops, 10, batch_tokens=200)
    assert len(lengths) == 2 or len({len(one.tokens) for one in found}) > 2


@pytest.mark.slow
def test_bfloat16_weights_decode_as_they_score(models):
    model = models.random_model(V, adapter=True)
    model = dataclasses.replace(
        model, params=jax.tree.map(lambda w: w.astype(jnp.bfloat16), model.params)
    )
    prompts = some_prompts([5, 20])
    found = decode(model, prompts, set(), 8)
    scores = [
        score_labels(model, [prompt], [[one.tokens]])[0, 0]
        for prompt, one in zip(prompts, found, strict=True)
    ]
    # A bfloat16 sum differs by its order: 8 bits, through two layers.
    np.testing.assert_allclose([one.score for one in found], scores, rtol=0.03)


def test_batches_and_buckets_change_nothing(models):
    model = models.random_model(V, adapter=True)
    prompts = some_prompts(np.random.default_rng(5).integers(1, 65, 9))
    alone = [generate(model, [prompt], {3}, 12)[0] for prompt in prompts]
    assert generate(model, prompts, {3}, 12) == alone
    assert generate(model, prompts, {3}, 12, batch_tokens=300) == alone


def test_few_compilations_whatever_the_lengths(models):
    model = models.random_model(V, adapter=False, seed=3)
    prompts = some_prompts(range(1, 300, 11))
    before = fill._cache_size(), decode_until._cache_size()
    counts = []
    decode(model, prompts, {3}, 5, batch_tokens=1024, on_results=counts.append)
    assert sum(map(len, counts)) == len(prompts) and len(counts) > 3
    assert max(fill._cache_size() - before[0], decode_until._cache_size() - before[1]) <= 3
    after = fill._cache_size(), decode_until._cache_size()
    decode(model, prompts[::-1], {4}, 5, batch_tokens=1024)
    assert (fill._cache_size(), decode_until._cache_size()) == after


def test_prompts_of_several_beginnings_share_their_programs(models):
    model, starts = models.random_model(V, adapter=False), some_prompts([150] * 3, seed=9)
    lengths = [range(1, 6), range(30, 34), range(60, 69)]
    prompts = [
        start + own
        for start, some in zip(starts, lengths, strict=True)
        for own in some_prompts(some, seed=10)
    ]
    assert [len(group.tokens) for group in shared_prefixes(prompts, 256)] == [150] * 3
    before = fill._cache_size(), decode_until._cache_size()
    check(models, model, prompts, {3}, 4, batch_tokens=256)
    assert (fill._cache_size(), decode_until._cache_size()) == (before[0] + 1, before[1] + 1)


@pytest.mark.parametrize(
    ("prompts", "message"),
    [([], "no example"), ([[1], []], "example 1"), ([[1] * 2047], "lower predict.max_new_tokens")],
)
def test_unusable_prompts_are_named(models, prompts, message):
    with pytest.raises(InputError, match=message):
        generate(models.random_model(V, adapter=False), prompts, {3}, 2)


@pytest.mark.parametrize(
    ("text", "label"),
    [
        ("Cause-Effect(e1,e2)", "Cause-Effect(e1,e2)"),
        ("Answer: Other", "Other"),
        ("\n Answer:Other \nbecause", "Other"),
        ("Answer:\nOther\nmore", "Other"),
        ("Other\n\nText: next", "Other"),
        ("The Answer: Other", "The Answer: Other"),
        ("", ""),
        ("Answer:", ""),
        (" \n\t", ""),
    ],
)
def test_only_a_leading_answer_and_later_lines_are_stripped(text, label):
    assert clean_answer(text) == label
