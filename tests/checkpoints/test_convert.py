"""Conversion keeps every bit it should, merges as PEFT does, and refuses what cannot be."""

from __future__ import annotations

import contextlib
import json
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import jax
import ml_dtypes
import numpy as np
import pytest
from refusals import refusal
from rich.console import Console
from safetensors.numpy import load_file, save_file
from tiny_decoders import CONFIGS, build, ground_truth, our_logits, random_factors, relative, their_logits, tokens_of
from tiny_runs import LORA, equal, make_run

from jaxre.checkpoints import native, shards
from jaxre.checkpoints.convert import DTYPES, convert, verification_table
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


@pytest.mark.parametrize("family", ["qwen2 tied, biases, grouped heads", "llama untied, head_dim given, K=H"])
def test_shards_convert_there_and_back_bit_identical(tmp_path, family, monkeypatch):
    """Shards that transformers cut, shards that we cut, and a model that transformers loads whole from ours."""
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
    loaded, report = AutoModelForCausalLM.from_pretrained(tmp_path / "back", dtype="auto", output_loading_info=True)
    assert not any(report.values())
    assert all(torch.equal(value, loaded.state_dict()[name]) for name, value in model.state_dict().items())


def test_weights_of_several_dtypes_keep_theirs(tmp_path):
    """Norms in f32 beside bf16 projections, as some checkpoints store them."""
    build(CONFIGS["qwen2 tied, biases, grouped heads"], tmp_path / "hf", dtype="bfloat16")
    path = tmp_path / "hf/model.safetensors"
    wide = {name: value.astype(np.float32) if "norm" in name else value for name, value in load_file(path).items()}
    save_file(wide, path)
    assert convert(tmp_path / "hf", tmp_path / "ours", "jaxre").dtype == "bfloat16, float32"
    convert(tmp_path / "ours", tmp_path / "back", "hf", verify=True)
    assert bits(tmp_path / "back") == bits(tmp_path / "hf")
    assert json.loads((tmp_path / "back/config.json").read_text())["dtype"] == "bfloat16"
    save_file({**wide, "model.layers.1.input_layernorm.weight": np.ones(32, ml_dtypes.bfloat16)}, path)
    assert "attention_norm is stored as bfloat16 and float32 in different layers" in refusal(
        lambda: convert(tmp_path / "hf", tmp_path / "mixed", "jaxre")
    )
    assert convert(tmp_path / "hf", tmp_path / "mixed", "jaxre", dtype="float32", verify=True).dtype == "float32"


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
        assert value.dtype == DTYPES[chosen] and torch.equal(torch.from_numpy(value.view(np.uint8)), rounded.view(torch.uint8))
        assert there.differences[name] == (rounded.double() - exact[name].double()).abs().max().item()


@pytest.mark.parametrize(("value", "dtype"), [(1e5, "float16"), (-65520.0, "float16"), (3.4e38, "bfloat16")])
def test_weight_that_the_dtype_cannot_hold_is_refused(tmp_path, value, dtype):
    build(CONFIGS["one layer"], tmp_path / "hf")
    path = tmp_path / "hf/model.safetensors"
    tensors = load_file(path)
    tensors["model.layers.0.mlp.up_proj.weight"][3, 4] = value
    save_file(tensors, path)
    message = refusal(lambda: convert(tmp_path / "hf", tmp_path / "ours", "jaxre", dtype=dtype))
    assert f"model.layers.0.mlp.up_proj.weight: {value:.6g} is too large for {dtype}" in message
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]


def test_every_chat_template_of_the_tokenizer_is_carried_along(tiny_base, tmp_path):
    from transformers import AutoTokenizer

    base = shutil.copytree(tiny_base, tmp_path / "hf")
    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.chat_template = {"default": "{{ messages }}", "tools": "{{ tools }}"}
    tokenizer.save_pretrained(base)
    convert(base, tmp_path / "ours", "jaxre")
    convert(tmp_path / "ours", tmp_path / "back", "hf")
    assert AutoTokenizer.from_pretrained(tmp_path / "back").chat_template == tokenizer.chat_template


# ---- verified -------------------------------------------------------------------------------


def printed(conversion, width: int = 120) -> str:
    console = Console(width=width, record=True, file=open(os.devnull, "w"))  # noqa: SIM115
    console.print(verification_table(conversion))
    return console.export_text()


@pytest.mark.parametrize(("source", "to"), [("hf", "jaxre"), ("jaxre", "hf"), ("adapter", "peft")])
def test_pure_conversion_verifies_as_bit_identical(run, tiny_base, tmp_path, source, to):
    convert(tiny_base, tmp_path / "ours", "jaxre")
    done = convert({"hf": tiny_base, "jaxre": tmp_path / "ours", "adapter": run}[source], tmp_path / "target", to, verify=True)
    tensors = 3 * 2 * 2 - 4 if to == "peft" else len(bits(tiny_base))  # an adapter's two targets: a stack and a last layer of A and B
    assert len(done.differences) == tensors and not any(done.differences.values())
    lines = printed(done).splitlines()
    assert "verified: bit-identical" in lines[0] and [cell.strip() for cell in lines[-2].split("│")[1:4]] == ["all", str(tensors), "0"]
    assert convert(tiny_base, tmp_path / "again", "jaxre").differences is None


def test_title_of_the_verification_is_true_for_what_was_asked(run, tiny_base, tmp_path):
    build(CONFIGS["one layer"], tmp_path / "half", dtype="bfloat16")
    for number, (source, merge, dtype, title) in enumerate(
        [
            (tiny_base, False, None, "bit-identical"),
            (tiny_base, False, "float32", "bit-identical"),
            (tiny_base, False, "bfloat16", "rounded to bfloat16"),
            (tmp_path / "half", False, "float32", "every value kept, as float32"),
            (run, True, None, "bit-identical to W + scale A B"),
            (run, True, "bfloat16", "rounded to bfloat16"),
        ]
    ):
        done = convert(source, tmp_path / str(number), "jaxre", merge=merge, dtype=dtype, verify=True)
        assert verification_table(done).title == f"verified: {title}"


def test_names_are_whole_in_a_narrow_table(tiny_base, tmp_path):
    done = convert(tiny_base, tmp_path / "ours", "jaxre", dtype="bfloat16", verify=True)
    lines = printed(done, width=60).splitlines()
    cells = "".join(line.split("│")[1].strip() for line in lines if line.count("│") == 5)
    for name in done.differences:
        assert re.sub(r"\.\d+\.", ".*.", name) in cells
    worst = max(done.differences, key=done.differences.get)
    assert worst in "".join(line.split("│")[4].strip() for line in lines if line.count("│") == 5)


def test_every_block_of_a_tensor_is_compared(run, tmp_path, monkeypatch):
    """A fault in the last of many, and the largest difference over all."""
    from jaxre.checkpoints import convert as module

    whole = convert(run, tmp_path / "whole", "hf", merge=True, dtype="bfloat16", verify=True)
    monkeypatch.setattr(module, "BLOCK", 100)
    done = convert(run, tmp_path / "blocks", "hf", merge=True, dtype="bfloat16", verify=True)
    assert done.differences == whole.differences and any(done.differences.values())
    write = module.write_base

    def damaging(folder, *arguments, **keywords):
        write(folder, *arguments, **keywords)
        data = bytearray((folder / "model.safetensors").read_bytes())
        data[-1] ^= 1
        (folder / "model.safetensors").write_bytes(data)

    monkeypatch.setattr(module, "write_base", damaging)
    assert "1 of" in refusal(lambda: convert(run, tmp_path / "target", "hf", merge=True, verify=True))


def test_values_that_are_no_numbers_verify_by_their_bits(tmp_path, monkeypatch):
    from jaxre.checkpoints import convert as module

    build(CONFIGS["one layer"], tmp_path / "hf")
    path = tmp_path / "hf/model.safetensors"
    tensors = load_file(path)
    tensors["model.norm.weight"][:3] = np.nan, np.inf, -np.inf
    save_file(tensors, path)
    done = convert(tmp_path / "hf", tmp_path / "half", "jaxre", dtype="bfloat16", verify=True)
    assert np.isfinite(done.differences["model.norm.weight"])
    write, name = module.write_base, "model.layers.0.mlp.up_proj.weight"

    def damaging(folder, *arguments, **keywords):
        write(folder, *arguments, **keywords)
        save_file({**tensors, name: np.full_like(tensors[name], np.nan)}, folder / "model.safetensors")

    monkeypatch.setattr(module, "write_base", damaging)
    convert(tmp_path / "hf", tmp_path / "ours", "jaxre")
    assert "up_proj.weight by inf" in refusal(lambda: convert(tmp_path / "ours", tmp_path / "back", "hf", verify=True))


def test_rounding_is_reported_tensor_by_tensor(run, tiny_base, tmp_path):
    done = convert(run, tmp_path / "merged", "hf", merge=True, dtype="bfloat16", verify=True)
    loaded = open_model(run, None)
    written, base = load_file(tmp_path / "merged/model.safetensors"), load_file(tiny_base / "model.safetensors")
    assert done.differences.keys() == written.keys() == base.keys()
    for name, value in written.items():
        exact = base[name]
        if "q_proj" in name or "down_proj" in name:
            layer, module = int(name.split(".")[2]), "q" if "q_proj" in name else "down"
            pair = loaded.factors["last"][module] if layer == 2 else {k: v[layer] for k, v in loaded.factors["layers"][module].items()}
            exact = exact + scale_of(LORA) * (pair["a"] @ pair["b"]).T
        expected = np.abs(value.astype(np.float64) - exact).max()
        assert 0 < done.differences[name] < 2.0**-8 * np.abs(exact).max()
        assert abs(done.differences[name] - expected) < 1e-5  # the reference is formed in f32 in another order
    worst = max(done.differences, key=done.differences.get)
    assert "verified: rounded to bfloat16" in printed(done) and f"{done.differences[worst]:.3g} │ {worst}" in printed(done).splitlines()[-2]


def swapped(folder: Path) -> None:
    """Two layers of one projection changed places: every shape still fits."""
    if (folder / "weights").is_dir():
        one, other = (folder / f"weights/layers.q/c/{layer}/0/0" for layer in (0, 1))
        data = one.read_bytes()
        one.write_bytes(other.read_bytes())
        other.write_bytes(data)
        return
    path = next(folder.glob("*.safetensors"))
    tensors = load_file(path)
    names = [name for name in tensors if "q_proj" in name][:4]
    names = names if len(names) == 3 else names[::2]
    tensors[names[0]], tensors[names[1]] = tensors[names[1]], tensors[names[0]]
    save_file(tensors, path)


def flipped(folder: Path) -> None:
    """One bit, the lowest of a mantissa, differs."""
    path = next(folder.rglob("layers.q/c/0/0/0"), None) or next(folder.glob("*.safetensors"))
    data = bytearray(path.read_bytes())
    data[-5 if path.suffix else 0] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize("damage", [swapped, flipped])
@pytest.mark.parametrize(
    ("to", "writer"), [("hf", "write_base"), ("jaxre", "write_native"), ("peft", "save_adapter")], ids=["hf", "jaxre", "peft"]
)
def test_folder_that_does_not_read_back_is_refused_and_removed(run, tmp_path, monkeypatch, to, writer, damage):
    from jaxre.checkpoints import convert as module

    write = getattr(module, writer)

    def damaging(folder, *arguments, **keywords):
        write(folder, *arguments, **keywords)
        damage(folder)

    monkeypatch.setattr(module, writer, damaging)
    message = refusal(lambda: convert(run, tmp_path / "target", to, merge=to != "peft", verify=True))
    if (to, damage) == ("jaxre", flipped):
        assert "the store cannot be read" in message  # the checksum of the chunk
    else:
        assert f"{tmp_path / 'target'}: {2 if damage is swapped and to != 'peft' else 1} of" in message
        assert "do not read back as written" in message
    assert [path.name for path in tmp_path.iterdir()] == ["run"]
    convert(run, tmp_path / "target", to, merge=to != "peft")  # and without --verify it would have passed


# ---- memory ---------------------------------------------------------------------------------


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="the kernel's peak of a process's memory is Linux's")
def test_conversion_holds_tensors_not_the_model(tmp_path):
    """Of a bf16 model of 206 MB whose largest tensor has 4 MB.

    Measured: 11 to 17 (hf to jaxre), 10 (jaxre to hf), 29 (to f32) and 13 MB (merged). Loaded whole it was 569, 322, 1,100 and 467 MB.
    """
    script = Path(__file__).with_name("peak_memory.py")
    # What malloc keeps for the next time is not what is held: give it back at once.
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": str(1 << 18), "PYTHONPATH": str(script.parents[1])}
    done = subprocess.run([sys.executable, script, tmp_path], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    figures = json.loads(done.stdout)
    model = figures.pop("model")
    assert model > 2e8 and set(figures) == {"hf to jaxre", "jaxre to hf", "to float32", "merged", "to nf4", "from nf4"}
    assert all(0 < growth < model / 4 for growth in figures.values()), figures


# ---- what is refused ------------------------------------------------------------------------


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


@pytest.mark.parametrize("fault", ["nan", "inf", "absurd alpha"])
def test_adapter_that_makes_a_weight_no_number_is_refused(run, tmp_path, fault):
    if fault == "absurd alpha":
        path = run / "adapter/adapter_config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), "lora_alpha": 1e42}))
    else:
        path = run / "adapter/adapter_model.safetensors"
        tensors = load_file(path)
        tensors["base_model.model.model.layers.1.mlp.down_proj.lora_A.weight"][2, 3] = float(fault)
        save_file(tensors, path)
    told = refusal(lambda: convert(run, tmp_path / "merged", "hf", merge=True))
    layer = 0 if fault == "absurd alpha" else 1
    assert f"{run / 'adapter'}: merged into model.layers.{layer}.mlp.down_proj.weight" in told and "not finite" in told
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_dtype_of_a_folder_changes_without_changing_its_form(tiny_base, tmp_path):
    convert(tiny_base, tmp_path / "half", "hf", dtype="bfloat16")
    assert {dtype for dtype, _, _ in bits(tmp_path / "half").values()} == {np.dtype(ml_dtypes.bfloat16)}
    convert(tiny_base, tmp_path / "ours", "jaxre")
    convert(tmp_path / "ours", tmp_path / "ours-half", "jaxre", dtype="bfloat16")
    assert equal(load_native(tmp_path / "ours-half")[1], load_base(tmp_path / "half")[1])
    convert(tmp_path / "ours", tmp_path / "nf4", "jaxre", quantise="nf4")
    assert convert(tmp_path / "nf4", tmp_path / "dense", "jaxre", dtype="float32").dtype == "float32"
    for source, to, dtype, quantise in (
        (tiny_base, "hf", "float32", None),
        (tmp_path / "ours", "jaxre", "float32", None),
        (tmp_path / "nf4", "jaxre", None, "nf4"),
    ):
        told = refusal(lambda s=source, t=to, d=dtype, q=quantise: convert(s, tmp_path / "target", t, dtype=d, quantise=q))
        assert "already; copy the folder" in told


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
    """Its own files where it has them; a whole tokenizer takes the place of the base's, of which no template is left."""
    base = shutil.copytree(tiny_base, tmp_path / "hf")
    (base / "chat_template.jinja").write_text("the base's")
    path = run / "adapter/adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "base_model_name_or_path": str(base)}))
    config = run / "adapter/tokenizer_config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "chat_template": "the adapter's"}))
    convert(run / "adapter", tmp_path / "whole", to, merge=True)
    assert (tmp_path / "whole/tokenizer_config.json").read_bytes() == config.read_bytes()
    assert (tmp_path / "whole/tokenizer.json").is_file() and not (tmp_path / "whole/chat_template.jinja").exists()
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


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("vocab.json", '{"a": 0, "b": 600}'),
        ("added_tokens.json", '{"<more>": 600}'),
        ("tokenizer_config.json", '{"added_tokens_decoder": {"600": {"content": "<more>"}}}'),
        ("vocab.txt", "word\n" * 601),
    ],
)
def test_token_beyond_the_embeddings_is_found_in_whichever_file_has_it(tiny_base, tmp_path, name, text):
    base = shutil.copytree(tiny_base, tmp_path / "hf")
    (base / name).write_text(text)
    told = refusal(lambda: convert(base, tmp_path / "ours", "jaxre"))
    assert f"{base / name}: the tokenizer gives token 600, but vocab_size of the model is 512" in told
    (base / name).write_text(text.replace("600", "511").replace("word\n" * 601, "word\n" * 512))
    convert(base, tmp_path / "ours", "jaxre")


def test_architecture_that_is_not_known_is_named_by_its_config(tiny_base, tmp_path):
    base = shutil.copytree(tiny_base, tmp_path / "hf")
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps({**config, "model_type": "mamba"}))
    assert refusal(lambda: convert(base, tmp_path / "ours", "jaxre")).startswith(f"{base / 'config.json'}: model_type 'mamba'")


def test_tokenizer_with_tokens_beyond_the_embeddings_is_refused(tiny_base, tmp_path):
    base = shutil.copytree(tiny_base, tmp_path / "hf")
    path = base / "tokenizer.json"
    tokenizer = json.loads(path.read_text())
    tokenizer["added_tokens"].append({**tokenizer["added_tokens"][0], "id": 512, "content": "<one more>"})
    path.write_text(json.dumps(tokenizer))
    message = refusal(lambda: convert(base, tmp_path / "ours", "jaxre"))
    assert f"{path}: the tokenizer gives token 512, but vocab_size of the model is 512" in message
    path.write_text("{}")
    assert f"{path}: the tokenizer does not load" in refusal(lambda: convert(base, tmp_path / "ours", "jaxre"))
    assert [entry.name for entry in tmp_path.iterdir()] == ["hf"]


def test_adapter_is_exported_without_its_base_weights(run, tiny_base, tmp_path):
    """Its base's config.json and tokenizer are all that is needed; --merge says what is missing."""
    base = shutil.copytree(tiny_base, tmp_path / "base")
    (run / "config.yaml").write_text((run / "config.yaml").read_text().replace(str(tiny_base), str(base)))
    (base / "model.safetensors").unlink()
    convert(run, tmp_path / "adapter", "peft", verify=True)
    assert bits(tmp_path / "adapter") == bits(run / "adapter")
    assert "no model.safetensors" in refusal(lambda: convert(run, tmp_path / "merged", "hf", merge=True))


def test_disk_that_is_too_small_is_refused_before_writing(tiny_base, tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**9, 10**9, 1000))
    message = refusal(lambda: convert(tiny_base, tmp_path / "deep/ours", "jaxre"))
    assert "deep/ours: needs 0.0 GB, and 0.0 GB are free there; name a folder on another disk" in message
    assert not list(tmp_path.iterdir())


@contextlib.contextmanager
def files_of_at_most(size: int):
    """The kernel refuses larger ones, as a full disk does."""
    before, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)


@pytest.mark.parametrize(("to", "merge"), [("hf", True), ("jaxre", True), ("peft", False)])
def test_disk_that_fills_while_writing_leaves_nothing(run, tmp_path, to, merge):
    with files_of_at_most(3000):
        message = refusal(lambda: convert(run, tmp_path / "target", to, merge=merge))
    assert "target: cannot be written (" in message and "File too large" in message
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_source_that_is_missing_is_refused(tmp_path):
    with pytest.raises(InputError, match="no such run or model folder"):
        convert(tmp_path / "none", tmp_path / "target", "hf")


# ---- our own folder -------------------------------------------------------------------------


@pytest.fixture
def ours(tiny_base, tmp_path):
    convert(tiny_base, tmp_path / "ours", "jaxre")
    return tmp_path / "ours"


def test_jaxre_folder_of_another_version_is_refused(ours):
    (ours / "jaxre.json").write_text(json.dumps({"format": "jaxre weights", "version": 99}))
    with pytest.raises(InputError, match="version 99 is not known, this jaxre reads 2; convert the Hugging Face folder again"):
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


CHUNK = "layers.gate/c/1/0/0"


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda weights: shutil.rmtree(weights), "no such folder"),
        (lambda weights: [shutil.rmtree(path) for path in weights.iterdir()], "embed is missing; norm is missing"),
        (lambda weights: (weights / CHUNK).unlink(), "is missing"),
        (lambda weights: (weights / CHUNK).write_bytes((weights / CHUNK).read_bytes()[:100]), "Not enough data"),
        (lambda weights: (weights / CHUNK).write_bytes(b"\1" + (weights / CHUNK).read_bytes()[1:]), "Digest mismatch"),
        (lambda weights: (weights / "norm/zarr.json").write_text("{"), "Invalid JSON"),
        (lambda weights: (weights / "norm/zarr.json").unlink(), "does not exist"),
    ],
    ids=["no weights", "empty weights", "lost chunk", "cut chunk", "flipped bits", "broken metadata", "no metadata"],
)
def test_damaged_jaxre_folder_is_refused(ours, tmp_path, damage, message):
    damage(ours / "weights")
    for call in (lambda: open_model(ours, None), lambda: convert(ours, tmp_path / "back", "hf")):
        told = refusal(call)
        assert message in told and told.endswith("convert the Hugging Face folder again")
    assert not (tmp_path / "back").exists()


def test_layers_larger_than_a_chunk_are_cut_into_several(tmp_path, monkeypatch):
    monkeypatch.setattr(native, "CHUNK_BYTES", 1000)
    build(CONFIGS["qwen2 tied, biases, grouped heads"], tmp_path / "hf")
    convert(tmp_path / "hf", tmp_path / "ours", "jaxre", verify=True)
    files = [path for path in (tmp_path / "ours/weights").rglob("c/**/*") if path.is_file()]
    assert len(files) > 100 and max(path.stat().st_size for path in files) <= 1004  # and four bytes of checksum
    assert equal(load_native(tmp_path / "ours")[1], load_base(tmp_path / "hf")[1])


def test_jaxre_folder_stores_bfloat16_as_such(tmp_path):
    build(CONFIGS["one layer"], tmp_path / "hf", dtype="bfloat16")
    convert(tmp_path / "hf", tmp_path / "ours", "jaxre")
    _, params = load_native(tmp_path / "ours")
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {np.dtype(ml_dtypes.bfloat16)}
    assert all(isinstance(leaf, np.ndarray) for leaf in jax.tree.leaves(params))
    assert equal(params, load_base(tmp_path / "hf")[1])
