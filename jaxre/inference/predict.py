"""Examples to prediction rows: exact label scoring, the search for the best label, or greedy
decoding.

loaded = open_model("runs/quickstart", compute_dtype("auto"))
rows = predict_examples(loaded, examples, labels, config.prompt, config.predict)
write_predictions("runs/quickstart/predictions/test", rows)
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
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
from jaxre.inference.decoding import clean_answer, decode
from jaxre.inference.model import Model
from jaxre.inference.scoring import plan_scoring, probabilities, run_scoring
from jaxre.inference.search import best_labels, no_number
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
    demonstrations: Callable[[Example], list[Example]] = lambda example: [],
    tuned_dataset_name: str = "",
    model_shot: str = "0",
    advance: Callable[[int], None] = lambda examples: None,
) -> list[Prediction]:
    """One row per example, in order.

    Args:
      labels: the schema.
      demonstrations: of an example, as `jaxre.data.tokens.demonstrator` makes them.
      mode: "score" gives the most probable label of the schema, and all probabilities; "best" that
        label alone; "generate" what the model writes, cleaned, whether or not it is a label.
      tuned_dataset_name, model_shot: what the model was tuned on and with how many shots, for the
        study's columns.
      advance: told how many examples each finished batch had.

    Returns:
      Rows whose `score` is the log-probability of the predicted label (or text) with its
      end-of-turn token; `prompt` is the text the model read.

    Raises:
      InputError: no example, a prompt that does not fit, labels that cannot be told apart, a faulty
        template.
    """
    if not examples:
        raise InputError("there is no example to predict; is the split empty?")
    if isinstance(loaded.architecture, EncoderArchitecture):
        return _predict_labels(
            loaded, examples, labels, settings, mode, tuned_dataset_name, advance
        )
    template = ChatTemplate(load_tokenizer(loaded.folder), prompt.date, str(loaded.folder))
    questions = questions_of(examples, prompt, labels, demonstrations)
    texts = [template.render(question, generation=True) for question in questions]
    names = [example.id for example in examples]
    model = model_of(loaded)
    if mode != "generate":
        tokens, answers = label_answers(template, questions, labels)
        check_vocabulary(
            max(max(ids) for one in (tokens, *answers) for ids in one), loaded.architecture
        )
        run = {"batch_tokens": settings.batch_tokens, "names": names}
        if mode == "best":
            best, scores = best_labels(model, tokens, answers, **run, advance=advance)
            shares = None
        else:
            every = run_scoring(
                model, plan_scoring(tokens, answers, loaded.architecture, **run), advance=advance
            )
            _check_numbers(every.max(axis=1), names)
            best, scores, shares = every.argmax(axis=1), every.max(axis=1), probabilities(every)
        found = [
            {
                "generated_relation": labels[choice],
                "score": score,
                "probabilities": (
                    None if shares is None else dict(zip(labels, shares[i].tolist(), strict=True))
                ),
                "output_tokens": len(answers[i][choice]),
            }
            for i, (choice, score) in enumerate(zip(best.tolist(), scores.tolist(), strict=True))
        ]
    else:
        tokens = template.tokenize(texts)
        check_vocabulary(max(map(max, tokens)), loaded.architecture)
        stops = stop_ids(template, questions[0], loaded.folder)
        written = decode(
            model,
            tokens,
            stops,
            settings.max_new_tokens,
            batch_tokens=settings.batch_tokens,
            names=names,
            advance=advance,
        )
        _check_numbers([one.score for one in written], names)
        plain = template.tokenizer.batch_decode(
            [one.tokens for one in written], skip_special_tokens=True
        )
        found = [
            {
                "generated_relation": clean_answer(text),
                "score": one.score,
                "output_tokens": len(one.tokens),
                "status": "" if one.tokens[-1] in stops else "truncated",
            }
            for text, one in zip(plain, written, strict=True)
        ]
    return [
        Prediction(
            example_id=example.id,
            relation=example.relation,
            eval_dataset_name=example.dataset,
            gen_type="gen_constrained" if prompt.enumerate else "gen_open",
            model_id=loaded.name,
            tuned_dataset_name=tuned_dataset_name,
            model_shot=model_shot,
            prompt_shot=str(prompt.shots),
            prompt=text,
            prompt_hash=example.prompt_hash or hash_prompt(text),
            input_tokens=len(ids),
            **row,
        )
        for example, text, ids, row in zip(examples, texts, tokens, found, strict=True)
    ]


def _predict_labels(
    loaded: Loaded,
    examples: Sequence[Example],
    labels: Sequence[str],
    settings: Predict,
    mode: str,
    tuned_dataset_name: str,
    advance: Callable[[int], None],
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
    # whatever the gold labels
    asked = dataclasses.replace(tokens, labels=np.zeros(len(tokens), np.int32))
    plan = plan_classification(asked, architecture, batch_tokens=settings.batch_tokens)
    scores = run_classification(jax.tree.map(jnp.asarray, loaded.base), architecture, plan, advance)
    _check_numbers(scores.max(axis=1), tokens.ids)
    scores = scores[:, [architecture.labels.index(label) for label in labels]]
    shares = probabilities(scores)
    return [
        Prediction(
            example_id=example.id,
            relation=example.relation,
            eval_dataset_name=example.dataset,
            model_id=loaded.name,
            tuned_dataset_name=tuned_dataset_name,
            prompt=text,
            prompt_hash=example.prompt_hash or hash_prompt(text),
            generated_relation=labels[best],
            score=float(score[best]),
            probabilities=dict(zip(labels, share.tolist(), strict=True)),
            input_tokens=int(length),
        )
        for example, text, score, share, best, length in zip(
            examples,
            texts,
            scores,
            shares,
            scores.argmax(axis=1).tolist(),
            tokens.lengths,
            strict=True,
        )
    ]


def _check_numbers(scores: Sequence[float], names: Sequence[str]) -> None:
    """Raises InputError, as the search does, for a score that is no number: its label would be that
    of the first place.
    """
    for name, score in zip(names, scores, strict=True):
        if score != score:
            raise InputError(no_number(name))


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
