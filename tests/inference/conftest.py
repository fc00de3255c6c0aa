"""Tiny models of two implementations with the same weights: ours, and transformers' as ground
truth.
"""

from __future__ import annotations

import dataclasses
import functools
import operator
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from jaxre_kernels.nf4 import quantise

from jaxre.checkpoints.huggingface import hf_tensors, load_base
from jaxre.config import Lora
from jaxre.inference.model import Model
from jaxre.models import lora as lora_module
from jaxre.models.architecture import Architecture, architecture_of
from jaxre.models.weights import Weight, places, tree_of

LORA = Lora(rank=4, alpha=8.0, dropout=0.0)
WINDOW = 8  # of Gemma 3's sliding layers: less than a shared prefix, a prompt or an answer


def random_model(vocabulary: int, *, adapter: bool, kind: str = "qwen2", seed: int = 0) -> Model:
    """A random f32 decoder of two layers, hidden 32, with weights large enough that its predictions
    differ from uniform; of Gemma 3 three layers, the second one global.
    """
    config = {
        "model_type": kind,
        "num_hidden_layers": 2,
        "hidden_size": 32,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "intermediate_size": 48,
        "vocab_size": vocabulary,
        "max_position_embeddings": 2048,
        "rope_theta": 10000.0,
        "rms_norm_eps": 1e-6,
        "tie_word_embeddings": True,
    }
    if kind == "gemma3_text":
        config |= {
            "num_hidden_layers": 3,
            "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
            "num_key_value_heads": 1,
            "head_dim": 16,
            "query_pre_attn_scalar": 16,
            "sliding_window": WINDOW,
        }
    architecture = architecture_of(config, "test")
    random = np.random.default_rng(seed)
    means = {"ones": 1.0, "zeros": 0.0, "normal": 0.0}

    def mean(weight: Weight) -> float:
        # Gemma 3's scaled embeddings would outweigh its layers: each token would predict itself.
        return 5.0 if weight.name.endswith("_out_norm") else means[weight.initial]

    params = tree_of(
        (path, (mean(weight) + 0.3 * random.standard_normal(shape)).astype(np.float32))
        for weight, path, shape, _ in places(architecture)
    )
    return Model(params, architecture, *(random_factors(architecture, seed) if adapter else ()))


def random_factors(architecture: Architecture, seed: int) -> tuple[dict, float]:
    """An adapter whose B is not zero, and its scale."""
    random = np.random.default_rng(seed + 1)
    shapes = jax.eval_shape(lambda: lora_module.init_adapter(architecture, LORA, jax.random.key(0)))
    factors = jax.tree.map(
        lambda leaf: (0.1 * random.standard_normal(leaf.shape)).astype(np.float32), shapes
    )
    return factors, lora_module.scale_of(LORA)


def quantised_model(model: Model) -> Model:
    """The same with NF4 projections."""

    def stored(weight: Weight, path: tuple[str, ...]) -> Any:
        value = functools.reduce(operator.getitem, path, model.params)
        if not weight.lora:
            return value
        layers = [quantise(one.T) for one in value.reshape(-1, *value.shape[-2:])]
        return jax.tree.map(lambda *one: np.stack(one), *layers) if value.ndim == 3 else layers[0]

    pairs = ((path, stored(weight, path)) for weight, path, _, _ in places(model.architecture))
    return dataclasses.replace(model, params=tree_of(pairs))


def stories_model(shared_models: Path, *, adapter: bool) -> Model:
    """The real pretrained stories260K, with a random adapter if asked for."""
    architecture, params = load_base(shared_models / "karpathy" / "stories260K" / "hf", np.float32)
    return Model(params, architecture, *(random_factors(architecture, 0) if adapter else ()))


def in_transformers(model: Model) -> Any:
    """The same model in transformers, the adapter merged into the weights."""
    torch = pytest.importorskip("torch")
    from transformers import (
        Gemma3ForCausalLM,
        Gemma3TextConfig,
        LlamaConfig,
        LlamaForCausalLM,
        Qwen2Config,
        Qwen2ForCausalLM,
    )

    torch.set_num_threads(1)  # tiny products: threads cost more than they bring
    a = model.architecture
    config_class, model_class = {
        "qwen2": (Qwen2Config, Qwen2ForCausalLM),
        "llama": (LlamaConfig, LlamaForCausalLM),
        "gemma3_text": (Gemma3TextConfig, Gemma3ForCausalLM),
    }[a.kind]
    own = {}
    if a.kind == "gemma3_text":
        own = {
            "head_dim": a.head_channels,
            "query_pre_attn_scalar": round(a.score_scale**-2),
            "sliding_window": a.window,
            "layer_types": [
                "sliding_attention" if sliding else "full_attention" for sliding in a.sliding
            ],
            "attn_implementation": "eager",
        }
    config = config_class(
        num_hidden_layers=a.layers,
        hidden_size=a.embedding,
        num_attention_heads=a.query_heads,
        num_key_value_heads=a.kv_heads,
        intermediate_size=a.feed_forward,
        vocab_size=a.vocabulary,
        max_position_embeddings=a.max_length,
        rope_theta=a.rope_theta,
        rms_norm_eps=a.norm_epsilon,
        tie_word_embeddings=a.tied_head,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=None,
        **own,
    )
    params = (
        model.params
        if model.factors is None
        else lora_module.merge(model.params, model.factors, model.scale)
    )
    truth = model_class(config)
    tensors = {
        name: torch.from_numpy(np.array(value))
        for name, value in hf_tensors(a, params, np.dtype(np.float32))
    }
    missing, unexpected = truth.load_state_dict(tensors, strict=False)
    assert not unexpected and set(missing) <= {"lm_head.weight"}
    truth.tie_weights()
    return truth.eval()


def brute_force(truth: Any, prompts: list[list[int]], answers: list[list[list[int]]]) -> np.ndarray:
    """[N, labels] scores by transformers: one label at a time, one example a row, the full
    sequence, f64 log-softmax.
    """
    torch = pytest.importorskip("torch")
    scores = np.zeros((len(prompts), len(answers[0])))
    with torch.no_grad():
        for i, (prompt, labels) in enumerate(zip(prompts, answers, strict=True)):
            for j, label in enumerate(labels):
                logits = (
                    truth(torch.tensor([[*prompt, *label]]))
                    .logits[0, len(prompt) - 1 : -1]
                    .double()
                )
                scores[i, j] = torch.log_softmax(logits, -1)[
                    torch.arange(len(label)), torch.tensor(label)
                ].sum()
    return scores


def largest_difference(found: np.ndarray, truth: np.ndarray) -> float:
    """max |difference| / max |reference|."""
    return float(np.abs(found - truth).max() / np.abs(truth).max())


@pytest.fixture(scope="session")
def models() -> Callable[..., Any]:
    """The functions above by name: pytest's conftest cannot be imported by the tests."""
    return type(
        "Models",
        (),
        {
            f.__name__: staticmethod(f)
            for f in (
                random_model,
                quantised_model,
                stories_model,
                in_transformers,
                brute_force,
                largest_difference,
            )
        },
    )
