"""The token cache: TensorStore arrays in a folder or a gs:// bucket, one entry per digest.

An entry is complete once its `manifest.json` exists, which is written last; a killed writer
leaves an entry that the next run writes again.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import tensorstore as ts

from jaxre.data.tokens import TokenSet

_ARRAYS = ("tokens", "starts", "prompt_lengths", "ids")


def cached_tokens(cache: str, digest: str, make: Callable[[], TokenSet]) -> tuple[TokenSet, bool]:
    """The entry of `digest`, made and stored if it is not there.

    Returns:
      The tokens, and whether they came from the cache.
    """
    base = location(cache, digest)
    store = ts.KvStore.open(base).result()
    manifest = store.read("manifest.json").result()
    if manifest.state == "value" and json.loads(manifest.value)["digest"] == digest:
        arrays = {name: _read(base, name) for name in _ARRAYS}
        ids = bytes(arrays.pop("ids")).decode().split("\n") if arrays["ids"].size else []
        return TokenSet(**arrays, ids=tuple(ids)), True
    made = make()
    ids = np.frombuffer("\n".join(made.ids).encode(), np.uint8)
    for name, value in zip(_ARRAYS, (made.tokens, made.starts, made.prompt_lengths, ids), strict=True):
        _write(base, name, value)
    store.write("manifest.json", json.dumps({"digest": digest, "examples": len(made), "tokens": int(made.tokens.size)}).encode()).result()
    return made, False


def location(cache: str, digest: str) -> str:
    """TensorStore URL of an entry."""
    if "://" in cache:
        return f"{cache.rstrip('/')}/{digest}/"
    return f"file://{Path(cache).expanduser().absolute()}/{digest}/"


def _read(base: str, name: str) -> np.ndarray:
    return np.asarray(ts.open({"driver": "zarr3", "kvstore": f"{base}{name}/"}).result().read().result())


def _write(base: str, name: str, value: np.ndarray) -> None:
    spec = {"driver": "zarr3", "kvstore": f"{base}{name}/"}
    array = ts.open(
        spec, create=True, delete_existing=True, dtype=value.dtype, shape=value.shape, chunk_layout=ts.ChunkLayout(chunk_shape=[1 << 22])
    ).result()
    array.write(value).result()
