"""ChatGPT's published answers on the SemEval-2010 Task 8 test split (pkuserc/ChatGPT_for_IE, 2023,
zero-shot).

`SemEval_All_ans.json` is an array of `{headEntity, tailEntity, groundTruth, closePred, ...}`; the
sentence is blank and `idx` is not a SemEval id. Its 2,717 entries are grouped by directed gold
label; groups are in the order in which the labels first occur in the test file, and entries of a
group in the order of that file. In this order gold labels agree in all 2,717 places, names in
2,575, names without spacing and punctuation in 2,715, and one of the two names in the other two
("acaisson", "continuumbath": a neighbouring word is attached to the name). So every entry has a
proven join: by its key if the key is unique, by position if several entries share a key.

Labels have no direction and no hyphen (`Cause Effect`); compare with
configs/labels/semeval-undirected.yaml.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

from jaxre.errors import InputError
from jaxre.evaluation.frontier.cache import (
    POSITION,
    SAME_ANSWER,
    Answer,
    Cache,
    how_joined,
    join_cached,
    squash,
)
from jaxre.evaluation.metrics.scores import undirected
from jaxre.relations.schema import Example

MODEL = "ChatGPT (2023, zero-shot)"
SEVERAL = "several items share names and gold label"
MISSING = "names and gold label have no counterpart"
FIELDS = ("headEntity", "tailEntity", "groundTruth", "closePred")


def recognises(document: object) -> bool:
    """Recognises this format in parsed JSON."""
    return isinstance(document, list) and all(
        isinstance(entry, dict) and set(FIELDS) <= set(entry) for entry in document
    )


def read(document: list[dict], examples: Sequence[Example], place: str) -> Cache:
    """Joins the cached entries to examples.

    Args:
      document: the parsed array.
      examples: of the SemEval-2010 Task 8 test split, in file order. Only the whole split proves
        positions; with a part of it, entries whose key is not unique are left over.
      place: the file, for messages.

    Raises:
      InputError: a field is not text.
    """
    for number, entry in enumerate(document):
        if not all(isinstance(entry[name], str) for name in FIELDS):
            raise InputError(
                f"{place}: entry {number}: {', '.join(FIELDS)} must be text; is this"
                " SemEval_All_ans.json?"
            )
    examples = _grouped(examples)
    ours = [
        _keys(example.head, example.tail, undirected(example.relation).replace("-", " "))
        for example in examples
    ]
    cached = [
        _keys(entry["headEntity"], entry["tailEntity"], entry["groundTruth"]) for entry in document
    ]

    def agree(i: int, j: int) -> bool:
        (head, tail, gold), (their_head, their_tail, their_gold) = ours[i][1], cached[j][1]
        return gold == their_gold and (head == their_head or tail == their_tail)

    joins = join_cached(ours, cached, [entry["closePred"] for entry in document], agree)
    how = how_joined(joins)
    joined = {j for j, _ in joins.values()}
    our_keys, cached_keys = {keys[1] for keys in ours}, {keys[1] for keys in cached}
    leftover: dict[str, list[str]] = {}
    for j, entry in enumerate(document):
        if j not in joined:
            item = f"{entry['headEntity']} / {entry['tailEntity']} / {entry['groundTruth']}"
            leftover.setdefault(SEVERAL if cached[j][1] in our_keys else MISSING, []).append(item)
    return Cache(
        place=place,
        answers=tuple(
            Answer(
                label=document[j]["closePred"].strip(),
                gold=document[j]["groundTruth"].strip(),
                example_id=examples[i].id,
                model=MODEL,
            )
            for i, (j, _) in sorted(joins.items())
        ),
        leftover={reason: tuple(items) for reason, items in leftover.items()},
        uncovered={
            example.id: SEVERAL if keys[1] in cached_keys else MISSING
            for i, (example, keys) in enumerate(zip(examples, ours, strict=True))
            if i not in joins
        },
        notes=(
            (
                f"{MODEL}: joined {how['key 1']:,} by names and gold label, {how['key 2']:,} more"
                f" without spacing and punctuation, {how[POSITION]:,} by their place in the file"
                f" (proven by all others), {how[SAME_ANSWER]:,} whose candidates all carry the same"
                " answer"
            ),
            "its labels have no direction",
        ),
    )


def _grouped(examples: Sequence[Example]) -> list[Example]:
    """Examples in the order of the cache: by gold label, labels in order of first occurrence."""
    groups = defaultdict(list)
    for example in examples:
        groups[example.relation].append(example)
    return [example for group in groups.values() for example in group]


def _keys(head: str, tail: str, gold: str) -> tuple[tuple[str, str, str], ...]:
    return (head, tail, gold.strip()), (squash(head), squash(tail), squash(gold))
