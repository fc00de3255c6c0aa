"""The benchmark against peers: what it measures is checked first, ratios are of turns side by side, (d) computes what (c) does."""

from __future__ import annotations

import argparse
import importlib
import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
from tiny import tiny_config, write_tiny_model

from jaxre.data.dataset import make_plan
from jaxre.profiling.prepared import prepare
from jaxre.training import compilation

TOOLS = Path(__file__).resolve().parents[2] / "tools"


def tool(name: str) -> ModuleType:
    with pytest.MonkeyPatch.context() as patched:
        patched.syspath_prepend(TOOLS)  # where Python finds the module of a script's own folder
        return importlib.import_module(name)


@pytest.fixture(scope="module")
def bench() -> ModuleType:
    return tool("bench_training")


@pytest.fixture(scope="module")
def sides() -> ModuleType:
    return tool("bench_sides")


class FakeSide:
    """A side with a known loss; its turns take a second."""

    losses: dict[str, float] = {}  # noqa: RUF012
    examples: dict[str, list[int]] = {}  # noqa: RUF012

    def __init__(self, name: str, *_: object):
        self.name, self.turns = name, iter(self.examples.get(name, []))

    def ready(self) -> None:
        pass

    def ask(self, command: str) -> dict:
        if command == "check":
            return {"loss": self.losses[self.name], "supervised": 10}
        if command == "warm":
            return {"updates": 1}
        examples = next(self.turns)
        return {"seconds": 1.0, "examples": examples, "tokens": 100 * examples, "updates": 1, "peak": 2**20}

    def close(self) -> None:
        pass


def settings(*sides: str) -> argparse.Namespace:
    return argparse.Namespace(sides=list(sides), rounds=3)


@pytest.mark.parametrize("loss", [1.001, float("nan")])
def test_sides_that_compute_different_losses_are_not_measured(
    bench: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, loss: float
) -> None:
    monkeypatch.setattr(bench, "Side", FakeSide)
    monkeypatch.setattr(FakeSide, "losses", {"a": 1.0, "b": 1.00001, "c": loss})
    with pytest.raises(SystemExit, match="different losses"):
        bench.bench_prompt("0shot", tmp_path, settings("a", "b", "c"))


def test_a_ratio_is_the_median_over_rounds_of_turns_side_by_side(
    bench: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(bench, "Side", FakeSide)
    monkeypatch.setattr(FakeSide, "losses", {"a": 1.0, "c": 1.00001})
    # The machine halves its speed after the first round: the sides' own medians would say 20 / 4 = 5.
    monkeypatch.setattr(FakeSide, "examples", {"a": [8, 4, 4], "c": [32, 20, 16]})
    found = bench.bench_prompt("0shot", tmp_path, settings("a", "c"))["c"]
    assert found["ratios"] == [4.0, 5.0, 4.0]
    assert found["ratio"] == 4.0
    assert found["examples_per_second"] == 20
    assert found["relative"] == pytest.approx(1e-5)


def test_each_variant_computes_the_loss_of_jaxre(sides: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    changes = {"data": {"train": {"dataset": "facts", "split": "train", "limit": 13}, "validation": None}}
    config = tiny_config(tmp_path, write_tiny_model(tmp_path / "model"), **changes, train={"epochs": 1, "batch_tokens": 2048})
    whole = prepare(config)
    loss = float(whole.update(whole.next_rows()).loss)
    for name, variant in sides.VARIANTS.items():
        key, _, value = "".join(variant.settings).partition("=")
        given = {"epochs": 1, "batch_tokens": 2048} | ({key.removeprefix("train."): value} if key else {})
        if variant.lora_group:
            monkeypatch.setattr(compilation, "ops_of", compilation.ops_of)  # put back by undo
            sides.run_with(variant.lora_group)
        run = prepare(tiny_config(tmp_path, tmp_path / "model", **changes, train=given), plan_of=variant.plan_of or make_plan)
        monkeypatch.undo()
        rows = run.next_rows()
        assert float(run.update(rows).loss) == pytest.approx(loss, rel=1e-5), name
        assert np.sum(rows.weights) == whole.dataset.train.tokens.supervised.sum(), name


@pytest.mark.usefixtures("shared_data")
def test_all_sides_start_from_one_model_one_adapter_and_the_same_tokens(
    sides: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, shared_models: Path
) -> None:
    folder, shape = sides.SHAPES["tiny"]
    small = shape | {"hidden_size": 48, "intermediate_size": 64, "num_attention_heads": 3, "num_key_value_heads": 1}
    monkeypatch.setitem(sides.SHAPES, "tiny", (folder, small))
    monkeypatch.setenv("JAXRE_MODELS", str(shared_models))
    given = argparse.Namespace(
        shape="tiny", prompts=["0shot", "2shot"], dtype="float32", examples=20, rows=1, row_length=1024, set=[], nf4=False
    )
    told = sides.write_inputs(tmp_path, given)["prompts"]
    for prompt in given.prompts:
        run = prepare(sides.run_config(tmp_path, prompt, given))
        stored, tokens = np.load(tmp_path / f"{prompt}.npz"), run.dataset.train.tokens
        np.testing.assert_array_equal(stored["tokens"], tokens.tokens)
        np.testing.assert_array_equal(stored["prompt_lengths"], tokens.prompt_lengths)
        assert told[prompt]["examples"] == len(tokens) == 20
        # B is far from zero, so that a side that leaves the adapter out computes another loss.
        assert min(np.abs(pair["b"]).max() for pair in run.initial.state.trainable["layers"].values()) > 0.01
        assert np.isfinite(float(run.update(run.next_rows()).loss))


def test_an_unknown_side_is_refused(bench: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    monkeypatch.setattr(sys, "argv", ["bench_training.py", "--sides", "a,e"])
    with pytest.raises(SystemExit) as stop:
        bench.main()
    assert stop.value.code == 2
    assert "'e'" in capsys.readouterr().err


SIDE = {
    "examples_per_second": 2.5,
    "ratio": 2.0,
    "ratios": [1.9, 2.0, 2.2],
    "tokens_per_second": 250.0,
    "examples_per_update": 8.0,
    "peak_bytes": 2**30,
    "relative": 1e-7,
}
ABOUT = {"examples": 9, "tokens": 92.0, "longest": 130, "supervised": 11.0}


def test_the_table_has_a_row_for_each_side(bench: ModuleType) -> None:
    lines = list(bench.table({"inputs": {"prompts": {"0shot": ABOUT}}, "prompts": {"0shot": {"a": SIDE, "c": SIDE}}}, "0shot"))
    assert "| (c) jaxre | 2.50 | 2.00 (1.90 to 2.20) | 250 | 8.0 | 1,024 | 1e-07 |" in lines
    assert len({line.count("|") for line in lines if line.startswith("|")}) == 1


def test_what_was_measured_stays_when_a_later_prompt_fails(
    bench: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    inputs = {"parameters": 7, "device": "cpu", "prompts": {"0shot": ABOUT, "2shot": ABOUT}}

    def measured(prompt: str, *_: object) -> dict:
        if prompt == "2shot":
            raise SystemExit("side c ended with code -9")
        return {"c": SIDE}

    monkeypatch.setattr(bench, "Side", lambda *_: SimpleNamespace(ready=lambda: inputs, close=lambda: None))
    monkeypatch.setattr(bench, "bench_prompt", measured)
    monkeypatch.setattr(bench.signal, "signal", lambda *_: None)
    given = ["--prompts", "0shot,2shot", "--sides", "c", "--json", str(tmp_path / "found.json")]
    monkeypatch.setattr(sys, "argv", ["bench_training.py", *given])
    with pytest.raises(SystemExit, match="ended with code -9"):
        bench.main()
    assert json.loads((tmp_path / "found.json").read_text())["prompts"] == {"0shot": {"c": SIDE}}
    assert "| (c) jaxre | 2.50 |" in capsys.readouterr().out


def test_a_side_that_was_killed_is_named(bench: ModuleType, tmp_path: Path) -> None:
    process = subprocess.Popen(["sh", "-c", "kill -KILL $$"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    process.wait()
    side = bench.Side.__new__(bench.Side)
    side.process, side.name, side.log = process, "b", tmp_path / "b.log"
    side.log.write_text("its last words\n")
    with pytest.raises(SystemExit, match=r"side b ended with code -9 \(killed; for want of memory\?.*\n.*last words"):
        side.ask("round")
