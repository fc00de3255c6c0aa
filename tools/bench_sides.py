"""The sides of `bench_training.py`, each a process of its own that answers one line of JSON for each command it is given.

python tools/bench_sides.py JSON    # {"side": name, "folder": of the model, "settings": of the benchmark}
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib.util
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
# name -> (folder below the models, changes of its config.json): random weights of that shape, the tokenizer of the folder.
SMOLLM2_135M = {"hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30, "num_attention_heads": 9, "num_key_value_heads": 3}
SHAPES = {
    "smollm2-135m": ("HuggingFaceTB/SmolLM2-360M-Instruct", SMOLLM2_135M),
    "smollm2-360m": ("HuggingFaceTB/SmolLM2-360M-Instruct", {}),
    "qwen2.5-0.5b": ("Qwen/Qwen2.5-0.5B-Instruct", {}),
    "qwen2.5-3b": ("Qwen/Qwen2.5-3B-Instruct", {}),
    "tiny": ("HuggingFaceTB/SmolLM2-360M-Instruct", SMOLLM2_135M | {"num_hidden_layers": 2}),
}


# ---- (d): what each saving is worth ------------------------------------------------------------------


def changed(shape_of: Callable) -> Callable:
    """`make_plan` with every row shape changed."""

    def plan_of(config, tokens, shards):
        from jaxre.data.dataset import make_plan

        plan = make_plan(config, tokens, shards)
        return dataclasses.replace(plan, updates=tuple(dataclasses.replace(one, shape=shape_of(one.shape)) for one in plan.updates))

    return plan_of


def unshared(config, tokens, shards):
    """No two examples share a prefix."""
    from jaxre.data.dataset import make_plan

    return make_plan(config, tokens, shards, share=False)


def unpacked(config, tokens, shards):
    """One example a row, rows as long as the longest example, the examples of an update without shared prefixes."""
    from jaxre.data.packing import RowShape

    plan = unshared(config, tokens, shards)
    alone = [tuple(tuple((example,) for row in rows for example in row) for rows in update.micro) for update in plan.updates]
    most = max(len(rows) for micro in alone for rows in micro)
    shape = RowShape(-(-most // shards) * shards, -(-int(tokens.lengths.max()) // 8) * 8, -(-int(tokens.supervised.max()) // 8) * 8)
    updates = [dataclasses.replace(update, shape=shape, micro=micro) for update, micro in zip(plan.updates, alone, strict=True)]
    return dataclasses.replace(plan, updates=tuple(updates))


def plain_lora(x, weights, factors, words, scale, rate):
    """`jaxre_kernels.lora.lora_group` as it is written down, each projection by itself, differentiated by JAX."""
    import jax.numpy as jnp
    from jaxre_kernels.lora.dropout import keep_channels

    dropped = jnp.where(keep_channels(words, x.shape[-1], rate), x * jnp.asarray(1 / (1 - rate), x.dtype), 0) if rate else x
    return [
        x @ w if pair is None else x @ w + (dropped @ pair.a.astype(x.dtype) * jnp.asarray(scale, x.dtype)) @ pair.b.astype(x.dtype)
        for w, pair in zip(weights, factors, strict=True)
    ]


def run_with(lora_group: Callable) -> None:
    """Every update that this process compiles from here on has `lora_group` in place of the fused one."""
    from jaxre.training import compilation

    ops_of = compilation.ops_of
    compilation.ops_of = lambda *given: ops_of(*given)._replace(lora_group=lora_group)


@dataclasses.dataclass(frozen=True)
class Variant:
    """`settings` on top of (c)'s; `plan_of` in place of `make_plan`; `lora_group` in place of the fused one."""

    settings: tuple[str, ...] = ()
    plan_of: Callable | None = None
    lora_group: Callable | None = None


VARIANTS = {
    "d:unpacked": Variant(plan_of=unpacked),
    "d:unshared": Variant(plan_of=unshared),
    # Last layer and head at every position of a row.
    "d:full-head-and-last-layer": Variant(plan_of=changed(lambda shape: dataclasses.replace(shape, supervised=shape.length))),
    "d:dense-attention": Variant(plan_of=changed(lambda shape: dataclasses.replace(shape, prefix=0, span=None))),
    "d:plain-lora": Variant(lora_group=plain_lora),
    "d:remat": Variant(settings=("train.remat=block",)),
}


# ---- a side: a process that answers one line of JSON for each command it is given ---------------------


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


def run_side(side: str, folder: Path, settings: argparse.Namespace) -> None:
    talk = Talk()
    if side == "prepare":
        talk.answer(**write_inputs(folder, settings))
    elif side in ("a", "a'", "b"):
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
    """Model, adapter and examples of the benchmark, once for all sides: random weights, B of every LoRA pair far from zero."""
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
    save_file(dict(hf_tensors(architecture, weights, np.dtype(np.float32))), base / "model.safetensors", metadata={"format": "pt"})
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
        np.savez(folder / f"{prompt}.npz", tokens=tokens.tokens, starts=tokens.starts, prompt_lengths=tokens.prompt_lengths)
        lengths[prompt] = {
            "examples": len(tokens),
            "tokens": float(tokens.lengths.mean()),
            "longest": int(tokens.lengths.max()),
            "supervised": float(tokens.supervised.mean()),
        }
    return {"parameters": parameter_count(architecture), "prompts": lengths, "device": str(jax.devices()[0].device_kind)}


def updates_in(seconds: float, settings: argparse.Namespace) -> int:
    """How many updates of this length a turn has, after one that is not timed.

    While a side was stopped the system took memory and files from it that it had not touched lately; its first update gets them back.
    """
    return max(1, math.ceil(settings.seconds / seconds))


# ---- (c), (d) ----------------------------------------------------------------------------------------


def jaxre_side(side: str, folder: Path, settings: argparse.Namespace, talk: Talk) -> None:
    import jax
    import numpy as np

    from jaxre.checkpoints.source import tokenizer_folder
    from jaxre.data.dataset import load_dataset, make_plan
    from jaxre.profiling.memory import peak_memory, reset_resident_peak
    from jaxre.profiling.prepared import members, prepare

    (prompt,) = settings.prompts
    variant = VARIANTS.get(side, Variant())
    overrides, plan_of = variant.settings, variant.plan_of or make_plan
    if variant.lora_group:
        run_with(variant.lora_group)  # this process is the variant's own
    config = run_config(folder, prompt, settings, *overrides)
    dataset = load_dataset(config, tokenizer_folder(config))
    talk.answer(ready=True)

    talk.command()  # check
    few = dataset.train.tokens.subset(np.arange(len(dataset.train.tokens)) < CHECKED)
    exact = run_config(folder, prompt, settings, *overrides, "model.dtype=float32", "lora.dropout=0.0", "train.learning_rate=1e-30")
    with jax.default_matmul_precision("highest"):
        run = prepare(exact, dataclasses.replace(dataset, train=dataclasses.replace(dataset.train, tokens=few)), plan_of)
        total = count = 0.0
        for _ in run.plan.updates:
            rows = run.next_rows()
            weight = float(rows.weights.sum())
            total, count = total + float(run.update(rows).loss) * weight, count + weight
    talk.answer(loss=total / count, supervised=count)
    del run

    talk.command()  # warm
    if settings.nf4:
        config = run_config(folder, prompt, settings, *overrides, "model.quantise=nf4")
    run = prepare(config, dataset, plan_of)
    jax.block_until_ready(run.update(run.next_rows()))
    began = time.perf_counter()
    jax.block_until_ready(run.update(run.next_rows()))
    count = updates_in(time.perf_counter() - began, settings)
    shapes = [[len(run.plan.updates[0].micro), *dataclasses.astuple(shape)] for shape in run.plan.shapes]
    _, temporary = run.compiled.memory
    talk.answer(updates=count, compile_seconds=run.compile_seconds, remat=run.compiled.remat, shapes=shapes, temporary=temporary)

    lengths = dataset.train.tokens.lengths
    while talk.command():
        jax.block_until_ready(run.update(run.next_rows()))  # not timed, as `updates_in` says
        chosen = np.concatenate([members(run.plan.updates[n % len(run.plan.updates)]) for n in range(run.done, run.done + count)])
        reset_resident_peak()
        began = time.perf_counter()
        for _ in range(count):
            metrics = run.update(run.next_rows())
        jax.block_until_ready(metrics)
        seconds = time.perf_counter() - began
        tokens = int(lengths[chosen].sum())
        talk.answer(seconds=seconds, examples=len(chosen), tokens=tokens, updates=count, peak=peak_memory(jax.devices()[0]))


# ---- (a), (a'), (b) ----------------------------------------------------------------------------------


def torch_side(side: str, folder: Path, settings: argparse.Namespace, talk: Talk) -> None:
    import torch
    from transformers import TrainerCallback

    from jaxre.profiling.memory import reset_resident_peak, resident_peak

    (prompt,) = settings.prompts
    trainer = torch_trainer(side, folder, settings, prompt, "float32")
    talk.answer(ready=True)

    talk.command()  # check
    total = count = 0.0
    trainer.model.eval()
    with torch.no_grad():
        for batch in trainer.get_eval_dataloader():
            batch = trainer._prepare_inputs(batch)
            supervised = int((batch["labels"][:, 1:] != -100).sum())
            total += float(trainer.compute_loss(trainer.model, batch)) * supervised
            count += supervised
    talk.answer(loss=total / count, supervised=count)
    if settings.dtype != "float32" or settings.nf4:
        del trainer
        trainer = torch_trainer(side, folder, settings, prompt, settings.dtype)

    class Turns(TrainerCallback):
        """Two updates to warm up, then turns; between them the process waits inside the training loop."""

        began = examples = tokens = start = until = length = 0

        def on_step_end(self, args, state, control, **_):
            if torch.cuda.is_available() and state.global_step in (1, 2, self.start, self.until):
                torch.cuda.synchronize()
            if state.global_step == 1:
                self.began = time.perf_counter()
            elif state.global_step == 2:
                self.length = updates_in(time.perf_counter() - self.began, settings)
                talk.answer(updates=self.length)
                self.turn(state, control)
            elif state.global_step == self.start:
                self.examples = self.tokens = 0
                self.began = time.perf_counter()
            elif state.global_step == self.until:
                seconds, device = time.perf_counter() - self.began, torch.cuda.is_available()
                talk.answer(
                    seconds=seconds,
                    examples=self.examples,
                    tokens=self.tokens,
                    updates=self.length,
                    peak=torch.cuda.max_memory_allocated() if device else resident_peak(),
                )
                self.turn(state, control)

        def turn(self, state, control):
            if not talk.command():
                control.should_training_stop = True
            reset_resident_peak()
            self.start = state.global_step + 1
            self.until = self.start + self.length

    turns = Turns()
    step = trainer.training_step

    def counted(model, inputs, *rest):
        if "attention_mask" in inputs:
            turns.examples += len(inputs["input_ids"])
            turns.tokens += int(inputs["attention_mask"].sum())
        else:  # packed: an example begins at position 0
            turns.examples += int((inputs["position_ids"] == 0).sum())
            turns.tokens += inputs["position_ids"].numel()
        return step(model, inputs, *rest)

    trainer.training_step = counted
    trainer.add_callback(turns)
    talk.command()  # warm
    trainer.train()


def torch_trainer(side: str, folder: Path, settings: argparse.Namespace, prompt: str, dtype: str):
    import numpy as np
    import torch
    from datasets import Dataset
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig, DataCollatorForSeq2Seq, Trainer, TrainingArguments

    cuda = torch.cuda.is_available()
    stored = np.load(folder / f"{prompt}.npz")
    records = []
    for i, prompt_length in enumerate(stored["prompt_lengths"].tolist()):
        ids = stored["tokens"][stored["starts"][i] : stored["starts"][i + 1]].tolist()
        records.append({"input_ids": ids, "labels": [-100] * prompt_length + ids[prompt_length:]})
    train, few = Dataset.from_list(records), Dataset.from_list(records[:CHECKED])
    quantised = {}
    if settings.nf4 and dtype == settings.dtype:
        four_bits = BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=dtype
        )
        quantised = {"quantization_config": four_bits}
    flash = side == "b" and cuda and dtype != "float32" and importlib.util.find_spec("flash_attn") is not None
    attention = "flash_attention_2" if flash else "sdpa"
    tokenizer = AutoTokenizer.from_pretrained(folder / "model")
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    base = AutoModelForCausalLM.from_pretrained(
        folder / "model", dtype=getattr(torch, dtype), attn_implementation=attention, device_map="cuda" if cuda else None, **quantised
    )
    base.config.use_cache = False
    model = PeftModel.from_pretrained(base, folder / "adapter", is_trainable=True)
    eight_bits = cuda and importlib.util.find_spec("bitsandbytes") is not None
    common = {
        "output_dir": str(folder / f"trainer-{side[0]}"),
        "max_steps": 1_000_000,  # stopped by the turns
        "learning_rate": RATE,
        "weight_decay": 0.01,
        "warmup_steps": 0,
        "lr_scheduler_type": "linear",
        "optim": "paged_adamw_8bit" if eight_bits else "adamw_torch_fused" if cuda else "adamw_torch",
        "seed": SEED,
        "bf16": dtype == "bfloat16",
        "use_cpu": not cuda,
        "report_to": [],
        "save_strategy": "no",
        "logging_strategy": "no",
        "disable_tqdm": True,
        "dataloader_pin_memory": cuda,
        "gradient_checkpointing": side == "a",
    }
    if side == "b":
        from trl import SFTConfig, SFTTrainer

        # Without variable-length attention rows of a batch are flattened into one, whose mask is dense: then one row at a time.
        rows = (settings.rows, 1) if flash else (1, settings.rows)
        config = SFTConfig(
            **common,
            per_device_train_batch_size=rows[0],
            per_device_eval_batch_size=rows[0],
            gradient_accumulation_steps=rows[1],
            max_length=settings.row_length,
            packing=True,
            torch_compile=settings.compile,
        )
        return SFTTrainer(model=model, args=config, train_dataset=train, eval_dataset=few, processing_class=tokenizer)
    args = TrainingArguments(
        **common,
        per_device_train_batch_size=4,
        per_device_eval_batch_size=4,
        gradient_accumulation_steps=2,
        gradient_checkpointing_kwargs={"use_reentrant": False},
        remove_unused_columns=False,
    )
    collate = DataCollatorForSeq2Seq(tokenizer, padding="longest")
    return Trainer(model=model, args=args, train_dataset=train, eval_dataset=few, data_collator=collate)


if __name__ == "__main__":
    given = json.loads(sys.argv[1])
    run_side(given["side"], Path(given["folder"]), argparse.Namespace(**given["settings"]))
