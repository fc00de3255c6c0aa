"""Host time of a run, phase by phase, in wall-clock and CPU seconds; the device's work is left out.

    python tools/bench_host.py data --examples 200000
        # read, tokenise, cache and plan; then from the cache
    python tools/bench_host.py start --examples 8000
        # `jaxre train` to step 1, cold and again (0.5B shape, random weights)
    python tools/bench_host.py step
        # host time of one update of a tiny model

The examples are SemEval's training sentences, each with another word at its end (JAXRE_DATA names
the data); --model is a folder with a tokenizer (and for `start` a config.json). Files stay in
--work; remove it for a cold start.
"""

from __future__ import annotations

import argparse
import json
import random
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

Phases = dict[str, tuple[float, float]]  # name -> wall, CPU seconds


@contextmanager
def phase(phases: Phases, name: str) -> Iterator[None]:
    wall, cpu = time.perf_counter(), time.process_time()
    yield
    phases[name] = time.perf_counter() - wall, time.process_time() - cpu
    print(f"{name:42s} {phases[name][0]:8.2f} s wall {phases[name][1]:8.2f} s CPU", flush=True)


def write_examples(work: Path, count: int) -> Path:
    """`count` examples like SemEval's, as a file that `data.train.dataset` takes."""
    from jaxre.config import Source
    from jaxre.relations import sources

    path = work / f"examples-{count}.jsonl"
    if not path.is_file():
        originals = sources.load(Source(dataset="semeval2010_task8", split="train"))
        words = sorted(
            {word for example in originals for word in example.text.split() if word.isalpha()}
        )
        draw = random.Random(0)
        with path.open("w", encoding="utf-8") as file:
            for number in range(count):
                original = originals[number % len(originals)]
                spans = {"head_span": original.head_span, "tail_span": original.tail_span}
                record = {
                    "id": str(number),
                    "text": f"{original.text} {draw.choice(words)}",
                    "head": original.head,
                    "tail": original.tail,
                }
                file.write(json.dumps(record | spans | {"relation": original.relation}) + "\n")
    return path


def settings(work: Path, model: Path, examples: Path, **train: object) -> dict:
    return {
        "name": "bench",
        "output": str(work / "runs"),
        "model": {"path": str(model)},
        "data": {"train": {"dataset": str(examples)}, "cache": str(work / "tokens")},
        "train": {"epochs": 2, "batch_tokens": 8192, "row_length": 1024, **train},
    }


# ---- data ----------------------------------------------------------------------------------------


def bench_data(work: Path, model: Path, count: int) -> Phases:
    from jaxre.config import check_config
    from jaxre.data.cache import cached_tokens
    from jaxre.data.dataset import ask, make_plan
    from jaxre.data.template import ChatTemplate
    from jaxre.data.tokenizer import load_tokenizer
    from jaxre.data.tokens import encode_examples, examples_digest
    from jaxre.relations import mixtures
    from jaxre.relations.labels import schemas_of

    config = check_config(settings(work, model, write_examples(work, count)), "bench")
    phases: Phases = {}
    with phase(phases, "whole"):
        with phase(phases, "tokenizer and template"):
            template = ChatTemplate(load_tokenizer(model), config.prompt.date, str(model))
        with phase(phases, "read the examples"):
            pool = mixtures.read(config.data.train, "data.train")
            examples, schemas = pool.examples, schemas_of(config.data, pool.by_dataset)
        with phase(phases, "prompts"):
            questions = ask(config, examples, schemas, pool.by_dataset)
        with phase(phases, "digest"):
            digest = examples_digest(questions, examples, template, config.train.row_length)
        with phase(phases, "tokenise and write the cache"):
            tokens, cached = cached_tokens(
                config.data.cache, digest, lambda: encode_examples(examples, questions, template)
            )
        print(
            "  already cached; remove --work for a cold start"
            if cached
            else f"  {tokens.tokens.size:,} tokens"
        )
        with phase(phases, f"plan {config.train.epochs} epochs"):
            plan = make_plan(config, tokens, shards=1)
        print(f"  {len(plan.updates):,} updates")
    with phase(phases, "read the cache"):
        again, cached = cached_tokens(config.data.cache, digest, lambda: tokens)
    assert cached and (again.tokens == tokens.tokens).all()
    return phases


# ---- start ---------------------------------------------------------------------------------------


def bench_start(work: Path, model: Path, count: int, dtype: str) -> Phases:
    """Two starts in separate processes; the second finds the tokens and the compiled update."""
    folder = random_weights(work, model)
    tree = settings(
        work, folder, write_examples(work, count), row_length=1024, batch_tokens=1024, max_steps=1
    )
    tree["model"]["dtype"] = dtype
    phases: Phases = {}
    for turn in ("first", "second"):
        path = work / f"{turn}.yaml"
        path.write_text(json.dumps(tree | {"name": f"{turn}-{time.time_ns()}"}), encoding="utf-8")
        print(f"{turn} start:")
        worker = [
            sys.executable,
            __file__,
            "start-worker",
            "--config",
            str(path),
            "--began",
            str(time.time()),
        ]
        done = subprocess.run(worker, stdout=subprocess.PIPE, text=True)
        if done.returncode:
            sys.exit(f"the {turn} start failed")
        for line in done.stdout.splitlines():
            if line.startswith("phase "):
                _, name, wall, cpu = line.split("\t")
                phases[f"{turn}: {name}"] = float(wall), float(cpu)
                print(
                    f"  {name:40s} {float(wall):8.2f} s wall {float(cpu):8.2f} s CPU since the"
                    " process began"
                )
    return phases


def random_weights(work: Path, model: Path) -> Path:
    """A model folder with the config and tokenizer of `model` and random bf16 weights."""
    import ml_dtypes
    import numpy as np
    from safetensors.numpy import save_file

    from jaxre.checkpoints.huggingface import hf_tensors
    from jaxre.models.architecture import architecture_of
    from jaxre.models.module import init_weights

    folder = work / f"{model.name}-random"
    if not (folder / "model.safetensors").is_file():
        folder.mkdir(parents=True, exist_ok=True)
        for file in model.iterdir():
            (folder / file.name).write_bytes(file.read_bytes())
        architecture = architecture_of(
            json.loads((model / "config.json").read_text(encoding="utf-8")), str(model)
        )
        tensors = dict(
            hf_tensors(
                architecture, init_weights(architecture, seed=0), np.dtype(ml_dtypes.bfloat16)
            )
        )
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def start_worker(config: Path, began: float) -> None:
    """Runs `jaxre train CONFIG` and reports when each of its parts is done: seconds since `began`,
    CPU seconds of the process.
    """

    def report(name: str) -> None:
        print(f"phase \t{name}\t{time.time() - began}\t{time.process_time()}", flush=True)

    from jaxre import cli

    cli.keep_freed_memory()
    from jaxre.config import load_config
    from jaxre.training import loop, setup

    report("imports")
    loaded = load_config(config)
    report("config")

    def wrap(owner: object, name: str, phase: str) -> None:
        function = getattr(owner, name)

        def timed(*args: object, **kwargs: object) -> object:
            result = function(*args, **kwargs)
            report(phase)
            return result

        setattr(owner, name, timed)

    wrap(setup, "load_dataset", "data")
    wrap(setup, "initial_state", "weights and state")
    wrap(setup, "compile_updates", "compiled (or read)")
    wrap(setup.SetUp, "rows", "step 1 reached")
    wrap(loop, "check_finite", "step 1 done")
    loop.train(loaded)


# ---- step ----------------------------------------------------------------------------------------


def bench_step(work: Path, steps: int) -> Phases:
    """CPU time of the thread that runs the loop, and of the thread that prepares its rows, per
    update.

    CPU time, not wall-clock: it leaves out waiting for the device, and other processes. On a CPU
    some of the device's work runs in the calling thread, so the model is small.
    """
    import jax

    from jaxre.config import check_config
    from jaxre.data.rows import Rows
    from jaxre.models import sharding
    from jaxre.training.log import RunLog
    from jaxre.training.setup import set_up

    # Rows of 128 tokens and the shipped base: little device work, as many arrays as any model has.
    tree = settings(work, Path("facts-base"), Path(), row_length=128, batch_tokens=128, epochs=9)
    tree["data"]["train"] = {"dataset": "facts", "split": "train", "limit": steps}
    config = check_config(tree, "bench")
    run = set_up(config)
    compiled = run.compiled.updates[run.plan.shapes[0]]
    put_times: list[float] = []

    def put(rows: Rows) -> Rows:
        placed = sharding.put_rows(rows, sharding.row_sharding(run.mesh))
        put_times.append(time.thread_time())
        return placed

    state, pending, parts = run.take_state(), [], {"take the rows": 0.0, "dispatch the update": 0.0}
    # waits every 16 steps: a loop must not run ahead of the device without bound
    for step, rows in enumerate(run.host_rows(0, steps, put)):
        if step == steps // 10:  # the first steps fill caches
            jax.block_until_ready(pending)
            parts = dict.fromkeys(parts, 0.0)
            counted, began = step, time.thread_time()
        before = time.thread_time()
        state, metrics = compiled(state, run.initial.base, rows)
        parts["dispatch the update"] += time.thread_time() - before
        pending.append(metrics)
        if step % 16 == 15:
            jax.block_until_ready(metrics)
    total, count = time.thread_time() - began, steps - counted
    parts["take the rows"] = total - parts["dispatch the update"]
    parts["prepare and put the rows (other thread)"] = (
        (put_times[-1] - put_times[counted]) * count / (len(put_times) - 1 - counted)
    )
    (work / "log").mkdir(exist_ok=True)
    log = RunLog(work / "log", 0)
    before = time.thread_time()
    for step in range(count):
        log.write("train", step, {"loss": 1.0, "gradient_norm": 1.0, "learning_rate": 1e-4})
    parts["log"] = time.thread_time() - before
    log.close()
    phases = {}
    for name, seconds in parts.items():
        phases[name] = (seconds / count,) * 2
        print(f"{name:42s} {1e3 * seconds / count:8.3f} ms an update")
    return phases


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("part", choices=["data", "start", "step", "start-worker"])
    parser.add_argument("--examples", type=int, default=200_000)
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument(
        "--model", type=Path, default=Path("../shared/models/Qwen/Qwen2.5-0.5B-Instruct")
    )
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float32"])
    parser.add_argument("--work", type=Path, default=Path("runs/bench-host"))
    parser.add_argument("--json", type=Path)
    parser.add_argument("--config", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--began", type=float, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.part == "start-worker":
        start_worker(options.config, options.began)
        return
    options.work.mkdir(parents=True, exist_ok=True)
    if options.part == "data":
        phases = bench_data(options.work, options.model, options.examples)
    elif options.part == "start":
        phases = bench_start(options.work, options.model, options.examples, options.dtype)
    else:
        phases = bench_step(options.work, options.steps)
    if options.json:
        seconds = {
            name: {"wall_seconds": wall, "cpu_seconds": cpu} for name, (wall, cpu) in phases.items()
        }
        options.json.write_text(json.dumps(seconds, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
