"""The commands: parse, call, print. `jaxre --help`."""

from __future__ import annotations

import contextlib
import logging
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Literal

import typer
from rich.console import Console

from jaxre.errors import InputError
from jaxre.host_memory import keep_freed_memory

# Each command imports its modules itself: jax and the readers take seconds to load.
# `keep_freed_memory` runs before that, as the imports start threads. `\b` before an example keeps
# its lines unwrapped, so that they can be pasted.

app = typer.Typer(
    help="Fine-tunes small language models for relation extraction.",
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
frontier = typer.Typer(
    help="Writes request files for frontier models, which you send, and caches their answers.",
    rich_markup_mode=None,
)
app.add_typer(frontier, name="frontier")
console = Console()

ConfigFile = Annotated[Path, typer.Argument(help="YAML file of the run", metavar="CONFIG")]
Overrides = Annotated[
    list[str] | None, typer.Argument(help="settings on top of the file", metavar="[KEY=VALUE ...]")
]
Dedup = Annotated[
    bool,
    typer.Option(
        "--dedup",
        help="leave out training examples whose text is in validation or test (data.dedup=true)",
    ),
]
Cache = Annotated[
    Path,
    typer.Argument(
        help="cached predictions of another model: a file, or hub:OWNER/NAME", metavar="CACHE"
    ),
]
LabelMapFile = Annotated[Path | None, typer.Option(help="label map, ours -> common", metavar="MAP")]
Data = Annotated[
    str | None,
    typer.Option(
        help="dataset name or file; the config's test data if not given", metavar="NAME_OR_FILE"
    ),
]
Split = Annotated[str | None, typer.Option(help="split of the dataset; test if not given")]
JsonFile = Annotated[
    Path | None, typer.Option("--json", help="also write the result to this file", metavar="FILE")
]


def main() -> None:
    """Runs a command; unusable input is one line on standard error and exit code 2."""
    # Orbax warns at each checkpoint without validation results, and many have none on purpose.
    logging.getLogger("absl").setLevel(logging.ERROR)
    # Raises SystemExit, so that unfinished folders are removed; the exit code is 128 + 15, as in
    # shells.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        sys.exit(app(sys.argv[1:] or ["--help"], standalone_mode=False))
    except InputError as error:
        message, code = str(error), 2
    except typer.TyperException as error:  # an unknown command, a missing argument, a bad value
        problem = " ".join(error.format_message().split()).replace("Value error, ", "").rstrip(".")
        context = getattr(error, "ctx", None)
        message = f"{problem}; see `{context.command_path if context else 'jaxre'} --help`"
        code = 2
    except typer.Abort:
        message, code = "stopped", 1
    except OSError as error:  # a name that is too long, a folder without read permission
        reason = error.strerror or str(error).partition("\n")[0] or type(error).__name__
        message = str(InputError(f"{error.filename}: {reason}" if error.filename else reason))
        code = 2
    print(f"error: {message}", file=sys.stderr)
    sys.exit(code)


@app.command()
def quickstart(
    output: Annotated[Path, typer.Option(help="folder of the run")] = Path("runs/quickstart"),
    tiny: Annotated[
        bool, typer.Option("--tiny", help="the tiny base that jaxre ships, not SmolLM2-135M")
    ] = False,
) -> None:
    """Runs the whole job on a small real model: train, predict, evaluate, compare, export.

    \b
    Example: jaxre quickstart
    """
    keep_freed_memory()
    from jaxre.quickstart import chosen_config, quickstart

    quickstart(output, console, chosen_config(tiny, console))


@app.command()
def doctor() -> None:
    """Shows versions, devices, and the implementations chosen on this machine, with the reason.

    \b
    Example: jaxre doctor
    """
    from jaxre.profiling.doctor import diagnose

    console.print(diagnose())


@app.command()
def prepare(config: ConfigFile, overrides: Overrides = None, dedup: Dedup = False) -> None:
    """Shows the data of a run: counts, lengths, packing, and three examples with the supervised
    part marked.

    \b
    Example: jaxre prepare configs/quickstart.yaml prompt.shots=2
    """
    from jaxre.checkpoints.source import tokenizer_folder
    from jaxre.config import load_config
    from jaxre.training.preview import preview

    loaded = load_config(config, _with_dedup(overrides, dedup))
    console.print(preview(loaded, tokenizer_folder(loaded)))


@app.command()
def train(config: ConfigFile, overrides: Overrides = None, dedup: Dedup = False) -> None:
    """Trains a run, or resumes it, and writes the run folder OUTPUT/NAME.

    \b
    Example: jaxre train configs/quickstart.yaml name=mine lora.rank=32 train.learning_rate=2e-4
    """
    keep_freed_memory()
    from jaxre.config import load_config
    from jaxre.training.loop import train

    with _resumable():
        print(train(load_config(config, _with_dedup(overrides, dedup)), console))


@app.command()
def profile(
    config: ConfigFile,
    overrides: Overrides = None,
    steps: Annotated[int, typer.Option(min=1, help="updates that are timed")] = 10,
    sweep: Annotated[
        bool,
        typer.Option(
            "--sweep", help="time several rows x length at the same batch and print the best"
        ),
    ] = False,
    json: JsonFile = None,
) -> None:
    """Counts the FLOPs and bytes of a run, times its updates, and names what limits their speed;
    writes OUTPUT/NAME-profile, no run folder.

    \b
    Example: jaxre profile configs/quickstart.yaml --steps 5
    """
    keep_freed_memory()
    from jaxre.config import load_config
    from jaxre.profiling.profile import (
        overrides_of,
        profile_run,
        profile_table,
        sweep_rows,
        sweep_table,
    )

    loaded = load_config(config, overrides)
    if sweep:
        measurements = sweep_rows(loaded, steps)
        console.print(sweep_table(measurements))
        print(f"the fastest: {overrides_of(measurements[0])}")
        write_json(json, {"sweep": measurements})
        return
    result = profile_run(loaded, steps)
    console.print(profile_table(result))
    console.print(result["verdict"], markup=False, highlight=False)
    print(result["folder"])
    write_json(json, result)


@app.command()
def predict(
    model: Annotated[
        str, typer.Argument(help="run folder, model folder or hub id", metavar="RUN_OR_MODEL_DIR")
    ],
    data: Annotated[
        str | None,
        typer.Option(
            help="dataset name or file; the run's test data if not given", metavar="NAME_OR_FILE"
        ),
    ] = None,
    split: Split = None,
    mode: Annotated[
        Literal["score", "best", "generate"],
        typer.Option(
            help=(
                "score: the most probable label, and the probability of each; best: that label"
                " alone, faster; generate: greedy decoding"
            )
        ),
    ] = "score",
    above: Annotated[
        float | None,
        typer.Option(
            help=(
                "with --mode score: exact probabilities for labels that the model writes with a"
                " higher one, upper bounds for the rest; faster"
            ),
            metavar="P",
        ),
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option(help="predictions file (.parquet and .csv are written)", metavar="FILE"),
    ] = None,
    text: Annotated[
        str | None, typer.Option(help='one text, marked: "... <e1>head</e1> ... <e2>tail</e2> ..."')
    ] = None,
    config: Annotated[
        Path | None,
        typer.Option(help="config with prompt and labels, for a model that is not a run"),
    ] = None,
    style: Annotated[
        str | None,
        typer.Option(help="prompt style in place of the run's prompt, such as shots2-task"),
    ] = None,
) -> None:
    """Predicts relations, with exact label probabilities.

    \b
    Example: jaxre predict runs/quickstart --text "<e1>Paris</e1>, capital of <e2>France</e2>"
    """
    keep_freed_memory()
    from jaxre.compilation_cache import use_compilation_cache
    from jaxre.inference.commands import predict_data, predict_text

    use_compilation_cache(console.print)
    if text is not None:
        if split or output:
            raise InputError(
                "--text prints one prediction; give it without --split and --output (--data NAME"
                " says whose labels it has)"
            )
        console.print(predict_text(model, text, mode, config, data, style, above))
        return
    predicted = predict_data(model, data, split, mode, output, config, console, style, above)
    if predicted.shown:
        console.print(predicted.summary)
        print(predicted.path)


@app.command()
def evaluate(
    predictions: Annotated[
        Path, typer.Argument(help="predictions file or folder", metavar="PREDICTIONS")
    ],
    json: JsonFile = None,
) -> None:
    """Scores a predictions file: positive-class micro-F1, macro-F1, accuracy, per class.

    \b
    Example: jaxre evaluate runs/quickstart/predictions/facts-test-score.parquet --json scores.json
    """
    from jaxre.evaluation.evaluate import evaluate_file, evaluation_table

    evaluation = evaluate_file(predictions)
    console.print(evaluation_table(evaluation))
    write_json(json, evaluation.to_json())


@app.command()
def compare(
    predictions: Annotated[
        Path, typer.Argument(help="our predictions file", metavar="PREDICTIONS")
    ],
    cache: Cache,
    labels: LabelMapFile = None,
    model: Annotated[
        str | None, typer.Option(help="which model of a cache that holds several")
    ] = None,
    coverage: Annotated[
        float | None,
        typer.Option(
            min=0,
            max=1,
            help="stop if less than this share of the predictions has an answer in the cache",
        ),
    ] = None,
    json: JsonFile = None,
) -> None:
    """Compares predictions with cached ones on the same examples: F1, difference with interval,
    McNemar.

    \b
    Example: jaxre compare runs/semeval/predictions/semeval2010_task8-test-score.parquet \\
      ../shared/data/frontier_predictions/semeval2010_chatgpt/SemEval_All_ans.json \\
      --labels configs/labels/semeval-undirected.yaml
    """
    from jaxre.evaluation.compare import compare_files, comparison_table

    comparison = compare_files(predictions, cache, labels, model, coverage)
    console.print(comparison_table(comparison))
    write_json(json, comparison.to_json())


@frontier.command("export")
def frontier_export(
    config: ConfigFile,
    provider: Annotated[
        Literal["openai", "anthropic", "openrouter"],
        typer.Option(help="API whose format the request files have"),
    ],
    model: Annotated[str, typer.Option(help="the provider's name of the model")],
    output: Annotated[
        Path, typer.Option(help="request file; its manifest is written beside it", metavar="FILE")
    ],
    overrides: Overrides = None,
    data: Data = None,
    split: Split = None,
    max_tokens: Annotated[
        int, typer.Option(min=1, help="tokens of an answer, including reasoning before it")
    ] = 64,
    no_temperature: Annotated[
        bool, typer.Option("--no-temperature", help="for models that refuse it; otherwise it is 0")
    ] = False,
    style: Annotated[
        str, typer.Option(help="prompt style in place of the config's prompt, such as shots2-task")
    ] = "",
) -> None:
    """Writes request files for a frontier model: the prompts of a run without repetitions. You send
    them; no key is read or stored.

    \b
    Example: jaxre frontier export configs/quickstart.yaml --provider openai --model gpt-4.1-mini \
      --output requests/facts.jsonl
    """
    from jaxre.config import load_config
    from jaxre.evaluation.frontier.requests import Ask
    from jaxre.inference.frontier import export_requests

    ask = Ask(provider, model, max_tokens, None if no_temperature else 0.0)
    written = export_requests(load_config(config, overrides), ask, data, split, output, style)
    for line in written.notices:
        console.print(line, markup=False)
    console.print(written.summary, markup=False, highlight=False)
    for path in (*written.files, written.manifest):
        print(path)


@frontier.command("import")
def frontier_import(
    manifest: Annotated[
        Path, typer.Argument(help="manifest that the export wrote", metavar="MANIFEST")
    ],
    results: Annotated[
        list[Path],
        typer.Argument(help="result and error files of the provider", metavar="RESULT_FILES..."),
    ],
    output: Annotated[
        Path,
        typer.Option(help="cache (.parquet, .csv and .summary.json are written)", metavar="FILE"),
    ],
    price: Annotated[
        tuple[float, float] | None,
        typer.Option(
            help="USD per million tokens in and out, where the files state no cost",
            metavar="IN OUT",
        ),
    ] = None,
) -> None:
    """Writes a cache of predictions from a provider's result files; errors and missing answers are
    counted and have no row.

    \b
    Example: jaxre frontier import requests/facts.manifest.json output.jsonl errors.jsonl \
      --output caches/facts --price 0.2 0.8
    """
    from jaxre.inference.frontier import import_results, import_table

    imported = import_results(manifest, results, output, price)
    console.print(import_table(imported))
    print(imported.path)


@frontier.command("check")
def frontier_check(
    cache: Cache,
    config: Annotated[
        Path | None, typer.Option(help="config with data, labels and prompts", metavar="CONFIG")
    ] = None,
    data: Data = None,
    split: Split = None,
    labels: LabelMapFile = None,
    model: Annotated[str | None, typer.Option(help="check the answers of this model only")] = None,
    coverage: Annotated[
        float, typer.Option(min=0, max=1, help="the share of the examples that must have an answer")
    ] = 0.95,
    json: JsonFile = None,
) -> None:
    """Checks a cache against the data it covers: coverage, gold labels, prompts, repeated answers,
    labels. Exit code 2 if it fails.

    \b
    Example: jaxre frontier check caches/facts.parquet --config configs/quickstart.yaml
    """
    from jaxre.config import load_config
    from jaxre.evaluation.frontier.check import check_table
    from jaxre.inference.frontier import check_file

    loaded = load_config(config) if config else None
    check = check_file(cache, loaded, data, split, model, labels, coverage)
    console.print(check_table(check))
    write_json(json, check.to_json())
    if check.problems:
        more = f" (and {len(check.problems) - 1} more)" if check.problems[1:] else ""
        raise InputError(f"{cache}: {check.problems[0]}{more}; correct the cache")


@app.command()
def report(
    folder: Annotated[Path, typer.Argument(help="folder of a study", metavar="FOLDER")],
    output: Annotated[
        Path | None, typer.Option(help="the page; FOLDER/report.html if not given", metavar="FILE")
    ] = None,
    figures: Annotated[
        Path | None,
        typer.Option(help="also draw PNG and PDF figures into this folder", metavar="FOLDER"),
    ] = None,
    public: Annotated[
        bool, typer.Option("--public", help="leave out sentences that may not be republished")
    ] = False,
) -> None:
    """Writes the results of a study as one HTML page that needs no network, and as figures.

    \b
    Example: jaxre report runs/study-small --figures runs/study-small/figures
    """
    from jaxre.evaluation.report.write import write_report

    written = write_report(folder, output, figures, public)
    if written.closed:
        print(
            f"do not publish the page: it shows sentences of {', '.join(written.closed)}; --public"
            " leaves them out",
            file=sys.stderr,
        )
    for path in (*written.figures, written.page):
        print(path)


@app.command()
def convert(
    source: Annotated[
        str,
        typer.Argument(
            help="run, adapter or model folder, GGUF file, base's name or hub id", metavar="SOURCE"
        ),
    ],
    target: Annotated[Path, typer.Argument(help="folder to write", metavar="TARGET")],
    to: Annotated[
        Literal["jaxre", "hf", "peft", "gguf"],
        typer.Option(
            help="hf: Hugging Face; peft: adapter; gguf: llama.cpp and Ollama; jaxre: our store"
        ),
    ],
    merge: Annotated[bool, typer.Option("--merge", help="merge the adapter into the base")] = False,
    dtype: Annotated[
        str | None,
        typer.Option(help="f32, bf16 or f16 (for GGUF also q8_0); as stored if not given"),
    ] = None,
    quantise: Annotated[
        Literal["nf4"] | None, typer.Option(help="nf4: projections as NF4, in a jaxre folder")
    ] = None,
    verify: Annotated[
        bool, typer.Option("--verify", help="read back what was written and compare every tensor")
    ] = False,
    json: JsonFile = None,
) -> None:
    """Converts weights from and to Hugging Face, PEFT and GGUF.

    \b
    Example: jaxre convert runs/quickstart exported --to hf --merge --verify
    """
    from jaxre.checkpoints.convert import convert, verification_table

    conversion = convert(source, target, to, merge, dtype, quantise, verify)
    console.print(str(conversion), markup=False)
    if verify:
        console.print(verification_table(conversion))
    write_json(json, conversion.to_json())


@app.command()
def study(
    config: Annotated[Path, typer.Argument(help="YAML file of the study", metavar="CONFIG")],
    overrides: Overrides = None,
    plan: Annotated[
        bool,
        typer.Option("--plan", help="show the steps and the hours that they should take, and stop"),
    ] = False,
) -> None:
    """Runs a grid of runs: shows the plan with expected hours, trains, predicts, and writes
    OUTPUT/NAME/study.json. Resumes where it stopped.

    \b
    Example: jaxre study configs/study/small.yaml --plan
    """
    keep_freed_memory()
    from jaxre.study.execute import study
    from jaxre.study.settings import load_study

    with _resumable():
        failed = study(load_study(config, overrides), console, plan_only=plan)
    if failed:
        raise typer.Exit(1)


@contextlib.contextmanager
def _resumable() -> Iterator[None]:
    try:
        yield
    except KeyboardInterrupt:
        print("stopped; the same command goes on from the last checkpoint", file=sys.stderr)
        raise typer.Exit(130) from None


def _with_dedup(overrides: list[str] | None, dedup: bool) -> list[str]:
    return [*(overrides or []), *(["data.dedup=true"] if dedup else [])]


def write_json(path: Path | None, value: dict) -> None:
    """Writes a result to the file of `--json`, if given."""
    if path is not None:
        from jaxre.evaluation.evaluate import write_json

        write_json(path, value)


if __name__ == "__main__":
    main()
