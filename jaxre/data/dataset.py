"""A config's data as tokens: splits with schema, template and demonstrations; and the plan of their
packing. `jaxre.objectives` loads them.
"""

from __future__ import annotations

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
from jaxre.code_digest import code_digest
from jaxre.config import Config, Source, shipped
from jaxre.data.cache import cached_tokens
from jaxre.data.packing import Plan, plan_by_examples, plan_by_tokens
from jaxre.data.prefixes import find_prefixes
from jaxre.data.template import ChatTemplate, Turn
from jaxre.data.tokens import (
    TokenSet,
    Truncation,
    demonstrator,
    encode_examples,
    examples_digest,
    questions_of,
)
from jaxre.errors import InputError
from jaxre.relations import leaks, mixtures, sources
from jaxre.relations.mixtures import Count
from jaxre.relations.schema import ANY, Example, Schema, Schemas, by_dataset

# dataset (or ANY) -> its training examples, for demonstrations
Pools = Mapping[str, Sequence[Example]]


@dataclass(frozen=True)
class Split:
    """One split: the tokens of the examples that fit a row, and on request the examples themselves.

    tokens: without the examples whose ids are in `dropped`.
    examples, questions: of all examples, in the same order; read on first access.
    digest: key in the token cache.
    counts: examples of each source.
    truncation: effect of cutting long examples on their answers; None if there are no answers.
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
    """The data that a run trains and validates on.

    schemas: None for the language-model objective.
    template: None for the language-model objective and for classification.
    new_tokens: entity markers that classification added, as `add_markers` returns them.
    recipe: from `recipe_of`.
    notices: lines about labels for the user.
    """

    train: Split
    validation: Split | None
    schemas: Schemas | None
    template: ChatTemplate | None
    tokenizer: PreTrainedTokenizerBase
    new_tokens: Mapping[int, list[int]] = field(default_factory=dict)
    recipe: str | None = None
    notices: tuple[str, ...] = ()

    @property
    def schema(self) -> Schema:
        """The only schema, of a run on one source."""
        return self.schemas.by_dataset[ANY]


def recipe_of(config: Config, template: ChatTemplate) -> str | None:
    """Digest of everything that the training split's tokens are made from: bytes of its files,
    settings, template, and our code that reads them.

    None if a source has no local files (the hub); it is then read every time.
    """
    listed = config.data.labels if isinstance(config.data.labels, dict) else {}
    label_sources = [source for source in listed.values() if isinstance(source, Source)]
    held_out = leaks.held_out_of(config.data)
    read = [*mixtures.sources_of(config.data.train), *label_sources, *held_out]
    files = [sources.digest_of(source) for source in read]
    if None in files:
        return None
    code = hashlib.sha256(f"{__version__} {pyarrow.__version__} {_own_code()}".encode())
    for path in sorted(shipped("definitions").glob("*.yaml")):
        code.update(path.read_bytes())
    settings = [
        config.data.model_dump(include={"train", "labels"}),
        [source.model_dump() for source in held_out],
        config.prompt.model_dump(),
        config.seed,
        config.train.row_length,
    ]
    return hashlib.sha256(
        json.dumps([files, code.hexdigest(), template.digest, *settings]).encode()
    ).hexdigest()


@functools.cache
def _own_code() -> str:
    """Digest of our code that reads, renders and tokenises."""
    root = Path(__file__).parents[1]
    packages = (root / "data", root / "relations")
    paths = [path for package in packages for path in sorted(package.glob("*.py"))]
    return code_digest([*paths, root / "objectives" / "sft.py"])


def ask(
    config: Config, examples: Sequence[Example], schemas: Schemas, pools: Pools
) -> list[list[Turn]]:
    """The chat turns of each example up to the question, with the labels and demonstrations of its
    own dataset.

    Raises:
      InputError: a dataset without schema or, with demonstrations, without training examples.
    """
    turns = {}
    for name, members in by_dataset(examples).items():
        pool = pools.get(name) or pools.get(ANY) or []
        if config.prompt.shots and not pool:
            raise InputError(
                f"{name}: not a dataset of data.train, so there are no demonstrations of it; set"
                " prompt.shots=0, or train on it"
            )
        questions = questions_of(
            members,
            config.prompt,
            schemas.of(name).labels,
            demonstrator(pool, config.prompt, config.seed),
        )
        turns.update(zip((example.id for example in members), questions, strict=True))
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
    """Tokenises examples, or reads their tokens from the cache.

    Args:
      read: returns the examples.
      pools: returns the training examples of each dataset, for demonstrations.
      stored: digest and tokens, if known; then nothing is read.
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


def supervised_of(config: Config, tokens: TokenSet) -> np.ndarray:
    """[n] tokens of each example that have a weight in the training loss."""
    return tokens.lengths - 1 if config.train.prompt_weight else tokens.supervised


def make_plan(config: Config, tokens: TokenSet, shards: int, share: bool = True) -> Plan:
    """The run's packing plan for a mesh whose rows are shared by `shards` devices.

    Args:
      share: False gives every example its own copy of its prefix, with the same loss and gradients.

    Raises:
      InputError: as the planners do, or the rows cannot be divided among the devices.
    """
    prefixes = find_prefixes(tokens)
    train = config.train
    plan = functools.partial(
        plan_by_tokens if train.batch_examples is None else plan_by_examples,
        tokens.lengths,
        supervised_of(config, tokens),
        prefixes if share else prefixes.unshared(),
        seed=config.seed,
        epochs=train.epochs,
        row_length=train.row_length,
        accumulation=train.accumulation,
    )
    if train.batch_examples is not None:
        return plan(examples=train.batch_examples, shards=shards)
    rows = train.batch_tokens // (train.row_length * train.accumulation)
    if rows % shards:
        raise InputError(
            f"train.batch_tokens gives {rows} rows, which {shards} devices (mesh data x fsdp)"
            " cannot share; make it a multiple"
        )
    return plan(rows=rows)
