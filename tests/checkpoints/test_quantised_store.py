"""An NF4 base in our folder: stored once, opened bit-identical, dequantised for others, merged,
refused where it cannot be.
"""

from __future__ import annotations

import json
import math

import jax
import ml_dtypes
import numpy as np
import pytest
from refusals import refusal
from safetensors.numpy import load_file
from tiny_decoders import (
    CONFIGS,
    build,
    ground_truth,
    our_logits,
    relative,
    their_logits,
    tokens_of,
)
from tiny_runs import LORA, equal, make_run

from jaxre.checkpoints.convert import convert
from jaxre.checkpoints.huggingface import load_base
from jaxre.checkpoints.native import VERSION, load_native
from jaxre.checkpoints.source import open_model
from jaxre.models.lora import scale_of
from jaxre.models.quantised import (
    dense_shape,
    dequantise_matrix,
    is_nf4,
    layer_matrices,
    quantise_matrix,
)

ground_truth("torch")  # the bases are built by transformers
BFLOAT16 = np.dtype(ml_dtypes.bfloat16)


@pytest.fixture
def store(tiny_base, tmp_path):
    """tiny_base with NF4 projections, in our folder."""
    convert(tiny_base, tmp_path / "nf4", "jaxre", quantise="nf4")
    return tmp_path / "nf4"


@pytest.mark.parametrize(
    "family",
    [
        "qwen2 tied, biases, grouped heads",
        "llama untied, head_dim given, K=H",
        "gemma3, sliding and global layers",
        "one layer",
    ],
)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_stored_base_opens_with_the_arrays_of_one_quantised_when_read(tmp_path, family, dtype):
    build(CONFIGS[family], tmp_path / "hf", dtype=dtype)
    summary = convert(tmp_path / "hf", tmp_path / "nf4", "jaxre", quantise="nf4")
    _, dense = load_base(tmp_path / "hf")
    fresh, stored = open_model(tmp_path / "hf", None, "nf4"), open_model(tmp_path / "nf4", None)
    assert equal(stored.base, fresh.base) and stored.architecture == fresh.architecture
    assert all(
        one.dtype == other.dtype
        for one, other in zip(*map(jax.tree.leaves, (stored.base, fresh.base)), strict=True)
    )
    assert equal(open_model(tmp_path / "nf4", None, "nf4").base, stored.base)  # not quantised again
    assert summary.dtype == f"NF4, {dtype}" and summary.parameters == sum(
        leaf.size for leaf in jax.tree.leaves(dense)
    )
    half = open_model(tmp_path / "nf4", BFLOAT16).base
    assert half["embed"].dtype == BFLOAT16 and equal(half["last"]["q"], stored.base["last"]["q"])
    assert equal(half, open_model(tmp_path / "hf", BFLOAT16, "nf4").base)


def test_what_is_written_verifies(tiny_base, tmp_path):
    """Into NF4: the dense weights bit for bit, a projection to the error of its quantisation; out
    of it, bit for bit; merged too.
    """
    there = convert(tiny_base, tmp_path / "nf4", "jaxre", quantise="nf4", verify=True)
    source = load_file(tiny_base / "model.safetensors")
    assert there.differences.keys() == source.keys()
    for name, value in source.items():
        error = (
            np.abs(dequantise_matrix(quantise_matrix(value, name)) - value).max()
            if "proj.weight" in name
            else 0
        )
        assert there.differences[name] == error and (error > 0) == ("proj.weight" in name)
    back = convert(tmp_path / "nf4", tmp_path / "back", "hf", verify=True)
    assert back.differences.keys() == source.keys() and not any(back.differences.values())
    merged = convert(
        quantised_run(tmp_path / "run", tiny_base),
        tmp_path / "merged",
        "jaxre",
        merge=True,
        verify=True,
    )
    assert merged.dtype == "float32" and not any(merged.differences.values())


@pytest.mark.parametrize("field", ["codes", "absmax", "nested_absmax", "offset"])
def test_an_nf4_store_that_does_not_read_back_is_refused_and_removed(
    tiny_base, tmp_path, monkeypatch, field
):
    """One of the four arrays of a projection changed places with that of another layer."""
    from jaxre.checkpoints import convert as module

    write = module.write_native

    def damaging(folder, *arguments, **keywords):
        write(folder, *arguments, **keywords)
        one, other = (
            folder
            / f"weights/layers.up.{field}/c"
            / (f"{layer}" if field == "offset" else f"{layer}/0")
            for layer in (0, 1)
        )
        data = one.read_bytes()
        assert data != other.read_bytes()
        one.write_bytes(other.read_bytes())
        other.write_bytes(data)

    monkeypatch.setattr(module, "write_native", damaging)
    said = refusal(
        lambda: convert(tiny_base, tmp_path / "nf4", "jaxre", quantise="nf4", verify=True)
    )
    assert (
        f"{tmp_path / 'nf4'}: 2 of" in said and "do not read back as written, model.layers." in said
    )
    assert not list(tmp_path.iterdir())


def test_a_dense_jaxre_folder_can_be_quantised_when_read_or_stored(tiny_base, store, tmp_path):
    convert(tiny_base, tmp_path / "dense", "jaxre")
    convert(tmp_path / "dense", tmp_path / "again", "jaxre", quantise="nf4")
    expected = open_model(store, None).base
    assert equal(open_model(tmp_path / "again", None).base, expected)
    # From what is stored, not from its rounding to the compute dtype.
    assert equal(
        open_model(tmp_path / "dense", BFLOAT16, "nf4").base["layers"]["up"],
        expected["layers"]["up"],
    )


def test_an_nf4_base_takes_half_a_byte_a_parameter(tmp_path):
    """4 bits, 8 bits in 64, 32 bits in 64 x 256, an offset."""
    fields = {
        "hidden_size": 512,
        "intermediate_size": 1024,
        "num_attention_heads": 8,
        "num_hidden_layers": 2,
    }
    build({**CONFIGS["llama grouped heads, K=1"], **fields}, tmp_path / "hf")
    base = open_model(tmp_path / "hf", None, "nf4").base
    projections = [leaf for leaf in jax.tree.leaves(base, is_leaf=is_nf4) if is_nf4(leaf)]
    stored = sum(leaf.nbytes for leaf in jax.tree.leaves(projections))
    assert 8 * stored / sum(math.prod(dense_shape(one)) for one in projections) == pytest.approx(
        4.127, abs=2e-3
    )


def test_to_hugging_face_an_nf4_base_is_dequantised(store, tiny_base, tmp_path):
    from transformers import AutoModelForCausalLM

    summary = convert(store, tmp_path / "hf", "hf")
    assert summary.dtype == "float32"
    loaded = open_model(store, None)
    model = AutoModelForCausalLM.from_pretrained(
        tmp_path / "hf", dtype="auto", attn_implementation="eager"
    ).eval()
    tokens = tokens_of(512, 2, 24)
    assert (
        relative(our_logits(loaded.architecture, loaded.base, tokens), their_logits(model, tokens))
        < 1e-4
    )
    before, after = (
        load_file(tiny_base / "model.safetensors"),
        load_file(tmp_path / "hf/model.safetensors"),
    )
    assert before.keys() == after.keys()
    assert {name for name in before if not np.array_equal(before[name], after[name])} == {
        name for name in before if "proj.weight" in name
    }
    half = convert(store, tmp_path / "half", "hf", dtype="bfloat16")
    assert half.dtype == "bfloat16"
    rounded = load_file(tmp_path / "half/model.safetensors")
    # rounded once
    assert all(np.array_equal(rounded[name], after[name].astype(BFLOAT16)) for name in after)


def quantised_run(folder, base):
    return make_run(folder, base, "lora", quantise="nf4")


def test_a_run_on_nf4_opens_with_its_quantised_base_and_predicts_as_its_merged_model(
    tiny_base, store, tmp_path
):
    """The merged weights are the dequantised ones with the adapter added, so that nothing changes
    but roundings.
    """
    run = quantised_run(tmp_path / "run", tiny_base)
    loaded = open_model(run, None)
    assert equal(loaded.base, open_model(store, None).base) and loaded.quantise == "nf4"
    tokens = tokens_of(512, 2, 24)
    own = our_logits(
        loaded.architecture, loaded.base, tokens, factors=loaded.factors, scale=scale_of(LORA)
    )
    summary = convert(run, tmp_path / "merged", "hf", merge=True)
    assert summary.merged and summary.dtype == "float32"
    architecture, merged = load_base(tmp_path / "merged")
    assert relative(our_logits(architecture, merged, tokens), own) < 1e-4  # measured: 2e-6
    ((_, q),), ((_, k),) = (layer_matrices(loaded.base["last"][name]) for name in "qk")
    factor = loaded.factors["last"]["q"]
    np.testing.assert_allclose(
        merged["last"]["q"], q + scale_of(LORA) * (factor["a"] @ factor["b"]), rtol=1e-5, atol=1e-6
    )
    assert np.array_equal(merged["last"]["k"], k)  # not targeted
    # Its adapter alone names the original base: merged there, the weights are others.
    convert(run / "adapter", tmp_path / "original", "hf", merge=True)
    assert np.array_equal(
        load_base(tmp_path / "original")[1]["last"]["k"], load_base(tiny_base)[1]["last"]["k"]
    )


def test_a_run_on_a_stored_base_opens_with_it(store, tmp_path):
    run = make_run(tmp_path / "run", store, "lora")
    loaded = open_model(run, BFLOAT16)
    assert loaded.folder == store and equal(loaded.base, open_model(store, BFLOAT16).base)
    convert(run, tmp_path / "merged", "hf", merge=True)
    assert load_base(tmp_path / "merged")[1]["last"]["q"].dtype == np.float32


def test_a_fully_trained_run_can_be_quantised(tiny_base, tmp_path):
    run = make_run(tmp_path / "run", tiny_base, "full")
    convert(run, tmp_path / "nf4", "jaxre", quantise="nf4")
    assert equal(load_native(tmp_path / "nf4")[1], load_base(run / "model", quantise="nf4")[1])


@pytest.mark.parametrize(
    ("source", "to", "quantise", "message"),
    [
        ("hf", "hf", "nf4", "only a jaxre folder holds NF4 weights; use --to jaxre"),
        ("hf", "peft", "nf4", "only a jaxre folder holds NF4 weights"),
        ("hf", "jaxre", "int8", "--quantise int8: not a form of weights that is known; nf4 is"),
        ("store", "jaxre", "nf4", "is a jaxre folder already; copy the folder"),
        ("store", "jaxre", None, "is a jaxre folder already; copy the folder"),
        ("run", "jaxre", "nf4", "add --merge for a whole model"),
        (
            "run, merged",
            "jaxre",
            "nf4",
            "is an adapter on a base; merge it into a folder first, then quantise that",
        ),
    ],
)
def test_what_cannot_be_quantised_is_refused_with_the_fix(
    tiny_base, store, tmp_path, source, to, quantise, message
):
    run = quantised_run(tmp_path / "run", tiny_base)
    folder = {"hf": tiny_base, "store": store}.get(source, run)
    before = sorted(path.name for path in tmp_path.iterdir())
    said = refusal(
        lambda: convert(
            folder, tmp_path / "target", to, merge="merged" in source, quantise=quantise
        )
    )
    assert message in said and sorted(path.name for path in tmp_path.iterdir()) == before


def test_a_store_quantised_in_another_way_is_refused(store):
    (store / "jaxre.json").write_text(
        json.dumps({"format": "jaxre weights", "version": VERSION, "quantised": "fp4"})
    )
    assert (
        "quantised as 'fp4', this jaxre reads nf4; convert the Hugging Face folder again"
        in refusal(lambda: open_model(store, None))
    )


def test_a_store_of_other_types_is_refused_with_every_array(store):
    for name, kind in (("last.up.codes", "int8"), ("norm", "int32")):
        path = store / "weights" / name / "zarr.json"
        path.write_text(
            json.dumps({**json.loads(path.read_text()), "data_type": kind, "fill_value": 0})
        )
    for asked in (
        lambda: open_model(store, None),
        lambda: convert(store, store.parent / "out", "hf"),
    ):
        said = refusal(asked)
        assert (
            "last.up.codes is stored as int8, which is not uint8" in said
            and "norm is stored as int32, which is not" in said
        )


def test_a_store_that_does_not_fit_its_config_is_refused_with_every_array(store):
    config = json.loads((store / "config.json").read_text())
    (store / "config.json").write_text(json.dumps({**config, "intermediate_size": 64}))
    said = refusal(lambda: open_model(store, None))
    assert (
        "last.up.codes has shape [768], expected [1024]" in said
        and "layers.down.absmax has shape [2, 24], expected [2, 32]" in said
    )
    (store / "config.json").write_text(json.dumps(config))
    (store / "jaxre.json").write_text(json.dumps({"format": "jaxre weights", "version": VERSION}))
    assert "last.up.codes is not known" in refusal(lambda: open_model(store, None))
