"""SmolLM2-135M from its package: it learns, and its export gives the same answers in
transformers.

`tools/test` installs it; `tools/check_real_weights.py` shows the rest.
"""

from __future__ import annotations

import io
import os
from pathlib import Path

import pytest
from rich.console import Console
from tiny_decoders import ground_truth

from jaxre.checkpoints.convert import convert
from jaxre.checkpoints.packaged import packaged_file
from jaxre.checkpoints.source import open_model
from jaxre.config import load_config
from jaxre.errors import InputError
from jaxre.inference.predict import predict_examples
from jaxre.relations.sources import load
from jaxre.training.log import read_log
from jaxre.training.loop import train

torch = ground_truth("torch")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve updates of 256 tokens of the quickstart."""
    try:
        packaged_file("smollm2-135m")
    except InputError as error:
        if os.environ.get("CI"):
            pytest.fail(str(error), pytrace=False)
        pytest.skip(str(error))
    folder = tmp_path_factory.mktemp("real")
    config = load_config(
        "configs/quickstart.yaml",
        [
            f"output={folder}",
            f"data.cache={folder / 'cache'}",
            "name=run",
            "data.train.limit=64",
            "data.validation=null",
            "train.batch_tokens=256",
            "train.row_length=256",
            "train.max_steps=12",
            "train.log_every=1",
            "model.dtype=float32",
            "mesh.cpu_devices=null",
        ],
    )
    train(config, Console(file=io.StringIO()))
    return folder / "run"


def test_its_loss_falls(run: Path) -> None:
    losses = [record["loss"] for record in read_log(run) if record["kind"] == "train"]
    assert len(losses) == 12 and sum(losses[-3:]) < 0.7 * sum(losses[:3]), losses


def test_its_export_gives_the_same_answers_in_transformers(run: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    config = load_config(run / "config.yaml")
    examples = load(config.data.test)[:6]
    ours = predict_examples(
        open_model(run, None),
        examples,
        sorted({one.relation for one in examples}),
        prompt=config.prompt,
        settings=config.predict.model_copy(update={"max_new_tokens": 8}),
        demonstrations=lambda example: [],
        mode="generate",
    )
    convert(run, tmp_path / "merged", "hf", merge=True)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "merged")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32).eval()
    for one in ours:
        ids = tokenizer(one.prompt, add_special_tokens=False, return_tensors="pt")
        with torch.no_grad():
            out = model.generate(**ids, max_new_tokens=8, do_sample=False)
        text = tokenizer.decode(out[0, ids.input_ids.shape[1] :], skip_special_tokens=True)
        assert text.strip().splitlines()[:1] == one.generated_relation.splitlines()[:1]
