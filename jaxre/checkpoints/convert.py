"""From one form of a model to another: Hugging Face folders, our own, PEFT adapters, merged.

    summary = convert("runs/quickstart", Path("facts-merged"), to="hf", merge=True)

Base weights pass through one tensor at a time, so that a model of any size needs the memory of its
largest tensors (the embeddings), not its own.
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

from jaxre.checkpoints.gguf import form_of, read_gguf, tensors_of
from jaxre.checkpoints.gguf_write import (
    bytes_of,
    check_writable,
    kinds_of,
    modelfile,
    speech_of,
    through_q8_0,
    value_dtype,
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
from jaxre.errors import InputError
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
# llama.cpp's words for them, and Q8_0: blocks of 32 values that share a scale, in GGUF only.
KINDS = {"float32": "F32", "bfloat16": "BF16", "float16": "F16", "q8_0": "Q8_0"}
SHORT = {"f32": "float32", "bf16": "bfloat16", "f16": "float16"}
NAMES = {
    "hf": "a Hugging Face folder",
    "jaxre": "a jaxre folder",
    "gguf": "a GGUF file",
    "peft": "a PEFT adapter",
    "run": "a run",
}
BLOCK = 1 << 22  # elements compared at once
# Every file that may give a token its id; tokenizers differ in which of them they read.
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
# Gemma 3's models of text alone have the tokenizer of those that read images, whose token stands
# one behind their embeddings. Text that holds it is refused where it is read.
WITHOUT_EMBEDDING = {"gemma3_text": ("<image_soft_token>",)}


@dataclass(frozen=True)
class Conversion:
    """What was written: numbers of weights and bytes, and their dtype.

    `merged` is whether an adapter was added in. `differences` is, where the folder was verified,
    name of each tensor -> max|written - source|, of NF4 by its values; of a merged one the source
    is W + scale A B in f32. `recast` is whether a tensor has another dtype than in the source;
    `left_out` names tensors of the source's that are not written; `unreadable` is a base that peft
    does not open.
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
    """One conversion: the form of each tensor that is written, its values before the cast, and how
    a folder is written and read.

    A form is (shape, dtype), with None for the dtype of an NF4 weight. `recast` and `left_out` are
    Conversion's. `rounded` (name, values, dtype) is what is meant to be read back, where that is
    not the cast; `words` and `bytes` say what is written where forms do not.
    """

    forms: dict[str, tuple[tuple[int, ...], np.dtype | None]]
    exact: Callable[[str], np.ndarray]
    write: Callable[[Path], None]
    reader: Callable[[Path], Callable[[str], np.ndarray | NF4Weight]]
    recast: bool = False
    left_out: tuple[str, ...] = ()
    rounded: Callable[[str, np.ndarray, np.dtype], np.ndarray] | None = None
    words: frozenset[str] = frozenset()
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
    """Writes `source`, in the form `to`, as the folder `target`, whole or not at all.

    Args:
      source: anything `open_model` opens.
      merge: adds the adapter into the base: formed in f32, cast once to the base's dtype. An NF4
        base is dequantised: a run's adapter goes into the values that it was trained on, and the
        merged model predicts as the run does.
      dtype: "float32", "bfloat16" or "float16" (or f32, bf16, f16) of the written dense weights;
        the stored one is kept if not given, the embeddings' for what was NF4. "q8_0" for the
        matrices of a GGUF file.
      quantise: "nf4" for NF4 projections in a jaxre folder. From there to Hugging Face they are
        dequantised.
      verify: reads back what was written, as the source's tensors, before the folder appears. Each
        must have the bits that were meant: those of the source, or of their one rounding where they
        were merged, cast or quantised.

    Raises:
      InputError: a source that does not open, a combination that says nothing, a target that exists
        or cannot be written, a weight that `dtype` cannot hold, tensors that do not read back as
        written.
    """
    target = Path(target)
    if to not in ("jaxre", "hf", "peft", "gguf"):
        raise InputError(f"{to}: not a form of a model; --to takes jaxre, hf, peft or gguf")
    dtype = SHORT.get(dtype, dtype)
    found = locate(source)
    _check(str(source), found, to, merge, dtype, quantise)
    check_free(target)
    _check_tokenizer(found)
    if to == "peft":
        plan = _plan_adapter(found)
    elif to == "gguf":
        config = None
        if found.kind == "run":
            config = load_config(resolve_model(str(source)) / "config.yaml")
        plan = _plan_gguf(found, merge, dtype, f"{target.resolve().name}.gguf", config)
    else:
        plan = _plan_weights(found, to, merge, dtype, quantise)
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
        kind=found.kind,
        to=to,
        merged=merge,
        parameters=sum(math.prod(shape) for shape, _ in plan.forms.values()),
        bytes=sum(file.stat().st_size for file in target.rglob("*") if file.is_file()),
        dtype=", ".join(sorted(plan.words or {_word(dtype) for _, dtype in plan.forms.values()})),
        differences=differences,
        recast=plan.recast,
        left_out=plan.left_out,
        unreadable=(
            f"{found.base_name}, {NAMES[kind_of(found.folder)]}"
            if to == "peft" and kind_of(found.folder) in ("jaxre", "gguf")
            else None
        ),
    )


def verification_table(conversion: Conversion) -> Table:
    """The largest difference of each weight over its layers, and over all; `to_json` has every
    tensor's.
    """
    groups: dict[str, dict[str, float]] = {}
    for name, value in conversion.differences.items():
        groups.setdefault(re.sub(r"\.\d+\.", ".*.", name), {})[name] = value
    if any(conversion.differences.values()):
        found = f"rounded to {conversion.dtype}"
    else:
        found = f"every value kept, as {conversion.dtype}" if conversion.recast else "bit-identical"
    of = " to W + scale A B" if conversion.merged and found == "bit-identical" else ""
    left_out = f"; left out: {', '.join(conversion.left_out)}" if conversion.left_out else ""
    table = Table(title=f"verified: {found}{of}{left_out}")
    for column in ("weight (* any layer)", "tensors", "largest difference", "in"):
        table.add_column(
            column,
            justify="right" if column in ("tensors", "largest difference") else "left",
            overflow="fold",
        )
    for weight, members in {**groups, "all": conversion.differences}.items():
        worst = max(members, key=members.get)
        table.add_row(
            weight, str(len(members)), f"{members[worst]:.3g}", worst if members[worst] else ""
        )
    return table


def _plan_weights(
    found: Located, to: str, merge: bool, dtype: str | None, quantise: str | None
) -> _Plan:
    tensors = open_weights(found.folder, found.quantise)
    architecture, shapes = tensors.architecture, hf_shapes(tensors.architecture)
    if quantise:
        check_quantisable(architecture, found.folder)
    at, embeddings = positions(architecture), tensors.dtypes[next(iter(shapes))]
    dtypes = {
        name: embeddings if stored is None else stored for name, stored in tensors.dtypes.items()
    }
    if dtype is not None:
        dtypes = dict.fromkeys(dtypes, DTYPES[dtype])
    if quantise:
        dtypes |= {name: None for name in dtypes if at[name][0].lora}
    pairs, scale = _pairs(found, architecture) if merge else ({}, 0.0)

    def exact(name: str) -> np.ndarray:
        value = tensors.read(name)
        value = dequantise_matrix(value) if is_nf4(value) else value
        if name not in pairs:
            return value
        with np.errstate(over="ignore", invalid="ignore"):
            whole = merge_one(value, *pairs[name], scale)
        if (~np.isfinite(whole) & np.isfinite(value)).any():
            raise InputError(
                f"{found.adapter}: merged into {name}, it gives values that are not finite; its"
                " factors or lora_alpha are broken"
            )
        return whole

    def write(folder: Path) -> None:
        fill, adapter = write_base if to == "hf" else write_native, found.adapter
        cast = _ahead((name, _cast(name, exact(name), dtypes[name])) for name in dtypes)
        fill(
            folder,
            architecture,
            dtypes,
            cast,
            found.folder,
            side_files=side_files_of(found.folder, adapter),
        )

    forms = {name: (shapes[name], dtypes[name]) for name in dtypes}
    return _Plan(
        forms,
        exact,
        write,
        lambda folder: open_weights(folder).read,
        dtypes != tensors.dtypes,
        tensors.left_out,
    )


def _plan_gguf(
    found: Located, merge: bool, dtype: str | None, name: str, config: Config | None
) -> _Plan:
    """A plan like that of `_plan_weights`, for one file and a Modelfile beside it."""
    plan = _plan_weights(found, "hf", merge, None if dtype == "q8_0" else dtype, None)
    architecture = open_weights(found.folder, found.quantise).architecture
    check_writable(architecture, found.name)
    dtypes = {tensor: dtype for tensor, (_, dtype) in plan.forms.items()}
    kinds = kinds_of(architecture, dtypes, KINDS[dtype] if dtype else None)
    prompt = config.prediction_prompt if config else Prompt()
    side_files = side_files_of(found.folder, found.adapter)
    speech = speech_of(architecture, side_files, found.folder, prompt.date)
    forms = {tensor: (plan.forms[tensor][0], value_dtype(kind)) for tensor, kind in kinds.items()}
    system = _system_of(config) if config else None

    def write(folder: Path) -> None:
        cast = _ahead(
            (tensor, _cast(tensor, plan.exact(tensor), forms[tensor][1])) for tensor in kinds
        )
        write_gguf(folder / name, architecture, kinds, cast, speech, found.name)
        (folder / "Modelfile").write_text(modelfile(name, speech, system), encoding="utf-8")

    form = form_of(architecture)

    def rounded(tensor: str, value: np.ndarray, dtype: np.dtype) -> np.ndarray:
        value = _cast(tensor, value, dtype)
        if tensor in form.norms:  # stored as 1 + w
            return form.to_hf(tensor, form.to_gguf(tensor, value))
        return through_q8_0(value) if kinds[tensor] == "Q8_0" else value

    def reader(folder: Path) -> Callable[[str], np.ndarray]:
        return tensors_of(folder / name, architecture, read_gguf(folder / name)[1]).read

    recast = any(dtypes[tensor] != dtype for tensor, (_, dtype) in forms.items())
    recast = recast or "Q8_0" in kinds.values()
    words = frozenset(
        "Q8_0" if kind == "Q8_0" else value_dtype(kind).name for kind in kinds.values()
    )
    size = bytes_of(architecture, kinds)
    return _Plan(forms, plan.exact, write, reader, recast, plan.left_out, rounded, words, size)


def _system_of(config: Config) -> str | None:
    """The system turn that a run was trained with, label list included.

    Raises:
      InputError: a run of several datasets, whose system turns differ; data that cannot be read.
    """
    prompt = config.prediction_prompt
    if config.train.objective != "sft" or not (prompt.enumerate or prompt.task_definition):
        return prompt.system
    asked = task_of(config)
    return system_turn(prompt, asked.schema.labels, asked.dataset or "")


def _ahead(tensors: Iterator[tuple[str, np.ndarray]]) -> Iterator[tuple[str, np.ndarray]]:
    """The same, each made in a thread while the one before is written."""
    with ThreadPoolExecutor(1) as thread:
        coming = thread.submit(next, tensors, None)
        while (tensor := coming.result()) is not None:
            coming = thread.submit(next, tensors, None)
            yield tensor


def _pairs(
    found: Located, architecture: AnyArchitecture
) -> tuple[dict[str, tuple[np.ndarray, np.ndarray]], float]:
    """Hugging Face name -> (B, A) in its layout, [O, R] and [R, I], of each targeted weight; and
    the scale.
    """
    lora, factors = load_adapter(found.adapter, architecture)
    pairs = {}
    for name, (weight, path, index) in positions(architecture).items():
        if weight.name in lora.targets:
            pair = factors[path[0]][weight.name]
            pairs[name] = (pair["b"][index].T, pair["a"][index].T)
    return pairs, scale_of(lora)


def _plan_adapter(found: Located) -> _Plan:
    architecture = read_architecture(found.folder)
    lora, factors = load_adapter(found.adapter, architecture)
    flat = _flat(factors)
    return _Plan(
        {name: (value.shape, value.dtype) for name, value in flat.items()},
        flat.__getitem__,
        lambda folder: save_adapter(
            folder, architecture, lora, factors, found.base_name, found.folder
        ),
        lambda folder: _flat(load_adapter(folder, architecture)[1]).__getitem__,
    )


def _flat(factors: dict) -> dict[str, np.ndarray]:
    leaves = jax.tree_util.tree_leaves_with_path(factors)
    return {
        jax.tree_util.keystr(path, simple=True, separator="."): leaf
        for path, leaf in leaves
        if leaf.size
    }


def _word(dtype: np.dtype | None) -> str:
    return "NF4" if dtype is None else dtype.name


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
    """max|written - source| of each tensor. Raises InputError for any that is not, bit for bit,
    what was meant.
    """
    read = plan.reader(folder)
    differences, wrong = {}, {}
    for name, (_, dtype) in plan.forms.items():
        exact, back = plan.exact(name), read(name)
        if dtype is None:
            meant = _cast(name, exact, dtype)
            same = is_nf4(back) and all(
                map(np.array_equal, jax.tree.leaves(meant), jax.tree.leaves(back))
            )
            differences[name] = _gap(exact, dequantise_matrix(back))
            if not same:
                wrong[name] = differences[name]
            continue
        exact, back, differences[name] = exact.reshape(-1), back.reshape(-1), 0.0
        for start in range(0, exact.size, BLOCK):
            one, other = exact[start : start + BLOCK], back[start : start + BLOCK]
            same = other.dtype == dtype and np.array_equal(
                (plan.rounded or _cast)(name, one, dtype).view(np.uint8), other.view(np.uint8)
            )
            if not same or one.dtype != dtype or plan.rounded:
                differences[name] = max(differences[name], _gap(one, other))
            if not same:
                wrong[name] = differences[name]
    if wrong:
        worst = max(wrong, key=wrong.get)
        raise InputError(
            f"{target}: {len(wrong)} of {len(plan.forms)} tensors do not read back as written,"
            f" {worst} by {wrong[worst]:.3g}; do not trust this disk, name a folder on another"
        )
    return differences


def _gap(one: np.ndarray, other: np.ndarray) -> float:
    """max|one - other|; infinite where only one of them is no number."""
    wide = np.float64 if np.float64 in (one.dtype, other.dtype) else np.float32
    one, other = one.astype(wide), other.astype(wide)
    with np.errstate(over="ignore", invalid="ignore"):
        gaps = np.abs(one - other)
    if np.isnan(gaps).any():
        gaps[(one == other) | (np.isnan(one) & np.isnan(other))] = 0
        gaps[np.isnan(gaps)] = np.inf
    return float(gaps.max())


def _check(
    source: str, found: Located, to: str, merge: bool, dtype: str | None, quantise: str | None
) -> None:
    """Refuses what cannot be, before any weight is read."""
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
        if found.adapter is None:
            whole = (
                "the run trained all weights"
                if found.kind == "run"
                else f"it is {NAMES[found.kind]}"
            )
            raise InputError(
                f"{source}: has no adapter, {whole};"
                f" {'use --to hf' if found.kind != 'hf' else 'train with train.method=lora first'}"
            )
        if merge:
            raise InputError(
                f"{source}: a merged model is no adapter; leave --merge out, or use --to hf"
            )
    elif found.adapter is not None and not merge:
        raise InputError(
            f"{source}: is an adapter on a base; add --merge for a whole model, or use --to peft"
            " for the adapter alone"
        )
    elif merge and found.adapter is None:
        raise InputError(f"{source}: has no adapter to merge; leave --merge out")
    if quantise and found.adapter is not None:
        raise InputError(
            f"{source}: is an adapter on a base; merge it into a folder first, then quantise that"
        )
    if found.kind == to and not _changes(found, dtype, quantise):
        raise InputError(f"{source}: is {NAMES[to]} already; copy the folder")


def _changes(found: Located, dtype: str | None, quantise: str | None) -> bool:
    """Whether a folder of the same form would hold other weights."""
    if dtype is None and quantise is None:
        return False
    if dtype == "q8_0" or found.kind == "gguf":
        return True
    stored = set(open_weights(found.folder).dtypes.values())
    return None not in stored if quantise else stored != {DTYPES[dtype]}


def _check_tokenizer(found: Located) -> None:
    """Raises InputError for a tokenizer with tokens that the embeddings lack, but for those that
    models of this kind are published without; a folder may have none.
    """
    architecture = read_architecture(found.folder)
    allowed = WITHOUT_EMBEDDING.get(architecture.kind, ())
    for name, path in side_files_of(found.folder, found.adapter).items():
        if name not in TOKEN_IDS:
            continue
        try:
            ids = (int(number) for token, number in TOKEN_IDS[name](path) if token not in allowed)
            highest = max(ids, default=0)
        except InputError:
            raise
        except Exception as error:  # noqa: BLE001 (tokenizers raises bare Exception)
            raise InputError(
                f"{path}: the tokenizer does not load"
                f" ({next(iter(str(error).splitlines()), type(error).__name__)}); download it again"
            ) from None
        try:
            check_vocabulary(highest, architecture)
        except InputError as error:
            raise InputError(f"{path}: {error}") from None


def _check_space(target: Path, needed: int) -> None:
    """Raises InputError where the disk is too small, before an hour of writing shows it."""
    place = next(parent for parent in target.absolute().parents if parent.is_dir())
    free = shutil.disk_usage(place).free
    if needed > free:
        raise InputError(
            f"{target}: needs {needed / 1e9:.1f} GB, and {free / 1e9:.1f} GB are free there; name a"
            " folder on another disk"
        )
