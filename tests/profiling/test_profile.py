"""`jaxre profile`: its figures agree with the plan, it leaves no run folder, nonsense is
refused.
"""

from __future__ import annotations

import json
import sys
import weakref
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import pytest
from refusals import refusal
from tiny import tiny_config, write_tiny_model

from jaxre import cli
from jaxre.checkpoints.source import tokenizer_folder
from jaxre.config import Config, save_config
from jaxre.data.dataset import make_plan
from jaxre.errors import DoesNotFit
from jaxre.objectives import load_dataset
from jaxre.profiling import profile
from jaxre.profiling.measure import Timed
from jaxre.profiling.profile import (
    candidates,
    profile_folder,
    profile_table,
    sweep_rows,
    sweep_table,
    verdict,
)
from jaxre.profiling.updates import members

pytestmark = pytest.mark.usefixtures("quiet")


@pytest.fixture
def quiet(capsys: pytest.CaptureFixture) -> None:
    """Keeps the command's output out of the test report."""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("model"))


@pytest.fixture
def config(tmp_path: Path, model: Path) -> Config:
    return tiny_config(tmp_path, model, data={"validation": None}, train={"epochs": 1})


@pytest.fixture
def jaxre(monkeypatch: pytest.MonkeyPatch) -> Callable[..., int]:
    """`jaxre ARGUMENTS` in this process: the exit code."""

    def call(*arguments: object) -> int:
        monkeypatch.setattr(sys, "argv", ["jaxre", *map(str, arguments)])
        try:
            cli.main()
        except SystemExit as stop:
            return stop.code or 0
        return 0

    return call


def test_a_profile_agrees_with_the_plan_and_leaves_the_run_folder_free(
    jaxre: Callable[..., int], config: Config, tmp_path: Path
) -> None:
    save_config(config, tmp_path / "config.yaml")
    assert (
        jaxre("profile", tmp_path / "config.yaml", "--steps", 2, "--json", tmp_path / "found.json")
        == 0
    )
    found = json.loads((tmp_path / "found.json").read_text())
    ledger, measured = found["ledger"], found["measured"]

    tokens = load_dataset(config, tokenizer_folder(config)).train.tokens
    plan = make_plan(config, tokens, shards=1)
    fill = plan.fill(tokens.lengths, tokens.supervised)
    assert ledger["shares"] == pytest.approx(
        {"pad": fill.pad, "supervised": fill.supervised, "shared": fill.shared}
    )
    assert ledger["examples"] == pytest.approx(len(tokens) / len(plan.updates))
    assert sum(
        value for part, value in ledger["flops"].items() if part != "total"
    ) == pytest.approx(ledger["flops"]["total"])
    assert len(ledger["savings"]) == 6 and ledger["savings"][-1]["after"] == pytest.approx(
        ledger["flops"]["total"]
    )
    # The program multiplies pads and masked pairs too, so never less than what is needed.
    assert ledger["program_flops"] > ledger["flops"]["total"]
    assert set(ledger["memory"]) == {"base", "trained", "optimiser", "rows", "activations"}
    assert ledger["memory"]["optimiser"] >= 2 * ledger["memory"]["trained"] > 0
    assert measured["updates"] == 2 and measured["compilations"] == len(plan.shapes)
    examples = sum(len(members(plan.updates[number % len(plan.updates)])) for number in (2, 3)) / 2
    assert measured["examples_per_second"] * measured["seconds"] == pytest.approx(examples)
    assert measured["mfu"] * ledger["matrix_rate"] == pytest.approx(
        ledger["flops_per_example"] * measured["examples_per_second"]
    )
    assert (
        set(measured["split"]) == {"input_wait", "host", "device"}
        and min(measured["split"].values()) >= 0
    )
    assert measured["share_of_floor"] * measured["seconds"] == pytest.approx(
        max(ledger["floor"].values())
    )
    assert ledger["square"]["rate"] > 0
    assert (
        "bounds this run" in found["verdict"]
        and f"would take {measured['share_of_floor']:.0%} of that" in found["verdict"]
    )
    cells = {
        name: value
        for name, value in zip(
            *(column.cells for column in profile_table(found).columns), strict=True
        )
    }
    assert cells["the floor's share of that"] == f"{measured['share_of_floor']:.1%}"
    assert [name.removeprefix("saved: ") for name in cells if "saved" in name] == [
        one["name"] for one in ledger["savings"]
    ]
    assert f"square ones of {ledger['square']['size']:,}" in cells["measured rates"]
    # A kernel hides its products from the program's count.
    found["ledger"]["program_flops"] = None
    assert verdict(found).endswith("The program's products are not counted: a kernel hides them.")
    cells = {
        name: value
        for name, value in zip(
            *(column.cells for column in profile_table(found).columns), strict=True
        )
    }
    assert cells["the program multiplies"] == "not counted, a kernel hides it"
    found = json.loads((tmp_path / "found.json").read_text())

    left = tmp_path / "runs" / "run-profile"
    assert json.loads((left / "profile.json").read_text()) == found
    assert (left / "profile.png").read_bytes().startswith(b"\x89PNG")
    assert list((left / "trace").rglob("*.xplane.pb")), "what XProf reads"
    assert list((left / "trace").rglob("*.trace.json.gz")), "what Perfetto reads"
    assert not config.run_folder.exists()


def test_a_profile_is_not_mixed_into_a_run_of_its_name(config: Config) -> None:
    taken = config.run_folder.with_name("run-profile")
    taken.mkdir(parents=True)
    (taken / "config.yaml").write_text("{}")
    assert "run-profile" in refusal(lambda: profile_folder(config))


@pytest.mark.parametrize(
    "arguments",
    [("--steps", "0"), ("lora.rnak=3",), ("train.row_length=8", "train.batch_tokens=64")],
)
def test_nonsense_is_refused_and_leaves_nothing(
    jaxre: Callable[..., int], config: Config, tmp_path: Path, arguments: tuple[str, ...]
) -> None:
    save_config(config, tmp_path / "config.yaml")
    assert jaxre("profile", tmp_path / "config.yaml", *arguments) == 2
    assert not (tmp_path / "runs").exists()


def test_a_sweep_keeps_the_batch_and_every_example(config: Config) -> None:
    tried = candidates(config, longest=100, shards=1)  # 2,048 tokens an update in rows of 256
    assert {"row_length": 256, "accumulation": 1} in tried
    assert {one["row_length"] for one in tried} == {128, 256, 512, 1024}
    assert all(2048 % (one["row_length"] * one["accumulation"]) == 0 for one in tried)
    assert all(
        2048 // (one["row_length"] * one["accumulation"]) % 4 == 0
        for one in candidates(config, longest=100, shards=4)
    )


def test_a_sweep_goes_on_where_rows_do_not_fit_and_keeps_nothing_of_them(
    tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Refused by the compiler's figure, or out of memory when they run."""

    class Run(SimpleNamespace):
        """A namespace that supports weak references."""

    held: list[weakref.ref] = []

    def set_up(config: Config) -> Run:
        assert not any(run() for run in held), "two runs in memory"
        if config.train.row_length == 256:
            raise DoesNotFit("rows of 4 x 256 take 99 MiB")
        compiled, plan = SimpleNamespace(memory=(1, 1)), SimpleNamespace(shapes=[])
        run = Run(length=config.train.row_length, plan=plan, compiled=compiled, compile_seconds=1.0)
        held.append(weakref.ref(run))
        return run

    def time_updates(run: Run, steps: int) -> Timed:
        if run.length == 512:
            jax.jit(lambda: jnp.zeros(2**46))()  # 256 TiB
        return Timed(steps, 4.0, 400.0, run.length, 0.0, 0.0, 0.0)

    monkeypatch.setattr(profile, "ACCUMULATIONS", (1,))
    monkeypatch.setattr(profile, "set_up", set_up)
    monkeypatch.setattr(profile, "Updates", lambda run: run)
    monkeypatch.setattr(profile, "time_updates", time_updates)
    config = tiny_config(tmp_path, model, data={"validation": None}, train={"row_length": 512})
    tried = sweep_rows(config)
    assert [one["settings"]["row_length"] for one in tried if "error" not in one] == [1024, 2048]
    assert {one["settings"]["row_length"] for one in tried if "fit" in one.get("error", "")} == {
        256,
        512,
    } and len(held) == 3
    assert list(sweep_table(tried).columns[1].cells)[2:] == ["does not fit the device's memory"] * 2

    monkeypatch.setattr(
        profile, "candidates", lambda *_: [{"row_length": 256}, {"row_length": 512}]
    )
    assert "lower train.batch_tokens" in refusal(lambda: sweep_rows(config))


@pytest.mark.slow
def test_a_sweep_names_the_fastest_first(
    jaxre: Callable[..., int],
    config: Config,
    tmp_path: Path,
    capsys: pytest.CaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("jaxre.profiling.profile.ACCUMULATIONS", (1,))
    save_config(config, tmp_path / "config.yaml")
    given = ("train.row_length=256", "train.batch_tokens=512")
    assert (
        jaxre(
            "profile",
            tmp_path / "config.yaml",
            "--sweep",
            "--steps",
            1,
            "--json",
            tmp_path / "swept.json",
            *given,
        )
        == 0
    )
    tried = json.loads((tmp_path / "swept.json").read_text())["sweep"]
    assert sorted(tuple(one["shapes"][0][:2]) for one in tried) == [(1, 512), (2, 256)]
    speeds = [one["examples_per_second"] for one in tried]
    assert speeds == sorted(speeds, reverse=True)
    best = " ".join(f"train.{name}={value}" for name, value in tried[0]["settings"].items())
    assert capsys.readouterr().out.endswith(f"the fastest: {best}\n")
    assert not (tmp_path / "runs").exists()
