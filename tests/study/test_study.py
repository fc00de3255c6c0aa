"""A study from its plan to its record: what is done again, what is not, what a kill and a failure
leave.
"""

from __future__ import annotations

import copy
import io
import itertools
import json
import shutil
from pathlib import Path

import jax
import pytest
from refusals import refusal
from rich.console import Console
from tiny import write_tiny_model
from tiny_grid import study_of, study_tree

from jaxre.checkpoints.source import open_model
from jaxre.data.dataset import make_plan as packing
from jaxre.evaluation.evaluate import evaluate_rows
from jaxre.evaluation.predictions import write_predictions
from jaxre.evaluation.report.prompt_effects import prompt_sensitivity
from jaxre.evaluation.report.record import read_record
from jaxre.evaluation.report.study_scores import measure
from jaxre.inference.predict import predict_examples
from jaxre.objectives import load_dataset
from jaxre.relations.sources import load
from jaxre.study import execute
from jaxre.study.estimate import sizes_of, training_load
from jaxre.study.execute import study
from jaxre.study.plan import in_order, make_plan, plan_table
from jaxre.study.results import results_table
from jaxre.training.run_folder import locked

PREDICTED = [
    "predict.majority.facts",
    "predict.majority.verbs",
    "predict.tfidf.facts",
    "predict.tfidf.verbs",
]
STEPS = [
    *PREDICTED,
    "train.tiny-both-0shot",
    "measure.tiny-both-0shot",
    "predict.tiny-both-0shot-generic-0shot.facts",
    "predict.tiny-both-0shot-generic-0shot.verbs",
]


def quiet() -> Console:
    return Console(file=io.StringIO(), width=200)


def undone(tree: dict) -> list[str]:
    """The steps that are not done."""
    made = make_plan(study_of(tree))
    return [name for name, step in made.steps.items() if made.state(step) != "done"]


@pytest.fixture(scope="module")
def tree(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict:
    return study_tree(tmp_path_factory.mktemp("study"), tiny_model)


@pytest.fixture(scope="module")
def finished(tree: dict) -> Path:
    """A whole study, killed twice: when its second run is asked for the second dataset, and while
    the predictions are written.
    """
    whole, calls = study_of(tree), []

    def killed(*given: object, **settings: object) -> object:
        calls.append("predict")
        if len(calls) == 2:
            raise KeyboardInterrupt
        return predict_examples(*given, **settings)

    def cut(path: Path, rows: list) -> None:
        calls.append("write")
        raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(execute, "write_predictions", cut)
        with pytest.raises(KeyboardInterrupt):
            study(whole, quiet())
        assert calls == ["write"] and undone(tree) == STEPS
        calls.clear()
        patch.setattr(execute, "write_predictions", write_predictions)
        patch.setattr(execute, "predict_examples", killed)
        with pytest.raises(KeyboardInterrupt):
            study(whole, quiet())
        assert undone(tree) == STEPS[-1:]
        assert not (whole.folder / "study.json").exists()
        patch.setattr(execute, "predict_examples", predict_examples)
        patch.setattr(
            execute, "train", lambda *_, **__: pytest.fail("a finished run is trained again")
        )
        assert study(whole, quiet()) == 0
    return whole.folder


def test_the_plan_names_each_step_once_after_what_it_needs(tree: dict) -> None:
    tree = copy.deepcopy(tree)
    tree["adaptation"] = {
        "read": {
            "of": "tiny",
            "text": {"sources": [{"dataset": "facts", "split": "train", "limit": 20}]},
            "train": {
                "method": "full",
                "batch_tokens": 512,
                "row_length": 128,
                "max_steps": 2,
                "best": "loss",
            },
            "regimes": ["both"],
            "shots": [0],
        }
    }
    tree["shots"], tree["untuned"] = [0, 1], True
    made = make_plan(study_of(tree))
    order = [step.name for step in in_order(made)]
    assert sorted(order) == sorted(made.steps) and set(STEPS) < set(order)
    assert order.index("train.read-text") < order.index("train.read-both-0shot")
    # All that needs the base comes before the language model's result is opened, and that is opened
    # once.
    bases = [step.base for step in in_order(made) if step.base]
    assert sum(one != other for one, other in itertools.pairwise(bases)) == len(set(bases)) - 1
    assert not any(step.problem for step in made.steps.values())


def test_a_sample_tells_the_tokens_of_the_whole_run(tree: dict, tiny_model: Path) -> None:
    """All 60 examples are in the sample here, so the count is that of the run itself, without the 4
    that are longer than a row.
    """
    made = make_plan(study_of(tree))
    config = made.steps["train.tiny-both-0shot"].config
    whole = config.model_copy(
        update={"train": config.train.model_copy(update={"max_steps": None, "epochs": 3})}
    )
    split = load_dataset(whole, tiny_model).train
    found = training_load(whole, made.read)
    assert found.examples == len(split.tokens) == 60 - len(split.dropped)
    assert found.tokens == pytest.approx(3 * split.tokens.lengths.sum())
    part = training_load(config, made.read)  # two updates
    updates = len(packing(whole, split.tokens, shards=1).updates)
    assert (
        part.train_flops == pytest.approx(found.train_flops * 2 / updates)
        and part.tokens < found.tokens
    )


def test_a_finished_study_is_not_done_again_and_its_record_tells_all(
    finished: Path, tree: dict, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("train", "predict_examples", "open_model"):
        monkeypatch.setattr(execute, name, lambda *_, **__: pytest.fail("done again"))
    assert undone(tree) == []
    console = quiet()
    assert study(study_of(tree), console) == 0
    record = read_record(finished)
    assert [system.name for system in record.systems] == [
        "tiny-both-0shot-generic-0shot",
        "majority",
        "tfidf",
    ]
    assert {name: len(examples) for name, examples in record.examples.items()} == {
        "facts": 12,
        "verbs": 12,
    }
    tuned = record.systems[0]
    assert (tuned.kind, tuned.regime, tuned.train_shots, tuned.prompt_shots, tuned.enumerated) == (
        "tuned",
        "both",
        0,
        0,
        False,
    )
    assert (
        tuned.seconds > 0
        and tuned.latency_ms > 0
        and tuned.peak_memory_bytes > 0
        and tuned.parameters > 0
    )
    assert (tuned.truncation["examples"], tuned.truncation["cut"]) == (60, 4) and record.systems[
        1
    ].truncation == {}
    (run,) = (finished / "runs").iterdir()
    opened = open_model(run, None)
    held = sum(leaf.nbytes for leaf in jax.tree.leaves(opened.base))
    adapter = sum(leaf.nbytes for leaf in jax.tree.leaves(opened.factors))
    assert (
        tuned.sizes["base"] == tuned.sizes["merged"] == held and tuned.sizes["adapter"] == adapter
    )
    assert held / 8 < tuned.sizes["nf4"] < held
    for system in record.systems:
        for name in ("facts", "verbs"):
            rows = record.rows(system, name)
            assert [row.example_id for row in rows] == list(record.examples[name])
            assert f"{evaluate_rows(rows, name).f1:.3f}" in console.file.getvalue()


def test_sizes_of_an_nf4_base_are_those_of_its_arrays(tiny_model: Path) -> None:
    opened = open_model(tiny_model, None, "nf4")
    assert sizes_of(opened.architecture, 4)["nf4"] == sum(
        leaf.nbytes for leaf in jax.tree.leaves(opened.base)
    )


@pytest.mark.parametrize(
    ("place", "value", "expected"),
    [
        (
            "datasets.facts.test.limit",
            11,
            [name for name in STEPS if name.startswith("predict") and name.endswith("facts")],
        ),
        ("base.train.learning_rate", 2e-2, STEPS[4:]),
        ("base.train.log_every", 5, []),
        (
            "datasets.facts.train.limit",
            29,
            [name for name in STEPS if name not in PREDICTED or name.endswith("facts")],
        ),
        ("evaluation.mode", "generate", STEPS[-2:]),
        ("base.predict", {"batch_tokens": 4096}, []),
        ("base.prompt.user", "{text}\n{head} -> {tail}:", STEPS[4:]),
    ],
)
def test_a_change_asks_for_what_depends_on_it_and_nothing_else(
    finished: Path, tree: dict, place: str, value: object, expected: list
) -> None:
    changed = copy.deepcopy(tree)
    *sections, last = place.split(".")
    node = changed
    for section in sections:
        node = node[section]
    node[last] = value
    assert undone(changed) == expected
    assert undone(tree) == []


def test_changed_weights_and_examples_are_seen(
    finished: Path, tree: dict, tiny_model: Path, tmp_path: Path
) -> None:
    changed = copy.deepcopy(tree)
    shutil.copytree(tiny_model, tmp_path / "model")
    changed["models"]["tiny"]["model"]["path"] = str(tmp_path / "model")
    assert undone(changed) == []  # the same weights in another place
    weights = tmp_path / "model" / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    assert undone(changed) == STEPS[4:]


def test_predictions_that_are_gone_are_made_again(finished: Path, tree: dict) -> None:
    path = finished / "predictions" / "majority" / "facts.parquet"
    kept = path.read_bytes()
    path.unlink()
    assert undone(tree) == ["predict.majority.facts"]
    assert study(study_of(tree), quiet()) == 0
    assert path.read_bytes() == kept


def test_a_run_that_fails_is_told_and_tried_again_and_the_others_go_on(
    tmp_path: Path, tiny_model: Path, monkeypatch
) -> None:
    broken = write_tiny_model(tmp_path / "broken")
    kept = (broken / "model.safetensors").read_bytes()
    (broken / "model.safetensors").write_bytes(kept[:1000])
    tree = study_tree(tmp_path, tiny_model)
    tree |= {
        "models": {"broken": {"model": {"path": str(broken)}}},
        "baselines": False,
        "frontier": [],
    }
    tree["regimes"] = {"facts": {"datasets": ["facts"]}}
    tree["evaluation"]["cross_domain"] = False
    tree["frontier"] = [
        {"name": "cached", "datasets": ["facts"], "cache": str(tmp_path / "cached.csv")}
    ]
    console, cleared, clear = quiet(), [], jax.clear_caches
    monkeypatch.setattr(jax, "clear_caches", lambda: (cleared.append(1), clear()))
    # The run itself, its latency, its predictions, and the cache that is not there.
    assert study(study_of(tree), console) == 4
    assert cleared  # before the run, so that programs of earlier ones do not pile up
    said = console.file.getvalue()
    assert (
        "model.safetensors" in said
        and "needs broken-facts-0shot, which has no result" in said
        and "cached.csv" in said
    )
    record = read_record(study_of(tree).folder)
    assert (
        record.systems == ()
        and len(record.without) == 4
        and "model.safetensors" in record.without["train.broken-facts-0shot"]
    )
    (failed,) = (study_of(tree).folder / "steps").iterdir()
    assert "model.safetensors" in json.loads(failed.read_text())["failed"]
    examples = load(study_of(tree).datasets["facts"].test)
    header = "example_id,relation,generated_relation,eval_dataset_name,model_id\n"
    (tmp_path / "cached.csv").write_text(
        header
        + "".join(f"{one.id},{one.relation},{one.relation},facts,m\n" for one in examples[:7])
    )
    (broken / "model.safetensors").write_bytes(kept)
    monkeypatch.setattr(
        execute, "train", lambda *_, **__: (_ for _ in ()).throw(MemoryError("too large\nby far"))
    )
    assert study(study_of(tree), console) == 3
    assert "MemoryError: too large" in console.file.getvalue()
    (cached,) = read_record(study_of(tree).folder).systems
    assert (cached.kind, cached.note) == (
        "frontier",
        "7 of 12 test examples have a cached answer; 5 not in the cache",
    )


def test_one_process_runs_a_study(tree: dict, finished: Path) -> None:
    with locked(finished):
        assert "another process" in refusal(lambda: study(study_of(tree), quiet()))


def test_what_cannot_be_read_is_told_in_the_plan(tree: dict) -> None:
    tree = copy.deepcopy(tree)
    tree["datasets"]["verbs"]["train"] = {"dataset": "absent.jsonl"}
    console = quiet()
    made = make_plan(study_of(tree))
    console.print(plan_table(made))
    said = console.file.getvalue()
    assert "absent.jsonl" in said and "impossible" in said
    assert [name for name, step in made.steps.items() if step.digest] == [
        "predict.majority.facts",
        "predict.tfidf.facts",
    ]


def test_cached_answers_of_several_models_and_settings_are_told_apart(
    tmp_path: Path, tiny_model: Path
) -> None:
    """One cache, as the study published its own: by model, with and without labels listed, and in a
    prompt style.
    """
    tree = study_tree(tmp_path, tiny_model) | {"models": {}, "regimes": {}, "baselines": False}
    cache = tmp_path / "cached.csv"
    examples = load(study_of(tree).datasets["facts"].test)
    settings = [
        ("A", "gen_constrained", 0, "", 12),
        ("A", "gen_open", 0, "", 6),
        ("B", "gen_constrained", 2, "shots2-task", 3),
    ]
    cache.write_text(
        "example_id,relation,generated_relation,eval_dataset_name,model_id,gen_type,prompt_shot,prompt_style\n"
        + "".join(
            f"{one.id},{one.relation},{one.relation if place < right else 'none'},"
            f"facts,{model},{kind},{shots},{style}\n"
            for model, kind, shots, style, right in settings
            for place, one in enumerate(examples)
        )
    )
    asked = {"datasets": ["facts"], "cache": str(cache)}
    tree["frontier"] = [
        {"name": "listed", "model": "A", "enumerate": True, **asked},
        {"name": "open", "model": "A", "enumerate": False, "shots": 0, **asked},
        {"name": "styled", "model": "B", "style": "shots2-task", **asked},
        {"name": "unclear", "model": "A", **asked},
    ]
    console = quiet()
    assert study(study_of(tree), console) == 1
    assert (
        "holds gen_type gen_constrained, gen_open, and none was chosen" in console.file.getvalue()
    )
    record = read_record(study_of(tree).folder)
    assert [
        (one.name, one.model, one.enumerated, one.prompt_shots, one.style) for one in record.systems
    ] == [
        ("listed", "A", True, None, ""),
        ("open", "A", False, 0, ""),
        ("styled", "B", True, 2, "shots2-task"),
    ]
    assert list(record.without) == ["predict.unclear.facts"]
    # What a study says of the prompts is not what the cache holds.
    tree |= {
        "name": "other",
        "frontier": [{"name": "listed", "model": "B", "enumerate": False, **asked}],
    }
    assert study(study_of(tree), console) == 1
    assert (
        "gen_type differs: ours 'gen_open', the cache 'gen_constrained'; correct frontier"
        in console.file.getvalue()
    )
    right = {
        one.name: sum(row.relation == row.generated_relation for row in record.rows(one, "facts"))
        for one in record.systems
    }
    none = [place for place, one in enumerate(examples) if one.relation == "none"]
    assert right == {
        name: count + sum(place >= count for place in none)
        for name, count in (("listed", 12), ("open", 6), ("styled", 3))
    }
    (table,) = prompt_sensitivity(measure(record, resamples=10))
    assert (table.model, [row.style for row in table.rows]) == ("B", ["shots2-task"])


@pytest.mark.parametrize(
    ("frontier", "expected"),
    [
        (
            [{"datasets": ["facts"], "style": "shots3"}],
            "no prompt style 'shots3'; the nearest is shots",
        ),
        (
            [{"datasets": ["facts", "verbs"]}, {"datasets": ["verbs"]}],
            "cached has two caches for one dataset",
        ),
        (
            [{"datasets": ["facts"]}, {"datasets": ["verbs"], "shots": 2}],
            "the caches of cached differ in model, enumerate, shots or style",
        ),
        (
            [{"datasets": ["fact"]}],
            "frontier.0.datasets: there is no 'fact' in this study; the nearest is facts",
        ),
    ],
)
def test_caches_that_are_no_row_of_the_results_are_refused(
    tmp_path: Path, tiny_model: Path, frontier: list[dict], expected: str
) -> None:
    tree = study_tree(tmp_path, tiny_model)
    tree["frontier"] = [{"name": "cached", "cache": "x.csv", **one} for one in frontier]
    assert expected in refusal(lambda: study_of(tree))


def test_cached_answers_in_common_labels_are_recorded_as_such(
    tmp_path: Path, tiny_model: Path
) -> None:
    tree = study_tree(tmp_path, tiny_model) | {"models": {}, "regimes": {}, "baselines": False}
    cache, labels = tmp_path / "cached.csv", tmp_path / "labels.json"
    tree["frontier"] = [
        {"name": "cached", "datasets": ["facts"], "cache": str(cache), "labels": str(labels)}
    ]
    examples = load(study_of(tree).datasets["facts"].test)
    common = {
        one.relation: "none" if one.relation == "none" else "some relation"
        for one in load(study_of(tree).datasets["facts"].train)
    }
    common |= {one.relation: common.get(one.relation, "some relation") for one in examples}
    labels.write_text(json.dumps(common))
    header = "example_id,relation,generated_relation,eval_dataset_name,model_id\n"
    cache.write_text(
        header
        + "".join(
            f"{one.id},{common[one.relation]},{common[one.relation]},facts,m\n" for one in examples
        )
    )
    assert study(study_of(tree), quiet()) == 0
    record = read_record(study_of(tree).folder)
    assert record.systems[0].common_labels == {"facts": common}
    table = results_table(record)
    # and in no mean
    assert [list(column.cells) for column in table.columns[1:]] == [
        ["1.000†"],
        [""],
        [""],
    ]
    cell = measure(record, resamples=10).cell("cached", "facts")
    assert cell.scores.accuracy == 1 and not cell.comparable
