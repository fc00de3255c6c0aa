"""Impossible conversions are refused with the fix, and no half-written folder stays."""

from __future__ import annotations

import contextlib
import json
import resource
import shutil
import signal

import pytest
from refusals import refusal
from safetensors.numpy import load_file, save_file
from tiny import write_tiny_model
from tiny_runs import make_run

from jaxre.checkpoints.convert import convert
from jaxre.errors import InputError


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
def test_what_cannot_be_is_refused_with_the_fix(tiny_base, tmp_path, source, to, merge, message):
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
    message = refusal(lambda: convert(run, tmp_path / "merged", "hf", merge=True))
    layer = 0 if fault == "absurd alpha" else 1
    assert (
        f"{run / 'adapter'}: merged into model.layers.{layer}.mlp.down_proj.weight" in message
        and "not finite" in message
    )
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("vocab.json", '{"a": 0, "b": 600}'),
        ("added_tokens.json", '{"<more>": 600}'),
        ("tokenizer_config.json", '{"added_tokens_decoder": {"600": {"content": "<more>"}}}'),
        ("vocab.txt", "word\n" * 601),
    ],
)
def test_token_beyond_the_embeddings_is_found_in_whichever_file_has_it(
    tiny_base, tmp_path, name, text
):
    base = shutil.copytree(tiny_base, tmp_path / "hf")
    (base / name).write_text(text)
    message = refusal(lambda: convert(base, tmp_path / "ours", "jaxre"))
    assert (
        f"{base / name}: the tokenizer gives token 600, but vocab_size of the model is 512"
        in message
    )
    (base / name).write_text(text.replace("600", "511").replace("word\n" * 601, "word\n" * 512))
    convert(base, tmp_path / "ours", "jaxre")


def test_the_image_token_of_gemma3_needs_no_embedding(tiny_base, tmp_path):
    """`<image_soft_token>` is 262,144 in the tokenizer of models that have 262,144 embeddings."""
    base = write_tiny_model(tmp_path / "hf", model_type="gemma3_text", head_dim=16)
    path = base / "tokenizer.json"
    tokenizer = json.loads((tiny_base / "tokenizer.json").read_text())  # of 512 tokens
    image = {**tokenizer["added_tokens"][0], "id": 512, "content": "<image_soft_token>"}
    path.write_text(json.dumps(tokenizer | {"added_tokens": [*tokenizer["added_tokens"], image]}))
    config = {"added_tokens_decoder": {"512": {"content": "<image_soft_token>"}}}
    (base / "tokenizer_config.json").write_text(json.dumps(config))
    convert(base, tmp_path / "ours", "jaxre")
    path.write_text(
        json.dumps(
            tokenizer
            | {"added_tokens": [*tokenizer["added_tokens"], image | {"content": "<more>"}]}
        )
    )
    message = refusal(lambda: convert(base, tmp_path / "other", "jaxre"))
    assert f"{path}: the tokenizer gives token 512, but vocab_size of the model is 512" in message


def test_architecture_that_is_not_known_is_named_by_its_config(tiny_base, tmp_path):
    base = shutil.copytree(tiny_base, tmp_path / "hf")
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps({**config, "model_type": "mamba"}))
    assert refusal(lambda: convert(base, tmp_path / "ours", "jaxre")).startswith(
        f"{base / 'config.json'}: model_type 'mamba'"
    )


def test_tokenizer_with_tokens_beyond_the_embeddings_is_refused(tiny_base, tmp_path):
    base = shutil.copytree(tiny_base, tmp_path / "hf")
    path = base / "tokenizer.json"
    tokenizer = json.loads(path.read_text())
    tokenizer["added_tokens"].append(
        {**tokenizer["added_tokens"][0], "id": 512, "content": "<one more>"}
    )
    path.write_text(json.dumps(tokenizer))
    message = refusal(lambda: convert(base, tmp_path / "ours", "jaxre"))
    assert f"{path}: the tokenizer gives token 512, but vocab_size of the model is 512" in message
    path.write_text("{}")
    assert f"{path}: the tokenizer does not load" in refusal(
        lambda: convert(base, tmp_path / "ours", "jaxre")
    )
    assert [entry.name for entry in tmp_path.iterdir()] == ["hf"]


def test_disk_that_is_too_small_is_refused_before_writing(tiny_base, tmp_path, monkeypatch):
    monkeypatch.setattr(
        shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**9, 10**9, 1000)
    )
    message = refusal(lambda: convert(tiny_base, tmp_path / "deep/ours", "jaxre"))
    assert (
        "deep/ours: needs 0.0 GB, and 0.0 GB are free there; name a folder on another disk"
        in message
    )
    assert not list(tmp_path.iterdir())


@contextlib.contextmanager
def files_of_at_most(size: int):
    """The kernel refuses larger ones, as a full disk does."""
    before, handler = (
        resource.getrlimit(resource.RLIMIT_FSIZE),
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN),
    )
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
