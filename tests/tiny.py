"""A tiny model folder and a tiny run on the shipped corpus, for tests that train.

The folder has random Qwen2-layout weights, a BPE tokenizer trained on the corpus and a ChatML
template.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file
from tokenizers import models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast, Qwen2Tokenizer

from jaxre.checkpoints.huggingface import hf_tensors
from jaxre.config import Config, Source, check_config
from jaxre.models.architecture import architecture_of
from jaxre.models.module import init_weights
from jaxre.relations.sources import load

TEMPLATE = (
    "{%- for message in messages -%}{{ '<|im_start|>' + message['role'] + '\\n' +"
    " message['content'] + '<|im_end|>' }}{%- endfor -%}{%- if add_generation_prompt -%}{{"
    " '<|im_start|>assistant\\n' }}{%- endif -%}"
)
ARCHITECTURE = {
    "architectures": ["Qwen2ForCausalLM"],
    "model_type": "qwen2",
    "hidden_act": "silu",
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "tie_word_embeddings": True,
    "vocab_size": 512,
    "initializer_range": 0.1,
}


def write_tiny_model(folder: Path, **fields: object) -> Path:
    """A model folder with random weights; `fields` change its config.json."""
    # What transformers builds for a Qwen2 folder, whatever tokenizer.json says.
    tokenizer = Qwen2Tokenizer().backend_tokenizer
    tokenizer.model = models.BPE()
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=500,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(
        [example.text for example in load(Source(dataset="facts", split="train", limit=200))],
        trainer,
    )
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        extra_special_tokens=["<|im_start|>"],
    )
    wrapped.chat_template = TEMPLATE
    wrapped.save_pretrained(folder)
    config = ARCHITECTURE | fields
    architecture = architecture_of(config, "tiny")
    params = init_weights(architecture, seed=0)
    save_file(
        dict(hf_tensors(architecture, params, np.dtype(np.float32))),
        folder / "model.safetensors",
        metadata={"format": "pt"},
    )
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    return folder


def tiny_config(folder: Path, model: Path, /, name: str = "run", **changes: dict) -> Config:
    """A run of a few steps on the shipped corpus; `changes` are merged into its sections."""
    tree = {
        "name": name,
        "output": str(folder / "runs"),
        "model": {"path": str(model)},
        "data": {
            "train": {"dataset": "facts", "split": "train", "limit": 96},
            "validation": {"dataset": "facts", "split": "validation", "limit": 16},
            "labels": sorted(
                {example.relation for example in load(Source(dataset="facts", split="train"))}
            ),
            "cache": str(folder / "cache"),
        },
        "prompt": {"system": None, "user": "{marked}\nHead: {head}\nTail: {tail}\nAnswer:"},
        "lora": {"rank": 4, "alpha": 8, "dropout": 0.1},
        "train": {
            "epochs": 2,
            "batch_tokens": 2048,
            "row_length": 256,
            "learning_rate": 1e-2,
            "log_every": 1,
        },
    }
    for section, values in changes.items():
        tree[section] = tree.get(section, {}) | values if isinstance(values, dict) else values
    return check_config(tree, "tiny")
