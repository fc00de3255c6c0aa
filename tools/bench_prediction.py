"""Prediction side by side with transformers, on the same weights, prompts and stop tokens, in one
process.

    python tools/bench_prediction.py
        # the shipped base, SemEval's enumerated prompts
    python tools/bench_prediction.py --model smollm2-360m --examples 16 --new-tokens 8
    python tools/bench_prediction.py --model runs/mine --json bench.json

Sides: transformers `generate`, greedy, batches of 8 in the order of the data, padded on the left;
jaxre's greedy decoding; its search for the best label; its scores of all labels. All in f32, from
token ids to token ids (or labels), without what is compiled.

Before anything is timed every side runs once. Exit code 1 if the greedy tokens differ from those of
transformers for one example, if the search finds another label than all scores do, or if those
differ from transformers' (one label at a time, --checked examples). Then the sides take turns,
--rounds times: the table has medians, and of the ratios the median of each round's. Where other
work shares the processor the threads of a side wait for each other; `taskset -c 0` gives all sides
one core, and then their processor times compare.

--model is a folder, a run, a shipped name, or one of the shapes of bench_sides.py with random
weights. Needs torch, and the data and tokenizers of JAXRE_DATA and JAXRE_MODELS (../shared/data and
../shared/models).
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from bench_sides import SEED, SHAPES
from bench_training import hardware, versions

TOLERANCE = 1e-4  # relative, of scores
BATCH = 8  # of transformers


def open_shape(name: str):
    """A model of one of the shapes, with random weights, that are large enough for answers to
    differ.
    """
    from jaxre.checkpoints.source import Loaded
    from jaxre.models.architecture import architecture_of
    from jaxre.models.module import init_weights

    below, changes = SHAPES[name]
    folder = Path(os.environ.get("JAXRE_MODELS", "../shared/models")) / below
    if not folder.is_dir():
        raise SystemExit(f"{folder} is not there; set JAXRE_MODELS to the folder of the models")
    fields = json.loads((folder / "config.json").read_text()) | changes
    architecture = architecture_of(fields, str(folder))
    return Loaded(folder, name, architecture, init_weights(architecture, SEED)), fields


def in_transformers(loaded, fields: dict[str, Any]):
    """The same weights in transformers, an adapter merged into them."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    from jaxre.checkpoints.huggingface import hf_tensors
    from jaxre.inference.predict import model_of
    from jaxre.models.lora import merge

    params = (
        loaded.base
        if loaded.factors is None
        else merge(loaded.base, loaded.factors, model_of(loaded).scale)
    )
    config = AutoConfig.for_model(**fields)
    config.dtype = torch.float32
    torch.manual_seed(SEED)
    peer = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    tensors = {
        name: torch.from_numpy(np.array(value))
        for name, value in hf_tensors(loaded.architecture, params, np.dtype(np.float32))
    }
    missing, unexpected = peer.load_state_dict(tensors, strict=False)
    if unexpected or set(missing) - {"lm_head.weight"}:
        raise SystemExit(
            f"transformers has other weights: {missing} missing, {unexpected} unexpected"
        )
    peer.tie_weights()
    peer.generation_config.max_length = None
    return peer.eval()


def peer_tokens(
    peer, prompts: Sequence[Sequence[int]], stops: set[int], new_tokens: int
) -> list[list[int]]:
    """The greedy tokens of transformers, up to and including the first stop token."""
    import torch

    found = []
    for start in range(0, len(prompts), BATCH):
        batch = prompts[start : start + BATCH]
        longest = max(map(len, batch))
        ids = torch.tensor([[0] * (longest - len(prompt)) + list(prompt) for prompt in batch])
        mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in batch])
        settings = {
            "do_sample": False,
            "num_beams": 1,
            "eos_token_id": sorted(stops),
            "pad_token_id": min(stops),
        }
        with torch.inference_mode():
            whole = peer.generate(ids, attention_mask=mask, max_new_tokens=new_tokens, **settings)
        for tokens in whole[:, longest:].tolist():
            end = next(
                (place + 1 for place, token in enumerate(tokens) if token in stops), len(tokens)
            )
            found.append(tokens[:end])
    return found


def peer_scores(peer, prompt: Sequence[int], answers: Sequence[Sequence[int]]) -> np.ndarray:
    """[labels] scores by transformers, one label at a time."""
    import torch

    scores = []
    with torch.inference_mode():
        for answer in answers:
            logits = (
                peer(torch.tensor([[*prompt, *answer]])).logits[0, len(prompt) - 1 : -1].double()
            )
            scores.append(
                float(
                    torch.log_softmax(logits, -1)[
                        torch.arange(len(answer)), torch.tensor(answer)
                    ].sum()
                )
            )
    return np.array(scores)


def prepared(settings: argparse.Namespace) -> tuple[Any, dict, list, list, set[int]]:
    """The model, its config.json, the prompts and answers as tokens, and the stop tokens."""
    from jaxre.checkpoints.huggingface import read_json
    from jaxre.checkpoints.source import open_model
    from jaxre.config import Prompt, Source
    from jaxre.data.template import ChatTemplate
    from jaxre.data.tokenizer import load_tokenizer
    from jaxre.data.tokens import demonstrator, questions_of
    from jaxre.inference.answers import label_answers
    from jaxre.inference.predict import stop_ids
    from jaxre.relations import sources

    if settings.model in SHAPES:
        loaded, fields = open_shape(settings.model)
    else:
        loaded = open_model(settings.model, np.dtype(np.float32))
        fields = read_json(loaded.folder / "config.json")
    prompt = Prompt(enumerate=True, shots=settings.shots)
    train, test = (
        sources.load(Source(dataset="semeval2010_task8", split=split))
        for split in ("train", "test")
    )
    labels = sorted({example.relation for example in train})
    examples = test[: settings.examples]
    template = ChatTemplate(load_tokenizer(loaded.folder), prompt.date, str(loaded.folder))
    questions = questions_of(examples, prompt, labels, demonstrator(train, prompt, SEED))
    prompts, answers = label_answers(template, questions, labels)
    return loaded, fields, prompts, answers, stop_ids(template, questions[0], loaded.folder)


def check(
    sides: dict[str, Callable], peer, prompts: list, answers: list, settings: argparse.Namespace
) -> dict[str, Any]:
    """Runs every side once, and compares what they find."""
    first, seconds = {}, {}
    for name, run in sides.items():
        began = time.perf_counter()
        first[name] = run()
        seconds[name] = time.perf_counter() - began
        print(f"first run, {name} {seconds[name]:.2f} s", file=sys.stderr, flush=True)
    differing = sum(
        ours != theirs for ours, theirs in zip(first["greedy"], first["transformers"], strict=True)
    )
    best, _ = first["best"]
    scores = first["scores"]
    apart = int((best != scores.argmax(axis=1)).sum())
    relative = 0.0
    for number in range(min(settings.checked, len(prompts))):
        truth = peer_scores(peer, prompts[number], answers[number])
        relative = max(relative, float(np.abs(scores[number] - truth).max() / np.abs(truth).max()))
        apart += int(truth.argmax() != best[number])
    return {
        "greedy_answers_that_differ": differing,
        "best_labels_that_differ": apart,
        "scores_differ_by": relative,
        "first_seconds": seconds,
        "new_tokens": statistics.fmean(map(len, first["transformers"])),
    }


def bench(settings: argparse.Namespace) -> dict[str, Any]:
    import jax
    import torch

    from jaxre.host_memory import keep_freed_memory
    from jaxre.inference.decoding import generate
    from jaxre.inference.model import Model, on_device
    from jaxre.inference.predict import model_of
    from jaxre.inference.prefix import shared_prefixes
    from jaxre.inference.scoring import score_labels
    from jaxre.inference.search import best_labels
    from jaxre.models.weights import parameter_count

    torch.set_num_threads(len(os.sched_getaffinity(0)))
    keep_freed_memory()  # as `jaxre predict` does, but after numpy; for all sides
    loaded, fields, prompts, answers, stops = prepared(settings)
    peer = in_transformers(loaded, fields)
    whole = model_of(loaded)
    model = Model(*on_device(whole)[:1], whole.architecture, on_device(whole)[1], whole.scale)
    size = {"batch_tokens": settings.batch_tokens}
    sides = {
        "transformers": lambda: peer_tokens(peer, prompts, stops, settings.new_tokens),
        "greedy": lambda: generate(model, prompts, stops, settings.new_tokens, **size),
        "best": lambda: best_labels(model, prompts, answers, **size),
        "scores": lambda: score_labels(model, prompts, answers, **size),
    }
    groups = shared_prefixes(prompts, settings.batch_tokens)
    found = {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="minutes"),
        "hardware": hardware(str(jax.devices()[0].device_kind)),
        "versions": versions(),
        "settings": {key: value for key, value in vars(settings).items() if key != "json"},
        "parameters": parameter_count(loaded.architecture),
        "prompt_tokens": statistics.fmean(map(len, prompts)),
        "shared_tokens": [len(group.tokens) for group in groups],
        **check(sides, peer, prompts, answers, settings),
        "seconds": {name: [] for name in sides},
        "cpu_seconds": {name: [] for name in sides},
    }
    for number in range(settings.rounds):
        for name, run in sides.items():
            began, worked = time.perf_counter(), time.process_time()
            run()
            seconds, work = time.perf_counter() - began, time.process_time() - worked
            found["seconds"][name].append(seconds)
            found["cpu_seconds"][name].append(work)
            print(
                f"round {number + 1}, {name} {seconds:.2f} s, {work:.2f} s of the processor",
                file=sys.stderr,
                flush=True,
            )
    return found


def table(found: dict[str, Any]) -> list[str]:
    numbers = ", ".join(f"{name} {number}" for name, number in found["versions"].items())
    count = found["settings"]["examples"]
    lines = [
        f"{found['date']}; {found['hardware']}; Python {platform.python_version()}, {numbers}",
        "",
        (
            f"{found['settings']['model']} ({found['parameters']:,} parameters), f32, {count}"
            f" examples of SemEval-2010 Task 8, enumerated, {found['settings']['shots']}-shot:"
            f" {found['prompt_tokens']:.0f} tokens a prompt, {found['shared_tokens']} of them"
            f" shared; {found['new_tokens']:.1f} new tokens an answer, at most"
            f" {found['settings']['new_tokens']}; {found['settings']['rounds']} rounds"
        ),
        "",
        (
            "Greedy answers that differ from those of transformers:"
            f" {found['greedy_answers_that_differ']} of {count}. Best labels that differ from brute"
            f" force: {found['best_labels_that_differ']}. Scores differ from transformers' by"
            f" {found['scores_differ_by']:.0e}."
        ),
        "",
        (
            "| side | examples/s | x transformers (rounds) | the same in processor time | first"
            " run, s |"
        ),
        "|---|---|---|---|---|",
    ]
    told = {
        "transformers": f"transformers generate, batches of {BATCH}",
        "greedy": "jaxre, greedy",
        "best": "jaxre, best label",
    }
    for name, seconds in found["seconds"].items():
        shown = []
        for what in ("seconds", "cpu_seconds"):
            ratios = [
                theirs / ours
                for ours, theirs in zip(found[what][name], found[what]["transformers"], strict=True)
            ]
            shown.append(
                f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"
            )
        speed = found["settings"]["examples"] / statistics.median(seconds)
        lines.append(
            f"| {told.get(name, 'jaxre, all scores')} | {speed:.2f} | {shown[0]} | {shown[1]} |"
            f" {found['first_seconds'][name]:.1f} |"
        )
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--model",
        default="facts-base",
        help=f"folder, run, shipped name, or one of {', '.join(SHAPES)}",
    )
    parser.add_argument("--examples", type=int, default=128, help="of the test split")
    parser.add_argument("--shots", type=int, default=0)
    parser.add_argument("--new-tokens", type=int, default=32, help="at most, of greedy decoding")
    parser.add_argument("--batch-tokens", type=int, default=8192, help="of jaxre")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument(
        "--checked",
        type=int,
        default=4,
        help="examples whose labels transformers scores one at a time",
    )
    parser.add_argument("--json", type=Path, metavar="FILE")
    settings = parser.parse_args()
    if settings.json and not settings.json.absolute().parent.is_dir():
        parser.error(f"{settings.json.parent} is not there; name a folder that is")
    found = bench(settings)
    print("\n".join(table(found)))
    if settings.json:
        settings.json.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    if (
        found["greedy_answers_that_differ"]
        or found["best_labels_that_differ"]
        or found["scores_differ_by"] > TOLERANCE
    ):
        raise SystemExit("the sides find different things, so their times mean nothing")


if __name__ == "__main__":
    main()
