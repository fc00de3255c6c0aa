"""A config's data as tokens: splits with their schema, template and demonstrations, and the packing
plan.
"""

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
from jaxre.config import Config, Source, shipped
from jaxre.data.cache import cached_tokens, read_note, stored_tokens, write_note
from jaxre.data.markers import add_markers, encode_marked, marked_digest, marked_text, markers_in
from jaxre.data.packing import Plan, plan_by_examples, plan_by_tokens
from jaxre.data.prefixes import find_prefixes
from jaxre.data.template import ChatTemplate, Turn
from jaxre.data.tokenizer import load_tokenizer
from jaxre.data.tokens import (
    TokenSet,
    Truncation,
    demonstrator,
    encode_examples,
    encode_texts,
    examples_digest,
    questions_of,
    read_texts,
    texts_digest,
)
from jaxre.errors import InputError
from jaxre.relations import labels, leaks, mixtures, sources
from jaxre.relations.mixtures import Count
from jaxre.relations.schema import ANY, Example, Schema, Schemas, by_dataset

# dataset (or ANY) -> its training examples, for demonstrations
Pools = Mapping[str, Sequence[Example]]


@dataclass(frozen=True)
class Split:
    """One split: its examples that fit a row as tokens, and on request what they were made from.

    `examples` and `questions` go together and are read when they are first asked for; `tokens`
    leaves out the examples whose ids are in `dropped`; `digest` is that of the token cache;
    `counts` are of its sources; `truncation` is what cutting the dropped ones would have done to
    their answers, None where there are no answers.
    """

    tokens: TokenSet
    dropped: list[str]
    from_cache: bool
    read: Callable[[], list[Example]] = list
    ask: Callable[[], list[list[Turn]]] = list
    digest: str = ""
    counts: tuple[Count, ...] = ()
    truncation: Truncation | None = None

    @property
    def examples(self) -> list[Example]:
        return self.read()

    @property
    def questions(self) -> list[list[Turn]]:
        return self.ask()


@dataclass(frozen=True)
class Dataset:
    """What a run trains and validates on.

    `schemas` is None for the language-model objective, `template` for that and for classification.
    `new_tokens` are the entity markers that classification gave the tokenizer, as `add_markers`
    returns them. `recipe` is that of `recipe_of`. `told` is what a user should know of labels, line
    by line.
    """

    train: Split
    validation: Split | None
    schemas: Schemas | None
    template: ChatTemplate | None
    tokenizer: PreTrainedTokenizerBase
    new_tokens: Mapping[int, list[int]] = field(default_factory=dict)
    recipe: str | None = None
    told: tuple[str, ...] = ()

    @property
    def schema(self) -> Schema:
        """The only schema, of a run on one source."""
        return self.schemas.by_dataset[ANY]


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
    pool = functools.cache(
        lambda: mixtures.read(
            config.data.train, "data.train", lambda given: leaks.load_train(config.data, given)
        )
    )
    recipe = recipe_of(config, template)
    known = recipe and read_note(config.data.cache, recipe)
    stored = known and stored_tokens(config.data.cache, known["digest"])
    if stored:
        schemas, told = Schemas.from_json(known["labels"]), known["told"]
        counts = tuple(Count(*count) for count in known["counts"])
    else:
        schemas, counts = labels.schemas_of(config.data, pool().by_dataset), pool().counts
        told = schemas.check(pool().examples, "data.train", strict=config.prompt.enumerate)
    pools = lambda: pool().by_dataset  # noqa: E731
    read = lambda: pool().examples  # noqa: E731
    train = tokenise(
        config,
        read,
        schemas,
        template,
        pools,
        "data.train",
        (known["digest"], stored) if stored else None,
    )
    train = dataclasses.replace(train, counts=counts)
    # Not where a file changed between its digest and its reading.
    if recipe and not stored and recipe == recipe_of(config, template):
        note = {
            "labels": schemas.to_json(),
            "told": told,
            "counts": list(map(dataclasses.astuple, counts)),
            "digest": train.digest,
        }
        write_note(config.data.cache, recipe, note)
    validation = None
    if config.data.validation:
        held_out = mixtures.read(config.data.validation, "data.validation")
        schemas = labels.with_given(schemas, config.data, by_dataset(held_out.examples))
        told = told + schemas.check(held_out.examples, "data.validation")
        validation = tokenise(
            config, lambda: held_out.examples, schemas, template, pools, "data.validation"
        )
        validation = dataclasses.replace(validation, counts=held_out.counts)
    told = (*labels.told_tested(config.data), *told)
    return Dataset(train, validation, schemas, template, tokenizer, recipe=recipe, told=told)


def recipe_of(config: Config, template: ChatTemplate) -> str | None:
    """Digest of what the training split's tokens are made from: bytes of its files, settings,
    template, and our code that reads them.

    None where a source has no local files to tell by (the hub); it is read every time.
    """
    listed = config.data.labels if isinstance(config.data.labels, dict) else {}
    collected = [one for one in listed.values() if isinstance(one, Source)]
    held_out = leaks.held_out_of(config.data)
    read = [*mixtures.sources_of(config.data.train), *collected, *held_out]
    files = [sources.digest_of(source) for source in read]
    if None in files:
        return None
    code = hashlib.sha256(f"{__version__} {pyarrow.__version__}".encode())
    parts = [
        path
        for package in ("data", "relations")
        for path in sorted((Path(__file__).parents[1] / package).glob("*.py"))
    ]
    for path in (*parts, *sorted(shipped("definitions").glob("*.yaml"))):
        code.update(path.read_bytes())
    data = config.data.model_dump(include={"train", "labels"})
    settings = [
        data,
        [one.model_dump() for one in held_out],
        config.prompt.model_dump(),
        config.seed,
        config.train.row_length,
    ]
    return hashlib.sha256(
        json.dumps([files, code.hexdigest(), template.digest, *settings]).encode()
    ).hexdigest()


def ask(
    config: Config, examples: Sequence[Example], schemas: Schemas, pools: Pools
) -> list[list[Turn]]:
    """The chat turns of each example up to the question, with the labels and demonstrations of its
    own dataset.

    Raises:
      InputError: a dataset without schema or, where demonstrations are asked for, training
        examples.
    """
    turns = {}
    for name, members in by_dataset(examples).items():
        pool = pools.get(name) or pools.get(ANY) or []
        if config.prompt.shots and not pool:
            raise InputError(
                f"{name}: not a dataset of data.train, so there are no demonstrations of it; set"
                " prompt.shots=0, or train on it"
            )
        asked = questions_of(
            members,
            config.prompt,
            schemas.of(name).labels,
            demonstrator(pool, config.prompt, config.seed),
        )
        turns.update(zip((example.id for example in members), asked, strict=True))
    return [turns[example.id] for example in examples]


def tokenise(
    config: Config,
    read: Callable[[], list[Example]],
    schemas: Schemas,
    template: ChatTemplate,
    pools: Callable[[], Pools],
    place: str,
    stored: tuple[str, TokenSet] | None = None,
) -> Split:
    """Examples as tokens, from the cache where it has them.

    Args:
      read: gives the examples; pools: the training ones of each dataset, for demonstrations.
      stored: digest and tokens, if they are known; then nothing is read.
    """
    questions = functools.cache(
        lambda: ask(config, read(), schemas, pools() if config.prompt.shots else {})
    )
    row_length = config.train.row_length
    if stored:
        (digest, tokens), cached = stored, True
    else:
        digest = examples_digest(questions(), read(), template, row_length)
        tokens, cached = cached_tokens(
            config.data.cache, digest, lambda: encode_examples(read(), questions(), template)
        )
    fitting, dropped = tokens.fitting(row_length, config.data.too_long, place)
    return Split(
        fitting, dropped, cached, read, questions, digest, truncation=tokens.truncation(row_length)
    )


def _load_marked(config: Config, tokenizer: PreTrainedTokenizerBase) -> Dataset:
    (train,) = leaks.load_train(config.data, [config.data.train])
    schemas = labels.schemas_of(config.data, {ANY: train})
    schema = schemas.of(ANY)
    schema.check(train, "data.train")
    new_tokens = add_markers(tokenizer, train)
    known, number = (
        markers_in(tokenizer),
        {label: number for number, label in enumerate(schema.labels)},
    )
    held_out = sources.load(config.data.validation) if config.data.validation else None
    if held_out is not None:
        schema.check(held_out, "data.validation")

    def split(examples: list[Example], place: str) -> Split:
        texts = [marked_text(example, known) for example in examples]
        digest = marked_digest(examples, texts, tokenizer)
        tokens, cached = cached_tokens(
            config.data.cache, digest, lambda: encode_marked(examples, texts, tokenizer)
        )
        numbers = np.array([number[example.relation] for example in examples], np.int32)
        fitting, dropped = dataclasses.replace(tokens, labels=numbers).fitting(
            config.train.row_length, config.data.too_long, place
        )
        return Split(fitting, dropped, cached, lambda: examples)

    validation = None if held_out is None else split(held_out, "data.validation")
    told = tuple(labels.told_tested(config.data))
    return Dataset(
        split(train, "data.train"), validation, schemas, None, tokenizer, new_tokens, told=told
    )


def _load_texts(config: Config, tokenizer: PreTrainedTokenizerBase) -> tuple[Split, Split | None]:
    text, row_length = config.data.text, config.train.row_length
    documents = read_texts(text)
    digest = texts_digest(documents, tokenizer, row_length)
    tokens, cached = cached_tokens(
        config.data.cache, digest, lambda: encode_texts(documents, tokenizer, row_length)
    )
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
            f"train.batch_tokens gives {rows} rows, which {shards} devices (mesh data x fsdp)"
            " cannot share; make it a multiple"
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
