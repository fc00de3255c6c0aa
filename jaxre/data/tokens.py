"""Tokenised examples of a split, and how examples and raw text become them.

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
    """What cutting each example after `limit` tokens, as others do, would do to its answer.

    examples: in all; cut: longer than the limit; answer_gone: no token of the answer would be left;
    answer_cut: some would be, not all; longest: tokens of the longest example.
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

    tokens: [total] int32; starts: [n + 1] int64; prompt_lengths: [n] int32, at least 1, tokens of
    example i from there on are supervised; ids: n example ids; labels: [n] int32 for
    classification, the number of each example's label, which is asked for at its first token (then
    no token is supervised).
    """

    tokens: np.ndarray
    starts: np.ndarray
    prompt_lengths: np.ndarray
    ids: tuple[str, ...]
    labels: np.ndarray | None = None

    @classmethod
    def of(cls, encoded: Iterable[Encoded], ids: Sequence[str]) -> TokenSet:
        # Four bytes a token as they come: as Python integers 200,000 examples take a gigabyte.
        tokens, starts, prompts = array.array("i"), array.array("q", [0]), array.array("i")
        for one in encoded:
            tokens.extend(one.tokens)
            starts.append(len(tokens))
            prompts.append(one.prompt_length)
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
        """[n] uint32 digest of each example's id: whose dropout mask its tokens follow."""
        return np.array([_owner(name) for name in self.ids], np.uint32)

    def truncation(self, limit: int) -> Truncation:
        """What truncation on the right would lose, were it done: tokens 0 to limit - 1 of each
        example would be left.
        """
        gone, longer = self.prompt_lengths >= limit, self.lengths > limit
        counts = (int(one.sum()) for one in (longer, gone, longer & ~gone))
        return Truncation(limit, len(self), *counts, longest=int(self.lengths.max(initial=0)))

    def fitting(self, row_length: int, too_long: str, place: str) -> tuple[TokenSet, list[str]]:
        """The examples that fit a row, and the ids of those that do not.

        Raises:
          InputError: `too_long` is "error" and there is one, or none fits.
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
        """(the rest, a share chosen by a fixed hash of the ids); the repeats of a sentence
        (`id#1@0`) stay together.
        """
        outside = (
            np.array([_owner(name.rpartition("#")[0] or name) for name in self.ids], np.uint32)
            < share * 2**32
        )
        return self.subset(~outside), self.subset(outside)


def _owner(name: str) -> int:
    """32-bit digest of an example id."""
    return zlib.crc32(name.encode("utf-8", "surrogatepass"))


def questions_of(
    examples: Sequence[Example],
    prompt: Prompt,
    labels: Sequence[str],
    demonstrations: Callable[[Example], list[Example]],
) -> list[list[dict[str, str]]]:
    """The chat turns of each example, up to and including the question; `labels` is the schema of
    all.
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
    """example -> its demonstrations, drawn from the training split; never the example itself."""
    if not prompt.shots:
        return lambda example: []
    grouped = by_label(train)
    if prompt.demonstrations == "per_example":
        return lambda example: choose_demonstrations(grouped, prompt, seed, example)
    # Drawn once; an example whose text is among them gets the next in line.
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
    """Questions answered by their gold labels, as tokens."""
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
    """Digest of everything the tokens depend on: ids, prompts with demonstrations, answers,
    tokenizer, template, date, length.
    """
    digest = hashlib.sha256(f"sft {FORMAT} {template.digest} {row_length}\n".encode())
    for example, question in zip(examples, questions, strict=True):
        digest.update(json.dumps([example.id, example.relation, question]).encode())
    return digest.hexdigest()


def read_texts(text: Text) -> list[tuple[str, str]]:
    """(name, text) of the documents and sentences of the language-model objective. Raises
    InputError.
    """
    documents = []
    for given in text.paths:
        path = Path(given).expanduser()
        path = path if path.exists() else data_root() / given
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
    digest = hashlib.sha256(
        (
            f"lm {FORMAT} {row_length} {tokenizer_digest(tokenizer)} {tokenizer.eos_token_id}\n"
        ).encode()
    )
    for name, document in documents:
        digest.update(json.dumps([name, document]).encode())
    return digest.hexdigest()


def encode_texts(documents: Sequence[tuple[str, str]], tokenizer, row_length: int) -> TokenSet:
    """Documents as tokens, ended by the end-of-text token and cut into pieces of a row; every token
    but a piece's first is supervised.

    A last piece of one token, the end-of-text alone, has nothing to be predicted from and is left
    out.

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
