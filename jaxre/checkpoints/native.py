"""Reads and writes jaxre folders: `config.json`, the tokenizer, and our pytree with each array as a
TensorStore (Zarr 3).

    write_native(folder, architecture, dtypes, tensors, like=base_folder)
    architecture, params = load_native(folder, np.dtype("float32"))

A chunk is at most one layer, so tensors are written as they arrive without stacking them in memory,
and a host can read just the part it needs. Each chunk has a checksum; a missing chunk is an error.
An NF4 projection is stored as its four arrays.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable
from pathlib import Path

import jax
import numpy as np
import tensorstore as ts
from jaxre_kernels.nf4 import NF4Weight, forms

from jaxre.checkpoints.encoder_folder import with_head_of
from jaxre.checkpoints.huggingface import (
    Tensors,
    copy_side_files,
    gathered,
    positions,
    quantised,
    read_json,
    side_files_of,
    transposed,
    uniform_dtypes,
)
from jaxre.checkpoints.shards import STORED_DTYPES
from jaxre.errors import InputError
from jaxre.models.architecture import EncoderArchitecture, read_architecture
from jaxre.models.quantised import is_nf4
from jaxre.models.weights import AnyArchitecture, places, tree_of

MARKER, WEIGHTS, VERSION = "jaxre.json", "weights", 2
CHUNK_BYTES = 64 * 2**20  # at most; a larger layer is split along its first dimension
REMEDY = "convert the Hugging Face folder again"


def is_native(folder: Path) -> bool:
    """True for a jaxre folder."""
    return (folder / MARKER).is_file()


def stored_quantised(folder: Path) -> str | None:
    """The stored format of a jaxre folder's projections: "nf4", or None if they are dense."""
    return read_json(folder / MARKER).get("quantised")


def write_native(
    folder: Path,
    architecture: AnyArchitecture,
    dtypes: dict[str, np.dtype | None],
    tensors: Iterable[tuple[str, np.ndarray | NF4Weight]],
    like: Path,
    *,
    side_files: dict[str, Path] | None = None,
) -> None:
    """Fills an empty folder; copies config.json, tokenizer and generation config from `like`.

    Args:
      dtypes: Hugging Face name -> dtype of every tensor; None for all projections if they are NF4.
      tensors: (name, array in Hugging Face's layout) of each tensor once, in any order; two are
        held at a time. The arrays must not change afterwards.
      side_files: name -> path of tokenizer and generation config, if not those of `like`.

    Raises:
      InputError: layers of one weight differ in dtype.
      OSError: the disk refuses a write.
    """
    stored = uniform_dtypes(architecture, dtypes, like)
    stores = {}
    for weight, path, shape, _ in places(architecture):
        if 0 in shape:
            continue  # a model of one layer has no stack, and TensorStore holds no empty array
        if stored[weight.name] is None:
            arrays = {
                field: _create(folder, (*path, field), *form)
                for field, form in forms(shape[:-3:-1], shape[:-2]).items()
            }
            stores[path] = NF4Weight(**arrays, shape=shape[:-3:-1])
        else:
            stores[path] = _create(folder, path, shape, stored[weight.name])
    at, writing = positions(architecture), None
    # Waits after an error too: a pending write would recreate the folder after its removal.
    try:
        for name, tensor in tensors:
            weight, path, index = at.pop(name)
            array = transposed(tensor) if weight.transpose and not is_nf4(tensor) else tensor
            _wait(writing)  # a tensor is written while the next one is read
            # The array does not change, so it need not be copied: measured twice as fast.
            writing = jax.tree.map(
                lambda store, part, index=index: store[index].write(
                    part, can_reference_source_data_indefinitely=True
                ),
                stores[path],
                array,
            )
    finally:
        _wait(writing)
    if at:
        raise ValueError(f"not written: {', '.join(at)}")
    shutil.copyfile(like / "config.json", folder / "config.json")
    copy_side_files(side_files_of(like) if side_files is None else side_files, folder)
    marker = {"format": "jaxre weights", "version": VERSION}
    if any(dtype is None for dtype in stored.values()):
        marker["quantised"] = "nf4"
    (folder / MARKER).write_text(json.dumps(marker) + "\n", encoding="utf-8")


def open_native(folder: Path) -> Tensors:
    """Opens the weights of a jaxre folder without reading data.

    Raises:
      InputError: another version, or weights that are broken or do not fit config.json (all
        listed).
    """
    architecture, stores = _open(Path(folder))
    at = positions(architecture)

    def read(name: str) -> np.ndarray:
        weight, path, index = at[name]
        value = _read(Path(folder), jax.tree.map(lambda store: store[index], stores[path]))
        return transposed(value) if weight.transpose and not is_nf4(value) else value

    dtypes = {
        name: None if is_nf4(stores[path]) else stores[path].dtype.numpy_dtype
        for name, (_, path, _) in at.items()
    }
    return Tensors(architecture, dtypes, read)


def load_native(
    folder: Path, dtype: np.dtype | None = None, quantise: str | None = None
) -> tuple[AnyArchitecture, dict]:
    """Architecture and weights (numpy) of a jaxre folder.

    Args:
      dtype: of the dense arrays; None keeps the stored dtype.
      quantise: "nf4" for NF4 projections; those stored as NF4 are not quantised again.

    Raises:
      InputError: another version, or weights that are broken or do not fit config.json (all
        listed).
    """
    folder = Path(folder)
    if quantise and not stored_quantised(folder):
        return gathered(quantised(open_native(folder), folder), dtype, folder)
    architecture, stores = _open(folder)
    arrays = {}
    for path, store in stores.items():
        if dtype is not None and not is_nf4(store):
            store = ts.cast(store, np.dtype(dtype))
        arrays[path] = _read(folder, store)
    for _, path, shape, _ in places(architecture):
        if 0 in shape:
            last = arrays["last", path[1]]
            arrays[path] = jax.tree.map(lambda leaf: np.zeros((0, *leaf.shape), leaf.dtype), last)
    return architecture, tree_of(arrays.items())


def _open(
    folder: Path,
) -> tuple[AnyArchitecture, dict[tuple[str, ...], ts.TensorStore | NF4Weight]]:
    """The store of each array of our pytree; an NF4 weight is an NF4Weight of its four stores."""
    version, nf4 = read_json(folder / MARKER).get("version"), stored_quantised(folder)
    if version != VERSION:
        raise InputError(
            f"{folder / MARKER}: version {version!r} is not known, this jaxre reads {VERSION};"
            f" {REMEDY}"
        )
    if nf4 not in (None, "nf4"):
        raise InputError(f"{folder / MARKER}: quantised as {nf4!r}, this jaxre reads nf4; {REMEDY}")
    architecture = read_architecture(folder)
    weights = folder / WEIGHTS
    if not weights.is_dir():
        raise InputError(f"{weights}: no such folder; {REMEDY}")
    names = {path.name for path in weights.iterdir()}
    if isinstance(architecture, EncoderArchitecture):
        architecture = with_head_of(architecture, names)
    not_empty = [place for place in places(architecture) if 0 not in place[2]]
    expected = {}
    for weight, path, shape, _ in not_empty:
        parts = {path: (shape, None)}  # any of STORED_DTYPES
        if nf4 and weight.lora:
            parts = {
                (*path, field): form for field, form in forms(shape[:-3:-1], shape[:-2]).items()
            }
        expected |= {".".join(part): (part, *form) for part, form in parts.items()}
    problems = [f"{name} is missing" for name in expected if name not in names]
    problems += [f"{name} is not known" for name in sorted(names - expected.keys())]
    stores = {}
    for name, (path, shape, dtype) in expected.items():
        if name not in names:
            continue
        # Without fill_missing_data_reads=False a missing chunk would read as zeros.
        spec = {
            "driver": "zarr3",
            "kvstore": _location(folder, path),
            "fill_missing_data_reads": False,
        }
        try:
            store = stores[path] = ts.open(spec, read=True).result()
        except ValueError as error:
            raise _unreadable(folder, error) from None
        if store.shape != shape:
            problems.append(f"{name} has shape {list(store.shape)}, expected {list(shape)}")
        allowed = [dtype] if dtype else list(STORED_DTYPES.values())
        stored = store.dtype.numpy_dtype
        if stored not in allowed:
            problems.append(
                f"{name} is stored as {stored.name}, which is not"
                f" {' or '.join(dtype.name for dtype in allowed)}"
            )
    if problems:
        raise InputError(
            f"{weights}: {'; '.join(problems)}; the weights do not fit config.json; {REMEDY}"
        )
    for weight, path, shape, _ in not_empty:
        if nf4 and weight.lora:
            stores[path] = NF4Weight(
                **{field: stores.pop((*path, field)) for field in forms(shape[:-3:-1])},
                shape=shape[:-3:-1],
            )
    return architecture, stores


def _create(
    folder: Path, path: tuple[str, ...], shape: tuple[int, ...], dtype: np.dtype
) -> ts.TensorStore:
    layer = shape[1:] if path[0] == "layers" else shape
    if layer:
        rows = max(
            1, min(layer[0], CHUNK_BYTES * layer[0] // (int(np.prod(layer)) * dtype.itemsize))
        )
        layer = (rows, *layer[1:])
    spec = {
        "driver": "zarr3",
        "kvstore": _location(folder, path),
        "metadata": {
            "shape": shape,
            "data_type": dtype.name,
            "chunk_grid": {
                "name": "regular",
                "configuration": {"chunk_shape": [1] * (len(shape) - len(layer)) + list(layer)},
            },
            "codecs": [
                {"name": "bytes", "configuration": {"endian": "little"}},
                {"name": "crc32c"},
            ],
        },
        "store_data_equal_to_fill_value": True,  # zeros are data: biases and norms
    }
    try:
        return ts.open(spec, create=True).result()
    except ValueError as error:
        raise OSError(_reason(error)) from None


def _location(folder: Path, path: tuple[str, ...]) -> dict[str, str | bool]:
    # Without file_io_sync the kernel decides when a chunk reaches the disk, as for all our files.
    return {
        "driver": "file",
        "path": f"{folder.absolute() / WEIGHTS / '.'.join(path)}/",
        "file_io_sync": False,
    }


def _read(folder: Path, store: ts.TensorStore | NF4Weight) -> np.ndarray | NF4Weight:
    try:
        return jax.tree.map(lambda array: np.asarray(array.read().result()), store)
    except ValueError as error:
        raise _unreadable(folder, error) from None


def _wait(writing: ts.WriteFutures | NF4Weight | None) -> None:
    try:
        for future in jax.tree.leaves(writing):
            future.result()
    except ValueError as error:  # TensorStore raises it for a failed write
        raise OSError(_reason(error)) from None


def _unreadable(folder: Path, error: ValueError) -> InputError:
    return InputError(f"{folder / WEIGHTS}: the store cannot be read ({_reason(error)}); {REMEDY}")


def _reason(error: ValueError) -> str:
    return str(error).splitlines()[0].split(" [")[0]
