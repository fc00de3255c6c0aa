"""Base class of the results of the statistics: frozen dataclasses that convert to JSON."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any


class Row:
    """Base class of results. Unknown values are None, never NaN, which is not valid JSON."""

    def to_json(self) -> dict[str, Any]:
        """Converts to dicts, tuples, numbers and strings, for `json.dumps`."""
        return asdict(self)  # type: ignore[call-overload]
