"""Conversion keeps every bit it should, merges as PEFT does, and refuses what cannot be."""

from __future__ import annotations

import json

import jax
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file
from tiny_decoders import CONFIGS, build, ground_truth, our_logits, random_factors, relative, their_logits, tokens_of
from tiny_runs import LORA, equal, make_run

from jaxre.checkpoints.convert import convert
from jaxre.checkpoints.huggingface import load_base
from jaxre.checkpoints.native import load_native
from jaxre.checkpoints.peft import save_adapter
from jaxre.checkpoints.source import open_model
from jaxre.errors import InputError
from jaxre.models.lora import scale_of

torch = ground_truth("torch")
peft = ground_truth("peft")


def bits(folder) -> dict:
    """name -> (dtype, shape, bytes) of every tensor of a Hugging Face folder."""
    return {
        name: (value.dtype, value.shape, value.tobytes())
        for path in sorted(folder.glob("*.safetensors"))
        for name, value in load_file(path).items()
    }


@pytest.fixture
def run(tiny_base, tmp_path):
    return make_run(tmp_path / "run", tiny_base, "lora")


@pytest.mark.parametrize(
    "family", ["qwen2 tied, biases, grouped heads", "llama untied, head_dim given, K=H", "qwen3, norms of q and k", "one layer"]
)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_hugging_face_to_jaxre_and_back_is_bit_identical(tmp_path, family, dtype):
    build(CONFIGS[family], tmp_path / "hf", dtype=dtype)
    there = convert(tmp_path / "hf", tmp_path / "ours", "jaxre")
    back = convert(tmp_path / "ours", tmp_path / "back", "hf")
    assert bits(tmp_path / "back") == bits(tmp_path / "hf")
    assert there.dtype == back.dtype == dtype and there.parameters == sum(np.prod(shape) for _, shape, _ in bits(tmp_path / "hf").values())
    ignored = ("transformers_version", "dtype")
    before, after = (
        {k: v for k, v in json.loads((tmp_path / f / "config.json").read_text()).items() if k not in ignored} for f in ("hf", "back")
    )
    assert before == after


def test_jaxre_folder_carries_tokenizer_and_generation_config(tiny_base, tmp_path):
    convert(tiny_base, tmp_path / "ours", "jaxre")
    convert(tmp_path / "ours", tmp_path / "back", "hf")
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        assert (tmp_path / "ours" / name).read_bytes() == (tmp_path / "back" / name).read_bytes() == (tiny_base / name).read_bytes()


@pytest.mark.parametrize("source", ["run", "adapter"])
def test_merged_folder_loads_in_transformers_with_the_same_logits(run, tiny_base, tmp_path, source):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    summary = convert(run if source == "run" else run / "adapter", tmp_path / "merged", "hf", merge=True)
    assert summary.merged and "the adapter merged" in str(summary) and "\n" not in str(summary)
    loaded = open_model(run, None)
    model, report = AutoModelForCausalLM.from_pretrained(
        tmp_path / "merged", dtype="auto", attn_implementation="eager", output_loading_info=True
    )
    assert model.dtype == torch.float32 and not any(report.values())
    tokens = tokens_of(512, 2, 32)
    ours = our_logits(loaded.architecture, loaded.base, tokens, factors=loaded.factors, scale=scale_of(LORA))
    assert relative(ours, their_logits(model.eval(), tokens)) < 1e-4  # measured: 2e-6
    beside = peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny_base, dtype="auto"), run / "adapter").eval()
    assert relative(their_logits(model, tokens), their_logits(beside, tokens)) < 1e-4
    assert AutoTokenizer.from_pretrained(tmp_path / "merged").encode("Once upon a time", add_special_tokens=False) == [403, 407, 261, 378]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_merging_keeps_the_stored_dtype_and_the_untouched_weights(tmp_path, dtype):
    """Formed in f32, cast once; a tied head is not written."""
    build(CONFIGS["qwen2 tied, biases, grouped heads"], tmp_path / "base", dtype=dtype)
    architecture, _ = load_base(tmp_path / "base")
    factors = random_factors(architecture, LORA)
    save_adapter(tmp_path / "adapter", architecture, LORA, factors, str(tmp_path / "base"), tmp_path / "base")
    assert convert(tmp_path / "adapter", tmp_path / "merged", "hf", merge=True).dtype == dtype
    before, after = bits(tmp_path / "base"), bits(tmp_path / "merged")
    assert before.keys() == after.keys() and "lm_head.weight" not in after
    targeted = {name for name in before if "q_proj.weight" in name or "down_proj.weight" in name}
    assert {name for name in before if before[name] != after[name]} == targeted
    wide = {name: np.asarray(value, np.float32) for name, value in load_file(tmp_path / "base/model.safetensors").items()}
    a, b = (np.asarray(factors["last"]["q"][side], np.float64) for side in ("a", "b"))
    exact = wide["model.layers.2.self_attn.q_proj.weight"] + scale_of(LORA) * (a @ b).T
    merged = load_file(tmp_path / "merged/model.safetensors")["model.layers.2.self_attn.q_proj.weight"]
    # One rounding: half a unit in the last place of f32's 24 or bf16's 8 bits, plus f32's sum of four products.
    unit = 2.0**-8 if dtype == "bfloat16" else 2.0**-22
    assert (np.abs(np.asarray(merged, np.float64) - exact) <= unit * np.abs(exact) + 1e-6).all()


def test_merged_jaxre_folder_equals_the_merged_hugging_face_folder(run, tmp_path):
    convert(run, tmp_path / "hf", "hf", merge=True)
    convert(run, tmp_path / "ours", "jaxre", merge=True)
    assert equal(load_native(tmp_path / "ours")[1], load_base(tmp_path / "hf")[1])


def test_run_to_peft_gives_its_adapter(run, tiny_base, tmp_path):
    summary = convert(run, tmp_path / "adapter", "peft")
    one, other = open_model(tmp_path / "adapter", None), open_model(run, None)
    assert equal(one.factors, other.factors) and one.lora == other.lora and one.folder == tiny_base
    assert summary.to == "peft" and not summary.merged and summary.parameters == sum(leaf.size for leaf in jax.tree.leaves(one.factors))


def test_fully_trained_run_to_hugging_face_gives_its_model(tiny_base, tmp_path):
    run = make_run(tmp_path / "run", tiny_base, "full")
    convert(run, tmp_path / "model", "hf")
    assert bits(tmp_path / "model") == bits(run / "model")


@pytest.mark.parametrize(
    ("source", "to", "merge", "message"),
    [
        ("hf", "hf", False, "is a Hugging Face folder already; copy the folder"),
        ("hf", "hf", True, "has no adapter to merge; leave --merge out"),
        ("hf", "jaxre", True, "has no adapter to merge; leave --merge out"),
        ("hf", "peft", False, "has no adapter, it is a Hugging Face folder"),
        ("jaxre", "jaxre", False, "is a jaxre folder already"),
        ("jaxre", "peft", False, "has no adapter, it is a jaxre folder"),
        ("run", "hf", False, "add --merge for a whole model, or use --to peft"),
        ("run", "jaxre", False, "add --merge for a whole model"),
        ("run", "peft", True, "leave --merge out, or use --to hf"),
        ("peft", "hf", False, "add --merge for a whole model"),
        ("peft", "peft", False, "is a PEFT adapter already"),
        ("full", "peft", False, "has no adapter, the run trained all weights; use --to hf"),
        ("full", "hf", True, "has no adapter to merge"),
        ("hf", "onnx", False, "onnx: not a form of a model"),
    ],
)
def test_what_cannot_be_is_refused_with_the_mend(tiny_base, tmp_path, source, to, merge, message):
    folder = {
        "hf": tiny_base,
        "jaxre": tmp_path / "ours",
        "run": tmp_path / "run",
        "peft": tmp_path / "run/adapter",
        "full": tmp_path / "run",
    }[source]
    if source == "jaxre":
        convert(tiny_base, folder, "jaxre")
    elif source != "hf":
        make_run(tmp_path / "run", tiny_base, "full" if source == "full" else "lora")
    before = sorted(path.name for path in tmp_path.iterdir())
    with pytest.raises(InputError, match=message):
        convert(folder, tmp_path / "target", to, merge=merge)
    assert sorted(path.name for path in tmp_path.iterdir()) == before


@pytest.mark.parametrize(("to", "merge"), [("hf", True), ("jaxre", True), ("peft", False)])
def test_target_that_exists_is_left_alone(run, tmp_path, to, merge):
    (tmp_path / "target").mkdir()
    (tmp_path / "target/mine").write_text("mine")
    with pytest.raises(InputError, match="exists already"):
        convert(run, tmp_path / "target", to, merge=merge)
    assert [path.name for path in (tmp_path / "target").iterdir()] == ["mine"]
    assert not [path for path in tmp_path.iterdir() if "partial" in path.name]


def test_source_that_is_missing_is_refused(tmp_path):
    with pytest.raises(InputError, match="no such model folder"):
        convert(tmp_path / "none", tmp_path / "target", "hf")


# ---- our own folder -------------------------------------------------------------------------


@pytest.fixture
def ours(tiny_base, tmp_path):
    convert(tiny_base, tmp_path / "ours", "jaxre")
    return tmp_path / "ours"


def test_jaxre_folder_of_another_version_is_refused(ours):
    (ours / "jaxre.json").write_text(json.dumps({"format": "jaxre weights", "version": 99}))
    with pytest.raises(InputError, match="version 99 is not known, this jaxre reads 1; convert the Hugging Face folder again"):
        open_model(ours, None)


def test_jaxre_folder_whose_config_does_not_fit_is_refused_with_every_array(ours):
    config = json.loads((ours / "config.json").read_text())
    (ours / "config.json").write_text(json.dumps({**config, "intermediate_size": 50, "tie_word_embeddings": True}))
    with pytest.raises(InputError, match="do not fit config") as error:
        open_model(ours, None)
    for problem in (
        "head is not known",
        "last.up has shape [32, 48], expected [32, 50]",
        "layers.down has shape [2, 48, 32], expected [2, 50, 32]",
    ):
        assert problem in str(error.value)


@pytest.mark.parametrize("damage", ["no weights", "empty weights", "cut data"])
def test_damaged_jaxre_folder_is_refused(ours, damage):
    import shutil

    if damage == "cut data":
        for path in (ours / "weights").rglob("*"):
            if path.is_file() and path.parent.name == "d":
                path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    else:
        shutil.rmtree(ours / "weights")
        if damage == "empty weights":
            (ours / "weights").mkdir()
    with pytest.raises(InputError, match="convert the Hugging Face folder again") as error:
        open_model(ours, None)
    assert "\n" not in str(error.value)


def test_jaxre_folder_stores_bfloat16_as_such(tmp_path):
    build(CONFIGS["one layer"], tmp_path / "hf", dtype="bfloat16")
    convert(tmp_path / "hf", tmp_path / "ours", "jaxre")
    _, params = load_native(tmp_path / "ours")
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {np.dtype(ml_dtypes.bfloat16)}
    assert all(isinstance(leaf, np.ndarray) for leaf in jax.tree.leaves(params))
    assert equal(params, load_base(tmp_path / "hf")[1])
