"""The labels of a schema as the tokens that a model would have to write, inside its chat
template.
"""

from __future__ import annotations

from collections.abc import Sequence

from jaxre.data.template import ChatTemplate, Turn
from jaxre.errors import InputError

AnswerTokens = tuple[tuple[int, ...], ...]


def label_answers(
    template: ChatTemplate, questions: Sequence[Sequence[Turn]], labels: Sequence[str]
) -> tuple[list[list[int]], list[AnswerTokens]]:
    """Prompt tokens of each question, and the tokens of each label as its answer, end-of-turn
    included.

    The tokens equal those of `template.encode` on every (question, label). They are found cheaply:
    what the template adds for a label is rendered once per sequence of roles (and compared, on
    every question, for one label in turn), and tokens after the last added token of a prompt depend
    only on the text after it, so each label is tokenised once per such tail. Where a prompt has no
    added token, or the comparison fails, the question is tokenised in full with every label.

    Args:
      questions: the turns of each example, up to and including the question.
      labels: the schema.

    Returns:
      N lists of token ids; for each example as many tuples as labels (one object for equal
      answers).

    Raises:
      InputError: an empty label, one that holds an added token of the tokenizer, two labels that
        the template makes the same, or a faulty template.
    """
    added = sorted(
        {str(token) for token in template.tokenizer.added_tokens_decoder.values()},
        key=len,
        reverse=True,
    )
    _check_labels(labels, added)
    if not questions:
        return [], []
    supervised: dict[
        tuple[str, ...], list[str]
    ] = {}  # roles -> what the template adds for each label
    prompts, alike = [], []
    for number, question in enumerate(questions):
        roles = tuple(turn["role"] for turn in question)
        if roles not in supervised:
            supervised[roles] = [template.split(question, label)[1] for label in labels]
        sample = number % len(labels)
        prompt, text = template.split(question, labels[sample])
        prompts.append(prompt)
        alike.append(text == supervised[roles][sample])
    tokens = template.tokenize(prompts)
    known: dict[tuple[str, tuple[str, ...]], tuple[list[int], AnswerTokens] | None] = {}
    answers = []
    for question, prompt, ids, same in zip(questions, prompts, tokens, alike, strict=True):
        tail = template.tail(prompt)
        found = None
        if tail is not None and same:
            roles = tuple(turn["role"] for turn in question)
            if (tail, roles) not in known:
                known[tail, roles] = _after_tail(template, tail, supervised[roles], labels)
            found = known[tail, roles]
        if found is not None and ids[-len(found[0]) :] == found[0]:
            answers.append(found[1])
        else:
            encoded = template.encode([(question, label) for label in labels])
            answers.append(
                _distinct(template, [one.tokens[one.prompt_length :] for one in encoded], labels)
            )
    return tokens, answers


def _after_tail(
    template: ChatTemplate, tail: str, supervised: Sequence[str], labels: Sequence[str]
) -> tuple[list[int], AnswerTokens] | None:
    """Tokens of a tail, and of each answer after it; None if the tail's tokens do not begin all of
    them.
    """
    found = [template.continued(tail, text) for text in supervised]
    if any(one is None for one in found):
        return None
    return found[0][0], _distinct(template, [answer for _, answer in found], labels)


def _distinct(
    template: ChatTemplate, answers: Sequence[Sequence[int]], labels: Sequence[str]
) -> AnswerTokens:
    """Answers cut after the end of the turn. Raises InputError if two are the same."""
    owners: dict[tuple[int, ...], str] = {}
    for label, answer in zip(labels, answers, strict=True):
        ids = tuple(answer[: template.end_of_turn(answer)])
        if ids in owners:
            raise InputError(
                f"{template.place}: the labels {owners[ids]!r} and {label!r} are the same inside"
                " the chat template; rename one"
            )
        owners[ids] = label
    return tuple(owners)


def _check_labels(labels: Sequence[str], added: Sequence[str]) -> None:
    if not labels:
        raise InputError("the schema has no label; give data.labels or a training split")
    for label in labels:
        if not label.strip():
            raise InputError(f"the schema has an empty label ({label!r}); name it in data.labels")
        for token in added:
            if token in label:
                raise InputError(
                    f"the label {label!r} holds {token!r}, which the tokenizer reads as a control"
                    " token; rename it"
                )
