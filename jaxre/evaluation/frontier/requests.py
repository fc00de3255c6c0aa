"""Request files for frontier models, and the manifest that maps requests to examples.

    manifest = build_manifest(examples, questions, ask, dataset=..., ...)
    # facts.jsonl and facts.manifest.json
    files, manifest_path = write_requests("requests/facts.jsonl", manifest)

A request's `custom_id` is a digest of its content (provider, model, parameters, prompt), so equal
prompts are one request, and an answer cannot be assigned to another prompt. Files are strictly in
the documented form of the provider:

- openai: JSON Lines for the batch interface, one request to /v1/chat/completions per line.
- anthropic: the JSON body of a message batch.
- openrouter: JSON Lines of `{"custom_id", "body"}`, with the body for a chat interface of this
  kind. Store the responses as `{"custom_id": ..., "response": ...}`, one line per answer:

      while read -r line; do
        jq -c .body <<< "$line" \\
          | curl -s -H @header.txt -H "Content-Type: application/json" -d @- \\
            $URL/chat/completions \\
          | jq -c --argjson asked "$line" '{custom_id: $asked.custom_id, response: .}'
      done < requests.jsonl > answers.jsonl

This module does not use the network, read the environment or store a key.
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
from jaxre.evaluation.frontier.credentials import refuse_credentials
from jaxre.relations.files import read_text
from jaxre.relations.schema import Example, hash_prompt

Provider = Literal["openai", "anthropic", "openrouter"]
Turn = dict[str, str]

FORMAT = "jaxre frontier manifest 1"
SUFFIX = ".manifest.json"


@dataclass(frozen=True)
class Limits:
    """Limits of one request file."""

    requests: int
    bytes: int


# Documented in 2026: OpenAI batch (50,000 requests, 200 MB), Anthropic message batches (100,000
# requests, 256 MB). Chat interfaces accept one request at a time; the limit keeps their files small
# enough to handle.
LIMITS: dict[str, Limits] = {
    "openai": Limits(50_000, 200_000_000),
    "anthropic": Limits(100_000, 256_000_000),
    "openrouter": Limits(100_000, 256_000_000),
}


@dataclass(frozen=True)
class Ask:
    """Provider, model and parameters. temperature None omits it: some models refuse it."""

    provider: Provider
    model: str
    max_tokens: int = 64
    temperature: float | None = 0.0


@dataclass(frozen=True)
class Asked:
    """An example that a request covers; `prompt_hash` is that of its prediction."""

    example_id: str
    relation: str
    prompt_hash: str


@dataclass(frozen=True)
class Request:
    """One prompt, as the JSON of its chat turns, and all examples with this prompt."""

    custom_id: str
    prompt: str
    examples: tuple[Asked, ...]


@dataclass(frozen=True)
class Manifest:
    """Data for the import of the answers. labels: the schema; date: of the export, YYYY-MM-DD."""

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
    """The chat turns as one text: their JSON."""
    return json.dumps(list(turns), ensure_ascii=False)


def example_hash(example: Example, prompt: str) -> str:
    """Prompt hash of an example's prediction: that of the source, if it states one."""
    return example.prompt_hash or hash_prompt(prompt)


def custom_id(ask: Ask, prompt: str) -> str:
    """Digest of everything that determines the answer: 46 characters of [a-z0-9-]. Providers allow
    64 letters, digits, - and _.
    """
    content = json.dumps([asdict(ask), prompt])
    return f"jaxre-{hashlib.sha256(content.encode()).hexdigest()[:40]}"


def data_digest(examples: Sequence[Example]) -> str:
    """Digest of the examples: ids, texts, entities and gold labels, in order."""
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
    """Makes one request per distinct prompt, in the order of the examples.

    Raises:
      InputError: no examples, a turn without text, something that looks like a key (names the
        example).
    """
    if not examples:
        raise InputError("no examples to send; is the split empty?")
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
            Request(custom_id(ask, prompt), prompt, tuple(covered))
            for prompt, covered in asked.items()
        ),
        prompt_style=prompt_style,
    )


def request_record(ask: Ask, request: Request) -> dict[str, Any]:
    """A request in the form of its provider."""
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
    body = {"model": ask.model, "messages": turns, **sampling}
    if ask.provider == "openai":
        # max_tokens is deprecated, and reasoning models refuse it.
        return {
            "custom_id": request.custom_id,
            "method": "POST",
            "url": "/v1/chat/completions",
            "body": {**body, "max_completion_tokens": ask.max_tokens},
        }
    return {"custom_id": request.custom_id, "body": {**body, "max_tokens": ask.max_tokens}}


def write_requests(path: str | Path, manifest: Manifest) -> tuple[list[Path], Path]:
    """Writes the request files and, last, the manifest: all of them or none.

    Args:
      path: of the request file; `x.jsonl` (`x.json` for anthropic) becomes `x-1.jsonl`,
        `x-2.jsonl`, ... if one file is not enough. The manifest is `x.manifest.json` in the same
        folder.

    Returns the paths of the request files and of the manifest. Raises InputError: one of them
    exists (without its manifest, the answers of a sent batch are lost), or a request is larger than
    a file may be.
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
    if existing := [file for file in (target, *files) if file.exists()]:
        raise InputError(
            f"{existing[0]}: already exists, and answers to it may be pending; choose another"
            " --output, or remove it"
        )
    tree = {"format": FORMAT, **asdict(manifest), "files": [file.name for file in files]}
    stem.parent.mkdir(parents=True, exist_ok=True)
    pairs = [
        *zip(files, contents, strict=True),
        (target, json.dumps(tree, indent=1, ensure_ascii=False) + "\n"),
    ]
    drafts = [file.with_name(f".{file.name}.{os.getpid()}.part") for file, _ in pairs]
    done: list[Path] = []
    try:
        for draft, (_, content) in zip(drafts, pairs, strict=True):
            draft.write_text(content, encoding="utf-8")
        for draft, (file, _) in zip(drafts, pairs, strict=True):
            os.replace(draft, file)
            done.append(file)
    except BaseException:
        for file in (*drafts, *done):
            with contextlib.suppress(OSError):
                file.unlink()
        raise
    return files, target


def _contents(manifest: Manifest) -> list[str]:
    """Text of each file, in ASCII, so that no line contains a line end of Unicode."""
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
    """Reads a manifest. Raises InputError: no such file, not a manifest, or a changed manifest (its
    ids do not fit its prompts).
    """
    path = Path(path)
    text = read_text(path)
    try:
        tree = json.loads(text)
        if not isinstance(tree, dict) or tree.pop("format", None) != FORMAT:
            raise ValueError("another format")
        ask = Ask(**tree.pop("ask"))
        requests = tuple(
            Request(
                request["custom_id"],
                request["prompt"],
                tuple(Asked(**example) for example in request["examples"]),
            )
            for request in tree.pop("requests")
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
        or any(request.custom_id != custom_id(ask, request.prompt) for request in requests)
    ):
        raise InputError(
            f"{path}: was changed after its export, its ids do not match its prompts; use the"
            " original"
        )
    ids = [example.example_id for request in requests for example in request.examples]
    if len(set(ids)) != len(ids):
        raise InputError(f"{path}: names an example twice; use the original manifest")
    return manifest
