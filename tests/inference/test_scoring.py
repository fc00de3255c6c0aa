"""Scores equal brute force by transformers, whatever the packing."""

import dataclasses
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from jaxre.errors import InputError
from jaxre.inference.model import Model
from jaxre.inference.scoring import (
    plan_scoring,
    probabilities,
    run_scoring,
    score_labels,
    target_log_probabilities,
)
from jaxre.inference.tree_rows import fill_trees
from jaxre.inference.trees import answer_tree

V, END = 97, 96

LABELS = {
    "a single label": [[5, 6, END]],
    "a label of no word": [[END], [3, END]],
    "a label that begins another": [[5, END], [5, 6, END], [5, 6, 7, END], [6, END]],
    "no end-of-turn token": [[5], [5, 6], [5, 6, 7], [6, 5]],
    "labels that share long beginnings": (
        [[1, 2, 3, 4, 5, 6, tail, END] for tail in (7, 8, 9)]
        + [[1, 2, 3, 4, END], [1, 2, 3, 4, 5, 6, 7, 1, END]]
    ),
    "forty labels": [
        [*np.random.default_rng(i).integers(0, 95, 2 + i % 9).tolist(), END] for i in range(40)
    ],
}


def some_prompts(lengths, seed=0):
    random = np.random.default_rng(seed)
    return [random.integers(0, V, length).tolist() for length in lengths]


@pytest.mark.parametrize("kind", ["qwen2", "gemma3_text"])
@pytest.mark.parametrize("labels", LABELS.values(), ids=LABELS)
def test_scores_equal_brute_force_one_label_at_a_time(models, labels, kind):
    model = models.random_model(V, adapter=True, kind=kind)
    prompts = some_prompts([1, 230, 17, 40, 60, 3, 90, 200])
    answers = [labels] * len(prompts)
    truth = models.brute_force(models.in_transformers(model), prompts, answers)
    plan = plan_scoring(prompts, answers, model.architecture)
    assert max(len(row) for batch in plan.batches for row in batch) > 1, "nothing was packed"
    # f32 sums of up to 10 tokens' log-probabilities, two implementations.
    assert models.largest_difference(run_scoring(model, plan), truth) < 1e-5


@pytest.mark.parametrize("adapter", [False, True], ids=["base", "lora"])
def test_scores_of_a_pretrained_model_equal_brute_force(models, shared_models, adapter):
    model = models.stories_model(shared_models, adapter=adapter)
    prompts = [
        [1, 403, 407, 261, 378],
        [1, 403, 407],
        [1, 403, 407, 261, 378, 403, 407, 261, 378] * 12,
    ]
    answers = [[[378, 2], [378, 261, 2], [261, 400, 2]]] * 3
    truth = models.brute_force(models.in_transformers(model), prompts, answers)
    assert models.largest_difference(score_labels(model, prompts, answers), truth) < 1e-5


def test_each_example_may_have_its_own_answer_tokens(models):
    model = models.random_model(V, adapter=True)
    prompts = some_prompts([12, 30, 7])
    answers = [[[1, END], [2, END]], [[3, 4, END], [3, END]], [[1, END], [9, 8, 7, END]]]
    truth = models.brute_force(models.in_transformers(model), prompts, answers)
    assert models.largest_difference(score_labels(model, prompts, answers), truth) < 1e-5


def test_one_example_is_scored_in_one_row(models):
    model = models.random_model(V, adapter=False)
    prompts, answers = some_prompts([20]), [LABELS["forty labels"]]
    plan = plan_scoring(prompts, answers, model.architecture)
    assert (len(plan.batches), plan.rows) == (1, 1)
    assert (
        models.largest_difference(
            run_scoring(model, plan),
            models.brute_force(models.in_transformers(model), prompts, answers),
        )
        < 1e-5
    )


@pytest.mark.parametrize("kind", ["qwen2", "gemma3_text"])
def test_rows_grow_until_the_tree_fits(models, kind):
    model = models.random_model(V, adapter=False, kind=kind)
    answers = [LABELS["forty labels"]]
    small, large = (
        plan_scoring(some_prompts([length]), answers, model.architecture) for length in (5, 1000)
    )
    assert small.length == 256 and large.length == 1280  # about 230 nodes, to a multiple of 128
    assert (
        models.largest_difference(
            run_scoring(model, large),
            models.brute_force(models.in_transformers(model), large.prompts, answers),
        )
        < 1e-5
    )


def test_packing_changes_nothing(models):
    model = models.random_model(V, adapter=True)
    prompts = some_prompts(np.random.default_rng(1).integers(2, 150, 30))
    answers = [LABELS["a label that begins another"]] * len(prompts)
    packed = score_labels(model, prompts, answers, batch_tokens=1024)
    alone = np.concatenate([score_labels(model, [prompt], answers[:1]) for prompt in prompts])
    assert models.largest_difference(packed, alone) < 1e-6  # the same sums, other places in the row


@pytest.mark.parametrize("kind", ["qwen2", "gemma3_text"])
def test_shared_prefixes_change_no_score(models, kind):
    model, random = models.random_model(V, adapter=True, kind=kind), np.random.default_rng(6)
    starts = [[first, *random.integers(0, V, 90).tolist()] for first in (1, 2)]
    prompts = [
        starts[number % 2] + own
        for number, own in enumerate(some_prompts([1, 40, 7, 150, 30, 3, 60, 12, 9, 20]))
    ]
    answers = [LABELS["a label that begins another"]] * len(prompts)
    plan = plan_scoring(prompts, answers, model.architecture, batch_tokens=256)
    assert [len(group.tokens) for group in plan.groups] == [91, 91]
    assert (
        models.largest_difference(
            run_scoring(model, plan),
            models.brute_force(models.in_transformers(model), prompts, answers),
        )
        < 1e-5
    )


def test_order_of_examples_changes_nothing(models):
    model = models.random_model(V, adapter=True)
    prompts = some_prompts(np.random.default_rng(2).integers(2, 150, 30))
    answers = [LABELS["labels that share long beginnings"]] * len(prompts)
    order = np.random.default_rng(3).permutation(len(prompts))
    straight = score_labels(model, prompts, answers)
    shuffled = score_labels(model, [prompts[i] for i in order], answers)
    assert models.largest_difference(shuffled, straight[order]) < 1e-6


def test_an_answer_sees_no_other_answer_and_no_other_example(models):
    model = models.random_model(V, adapter=False)
    prompts = some_prompts([20, 31])
    labels = [[1, 2, END], [1, 3, END], [4, 5, END]]
    before = score_labels(model, prompts, [labels] * 2)
    # The last label comes after the others in the row; only they and the other example change.
    other = score_labels(
        model, [prompts[0], prompts[1][::-1]], [[[1, 7, END], [1, 3, 9, END], labels[2]]] * 2
    )
    assert abs(before[0, 2] - other[0, 2]) < 1e-5
    assert abs(before[1, 2] - other[1, 2]) > 1e-2


def test_probabilities_sum_to_one_and_keep_the_order(models):
    scores = np.array([[-1000.0, -1001.0, -2000.0], [-0.1, -30.0, -3.0]])
    shares = probabilities(scores)
    np.testing.assert_allclose(shares.sum(axis=1), 1, rtol=1e-12)
    np.testing.assert_allclose(shares[0, 1] / shares[0, 0], np.exp(-1), rtol=1e-12)
    assert (shares.argsort(axis=1) == scores.argsort(axis=1)).all()


@pytest.mark.parametrize("positions", [1, 3, 7, 1000], ids="{} positions at a time".format)
def test_head_in_parts_equals_the_whole_head(models, positions):
    model = models.random_model(V, adapter=True)
    plan = plan_scoring(
        some_prompts([20, 30, 200, 100]), [LABELS["forty labels"]] * 4, model.architecture
    )
    rows = fill_trees(plan, 0)
    run = {"architecture": model.architecture, "scale": model.scale, "span": plan.span}
    whole = np.asarray(target_log_probabilities(model.params, model.factors, rows, None, **run))
    parts = np.asarray(
        target_log_probabilities(
            model.params, model.factors, rows, None, **run, head_bytes=positions * plan.rows * V * 4
        )
    )
    assert models.largest_difference(parts, whole) < 1e-6


def test_head_never_holds_all_logits(models):
    vocabulary = 50_000
    model = models.random_model(vocabulary, adapter=False)
    plan = plan_scoring(some_prompts([20] * 8), [LABELS["forty labels"]] * 8, model.architecture)
    rows = fill_trees(plan, 0)
    budget = 8 * 2**20
    assert plan.rows * plan.supervised * vocabulary * 4 > 20 * budget
    step = target_log_probabilities.lower(
        model.params,
        None,
        rows,
        None,
        architecture=model.architecture,
        span=plan.span,
        head_bytes=budget,
    ).compile()
    # Beside the budget: exponentials of the same size, and the small model's activations.
    assert step.memory_analysis().temp_size_in_bytes < 6 * budget


def test_one_compilation_serves_all_batches_and_all_factors(models):
    model = models.random_model(V, adapter=True, seed=7)
    prompts = some_prompts(np.random.default_rng(4).integers(2, 120, 50))
    plan = plan_scoring(
        prompts, [LABELS["forty labels"]] * len(prompts), model.architecture, batch_tokens=1024
    )
    assert len(plan.batches) > 3
    before = target_log_probabilities._cache_size()
    first = run_scoring(model, plan)
    later = Model(model.params, model.architecture, {**model.factors, "last": {}}, model.scale)
    changed = dataclasses.replace(
        model, factors=models.random_model(V, adapter=True, seed=8).factors
    )
    second = run_scoring(changed, plan)
    assert target_log_probabilities._cache_size() == before + 1
    assert models.largest_difference(second, first) > 1e-2
    run_scoring(later, plan)  # another form of adapter is another program
    assert target_log_probabilities._cache_size() == before + 2


def test_progress_counts_every_example(models):
    model = models.random_model(V, adapter=False)
    counts = []
    plan = plan_scoring(
        some_prompts([90] * 20),
        [LABELS["a single label"]] * 20,
        model.architecture,
        batch_tokens=512,
    )
    run_scoring(model, plan, on_results=counts.append)
    assert sum(map(len, counts)) == 20 and len(counts) == len(plan.batches) > 1
    assert f"{len(plan.batches)} batches" in str(plan) and 0 <= plan.pad_share < 1


def test_shared_beginnings_take_one_place():
    tree = answer_tree(LABELS["labels that share long beginnings"])
    assert tree.tokens.tolist() == [1, 2, 3, 4, 5, 6, 7, 1, 8, 9]
    assert tree.depths.tolist() == [0, 1, 2, 3, 4, 5, 6, 7, 6, 6]
    assert tree.until.tolist() == [10, 10, 10, 10, 10, 10, 8, 8, 9, 10]


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["qwen2", "gemma3_text"])
def test_scores_on_a_mesh_equal_one_device(kind):
    code = """
import sys

sys.path.insert(0, "tests/inference")
import jax, numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec as P
from conftest import largest_difference, random_model
from jaxre.inference.model import Model
from jaxre.inference.scoring import score_labels
from jaxre.models.weights import places, tree_of

assert jax.device_count() == 8
model = random_model(96, adapter=True, kind=sys.argv[1])
random = np.random.default_rng(0)
start = random.integers(0, 95, 40).tolist()
prompts = [
    start + random.integers(0, 95, length).tolist() for length in random.integers(5, 100, 21)
]
answers = [[[5, 95], [5, 6, 95], [7, 95]]] * 21
truth = score_labels(model, prompts, answers)
for shape in ((2, 2, 2),):  # every axis at once
    mesh = Mesh(np.array(jax.devices()).reshape(shape), ("data", "fsdp", "tensor"))

    def put(axes, weight):
        fits = [
            axis if axis and size % mesh.shape[axis] == 0 else None
            for axis, size in zip(axes, weight.shape)
        ]
        return jax.device_put(weight, NamedSharding(mesh, P(*fits)))

    axes = tree_of((path, axes) for _, path, _, axes in places(model.architecture))
    params = jax.tree.map(put, axes, model.params, is_leaf=lambda leaf: isinstance(leaf, tuple))
    factors = jax.device_put(model.factors, NamedSharding(mesh, P()))
    sharded = Model(params, model.architecture, factors, model.scale)
    found = score_labels(
        sharded, prompts, answers, sharding=NamedSharding(mesh, P(("data", "fsdp")))
    )
    print(shape, largest_difference(found, truth))
    assert largest_difference(found, truth) < 1e-5, shape
"""
    result = subprocess.run(
        [sys.executable, "-c", code, kind],
        capture_output=True,
        text=True,
        cwd=Path(__file__).parents[2],
        env={
            "XLA_FLAGS": "--xla_force_host_platform_device_count=8",
            "JAX_PLATFORMS": "cpu",
            "PATH": "/usr/bin:/bin",
        },
    )
    assert result.returncode == 0, result.stderr[-2000:]


@pytest.mark.parametrize(
    ("prompts", "answers", "message"),
    [
        ([], [], "no example"),
        ([[1]], [[]], "no label"),
        ([[1]], [[[3, END], []]], "label 1 .* no token"),
        ([[1]], [[[3, END], [4, END], [3, END]]], "label 2 .* same tokens"),
        ([[1], []], [[[3, END]]] * 2, "example 1: its prompt"),
        ([[1] * 2047], [[[3, END]]], "the model reads 2048"),
        ([[1] * 1025], [[[3, END]]], "raise predict.batch_tokens"),
    ],
)
def test_unusable_input_is_named(models, prompts, answers, message):
    with pytest.raises(InputError, match=message) as caught:
        score_labels(models.random_model(V, adapter=False), prompts, answers, batch_tokens=1024)
    assert "\n" not in str(caught.value)


def test_a_prompt_as_long_as_the_model_reads_is_scored(models):
    model = models.random_model(V, adapter=False)
    prompts, answers = some_prompts([2046]), [[[3, END], [4, END]]]
    truth = models.brute_force(models.in_transformers(model), prompts, answers)
    assert models.largest_difference(score_labels(model, prompts, answers), truth) < 1e-5
