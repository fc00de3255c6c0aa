"""The Python API: the commands `train`, `predict` and `evaluate` as functions."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from jaxre.config import Config, load_config
from jaxre.evaluation.evaluate import evaluate_file as evaluate
from jaxre.host_memory import keep_freed_memory
from jaxre.inference.run import Run, load_run
from jaxre.training import loop

__all__ = ["Run", "evaluate", "load_run", "train"]


def train(
    config: Config | str | Path, overrides: Sequence[str] = (), console: Console | None = None
) -> Path:
    """Trains or resumes a run, as `jaxre train` does, and returns its folder.

    Args:
      config: a config file, or what `jaxre.config.load_config` returns.
      overrides: `key=value` settings on top of the file, such as "lora.rank=32".
      console: where progress is printed; standard output if not given.

    Raises:
      InputError: anything in the config, data, weights or run folder that cannot be used.
    """
    keep_freed_memory()
    if isinstance(config, Config):
        if overrides:
            raise TypeError("overrides go on top of a file; change the Config itself")
    else:
        config = load_config(config, list(overrides))
    return loop.train(config, console)
