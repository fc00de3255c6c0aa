"""Hugging Face folders in and out, driven by the weight table.

architecture, params = load_base(folder, jnp.float32)
save_base(target, architecture, params, like=folder)
"""

from __future__ import annotations

import glob
import json
import os
import re
import shutil
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import EllipsisType
from typing import Any

import jax
import numpy as np
from jaxre_kernels.nf4 import NF4Weight, empty
from transformers import PreTrainedTokenizerBase

from jaxre.checkpoints.encoder_folder import BUFFERS, classifier_fields, stored_names, with_head_of
from jaxre.checkpoints.shards import (
    MEND_PICKLED,
    STORED_DTYPES,
    Form,
    Stored,
    is_pickled,
    stored_tensors,
    write_shards,
)
from jaxre.errors import InputError
from jaxre.models.architecture import EncoderArchitecture, read_architecture
from jaxre.models.quantised import is_nf4, quantise_matrix
from jaxre.models.weights import AnyArchitecture, Weight, places, tree_of

# Tables that old versions of transformers stored beside the weights; they follow from config.json.
HARMLESS = re.compile(r"model\.(layers\.\d+\.self_attn\.)?rotary_emb\.inv_freq")
# What a folder carries beside its weights; copied on export.
SIDE_FILES = (
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "chat_template.jinja",
    "added_tokens.json",
    "tokenizer.model",
)
VOCABULARIES = ("tokenizer.json", "vocab.json", "vocab.txt", "tokenizer.model")
TEMPLATES = "additional_chat_templates"  # a folder: a tokenizer's templates beside its default one


@dataclass(frozen=True)
class Tensors:
    """The weights of a folder, read one at a time, so that a model passes through without being
    held.

    `dtypes` is name -> stored dtype in the order in which they lie on disk, None for NF4;
    `read(name)` gives one tensor. Names and layout are Hugging Face's, whatever the folder is.
    `left_out` names stored tensors that are not weights of this architecture (the head of an
    encoder's pretraining).
    """

    architecture: AnyArchitecture
    dtypes: dict[str, np.dtype | None]
    read: Callable[[str], np.ndarray | NF4Weight]
    left_out: tuple[str, ...] = ()


def folder_tensors(folder: Path) -> dict[str, Stored | str]:
    """Hugging Face name -> tensor, from `model.safetensors` or, where there is none, the sharded
    index (transformers' order).

    In the order in which they lie on disk. One that the index and its file do not agree on is what
    is wrong with it: loaders differ in which of the two they follow.

    Raises:
      InputError: no safetensors (pickled weights are never read), a broken index, a missing or
        outside shard.
    """
    single, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if single.is_file():
        return dict(stored_tensors(single))
    if index.is_file():
        names = read_json(index).get("weight_map")
        if (
            not isinstance(names, dict)
            or not names
            or not all(isinstance(shard, str) for shard in names.values())
        ):
            raise InputError(
                f"{index}: not a safetensors index; its weight_map must name a file for each tensor"
            )
        for shard in sorted(set(names.values())):
            # The name decides, not where a link leads: the hub's cache links each file to a folder
            # of blobs.
            if shard in (".", "..") or Path(shard).name != shard or "\\" in shard:
                raise InputError(
                    f"{index}: points at {shard}, outside the folder; an index may name files"
                    " beside it only"
                )
            if not (folder / shard).is_file():
                raise InputError(
                    f"{folder / shard}: no such file, though {index.name} names it; download it"
                    " again"
                )
        lying = [
            pair
            for shard in sorted(set(names.values()))
            for pair in stored_tensors(folder / shard).items()
        ]
        found: dict[str, Stored | str] = {
            name: one for name, one in lying if names.get(name) == one.path.name
        }
        found |= {
            name: f"lies in {one.path.name}, where the index has it not"
            for name, one in lying
            if names.get(name) != one.path.name
        }
        return found | dict.fromkeys(
            (name for name in names if name not in found),
            "is not in its file, though the index says so",
        )
    pickled = sorted(path.name for path in folder.iterdir() if is_pickled(path.name))
    if pickled:
        raise InputError(
            f"{folder}: only pickled weights ({pickled[0]}), which are never read; {MEND_PICKLED}"
        )
    # Of a hub's model the pickled files are not downloaded, so what it has of them is not known
    # here.
    hub = (
        f"; if it has pickled weights, which are never read, {MEND_PICKLED}"
        if folder.parent.name == "snapshots"
        else ""
    )
    raise InputError(
        f"{folder}: no model.safetensors and no model.safetensors.index.json; give a folder that"
        f" holds its weights{hub}"
    )


def open_base(folder: Path) -> Tensors:
    """The weights of a Hugging Face folder; no data is read yet. An encoder's head may be missing.

    Raises:
      InputError: listing every missing, misshapen and unknown tensor, or a broken file.
    """
    folder = Path(folder)
    architecture = read_architecture(folder)
    stored, left_out = folder_tensors(folder), ()
    if isinstance(architecture, EncoderArchitecture):
        names = stored_names(architecture, stored, folder)
        left_out = tuple(
            sorted(
                name for name in stored.keys() - set(names.values()) if not name.endswith(BUFFERS)
            )
        )
        stored = {ours: stored[own] for ours, own in names.items()}
        architecture = with_head_of(architecture, stored)
    check_tensors(folder, architecture, stored)
    head = stored.get("lm_head.weight") if architecture.tied_head else None
    if head is not None and not np.array_equal(
        head.read(), stored["model.embed_tokens.weight"].read()
    ):
        raise InputError(
            f"{folder}: config.json ties the head to the embeddings, but lm_head.weight differs"
            " from them; set tie_word_embeddings to false, or remove the tensor"
        )
    wanted = hf_shapes(architecture)
    dtypes = {name: one.dtype for name, one in stored.items() if name in wanted}
    return Tensors(architecture, dtypes, lambda name: stored[name].read(), left_out)


def load_base(
    folder: Path, dtype: np.dtype | None = None, quantise: str | None = None
) -> tuple[AnyArchitecture, dict]:
    """The architecture and weights (numpy, our layout) from a folder.

    Args:
      dtype: of the dense arrays; as stored if not given.
      quantise: "nf4" for projections as NF4, of the stored values; the host then holds the
        quantised model and one tensor.

    Raises:
      InputError: listing every missing, misshapen and unknown tensor, or a broken file.
    """
    tensors = open_base(folder)
    return gathered(quantised(tensors, folder) if quantise else tensors, dtype, folder)


def quantised(tensors: Tensors, place: Path) -> Tensors:
    """The same with the projections as NF4, each quantised when it is read; those that are NF4
    already are taken as they are.

    Raises:
      InputError: a model that has no such projections, with `place` in front.
    """
    check_quantisable(tensors.architecture, place)
    at = positions(tensors.architecture)
    dtypes = {name: None if at[name][0].lora else dtype for name, dtype in tensors.dtypes.items()}

    def read(name: str) -> np.ndarray | NF4Weight:
        value = tensors.read(name)
        return (
            quantise_matrix(value, f"{place}: {name}")
            if dtypes[name] is None and not is_nf4(value)
            else value
        )

    return Tensors(tensors.architecture, dtypes, read)


def check_quantisable(architecture: AnyArchitecture, place: str | Path) -> None:
    """Raises InputError for an encoder: NF4 holds a frozen base of LoRA, and encoders are trained
    whole.
    """
    if isinstance(architecture, EncoderArchitecture):
        raise InputError(
            f"{place}: is an encoder ({architecture.kind}); nf4 is for the projections of decoders,"
            " leave it out"
        )


def gathered(tensors: Tensors, dtype: np.dtype | None, place: Path) -> tuple[AnyArchitecture, dict]:
    """The architecture and all weights as our pytree; each tensor goes straight into its place of
    the stack.

    Args:
      dtype: of the dense arrays; as stored if not given.

    Raises:
      InputError: layers of one weight that differ in dtype, with `place` in front.
    """
    at = positions(tensors.architecture)
    chosen = {
        name: stored if dtype is None or stored is None else np.dtype(dtype)
        for name, stored in tensors.dtypes.items()
    }
    dtypes = uniform_dtypes(tensors.architecture, chosen, place)
    arrays = {
        path: (
            empty(shape[:-3:-1], shape[:-2])
            if dtypes[weight.name] is None
            else np.empty(shape, dtypes[weight.name])
        )
        for weight, path, shape, _ in places(tensors.architecture)
    }
    for name in tensors.dtypes:
        weight, path, index = at[name]
        value = tensors.read(name)
        for whole, one in zip(
            jax.tree.leaves(arrays[path]), jax.tree.leaves(value), strict=True
        ):  # four of an NF4 weight
            whole[index] = transposed(one) if weight.transpose and not is_nf4(value) else one
    return tensors.architecture, tree_of(arrays.items())


def save_base(
    target: Path,
    architecture: AnyArchitecture,
    params: dict,
    like: Path,
    dtype: np.dtype | None = None,
    *,
    config: dict[str, Any] | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    replace: bool = False,
) -> None:
    """Writes a folder that transformers loads: weights, config, and the side files of `like`.

    The folder appears whole or not at all.

    Args:
      params: our pytree (numpy or jax arrays).
      like: the folder whose config.json, tokenizer and generation config are carried along.
      dtype: of the stored weights; as they are if not given.
      config: the fields of config.json, where they are not those of `like` (a model trained from
        scratch).
      tokenizer: where it is not that of `like` (an encoder's, with its entity markers).
      replace: whether a folder that is there already is replaced.

    Raises:
      InputError: the target exists (and is not to be replaced) or cannot be made.
    """
    leaves = {name: _leaf(params, path) for name, (_, path, _) in positions(architecture).items()}
    dtypes = {name: np.dtype(dtype or leaf.dtype) for name, leaf in leaves.items()}
    with atomic_folder(target, replace=replace) as folder:
        write_base(
            folder,
            architecture,
            dtypes,
            hf_tensors(architecture, params, dtype),
            like,
            config=config,
            tokenizer=tokenizer,
        )


def write_base(
    folder: Path,
    architecture: AnyArchitecture,
    dtypes: dict[str, np.dtype],
    tensors: Iterable[tuple[str, np.ndarray]],
    like: Path,
    *,
    config: dict[str, Any] | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    side_files: dict[str, Path] | None = None,
) -> None:
    """Fills an empty folder as `save_base` does, from tensors that come one at a time.

    Args:
      dtypes: Hugging Face name -> dtype of every tensor.
      tensors: (name, array in Hugging Face's layout), in any order.
      side_files: name -> path, where they are not those of `like`.
    """
    fields = dict(read_json(like / "config.json") if config is None else config)
    shapes = hf_shapes(architecture)
    forms: dict[str, Form] = {name: (shape, dtypes[name]) for name, shape in shapes.items()}
    write_shards(folder, forms, tensors)
    fields.pop("torch_dtype", None)
    fields["dtype"] = next(iter(forms.values()))[1].name  # the embeddings'
    if isinstance(architecture, EncoderArchitecture):
        fields |= classifier_fields(architecture)
    (folder / "config.json").write_text(json.dumps(fields, indent=2) + "\n", encoding="utf-8")
    if tokenizer is None:
        copy_side_files(side_files_of(like) if side_files is None else side_files, folder)
    else:
        tokenizer.save_pretrained(folder)


def side_files_of(folder: Path, adapter: Path | None = None) -> dict[str, Path]:
    """Name -> path of what `folder` carries beside its weights; what `adapter` has is taken from
    there.

    An adapter with a whole tokenizer takes the place of the base's: added tokens or templates of
    two do not mix.
    """
    found: dict[str, Path] = {}
    for place in filter(None, (folder, adapter)):
        if (place / "tokenizer_config.json").is_file() and any(
            (place / name).is_file() for name in VOCABULARIES
        ):
            found = {name: path for name, path in found.items() if name == "generation_config.json"}
        found |= {
            name: place / name for name in (*SIDE_FILES, TEMPLATES) if (place / name).exists()
        }
    return found


def copy_side_files(files: dict[str, Path], target: Path) -> None:
    """Tokenizer and generation config, as `side_files_of` gives them."""
    for name, path in files.items():
        (shutil.copytree if path.is_dir() else shutil.copyfile)(path, target / name)


def positions(
    architecture: AnyArchitecture,
) -> dict[str, tuple[Weight, tuple[str, ...], int | EllipsisType]]:
    """Hugging Face name -> (row, path in our pytree, index of the layer in a stack or `...`) of
    each tensor.
    """
    return {
        name: (weight, path, layer if path[0] == "layers" else ...)
        for weight, path, _, _ in places(architecture)
        for layer, name in enumerate(_hf_names_at(architecture, weight, path))
    }


def transposed(matrix: np.ndarray) -> np.ndarray:
    """A matrix [I, O] as a contiguous [O, I].

    Sixty-four rows at a time, copied aside with a gap between them: at a stride of a power of two a
    column's lines share one set of the cache. Measured on [11008, 2048] in bf16: 1,700 MB/s,
    numpy's copy of `matrix.T` 270.
    """
    inputs, outputs = matrix.shape
    turned = np.empty((outputs, inputs), matrix.dtype)
    aside = np.empty((64, outputs + 32), matrix.dtype)[:, :outputs]
    for row in range(0, inputs, 64):
        rows = aside[: inputs - row]
        rows[...] = matrix[row : row + 64]
        turned[:, row : row + 64] = rows.T
    return turned


def hf_shapes(architecture: AnyArchitecture) -> dict[str, tuple[int, ...]]:
    """Hugging Face name -> shape in its layout, of every tensor that a folder of this architecture
    must have.
    """
    return {
        name: weight.shape(architecture)[:: -1 if weight.transpose else 1]
        for weight, path, _, _ in places(architecture)
        for name in _hf_names_at(architecture, weight, path)
    }


def hf_tensors(
    architecture: AnyArchitecture, params: dict, dtype: np.dtype | None = None
) -> Iterator[tuple[str, np.ndarray]]:
    """(Hugging Face name, tensor in its layout) of each base weight; a tied head is not written."""
    for weight, path, _, _ in places(architecture):
        value = np.asarray(_leaf(params, path))  # one copy to the host per array, not per layer
        for layer, name in enumerate(_hf_names_at(architecture, weight, path)):
            one = value[layer] if path[0] == "layers" else value
            one = one.astype(dtype or one.dtype, copy=False)
            yield name, transposed(one) if weight.transpose else np.ascontiguousarray(one)


def _leaf(params: dict, path: tuple[str, ...]) -> Any:
    for key in path:
        params = params[key]
    return params


def check_free(target: Path) -> None:
    """Raises InputError where something stands in the way of a new folder; an empty folder does
    not.
    """
    if target.is_dir() and (os.path.ismount(target.resolve()) or target.resolve() == Path.cwd()):
        raise InputError(
            f"{target}: is the current folder or a mount point, which no folder can replace; name a"
            " folder in it"
        )
    if (target.exists() or target.is_symlink()) and not (
        target.is_dir() and not any(target.iterdir())
    ):
        raise InputError(f"{target}: exists already; remove it or name another folder")


class atomic_folder:
    """A folder that is renamed into place when the block ends well, and removed when it does not.

    Where the target is a link to a folder, that folder is meant and the link stays.

    Args:
      replace: whether a folder that is there already is replaced (it stays until the new one is
        whole).

    Raises:
      InputError: the target is a file, a folder that is not empty (unless replaced), or cannot be
        made.
    """

    def __init__(self, target: Path, *, replace: bool = False):
        self.target, self.replace = Path(target), replace

    def __enter__(self) -> Path:
        if not (self.replace and self.target.is_dir()):
            check_free(self.target)
        self.place = self.target.resolve()
        self.partial = self.place.with_name(f".{self.place.name}.partial-{os.getpid()}")
        self.old = self.place.with_name(f".{self.place.name}.old-{os.getpid()}")
        try:
            for left in self.place.parent.glob(f".{glob.escape(self.place.name)}.partial-*"):
                if not _alive(left.name.rpartition("-")[2]):
                    shutil.rmtree(left)
                    print(
                        f"removed {left}, the unfinished folder of a process that was killed",
                        file=sys.stderr,
                    )
            shutil.rmtree(self.partial, ignore_errors=True)
            self.partial.mkdir(parents=True)
        except OSError as error:
            raise InputError(
                f"{self.target}: cannot be made ({error.strerror}: {error.filename}); name another"
                " folder"
            ) from None
        return self.partial

    def __exit__(self, kind, error, trace) -> None:
        if kind is not None:
            shutil.rmtree(self.partial, ignore_errors=True)
            return
        try:
            if self.replace and self.place.is_dir():
                self.place.rename(self.old)
            # takes the place of an empty folder, and fails on what came there meanwhile
            self.partial.rename(self.place)
        except OSError as failure:
            shutil.rmtree(self.partial, ignore_errors=True)
            if self.old.is_dir():
                self.old.rename(self.place)
            raise InputError(
                f"{self.target}: cannot be put in its place ({failure.strerror}); remove what came"
                " there meanwhile or name another folder"
            ) from None
        shutil.rmtree(self.old, ignore_errors=True)


def _alive(pid: str) -> bool:
    try:
        os.kill(int(pid), 0)
    except ProcessLookupError:
        return False
    except (
        OSError,
        ValueError,
        OverflowError,
    ):  # another user's process, or a name that is not ours
        return True
    return True


def read_json(path: Path) -> dict[str, Any]:
    """A JSON file that holds an object. Raises InputError."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(
            f"{path}: cannot be read ({error.strerror}); give a file that is there and may be read"
        ) from None
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise InputError(
            f"{path}: not valid JSON ({error}); correct it or download it again"
        ) from None
    if not isinstance(value, dict):
        raise InputError(f"{path}: must hold one JSON object; correct it or download it again")
    return value


def check_tensors(folder: Path, architecture: AnyArchitecture, stored: dict[str, Any]) -> None:
    """Raises InputError listing every tensor that is missing, misshapen, of no floating-point type,
    or not known.
    """
    shapes = hf_shapes(architecture)
    problems = [
        f"{name} {found}"
        for name, found in stored.items()
        if isinstance(found, str) and not HARMLESS.fullmatch(name)
    ]
    for name, expected in shapes.items():
        if name not in stored:
            problems.append(f"{name} is missing")
        elif isinstance(found := stored[name], str):
            continue
        elif found.shape != expected:
            problems.append(f"{name} has shape {list(found.shape)}, expected {list(expected)}")
        elif isinstance(found, Stored) and found.kind not in STORED_DTYPES:
            problems.append(
                f"{name} is stored as {found.kind}, which is not one of {', '.join(STORED_DTYPES)}"
            )
    known = set(shapes)
    if architecture.tied_head:
        known.add("lm_head.weight")  # compared with the embeddings by the caller
    problems += [
        f"{name} is not known"
        for name in sorted(stored)
        if name not in known and not isinstance(stored[name], str) and not HARMLESS.fullmatch(name)
    ]
    if problems:
        raise InputError(f"{folder}: {'; '.join(problems)}; the weights do not fit config.json")


def uniform_dtypes(
    architecture: AnyArchitecture, dtypes: dict[str, np.dtype | None], place: Path
) -> dict[str, np.dtype | None]:
    """Name of our weight -> its dtype, from that of each tensor; None is NF4.

    Raises:
      InputError: listing the weights whose layers differ in dtype, which no stack can hold.
    """
    kinds: dict[str, set[np.dtype | None]] = {}
    for name, (weight, _, _) in positions(architecture).items():
        kinds.setdefault(weight.name, set()).add(dtypes[name])
    mixed = {
        name: " and ".join(sorted(dtype.name for dtype in found))
        for name, found in kinds.items()
        if len(found) > 1
    }
    if mixed:
        listed = "; ".join(f"{name} is stored as {found}" for name, found in mixed.items())
        raise InputError(
            f"{place}: {listed} in different layers; choose one with jaxre convert --dtype"
        )
    return {name: found.pop() for name, found in kinds.items()}


def _hf_names_at(architecture: AnyArchitecture, weight: Weight, path: tuple[str, ...]) -> list[str]:
    """The Hugging Face names of one array of our pytree: L-1 for a stack, else one."""
    if path[0] == "layers":
        return [weight.hf.format(layer=layer) for layer in range(architecture.layers - 1)]
    return [weight.hf.format(layer=architecture.layers - 1)]
