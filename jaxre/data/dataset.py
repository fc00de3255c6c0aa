"""A config's data as tokens: splits with their schema, template and demonstrations, and the packing plan."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pyarrow
from transformers import PreTrainedTokenizerBase

from jaxre import __version__
from jaxre.config import Config
from jaxre.data.cache import cached_tokens, read_note, stored_tokens, write_note
from jaxre.data.markers import add_markers, encode_marked, marked_digest, marked_text, markers_in
from jaxre.data.packing import Plan, plan_by_examples, plan_by_tokens
from jaxre.data.prefixes import find_prefixes
from jaxre.data.template import ChatTemplate, Turn, load_tokenizer
from jaxre.data.tokens import (
    TokenSet,
    demonstrator,
    encode_examples,
    encode_texts,
    examples_digest,
    questions_of,
    read_texts,
    texts_digest,
)
from jaxre.errors import InputError
from jaxre.relations import leaks, sources
from jaxre.relations.schema import Example, Schema


@dataclass(frozen=True)
class Split:
    """One split: its examples that fit a row as tokens, and on request what they were made from.

    `examples` and `questions` go together and are read when they are first asked for; `tokens` leaves out the examples
    whose ids are in `dropped`; `digest` is that of the token cache.
    """

    tokens: TokenSet
    dropped: list[str]
    from_cache: bool
    read: Callable[[], list[Example]] = list
    ask: Callable[[], list[list[Turn]]] = list
    digest: str = ""

    @property
    def examples(self) -> list[Example]:
        return self.read()

    @property
    def questions(self) -> list[list[Turn]]:
        return self.ask()


@dataclass(frozen=True)
class Dataset:
    """What a run trains and validates on.

    `template` is None for the language-model objective and for classification. `new_tokens` are the entity
    markers that classification gave the tokenizer, as `add_markers` returns them. `recipe` is that of `recipe_of`.
    """

    train: Split
    validation: Split | None
    schema: Schema | None
    template: ChatTemplate | None
    tokenizer: PreTrainedTokenizerBase
    new_tokens: Mapping[int, list[int]] = field(default_factory=dict)
    recipe: str | None = None


def load_dataset(config: Config, folder: Path) -> Dataset:
    """Reads, renders and tokenises the training and validation data.

    Args:
      folder: of the model, for its tokenizer and chat template.

    Raises:
      InputError: anything in the data, the template or the schema that cannot be used.
    """
    tokenizer = load_tokenizer(folder)
    if config.train.objective == "lm":
        train, validation = _load_texts(config, tokenizer)
        return Dataset(train, validation, None, None, tokenizer)
    if config.train.objective == "classify":
        return _load_marked(config, tokenizer)
    template = ChatTemplate(tokenizer, config.prompt.date, str(folder))
    read = functools.cache(lambda: leaks.load_train(config.data))
    recipe = recipe_of(config, template)
    known = recipe and read_note(config.data.cache, recipe)
    stored = known and stored_tokens(config.data.cache, known["digest"])
    schema = Schema(tuple(known["labels"])) if stored else schema_of(config, read())
    train = tokenise(config, read, schema, template, read, "data.train", (known["digest"], stored) if stored else None)
    # Not where a file changed between its digest and its reading.
    if recipe and not stored and recipe == recipe_of(config, template):
        write_note(config.data.cache, recipe, {"labels": schema.labels, "digest": train.digest})
    validation = None
    if config.data.validation:
        held_out = sources.load(config.data.validation)
        schema.check(held_out, "data.validation")
        validation = tokenise(config, lambda: held_out, schema, template, read, "data.validation")
    return Dataset(train, validation, schema, template, tokenizer, recipe=recipe)


def recipe_of(config: Config, template: ChatTemplate) -> str | None:
    """Digest of what the training split's tokens are made from: bytes of its files, settings, template, and our code that reads them.

    None where a source has no local files to tell by (the hub); it is read every time.
    """
    files = leaks.digest_of(config.data)
    if files is None:
        return None
    code = hashlib.sha256(f"{__version__} {pyarrow.__version__}".encode())
    for package in ("data", "relations"):
        for path in sorted((Path(__file__).parents[1] / package).glob("*.py")):
            code.update(path.read_bytes())
    settings = [config.data.train.model_dump(), config.prompt.model_dump(), config.data.labels, config.seed, config.train.row_length]
    return hashlib.sha256(json.dumps([files, code.hexdigest(), template.digest, *settings]).encode()).hexdigest()


def schema_of(config: Config, train: Sequence[Example]) -> Schema:
    """The config's labels, or those of the training split. Raises InputError for an example outside of them."""
    if config.data.labels is None:
        return Schema.of(train)
    schema = Schema(tuple(sorted(set(config.data.labels))))
    schema.check(train, "data.train")
    return schema


def load_schema(config: Config) -> tuple[Schema, list[Example]]:
    """The schema and the training examples, which demonstrations are drawn from."""
    if config.data.train is None:
        raise InputError(f"{config.name}: a run without data.train has no schema; predict with a run that was trained on relations")
    train = leaks.load_train(config.data)
    return schema_of(config, train), train


def ask(config: Config, examples: Sequence[Example], schema: Schema, train: Sequence[Example]) -> list[list[Turn]]:
    """The chat turns of each example up to the question, with demonstrations from `train`."""
    return questions_of(examples, config.prompt, schema.labels, demonstrator(train, config.prompt, config.seed))


def tokenise(
    config: Config,
    read: Callable[[], list[Example]],
    schema: Schema,
    template: ChatTemplate,
    read_train: Callable[[], list[Example]],
    place: str,
    stored: tuple[str, TokenSet] | None = None,
) -> Split:
    """Examples as tokens, from the cache where it has them.

    Args:
      read, read_train: give the examples, and the training ones for demonstrations.
      stored: digest and tokens, if they are known; then nothing is read.
    """
    questions = functools.cache(lambda: ask(config, read(), schema, read_train() if config.prompt.shots else []))
    row_length = config.train.row_length
    if stored:
        (digest, tokens), cached = stored, True
    else:
        digest = examples_digest(questions(), read(), template, row_length)
        tokens, cached = cached_tokens(config.data.cache, digest, lambda: encode_examples(read(), questions(), template))
    fitting, dropped = tokens.fitting(row_length, config.data.too_long, place)
    return Split(fitting, dropped, cached, read, questions, digest)


def _load_marked(config: Config, tokenizer: PreTrainedTokenizerBase) -> Dataset:
    train = leaks.load_train(config.data)
    schema = schema_of(config, train)
    new_tokens = add_markers(tokenizer, train)
    known, number = markers_in(tokenizer), {label: number for number, label in enumerate(schema.labels)}
    held_out = sources.load(config.data.validation) if config.data.validation else None
    if held_out is not None:
        schema.check(held_out, "data.validation")

    def split(examples: list[Example], place: str) -> Split:
        texts = [marked_text(example, known) for example in examples]
        digest = marked_digest(examples, texts, tokenizer)
        tokens, cached = cached_tokens(config.data.cache, digest, lambda: encode_marked(examples, texts, tokenizer))
        labels = np.array([number[example.relation] for example in examples], np.int32)
        fitting, dropped = dataclasses.replace(tokens, labels=labels).fitting(config.train.row_length, config.data.too_long, place)
        return Split(fitting, dropped, cached, lambda: examples)

    validation = None if held_out is None else split(held_out, "data.validation")
    return Dataset(split(train, "data.train"), validation, schema, None, tokenizer, new_tokens)


def _load_texts(config: Config, tokenizer: PreTrainedTokenizerBase) -> tuple[Split, Split | None]:
    text, row_length = config.data.text, config.train.row_length
    documents = read_texts(text)
    digest = texts_digest(documents, tokenizer, row_length)
    tokens, cached = cached_tokens(config.data.cache, digest, lambda: encode_texts(documents, tokenizer, row_length))
    train, held_out = tokens.held_out(text.holdout)
    return Split(train, [], cached), Split(held_out, [], cached) if len(held_out) else None


def supervised_of(config: Config, tokens: TokenSet) -> np.ndarray:
    """[n] tokens of each example that have a weight in the training loss."""
    return tokens.lengths - 1 if config.train.prompt_weight else tokens.supervised


def make_plan(config: Config, tokens: TokenSet, shards: int, share: bool = True) -> Plan:
    """The run's packing plan for a mesh whose rows are shared by `shards` devices.

    Args:
      share: False packs every example with a prefix of its own; loss and gradients are the same.

    Raises:
      InputError: as the planners, or rows that the devices cannot share.
    """
    prefixes = find_prefixes(tokens)
    prefixes = prefixes if share else prefixes.unshared()
    train = config.train
    supervised = supervised_of(config, tokens)
    if train.batch_examples is not None:
        return plan_by_examples(
            tokens.lengths,
            supervised,
            prefixes,
            seed=config.seed,
            epochs=train.epochs,
            row_length=train.row_length,
            examples=train.batch_examples,
            accumulation=train.accumulation,
            shards=shards,
        )
    rows = train.batch_tokens // (train.row_length * train.accumulation)
    if rows % shards:
        raise InputError(
            f"train.batch_tokens gives {rows} rows, which {shards} devices (mesh data x fsdp) cannot share; make it a multiple"
        )
    return plan_by_tokens(
        tokens.lengths,
        supervised,
        prefixes,
        seed=config.seed,
        epochs=train.epochs,
        row_length=train.row_length,
        rows=rows,
        accumulation=train.accumulation,
    )
