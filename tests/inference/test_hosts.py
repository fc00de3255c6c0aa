"""Several processes predict what one does."""

import json

import numpy as np
import pytest
from processes import by_address, by_slurm, jaxre
from tiny import tiny_config, write_tiny_model

from jaxre.config import Source
from jaxre.evaluation.predictions import read_predictions
from jaxre.relations.sources import load
from jaxre.training.loop import train


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("hosts")
    model = write_tiny_model(folder / "model")
    return train(tiny_config(folder, model, train={"max_steps": 1, "batch_tokens": 512}))


@pytest.mark.slow
@pytest.mark.parametrize("joined", [by_address, by_slurm])
def test_two_processes_predict_what_one_does(run, tmp_path, joined):
    data = tmp_path / "test.jsonl"
    examples = load(Source(dataset="facts", split="test", limit=17))  # shares differ in size
    fields = ("id", "text", "head", "tail", "relation")
    data.write_text(
        "".join(json.dumps({n: getattr(one, n) for n in fields}) + "\n" for one in examples)
    )

    def predict(name, **processes):
        target = tmp_path / name / "rows"
        outputs = jaxre(
            "predict", str(run), "--data", str(data), "--output", str(target), **processes
        )
        return read_predictions(target), outputs

    alone, _ = predict("one")
    together, outputs = predict("two", processes=2, joined=joined)
    assert [row.example_id for row in together] == [row.example_id for row in alone]
    assert len(alone) == 17
    for one, two in zip(alone, together, strict=True):
        assert one.generated_relation == two.generated_relation
        np.testing.assert_allclose(two.score, one.score, rtol=1e-5)
    # The first process alone prints and writes; no share is left behind.
    assert "F1" in outputs[0] and "F1" not in outputs[1]
    assert sorted(path.name for path in (tmp_path / "two").iterdir()) == [
        "rows.csv",
        "rows.parquet",
    ]
