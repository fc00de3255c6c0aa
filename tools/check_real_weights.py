"""Checks exactness on real pretrained weights against transformers, PEFT and bitsandbytes.

    python tools/check_real_weights.py smollm2-135m   # a named base
    python tools/check_real_weights.py FILE.gguf [...] --json checks.json

For each model, in f32 on a CPU unless stated otherwise, with the quickstart's prompts (and the
model's own template, or jaxre's own fallback if it has none):

  weights        every dequantised tensor against transformers' `gguf_file=`, bit for bit
  logits         the longest prompts of a row of 256 tokens
  bf16           root-mean-square distance of bf16 logits to f32, as a share of transformers'
  packed         loss and LoRA gradients of packed rows against one example a row
  shared         the same, where rows store a shared prefix once
  LoRA           losses of 20 updates of 256 tokens against PEFT and torch's AdamW
  export         logits of that adapter, written by jaxre, in PEFT; and merged
  NF4            codes and statistics of each projection against bitsandbytes, bit for bit
  greedy         tokens of --prompts prompts against `generate`
  best label     on --brute prompts, against every label scored alone in transformers

Each line has the largest difference (relative: max|difference| / max|reference|) and the largest
allowed. Exit code 1 if one is larger. Needs the test extra (torch, peft, bitsandbytes).
"""

from __future__ import annotations

import argparse
import datetime
import gc
import json
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

UPDATES, TOKENS, RATE, SEED = 20, 256, 1e-3, 0
ANSWER = 12  # new tokens of a greedy answer, at most


@dataclass(frozen=True)
class Check:
    """A comparison: its claim, the largest difference, and the largest allowed."""

    model: str
    claim: str
    truth: str
    found: float
    allowed: float
    seconds: float
    note: str = ""

    @property
    def passed(self) -> bool:
        return bool(self.found <= self.allowed)


def relative(found: np.ndarray, reference: np.ndarray) -> float:
    found, reference = (np.asarray(values, np.float64) for values in (found, reference))
    return float(np.abs(found - reference).max() / np.abs(reference).max())


class Model:
    """A model on both sides: jaxre's, and a Hugging Face folder that transformers opens."""

    def __init__(self, name: str, work: Path, examples: int):
        from jaxre.checkpoints.convert import convert
        from jaxre.checkpoints.source import open_model, resolve_model
        from jaxre.config import load_config
        from jaxre.data.template import ChatTemplate
        from jaxre.data.tokenizer import load_tokenizer
        from jaxre.data.tokens import TokenSet, questions_of
        from jaxre.inference.predict import stop_ids
        from jaxre.relations.sources import load

        self.name, self.folder = name, work / "hf"
        self.source = resolve_model(name)
        convert(name, self.folder, "hf", dtype="float32", verify=True)
        self.loaded = open_model(self.folder, np.dtype(np.float32))
        config = load_config(Path(__file__).parents[1] / "configs/quickstart.yaml")
        test = load(config.data.test)
        self.examples = test[:examples]
        self.labels = sorted({example.relation for example in test})
        self.template = ChatTemplate(load_tokenizer(self.folder), config.prompt.date, name)
        self.questions = questions_of(self.examples, config.prompt, self.labels, lambda example: [])
        texts = [self.template.render(question, generation=True) for question in self.questions]
        self.prompts = self.template.tokenize(texts)
        pairs = [
            (question, example.relation)
            for question, example in zip(self.questions, self.examples, strict=True)
        ]
        encoded = self.template.encode(pairs)
        self.tokens = TokenSet.of(encoded, [example.id for example in self.examples])
        self.stops = stop_ids(self.template, self.questions[0], self.folder)

    def peer(self, dtype: str = "float32", folder: Path | None = None, attention: str = "eager"):
        import torch
        from transformers import AutoModelForCausalLM

        return AutoModelForCausalLM.from_pretrained(
            folder or self.folder, dtype=getattr(torch, dtype), attn_implementation=attention
        ).eval()

    def config(self, adapter: Path):
        from jaxre.config import check_config

        return check_config(
            {
                "name": "check",
                "model": {"path": str(adapter), "dtype": "float32"},
                "data": {"train": {"dataset": "facts"}},
                "lora": {"rank": 16, "alpha": 32, "dropout": 0.0},
                "train": {
                    "batch_tokens": TOKENS,
                    "row_length": TOKENS,
                    "learning_rate": RATE,
                    "schedule": "constant",
                    "warmup": 0.0,
                    "clip_norm": 1e9,
                    "max_steps": UPDATES,
                },
            },
            "check",
        )


def logits_in(peer, rows: list[list[int]]) -> list[np.ndarray]:
    import torch

    with torch.inference_mode():
        return [peer(torch.tensor([row])).logits[0].float().numpy() for row in rows]


def our_logits(model: Model, rows, dtype: str = "float32") -> np.ndarray:
    """[B, T, V] f32 of packed rows (tokens, positions, visible_until), as numpy."""
    import jax
    import jax.numpy as jnp

    from jaxre.models import decoder

    @jax.jit
    def run(params, tokens, positions, until):
        x = decoder.forward(params, tokens, positions, until, model.loaded.architecture)
        return decoder.head(params, x, model.loaded.architecture)

    params = jax.tree.map(lambda leaf: jnp.asarray(leaf, dtype), model.loaded.base)
    return np.asarray(run(params, *map(jnp.asarray, rows)), np.float32)


def one_a_row(rows: list[list[int]]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    length = max(map(len, rows))
    tokens = np.zeros((len(rows), length), np.int32)
    for b, row in enumerate(rows):
        tokens[b, : len(row)] = row
    positions = np.broadcast_to(np.arange(length, dtype=np.int32), tokens.shape)
    return tokens, positions, np.full_like(tokens, length)


# ---- the checks: each yields (claim, truth, found, allowed[, note]) -----------------------------


def check_weights(model: Model) -> Iterator[tuple]:
    from transformers import AutoModelForCausalLM

    from jaxre.checkpoints.gguf import file_of, is_gguf, open_gguf

    if not is_gguf(model.source):
        return
    file = file_of(model.source)
    try:
        peer = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name)
    except (ValueError, RuntimeError, NotImplementedError) as error:
        print(f"  weights: transformers does not read this file ({error})", file=sys.stderr)
        return
    theirs, tensors = peer.state_dict(), open_gguf(model.source)
    wrong = [
        name
        for name in tensors.dtypes
        if not np.array_equal(theirs[name].float().numpy(), tensors.read(name).astype(np.float32))
    ]
    yield f"{len(tensors.dtypes)} dequantised tensors that differ", "transformers", len(wrong), 0


def check_logits(model: Model) -> Iterator[tuple]:
    rows = [row for row in model.prompts if len(row) <= TOKENS][:8]
    exact = logits_in(model.peer(), rows)
    ours = our_logits(model, one_a_row(rows))
    ours = [logits[: len(row)] for logits, row in zip(ours, rows, strict=True)]
    worst = max(map(relative, ours, exact))
    yield "f32 logits", "transformers", worst, 1e-5
    half = logits_in(model.peer("bfloat16"), rows)
    own = our_logits(model, one_a_row(rows), "bfloat16")
    own = [logits[: len(row)] for logits, row in zip(own, rows, strict=True)]

    def distance(found: list[np.ndarray]) -> float:
        return float(
            np.sqrt(np.mean([np.mean((a - b) ** 2) for a, b in zip(found, exact, strict=True)]))
        )

    share = distance(own) / distance(half)
    yield "bf16 logits' distance to f32, share of", "transformers' bf16", share, 1.1


def check_packing(model: Model) -> Iterator[tuple]:
    import jax
    import jax.numpy as jnp

    from jaxre.config import Lora
    from jaxre.data.packing import plan_by_tokens
    from jaxre.data.prefixes import find_prefixes
    from jaxre.data.rows import Rows, fill_update
    from jaxre.models.decoder import Adapter
    from jaxre.models.lora import init_adapter
    from jaxre.objectives.sft import loss_sum

    draw = np.random.default_rng(SEED)
    fresh = init_adapter(model.loaded.architecture, Lora(rank=4), jax.random.key(SEED))
    factors = jax.tree.map(
        lambda leaf: np.asarray(leaf + 0.01 * draw.standard_normal(leaf.shape), np.float32), fresh
    )

    @jax.jit
    def gradients(factors, params, rows: Rows):
        def loss(factors):
            return loss_sum(params, Adapter(factors, 2.0), rows, model.loaded.architecture)

        return jax.value_and_grad(loss)(factors)

    tokens = model.tokens.subset(np.arange(len(model.tokens)) < 16)
    prefixes = find_prefixes(tokens)
    alone = gradients(factors, model.loaded.base, _alone(tokens, Rows))
    for claim, sharing in (("packed", prefixes.unshared()), ("shared prefixes", prefixes)):
        plan = plan_by_tokens(
            tokens.lengths,
            tokens.supervised,
            sharing,
            seed=SEED,
            epochs=1,
            row_length=2 * TOKENS,
            rows=1,
            accumulation=1,
        )
        total = None
        for update in plan.updates:
            rows = jax.tree.map(
                lambda array: array.reshape(-1, array.shape[-1]),
                fill_update(tokens, plan.prefixes, update),
            )
            part = gradients(factors, model.loaded.base, rows)
            total = part if total is None else jax.tree.map(jnp.add, total, part)
        worst = max(map(relative, jax.tree.leaves(total), jax.tree.leaves(alone)))
        yield f"loss and LoRA gradients, {claim}", "one example a row", worst, 1e-4


def _alone(tokens, rows_type):
    """One example a row under the plain causal mask, written without the planner."""
    rows = one_a_row([list(tokens[example]) for example in range(len(tokens))])
    count = int(tokens.supervised.max())
    supervised = np.zeros((len(tokens), count), np.int32)
    targets, weights = np.zeros_like(supervised), np.zeros(supervised.shape, np.float32)
    for example in range(len(tokens)):
        prompt, own = int(tokens.prompt_lengths[example]), int(tokens.supervised[example])
        supervised[example, :own] = np.arange(prompt - 1, prompt - 1 + own)
        targets[example, :own] = tokens[example][prompt:]
        weights[example, :own] = 1
    owner = np.zeros_like(rows[0], np.uint32)
    return rows_type(*rows, owner, supervised, targets, weights)


def peft_losses(
    model: Any, tokens: Any, batches: Sequence[Sequence[int]], weight_decay: float
) -> list[float]:
    """The loss before each update of a PEFT model with torch's AdamW; it is trained."""
    import torch

    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimiser = torch.optim.AdamW(trained, lr=RATE, weight_decay=weight_decay)
    losses = []
    model.train()
    for members in batches:
        count = int(tokens.supervised[members].sum())
        loss = torch.zeros((), dtype=trained[0].dtype)
        for example in members:
            ids = torch.from_numpy(np.array(tokens[example], np.int64))
            prompt = int(tokens.prompt_lengths[example])
            logits = model(ids[None]).logits[0, prompt - 1 : -1]
            loss += torch.nn.functional.cross_entropy(logits, ids[prompt:], reduction="sum") / count
        optimiser.zero_grad()
        loss.backward()
        losses.append(loss.item())
        optimiser.step()
    return losses


def check_lora(model: Model, work: Path) -> Iterator[tuple]:
    import jax
    import peft
    import torch

    from jaxre.checkpoints.convert import convert
    from jaxre.checkpoints.peft import save_adapter
    from jaxre.data.packing import plan_by_tokens
    from jaxre.data.prefixes import find_prefixes
    from jaxre.data.rows import fill_update
    from jaxre.models import sharding
    from jaxre.training.initial import initial_state
    from jaxre.training.step import make_optimiser, make_update

    start = work / "start"
    torch.manual_seed(SEED)
    names = ("q", "k", "v", "o", "gate", "up", "down")
    settings = peft.LoraConfig(
        r=16,
        lora_alpha=32,
        target_modules=[f"{name}_proj" for name in names],
        task_type="CAUSAL_LM",
    )
    theirs = peft.get_peft_model(model.peer(attention="sdpa"), settings)
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            if "lora_B" in name:  # zero would make the first gradient of A zero
                parameter.copy_(0.01 * torch.randn(parameter.shape))
    theirs.save_pretrained(start)
    description = json.loads((start / "adapter_config.json").read_text())
    description["base_model_name_or_path"] = str(model.folder)
    (start / "adapter_config.json").write_text(json.dumps(description))

    config, tokens = model.config(start), model.tokens
    plan = plan_by_tokens(
        tokens.lengths,
        tokens.supervised,
        find_prefixes(tokens),
        seed=SEED,
        epochs=8,
        row_length=TOKENS,
        rows=1,
        accumulation=1,
    )
    optimiser = make_optimiser(config, UPDATES)
    mesh = sharding.make_mesh(config.mesh, jax.devices()[:1])
    initial = initial_state(config, np.dtype(np.float32), optimiser, mesh)
    update = jax.jit(make_update(config, initial.architecture, optimiser, np.dtype(np.float32)))
    state, ours = initial.state, []
    for planned in plan.updates[:UPDATES]:
        state, metrics = update(state, initial.base, fill_update(tokens, plan.prefixes, planned))
        ours.append(float(metrics.loss))

    batches = [
        [example for row in planned.micro[0] for example in row]
        for planned in plan.updates[:UPDATES]
    ]
    decay = config.train.weight_decay
    losses = peft_losses(theirs, tokens, batches, decay)
    del theirs
    gc.collect()
    other = peft.PeftModel.from_pretrained(model.peer(), start, is_trainable=True)
    # Adam moves a factor by its rate however small its gradient is, so rounding grows from update
    # to update. PEFT with another form of attention shows by how much.
    rounding = relative(peft_losses(other, tokens, batches, decay), losses)
    note = f"{losses[0]:.3f} to {losses[-1]:.3f}; PEFT with eager attention: {rounding:.2g}"
    claim, allowed = f"losses of {UPDATES} LoRA updates", max(1e-4, 3 * rounding)
    yield claim, "PEFT, AdamW", relative(ours, losses), allowed, note

    factors = jax.device_get(state.trainable)
    adapter = work / "adapter"
    save_adapter(
        adapter, initial.architecture, config.lora, factors, str(model.folder), model.folder
    )
    del other, initial, state
    gc.collect()
    opened = peft.PeftModel.from_pretrained(model.peer(), adapter).eval()
    rows = model.prompts[:4]
    expected = logits_in(opened, rows)
    convert(adapter, work / "merged", "hf", merge=True)
    merged = opened.merge_and_unload().state_dict()
    from safetensors.numpy import load_file

    written = load_file(work / "merged" / "model.safetensors")
    # NumPy and torch may add up a product in another order, so the last bit can differ.
    pairs = [(written[name], merged[name].numpy()) for name in written]
    note = f"{sum(not np.array_equal(*pair) for pair in pairs)} differ in some bit"
    worst = max(relative(*pair) for pair in pairs)
    yield f"{len(pairs)} merged tensors", "peft merge_and_unload", worst, 1e-6, note
    del opened, merged
    gc.collect()
    again = logits_in(model.peer(folder=work / "merged"), rows)
    yield "logits of the merged folder", "PEFT", max(map(relative, again, expected)), 1e-4
    from jaxre.checkpoints.source import open_model

    run = open_model(adapter, np.dtype(np.float32))
    own = _adapted_logits(run, one_a_row(rows))
    own = [logits[: len(row)] for logits, row in zip(own, rows, strict=True)]
    yield "logits of the exported adapter", "PEFT", max(map(relative, own, expected)), 1e-4


def _adapted_logits(run, rows) -> np.ndarray:
    import jax
    import jax.numpy as jnp

    from jaxre.models import decoder
    from jaxre.models.lora import scale_of

    @jax.jit
    def logits(params, factors, tokens, positions, until):
        adapter = decoder.Adapter(factors, scale_of(run.lora))
        x = decoder.forward(params, tokens, positions, until, run.architecture, adapter)
        return decoder.head(params, x, run.architecture)

    return np.asarray(logits(run.base, run.factors, *map(jnp.asarray, rows)))


def check_nf4(model: Model) -> Iterator[tuple]:
    import bitsandbytes.functional as peer
    import torch
    from jaxre_kernels.nf4 import dequantise

    from jaxre.checkpoints.huggingface import open_base, positions
    from jaxre.models.quantised import quantise_matrix

    torch.set_num_threads(1)  # its CPU quantiser differs between threads
    tensors, wrong, count = open_base(model.folder), [], 0
    for name, (weight, _, _) in positions(tensors.architecture).items():
        if not weight.lora:
            continue
        value = tensors.read(name).astype(np.float32)
        ours = np.asarray(dequantise(quantise_matrix(value, name), np.float32))
        codes, state = peer.quantize_4bit(
            torch.from_numpy(value), blocksize=64, compress_statistics=True, quant_type="nf4"
        )
        scales = peer.dequantize_blockwise(state.absmax, state.state2) + state.offset
        # As one row: its CPU kernel takes wrong scales for rows of some lengths (0.50.2).
        theirs = torch.ops.bitsandbytes.dequantize_4bit(
            codes, scales, 64, "nf4", (1, value.size), torch.float32
        )
        count += 1
        if not np.array_equal(ours, theirs.numpy().reshape(ours.shape)):
            wrong.append(name)
    torch.set_num_threads(2)
    yield f"{count} NF4 projections that differ", "bitsandbytes", len(wrong), 0


def check_answers(model: Model, prompts: int, brute: int) -> Iterator[tuple]:
    import torch

    from jaxre.inference.answers import label_answers
    from jaxre.inference.decoding import decode
    from jaxre.inference.predict import model_of
    from jaxre.inference.search import best_labels

    ours = decode(model_of(model.loaded), model.prompts[:prompts], model.stops, ANSWER)
    tokens, answers = label_answers(model.template, model.questions[:brute], model.labels)
    best, _ = best_labels(model_of(model.loaded), tokens, answers)
    peer = model.peer(attention="sdpa")
    peer.generation_config.max_length = None
    wrong = 0
    for prompt, decoded in zip(model.prompts[:prompts], ours, strict=True):
        with torch.inference_mode():
            ids = torch.tensor([prompt])
            generated = peer.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=ANSWER,
                do_sample=False,
                eos_token_id=sorted(model.stops),
                pad_token_id=min(model.stops),
            )[0, len(prompt) :].tolist()
        own = list(decoded.tokens)
        wrong += own[: len(generated)] != generated[: len(own)]
    yield f"greedy answers of {len(ours)} prompts that differ", "generate", wrong, 0
    different = 0
    for prompt, labels, choice in zip(tokens, answers, best, strict=True):
        scores = []
        for answer in labels:
            with torch.inference_mode():
                logits = peer(torch.tensor([[*prompt, *answer]])).logits[0, len(prompt) - 1 : -1]
            chosen = torch.log_softmax(logits.double(), -1)[range(len(answer)), list(answer)]
            scores.append(float(chosen.sum()))
        different += int(np.argmax(scores)) != choice
    yield f"best labels of {len(tokens)} prompts that differ", "each label alone", different, 0


def check_model(name: str, options: argparse.Namespace) -> list[Check]:
    done: list[Check] = []
    with tempfile.TemporaryDirectory(prefix="jaxre-check-", dir=options.work) as made:
        work = Path(made)
        model = Model(name, work, max(options.prompts, 64))
        parts: dict[str, Callable[[], Iterator[tuple]]] = {
            "weights": lambda: check_weights(model),
            "logits": lambda: check_logits(model),
            "packing": lambda: check_packing(model),
            "lora": lambda: check_lora(model, work),
            "nf4": lambda: check_nf4(model),
            "answers": lambda: check_answers(model, options.prompts, options.brute),
        }
        for part in options.only or parts:
            start = time.perf_counter()
            for claim, truth, found, allowed, *note in parts[part]():
                seconds = time.perf_counter() - start
                done.append(Check(name, claim, truth, float(found), allowed, seconds, *note))
                print(line(done[-1]), flush=True)
                start = time.perf_counter()
            gc.collect()
    return done


def line(check: Check) -> str:
    value = f"{check.found:.3g}" if check.found else "0"
    mark = "" if check.passed else "   LARGER"
    note = f" ({check.note})" if check.note else ""
    return (
        f"| {check.claim} | {check.truth} | {value} | {check.allowed:g} | {check.seconds:.0f} s |"
        f"{note}{mark}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("models", nargs="+", help="GGUF files, folders or names")
    parser.add_argument("--prompts", type=int, default=200)
    parser.add_argument("--brute", type=int, default=20)
    parser.add_argument("--only", action="append", help="one part: weights, logits, packing, ...")
    parser.add_argument(
        "--work", help="where folders are created (needs space for three copies in f32)"
    )
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    checks: list[Check] = []
    for name in options.models:
        print(f"\n{name}, {datetime.date.today()}\n| claim | against | found | allowed | took |")
        checks += check_model(name, options)
    if options.json:
        options.json.write_text(json.dumps([asdict(check) for check in checks], indent=2) + "\n")
    if not all(check.passed for check in checks):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
