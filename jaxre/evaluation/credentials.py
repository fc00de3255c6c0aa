"""Keys of providers have no business in a file of requests, of answers or of predictions: what
looks like one is refused.
"""

from __future__ import annotations

import re
from typing import Any

from jaxre.errors import InputError

# sk-..., sk-ant-..., sk-or-v1-...; "Bearer ..."; a header in text. A key has digits, "the bearer
# internationalisation" has none.
_TEXT = re.compile(
    r"(?<![a-z0-9])sk-(?=[a-z_-]*\d)[a-z0-9_-]{16,}"
    r"|\bbearer\s+(?=[a-z._~+/-]*\d)[a-z0-9._~+/-]{16,}"
    r"|\bx-api-key\s*:\s*\S{8,}|\bauthorization\s*:\s*(?:basic|bearer|token)\s+\S{8,}",
    re.IGNORECASE,
)
_NAMES = frozenset({"authorization", "xapikey", "apikey"})


def refuse_credentials(value: Any, place: str) -> None:
    """Raises InputError, without quoting it, where a JSON value holds what looks like a key or an
    Authorization header.
    """
    # A list in place of recursion: a hostile file may be nested deep.
    waiting = [value]
    while waiting:
        one = waiting.pop()
        if isinstance(one, dict):
            for name, inner in one.items():
                if inner and re.sub("[-_]", "", str(name).lower()) in _NAMES:
                    raise InputError(
                        f"{place}: holds a field {name!r}; take the key out of the file, and revoke"
                        " it if the file was shared"
                    )
                waiting += (str(name), inner)
        elif isinstance(one, list | tuple):
            waiting += one
        elif isinstance(one, str) and _TEXT.search(one):
            raise InputError(
                f"{place}: holds what looks like a key of a provider; take it out, and revoke it if"
                " the file was shared"
            )
