"""Our own folder: `config.json`, the tokenizer, and the pytree as it lies in memory, each array a TensorStore (Zarr 3).

    write_native(folder, architecture, dtypes, tensors, like=base_folder)
    architecture, params = load_native(folder, np.dtype("float32"))

A chunk is one layer at most, so tensors are written as they come, nothing is stacked in memory, and
a host may read the part it needs. A chunk carries its checksum, and one that is lost is an error.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import tensorstore as ts

from jaxre.checkpoints.huggingface import Tensors, copy_side_files, positions, read_json, transposed, uniform_dtypes
from jaxre.errors import InputError
from jaxre.models.architecture import Architecture, read_architecture
from jaxre.models.weights import places, tree_of

MARKER, WEIGHTS, VERSION = "jaxre.json", "weights", 2
CHUNK_BYTES = 64 * 2**20  # at most; a layer that is larger is cut along its first dimension
MEND = "convert the Hugging Face folder again"


def is_native(folder: Path) -> bool:
    """Whether a folder is ours."""
    return (folder / MARKER).is_file()


def write_native(
    folder: Path, architecture: Architecture, dtypes: dict[str, np.dtype], tensors: Iterable[tuple[str, np.ndarray]], like: Path
) -> None:
    """Fills an empty folder; `like` gives config.json, tokenizer and generation config.

    Args:
      dtypes: Hugging Face name -> dtype of every tensor.
      tensors: (name, array in Hugging Face's layout) of each, once, in any order; two are held at a time. None may change later.

    Raises:
      InputError: layers of one weight that differ in dtype.
      OSError: the disk does not take them.
    """
    stored = uniform_dtypes(architecture, dtypes, like)
    stores = {path: _create(folder, path, shape, stored[weight.name]) for weight, path, shape, _ in places(architecture) if 0 not in shape}
    at, writing = positions(architecture), None
    for name, tensor in tensors:
        weight, path, index = at.pop(name)
        array = transposed(tensor) if weight.transpose else tensor
        _wait(writing)  # so that one is written while the next is read
        # Nobody changes the array, so it need not be copied: measured twice as fast.
        writing = stores[path][index].write(array, can_reference_source_data_indefinitely=True)
    _wait(writing)
    if at:
        raise ValueError(f"not written: {', '.join(at)}")
    shutil.copyfile(like / "config.json", folder / "config.json")
    copy_side_files(like, folder)
    (folder / MARKER).write_text(json.dumps({"format": "jaxre weights", "version": VERSION}) + "\n", encoding="utf-8")


def open_native(folder: Path) -> Tensors:
    """The weights of our folder; no data is read yet.

    Raises:
      InputError: another version, or weights that are broken or do not fit config.json (all listed).
    """
    architecture, stores = _open(Path(folder))
    at = positions(architecture)

    def read(name: str) -> np.ndarray:
        weight, path, index = at[name]
        value = _read(Path(folder), stores[path][index])
        return transposed(value) if weight.transpose else value

    return Tensors(architecture, {name: stores[path].dtype.numpy_dtype for name, (_, path, _) in at.items()}, read)


def load_native(folder: Path, dtype: np.dtype | None = None) -> tuple[Architecture, dict]:
    """Architecture and weights (numpy) of our folder.

    Args:
      dtype: of the arrays; as stored if not given.

    Raises:
      InputError: another version, or weights that are broken or do not fit config.json (all listed).
    """
    architecture, stores = _open(Path(folder))
    arrays = {path: _read(Path(folder), store if dtype is None else ts.cast(store, np.dtype(dtype))) for path, store in stores.items()}
    for _, path, shape, _ in places(architecture):
        if 0 in shape:  # a model of one layer has no stack, and TensorStore holds no empty array
            arrays[path] = np.zeros(shape, arrays["last", path[1]].dtype)
    return architecture, tree_of(arrays.items())


def _open(folder: Path) -> tuple[Architecture, dict[tuple[str, ...], ts.TensorStore]]:
    version = read_json(folder / MARKER).get("version")
    if version != VERSION:
        raise InputError(f"{folder / MARKER}: version {version!r} is not known, this jaxre reads {VERSION}; {MEND}")
    architecture = read_architecture(folder)
    weights = folder / WEIGHTS
    if not weights.is_dir():
        raise InputError(f"{weights}: no such folder; {MEND}")
    expected = {".".join(path): (path, shape) for _, path, shape, _ in places(architecture) if 0 not in shape}
    found = {path.name for path in weights.iterdir()}
    problems = [f"{name} is missing" for name in expected if name not in found]
    problems += [f"{name} is not known" for name in sorted(found - expected.keys())]
    stores = {}
    for name, (path, shape) in expected.items():
        if name not in found:
            continue
        # Without this option a chunk that is lost would read as zeros.
        spec = {"driver": "zarr3", "kvstore": _location(folder, path), "fill_missing_data_reads": False}
        try:
            stores[path] = ts.open(spec, read=True).result()
        except ValueError as error:
            raise _unreadable(folder, error) from None
        if stores[path].shape != shape:
            problems.append(f"{name} has shape {list(stores[path].shape)}, expected {list(shape)}")
    if problems:
        raise InputError(f"{weights}: {'; '.join(problems)}; the weights do not fit config.json; {MEND}")
    return architecture, stores


def _create(folder: Path, path: tuple[str, ...], shape: tuple[int, ...], dtype: np.dtype) -> ts.TensorStore:
    layer = shape[1:] if path[0] == "layers" else shape
    rows = max(1, min(layer[0], CHUNK_BYTES * layer[0] // (int(np.prod(layer)) * dtype.itemsize)))
    spec = {
        "driver": "zarr3",
        "kvstore": _location(folder, path),
        "metadata": {
            "shape": shape,
            "data_type": dtype.name,
            "chunk_grid": {
                "name": "regular",
                "configuration": {"chunk_shape": [1] * (len(shape) - len(layer)) + [rows, *layer[1:]]},
            },
            "codecs": [{"name": "bytes", "configuration": {"endian": "little"}}, {"name": "crc32c"}],
        },
        "store_data_equal_to_fill_value": True,  # zeros are data: biases and norms
    }
    try:
        return ts.open(spec, create=True).result()
    except ValueError as error:
        raise OSError(_reason(error)) from None


def _location(folder: Path, path: tuple[str, ...]) -> dict[str, str | bool]:
    # Left to the kernel when a chunk reaches the disk, as with every other file that we write.
    return {"driver": "file", "path": f"{folder.absolute() / WEIGHTS / '.'.join(path)}/", "file_io_sync": False}


def _read(folder: Path, store: ts.TensorStore) -> np.ndarray:
    try:
        return store.read().result()
    except ValueError as error:
        raise _unreadable(folder, error) from None


def _wait(writing: ts.WriteFutures | None) -> None:
    try:
        if writing is not None:
            writing.result()
    except ValueError as error:  # TensorStore's class for what the disk refuses
        raise OSError(_reason(error)) from None


def _unreadable(folder: Path, error: ValueError) -> InputError:
    return InputError(f"{folder / WEIGHTS}: the store cannot be read ({_reason(error)}); {MEND}")


def _reason(error: ValueError) -> str:
    return str(error).splitlines()[0].split(" [")[0]
