"""LoRA training equals PEFT's: the same adapter, the same examples, twenty updates of AdamW on both
sides.

Ours starts from the folder that PEFT saved and runs packed rows through the product's own update;
theirs pads one example a row. No dropout: PEFT draws a mask per projection, ours is one per input.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import optax
import pytest
from tiny_decoders import CONFIGS, build, our_logits, relative

from jaxre.config import LORA_TARGETS, Config, Lora, check_config
from jaxre.data.packing import Plan, plan_by_tokens
from jaxre.data.prefixes import find_prefixes
from jaxre.data.rows import fill_update
from jaxre.data.template import Encoded
from jaxre.data.tokens import TokenSet
from jaxre.models import sharding
from jaxre.models.lora import scale_of
from jaxre.training.initial import initial_state
from jaxre.training.step import make_optimiser, make_update

if sys.version_info < (3, 12):
    import peft
    import torch
    from transformers import AutoModelForCausalLM, get_constant_schedule_with_warmup
else:
    pytest.skip("comparisons with PEFT run on Python 3.11", allow_module_level=True)

STEPS, ROW, ROWS, EXAMPLES = 20, 48, 2, 48
UNCLIPPED = 1e9
# Halves of it are exact too: optax rounds the rates of a schedule to f32, which 1e-9 would show
# (test_optimiser.py has the schedules).
RATE = 2.0**-8
# Rank unlike any size, alpha unlike the rank; the families have every switch that LoRA's gradient
# passes.
CASES = {
    "all projections": (
        "qwen2 tied, biases, grouped heads",
        Lora(rank=5, alpha=12.0, dropout=0.0),
        UNCLIPPED,
    ),
    "all projections, clipped": (
        "qwen3, norms of q and k",
        Lora(rank=4, alpha=4.0, dropout=0.0),
        0.5,
    ),
    "rank-stabilised, some targets": (
        "llama-3 scaled rope",
        Lora(rank=3, alpha=4.0, dropout=0.0, rslora=True, targets=("k", "o", "gate")),
        UNCLIPPED,
    ),
    "one target, clipped": (
        "smollm3, list of unrotated layers",
        Lora(rank=1, alpha=3.0, dropout=0.0, targets=("v",)),
        0.5,
    ),
    "all projections, sliding windows": (
        "gemma3, sliding and global layers",
        Lora(rank=3, alpha=6.0, dropout=0.0),
        UNCLIPPED,
    ),
    "some targets, scaled rope of global layers": (
        "gemma3, last layer global, scaled",
        Lora(rank=2, alpha=3.0, dropout=0.0, targets=("q", "down")),
        0.25,
    ),
}
MODULES = {name: f"{'self_attn' if name in 'qkvo' else 'mlp'}.{name}_proj" for name in LORA_TARGETS}


class Trajectory(NamedTuple):
    """logits: [B, T, V] before the first update; loss and gradient norm [STEPS]; first gradient and
    final factors in our form.
    """

    logits: np.ndarray
    losses: np.ndarray
    norms: np.ndarray
    gradient: dict
    factors: dict


@pytest.fixture(scope="module")
def tokens() -> TokenSet:
    draw = np.random.default_rng(0)
    encoded = []
    for number in range(EXAMPLES):
        length = ROW if number == 0 else int(draw.integers(2, 40))  # one fills its row
        encoded.append(
            Encoded(draw.integers(0, 97, length).tolist(), int(draw.integers(1, length)))
        )
    return TokenSet.of(encoded, [f"example-{number}" for number in range(EXAMPLES)])


@pytest.fixture(scope="module")
def plan(tokens: TokenSet) -> Plan:
    plan = plan_by_tokens(
        tokens.lengths,
        tokens.supervised,
        find_prefixes(tokens),
        seed=0,
        epochs=2,
        row_length=ROW,
        rows=ROWS,
        accumulation=1,
    )
    assert (
        len(plan.updates) >= STEPS
        and max(len(row) for update in plan.updates for row in update.micro[0]) > 2
    )
    return plan


@pytest.fixture(params=CASES)
def config(request, tmp_path: Path) -> Config:
    """A base, an adapter made by PEFT with A and B both far from zero, and a run that goes on from
    it.
    """
    family, lora, clip_norm = CASES[request.param]
    build(CONFIGS[family], tmp_path / "base")
    settings = peft.LoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha,
        use_rslora=lora.rslora,
        target_modules=[f"{name}_proj" for name in lora.targets],
        task_type="CAUSAL_LM",
    )
    model = peft.get_peft_model(
        AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.float32), settings
    )
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
    model.save_pretrained(tmp_path / "adapter")
    train = {
        "batch_tokens": ROW * ROWS,
        "row_length": ROW,
        "learning_rate": RATE,
        "schedule": "constant",
        "warmup": 0.1,
        "weight_decay": 0.1,
        "clip_norm": clip_norm,
        "max_steps": STEPS,
    }
    return check_config(
        {
            "name": "continued",
            "model": {"path": str(tmp_path / "adapter")},
            "data": {"train": {"dataset": "facts"}},
            "lora": lora.model_dump(),
            "train": train,
        },
        "test",
    )


def ours(config: Config, tokens: TokenSet, plan: Plan, dtype: type) -> Trajectory:
    """The product's update in `dtype`, packed."""
    # the trace is the last gradient
    optimiser = optax.chain(optax.trace(decay=0.0), make_optimiser(config, STEPS))
    mesh = sharding.make_mesh(config.mesh, jax.devices()[:1])
    with jax.enable_x64(dtype is np.float64):
        initial = initial_state(config, np.dtype(np.float32), optimiser, mesh)
        base, start = jax.tree.map(
            lambda leaf: np.asarray(leaf, dtype), (initial.base, initial.state.trainable)
        )
        state = initial.state._replace(trainable=start, optimiser=optimiser.init(start))
        update = jax.jit(make_update(config, initial.architecture, optimiser, np.dtype(dtype)))
        logits = our_logits(
            initial.architecture, base, tokens[0][None], factors=start, scale=scale_of(config.lora)
        )
        metrics, gradient = [], None
        for planned in plan.updates[:STEPS]:
            state, figures = update(state, base, fill_update(tokens, plan.prefixes, planned))
            metrics.append(figures)
            gradient = gradient or jax.device_get(state.optimiser[0].trace)
        losses, norms = np.array(metrics).T
        factors = jax.device_get(state.trainable)
    assert {leaf.dtype for leaf in (logits, losses, *jax.tree.leaves((gradient, factors)))} == {
        np.dtype(dtype)
    }
    return Trajectory(logits, losses, norms, gradient, factors)


def theirs(
    config: Config,
    tokens: TokenSet,
    plan: Plan,
    dtype: torch.dtype,
    clip: Callable[[list, float], Any],
) -> Trajectory:
    """PEFT's adapter and torch's AdamW, one padded row an example."""
    adapter = Path(config.model.path)
    base = AutoModelForCausalLM.from_pretrained(
        adapter.parent / "base", dtype=dtype, attn_implementation="sdpa"
    )
    if dtype == torch.float64:
        widen(base)
    model = peft.PeftModel.from_pretrained(
        base, adapter, is_trainable=True, autocast_adapter_dtype=False
    )
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    assert {parameter.dtype for parameter in trained} == {dtype}
    optimiser = torch.optim.AdamW(trained, lr=RATE, weight_decay=config.train.weight_decay)
    schedule = get_constant_schedule_with_warmup(optimiser, 2)

    def logits(members: list[int]) -> torch.Tensor:
        # on the right, where a causal mask hides it
        padded = np.zeros((len(members), ROW), np.int64)
        for row, example in zip(padded, members, strict=True):
            row[: len(tokens[example])] = tokens[example]
        return model(torch.from_numpy(padded)).logits

    first = logits([0]).detach().numpy()
    losses, norms, gradient = [], [], None
    for one in plan.updates[:STEPS]:
        members = [example for row in one.micro[0] for example in row]
        count = int(tokens.supervised[members].sum())
        loss = torch.zeros((), dtype=dtype)
        for example, found in zip(members, logits(members), strict=True):
            prompt, length = int(tokens.prompt_lengths[example]), len(tokens[example])
            answer = torch.tensor(tokens[example][prompt:], dtype=torch.long)
            loss = (
                loss
                + torch.nn.functional.cross_entropy(
                    found[prompt - 1 : length - 1], answer, reduction="sum"
                )
                / count
            )
        optimiser.zero_grad()
        loss.backward()
        gradient = gradient or in_our_form(model, config.lora, lambda parameter: parameter.grad)
        losses.append(loss.item())
        norms.append(float(clip(trained, config.train.clip_norm)))
        optimiser.step()
        schedule.step()
    return Trajectory(
        first,
        np.array(losses),
        np.array(norms),
        gradient,
        in_our_form(model, config.lora, lambda parameter: parameter),
    )


def widen(model) -> None:
    """Computes norms and cosines of a transformers decoder in f64 (from the same f32 angles), which
    it does in f32 whatever the weights are.
    """
    gemma3 = model.config.model_type == "gemma3_text"
    for module in model.modules():
        if type(module).__name__.endswith("RMSNorm"):
            epsilon = module.eps if gemma3 else module.variance_epsilon
            module.forward = lambda x, own=module, epsilon=epsilon: torch.nn.functional.rms_norm(
                x, own.weight.shape, own.weight + 1 if gemma3 else own.weight, epsilon
            )
    rotary = model.model.rotary_emb
    if gemma3:
        scale = torch.tensor(model.config.hidden_size**0.5, dtype=torch.float64)
        model.model.embed_tokens.embed_scale = scale

    def cosine_and_sine(x, position_ids, layer_type=None):
        frequencies = getattr(rotary, f"{layer_type}_inv_freq" if layer_type else "inv_freq")
        angles = (position_ids[..., None].float() * frequencies.float()).double().tile(2)
        return angles.cos(), angles.sin()

    rotary.forward = cosine_and_sine


def clip_exactly(parameters: list[torch.nn.Parameter], limit: float) -> torch.Tensor:
    """Clipping by the global norm. torch's own divides by norm + 1e-6, which 1e-9 would show."""
    norm = torch.nn.utils.get_total_norm([parameter.grad for parameter in parameters])
    for parameter in parameters:
        parameter.grad *= min(1.0, limit / float(norm))
    return norm


def in_our_form(model, lora: Lora, read: Callable[[torch.nn.Parameter], torch.Tensor]) -> dict:
    """Applies `read` to each A and B and stacks layers but the last, in the form of
    `models.lora.init_adapter`.
    """
    layers = model.base_model.model.model.layers

    def pair(layer, name: str) -> dict:
        module = layer.get_submodule(MODULES[name])
        sides = {"a": module.lora_A, "b": module.lora_B}
        return {
            side: read(parts["default"].weight).detach().numpy().T.copy()
            for side, parts in sides.items()
        }

    pairs = {name: [pair(layer, name) for layer in layers] for name in lora.targets}
    return {
        "layers": {
            name: {side: np.stack([one[side] for one in found[:-1]]) for side in ("a", "b")}
            for name, found in pairs.items()
        },
        "last": {name: found[-1] for name, found in pairs.items()},
    }


def worst(found: dict, reference: dict) -> float:
    return max(jax.tree.leaves(jax.tree.map(relative, found, reference)))


def test_forward_gradients_and_twenty_updates_in_float64(
    config: Config, tokens: TokenSet, plan: Plan
) -> None:
    """All that may differ is the rounding of f64: measured 2e-14 in the gradients, 3e-15 in the
    factors after the last update.
    """
    found, truth = (
        ours(config, tokens, plan, np.float64),
        theirs(config, tokens, plan, torch.float64, clip_exactly),
    )
    assert relative(found.logits, truth.logits) < 1e-9
    assert worst(found.gradient, truth.gradient) < 1e-9
    np.testing.assert_allclose(found.losses, truth.losses, rtol=1e-9)
    np.testing.assert_allclose(found.norms, truth.norms, rtol=1e-9)
    assert worst(found.factors, truth.factors) < 1e-9
    # Or it would prove nothing: every factor has a gradient, and where there is a limit it is
    # passed.
    assert all(np.abs(leaf).max() > 0 for leaf in jax.tree.leaves(truth.gradient))
    assert config.train.clip_norm == UNCLIPPED or truth.norms.min() > config.train.clip_norm


@pytest.mark.parametrize(
    "config", ["all projections, clipped"], indirect=True
)  # what the others differ in is above
def test_an_adapter_of_peft_is_continued_with_the_losses_of_peft_in_float32(
    config: Config, tokens: TokenSet, plan: Plan
) -> None:
    """transformers, PEFT and torch as they are, clipping with torch's own formula. Measured:
    3e-6.
    """
    found, truth = (
        ours(config, tokens, plan, np.float32),
        theirs(config, tokens, plan, torch.float32, torch.nn.utils.clip_grad_norm_),
    )
    np.testing.assert_allclose(found.losses, truth.losses, rtol=1e-5)
