"""Safetensors files of a folder, written one tensor at a time.

    write_shards(folder, {"model.norm.weight": ((64,), np.dtype(np.float32))}, tensors)

`safetensors.numpy.save_file` wants every tensor of a file in memory at once: 5 GB a shard. Here all
headers are written first (sizes are known before any weight is read), then each tensor at its place,
in whatever order they come.
"""

from __future__ import annotations

import contextlib
import json
import math
from collections.abc import Iterable
from pathlib import Path

import ml_dtypes  # registers bfloat16 with numpy, which safetensors needs
import numpy as np

# Safetensors' words for the types a weight may have.
STORED_DTYPES = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
}
SHARD_BYTES = 5 * 10**9  # transformers' and the hub's usual size

Form = tuple[tuple[int, ...], np.dtype]  # shape and dtype of a tensor


def write_shards(folder: Path, forms: dict[str, Form], tensors: Iterable[tuple[str, np.ndarray]]) -> None:
    """Writes `model.safetensors`, or shards of at most SHARD_BYTES (a larger tensor is one alone) and their index.

    Args:
      forms: name -> (shape, dtype) of every tensor, in the order in which they are laid out.
      tensors: (name, array of that form) of each, once, in any order; one is held at a time.

    Raises:
      ValueError: tensors that are not those of `forms`.
      OSError: the disk does not take them.
    """
    words = {dtype: word for word, dtype in STORED_DTYPES.items()}
    shards = _shards(forms)
    names = ["model.safetensors"] if len(shards) == 1 else [f"model-{n:05d}-of-{len(shards):05d}.safetensors" for n in _counted(shards)]
    places = {}
    with contextlib.ExitStack() as stack:
        for file_name, members in zip(names, shards, strict=True):
            header: dict = {"__metadata__": {"format": "pt"}}
            end = 0
            for name in members:
                start, end = end, end + _bytes(forms[name])
                header[name] = {"dtype": words[forms[name][1]], "shape": forms[name][0], "data_offsets": (start, end)}
            text = json.dumps(header, separators=(",", ":")).encode()
            text += b" " * (-len(text) % 8)  # so that the data is aligned
            file = stack.enter_context((folder / file_name).open("wb"))
            file.write(len(text).to_bytes(8, "little") + text)
            places |= {name: (file, 8 + len(text) + header[name]["data_offsets"][0]) for name in members}
        for name, tensor in tensors:
            file, place = places.pop(name)
            if (tensor.shape, tensor.dtype) != forms[name]:
                raise ValueError(f"{name}: {tensor.dtype} {tensor.shape} is not {forms[name]}")
            file.seek(place)
            file.write(np.ascontiguousarray(tensor).reshape(-1).view(np.uint8))
        if places:
            raise ValueError(f"not written: {', '.join(places)}")
    if len(shards) > 1:
        index = {
            "metadata": {"total_size": sum(map(_bytes, forms.values()))},
            "weight_map": {name: file_name for file_name, members in zip(names, shards, strict=True) for name in members},
        }
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _shards(forms: dict[str, Form]) -> list[list[str]]:
    """The names of each shard; wide types first, which keeps every tensor aligned to its own."""
    shards: list[list[str]] = [[]]
    size = 0
    for name in sorted(forms, key=lambda name: -forms[name][1].itemsize):
        if shards[-1] and size + _bytes(forms[name]) > SHARD_BYTES:
            shards.append([])
            size = 0
        shards[-1].append(name)
        size += _bytes(forms[name])
    return shards


def _counted(shards: list) -> range:
    return range(1, len(shards) + 1)


def _bytes(form: Form) -> int:
    return math.prod(form[0]) * form[1].itemsize
