"""Our own folder: `config.json`, the tokenizer, and the pytree as it lies in memory, each array a
TensorStore (Zarr 3).

    write_native(folder, architecture, dtypes, tensors, like=base_folder)
    architecture, params = load_native(folder, np.dtype("float32"))

A chunk is one layer at most, so tensors are written as they come, nothing is stacked in memory, and
a host may read the part it needs. A chunk carries its checksum, and one that is lost is an error.
The projections may be NF4: each is then stored as its four arrays.
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
CHUNK_BYTES = 64 * 2**20  # at most; a layer that is larger is cut along its first dimension
MEND = "convert the Hugging Face folder again"


def is_native(folder: Path) -> bool:
    """Whether a folder is ours."""
    return (folder / MARKER).is_file()


def stored_quantised(folder: Path) -> str | None:
    """How the projections of our folder are stored: "nf4", or None where they are dense."""
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
    """Fills an empty folder; `like` gives config.json, tokenizer and generation config.

    Args:
      side_files: name -> path of these two, where they are not those of `like`.
      dtypes: Hugging Face name -> dtype of every tensor; None, of all projections, where they come
        as NF4.
      tensors: (name, array in Hugging Face's layout) of each, once, in any order; two are held at a
        time. None may change later.

    Raises:
      InputError: layers of one weight that differ in dtype.
      OSError: the disk does not take them.
    """
    stored = uniform_dtypes(architecture, dtypes, like)
    stores = {}
    for weight, path, shape, _ in places(architecture):
        if 0 in shape:
            continue  # a model of one layer has no stack, and TensorStore holds no empty array
        if stored[weight.name] is None:
            made = {
                field: _create(folder, (*path, field), *form)
                for field, form in forms(shape[:-3:-1], shape[:-2]).items()
            }
            stores[path] = NF4Weight(**made, shape=shape[:-3:-1])
        else:
            stores[path] = _create(folder, path, shape, stored[weight.name])
    at, writing = positions(architecture), None
    # where a tensor is refused too: what is still written would bring the folder back that is then
    # removed
    try:
        for name, tensor in tensors:
            weight, path, index = at.pop(name)
            array = transposed(tensor) if weight.transpose and not is_nf4(tensor) else tensor
            _wait(writing)  # so that one is written while the next is read
            # Nobody changes the array, so it need not be copied: measured twice as fast.
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
    """The weights of our folder; no data is read yet.

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
    """Architecture and weights (numpy) of our folder.

    Args:
      dtype: of the dense arrays; as stored if not given.
      quantise: "nf4" for projections as NF4; those that are stored so are taken as they are.

    Raises:
      InputError: another version, or weights that are broken or do not fit config.json (all
        listed).
    """
    if quantise and not stored_quantised(folder):
        return gathered(quantised(open_native(folder), folder), dtype, folder)
    architecture, stores = _open(Path(folder))
    arrays = {}
    for path, store in stores.items():
        arrays[path] = _read(
            Path(folder),
            store if dtype is None or is_nf4(store) else ts.cast(store, np.dtype(dtype)),
        )
    for _, path, shape, _ in places(architecture):
        if 0 in shape:
            last = arrays["last", path[1]]
            arrays[path] = jax.tree.map(lambda leaf: np.zeros((0, *leaf.shape), leaf.dtype), last)
    return architecture, tree_of(arrays.items())


def _open(
    folder: Path,
) -> tuple[AnyArchitecture, dict[tuple[str, ...], ts.TensorStore | NF4Weight]]:
    """The store of each array of our pytree; of an NF4 weight its four, as an NF4Weight."""
    version, nf4 = read_json(folder / MARKER).get("version"), stored_quantised(folder)
    if version != VERSION:
        raise InputError(
            f"{folder / MARKER}: version {version!r} is not known, this jaxre reads {VERSION};"
            f" {MEND}"
        )
    if nf4 not in (None, "nf4"):
        raise InputError(f"{folder / MARKER}: quantised as {nf4!r}, this jaxre reads nf4; {MEND}")
    architecture = read_architecture(folder)
    weights = folder / WEIGHTS
    if not weights.is_dir():
        raise InputError(f"{weights}: no such folder; {MEND}")
    found = {path.name for path in weights.iterdir()}
    if isinstance(architecture, EncoderArchitecture):
        architecture = with_head_of(architecture, found)
    held = [place for place in places(architecture) if 0 not in place[2]]
    expected = {}
    for weight, path, shape, _ in held:
        parts = {path: (shape, None)}  # any of the dtypes of weights
        if nf4 and weight.lora:
            parts = {
                (*path, field): form for field, form in forms(shape[:-3:-1], shape[:-2]).items()
            }
        expected |= {".".join(part): (part, *form) for part, form in parts.items()}
    problems = [f"{name} is missing" for name in expected if name not in found]
    problems += [f"{name} is not known" for name in sorted(found - expected.keys())]
    stores = {}
    for name, (path, shape, dtype) in expected.items():
        if name not in found:
            continue
        # Without this option a chunk that is lost would read as zeros.
        spec = {
            "driver": "zarr3",
            "kvstore": _location(folder, path),
            "fill_missing_data_reads": False,
        }
        try:
            stores[path] = ts.open(spec, read=True).result()
        except ValueError as error:
            raise _unreadable(folder, error) from None
        if stores[path].shape != shape:
            problems.append(f"{name} has shape {list(stores[path].shape)}, expected {list(shape)}")
        kinds, kind = (
            [dtype] if dtype else list(STORED_DTYPES.values()),
            stores[path].dtype.numpy_dtype,
        )
        if kind not in kinds:
            problems.append(
                f"{name} is stored as {kind.name}, which is not"
                f" {' or '.join(one.name for one in kinds)}"
            )
    if problems:
        raise InputError(
            f"{weights}: {'; '.join(problems)}; the weights do not fit config.json; {MEND}"
        )
    for weight, path, shape, _ in held:
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
    # Left to the kernel when a chunk reaches the disk, as with every other file that we write.
    return {
        "driver": "file",
        "path": f"{folder.absolute() / WEIGHTS / '.'.join(path)}/",
        "file_io_sync": False,
    }


def _read(folder: Path, store: ts.TensorStore | NF4Weight) -> np.ndarray | NF4Weight:
    try:
        return jax.tree.map(lambda one: np.asarray(one.read().result()), store)
    except ValueError as error:
        raise _unreadable(folder, error) from None


def _wait(writing: ts.WriteFutures | NF4Weight | None) -> None:
    try:
        for one in jax.tree.leaves(writing):
            one.result()
    except ValueError as error:  # TensorStore's class for what the disk refuses
        raise OSError(_reason(error)) from None


def _unreadable(folder: Path, error: ValueError) -> InputError:
    return InputError(f"{folder / WEIGHTS}: the store cannot be read ({_reason(error)}); {MEND}")


def _reason(error: ValueError) -> str:
    return str(error).splitlines()[0].split(" [")[0]
