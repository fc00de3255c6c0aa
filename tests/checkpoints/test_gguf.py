"""GGUF files are read and written with the bits, the tokens and the answers of their model."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from refusals import refusal
from tiny import write_tiny_model
from tiny_decoders import build, ground_truth, our_logits, relative, their_logits, tokens_of
from tiny_runs import bits, make_run
from tokenizers import Tokenizer

from jaxre.checkpoints import gguf as gguf_module
from jaxre.checkpoints.convert import convert
from jaxre.checkpoints.gguf import StoredGGUF, open_gguf, unpacked
from jaxre.checkpoints.gguf_tokenizer import tokenizer_fields, tokenizer_files
from jaxre.checkpoints.huggingface import open_base
from jaxre.checkpoints.source import locate, open_model, resolve_model
from jaxre.config import Prompt, Source, shipped
from jaxre.data.tokenizer import load_tokenizer, token_ids
from jaxre.relations.sources import load

gguf = pytest.importorskip("gguf")
torch = ground_truth("torch")

FAMILIES = {
    "llama, grouped heads": {"model_type": "llama", "tie_word_embeddings": True},
    "llama untied, head_dim given": {"model_type": "llama", "head_dim": 12},
    "llama-3 scaled rope": {
        "model_type": "llama",
        "head_dim": 16,
        "tie_word_embeddings": True,
        "rope_parameters": {
            "rope_type": "llama3",
            "rope_theta": 500000.0,
            "factor": 32.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        },
    },
    "qwen2 tied, biases": {"model_type": "qwen2", "tie_word_embeddings": True},
    "qwen2 untied": {"model_type": "qwen2", "tie_word_embeddings": False},
    # transformers takes the heads of a qwen3 file to have 128 channels, whatever it says.
    "qwen3": {"model_type": "qwen3", "head_dim": 128, "tie_word_embeddings": True},
    "smollm3": {"model_type": "smollm3", "num_hidden_layers": 5},
    "gemma3": {
        "model_type": "gemma3_text",
        "head_dim": 16,
        "query_pre_attn_scalar": 16,
        "sliding_window": 8,
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
        "tie_word_embeddings": True,
        "hidden_activation": "gelu_pytorch_tanh",
    },
}
# transformers reads no smollm3, and of a scaled rope the factors only.
READ_BY_TRANSFORMERS = [
    name for name in FAMILIES if name[:3] in ("lla", "qwe") and "rope" not in name
]
TEXTS = [
    "<|im_start|>user\nText: In 1895, Ada (Lovelace) isn't here.\nHead: x<|im_end|>",
    "  two  spaces\n\n\tand a tab, naïve café, don't, 12345 678,9",
    "中文 ١٢٣ 🙂",
]


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JAXRE_CACHE", str(tmp_path / "cache"))


@pytest.fixture(scope="session")
def tokenizer_of(tmp_path_factory: pytest.TempPathFactory):
    """Family -> a folder of a small tokenizer as transformers builds it for that family."""
    made: dict[str, Path] = {}

    def give(model_type: str) -> Path:
        if model_type not in made:
            folder = tmp_path_factory.mktemp(model_type)
            made[model_type] = write_tiny_model(folder, model_type=model_type, head_dim=8)
        return made[model_type]

    return give


@pytest.fixture
def base(tmp_path: Path, tokenizer_of, request: pytest.FixtureRequest) -> Path:
    """A folder of the family that the test is parametrised with, weights and tokenizer."""
    fields = FAMILIES[request.param]
    return folder_of(fields, tmp_path / "base", tokenizer_of)


def folder_of(fields: dict, folder: Path, tokenizer_of, dtype: str = "float32") -> Path:
    build({**fields, "vocab_size": 512, "intermediate_size": 64}, folder, dtype=dtype)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copyfile(tokenizer_of(fields["model_type"]) / name, folder / name)
    return folder


# ---- weights ----------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("family", FAMILIES)
def test_out_and_back_in_gives_the_same_bits(tmp_path, tokenizer_of, family, dtype):
    source = folder_of(FAMILIES[family], tmp_path / "hf", tokenizer_of, dtype)
    convert(source, tmp_path / "file", "gguf", verify=True)
    convert(tmp_path / "file" / "file.gguf", tmp_path / "back", "hf", dtype=dtype, verify=True)
    if family != "gemma3":
        assert bits(tmp_path / "back") == bits(source)
        return
    # A file has 1 + w in f32, which may round w: the factor is the same, and all else.
    before, after = (open_base(folder) for folder in (source, tmp_path / "back"))
    for name in before.dtypes:
        one, other = before.read(name), after.read(name)
        if name.endswith("norm.weight"):
            one, other = (np.float32(1) + value.astype(np.float32) for value in (one, other))
        assert np.array_equal(one, other), name


@pytest.mark.parametrize("base", READ_BY_TRANSFORMERS, indirect=True)
def test_transformers_reads_the_file_as_the_folder_it_came_from(base, tmp_path):
    from transformers import AutoModelForCausalLM

    convert(base, tmp_path / "file", "gguf")
    theirs, original = (
        AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.float32, attn_implementation="eager", **given
        ).eval()
        for folder, given in ((tmp_path / "file", {"gguf_file": "file.gguf"}), (base, {}))
    )
    tokens = tokens_of(512, 2, 24)
    assert relative(their_logits(theirs, tokens), their_logits(original, tokens)) < 1e-6
    assert theirs.config.tie_word_embeddings == original.config.tie_word_embeddings


@pytest.mark.parametrize("base", FAMILIES, indirect=True)
def test_a_file_opens_as_a_model_with_the_logits_of_its_folder(base, tmp_path):
    from transformers import AutoModelForCausalLM

    convert(base, tmp_path / "file", "gguf")
    opened = open_model(tmp_path / "file" / "file.gguf", np.dtype(np.float32))
    assert opened.kind == "gguf" and locate(tmp_path / "file").folder == opened.folder
    original = AutoModelForCausalLM.from_pretrained(
        base, dtype=torch.float32, attn_implementation="eager"
    ).eval()
    tokens = tokens_of(512, 2, 24)
    ours = our_logits(opened.architecture, opened.base, tokens)
    assert relative(ours, their_logits(original, tokens)) < 1e-5


@pytest.mark.parametrize("family", ["llama, grouped heads", "qwen2 tied, biases"])
def test_q8_0_is_what_the_package_makes_of_each_matrix(tmp_path, tokenizer_of, family):
    """[32, 64] and wider have whole blocks; a matrix that has none is f16, vectors are f32."""
    source = folder_of(FAMILIES[family], tmp_path / "hf", tokenizer_of)
    done = convert(source, tmp_path / "file", "gguf", dtype="q8_0", verify=True)
    assert 0 < max(done.differences.values()) < 0.1
    original, file = open_model(source, None), unpacked(tmp_path / "file" / "file.gguf")
    stored = json.loads((file / "gguf.json").read_text())["tensors"]
    assert (
        stored["blk.0.ffn_up.weight"][0] == "Q8_0" and stored["blk.0.attn_norm.weight"][0] == "F32"
    )
    read = open_gguf(file).read("model.layers.0.mlp.up_proj.weight")
    matrix = np.ascontiguousarray(original.base["layers"]["up"][0].T)
    kind = gguf.GGMLQuantizationType.Q8_0
    expected = gguf.quants.dequantize(gguf.quants.quantize(matrix, kind), kind)
    assert np.array_equal(read, expected)


@pytest.mark.parametrize("kind", gguf_module.QUANTISED)
def test_every_block_format_is_dequantised_as_the_package_does(tmp_path, kind):
    number = gguf.GGMLQuantizationType[kind]
    block, size = gguf.GGML_QUANT_SIZES[number]
    draw = np.random.default_rng(0)
    data = draw.integers(0, 60, (6, 512 // block * size), np.uint8)  # scales stay finite
    path = tmp_path / "blocks"
    path.write_bytes(b"head" + data.tobytes())
    found = StoredGGUF(path, kind, (6, 512), 4, data.nbytes).read()
    assert found.dtype == np.float32 and np.isfinite(found).all() and found.std() > 0
    assert np.array_equal(found, gguf.quants.dequantize(data, number))


def test_layers_of_one_weight_that_differ_in_type_are_widened_together(tmp_path, tokenizer_of):
    """llama.cpp's mixed files: some layers of a weight in another type than the rest."""
    source = folder_of(FAMILIES["qwen2 untied"], tmp_path / "hf", tokenizer_of, "float16")
    convert(source, tmp_path / "file", "gguf")
    marker = unpacked(tmp_path / "file" / "file.gguf") / "gguf.json"
    content = json.loads(marker.read_text())
    assert open_gguf(marker.parent).dtypes["model.layers.1.mlp.up_proj.weight"] == np.float16
    content["tensors"]["blk.0.ffn_up.weight"][0] = "BF16"
    marker.write_text(json.dumps(content))
    dtypes = open_gguf(marker.parent).dtypes
    assert dtypes["model.layers.1.mlp.up_proj.weight"] == np.float32
    assert dtypes["model.layers.1.mlp.down_proj.weight"] == np.float16


# ---- tokens -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", ["Qwen/Qwen2.5-0.5B-Instruct", "HuggingFaceTB/SmolLM2-360M-Instruct"]
)
def test_a_real_tokenizer_goes_through_a_file_s_fields_unchanged(name, shared_models, tmp_path):
    folder = shared_models / name
    real = load_tokenizer(folder)
    config = json.loads((folder / "config.json").read_text())
    fields = tokenizer_fields(folder, real, config["vocab_size"], name)
    fields["general.architecture"] = config["model_type"]
    files = tokenizer_files(fields, config["vocab_size"], tmp_path)
    for file, content in files.items():
        text = content if isinstance(content, str) else json.dumps(content)
        (tmp_path / file).write_text(text, encoding="utf-8")
    shutil.copyfile(folder / "config.json", tmp_path / "config.json")
    back = load_tokenizer(tmp_path)
    assert back.stated is None and len(back) == len(real)
    stated = Tokenizer.from_file(str(folder / "tokenizer.json"))
    texts = TEXTS + [one.text for one in load(Source(dataset="facts", split="test", limit=200))]
    assert token_ids(back, texts) == [
        stated.encode(text, add_special_tokens=False).ids for text in texts
    ]
    assert back.eos_token_id == real.eos_token_id and back.pad_token_id == real.pad_token_id


@pytest.mark.parametrize("base", FAMILIES, indirect=True)
def test_a_file_tokenises_and_ends_as_its_folder_does(base, tmp_path):
    convert(base, tmp_path / "file", "gguf")
    before, after = load_tokenizer(base), load_tokenizer(resolve_model(str(tmp_path / "file")))
    assert token_ids(after, TEXTS) == token_ids(before, TEXTS)
    assert after.stated is None
    assert after.get_chat_template() == before.get_chat_template()
    assert after.eos_token == "<|im_end|>"


def test_an_added_token_that_eats_space_is_not_written(tmp_path, tokenizer_of):
    folder = folder_of(FAMILIES["qwen2 untied"], tmp_path / "hf", tokenizer_of)
    path = folder / "tokenizer.json"
    tree = json.loads(path.read_text(encoding="utf-8"))
    tree["added_tokens"][1]["lstrip"] = True
    path.write_text(json.dumps(tree), encoding="utf-8")
    message = refusal(lambda: convert(folder, tmp_path / "file", "gguf"))
    assert "'<|im_start|>' has lstrip set" in message and not (tmp_path / "file").exists()


def test_a_pre_tokenizer_without_a_name_is_not_written(tiny_base, tmp_path):
    message = refusal(lambda: convert(tiny_base, tmp_path / "file", "gguf"))
    assert "pre-tokenizer is none of" in message and "--to hf" in message


def test_the_shipped_base_s_tokenizer_goes_through_a_file(tmp_path):
    """Its merges contain spaces, which GGUF also uses to separate the two sides."""
    base = shipped("facts-base")
    convert(base, tmp_path / "file", "gguf")
    before, after = load_tokenizer(base), load_tokenizer(resolve_model(str(tmp_path / "file")))
    texts = TEXTS + [one.text for one in load(Source(dataset="facts", split="test", limit=200))]
    texts += ["Text: in <e1>Ada</e1> (<e2>Bob</e2>) <e1 e2> < e1>"]
    assert token_ids(after, texts) == token_ids(before, texts)


def test_a_first_token_of_its_own_is_kept(written, monkeypatch):
    read = gguf_module.read_gguf

    def begun(path):
        fields, tensors = read(path)
        fields["tokenizer.ggml.add_bos_token"] = True
        fields["tokenizer.ggml.bos_token_id"] = 1
        return fields, tensors

    monkeypatch.setattr(gguf_module, "read_gguf", begun)
    tokenizer = load_tokenizer(unpacked(written))
    assert tokenizer("Ada")["input_ids"][0] == 1
    assert token_ids(tokenizer, ["Ada"])[0][0] != 1


def test_only_a_folder_that_is_nothing_else_is_taken_for_its_file(written, tmp_path):
    assert resolve_model(str(written.parent)) == unpacked(written)
    assert locate(written.parent).name == "file" and locate(written).name == "file"
    shutil.copyfile(written, written.with_name("second.gguf"))
    assert "holds 2 GGUF files" in refusal(lambda: resolve_model(str(written.parent)))
    (written.parent / "adapter_config.json").write_text("{}")
    assert resolve_model(str(written.parent)) == written.parent


def test_a_file_of_the_other_byte_order_is_refused(tmp_path):
    writer = gguf.GGUFWriter(tmp_path / "big.gguf", "llama", endianess=gguf.GGUFEndian.BIG)
    writer.add_tensor("token_embd.weight", np.ones((4, 8), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    assert "little-endian" in refusal(lambda: unpacked(tmp_path / "big.gguf"))


def test_a_file_is_quantised_again(written, tmp_path):
    done = convert(written, tmp_path / "small", "gguf", dtype="q8_0", verify=True)
    assert done.dtype == "Q8_0, float32" and "Q8_0" in str(done)


def test_the_modelfile_has_the_template_the_system_turn_and_the_end(tmp_path):
    base = shipped("facts-base")
    run = make_run(tmp_path / "run", base, "lora")
    convert(run, tmp_path / "facts", "gguf", merge=True, dtype="q8_0")
    text = (tmp_path / "facts" / "Modelfile").read_text()
    assert text.startswith("FROM ./facts.gguf\n")
    assert (
        'TEMPLATE """{{ if .System }}<|im_start|>system\n{{ .System }}<|im_end|><|im_start|>user\n'
        "{{ else }}<|im_start|>user\n{{ end }}{{ .Prompt }}<|im_end|><|im_start|>assistant\n"
        '{{ .Response }}<|im_end|>"""'
    ) in text
    assert f'SYSTEM """{Prompt().system}"""' in text
    assert 'PARAMETER stop "<|im_end|>"' in text and "temperature 0" in text


# ---- refusals ---------------------------------------------------------------------------------


@pytest.fixture
def written(tmp_path: Path, tokenizer_of) -> Path:
    source = folder_of(FAMILIES["qwen2 untied"], tmp_path / "hf", tokenizer_of)
    convert(source, tmp_path / "file", "gguf")
    return tmp_path / "file" / "file.gguf"


@pytest.mark.parametrize(
    ("field", "value", "words"),
    [
        ("general.architecture", "mamba", "general.architecture 'mamba' is not known"),
        ("tokenizer.ggml.pre", "qwen9", "tokenizer.ggml.pre 'qwen9' is not known; known are qwen2"),
        ("tokenizer.ggml.model", "bert", "tokenizer.ggml.model 'bert' is not supported"),
        ("split.count", 3, "is one of 3 parts"),
        ("qwen2.rope.scaling.type", "yarn", "rope scaling 'yarn'"),
        ("qwen2.expert_count", 8, "experts (8)"),
        ("qwen2.block_count", None, "the field qwen2.block_count is missing"),
        ("qwen2.block_count", 4, "blk.3"),
        ("qwen2.block_count", 2, "blk.2.attn_k.bias is not known"),
        ("qwen2.embedding_length", 48, "has shape"),
        ("qwen2.rope.scaling.factor", 4.0, "rope scaling 'linear'"),
        ("qwen2.attention.head_count", [4, 4, 4], "head_count is [4, 4, 4]"),
        ("qwen2.attention.head_count", 0, "head_count is 0"),
        ("qwen2.attention.layer_norm_rms_epsilon", "x", "a value that cannot be"),
        ("tokenizer.ggml.merges", [1, 2], "the merge 1 has no two sides"),
        ("tokenizer.ggml.pre", ["qwen2"], "a value that cannot be"),
        ("tokenizer.ggml.eos_token_id", "a", "a value that cannot be"),
    ],
)
def test_what_a_file_says_that_we_do_not_have_is_refused_by_name(
    written, monkeypatch, field, value, words
):
    read = gguf_module.read_gguf

    def changed(path):
        fields, tensors = read(path)
        fields[field] = value
        return fields, tensors

    monkeypatch.setattr(gguf_module, "read_gguf", changed)
    message = refusal(lambda: open_model(written, None))
    assert words in message.replace("model.layers.3.", "blk.3."), message


def test_types_that_are_not_known_are_refused_by_name(tmp_path):
    writer = gguf.GGUFWriter(tmp_path / "a.gguf", "llama")
    kind = gguf.GGMLQuantizationType.IQ4_NL
    writer.add_tensor("token_embd.weight", np.zeros((4, 18), np.uint8), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    message = refusal(lambda: unpacked(tmp_path / "a.gguf"))
    assert "token_embd.weight is stored as IQ4_NL" in message and "Q4_K" in message


@pytest.mark.parametrize("share", [0.001, 0.1, 0.5, 0.999])
def test_a_file_that_was_cut_short_is_refused(written, tmp_path, share):
    whole = written.read_bytes()
    cut = tmp_path / "cut.gguf"
    cut.write_bytes(whole[: int(len(whole) * share)])
    message = refusal(lambda: open_model(cut, None))
    assert str(cut) in message and "download it again" in message


def test_a_file_that_changed_after_it_was_opened_is_refused_or_read_anew(written):
    folder = unpacked(written)
    os.utime(written, ns=(1, 1))
    assert "has changed" in refusal(lambda: open_gguf(folder))
    assert unpacked(written) != folder
    written.unlink()
    assert "is not there any more" in refusal(lambda: open_gguf(folder))


def test_flipped_bytes_are_one_line_or_a_model(written, tmp_path):
    """Fuzzed headers: never a traceback."""
    whole = bytearray(written.read_bytes())
    draw, opened = np.random.default_rng(0), 0
    for number in range(20):
        broken = bytearray(whole)
        for place in draw.integers(4, 6000, 3):
            broken[place] = draw.integers(0, 256)
        path = tmp_path / f"broken{number}.gguf"
        path.write_bytes(broken)
        try:
            open_model(path, None)
            opened += 1
        except gguf_module.InputError as error:
            assert len(str(error).splitlines()) == 1
    assert opened < 20
