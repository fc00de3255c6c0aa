"""Examples to prediction rows: exact label scoring, the search for the best label, or greedy
decoding.

loaded = open_model("runs/quickstart", compute_dtype("auto"))
rows = predict_examples(loaded, examples, labels, config.prompt, config.predict)
write_predictions("runs/quickstart/predictions/test", rows)
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np

from jaxre.checkpoints.huggingface import read_json
from jaxre.checkpoints.source import Loaded
from jaxre.config import Predict, Prompt
from jaxre.data.markers import encode_marked, marked_text, markers_in
from jaxre.data.template import ChatTemplate, Turn
from jaxre.data.tokenizer import load_tokenizer
from jaxre.data.tokens import questions_of
from jaxre.errors import InputError
from jaxre.evaluation.predictions import Prediction
from jaxre.inference.answers import label_answers
from jaxre.inference.classification import plan_classification, run_classification
from jaxre.inference.decoding import Generation, clean_answer, decode
from jaxre.inference.model import Model
from jaxre.inference.scoring import plan_scoring, probabilities, run_scoring
from jaxre.inference.search import Best, Bounded, best_labels, labels_above, no_number
from jaxre.models.architecture import EncoderArchitecture, check_vocabulary
from jaxre.models.lora import scale_of
from jaxre.relations.schema import Example, hash_prompt

Mode = Literal["score", "best", "generate"]


def model_of(loaded: Loaded) -> Model:
    """An opened model, ready to run."""
    return Model(
        loaded.base,
        loaded.architecture,
        loaded.factors,
        scale_of(loaded.lora) if loaded.lora else 1.0,
    )


def predict_examples(
    loaded: Loaded,
    examples: Sequence[Example],
    labels: Sequence[str],
    prompt: Prompt,
    settings: Predict,
    *,
    mode: Mode = "score",
    above: float | None = None,
    demonstrations: Callable[[Example], list[Example]] = lambda example: [],
    tuned_dataset_name: str = "",
    model_shot: str = "0",
    answered: Mapping[str, Prediction] | None = None,
    start: Callable[[int], None] = lambda known: None,
    record: Callable[[list[Prediction]], None] = lambda rows: None,
) -> list[Prediction]:
    """One row per example, in order.

    Args:
      labels: the schema.
      demonstrations: of an example, as `jaxre.data.tokens.demonstrator` makes them.
      mode: "score" gives the most probable label of the schema, and all probabilities; "best" that
        label alone; "generate" what the model writes, cleaned, whether or not it is a label.
      above: with "score", only the best label and labels that the model writes with a higher
        probability than this get their own (exact, not divided by the sum over the labels), the
        rest an upper bound (`Prediction.bounds`).
      tuned_dataset_name, model_shot: what the model was tuned on and with how many shots, for the
        study's columns.
      answered: example id -> row of an earlier, unfinished call; it is taken where its prompt is
        the same.
      start: called once with the number of examples that need no answer.
      record: called with the rows of each batch that has been answered.

    Returns:
      Rows whose `score` is the log-probability of the predicted label (or text) with its
      end-of-turn token; `prompt` is the text the model read.

    Raises:
      InputError: no example, a prompt that does not fit, labels that the tokenizer makes the same,
      a faulty
        template.
    """
    if not examples:
        raise InputError("there is no example to predict; is the split empty?")
    if above is not None:
        _check_above(above, mode, loaded)
    if isinstance(loaded.architecture, EncoderArchitecture):
        return _predict_labels(
            loaded, examples, labels, settings, mode, tuned_dataset_name, answered, start, record
        )
    template = ChatTemplate(load_tokenizer(loaded.folder), prompt.date, str(loaded.folder))
    questions = questions_of(examples, prompt, labels, demonstrations)
    texts = [template.render(question, generation=True) for question in questions]
    if mode != "generate":
        tokens, answers = label_answers(template, questions, labels)
        check_vocabulary(
            max(max(ids) for one in (tokens, *answers) for ids in one), loaded.architecture
        )
    else:
        tokens, answers = template.tokenize(texts), []
        check_vocabulary(max(map(max, tokens)), loaded.architecture)
    common = {
        "gen_type": "gen_constrained" if prompt.enumerate else "gen_open",
        "model_id": loaded.name,
        "tuned_dataset_name": tuned_dataset_name,
        "model_shot": model_shot,
        "prompt_shot": str(prompt.shots),
    }
    lengths = [len(ids) for ids in tokens]
    rows = _Rows(examples, texts, common, lengths, answered or {}, record)
    start(len(examples) - len(rows.pending))
    if not rows.pending:
        return rows.all()
    model = model_of(loaded)
    prompts = [tokens[i] for i in rows.pending]
    names = [examples[i].id for i in rows.pending]
    run = {"batch_tokens": settings.batch_tokens, "names": names}
    if mode == "generate":
        stops = stop_ids(template, questions[0], loaded.folder)

        def written(found: Mapping[int, Generation]) -> None:
            plain = template.tokenizer.batch_decode(
                [one.tokens for one in found.values()], skip_special_tokens=True
            )
            rows.add(
                {
                    number: {
                        "generated_relation": clean_answer(text),
                        "score": one.score,
                        "output_tokens": len(one.tokens),
                        "status": "" if one.tokens[-1] in stops else "truncated",
                    }
                    for (number, one), text in zip(found.items(), plain, strict=True)
                }
            )

        decode(model, prompts, stops, settings.max_new_tokens, **run, on_results=written)
        return rows.all()
    answers = [answers[i] for i in rows.pending]

    def row_of(number: int, label: int, score: float, **more: dict[str, float]) -> dict:
        return {
            "generated_relation": labels[label],
            "score": score,
            "output_tokens": len(answers[number][label]),
            **more,
        }

    def best(results: Mapping[int, Best]) -> None:
        rows.add({number: row_of(number, *result) for number, result in results.items()})

    def bounded(results: Mapping[int, Bounded]) -> None:
        fresh = {}
        for number, (scores, exact) in results.items():
            shares = np.exp(scores).tolist()
            fresh[number] = row_of(
                number,
                label := int(np.where(exact, scores, -np.inf).argmax()),
                float(scores[label]),
                probabilities={labels[i]: shares[i] for i in np.flatnonzero(exact)},
                bounds={labels[i]: shares[i] for i in np.flatnonzero(~exact)},
            )
        rows.add(fresh)

    def scored(results: Mapping[int, np.ndarray]) -> None:
        fresh = {}
        for number, scores in results.items():
            shares = dict(zip(labels, probabilities(scores[None])[0].tolist(), strict=True))
            label = int(scores.argmax())
            fresh[number] = row_of(number, label, float(scores[label]), probabilities=shares)
        rows.add(fresh)

    if mode == "best":
        best_labels(model, prompts, answers, **run, on_results=best)
    elif above is not None:
        labels_above(model, prompts, answers, above, **run, on_results=bounded)
    else:
        plan = plan_scoring(prompts, answers, loaded.architecture, **run)
        run_scoring(model, plan, on_results=scored)
    return rows.all()


def _check_above(above: float, mode: str, loaded: Loaded) -> None:
    """Raises InputError for a threshold that is no probability or goes with another mode or an
    encoder.
    """
    if not 0 < above < 1:
        raise InputError(f"--above {above:g}: is no probability; give one between 0 and 1")
    if mode != "score":
        raise InputError(f"--above {above:g}: bounds the scores of labels; use --mode score")
    if isinstance(loaded.architecture, EncoderArchitecture):
        raise InputError(
            f"{loaded.name}: an encoder computes all probabilities at once; leave --above out"
        )


class _Rows:
    """Collects the rows of a prediction. `pending` lists the examples without an earlier answer;
    results are numbered by their place in it.
    """

    def __init__(
        self,
        examples: Sequence[Example],
        texts: Sequence[str],
        common: Mapping[str, str],
        lengths: Sequence[int],
        answered: Mapping[str, Prediction],
        record: Callable[[list[Prediction]], None],
    ):
        self.examples, self.texts, self.record = examples, texts, record
        self.common, self.lengths = common, lengths
        self.hashes = [
            example.prompt_hash or hash_prompt(text)
            for example, text in zip(examples, texts, strict=True)
        ]
        self.rows: dict[int, Prediction] = {}
        for i, example in enumerate(examples):
            row = answered.get(example.id)
            if row and (row.prompt_hash, row.prompt) == (self.hashes[i], texts[i]):
                self.rows[i] = dataclasses.replace(
                    row, relation=example.relation, eval_dataset_name=example.dataset, **common
                )
        self.pending = [i for i in range(len(examples)) if i not in self.rows]

    def add(self, found: Mapping[int, dict]) -> None:
        """Raises InputError, as the search does, for a score that is no number: its label would be
        that of the first place.
        """
        fresh = {}
        for number, row in found.items():
            i = self.pending[number]
            example = self.examples[i]
            if row["score"] != row["score"]:
                raise InputError(no_number(example.id))
            fresh[i] = Prediction(
                example_id=example.id,
                relation=example.relation,
                eval_dataset_name=example.dataset,
                prompt=self.texts[i],
                prompt_hash=self.hashes[i],
                input_tokens=self.lengths[i],
                **self.common,
                **row,
            )
        self.rows |= fresh
        self.record(list(fresh.values()))

    def all(self) -> list[Prediction]:
        """One row per example, in order."""
        return [self.rows[i] for i in range(len(self.examples))]


def _predict_labels(
    loaded: Loaded,
    examples: Sequence[Example],
    labels: Sequence[str],
    settings: Predict,
    mode: str,
    tuned_dataset_name: str,
    answered: Mapping[str, Prediction] | None,
    start: Callable[[int], None],
    record: Callable[[list[Prediction]], None],
) -> list[Prediction]:
    """`predict_examples` of an encoder: probabilities are the softmax of its head."""
    architecture = loaded.architecture
    if mode != "score":
        raise InputError(f"{loaded.name}: an encoder has no {mode} mode; leave --mode out")
    if set(labels) != set(architecture.labels):
        known = (
            ", ".join(architecture.labels)
            or "none: it has no head yet, train it with train.objective=classify"
        )
        raise InputError(
            f"{loaded.name}: the labels of its head ({known}) are not those of the schema"
            f" ({', '.join(labels)}); use its own config"
        )
    tokenizer = load_tokenizer(loaded.folder)
    known = markers_in(tokenizer)
    texts = [marked_text(example, known) for example in examples]
    tokens = encode_marked(examples, texts, tokenizer)
    check_vocabulary(max(tokenizer.get_vocab().values()), architecture)
    common = {"model_id": loaded.name, "tuned_dataset_name": tuned_dataset_name}
    lengths = tokens.lengths.tolist()
    rows = _Rows(examples, texts, common, lengths, answered or {}, record)
    start(len(examples) - len(rows.pending))
    if not rows.pending:
        return rows.all()
    chosen = np.zeros(len(examples), bool)
    chosen[rows.pending] = True
    # whatever the gold labels
    pending = dataclasses.replace(tokens, labels=np.zeros(len(tokens), np.int32)).subset(chosen)
    plan = plan_classification(pending, architecture, batch_tokens=settings.batch_tokens)
    columns = [architecture.labels.index(label) for label in labels]

    def settle(found: Mapping[int, np.ndarray]) -> None:
        settled = {}
        for number, every in found.items():
            scores = every[columns]
            choice, shares = int(scores.argmax()), probabilities(scores[None])[0]
            settled[number] = {
                "generated_relation": labels[choice],
                "score": float(scores[choice]),
                "probabilities": dict(zip(labels, shares.tolist(), strict=True)),
            }
        rows.add(settled)

    run_classification(jax.tree.map(jnp.asarray, loaded.base), architecture, plan, settle)
    return rows.all()


def stop_ids(template: ChatTemplate, question: Sequence[Turn], folder: Path) -> set[int]:
    """The tokens that end an answer: the template's end of turn, the tokenizer's and the generation
    config's end of text.
    """
    supervised = template.encode([(question, "answer")])[0]
    answer = supervised.tokens[supervised.prompt_length :]
    last = answer[template.end_of_turn(answer) - 1]
    stops = {last} if last in template.tokenizer.added_tokens_decoder else set()
    if template.tokenizer.eos_token_id is not None:
        stops.add(template.tokenizer.eos_token_id)
    path = folder / "generation_config.json"
    if path.is_file():
        listed = read_json(path).get("eos_token_id")
        ids = listed if isinstance(listed, list) else [] if listed is None else [listed]
        if not all(isinstance(one, int) and not isinstance(one, bool) for one in ids):
            raise InputError(
                f"{path}: eos_token_id is {listed!r}; write a token id or a list of them"
            )
        stops |= set(ids)
    return stops
