"""An encoder's input: the text with typed entity markers, each a token of its own.

    The [E1:PERSON] Ada Lovelace [/E1:PERSON] wrote the [E2:WORK] Notes [/E2:WORK].

Markers are untyped (`[E1]`) if an example has no entity types or a type did not occur in training.
(Study: protocol, encoder baseline; typed entity markers: Zhou & Chen 2021, arXiv:2102.01373,
section 3.) The tokenizer determines the markers: training adds missing ones, prediction uses those
that exist.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Sequence

from tokenizers import AddedToken
from transformers import PreTrainedTokenizerBase

from jaxre.data.template import Encoded
from jaxre.data.tokenizer import add_tokens, token_ids, tokenizer_digest
from jaxre.data.tokens import FORMAT, TokenSet
from jaxre.errors import InputError
from jaxre.relations.marks import insert_marks, locate
from jaxre.relations.schema import Example

_DESCRIBED = {"E1": "@", "E2": "#"}
_MARKER = re.compile(r"\[/?E[12](:.*)?\]", re.DOTALL)


def markers(role: str, kind: str | None = None) -> tuple[str, str]:
    """The markers before and after an entity of type `kind`; role is E1 (head) or E2 (tail)."""
    name = f"{role}:{kind}" if kind else role
    return f"[{name}]", f"[/{name}]"


def add_markers(
    tokenizer: PreTrainedTokenizerBase, train: Iterable[Example]
) -> dict[int, list[int]]:
    """Adds the markers of the training examples and the untyped markers to the tokenizer.

    A marker strips the white space before it, so that RoBERTa tokenises the words around it as
    usual.

    Returns:
      For each new marker, id -> ids of tokens that describe it: `@` or `#`, which worked best for
      Zhou & Chen, and the words of the type.

    Raises:
      InputError: the tokenizer's ids have gaps, so that a new token would get the id of another.
    """
    typed = {marker for example in train for pair in _markers_of(example) for marker in pair}
    names = [*markers("E1"), *markers("E2"), *sorted(typed - {*markers("E1"), *markers("E2")})]
    new = [name for name in names if name not in tokenizer.added_tokens_encoder]
    taken = set(tokenizer.get_vocab().values())
    described = token_ids(tokenizer, [_description(name) for name in new])
    add_tokens(
        tokenizer, [AddedToken(name, lstrip=True, normalized=False, special=True) for name in new]
    )
    ids = tokenizer.convert_tokens_to_ids(new)
    if taken.intersection(ids):
        raise InputError(
            "the tokenizer's ids have gaps, so its new tokens would take the ids of others; number"
            " its vocabulary without gaps"
        )
    return dict(zip(ids, described, strict=True))


def markers_in(tokenizer: PreTrainedTokenizerBase) -> frozenset[str]:
    """The markers in a tokenizer."""
    return frozenset(token for token in tokenizer.added_tokens_encoder if _MARKER.fullmatch(token))


def unknown_types(examples: Iterable[Example], known: frozenset[str]) -> list[str]:
    """Ids of the examples with an entity type that has no marker, or without a type where typed
    markers exist.
    """
    typed = {
        role for role in ("E1", "E2") if any(marker.startswith(f"[{role}:") for marker in known)
    }

    def is_unknown(role: str, kind: str | None) -> bool:
        return markers(role, kind)[0] not in known if kind else role in typed

    return [
        example.id
        for example in examples
        if is_unknown("E1", example.head_type) or is_unknown("E2", example.tail_type)
    ]


def marked_text(example: Example, known: frozenset[str]) -> str:
    """The encoder's input. An entity that is not in the text (`marks.locate`) is not marked.

    Args:
      known: `markers_in` the tokenizer.

    Raises:
      InputError: the text contains a marker.
    """
    present = next((marker for marker in known if marker in example.text), None)
    if present:
        raise InputError(
            f"example {example.id}: the text holds {present}, which marks an entity here; write it"
            " another way"
        )
    tags = ()
    for role, pair in zip(("E1", "E2"), _markers_of(example), strict=True):
        before, after = pair if pair[0] in known else markers(role)
        tags += (f"{before} ", f" {after}")
    spans = locate(example.text, example.head, example.tail, example.head_span, example.tail_span)
    return insert_marks(example.text, *spans, tags)


def encode_marked(
    examples: Sequence[Example], texts: Sequence[str], tokenizer: PreTrainedTokenizerBase
) -> TokenSet:
    """Tokenises marked texts, with the tokenizer's own first and last token; nothing is cut.

    Raises:
      InputError: a tokenizer without entity markers, or one that does not begin a text with its
        classification token.
    """
    if not set((*markers("E1"), *markers("E2"))) <= markers_in(tokenizer):
        raise InputError(
            "the tokenizer has no entity markers ([E1], [E2]); take an encoder that `jaxre train`"
            " wrote"
        )
    ids = token_ids(tokenizer, texts, special=True)
    first = tokenizer.cls_token_id
    if first is None or any(tokens[0] != first for tokens in ids):
        raise InputError(
            "the tokenizer does not begin a text with its classification token; set cls_token and"
            " its post-processor"
        )
    return TokenSet.of(
        (Encoded(tokens, len(tokens)) for tokens in ids), [example.id for example in examples]
    )


def marked_digest(
    examples: Sequence[Example], texts: Sequence[str], tokenizer: PreTrainedTokenizerBase
) -> str:
    """Digest of everything that determines the tokens: ids, marked texts, tokenizer."""
    digest = hashlib.sha256(f"classify {FORMAT} {tokenizer_digest(tokenizer)}\n".encode())
    for example, text in zip(examples, texts, strict=True):
        digest.update(json.dumps([example.id, text]).encode())
    return digest.hexdigest()


def _description(marker: str) -> str:
    role, _, kind = marker.strip("[/]").partition(":")
    return f" {_DESCRIBED[role]} {kind.replace('_', ' ').lower()}".rstrip()


def _markers_of(example: Example) -> tuple[tuple[str, str], tuple[str, str]]:
    return markers("E1", example.head_type), markers("E2", example.tail_type)
