"""Converts models between Hugging Face folders, jaxre folders, GGUF files and PEFT adapters.

    summary = convert("runs/quickstart", Path("facts-merged"), to="hf", merge=True)

Base weights are streamed one tensor at a time, so a conversion needs memory for the largest tensors
(the embeddings), not for the whole model.
"""

from __future__ import annotations

import math
import re
import shutil
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import jax
import ml_dtypes
import numpy as np
from jaxre_kernels.nf4 import NF4Weight
from jaxre_kernels.nf4 import forms as nf4_forms
from rich.table import Table
from safetensors import SafetensorError
from tokenizers import Tokenizer

from jaxre.checkpoints.gguf import form_of, read_gguf, tensors_of, value_dtype
from jaxre.checkpoints.gguf_write import (
    bytes_of,
    check_writable,
    kinds_of,
    modelfile,
    speech_of,
    through_q8_0,
    write_gguf,
)
from jaxre.checkpoints.huggingface import (
    atomic_folder,
    check_free,
    check_quantisable,
    hf_shapes,
    positions,
    read_json,
    side_files_of,
    write_base,
)
from jaxre.checkpoints.native import write_native
from jaxre.checkpoints.peft import load_adapter, save_adapter
from jaxre.checkpoints.source import Located, kind_of, locate, open_weights, resolve_model
from jaxre.config import Config, Prompt, load_config
from jaxre.errors import InputError, first_line
from jaxre.models.architecture import check_vocabulary, read_architecture
from jaxre.models.lora import merge_one, scale_of
from jaxre.models.quantised import dequantise_matrix, is_nf4, quantise_matrix
from jaxre.models.weights import AnyArchitecture
from jaxre.relations.labels import task_of
from jaxre.relations.prompts import system_turn

DTYPES = {
    "float32": np.dtype(np.float32),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
    "float16": np.dtype(np.float16),
}
# llama.cpp's names for these, and Q8_0: blocks of 32 values with one scale, in GGUF only.
KINDS = {"float32": "F32", "bfloat16": "BF16", "float16": "F16", "q8_0": "Q8_0"}
SHORT = {"f32": "float32", "bf16": "bfloat16", "f16": "float16"}
NAMES = {
    "hf": "a Hugging Face folder",
    "jaxre": "a jaxre folder",
    "gguf": "a GGUF file",
    "peft": "a PEFT adapter",
    "run": "a run",
}
BLOCK = 1 << 22  # elements compared at a time
# Every file that may assign token ids; tokenizers differ in which of them they read.
TOKEN_IDS: dict[str, Callable[[Path], Iterable[tuple[str, int | str]]]] = {
    "tokenizer.json": lambda path: (
        Tokenizer.from_file(str(path)).get_vocab(with_added_tokens=True).items()
    ),
    "vocab.json": lambda path: read_json(path).items(),
    "added_tokens.json": lambda path: read_json(path).items(),
    "tokenizer_config.json": lambda path: (
        (token["content"], number)
        for number, token in (read_json(path).get("added_tokens_decoder") or {}).items()
    ),
    "vocab.txt": lambda path: (
        (token, number)
        for number, token in enumerate(
            path.read_text(encoding="utf-8").removesuffix("\n").split("\n")
        )
    ),
}
# Gemma 3's text-only models have the tokenizer of the image models, whose image token lies one past
# the end of the embeddings. Text that contains it is refused where it is read.
WITHOUT_EMBEDDING = {"gemma3_text": ("<image_soft_token>",)}


@dataclass(frozen=True)
class Conversion:
    """Summary of a written model: number of parameters and bytes, and dtype.

    merged: an adapter was merged into the base.
    differences: if verified, name of each tensor -> max|written - source|; NF4 is compared by its
      values, and the source of a merged tensor is W + scale A B in f32.
    recast: a tensor has another dtype than in the source.
    left_out: tensors of the source that are not written.
    unreadable: the base of a PEFT adapter, if peft cannot open it.
    """

    source: str
    target: Path
    kind: str
    to: str
    merged: bool
    parameters: int
    bytes: int
    dtype: str
    differences: dict[str, float] | None = None
    recast: bool = False
    left_out: tuple[str, ...] = ()
    unreadable: str | None = None

    def __str__(self) -> str:
        merged = ", the adapter merged" if self.merged else ""
        size = f"{self.parameters:,} parameters, {self.dtype}, {self.bytes / 1e6:,.1f} MB"
        line = (
            f"{NAMES[self.kind]} {self.source} -> {NAMES[self.to]} {self.target} ({size}{merged})"
        )
        if self.left_out:
            line += f"; left out, for no classifier has them: {', '.join(self.left_out)}"
        if self.unreadable:
            base = f"its base {self.unreadable}"
            line += (
                f"; peft cannot open {base}: convert that --to hf and name the new folder in"
                " adapter_config.json"
            )
        return line

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "target": str(self.target)}


@dataclass(frozen=True)
class _Plan:
    """One conversion: which tensors to write, and how to write a folder and read it back.

    forms: name -> (shape, dtype) of each tensor; the dtype of an NF4 weight is None.
    exact: name -> its values before the cast.
    recast, left_out: as in Conversion.
    rounded: (name, values, dtype) -> the values to be read back, if that is not the plain cast.
    stored_types, bytes: the types and size on disk, if they do not follow from `forms`.
    """

    forms: dict[str, tuple[tuple[int, ...], np.dtype | None]]
    exact: Callable[[str], np.ndarray]
    write: Callable[[Path], None]
    reader: Callable[[Path], Callable[[str], np.ndarray | NF4Weight]]
    recast: bool = False
    left_out: tuple[str, ...] = ()
    rounded: Callable[[str, np.ndarray, np.dtype], np.ndarray] | None = None
    stored_types: frozenset[str] = frozenset()
    bytes: int | None = None


def convert(
    source: str | Path,
    target: Path,
    to: Literal["jaxre", "hf", "peft", "gguf"],
    merge: bool = False,
    dtype: str | None = None,
    quantise: str | None = None,
    verify: bool = False,
) -> Conversion:
    """Writes the model `source` in the format `to` as the folder `target`, whole or not at all.

    Args:
      source: anything `open_model` opens.
      merge: merges the adapter into the base: computed in f32, cast once to the base's dtype. An
        NF4 base is dequantised first: a run's adapter is added to the values it was trained on, so
        the merged model predicts as the run does.
      dtype: "float32", "bfloat16" or "float16" (or f32, bf16, f16) for the written dense weights;
        None keeps the stored dtype, and uses that of the embeddings for weights that were NF4.
        "q8_0" for the matrices of a GGUF file.
      quantise: "nf4" for NF4 projections in a jaxre folder. Converting such a folder to Hugging
        Face dequantises them.
      verify: reads the written tensors back before the folder appears. Each must be bit-identical
        to the source, or to its one rounding if it was merged, cast or quantised.

    Raises:
      InputError: a source that does not open, options that contradict each other or change nothing,
        a target that exists or cannot be written, a weight that `dtype` cannot hold, tensors that
        do not read back as written.
    """
    target = Path(target)
    if to not in ("jaxre", "hf", "peft", "gguf"):
        raise InputError(f"{to}: not a form of a model; --to takes jaxre, hf, peft or gguf")
    dtype = SHORT.get(dtype, dtype)
    model = locate(source)
    _check(str(source), model, to, merge, dtype, quantise)
    check_free(target)
    _check_tokenizer(model)
    if to == "peft":
        plan = _plan_adapter(model)
    elif to == "gguf":
        config = None
        if model.kind == "run":
            config = load_config(resolve_model(str(source)) / "config.yaml")
        plan = _plan_gguf(model, merge, dtype, f"{target.resolve().name}.gguf", config)
    else:
        plan = _plan_weights(model, to, merge, dtype, quantise)
    _check_space(target, plan.bytes or sum(_bytes(*form) for form in plan.forms.values()))
    try:
        with atomic_folder(target) as folder:
            plan.write(folder)
            differences = _verify(plan, folder, target) if verify else None
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or error
        raise InputError(
            f"{target}: cannot be written ({reason}); free its disk or name another folder"
        ) from None
    return Conversion(
        source=str(source),
        target=target,
        kind=model.kind,
        to=to,
        merged=merge,
        parameters=sum(math.prod(shape) for shape, _ in plan.forms.values()),
        bytes=sum(file.stat().st_size for file in target.rglob("*") if file.is_file()),
        dtype=", ".join(
            sorted(
                plan.stored_types
                or {"NF4" if dtype is None else dtype.name for _, dtype in plan.forms.values()}
            )
        ),
        differences=differences,
        recast=plan.recast,
        left_out=plan.left_out,
        unreadable=(
            f"{model.base_name}, {NAMES[kind_of(model.folder)]}"
            if to == "peft" and kind_of(model.folder) in ("jaxre", "gguf")
            else None
        ),
    )


def verification_table(conversion: Conversion) -> Table:
    """Tabulates the largest difference of each weight over its layers, and over all weights;
    `to_json` lists every tensor.
    """
    groups: dict[str, dict[str, float]] = {}
    for name, value in conversion.differences.items():
        groups.setdefault(re.sub(r"\.\d+\.", ".*.", name), {})[name] = value
    if any(conversion.differences.values()):
        result = f"rounded to {conversion.dtype}"
    elif conversion.recast:
        result = f"every value kept, as {conversion.dtype}"
    else:
        result = f"bit-identical{' to W + scale A B' if conversion.merged else ''}"
    left_out = f"; left out: {', '.join(conversion.left_out)}" if conversion.left_out else ""
    table = Table(title=f"verified: {result}{left_out}")
    table.add_column("weight (* any layer)", overflow="fold")
    table.add_column("tensors", justify="right", overflow="fold")
    table.add_column("largest difference", justify="right", overflow="fold")
    table.add_column("in", overflow="fold")
    for weight, members in {**groups, "all": conversion.differences}.items():
        worst = max(members, key=members.get)
        table.add_row(
            weight, str(len(members)), f"{members[worst]:.3g}", worst if members[worst] else ""
        )
    return table


def _plan_weights(
    model: Located, to: str, merge: bool, dtype: str | None, quantise: str | None
) -> _Plan:
    tensors = open_weights(model.folder, model.quantise)
    architecture, shapes = tensors.architecture, hf_shapes(tensors.architecture)
    if quantise:
        check_quantisable(architecture, model.folder)
    at, embeddings = positions(architecture), tensors.dtypes[next(iter(shapes))]
    dtypes = {
        name: embeddings if stored is None else stored for name, stored in tensors.dtypes.items()
    }
    if dtype is not None:
        dtypes = dict.fromkeys(dtypes, DTYPES[dtype])
    if quantise:
        dtypes |= {name: None for name in dtypes if at[name][0].lora}
    pairs, scale = _adapter_pairs(model.adapter, architecture) if merge else ({}, 0.0)

    def exact(name: str) -> np.ndarray:
        value = tensors.read(name)
        value = dequantise_matrix(value) if is_nf4(value) else value
        if name not in pairs:
            return value
        with np.errstate(over="ignore", invalid="ignore"):
            merged = merge_one(value, *pairs[name], scale)
        if (~np.isfinite(merged) & np.isfinite(value)).any():
            raise InputError(
                f"{model.adapter}: merged into {name}, it gives values that are not finite; its"
                " factors or lora_alpha are broken"
            )
        return merged

    def write(folder: Path) -> None:
        write_folder = write_base if to == "hf" else write_native
        write_folder(
            folder,
            architecture,
            dtypes,
            _prefetch((name, _cast(name, exact(name), dtypes[name])) for name in dtypes),
            model.folder,
            side_files=side_files_of(model.folder, model.adapter),
        )

    return _Plan(
        forms={name: (shapes[name], dtypes[name]) for name in dtypes},
        exact=exact,
        write=write,
        reader=lambda folder: open_weights(folder).read,
        recast=dtypes != tensors.dtypes,
        left_out=tensors.left_out,
    )


def _plan_gguf(
    model: Located, merge: bool, dtype: str | None, name: str, config: Config | None
) -> _Plan:
    """Like `_plan_weights`, for a GGUF file called `name` and a Modelfile beside it."""
    plan = _plan_weights(model, "hf", merge, None if dtype == "q8_0" else dtype, None)
    architecture = read_architecture(model.folder)
    check_writable(architecture, model.name)
    dtypes = {tensor: dtype for tensor, (_, dtype) in plan.forms.items()}
    kinds = kinds_of(architecture, dtypes, KINDS[dtype] if dtype else None)
    prompt = config.prediction_prompt if config else Prompt()
    side_files = side_files_of(model.folder, model.adapter)
    speech = speech_of(architecture, side_files, model.folder, prompt.date)
    forms = {tensor: (plan.forms[tensor][0], value_dtype(kind)) for tensor, kind in kinds.items()}
    system = _system_of(config) if config else None

    def write(folder: Path) -> None:
        cast = _prefetch(
            (tensor, _cast(tensor, plan.exact(tensor), forms[tensor][1])) for tensor in kinds
        )
        write_gguf(folder / name, architecture, kinds, cast, speech, model.name)
        (folder / "Modelfile").write_text(modelfile(name, speech, system), encoding="utf-8")

    form = form_of(architecture)

    def rounded(tensor: str, value: np.ndarray, dtype: np.dtype) -> np.ndarray:
        value = _cast(tensor, value, dtype)
        if tensor in form.norms:  # stored as 1 + w
            return form.to_hf(tensor, form.to_gguf(tensor, value))
        return through_q8_0(value) if kinds[tensor] == "Q8_0" else value

    def reader(folder: Path) -> Callable[[str], np.ndarray]:
        return tensors_of(folder / name, architecture, read_gguf(folder / name)[1]).read

    return _Plan(
        forms=forms,
        exact=plan.exact,
        write=write,
        reader=reader,
        recast="Q8_0" in kinds.values()
        or any(dtypes[tensor] != dtype for tensor, (_, dtype) in forms.items()),
        left_out=plan.left_out,
        rounded=rounded,
        stored_types=frozenset(
            "Q8_0" if kind == "Q8_0" else value_dtype(kind).name for kind in kinds.values()
        ),
        bytes=bytes_of(architecture, kinds),
    )


def _system_of(config: Config) -> str | None:
    """The system turn that a run was trained with, label list included.

    Raises:
      InputError: a run of several datasets, whose system turns differ; data that cannot be read.
    """
    prompt = config.prediction_prompt
    if config.train.objective != "sft" or not (prompt.enumerate or prompt.task_definition):
        return prompt.system
    task = task_of(config)
    return system_turn(prompt, task.schema.labels, task.dataset or "")


def _prefetch(tensors: Iterator[tuple[str, np.ndarray]]) -> Iterator[tuple[str, np.ndarray]]:
    """The same tensors; a thread makes each while the previous one is written."""
    with ThreadPoolExecutor(1) as thread:
        pending = thread.submit(next, tensors, None)
        while (tensor := pending.result()) is not None:
            pending = thread.submit(next, tensors, None)
            yield tensor


def _adapter_pairs(
    adapter: Path, architecture: AnyArchitecture
) -> tuple[dict[str, tuple[np.ndarray, np.ndarray]], float]:
    """Hugging Face name -> (B, A) in its layout, [O, R] and [R, I], of each targeted weight; and
    the scale.
    """
    lora, factors = load_adapter(adapter, architecture)
    pairs = {}
    for name, (weight, path, index) in positions(architecture).items():
        if weight.name in lora.targets:
            pair = factors[path[0]][weight.name]
            pairs[name] = (pair["b"][index].T, pair["a"][index].T)
    return pairs, scale_of(lora)


def _plan_adapter(model: Located) -> _Plan:
    architecture = read_architecture(model.folder)
    lora, factors = load_adapter(model.adapter, architecture)
    flat = _flat(factors)
    return _Plan(
        forms={name: (value.shape, value.dtype) for name, value in flat.items()},
        exact=flat.__getitem__,
        write=lambda folder: save_adapter(
            folder, architecture, lora, factors, model.base_name, model.folder
        ),
        reader=lambda folder: _flat(load_adapter(folder, architecture)[1]).__getitem__,
    )


def _flat(factors: dict) -> dict[str, np.ndarray]:
    leaves = jax.tree_util.tree_leaves_with_path(factors)
    return {
        jax.tree_util.keystr(path, simple=True, separator="."): leaf
        for path, leaf in leaves
        if leaf.size
    }


def _bytes(shape: tuple[int, ...], dtype: np.dtype | None) -> int:
    parts = nf4_forms(shape).values() if dtype is None else [(shape, dtype)]
    return sum(math.prod(shape) * dtype.itemsize for shape, dtype in parts)


def _cast(name: str, value: np.ndarray, dtype: np.dtype | None) -> np.ndarray | NF4Weight:
    if dtype is None:
        return quantise_matrix(value, name)
    with np.errstate(over="ignore"):
        cast = value.astype(dtype, copy=False)
    if dtype.itemsize < value.dtype.itemsize or dtype == np.float16:
        lost = np.isinf(cast) & np.isfinite(value)
        if lost.any():
            raise InputError(
                f"{name}: {np.asarray(value[lost][0], np.float64):.6g} is too large for"
                f" {dtype.name}; use --dtype float32"
            )
    return cast


def _verify(plan: _Plan, folder: Path, target: Path) -> dict[str, float]:
    """max|written - source| of each tensor. Raises InputError if any is not bit-identical to the
    intended values.
    """
    read, round_to = plan.reader(folder), plan.rounded or _cast
    differences, wrong = {}, {}
    for name, (_, dtype) in plan.forms.items():
        exact, written = plan.exact(name), read(name)
        if dtype is None:
            expected = jax.tree.leaves(_cast(name, exact, dtype))
            differences[name] = _max_difference(exact, dequantise_matrix(written))
            if not is_nf4(written) or not all(
                map(np.array_equal, expected, jax.tree.leaves(written))
            ):
                wrong[name] = differences[name]
            continue
        exact, written, differences[name] = exact.reshape(-1), written.reshape(-1), 0.0
        for start in range(0, exact.size, BLOCK):
            before, after = exact[start : start + BLOCK], written[start : start + BLOCK]
            same = after.dtype == dtype and np.array_equal(
                round_to(name, before, dtype).view(np.uint8), after.view(np.uint8)
            )
            if not same or before.dtype != dtype or plan.rounded:
                differences[name] = max(differences[name], _max_difference(before, after))
            if not same:
                wrong[name] = differences[name]
    if wrong:
        worst = max(wrong, key=wrong.get)
        raise InputError(
            f"{target}: {len(wrong)} of {len(plan.forms)} tensors do not read back as written,"
            f" {worst} by {wrong[worst]:.3g}; do not trust this disk, name a folder on another"
        )
    return differences


def _max_difference(a: np.ndarray, b: np.ndarray) -> float:
    """max|a - b|; infinite where only one of the two is NaN."""
    wide = np.float64 if np.float64 in (a.dtype, b.dtype) else np.float32
    a, b = a.astype(wide), b.astype(wide)
    with np.errstate(over="ignore", invalid="ignore"):
        differences = np.abs(a - b)
    if np.isnan(differences).any():
        differences[(a == b) | (np.isnan(a) & np.isnan(b))] = 0
        differences[np.isnan(differences)] = np.inf
    return float(differences.max())


def _check(
    source: str, model: Located, to: str, merge: bool, dtype: str | None, quantise: str | None
) -> None:
    """Refuses impossible combinations of options before any weight is read."""
    if dtype is not None and to == "peft":
        raise InputError(f"--dtype {dtype}: an adapter is stored in float32; leave it out")
    if dtype is not None and dtype not in KINDS:
        raise InputError(f"--dtype {dtype}: no such type; choose one of {', '.join(KINDS)}")
    if dtype == "q8_0" and to != "gguf":
        raise InputError(f"--dtype {dtype}: only a GGUF file holds such weights; use --to gguf")
    if quantise not in (None, "nf4"):
        raise InputError(f"--quantise {quantise}: not a form of weights that is known; nf4 is")
    if quantise and to != "jaxre":
        raise InputError(
            f"--quantise {quantise}: only a jaxre folder holds NF4 weights; use --to jaxre"
        )
    if to == "peft":
        if model.adapter is None:
            is_run = model.kind == "run"
            reason = "the run trained all weights" if is_run else f"it is {NAMES[model.kind]}"
            raise InputError(
                f"{source}: has no adapter, {reason};"
                f" {'use --to hf' if model.kind != 'hf' else 'train with train.method=lora first'}"
            )
        if merge:
            raise InputError(
                f"{source}: a merged model is no adapter; leave --merge out, or use --to hf"
            )
    elif model.adapter is not None and not merge:
        raise InputError(
            f"{source}: is an adapter on a base; add --merge for a whole model, or use --to peft"
            " for the adapter alone"
        )
    elif merge and model.adapter is None:
        raise InputError(f"{source}: has no adapter to merge; leave --merge out")
    if quantise and model.adapter is not None:
        raise InputError(
            f"{source}: is an adapter on a base; merge it into a folder first, then quantise that"
        )
    if model.kind == to and not _changes_weights(model, dtype, quantise):
        raise InputError(f"{source}: is {NAMES[to]} already; copy the folder")


def _changes_weights(model: Located, dtype: str | None, quantise: str | None) -> bool:
    """True if converting to the same format would change the weights."""
    if dtype is None and quantise is None:
        return False
    if dtype == "q8_0" or model.kind == "gguf":
        return True
    stored = set(open_weights(model.folder).dtypes.values())
    return None not in stored if quantise else stored != {DTYPES[dtype]}


def _check_tokenizer(model: Located) -> None:
    """Raises InputError if the tokenizer has tokens without embeddings, except those in
    WITHOUT_EMBEDDING. A folder may have no tokenizer.
    """
    architecture = read_architecture(model.folder)
    allowed = WITHOUT_EMBEDDING.get(architecture.kind, ())
    for name, path in side_files_of(model.folder, model.adapter).items():
        if name not in TOKEN_IDS:
            continue
        try:
            ids = (int(number) for token, number in TOKEN_IDS[name](path) if token not in allowed)
            highest = max(ids, default=0)
        except InputError:
            raise
        except Exception as error:  # noqa: BLE001 (tokenizers raises bare Exception)
            raise InputError(
                f"{path}: the tokenizer does not load ({first_line(error)}); download it again"
            ) from None
        try:
            check_vocabulary(highest, architecture)
        except InputError as error:
            raise InputError(f"{path}: {error}") from None


def _check_space(target: Path, needed: int) -> None:
    """Raises InputError if the disk is too small, before an hour of writing reveals it."""
    existing = next(parent for parent in target.absolute().parents if parent.is_dir())
    free = shutil.disk_usage(existing).free
    if needed > free:
        raise InputError(
            f"{target}: needs {needed / 1e9:.1f} GB, and {free / 1e9:.1f} GB are free there; name a"
            " folder on another disk"
        )
