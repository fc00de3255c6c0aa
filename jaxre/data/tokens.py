"""Tokenises examples and raw text.

A `TokenSet` is three flat arrays and the ids, so that it can be cached and memory-mapped.
"""

from __future__ import annotations

import array
import hashlib
import json
import zlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from jaxre.config import Prompt, Text, data_root
from jaxre.data.template import ChatTemplate, Encoded
from jaxre.data.tokenizer import token_ids, tokenizer_digest
from jaxre.errors import InputError
from jaxre.relations import sources
from jaxre.relations.marks import squeezed
from jaxre.relations.prompts import (
    by_label,
    choose_demonstrations,
    marked_text,
    system_turn,
    turns_after,
)
from jaxre.relations.schema import Example

FORMAT = 1  # part of every digest: raise it when the meaning of the tokens changes


@dataclass(frozen=True)
class Truncation:
    """Effect on answers if examples were cut after `limit` tokens, as other trainers do.

    examples: number of all examples.
    cut: examples longer than the limit.
    answer_gone: examples that would lose their whole answer.
    answer_cut: examples that would lose part of it.
    longest: tokens of the longest example.
    """

    limit: int
    examples: int
    cut: int
    answer_gone: int
    answer_cut: int
    longest: int


@dataclass(frozen=True)
class TokenSet:
    """Tokens of n examples.

    tokens: [total] int32.
    starts: [n + 1] int64, offsets of the examples.
    prompt_lengths: [n] int32, at least 1; the tokens of an example from there on are supervised.
    ids: n example ids.
    labels: [n] int32 for classification, the label number of each example, predicted at its first
      token; then no token is supervised.
    """

    tokens: np.ndarray
    starts: np.ndarray
    prompt_lengths: np.ndarray
    ids: tuple[str, ...]
    labels: np.ndarray | None = None

    @classmethod
    def of(cls, encoded: Iterable[Encoded], ids: Sequence[str]) -> TokenSet:
        # Four bytes a token from the start: as Python integers 200,000 examples take a gigabyte.
        tokens, starts, prompts = array.array("i"), array.array("q", [0]), array.array("i")
        for example in encoded:
            tokens.extend(example.tokens)
            starts.append(len(tokens))
            prompts.append(example.prompt_length)
        return cls(
            np.array(tokens, np.int32),
            np.array(starts, np.int64),
            np.array(prompts, np.int32),
            tuple(ids),
        )

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int) -> np.ndarray:
        return self.tokens[self.starts[index] : self.starts[index + 1]]

    @property
    def lengths(self) -> np.ndarray:
        """[n] tokens of each example."""
        return np.diff(self.starts)

    @property
    def supervised(self) -> np.ndarray:
        """[n] supervised positions of each example."""
        if self.labels is not None:
            return np.ones(len(self), np.int64)
        return self.lengths - self.prompt_lengths

    @property
    def owners(self) -> np.ndarray:
        """[n] uint32 digest of each example's id, the key of its dropout mask."""
        return np.array([_id_digest(name) for name in self.ids], np.uint32)

    def truncation(self, limit: int) -> Truncation:
        """Counts what would be lost if only the first `limit` tokens of each example were used."""
        gone, longer = self.prompt_lengths >= limit, self.lengths > limit
        return Truncation(
            limit,
            examples=len(self),
            cut=int(longer.sum()),
            answer_gone=int(gone.sum()),
            answer_cut=int((longer & ~gone).sum()),
            longest=int(self.lengths.max(initial=0)),
        )

    def fitting(self, row_length: int, too_long: str, place: str) -> tuple[TokenSet, list[str]]:
        """The examples that fit a row, and the ids of those that do not.

        Raises:
          InputError: `too_long` is "error" and one does not fit, or none fits.
        """
        fits = self.lengths <= row_length
        dropped = [name for name, keep in zip(self.ids, fits, strict=True) if not keep]
        if dropped and (too_long == "error" or not fits.any()):
            raise InputError(
                f"{place}: {len(dropped)} of {len(self)} examples are longer than a row of"
                f" {row_length} tokens (longest {int(self.lengths.max())}, first {dropped[0]});"
                " raise train.row_length"
            )
        if not dropped:
            return self, []
        return self.subset(fits), dropped

    def subset(self, chosen: np.ndarray) -> TokenSet:
        """The examples where `chosen` [n] bool is true."""
        lengths = self.lengths[chosen]
        starts = np.concatenate([np.zeros(1, np.int64), np.cumsum(lengths, dtype=np.int64)])
        tokens = self.tokens[np.repeat(chosen, self.lengths)]
        ids = tuple(self.ids[i] for i in np.flatnonzero(chosen))
        return TokenSet(
            tokens,
            starts,
            self.prompt_lengths[chosen],
            ids,
            None if self.labels is None else self.labels[chosen],
        )

    def held_out(self, share: float) -> tuple[TokenSet, TokenSet]:
        """(the rest, a share chosen by a fixed hash of the ids). Repeats of a sentence (`id#1@0`)
        stay together.
        """
        hashes = [_id_digest(name.rpartition("#")[0] or name) for name in self.ids]
        chosen = np.array(hashes, np.uint32) < share * 2**32
        return self.subset(~chosen), self.subset(chosen)


def _id_digest(name: str) -> int:
    return zlib.crc32(name.encode("utf-8", "surrogatepass"))


def questions_of(
    examples: Sequence[Example],
    prompt: Prompt,
    labels: Sequence[str],
    demonstrations: Callable[[Example], list[Example]],
) -> list[list[dict[str, str]]]:
    """The chat turns of each example up to and including the question; all have the schema
    `labels`.
    """
    systems = {
        name: system_turn(prompt, labels, name)
        for name in {example.dataset for example in examples}
    }
    return [
        turns_after(systems[example.dataset], example, prompt, demonstrations(example))
        for example in examples
    ]


def demonstrator(
    train: Sequence[Example], prompt: Prompt, seed: int
) -> Callable[[Example], list[Example]]:
    """Returns example -> its demonstrations from the training split, never the example itself."""
    if not prompt.shots:
        return lambda example: []
    grouped = by_label(train)
    if prompt.demonstrations == "per_example":
        return lambda example: choose_demonstrations(grouped, prompt, seed, example)
    # Drawn once; an example with the text of one of them gets the next in line instead.
    fixed = choose_demonstrations(grouped, prompt, seed)
    texts = {squeezed(demonstration.text) for demonstration in fixed}
    return lambda example: (
        choose_demonstrations(grouped, prompt, seed, example)
        if squeezed(example.text) in texts
        else fixed
    )


def encode_examples(
    examples: Sequence[Example],
    questions: Sequence[Sequence[dict[str, str]]],
    template: ChatTemplate,
) -> TokenSet:
    """Tokenises the questions with their gold labels as answers."""
    pairs = [
        (question, example.relation) for question, example in zip(questions, examples, strict=True)
    ]
    return TokenSet.of(template.stream(pairs), [example.id for example in examples])


def examples_digest(
    questions: Sequence[Sequence[dict[str, str]]],
    examples: Sequence[Example],
    template: ChatTemplate,
    row_length: int,
) -> str:
    """Digest of everything that determines the tokens: ids, prompts with demonstrations, answers,
    tokenizer, template, date, row length.
    """
    digest = hashlib.sha256(f"sft {FORMAT} {template.digest} {row_length}\n".encode())
    for example, question in zip(examples, questions, strict=True):
        digest.update(json.dumps([example.id, example.relation, question]).encode())
    return digest.hexdigest()


def read_texts(text: Text) -> list[tuple[str, str]]:
    """(name, text) of the documents and sentences of the language-model objective. Raises
    InputError if there are none or they cannot be read.
    """
    documents = []
    for name in text.paths:
        path = Path(name).expanduser()
        path = path if path.exists() else data_root() / name
        files = sorted(path.rglob("*.txt")) if path.is_dir() else [path]
        if not files or not files[0].is_file():
            raise InputError(
                f"{path}: no such text file or folder of .txt files; correct data.text.paths"
            )
        try:
            documents += [(file.name, file.read_text(encoding="utf-8-sig")) for file in files]
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(
                f"{path}: cannot be read as UTF-8 text ({error}); save it as UTF-8"
            ) from None
    for source in text.sources:
        examples = sources.load(source)
        for repeat in range(text.repeat_sources):
            documents += [
                (f"{example.id}#{repeat}", marked_text(example) if repeat else example.text)
                for example in examples
            ]
    if not documents:
        raise InputError("data.text: neither paths nor sources are given; give at least one")
    return documents


def texts_digest(documents: Sequence[tuple[str, str]], tokenizer, row_length: int) -> str:
    """Digest of documents, tokenizer and row length."""
    settings = f"lm {FORMAT} {row_length} {tokenizer_digest(tokenizer)} {tokenizer.eos_token_id}\n"
    digest = hashlib.sha256(settings.encode())
    for name, document in documents:
        digest.update(json.dumps([name, document]).encode())
    return digest.hexdigest()


def encode_texts(documents: Sequence[tuple[str, str]], tokenizer, row_length: int) -> TokenSet:
    """Tokenises documents, appends the end-of-text token and cuts them into pieces of a row; every
    token but a piece's first is supervised.

    A last piece of one token (end-of-text) is dropped, because nothing precedes it.

    Raises:
      InputError: the tokenizer has no end-of-text token.
    """
    end = tokenizer.eos_token_id
    if end is None:
        raise InputError(
            "the tokenizer has no end-of-text token; set eos_token in tokenizer_config.json"
        )
    all_ids = token_ids(tokenizer, [document for _, document in documents])
    encoded, ids = [], []
    for (name, _), tokens in zip(documents, all_ids, strict=True):
        tokens = [*tokens, end]
        for start in range(0, len(tokens), row_length):
            piece = tokens[start : start + row_length]
            if len(piece) > 1:
                encoded.append(Encoded(piece, 1))
                ids.append(f"{name}@{start}")
    return TokenSet.of(encoded, ids)
