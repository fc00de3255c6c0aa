"""The table of implementations: what it decides, what it may hold, and that nothing it says makes
an op fail.
"""

from __future__ import annotations

import datetime
import os
import subprocess
import sys
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jaxre_kernels import implementations
from jaxre_kernels.attention import Heads, attention
from jaxre_kernels.attention import choose as choose_attention
from jaxre_kernels.attention import dispatch as attention_dispatch
from jaxre_kernels.cross_entropy import Channels, dense_cross_entropy, linear_cross_entropy
from jaxre_kernels.cross_entropy import choose as choose_cross_entropy
from jaxre_kernels.cross_entropy import dispatch as cross_entropy_dispatch
from jaxre_kernels.implementations import (
    Entry,
    checked,
    implementations_of,
    measured,
    named,
    overlap,
    read_table,
    tiles_of,
    verdict,
    write_table,
)
from jaxre_kernels.lora import Projections
from jaxre_kernels.lora import choose as choose_lora

KIND = "NVIDIA H200"
ENTRY = Entry(
    op="attention",
    device_kind=KIND,
    dtype="bfloat16",
    sizes={"length": (4096, 16384), "channels": (64, 64)},
    implementation="pallas_gpu",
    tiles={"block": 128},
    date="2026-11-22",
    gain=3.1,
    error=4e-3,
)
THERE = ("xla", "pallas_gpu", "pallas_tpu")


@pytest.fixture
def table(monkeypatch):
    """Sets the entries that an op's dispatch finds."""
    return lambda *entries: monkeypatch.setattr(
        implementations, "read_table", lambda: checked(entries)
    )


def test_the_committed_table_names_what_exists():
    for entry in read_table():
        assert entry.implementation in implementations_of(entry.op)
        datetime.date.fromisoformat(entry.date)
        assert entry.gain > 1 and entry.error < 0.05


@pytest.mark.parametrize(
    ("change", "hit"),
    [
        ({}, True),
        ({"length": 4096}, True),
        ({"length": 16384}, True),
        ({"length": 4095}, False),
        ({"length": 16385}, False),
        ({"channels": 128}, False),
        ({"channels": None}, False),  # a size that the table bounds and nobody gives
        ({"rows": 7}, True),  # a size that it does not bound
        ({"op": "lora"}, False),
        ({"dtype": "float32"}, False),
        ({"dtype": jnp.bfloat16}, True),
        ({"device_kind": "NVIDIA H100"}, False),
        ({"device_kind": "NVIDIA H200 NVL"}, False),
        ({"device_kind": None}, False),
    ],
    ids=str,
)
def test_an_entry_holds_for_its_device_dtype_and_sizes_alone(change, hit):
    asked = {
        "op": "attention",
        "device_kind": KIND,
        "dtype": "bfloat16",
        "length": 8192,
        "channels": 64,
    } | change
    about = [asked.pop(name) for name in ("op", "device_kind", "dtype")]
    sizes = {name: size for name, size in asked.items() if size is not None}
    assert measured(*about, sizes, [ENTRY]) == (ENTRY if hit else None)


@pytest.mark.parametrize(
    ("change", "overlaps"),
    [
        ({}, True),
        ({"implementation": "xla"}, True),
        ({"sizes": {"length": (16384, 20000), "channels": (64, 64)}}, True),
        ({"sizes": {"length": (16385, 20000), "channels": (64, 64)}}, False),
        ({"sizes": {"channels": (64, 64)}}, True),
        ({"sizes": {"rows": (1, 2)}}, True),
        ({"sizes": {"length": (1, 2), "rows": (1, 2)}}, False),
        ({"dtype": "float32"}, False),
        ({"device_kind": "TPU v5e"}, False),
        ({"op": "lora"}, False),
    ],
    ids=str,
)
def test_two_entries_for_the_same_arrays_are_refused(change, overlaps, tmp_path):
    other = ENTRY._replace(**change)
    assert overlap(ENTRY, other) == overlap(other, ENTRY) == overlaps
    path = tmp_path / "table.json"
    if overlaps:
        with pytest.raises(ValueError, match="overlaps"):
            write_table(path, [ENTRY, other])
        assert not path.exists()
    else:
        write_table(path, [ENTRY, other])
        assert set(map(str, read_table(path))) == {str(ENTRY), str(other)}


def test_bounds_that_hold_nothing_are_refused():
    with pytest.raises(ValueError, match="no length lies between 5 and 4"):
        checked([ENTRY._replace(sizes={"length": (5, 4)})])


def test_an_empty_table_leaves_every_op_as_it_is(tmp_path):
    write_table(tmp_path / "table.json", [])
    assert read_table(tmp_path / "table.json") == ()
    assert named("attention", None, ("xla",)) == ("xla", "the only implementation there is")
    assert named("attention", None, THERE) == (
        "xla",
        "the default; opt-in, unverified: pallas_gpu, pallas_tpu",
    )
    assert (
        set(implementations_of("attention")) >= {"xla", "pallas_tpu"}
        and implementations_of("nf4")[0] == "xla"
    )


def test_the_table_decides_where_nothing_is_asked_for():
    name, why = named("attention", None, THERE, ENTRY)
    assert name == "pallas_gpu"
    for said in ("block 128", KIND, "2026-11-22", "3.10 x xla", "4e-03"):
        assert said in why
    assert (
        tiles_of(ENTRY, "pallas_gpu") == {"block": 128}
        and tiles_of(ENTRY, "xla") == tiles_of(None, "xla") == {}
    )
    assert named("attention", "xla", THERE, ENTRY) == ("xla", "asked for")
    assert "2026-11-22" in named("attention", "pallas_gpu", THERE, ENTRY)[1]


def test_the_verdict_tells_every_entry_for_a_kind_of_device(table):
    table(ENTRY)
    told = verdict("attention", KIND)
    assert (
        "bfloat16, length 4,096 to 16,384, channels 64: pallas_gpu (block 128), measured" in told
        and "else xla: the default" in told
    )
    assert verdict("attention", "cpu").endswith("nothing was measured on cpu")
    assert verdict("cross_entropy", KIND).endswith(f"nothing was measured on {KIND}")


def test_an_implementation_that_is_measured_is_no_longer_called_unverified():
    assert "unverified" in named("attention", "pallas_tpu", THERE)[1]
    assert (
        "unverified"
        not in named("attention", "pallas_tpu", THERE, ENTRY._replace(implementation="pallas_tpu"))[
            1
        ]
    )


def test_what_the_table_names_and_cannot_run_gives_way_to_xla_and_says_why():
    assert named("attention", None, THERE, ENTRY, lambda name: f"{name}: too wide") == (
        "xla",
        "the table's pallas_gpu does not take this: pallas_gpu: too wide",
    )
    assert named("attention", None, ("xla", "pallas_tpu"), ENTRY)[0] == "xla"  # it is gone


# ---- the ops ask it ----------------------------------------------------------------------------


def attention_inputs(dtype: str = "float32"):
    draw = np.random.default_rng(0)
    q, k, v = (jnp.asarray(draw.standard_normal((1, 96, heads, 8)), dtype) for heads in (4, 2, 2))
    return q, k, v, jnp.asarray(np.arange(96)[None] // 12 * 12 + 12, jnp.int32)


def test_attention_takes_its_tile_sizes_from_the_table(table):
    table(
        ENTRY._replace(
            dtype="float32",
            sizes={"length": (90, 96), "span": (12, 12)},
            implementation="xla",
            tiles={"queries": 16},
        )
    )
    inputs, bounds = attention_inputs(), {"span": 12, "device_kind": KIND}
    heads = Heads(1, 4, 2, 8, jnp.float32)
    assert "16 queries at a time" in choose_attention(96, span=12, heads=heads, device_kind=KIND)[1]
    assert "dense" in choose_attention(96, span=12, heads=heads)[1]  # the device is not known
    programs = [
        str(jax.make_jaxpr(lambda *arrays, given=given: attention(*arrays, **given))(*inputs))
        for given in (bounds, {"span": 12})
    ]
    # of the scan over blocks of 16
    assert "length=6" in programs[0] and "length=6" not in programs[1]
    np.testing.assert_allclose(attention(*inputs, **bounds), attention(*inputs), atol=2e-6)


def test_attention_does_not_fail_where_the_tables_kernel_does_not_take_the_arrays(table):
    table(ENTRY._replace(dtype="float16", sizes={}, implementation="pallas_tpu", tiles={}))
    heads = Heads(1, 4, 2, 8, jnp.float16)
    name, why = choose_attention(96, heads=heads, device_kind=KIND)
    assert name == "xla" and "takes float32 and bfloat16, not float16" in why
    assert jnp.isfinite(attention(*attention_inputs("float16"), device_kind=KIND)).all()
    with pytest.raises(ValueError, match="float16"):
        choose_attention(96, heads=heads, implementation="pallas_tpu", device_kind=KIND)


def test_cross_entropy_asks_the_table(table):
    entry = ENTRY._replace(
        op="cross_entropy",
        dtype="float32",
        sizes={"tokens": (32, 32)},
        implementation="xla",
        tiles={"at_most": 16},
    )
    table(entry, entry._replace(dtype="float16", sizes={}, implementation="pallas_tpu", tiles={}))
    draw = np.random.default_rng(0)
    x, head = (
        jnp.asarray(draw.standard_normal(shape), jnp.float32) for shape in ((2, 16, 8), (33, 8))
    )
    targets, weights = jnp.asarray(draw.integers(0, 33, (2, 16)), jnp.int32), jnp.ones((2, 16))
    channels = Channels(8, jnp.float32)
    assert (
        "8 of a row's 16 positions at a time"
        in choose_cross_entropy((2, 16), 33, channels=channels, device_kind=KIND)[1]
    )
    assert "all logits at once" in choose_cross_entropy((2, 16), 33, channels=channels)[1]
    found = linear_cross_entropy(x, head, targets, weights, device_kind=KIND)
    np.testing.assert_allclose(found, dense_cross_entropy(x, head, targets, weights), rtol=1e-6)
    name, why = choose_cross_entropy(
        (2, 16), 33, channels=Channels(8, jnp.float16), device_kind=KIND
    )
    assert name == "xla" and "not float16" in why


def test_tile_sizes_that_are_tried_are_taken():
    """As far as tracing goes; a size that is none is refused by its name."""
    q, k, v = (jax.ShapeDtypeStruct((1, 1024, heads, 64), jnp.bfloat16) for heads in (4, 2, 2))
    x, head = (jax.ShapeDtypeStruct((*shape, 256), jnp.bfloat16) for shape in ((2, 512), (4096,)))
    until, ints, floats = (
        jax.ShapeDtypeStruct(shape, dtype)
        for shape, dtype in (((1, 1024), jnp.int32), ((2, 512), jnp.int32), ((2, 512), jnp.float32))
    )
    calls = {
        attention_dispatch: lambda **more: jax.eval_shape(
            partial(attention, span=100, **more), q, k, v, until
        ),
        cross_entropy_dispatch: lambda **more: jax.eval_shape(
            partial(linear_cross_entropy, **more), x, head, ints, floats
        ),
    }
    tried = set()
    for dispatch, call in calls.items():
        for name, listed in dispatch.TILES.items():
            if name == "pallas_gpu" and jax.__version_info__ < (0, 11):
                continue
            for tiles in listed:
                call(implementation=name, tiles=tiles)
                tried.add((dispatch, name))
            with pytest.raises((TypeError, KeyError), match=r"nonsense|tokens"):
                call(implementation=name, tiles={"nonsense": 1})
    assert {
        (attention_dispatch, "pallas_tpu"),
        (cross_entropy_dispatch, "pallas_tpu"),
        (attention_dispatch, "xla"),
    } <= tried


def test_the_words_of_a_choice_tell_the_tables_tiles(table):
    table(ENTRY._replace(device_kind="TPU v5e", implementation="pallas_tpu", tiles={"block": 512}))
    heads = Heads(1, 2, 1, 64, jnp.bfloat16)
    assert (
        "blocks of 512 tokens of 8,192"
        in choose_attention(8192, 0, 200, heads=heads, device_kind="TPU v5e")[1]
    )
    table(
        ENTRY._replace(
            op="cross_entropy",
            sizes={},
            implementation="pallas_tpu",
            tiles={"tokens": 256, "entries": 128},
        )
    )
    channels = Channels(896, jnp.bfloat16)
    assert (
        "256 tokens and 128 entries"
        in choose_cross_entropy((16, 256), 151936, channels=channels, device_kind=KIND)[1]
    )


def test_what_does_not_ask_for_a_kernel_does_not_import_it():
    program = (
        "import sys, jaxre_kernels.attention, jaxre_kernels.cross_entropy, jaxre_kernels.lora\n"
    )
    program += (
        "print([name for name in sys.modules if name.endswith(('.tpu', '.gpu')) and"
        " name.startswith('jaxre_kernels')])"
    )
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2] / "kernels")}
    done = subprocess.run(
        [sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "[]"


def test_lora_asks_the_table(table):
    entry = ENTRY._replace(
        op="lora",
        dtype="float16",
        sizes={"rank": (4, 4), "outputs": (96, 96)},
        implementation="pallas_tpu",
        tiles={},
    )
    table(entry, entry._replace(op="nf4", sizes={"rank": (8, 8)}))
    dense = Projections(16, 64, (64, 32), (4, 4), (False, False), jnp.float16)
    for there in (dense, dense._replace(ranks=(8, 8), nf4=(True, True))):
        name, why = choose_lora(there, device_kind=KIND)
        assert (
            name == "xla"
            and "the table's pallas_tpu does not take this" in why
            and "not float16" in why
        )
    for other in (
        {"ranks": (8, 8)},
        {"ranks": (4, 0)},
        {"nf4": (True, True)},
        {"nf4": (True, False)},
        {"outputs": (64, 64)},
    ):
        assert "the default" in choose_lora(dense._replace(**other), device_kind=KIND)[1]
    assert "the default" in choose_lora(dense)[1]  # the device is not known
