"""A prediction that is killed goes on where it stopped, and says how far it is."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path

import pytest
from refusals import refusal
from rich.console import Console
from tiny import tiny_config, write_tiny_model

from jaxre.config import save_config
from jaxre.evaluation.predictions import Prediction, read_predictions
from jaxre.inference import commands, counter
from jaxre.inference.commands import predict_data
from jaxre.inference.counter import Counter
from jaxre.inference.journal import Journal, identity_of

pytestmark = pytest.mark.once

N = 40


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("journal") / "model")


@pytest.fixture
def config(model: Path, tmp_path: Path) -> Path:
    found = tiny_config(
        tmp_path,
        model,
        data={"test": {"dataset": "facts", "split": "test", "limit": N}},
        predict={"batch_tokens": 1024, "max_new_tokens": 4},
    )
    save_config(found, tmp_path / "run.yaml")
    return tmp_path / "run.yaml"


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many examples each prediction asked the model."""
    counts: list[int] = []
    real = commands.predict_examples

    def counted(*given, record: Callable, **settings):
        counts.append(0)

        def count(rows: list[Prediction]) -> None:
            counts[-1] += len(rows)
            record(rows)

        return real(*given, record=count, **settings)

    monkeypatch.setattr(commands, "predict_examples", counted)
    return counts


def predict(model: Path, config: Path, mode: str, target: Path) -> str:
    said = io.StringIO()
    predict_data(str(model), None, None, mode, target, config, Console(file=said, width=150))
    return said.getvalue()


def stop_after(monkeypatch: pytest.MonkeyPatch, rows: int) -> None:
    """A kill once so many rows are written."""
    add, count = Journal.add, [0]

    def adding(self: Journal, new: list[Prediction]) -> None:
        add(self, new)
        count[0] += len(new)
        if count[0] >= rows:
            raise KeyboardInterrupt

    monkeypatch.setattr(Journal, "add", adding)


@pytest.mark.parametrize("mode", ["score", "generate"])
def test_a_killed_prediction_asks_only_what_was_not_answered(
    model, config, tmp_path, mode, asked, monkeypatch
):
    predict(model, config, mode, tmp_path / "whole")
    with monkeypatch.context() as killed:
        stop_after(killed, 8)
        with pytest.raises(KeyboardInterrupt):
            predict(model, config, mode, tmp_path / "part")
    hidden = tmp_path / ".part.part.jsonl"
    answered = len(hidden.read_text().splitlines()) - 1
    assert 8 <= answered < N and not (tmp_path / "part.parquet").exists()
    said = predict(model, config, mode, tmp_path / "part")
    assert asked == [N, answered, N - answered]
    assert f"{answered} of {N} were answered before" in said and not hidden.exists()
    whole, part = (read_predictions(tmp_path / f"{name}.parquet") for name in ("whole", "part"))
    assert [one.generated_relation for one in whole] == [one.generated_relation for one in part]
    # Rows that were packed with others: f32 sums in another order.
    assert [one.score for one in part] == pytest.approx([one.score for one in whole], abs=1e-5)


def test_what_was_answered_for_another_model_prompt_or_mode_is_asked_again(
    model, config, tmp_path, asked, monkeypatch
):
    with monkeypatch.context() as killed:
        stop_after(killed, 8)
        with pytest.raises(KeyboardInterrupt):
            predict(model, config, "score", tmp_path / "out")
    predict(model, config, "best", tmp_path / "out")
    assert asked[-1] == N


def test_a_line_that_a_kill_cut_short_is_dropped(tmp_path):
    rows = [Prediction(f"id {n}", "a", "b", prompt="ü\n", score=0.1 * n) for n in range(3)]
    journal = Journal(tmp_path / "out", "model")
    journal.add(rows)
    journal.close()
    whole = journal.path.read_bytes()
    for cut in range(len(whole)):
        journal.path.write_bytes(whole[:cut])
        again = Journal(tmp_path / "out", "model")
        found = list(again.rows.values())
        assert found == rows[: len(found)]
        again.add(rows[len(found) :])
        again.close()
        assert list(Journal(tmp_path / "out", "model").rows.values()) == rows
    assert not Journal(tmp_path / "out", "another").rows


def test_identity_follows_the_files_of_the_model(tmp_path):
    (tmp_path / "weights").write_text("a")
    first = identity_of([tmp_path], {"mode": "score"})
    assert first == identity_of([tmp_path], {"mode": "score"})
    assert first != identity_of([tmp_path], {"mode": "best"})
    for name in ("out.parquet", "out.csv", ".out.part.jsonl"):
        (tmp_path / name).write_text("a prediction beside the weights")
    assert first == identity_of([tmp_path], {"mode": "score"})
    (tmp_path / "weights").write_text("ab")
    assert first != identity_of([tmp_path], {"mode": "score"})


def test_the_rate_and_the_time_left_are_said_once_a_minute(monkeypatch):
    clock = [0.0]
    monkeypatch.setattr(counter.time, "monotonic", lambda: clock[0])
    said = io.StringIO()
    with Counter(Console(file=said, width=100), 1000, known=100) as one:
        for _ in range(4):
            clock[0] += 30.0
            one.advance(60)
    lines = said.getvalue().split("\n")
    assert "220 of 1,000 examples, 2/s, 6 min 30 s left" in lines
    assert "340 of 1,000 examples, 2/s, 5 min 30 s left" in lines
    assert sum("left" in line for line in lines) == 2


def test_an_answered_file_is_json_a_line(tmp_path):
    journal = Journal(tmp_path / "out", "x")
    journal.add([Prediction("1", "a", "b", probabilities={"a": 0.25, "b": 0.75})])
    header, row = map(json.loads, journal.path.read_text().splitlines())
    assert header == {"identity": "x"} and row["probabilities"] == {"a": 0.25, "b": 0.75}
    journal.remove()
    assert not journal.path.exists()


def test_two_predictions_to_one_place_do_not_mix(tmp_path):
    first = Journal(tmp_path / "out", "x")
    assert "another prediction writes there" in refusal(lambda: Journal(tmp_path / "out", "y"))
    first.add([Prediction("1", "a", "b")])
    first.close()
    second = Journal(tmp_path / "out", "y")
    assert second.replaced == 1 and not second.rows
    second.close()
    assert not second.path.exists()  # nothing was answered


def test_examples_whose_prompt_changed_are_asked_again(model, config, tmp_path, asked, monkeypatch):
    with monkeypatch.context() as killed:
        stop_after(killed, 8)
        with pytest.raises(KeyboardInterrupt):
            predict(model, config, "score", tmp_path / "out")
    hidden = tmp_path / ".out.part.jsonl"
    header, *rows = map(json.loads, hidden.read_text().splitlines())
    rows[0]["prompt"] += "another text"
    hidden.write_text("".join(json.dumps(one) + "\n" for one in [header, *rows]))
    said = predict(model, config, "score", tmp_path / "out")
    assert f"{len(rows) - 1} of {N} were answered before" in said
    assert asked[-1] == N - len(rows) + 1
