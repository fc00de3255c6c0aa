"""The five mistakes of the study (paper/protocol.md), which ours cannot make: each tested on the
paper's own grid.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from tiny_encoders import write_sentences

from jaxre.config import Source, shipped
from jaxre.data.template import ChatTemplate
from jaxre.data.tokenizer import load_tokenizer
from jaxre.data.tokens import demonstrator, questions_of
from jaxre.evaluation.metrics.scores import score
from jaxre.inference.answers import label_answers
from jaxre.inference.predict import stop_ids
from jaxre.objectives import load_dataset
from jaxre.relations.benchmarks import BENCHMARKS, COPIES, ORIGINALS
from jaxre.relations.hub import PREFIX
from jaxre.relations.labels import label_source_notices
from jaxre.relations.mixtures import sources_of
from jaxre.relations.sources import load
from jaxre.study.grid import Run, System, grid
from jaxre.study.settings import load_study

PAPER = Path(__file__).parents[2] / "configs/study/paper.yaml"


@pytest.fixture(scope="module")
def paper() -> tuple[tuple[Run, ...], tuple[System, ...]]:
    return grid(load_study(PAPER))


@pytest.mark.parametrize("shots", [0, 2])
def test_smollm3_does_not_reason(paper, shared_models: Path, tmp_path: Path, shots: int) -> None:
    """Theirs began every answer with <think>: 0.000 on all nine. Its prompt has the reasoning
    closed before the answer begins.
    """
    folder = tmp_path / "smollm3"
    # a tokenizer for its template, which came without one
    shutil.copytree(shared_models / "Qwen/Qwen2.5-0.5B-Instruct", folder)
    shutil.copy(
        shared_models / "HuggingFaceTB/SmolLM3-3B/chat_template.jinja",
        folder / "chat_template.jinja",
    )
    run = next(one for one in paper[0] if one.model == "smollm3-3b" and one.shots == shots)
    template = ChatTemplate(load_tokenizer(folder), run.config.prompt.date, "smollm3")
    train = load(Source(dataset="facts", split="train", limit=30))
    labels = sorted({example.relation for example in train})
    questions = questions_of(
        train[:4],
        run.config.prompt,
        labels,
        demonstrator(train, run.config.prompt, run.config.seed),
    )
    prompts, answers = label_answers(template, questions, labels)
    for prompt in map(template.tokenizer.decode, prompts):
        assert (
            prompt.endswith("<think>\n\n</think>\n")
            and prompt.count("<think>") == prompt.count("</think>") == shots + 1
        )
        assert "/no_think" in prompt
    assert not any(
        "think>" in template.tokenizer.decode(answer)
        for of_example in answers
        for answer in of_example
    )


def test_no_answer_runs_on(shared_models: Path) -> None:
    """Theirs did (`no_relation because ...`): 0.277. Ours learn to end the turn after the label,
    and writing stops at that token.
    """
    folder = shared_models / "Qwen/Qwen2.5-0.5B-Instruct"
    template = ChatTemplate(load_tokenizer(folder), "2024-01-01", "qwen")
    question = [{"role": "user", "content": "Which relation?"}]
    encoded = template.encode([(question, "no_relation")])[0]
    answer = encoded.tokens[encoded.prompt_length :]
    ends = [token in stop_ids(template, question, folder) for token in answer]
    assert template.tokenizer.decode(answer[: ends.index(True)]) == "no_relation"
    said = (
        "no_relation because the two are only named together, and nothing in the text says how they"
        " are related to each other"
    )
    scores = score(["no_relation", "spouse"], [said, "spouse"], schema=["no_relation", "spouse"])
    # what runs on is no label, and is counted as such
    assert scores.accuracy == 0.5 and scores.malformed == 0.5


def test_no_answer_is_cut_off(paper, tmp_path: Path) -> None:
    """Theirs cut long examples at 1,024 tokens, the answer first. Ours are whole or are left out,
    counted and listed.
    """
    write_sentences(tmp_path / "long.jsonl", 12, 0)
    lines = (tmp_path / "long.jsonl").read_text(encoding="utf-8").splitlines()
    longer = [
        line.replace('"text": "', '"text": "' + "and " * 1100 * (number % 3 == 0), 1)
        for number, line in enumerate(lines)
    ]
    (tmp_path / "long.jsonl").write_text("\n".join(longer), encoding="utf-8")
    run = next(one for one in paper[0] if one.kind == "tuned" and one.shots == 0)
    data = run.config.data.model_copy(
        update={
            "train": Source(dataset=str(tmp_path / "long.jsonl")),
            "validation": None,
            "labels": None,
            "cache": str(tmp_path / "cache"),
        }
    )
    split = load_dataset(run.config.model_copy(update={"data": data}), shipped("facts-base")).train
    assert (
        len(split.dropped) == 4 == split.truncation.cut == split.truncation.answer_gone
        and len(split.tokens) == 8
    )
    assert (
        split.tokens.supervised > 1
    ).all() and split.tokens.lengths.max() <= run.config.train.row_length == 1024


def test_no_label_is_collected_from_what_is_tested(paper) -> None:
    """Theirs were those of the test split. Ours can be too, but not without a word."""
    settings = load_study(PAPER)
    for run in paper[0]:
        if run.kind == "language-model":
            continue
        assert label_source_notices(run.config.data) == []
        for name in run.datasets:
            test = settings.datasets[name].test
            assert label_source_notices(run.config.data, test) == []
            theirs = run.config.data.model_copy(update={"labels": {name: test}})
            assert any(
                "LABELS FROM THE TEST SPLIT" in line for line in label_source_notices(theirs, test)
            )


def test_every_source_of_the_paper_is_known_by_the_name_it_is_given(paper) -> None:
    """Theirs named a source `rebel-dataset` that its registry called `rebel`: the mixture could not
    be built.
    """
    settings = load_study(PAPER)
    named = {
        one.dataset: name
        for name, given in settings.datasets.items()
        for one in (given.train, given.validation, given.test)
    }
    for source, name in named.items():
        key = source.removeprefix(PREFIX)
        assert (COPIES.get(key) or ORIGINALS.get(key) or BENCHMARKS.get(key)).name == name
    asked = {
        source.dataset
        for run in paper[0]
        if run.kind == "tuned"
        for source in sources_of(run.config.data.train)
    }
    assert asked <= set(named) and "hub:Despina/rebel-dataset" in asked
