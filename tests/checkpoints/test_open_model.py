"""Every kind of model opens, or is refused with the fix."""

from __future__ import annotations

import json
import shutil
from types import SimpleNamespace

import jax
import ml_dtypes
import numpy as np
import pytest
from refusals import refusal
from tiny_decoders import ground_truth, random_factors
from tiny_runs import LORA, equal, make_run

from jaxre.checkpoints import source
from jaxre.checkpoints.convert import convert
from jaxre.checkpoints.huggingface import load_base
from jaxre.checkpoints.peft import base_name_of, save_adapter
from jaxre.checkpoints.source import compute_dtype, open_model
from jaxre.config import load_config
from jaxre.errors import InputError
from jaxre.training.loop import save_result

ground_truth("torch")  # the base that these tests open is built by transformers
FLOAT32 = np.dtype(np.float32)


@pytest.mark.parametrize("dtype", [None, FLOAT32, np.dtype(ml_dtypes.bfloat16)])
def test_hugging_face_folder_opens(tiny_base, dtype):
    loaded = open_model(str(tiny_base), dtype)
    assert (loaded.folder, loaded.name, loaded.kind, loaded.lora, loaded.factors) == (
        tiny_base,
        "tiny",
        "hf",
        None,
        None,
    )
    assert equal(loaded.base, load_base(tiny_base, dtype)[1])
    assert {leaf.dtype for leaf in jax.tree.leaves(loaded.base)} == {dtype or FLOAT32}


def test_jaxre_folder_opens(tiny_base, tmp_path):
    convert(tiny_base, tmp_path / "ours", "jaxre")
    loaded = open_model(tmp_path / "ours", FLOAT32)
    assert (loaded.folder, loaded.kind, loaded.factors) == (tmp_path / "ours", "jaxre", None)
    assert equal(loaded.base, load_base(tiny_base)[1])
    half = open_model(tmp_path / "ours", np.dtype(ml_dtypes.bfloat16)).base
    assert equal(half, load_base(tiny_base, np.dtype(ml_dtypes.bfloat16))[1])


@pytest.mark.parametrize("stored_as", ["hf", "jaxre"])
def test_adapter_folder_opens_with_its_base(tiny_base, tmp_path, stored_as):
    base = tiny_base
    if stored_as == "jaxre":
        base = tmp_path / "ours"
        convert(tiny_base, base, "jaxre")
    architecture, params = load_base(tiny_base)
    factors = random_factors(architecture, LORA)
    save_adapter(tmp_path / "adapter", architecture, LORA, factors, str(base), tiny_base)
    loaded = open_model(tmp_path / "adapter", FLOAT32)
    assert (loaded.folder, loaded.name, loaded.kind) == (base, "adapter", "peft")
    assert equal(loaded.base, params) and equal(loaded.factors, factors)
    assert loaded.lora == LORA


def test_run_with_an_adapter_opens(tiny_base, tmp_path):
    loaded = open_model(make_run(tmp_path / "run", tiny_base, "lora"), FLOAT32)
    assert (loaded.folder, loaded.name, loaded.kind, loaded.lora) == (
        tiny_base,
        "study-1",
        "run",
        LORA,
    )
    assert equal(loaded.factors, random_factors(loaded.architecture, LORA)) and equal(
        loaded.base, load_base(tiny_base)[1]
    )


def test_fully_trained_run_opens_as_its_own_weights(tiny_base, tmp_path):
    run = make_run(tmp_path / "run", tiny_base, "full")
    loaded = open_model(run, FLOAT32)
    assert (loaded.folder, loaded.kind, loaded.factors) == (run / "model", "run", None)
    assert (loaded.folder / "tokenizer.json").is_file() and (
        loaded.folder / "config.json"
    ).is_file()
    assert equal(loaded.base, jax.tree.map(lambda leaf: leaf * 2, load_base(tiny_base)[1]))


def test_run_on_a_fully_trained_run_has_that_run_as_its_base(tiny_base, tmp_path):
    first = make_run(tmp_path / "first", tiny_base, "full")
    loaded = open_model(make_run(tmp_path / "second", first, "lora"), FLOAT32)
    assert loaded.folder == first / "model" and loaded.factors is not None
    assert equal(loaded.base, open_model(first, FLOAT32).base)


def test_model_is_found_by_a_relative_path_and_by_its_shipped_name(
    tiny_base, tmp_path, monkeypatch
):
    monkeypatch.chdir(tiny_base.parent)
    assert open_model("tiny", FLOAT32).name == "tiny"
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("jaxre.checkpoints.source.shipped", lambda name: tiny_base.parent / name)
    assert open_model("tiny", FLOAT32).folder == tiny_base


@pytest.mark.parametrize("method", ["lora", "full"])
def test_unfinished_run_is_refused_with_the_command_that_finishes_it(tiny_base, tmp_path, method):
    run = make_run(tmp_path / "run", tiny_base, method, result=False)
    with pytest.raises(
        InputError,
        match=(
            rf"this run has no {'adapter' if method == 'lora' else 'model'}/ yet; finish it with:"
            r" jaxre train .*config\.yaml"
        ),
    ):
        open_model(run, FLOAT32)


def test_adapter_on_random_weights_that_were_not_kept_is_refused(tiny_base, tmp_path):
    run = make_run(tmp_path / "run", tiny_base, "lora", architecture={"model_type": "llama"})
    with pytest.raises(InputError, match="random weights that were not kept"):
        open_model(run, FLOAT32)


def test_folder_that_is_no_model_is_refused(tmp_path):
    with pytest.raises(InputError, match=r"not a model; it has none of config\.json"):
        open_model(tmp_path, FLOAT32)


def test_adapter_whose_base_is_gone_is_refused(tiny_base, tmp_path):
    base = shutil.copytree(tiny_base, tmp_path / "base")
    architecture, _ = load_base(base)
    save_adapter(
        tmp_path / "adapter",
        architecture,
        LORA,
        random_factors(architecture, LORA),
        str(base),
        base,
    )
    shutil.rmtree(base)
    with pytest.raises(
        InputError, match=r"adapter: its base does not open: .* no such run or model folder"
    ):
        open_model(tmp_path / "adapter", FLOAT32)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"base_model_name_or_path": None}, "base_model_name_or_path is missing"),
        ({"revision": "v2"}, "revision 'v2'"),
        ({"base_model_name_or_path": "{adapter}"}, "is named as the base of itself"),
    ],
    ids=["no base", "a revision", "itself"],
)
def test_adapter_that_names_no_usable_base_is_refused(tiny_base, tmp_path, change, message):
    architecture, _ = load_base(tiny_base)
    save_adapter(
        tmp_path / "adapter",
        architecture,
        LORA,
        random_factors(architecture, LORA),
        str(tiny_base),
        tiny_base,
    )
    path = tmp_path / "adapter/adapter_config.json"
    if change.get("base_model_name_or_path"):
        change = {"base_model_name_or_path": str(tmp_path / "adapter")}
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises(InputError, match=message):
        open_model(tmp_path / "adapter", FLOAT32)


def adapter_on(folder, base, named: str):
    """A PEFT folder with an adapter that fits `base` and names its base `named`."""
    architecture, _ = load_base(base)
    save_adapter(folder, architecture, LORA, random_factors(architecture, LORA), named, base)
    return folder


@pytest.fixture
def hub(tiny_base, monkeypatch):
    """The hub has tiny_base as owner/base."""
    resolve = source.resolve_model
    monkeypatch.setattr(
        source, "resolve_model", lambda path: tiny_base if path == "owner/base" else resolve(path)
    )
    return "owner/base"


def test_run_that_continues_an_adapter_names_the_hub_id_of_its_base(tiny_base, hub, tmp_path):
    """Not the run or adapter it started from, which PEFT would apply too, nor the folder of a
    cache; at its end and when exported.
    """
    first = adapter_on(tmp_path / "first", tiny_base, hub)
    second = make_run(tmp_path / "second", first, "lora")
    third = make_run(tmp_path / "third", second, "lora")
    config, state = (
        load_config(third / "config.yaml"),
        SimpleNamespace(trainable=open_model(third, None).factors),
    )
    save_result(tmp_path / "ended", config, load_base(tiny_base)[0], state, tiny_base, None)
    convert(third, tmp_path / "exported", "peft")
    assert base_name_of(tmp_path / "ended/adapter") == base_name_of(tmp_path / "exported") == hub


def test_shipped_base_is_named_by_its_folder(tiny_base, tmp_path, monkeypatch):
    """PEFT would take the name for a hub id."""
    monkeypatch.setattr("jaxre.checkpoints.source.shipped", lambda name: tiny_base.parent / name)
    convert(make_run(tmp_path / "run", "tiny", "lora"), tmp_path / "exported", "peft")
    assert base_name_of(tmp_path / "exported") == str(tiny_base)


@pytest.mark.parametrize("quantise", [None, "nf4"])
def test_exported_adapter_on_a_jaxre_folder_says_that_peft_cannot_open_it(
    tiny_base, tmp_path, quantise
):
    convert(tiny_base, tmp_path / "ours", "jaxre", quantise=quantise)
    done = convert(
        make_run(tmp_path / "run", tmp_path / "ours", "lora"), tmp_path / "exported", "peft"
    )
    assert (
        f"peft cannot open its base {tmp_path / 'ours'}, a jaxre folder: convert that --to hf"
        in str(done)
    )
    assert "peft cannot" not in str(
        convert(make_run(tmp_path / "other", tiny_base, "lora"), tmp_path / "fine", "peft")
    )


@pytest.mark.parametrize("under", ["adapter", "run"])
def test_adapter_on_an_adapter_is_refused_not_opened_without_it(tiny_base, tmp_path, under):
    first = make_run(tmp_path / "run", tiny_base, "lora")
    first = first / "adapter" if under == "adapter" else first
    second = adapter_on(tmp_path / "second", tiny_base, str(first))
    run = make_run(tmp_path / "third", tiny_base, "lora")
    (run / "config.yaml").write_text(
        (run / "config.yaml").read_text().replace(str(tiny_base), str(second))
    )
    for model in (second, run):
        message = refusal(lambda model=model: open_model(model, FLOAT32))
        assert (
            f"{first}: is itself an adapter" in message
            and f"jaxre convert {first} TARGET --to hf --merge" in message
        )
    merged = convert(first, tmp_path / "merged", "hf", merge=True).target
    assert (
        open_model(adapter_on(tmp_path / "fixed", tiny_base, str(merged)), FLOAT32).folder == merged
    )


def test_runs_that_name_each_other_as_base_are_refused(tiny_base, tmp_path):
    run = make_run(tmp_path / "run", tiny_base, "lora")
    text = (run / "config.yaml").read_text()
    (run / "config.yaml").write_text(text.replace(str(tiny_base), str(run)))
    with pytest.raises(InputError, match="is named as the base of itself"):
        open_model(run, FLOAT32)


@pytest.mark.parametrize(
    ("setting", "backend", "expected"),
    [
        ("auto", "cpu", "float32"),
        ("auto", "gpu", "bfloat16"),
        ("auto", "tpu", "bfloat16"),
        ("float32", "gpu", "float32"),
        ("bfloat16", "cpu", "bfloat16"),
    ],
)
def test_compute_dtype_is_bfloat16_on_an_accelerator_unless_told(
    setting, backend, expected, monkeypatch
):
    monkeypatch.setattr(jax, "default_backend", lambda: backend)
    assert compute_dtype(setting) == np.dtype(expected)
