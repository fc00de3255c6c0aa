"""The hardware check: what is wrong is found, a section that fails costs the others nothing; the
table takes right and faster kernels.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from types import ModuleType, SimpleNamespace

import jax
import jax.numpy as jnp
import pytest
from jaxre_kernels.attention import dispatch
from jaxre_kernels.implementations import Entry, implementations_of

from jaxre.models import kernels

TOOLS = Path(__file__).resolve().parents[2] / "tools"


def tool(name: str) -> ModuleType:
    with pytest.MonkeyPatch.context() as patched:
        patched.syspath_prepend(TOOLS)  # where Python finds the modules of a script's own folder
        return importlib.import_module(name)


check, report, sections, timing, cases, tune = (
    tool(f"{name}")
    for name in (
        "hardware_check",
        "hardware_report",
        "hardware_sections",
        "kernel_timing",
        "kernel_cases",
        "tune_kernels",
    )
)
DRY = argparse.Namespace(dry=True, sweep=True)


def records_of(run, *args, deadline: float = float("inf"), earlier: str = "") -> list[dict]:
    """The records that a section writes to its file, except those of beginnings."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "records"
        path.write_text(earlier)
        run(sections.Records(path), deadline, DRY, *args)
        found = [json.loads(line) for line in path.read_text().splitlines() if line.endswith("}")]
    return [one for one in found if "begun" not in one]


# ---- what is run -------------------------------------------------------------------------------


@pytest.mark.parametrize("op", check.OPS)
def test_every_implementation_is_checked_against_f32(op):
    found = [one for one in records_of(sections.check_op, op) if "case" in one]
    assert {one["implementation"] for one in found} == set(implementations_of(op))
    assert {one["dtype"] for one in found} == {"float32", "bfloat16"}
    ran = [one for one in found if "left_out" not in one]
    assert ran and all(one["passed"] for one in ran), ran
    assert all("alone" in one["left_out"] for one in found if one not in ran)


def test_a_step_is_timed_with_the_kernels_that_were_written_for_the_device(monkeypatch):
    assert sections.kernels_here() == []
    monkeypatch.setitem(
        kernels.HARDWARE, "pallas_tpu", kernels.HARDWARE["pallas_tpu"]._replace(platform="cpu")
    )
    assert sections.kernels_here() == [
        f"kernels.{op}=pallas_tpu" for op in ("attention", "lora", "cross_entropy")
    ]


def test_a_timing_tells_each_variant_and_how_it_stands_to_the_goal(monkeypatch):
    monkeypatch.setattr(dispatch, "TILES", {"xla": [{"queries": 64}]})
    found = records_of(sections.time_op, "attention")
    variants = {one["variant"]: one for one in found if "variant" in one}
    for name in ("xla", "xla, queries 64", "xla, as on a CPU", "dense mask"):
        assert variants[name]["passed"] and variants[name]["seconds"] > 0, variants[name]
    assert variants["xla, queries 64"]["tiles"] == {"queries": 64}
    for name in ("cuDNN, dense mask", "cuDNN, packed"):
        assert variants[name]["left_out"] == "is for a GPU alone"
    (goal,) = (one for one in found if "target" in one)
    assert goal["against"] == "dense mask" and goal["ours"].startswith("xla")
    assert goal["ratio"] == pytest.approx(
        variants["dense mask"]["seconds"] / variants[goal["ours"]]["seconds"]
    )


def test_nothing_is_begun_when_the_time_is_over():
    found = [
        one
        for one in records_of(sections.time_op, "nf4", deadline=time.monotonic())
        if "case" in one
    ]
    # What could not run here at all says that instead.
    assert found and {one["left_out"] for one in found} == {
        sections.LATE,
        "is for a TPU alone",
        "is for a Hopper GPU alone",
    }


def test_no_inputs_are_made_when_the_time_is_over(monkeypatch):
    monkeypatch.setattr(cases, "normal", None)
    found = [
        one
        for one in records_of(sections.check_op, "attention", deadline=time.monotonic())
        if "case" in one
    ]
    assert sections.LATE in {one["left_out"] for one in found}


def test_blocks_as_on_a_cpu_are_elsewhere_too_and_backwards():
    (case,) = cases.attention_timings(True, False)
    traced = {
        name: jax.jit(case.variants[name].run).trace(*case.inputs(0))
        for name in ("xla", "xla, as on a CPU")
    }
    loops = {
        name: one.lower(lowering_platforms=("cuda",)).as_text().count("stablehlo.case")
        for name, one in traced.items()
    }
    assert loops["xla, as on a CPU"] == loops["xla"] + 2


@pytest.fixture
def pretended(monkeypatch):
    """Sets implementations of attention that are chosen by their names alone."""

    def pretend(**kernels):
        for name, kernel in kernels.items():
            monkeypatch.setitem(dispatch.IMPLEMENTATIONS, name, kernel)
        monkeypatch.setattr(
            dispatch,
            "choose",
            lambda *_, implementation=None, **__: (implementation or "xla", "pretended"),
        )

    return pretend


def test_a_new_implementation_is_picked_up_from_its_dispatch(pretended, monkeypatch):
    plain = dispatch.IMPLEMENTATIONS["xla"]

    def kernel(q, k, v, visible_until, visible_from, prefix, span, warps=1):
        return plain(q, k, v, visible_until, visible_from, prefix, span)

    pretended(pallas_gpu=kernel)
    monkeypatch.setitem(dispatch.TILES, "pallas_gpu", [{"warps": 4}])
    (elsewhere,) = cases.attention_timings(True, True)
    assert elsewhere.variants["pallas_gpu"].left_out == "is for a Hopper GPU alone"
    monkeypatch.setattr(timing, "runs_on", lambda name, device: True)
    (case,) = cases.attention_timings(True, True)
    assert case.variants["pallas_gpu, warps 4"].tiles == {"warps": 4}
    inputs = case.inputs(0)
    assert timing.Oracle(case, inputs).judge(
        jax.jit(case.variants["pallas_gpu, warps 4"].run)(*inputs)
    )["passed"]


@pytest.mark.parametrize("capability", ["8.9", "9.0", "10.0"])
@pytest.mark.parametrize("op", ["attention", "lora", "cross_entropy"])
def test_kernels_for_another_kind_of_gpu_are_left_out(op, capability, monkeypatch):
    gpu = SimpleNamespace(platform="gpu", compute_capability=capability)
    monkeypatch.setattr(timing.jax, "devices", lambda: [gpu])
    (case,) = cases.TIMINGS[op](True, False)
    kernels = {
        name: variant.left_out
        for name, variant in case.variants.items()
        if name.startswith("pallas")
    }
    meant = {
        "8.9": {"pallas_gpu_sm80"} if op == "attention" else set(),
        "9.0": {"pallas_gpu"},
        "10.0": set(),
    }[capability]
    beside = {"pallas_gpu_sm80, copy engine"} if (op, capability) == ("attention", "9.0") else set()
    assert {name for name, why in kernels.items() if not why} == meant | beside


def test_an_opponent_that_is_wrong_sets_no_goal():
    case = SimpleNamespace(op="op", name="case", targets={"other": 2.0})
    ours, other = (
        {"implementation": "xla", "passed": True, "seconds": 1.0},
        {"implementation": None, "seconds": 3.0},
    )
    (goal,) = sections.targets_of(case, {"xla": ours, "other": other})
    assert goal["ratio"] == 3.0
    assert not list(sections.targets_of(case, {"xla": ours, "other": {**other, "passed": False}}))


def test_a_section_goes_on_behind_what_it_has():
    first = records_of(sections.check_op, "attention")
    kept = [one for one in first if one.get("dtype") == "float32"]
    kept[0]["error"] = "not run again"
    again = records_of(
        sections.check_op, "attention", earlier="".join(json.dumps(one) + "\n" for one in kept)
    )
    assert again[: len(kept)] == kept and len(again) == len(first)
    assert set(map(sections.key_of, again)) == set(map(sections.key_of, first))


def test_a_kernel_that_the_device_does_not_survive_has_failed_and_the_section_leaves_off(
    pretended, monkeypatch, tmp_path
):
    def deadly(*_):
        monkeypatch.setattr(jax, "block_until_ready", None)  # nothing can be waited for any more
        raise RuntimeError("CUDA_ERROR_ILLEGAL_ADDRESS")

    pretended(pallas_deadly=deadly)
    records = sections.Records(tmp_path / "records")
    with pytest.raises(SystemExit) as left:
        sections.check_op(records, float("inf"), DRY, "attention")
    assert left.value.code == sections.AGAIN
    assert (
        records.found[-1]["implementation"] == "pallas_deadly"
        and records.found[-1]["passed"] is False
    )
    assert [
        one["passed"]
        for one in records.found
        if one.get("implementation") == "xla" and "begun" not in one
    ] == [True]


def test_goals_of_a_step_are_set_against_the_faster_of_two():
    name = "qwen2.5-0.5b bfloat16"
    rows = f"{name}, 4 rows of 8,192"
    one = {"mfu": 0.4, "share_of_floor": 0.6, "examples_per_second": 1000.0}
    found = {
        rows: {**one, "seconds": 0.6},
        f"{rows}, kernels": {**one, "seconds": 0.5},
        f"{rows}, NF4": {**one, "seconds": 0.55},
    }
    found[f"{name}, batch of 8"] = {**one, "seconds": 0.010}
    goals = {
        goal["target"]: (goal["ours"], goal["ratio"] >= goal["least"], goal["ratio"])
        for goal in sections.step_goals(found, False)
    }
    assert goals == {
        "share of the ledger's floor": (f"{rows}, kernels", False, 0.6),
        "MFU on real tokens": (f"{rows}, kernels", True, 0.4),
        "the study's 400,000 examples in ten minutes": (f"{rows}, kernels", True, 1.5),
        "an update of the study's batch": (f"{name}, batch of 8", True, 1.2),
        "an update on NF4 weights": (f"{rows}, NF4", True, 0.5 / 0.55),
    }


def test_a_kernel_that_refuses_is_left_out_and_one_that_breaks_has_failed(pretended, monkeypatch):
    def refusing(*_):
        raise ValueError("attention implementation 'pallas_gpu' does not run here: it is too wide")

    def breaking(*_):
        raise RuntimeError("CUDA_ERROR_ILLEGAL_ADDRESS")

    def wrong(q, *_):
        return q

    pretended(refusing=refusing, breaking=breaking, wrong=wrong)
    monkeypatch.delitem(dispatch.IMPLEMENTATIONS, "xla")
    found = {
        one["implementation"]: one
        for one in records_of(sections.check_op, "attention")
        if "case" in one
    }
    assert "it is too wide" in found["refusing"]["left_out"] and "passed" not in found["refusing"]
    assert (
        found["breaking"]["passed"] is False and "ILLEGAL_ADDRESS" in found["breaking"]["problem"]
    )
    assert found["wrong"]["passed"] is False and found["wrong"]["error"] > found["wrong"]["limit"]
    run = {"sections": {"check attention": {"outcome": "done", "records": list(found.values())}}}
    told = report.failures(run)
    assert len(told) == 2 and ", breaking: RuntimeError" in told[0] and ", wrong: error" in told[1]


def test_each_run_of_the_step_has_a_process_of_its_own_and_goals_come_last(monkeypatch, tmp_path):
    name = f"{sections.DRY_SHAPE} float32, 1 rows of 1,024"
    monkeypatch.setattr(
        sections,
        "step_runs",
        lambda dry: {name: ("tiny", ()), f"{name}, NF4": ("tiny", ("model.quantise=nf4",))},
    )

    def timed_step(folder, shape, overrides, dry):
        if overrides:
            raise RuntimeError("out of memory")
        return {"seconds": 1.0, "share_of_floor": 0.5, "mfu": 0.3, "examples_per_second": 9.0}

    monkeypatch.setattr(sections, "timed_step", timed_step)
    options, path = (
        argparse.Namespace(dry=True, sweep=False, records=tmp_path / "records"),
        tmp_path / "records",
    )
    for _ in range(2):
        with pytest.raises(SystemExit) as left:
            sections.time_step(sections.Records(path), float("inf"), options)
        assert left.value.code == sections.AGAIN
    sections.time_step(sections.Records(path), float("inf"), options)
    found = sections.Records(path).found
    assert [one["case"] for one in found if "case" in one] == [name, f"{name}, NF4"]
    assert "out of memory" in found[3]["problem"]
    assert {one["target"]: one["ratio"] for one in found[4:]} == {
        "share of the ledger's floor": 0.5,
        "MFU on real tokens": 0.3,
    }


def test_peers_are_held_against_their_goals(monkeypatch, tmp_path):
    commands = []

    class Bench:
        def __init__(self, command, **_):
            commands.append(command)
            kept = dict.fromkeys(
                (
                    "tokens_per_second",
                    "ratio",
                    "ratios",
                    "examples_per_update",
                    "peak_bytes",
                    "relative",
                ),
                1.0,
            )
            speeds = {"a": 1.0, "c": 30.0} | ({"b": 20.0} if "--packed" in command else {})
            sides = {side: kept | {"examples_per_second": speed} for side, speed in speeds.items()}
            Path(command[command.index("--json") + 1]).write_text(
                json.dumps({"prompts": {"0shot": sides}})
            )

        def wait(self, limit):
            return 0

    monkeypatch.setattr(sections.subprocess, "Popen", Bench)
    records = sections.Records(tmp_path / "records")
    sections.time_peers(records, float("inf"), argparse.Namespace(dry=False))
    goals = [
        (one["target"], one["against"], one["ratio"], one["ratio"] >= one["least"])
        for one in records.found
        if "target" in one
    ]
    batch, packed = (
        "training: jaxre at the study's batch, 0shot",
        "training: jaxre with packed rows, 0shot",
    )
    assert goals == [
        (batch, "a", 30.0, True),
        (packed, "a", 30.0, False),
        (packed, "b", 1.5, False),
    ]
    assert (
        "train.batch_examples=8" in commands[0]
        and "--packed" not in commands[0]
        and "varlen,flex_attention" in commands[1]
    )


@pytest.mark.parametrize(("waited", "bound"), [(0.05, True), (0.5, False)])
def test_a_time_that_may_be_the_hosts_is_told(waited, bound, monkeypatch):
    clock = timing.Clock(dry=True)
    monkeypatch.setattr(timing.jax, "default_backend", lambda: "gpu")

    def flushes(count, run=None, sets=None):
        clock.waited = waited if run else 0.9
        return count * (2.0 if run else 1.0)

    monkeypatch.setattr(clock, "flushes", flushes)
    assert clock.seconds(lambda: None, [()]) == (1.0, 1.0, 1.0) and clock.host_bound is bound


def double(x):
    return {"y": 2 * x, "z": x.sum()}


@pytest.mark.parametrize(
    ("dtype", "wrong", "passed"),
    [
        ("float32", lambda x: x, True),
        ("float32", lambda x: x * (1 + 1e-4), False),
        ("bfloat16", lambda x: x * (1 + 1e-4), True),
        ("bfloat16", lambda x: x * 1.05, False),
        ("float32", lambda x: x.at[3].set(jnp.nan), False),
        ("float32", lambda x: x.at[3].set(jnp.inf), False),
    ],
)
def test_a_kernel_that_differs_from_f32_fails(dtype, wrong, passed):
    case = timing.Case(
        "op", "case", dtype, lambda seed: (timing.normal(seed, 0, (64,), dtype),), double, {}
    )
    inputs = case.inputs(0)
    found = timing.Oracle(case, inputs).judge({**double(*inputs), "y": wrong(double(*inputs)["y"])})
    assert found["passed"] == passed
    json.dumps(found, allow_nan=False)


# ---- sections are processes --------------------------------------------------------------------

SCRIPT = """
import json, os, subprocess, sys, time
section, records = sys.argv[1:3]
with open(records, "a") as out:
    out.write(json.dumps({"about": {"kind": "pretended"}}) + "\\n")
    if section == "check attention":
        about = {"case": "c", "dtype": "float32", "implementation": "xla"}
        out.write(json.dumps({**about, "error": 1.0, "limit": 0.1, "passed": False}) + "\\n")
    elif section == "check lora":
        out.write('{"left_out": "half", "n": 1}\\n{"case": "cut sh')
        out.flush()
        print("its last words", flush=True)
        os.abort()
    elif section == "time attention":
        out.flush()
        subprocess.Popen(["sleep", "97.5"])
        time.sleep(60)
    elif section == "step":
        out.write(json.dumps({"left_out": "pydantic is not installed"}) + "\\n")
    elif section == "check nf4":
        there = open(records).read().count("begun")
        one = {"case": f"c{there}", "dtype": "float32", "implementation": "xla"}
        out.write(json.dumps({"begun": one}) + "\\n")
        out.flush()
        if there < 2:
            os.abort()
        out.write(json.dumps({**one, "passed": True, "error": 0.0, "limit": 0.1}) + "\\n")
"""


def test_sections_that_crash_hang_or_lack_something_leave_the_others_their_results(
    tmp_path, monkeypatch, capsys
):
    script = tmp_path / "sections.py"
    script.write_text(SCRIPT)
    monkeypatch.setattr(check, "SECTIONS", script)
    monkeypatch.setattr(check, "GRACE", 0.5)
    monkeypatch.setattr(
        check, "SHARES", {"time attention": 0.1, "time lora": 3.0, "time nf4": 3.0, "step": 3.0}
    )
    options = argparse.Namespace(out=tmp_path / "out", minutes=0.5, dry=True, sweep=False)
    check.run_all(["attention", "lora", "nf4", "step"], options)
    found = json.loads((tmp_path / "out" / "hardware_check.json").read_text())
    outcomes = {name: one["outcome"] for name, one in found["sections"].items()}
    assert outcomes["check attention"] == outcomes["time lora"] == "done"
    assert (
        outcomes["check lora"] == "ended with code -6"
        and "its last words" in found["sections"]["check lora"]["log"]
    )
    assert found["sections"]["check lora"]["records"] == [
        {"about": {"kind": "pretended"}},
        {"left_out": "half", "n": 1},
    ]
    # One that ended while it ran something went on behind that, and what ended it has failed.
    assert outcomes["check nf4"] == "done"
    cases = [one for one in found["sections"]["check nf4"]["records"] if "case" in one]
    assert [(one["case"], one["passed"]) for one in cases] == [
        ("c0", False),
        ("c1", False),
        ("c2", True),
    ]
    assert outcomes["time attention"].startswith("stopped after")
    assert outcomes["step"] == "left out: pydantic is not installed"
    assert found["device"] == {"kind": "pretended"} and found["versions"]["jax"] == jax.__version__
    broke = "the section ended with code -6 while this ran"
    assert report.failures(found) == [
        "check attention: c, float32, xla: error 1.0e+00, allowed 1.0e-01",
        "check lora: ended with code -6",
        *(f"check nf4: {case}, float32, xla: {broke}" for case in ("c0", "c1")),
    ]
    told = (tmp_path / "out" / "hardware_check.md").read_text()
    assert (
        "FAILED: check attention" in told
        and "| step | left out: pydantic is not installed |" in told
    )
    # What a section started ends with it.
    running = [path.read_bytes() for path in Path("/proc").glob("[0-9]*/cmdline") if path.exists()]
    assert b"sleep\x0097.5\x00" not in running


def test_the_command_names_a_part_that_it_does_not_have():
    command = [TOOLS / "hardware_check", "--only", "lora,nonsense"]
    found = subprocess.run(
        command, capture_output=True, text=True, env=os.environ | {"PYTHON": sys.executable}
    )
    assert found.returncode == 2 and "'nonsense' is none of attention" in found.stderr


# ---- the table ---------------------------------------------------------------------------------


def timed(variant: str, seconds: float, **changes) -> dict:
    implementation = variant.split(",")[0]
    spread = {"least": 0.99 * seconds, "most": 1.01 * seconds, "error": 4e-3, "passed": True}
    about = {
        "case": "c",
        "dtype": "bfloat16",
        "variant": variant,
        "implementation": implementation,
        "tiles": {},
    }
    return about | {"covers": {"length": [1, 9]}, "seconds": seconds} | spread | changes


def run_of(
    *variants: dict, checked: tuple[dict, ...] = (), outcome: str = "done", dry: bool = False
) -> dict:
    checks = [
        {"case": "k", "dtype": "bfloat16", "implementation": name, "passed": True}
        for name in ("xla", "pallas_gpu")
    ]
    return {
        "date": "2026-11-22T01:00+00:00",
        "device": {"kind": "NVIDIA H200"},
        "settings": {"dry": dry},
        "sections": {
            "check attention": {"outcome": outcome, "records": [*checks, *checked]},
            "time attention": {"outcome": "done", "records": list(variants)},
        },
    }


OLD = Entry(
    "attention",
    "NVIDIA H200",
    "bfloat16",
    {"length": (1, 9)},
    "pallas_gpu",
    {},
    "2026-01-01",
    2.0,
    1e-3,
)
WRONG = {"case": "k2", "dtype": "bfloat16", "implementation": "pallas_gpu", "passed": False}


def test_the_fastest_right_kernel_gets_the_entry():
    found = run_of(
        timed("xla", 3.0),
        timed("xla, queries 64", 2.0, tiles={"queries": 64}),
        timed("pallas_gpu", 1.0),
        timed("pallas_gpu, block 64", 0.5, tiles={"block": 64}, passed=False),
    )
    (entry,) = tune.tuned((OLD,), found)
    assert entry == OLD._replace(date="2026-11-22", gain=3.0, error=4e-3)
    other = OLD._replace(device_kind="TPU v5e")
    assert set(map(str, tune.tuned((other,), found))) == {str(entry), str(other)}


@pytest.mark.parametrize(
    "found",
    [
        run_of(timed("xla", 3.0), timed("pallas_gpu", 3.5)),
        run_of(timed("xla", 3.0), timed("pallas_gpu", 2.0, most=2.98)),
        run_of(timed("xla", 3.0, least=2.99), timed("pallas_gpu", 2.95, most=2.96)),
        run_of(timed("xla", 3.0), timed("pallas_gpu", 1.0), checked=(WRONG,)),
        run_of(timed("xla", 3.0), timed("pallas_gpu", 1.0), outcome="stopped after 70 s"),
        run_of(timed("xla", 3.0), timed("pallas_gpu", 1.0, passed=False)),
    ],
    ids=[
        "slower",
        "within the spread",
        "too small a gain",
        "wrong in a check",
        "checks did not end",
        "wrong at this size",
    ],
)
def test_a_kernel_that_is_not_faster_and_right_gets_none_and_loses_its_old_one(found):
    assert tune.tuned((OLD,), found) == ()


def test_what_was_not_measured_stays_and_overlaps_are_refused():
    assert tune.tuned((OLD,), run_of()) == (OLD,)
    with pytest.raises(ValueError, match="overlaps"):
        tune.tuned(
            (OLD._replace(sizes={"length": (5, 20)}),),
            run_of(timed("xla", 3.0), timed("pallas_gpu", 1.0)),
        )
    with pytest.raises(ValueError, match="dry run"):
        tune.tuned((), run_of(dry=True))
