"""Writes a GGUF file for llama.cpp, and the Modelfile from which Ollama creates a model.

Vectors (norms, biases) are stored in f32 whatever the type of the matrices, as llama.cpp does.
Nothing here has been run in Ollama.
"""

from __future__ import annotations

import math
import re
import shutil
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from jaxre.checkpoints.gguf import FAMILIES, PLAIN, ROPE_FACTORS, form_of, names_of, rope_factors
from jaxre.checkpoints.gguf_tokenizer import tokenizer_fields
from jaxre.checkpoints.huggingface import copy_side_files, hf_shapes
from jaxre.data.template import ChatTemplate
from jaxre.data.tokenizer import load_tokenizer
from jaxre.errors import InputError
from jaxre.models.architecture import Architecture, LinearScaling, RopeScaling
from jaxre.models.weights import AnyArchitecture

BLOCK = 32  # values per scale in Q8_0
# general.file_type (llama.h, LLAMA_FTYPE): the type of most tensors.
FILE_TYPES = {"F32": 0, "F16": 1, "Q8_0": 7, "BF16": 32}
KINDS = {dtype: kind for kind, dtype in PLAIN.items()}
# Placeholders for the turns while a template is rendered; no template contains such words.
SYSTEM, USER = "THE-SYSTEM-TURN", "THE-USER-TURN"
LARGEST_Q8_0 = 127 * 65504.0  # the scale of a block is an f16


def kinds_of(architecture: Architecture, stored: dict[str, np.dtype], kind: str | None) -> dict:
    """Hugging Face name -> GGUF's name of the type in which to store each tensor.

    Args:
      stored: dtypes of the source.
      kind: of the matrices; None keeps that of the source. With Q8_0, a matrix whose row length is
        not a multiple of 32 is stored as F16.
    """
    kinds = {}
    for name, shape in hf_shapes(architecture).items():
        kinds[name] = kind or KINDS[stored[name]]
        if len(shape) == 1:
            kinds[name] = "F32"
        elif kind == "Q8_0" and shape[-1] % BLOCK:
            kinds[name] = "F16"
    return kinds


def through_q8_0(value: np.ndarray) -> np.ndarray:
    """Rounds f32 values [..., a multiple of 32] to Q8_0 and back."""
    from gguf import GGMLQuantizationType
    from gguf.quants import dequantize

    return dequantize(_encoded(value, "Q8_0"), GGMLQuantizationType.Q8_0)


def _encoded(value: np.ndarray, kind: str) -> np.ndarray:
    """Values in the form of the file: a float type, or the bytes of Q8_0 blocks."""
    if kind != "Q8_0":
        return value
    from gguf import GGMLQuantizationType
    from gguf.quants import quantize

    if np.abs(value).max() > LARGEST_Q8_0:
        raise InputError("a weight is too large for the blocks of q8_0; use --dtype f32")
    return quantize(value, GGMLQuantizationType.Q8_0)


@dataclass(frozen=True)
class Speech:
    """The tokenizer's GGUF fields, the chat template, the token that ends an answer, and the text
    that the template puts after an answer.
    """

    fields: dict[str, Any]
    template: ChatTemplate | None
    stop: str | None
    end: str = ""


def speech_of(
    architecture: Architecture, side_files: dict[str, Path], like: Path, date: str
) -> Speech:
    """The tokenizer and template of a folder together with an adapter's side files.

    Raises:
      InputError: a tokenizer that GGUF cannot express, or files that disagree.
    """
    if "tokenizer.json" not in side_files:
        raise InputError(f"{like}: no tokenizer.json; a GGUF file carries its tokenizer")
    with tempfile.TemporaryDirectory(prefix="jaxre-") as temporary:
        folder = Path(temporary)
        copy_side_files(side_files, folder)
        shutil.copyfile(like / "config.json", folder / "config.json")
        tokenizer = load_tokenizer(folder)
        fields = tokenizer_fields(folder, tokenizer, architecture.vocabulary, str(like))
    fields["tokenizer.ggml.add_bos_token"] = architecture.kind == "gemma3_text"
    template, stop, end = None, tokenizer.eos_token, ""
    default = tokenizer.chat_template
    if isinstance(default, dict):
        default = default.get("default")
    if default:
        template = ChatTemplate(tokenizer, date, str(like))
        fields["tokenizer.chat_template"] = template.template
        turns = [{"role": "user", "content": "question"}]
        (encoded,) = template.encode([(turns, "answer")])
        end = template.split(turns, "answer")[1].removeprefix("answer")
        supervised = encoded.tokens[encoded.prompt_length :]
        last = supervised[template.end_of_turn(supervised) - 1]
        if last in tokenizer.added_tokens_decoder:
            # The last supervised token ends an answer, whatever end the tokenizer declares.
            fields["tokenizer.ggml.eos_token_id"] = fields["tokenizer.ggml.eot_token_id"] = last
            stop = tokenizer.convert_ids_to_tokens(last)
    return Speech(fields, template, stop, end)


def write_gguf(
    path: Path,
    architecture: Architecture,
    kinds: dict[str, str],
    tensors: Iterable[tuple[str, np.ndarray]],
    speech: Speech,
    name: str,
) -> None:
    """Writes a file; holds two tensors at a time.

    Args:
      kinds: from `kinds_of`.
      tensors: (Hugging Face name, array) in the order of `kinds`.
      name: of the model, recorded in the file.
    """
    from gguf import GGMLQuantizationType, GGUFWriter

    writer = GGUFWriter(path, arch_of(architecture))
    writer.add_string("general.type", "model")
    writer.add_string("general.name", name)
    main = max(set(kinds.values()) - {"F32"}, default="F32", key=list(kinds.values()).count)
    writer.add_file_type(FILE_TYPES[main])
    if main == "Q8_0":
        writer.add_quantization_version(2)
    _add_sizes(writer, architecture)
    for field, value in speech.fields.items():
        _add_field(writer, field, value)
    factors = rope_factors(architecture)
    if factors is not None:
        writer.add_tensor_info(ROPE_FACTORS, factors.shape, factors.dtype, factors.nbytes)
    gguf_names, shapes = names_of(architecture), hf_shapes(architecture)
    for tensor, kind in kinds.items():
        bytes_shape = _bytes_shape(shapes[tensor], kind)
        writer.add_tensor_info(
            gguf_names[tensor],
            bytes_shape if kind == "Q8_0" else shapes[tensor],
            np.dtype(np.uint8 if kind == "Q8_0" else np.float32),
            int(np.prod(bytes_shape)),
            raw_dtype=GGMLQuantizationType[kind],
        )
    try:
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        if factors is not None:
            writer.write_tensor_data(factors)
        form = form_of(architecture)
        for (tensor, value), expected in zip(tensors, kinds, strict=True):
            if tensor != expected:
                raise ValueError(f"{tensor} came where {expected} is written")
            value = _encoded(form.to_gguf(tensor, value), kinds[tensor])
            writer.write_tensor_data(np.ascontiguousarray(value).view(np.uint8))
    finally:
        writer.close()


def arch_of(architecture: Architecture) -> str | None:
    """GGUF's name of an architecture; None if it has none."""
    names = {family.model_type: arch for arch, family in FAMILIES.items()}
    return names.get(architecture.kind)


def check_writable(architecture: AnyArchitecture, place: str) -> None:
    """Raises InputError for a model that GGUF cannot express."""
    if arch_of(architecture) is None:
        raise InputError(f"{place}: {architecture.kind} has no form in GGUF here; use --to hf")
    linear = isinstance(architecture.rope_scaling, LinearScaling)
    scale = architecture.score_scale
    if linear or scale not in (None, architecture.head_channels**-0.5):
        raise InputError(
            f"{place}: its rope scaling or query_pre_attn_scalar is not that of a small Gemma 3,"
            " which is not written; use --to hf"
        )
    if isinstance(architecture.rope_scaling, RopeScaling) and architecture.kind != "llama":
        raise InputError(
            f"{place}: llama.cpp scales the rotation of llama alone, not of {architecture.kind};"
            " use --to hf"
        )
    rotary = tuple((layer + 1) % 4 != 0 for layer in range(architecture.layers))
    if architecture.kind == "smollm3" and architecture.rotary != rotary:
        raise InputError(
            f"{place}: llama.cpp leaves the rotation out in every fourth layer of smollm3, this"
            " model in others; use --to hf"
        )


def bytes_of(architecture: Architecture, kinds: dict[str, str]) -> int:
    """Total bytes of the tensors of a file."""
    shapes = hf_shapes(architecture)
    return sum(math.prod(_bytes_shape(shapes[name], kind)) for name, kind in kinds.items())


def _bytes_shape(shape: tuple[int, ...], kind: str) -> tuple[int, ...]:
    if kind == "Q8_0":
        return (*shape[:-1], shape[-1] // BLOCK * (BLOCK + 2))
    return (*shape[:-1], shape[-1] * PLAIN[kind].itemsize)


def _add_sizes(writer: Any, architecture: Architecture) -> None:
    writer.add_context_length(architecture.max_length)
    writer.add_embedding_length(architecture.embedding)
    writer.add_block_count(architecture.layers)
    writer.add_feed_forward_length(architecture.feed_forward)
    writer.add_head_count(architecture.query_heads)
    writer.add_head_count_kv(architecture.kv_heads)
    writer.add_key_length(architecture.head_channels)
    writer.add_value_length(architecture.head_channels)
    writer.add_layer_norm_rms_eps(architecture.norm_epsilon)
    writer.add_rope_freq_base(architecture.rope_theta)
    writer.add_rope_dimension_count(architecture.head_channels)
    writer.add_vocab_size(architecture.vocabulary)
    if architecture.window is not None:
        writer.add_sliding_window(architecture.window)
        prefix = arch_of(architecture)
        writer.add_float32(f"{prefix}.rope.freq_base_swa", architecture.local_rope_theta)
        writer.add_array(
            f"{prefix}.attention.sliding_window_pattern", list(map(bool, architecture.sliding))
        )


def _add_field(writer: Any, name: str, value: Any) -> None:
    if isinstance(value, bool):
        writer.add_bool(name, value)
    elif isinstance(value, int):
        writer.add_uint32(name, value)
    elif isinstance(value, str):
        writer.add_string(name, value)
    else:
        writer.add_array(name, value)


def modelfile(file: str, speech: Speech, system: str | None) -> str:
    """Text for `ollama create NAME -f Modelfile`. Ollama has its own template language, so the chat
    template is rendered once around a system and a user turn.

    Args:
      system: the system turn of training, if any.
    """
    lines = [f"FROM ./{file}"]
    template = speech.template
    if template is not None:
        turns = [{"role": "system", "content": SYSTEM}, {"role": "user", "content": USER}]
        before, _, rest = template.render(turns, generation=True).partition(SYSTEM)
        between, _, after = rest.partition(USER)
        start = template.render(turns[1:], generation=True).partition(USER)[0]
        if speech.fields["tokenizer.ggml.add_bos_token"]:  # Ollama adds it itself
            bos = template.tokenizer.bos_token or ""
            before, start = before.removeprefix(bos), start.removeprefix(bos)
        before, between, after, start = map(_literal, (before, between, after, start))
        end = _literal(speech.end)
        lines.append(
            f'TEMPLATE """{{{{ if .System }}}}{before}{{{{ .System }}}}{between}'
            f'{{{{ else }}}}{start}{{{{ end }}}}{{{{ .Prompt }}}}{after}{{{{ .Response }}}}{end}"""'
        )
    if any(re.search(r'"""[ \t]*(\n|$)', text) for text in (system or "", lines[-1][:-3])):
        raise InputError(
            "three quotes end a line of the system turn or template, which a Modelfile cannot"
            " express; change prompt.system, or use --to hf"
        )
    if system:
        lines.append(f'SYSTEM """{system}"""')
    if speech.stop:
        lines.append(f'PARAMETER stop "{speech.stop}"')
    lines += ["PARAMETER temperature 0", "PARAMETER repeat_penalty 1"]
    return "\n".join(lines) + "\n"


def _literal(text: str) -> str:
    """Text escaped for a Go template."""
    return re.sub(r"\{\{|\{$", lambda braces: f'{{{{ "{braces.group()}" }}}}', text)
