"""`jaxre predict`: which prompt, labels and data a prediction takes, and where its rows go."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import jax
from rich.console import Console
from rich.table import Table
from rich.text import Text

from jaxre import __version__
from jaxre.checkpoints.source import Loaded, dtype_of, kind_of, open_model, resolve_model
from jaxre.config import Config, Prompt, Source, load_config
from jaxre.data.markers import markers_in, unknown_types
from jaxre.data.tokenizer import load_tokenizer
from jaxre.data.tokens import demonstrator
from jaxre.errors import InputError
from jaxre.evaluation.evaluate import evaluate_rows
from jaxre.evaluation.predictions import Prediction, stem_of, write_predictions
from jaxre.inference.counter import Counter
from jaxre.inference.journal import Journal, identity_of
from jaxre.inference.predict import Mode, predict_examples
from jaxre.models.architecture import EncoderArchitecture
from jaxre.relations import sources
from jaxre.relations.columns import NoColumn, RecordWithoutColumn
from jaxre.relations.hub import PREFIX
from jaxre.relations.labels import DatasetTask, task_of
from jaxre.relations.mixtures import name_of, sources_of
from jaxre.relations.prompt_styles import styled
from jaxre.relations.prompts import parse_marked
from jaxre.relations.schema import ANY, Example, Schemas
from jaxre.relations.tables import is_file


@dataclass(frozen=True)
class Predicted:
    """What `predict_data` did: its rows, the Parquet file they are in, and a line to print."""

    rows: list[Prediction]
    path: Path
    summary: Text


@dataclass(frozen=True)
class Task:
    """A model with the config, prompt, schema and demonstrations that it predicts a dataset
    with.
    """

    loaded: Loaded
    config: Config
    prompt: Prompt
    asked: DatasetTask
    folder: Path | None  # of the run, if it is one

    def predict(
        self,
        examples: list[Example],
        mode: Mode,
        answered: Mapping[str, Prediction] | None = None,
        start: Callable[[int], None] = lambda known: None,
        record: Callable[[list[Prediction]], None] = lambda rows: None,
    ) -> list[Prediction]:
        config = self.config
        return predict_examples(
            self.loaded,
            examples,
            self.asked.schema.labels,
            self.prompt,
            config.predict,
            mode=mode,
            demonstrations=demonstrator(self.asked.train, self.prompt, config.seed),
            tuned_dataset_name=(
                name_of(config.data.train)
                if self.loaded.factors is not None or self.folder
                else "none"
            ),
            model_shot=str(config.prompt.shots),
            answered=answered,
            start=start,
            record=record,
        )


def open_config(
    model: str, config_path: Path | None, style: str | None
) -> tuple[Config, Prompt, Path | None]:
    """The config that a model predicts with, the prompt (in a style, if one is given), and the
    folder of the run if it is one.

    Raises:
      InputError: a model that is no run and no config for it; a config that cannot be used; no such
        style.
    """
    folder = resolve_model(model)
    is_run = kind_of(folder) == "run"
    if config_path is None and not is_run:
        raise InputError(
            f"{model}: not a run folder, so its prompt and labels are not known; give --config"
            " CONFIG with prompt and data"
        )
    config = load_config(config_path or folder / "config.yaml")
    if style and config.train.objective == "classify":
        raise InputError(f"{model}: an encoder has no prompt; leave --style {style} out")
    prompt = styled(config.prediction_prompt, style) if style else config.prediction_prompt
    return config, prompt, folder if is_run else None


def predict_text(
    model: str,
    text: str,
    mode: Mode,
    config_path: Path | None,
    data: str | None = None,
    style: str | None = None,
) -> Table:
    """The labels of one marked text with their probabilities, the most probable first; the one
    answer with its own, where the mode gives no more. `data` says whose labels, where the run has
    several.

    Raises InputError.
    """
    example = parse_marked(text)
    config, prompt, folder = open_config(model, config_path, style)
    asked = task_of(config, source_of(config, data, None) if data else None, shots=prompt.shots)
    task = Task(
        open_model(model, dtype_of(config).dtype, config.model.quantise),
        config,
        prompt,
        asked,
        folder,
    )
    # whose shipped label definitions the prompt may hold
    if asked.dataset:
        example = replace(example, dataset=asked.dataset)
    (row,) = task.predict([example], mode)
    # not markup: a head may be "[/b]"
    table = Table(title=Text(f"{example.head} -> {example.tail}"), title_justify="left")
    told = [*asked.told, *filter(None, [untyped_notice(task.loaded, [example])])]
    table.add_column("label")
    table.add_column("probability", justify="right")
    if row.probabilities is None:
        told.append(
            "the probability that the model writes this and nothing else; --mode score compares all"
            " labels"
        )
        table.add_row(Text(row.generated_relation), f"{math.exp(row.score):.4g}", style="bold")
    else:
        for label, share in sorted(row.probabilities.items(), key=lambda item: -item[1]):
            table.add_row(
                Text(label), f"{share:.4f}", style="bold" if label == row.generated_relation else ""
            )
    table.caption = "\n".join(told) or None
    return table


def predict_data(
    model: str,
    data: str | None,
    split: str | None,
    mode: Mode,
    output: Path | None,
    config_path: Path | None,
    console: Console,
    style: str | None = None,
) -> Predicted:
    """Predicts a split and writes its rows, by default to `predictions/DATASET-SPLIT-MODE[-STYLE]`
    in the run folder.

    Args:
      style: one of `prompt_styles.STYLES`, in place of the run's own prompt.

    Raises:
      InputError: unknown data, labels outside of the schema, prompts that do not fit.
    """
    config, prompt, folder = open_config(model, config_path, style)
    source, examples = load_source(config, data, split)
    asked = task_of(config, source, examples[0].dataset, prompt.shots)
    gold = sum(bool(example.relation) for example in examples)
    labelled = gold == len(examples)
    dtype, why = dtype_of(config)
    told = [
        *([f"model.dtype=auto: {why}"] if why else []),
        *asked.told,
        *(Schemas({ANY: asked.schema}).check(examples, source.dataset) if labelled else []),
    ]
    task = Task(
        open_model(model, dtype, config.model.quantise),
        config,
        prompt,
        asked,
        folder,
    )
    for line in [*told, *filter(None, [untyped_notice(task.loaded, examples)])]:
        console.print(line, markup=False)
    dataset = Path(source.dataset).stem.replace("/", "_").replace(":", "_")
    name = "-".join(part for part in (dataset, source.split, mode, style) if part)
    if folder is None:
        name = f"{task.loaded.name.rpartition('/')[2]}-{name}"
    target = output or (folder or Path()) / "predictions" / name
    identity = identity_of(
        filter(None, (task.loaded.folder, task.loaded.adapter)),
        [
            mode,
            asked.schema.labels,
            prompt.model_dump(),
            config.predict.max_new_tokens,
            dtype.name,
            task.loaded.quantise,
            jax.default_backend(),
            __version__,
        ],
    )
    journal = Journal(stem_of(Path(target)), identity)
    if journal.replaced:
        console.print(
            f"{journal.replaced:,} answers of another model, prompt or mode are replaced",
            markup=False,
        )

    def start(known: int) -> None:
        counter.known = counter.done = known
        if known:
            console.print(f"{known:,} of {len(examples):,} were answered before", markup=False)

    def record(rows: list[Prediction]) -> None:
        journal.add(rows)
        counter.advance(len(rows))

    counter = Counter(console, len(examples))
    try:
        with counter:
            rows = task.predict(examples, mode, journal.rows, start, record)
    except BaseException:
        journal.close()
        raise
    if style:
        rows = [replace(row, prompt_style=style) for row in rows]
    path, _ = write_predictions(target, rows)
    journal.remove()
    if not labelled:
        return Predicted(
            rows,
            path,
            Text(
                f"{len(rows):,} examples, {gold or 'no'} gold"
                f" labels{'; not scored' if gold else ''}"
            ),
        )
    found = evaluate_rows(rows, str(path))
    official = (
        ""
        if found.semeval_official_f1 is None
        else f", official SemEval macro-F1 {found.semeval_official_f1:.4f}"
    )
    told = "; COLLAPSED: one label is predicted for every example" if found.collapsed else ""
    if cut := sum(row.status == "truncated" for row in rows):
        told += (
            f"; {cut:,} answers reach the {config.predict.max_new_tokens} tokens of"
            " predict.max_new_tokens without an end"
        )
    return Predicted(
        rows,
        path,
        Text(
            f"{len(rows):,} examples: F1 {found.f1:.4f}, accuracy"
            f" {found.accuracy:.4f}{official}{told}"
        ),
    )


def untyped_notice(loaded: Loaded, examples: list[Example]) -> str | None:
    """What to say of the examples that an encoder reads with markers other than those of its
    training, if there are any.
    """
    if not isinstance(loaded.architecture, EncoderArchitecture):
        return None
    unknown = unknown_types(examples, markers_in(load_tokenizer(loaded.folder)))
    if not unknown:
        return None
    return (
        f"entities of {len(unknown):,} of {len(examples):,} examples have no type, or none that"
        " training had; they get the untyped marker"
    )


def load_source(
    config: Config, data: str | None, split: str | None
) -> tuple[Source, list[Example]]:
    """What `source_of` names, and its examples.

    Data that the config does not name is read with the column mapping of the config's first source
    of the same kind (file or hub) whose columns it has, with or without that of the relation; with
    the usual columns if there is none such.
    """
    source, known = source_of(config, data, split), _known(config)
    unread: NoColumn | None = None
    if not any(source.dataset == one.dataset for one in known):
        kind, source = (
            _kind(source.dataset),
            source.with_columns_key("--config CONFIG, in it data.test.columns"),
        )
        for mapping in (
            one.columns for one in known if one.columns and kind and _kind(one.dataset) == kind
        ):
            unlabelled = {field: name for field, name in mapping.items() if field != "relation"}
            # "" hides the labels of that source; of another's it says nothing.
            for columns in (mapping, unlabelled) if mapping.get("relation") else (unlabelled,):
                mapped = source.model_copy(update={"columns": columns})
                try:
                    return mapped, sources.load(mapped, labelled=False)
                except RecordWithoutColumn as error:
                    unread = unread or error
                except NoColumn:  # the next one, then
                    continue
    try:
        return source, sources.load(source, labelled=False)
    except NoColumn as error:
        # Of a mapping that all but a record fits, that record says more than advice for the whole
        # file.
        raise unread or error from None


def _known(config: Config) -> list[Source]:
    data = config.data
    return [
        source for given in (data.test, data.validation, data.train) for source in sources_of(given)
    ]


def _kind(dataset: str) -> str | None:
    """Of data whose columns may be mapped."""
    if dataset.startswith(PREFIX):
        return "hub"
    return "file" if is_file(dataset) else None


def source_of(config: Config, data: str | None, split: str | None) -> Source:
    """What `--data` and `--split` name; the settings of the config's source of the same dataset are
    kept.
    """
    if data is None:
        if config.data.test is None:
            raise InputError(
                f"{config.name}: its config has no data.test; say what to predict with --data"
            )
        return (
            config.data.test
            if split is None
            else config.data.test.model_copy(update={"split": split, "part": (0.0, 1.0)})
        )
    if not data:
        raise InputError("--data: is empty; give a dataset name or a file, or leave it out")
    is_file = _kind(data) == "file"
    if is_file and split is not None:
        raise InputError(f"{data}: a file has no splits; leave --split {split} out")
    like = next((source for source in _known(config) if source.dataset == data), None)
    if like is None:
        return Source(dataset=data, split=None if is_file else split or "test")
    return like.model_copy(
        update={"split": None if is_file else split or "test", "part": (0.0, 1.0), "limit": None}
    )
