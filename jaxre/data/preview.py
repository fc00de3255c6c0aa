"""`jaxre prepare`: what a run would train on, shown before it does."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import numpy as np
from rich.console import Group
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from jaxre.config import Config, Mixture
from jaxre.data.cache import read_note, write_note
from jaxre.data.dataset import Dataset, load_dataset, make_plan, supervised_of
from jaxre.data.tokens import TokenSet
from jaxre.errors import InputError
from jaxre.relations import mixtures, sources
from jaxre.relations.hub import PREFIX
from jaxre.relations.schema import ANY, Example, by_dataset, is_negative, label_counts

SHOWN = 3
LISTED = 10
BINS = 12
BAR = 40


def preview(config: Config, folder: Path) -> Group:
    """Counts, also of each source, labels, leakage, length histogram, packing, and three examples
    decoded with the supervised part marked.

    Args:
      folder: of the model, for its tokenizer.

    Raises:
      InputError: as `load_dataset`.
    """
    dataset = load_dataset(config, folder)
    test = sources.load(config.data.test) if config.data.test and dataset.schemas else []
    parts = [_counts(config, dataset, test), *_mixed(config, dataset)]
    if dataset.schemas is not None:
        parts += [*_labels(dataset), _leakage(dataset, test)]
    parts += [
        _histogram(dataset.train.tokens, config.train.row_length),
        _packing(config, dataset.train.tokens),
    ]
    parts += [_shown(dataset, number) for number in range(min(SHOWN, len(dataset.train.tokens)))]
    return Group(*parts)


def told_leaks(config: Config, dataset: Dataset) -> str:
    """One line on how many held-out examples have a text of train; "" where there are none to look
    at.

    A test split on the hub is left out, for training should not wait for it; one that does not load
    is said to be so. The line is kept in the token cache, so that a second start need not read the
    training examples for it.
    """
    given = {
        name: getattr(config.data, name)
        for name in ("validation", "test")
        if getattr(config.data, name)
    }
    compared = [
        dataset.recipe,
        *(digest for one in given.values() for digest in mixtures.digests_of(one)),
    ]
    settings = {name: source.model_dump() for name, source in given.items()}
    key = (
        None
        if None in compared
        else hashlib.sha256(json.dumps(["leaks", compared, settings]).encode()).hexdigest()
    )
    if key and (note := read_note(config.data.cache, key)):
        return note["told"]
    told = []
    for name, examples in (
        ("validation", lambda: dataset.validation.examples),
        ("test", lambda: sources.load(config.data.test)),
    ):
        if (
            name not in given
            or dataset.schemas is None
            or (name == "test" and given[name].dataset.startswith(PREFIX))
        ):
            continue
        try:
            held_out = examples()
        except InputError as error:
            told.append(f"{name} not read ({error})")
            continue
        found = sources.overlap(dataset.train.examples, held_out)
        told.append(
            f"{len(found.same_text):,} of {len(held_out):,} in {name} ({len(found.same_pair):,}"
            " with the same pair)"
        )
    line = f"examples whose text also occurs in train: {', '.join(told)}" if told else ""
    if key:
        write_note(config.data.cache, key, {"told": line})
    return line


def _counts(config: Config, dataset: Dataset, test: list[Example]) -> Table:
    table = Table(title=f"data of {config.name}", title_justify="left")
    for column in (
        "split",
        "examples",
        "tokens",
        "supervised",
        "longest",
        "too long",
        "token cache",
    ):
        table.add_column(column, justify="left" if column in ("split", "token cache") else "right")
    for name, split in (("train", dataset.train), ("validation", dataset.validation)):
        if split is None:
            continue
        tokens = split.tokens
        row = (
            len(tokens),
            tokens.tokens.size,
            int(tokens.supervised.sum()),
            int(tokens.lengths.max()),
            len(split.dropped),
        )
        table.add_row(
            name, *(f"{value:,}" for value in row), "read" if split.from_cache else "written"
        )
    if test:
        table.add_row("test", f"{len(test):,}")
    return table


def told_data(config: Config, dataset: Dataset) -> list[str]:
    """Lines on the sources of a mixture, then on labels that come from where they should not, or
    are not known.
    """
    lines = []
    for name, split in (("train", dataset.train), ("validation", dataset.validation)):
        if isinstance(getattr(config.data, name), Mixture):
            listed = ", ".join(
                f"{count.used:,} of {count.read:,} of {count.source} ({count.domain})"
                for count in split.counts
            )
            lines.append(f"{name}: {listed}")
    return [*lines, *dataset.told]


def _mixed(config: Config, dataset: Dataset) -> list[Table | Text]:
    """A table of the sources for each mixture, and what is to be said of labels."""
    parts = []
    for name, split in (("train", dataset.train), ("validation", dataset.validation)):
        if not isinstance(getattr(config.data, name), Mixture):
            continue
        table = Table(title=f"sources of {name}", title_justify="left")
        for column in ("source", "domain", "examples", "used"):
            table.add_column(column, justify="left" if column in ("source", "domain") else "right")
        for count in split.counts:
            table.add_row(
                Text(count.source), Text(count.domain), f"{count.read:,}", f"{count.used:,}"
            )
        parts.append(table)
    return [*parts, *(Text(line, style="bold red") for line in dataset.told)]


def _labels(dataset: Dataset) -> list[Table]:
    tables = []
    for name, examples in by_dataset(dataset.train.examples).items():
        counts = label_counts(examples)
        of = "the training split" if ANY in dataset.schemas.by_dataset else name
        table = Table(title=Text(f"labels of {of}"), title_justify="left")
        table.add_column("label")
        table.add_column("examples", justify="right")
        table.add_column("")
        for label in dataset.schemas.of(name).labels:
            table.add_row(
                Text(label), f"{counts[label]:,}", "no relation" if is_negative(label) else ""
            )
        tables.append(table)
    return tables


def _leakage(dataset: Dataset, test: list[Example]) -> Text:
    lines = []
    for name, examples in (
        ("validation", dataset.validation.examples if dataset.validation else []),
        ("test", test),
    ):
        datasets = by_dataset(examples)
        for of, members in datasets.items():
            found = sources.overlap(dataset.train.examples, members)
            texts, pairs = len(found.same_text), len(found.same_pair)
            place = f"{name}, {of}" if len(datasets) > 1 else name
            lines.append(
                f"{place}: {texts} examples have a text of train, {pairs} also the same"
                f" pair{_few(found.same_text)}"
            )
    for name, split in (("train", dataset.train), ("validation", dataset.validation)):
        if split and split.dropped:
            lines.append(
                f"{name}: {len(split.dropped)} examples are longer than a row and left"
                f" out{_few(split.dropped)}"
            )
            if cut := split.truncation:
                lines.append(
                    f"{name}: cut at {cut.limit} tokens, {cut.answer_gone} would lose their answer,"
                    f" {cut.answer_cut} a part of it"
                )
    unlocated = sources.unlocated(dataset.train.examples)
    if unlocated:
        lines.append(
            f"train: {len(unlocated)} examples have an entity that is not in the text and is not"
            f" marked{_few(unlocated)}"
        )
    return Text("\n".join(lines))


def _few(ids) -> str:
    return f" ({', '.join(ids[:LISTED])}{', ...' if len(ids) > LISTED else ''})" if len(ids) else ""


def _histogram(tokens: TokenSet, row_length: int) -> Table:
    table = Table(title="tokens per example", title_justify="left", show_header=False)
    shortest, longest = int(tokens.lengths.min()), int(tokens.lengths.max())
    width = -(-(longest - shortest + 1) // BINS)
    counts = np.bincount((tokens.lengths - shortest) // width)
    for number, count in enumerate(counts.tolist()):
        low = shortest + number * width
        table.add_row(
            f"{low}-{min(low + width - 1, longest)}",
            "█" * round(BAR * count / counts.max()),
            f"{count:,}",
        )
    table.add_row("row", "", str(row_length))
    return table


def _packing(config: Config, tokens: TokenSet) -> Text:
    plan = make_plan(config, tokens, shards=1)
    fill = plan.fill(tokens.lengths, supervised_of(config, tokens))
    shapes = ", ".join(
        f"{shape.rows} x {shape.length} ({shape.supervised} supervised)" for shape in plan.shapes
    )
    return Text(
        f"packing: rows of {shapes}; fill {1 - fill.pad:.1%}; {plan.epoch_ends[0]:,} updates an"
        f" epoch; {fill.supervised:.1%} of the tokens supervised; {fill.shared:.1%} shared"
    )


def _shown(dataset: Dataset, number: int) -> Panel:
    tokens = dataset.train.tokens
    ids, prompt = tokens[number].tolist(), int(tokens.prompt_lengths[number])
    if tokens.labels is not None:
        text = Text(dataset.tokenizer.decode(ids), style="dim")
        text.append(f" ⟦{dataset.schema.labels[tokens.labels[number]]}⟧", style="bold green")
        return Panel(
            text,
            title=Text(f"{tokens.ids[number]}: {len(ids)} tokens, ⟦label⟧"),
            title_align="left",
        )
    text = Text(dataset.tokenizer.decode(ids[:prompt]), style="dim")
    text.append("⟦" + dataset.tokenizer.decode(ids[prompt:]) + "⟧", style="bold green")
    return Panel(
        text,
        title=Text(f"{tokens.ids[number]}: {prompt} + {len(ids) - prompt} tokens, ⟦supervised⟧"),
        title_align="left",
    )
