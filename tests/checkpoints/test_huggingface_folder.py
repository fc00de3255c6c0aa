"""Hugging Face folders are read and written bit-identical; faulty ones are refused with every fault
named.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from tiny_decoders import (
    CONFIGS,
    build,
    ground_truth,
    our_logits,
    relative,
    their_logits,
    tokens_of,
)

from jaxre.checkpoints import huggingface, shards
from jaxre.checkpoints.huggingface import atomic_folder, load_base, save_base
from jaxre.checkpoints.source import resolve_model
from jaxre.errors import InputError

torch = ground_truth("torch")


@pytest.fixture(
    scope="session",
    params=[
        "qwen2 tied, biases, grouped heads",
        "llama untied, head_dim given, K=H",
        "qwen3, norms of q and k",
        "gemma3, sliding and global layers",
        "one layer",
    ],
)
def family(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("family")
    build(CONFIGS[request.param], folder)
    return folder


@pytest.fixture
def folder(tiny_base, tmp_path):
    """A copy to break."""
    return shutil.copytree(tiny_base, tmp_path / "model")


@pytest.fixture
def tied(tmp_path):
    build(CONFIGS["one layer"], tmp_path / "tied")
    return tmp_path / "tied"


def rewrite(folder, change):
    """Applies `change` to the folder's tensors in place."""
    path = folder / "model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)


def same_bits(one: np.ndarray, other: np.ndarray) -> bool:
    return (
        one.dtype == other.dtype and one.shape == other.shape and one.tobytes() == other.tobytes()
    )


# ---- what works -----------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_saved_folder_is_bit_identical_and_loads_in_transformers(family, tmp_path, dtype):
    from transformers import AutoModelForCausalLM

    architecture, params = load_base(family)
    if dtype == "bfloat16":
        params = jax.tree.map(lambda leaf: leaf.astype(ml_dtypes.bfloat16), params)
    save_base(tmp_path / "saved", architecture, params, like=family)
    assert json.loads((tmp_path / "saved/config.json").read_text())["dtype"] == dtype
    written, original = (
        load_file(tmp_path / "saved/model.safetensors"),
        load_file(family / "model.safetensors"),
    )
    assert written.keys() == original.keys()  # in particular no lm_head where it is tied
    for name, value in original.items():
        assert same_bits(written[name], value.astype(written[name].dtype))
        assert written[name].dtype.name == dtype
    model, report = AutoModelForCausalLM.from_pretrained(
        tmp_path / "saved", dtype="auto", attn_implementation="eager", output_loading_info=True
    )
    assert str(model.dtype) == f"torch.{dtype}" and not any(report.values())
    tokens = tokens_of(architecture.vocabulary, 1, 32)
    if dtype == "float32":
        assert (
            relative(our_logits(architecture, params, tokens), their_logits(model.eval(), tokens))
            < 1e-4
        )
    back = load_base(tmp_path / "saved")
    assert back[0] == architecture and jax.tree.all(jax.tree.map(same_bits, back[1], params))


@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16])
def test_weights_load_in_the_dtype_asked_for(tiny_base, dtype):
    _, stored = load_base(tiny_base)
    _, params = load_base(tiny_base, np.dtype(dtype))
    assert jax.tree.all(
        jax.tree.map(lambda one, other: same_bits(one, other.astype(dtype)), params, stored)
    )


def test_sharded_index_loads_as_the_single_file_does(tmp_path, family):
    """Shards as transformers cuts them."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(family, dtype=torch.float32)
    model.save_pretrained(tmp_path / "sharded", max_shard_size="20KB")
    assert len(list((tmp_path / "sharded").glob("*.safetensors"))) > 1
    (one, params), (other, sharded) = load_base(family), load_base(tmp_path / "sharded")
    assert one == other and jax.tree.all(jax.tree.map(same_bits, params, sharded))


def test_large_weights_are_written_in_shards_that_transformers_loads(
    tiny_base, tmp_path, monkeypatch
):
    from transformers import AutoModelForCausalLM

    monkeypatch.setattr(shards, "SHARD_BYTES", 40_000)
    architecture, params = load_base(tiny_base)
    save_base(tmp_path / "saved", architecture, params, like=tiny_base)
    index = json.loads((tmp_path / "saved/model.safetensors.index.json").read_text())
    names = sorted(path.name for path in (tmp_path / "saved").glob("*.safetensors"))
    assert len(names) > 2 and sorted(set(index["weight_map"].values())) == names
    assert names[0] == f"model-00001-of-{len(names):05d}.safetensors"
    assert index["metadata"]["total_size"] == sum(leaf.nbytes for leaf in jax.tree.leaves(params))
    assert jax.tree.all(jax.tree.map(same_bits, load_base(tmp_path / "saved")[1], params))
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "saved", dtype="auto").eval()
    tokens = tokens_of(architecture.vocabulary, 1, 16)
    assert relative(our_logits(architecture, params, tokens), their_logits(model, tokens)) < 1e-4


def test_index_is_the_one_transformers_writes(tmp_path, family, monkeypatch):
    """Every tensor is in the file that the index names, no shard exceeds the limit, and the total
    size is the same.
    """
    from transformers import AutoModelForCausalLM

    AutoModelForCausalLM.from_pretrained(family, dtype=torch.float32).save_pretrained(
        tmp_path / "theirs", max_shard_size="20KB"
    )
    monkeypatch.setattr(shards, "SHARD_BYTES", 20_000)
    save_base(tmp_path / "ours", *load_base(family), like=family)
    theirs, ours = (
        json.loads((tmp_path / name / "model.safetensors.index.json").read_text())
        for name in ("theirs", "ours")
    )
    assert ours["weight_map"].keys() == theirs["weight_map"].keys()
    assert ours["metadata"]["total_size"] == theirs["metadata"]["total_size"]
    files = {path.name: load_file(path) for path in (tmp_path / "ours").glob("*.safetensors")}
    assert {name: file for file, tensors in files.items() for name in tensors} == ours["weight_map"]
    for tensors in files.values():
        assert sum(value.nbytes for value in tensors.values()) <= 20_000 or len(tensors) == 1


def test_shards_of_several_dtypes_are_read_by_safetensors_and_torch(tmp_path, monkeypatch):
    """Odd sizes, written in another order than they lie in; each tensor starts at a multiple of its
    own size.
    """
    from safetensors.torch import load_file as load_torch

    draw = np.random.default_rng(0)
    tensors = {
        f"{dtype.name}.{size}": draw.standard_normal((size, 3)).astype(dtype)
        for dtype in shards.STORED_DTYPES.values()
        for size in (1, 7, 64)
    }
    for limit in (10**6, 300):
        monkeypatch.setattr(shards, "SHARD_BYTES", limit)
        (tmp_path / str(limit)).mkdir()
        forms = {name: (value.shape, value.dtype) for name, value in tensors.items()}
        shards.write_shards(tmp_path / str(limit), forms, reversed(tensors.items()))
        files = sorted((tmp_path / str(limit)).glob("*.safetensors"))
        assert (len(files) == 1) == (limit == 10**6)
        read = {name: value for path in files for name, value in load_file(path).items()}
        assert read.keys() == tensors.keys() and all(
            same_bits(read[name], value) for name, value in tensors.items()
        )
        for name, value in {
            name: value for path in files for name, value in load_torch(path).items()
        }.items():
            np.testing.assert_array_equal(value.double().numpy(), tensors[name].astype(np.float64))
        for path in files:
            data = path.read_bytes()
            header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
            start = 8 + int.from_bytes(data[:8], "little")
            assert all(
                (start + entry["data_offsets"][0]) % tensors[name].itemsize == 0
                for name, entry in header.items()
                if name in tensors
            )


@pytest.mark.parametrize("shape", [(1, 1), (1, 7), (63, 5), (64, 64), (65, 3), (200, 129)])
@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16])
def test_blocked_transpose_is_numpys(shape, dtype):
    matrix = np.random.default_rng(0).standard_normal(shape).astype(dtype)
    turned = huggingface.transposed(matrix)
    assert turned.flags.c_contiguous and same_bits(turned, np.ascontiguousarray(matrix.T))
    assert same_bits(huggingface.transposed(matrix.T), matrix)  # of a view that is not contiguous


def test_tensors_other_than_promised_are_never_written(tmp_path):
    form = {"a": ((2, 3), np.dtype(np.float32)), "b": ((1,), np.dtype(np.float32))}
    good = [("a", np.zeros((2, 3), np.float32)), ("b", np.zeros(1, np.float32))]
    for bad in (
        [("a", good[0][1].T), good[1]],
        [("a", good[0][1].astype(np.float64)), good[1]],
        good[:1],
    ):
        with pytest.raises(ValueError, match=r"is not|not written: b"):
            shards.write_shards(tmp_path, form, bad)


def test_hub_cache_of_links_to_blobs_loads(folder, tmp_path):
    """The hub keeps a snapshot as links into a folder of blobs; the shards of an index are such
    links.
    """
    single = load_file(folder / "model.safetensors")
    names = sorted(single)
    snapshot, blobs = tmp_path / "snapshots/abc", tmp_path / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    shutil.copyfile(folder / "config.json", snapshot / "config.json")
    weight_map = {}
    for number, part in enumerate((names[::2], names[1::2]), 1):
        shard = f"model-{number:05d}-of-00002.safetensors"
        save_file({name: single[name] for name in part}, blobs / f"digest{number}")
        (snapshot / shard).symlink_to(f"../../blobs/digest{number}")
        weight_map |= dict.fromkeys(part, shard)
    (snapshot / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    assert jax.tree.all(jax.tree.map(same_bits, load_base(snapshot)[1], load_base(folder)[1]))


def test_tokenizer_and_generation_config_are_carried_along(tiny_base, tmp_path):
    from transformers import AutoTokenizer

    architecture, params = load_base(tiny_base)
    save_base(tmp_path / "saved", architecture, params, like=tiny_base)
    assert (tmp_path / "saved/generation_config.json").is_file()
    assert AutoTokenizer.from_pretrained(tmp_path / "saved").encode(
        "Once upon a time", add_special_tokens=False
    ) == [403, 407, 261, 378]


def test_weights_trained_from_scratch_carry_their_own_config(tiny_base, tmp_path):
    architecture, params = load_base(tiny_base)
    fields = {**json.loads((tiny_base / "config.json").read_text()), "initializer_range": 0.5}
    save_base(tmp_path / "saved", architecture, params, like=tiny_base, config=fields)
    assert load_base(tmp_path / "saved")[0].initializer_range == 0.5


@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16])
def test_equal_copy_of_a_tied_head_is_ignored(tied, dtype):
    rewrite(
        tied,
        lambda tensors: tensors.update(
            {name: value.astype(dtype) for name, value in tensors.items()}
        ),
    )
    before = load_base(tied)[1]
    rewrite(
        tied,
        lambda tensors: tensors.update({"lm_head.weight": tensors["model.embed_tokens.weight"]}),
    )
    assert jax.tree.all(jax.tree.map(same_bits, load_base(tied)[1], before))


def test_rotary_tables_of_old_versions_are_ignored(folder):
    tables = {
        f"model.layers.{layer}.self_attn.rotary_emb.inv_freq": np.ones(6, np.float32)
        for layer in range(3)
    }
    rewrite(
        folder,
        lambda tensors: tensors.update(
            tables, **{"model.rotary_emb.inv_freq": np.ones(6, np.float32)}
        ),
    )
    load_base(folder)


# ---- what is refused ------------------------------------------------------------------------


def refusal(folder) -> str:
    with pytest.raises(InputError) as error:
        load_base(folder)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_every_missing_misshapen_and_unknown_tensor_is_listed(folder):
    def change(tensors):
        del tensors["model.layers.1.mlp.up_proj.weight"], tensors["lm_head.weight"]
        tensors["model.norm.weight"] = tensors["model.norm.weight"][:5]
        tensors["model.layers.0.self_attn.q_proj.weight"] = np.ascontiguousarray(
            tensors["model.layers.0.self_attn.q_proj.weight"].T
        )
        tensors["model.layers.0.self_attn.q_norm.weight"] = np.ones(12, np.float32)
        tensors["model.layers.3.input_layernorm.weight"] = np.ones(32, np.float32)
        tensors["model.layers.2.mlp.gate_proj.weight"] = tensors[
            "model.layers.2.mlp.gate_proj.weight"
        ].astype(np.int8)

    rewrite(folder, change)
    message = refusal(folder)
    for problem in (
        "model.layers.1.mlp.up_proj.weight is missing",
        "lm_head.weight is missing",
        "model.norm.weight has shape [5], expected [32]",
        "model.layers.0.self_attn.q_proj.weight has shape [32, 48], expected [48, 32]",
        "model.layers.0.self_attn.q_norm.weight is not known",
        "model.layers.3.input_layernorm.weight is not known",
        "model.layers.2.mlp.gate_proj.weight is stored as I8",
    ):
        assert problem in message


def test_other_head_than_the_tied_embeddings_is_refused(tied):
    rewrite(
        tied,
        lambda tensors: tensors.update(
            {"lm_head.weight": tensors["model.embed_tokens.weight"] + 1}
        ),
    )
    assert "lm_head.weight differs" in refusal(tied) and "tie_word_embeddings" in refusal(tied)


def test_layers_stored_in_several_dtypes_are_refused_unless_one_is_asked_for(folder):
    names = ["model.layers.1.mlp.up_proj.weight", "model.layers.2.self_attn.k_proj.weight"]
    rewrite(
        folder,
        lambda tensors: tensors.update(
            {name: tensors[name].astype(ml_dtypes.bfloat16) for name in names}
        ),
    )
    assert (
        "k is stored as bfloat16 and float32; up is stored as bfloat16 and float32 in different"
        " layers" in refusal(folder)
    )
    load_base(folder, np.dtype(np.float32))


@pytest.mark.parametrize("cut", [0, 5, 100, -1, -5000])
def test_truncated_file_is_refused(folder, cut):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:cut])
    assert "model.safetensors: not a whole safetensors file" in refusal(folder)


@pytest.mark.parametrize(
    "damage",
    [
        lambda data, header: b"\xff" * 8 + data[8:],
        lambda data, header: data[:20] + b"\x00" + data[21:],
        lambda data, header: data + b"more",
        lambda data, header: b"\x80\x04cos\nsystem\n." + data,
        lambda data, header: with_header(
            data,
            {
                **header,
                "model.norm.weight": {**header["model.norm.weight"], "data_offsets": [0, 128]},
            },
        ),
        lambda data, header: with_header(
            data,
            {**header, "model.norm.weight": {**header["model.norm.weight"], "shape": [1 << 62, 8]}},
        ),
        lambda data, header: with_header(
            data,
            {**header, "model.norm.weight": {**header["model.norm.weight"], "dtype": "PICKLE"}},
        ),
    ],
    ids=[
        "length of the header",
        "header",
        "longer than it says",
        "a pickle",
        "overlapping tensors",
        "overflowing shape",
        "unknown type",
    ],
)
def test_corrupt_file_is_refused(folder, damage):
    path = folder / "model.safetensors"
    data = path.read_bytes()
    path.write_bytes(damage(data, json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])))
    assert "model.safetensors: not a whole safetensors file" in refusal(folder)


def with_header(data: bytes, header: dict) -> bytes:
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data[8 + int.from_bytes(data[:8], "little") :]


def index_of(folder, change) -> None:
    """Turns the folder into one shard with an index, changed by `change`."""
    (folder / "model.safetensors").rename(folder / "model-00001-of-00001.safetensors")
    names = load_file(folder / "model-00001-of-00001.safetensors")
    tree = {"weight_map": dict.fromkeys(names, "model-00001-of-00001.safetensors")}
    text = change(tree)
    (folder / "model.safetensors.index.json").write_text(
        text if isinstance(text, str) else json.dumps(tree)
    )


@pytest.mark.parametrize(
    "place", ["../other.safetensors", "/etc/passwd", "sub/one.safetensors", "..", "a\\b"]
)
def test_index_that_points_outside_the_folder_is_refused(folder, place):
    (folder.parent / "other.safetensors").write_bytes((folder / "model.safetensors").read_bytes())
    index_of(folder, lambda tree: tree["weight_map"].update({"model.norm.weight": place}))
    assert f"points at {place}, outside the folder" in refusal(folder)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda tree: tree["weight_map"].update({"model.norm.weight": "gone.safetensors"}),
            "gone.safetensors: no such file",
        ),
        (
            lambda tree: tree["weight_map"].update(
                dict.fromkeys(("model.extra", "model.more"), "model-00001-of-00001.safetensors")
            ),
            (
                "model.extra is not in its file, though the index says so; model.more is not in its"
                " file"
            ),
        ),
        (
            lambda tree: tree["weight_map"].pop("model.norm.weight") and None,
            (
                "model.norm.weight lies in model-00001-of-00001.safetensors, where the index"
                " does not list it"
            ),
        ),
        (lambda tree: tree.update({"weight_map": ["a"]}), "not a safetensors index"),
        (lambda tree: tree.update({"weight_map": {"a": 5}}), "not a safetensors index"),
        (lambda tree: tree.clear(), "not a safetensors index"),
        (lambda tree: "{", "not valid JSON"),
        (lambda tree: "[]", "one JSON object"),
    ],
    ids=[
        "missing shard",
        "tensor not in shard",
        "tensor not in index",
        "list",
        "number",
        "no weight_map",
        "not JSON",
        "not an object",
    ],
)
def test_broken_index_is_refused(folder, change, message):
    index_of(folder, change)
    assert message in refusal(folder)


def test_tensor_that_lies_in_two_shards_is_refused_with_the_other_faults(folder):
    """Loaders differ in which of the two they follow."""
    index_of(
        folder,
        lambda tree: tree["weight_map"].update(
            dict.fromkeys(("model.extra", "model.norm.weight"), "model-2.safetensors")
        ),
    )
    save_file({"model.norm.weight": np.ones(32, np.float32)}, folder / "model-2.safetensors")
    message = refusal(folder)
    misplaced = "lies in model-00001-of-00001.safetensors, where the index does not list it"
    assert f"model.norm.weight {misplaced}" in message
    assert "model.extra is not in its file" in message


@pytest.mark.parametrize("name", ["pytorch_model.BIN", "pytorch_model.bin.index.json", None])
def test_hub_model_without_safetensors_is_refused_with_how_to_convert_it(folder, tmp_path, name):
    """Its pickled files are not downloaded; at most their index is there."""
    (tmp_path / "snapshots").mkdir()
    folder = folder.rename(tmp_path / "snapshots/0123abc")
    (folder / "model.safetensors").unlink()
    if name:
        (folder / name).write_text("{}")
    assert "pickled weights" in refusal(
        folder
    ) and "model.save_pretrained(folder, safe_serialization=True)" in refusal(folder)


@pytest.mark.parametrize(
    "name", ["pytorch_model.bin", "model.pt", "model.pth", "last.ckpt", "weights.pkl"]
)
def test_pickled_weights_are_never_read(folder, name):
    (folder / "model.safetensors").unlink()
    (folder / name).write_bytes(b"\x80\x04cos\nsystem\n.")
    assert "pickled" in refusal(folder) and "save_pretrained" in refusal(folder)
    with pytest.raises(
        InputError,
        match=(
            rf"{name}: holds pickled weights, which are never read; convert them with transformers"
        ),
    ):
        resolve_model(str(folder / name))
    (folder / "model.safetensors.index.json").write_text(
        json.dumps({"weight_map": {"model.norm.weight": name}})
    )
    assert (
        f"{name}: pickled weights, which are never read; convert them with transformers"
        in refusal(folder)
    )


def test_file_in_place_of_a_folder_is_refused(folder):
    with pytest.raises(InputError, match=r"model\.safetensors: is a file; give its folder"):
        resolve_model(str(folder / "model.safetensors"))


def test_folder_without_weights_or_config_is_refused(folder):
    (folder / "model.safetensors").unlink()
    assert "no model.safetensors" in refusal(folder)
    (folder / "config.json").unlink()
    assert "config.json: no such file" in refusal(folder)


@pytest.mark.parametrize(
    "path", ["no-such-folder", "./missing", "/nowhere/model", "a/b/c", "~/none/x/y"]
)
def test_model_that_is_no_folder_is_refused(path):
    with pytest.raises(
        InputError, match="no such run or model folder; give a folder, a GGUF file, a hub id"
    ):
        resolve_model(path)


@pytest.mark.parametrize("path", ["runs/nowhere", "./nowhere"])
def test_the_name_of_a_run_is_not_looked_for_on_the_hub(tmp_path, monkeypatch, path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(
        "huggingface_hub.snapshot_download",
        lambda *arguments, **settings: pytest.fail("asked the hub"),
    )
    with pytest.raises(InputError, match=f"{path}: no such run or model folder; give a folder"):
        resolve_model(path)


@pytest.mark.parametrize("path", ["someone/not-in-the-cache", "bad id/with spaces"])
def test_hub_model_that_cannot_be_had_is_refused(path, monkeypatch, tmp_path):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(InputError, match="not a folder, and the hub did not give it") as error:
        resolve_model(path)
    assert "\n" not in str(error.value)


# ---- whole or not at all --------------------------------------------------------------------


def test_folder_appears_whole_or_not_at_all(tmp_path):
    with pytest.raises(RuntimeError), atomic_folder(tmp_path / "new") as partial:
        (partial / "half").write_text("half")
        raise RuntimeError("out of disk")
    assert not list(tmp_path.iterdir())
    with atomic_folder(tmp_path / "deep/new") as partial:
        (partial / "whole").write_text("whole")
        assert not (tmp_path / "deep/new").exists()
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["new"] and (
        tmp_path / "deep/new/whole"
    ).is_file()


def test_folder_that_is_there_is_kept_until_its_successor_is_whole(tmp_path):
    (tmp_path / "old").mkdir()
    (tmp_path / "old/kept").write_text("kept")
    with pytest.raises(InputError, match="exists already"), atomic_folder(tmp_path / "old"):
        pass
    with pytest.raises(RuntimeError), atomic_folder(tmp_path / "old", replace=True):
        raise RuntimeError
    assert (tmp_path / "old/kept").is_file()
    with atomic_folder(tmp_path / "old", replace=True) as partial:
        (partial / "new").write_text("new")
    assert [path.name for path in (tmp_path / "old").iterdir()] == ["new"]
    assert [path.name for path in tmp_path.iterdir()] == ["old"]


def test_target_that_is_or_lies_in_a_file_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="exists already"), atomic_folder(tmp_path / "file"):
        pass
    with pytest.raises(InputError, match="cannot be made"), atomic_folder(tmp_path / "file/below"):
        pass
    (tmp_path / "empty").mkdir()
    with atomic_folder(tmp_path / "empty") as partial:
        (partial / "x").write_text("")
    assert (tmp_path / "empty/x").is_file()


def test_folder_that_came_meanwhile_is_left_alone(tmp_path):
    with (
        pytest.raises(InputError, match=r"new: cannot be put in its place \(.*not empty"),
        atomic_folder(tmp_path / "new") as partial,
    ):
        (partial / "ours").write_text("")
        (tmp_path / "new").mkdir()
        (tmp_path / "new/theirs").write_text("theirs")
    assert [path.relative_to(tmp_path).as_posix() for path in sorted(tmp_path.rglob("*"))] == [
        "new",
        "new/theirs",
    ]


def test_link_to_a_folder_stays_a_link(tmp_path):
    (tmp_path / "disk").mkdir()
    (tmp_path / "link").symlink_to("disk")
    for replace in (False, True):
        with atomic_folder(tmp_path / "link", replace=replace) as partial:
            (partial / f"{replace}").write_text("")
        assert (tmp_path / "link").is_symlink() and [
            path.name for path in (tmp_path / "disk").iterdir()
        ] == [f"{replace}"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["disk", "link"]


def test_current_folder_and_mount_points_are_refused_before_anything_is_written(
    tmp_path, monkeypatch
):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    for target in (Path("."), tmp_path / "here", Path("/")):
        with (
            pytest.raises(InputError, match="is the current folder or a mount point"),
            atomic_folder(target),
        ):
            pytest.fail("entered")
    assert [path.name for path in tmp_path.iterdir()] == ["here"]


def test_unfinished_folders_of_dead_processes_are_removed_and_named(tmp_path, capsys):
    done = subprocess.Popen([sys.executable, "-c", ""])
    done.wait()
    dead, alive, other = (
        tmp_path / f".{name}"
        for name in (f"new.partial-{done.pid}", "new.partial-1", f"old.partial-{done.pid}")
    )
    for folder in (dead, alive, other):
        folder.mkdir()
    with atomic_folder(tmp_path / "new"):
        assert not dead.exists() and alive.exists() and other.exists()
    assert f"removed {dead}" in capsys.readouterr().err


def test_config_of_the_source_that_is_broken_leaves_nothing_behind(tiny_base, tmp_path):
    architecture, params = load_base(tiny_base)
    (tmp_path / "like").mkdir()
    with pytest.raises(InputError, match=r"config\.json: cannot be read"):
        save_base(tmp_path / "saved", architecture, params, like=tmp_path / "like")
    assert [path.name for path in tmp_path.iterdir()] == ["like"]
