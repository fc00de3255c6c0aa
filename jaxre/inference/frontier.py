"""`jaxre frontier`: asks frontier models the prompts of a run through files that the user sends,
and makes a cache of the answers.

written = export_requests(config, Ask("openai", "gpt-x"), None, None, "requests/facts.jsonl")
done = import_results(written.manifest, ["output.jsonl"], "caches/facts", price=(0.5, 2.0))
"""

from __future__ import annotations

import dataclasses
import datetime
import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Group
from rich.table import Table
from rich.text import Text

from jaxre.config import Config, Source
from jaxre.data.tokens import demonstrator, questions_of
from jaxre.errors import InputError
from jaxre.evaluation.evaluate import write_json
from jaxre.evaluation.frontier.check import CacheCheck, check_cache
from jaxre.evaluation.frontier.read import read_cache
from jaxre.evaluation.frontier.requests import (
    Ask,
    Manifest,
    Request,
    build_manifest,
    prompt_text,
    read_manifest,
    write_requests,
)
from jaxre.evaluation.frontier.results import Collected, Outcome, collect
from jaxre.evaluation.metrics.scores import MALFORMED_CHARACTERS
from jaxre.evaluation.predictions import Prediction, stem_of, write_predictions
from jaxre.inference.commands import load_source
from jaxre.inference.decoding import clean_answer
from jaxre.relations import sources
from jaxre.relations.label_map import read_label_map
from jaxre.relations.labels import task_of
from jaxre.relations.prompt_styles import styled
from jaxre.relations.schema import ANY, Example, Schema, Schemas, normalise_label
from jaxre.relations.tables import is_file

REFUSAL = "(refusal)"
SHOWN = 5


@dataclass(frozen=True)
class Exported:
    """Request files, the manifest beside them, a line to print, and what a user should know of the
    labels, line by line.
    """

    files: list[Path]
    manifest: Path
    summary: str
    notices: tuple[str, ...]


@dataclass(frozen=True)
class Imported:
    """The cache, its account (`summary`, also in the JSON file beside it), and the rows."""

    path: Path
    summary_path: Path
    summary: dict[str, Any]
    rows: list[Prediction]


@dataclass(frozen=True)
class _Task:
    """The prompts of a config on some data."""

    examples: list[Example]
    schema: Schema
    prompts: list[list[dict[str, str]]]
    gen_type: str
    prompt_shot: str
    notices: tuple[str, ...]


def export_requests(
    config: Config, ask: Ask, data: str | None, split: str | None, output: Path, style: str = ""
) -> Exported:
    """Writes what to ask a frontier model: the same chat turns that a local model gets.

    Args:
      data, split: as in `jaxre predict`; the config's test data if not given.
      output: see `write_requests`.
      style: one of `prompt_styles.STYLES`, in place of the config's own prompt.

    Raises:
      InputError: unknown data or style, labels outside of the schema, and as `build_manifest` and
        `write_requests`.
    """
    task = _task(config, *load_source(config, data, split), style)
    manifest = build_manifest(
        task.examples,
        task.prompts,
        ask,
        dataset=task.examples[0].dataset,
        gen_type=task.gen_type,
        prompt_shot=task.prompt_shot,
        labels=task.schema.labels,
        date=datetime.datetime.now(datetime.UTC).date().isoformat(),
        prompt_style=style,
    )
    files, path = write_requests(output, manifest)
    characters = sum(len(turn["content"]) for question in task.prompts for turn in question)
    return Exported(
        files,
        path,
        f"{manifest.examples:,} examples, {len(manifest.requests):,} requests to {ask.model}"
        f" ({task.gen_type}, {task.prompt_shot}-shot), {characters / manifest.examples:,.0f}"
        f" characters a prompt, at most {ask.max_tokens} tokens an answer",
        task.notices,
    )


def import_results(
    manifest_path: str | Path,
    results: Sequence[str | Path],
    output: Path,
    price: tuple[float, float] | None = None,
) -> Imported:
    """Makes a cache (.parquet and .csv) and its account (.summary.json) from the answers to
    exported requests.

    A request with an error, and one without an answer, has no row: it is counted. A refusal is a
    row that is no label, so it counts as wrong wherever it stands; an answer that was cut is a row
    too. Rows stand in the order of the export, whatever that of the results.

    Args:
      price: USD per million input and output tokens, for answers whose file states no cost of its
        own. A row has its share of what its request cost; the account has all that was paid,
        repeated answers included.

    Raises:
      InputError: a file that cannot be used, no answer at all. Then an earlier cache of this name
        stays as it is.
    """
    manifest = read_manifest(manifest_path)
    if price is not None and not all(math.isfinite(one) and one >= 0 for one in price):
        raise InputError(
            "--price: is negative or no number; give USD per million tokens, such as --price"
            " 0.5 2.0"
        )
    collected = collect(manifest, results)
    rows = [
        row
        for request in manifest.requests
        for row in _rows(manifest, request, collected.kept.get(request.custom_id), price)
    ]
    if not rows:
        raise InputError(
            f"{results[0]}: no request has an answer ({_few(_errors(collected))}); send the"
            " requests again"
        )
    stem = stem_of(Path(output))
    target = stem.with_name(f"{stem.name}.summary.json")
    draft = stem.with_name(f".{stem.name}.summary.json.part")
    summary = summarise(manifest, collected, rows, price)
    try:
        write_json(draft, summary)
        path, _ = write_predictions(stem, rows)
        draft.replace(target)
    finally:
        draft.unlink(missing_ok=True)
    return Imported(path, target, summary, rows)


def _rows(
    manifest: Manifest, request: Request, outcome: Outcome | None, price: tuple[float, float] | None
) -> list[Prediction]:
    """One row per example of an answered request."""
    if outcome is None or outcome.kind == "error":
        return []
    text = clean_answer(outcome.text)
    cost = _cost(outcome, price)
    return [
        Prediction(
            example_id=example.example_id,
            relation=example.relation,
            generated_relation=f"{REFUSAL} {text}".strip() if outcome.kind == "refusal" else text,
            eval_dataset_name=manifest.dataset,
            gen_type=manifest.gen_type,
            model_id=manifest.ask.model,
            tuned_dataset_name="frontier",
            model_shot="n/a",
            prompt_shot=manifest.prompt_shot,
            prompt_style=manifest.prompt_style,
            prompt=request.prompt,
            prompt_hash=example.prompt_hash,
            input_tokens=outcome.input_tokens,
            output_tokens=outcome.output_tokens,
            date=outcome.date or manifest.date,
            cost_usd=None if cost is None else cost / len(request.examples),
            status=(
                "refusal" if outcome.kind == "refusal" else "truncated" if outcome.truncated else ""
            ),
        )
        for example in request.examples
    ]


def _cost(outcome: Outcome, price: tuple[float, float] | None) -> float | None:
    """USD that one answer cost; None if neither the file nor a price tells."""
    if outcome.cost_usd is not None:
        return outcome.cost_usd
    if price is None or outcome.input_tokens is None or outcome.output_tokens is None:
        return None
    return (outcome.input_tokens * price[0] + outcome.output_tokens * price[1]) / 1e6


def summarise(
    manifest: Manifest,
    collected: Collected,
    rows: Sequence[Prediction],
    price: tuple[float, float] | None,
) -> dict[str, Any]:
    """Summary of an import: requests, answers, what is missing, and the cost."""
    known = {normalise_label(label) for label in manifest.labels}
    answers = [normalise_label(row.generated_relation) for row in rows if row.status != "refusal"]
    costs = [_cost(outcome, price) for outcome in collected.outcomes]
    kept = [outcome for outcome in collected.kept.values() if outcome.kind != "error"]
    return {
        "provider": manifest.ask.provider,
        "model": manifest.ask.model,
        "models_reported": _counts(outcome.model for outcome in kept if outcome.model),
        "dataset": manifest.dataset,
        "gen_type": manifest.gen_type,
        "prompt_shot": manifest.prompt_shot,
        "prompt_style": manifest.prompt_style,
        "asked_on": manifest.date,
        "data_digest": manifest.data_digest,
        "requests": len(manifest.requests),
        "examples": manifest.examples,
        "records": collected.records,
        "answered_requests": len(kept),
        "answered_examples": len(rows),
        "coverage": len(rows) / manifest.examples,
        "errors": _errors(collected),
        "missing": len(collected.missing),
        "unanswered_ids": [
            example.example_id
            for request in manifest.requests
            if request.custom_id not in collected.kept
            or collected.kept[request.custom_id].kind == "error"
            for example in request.examples
        ],
        "refusals": sum(outcome.kind == "refusal" for outcome in kept),
        "truncated": sum(outcome.truncated for outcome in kept),
        "empty": sum(
            outcome.kind == "answer" and not clean_answer(outcome.text) for outcome in kept
        ),
        "malformed_rows": sum(len(answer) > MALFORMED_CHARACTERS for answer in answers),
        "outside_schema_rows": _counts(answer for answer in answers if answer not in known),
        "repeated": len(collected.repeated),
        "contradicted_ids": list(collected.contradicted),
        "unknown_ids": list(collected.unknown),
        "input_tokens": sum(outcome.input_tokens or 0 for outcome in collected.outcomes),
        "output_tokens": sum(outcome.output_tokens or 0 for outcome in collected.outcomes),
        "without_token_counts": sum(
            outcome.input_tokens is None and outcome.kind != "error"
            for outcome in collected.outcomes
        ),
        "cost_usd": (
            math.fsum(cost for cost in costs if cost is not None)
            if any(cost is not None for cost in costs)
            else None
        ),
        "without_cost": sum(
            cost is None and outcome.kind != "error"
            for cost, outcome in zip(costs, collected.outcomes, strict=True)
        ),
    }


def import_table(imported: Imported) -> Group:
    """The account of an import for the terminal."""
    s = imported.summary
    style = f", style {s['prompt_style']}" if s["prompt_style"] else ""
    title = Text(f"{s['model']} on {s['dataset']}, {s['gen_type']}, {s['prompt_shot']}-shot{style}")
    table = Table(show_header=False, title=title, title_justify="left")
    table.add_row("models that answered, as they say", Text(_few(s["models_reported"])))
    table.add_row(
        "examples answered",
        f"{s['answered_examples']:,} of {s['examples']:,} ({s['coverage']:.1%})",
    )
    table.add_row("requests answered", f"{s['answered_requests']:,} of {s['requests']:,}")
    if s["errors"]:
        table.add_row(
            "errors, without a row", Text(f"{sum(s['errors'].values()):,} ({_few(s['errors'])})")
        )
    for name, key in (
        ("in no file, without a row", "missing"),
        ("refusals, scored as wrong", "refusals"),
        ("cut at --max-tokens", "truncated"),
    ):
        table.add_row(name, f"{s[key]:,}")
    table.add_row("empty, scored as none", f"{s['empty']:,}")
    table.add_row(
        "no label of the schema",
        Text(f"{sum(s['outside_schema_rows'].values()):,} ({_few(s['outside_schema_rows'])})"),
    )
    table.add_row(
        "answered again: alike, otherwise", f"{s['repeated']:,}, {len(s['contradicted_ids']):,}"
    )
    table.add_row("ids that are not of this export", f"{len(s['unknown_ids']):,}")
    table.add_row("tokens in, out", f"{s['input_tokens']:,}, {s['output_tokens']:,}")
    unknown = f" ({s['without_cost']:,} answers without)" if s["without_cost"] else ""
    table.add_row(
        "cost",
        "not known; give --price" if s["cost_usd"] is None else f"{s['cost_usd']:.4f} USD{unknown}",
    )
    notes = []
    if s["contradicted_ids"]:
        notes.append(
            f"WARNING: {len(s['contradicted_ids']):,} requests were answered in two ways; the first"
            " answer in the files is kept"
        )
    if len(s["models_reported"]) > 1:
        notes.append(
            "WARNING: several models answered:"
            f" {', '.join(f'{name} {number:,}' for name, number in s['models_reported'].items())}"
        )
    return Group(table, *(Text(note, style="bold red") for note in notes))


def check_file(
    cache: Path,
    config: Config | None,
    data: str | None,
    split: str | None,
    model: str | None,
    labels: Path | None,
    least: float,
) -> CacheCheck:
    """Checks a cache against the data of a config, or against data alone (then the schema is that
    of its gold labels, and prompts are only checked where the data has the study's prompt column).
    The prompts of a config are those of the style that the cache states.

    Raises:
      InputError: neither config nor data; a cache or data that cannot be read; a model that the
        cache does not have.
    """
    if config is not None:
        source, examples = load_source(config, data, split)
    elif data is not None:
        source = Source(dataset=data, split=split if is_file(data) else split or "test")
        examples = sources.load(source, labelled=False)
    else:
        raise InputError("a cache is checked against data; give --config CONFIG or --data NAME")
    found = read_cache(cache, examples)
    if model is not None:
        offered = sorted({answer.model for answer in found.answers})
        if model not in offered:
            raise InputError(
                f"{cache}: holds answers of {', '.join(offered)}, not {model!r}; name one of them"
                " with --model"
            )
        found = dataclasses.replace(
            found, answers=tuple(answer for answer in found.answers if answer.model == model)
        )
    label_map = None if labels is None else read_label_map(labels)
    if config is None:
        return check_cache(
            found, examples, Schema.of(examples).labels, label_map=label_map, least=least
        )
    styles = {answer.prompt_style for answer in found.answers}
    task = _task(config, source, examples, styles.pop() if len(styles) == 1 else "")
    prompts = {
        example.id: prompt_text(question)
        for example, question in zip(examples, task.prompts, strict=True)
    }
    setting = task.gen_type, task.prompt_shot
    check = check_cache(
        found,
        examples,
        task.schema.labels,
        prompts=prompts,
        setting=setting,
        label_map=label_map,
        least=least,
    )
    return dataclasses.replace(check, notes=(*task.notices, *check.notes))


def _task(config: Config, source: Source, examples: list[Example], style: str) -> _Task:
    prompt = styled(config.prediction_prompt, style) if style else config.prediction_prompt
    dataset_task = task_of(config, source, examples[0].dataset, prompt.shots)
    labelled = all(example.relation for example in examples)
    notices = (
        *dataset_task.notices,
        *(Schemas({ANY: dataset_task.schema}).check(examples, source.dataset) if labelled else ()),
    )
    questions = questions_of(
        examples,
        prompt,
        dataset_task.schema.labels,
        demonstrator(dataset_task.train, prompt, config.seed),
    )
    return _Task(
        examples,
        dataset_task.schema,
        questions,
        "gen_constrained" if prompt.enumerate else "gen_open",
        str(prompt.shots),
        notices,
    )


def _errors(collected: Collected) -> dict[str, int]:
    return _counts(outcome.reason for outcome in collected.kept.values() if outcome.kind == "error")


def _counts(names: Iterable[str]) -> dict[str, int]:
    """Counts of the names, the most frequent first, independent of their order."""
    return dict(sorted(Counter(names).items(), key=lambda item: (-item[1], item[0])))


def _few(counts: dict[str, int]) -> str:
    shown = ", ".join(f"{name[:60]} {number:,}" for name, number in list(counts.items())[:SHOWN])
    return (shown or "none") + (", ..." if len(counts) > SHOWN else "")
