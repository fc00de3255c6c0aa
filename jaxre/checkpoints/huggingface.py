"""Hugging Face folders in and out, driven by the weight table.

architecture, params = load_base(folder, jnp.float32)
save_base(target, architecture, params, like=folder)
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import ml_dtypes  # registers bfloat16 with numpy, which safetensors needs
import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from jaxre.errors import InputError
from jaxre.models.architecture import Architecture, read_architecture
from jaxre.models.quantised import quantise_matrices
from jaxre.models.weights import Weight, places, tree_of

# Safetensors' words for the types a weight may have.
STORED_DTYPES = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
}
# Tables that old versions of transformers stored beside the weights; they follow from config.json.
HARMLESS = re.compile(r"model\.(layers\.\d+\.self_attn\.)?rotary_emb\.inv_freq")
SHARD_BYTES = 5 * 10**9
# What a folder carries beside its weights; copied on export.
SIDE_FILES = (
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "added_tokens.json",
    "tokenizer.model",
)


def resolve_model(path: str) -> Path:
    """The local folder of a model: a folder, what the project ships by name, or a hub snapshot.

    Raises:
      InputError: neither a folder nor a model that the hub (or its local cache) has.
    """
    from jaxre.config import shipped

    folder = Path(path).expanduser()
    if folder.is_dir():
        return folder
    if shipped(path).is_dir() and "/" not in path:
        return shipped(path)
    if path.count("/") != 1 or path.startswith((".", "/", "~")):
        raise InputError(f"{path}: no such model folder; give a folder, a hub id OWNER/NAME, or the shipped facts-base")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(path, allow_patterns=["*.json", "*.safetensors", "*.txt", "*.jinja", "*.model"]))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        reason = (str(error) or repr(error)).splitlines()[0]
        raise InputError(f"{path}: not a folder, and the hub did not give it ({reason}); download it and give the folder") from None


def weight_files(folder: Path) -> dict[str, Path]:
    """Hugging Face name -> file, from `model.safetensors` or, where there is none, the sharded index (transformers' order).

    Raises:
      InputError: no safetensors (pickled weights are never read), a broken index, a missing or outside shard.
    """
    single, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if single.is_file():
        with open_safetensors(single) as file:
            return dict.fromkeys(file.keys(), single)
    if index.is_file():
        names = read_json(index).get("weight_map")
        if not isinstance(names, dict) or not names or not all(isinstance(shard, str) for shard in names.values()):
            raise InputError(f"{index}: not a safetensors index; its weight_map must name a file for each tensor")
        for shard in sorted(set(names.values())):
            # The name decides, not where a link leads: the hub's cache links each file to a folder of blobs.
            if shard in (".", "..") or Path(shard).name != shard or "\\" in shard:
                raise InputError(f"{index}: points at {shard}, outside the folder; an index may name files beside it only")
            if not (folder / shard).is_file():
                raise InputError(f"{folder / shard}: no such file, though {index.name} names it; download it again")
        return {name: folder / shard for name, shard in names.items()}
    pickled = sorted(path.name for pattern in ("*.bin", "*.pt", "*.pth") for path in folder.glob(pattern))
    if pickled:
        raise InputError(
            f"{folder}: only pickled weights ({pickled[0]}), which are never read; "
            "convert them with transformers: model.save_pretrained(folder, safe_serialization=True)"
        )
    raise InputError(f"{folder}: no model.safetensors and no model.safetensors.index.json")


def load_base(folder: Path, dtype: np.dtype | None = None, quantise: str | None = None) -> tuple[Architecture, dict]:
    """A decoder's architecture and weights (numpy, our layout) from a folder.

    Each tensor is read straight into its place of the stack, so the host holds the model and one tensor.

    Args:
      dtype: of the arrays; as stored if not given.
      quantise: "nf4" for projections as NF4, of the stored values; the host then holds the quantised model and one tensor.

    Raises:
      InputError: listing every missing, misshapen and unknown tensor, or a broken file.
    """
    folder = Path(folder)
    architecture = read_architecture(folder)
    files = weight_files(folder)
    with contextlib.ExitStack() as stack:
        opened = {path: stack.enter_context(open_safetensors(path)) for path in sorted(set(files.values()))}
        stored = {name: _stored(opened[path], name, path) for name, path in files.items()}
        _check_tensors(folder, architecture, stored)

        def read(name: str) -> np.ndarray:
            return read_tensor(opened[files[name]], name, files[name])

        arrays = {}
        for weight, path, shape, _ in places(architecture):
            names = _hf_names_at(architecture, weight, path)
            if quantise and weight.lora:
                arrays[path] = quantise_matrices(shape, map(read, names), (f"{folder}: {name}" for name in names))
                continue
            array = np.empty(shape, dtype or _stored_dtype(folder, architecture, weight, stored))
            for layer, name in enumerate(names):
                value = read(name).T if weight.transpose else read(name)
                array[layer if path[0] == "layers" else ...] = value
            arrays[path] = array
        tied_head = "lm_head.weight"
        if architecture.tied_head and tied_head in files and not np.array_equal(read(tied_head), read("model.embed_tokens.weight")):
            raise InputError(
                f"{folder}: config.json ties the head to the embeddings, but {tied_head} differs from them; "
                "set tie_word_embeddings to false, or remove the tensor"
            )
    return architecture, tree_of(arrays.items())


def save_base(
    target: Path,
    architecture: Architecture,
    params: dict,
    like: Path,
    dtype: np.dtype | None = None,
    *,
    config: dict[str, Any] | None = None,
    replace: bool = False,
) -> None:
    """Writes a folder that transformers loads: weights, config, and the side files of `like`.

    The folder appears whole or not at all.

    Args:
      params: our pytree (numpy or jax arrays).
      like: the folder whose config.json, tokenizer and generation config are carried along.
      dtype: of the stored weights; as they are if not given.
      config: the fields of config.json, where they are not those of `like` (a model trained from scratch).
      replace: whether a folder that is there already is replaced.

    Raises:
      InputError: the target exists (and is not to be replaced) or cannot be made.
    """
    fields = dict(read_json(like / "config.json") if config is None else config)
    with atomic_folder(target, replace=replace) as folder:
        stored = _save_shards(folder, architecture, params, dtype)
        fields.pop("torch_dtype", None)
        fields["dtype"] = stored.name
        (folder / "config.json").write_text(json.dumps(fields, indent=2) + "\n", encoding="utf-8")
        copy_side_files(like, folder)


def copy_side_files(source: Path, target: Path) -> None:
    """Tokenizer and generation config, where `source` has them."""
    for name in SIDE_FILES:
        if (source / name).is_file():
            shutil.copyfile(source / name, target / name)


def hf_shapes(architecture: Architecture) -> dict[str, tuple[int, ...]]:
    """Hugging Face name -> shape in its layout, of every tensor that a folder of this architecture must have."""
    return {
        name: weight.shape(architecture)[:: -1 if weight.transpose else 1]
        for weight, path, _, _ in places(architecture)
        for name in _hf_names_at(architecture, weight, path)
    }


def hf_tensors(architecture: Architecture, params: dict, dtype: np.dtype | None = None) -> Iterator[tuple[str, np.ndarray]]:
    """(Hugging Face name, tensor in its layout) of each base weight; a tied head is not written."""
    for weight, path, _, _ in places(architecture):
        value = params
        for key in path:
            value = value[key]
        value = np.asarray(value)  # one copy to the host per array, not per layer
        for layer, name in enumerate(_hf_names_at(architecture, weight, path)):
            one = value[layer] if path[0] == "layers" else value
            one = one.T if weight.transpose else one
            yield name, np.ascontiguousarray(one.astype(dtype or one.dtype, copy=False))


def check_free(target: Path) -> None:
    """Raises InputError where something stands in the way of a new folder; an empty folder does not."""
    if (target.exists() or target.is_symlink()) and not (target.is_dir() and not any(target.iterdir())):
        raise InputError(f"{target}: exists already; remove it or name another folder")


class atomic_folder:
    """A folder that is renamed into place when the block ends well, and removed when it does not.

    Args:
      replace: whether a folder that is there already is replaced (it stays until the new one is whole).

    Raises:
      InputError: the target is a file, a folder that is not empty (unless replaced), or cannot be made.
    """

    def __init__(self, target: Path, *, replace: bool = False):
        self.target = Path(target)
        absolute = self.target.absolute()
        self.partial = absolute.with_name(f".{absolute.name}.partial-{os.getpid()}")
        self.old = absolute.with_name(f".{absolute.name}.old-{os.getpid()}")
        self.replace = replace

    def __enter__(self) -> Path:
        if not (self.replace and self.target.is_dir()):
            check_free(self.target)
        try:
            shutil.rmtree(self.partial, ignore_errors=True)
            self.partial.mkdir(parents=True)
        except OSError as error:
            raise InputError(f"{self.target}: cannot be made ({error.strerror}: {error.filename}); name another folder") from None
        return self.partial

    def __exit__(self, kind, error, trace) -> None:
        if kind is not None:
            shutil.rmtree(self.partial)
            return
        if self.target.is_dir():
            self.target.rename(self.old)
        self.partial.rename(self.target)
        shutil.rmtree(self.old, ignore_errors=True)


def read_json(path: Path) -> dict[str, Any]:
    """A JSON file that holds an object. Raises InputError."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror})") from None
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise InputError(f"{path}: not valid JSON ({error})") from None
    if not isinstance(value, dict):
        raise InputError(f"{path}: must hold one JSON object")
    return value


def open_safetensors(path: Path):
    """A safetensors file, read as numpy. Raises InputError for one that is missing, truncated or corrupt."""
    try:
        return safe_open(path, framework="np")
    except (SafetensorError, OSError) as error:
        raise InputError(f"{path}: not a whole safetensors file ({error}); download it again") from None


def read_tensor(file, name: str, path: Path) -> np.ndarray:
    """One tensor of an open file. Raises InputError for a type that numpy lacks."""
    try:
        return file.get_tensor(name)
    except (SafetensorError, TypeError, ValueError) as error:
        raise InputError(f"{path}: {name} cannot be read ({error})") from None


def _stored(file, name: str, path: Path) -> tuple[tuple[int, ...], str]:
    """(shape, safetensors' word for the dtype) of one tensor, from the header alone."""
    try:
        header = file.get_slice(name)
    except SafetensorError as error:
        raise InputError(f"{path}: {name} is not in it, though the index says so ({error}); download it again") from None
    return tuple(header.get_shape()), header.get_dtype()


def _check_tensors(folder: Path, architecture: Architecture, stored: dict[str, tuple[tuple[int, ...], str]]) -> None:
    """Raises InputError listing every tensor that is missing, misshapen, of no floating-point type, or not known."""
    problems, shapes = [], hf_shapes(architecture)
    for name, expected in shapes.items():
        shape, kind = stored.get(name, (None, None))
        if shape is None:
            problems.append(f"{name} is missing")
        elif shape != expected:
            problems.append(f"{name} has shape {list(shape)}, expected {list(expected)}")
        elif kind not in STORED_DTYPES:
            problems.append(f"{name} is stored as {kind}, which is not one of {', '.join(STORED_DTYPES)}")
    known = set(shapes)
    if architecture.tied_head:
        known.add("lm_head.weight")  # compared with the embeddings by the caller
    problems += [f"{name} is not known" for name in sorted(stored) if name not in known and not HARMLESS.fullmatch(name)]
    if problems:
        raise InputError(f"{folder}: {'; '.join(problems)}; the weights do not fit config.json")


def _stored_dtype(folder: Path, architecture: Architecture, weight: Weight, stored: dict[str, tuple[tuple[int, ...], str]]) -> np.dtype:
    layers = range(architecture.layers) if weight.in_layer else (0,)
    kinds = {stored[weight.hf.format(layer=layer)][1] for layer in layers}
    if len(kinds) > 1:
        raise InputError(
            f"{folder}: {weight.hf} is stored as {' and '.join(sorted(kinds))} in different layers; save the model in one dtype"
        )
    return STORED_DTYPES[kinds.pop()]


def _hf_names_at(architecture: Architecture, weight: Weight, path: tuple[str, ...]) -> list[str]:
    """The Hugging Face names of one array of our pytree: L-1 for a stack, else one."""
    if path[0] == "layers":
        return [weight.hf.format(layer=layer) for layer in range(architecture.layers - 1)]
    return [weight.hf.format(layer=architecture.layers - 1)]


def _save_shards(folder: Path, architecture: Architecture, params: dict, dtype: np.dtype | None) -> np.dtype:
    """Writes the weights, holding one shard at a time, and returns the dtype of the embeddings."""
    weight_map: dict[str, int] = {}
    shard: dict[str, np.ndarray] = {}
    number, size, total, first = 1, 0, 0, None

    def flush() -> None:
        save_file(shard, folder / f"shard-{number}", metadata={"format": "pt"})
        weight_map.update(dict.fromkeys(shard, number))

    for name, value in hf_tensors(architecture, params, dtype):
        if shard and size + value.nbytes > SHARD_BYTES:
            flush()
            shard, number, size = {}, number + 1, 0
        shard[name] = value
        size, total, first = size + value.nbytes, total + value.nbytes, first or value.dtype
    flush()
    if number == 1:
        (folder / "shard-1").rename(folder / "model.safetensors")
        return first
    names = {one: f"model-{one:05d}-of-{number:05d}.safetensors" for one in range(1, number + 1)}
    for one, name in names.items():
        (folder / f"shard-{one}").rename(folder / name)
    index = {"metadata": {"total_size": total}, "weight_map": {name: names[one] for name, one in weight_map.items()}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    return first
