"""`jaxre predict`: the prompt, labels and data of a prediction, and where its rows are written."""

from __future__ import annotations

import functools
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
from jaxre.evaluation.predictions import Prediction, parquet_of, stem_of, write_predictions
from jaxre.inference.counter import Counter
from jaxre.inference.hosts import join_rows, share_of, wait_for_all
from jaxre.inference.journal import Journal, identity_of
from jaxre.inference.predict import Mode, predict_examples
from jaxre.models.architecture import EncoderArchitecture
from jaxre.models.sharding import join_processes
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
    """The rows of a prediction, the Parquet file that holds them, and a line to print; `shown`
    unless another process prints it.
    """

    rows: list[Prediction]
    path: Path
    summary: Text
    shown: bool = True


@dataclass(frozen=True)
class Task:
    """A model, and the config, prompt, schema and demonstrations for one dataset."""

    loaded: Loaded
    config: Config
    prompt: Prompt
    dataset_task: DatasetTask
    folder: Path | None  # of the run, if it is one

    def predict(
        self,
        examples: list[Example],
        mode: Mode,
        above: float | None = None,
        answered: Mapping[str, Prediction] | None = None,
        start: Callable[[int], None] = lambda known: None,
        record: Callable[[list[Prediction]], None] = lambda rows: None,
    ) -> list[Prediction]:
        config = self.config
        return predict_examples(
            self.loaded,
            examples,
            self.dataset_task.schema.labels,
            self.prompt,
            config.predict,
            mode=mode,
            above=above,
            demonstrations=demonstrator(self.dataset_task.train, self.prompt, config.seed),
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
    above: float | None = None,
) -> Table:
    """The labels of one marked text with their probabilities, the most probable first; the one
    answer with its own, where the mode gives no more. `data` says whose labels, where the run has
    several.

    Raises InputError.
    """
    example = parse_marked(text)
    config, prompt, folder = open_config(model, config_path, style)
    dataset_task = task_of(
        config, source_of(config, data, None) if data else None, shots=prompt.shots
    )
    task = Task(
        open_model(model, dtype_of(config).dtype, config.model.quantise),
        config,
        prompt,
        dataset_task,
        folder,
    )
    # whose shipped label definitions the prompt may hold
    if dataset_task.dataset:
        example = replace(example, dataset=dataset_task.dataset)
    (row,) = task.predict([example], mode, above)
    # not markup: a head may be "[/b]"
    table = Table(title=Text(f"{example.head} -> {example.tail}"), title_justify="left")
    notices = [*dataset_task.notices, *filter(None, [untyped_notice(task.loaded, [example])])]
    table.add_column("label")
    table.add_column("probability", justify="right")
    if row.probabilities is None:
        notices.append(
            "the probability that the model writes this and nothing else; --mode score compares all"
            " labels"
        )
        table.add_row(Text(row.generated_relation), f"{math.exp(row.score):.4g}", style="bold")
    else:
        for label, share in sorted(row.probabilities.items(), key=lambda item: -item[1]):
            table.add_row(
                Text(label), f"{share:.4f}", style="bold" if label == row.generated_relation else ""
            )
        for label, bound in sorted((row.bounds or {}).items(), key=lambda item: -item[1]):
            table.add_row(Text(label), f"at most {bound:.4g}", style="dim")
        if above is not None:
            notices.append(
                "probabilities that the model writes each label, not shares of their sum"
            )
    table.caption = "\n".join(notices) or None
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
    above: float | None = None,
) -> Predicted:
    """Predicts a split and writes its rows, by default to
    `predictions/DATASET-SPLIT-MODE[-aboveP][-STYLE]` in the run folder. On several hosts each
    predicts its share (`hosts.py`) and the first writes all rows.

    Args:
      style: one of `prompt_styles.STYLES`, in place of the run's own prompt.

    Raises:
      InputError: unknown data, labels outside of the schema, prompts that do not fit.
    """
    join_processes()
    first_process = jax.process_index() == 0
    say = functools.partial(console.print, markup=False) if first_process else lambda line: None
    config, prompt, folder = open_config(model, config_path, style)
    source, examples = load_source(config, data, split)
    dataset_task = task_of(config, source, examples[0].dataset, prompt.shots)
    gold = sum(bool(example.relation) for example in examples)
    labelled = gold == len(examples)
    dtype, why = dtype_of(config)
    notices = [
        *([f"model.dtype=auto: {why}"] if why else []),
        *dataset_task.notices,
        *(Schemas({ANY: dataset_task.schema}).check(examples, source.dataset) if labelled else []),
    ]
    task = Task(
        open_model(model, dtype, config.model.quantise),
        config,
        prompt,
        dataset_task,
        folder,
    )
    for line in [*notices, *filter(None, [untyped_notice(task.loaded, examples)])]:
        say(line)
    dataset = Path(source.dataset).stem.replace("/", "_").replace(":", "_")
    threshold = "" if above is None else f"above{above:g}"
    name = "-".join(part for part in (dataset, source.split, mode, threshold, style) if part)
    if folder is None:
        name = f"{task.loaded.name.rpartition('/')[2]}-{name}"
    target = output or (folder or Path()) / "predictions" / name
    identity = identity_of(
        filter(None, (task.loaded.folder, task.loaded.adapter)),
        [
            mode,
            above,
            dataset_task.schema.labels,
            prompt.model_dump(),
            config.predict.max_new_tokens,
            dtype.name,
            task.loaded.quantise,
            jax.default_backend(),
            __version__,
        ],
    )
    stem = stem_of(Path(target))
    processes, mine = jax.process_count(), share_of(examples)
    if processes > 1:
        say(f"{processes} processes predict {len(mine):,} examples each, or one less")
        stem = stem.with_name(f"{stem.name}.{jax.process_index() + 1}-of-{processes}")
    journal = Journal(stem, identity)
    if journal.replaced:
        say(f"{journal.replaced:,} answers of another model, prompt or mode are replaced")

    def start(known: int) -> None:
        counter.known = counter.done = known
        if known:
            say(f"{known:,} of {len(mine):,} were answered before")

    def record(rows: list[Prediction]) -> None:
        journal.add(rows)
        counter.advance(len(rows))

    counter = Counter(console if first_process else Console(quiet=True), len(mine))
    try:
        with counter:
            rows = task.predict(mine, mode, above, journal.rows, start, record) if mine else []
    except BaseException:
        journal.close()
        raise
    rows = join_rows(rows)
    if style:
        rows = [replace(row, prompt_style=style) for row in rows]
    path = parquet_of(Path(target))
    if first_process:
        write_predictions(target, rows)
    wait_for_all("predictions are written")  # before a share that a kill may need again goes
    journal.remove()
    return Predicted(rows, path, summary_of(rows, gold, config, path), first_process)


def summary_of(rows: list[Prediction], gold: int, config: Config, path: Path) -> Text:
    """A line on rows of which `gold` have a gold label: their scores where all have one."""
    count = f"{len(rows):,} examples"
    if gold < len(rows):
        return Text(f"{count}, {gold or 'no'} gold labels{'; not scored' if gold else ''}")
    scores = evaluate_rows(rows, str(path))
    official = scores.semeval_official_f1
    parts = [f"{count}: F1 {scores.f1:.4f}, accuracy {scores.accuracy:.4f}"]
    if official is not None:
        parts.append(f", official SemEval macro-F1 {official:.4f}")
    if scores.collapsed:
        parts.append("; COLLAPSED: one label is predicted for every example")
    if truncated := sum(row.status == "truncated" for row in rows):
        parts.append(
            f"; {truncated:,} answers reach the {config.predict.max_new_tokens} tokens of"
            " predict.max_new_tokens without an end"
        )
    return Text("".join(parts))


def untyped_notice(loaded: Loaded, examples: list[Example]) -> str | None:
    """A notice on examples whose entity types an encoder has no marker for, or None."""
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
    """The source that `source_of` returns, and its examples.

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
    """The kind of data whose columns may be mapped: "hub" or "file"; None for any other."""
    if dataset.startswith(PREFIX):
        return "hub"
    return "file" if is_file(dataset) else None


def source_of(config: Config, data: str | None, split: str | None) -> Source:
    """The source that `--data` and `--split` name, with the settings of the config's source of the
    same dataset.
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
