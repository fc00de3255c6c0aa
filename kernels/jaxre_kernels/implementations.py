"""Which implementation of an op is meant: where the `choose` of every op begins."""

from __future__ import annotations

from collections.abc import Collection

UNVERIFIED = {"pallas_tpu": "it has not run on a TPU", "pallas_gpu": "it has not run on a GPU"}


def named(op: str, implementation: str | None, there: Collection[str]) -> tuple[str, str]:
    """The name of the implementation, "xla" if none is asked for, and the reason in words; one that is unverified is called so.

    Args:
      op: for the error; there: the names that exist.

    Raises:
      ValueError: an implementation that does not exist.
    """
    if implementation is None:
        opt_in = [name for name in there if name in UNVERIFIED]
        return "xla", f"the default; {', '.join(opt_in)} is opt-in, unverified" if opt_in else "the only implementation there is"
    if implementation not in there:
        raise ValueError(f"{op} implementation {implementation!r} does not exist; there is {', '.join(there)}")
    unverified = f"; unverified, {UNVERIFIED[implementation]}" if implementation in UNVERIFIED else ""
    return implementation, f"asked for{unverified}"
