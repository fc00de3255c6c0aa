"""Reads and writes safetensors files one tensor at a time.

    tensors = {name: tensor.read() for name, tensor in stored_tensors(path).items()}
    write_shards(folder, {"model.norm.weight": ((64,), np.dtype(np.float32))}, tensors.items())

`safetensors.numpy.save_file` needs all tensors of a file in memory: 5 GB a shard. Here the headers
are written first (sizes are known before any weight is read), then each tensor at its offset, in
any order. `safe_open` checks a file, but the data is read straight into numpy: measured 4 times as
fast as `get_tensor`, and without mapped pages that would count as the process's memory.
"""

from __future__ import annotations

import contextlib
import json
import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open

from jaxre.errors import InputError

# Safetensors' names of the types that a weight may have.
STORED_DTYPES = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
}
SHARD_BYTES = 5 * 10**9  # transformers' and the hub's usual size

PICKLED = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
CONVERT_PICKLED = (
    "convert them with transformers: model.save_pretrained(folder, safe_serialization=True)"
)

Form = tuple[tuple[int, ...], np.dtype]  # shape and dtype of a tensor


@dataclass(frozen=True)
class Stored:
    """One tensor of a file, known from the header. `kind` is safetensors' name of its dtype."""

    path: Path
    kind: str
    shape: tuple[int, ...]
    start: int
    bytes: int

    @property
    def dtype(self) -> np.dtype:
        """Raises KeyError for a type that is not in STORED_DTYPES."""
        return STORED_DTYPES[self.kind]

    def read(self) -> np.ndarray:
        """The tensor. Raises InputError if the disk fails."""
        data = read_bytes(self.path, self.start, self.bytes)
        return data.view(self.dtype).reshape(self.shape)


def read_bytes(path: Path, start: int, count: int) -> np.ndarray:
    """[count] uint8 of a file from offset `start`. Raises InputError if the disk fails."""
    try:
        data = np.fromfile(path, np.uint8, count, offset=start)
    except OSError as error:
        raise InputError(
            f"{path}: cannot be read ({error.strerror}); give a file that may be read"
        ) from None
    if data.size < count:
        raise InputError(f"{path}: became shorter while it was read; download it again")
    return data


def is_pickled(name: str) -> bool:
    """True if a file's name is that of pickled weights or of their index."""
    return name.lower().removesuffix(".index.json").endswith(PICKLED)


def stored_tensors(path: Path) -> dict[str, Stored]:
    """Name -> tensor of a safetensors file, in the order of their data.

    Raises:
      InputError: a file that is missing, truncated, corrupt or pickled.
    """
    if is_pickled(path.name):
        raise InputError(f"{path}: pickled weights, which are never read; {CONVERT_PICKLED}")
    try:
        # Checks that header, types, shapes and length agree.
        safe_open(path, framework="np", backend="pread")
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(length))
    except (SafetensorError, OSError) as error:
        raise InputError(
            f"{path}: not a whole safetensors file ({error}); download it again"
        ) from None
    header.pop("__metadata__", None)
    tensors = {}
    for name, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
        start, end = entry["data_offsets"]
        tensors[name] = Stored(
            path, entry["dtype"], tuple(entry["shape"]), 8 + length + start, end - start
        )
    return tensors


def write_shards(
    folder: Path, forms: dict[str, Form], tensors: Iterable[tuple[str, np.ndarray]]
) -> None:
    """Writes `model.safetensors`, or shards of at most SHARD_BYTES with their index; a larger
    tensor has a shard of its own.

    Args:
      forms: name -> (shape, dtype) of every tensor, in the order of their data.
      tensors: (name, array of that form) of each tensor once, in any order; one is held at a time.

    Raises:
      ValueError: tensors that do not match `forms`.
      OSError: the disk refuses a write.
    """
    kinds = {dtype: kind for kind, dtype in STORED_DTYPES.items()}
    shards = _shards(forms)
    count = len(shards)
    names = ["model.safetensors"]
    if count > 1:
        names = [f"model-{n:05d}-of-{count:05d}.safetensors" for n in range(1, count + 1)]
    places = {}
    with contextlib.ExitStack() as stack:
        for file_name, members in zip(names, shards, strict=True):
            header: dict = {"__metadata__": {"format": "pt"}}
            end = 0
            for name in members:
                start, end = end, end + _bytes(forms[name])
                header[name] = {
                    "dtype": kinds[forms[name][1]],
                    "shape": forms[name][0],
                    "data_offsets": (start, end),
                }
            text = json.dumps(header, separators=(",", ":")).encode()
            text += b" " * (-len(text) % 8)  # aligns the data
            file = stack.enter_context((folder / file_name).open("wb"))
            file.write(len(text).to_bytes(8, "little") + text)
            places |= {
                name: (file, 8 + len(text) + header[name]["data_offsets"][0]) for name in members
            }
        for name, tensor in tensors:
            file, place = places.pop(name)
            if (tensor.shape, tensor.dtype) != forms[name]:
                raise ValueError(f"{name}: {tensor.dtype} {tensor.shape} is not {forms[name]}")
            file.seek(place)
            file.write(np.ascontiguousarray(tensor).reshape(-1).view(np.uint8))
        if places:
            raise ValueError(f"not written: {', '.join(places)}")
    if count > 1:
        index = {
            "metadata": {"total_size": sum(map(_bytes, forms.values()))},
            "weight_map": {
                name: file_name
                for file_name, members in zip(names, shards, strict=True)
                for name in members
            },
        }
        (folder / "model.safetensors.index.json").write_text(
            json.dumps(index, indent=2) + "\n", encoding="utf-8"
        )


def _shards(forms: dict[str, Form]) -> list[list[str]]:
    """The names in each shard; wide types come first, which aligns every tensor to its type."""
    shards: list[list[str]] = [[]]
    size = 0
    for name in sorted(forms, key=lambda name: -forms[name][1].itemsize):
        if shards[-1] and size + _bytes(forms[name]) > SHARD_BYTES:
            shards.append([])
            size = 0
        shards[-1].append(name)
        size += _bytes(forms[name])
    return shards


def _bytes(form: Form) -> int:
    return math.prod(form[0]) * form[1].itemsize
