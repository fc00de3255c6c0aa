"""The PyTorch sides of `bench_training.py`, started by `bench_sides.py`: (a) and (a') with Trainer,
(b) with TRL's SFTTrainer.
"""

from __future__ import annotations

import argparse
import gc
import importlib.util
import time
from collections import deque
from pathlib import Path
from typing import Any

import numpy as np
import torch
from bench_sides import BATCH, CHECKED, RATE, SEED, Talk, updates_in
from peft import PeftModel
from transformers import (
    AttentionInterface,
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    DataCollatorForSeq2Seq,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

from jaxre.profiling.memory import reset_resident_peak, resident_peak

CUDA = torch.cuda.is_available()
# attentions that skip pairs of tokens of different examples, however long a row is
WHOLE_ROWS = ("flash_attention_2", "varlen", "flex_attention")


def torch_side(side: str, folder: Path, settings: argparse.Namespace, talk: Talk) -> None:
    if CUDA:
        torch.cuda.set_per_process_memory_fraction(settings.share)
    talk.answer(ready=True)
    tried = fits(settings) if side == "b" else [(4, side == "a")]
    while command := talk.check():
        what, _, precision = command.partition(" ")
        exact = precision == "exact"
        trainer = torch_trainer(
            side,
            folder,
            settings,
            *tried[0],
            dtype="float32" if exact else settings.dtype,
            quantise=settings.nf4 and not exact,
            curve=what == "curve",
        )
        talk.answer(**(curve_of(trainer) if what == "curve" else loss_of(trainer)))
        del trainer
        free()
    for rows, checkpointing in tried:
        trainer = torch_trainer(
            side, folder, settings, rows, checkpointing, dtype=settings.dtype, quantise=settings.nf4
        )
        turns = Turns(trainer, settings, talk, {"at_once": rows, "checkpointing": checkpointing})
        if turns.run(last=(rows, checkpointing) == tried[-1]):
            return
        del trainer, turns
        free()


def free() -> None:
    gc.collect()  # a trainer and its model refer to each other
    if CUDA:
        torch.cuda.empty_cache()


def fits(settings: argparse.Namespace) -> list[tuple[int, bool]]:
    """(b)'s settings in order of preference: (rows at once, gradient checkpointing)."""
    if not CUDA:
        return [(1, False)]
    most = settings.rows if settings.packed.partition("+")[0] in WHOLE_ROWS else 1
    return [
        (rows, checkpointing)
        for checkpointing in (False, True)
        for rows in dict.fromkeys((most, 1))
    ]


def loss_of(trainer: Trainer) -> dict[str, float]:
    """The loss per supervised token of the checked examples, and the number of these tokens."""
    total = count = 0.0
    trainer.model.eval()
    with torch.no_grad(), trainer.compute_loss_context_manager():
        for batch in trainer.get_eval_dataloader():
            batch = trainer._prepare_inputs(batch)
            supervised = int((batch["labels"][:, 1:] != -100).sum())
            total += float(trainer.compute_loss(trainer.model, batch)) * supervised
            count += supervised
    return {"loss": total / count, "supervised": count}


def curve_of(trainer: Trainer) -> dict[str, list[float]]:
    """The loss of each update, summed over its micro-batches."""
    parts, step = [], trainer.training_step

    def stepped(*inputs: Any) -> torch.Tensor:
        parts.append(step(*inputs))
        return parts[-1]

    trainer.training_step = stepped
    trainer.train()
    losses = torch.stack(parts).double().reshape(trainer.args.max_steps, -1)
    return {"losses": losses.sum(1).tolist()}


class Turns(TrainerCallback):
    """Warm-up updates, the last of them timed, then turns; between them the process waits inside
    the training loop.
    """

    def __init__(
        self, trainer: Trainer, settings: argparse.Namespace, talk: Talk, about: dict[str, Any]
    ):
        self.trainer, self.settings, self.talk, self.about = trainer, settings, talk, about
        # torch.compile compiles the first shape, and at the second shape once more, for any shape.
        self.warm = 4 if trainer.args.torch_compile else 2
        self.began = self.examples = self.tokens = self.start = self.until = self.length = 0
        # (examples, tokens) of the micro-batches that are prepared but not trained on yet, counted
        # before they go to the device.
        self.made: deque[tuple[int, int]] = deque()
        self.collate, self.step = trainer.data_collator, trainer.training_step
        trainer.data_collator, trainer.training_step = self.collated, self.stepped
        trainer.add_callback(self)

    def run(self, last: bool) -> bool:
        """Trains until there are no more commands. Returns False if the device has too little
        memory, and raises that error for the `last` setting.
        """
        try:
            self.trainer.train()
        except torch.OutOfMemoryError:
            if last or self.length:
                raise
            return False
        return True

    def collated(self, examples: list[dict]) -> dict[str, Any]:
        batch = self.collate(examples)
        if "attention_mask" in batch:
            self.made.append((len(batch["input_ids"]), int(batch["attention_mask"].sum())))
        else:  # packed: an example begins at position 0
            self.made.append(
                (int((batch["position_ids"] == 0).sum()), batch["position_ids"].numel())
            )
        return batch

    def stepped(self, *inputs: Any) -> torch.Tensor:
        examples, tokens = self.made.popleft()
        self.examples, self.tokens = self.examples + examples, self.tokens + tokens
        return self.step(*inputs)

    def on_step_end(self, args, state, control, **_):
        if CUDA and state.global_step in (self.warm - 1, self.warm, self.start, self.until):
            torch.cuda.synchronize()
        if state.global_step == self.warm - 1:
            self.began = time.perf_counter()
        elif state.global_step == self.warm:
            self.length = updates_in(time.perf_counter() - self.began, self.settings)
            self.talk.answer(updates=self.length, **self.about)
            self.turn(state, control)
        elif state.global_step == self.start:
            self.examples = self.tokens = 0
            self.began = time.perf_counter()
        elif state.global_step == self.until:
            seconds = time.perf_counter() - self.began
            peak = torch.cuda.max_memory_allocated() if CUDA else resident_peak()
            self.talk.answer(
                seconds=seconds,
                examples=self.examples,
                tokens=self.tokens,
                updates=self.length,
                peak=peak,
            )
            self.turn(state, control)

    def turn(self, state, control):
        if not self.talk.command():
            control.should_training_stop = True
        reset_resident_peak()
        if CUDA:
            torch.cuda.reset_peak_memory_stats()
        self.start = state.global_step + 1
        self.until = self.start + self.length


def torch_trainer(
    side: str,
    folder: Path,
    settings: argparse.Namespace,
    rows: int,
    checkpointing: bool,
    *,
    dtype: str,
    quantise: bool,
    curve: bool = False,
) -> Trainer:
    """The trainer of a side.

    Args:
      rows: of a micro-batch.
      checkpointing: whether the backward pass recomputes the layers.
      dtype, quantise: bfloat16 or float32 for the base, and whether its projections are NF4.
      curve: train without dropout on the updates of `folder`/curve.npy, then stop.
    """
    (prompt,) = settings.prompts
    stored = np.load(folder / f"{prompt}.npz")
    records = []
    for i, prompt_length in enumerate(stored["prompt_lengths"].tolist()):
        ids = stored["tokens"][stored["starts"][i] : stored["starts"][i + 1]].tolist()
        records.append({"input_ids": ids, "labels": [-100] * prompt_length + ids[prompt_length:]})
    attention, _, compiled = settings.packed.partition("+") if side == "b" else ("sdpa", "", "")
    quantised = {}
    if quantise:
        four_bits = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=dtype,
        )
        quantised = {"quantization_config": four_bits}
    AttentionInterface.register("varlen", varlen_attention)
    base = AutoModelForCausalLM.from_pretrained(
        folder / "model",
        dtype=getattr(torch, dtype),
        # Not every attention supports f32; the timed precision is checked with the timed one.
        attn_implementation=attention if dtype == settings.dtype else "sdpa",
        device_map="cuda" if CUDA else None,
        **quantised,
    )
    base.config.use_cache = False
    model = PeftModel.from_pretrained(base, folder / "adapter", is_trainable=True)
    tokenizer = AutoTokenizer.from_pretrained(folder / "model")
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    eight_bits = CUDA and importlib.util.find_spec("bitsandbytes") is not None
    common = {
        "output_dir": str(folder / f"trainer-{side[0]}"),
        "max_steps": 1_000_000,  # stopped by the turns
        "learning_rate": RATE,
        "weight_decay": 0.01,
        "warmup_steps": 0,
        "lr_scheduler_type": "linear",
        "optim": (
            "paged_adamw_8bit" if eight_bits else "adamw_torch_fused" if CUDA else "adamw_torch"
        ),
        "seed": SEED,
        "bf16": dtype == "bfloat16",
        "use_cpu": not CUDA,
        "report_to": [],
        "save_strategy": "no",
        "logging_strategy": "no",
        "disable_tqdm": True,
        "dataloader_pin_memory": CUDA,
        "per_device_train_batch_size": rows,
        "per_device_eval_batch_size": rows,
        "gradient_checkpointing": checkpointing,
        "gradient_checkpointing_kwargs": {"use_reentrant": False},
    }
    if side == "b":
        from datasets import Dataset
        from trl import SFTConfig, SFTTrainer

        config = SFTConfig(
            **common,
            gradient_accumulation_steps=settings.rows // rows,
            max_length=settings.row_length,
            packing=True,
            torch_compile=bool(compiled),
        )
        train, few = Dataset.from_list(records), Dataset.from_list(records[:CHECKED])
        return SFTTrainer(
            model=model,
            args=config,
            train_dataset=train,
            eval_dataset=few,
            processing_class=tokenizer,
        )
    if curve:
        updates = np.load(folder / "curve.npy")
        records = [records[example] for example in updates.ravel()]
        common |= {"max_steps": len(updates), "train_sampling_strategy": "sequential"}
        for module in model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
    args = TrainingArguments(
        **common, gradient_accumulation_steps=BATCH // rows, remove_unused_columns=False
    )
    collate = DataCollatorForSeq2Seq(tokenizer, padding="longest")
    return Trainer(
        model=model,
        args=args,
        train_dataset=records,
        eval_dataset=records[:CHECKED],
        data_collator=collate,
    )


def varlen_attention(module, query, key, value, attention_mask, scaling=None, **packed):
    """PyTorch's own FlashAttention over packed examples (torch.nn.attention.varlen), as
    transformers calls attention: [1, H, T, C] each.
    """
    from torch.nn.attention.varlen import varlen_attn

    groups = query.shape[1] // key.shape[1]
    key, value = (array.repeat_interleave(groups, dim=1) for array in (key, value))
    q, k, v = (array[0].transpose(0, 1).contiguous() for array in (query, key, value))  # T H C
    starts, longest = packed["cu_seq_lens_q"], packed["max_length_q"]
    return (
        varlen_attn(q, k, v, starts, starts, longest, longest, scale=scaling, window_size=(-1, 0))[
            None
        ],
        None,
    )
