"""What providers answer: result files of any of the three interfaces, as one outcome per request.

    collected = collect(manifest, ["output.jsonl", "errors.jsonl"])
    collected.kept["jaxre-..."].text

Read are OpenAI's batch output and error files, Anthropic's message batch results, and chat
completions stored as `{"custom_id", "response"}` (or with the id beside their own fields), as JSON
Lines or a JSON array, in any order. The form is told from each record. Nothing is guessed: what is
no answer is an error with its reason.

One request answered twice: an answer counts more than an error (a request may be sent again); of
two different answers the first is kept, in the order in which the files were given, and the request
is listed.
"""

from __future__ import annotations

import datetime
import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from jaxre.errors import InputError
from jaxre.evaluation.credentials import refuse_credentials
from jaxre.evaluation.frontier_requests import Manifest
from jaxre.relations.files import read_lines, read_text

LONGEST_REASON = 80
# What finish_reason and stop_reason say of an answer that was cut, and of one that was withheld.
_CUT = frozenset({"length", "max_tokens", "model_context_window_exceeded"})
_WITHHELD = frozenset({"content_filter", "refusal"})


@dataclass(frozen=True)
class Outcome:
    """What became of a request. `reason` says why an error is one; tokens and cost are None where
    the file does not state them.
    """

    kind: Literal["answer", "refusal", "error"]
    text: str = ""
    truncated: bool = False
    reason: str = ""
    model: str = ""
    date: str = ""
    input_tokens: int | None = None
    output_tokens: int | None = None
    cost_usd: float | None = None


@dataclass(frozen=True)
class Collected:
    """`kept`: custom id -> its outcome. The rest is an account of what was left out."""

    kept: dict[str, Outcome]
    records: int
    unknown: tuple[str, ...]  # ids that the manifest does not have
    repeated: tuple[str, ...]  # answered again with the same text
    contradicted: tuple[str, ...]  # answered again with another text; the first is kept
    missing: tuple[str, ...]  # ids of the manifest that no file has
    outcomes: tuple[Outcome, ...]  # every one that belongs to the manifest: all were paid for


def collect(manifest: Manifest, paths: Sequence[str | Path]) -> Collected:
    """Reads result files and sorts their records by request.

    Raises:
      InputError: a file that is missing, empty, or no result file; a file given twice; a record
        without an id; what looks like a key of a provider; no record of this manifest at all.
    """
    # By their bytes: under another name too, a file read twice would count what its answers cost
    # twice.
    seen: dict[str, Path] = {}
    for path in map(Path, paths):
        read = hashlib.sha256(read_text(path).encode()).hexdigest()
        if read in seen:
            raise InputError(
                f"{path}: is given twice (also as {seen[read]}); give each result file once"
            )
        seen[read] = path
    known = {request.custom_id for request in manifest.requests}
    kept: dict[str, Outcome] = {}
    unknown, repeated, contradicted, outcomes = [], [], [], []
    records = 0
    for path in paths:
        for place, record in _records(Path(path)):
            records += 1
            refuse_credentials(record, place)
            name = _id_of(record, known, place)
            if name not in known:
                unknown.append(name)
                continue
            outcome = outcome_of(record, place)
            outcomes.append(outcome)
            before = kept.get(name)
            if before is None or (before.kind == "error" and outcome.kind != "error"):
                kept[name] = outcome
            elif outcome.kind != "error":
                same = (before.kind, before.text) == (outcome.kind, outcome.text)
                (repeated if same else contradicted).append(name)
    if not outcomes:
        example = f"such as {unknown[0]!r}" if unknown else "none"
        raise InputError(
            f"{paths[0]}: none of its {records:,} records ({example}) belongs to the manifest; give"
            " the results of its requests"
        )
    missing = tuple(
        request.custom_id for request in manifest.requests if request.custom_id not in kept
    )
    return Collected(
        kept,
        records,
        _distinct(unknown),
        _distinct(repeated),
        _distinct(contradicted),
        missing,
        tuple(outcomes),
    )


def outcome_of(record: dict[str, Any], place: str) -> Outcome:
    """The outcome in a record of any of the known forms. Raises InputError for another form."""
    if isinstance(record.get("result"), dict):
        return _message_batch(record["result"])
    if "params" in record or ("body" in record and "response" not in record):
        raise InputError(
            f"{place}: is a request and no answer; give the files that the provider sent back"
        )
    if record.get("error"):
        return Outcome("error", reason=_reason(record["error"]))
    response = record.get("response", record if "choices" in record else None)
    if response is None:
        return Outcome("error", reason="no response")
    if not isinstance(response, dict):
        raise InputError(
            f"{place}: its response is {type(response).__name__}, not an object; store what the"
            " provider sent back as it came"
        )
    status = response.get("status_code", 200)
    body = response.get("body", response)
    if not isinstance(body, dict):
        return Outcome("error", reason=f"status {status}: no JSON object")
    if body.get("error") or status != 200:
        return Outcome(
            "error",
            reason=(
                f"status {status}: {_reason(body.get('error'))}"
                if status != 200
                else _reason(body["error"])
            ),
        )
    return _message(body) if body.get("type") == "message" else _completion(body)


def _completion(body: dict[str, Any]) -> Outcome:
    """A chat completion of OpenAI's form."""
    choices = body.get("choices")
    choice = (
        choices[0]
        if isinstance(choices, list) and choices and isinstance(choices[0], dict)
        else None
    )
    if choice is None or not isinstance(choice.get("message"), dict):
        return Outcome("error", reason="no choice in the response")
    finish, message = choice.get("finish_reason"), choice["message"]
    if choice.get("error") or finish == "error":
        return Outcome("error", reason=_reason(choice.get("error")))
    usage = body.get("usage") if isinstance(body.get("usage"), dict) else {}
    facts = {
        "model": _text(body.get("model")),
        "date": _day(body.get("created")),
        "input_tokens": _whole(usage.get("prompt_tokens", usage.get("input_tokens"))),
        "output_tokens": _whole(usage.get("completion_tokens", usage.get("output_tokens"))),
        "cost_usd": _amount(usage.get("cost")),
    }
    text, refusal = _text(message.get("content")), _text(message.get("refusal"))
    if refusal or finish in _WITHHELD:
        return Outcome("refusal", refusal or text, **facts)
    return _answer(text, finish in _CUT, facts)


def _message_batch(result: dict[str, Any]) -> Outcome:
    """One result of an Anthropic message batch."""
    kind, message = result.get("type"), result.get("message")
    if kind != "succeeded":
        return Outcome(
            "error",
            reason=_reason(result["error"]) if result.get("error") else _text(kind) or "no type",
        )
    return (
        _message(message)
        if isinstance(message, dict)
        else Outcome("error", reason="no message in the result")
    )


def _message(message: dict[str, Any]) -> Outcome:
    """A message of Anthropic's form; thinking and other blocks are no part of the answer."""
    usage = message.get("usage") if isinstance(message.get("usage"), dict) else {}
    read = [
        _whole(usage.get(name))
        for name in ("input_tokens", "cache_creation_input_tokens", "cache_read_input_tokens")
    ]
    facts = {
        "model": _text(message.get("model")),
        "input_tokens": None if read[0] is None else sum(tokens or 0 for tokens in read),
        "output_tokens": _whole(usage.get("output_tokens")),
        "cost_usd": _amount(usage.get("cost")),
    }
    text, stop = _text(message.get("content")), message.get("stop_reason")
    return (
        Outcome("refusal", text, **facts)
        if stop in _WITHHELD
        else _answer(text, stop in _CUT, facts)
    )


def _answer(text: str, truncated: bool, facts: dict[str, Any]) -> Outcome:
    if truncated and not text.strip():
        # A model that reasons can spend all its tokens before the first word. The study scores an
        # empty answer as "none".
        return Outcome(
            "error", reason="cut before the first word of the answer (raise --max-tokens)", **facts
        )
    return Outcome("answer", text, truncated, **facts)


def _records(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """(place, record) of a JSON Lines file, or of one JSON array."""
    text = read_text(path)
    if text.lstrip().startswith("["):
        found = _parsed(text, str(path))
        numbered = [
            (f"{path}: entry {number}", record) for number, record in enumerate(found, start=1)
        ]
    else:
        lines = enumerate(read_lines(path), start=1)
        numbered = (
            (f"{path}:{number}", _parsed(line, f"{path}:{number}"))
            for number, line in lines
            if line.strip()
        )
    for place, record in numbered:
        if not isinstance(record, dict):
            raise InputError(
                f"{place}: not a JSON object; give the result files as the provider sent them"
            )
        yield place, record


def _parsed(text: str, place: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):  # not quoted: it may hold a key
        raise InputError(
            f"{place}: not valid JSON; give the result files as the provider sent them, whole"
        ) from None


def _id_of(record: dict[str, Any], known: set[str], place: str) -> str:
    for field in ("custom_id", "id"):
        name = record.get(field)
        if isinstance(name, str) and name and (field == "custom_id" or name in known):
            return name
    raise InputError(f"{place}: no custom_id; store each answer with the custom_id of its request")


def _reason(error: Any) -> str:
    """The name of an error (it has no space), without its text: texts hold parts of prompts and of
    keys.
    """
    while isinstance(error, dict) and isinstance(error.get("error"), dict):
        error = error["error"]
    if isinstance(error, dict):
        error = next((str(error[name]) for name in ("code", "type") if error.get(name)), "")
    name = str(error or "")
    return name[:LONGEST_REASON] if len(name.split()) == 1 else "error without a name"


def _text(value: Any) -> str:
    """Text, or the text parts of a list of content blocks."""
    if isinstance(value, list):
        return "".join(
            _text(part.get("text"))
            for part in value
            if isinstance(part, dict) and part.get("type") in ("text", "output_text")
        )
    # Half a surrogate pair cannot be written as UTF-8.
    return value.encode("utf-8", "replace").decode("utf-8") if isinstance(value, str) else ""


def _whole(value: Any) -> int | None:
    return (
        value
        if isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**63
        else None
    )


def _amount(value: Any) -> float | None:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    return float(value) if number and 0 <= value < 1e15 else None  # NaN is neither


def _day(created: Any) -> str:
    """The UTC day of a Unix time; empty if there is none."""
    seconds = _amount(created)
    if not seconds or seconds >= 253_402_300_800:  # the year 10,000
        return ""
    return datetime.datetime.fromtimestamp(seconds, datetime.UTC).date().isoformat()


def _distinct(names: list[str]) -> tuple[str, ...]:
    """Sorted, so that an account does not hang on the order of the results."""
    return tuple(sorted(set(names)))
