"""The benchmark against peers: what it measures is checked first, ratios are of turns side by side,
(d) computes what (c) does.
"""

from __future__ import annotations

import argparse
import importlib
import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import jax
import numpy as np
import pytest
from jaxre_kernels.lora import lora_group
from jaxre_kernels.lora.group import Factors
from jaxre_kernels.nf4 import quantise, tiled
from tiny import tiny_config, write_tiny_model

from jaxre.checkpoints import packaged
from jaxre.checkpoints.source import open_model
from jaxre.errors import InputError
from jaxre.profiling.updates import Updates
from jaxre.training.setup import set_up

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


@pytest.fixture(scope="module")
def peers() -> ModuleType:
    pytest.importorskip("torch")
    pytest.importorskip("peft")
    return tool("bench_peers")


class FakeSide:
    """A side with a known loss in each check; its turns take a second. `events`: what was started,
    asked and ended, in order.
    """

    losses: dict[str, dict[str, float]] = {}  # noqa: RUF012
    examples: dict[str, list[int]] = {}  # noqa: RUF012
    events: list[tuple[str, str]] = []  # noqa: RUF012

    def __init__(self, name: str, folder: Path, given: argparse.Namespace, *_: object):
        self.name = name
        self.key = f"{name} {given.packed}" if name == "b" else name
        self.turns = iter(self.examples.get(self.key, []))
        self.process = SimpleNamespace(kill=lambda: None)
        self.events.append((self.key, "begins"))

    def ready(self) -> None:
        pass

    def ask(self, command: str) -> dict:
        self.events.append((self.key, command))
        if command.startswith("check"):
            return {"loss": self.losses[self.key][command], "supervised": 10}
        if command.startswith("curve"):
            return {"losses": self.losses[self.key][command]}
        if command == "warm":
            return {"updates": 1}
        examples = next(self.turns)
        return {
            "seconds": 1.0,
            "examples": examples,
            "tokens": 100 * examples,
            "updates": 1,
            "peak": 2**20,
        }

    def close(self) -> None:
        self.events.append((self.key, "ends"))


def settings(
    *sides: str, dtype: str = "float32", packed: str | list[str] = "sdpa"
) -> argparse.Namespace:
    return argparse.Namespace(
        sides=list(sides),
        rounds=3,
        dtype=dtype,
        nf4=False,
        packed=packed,
        prompts=["0shot"],
        curve=0,
    )


def losses(exact: float, timed: float | None = None) -> dict[str, float]:
    return {"check exact": exact} | ({"check timed": timed} if timed is not None else {})


@pytest.fixture
def fake(bench: ModuleType, monkeypatch: pytest.MonkeyPatch) -> type[FakeSide]:
    monkeypatch.setattr(bench, "Side", FakeSide)
    monkeypatch.setattr(FakeSide, "events", [])
    return FakeSide


@pytest.mark.parametrize("loss", [1.001, float("nan")])
def test_sides_that_compute_different_losses_are_not_measured(
    bench: ModuleType,
    fake: type[FakeSide],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    loss: float,
) -> None:
    monkeypatch.setattr(
        fake, "losses", {"a": losses(1.0), "b sdpa": losses(1.00001), "c": losses(loss)}
    )
    with pytest.raises(SystemExit, match=r"different losses \(c in float32\)"):
        bench.bench_prompt("0shot", tmp_path, settings("a", "b", "c"))
    assert "warm" not in {what for _, what in fake.events}


def test_the_loss_is_checked_in_what_is_timed_too(
    bench: ModuleType, fake: type[FakeSide], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(fake, "losses", {"a": losses(1.0, 1.002), "c": losses(1.0, 1.0025)})
    monkeypatch.setattr(fake, "examples", {"a": [1] * 3, "c": [1] * 3})
    found = bench.bench_prompt("0shot", tmp_path, settings("a", "c", dtype="bfloat16"))["c"]
    assert found["relative"] == 0
    assert found["timed_relative"] == pytest.approx(5e-4, rel=0.01)
    assert "| 0e+00 (f32), 5e-04 |" in bench.row("c", found, "sdpa")
    monkeypatch.setattr(fake, "losses", {"a": losses(1.0, 1.0), "c": losses(1.0, 1.002)})
    with pytest.raises(SystemExit, match=r"different losses \(c in bfloat16\)"):
        bench.bench_prompt("0shot", tmp_path, settings("a", "c", dtype="bfloat16"))


def test_a_ratio_is_the_median_over_rounds_of_turns_side_by_side(
    bench: ModuleType, fake: type[FakeSide], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(fake, "losses", {"a": losses(1.0), "c": losses(1.00001)})
    # The machine halves its speed after the first round: the sides' own medians would say 20 / 4 =
    # 5.
    monkeypatch.setattr(fake, "examples", {"a": [8, 4, 4], "c": [32, 20, 16]})
    found = bench.bench_prompt("0shot", tmp_path, settings("a", "c"))["c"]
    assert found["ratios"] == [4.0, 5.0, 4.0]
    assert found["ratio"] == 4.0
    assert found["examples_per_second"] == 20
    assert found["relative"] == pytest.approx(1e-5)


def test_loss_checks_end_before_anything_is_timed_and_variants_run_beside_jaxre_one_at_a_time(
    bench: ModuleType, fake: type[FakeSide], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    names = ("a", "c", "d:remat", "d:unshared")
    monkeypatch.setattr(fake, "losses", {name: losses(1.0) for name in names})
    monkeypatch.setattr(
        fake, "examples", {"a": [1] * 3, "c": [4] * 3, "d:remat": [2] * 3, "d:unshared": [1] * 3}
    )
    found = bench.bench_prompt("0shot", tmp_path, settings(*names))
    assert [found[name]["ratio"] for name in names] == [1.0, 4.0, 0.5, 0.25]
    assert [found[name]["against"] for name in names] == ["a", "a", "c", "c"]
    alive, together = [], set()
    for name, what in fake.events:
        if what == "begins":
            alive.append(name)
        elif what == "ends":
            alive.remove(name)
        elif what.startswith("check"):
            assert alive == [name]
        else:
            together.add(tuple(alive))
    assert together == {("a", "c"), ("c", "d:remat"), ("c", "d:unshared")}
    assert bench.groups_of(["c", "d:remat"]) == [["c", "d:remat"]]


def test_the_packed_peer_is_the_fastest_setting_that_works(
    bench: ModuleType,
    fake: type[FakeSide],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capsys: pytest.CaptureFixture,
) -> None:
    def ask(self: FakeSide, command: str) -> dict:
        if self.key == "b sdpa+compile" and command == "warm":
            raise bench.Ended("side b ended with code 1:\nno compiler")
        return asked(self, command)

    asked = fake.ask
    monkeypatch.setattr(fake, "ask", ask)
    monkeypatch.setattr(bench.importlib.util, "find_spec", lambda _: None)
    same, other = losses(1.0, 1.0), losses(1.0, 1.5)
    known = {
        "sdpa": same,
        "varlen": same,
        "flex_attention": other,
        "flex_attention+compile": same,
        "sdpa+compile": same,
    }
    monkeypatch.setattr(
        fake, "losses", {"a": same} | {f"b {packed}": loss for packed, loss in known.items()}
    )
    speeds = {"sdpa": 3, "varlen": 5, "flex_attention": 9, "flex_attention+compile": 4}
    monkeypatch.setattr(
        fake, "examples", {f"b {packed}": [speed] for packed, speed in speeds.items()}
    )
    given = settings("b", "a", dtype="bfloat16", packed=["flash_attention_2", *known])
    tried = bench.fastest_packed("0shot", tmp_path, given)
    assert given.packed == "varlen"
    assert {
        packed: one["examples_per_second"] for packed, one in tried.items() if "left_out" not in one
    } == {
        "sdpa": 3.0,
        "varlen": 5.0,
        "flex_attention+compile": 4.0,
    }
    told = capsys.readouterr().err
    assert "(b) with flash_attention_2 is left out: flash_attn not installed" in told
    assert "(b) with flex_attention is left out: its loss differs by 5.0e-01" in told
    assert "(b) with sdpa+compile is left out: side b ended with code 1: no compiler" in told
    assert "(b) with varlen 5.000 examples/s" in told


def test_one_packed_setting_is_taken_without_a_trial_unless_it_cannot_run(
    bench: ModuleType, fake: type[FakeSide], tmp_path: Path
) -> None:
    given = settings("b", packed=["sdpa"])
    assert bench.fastest_packed("0shot", tmp_path, given) == {}
    assert given.packed == "sdpa"
    given = settings("b", packed=["varlen"])
    assert bench.fastest_packed("0shot", tmp_path, given) == {
        "varlen": {"left_out": "takes no float32"}
    }
    assert given.packed is None
    assert fake.events == []


@pytest.mark.parametrize(
    ("nf4", "absent", "left"),
    [
        (False, "datasets", ["a", "c"]),
        (True, "bitsandbytes", ["c"]),
        (False, "bitsandbytes", ["a", "b", "c"]),
    ],
)
def test_a_side_whose_packages_are_not_there_is_left_out_and_named(
    bench: ModuleType,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
    nf4: bool,
    absent: str,
    left: list[str],
) -> None:
    monkeypatch.setattr(
        bench.importlib.util, "find_spec", lambda name: None if name == absent else name
    )
    given = argparse.Namespace(sides=["a", "b", "c"], nf4=nf4)
    bench.leave_out(given)
    assert given.sides == left
    assert ("(b) is left out" in capsys.readouterr().err) == ("b" not in left)


def test_versions_name_the_driver_where_there_is_one(
    bench: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert "NVIDIA driver" not in bench.versions()
    (tmp_path / "nvidia-smi").write_text("#!/bin/sh\necho 580.1.2\n")
    (tmp_path / "nvidia-smi").chmod(0o755)
    monkeypatch.setattr(
        bench, "version", lambda package: {"nvidia-cudnn-cu13": "9.1"}.get(package, "1")
    )
    found = bench.versions()
    assert found["NVIDIA driver"] == "580.1.2"
    assert found["nvidia-cudnn-cu13"] == "9.1"


def test_each_variant_computes_the_loss_of_jaxre(
    sides: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    changes = {
        "data": {"train": {"dataset": "facts", "split": "train", "limit": 13}, "validation": None}
    }
    config = tiny_config(
        tmp_path,
        write_tiny_model(tmp_path / "model"),
        **changes,
        train={"epochs": 1, "batch_tokens": 2048},
    )
    whole = set_up(config)
    updates = Updates(whole)
    loss = float(updates.run(updates.next_rows()).loss)
    work = {}
    for name, variant in sides.VARIANTS.items():
        key, _, value = "".join(variant.settings).partition("=")
        given = {"epochs": 1, "batch_tokens": 2048} | (
            {key.removeprefix("train."): value} if key else {}
        )
        run = set_up(
            tiny_config(tmp_path, tmp_path / "model", **changes, train=given), **variant.changes
        )
        updates = Updates(run)
        rows = updates.next_rows()
        assert float(updates.run(rows).loss) == pytest.approx(loss, rel=1e-5), name
        assert np.sum(rows.weights) == whole.dataset.train.tokens.supervised.sum(), name
        work[name] = flops(run)
    # Each of these does more of its own part, and the other's is as it was.
    shape = next(iter(whole.plan.shapes))
    assert 2 * shape.supervised <= shape.length  # or the last layer is whole anyway
    assert min(work["d:full-head"], work["d:full-last-layer"]) > 1.05 * flops(whole)
    assert work["d:full-head"] != work["d:full-last-layer"]


def flops(run) -> float:
    return sum(update.cost_analysis()["flops"] for update in run.compiled.updates.values())


@pytest.mark.parametrize("form", ["nf4", "tiles"])
def test_lora_as_it_is_written_down_takes_a_base_in_nf4(sides: ModuleType, form: str) -> None:
    draw = np.random.default_rng(0)
    weights = [
        quantise(draw.standard_normal((outputs, 64)).astype(np.float32)) for outputs in (96, 32)
    ]
    if form == "tiles":
        weights = [tiled(weight) for weight in weights]
    x = draw.standard_normal((5, 64)).astype(np.float32)
    pair = Factors(
        draw.standard_normal((64, 4)).astype(np.float32),
        draw.standard_normal((4, 96)).astype(np.float32),
    )
    given = (x, weights, [pair, None], None, 2.0, 0.0)
    for ours, theirs in zip(
        sides.written_down(*given), lora_group(*given, implementation="xla"), strict=True
    ):
        # sums of 64 products in another order
        np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-4)


class FakeTalk:
    """Gives commands, keeps answers."""

    def __init__(self, *commands: str):
        self.commands, self.answers = iter(commands), []

    def answer(self, **values: object) -> None:
        self.answers.append(values)

    def check(self) -> str | None:
        return next(self.commands, None)

    def command(self) -> str | None:
        return next(self.commands, None)


def test_the_peers_check_in_f32_is_on_dense_weights(
    peers: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    made = []

    def trainer(side, folder, given, rows, checkpointing, *, dtype, quantise, curve=False):
        made.append((rows, checkpointing, dtype, quantise))
        return SimpleNamespace(
            args=SimpleNamespace(torch_compile=False),
            data_collator=None,
            training_step=None,
            **does_nothing,
        )

    does_nothing = {"add_callback": lambda _: None, "train": lambda: None}
    monkeypatch.setattr(peers, "torch_trainer", trainer)
    monkeypatch.setattr(peers, "loss_of", lambda _: {"loss": 1.0})
    peers.torch_side(
        "a",
        tmp_path,
        argparse.Namespace(dtype="float32", nf4=True),
        FakeTalk("check exact", "check timed"),
    )
    assert made == [
        (4, True, "float32", False),
        (4, True, "float32", True),
        (4, True, "float32", True),
    ]


def test_the_packed_peer_takes_fewer_rows_at_once_and_then_checkpoints_where_memory_is_short(
    peers: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    torch = pytest.importorskip("torch")
    made = []

    def trainer(side, folder, given, rows, checkpointing, *, dtype, quantise, curve=False):
        def train() -> None:
            if len(made) < 4:
                raise torch.OutOfMemoryError("out of memory")

        made.append((rows, checkpointing))
        args = SimpleNamespace(torch_compile=False)
        return SimpleNamespace(
            args=args,
            data_collator=None,
            training_step=None,
            add_callback=lambda _: None,
            train=train,
        )

    monkeypatch.setattr(peers, "CUDA", True)
    monkeypatch.setattr(peers, "torch_trainer", trainer)
    monkeypatch.setattr(torch.cuda, "set_per_process_memory_fraction", lambda _: None)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    given = argparse.Namespace(
        dtype="bfloat16", nf4=False, rows=4, share=0.4, packed="varlen+compile"
    )
    peers.torch_side("b", tmp_path, given, FakeTalk())
    assert made == [(4, False), (1, False), (4, True), (1, True)]
    given.packed = "sdpa"  # its mask is dense
    assert peers.fits(given) == [(1, False), (1, True)]


def test_what_a_peer_trains_on_is_counted_before_it_goes_to_the_device(peers: ModuleType) -> None:
    torch = pytest.importorskip("torch")
    args = SimpleNamespace(torch_compile=False)
    steps = []
    trainer = SimpleNamespace(
        args=args,
        data_collator=lambda batch: batch,
        training_step=lambda *given: steps.append(given),
    )
    trainer.add_callback = lambda _: None
    turns = peers.Turns(trainer, argparse.Namespace(), FakeTalk(), {})
    # The loader is a micro-batch ahead of the training step, which here gets nothing that could be
    # counted.
    trainer.data_collator(
        {"input_ids": torch.zeros(2, 3), "attention_mask": torch.tensor([[1, 1, 1], [1, 1, 0]])}
    )
    trainer.data_collator({"position_ids": torch.tensor([[0, 1, 0, 0, 1, 2]])})
    trainer.training_step("model", "on the device")
    assert (turns.examples, turns.tokens) == (2, 5)
    trainer.training_step("model", "on the device")
    assert (turns.examples, turns.tokens) == (5, 11)
    assert len(steps) == 2


def test_pytorchs_packed_attention_keeps_examples_apart(
    peers: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch = pytest.importorskip("torch")
    varlen = pytest.importorskip("torch.nn.attention.varlen")
    attend = torch.nn.functional.scaled_dot_product_attention

    def one_by_one(
        q, k, v, starts, starts_k, longest, longest_k, *, scale, window_size
    ):  # on a CPU PyTorch has none
        assert window_size == (-1, 0)  # causal
        assert longest == longest_k == starts.diff().max()
        parts = [
            [x[start:end].transpose(0, 1) for x in (q, k, v)]
            for start, end in zip(starts[:-1], starts_k[1:], strict=True)
        ]
        return torch.cat(
            [attend(*part, is_causal=True, scale=scale).transpose(0, 1) for part in parts]
        )

    monkeypatch.setattr(varlen, "varlen_attn", one_by_one)
    torch.manual_seed(0)
    q, k, v = torch.randn(1, 6, 9, 8), torch.randn(1, 2, 9, 8), torch.randn(1, 2, 9, 8)
    starts = torch.tensor([0, 4, 9], dtype=torch.int32)
    packed = {
        "cu_seq_lens_q": starts,
        "cu_seq_lens_k": starts,
        "max_length_q": 5,
        "max_length_k": 5,
    }
    found, _ = peers.varlen_attention(None, q, k, v, None, scaling=0.3, dropout=0.0, **packed)
    segment = torch.tensor([0] * 4 + [1] * 5)
    mask = (segment[:, None] == segment) & torch.ones(9, 9).tril().bool()
    wanted = attend(q, k, v, attn_mask=mask, scale=0.3, enable_gqa=True).transpose(1, 2)
    torch.testing.assert_close(found, wanted)


@pytest.fixture
def small(
    sides: ModuleType, monkeypatch: pytest.MonkeyPatch, shared_data: Path, shared_models: Path
) -> argparse.Namespace:
    """The settings of a benchmark of 20 examples on a model of two narrow layers."""
    folder, shape = sides.SHAPES["tiny"]
    narrow = {
        "hidden_size": 48,
        "intermediate_size": 64,
        "num_attention_heads": 3,
        "num_key_value_heads": 1,
    }
    monkeypatch.setitem(sides.SHAPES, "tiny", (folder, shape | narrow))
    monkeypatch.setenv("JAXRE_MODELS", str(shared_models))
    return argparse.Namespace(
        model="random:tiny",
        prompts=["0shot"],
        dtype="float32",
        examples=20,
        rows=1,
        row_length=1024,
        set=[],
        nf4=False,
        curve=4,
    )


def test_curves_that_differ_stop_the_benchmark_and_stand_in_the_table_if_they_agree(
    bench: ModuleType, fake: type[FakeSide], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    given = settings("a", "c", dtype="bfloat16")
    given.curve = 2
    curves = {
        "a": {"curve exact": [2.0, 1.0], "curve timed": [2.0, 1.002]},
        "c": {"curve exact": [2.0, 1.00001], "curve timed": [2.0, 1.001]},
    }
    monkeypatch.setattr(
        fake, "losses", {name: losses(1.0, 1.0) | curve for name, curve in curves.items()}
    )
    monkeypatch.setattr(fake, "examples", {"a": [1] * 3, "c": [4] * 3})
    found = bench.bench_prompt("0shot", tmp_path, given)["c"]["curve"]
    lines = list(bench.described_curves(found, "bfloat16"))
    assert lines[1].endswith("goes from 2.0000 to 1.0000")
    assert [line for line in lines if line.startswith("| (")] == [
        "| (c) f32 | 5.0e-06 | 1.0e-05 |",
        "| (c) bfloat16 | 5.0e-04 | 1.0e-03 |",
        "| (a) bfloat16 | 1.0e-03 | 2.0e-03 |",
    ]
    curves["c"]["curve exact"][1] = 1.1
    monkeypatch.setattr(fake, "events", [])
    monkeypatch.setattr(
        fake, "losses", {name: losses(1.0, 1.0) | curve for name, curve in curves.items()}
    )
    with pytest.raises(SystemExit, match="train differently"):
        bench.bench_prompt("0shot", tmp_path, given)
    assert "warm" not in {what for _, what in fake.events}


def test_the_recipe_and_jaxre_train_alike(
    sides: ModuleType, peers: ModuleType, small: argparse.Namespace, tmp_path: Path
) -> None:
    small.examples = 4 * 8
    small.set = ["train.learning_rate=0.1"]  # so that four updates change the loss
    sides.write_inputs(tmp_path, small)
    config = sides.run_config(
        tmp_path, "0shot", small, *sides.curve_settings(small), "lora.dropout=0.0"
    )
    ours = sides.curve_of(set_up(config), tmp_path)["losses"]
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(peers, "RATE", 0.1)
        trainer = peers.torch_trainer(
            "a", tmp_path, small, 4, True, dtype="float32", quantise=False, curve=True
        )
        theirs = peers.curve_of(trainer)["losses"]
    assert len(ours) == len(theirs) == 4
    assert np.ptp(ours) > 0.1
    np.testing.assert_allclose(ours, theirs, rtol=1e-4)


def test_all_sides_start_from_one_model_one_adapter_and_the_same_tokens(
    sides: ModuleType, small: argparse.Namespace, tmp_path: Path
) -> None:
    given = small
    given.prompts = ["0shot", "2shot"]
    told = sides.write_inputs(tmp_path, given)["prompts"]
    for prompt in given.prompts:
        run = set_up(sides.run_config(tmp_path, prompt, given))
        stored, tokens = np.load(tmp_path / f"{prompt}.npz"), run.dataset.train.tokens
        np.testing.assert_array_equal(stored["tokens"], tokens.tokens)
        np.testing.assert_array_equal(stored["prompt_lengths"], tokens.prompt_lengths)
        assert told[prompt]["examples"] == len(tokens) == 20
        # B is far from zero, so that a side that leaves the adapter out computes another loss.
        assert (
            min(np.abs(pair["b"]).max() for pair in run.initial.state.trainable["layers"].values())
            > 0.01
        )
        updates = Updates(run)
        assert np.isfinite(float(updates.run(updates.next_rows()).loss))


def test_a_benchmark_takes_real_weights(
    sides: ModuleType, small: argparse.Namespace, tmp_path: Path
) -> None:
    small.model = "facts-base"
    sides.write_inputs(tmp_path, small)
    base = set_up(sides.run_config(tmp_path, "0shot", small)).initial.base
    loaded = open_model("facts-base", np.dtype("float32")).base
    for ours, theirs in zip(jax.tree.leaves(base), jax.tree.leaves(loaded), strict=True):
        np.testing.assert_array_equal(ours, theirs)


def test_the_default_model_is_the_real_one_where_it_is_installed(
    sides: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(packaged, "packaged_file", lambda name: Path(name))
    assert sides.default_model() == "smollm2-135m"

    def missing(name: str) -> Path:
        raise InputError(f"{name}: not installed")

    monkeypatch.setattr(packaged, "packaged_file", missing)
    assert sides.default_model() == "random:smollm2-135m"


def test_an_unknown_side_is_refused(
    bench: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
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
    "against": "a",
}
ABOUT = {"examples": 9, "tokens": 92.0, "longest": 130, "supervised": 11.0}


def test_the_table_has_a_row_for_each_side(bench: ModuleType) -> None:
    sides = {
        "a": SIDE,
        "b": SIDE | {"checkpointing": True},
        "c": SIDE,
        "d:remat": SIDE | {"against": "c"},
    }
    found = {
        "inputs": {"prompts": {"0shot": ABOUT}},
        "prompts": {"0shot": sides},
        "settings": {"packed": "varlen"},
    }
    lines = list(bench.table(found, "0shot"))
    assert "| (c) jaxre | 2.50 | 2.00 (1.90 to 2.20) | 250 | 8.0 | 1,024 | 1e-07 |" in lines
    assert any(
        line.startswith("| (b) TRL SFTTrainer + PEFT, packed, varlen, gradient checkpointing |")
        for line in lines
    )
    assert [line.split(" | ")[2] for line in lines if line.startswith("| side")] == [
        "x a (rounds)",
        "x c (rounds)",
    ]
    assert len({line.count("|") for line in lines if line.startswith("|")}) == 1


def test_what_was_measured_stays_when_a_later_prompt_fails(
    bench: ModuleType,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capsys: pytest.CaptureFixture,
) -> None:
    inputs = {
        "parameters": 7,
        "device": "cpu",
        "platform": "cpu",
        "prompts": {"0shot": ABOUT, "2shot": ABOUT},
    }

    def measured(prompt: str, *_: object) -> dict:
        if prompt == "2shot":
            raise SystemExit("side c ended with code -9")
        return {"c": SIDE}

    monkeypatch.setattr(
        bench, "Side", lambda *_: SimpleNamespace(ready=lambda: inputs, close=lambda: None)
    )
    monkeypatch.setattr(bench, "bench_prompt", measured)
    monkeypatch.setattr(bench.signal, "signal", lambda *_: None)
    given = ["--prompts", "0shot,2shot", "--sides", "c", "--json", str(tmp_path / "found.json")]
    monkeypatch.setattr(sys, "argv", ["bench_training.py", *given])
    with pytest.raises(SystemExit, match="ended with code -9"):
        bench.main()
    assert json.loads((tmp_path / "found.json").read_text())["prompts"] == {"0shot": {"c": SIDE}}
    assert "| (c) jaxre | 2.50 |" in capsys.readouterr().out


def test_a_side_that_was_killed_is_named(bench: ModuleType, tmp_path: Path) -> None:
    process = subprocess.Popen(
        ["sh", "-c", "kill -KILL $$"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    process.wait()
    side = bench.Side.__new__(bench.Side)
    side.process, side.name, side.log = process, "b", tmp_path / "b.log"
    side.log.write_text("its last words\n")
    with pytest.raises(
        SystemExit,
        match=r"side b ended with code -9 \(killed; for want of memory\?.*\n.*last words",
    ):
        side.ask("round")
