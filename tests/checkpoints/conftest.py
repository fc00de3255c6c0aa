"""A small folder that most of these tests start from."""

from __future__ import annotations

import shutil

import pytest

TOKENIZER = ("tokenizer.json", "tokenizer_config.json", "generation_config.json")


@pytest.fixture(scope="session")
def tiny_base(tmp_path_factory, shared_models):
    """A random Llama-layout base with the real stories260K tokenizer, untied, three layers, f32."""
    from tiny_decoders import build

    folder = tmp_path_factory.mktemp("bases") / "tiny"
    fields = {
        "model_type": "llama",
        "vocab_size": 512,
        "head_dim": 12,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 2,
    }
    build(fields, folder)
    for name in TOKENIZER:
        source = shared_models / "karpathy/stories260K/hf" / name
        if source.is_file():
            shutil.copyfile(source, folder / name)
    return folder


@pytest.fixture
def run(tiny_base, tmp_path):
    """A run of LoRA on that base."""
    from tiny_runs import make_run

    return make_run(tmp_path / "run", tiny_base, "lora")
