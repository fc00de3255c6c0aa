"""Conversion preserves every bit that it should and merges as PEFT does."""

from __future__ import annotations

import json
import shutil

import jax
import ml_dtypes
import numpy as np
import pytest
from refusals import refusal
from safetensors.numpy import load_file, save_file
from tiny_decoders import (
    CONFIGS,
    build,
    ground_truth,
    our_logits,
    random_factors,
    relative,
    their_logits,
    tokens_of,
)
from tiny_runs import LORA, bits, equal, make_run

from jaxre.checkpoints import native, shards
from jaxre.checkpoints.convert import DTYPES, convert
from jaxre.checkpoints.huggingface import hf_tensors, load_base
from jaxre.checkpoints.native import load_native
from jaxre.checkpoints.peft import save_adapter
from jaxre.checkpoints.source import open_model
from jaxre.errors import InputError
from jaxre.models.lora import scale_of

torch = ground_truth("torch")
peft = ground_truth("peft")


@pytest.mark.parametrize(
    "family",
    [
        "qwen2 tied, biases, grouped heads",
        "llama untied, head_dim given, K=H",
        "qwen3, norms of q and k",
        "gemma3, sliding and global layers",
        "gemma3, last layer global, scaled",
        "one layer",
    ],
)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_hugging_face_to_jaxre_and_back_is_bit_identical(tmp_path, family, dtype):
    build(CONFIGS[family], tmp_path / "hf", dtype=dtype)
    there = convert(tmp_path / "hf", tmp_path / "ours", "jaxre")
    back = convert(tmp_path / "ours", tmp_path / "back", "hf")
    assert bits(tmp_path / "back") == bits(tmp_path / "hf")
    assert there.dtype == back.dtype == dtype and there.parameters == sum(
        np.prod(shape) for _, shape, _ in bits(tmp_path / "hf").values()
    )
    ignored = ("transformers_version", "dtype")
    before, after = (
        {
            k: v
            for k, v in json.loads((tmp_path / f / "config.json").read_text()).items()
            if k not in ignored
        }
        for f in ("hf", "back")
    )
    assert before == after


def test_jaxre_folder_carries_tokenizer_and_generation_config(tiny_base, tmp_path):
    convert(tiny_base, tmp_path / "ours", "jaxre")
    convert(tmp_path / "ours", tmp_path / "back", "hf")
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        assert (
            (tmp_path / "ours" / name).read_bytes()
            == (tmp_path / "back" / name).read_bytes()
            == (tiny_base / name).read_bytes()
        )


@pytest.mark.parametrize("source", ["run", "adapter"])
def test_merged_folder_loads_in_transformers_with_the_same_logits(run, tiny_base, tmp_path, source):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    summary = convert(
        run if source == "run" else run / "adapter", tmp_path / "merged", "hf", merge=True
    )
    assert summary.merged and "the adapter merged" in str(summary) and "\n" not in str(summary)
    loaded = open_model(run, None)
    model, report = AutoModelForCausalLM.from_pretrained(
        tmp_path / "merged", dtype="auto", attn_implementation="eager", output_loading_info=True
    )
    assert model.dtype == torch.float32 and not any(report.values())
    tokens = tokens_of(512, 2, 32)
    ours = our_logits(
        loaded.architecture, loaded.base, tokens, factors=loaded.factors, scale=scale_of(LORA)
    )
    assert relative(ours, their_logits(model.eval(), tokens)) < 1e-4  # measured: 2e-6
    beside = peft.PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(tiny_base, dtype="auto"), run / "adapter"
    ).eval()
    assert relative(their_logits(model, tokens), their_logits(beside, tokens)) < 1e-4
    assert AutoTokenizer.from_pretrained(tmp_path / "merged").encode(
        "Once upon a time", add_special_tokens=False
    ) == [403, 407, 261, 378]


@pytest.mark.parametrize(
    "family", ["qwen2 tied, biases, grouped heads", "gemma3, last layer global, scaled"]
)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_merging_keeps_the_stored_dtype_and_the_untouched_weights(tmp_path, family, dtype):
    """Formed in f32, cast once; a tied head is not written."""
    build(CONFIGS[family], tmp_path / "base", dtype=dtype)
    architecture, _ = load_base(tmp_path / "base")
    factors = random_factors(architecture, LORA)
    save_adapter(
        tmp_path / "adapter", architecture, LORA, factors, str(tmp_path / "base"), tmp_path / "base"
    )
    assert convert(tmp_path / "adapter", tmp_path / "merged", "hf", merge=True).dtype == dtype
    before, after = bits(tmp_path / "base"), bits(tmp_path / "merged")
    assert before.keys() == after.keys() and "lm_head.weight" not in after
    targeted = {name for name in before if "q_proj.weight" in name or "down_proj.weight" in name}
    assert {name for name in before if before[name] != after[name]} == targeted
    wide = {
        name: np.asarray(value, np.float32)
        for name, value in load_file(tmp_path / "base/model.safetensors").items()
    }
    a, b = (np.asarray(factors["last"]["q"][side], np.float64) for side in ("a", "b"))
    exact = wide["model.layers.2.self_attn.q_proj.weight"] + scale_of(LORA) * (a @ b).T
    merged = load_file(tmp_path / "merged/model.safetensors")[
        "model.layers.2.self_attn.q_proj.weight"
    ]
    # One rounding: half a unit in the last place of f32's 24 or bf16's 8 bits, plus f32's sum of
    # four products.
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
    assert (
        summary.to == "peft"
        and not summary.merged
        and summary.parameters == sum(leaf.size for leaf in jax.tree.leaves(one.factors))
    )


def test_fully_trained_run_to_hugging_face_gives_its_model(tiny_base, tmp_path):
    run = make_run(tmp_path / "run", tiny_base, "full")
    convert(run, tmp_path / "model", "hf")
    assert bits(tmp_path / "model") == bits(run / "model")


@pytest.mark.parametrize(
    "family", ["qwen2 tied, biases, grouped heads", "llama untied, head_dim given, K=H"]
)
def test_shards_convert_there_and_back_bit_identical(tmp_path, family, monkeypatch):
    """Shards that transformers cut, shards that we cut, and a model that transformers loads whole
    from ours.
    """
    from transformers import AutoModelForCausalLM

    model = build(CONFIGS[family], tmp_path / "hf", dtype="bfloat16", max_shard_size="10KB")
    assert len(list((tmp_path / "hf").glob("*.safetensors"))) > 2
    monkeypatch.setattr(shards, "SHARD_BYTES", 15_000)
    convert(tmp_path / "hf", tmp_path / "ours", "jaxre", verify=True)
    convert(tmp_path / "ours", tmp_path / "back", "hf", verify=True)
    assert len(list((tmp_path / "back").glob("*.safetensors"))) > 2
    assert bits(tmp_path / "back") == bits(tmp_path / "hf")
    index = json.loads((tmp_path / "back/model.safetensors.index.json").read_text())
    assert ("lm_head.weight" in index["weight_map"]) == (not model.config.tie_word_embeddings)
    loaded, report = AutoModelForCausalLM.from_pretrained(
        tmp_path / "back", dtype="auto", output_loading_info=True
    )
    assert not any(report.values())
    assert all(
        torch.equal(value, loaded.state_dict()[name]) for name, value in model.state_dict().items()
    )


def test_weights_of_several_dtypes_keep_theirs(tmp_path):
    """Norms in f32 beside bf16 projections, as some checkpoints store them."""
    build(CONFIGS["qwen2 tied, biases, grouped heads"], tmp_path / "hf", dtype="bfloat16")
    path = tmp_path / "hf/model.safetensors"
    wide = {
        name: value.astype(np.float32) if "norm" in name else value
        for name, value in load_file(path).items()
    }
    save_file(wide, path)
    assert convert(tmp_path / "hf", tmp_path / "ours", "jaxre").dtype == "bfloat16, float32"
    convert(tmp_path / "ours", tmp_path / "back", "hf", verify=True)
    assert bits(tmp_path / "back") == bits(tmp_path / "hf")
    assert json.loads((tmp_path / "back/config.json").read_text())["dtype"] == "bfloat16"
    save_file(
        {**wide, "model.layers.1.input_layernorm.weight": np.ones(32, ml_dtypes.bfloat16)}, path
    )
    assert "attention_norm is stored as bfloat16 and float32 in different layers" in refusal(
        lambda: convert(tmp_path / "hf", tmp_path / "mixed", "jaxre")
    )
    assert (
        convert(tmp_path / "hf", tmp_path / "mixed", "jaxre", dtype="float32", verify=True).dtype
        == "float32"
    )


@pytest.mark.parametrize("stored", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("chosen", ["float32", "bfloat16", "float16"])
def test_chosen_dtype_is_the_rounding_of_torch(tmp_path, stored, chosen):
    model = build(CONFIGS["one layer"], tmp_path / "hf", dtype=stored)
    there = convert(tmp_path / "hf", tmp_path / "ours", "jaxre", dtype=chosen, verify=True)
    back = convert(tmp_path / "ours", tmp_path / "back", "hf", verify=True)
    assert there.dtype == back.dtype == chosen and not any(back.differences.values())
    exact = model.state_dict()
    written = load_file(tmp_path / "back/model.safetensors")
    assert written.keys() == exact.keys() - {"lm_head.weight"}
    for name, value in written.items():
        rounded = exact[name].to(getattr(torch, chosen))
        assert value.dtype == DTYPES[chosen] and torch.equal(
            torch.from_numpy(value.view(np.uint8)), rounded.view(torch.uint8)
        )
        assert (
            there.differences[name] == (rounded.double() - exact[name].double()).abs().max().item()
        )


@pytest.mark.parametrize(
    ("value", "dtype"), [(1e5, "float16"), (-65520.0, "float16"), (3.4e38, "bfloat16")]
)
def test_weight_that_the_dtype_cannot_hold_is_refused(tmp_path, value, dtype):
    build(CONFIGS["one layer"], tmp_path / "hf")
    path = tmp_path / "hf/model.safetensors"
    tensors = load_file(path)
    tensors["model.layers.0.mlp.up_proj.weight"][3, 4] = value
    save_file(tensors, path)
    message = refusal(lambda: convert(tmp_path / "hf", tmp_path / "ours", "jaxre", dtype=dtype))
    assert f"model.layers.0.mlp.up_proj.weight: {value:.6g} is too large for {dtype}" in message
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]


def test_what_is_still_written_is_waited_for_before_the_folder_of_a_refused_conversion_is_removed(
    tiny_base, tmp_path, monkeypatch
):
    """TensorStore writes in threads of its own: it would bring the folder back."""
    waited = []
    monkeypatch.setattr(
        native, "_wait", lambda writing, wait=native._wait: waited.append(writing) or wait(writing)
    )
    architecture, _ = load_base(tiny_base)
    tensors = list(hf_tensors(architecture, load_base(tiny_base)[1]))

    def some():
        yield from tensors[:3]
        raise InputError("the fourth is refused")

    (tmp_path / "ours").mkdir()
    dtypes = {name: array.dtype for name, array in tensors}
    assert (
        refusal(
            lambda: native.write_native(tmp_path / "ours", architecture, dtypes, some(), tiny_base)
        )
        == "the fourth is refused"
    )
    # the first has nothing before it
    assert len(waited) == 4 and all(one.done() for one in jax.tree.leaves(waited[1:]))


def test_every_chat_template_of_the_tokenizer_is_carried_along(tiny_base, tmp_path):
    from transformers import AutoTokenizer

    base = shutil.copytree(tiny_base, tmp_path / "hf")
    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.chat_template = {"default": "{{ messages }}", "tools": "{{ tools }}"}
    tokenizer.save_pretrained(base)
    convert(base, tmp_path / "ours", "jaxre")
    convert(tmp_path / "ours", tmp_path / "back", "hf")
    assert AutoTokenizer.from_pretrained(tmp_path / "back").chat_template == tokenizer.chat_template


def test_dtype_of_a_folder_changes_without_changing_its_form(tiny_base, tmp_path):
    convert(tiny_base, tmp_path / "half", "hf", dtype="bfloat16")
    assert {dtype for dtype, _, _ in bits(tmp_path / "half").values()} == {
        np.dtype(ml_dtypes.bfloat16)
    }
    convert(tiny_base, tmp_path / "ours", "jaxre")
    convert(tmp_path / "ours", tmp_path / "ours-half", "jaxre", dtype="bfloat16")
    assert equal(load_native(tmp_path / "ours-half")[1], load_base(tmp_path / "half")[1])
    convert(tmp_path / "ours", tmp_path / "nf4", "jaxre", quantise="nf4")
    assert (
        convert(tmp_path / "nf4", tmp_path / "dense", "jaxre", dtype="float32").dtype == "float32"
    )
    for source, to, dtype, quantise in (
        (tiny_base, "hf", "float32", None),
        (tmp_path / "ours", "jaxre", "float32", None),
        (tmp_path / "nf4", "jaxre", None, "nf4"),
    ):
        message = refusal(
            lambda s=source, t=to, d=dtype, q=quantise: convert(
                s, tmp_path / "target", t, dtype=d, quantise=q
            )
        )
        assert "already; copy the folder" in message


SIDE_FILES = {
    "vocab.json": '{"a": 0, "b": 511}',
    "merges.txt": "a b",
    "special_tokens_map.json": '{"eos_token": "b"}',
    "added_tokens.json": '{"c": 300}',
    "vocab.txt": "a\nb\n",
    "tokenizer.model": "sentences",
}


def test_every_file_of_the_tokenizer_is_carried_along(tiny_base, tmp_path):
    base = shutil.copytree(tiny_base, tmp_path / "hf")
    for name, text in SIDE_FILES.items():
        (base / name).write_text(text)
    convert(base, tmp_path / "ours", "jaxre")
    convert(tmp_path / "ours", tmp_path / "back", "hf")
    assert {name: (tmp_path / "back" / name).read_text() for name in SIDE_FILES} == SIDE_FILES
    convert(make_run(tmp_path / "run", base, "lora"), tmp_path / "adapter", "peft")
    assert {name: (tmp_path / "adapter" / name).read_text() for name in SIDE_FILES} == SIDE_FILES


@pytest.mark.parametrize("to", ["hf", "jaxre"])
def test_merged_folder_has_the_tokenizer_of_the_adapter(run, tiny_base, tmp_path, to):
    """Uses the adapter's files where they exist; a complete tokenizer replaces that of the base,
    templates included.
    """
    base = shutil.copytree(tiny_base, tmp_path / "hf")
    (base / "chat_template.jinja").write_text("the base's")
    path = run / "adapter/adapter_config.json"
    path.write_text(
        json.dumps({**json.loads(path.read_text()), "base_model_name_or_path": str(base)})
    )
    config = run / "adapter/tokenizer_config.json"
    config.write_text(
        json.dumps({**json.loads(config.read_text()), "chat_template": "the adapter's"})
    )
    convert(run / "adapter", tmp_path / "whole", to, merge=True)
    assert (tmp_path / "whole/tokenizer_config.json").read_bytes() == config.read_bytes()
    assert (tmp_path / "whole/tokenizer.json").is_file() and not (
        tmp_path / "whole/chat_template.jinja"
    ).exists()
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (run / "adapter" / name).unlink()
    (run / "adapter/chat_template.jinja").write_text("the adapter's")
    convert(run / "adapter", tmp_path / "part", to, merge=True)
    assert (tmp_path / "part/chat_template.jinja").read_text() == "the adapter's"
    assert (tmp_path / "part/tokenizer.json").read_bytes() == (base / "tokenizer.json").read_bytes()
    (run / "adapter/added_tokens.json").write_text('{"<more>": 512}')
    assert "added_tokens.json: the tokenizer gives token 512" in refusal(
        lambda: convert(run / "adapter", tmp_path / "more", to, merge=True)
    )


def test_adapter_is_exported_without_its_base_weights(run, tiny_base, tmp_path):
    """Needs only config.json and tokenizer of the base; --merge reports what is missing."""
    base = shutil.copytree(tiny_base, tmp_path / "base")
    (run / "config.yaml").write_text(
        (run / "config.yaml").read_text().replace(str(tiny_base), str(base))
    )
    (base / "model.safetensors").unlink()
    convert(run, tmp_path / "adapter", "peft", verify=True)
    assert bits(tmp_path / "adapter") == bits(run / "adapter")
    assert "no model.safetensors" in refusal(
        lambda: convert(run, tmp_path / "merged", "hf", merge=True)
    )
