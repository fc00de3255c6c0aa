from __future__ import annotations

from pathlib import Path

import pytest
from tiny import write_tiny_model


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a tiny random model."""
    return write_tiny_model(tmp_path_factory.mktemp("tiny-model"))
