"""Refuses provider keys in files of requests, answers and predictions."""

from __future__ import annotations

import re
from typing import Any

from jaxre.errors import InputError

# sk-..., sk-ant-..., sk-or-v1-...; "Bearer ..."; a header in text. A key has digits; ordinary text
# such as "the bearer internationalisation" has none.
_TEXT = re.compile(
    r"(?<![a-z0-9])sk-(?=[a-z_-]*\d)[a-z0-9_-]{16,}"
    r"|\bbearer\s+(?=[a-z._~+/-]*\d)[a-z0-9._~+/-]{16,}"
    r"|\bx-api-key\s*:\s*\S{8,}|\bauthorization\s*:\s*(?:basic|bearer|token)\s+\S{8,}",
    re.IGNORECASE,
)
_NAMES = frozenset({"authorization", "xapikey", "apikey"})


def refuse_credentials(value: Any, place: str) -> None:
    """Raises InputError, without quoting the key, if a JSON value contains something like a key or
    an Authorization header.
    """
    # A list, not recursion: a hostile file may be deeply nested.
    waiting = [value]
    while waiting:
        value = waiting.pop()
        if isinstance(value, dict):
            for name, inner in value.items():
                if inner and re.sub("[-_]", "", str(name).lower()) in _NAMES:
                    raise InputError(
                        f"{place}: contains a field {name!r}; take the key out of the file, and"
                        " revoke it if the file was shared"
                    )
                waiting += (str(name), inner)
        elif isinstance(value, list | tuple):
            waiting += value
        elif isinstance(value, str) and _TEXT.search(value):
            raise InputError(
                f"{place}: contains something like a provider's key; take it out, and revoke it if"
                " the file was shared"
            )
