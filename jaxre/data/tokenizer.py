"""The tokenizer of a model folder, and the proof that its files agree on the data.

A folder may describe its tokenizer twice: `tokenizer.json` states a pre-tokenizer and a normaliser,
and transformers builds those of the class that `config.json` or `tokenizer_config.json` names and
ignores the file's (Qwen2, GPT-2). What is trained on one and served by a program that reads the
other answers differently, so every text is tokenised by both, and a difference stops the run.
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
    """The tokenizer of a model folder, as transformers builds it. Raises InputError if there is
    none.
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
    # Read by `token_ids`. None where both are built alike, which saves tokenising twice.
    tokenizer.stated = None if same else stated
    return tokenizer


def tokenizer_digest(tokenizer: PreTrainedTokenizerBase) -> str:
    """Digest of a tokenizer, but for its truncation and padding, which a call switches on and
    off.
    """
    backend = json.loads(tokenizer.backend_tokenizer.to_str())
    kept = {name: value for name, value in backend.items() if name not in ("truncation", "padding")}
    return hashlib.sha256(json.dumps(kept).encode()).hexdigest()


def token_ids(
    tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], special: bool = False
) -> list[list[int]]:
    """Token ids of each text.

    Args:
      special: adds the tokenizer's own first and last token.

    Raises:
      InputError: `tokenizer.json` gives other tokens than transformers for one of the texts.
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
        found = stated.encode_batch_fast(list(texts), add_special_tokens=special)
        for text, own, other in zip(texts, ids, found, strict=True):
            if own != other.ids:
                _refuse(tokenizer, text, own, other.ids)
    return ids


def add_tokens(tokenizer: PreTrainedTokenizerBase, tokens: Sequence[Any]) -> None:
    """Adds `AddedToken`s to the tokenizer, and to the one that its file states."""
    tokenizer.add_tokens(list(tokens))
    stated = getattr(tokenizer, "stated", None)
    if stated is not None:
        for token in tokens:  # in their order, which numbers them
            (stated.add_special_tokens if token.special else stated.add_tokens)([token])


def _pipeline(tokenizer: Tokenizer) -> dict[str, Any]:
    """What decides the ids of a text: the file without offsets, decoding, cutting and padding."""
    parts = json.loads(tokenizer.to_str())
    for name in ("version", "truncation", "padding", "decoder"):
        parts.pop(name, None)
    after = parts["post_processor"] or {}
    # Moves offsets, or puts no token anywhere.
    if after.get("type") == "ByteLevel" or after.get("special_tokens") == {}:
        parts["post_processor"] = None
    model = parts["model"]
    for name in ("continuing_subword_prefix", "end_of_word_suffix"):
        model[name] = model.get(name) or None
    parts["added_tokens"] = [{**token, "special": None} for token in parts["added_tokens"]]
    return without(parts, "trim_offsets")


def without(value: Any, name: str) -> Any:
    """Nested dictionaries without one key, wherever it stands."""
    if isinstance(value, dict):
        return {key: without(one, name) for key, one in value.items() if key != name}
    # Merges are lists of lists, 150,000 of them, and hold no settings.
    if isinstance(value, list) and value and isinstance(value[0], dict):
        return [without(one, name) for one in value]
    return value


def _refuse(
    tokenizer: PreTrainedTokenizerBase, text: str, own: Sequence[int], other: Sequence[int]
) -> None:
    same = next(
        (i for i, (one, two) in enumerate(zip(own, other, strict=False)) if one != two),
        min(len(own), len(other)),
    )
    start = tokenizer.decode(own[:same])
    here = text[len(start) :][:SHOWN] if text.startswith(start) else text[:SHOWN]
    one, two = (tokenizer.convert_ids_to_tokens(list(ids[same : same + 3])) for ids in (own, other))
    raise InputError(
        f"{tokenizer.name_or_path}: its files disagree on the tokens of {here!r}: transformers"
        f" ({type(tokenizer).__name__}) gives {one}, {FILE} {two}; a model tuned on one answers"
        " differently where the other is read. If transformers' are right, write the file again"
        " with AutoTokenizer.from_pretrained(FOLDER).save_pretrained(FOLDER)"
    )
