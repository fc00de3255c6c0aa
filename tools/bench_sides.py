"""The sides of `bench_training.py`, each a process of its own that answers one line of JSON for
each command it is given.

python tools/bench_sides.py JSON    # {"side": name, "folder": of the model, "settings": of the
benchmark}
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
import math
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

CHECKED = 16  # examples of the loss check
SEED = 42  # the study's
RANK, ALPHA, DROPOUT, RATE = 16, 32, 0.05, 1e-4
PROMPTS = {"0shot": {}, "2shot": {"shots": 2}, "2shot-enumerated": {"shots": 2, "enumerate": True}}
# name -> (folder below the models, changes of its config.json): random weights of that shape, the
# tokenizer of the folder.
SMOLLM2_135M = {
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
}
SHAPES = {
    "smollm2-135m": ("HuggingFaceTB/SmolLM2-360M-Instruct", SMOLLM2_135M),
    "smollm2-360m": ("HuggingFaceTB/SmolLM2-360M-Instruct", {}),
    "qwen2.5-0.5b": ("Qwen/Qwen2.5-0.5B-Instruct", {}),
    "qwen2.5-3b": ("Qwen/Qwen2.5-3B-Instruct", {}),
    "tiny": ("HuggingFaceTB/SmolLM2-360M-Instruct", SMOLLM2_135M | {"num_hidden_layers": 2}),
}


# ---- (d): what each saving is worth
# ------------------------------------------------------------------


def changed(shape_of: Callable) -> Callable:
    """`make_plan` with every row shape changed."""

    def plan_of(config, tokens, shards):
        from jaxre.data.dataset import make_plan

        plan = make_plan(config, tokens, shards)
        return dataclasses.replace(
            plan,
            updates=tuple(
                dataclasses.replace(one, shape=shape_of(one.shape)) for one in plan.updates
            ),
        )

    return plan_of


def unshared(config, tokens, shards):
    """No two examples share a prefix."""
    from jaxre.data.dataset import make_plan

    return make_plan(config, tokens, shards, share=False)


def unpacked(config, tokens, shards):
    """One example a row, rows as long as the longest example, the examples of an update without
    shared prefixes.
    """
    from jaxre.data.packing import RowShape

    plan = unshared(config, tokens, shards)
    alone = [
        tuple(tuple((example,) for row in rows for example in row) for rows in update.micro)
        for update in plan.updates
    ]
    most = max(len(rows) for micro in alone for rows in micro)
    shape = RowShape(
        -(-most // shards) * shards,
        -(-int(tokens.lengths.max()) // 8) * 8,
        -(-int(tokens.supervised.max()) // 8) * 8,
    )
    updates = [
        dataclasses.replace(update, shape=shape, micro=micro)
        for update, micro in zip(plan.updates, alone, strict=True)
    ]
    return dataclasses.replace(plan, updates=tuple(updates))


def plain_lora(loss_sum, params, adapter, rows, architecture, ops, shape, remat):
    """Each projection by itself, as it is written down, differentiated by JAX."""
    return loss_sum(
        params, adapter, rows, architecture, ops._replace(lora_group=written_down), shape, remat
    )


def written_down(x, weights, factors, words, scale, rate):
    """`jaxre_kernels.lora.lora_group`."""
    import jax.numpy as jnp
    from jaxre_kernels.lora.dropout import keep_channels
    from jaxre_kernels.nf4 import NF4Tiles, NF4Weight, dequantise, dequantise_tiles

    def dense(weight):
        if isinstance(weight, NF4Tiles):
            return dequantise_tiles(weight, x.dtype)
        return dequantise(weight, x.dtype).T if isinstance(weight, NF4Weight) else weight

    dropped = (
        jnp.where(
            keep_channels(words, x.shape[-1], rate), x * jnp.asarray(1 / (1 - rate), x.dtype), 0
        )
        if rate
        else x
    )
    outputs = [x @ dense(weight) for weight in weights]
    return [
        (
            y
            if pair is None
            else y
            + (dropped @ pair.a.astype(x.dtype) * jnp.asarray(scale, x.dtype))
            @ pair.b.astype(x.dtype)
        )
        for y, pair in zip(outputs, factors, strict=True)
    ]


def full_head(loss_sum, params, adapter, rows, architecture, ops, shape, remat):
    """The head at as many places as a row has; those that the last layer does not give are zeros of
    weight 0.
    """
    import jax.numpy as jnp

    def head(x, table, targets, weights):
        rest = rows.tokens.shape[1] - targets.shape[1]
        x, targets, weights = (
            jnp.pad(array, ((0, 0), (0, rest)) + ((0, 0),) * (array.ndim - 2))
            for array in (x, targets, weights)
        )
        return ops.cross_entropy(x, table, targets, weights)

    return loss_sum(
        params, adapter, rows, architecture, ops._replace(cross_entropy=head), shape, remat
    )


def full_last_layer(loss_sum, params, adapter, rows, architecture, ops, shape, remat):
    """The last layer at every place of a row, as the others; the head at supervised positions."""
    from jaxre.models import decoder

    given = (rows.tokens, rows.positions, rows.visible_until)
    # B T D
    x = decoder.forward(
        params,
        *given,
        architecture,
        adapter,
        ops,
        prefix=shape.prefix,
        span=shape.span,
        remat=remat,
    )
    # B S D
    normed, table = decoder.head_factors(params, decoder.take(x, rows.supervised), architecture)
    return ops.cross_entropy(normed, table, rows.targets, rows.weights)


def run_with(loss_sum: Callable) -> None:
    """Every update that this process compiles from here on has `loss_sum` in place of
    `jaxre.training.step.loss_sum`, which it is given.
    """
    from jaxre.training import step

    step.loss_sum = functools.partial(loss_sum, step.loss_sum)


@dataclasses.dataclass(frozen=True)
class Variant:
    """`settings` on top of (c)'s; `plan_of` in place of `make_plan`; `loss_sum` in place of the
    step's.
    """

    settings: tuple[str, ...] = ()
    plan_of: Callable | None = None
    loss_sum: Callable | None = None


VARIANTS = {
    "d:unpacked": Variant(plan_of=unpacked),
    "d:unshared": Variant(plan_of=unshared),
    "d:full-head": Variant(loss_sum=full_head),
    "d:full-last-layer": Variant(loss_sum=full_last_layer),
    "d:dense-attention": Variant(
        plan_of=changed(lambda shape: dataclasses.replace(shape, prefix=0, span=None))
    ),
    "d:plain-lora": Variant(loss_sum=plain_lora),
    "d:remat": Variant(settings=("train.remat=block",)),
}


# ---- a side: a process that answers one line of JSON for each command it is given
# ---------------------


class Talk:
    """Commands in, answers out; what libraries print goes to standard error."""

    def __init__(self) -> None:
        self.out = os.fdopen(os.dup(1), "w", buffering=1)
        os.dup2(2, 1)

    def answer(self, **values: Any) -> None:
        self.out.write(json.dumps(values) + "\n")

    def command(self) -> str | None:
        """The next command; None when there is no more to do."""
        return sys.stdin.readline().strip() or None

    def check(self) -> str | None:
        """The next command if it asks for a loss: "check exact" in f32 on dense weights, "check
        timed" of what is timed. None is "warm".
        """
        command = self.command()
        if command is None:
            sys.exit()
        return command if command.startswith("check") else None


def run_side(side: str, folder: Path, settings: argparse.Namespace) -> None:
    talk = Talk()
    if side == "prepare":
        talk.answer(**write_inputs(folder, settings))
    elif side in ("a", "a'", "b"):
        from bench_peers import torch_side

        torch_side(side, folder, settings, talk)
    else:
        from jaxre.host_memory import keep_freed_memory

        keep_freed_memory()  # as `jaxre train` does
        jaxre_side(side, folder, settings, talk)


def run_config(folder: Path, prompt: str, settings: argparse.Namespace, *overrides: str):
    """The run of (c), from the adapter that every side starts from."""
    from jaxre.config import load_config

    tree = {
        "name": f"bench-{prompt}",
        "output": str(folder / "runs"),
        "seed": SEED,
        "model": {"path": str(folder / "adapter"), "dtype": settings.dtype},
        "data": {
            "train": {"dataset": "semeval2010_task8", "split": "train", "limit": settings.examples},
            "cache": str(folder / "cache"),
            "too_long": "error",
        },
        "prompt": PROMPTS[prompt],
        "lora": {"rank": RANK, "alpha": float(ALPHA), "dropout": DROPOUT},
        "train": {
            "epochs": 1,
            "batch_tokens": settings.rows * settings.row_length,
            "row_length": settings.row_length,
            "learning_rate": RATE,
        },
    }
    path = folder / f"config-{prompt}-{os.getpid()}.yaml"
    path.write_text(json.dumps(tree), encoding="utf-8")  # YAML reads JSON
    return load_config(path, [*settings.set, *overrides])


def write_inputs(folder: Path, settings: argparse.Namespace) -> dict[str, Any]:
    """Model, adapter and examples of the benchmark, once for all sides: random weights, B of every
    LoRA pair far from zero.
    """
    import jax
    import numpy as np
    from safetensors.numpy import save_file

    from jaxre.checkpoints.huggingface import copy_side_files, hf_tensors, side_files_of
    from jaxre.checkpoints.peft import save_adapter
    from jaxre.checkpoints.source import tokenizer_folder
    from jaxre.config import Lora
    from jaxre.data.dataset import load_dataset
    from jaxre.models.architecture import architecture_of
    from jaxre.models.lora import init_adapter
    from jaxre.models.module import init_weights
    from jaxre.models.weights import parameter_count

    below, changes = SHAPES[settings.shape]
    source = Path(os.environ.get("JAXRE_MODELS", "../shared/models")) / below
    if not source.is_dir():
        raise SystemExit(f"{source} is not there; set JAXRE_MODELS to the folder of the models")
    fields = json.loads((source / "config.json").read_text()) | changes
    architecture = architecture_of(fields, str(source))
    base = folder / "model"
    base.mkdir()
    copy_side_files(side_files_of(source), base)
    (base / "config.json").write_text(json.dumps(fields), encoding="utf-8")
    weights = init_weights(architecture, SEED)
    # Of the dtype that is timed: then NF4 is of the same values on every side, and the check in f32
    # of those of the timed part.
    save_file(
        dict(hf_tensors(architecture, weights, np.dtype(settings.dtype))),
        base / "model.safetensors",
        metadata={"format": "pt"},
    )
    lora, draw = Lora(rank=RANK, alpha=float(ALPHA), dropout=DROPOUT), np.random.default_rng(SEED)
    factors = jax.tree.map(np.array, init_adapter(architecture, lora, jax.random.key(SEED)))
    for part in factors.values():
        for pair in part.values():
            pair["b"] = (0.02 * draw.standard_normal(pair["b"].shape)).astype(np.float32)
    save_adapter(folder / "adapter", architecture, lora, factors, str(base), base)
    lengths = {}
    for prompt in settings.prompts:
        config = run_config(folder, prompt, settings)
        tokens = load_dataset(config, tokenizer_folder(config)).train.tokens
        np.savez(
            folder / f"{prompt}.npz",
            tokens=tokens.tokens,
            starts=tokens.starts,
            prompt_lengths=tokens.prompt_lengths,
        )
        lengths[prompt] = {
            "examples": len(tokens),
            "tokens": float(tokens.lengths.mean()),
            "longest": int(tokens.lengths.max()),
            "supervised": float(tokens.supervised.mean()),
        }
    device = {"device": str(jax.devices()[0].device_kind), "platform": jax.default_backend()}
    return {"parameters": parameter_count(architecture), "prompts": lengths, **device}


def updates_in(seconds: float, settings: argparse.Namespace) -> int:
    """How many updates of this length a turn has, after one that is not timed.

    While a side was stopped the system took memory and files from it that it had not touched
    lately; its first update gets them back.
    """
    return max(1, math.ceil(settings.seconds / seconds))


# ---- (c), (d)
# ----------------------------------------------------------------------------------------


def jaxre_side(side: str, folder: Path, settings: argparse.Namespace, talk: Talk) -> None:
    import jax
    import numpy as np

    from jaxre.checkpoints.source import tokenizer_folder
    from jaxre.data.dataset import load_dataset, make_plan
    from jaxre.profiling.memory import peak_memory, reset_resident_peak
    from jaxre.profiling.prepared import members, prepare

    (prompt,) = settings.prompts
    variant = VARIANTS.get(side, Variant())
    plan_of = variant.plan_of or make_plan
    if variant.loss_sum:
        run_with(variant.loss_sum)  # this process is the variant's own
    timed = (*variant.settings, *(("model.quantise=nf4",) if settings.nf4 else ()))
    config = run_config(folder, prompt, settings, *timed)
    dataset = load_dataset(config, tokenizer_folder(config))
    talk.answer(ready=True)

    few = dataset.train.tokens.subset(np.arange(len(dataset.train.tokens)) < CHECKED)
    few = dataclasses.replace(dataset, train=dataclasses.replace(dataset.train, tokens=few))
    while command := talk.check():
        exact = (*variant.settings, "model.dtype=float32")
        checked = (
            *(exact if command == "check exact" else timed),
            "lora.dropout=0.0",
            "train.learning_rate=1e-30",
        )
        with jax.default_matmul_precision("highest" if command == "check exact" else None):
            talk.answer(
                **loss_of(prepare(run_config(folder, prompt, settings, *checked), few, plan_of))
            )

    run = prepare(config, dataset, plan_of)  # warm
    jax.block_until_ready(run.update(run.next_rows()))
    began = time.perf_counter()
    jax.block_until_ready(run.update(run.next_rows()))
    count = updates_in(time.perf_counter() - began, settings)
    shapes = [
        [len(run.plan.updates[0].micro), *dataclasses.astuple(shape)] for shape in run.plan.shapes
    ]
    _, temporary = run.compiled.memory
    talk.answer(
        updates=count,
        compile_seconds=run.compile_seconds,
        remat=run.compiled.remat,
        shapes=shapes,
        temporary=temporary,
    )

    lengths = dataset.train.tokens.lengths
    while talk.command():
        jax.block_until_ready(run.update(run.next_rows()))  # not timed, as `updates_in` says
        chosen = np.concatenate(
            [
                members(run.plan.updates[n % len(run.plan.updates)])
                for n in range(run.done, run.done + count)
            ]
        )
        reset_resident_peak()
        began = time.perf_counter()
        for _ in range(count):
            metrics = run.update(run.next_rows())
        jax.block_until_ready(metrics)
        seconds = time.perf_counter() - began
        tokens = int(lengths[chosen].sum())
        # A device's peak cannot be set back: it is the process's, which for that has not checked a
        # loss before; loading is in it.
        talk.answer(
            seconds=seconds,
            examples=len(chosen),
            tokens=tokens,
            updates=count,
            peak=peak_memory(jax.devices()[0]),
        )


def loss_of(run: Any) -> dict[str, float]:
    """The loss per supervised token of a prepared run's examples, and how many of these there
    are.
    """
    total = count = 0.0
    for _ in run.plan.updates:
        rows = run.next_rows()
        weight = float(rows.weights.sum())
        total, count = total + float(run.update(rows).loss) * weight, count + weight
    return {"loss": total / count, "supervised": count}


if __name__ == "__main__":
    given = json.loads(sys.argv[1])
    run_side(given["side"], Path(given["folder"]), argparse.Namespace(**given["settings"]))
