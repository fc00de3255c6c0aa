"""What every result of the statistics has in common: a frozen dataclass that becomes JSON."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any


class Row:
    """Base of results. What is not known is None in them, never NaN, which is no JSON."""

    def to_json(self) -> dict[str, Any]:
        """Plain dicts, tuples, numbers and strings, for `json.dumps`."""
        return asdict(self)  # type: ignore[call-overload]
