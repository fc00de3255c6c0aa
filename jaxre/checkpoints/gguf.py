"""Reads GGUF files, llama.cpp's model format: weights, config, tokenizer and template in one file.

    folder = unpacked(Path("SmolLM2-135M-Instruct.Q4_1.gguf"))  # config.json, tokenizer, no weights
    tensors = open_gguf(folder)  # dequantised, one tensor at a time

An unpacked folder lies in jaxre's cache, has the layout of a Hugging Face folder, and names the
file with the weights. The weight table translates names and layout; two kinds of architecture also
store other values:

  llama, smollm3   rows of q and k interleaved in each head: channels c and c + C/2 are adjacent.
  gemma3           norms as 1 + w, the factor itself.

The `gguf` package dequantises tensors to f32. Field and tensor names are those of the GGUF
specification (ggml's docs/gguf.md) and of llama.cpp's converters.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import re
import shutil
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from jaxre.checkpoints import gguf_tokenizer
from jaxre.checkpoints.gguf_tokenizer import tokenizer_files
from jaxre.checkpoints.huggingface import (
    Tensors,
    check_tensors,
    hf_shapes,
    positions,
    read_json,
)
from jaxre.checkpoints.shards import read_bytes
from jaxre.errors import InputError, first_line
from jaxre.models.architecture import Architecture, architecture_of, read_architecture
from jaxre.models.decoder import rotary_frequencies

MARKER = "gguf.json"
CACHE = "~/.cache/jaxre"  # JAXRE_CACHE names another folder

# Our name of a weight -> its name in a file, without the `blk.N.` of a layer.
NAMES = {
    "embed": "token_embd.weight",
    "norm": "output_norm.weight",
    "head": "output.weight",
    "attention_norm": "attn_norm.weight",
    "q": "attn_q.weight",
    "k": "attn_k.weight",
    "v": "attn_v.weight",
    "q_bias": "attn_q.bias",
    "k_bias": "attn_k.bias",
    "v_bias": "attn_v.bias",
    "q_norm": "attn_q_norm.weight",
    "k_norm": "attn_k_norm.weight",
    "o": "attn_output.weight",
    "mlp_norm": "ffn_norm.weight",
    "gate": "ffn_gate.weight",
    "up": "ffn_up.weight",
    "down": "ffn_down.weight",
    "attention_out_norm": "post_attention_norm.weight",
    "mlp_out_norm": "post_ffw_norm.weight",
}
# Factors of the rotary frequencies; a file stores these instead of Llama 3's scaling parameters.
ROPE_FACTORS = "rope_freqs.weight"
# The parameters that Llama 3.1 and 3.2 were trained with (their config.json).
LLAMA3_SCALINGS = tuple(
    {
        "rope_type": "llama3",
        "factor": factor,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    for factor in (8.0, 32.0)
)
PLAIN = {
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
}
QUANTISED = ("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K")


@dataclass(frozen=True)
class Family:
    """The names of a `general.architecture` in transformers, and how its stored weights differ."""

    model_type: str
    class_name: str
    paired: bool = False
    norm_offset: float = 0.0  # stored value of a norm minus Hugging Face's
    fields: tuple[tuple[str, Any], ...] = ()


FAMILIES = {
    "llama": Family("llama", "LlamaForCausalLM", paired=True),
    "qwen2": Family("qwen2", "Qwen2ForCausalLM", fields=(("use_sliding_window", False),)),
    "qwen3": Family("qwen3", "Qwen3ForCausalLM", fields=(("use_sliding_window", False),)),
    # llama.cpp supports no other interval.
    "smollm3": Family(
        "smollm3", "SmolLM3ForCausalLM", paired=True, fields=(("no_rope_layer_interval", 4),)
    ),
    # llama.cpp's defaults for fields that its converter does not write.
    "gemma3": Family(
        "gemma3_text",
        "Gemma3ForCausalLM",
        norm_offset=1.0,
        fields=(("hidden_activation", "gelu_pytorch_tanh"), ("rope_local_base_freq", 10000.0)),
    ),
}


@dataclass(frozen=True)
class StoredGGUF:
    """One tensor of a file, known from the header. `kind` is GGUF's name of its type; `shape` is in
    numpy's order.
    """

    path: Path
    kind: str
    shape: tuple[int, ...]
    start: int
    bytes: int

    @property
    def dtype(self) -> np.dtype:
        """Dtype of the values; a quantised tensor is dequantised to f32."""
        return value_dtype(self.kind)

    def read(self) -> np.ndarray:
        """The values. Raises InputError if the disk fails."""
        from gguf import GGMLQuantizationType
        from gguf.quants import dequantize

        data = read_bytes(self.path, self.start, self.bytes)
        if self.kind in PLAIN:
            return data.view(self.dtype).reshape(self.shape)
        blocks = data.reshape(*self.shape[:-1], -1)
        return dequantize(blocks, GGMLQuantizationType[self.kind]).reshape(self.shape)


def value_dtype(kind: str) -> np.dtype:
    """The dtype of a tensor's values when it is read."""
    return PLAIN.get(kind, PLAIN["F32"])


def is_gguf_file(path: Path) -> bool:
    """True if a file starts with GGUF's magic bytes."""
    with path.open("rb") as file:
        return file.read(4) == b"GGUF"


def is_gguf(folder: Path) -> bool:
    """True for a folder that `unpacked` made."""
    return (folder / MARKER).is_file()


def file_of(folder: Path) -> Path:
    """The file that an unpacked folder was made from."""
    return Path(read_json(folder / MARKER)["file"])


def unpacked(path: Path, check: Callable[[], None] | None = None) -> Path:
    """The folder in jaxre's cache with everything in a file but its weights; made if missing.

    Args:
      check: called before a file is read for the first time.

    Raises:
      InputError: a file that is damaged or split, or whose architecture, tensor type or tokenizer
        is unknown.
    """
    path = Path(path).resolve()
    stat = path.stat()
    # The reading code decides what the folder contains, so it is part of the key.
    code = b"".join(
        Path(module_file).read_bytes() for module_file in (__file__, gguf_tokenizer.__file__)
    )
    file = f"{path} {stat.st_size} {stat.st_mtime_ns} {check is not None}"
    key = hashlib.sha256(code + file.encode()).hexdigest()
    cache = Path(os.environ.get("JAXRE_CACHE") or CACHE).expanduser() / "gguf"
    folder = cache / f"{path.stem}-{key[:12]}"
    if is_gguf(folder):
        return folder
    if check is not None:
        check()
    fields, tensors = read_gguf(path)
    try:
        family = family_of(fields, path)
        config = config_of(fields, tensors, family, path)
        files = tokenizer_files(fields, config["vocab_size"], path)
    except (TypeError, ValueError, KeyError, AttributeError, ZeroDivisionError) as error:
        raise InputError(
            f"{path}: a field has a value that cannot be ({first_line(error)}); download it again"
        ) from None
    if "chat_template.jinja" in files and not fields.get("tokenizer.chat_template"):
        print(
            f"{path.name}: has no chat template; {family.model_type}'s turns are used, as jaxre"
            " writes them",
            file=sys.stderr,
        )
    ids = {name: config[name] for name in config if name.endswith("_token_id")}
    files |= {"config.json": config, "generation_config.json": ids}
    files[MARKER] = {
        "file": str(path),
        "size": stat.st_size,
        "modified": stat.st_mtime_ns,
        "tensors": {
            name: [tensor.kind, list(tensor.shape), tensor.start, tensor.bytes]
            for name, tensor in tensors.items()
        },
    }
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        partial = Path(tempfile.mkdtemp(prefix=".", dir=folder.parent))
        for name, content in files.items():
            text = content if isinstance(content, str) else json.dumps(content, ensure_ascii=False)
            (partial / name).write_text(text, encoding="utf-8")
        try:
            partial.rename(folder)
        except OSError:
            # Another process may have written the same content first.
            shutil.rmtree(partial, ignore_errors=True)
            if not is_gguf(folder):
                raise
    except OSError as error:
        raise InputError(
            f"{folder}: cannot be written ({error.strerror}); set JAXRE_CACHE to a folder that can"
        ) from None
    return folder


def read_gguf(path: Path) -> tuple[dict[str, Any], dict[str, StoredGGUF]]:
    """The fields and tensors of a file; no weight is read.

    Raises:
      InputError: a damaged or truncated file, a tensor of unknown type.
    """
    from gguf import GGUFReader

    try:
        reader = GGUFReader(path)
        fields = {name: field.contents() for name, field in reader.fields.items()}
    except (ValueError, KeyError, IndexError, OverflowError, OSError, TypeError) as error:
        raise InputError(
            f"{path}: not a GGUF file that can be read ({first_line(error)}); download it again"
        ) from None
    if reader.byte_order == "S":
        raise InputError(f"{path}: is of the other byte order; take the little-endian file")
    known, tensors, size = (*PLAIN, *QUANTISED), {}, path.stat().st_size
    for tensor in reader.tensors:
        kind = tensor.tensor_type.name
        if kind not in known:
            raise InputError(
                f"{path}: {tensor.name} is stored as {kind}, which is not one of"
                f" {', '.join(known)}; take another file of the model"
            )
        shape = tuple(int(length) for length in reversed(tensor.shape))
        stored = StoredGGUF(path, kind, shape, int(tensor.data_offset), int(tensor.n_bytes))
        if stored.start + stored.bytes > size:
            raise InputError(f"{path}: ends inside {tensor.name}; download it again")
        tensors[tensor.name] = stored
    return fields, tensors


def family_of(fields: dict[str, Any], place: Path) -> Family:
    """The family of a file. Raises InputError for an unknown architecture or part of a split
    file.
    """
    if int(fields.get("split.count", 1)) > 1:
        raise InputError(
            f"{place}: is one of {fields['split.count']} parts; join them with llama.cpp's"
            " llama-gguf-split --merge"
        )
    name = fields.get("general.architecture")
    if name not in FAMILIES:
        raise InputError(
            f"{place}: general.architecture {name!r} is not known; known are {', '.join(FAMILIES)}"
        )
    return FAMILIES[name]


def config_of(
    fields: dict[str, Any], tensors: dict[str, StoredGGUF], family: Family, place: Path
) -> dict[str, Any]:
    """The fields of config.json that follow from a file's fields and tensors.

    Raises:
      InputError: a missing field, or an unknown feature.
    """
    prefix = fields["general.architecture"]

    def field(name: str, default: Any = None) -> Any:
        value = fields.get(f"{prefix}.{name}", default)
        if value is None:
            raise InputError(f"{place}: the field {prefix}.{name} is missing; download it again")
        return value

    if "token_embd.weight" not in tensors:
        raise InputError(f"{place}: token_embd.weight is missing; download it again")
    heads, width = field("attention.head_count"), field("embedding_length")
    if not isinstance(heads, int) or heads < 1:
        raise InputError(
            f"{place}: {prefix}.attention.head_count is {heads!r}; one number for all layers is"
            " supported, take another model"
        )
    channels = field("attention.key_length", width // heads)
    for name in ("attention.value_length", "rope.dimension_count"):
        if field(name, channels) != channels:
            raise InputError(
                f"{place}: {prefix}.{name} is {field(name)}, the heads have {channels} channels;"
                " that is not supported, take another model"
            )
    scaling = field("rope.scaling.type", "none")
    factor = field("rope.scaling.factor", field("rope.scale_linear", 1.0))
    scaling = "linear" if scaling == "none" and factor not in (0.0, 1.0) else scaling
    if scaling != "none" or fields.get(f"{prefix}.expert_count"):
        raise InputError(
            f"{place}: rope scaling {scaling!r} or experts"
            f" ({fields.get(f'{prefix}.expert_count', 0)}) are set, which is not supported; take"
            " another model"
        )
    gemma = family.model_type == "gemma3_text"
    config = {
        "architectures": [family.class_name],
        "model_type": family.model_type,
        **({} if gemma else {"hidden_act": "silu"}),
        "hidden_size": width,
        "intermediate_size": field("feed_forward_length"),
        "num_hidden_layers": field("block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": field("attention.head_count_kv", heads),
        "head_dim": channels,
        "max_position_embeddings": field("context_length"),
        "rms_norm_eps": _decimal(field("attention.layer_norm_rms_epsilon")),
        "rope_theta": _decimal(field("rope.freq_base", 10000.0)),
        "tie_word_embeddings": "output.weight" not in tensors,
        "vocab_size": tensors["token_embd.weight"].shape[0],
        **dict(family.fields),
    }
    if gemma:
        # llama.cpp's score scale for all sizes but 27B, which is not supported here.
        config["query_pre_attn_scalar"] = channels
        config["sliding_window"] = field("attention.sliding_window")
        pattern = field("attention.sliding_window_pattern", 6)
        if not isinstance(pattern, list):
            pattern = [(layer + 1) % pattern != 0 for layer in range(field("block_count"))]
        config["layer_types"] = [
            "sliding_attention" if slides else "full_attention" for slides in pattern
        ]
        local = field("rope.freq_base_swa", config["rope_local_base_freq"])
        config["rope_local_base_freq"] = _decimal(local)
        if fields.get(f"{prefix}.final_logit_softcapping"):
            raise InputError(
                f"{place}: {prefix}.final_logit_softcapping is set, which is not supported; take"
                " another model"
            )
    for name, gguf_name in (("bos", "bos"), ("eos", "eos"), ("pad", "padding")):
        token = fields.get(f"tokenizer.ggml.{gguf_name}_token_id")
        if token is not None and 0 <= token < config["vocab_size"]:
            config[f"{name}_token_id"] = token
    stops = [fields.get(f"tokenizer.ggml.{name}_token_id") for name in ("eos", "eot")]
    stops = list(dict.fromkeys(stop for stop in stops if stop is not None))
    if len(stops) > 1:
        config["eos_token_id"] = stops
    config["dtype"] = tensors["token_embd.weight"].dtype.name
    if ROPE_FACTORS in tensors:
        config["rope_scaling"] = _llama3_of(config, tensors[ROPE_FACTORS].read(), place)
    return config


def _decimal(value: float) -> float:
    """The shortest decimal that rounds to the same f32: 1e-05 for 9.99999974e-06."""
    return float(str(np.float32(value)))


def _llama3_of(config: dict[str, Any], factors: np.ndarray, place: Path) -> dict[str, Any]:
    """The Llama 3 scaling parameters of these factors. Raises InputError if there are none."""
    for scaling in LLAMA3_SCALINGS:
        architecture = architecture_of({**config, "rope_scaling": scaling}, str(place))
        expected = rope_factors(architecture)
        if factors.shape == expected.shape and np.allclose(factors, expected, rtol=1e-5, atol=0):
            return scaling
    raise InputError(
        f"{place}: {ROPE_FACTORS} are not those of Llama 3.1 or 3.2, and a file does not have their"
        " parameters; take the Hugging Face folder of the model"
    )


def rope_factors(architecture: Architecture) -> np.ndarray | None:
    """[C/2] f32 divisors of the unscaled rotary frequencies; None without scaling."""
    if architecture.rope_scaling is None:
        return None
    plain = dataclasses.replace(architecture, rope_scaling=None)
    return rotary_frequencies(plain) / rotary_frequencies(architecture)


def open_gguf(folder: Path) -> Tensors:
    """Opens the weights behind an unpacked folder without reading data.

    Raises:
      InputError: a file that is gone or changed; lists every missing, misshapen and unknown tensor.
    """
    marker = read_json(folder / MARKER)
    path = Path(marker["file"])
    stat = path.stat() if path.is_file() else None
    if stat is None or [stat.st_size, stat.st_mtime_ns] != [marker["size"], marker["modified"]]:
        raise InputError(f"{path}: is not there any more, or has changed; give the file again")
    stored = {
        name: StoredGGUF(path, kind, tuple(shape), start, count)
        for name, (kind, shape, start, count) in marker["tensors"].items()
    }
    return tensors_of(path, read_architecture(folder), stored)


def tensors_of(path: Path, architecture: Architecture, stored: dict[str, StoredGGUF]) -> Tensors:
    """The tensors of a file by Hugging Face name. Raises InputError as `open_gguf` does."""
    unknown = {name: tensor for name, tensor in stored.items() if name != ROPE_FACTORS}
    known = {
        hf: unknown.pop(name) for hf, name in names_of(architecture).items() if name in unknown
    }
    check_tensors(path, architecture, {**known, **unknown})
    # All layers of a weight share one stack: f32 if their types differ.
    weight_of = {name: weight.name for name, (weight, _, _) in positions(architecture).items()}
    stored_dtypes: dict[str, set[np.dtype]] = {}
    for name, tensor in known.items():
        stored_dtypes.setdefault(weight_of[name], set()).add(tensor.dtype)
    dtypes = {}
    for name in hf_shapes(architecture):
        of_weight = stored_dtypes[weight_of[name]]
        dtypes[name] = next(iter(of_weight)) if len(of_weight) == 1 else PLAIN["F32"]
    form = form_of(architecture)

    def read(name: str) -> np.ndarray:
        return form.to_hf(name, known[name].read()).astype(dtypes[name], copy=False)

    return Tensors(architecture, dtypes, read)


def names_of(architecture: Architecture) -> dict[str, str]:
    """Hugging Face name -> name in a GGUF file, of each tensor."""
    return {
        hf: f"blk.{layer.group(1)}.{NAMES[weight.name]}"
        if (layer := re.search(r"\.layers\.(\d+)\.", hf))
        else NAMES[weight.name]
        for hf, (weight, _, _) in positions(architecture).items()
    }


@dataclass(frozen=True)
class Form:
    """Differences of a file's values from Hugging Face's.

    heads: name -> number of heads, of the q and k weights whose rows are interleaved.
    offset: added to the values of `norms`.
    """

    heads: dict[str, int]
    norms: frozenset[str]
    offset: float

    def to_hf(self, name: str, value: np.ndarray) -> np.ndarray:
        if name in self.norms and self.offset:
            return value - np.float32(self.offset)
        if name in self.heads:
            rows = value.reshape(self.heads[name], -1, 2, *value.shape[1:])
            return np.ascontiguousarray(rows.swapaxes(1, 2)).reshape(value.shape)
        return value

    def to_gguf(self, name: str, value: np.ndarray) -> np.ndarray:
        if name in self.norms and self.offset:
            return value + np.float32(self.offset)
        if name in self.heads:
            rows = value.reshape(self.heads[name], 2, -1, *value.shape[1:])
            return np.ascontiguousarray(rows.swapaxes(1, 2)).reshape(value.shape)
        return value


def form_of(architecture: Architecture) -> Form:
    """The form in which a file stores an architecture's values."""
    (family,) = (family for family in FAMILIES.values() if family.model_type == architecture.kind)
    paired = {"q": architecture.query_heads, "k": architecture.kv_heads} if family.paired else {}
    weight_of = {name: weight.name for name, (weight, _, _) in positions(architecture).items()}
    return Form(
        {name: paired[weight] for name, weight in weight_of.items() if weight in paired},
        frozenset(name for name, weight in weight_of.items() if weight.endswith("norm")),
        family.norm_offset,
    )
