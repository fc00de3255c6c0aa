"""Request files for frontier models, and the manifest that says which examples each request
answers.

    manifest = build_manifest(examples, questions, ask, dataset=..., ...)
    paths = write_requests("requests/facts.jsonl", manifest)
        # facts.jsonl and facts.manifest.json

A request's `custom_id` is a digest of what is asked (provider, model, parameters, prompt), so equal
prompts are one request, and an answer can never be taken for that of another prompt. Files are
written strictly in the form that a provider documents:

- openai: JSON Lines for the batch interface, one request to /v1/chat/completions per line.
- anthropic: the JSON body of a message batch.
- openrouter: JSON Lines of `{"custom_id", "body"}`, `body` being what is posted to a chat interface
  of this kind. Store what comes back as `{"custom_id": ..., "response": ...}`, one line per answer:

      while read -r line; do
        jq -c .body <<< "$line" | curl -s -H @header.txt -H "Content-Type: application/json" -d @-
            $URL/chat/completions \\
          | jq -c --argjson asked "$line" '{custom_id: $asked.custom_id, response: .}'
      done < requests.jsonl > answers.jsonl

Nothing here talks to a network, reads the environment, or stores a key.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from jaxre.errors import InputError
from jaxre.evaluation.credentials import refuse_credentials
from jaxre.relations.files import read_text
from jaxre.relations.schema import Example, hash_prompt

Provider = Literal["openai", "anthropic", "openrouter"]
Turn = dict[str, str]

FORMAT = "jaxre frontier manifest 1"
SUFFIX = ".manifest.json"


@dataclass(frozen=True)
class Limits:
    """What one file may hold."""

    requests: int
    bytes: int


# As documented in 2026: OpenAI batch (50,000 requests, 200 MB), Anthropic message batches (100,000
# requests, 256 MB). Chat interfaces take one request at a time; their files only stay small enough
# to handle.
LIMITS: dict[str, Limits] = {
    "openai": Limits(50_000, 200_000_000),
    "anthropic": Limits(100_000, 256_000_000),
    "openrouter": Limits(100_000, 256_000_000),
}


@dataclass(frozen=True)
class Ask:
    """Who is asked, and how. `temperature` None leaves it out: some models refuse it."""

    provider: Provider
    model: str
    max_tokens: int = 64
    temperature: float | None = 0.0


@dataclass(frozen=True)
class Asked:
    """An example that a request answers; `prompt_hash` as its prediction has it."""

    example_id: str
    relation: str
    prompt_hash: str


@dataclass(frozen=True)
class Request:
    """One prompt, as the JSON of its chat turns, and all examples that have it."""

    custom_id: str
    prompt: str
    examples: tuple[Asked, ...]


@dataclass(frozen=True)
class Manifest:
    """Everything that importing the answers needs; `labels` is the schema, `date` the day of the
    export, YYYY-MM-DD.
    """

    ask: Ask
    dataset: str
    gen_type: str
    prompt_shot: str
    labels: tuple[str, ...]
    date: str
    data_digest: str
    requests: tuple[Request, ...]
    files: tuple[str, ...] = ()
    prompt_style: str = ""

    @property
    def examples(self) -> int:
        return sum(len(request.examples) for request in self.requests)


def prompt_text(turns: Sequence[Turn]) -> str:
    """The chat turns as one text that says exactly what is asked: their JSON."""
    return json.dumps(list(turns), ensure_ascii=False)


def example_hash(example: Example, prompt: str) -> str:
    """The prompt hash of an example's prediction: the source's own where it has one."""
    return example.prompt_hash or hash_prompt(prompt)


def custom_id(ask: Ask, prompt: str) -> str:
    """46 characters of [a-z0-9-]: a digest of all that decides the answer. Providers take 64 of
    letters, digits, - and _.
    """
    asked = json.dumps([asdict(ask), prompt])
    return f"jaxre-{hashlib.sha256(asked.encode()).hexdigest()[:40]}"


def data_digest(examples: Sequence[Example]) -> str:
    """Digest of the examples asked about: ids, texts, entities and gold labels, in order."""
    digest = hashlib.sha256()
    for example in examples:
        digest.update(json.dumps(asdict(example)).encode() + b"\n")
    return digest.hexdigest()


def build_manifest(
    examples: Sequence[Example],
    questions: Sequence[Sequence[Turn]],
    ask: Ask,
    *,
    dataset: str,
    gen_type: str,
    prompt_shot: str,
    labels: Sequence[str],
    date: str,
    prompt_style: str = "",
) -> Manifest:
    """One request per different prompt, in the order of the examples.

    Raises:
      InputError: no examples, a turn without text, something that looks like a key (names the
        example).
    """
    if not examples:
        raise InputError("there is no example to ask about; is the split empty?")
    if not ask.model.strip():
        raise InputError("--model: is empty; give the provider's name of the model")
    refuse_credentials(ask.model, "--model")
    asked: dict[str, list[Asked]] = {}
    for example, question in zip(examples, questions, strict=True):
        if not all(turn["content"].strip() for turn in question):
            raise InputError(
                f"example {example.id}: a turn of its prompt is empty, which providers refuse;"
                " correct prompt.user and prompt.system"
            )
        prompt = prompt_text(question)
        if prompt not in asked:
            refuse_credentials(prompt, f"the prompt of example {example.id}")
        asked.setdefault(prompt, []).append(
            Asked(example.id, example.relation, example_hash(example, prompt))
        )
    return Manifest(
        ask=ask,
        dataset=dataset,
        gen_type=gen_type,
        prompt_shot=prompt_shot,
        labels=tuple(labels),
        date=date,
        data_digest=data_digest(examples),
        requests=tuple(
            Request(custom_id(ask, prompt), prompt, tuple(those)) for prompt, those in asked.items()
        ),
        prompt_style=prompt_style,
    )


def request_record(ask: Ask, request: Request) -> dict[str, Any]:
    """A request as its provider wants it."""
    turns = json.loads(request.prompt)
    sampling = {} if ask.temperature is None else {"temperature": ask.temperature}
    if ask.provider == "anthropic":
        system = {"system": turns[0]["content"]} if turns[0]["role"] == "system" else {}
        chat = [turn for turn in turns if turn["role"] != "system"]
        return {
            "custom_id": request.custom_id,
            "params": {
                "model": ask.model,
                "max_tokens": ask.max_tokens,
                **sampling,
                **system,
                "messages": chat,
            },
        }
    if ask.provider == "openai":
        # max_tokens is deprecated there, and refused by the models that reason.
        body = {
            "model": ask.model,
            "messages": turns,
            **sampling,
            "max_completion_tokens": ask.max_tokens,
        }
        return {
            "custom_id": request.custom_id,
            "method": "POST",
            "url": "/v1/chat/completions",
            "body": body,
        }
    return {
        "custom_id": request.custom_id,
        "body": {"model": ask.model, "messages": turns, **sampling, "max_tokens": ask.max_tokens},
    }


def write_requests(path: str | Path, manifest: Manifest) -> tuple[list[Path], Path]:
    """Writes the request files and, last, the manifest: all of them or none.

    Args:
      path: of the request file; `x.jsonl` (`x.json` for anthropic) becomes `x-1.jsonl`,
        `x-2.jsonl`, ... where one file cannot hold all. The manifest is `x.manifest.json` beside
        it.

    Returns the request files and the manifest. Raises InputError: one of them exists (a manifest is
    the only key to the answers of a batch that was sent), a request larger than a file may be.
    """
    path = Path(path)
    stem = path.with_suffix("") if path.suffix in (".json", ".jsonl") else path
    suffix = ".json" if manifest.ask.provider == "anthropic" else ".jsonl"
    contents = _contents(manifest)
    numbers = (
        [""] if len(contents) == 1 else [f"-{number}" for number in range(1, len(contents) + 1)]
    )
    files = [stem.with_name(f"{stem.name}{number}{suffix}") for number in numbers]
    target = stem.with_name(stem.name + SUFFIX)
    if existing := [one for one in (target, *files) if one.exists()]:
        raise InputError(
            f"{existing[0]}: exists, and answers may be on their way to it; give --output another"
            " name, or remove it"
        )
    tree = {"format": FORMAT, **asdict(manifest), "files": [file.name for file in files]}
    stem.parent.mkdir(parents=True, exist_ok=True)
    pairs = [
        *zip(files, contents, strict=True),
        (target, json.dumps(tree, indent=1, ensure_ascii=False) + "\n"),
    ]
    drafts = [one.with_name(f".{one.name}.{os.getpid()}.part") for one, _ in pairs]
    done: list[Path] = []
    try:
        for draft, (_, content) in zip(drafts, pairs, strict=True):
            draft.write_text(content, encoding="utf-8")
        for draft, (one, _) in zip(drafts, pairs, strict=True):
            os.replace(draft, one)
            done.append(one)
    except BaseException:
        for one in (*drafts, *done):
            with contextlib.suppress(OSError):
                one.unlink()
        raise
    return files, target


def _contents(manifest: Manifest) -> list[str]:
    """The text of each file. ASCII, so that no line end of Unicode hides in a line."""
    limits, enclosing = LIMITS[manifest.ask.provider], len('{"requests": [\n\n]}\n')
    files: list[list[str]] = [[]]
    size = enclosing
    for request in manifest.requests:
        line = json.dumps(request_record(manifest.ask, request))
        if len(line) + 2 + enclosing > limits.bytes:
            raise InputError(
                f"example {request.examples[0].example_id}: its request has {len(line):,} bytes,"
                f" more than a file of {manifest.ask.provider} may have ({limits.bytes:,}); shorten"
                " the text, or lower prompt.shots"
            )
        if len(files[-1]) == limits.requests or size + len(line) + 2 > limits.bytes:
            files.append([])
            size = enclosing
        files[-1].append(line)
        size += len(line) + 2  # a comma and a line end
    if manifest.ask.provider == "anthropic":
        return ['{"requests": [\n' + ",\n".join(lines) + "\n]}\n" for lines in files]
    return ["".join(line + "\n" for line in lines) for lines in files]


def read_manifest(path: str | Path) -> Manifest:
    """Reads a manifest. Raises InputError: no such file, not a manifest, one that was changed (its
    ids do not fit its prompts).
    """
    path = Path(path)
    text = read_text(path)
    try:
        tree = json.loads(text)
        if not isinstance(tree, dict) or tree.pop("format", None) != FORMAT:
            raise ValueError("its format is another")
        ask = Ask(**tree.pop("ask"))
        requests = tuple(
            Request(
                one["custom_id"],
                one["prompt"],
                tuple(Asked(**example) for example in one["examples"]),
            )
            for one in tree.pop("requests")
        )
        manifest = Manifest(
            ask=ask,
            requests=requests,
            **{
                name: tuple(value) if isinstance(value, list) else value
                for name, value in tree.items()
            },
        )
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise InputError(
            f"{path}: not a manifest of `jaxre frontier export` ({error}); give the {SUFFIX} that"
            " it wrote"
        ) from None
    refuse_credentials(tree, str(path))
    if (
        ask.provider not in get_args(Provider)
        or not requests
        or any(one.custom_id != custom_id(ask, one.prompt) for one in requests)
    ):
        raise InputError(
            f"{path}: was changed after its export, its ids do not fit its prompts; give the one"
            " that was written"
        )
    ids = [example.example_id for request in requests for example in request.examples]
    if len(set(ids)) != len(ids):
        raise InputError(f"{path}: names an example twice; give the one that was written")
    return manifest
