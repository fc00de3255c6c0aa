"""The commands, and bad input to them: one line, exit code 2, nothing half-written."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from fake_provider import answer_files
from safetensors.numpy import load_file, save_file
from tiny import ARCHITECTURE, tiny_config, write_tiny_model
from typer.main import get_command

from jaxre import cli
from jaxre.checkpoints.huggingface import atomic_folder
from jaxre.config import load_config, save_config, shipped
from jaxre.evaluation.predictions import Prediction, write_predictions
from jaxre.relations.schema import hash_prompt

pytestmark = pytest.mark.once

ROOT = Path(__file__).resolve().parents[1]
RECORD = {
    "id": "1",
    "text": "Ada wrote Notes.",
    "head": "Ada",
    "tail": "Notes",
    "relation": "author_of",
}
OTHER = {"id": "2", "text": "Bob met Carl.", "head": "Bob", "tail": "Carl", "relation": "none"}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("model"))


@pytest.fixture
def run(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> Callable[..., tuple[int, str, str]]:
    """`jaxre ARGUMENTS` in this process: exit code, standard output, standard error."""

    def call(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["jaxre", *map(str, arguments)])
        capsys.readouterr()
        code = 0
        # and does not end the tests
        handler = signal.signal(signal.SIGTERM, lambda *_: pytest.fail("SIGTERM is not handled"))
        try:
            cli.main()
        except SystemExit as stop:
            code = stop.code or 0
        finally:
            signal.signal(signal.SIGTERM, handler)
        out, err = capsys.readouterr()
        return code, out, err

    return call


def write_config(
    tmp_path: Path, model: Path, records: list[dict] | None = None, **changes: dict
) -> Path:
    """A config on a file of records (the two above if not given)."""
    data = tmp_path / "train.jsonl"
    data.write_text(
        "".join(json.dumps(record) + "\n" for record in records or [RECORD, OTHER]),
        encoding="utf-8",
    )
    config = tiny_config(
        tmp_path,
        model,
        data={"train": {"dataset": str(data)}, "validation": None, "labels": None},
        **changes,
    )
    path = tmp_path / "config.yaml"
    save_config(config, path)
    return path


def refused(result: tuple[int, str, str], *parts: str) -> None:
    code, _, err = result
    assert code == 2
    assert len(err.strip().splitlines()) == 1, err
    assert "Traceback" not in err
    for part in parts:
        assert part in err


@pytest.mark.parametrize(
    ("override", "parts"),
    [
        ("model.path=${oc.env:HOME}", ["oc.env", "refused"]),
        ("lora.rnak=8", ["lora.rnak", "lora.rank"]),
        ("train.learning_rate=fast", ["train.learning_rate", "fast"]),
        ("lora.rank=0", ["lora.rank", "0"]),
        ("data.train.dataset=nowhere.jsonl", ["nowhere.jsonl"]),
        ("data.train.dataset=semeval", ["semeval2010_task8"]),
        ("data.labels=[none]", ["author_of", "data.labels"]),
        ("data.train.part=[0.0, 0.00001]", ["none of its 2 examples"]),
        ("model.path=nowhere/at/all", ["nowhere/at/all"]),
        ("mesh.fsdp=3", ["mesh"]),
        ("train.row_length=8", ["train.row_length"]),
    ],
)
def test_a_bad_setting_is_one_line_and_leaves_no_run(
    run: Callable, tmp_path: Path, model: Path, override: str, parts: list[str]
) -> None:
    changes = [override, "train.batch_tokens=64"] if "row_length" in override else [override]
    refused(run("train", write_config(tmp_path, model), *changes), *parts)
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("records", "parts"),
    [
        ([RECORD, {"id": "2", "text": "Bob.", "head": "Bob", "relation": "none"}], [":2", "tail"]),
        ([RECORD | {"head_span": [4, 7]}, OTHER], [":1", "head"]),
        ([RECORD | {"head_span": [40, 43]}, OTHER], [":1", "head"]),
        ([RECORD, OTHER | {"id": "1"}], [":2", "id"]),
        ([RECORD, OTHER | {"tail": "Dora"}], [":2", "Dora"]),
    ],
    ids=["no tail", "span of another word", "span outside", "duplicate id", "tail not in text"],
)
def test_a_bad_record_is_named_by_file_and_line(
    run: Callable, tmp_path: Path, model: Path, records: list[dict], parts: list[str]
) -> None:
    refused(run("train", write_config(tmp_path, model, records)), *parts)
    assert not (tmp_path / "runs").exists()


def test_a_missing_config_is_named(run: Callable, tmp_path: Path) -> None:
    refused(run("train", tmp_path / "nowhere.yaml"), "nowhere.yaml")


@pytest.mark.parametrize(
    ("fields", "method", "parts"),
    [
        ({"vocab_size": 300}, "full", ["token", "vocab_size", "300"]),
        ({"max_position_embeddings": 8}, "full", ["tokens", "reads 8", "train.row_length"]),
        ({}, "lora", ["train.method", "random weights"]),
    ],
    ids=["vocabulary", "context", "LoRA on random weights"],
)
def test_an_architecture_that_does_not_fit_the_data_is_refused(
    run: Callable, tmp_path: Path, model: Path, fields: dict, method: str, parts: list[str]
) -> None:
    architecture = f"model.architecture={json.dumps(ARCHITECTURE | fields)}"
    refused(
        run("train", write_config(tmp_path, model), architecture, f"train.method={method}"), *parts
    )
    assert not (tmp_path / "runs").exists()


def test_a_place_that_cannot_be_written_is_refused(
    run: Callable, tmp_path: Path, model: Path
) -> None:
    path = write_config(tmp_path, model)
    (tmp_path / "file").write_text("in the way")
    refused(run("train", path, f"output={tmp_path / 'file'}"), "file", "output=")
    ours, _ = write_predictions(tmp_path / "ours", [Prediction("a/1", "x", "x", "a")])
    refused(run("evaluate", ours, "--json", tmp_path), str(tmp_path), "cannot be written")
    assert not list(tmp_path.parent.glob(".*.partial"))


def test_what_the_system_refuses_is_one_line(run: Callable, tmp_path: Path, model: Path) -> None:
    refused(
        run("convert", model, tmp_path / ("x" * 300), "--to", "jaxre"), "xxx", "File name too long"
    )
    assert not list(tmp_path.iterdir())


def test_a_command_that_is_terminated_leaves_no_unfinished_folder(
    run: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def app(*_: object, **__: object) -> None:
        with atomic_folder(tmp_path / "new") as partial:
            (partial / "half").write_text("half")
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(10)

    monkeypatch.setattr(cli, "app", app)
    code, _, _ = run()
    assert code == 143 and not list(tmp_path.iterdir())


def test_predict_refuses_a_split_of_a_file(run: Callable, tmp_path: Path, model: Path) -> None:
    path = write_config(tmp_path, model)
    refused(
        run(
            "predict",
            model,
            "--config",
            path,
            "--data",
            tmp_path / "train.jsonl",
            "--split",
            "test",
        ),
        "no splits",
        "--split",
    )


def test_an_empty_split_is_refused(run: Callable, tmp_path: Path, model: Path) -> None:
    path = write_config(tmp_path, model)
    (tmp_path / "train.jsonl").write_text("")
    refused(run("train", path), "train.jsonl")


def test_a_tokenizer_without_chat_template_is_refused(
    run: Callable, tmp_path: Path, model: Path
) -> None:
    plain = shutil.copytree(model, tmp_path / "plain")
    (plain / "chat_template.jinja").unlink()
    refused(run("train", write_config(tmp_path, plain)), "chat template")
    assert not (tmp_path / "runs").exists()


def test_weights_that_lack_a_tensor_or_have_a_wrong_shape_are_all_listed(
    run: Callable, tmp_path: Path, model: Path
) -> None:
    broken = shutil.copytree(model, tmp_path / "broken")
    tensors = load_file(broken / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    tensors["model.norm.weight"] = np.zeros(7, np.float32)
    save_file(tensors, broken / "model.safetensors", metadata={"format": "pt"})
    refused(
        run("train", write_config(tmp_path, broken)),
        "model.layers.1.mlp.up_proj.weight",
        "model.norm.weight",
        "[7]",
    )
    assert not (tmp_path / "runs").exists()


def test_predictions_with_other_ids_than_the_cache_are_refused(
    run: Callable, tmp_path: Path
) -> None:
    ours, _ = write_predictions(tmp_path / "ours", [Prediction("a/1", "x", "x", "a")])
    cache, _ = write_predictions(
        tmp_path / "cache", [Prediction("b/1", "x", "x", "a", tuned_dataset_name="frontier")]
    )
    refused(run("compare", ours, cache, "--json", tmp_path / "out.json"), "a/1", "b/1")
    assert not (tmp_path / "out.json").exists()


def test_predict_refuses_a_text_without_marks(run: Callable, tmp_path: Path, model: Path) -> None:
    refused(
        run(
            "predict",
            model,
            "--config",
            write_config(tmp_path, model),
            "--text",
            "Ada wrote Notes.",
        ),
        "<e1>",
    )


def test_predict_needs_a_config_for_a_model_that_is_no_run(run: Callable, model: Path) -> None:
    refused(run("predict", model, "--data", "facts"), "--config")


COMMANDS = [
    "train",
    "predict",
    "evaluate",
    "compare",
    "convert",
    "prepare",
    "profile",
    "doctor",
    "quickstart",
    "frontier",
]
PAGES = [*COMMANDS[:-1], "frontier export", "frontier import", "frontier check"]


def example_of(help_text: str) -> list[str]:
    """Words of the example in a help text, as a shell reads them when pasted."""
    pasted = help_text.partition("Example: ")[2].replace("\\\n", " ")
    return shlex.split(pasted.splitlines()[0])


@pytest.mark.parametrize("command", PAGES)
def test_help_shows_an_example_that_can_be_pasted(run: Callable, command: str) -> None:
    words = command.split()
    code, out, _ = run(*words, "--help")
    name, *arguments = example_of(out)
    assert (code, name, arguments[: len(words)]) == (0, "jaxre", words)
    page = get_command(cli.app)
    for word in words:
        page = page.commands[word]
    arguments = arguments[len(words) :]
    page.make_context(command, arguments)  # raises for what the command does not take
    assert all(
        (ROOT / argument).is_file() for argument in arguments if argument.startswith("configs/")
    )
    # a path that was wrapped at its hyphen
    assert not any(argument.endswith("-") for argument in arguments)


def test_the_example_of_train_is_another_run_than_the_quickstart(run: Callable) -> None:
    _, _, config, *overrides = example_of(run("train", "--help")[1])
    assert load_config(ROOT / config, overrides).run_folder != load_config(ROOT / config).run_folder


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (["convert", "a", "b", "--to", "zz"], ["--to", "'zz'", "'peft'", "convert --help"]),
        (["predict", "a", "--mode", "foo"], ["--mode", "'foo'", "predict --help"]),
        (["profile", "a.yaml", "--steps", "0"], ["--steps", "1", "profile --help"]),
        (["train"], ["CONFIG", "train --help"]),
        (["evaluate", "a", "--jsno", "b"], ["--jsno", "--json", "evaluate --help"]),
        (["trian"], ["'trian'", "'train'", "--help"]),
    ],
)
def test_a_bad_command_line_is_one_line(
    run: Callable, arguments: list[str], parts: list[str]
) -> None:
    refused(run(*arguments), *parts)


def test_no_command_at_all_shows_the_help(run: Callable) -> None:
    code, out, _ = run()
    assert code == 0 and all(command in out for command in COMMANDS)


@pytest.mark.once
def test_the_main_job_by_commands(run: Callable, tmp_path: Path, model: Path) -> None:
    """prepare, train, predict (data and text, both modes), evaluate, compare and convert, each on
    the output of the previous command.
    """
    config = tiny_config(
        tmp_path,
        model,
        "job",
        data={"test": {"dataset": "facts", "split": "test", "limit": 12}},
        train={"epochs": 1},
    )
    path, folder = tmp_path / "job.yaml", config.run_folder
    save_config(config, path)
    code, out, _ = run("prepare", path)
    assert code == 0 and "⟦" in out and "96" in out
    code, out, _ = run("train", path)
    assert code == 0 and out.strip().endswith(str(folder))
    code, out, _ = run("predict", folder)
    assert code == 0 and (folder / "predictions" / "facts-test-score.csv").is_file()
    ours = folder / "predictions" / "facts-test-score.parquet"
    code, out, _ = run("predict", folder, "--mode", "generate", "--output", tmp_path / "greedy.csv")
    assert code == 0 and (tmp_path / "greedy.parquet").is_file()
    code, out, _ = run(
        "predict", folder, "--text", "<e1>Paris [/b]</e1> is the capital of <e2>France</e2>."
    )
    assert code == 0 and "capital_of" in out and "Paris [/b] -> France" in out
    code, out, _ = run("evaluate", ours, "--json", tmp_path / "scores.json")
    assert code == 0 and json.loads((tmp_path / "scores.json").read_text())["schema_valid"] == 1.0
    code, out, _ = run(
        "compare", ours, tmp_path / "greedy.parquet", "--json", tmp_path / "comparison.json"
    )
    assert code == 0 and json.loads((tmp_path / "comparison.json").read_text())["joined"] == 12
    for to, extra in (
        ("hf", ["--merge", "--verify", "--json", tmp_path / "tensors.json"]),
        ("peft", []),
    ):
        code, out, _ = run("convert", folder, tmp_path / to, "--to", to, *extra)
        assert code == 0 and (tmp_path / to / "tokenizer.json").is_file()
        assert ("verified: " in out) == ("--verify" in extra)
    differences = json.loads((tmp_path / "tensors.json").read_text())["differences"]
    assert differences.keys() == load_file(tmp_path / "hf/model.safetensors").keys() and not any(
        differences.values()
    )
    refused(run("convert", folder, tmp_path / "hf", "--to", "hf", "--merge"), "hf", "exists")


def test_a_frontier_model_is_compared_by_commands(
    run: Callable, tmp_path: Path, model: Path
) -> None:
    """export, import, check and compare, each on the output of the previous command; then a cache
    in the study's format.
    """
    lines = (shipped("corpus") / "test.jsonl").read_text(encoding="utf-8").splitlines()[:8]
    records = [
        json.loads(line) | {"prompt_0_shot": f"Which relation? {json.loads(line)['text']}"}
        for line in lines
    ]
    data = tmp_path / "copy.jsonl"
    data.write_text("".join(json.dumps(one) + "\n" for one in records), encoding="utf-8")
    path = tmp_path / "config.yaml"
    save_config(tiny_config(tmp_path, model, data={"test": {"dataset": str(data)}}), path)
    code, out, err = run(
        *(
            "frontier",
            "export",
            path,
            "--provider",
            "anthropic",
            "--model",
            "big",
            "--style",
            "shots2-task",
        ),
        *("--output", tmp_path / "requests.json", "prompt.shots=1"),
    )
    assert code == 0, err
    *requests, manifest = map(Path, out.splitlines()[-2:])
    gold = [one["relation"] for one in records]
    results = answer_files("anthropic", requests, tmp_path, lambda question: [(gold[0], "stop")])
    code, out, _ = run(
        "frontier",
        "import",
        manifest,
        *results,
        "--output",
        tmp_path / "cache",
        "--price",
        "1",
        "5",
    )
    assert code == 0 and "8 of 8 (100.0%)" in out and "0.0010 USD" in out and "big-1-0901 8" in out
    cache = Path(out.splitlines()[-1])
    code, out, err = run(
        "frontier", "check", cache, "--config", path, "--json", tmp_path / "check.json"
    )
    (checked,) = json.loads((tmp_path / "check.json").read_text())["settings"]
    assert code == 0 and (checked["coverage"], checked["prompts_checked"]) == (1, 8), err
    refused(
        run("frontier", "check", cache, "--data", "facts"),
        "cache.parquet",
        "of 399 examples (0.0%)",
    )
    refused(run("frontier", "check", cache), "--config", "--data")

    code, _, err = run("predict", model, "--config", path, "--output", tmp_path / "ours")
    assert code == 0, err
    compared = ["compare", tmp_path / "ours.parquet", cache, "--json", tmp_path / "one.json"]
    assert run(*compared, "--coverage", "1")[0] == 0
    assert json.loads((tmp_path / "one.json").read_text())["joined"] == 8
    rows = [
        "eval_dataset_name,relation,gen_type,model_id,tuned_dataset_name,model_shot,prompt_shot,generated_relation,prompt_hash"
    ]
    rows += [
        f"facts,{one['relation']},gen_open,gpt,frontier,n/a,0,none,{hash_prompt(one['prompt_0_shot'])}"
        for one in records[:6]
    ]
    (tmp_path / "published.csv").write_text("\n".join(rows) + "\n")
    code, out, _ = run("compare", tmp_path / "ours.csv", tmp_path / "published.csv")
    assert code == 0 and out.startswith("WARNING: the cache answers 6 of 8 predictions")
    refused(
        run("compare", tmp_path / "ours.csv", tmp_path / "published.csv", "--coverage", "0.9"),
        "published.csv",
        "75.0%",
    )


def test_doctor_says_what_would_be_chosen(run: Callable) -> None:
    code, out, _ = run("doctor")
    assert code == 0 and "attention" in out and "model.dtype=auto" in out
