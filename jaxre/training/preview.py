"""`jaxre prepare`: shows the data that a run would train on."""

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
from jaxre.data.dataset import Dataset, Split, make_plan, supervised_of
from jaxre.data.tokens import TokenSet
from jaxre.errors import InputError
from jaxre.objectives import load_dataset
from jaxre.relations import mixtures, sources
from jaxre.relations.hub import PREFIX
from jaxre.relations.schema import ANY, Example, by_dataset, is_negative, label_counts

SHOWN = 3
LISTED = 10
BINS = 12
BAR = 40


def preview(config: Config, folder: Path) -> Group:
    """Shows counts (in all and of each source), labels, leakage, a histogram of lengths, packing,
    and three decoded examples with the supervised part marked.

    Args:
      folder: of the model, for its tokenizer.

    Raises:
      InputError: as `load_dataset` does.
    """
    dataset = load_dataset(config, folder)
    test = sources.load(config.data.test) if config.data.test and dataset.schemas else []
    parts = [_counts(config, dataset, test), *_mixture_parts(config, dataset)]
    if dataset.schemas is not None:
        parts += [*_labels(dataset), _leakage(dataset, test)]
    parts += [
        _histogram(dataset.train.tokens, config.train.row_length),
        _packing(config, dataset.train.tokens),
    ]
    parts += [_shown(dataset, number) for number in range(min(SHOWN, len(dataset.train.tokens)))]
    return Group(*parts)


def leak_notice(config: Config, dataset: Dataset) -> str:
    """One line on how many held-out examples have a text of train; "" if there are no held-out
    examples to compare.

    Skips a test split on the hub, so that training does not wait for it, and reports one that does
    not load. The token cache stores the line, so that a second start need not read the training
    examples for it.
    """
    splits = {
        name: getattr(config.data, name)
        for name in ("validation", "test")
        if getattr(config.data, name)
    }
    compared = [
        dataset.recipe,
        *(digest for split in splits.values() for digest in mixtures.digests_of(split)),
    ]
    key = None
    if None not in compared:
        settings = {name: split.model_dump() for name, split in splits.items()}
        key = hashlib.sha256(json.dumps(["leaks", compared, settings]).encode()).hexdigest()
        if note := read_note(config.data.cache, key):
            return note["notices"]
    notices = []
    for name, split in splits.items():
        if dataset.schemas is None or (name == "test" and split.dataset.startswith(PREFIX)):
            continue
        try:
            held_out = sources.load(split) if name == "test" else dataset.validation.examples
        except InputError as error:
            notices.append(f"{name} not read ({error})")
            continue
        overlap = sources.overlap(dataset.train.examples, held_out)
        notices.append(
            f"{len(overlap.same_text):,} of {len(held_out):,} in {name}"
            f" ({len(overlap.same_pair):,} with the same pair)"
        )
    line = f"examples whose text also occurs in train: {', '.join(notices)}" if notices else ""
    if key:
        write_note(config.data.cache, key, {"notices": line})
    return line


def _counts(config: Config, dataset: Dataset, test: list[Example]) -> Table:
    table = Table(title=f"data of {config.name}", title_justify="left")
    table.add_column("split")
    for column in ("examples", "tokens", "supervised", "longest", "too long"):
        table.add_column(column, justify="right")
    table.add_column("token cache")
    for name, split in _splits(dataset):
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


def _splits(dataset: Dataset) -> list[tuple[str, Split]]:
    """Names and splits of the training data and, if there is one, the validation data."""
    splits = (("train", dataset.train), ("validation", dataset.validation))
    return [(name, split) for name, split in splits if split is not None]


def _mixtures(config: Config, dataset: Dataset) -> list[tuple[str, Split]]:
    return [
        (name, split)
        for name, split in _splits(dataset)
        if isinstance(getattr(config.data, name), Mixture)
    ]


def data_notices(config: Config, dataset: Dataset) -> list[str]:
    """Lines on the sources of each mixture, then on labels from improper sources and unknown
    labels.
    """
    lines = []
    for name, split in _mixtures(config, dataset):
        listed = ", ".join(
            f"{count.used:,} of {count.read:,} of {count.source} ({count.domain})"
            for count in split.counts
        )
        lines.append(f"{name}: {listed}")
    return [*lines, *dataset.notices]


def _mixture_parts(config: Config, dataset: Dataset) -> list[Table | Text]:
    """A table of the sources of each mixture, and the notices about labels."""
    parts = []
    for name, split in _mixtures(config, dataset):
        table = Table(title=f"sources of {name}", title_justify="left")
        table.add_column("source")
        table.add_column("domain")
        table.add_column("examples", justify="right")
        table.add_column("used", justify="right")
        for count in split.counts:
            table.add_row(
                Text(count.source), Text(count.domain), f"{count.read:,}", f"{count.used:,}"
            )
        parts.append(table)
    return [*parts, *(Text(line, style="bold red") for line in dataset.notices)]


def _labels(dataset: Dataset) -> list[Table]:
    tables = []
    for name, examples in by_dataset(dataset.train.examples).items():
        counts = label_counts(examples)
        place = "the training split" if ANY in dataset.schemas.by_dataset else name
        table = Table(title=Text(f"labels of {place}"), title_justify="left")
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
        for dataset_name, members in datasets.items():
            overlap = sources.overlap(dataset.train.examples, members)
            texts, pairs = len(overlap.same_text), len(overlap.same_pair)
            place = f"{name}, {dataset_name}" if len(datasets) > 1 else name
            lines.append(
                f"{place}: {texts} examples have a text of train, {pairs} also the same"
                f" pair{_few(overlap.same_text)}"
            )
    for name, split in _splits(dataset):
        if split.dropped:
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
        title = f"{len(ids)} tokens, ⟦label⟧"
    else:
        text = Text(dataset.tokenizer.decode(ids[:prompt]), style="dim")
        text.append("⟦" + dataset.tokenizer.decode(ids[prompt:]) + "⟧", style="bold green")
        title = f"{prompt} + {len(ids) - prompt} tokens, ⟦supervised⟧"
    return Panel(text, title=Text(f"{tokens.ids[number]}: {title}"), title_align="left")
