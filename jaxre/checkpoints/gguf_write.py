"""A GGUF file of a model, for llama.cpp, and the Modelfile that Ollama makes a model of it with.

llama.cpp keeps vectors (norms, biases) in f32 whatever the matrices are; so does this. Nothing here
has run in Ollama.
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

BLOCK = 32  # values that share a scale in Q8_0
# general.file_type (llama.h, LLAMA_FTYPE): what most of the file is stored as.
FILE_TYPES = {"F32": 0, "F16": 1, "Q8_0": 7, "BF16": 32}
KINDS = {dtype: kind for kind, dtype in PLAIN.items()}
# Stand for a conversation's turns while its template is rendered; no template writes such words.
SYSTEM, USER = "THE-SYSTEM-TURN", "THE-USER-TURN"
LARGEST_Q8_0 = 127 * 65504.0  # the scale of a block is an f16


def kinds_of(architecture: Architecture, stored: dict[str, np.dtype], kind: str | None) -> dict:
    """Hugging Face name -> GGUF's word for what each tensor is stored as.

    Args:
      stored: dtypes of the source; kind: of the matrices, as the source has them if not given. In
        Q8_0 a matrix whose rows are no multiple of 32 is stored as F16.
    """
    kinds = {}
    for name, shape in hf_shapes(architecture).items():
        own = kind or KINDS[stored[name]]
        if len(shape) == 1:
            own = "F32"
        elif own == "Q8_0" and shape[-1] % BLOCK:
            own = "F16"
        kinds[name] = own
    return kinds


def value_dtype(kind: str) -> np.dtype:
    """The dtype of a tensor's values when it is read back."""
    return PLAIN.get(kind, PLAIN["F32"])


def through_q8_0(value: np.ndarray) -> np.ndarray:
    """What f32 values [..., a multiple of 32] are after Q8_0."""
    from gguf import GGMLQuantizationType
    from gguf.quants import dequantize

    return dequantize(_encoded(value, "Q8_0"), GGMLQuantizationType.Q8_0)


def _encoded(value: np.ndarray, kind: str) -> np.ndarray:
    """Values as a file stores them: a float type, or the bytes of blocks."""
    if kind != "Q8_0":
        return value
    from gguf import GGMLQuantizationType
    from gguf.quants import quantize

    if np.abs(value).max() > LARGEST_Q8_0:
        raise InputError("a weight is too large for the blocks of q8_0; use --dtype f32")
    return quantize(value, GGMLQuantizationType.Q8_0)


@dataclass(frozen=True)
class Speech:
    """What a file says besides weights: its tokenizer's fields and template, the token that ends an
    answer, and all that the template puts behind one.
    """

    fields: dict[str, Any]
    template: ChatTemplate | None
    stop: str | None
    end: str = ""


def speech_of(
    architecture: Architecture, side_files: dict[str, Path], like: Path, date: str
) -> Speech:
    """The tokenizer and template that a folder and an adapter's side files make together.

    Raises:
      InputError: a tokenizer that GGUF cannot say, or files that disagree.
    """
    if "tokenizer.json" not in side_files:
        raise InputError(f"{like}: no tokenizer.json; a GGUF file carries its tokenizer")
    with tempfile.TemporaryDirectory(prefix="jaxre-") as made:
        place = Path(made)
        copy_side_files(side_files, place)
        shutil.copyfile(like / "config.json", place / "config.json")
        tokenizer = load_tokenizer(place)
        fields = tokenizer_fields(place, tokenizer, architecture.vocabulary, str(like))
    fields["tokenizer.ggml.add_bos_token"] = architecture.kind == "gemma3_text"
    template, stop, end = None, tokenizer.eos_token, ""
    default = tokenizer.chat_template
    if isinstance(default, dict):
        default = default.get("default")
    if default:
        template = ChatTemplate(tokenizer, date, str(like))
        fields["tokenizer.chat_template"] = template.template
        turns = [{"role": "user", "content": "question"}]
        (answered,) = template.encode([(turns, "answer")])
        end = template.split(turns, "answer")[1].removeprefix("answer")
        supervised = answered.tokens[answered.prompt_length :]
        last = supervised[template.end_of_turn(supervised) - 1]
        if last in tokenizer.added_tokens_decoder:
            # What training supervised ends an answer, whatever else the tokenizer calls its end.
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
    """Writes a file; two tensors are held at a time.

    Args:
      kinds: as `kinds_of` gives them; tensors: (Hugging Face name, encoded array), in their order.
      name: what the file calls the model.
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
    own, shapes = names_of(architecture), hf_shapes(architecture)
    for tensor, kind in kinds.items():
        bytes_shape = _bytes_shape(shapes[tensor], kind)
        writer.add_tensor_info(
            own[tensor],
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
    """GGUF's name of an architecture; None where it has none."""
    names = {family.model_type: arch for arch, family in FAMILIES.items()}
    return names.get(architecture.kind)


def check_writable(architecture: AnyArchitecture, place: str) -> None:
    """Raises InputError for a model that has no form in GGUF."""
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
    paused = tuple((layer + 1) % 4 != 0 for layer in range(architecture.layers))
    if architecture.kind == "smollm3" and architecture.rotary != paused:
        raise InputError(
            f"{place}: llama.cpp leaves the rotation out in every fourth layer of smollm3, this"
            " model in others; use --to hf"
        )


def bytes_of(architecture: Architecture, kinds: dict[str, str]) -> int:
    """Bytes that the tensors of a file take."""
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
            f"{prefix}.attention.sliding_window_pattern",
            [bool(one) for one in architecture.sliding],
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
    """What `ollama create NAME -f Modelfile` reads. Ollama has templates of its own language, so
    the chat template is rendered once around a system and a user turn.

    Args:
      system: the system turn of training, if there was one.
    """
    lines = [f"FROM ./{file}"]
    template = speech.template
    if template is not None:
        turns = [{"role": "system", "content": SYSTEM}, {"role": "user", "content": USER}]
        whole, bare = (template.render(some, generation=True) for some in (turns, turns[1:]))
        before, _, rest = whole.partition(SYSTEM)
        between, _, after = rest.partition(USER)
        start = bare.partition(USER)[0]
        if speech.fields["tokenizer.ggml.add_bos_token"]:  # Ollama puts it in front itself
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
            "three quotes end a line of the system turn or template, which a Modelfile cannot say;"
            " change prompt.system, or use --to hf"
        )
    if system:
        lines.append(f'SYSTEM """{system}"""')
    if speech.stop:
        lines.append(f'PARAMETER stop "{speech.stop}"')
    lines += ["PARAMETER temperature 0", "PARAMETER repeat_penalty 1"]
    return "\n".join(lines) + "\n"


def _literal(text: str) -> str:
    """Text inside a template of Go."""
    return re.sub(r"\{\{|\{$", lambda found: f'{{{{ "{found.group()}" }}}}', text)
