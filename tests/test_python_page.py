"""docs/python.md as it is written: its snippets run in order and answer as the commands do."""

from __future__ import annotations

import io
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

import jaxre
from jaxre.config import Source
from jaxre.errors import InputError
from jaxre.inference.commands import predict_data
from jaxre.relations import sources

pytestmark = pytest.mark.once

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict]:
    """The folder in which the page's snippets ran, and the names that they left."""
    folder = tmp_path_factory.mktemp("page")
    (folder / "configs").mkdir()
    for name in ("quickstart.yaml", "quickstart-tiny.yaml"):
        # JAX may run in this process already, with another number of devices.
        text = (ROOT / "configs" / name).read_text()
        assert "cpu_devices: 2" in text
        text = text.replace("cpu_devices: 2", "cpu_devices: null")
        text, limited = re.subn(r"(split: (test|validation))", r"\1, limit: 12", text)
        assert limited == 2
        (folder / "configs" / name).write_text(text)
    snippets = re.findall(r"```python\n(.*?)```", (ROOT / "docs/python.md").read_text(), re.S)
    assert len(snippets) == 3
    names: dict = {}
    with pytest.MonkeyPatch.context() as patched:
        patched.chdir(folder)
        for snippet in snippets:
            exec(snippet, names)
    return folder, names


def test_the_snippets_run(page: tuple[Path, dict]) -> None:
    _, names = page
    assert names["folder"] == Path("runs/mine")
    assert len(names["answers"]) == 2
    for answer in names["answers"]:
        assert answer.label in names["run"].labels()
        assert answer.probability == max(answer.probabilities.values())
        assert sum(answer.probabilities.values()) == pytest.approx(1)
    assert names["scores"].examples == 2


def test_a_run_answers_as_the_command_does(page: tuple[Path, dict]) -> None:
    folder, names = page
    with pytest.MonkeyPatch.context() as patched:
        patched.chdir(folder)
        rows = predict_data(
            "runs/mine", None, None, "score", None, None, Console(file=io.StringIO())
        ).rows
    answers = names["run"].predict(sources.load(Source(dataset="facts", split="test", limit=12)))
    for row, answer in zip(rows, answers, strict=True):
        assert row.generated_relation == answer.label
        np.testing.assert_allclose(
            list(row.probabilities.values()), list(answer.probabilities.values()), atol=1e-6
        )
    assert (
        names["run"]
        .predict(["<e1>Ada Lovelace</e1> wrote the <e2>Notes</e2>."], "generate")[0]
        .probability
        <= 1
    )


@pytest.mark.parametrize(
    ("examples", "message"),
    [
        ("<e1>Ada</e1> saw <e2>Rome</e2>.", "write [example]"),
        (["<e1>Ada</e1> saw Rome."], "example 1: "),
        ([{"text": "Ada saw Rome.", "head": "Ada"}], 'example 1: no column for "tail"'),
        ([], "no example to predict"),
    ],
)
def test_an_example_that_cannot_be_used_is_named(
    page: tuple[Path, dict], examples: list, message: str
) -> None:
    with pytest.raises(InputError, match=re.escape(message)):
        page[1]["run"].predict(examples)


def test_importing_jaxre_does_not_import_jax() -> None:
    code = "import sys, jaxre; assert 'jax' not in sys.modules and 'numpy' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
    with pytest.raises(AttributeError):
        jaxre.nothing  # noqa: B018
