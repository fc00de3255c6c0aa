"""Stand-ins for the three providers: they take request files as strictly as documented and write
result files in their own form.
"""

from __future__ import annotations

import json
import random
import re
from collections.abc import Callable, Sequence
from pathlib import Path

CREATED = 1_767_225_600  # 2026-01-01, UTC

# What a fake model does with a question: text and how it stops. "error" and "expired" have no text,
# None is left out.
Reply = tuple[str, str] | None


def take(provider: str, path: Path) -> list[tuple[str, list[dict], dict]]:
    """(custom id, chat turns, parameters) of each request of a file; a request that the provider
    would refuse is an AssertionError.
    """
    text = path.read_text(encoding="utf-8")
    assert text.isascii()
    if provider == "anthropic":
        body = json.loads(text)
        assert set(body) == {"requests"}
        records = body["requests"]
    else:
        records = [json.loads(line) for line in text.splitlines()]
    taken = []
    for record in records:
        name = record.pop("custom_id")
        assert re.fullmatch(r"[a-zA-Z0-9_-]{1,64}", name)
        if provider == "openai":
            assert (record.pop("method"), record.pop("url")) == ("POST", "/v1/chat/completions")
        [(field, body)] = record.items()
        assert field == ("params" if provider == "anthropic" else "body")
        turns = body.pop("messages")
        if provider == "anthropic":
            assert all(turn["role"] != "system" for turn in turns)
            if "system" in body:
                turns = [{"role": "system", "content": body.pop("system")}, *turns]
        chat = [turn for turn in turns if turn["role"] != "system"]
        assert [turn["role"] for turn in chat] == ["user", "assistant"] * (len(chat) // 2) + [
            "user"
        ]
        assert all(set(turn) == {"role", "content"} and turn["content"].strip() for turn in turns)
        assert set(body) <= {
            "model",
            "temperature",
            "max_completion_tokens" if provider == "openai" else "max_tokens",
        }
        taken.append((name, turns, body))
    assert len({name for name, _, _ in taken}) == len(taken)
    return taken


def result(provider: str, name: str, reply: tuple[str, str], model: str = "big-1-0901") -> dict:
    """One record of a result file."""
    text, stop = reply
    if provider == "anthropic":
        if stop in ("error", "expired"):
            error = {
                "type": "errored",
                "error": {"type": "error", "error": {"type": "overloaded", "message": "busy"}},
            }
            return {"custom_id": name, "result": error if stop == "error" else {"type": "expired"}}
        message = {
            "id": "msg_1",
            "type": "message",
            "role": "assistant",
            "model": model,
            "content": [{"type": "text", "text": text}] if text else [],
            "stop_reason": {"stop": "end_turn", "cut": "max_tokens", "refusal": "refusal"}[stop],
            "stop_sequence": None,
            "usage": {
                "input_tokens": 90,
                "cache_creation_input_tokens": 0,
                "cache_read_input_tokens": 10,
                "output_tokens": 5,
            },
        }
        return {"custom_id": name, "result": {"type": "succeeded", "message": message}}
    if stop == "expired":
        record = {
            "custom_id": name,
            "response": None,
            "error": {"code": "batch_expired", "message": "late"},
        }
        return (
            record if provider == "openai" else record | {"error": {"code": 408, "message": "late"}}
        )
    message = {
        "role": "assistant",
        "content": None if stop == "refusal" else text,
        "refusal": text if stop == "refusal" else None,
    }
    finish = {"stop": "stop", "cut": "length", "refusal": "stop" if text else "content_filter"}.get(
        stop
    )
    usage = {"prompt_tokens": 100, "completion_tokens": 5, "total_tokens": 105} | (
        {"cost": 0.25} if provider == "openrouter" else {}
    )
    body = {
        "id": "gen-1",
        "object": "chat.completion",
        "created": CREATED,
        "model": model,
        "usage": usage,
    }
    body["choices"] = [{"index": 0, "message": message, "logprobs": None, "finish_reason": finish}]
    if stop == "error":
        body = {"error": {"message": "busy", "type": "server_error", "code": "overloaded"}}
    if provider == "openrouter":
        return {"custom_id": name, "response": body}
    response = {"status_code": 503 if stop == "error" else 200, "request_id": "r-1", "body": body}
    return {"id": "batch_req_1", "custom_id": name, "response": response, "error": None}


def answer_files(
    provider: str,
    requests: Sequence[Path],
    folder: Path,
    model: Callable[[str], Sequence[Reply]],
    seed: int = 0,
) -> list[Path]:
    """Result files with the replies of `model` to the last turn of each request, shuffled; for
    openai the failed ones in a second file.
    """
    good, bad = [], []
    for path in requests:
        for name, turns, _ in take(provider, path):
            for reply in model(turns[-1]["content"]):
                if reply is not None:
                    (
                        bad if provider == "openai" and reply[1] in ("error", "expired") else good
                    ).append(result(provider, name, reply))
    files = []
    for number, records in enumerate((good, bad)):
        # Repeated answers keep their order in the file.
        names = sorted({record["custom_id"] for record in records})
        place = {
            name: number
            for number, name in enumerate(random.Random(seed).sample(names, len(names)))
        }
        records.sort(key=lambda record: place[record["custom_id"]])
        if records:
            files.append(folder / f"results-{number}.jsonl")
            files[-1].write_text(
                "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records),
                encoding="utf-8",
            )
    return files
