"""The sides of `bench_training.py`, each a process of its own that answers every command with one
line of JSON.

    python tools/bench_sides.py JSON
        # {"side": name, "folder": of the model, "settings": of the benchmark}
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

CHECKED = 16  # examples of the loss check
BATCH = 8  # examples of the recipe's update
SEED = 42  # the study's
RANK, ALPHA, DROPOUT, RATE = 16, 32, 0.05, 1e-4
PROMPTS = {"0shot": {}, "2shot": {"shots": 2}, "2shot-enumerated": {"shots": 2, "enumerate": True}}
# random:NAME -> (folder below the models, changes of its config.json): random weights of that
# shape, the tokenizer of the folder.
RANDOM = "random:"
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


def default_model() -> str:
    """SmolLM2-135M where its package is installed, else random weights of its shape."""
    from jaxre.checkpoints.packaged import packaged_file
    from jaxre.errors import InputError

    try:
        packaged_file("smollm2-135m")
    except InputError:
        return RANDOM + "smollm2-135m"
    return "smollm2-135m"


def random_shape(name: str) -> tuple[Path, dict[str, Any]]:
    """The folder of the tokenizer of a `random:` model, and the fields of its config.json."""
    below, changes = SHAPES[name.removeprefix(RANDOM)]
    folder = Path(os.environ.get("JAXRE_MODELS", "../shared/models")) / below
    if not folder.is_dir():
        raise SystemExit(f"{folder} does not exist; set JAXRE_MODELS to the folder of the models")
    return folder, json.loads((folder / "config.json").read_text()) | changes


# ---- (d): one saving switched off - --------------------------------------------------------------


def changed(shape_of: Callable) -> Callable:
    """`make_plan` with every row shape changed."""

    def plan_of(config, tokens, shards):
        from jaxre.data.dataset import make_plan

        plan = make_plan(config, tokens, shards)
        return dataclasses.replace(
            plan,
            updates=tuple(
                dataclasses.replace(update, shape=shape_of(update.shape)) for update in plan.updates
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


def plain_lora(params, adapter, rows, architecture, ops, shape, remat, keys):
    """Each projection separately, as in the formula, differentiated by JAX."""
    from jaxre.objectives.sft import loss_sum

    return loss_sum(
        params, adapter, rows, architecture, ops._replace(lora_group=written_down), shape, remat
    )


def written_down(x, weights, factors, words, scale, rate):
    """The formula of `jaxre_kernels.lora.lora_group`, term by term."""
    import jax.numpy as jnp
    from jaxre_kernels.lora.dropout import keep_channels
    from jaxre_kernels.nf4 import NF4Tiles, NF4Weight, dequantise, dequantise_tiles

    def dense(weight):
        if isinstance(weight, NF4Tiles):
            return dequantise_tiles(weight, x.dtype)
        return dequantise(weight, x.dtype).T if isinstance(weight, NF4Weight) else weight

    dropped = x
    if rate:
        kept = keep_channels(words, x.shape[-1], rate)
        dropped = jnp.where(kept, x * jnp.asarray(1 / (1 - rate), x.dtype), 0)
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


def full_head(params, adapter, rows, architecture, ops, shape, remat, keys):
    """The head at as many positions as a row has; positions that the last layer leaves out are
    zeros of weight 0.
    """
    import jax.numpy as jnp

    from jaxre.objectives.sft import loss_sum

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


def full_last_layer(params, adapter, rows, architecture, ops, shape, remat, keys):
    """The last layer at every position, like the others; the head at supervised positions."""
    from jaxre.models import decoder

    tokens = rows.tokens, rows.positions, rows.visible_until
    bounds = {"prefix": shape.prefix, "span": shape.span}
    x = decoder.forward(params, *tokens, architecture, adapter, ops, **bounds, remat=remat)  # B T D
    # B S D
    normed, table = decoder.head_factors(params, decoder.take(x, rows.supervised), architecture)
    return ops.cross_entropy(normed, table, rows.targets, rows.weights)


@dataclasses.dataclass(frozen=True)
class Variant:
    """`settings` added to (c)'s; `plan_of` replaces `make_plan`, `loss` that of the objective."""

    settings: tuple[str, ...] = ()
    plan_of: Callable | None = None
    loss: Callable | None = None

    @property
    def changes(self) -> dict[str, Callable]:
        """Arguments of `set_up`."""
        functions = {"plan_of": self.plan_of, "loss": self.loss}
        return {name: function for name, function in functions.items() if function is not None}


VARIANTS = {
    "d:unpacked": Variant(plan_of=unpacked),
    "d:unshared": Variant(plan_of=unshared),
    "d:full-head": Variant(loss=full_head),
    "d:full-last-layer": Variant(loss=full_last_layer),
    "d:dense-attention": Variant(
        plan_of=changed(lambda shape: dataclasses.replace(shape, prefix=0, span=None))
    ),
    "d:plain-lora": Variant(loss=plain_lora),
    "d:remat": Variant(settings=("train.remat=block",)),
}


# ---- a side: a process that answers one line of JSON for each command it is given ----------------


class Talk:
    """Reads commands and writes answers; the output of libraries goes to standard error."""

    def __init__(self) -> None:
        self.out = os.fdopen(os.dup(1), "w", buffering=1)
        os.dup2(2, 1)

    def answer(self, **values: Any) -> None:
        self.out.write(json.dumps(values) + "\n")

    def command(self) -> str | None:
        """The next command; None at the end."""
        return sys.stdin.readline().strip() or None

    def check(self) -> str | None:
        """The next command if it checks losses: "check" for one, "curve" for those of updates;
        "exact" in f32 on dense weights, "timed" in the timed precision. None is "warm".
        """
        command = self.command()
        if command is None:
            sys.exit()
        return command if command.startswith(("check", "curve")) else None


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


def write_model(model: str, base: Path, dtype: str):
    """Writes `model` (a folder, GGUF file, run, named base, or `random:SHAPE`) as a Hugging Face
    folder; returns its architecture.
    """
    import numpy as np
    from safetensors.numpy import save_file

    from jaxre.checkpoints.convert import convert
    from jaxre.checkpoints.huggingface import copy_side_files, hf_tensors, side_files_of
    from jaxre.checkpoints.source import locate
    from jaxre.models.architecture import architecture_of
    from jaxre.models.module import init_weights

    # In the timed dtype: then every side quantises the same values, and the check in f32 uses the
    # values of the timed part.
    if not model.startswith(RANDOM):
        convert(model, base, "hf", merge=locate(model).adapter is not None, dtype=dtype)
        return architecture_of(json.loads((base / "config.json").read_text()), str(base))
    source, fields = random_shape(model)
    architecture = architecture_of(fields, str(source))
    base.mkdir()
    copy_side_files(side_files_of(source), base)
    (base / "config.json").write_text(json.dumps(fields), encoding="utf-8")
    save_file(
        dict(hf_tensors(architecture, init_weights(architecture, SEED), np.dtype(dtype))),
        base / "model.safetensors",
        metadata={"format": "pt"},
    )
    return architecture


def write_inputs(folder: Path, settings: argparse.Namespace) -> dict[str, Any]:
    """Writes model, adapter and examples of the benchmark, once for all sides; B of every LoRA pair
    is far from zero.
    """
    import jax
    import numpy as np

    from jaxre.checkpoints.peft import save_adapter
    from jaxre.checkpoints.source import tokenizer_folder
    from jaxre.config import Lora
    from jaxre.models.lora import init_adapter
    from jaxre.models.weights import parameter_count
    from jaxre.objectives import load_dataset

    base = folder / "model"
    architecture = write_model(settings.model, base, settings.dtype)
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
    """Updates in a turn, if one takes `seconds`, after a first update that is not timed.

    While a side is stopped the system reclaims its memory and files that it has not used lately;
    the first update brings them back.
    """
    return max(1, math.ceil(settings.seconds / seconds))


# ---- (c), (d) ------------------------------------------------------------------------------------


def jaxre_side(side: str, folder: Path, settings: argparse.Namespace, talk: Talk) -> None:
    import jax
    import numpy as np

    from jaxre.checkpoints.source import tokenizer_folder
    from jaxre.objectives import load_dataset
    from jaxre.profiling.memory import peak_memory, reset_resident_peak
    from jaxre.profiling.updates import Updates
    from jaxre.training.setup import set_up

    (prompt,) = settings.prompts
    variant = VARIANTS.get(side, Variant())
    timed = (*variant.settings, *(("model.quantise=nf4",) if settings.nf4 else ()))
    config = run_config(folder, prompt, settings, *timed)
    dataset = load_dataset(config, tokenizer_folder(config))
    talk.answer(ready=True)

    tokens = dataset.train.tokens
    few = dataclasses.replace(dataset.train, tokens=tokens.subset(np.arange(len(tokens)) < CHECKED))
    few = dataclasses.replace(dataset, train=few)
    while command := talk.check():
        what, _, precision = command.partition(" ")
        exact = precision == "exact"
        overrides = [*variant.settings, "model.dtype=float32"] if exact else [*timed]
        overrides.append("lora.dropout=0.0")
        if what == "check":
            overrides.append("train.learning_rate=1e-30")
        else:
            overrides += curve_settings(settings)
        checked = run_config(folder, prompt, settings, *overrides)
        with jax.default_matmul_precision("highest" if exact else None):
            run = set_up(checked, dataset=few if what == "check" else dataset, **variant.changes)
            talk.answer(**(loss_of(run) if what == "check" else curve_of(run, folder)))
        del run

    run = set_up(config, dataset=dataset, **variant.changes)  # warm
    updates = Updates(run)
    jax.block_until_ready(updates.run(updates.next_rows()))
    began = time.perf_counter()
    jax.block_until_ready(updates.run(updates.next_rows()))
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
        jax.block_until_ready(updates.run(updates.next_rows()))  # not timed: see `updates_in`
        chosen = updates.upcoming(count)
        reset_resident_peak()
        began = time.perf_counter()
        for _ in range(count):
            metrics = updates.run(updates.next_rows())
        jax.block_until_ready(metrics)
        seconds = time.perf_counter() - began
        tokens = int(lengths[chosen].sum())
        # The peak of a device cannot be reset: it covers the whole process, with loading, so other
        # processes check losses.
        talk.answer(
            seconds=seconds,
            examples=len(chosen),
            tokens=tokens,
            updates=count,
            peak=peak_memory(jax.devices()[0]),
        )


def loss_of(run: Any) -> dict[str, float]:
    """The loss per supervised token of a run's examples, and the number of these tokens."""
    from jaxre.profiling.updates import Updates

    updates, total, count = Updates(run), 0.0, 0.0
    for _ in run.plan.updates:
        rows = updates.next_rows()
        weight = float(rows.weights.sum())
        total, count = total + float(updates.run(rows).loss) * weight, count + weight
    return {"loss": total / count, "supervised": count}


def curve_settings(settings: argparse.Namespace) -> tuple[str, ...]:
    """Settings that make (c)'s updates the recipe's: its examples an update, its schedule."""
    return (
        f"train.batch_examples={BATCH}",
        "train.batch_tokens=null",
        "train.warmup=0.0",
        f"train.max_steps={settings.curve}",
    )


def curve_of(run: Any, folder: Path) -> dict[str, list[float]]:
    """The loss of each update of a prepared run; writes the examples of each update to `folder`,
    for the other sides.
    """
    import numpy as np

    from jaxre.profiling.updates import Updates, members

    updates = Updates(run)
    planned = run.plan.updates[: run.steps]
    np.save(folder / "curve.npy", np.stack([members(update) for update in planned]))
    return {"losses": [float(updates.run(updates.next_rows()).loss) for _ in planned]}


if __name__ == "__main__":
    options = json.loads(sys.argv[1])
    run_side(options["side"], Path(options["folder"]), argparse.Namespace(**options["settings"]))
