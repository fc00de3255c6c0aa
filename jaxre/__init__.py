"""jaxre: fine-tunes small language models for relation extraction in JAX/Flax.

    import jaxre

    folder = jaxre.train("configs/quickstart.yaml", ["name=mine"])
    run = jaxre.load_run(folder)
    (answer,) = run.predict(["<e1>Ada Lovelace</e1> wrote the <e2>Notes</e2>."])
    scores = jaxre.evaluate(folder / "predictions/facts-test-score.parquet")

`docs/python.md` has more.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from jaxre.api import evaluate, load_run, train

__version__ = "0.1.0"
__all__ = ["evaluate", "load_run", "train"]


def __getattr__(name: str) -> Any:
    """Imports what the names stand for, and JAX with it, when they are used."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from jaxre import api

    return getattr(api, name)
