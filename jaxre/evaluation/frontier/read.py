"""Reads cached predictions of frontier models in any of the published formats.

    cache = read_cache("SemEval_All_ans.json", examples)

The format is recognised from the content: the study's long format (a table with `prompt_hash` or
`example_id`, also from the hub: `hub:Despina/frontier-re-generations`), or one of the JSON formats
of `chatgpt_semeval` and `gpt_conll04`.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from jaxre.errors import InputError
from jaxre.evaluation.frontier import chatgpt_semeval, gpt_conll04
from jaxre.evaluation.frontier.cache import Answer, Cache
from jaxre.evaluation.predictions import as_text, read_table
from jaxre.relations import hub
from jaxre.relations.schema import Example

EXPECTED = (
    "the study's long format (.parquet or .csv with generated_relation and prompt_hash or"
    " example_id), an array of {headEntity, tailEntity, groundTruth, closePred}, or an object with"
    " correct_cases and fail_cases"
)

NAMELESS = "rows without example_id and prompt_hash"
# In place of an answer that it could not get, the study's collector writes this and the reason.
ERROR = "ERROR: "
FAILED = f"requests that failed ({ERROR.strip()} in place of an answer)"


def read_cache(
    place: str | Path, examples: Sequence[Example] | Callable[[], Sequence[Example]] | None = None
) -> Cache:
    """Reads cached answers and, for the JSON formats, joins them to examples.

    Args:
      place: a .parquet, .csv or .json file, or `hub:OWNER/NAME` of a hub dataset in the study's
        long format.
      examples: the whole split that the cache covers, in file order (for CoNLL04 with all entity
        pairs), or a function that loads it. Only JSON caches need it, because they name texts and
        entities.

    Raises:
      InputError: no such file, an unknown format (names the expected formats), a broken entry, no
        examples; for the hub as `hub.download`.
    """
    if str(place).startswith(hub.PREFIX):
        rows = [row for split in hub.download(str(place)).values() for row in split.to_list()]
        return _of_rows(rows, str(place))
    path = Path(place)
    if not path.is_file():
        raise InputError(f"{path}: no such cache of predictions; correct the path of CACHE")
    if path.suffix in (".parquet", ".csv"):
        return _of_rows(read_table(path), str(path))
    unknown = f"{path}: not a cache of predictions that jaxre knows; expected {EXPECTED}"
    if path.suffix != ".json":
        raise InputError(unknown)
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise InputError(f"{path}: not a JSON file: {error}; download it again") from None
    if not document:
        raise InputError(f"{path}: the cache is empty; give one with answers")
    for adapter in (chatgpt_semeval, gpt_conll04):
        if adapter.recognises(document):
            examples = examples() if callable(examples) else examples
            if not examples:
                raise InputError(
                    f"{path}: this cache is joined by text and entities; give the examples of the"
                    " split it covers"
                )
            return adapter.read(document, examples, str(path))
    raise InputError(unknown)


def _of_rows(table: Sequence[dict[str, Any]], place: str) -> Cache:
    """Reads the study's long format. Rows without id and hash, and failed requests, are left
    over.
    """
    if not table:
        raise InputError(f"{place}: the cache is empty; give one with answers")
    if "generated_relation" not in table[0] or not {"prompt_hash", "example_id"} & set(table[0]):
        raise InputError(f"{place}: columns {', '.join(table[0])}; expected {EXPECTED}")
    rows = [
        Answer(
            label=as_text(row["generated_relation"]),
            gold=as_text(row.get("relation")),
            example_id=as_text(row.get("example_id")),
            prompt_hash=as_text(row.get("prompt_hash")),
            dataset=as_text(row.get("eval_dataset_name")),
            model=as_text(row.get("model_id")),
            gen_type=as_text(row.get("gen_type")),
            prompt_shot=_shots(as_text(row.get("prompt_shot"))),
            prompt_style=as_text(row.get("prompt_style")),
            prompt=as_text(row.get("prompt")),
            status=as_text(row.get("status")),
            input_tokens=_count(row.get("input_tokens")),
            output_tokens=_count(row.get("output_tokens")),
            cost_usd=_number(row.get("cost_usd")),
        )
        for row in table
    ]
    leftover: dict[str, list[str]] = {NAMELESS: [], FAILED: []}
    answers = []
    for row in rows:
        if not row.key:
            leftover[NAMELESS].append(row.label)
        elif row.label.startswith(ERROR):
            leftover[FAILED].append(row.key)
        else:
            answers.append(row)
    return Cache(
        place, tuple(answers), {reason: tuple(items) for reason, items in leftover.items() if items}
    )


def _number(value: object) -> float | None:
    """A number of a published table; other tools write missing numbers as NaN."""
    try:
        number = float(as_text(value))
    except ValueError:
        return None
    return number if math.isfinite(number) else None


def _count(value: object) -> int | None:
    """A count of a published table; other tools write 7 as 7.0."""
    number = _number(value)
    return None if number is None else int(number)


def _shots(text: str) -> str:
    """A number of shots; published tables also write 0.0, 0-shot and 0_shot."""
    match = re.fullmatch(r"(\d+)(?:\.0+)?(?:[\s_-]?shots?)?", text.strip(), re.IGNORECASE)
    return match[1] if match else text
