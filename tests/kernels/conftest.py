"""Fixtures of every kernel test."""

from __future__ import annotations

import pytest
from interpreters import clean


@pytest.fixture(autouse=True)
def no_race(capfd):
    """No test has to ask: where an interpreter that looks for races found one, the test fails."""
    with clean(capfd):
        yield
