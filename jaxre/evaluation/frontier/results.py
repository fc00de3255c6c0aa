"""Reads result files of providers, of any of the three interfaces, as one outcome per request.

    collected = collect(manifest, ["output.jsonl", "errors.jsonl"])
    collected.kept["jaxre-..."].text

The files are OpenAI's batch output and error files, Anthropic's message batch results, and chat
completions stored as `{"custom_id", "response"}` (or with the id among their own fields), as JSON
Lines or a JSON array, in any order. The form is recognised from each record. Nothing is guessed:
everything that is not an answer is an error with its reason.

If a request has several records, an answer replaces an error (a request may be sent again); of two
different answers the first counts, in the order of the files, and the request is listed.
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
from jaxre.evaluation.frontier.credentials import refuse_credentials
from jaxre.evaluation.frontier.requests import Manifest
from jaxre.relations.files import read_lines, read_text

LONGEST_REASON = 80
# Values of finish_reason and stop_reason for truncated and for withheld answers.
_CUT = frozenset({"length", "max_tokens", "model_context_window_exceeded"})
_WITHHELD = frozenset({"content_filter", "refusal"})


@dataclass(frozen=True)
class Outcome:
    """Outcome of a request. reason: of an error; tokens and cost are None if the file does not
    state them.
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
    """kept: custom id -> outcome. The other fields list what was left out."""

    kept: dict[str, Outcome]
    records: int
    unknown: tuple[str, ...]  # ids that are not in the manifest
    repeated: tuple[str, ...]  # answered again with the same text
    contradicted: tuple[str, ...]  # answered again with another text; the first counts
    missing: tuple[str, ...]  # ids of the manifest that are in no file
    outcomes: tuple[Outcome, ...]  # all of the manifest, repeated ones too: all were paid for


def collect(manifest: Manifest, paths: Sequence[str | Path]) -> Collected:
    """Reads result files and sorts their records by request.

    Raises:
      InputError: a file that is missing, empty, or not a result file; the same file twice; a record
        without an id; something like a key of a provider; no record of this manifest.
    """
    # Compares contents: a file read twice, also under another name, would double its costs.
    seen: dict[str, Path] = {}
    for path in map(Path, paths):
        digest = hashlib.sha256(read_text(path).encode()).hexdigest()
        if digest in seen:
            raise InputError(
                f"{path}: is given twice (also as {seen[digest]}); give each result file once"
            )
        seen[digest] = path
    known = {request.custom_id for request in manifest.requests}
    kept: dict[str, Outcome] = {}
    unknown, repeated, contradicted, outcomes = [], [], [], []
    records = 0
    for path in paths:
        for place, record in _records(Path(path)):
            records += 1
            refuse_credentials(record, place)
            custom_id = _id_of(record, known, place)
            if custom_id not in known:
                unknown.append(custom_id)
                continue
            outcome = outcome_of(record, place)
            outcomes.append(outcome)
            before = kept.get(custom_id)
            if before is None or (before.kind == "error" and outcome.kind != "error"):
                kept[custom_id] = outcome
            elif outcome.kind != "error":
                same = (before.kind, before.text) == (outcome.kind, outcome.text)
                (repeated if same else contradicted).append(custom_id)
    if not outcomes:
        example = f"such as {unknown[0]!r}" if unknown else "none"
        raise InputError(
            f"{paths[0]}: none of its {records:,} records ({example}) belongs to the manifest; give"
            " the results of its requests"
        )
    missing = tuple(
        request.custom_id for request in manifest.requests if request.custom_id not in kept
    )
    # Sorted, so that the account does not depend on the order of the results.
    return Collected(
        kept=kept,
        records=records,
        unknown=tuple(sorted(set(unknown))),
        repeated=tuple(sorted(set(repeated))),
        contradicted=tuple(sorted(set(contradicted))),
        missing=missing,
        outcomes=tuple(outcomes),
    )


def outcome_of(record: dict[str, Any], place: str) -> Outcome:
    """Outcome in a record of any known form. Raises InputError for other forms."""
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
        reason = _reason(body.get("error"))
        return Outcome("error", reason=reason if status == 200 else f"status {status}: {reason}")
    return _message(body) if body.get("type") == "message" else _completion(body)


def _completion(body: dict[str, Any]) -> Outcome:
    """Outcome of a chat completion in OpenAI's form."""
    choices = body.get("choices")
    choice = choices[0] if isinstance(choices, list) and choices else None
    if not isinstance(choice, dict) or not isinstance(choice.get("message"), dict):
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
    """Outcome of one result of an Anthropic message batch."""
    kind, message = result.get("type"), result.get("message")
    if kind != "succeeded":
        reason = _reason(result["error"]) if result.get("error") else _text(kind) or "no type"
        return Outcome("error", reason=reason)
    if not isinstance(message, dict):
        return Outcome("error", reason="no message in the result")
    return _message(message)


def _message(message: dict[str, Any]) -> Outcome:
    """Outcome of a message in Anthropic's form; its answer is the text blocks, without thinking."""
    usage = message.get("usage") if isinstance(message.get("usage"), dict) else {}
    inputs = [
        _whole(usage.get(name))
        for name in ("input_tokens", "cache_creation_input_tokens", "cache_read_input_tokens")
    ]
    facts = {
        "model": _text(message.get("model")),
        "input_tokens": None if inputs[0] is None else sum(tokens or 0 for tokens in inputs),
        "output_tokens": _whole(usage.get("output_tokens")),
        "cost_usd": _amount(usage.get("cost")),
    }
    text, stop = _text(message.get("content")), message.get("stop_reason")
    if stop in _WITHHELD:
        return Outcome("refusal", text, **facts)
    return _answer(text, stop in _CUT, facts)


def _answer(text: str, truncated: bool, facts: dict[str, Any]) -> Outcome:
    if truncated and not text.strip():
        # A reasoning model can spend all its tokens before the first word; the study would score
        # the empty answer as "none".
        return Outcome(
            "error", reason="cut before the first word of the answer (raise --max-tokens)", **facts
        )
    return Outcome("answer", text, truncated, **facts)


def _records(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yields (place, record) of a JSON Lines file, or of one JSON array."""
    text = read_text(path)
    if text.lstrip().startswith("["):
        entries = enumerate(_parsed(text, str(path)), start=1)
        numbered = ((f"{path}: entry {number}", record) for number, record in entries)
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
    """Name of an error (a single word), without its text, which can quote prompts and keys."""
    while isinstance(error, dict) and isinstance(error.get("error"), dict):
        error = error["error"]
    if isinstance(error, dict):
        error = next((str(error[name]) for name in ("code", "type") if error.get(name)), "")
    name = str(error or "")
    return name[:LONGEST_REASON] if len(name.split()) == 1 else "error without a name"


def _text(value: Any) -> str:
    """A text, or the text parts of a list of content blocks."""
    if isinstance(value, list):
        return "".join(
            _text(part.get("text"))
            for part in value
            if isinstance(part, dict) and part.get("type") in ("text", "output_text")
        )
    # Half a surrogate pair cannot be written as UTF-8.
    return value.encode("utf-8", "replace").decode("utf-8") if isinstance(value, str) else ""


def _whole(value: Any) -> int | None:
    number = isinstance(value, int) and not isinstance(value, bool)
    return value if number and 0 <= value < 2**63 else None


def _amount(value: Any) -> float | None:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    return float(value) if number and 0 <= value < 1e15 else None  # NaN is neither


def _day(created: Any) -> str:
    """UTC day of a Unix time; empty if there is none."""
    seconds = _amount(created)
    if not seconds or seconds >= 253_402_300_800:  # the year 10,000
        return ""
    return datetime.datetime.fromtimestamp(seconds, datetime.UTC).date().isoformat()
