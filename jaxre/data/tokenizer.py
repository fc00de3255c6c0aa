"""Loads the tokenizer of a model folder and checks that its files agree on the data.

A folder may describe its tokenizer twice: `tokenizer.json` has a pre-tokenizer and a normaliser,
but for some classes (Qwen2, GPT-2) that `config.json` or `tokenizer_config.json` names,
transformers ignores these and builds its own. A model that is trained with one tokenizer and served
with the other answers differently, so every text is tokenised by both, and a difference stops the
run.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from jaxre.errors import InputError, first_line

FILE = "tokenizer.json"
# Characters shown on each side of the first difference.
SHOWN = 20


def load_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """Loads the tokenizer of a model folder, as transformers builds it. Raises InputError if that
    fails.
    """
    path = folder / FILE
    if not path.is_file():
        raise InputError(f"{folder}: no {FILE}; a model folder carries its tokenizer")
    try:
        tokenizer = AutoTokenizer.from_pretrained(str(folder), local_files_only=True)
        stated = Tokenizer.from_file(str(path))
    except Exception as error:  # noqa: BLE001 (tokenizers raises bare Exception)
        raise InputError(
            f"{folder}: the tokenizer does not load ({first_line(error)}); download it again"
        ) from None
    stated.no_truncation()
    stated.no_padding()
    same = _pipeline(tokenizer.backend_tokenizer) == _pipeline(stated)
    # Read by `token_ids`. None if both are built identically, which saves tokenising twice.
    tokenizer.stated = None if same else stated
    return tokenizer


def tokenizer_digest(tokenizer: PreTrainedTokenizerBase) -> str:
    """Digest of a tokenizer without its truncation and padding, which calls switch on and off."""
    parts = json.loads(tokenizer.backend_tokenizer.to_str())
    parts = {name: value for name, value in parts.items() if name not in ("truncation", "padding")}
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def token_ids(
    tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], special: bool = False
) -> list[list[int]]:
    """Token ids of each text.

    Args:
      special: adds the tokenizer's own first and last token.

    Raises:
      InputError: `tokenizer.json` and transformers tokenise one of the texts differently.
    """
    if not texts:
        return []
    ids = tokenizer(
        list(texts),
        add_special_tokens=special,
        return_attention_mask=False,
        return_token_type_ids=False,
        verbose=False,
    )["input_ids"]
    stated = getattr(tokenizer, "stated", None)
    if stated is not None:
        from_file = stated.encode_batch_fast(list(texts), add_special_tokens=special)
        for text, own, other in zip(texts, ids, from_file, strict=True):
            if own != other.ids:
                _refuse(tokenizer, text, own, other.ids)
    return ids


def add_tokens(tokenizer: PreTrainedTokenizerBase, tokens: Sequence[Any]) -> None:
    """Adds `AddedToken`s to the tokenizer, and to that of its `tokenizer.json` if it differs."""
    tokenizer.add_tokens(list(tokens))
    stated = getattr(tokenizer, "stated", None)
    if stated is not None:
        for token in tokens:  # in order, which determines their ids
            (stated.add_special_tokens if token.special else stated.add_tokens)([token])


def _pipeline(tokenizer: Tokenizer) -> dict[str, Any]:
    """The parts of tokenizer.json that determine token ids: no offsets, decoder, truncation or
    padding.
    """
    parts = json.loads(tokenizer.to_str())
    for name in ("version", "truncation", "padding", "decoder"):
        parts.pop(name, None)
    after = parts["post_processor"] or {}
    # Changes offsets only, or adds no token.
    if after.get("type") == "ByteLevel" or after.get("special_tokens") == {}:
        parts["post_processor"] = None
    model = parts["model"]
    for name in ("continuing_subword_prefix", "end_of_word_suffix"):
        model[name] = model.get(name) or None
    parts["added_tokens"] = [{**token, "special": None} for token in parts["added_tokens"]]
    return without(parts, "trim_offsets")


def without(value: Any, name: str) -> Any:
    """Nested dictionaries without the key `name` at any level."""
    if isinstance(value, dict):
        return {key: without(inner, name) for key, inner in value.items() if key != name}
    # Merges, 150,000 lists without settings, are skipped.
    if isinstance(value, list) and value and isinstance(value[0], dict):
        return [without(inner, name) for inner in value]
    return value


def common_length(a: Sequence, b: Sequence) -> int:
    """Length of the common prefix of two sequences."""
    pairs = enumerate(zip(a, b, strict=False))
    return next((i for i, (x, y) in pairs if x != y), min(len(a), len(b)))


def _refuse(
    tokenizer: PreTrainedTokenizerBase, text: str, own: Sequence[int], other: Sequence[int]
) -> None:
    same = common_length(own, other)
    start = tokenizer.decode(own[:same])
    here = text[len(start) :][:SHOWN] if text.startswith(start) else text[:SHOWN]
    built, stated = (
        tokenizer.convert_ids_to_tokens(list(ids[same : same + 3])) for ids in (own, other)
    )
    raise InputError(
        f"{tokenizer.name_or_path}: its files disagree on the tokens of {here!r}: transformers"
        f" ({type(tokenizer).__name__}) gives {built}, {FILE} {stated}; a model tuned on one"
        " answers differently where the other is read. If transformers' are right, write the file"
        " again with AutoTokenizer.from_pretrained(FOLDER).save_pretrained(FOLDER)"
    )
