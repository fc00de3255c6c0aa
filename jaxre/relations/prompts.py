"""Formats an example as chat turns: system turn, demonstrations, and the user turn of the example.

    [{"role": "system", ...}, {"role": "user", ...}, {"role": "assistant", "content": "born_in"},
        {"role": "user", ...}]

The answer to the example itself is not included: the model is trained to add it.
"""

from __future__ import annotations

import functools
import string
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence

from jaxre.config import Prompt, read_definitions
from jaxre.errors import InputError
from jaxre.relations.draws import digest
from jaxre.relations.marks import insert_marks, is_text, locate, squeezed, strip_marks
from jaxre.relations.schema import Example

FIELDS = ("text", "marked", "head", "tail", "head_type", "tail_type")

# The text of `prompt.task_definition`.
TASK = (
    "Relation extraction names how two entities of a text are related, the head and the tail. A"
    " relation is read from the head to the tail: what the head is or does with regard to the tail."
    " The same fact read from the tail to the head is another relation, or the same label with the"
    " other direction. Only what the text says counts; where it relates the two in no way of"
    " interest, the label for no relation is right."
)

# Value of {head_type} and {tail_type} for an entity of unknown type.
UNKNOWN_TYPE = "entity"


def turns(
    example: Example, prompt: Prompt, labels: Sequence[str], demonstrations: Sequence[Example] = ()
) -> list[dict[str, str]]:
    """The chat up to and including the user turn of `example`.

    Args:
      example: the example to predict; its relation is not used.
      prompt: templates.
      labels: the schema of the example's dataset, for `prompt.enumerate`.
      demonstrations: each becomes a user and an assistant turn, in this order.
    Raises:
      InputError: a template that cannot be filled, a label without definition.
    """
    system = system_turn(prompt, labels, example.dataset)
    return turns_after(system, example, prompt, demonstrations)


def turns_after(
    system: str | None, example: Example, prompt: Prompt, demonstrations: Sequence[Example] = ()
) -> list[dict[str, str]]:
    """`turns` with a given system turn, which the examples of a dataset share."""
    chat = []
    if system is not None:
        chat.append({"role": "system", "content": system})
    for demonstration in demonstrations:
        chat.append({"role": "user", "content": user_turn(demonstration, prompt)})
        chat.append({"role": "assistant", "content": demonstration.relation})
    return [*chat, {"role": "user", "content": user_turn(example, prompt)}]


def system_turn(prompt: Prompt, labels: Sequence[str], dataset: str = "") -> str | None:
    """The system turn: `prompt.system`, the task definition and the sorted labels, as far as the
    prompt includes them; None if it includes none.

    Args:
      dataset: of the labels, for the definitions that ship with it.
    Raises:
      InputError: a label without definition.
    """
    parts = [] if prompt.system is None else [prompt.system]
    if prompt.task_definition:
        parts.append(TASK)
    if prompt.enumerate:
        parts.append(
            "The answer is exactly one label from this allowed"
            f" set:{_label_list(prompt, sorted(labels), dataset)}"
        )
    return " ".join(parts) if parts else None


def _label_list(prompt: Prompt, labels: Sequence[str], dataset: str) -> str:
    if prompt.label_definitions is None:
        return f" {', '.join(labels)}"
    shipped = prompt.label_definitions == "shipped"
    definitions = _shipped(dataset) if shipped else prompt.label_definitions
    missing = [label for label in labels if label not in definitions]
    if missing:
        origin = f"those shipped for {dataset}" if shipped else "the given ones"
        raise InputError(
            f"prompt.label_definitions: {origin} lack {len(missing)} of {len(labels)} labels (first"
            f" {missing[0]!r}); add them"
        )
    return "".join(f"\n- {label}: {definitions[label]}" for label in labels)


@functools.cache
def _shipped(dataset: str) -> dict[str, str]:
    try:
        return read_definitions(dataset)
    except ValueError:
        raise InputError(
            f"prompt.label_definitions=shipped: no definitions ship for the dataset {dataset}; give"
            " a mapping or a file"
        ) from None


def user_turn(example: Example, prompt: Prompt) -> str:
    """`prompt.user` filled with the example.

    Raises:
      InputError: a field that is not one of `FIELDS`, or a brace without its partner.
    """
    check_template(prompt.user)
    return prompt.user.format(
        text=example.text,
        marked=marked_text(example),
        head=example.head,
        tail=example.tail,
        head_type=example.head_type or UNKNOWN_TYPE,
        tail_type=example.tail_type or UNKNOWN_TYPE,
    )


def check_template(template: str) -> None:
    """Raises InputError, naming `prompt.user`, unless `str.format` can fill it with plain
    `FIELDS`.
    """
    try:
        parts = list(string.Formatter().parse(template))
    except ValueError as error:
        raise InputError(f"prompt.user: {error}; write {{{{ and }}}} for a literal brace") from None
    for _, field, form, conversion in parts:
        if field is None:
            continue
        if field not in FIELDS or form or conversion:
            full = field + (f"!{conversion}" if conversion else "") + (f":{form}" if form else "")
            raise InputError(
                f"prompt.user: unknown field {{{full}}}; the fields are {', '.join(FIELDS)} ({{{{"
                " is a literal brace)"
            )


def marked_text(example: Example) -> str:
    """The text with `<e1>head</e1>` and `<e2>tail</e2>`.

    An entity without a span is marked at its first occurrence (`marks.locate`), or not at all if it
    does not occur. Nested and crossing entities: see `marks.insert_marks`.
    """
    spans = locate(example.text, example.head, example.tail, example.head_span, example.tail_span)
    return insert_marks(example.text, *spans)


def parse_marked(text: str) -> Example:
    """Parses `--text "... <e1>head</e1> ... <e2>tail</e2> ..."` of the command line as an example
    (relation "").

    Raises:
      InputError: a tag that is missing, occurs twice or closes before it opens.
    """
    if not is_text(text):
        raise InputError("--text: is not UTF-8; correct its encoding")
    try:
        plain, head_span, tail_span = strip_marks(text)
    except ValueError as error:
        raise InputError(f"--text: {error}") from None
    return Example.with_spans(
        plain, head_span, tail_span, id="text", dataset="text", split="", relation=""
    )


def by_label(train: Iterable[Example]) -> dict[str, list[Example]]:
    """Groups training examples by label, each list in an order that depends on the ids only.

    The order is by hash, not by id: neighbouring ids are often pairs of one sentence.
    """
    pools = defaultdict(list)
    for example in sorted(train, key=lambda example: digest(example.id)):
        pools[example.relation].append(example)
    return dict(pools)


def choose_demonstrations(
    train: Iterable[Example] | Mapping[str, Sequence[Example]],
    prompt: Prompt,
    seed: int,
    example: Example | None = None,
) -> list[Example]:
    """The `prompt.shots` demonstrations for an example, from the training examples of its dataset.

    They cycle through the labels: each label once before any twice. The order of the labels, and
    the examples of a label, are:
    - `fixed`: drawn by hash from the seed.
    - `stratified`: the most frequent label of `train` first (ties by name), so that few
      demonstrations show the most common answers; the examples are drawn as for `fixed`.
    - `per_example`: drawn by hash from the seed and the example's id.
    No demonstration shares its text (ignoring white space) with the example or with another one.
    With `fixed` and `stratified`, all examples have the same demonstrations, except those whose
    text is among them: they get the next in order, or the prompt would contain their answer.

    Args:
      train: training examples in any order, or `by_label(train)`, which saves the grouping when
        this is called for many examples.
      prompt: sets `shots` and `demonstrations`.
      seed: of the run.
      example: the example to predict; may be None except for `per_example`.
    Raises:
      InputError: fewer training examples with other texts than shots.
      ValueError: `per_example` without an example.
    """
    if prompt.shots == 0:
        return []
    if prompt.demonstrations == "per_example" and example is None:
        raise ValueError("per_example demonstrations need the example")
    pools = train if isinstance(train, Mapping) else by_label(train)
    key = f"{seed}:{example.id}" if prompt.demonstrations == "per_example" else str(seed)
    if prompt.demonstrations == "stratified":
        order = sorted(pools, key=lambda label: (-len(pools[label]), label))
    else:
        order = sorted(pools, key=lambda label: digest(f"{key}:label:{label}"))
    queues = [_rotated(pools[label], f"{key}:start:{label}") for label in order]
    texts = set() if example is None else {squeezed(example.text)}
    chosen: list[Example] = []
    while queues and len(chosen) < prompt.shots:
        for queue in list(queues):
            candidate = next(
                (example for example in queue if squeezed(example.text) not in texts), None
            )
            if candidate is None:
                queues.remove(queue)
            elif len(chosen) < prompt.shots:
                texts.add(squeezed(candidate.text))
                chosen.append(candidate)
    if len(chosen) < prompt.shots:
        raise InputError(
            f"prompt.shots={prompt.shots}: only {len(chosen)} training examples have a text of"
            " their own; lower it"
        )
    return chosen


def _rotated(pool: Sequence[Example], key: str) -> Iterator[Example]:
    """The pool, rotated to a start drawn by the key; lazy, as pools are large."""
    start = digest(key) % len(pool)
    return (pool[(start + step) % len(pool)] for step in range(len(pool)))
