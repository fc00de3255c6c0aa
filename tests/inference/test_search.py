"""The search finds the label that all scores name, whatever the tree."""

import dataclasses
import tracemalloc
import weakref

import jax
import numpy as np
import pytest

from jaxre.errors import InputError
from jaxre.inference import search
from jaxre.inference.prefix import shared_prefixes
from jaxre.inference.scoring import score_labels
from jaxre.inference.search import Branches, Search, best_labels, labels_above
from jaxre.inference.trees import answer_tree

V, END = 97, 96


def random_labels(count, seed):
    """Labels of few different tokens: many begin alike, some begin others."""
    random = np.random.default_rng(seed)
    labels = set()
    while len(labels) < count:
        labels.add((*random.integers(0, 4, random.integers(0, 7)).tolist(), END))
    return [list(label) for label in random.permutation(np.array(sorted(labels), dtype=object))]


def some_prompts(shared, lengths, seed=0):
    random = np.random.default_rng(seed)
    start = random.integers(0, V, shared).tolist()
    return [start + random.integers(0, V, length).tolist() for length in lengths]


def check(model, prompts, labels, **settings):
    done = []
    best, scores = best_labels(
        model, prompts, [labels] * len(prompts), **settings, on_results=done.append
    )
    truth = score_labels(model, prompts, [labels] * len(prompts))
    assert best.tolist() == truth.argmax(axis=1).tolist()
    # f32 sums of up to 7 tokens in another order
    np.testing.assert_allclose(scores, truth.max(axis=1), atol=2e-5)
    assert sum(map(len, done)) == len(prompts)
    everyone = {example: found for part in done for example, found in part.items()}
    assert everyone == {i: (int(best[i]), float(scores[i])) for i in range(len(prompts))}
    return best


@pytest.mark.parametrize(
    ("count", "shared", "lengths", "batch_tokens"),
    [(1, 0, [20], 2048), (40, 70, [*range(1, 40), 300], 1024)],
    ids=["one label, one example", "more examples than slots, lengths far apart"],
)
@pytest.mark.parametrize("kind", ["qwen2", "gemma3_text"])
def test_the_best_label_is_that_of_all_scores(models, count, shared, lengths, batch_tokens, kind):
    check(
        models.random_model(V, adapter=True, kind=kind),
        some_prompts(shared, lengths),
        random_labels(count, count),
        batch_tokens=batch_tokens,
    )


@pytest.mark.parametrize("kind", ["qwen2", "gemma3_text"])
def test_the_best_label_is_that_of_transformers_also_where_each_example_has_its_own_labels(
    models, kind
):
    model = models.random_model(V, adapter=True, kind=kind)
    prompts, answers = (
        some_prompts(70, [1, 9, 30, 12]),
        [random_labels(12, seed) for seed in range(4)],
    )
    truth = models.brute_force(models.in_transformers(model), prompts, answers)
    best, scores = best_labels(model, prompts, answers)
    assert best.tolist() == truth.argmax(axis=1).tolist()
    assert models.largest_difference(scores, truth.max(axis=1)) < 1e-5


def test_what_the_columns_do_not_settle_is_scored_in_full(models, monkeypatch):
    monkeypatch.setattr(search, "COLUMNS", 2)
    model = models.random_model(V, adapter=True)
    asked = []
    monkeypatch.setattr(
        search,
        "run_scoring",
        lambda model, plan: asked.append(plan) or search_run(model, plan),
    )
    check(model, some_prompts(70, range(5, 25)), random_labels(12, 5))
    assert 0 < len(asked[0].prompts) <= 20


def test_of_equal_scores_the_first_label_is_the_best(models):
    model = models.random_model(V, adapter=False)
    # Logits that are all 0: every token has probability 1/V, every label of a length the same
    # score.
    model = dataclasses.replace(model, params=jax.tree.map(np.zeros_like, model.params))
    labels = [[3, 4, 5, END], [7, 8, END], [2, 9, END], [2, 1, END], [1, 1, END]]
    for order in ([0, 1, 2, 3, 4], [4, 3, 2, 1, 0], [2, 0, 4, 1, 3]):
        best = check(model, some_prompts(70, [4, 5, 6]), [labels[number] for number in order])
        assert set(best.tolist()) == {next(place for place, number in enumerate(order) if number)}


@pytest.mark.parametrize("columns", [64, 3], ids=["search", "search or all scores"])
@pytest.mark.parametrize("kind", ["qwen2", "gemma3_text"])
def test_labels_above_a_probability_are_exact_and_the_others_bounded(
    models, monkeypatch, kind, columns
):
    """Against transformers, one label at a time; thresholds from all labels to the best alone."""
    monkeypatch.setattr(search, "COLUMNS", columns)
    model = models.random_model(V, adapter=True, kind=kind)
    prompts, answers = some_prompts(70, [1, 9, 30, 12]), [random_labels(12, 5)] * 4
    truth = models.brute_force(models.in_transformers(model), prompts, answers)
    counts = []
    for probability in (1e-25, 1e-9, 1e-4, 0.9):
        parts = []
        scores, exact = labels_above(model, prompts, answers, probability, on_results=parts.append)
        assert scores.shape == exact.shape == truth.shape
        np.testing.assert_allclose(scores[exact], truth[exact], atol=1e-4)
        assert (scores[~exact] > truth[~exact] - 1e-4).all()
        assert (scores[~exact] <= np.log(probability)).all()
        assert exact[truth > np.log(probability) + 1e-4].all()
        best = np.where(exact, scores, -np.inf).argmax(axis=1)
        assert best.tolist() == truth.argmax(axis=1).tolist()
        assert sorted(example for part in parts for example in part) == [0, 1, 2, 3]
        counts.append(int(exact.sum()))
    assert counts[0] == truth.size and counts == sorted(counts, reverse=True)
    assert counts[-1] < truth.size or columns == 3


def test_few_nodes_are_read_where_the_model_is_sure(models, monkeypatch):
    """A label that the model is sure of takes as many steps as it has tokens, not as many as the
    tree has nodes.
    """
    model = models.random_model(V, adapter=False)
    model = dataclasses.replace(model, params=model.params | {"norm": 30 * model.params["norm"]})
    prompts = some_prompts(0, [20])
    from jaxre.inference.decoding import generate

    sure = generate(model, prompts, set(), 6)[0]
    labels = [
        [*random, END] for random in np.random.default_rng(0).integers(0, 95, (50, 6)).tolist()
    ] + [sure]
    steps = []
    monkeypatch.setattr(
        search, "read_nodes", lambda *given, **more: steps.append(1) or nodes(*given, **more)
    )
    assert check(model, prompts, labels).tolist() == [50]
    assert len(steps) == 5


def test_prompts_of_several_beginnings_share_their_programs(models):
    model, labels = models.random_model(V, adapter=True), random_labels(12, 3)
    lengths = [range(1, 6), range(30, 34), range(60, 69)]
    prompts = [
        prompt for seed, some in enumerate(lengths) for prompt in some_prompts(150, some, seed)
    ]
    assert [len(group.tokens) for group in shared_prefixes(prompts, 256)] == [150] * 3
    before = search.fill._cache_size(), search.read_nodes._cache_size()
    check(model, prompts, labels, batch_tokens=256)
    assert (search.fill._cache_size(), search.read_nodes._cache_size()) == (
        before[0] + 1,
        before[1] + 1,
    )


def test_what_is_settled_is_not_kept(models, monkeypatch):
    """The open nodes of an example are many: its children of the root, at least."""
    begun, at_once = [], []

    def counted(*given):
        one = Search(*given)
        begun.append(weakref.ref(one))
        return one

    monkeypatch.setattr(search, "Search", counted)
    prompts, labels = some_prompts(70, range(1, 41)), random_labels(12, 3)
    best_labels(
        models.random_model(V, adapter=True),
        prompts,
        [labels] * len(prompts),
        batch_tokens=256,
        on_results=lambda done: at_once.append(sum(one() is not None for one in begun)),
    )
    assert len(begun) == len(prompts) and max(at_once) < len(prompts) / 2


def test_a_tree_of_many_labels_takes_memory_by_its_nodes():
    random = np.random.default_rng(0)
    tree = answer_tree(
        [[first, *random.integers(0, 4, 2).tolist(), END] for first in range(100, 700)]
    )
    tracemalloc.start()
    Branches.of(tree)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    # which have a place for each target of the root at each of 1,800 nodes
    assert peak < tree.targets.nbytes


def test_scores_that_are_no_numbers_are_refused(models):
    model = models.random_model(V, adapter=False)
    model = dataclasses.replace(
        model, params=model.params | {"norm": model.params["norm"] * np.nan}
    )
    with pytest.raises(InputError, match=r"example a: .*NaN"):
        best_labels(model, [[1, 2]], [[[3, END], [4, END]]], names=["a"])


@pytest.mark.parametrize(
    ("prompts", "answers", "message"),
    [
        ([], [], "no example"),
        ([[1], []], [[[3, END]]] * 2, "example 1: its prompt"),
        ([[1]], [[]], "no label"),
        ([[1] * 2047], [[[3, END]]], "the model reads 2048"),
        ([[1] * 1025], [[[3, END]]], "raise predict.batch_tokens"),
    ],
)
def test_unusable_input_is_named(models, prompts, answers, message):
    with pytest.raises(InputError, match=message):
        best_labels(models.random_model(V, adapter=False), prompts, answers, batch_tokens=1024)


nodes, search_run = search.read_nodes, search.run_scoring
