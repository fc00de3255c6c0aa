"""Tokenizers of the data tests: the real ones, and a small one that any template can be put on."""

from __future__ import annotations

from pathlib import Path

import pytest
from tiny import write_tiny_model
from transformers import PreTrainedTokenizerBase

from jaxre.data.tokenizer import load_tokenizer


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a tiny random model."""
    return write_tiny_model(tmp_path_factory.mktemp("tiny-model"))


@pytest.fixture(scope="session")
def qwen(shared_models: Path) -> PreTrainedTokenizerBase:
    return load_tokenizer(shared_models / "Qwen" / "Qwen2.5-0.5B-Instruct")


@pytest.fixture(scope="session")
def smollm2(shared_models: Path) -> PreTrainedTokenizerBase:
    return load_tokenizer(shared_models / "HuggingFaceTB" / "SmolLM2-360M-Instruct")


@pytest.fixture(scope="session")
def smollm3_template(shared_models: Path) -> str:
    """SmolLM3's real template; its tokenizer.json is not there."""
    return (shared_models / "HuggingFaceTB" / "SmolLM3-3B" / "chat_template.jinja").read_text(
        encoding="utf-8"
    )
