"""From one form of a model to another: Hugging Face folders, our own, PEFT adapters, merged.

summary = convert("runs/quickstart", Path("facts-merged"), to="hf", merge=True)
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import jax
import ml_dtypes
import numpy as np

from jaxre.checkpoints.huggingface import check_free, resolve_model, save_base
from jaxre.checkpoints.native import save_native, stored_quantised
from jaxre.checkpoints.peft import save_adapter
from jaxre.checkpoints.source import kind_of, open_model
from jaxre.config import load_config
from jaxre.errors import InputError
from jaxre.models.lora import merge as merge_factors
from jaxre.models.lora import scale_of
from jaxre.models.quantised import dense_shape, is_nf4

DTYPES = {"float32": np.dtype(np.float32), "bfloat16": np.dtype(ml_dtypes.bfloat16), "float16": np.dtype(np.float16)}
NAMES = {"hf": "a Hugging Face folder", "jaxre": "a jaxre folder", "peft": "a PEFT adapter", "run": "a run"}


@dataclass(frozen=True)
class Conversion:
    """What was written: numbers of weights and bytes, and their dtype. `merged` is whether an adapter was added in."""

    source: str
    target: Path
    kind: str
    to: str
    merged: bool
    parameters: int
    bytes: int
    dtype: str

    def __str__(self) -> str:
        merged = ", the adapter merged" if self.merged else ""
        size = f"{self.parameters:,} parameters, {self.dtype}, {self.bytes / 1e6:,.1f} MB"
        return f"{NAMES[self.kind]} {self.source} -> {NAMES[self.to]} {self.target} ({size}{merged})"


def convert(
    source: str | Path,
    target: Path,
    to: Literal["jaxre", "hf", "peft"],
    merge: bool = False,
    dtype: str | None = None,
    quantise: str | None = None,
) -> Conversion:
    """Writes `source`, in the form `to`, as the folder `target`, whole or not at all.

    Args:
      source: anything `open_model` opens.
      merge: adds the adapter into the base: formed in f32, cast once to the base's dtype. An NF4 base is dequantised:
        a run's adapter goes into the values that it was trained on, and the merged model predicts as the run does.
      dtype: "float32", "bfloat16" or "float16" of the written dense weights; the stored one is kept if not given.
      quantise: "nf4" for NF4 projections in a jaxre folder. From there to Hugging Face they are dequantised.

    Raises:
      InputError: a source that does not open, a combination that says nothing, a target that exists.
    """
    target = Path(target)
    _check(source, to, merge, dtype, quantise)
    check_free(target)
    loaded = open_model(source, None, quantise)
    if to == "peft":
        save_adapter(target, loaded.architecture, loaded.lora, loaded.factors, loaded.base_name, loaded.folder)
        written = loaded.factors
    else:
        written, chosen = loaded.base, DTYPES.get(dtype)
        if merge or to == "hf":  # Hugging Face's folder is dense
            factors, scale = (loaded.factors, scale_of(loaded.lora)) if merge else ({"layers": {}, "last": {}}, 0.0)
            written = merge_factors(written, factors, scale, chosen)
        if chosen is not None:
            written = jax.tree.map(lambda leaf: leaf if is_nf4(leaf) else np.asarray(leaf).astype(chosen), written, is_leaf=is_nf4)
        save = save_base if to == "hf" else save_native
        save(target, loaded.architecture, written, loaded.folder)
    arrays = jax.tree.leaves(written, is_leaf=is_nf4)
    dtypes = ", ".join(sorted({"NF4" if is_nf4(array) else np.asarray(array).dtype.name for array in arrays}))
    parameters = sum(math.prod(dense_shape(array)) for array in arrays)
    size = sum(file.stat().st_size for file in target.rglob("*") if file.is_file())
    return Conversion(str(source), target, loaded.kind, to, merge, parameters, size, dtypes)


def _check(source: str | Path, to: str, merge: bool, dtype: str | None, quantise: str | None) -> None:
    """Refuses what cannot be, before any weight is read."""
    if to not in ("jaxre", "hf", "peft"):
        raise InputError(f"{to}: not a form of a model; --to takes jaxre, hf or peft")
    if dtype is not None and to == "peft":
        raise InputError(f"--dtype {dtype}: an adapter is stored in float32; leave it out")
    if dtype is not None and dtype not in DTYPES:
        raise InputError(f"--dtype {dtype}: not one of {', '.join(DTYPES)}")
    if quantise not in (None, "nf4"):
        raise InputError(f"--quantise {quantise}: not a form of weights that is known; nf4 is")
    if quantise and to != "jaxre":
        raise InputError(f"--quantise {quantise}: only a jaxre folder holds NF4 weights; use --to jaxre")
    folder = resolve_model(str(source))
    kind = kind_of(folder)
    has_adapter = kind == "peft" or (kind == "run" and load_config(folder / "config.yaml").train.method == "lora")
    if to == "peft":
        if not has_adapter:
            whole = "the run trained all weights" if kind == "run" else f"it is {NAMES[kind]}"
            raise InputError(
                f"{source}: has no adapter, {whole}; {'use --to hf' if kind != 'hf' else 'train with train.method=lora first'}"
            )
        if merge:
            raise InputError(f"{source}: a merged model is no adapter; leave --merge out, or use --to hf")
    elif has_adapter and not merge:
        raise InputError(f"{source}: is an adapter on a base; add --merge for a whole model, or use --to peft for the adapter alone")
    elif merge and not has_adapter:
        raise InputError(f"{source}: has no adapter to merge; leave --merge out")
    if quantise and has_adapter:
        raise InputError(f"{source}: is an adapter on a base; merge it into a folder first, then quantise that")
    if kind == to and not (quantise and not stored_quantised(folder)):
        raise InputError(f"{source}: is {NAMES[to]} already; copy the folder")
