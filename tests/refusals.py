"""The message of a refused input."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from jaxre.errors import InputError


def refusal(call: Callable[[], object]) -> str:
    """The message of the InputError that `call` must raise; it must be one line."""
    with pytest.raises(InputError) as caught:
        call()
    message = str(caught.value)
    assert len(message.splitlines()) == 1, message
    return message
