"""AdamW, clipping and schedules against torch and transformers."""

from __future__ import annotations

import sys
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import optax
import pytest
from tiny import tiny_config

from jaxre.training.step import make_optimiser, make_schedule

if sys.version_info < (3, 12):
    import torch
    from transformers import get_cosine_schedule_with_warmup, get_linear_schedule_with_warmup
else:
    pytest.skip("comparisons with torch run on Python 3.11", allow_module_level=True)

STEPS = 40


def schedule_of_transformers(name: str, warm: int, rate: float) -> list[float]:
    optimiser = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=rate)
    make = {"linear": get_linear_schedule_with_warmup, "cosine": get_cosine_schedule_with_warmup}[
        name
    ]
    schedule = make(optimiser, warm, STEPS)
    rates = []
    for _ in range(STEPS):
        rates.append(schedule.get_last_lr()[0])
        optimiser.step()
        schedule.step()
    return rates


@pytest.mark.parametrize("name", ["linear", "cosine"])
@pytest.mark.parametrize("warmup", [0.0, 0.03, 0.26])
def test_learning_rates_equal_transformers(tmp_path: Path, name: str, warmup: float) -> None:
    config = tiny_config(
        tmp_path, tmp_path, train={"schedule": name, "warmup": warmup, "learning_rate": 1e-3}
    )
    warm = int(np.ceil(warmup * STEPS))  # as Trainer rounds
    schedule = make_schedule(config, STEPS)
    np.testing.assert_allclose(
        [float(schedule(step)) for step in range(STEPS)],
        schedule_of_transformers(name, warm, 1e-3),
        atol=1e-9,
    )


def test_adamw_with_clipping_follows_torch(tmp_path: Path) -> None:
    """Twenty steps; gradients large enough that most are clipped. Rounding of f32 is all that may
    differ.
    """
    config = tiny_config(
        tmp_path,
        tmp_path,
        train={"weight_decay": 0.1, "learning_rate": 1e-2, "warmup": 0.1, "clip_norm": 1.0},
    )
    random = np.random.default_rng(0)
    start = {
        "q": random.standard_normal((5, 3)),
        "o_norm": random.standard_normal(4),
        "q_bias": random.standard_normal(3),
    }
    start = {name: value.astype(np.float32) for name, value in start.items()}
    theirs = {
        name: torch.nn.Parameter(torch.from_numpy(value.copy())) for name, value in start.items()
    }
    groups = [
        {"params": [theirs["q"]], "weight_decay": 0.1},
        {"params": [theirs["o_norm"], theirs["q_bias"]], "weight_decay": 0.0},
    ]
    truth = torch.optim.AdamW(groups, lr=1e-2)
    rates = get_linear_schedule_with_warmup(truth, 2, 20)
    optimiser = make_optimiser(config, 20)
    ours = {name: jnp.asarray(value) for name, value in start.items()}
    state = optimiser.init(ours)
    for step in range(20):
        gradients = {
            name: (
                ((0.1 if step % 5 == 0 else 3.0) * random.standard_normal(value.shape)).astype(
                    np.float32
                )
            )
            for name, value in start.items()
        }
        for name, parameter in theirs.items():
            parameter.grad = torch.from_numpy(gradients[name].copy())
        torch.nn.utils.clip_grad_norm_(theirs.values(), 1.0)
        truth.step()
        rates.step()
        changes, state = optimiser.update(gradients, state, ours)
        ours = optax.apply_updates(ours, changes)
    for name in start:
        np.testing.assert_allclose(ours[name], theirs[name].detach().numpy(), rtol=2e-5, atol=1e-6)
