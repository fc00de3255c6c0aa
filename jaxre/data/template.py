"""Chat turns to tokens with the model's own template; the supervised span is what follows the generation prompt.

A template is foreign code, so each of its known faults is caught here by name: no assistant
text, a supervised prompt, an empty `<think>` block in the target, prompt tokens that are not a
prefix of all tokens, today's date in the prompt.
"""

from __future__ import annotations

import datetime
import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import jinja2
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from jaxre.errors import InputError

Turn = dict[str, str]


@dataclass(frozen=True)
class Encoded:
    """Tokens of one example; those from `prompt_length` on are supervised."""

    tokens: list[int]
    prompt_length: int


def load_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """The tokenizer of a model folder. Raises InputError if there is none."""
    if not (folder / "tokenizer.json").is_file():
        raise InputError(f"{folder}: no tokenizer.json; a model folder carries its tokenizer")
    try:
        return AutoTokenizer.from_pretrained(str(folder), local_files_only=True)
    except (OSError, ValueError) as error:
        raise InputError(f"{folder}: the tokenizer does not load ({str(error).splitlines()[0]})") from None


class ChatTemplate:
    """A tokenizer's chat template, with reasoning off and the date pinned.

    Raises:
      InputError: the tokenizer has no chat template, or one that asks for the date in a way that cannot be pinned.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, date: str, place: str):
        if not tokenizer.chat_template:
            raise InputError(
                f"{place}: the tokenizer has no chat template; add chat_template.jinja, or use the instruct version of the model"
            )
        self.tokenizer = tokenizer
        self.place = place
        self.template = pin_date(tokenizer.chat_template, datetime.date.fromisoformat(date), place)
        self.date = date

    @property
    def digest(self) -> str:
        """Digest of the tokenizer, its template and the pinned date."""
        parts = (self.tokenizer.backend_tokenizer.to_str(), self.template, str(self.tokenizer.special_tokens_map), self.date)
        return hashlib.sha256("\0".join(parts).encode()).hexdigest()

    def render(self, turns: Sequence[Turn], generation: bool) -> str:
        """The text of a conversation, with the generation prompt at its end if asked for."""
        try:
            return self.tokenizer.apply_chat_template(
                list(turns),
                chat_template=self.template,
                tokenize=False,
                add_generation_prompt=generation,
                enable_thinking=False,
                date_string=datetime.date.fromisoformat(self.date).strftime("%d %b %Y"),
            )
        except jinja2.TemplateError as error:
            raise InputError(f"{self.place}: the chat template refuses these turns ({error})") from None

    def split(self, turns: Sequence[Turn], answer: str) -> tuple[str, str]:
        """(prompt text, supervised text) of turns answered by `answer`. Raises InputError for a faulty template."""
        prompt = self.render(turns, generation=True)
        full = self.render([*turns, {"role": "assistant", "content": answer}], generation=False)
        if not full.startswith(prompt):
            raise InputError(
                f"{self.place}: the chat template's generation prompt is not a prefix of the answered conversation "
                f"(prompt ends {prompt[-30:]!r}, conversation has {full[len(prompt) - 30 : len(prompt) + 10]!r} there); the template needs mending"
            )
        supervised = full[len(prompt) :]
        if "<think>" in supervised:
            raise InputError(f"{self.place}: the chat template puts a <think> block into the target; switch reasoning off in the template")
        if not supervised.lstrip().startswith(answer.strip()) or not answer.strip():
            wrong = (
                "no supervised token"
                if answer.strip() not in supervised
                else f"{supervised[:40]!r} before the answer, which would be supervised"
            )
            raise InputError(
                f"{self.place}: the chat template yields {wrong}; it must put the assistant's text right after its generation prompt"
            )
        return prompt, supervised

    def encode(self, conversations: Sequence[tuple[Sequence[Turn], str]]) -> list[Encoded]:
        """Tokens and prompt lengths of (turns, answer) pairs. Raises InputError for a faulty template."""
        parts = [self.split(turns, answer) for turns, answer in conversations]
        prompts = self.tokenize([prompt for prompt, _ in parts])
        fulls = self.tokenize([prompt + supervised for prompt, supervised in parts])
        for (prompt, _), prompt_ids, ids in zip(parts, prompts, fulls, strict=True):
            if ids[: len(prompt_ids)] != prompt_ids or len(ids) == len(prompt_ids):
                raise InputError(
                    f"{self.place}: the prompt's tokens are not a prefix of all tokens (the prompt ends {prompt[-30:]!r}); "
                    "end the generation prompt with a special token or a newline"
                )
        return [Encoded(ids, len(prompt_ids)) for prompt_ids, ids in zip(prompts, fulls, strict=True)]

    def tokenize(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of texts that already carry their special tokens."""
        return self.tokenizer(list(texts), add_special_tokens=False, return_attention_mask=False)["input_ids"] if texts else []

    def end_of_turn(self, supervised: Sequence[int]) -> int:
        """How many of the supervised tokens go up to and including the end-of-turn token; all if there is none."""
        special = set(self.tokenizer.all_special_ids) | set(self.tokenizer.added_tokens_decoder)
        for number, token in enumerate(supervised, 1):
            if token in special:
                return number
        return len(supervised)


def pin_date(template: str, date: datetime.date, place: str) -> str:
    """The template with `strftime_now("...")` replaced by the given date."""

    def literal(match: re.Match[str]) -> str:
        return '"' + date.strftime(match.group(2)) + '"'

    pinned = re.sub(r"""strftime_now\(\s*(["'])(.*?)\1\s*\)""", literal, template)
    # Llama 3 asks whether the function exists before it calls it.
    left = re.sub(r"strftime_now\s+is\s+(not\s+)?defined", "", pinned)
    if "strftime_now" in left:
        raise InputError(
            f"{place}: the chat template asks for the date in a way that cannot be pinned; write strftime_now with a literal format"
        )
    return pinned
