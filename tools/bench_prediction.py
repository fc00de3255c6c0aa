"""Prediction side by side with transformers, on the same weights, prompts and stop tokens, in one
process.

    python tools/bench_prediction.py
        # SmolLM2-135M, SemEval's enumerated prompts
    python tools/bench_prediction.py --model random:smollm2-360m --examples 16 --new-tokens 8
    python tools/bench_prediction.py --model runs/mine --json bench.json

Sides: transformers `generate`, greedy, batches of 8 in the order of the data, padded on the left;
jaxre's greedy decoding; its search for the best label, and for labels
above a probability of ABOVE; its scores of all labels. All in f32, from
token ids to token ids (or labels), without compilation.

Before timing every side runs once. Exit code 1 if the greedy tokens of an example differ from those
of transformers, if the best labels differ from those of all scores, or if the scores differ from
transformers' (one label at a time, --checked examples). Then the sides take turns, --rounds times:
the table has medians, and of the ratios the median of each round's. If other work shares the
processor, the threads of a side wait for each other; `taskset -c 0` limits all sides to one core,
and then their processor times are comparable.

Needs torch, and the data and tokenizers of JAXRE_DATA and JAXRE_MODELS (../shared/data and
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
from bench_sides import RANDOM, SEED, SHAPES, default_model, random_shape
from bench_training import hardware, versions

TOLERANCE = 1e-4  # relative, of scores
BATCH = 8  # prompts of a batch of transformers
ABOVE = 0.01  # probability


def open_random(name: str):
    """A model of a known shape, with random weights large enough that answers differ."""
    from jaxre.checkpoints.source import Loaded
    from jaxre.models.architecture import architecture_of
    from jaxre.models.module import init_weights

    folder, fields = random_shape(name)
    architecture = architecture_of(fields, str(folder))
    return Loaded(folder, name, architecture, init_weights(architecture, SEED)), fields


def in_transformers(loaded, fields: dict[str, Any]):
    """The same weights in transformers, with any adapter merged."""
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

    answers = []
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
            generated = peer.generate(
                ids, attention_mask=mask, max_new_tokens=new_tokens, **settings
            )
        for tokens in generated[:, longest:].tolist():
            end = next(
                (place + 1 for place, token in enumerate(tokens) if token in stops), len(tokens)
            )
            answers.append(tokens[:end])
    return answers


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

    if settings.model.startswith(RANDOM):
        loaded, fields = open_random(settings.model)
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
    """Runs every side once, and compares the results."""
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
    above = first["above"]
    # An exact score equals that of all scores, and no bound lies below it.
    gap = np.where(above.exact, abs(above.scores - scores), scores - above.scores)
    relative = max(0.0, float((gap / abs(scores).max(axis=1, keepdims=True)).max()))
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
    from jaxre.inference.search import best_labels, labels_above
    from jaxre.models.weights import parameter_count

    torch.set_num_threads(len(os.sched_getaffinity(0)))
    keep_freed_memory()  # as `jaxre predict` does, but after numpy; for all sides
    loaded, fields, prompts, answers, stops = prepared(settings)
    peer = in_transformers(loaded, fields)
    predictor = model_of(loaded)
    model = Model(
        *on_device(predictor)[:1], predictor.architecture, on_device(predictor)[1], predictor.scale
    )
    batch = {"batch_tokens": settings.batch_tokens}
    sides = {
        "transformers": lambda: peer_tokens(peer, prompts, stops, settings.new_tokens),
        "greedy": lambda: generate(model, prompts, stops, settings.new_tokens, **batch),
        "best": lambda: best_labels(model, prompts, answers, **batch),
        "above": lambda: labels_above(model, prompts, answers, ABOVE, **batch),
        "scores": lambda: score_labels(model, prompts, answers, **batch),
    }
    groups = shared_prefixes(prompts, settings.batch_tokens)
    results = {
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
            results["seconds"][name].append(seconds)
            results["cpu_seconds"][name].append(work)
            print(
                f"round {number + 1}, {name} {seconds:.2f} s, {work:.2f} s of the processor",
                file=sys.stderr,
                flush=True,
            )
    return results


def table(results: dict[str, Any]) -> list[str]:
    numbers = ", ".join(f"{name} {number}" for name, number in results["versions"].items())
    count = results["settings"]["examples"]
    lines = [
        f"{results['date']}; {results['hardware']}; Python {platform.python_version()}, {numbers}",
        "",
        (
            f"{results['settings']['model']} ({results['parameters']:,} parameters), f32, {count}"
            f" examples of SemEval-2010 Task 8, enumerated, {results['settings']['shots']}-shot:"
            f" {results['prompt_tokens']:.0f} tokens a prompt, {results['shared_tokens']} of them"
            f" shared; {results['new_tokens']:.1f} new tokens an answer, at most"
            f" {results['settings']['new_tokens']}; {results['settings']['rounds']} rounds"
        ),
        "",
        (
            "Greedy answers that differ from those of transformers:"
            f" {results['greedy_answers_that_differ']} of {count}. Best labels that differ from"
            f" brute force: {results['best_labels_that_differ']}. Scores differ from transformers'"
            f" by {results['scores_differ_by']:.0e}."
        ),
        "",
        (
            "| side | examples/s | x transformers (rounds) | the same in processor time | first"
            " run, s |"
        ),
        "|---|---|---|---|---|",
    ]
    descriptions = {
        "transformers": f"transformers generate, batches of {BATCH}",
        "greedy": "jaxre, greedy",
        "best": "jaxre, best label",
        "above": f"jaxre, labels above {ABOVE:g}, the others bounded",
        "scores": "jaxre, all scores",
    }
    for name, seconds in results["seconds"].items():
        shown = []
        for measure in ("seconds", "cpu_seconds"):
            ratios = [
                theirs / ours
                for ours, theirs in zip(
                    results[measure][name], results[measure]["transformers"], strict=True
                )
            ]
            shown.append(
                f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"
            )
        speed = results["settings"]["examples"] / statistics.median(seconds)
        lines.append(
            f"| {descriptions[name]} | {speed:.2f} | {shown[0]} | {shown[1]} |"
            f" {results['first_seconds'][name]:.1f} |"
        )
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--model",
        default=default_model(),
        help=(
            "folder, GGUF file, run, named base, or random weights:"
            f" {', '.join(RANDOM + name for name in SHAPES)} (default: %(default)s)"
        ),
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
        parser.error(f"{settings.json.parent} does not exist; name an existing folder")
    results = bench(settings)
    print("\n".join(table(results)))
    if settings.json:
        settings.json.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    if (
        results["greedy_answers_that_differ"]
        or results["best_labels_that_differ"]
        or results["scores_differ_by"] > TOLERANCE
    ):
        raise SystemExit("the sides compute different results, so their times mean nothing")


if __name__ == "__main__":
    main()
