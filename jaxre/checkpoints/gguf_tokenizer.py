"""Converts the tokenizer of a GGUF file to the files of a Hugging Face folder, and back.

GGUF stores the vocabulary, the merges and the name of a pre-tokenizer (`tokenizer.ggml.pre`).
llama.cpp's code (`src/llama-vocab.cpp`) defines these names; PRES gives their equivalents in
tokenizer.json. Two kinds are supported: byte-level BPE (`gpt2`), and Gemma's SentencePiece (`llama`
in a gemma file), whose merges follow from the scores.

llama.cpp supports neither normalisers nor added tokens that strip white space: it tokenises text
that is not in Unicode form C differently from Qwen's own tokenizer, and a tokenizer with such added
tokens is not written.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from jaxre.data.tokenizer import without
from jaxre.errors import InputError

# Values of tokenizer.ggml.token_type.
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6

_CONTRACTIONS = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_WORD = r"|[^\r\n\p{L}\p{N}]?\p{L}+"


def _byte_level(use_regex: bool) -> dict[str, Any]:
    return {
        "type": "ByteLevel",
        "add_prefix_space": False,
        "trim_offsets": True,
        "use_regex": use_regex,
    }


def _split(pattern: str) -> dict[str, Any]:
    return {
        "type": "Sequence",
        "pretokenizers": [
            {
                "type": "Split",
                "pattern": {"Regex": pattern},
                "behavior": "Isolated",
                "invert": False,
            },
            _byte_level(use_regex=False),
        ],
    }


@dataclass(frozen=True)
class Pre:
    """The meaning of a name in `tokenizer.ggml.pre`: the settings of tokenizer.json, and the class
    of transformers that builds the same tokenizer.
    """

    pre_tokenizer: dict[str, Any]
    class_name: str
    normalizer: dict[str, Any] | None = None
    ignore_merges: bool = False


# Follows tokenizer.json, in transformers 4 and 5.
GENERIC = "PreTrainedTokenizerFast"
PRES = {
    "qwen2": Pre(
        _split(_CONTRACTIONS + _WORD + r"|\p{N}" + _REST), "Qwen2Tokenizer", {"type": "NFC"}
    ),
    "smollm": Pre(
        {
            "type": "Sequence",
            "pretokenizers": [
                {"type": "Digits", "individual_digits": True},
                _byte_level(use_regex=True),
            ],
        },
        GENERIC,
    ),
    "llama-bpe": Pre(
        _split(_CONTRACTIONS + _WORD + r"|\p{N}{1,3}" + _REST),
        GENERIC,
        ignore_merges=True,
    ),
    "gpt-2": Pre(_byte_level(use_regex=True), GENERIC),
}
SYNONYMS = {"llama3": "llama-bpe", "llama-v3": "llama-bpe", "deepseek-r1-qwen": "qwen2"}

_SPACE, _BYTE = "▁", re.compile("<0x[0-9A-F]{2}>")
GEMMA = {
    "normalizer": {"type": "Replace", "pattern": {"String": " "}, "content": _SPACE},
    "pre_tokenizer": {
        "type": "Split",
        "pattern": {"String": " "},
        "behavior": "MergedWithPrevious",
        "invert": False,
    },
    "decoder": {
        "type": "Sequence",
        "decoders": [
            {"type": "Replace", "pattern": {"String": _SPACE}, "content": " "},
            {"type": "ByteFallback"},
            {"type": "Fuse"},
        ],
    },
}
# Gemma's turns (from its model card), for a pretrained file without a template. Like Google's own
# it refuses a system turn, whose text then goes into the first user turn.
GEMMA_TEMPLATE = (
    "{{ bos_token }}{%- for message in messages -%}"
    "{%- if message['role'] == 'system' -%}"
    "{{ raise_exception('System role not supported') }}{%- endif -%}"
    "{{ '<start_of_turn>' + ('model' if message['role'] == 'assistant' else message['role'])"
    " + '\\n' + message['content'] | trim + '<end_of_turn>\\n' }}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{ '<start_of_turn>model\\n' }}{%- endif -%}"
)


def tokenizer_files(
    fields: dict[str, Any], vocabulary: int, place: Path
) -> dict[str, dict[str, Any] | str]:
    """Name -> content of tokenizer.json, tokenizer_config.json and chat_template.jinja.

    Args:
      fields: of the file.
      vocabulary: rows of its embeddings.

    Raises:
      InputError: an unsupported tokenizer, or one with more tokens than embeddings.
    """
    model = fields.get("tokenizer.ggml.model")
    tokens, types = (fields.get(f"tokenizer.ggml.{name}") for name in ("tokens", "token_type"))
    if not isinstance(tokens, list) or not isinstance(types, list) or len(tokens) != len(types):
        raise InputError(f"{place}: has no whole vocabulary; download it again")
    if len(tokens) > vocabulary:
        raise InputError(
            f"{place}: {len(tokens)} tokens, but {vocabulary} embeddings; download it again"
        )
    gemma = model == "llama" and fields["general.architecture"] == "gemma3"
    if gemma:
        tokenizer, class_name = _gemma(fields, tokens, place), "GemmaTokenizer"
    elif model == "gpt2":
        tokenizer, class_name = _byte_level_bpe(fields, tokens, types, place)
    else:
        raise InputError(
            f"{place}: tokenizer.ggml.model {model!r} is not supported, byte-level BPE (gpt2) and"
            " Gemma's are; take the Hugging Face folder of the model"
        )
    kinds = (CONTROL, USER_DEFINED, UNKNOWN) if gemma else (CONTROL, USER_DEFINED)
    tokenizer["added_tokens"] = [
        {
            "id": number,
            "content": token,
            "single_word": False,
            "lstrip": False,
            "rstrip": False,
            "normalized": False,
            "special": kind != USER_DEFINED,
        }
        for number, (token, kind) in enumerate(zip(tokens, types, strict=True))
        if kind in kinds
    ]
    config: dict[str, Any] = {
        "tokenizer_class": class_name,
        "clean_up_tokenization_spaces": False,
        "model_max_length": fields.get(f"{fields['general.architecture']}.context_length"),
    }
    names = (("bos", "bos"), ("eos", "eos"), ("pad", "padding"), ("unk", "unknown"))
    for name, field in names:
        number = fields.get(f"tokenizer.ggml.{field}_token_id")
        if number is not None and 0 <= number < len(tokens):
            config[f"{name}_token"] = tokens[number]
    files = {"tokenizer.json": tokenizer, "tokenizer_config.json": config}
    template = fields.get("tokenizer.chat_template") or (GEMMA_TEMPLATE if gemma else None)
    if template:
        files["chat_template.jinja"] = template
    return files


def _byte_level_bpe(
    fields: dict[str, Any], tokens: list[str], types: list[int], place: Path
) -> tuple[dict[str, Any], str]:
    name = fields.get("tokenizer.ggml.pre")
    pre = PRES.get(SYNONYMS.get(name, name))
    if pre is None:
        raise InputError(
            f"{place}: tokenizer.ggml.pre {name!r} is not known; known are"
            f" {', '.join((*PRES, *SYNONYMS))}"
        )
    merges = fields.get("tokenizer.ggml.merges")
    if not isinstance(merges, list):
        raise InputError(f"{place}: has no tokenizer.ggml.merges; download it again")
    # Includes the added tokens: one missing from the vocabulary is renumbered when it is read.
    vocabulary = {
        token: number
        for number, (token, kind) in enumerate(zip(tokens, types, strict=True))
        if kind != UNUSED
    }
    tokenizer = _bpe_tokenizer(
        vocabulary, [_pair(merge, place) for merge in merges], ignore_merges=pre.ignore_merges
    )
    return tokenizer | {
        "normalizer": pre.normalizer,
        "pre_tokenizer": pre.pre_tokenizer,
        "post_processor": _bos_processor(fields, tokens),
        "decoder": _byte_level(use_regex=True),
    }, pre.class_name


def _bos_processor(fields: dict[str, Any], tokens: list[str]) -> dict[str, Any] | None:
    """The post-processor that puts the beginning-of-text token first; None if the file has none."""
    number = fields.get("tokenizer.ggml.bos_token_id")
    if fields.get("tokenizer.ggml.add_bos_token") is not True or number is None:
        return None
    token = {"SpecialToken": {"id": tokens[number], "type_id": 0}}
    first, second = ({"Sequence": {"id": name, "type_id": 0}} for name in "AB")
    return {
        "type": "TemplateProcessing",
        "single": [token, first],
        "pair": [token, first, second],
        "special_tokens": {
            tokens[number]: {"id": tokens[number], "ids": [number], "tokens": [tokens[number]]}
        },
    }


def _pair(merge: Any, place: Path | str) -> list[str]:
    """The two sides of a merge, split like llama.cpp at the first space after a character."""
    cut = merge.find(" ", 1) if isinstance(merge, str) else -1
    if cut < 0:
        raise InputError(f"{place}: the merge {merge!r} has no two sides; download it again")
    return [merge[:cut], merge[cut + 1 :]]


def _bpe_tokenizer(
    vocabulary: dict[str, int], merges: list[list[str]], **settings: Any
) -> dict[str, Any]:
    """tokenizer.json of a BPE model with these settings, without its processing of text."""
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [],
        "post_processor": None,
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": False,
            "vocab": vocabulary,
            "merges": merges,
            **settings,
        },
    }


def _gemma(fields: dict[str, Any], tokens: list[str], place: Path) -> dict[str, Any]:
    """Converts SentencePiece's BPE to merges: every pair of pieces that forms a piece, the piece
    with the best score first (as transformers converts Gemma's tokenizer.model).
    """
    ids = {token: number for number, token in enumerate(tokens)}
    scores = fields.get("tokenizer.ggml.scores") or []
    unknown = fields.get("tokenizer.ggml.unknown_token_id", 3)
    if len(scores) != len(tokens) or not 0 <= unknown < len(tokens):
        raise InputError(f"{place}: has no whole vocabulary; download it again")
    merges = []
    for piece, number in ids.items():
        for cut in range(1, len(piece)):
            left, right = piece[:cut], piece[cut:]
            if left in ids and right in ids:
                merges.append((-scores[number], number, ids[left], ids[right], left, right))
    merges.sort(key=lambda merge: (merge[0], -len(merge[4]), -len(merge[5]), merge[1:4]))
    tokenizer = _bpe_tokenizer(
        ids,
        [[left, right] for *_, left, right in merges],
        unk_token=tokens[unknown],
        fuse_unk=True,
        byte_fallback=True,
    )
    return tokenizer | GEMMA


def tokenizer_fields(
    folder: Path, tokenizer: PreTrainedTokenizerBase, vocabulary: int, place: str
) -> dict[str, Any]:
    """The GGUF fields that describe a folder's tokenizer.

    Args:
      tokenizer: the folder's, as transformers loads it.
      vocabulary: rows of the embeddings.

    Raises:
      InputError: a tokenizer that GGUF or llama.cpp cannot express; the message starts with
        `place`.
    """
    parts = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    model, gemma = parts["model"], _same(parts, GEMMA, ("normalizer", "pre_tokenizer"))
    names = [
        name
        for name, pre in PRES.items()
        if _same(parts, {"normalizer": pre.normalizer, "pre_tokenizer": pre.pre_tokenizer})
        and bool(model.get("ignore_merges")) == pre.ignore_merges
    ]
    if model.get("type") != "BPE" or not (gemma or names):
        raise InputError(
            f"{place}: its pre-tokenizer is none of {', '.join(PRES)} and Gemma's, which llama.cpp"
            " has a name for; use --to hf"
        )
    ids = dict(model["vocab"])
    kinds = dict.fromkeys(ids, NORMAL)
    for token in parts["added_tokens"]:
        unsupported = [name for name in ("lstrip", "rstrip", "single_word") if token[name]]
        if unsupported or (token["normalized"] and parts["normalizer"] is not None):
            raise InputError(
                f"{place}: the added token {token['content']!r} has"
                f" {', '.join(unsupported) or 'normalized'} set, which llama.cpp does not support;"
                " use --to hf"
            )
        ids[token["content"]] = token["id"]
        kinds[token["content"]] = CONTROL if token["special"] else USER_DEFINED
    if gemma:
        kinds |= {token: BYTE for token in ids if _BYTE.fullmatch(token)}
        kinds[model["unk_token"]] = UNKNOWN
    tokens = [f"[PAD{number}]" for number in range(vocabulary)]
    types = [UNUSED] * vocabulary
    for token, number in ids.items():
        if number < vocabulary:  # Gemma's tokenizer has one more, for images
            tokens[number], types[number] = token, kinds[token]
    merges = [_pair(merge, place) if isinstance(merge, str) else merge for merge in model["merges"]]
    ambiguous = [f"{left} {right}" for left, right in merges if " " in left[1:] or not right]
    if ambiguous and not gemma:
        raise InputError(
            f"{place}: the merge {ambiguous[0]!r} has a space inside, which GGUF cannot express;"
            " use --to hf"
        )
    fields: dict[str, Any] = {
        "tokenizer.ggml.model": "llama" if gemma else "gpt2",
        "tokenizer.ggml.pre": "default" if gemma else names[0],
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": types,
    }
    if gemma:
        fields["tokenizer.ggml.scores"] = _scores(tokens, types, merges)
        fields["tokenizer.ggml.add_space_prefix"] = False
    else:
        fields["tokenizer.ggml.merges"] = [f"{left} {right}" for left, right in merges]
    for name, field in (("bos", "bos"), ("eos", "eos"), ("pad", "padding"), ("unk", "unknown")):
        number = getattr(tokenizer, f"{name}_token_id")
        if number is not None:
            fields[f"tokenizer.ggml.{field}_token_id"] = number
    return fields


def _same(parts: dict[str, Any], expected: dict[str, Any], names: Sequence[str] = ()) -> bool:
    return all(
        without(parts.get(name), "trim_offsets") == without(expected[name], "trim_offsets")
        for name in names or expected
    )


def _scores(tokens: list[str], types: list[int], merges: list[list[str]]) -> list[float]:
    """SentencePiece's scores: the piece that is merged first has the best one."""
    first_rank: dict[str, int] = {}
    for rank, (left, right) in enumerate(merges):
        first_rank.setdefault(left + right, rank)

    def score(token: str, kind: int) -> float:
        if kind in (CONTROL, USER_DEFINED, UNUSED, UNKNOWN) and token not in first_rank:
            return -1000.0
        return 0.0 if kind == BYTE else -float(first_rank.get(token, len(merges)))

    return list(map(score, tokens, types))
