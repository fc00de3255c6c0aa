"""What a run is trained for: each value of `train.objective` is a module here.

Every module has

    load(config, tokenizer, folder)
        its training and validation data as tokens
    loss_sum(params, adapter, rows, architecture, ops, shape, remat, keys)
        the loss of a micro-batch
    Validation(config, dataset, architecture, dtype, mesh)
        its `run(trainable, base)` returns figures of the validation data
"""

from __future__ import annotations

from pathlib import Path
from types import ModuleType

from jaxre.config import Config
from jaxre.data.dataset import Dataset
from jaxre.data.tokenizer import load_tokenizer
from jaxre.objectives import classify, lm, sft

OBJECTIVES = {"sft": sft, "lm": lm, "classify": classify}


def objective_of(config: Config) -> ModuleType:
    """The module of a config's `train.objective`."""
    return OBJECTIVES[config.train.objective]


def load_dataset(config: Config, folder: Path) -> Dataset:
    """Reads and tokenises the training and validation data.

    Args:
      folder: of the model, for its tokenizer and chat template.

    Raises:
      InputError: the data, the template or the schema cannot be used.
    """
    return objective_of(config).load(config, load_tokenizer(folder), folder)
