"""Every export of every family, used through its own files alone, answers as jaxre does."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
from tiny import write_tiny_model
from tiny_decoders import CONFIGS, build, ground_truth
from tiny_runs import make_run

from jaxre.checkpoints.convert import convert
from jaxre.checkpoints.source import open_model
from jaxre.config import Predict, Prompt, Source
from jaxre.evaluation.predictions import Prediction
from jaxre.inference.predict import predict_examples
from jaxre.relations.sources import load

torch = ground_truth("torch")
peft = ground_truth("peft")

FAMILIES = (
    "qwen2 tied, biases, grouped heads",
    "llama grouped heads, K=1",
    "qwen3, norms of q and k",
    "smollm3, every fourth layer unrotated",
    "gemma3, sliding and global layers",
)
NEW = 5


@pytest.fixture(scope="module", params=FAMILIES)
def run(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A LoRA run on a random base of the family, with a tokenizer and template of its own."""
    folder = tmp_path_factory.mktemp("exports")
    build({**CONFIGS[request.param], "vocab_size": 512}, folder / "base")
    kind = CONFIGS[request.param]["model_type"]
    spoken = write_tiny_model(folder / "spoken", model_type=kind, head_dim=8)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copyfile(spoken / name, folder / "base" / name)
    return make_run(folder / "run", folder / "base", "lora")


def answers_of(path: Path) -> list[Prediction]:
    """Greedy text of ten test sentences."""
    examples = load(Source(dataset="facts", split="test", limit=10))
    return predict_examples(
        open_model(path, np.dtype(np.float32)),
        examples,
        sorted({one.relation for one in examples}),
        prompt=Prompt(),
        settings=Predict(max_new_tokens=NEW),
        mode="generate",
    )


@pytest.fixture(scope="module")
def answers(run: Path) -> list[Prediction]:
    return answers_of(run)


def test_a_merged_gguf_file_answers_alike(
    run: Path, answers: list[Prediction], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("JAXRE_CACHE", str(tmp_path / "cache"))
    convert(run, tmp_path / "file", "gguf", merge=True, verify=True)
    again = answers_of(tmp_path / "file")
    assert [one.generated_relation for one in again] == [one.generated_relation for one in answers]
    scores = [one.score for one in answers]
    assert [one.score for one in again] == pytest.approx(scores, rel=1e-4)
    # Gemma's scaled embeddings and tied head repeat a token for certain in a random model.
    assert len(set(scores)) > 5 or set(scores) == {0.0}


@pytest.mark.parametrize("form", ["merged", "adapter"])
def test_an_export_answers_alike_from_its_own_files(
    run: Path, answers: list[Prediction], tmp_path: Path, form: str
) -> None:
    """transformers and peft read prompt text with the export's own tokenizer; an adapter's folder
    has no config.json to choose the tokenizer's class by.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    exported = tmp_path / form
    convert(run, exported, "hf" if form == "merged" else "peft", merge=form == "merged")
    given = {"dtype": torch.float32, "attn_implementation": "eager"}
    if form == "merged":
        model = AutoModelForCausalLM.from_pretrained(exported, **given)
    else:
        base = AutoModelForCausalLM.from_pretrained(run.parent / "base", **given)
        model = peft.PeftModel.from_pretrained(base, exported)
    model.eval()
    tokenizer = AutoTokenizer.from_pretrained(exported)
    for one in answers:
        ids = tokenizer(one.prompt, add_special_tokens=False, return_tensors="pt")["input_ids"]
        assert ids.shape[1] == one.input_tokens
        with torch.no_grad():
            whole = model.generate(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=NEW,
                do_sample=False,
                eos_token_id=tokenizer.eos_token_id,
                pad_token_id=tokenizer.pad_token_id,
            )[0, ids.shape[1] :]
        text = tokenizer.decode(whole, skip_special_tokens=True).strip()
        assert text.splitlines()[:1] == one.generated_relation.splitlines()[:1]
