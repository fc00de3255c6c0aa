"""Tokenised examples of a split, and how examples and raw text become them.

A `TokenSet` is three flat arrays and the ids, so that it can be cached and memory-mapped.
"""

from __future__ import annotations

import hashlib
import json
import zlib
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from jaxre.config import Prompt, Text, data_root
from jaxre.data.template import ChatTemplate, Encoded
from jaxre.errors import InputError
from jaxre.relations import sources
from jaxre.relations.prompts import by_label, choose_demonstrations, marked_text, turns
from jaxre.relations.schema import Example

FORMAT = 1  # part of every digest: raise it when the meaning of the tokens changes


@dataclass(frozen=True)
class TokenSet:
    """Tokens of n examples.

    tokens: [total] int32; starts: [n + 1] int64; prompt_lengths: [n] int32, at least 1, tokens of
    example i from there on are supervised; ids: n example ids.
    """

    tokens: np.ndarray
    starts: np.ndarray
    prompt_lengths: np.ndarray
    ids: tuple[str, ...]

    @classmethod
    def of(cls, encoded: Sequence[Encoded], ids: Sequence[str]) -> TokenSet:
        lengths = np.array([len(one.tokens) for one in encoded], np.int64)
        tokens = np.fromiter((token for one in encoded for token in one.tokens), np.int32, int(lengths.sum()))
        prompts = np.array([one.prompt_length for one in encoded], np.int32)
        return cls(tokens, np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64), prompts, tuple(ids))

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
        """[n] supervised tokens of each example."""
        return self.lengths - self.prompt_lengths

    @property
    def owners(self) -> np.ndarray:
        """[n] uint32 digest of each example's id: whose dropout mask its tokens follow."""
        return np.array([zlib.crc32(name.encode()) for name in self.ids], np.uint32)

    def fitting(self, row_length: int, too_long: str, place: str) -> tuple[TokenSet, list[str]]:
        """The examples that fit a row, and the ids of those that do not.

        Raises:
          InputError: `too_long` is "error" and there is one, or none fits.
        """
        fits = self.lengths <= row_length
        dropped = [name for name, keep in zip(self.ids, fits, strict=True) if not keep]
        if dropped and (too_long == "error" or not fits.any()):
            raise InputError(
                f"{place}: {len(dropped)} of {len(self)} examples are longer than a row of {row_length} tokens "
                f"(longest {int(self.lengths.max())}, first {dropped[0]}); raise train.row_length"
            )
        if not dropped:
            return self, []
        return self.subset(fits), dropped

    def subset(self, chosen: np.ndarray) -> TokenSet:
        """The examples where `chosen` [n] bool is true."""
        indices = np.flatnonzero(chosen)
        kept = [Encoded(self[i].tolist(), int(self.prompt_lengths[i])) for i in indices]
        return TokenSet.of(kept, [self.ids[i] for i in indices])

    def held_out(self, share: float) -> tuple[TokenSet, TokenSet]:
        """(the rest, a share chosen by a fixed hash of the ids)."""
        outside = self.owners < share * 2**32
        return self.subset(~outside), self.subset(outside)


def questions_of(
    examples: Sequence[Example], prompt: Prompt, labels: Sequence[str], demonstrations: Callable[[Example], list[Example]]
) -> list[list[dict[str, str]]]:
    """The chat turns of each example, up to and including the question."""
    return [turns(example, prompt, labels, demonstrations(example)) for example in examples]


def demonstrator(train: Sequence[Example], prompt: Prompt, seed: int) -> Callable[[Example], list[Example]]:
    """example -> its demonstrations, drawn from the training split; never the example itself."""
    if not prompt.shots:
        return lambda example: []
    grouped = by_label(train)
    return lambda example: choose_demonstrations(grouped, prompt, seed, example)


def encode_examples(examples: Sequence[Example], questions: Sequence[Sequence[dict[str, str]]], template: ChatTemplate) -> TokenSet:
    """Questions answered by their gold labels, as tokens."""
    pairs = [(question, example.relation) for question, example in zip(questions, examples, strict=True)]
    return TokenSet.of(template.encode(pairs), [example.id for example in examples])


def examples_digest(
    questions: Sequence[Sequence[dict[str, str]]], examples: Sequence[Example], template: ChatTemplate, row_length: int
) -> str:
    """Digest of everything the tokens depend on: data, prompts, demonstrations, tokenizer, template, date, length."""
    digest = hashlib.sha256(f"sft {FORMAT} {template.digest} {row_length}\n".encode())
    for example, question in zip(examples, questions, strict=True):
        digest.update(json.dumps([asdict(example), question]).encode())
    return digest.hexdigest()


def read_texts(text: Text) -> list[tuple[str, str]]:
    """(name, text) of the documents and sentences of the language-model objective. Raises InputError."""
    documents = []
    for given in text.paths:
        path = Path(given).expanduser()
        path = path if path.exists() else data_root() / given
        files = sorted(path.rglob("*.txt")) if path.is_dir() else [path]
        if not files or not files[0].is_file():
            raise InputError(f"{path}: no such text file or folder of .txt files")
        documents += [(str(file.name), file.read_text(encoding="utf-8-sig")) for file in files]
    for source in text.sources:
        examples = sources.load(source)
        for repeat in range(text.repeat_sources):
            documents += [(f"{example.id}#{repeat}", marked_text(example) if repeat % 2 else example.text) for example in examples]
    if not documents:
        raise InputError("data.text: neither paths nor sources are given")
    return documents


def texts_digest(documents: Sequence[tuple[str, str]], tokenizer, row_length: int) -> str:
    """Digest of documents, tokenizer and row length."""
    digest = hashlib.sha256(f"lm {FORMAT} {row_length} {tokenizer.backend_tokenizer.to_str()}\n".encode())
    for name, document in documents:
        digest.update(json.dumps([name, document]).encode())
    return digest.hexdigest()


def encode_texts(documents: Sequence[tuple[str, str]], tokenizer, row_length: int) -> TokenSet:
    """Documents as tokens, ended by the end-of-text token and cut into pieces of a row; every token but the first is supervised."""
    encoded, ids = [], []
    end = tokenizer.eos_token_id
    all_ids = tokenizer([document for _, document in documents], add_special_tokens=False, return_attention_mask=False)["input_ids"]
    for (name, _), tokens in zip(documents, all_ids, strict=True):
        tokens = [*tokens, end]
        for start in range(0, len(tokens), row_length):
            piece = tokens[start : start + row_length]
            if len(piece) > 1:
                encoded.append(Encoded(piece, 1))
                ids.append(f"{name}@{start}")
    return TokenSet.of(encoded, ids)
