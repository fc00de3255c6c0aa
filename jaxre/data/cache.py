"""The token cache: TensorStore arrays in a folder or a gs:// bucket, one entry per digest.

An entry is complete once its `manifest.json` exists, which is written last; if the writer is
killed, the next run writes the entry again. The manifest has a checksum of each array, because a
missing chunk reads as zeros. All writers of a digest write the same bytes, so several processes may
write an entry at once.
"""

from __future__ import annotations

import contextlib
import functools
import json
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import tensorstore as ts

from jaxre.data.tokens import TokenSet
from jaxre.errors import InputError

CHUNK = 1 << 22  # elements
_TYPES = {"tokens": np.int32, "starts": np.int64, "prompt_lengths": np.int32, "ids": np.uint8}


def cached_tokens(cache: str, digest: str, make: Callable[[], TokenSet]) -> tuple[TokenSet, bool]:
    """The entry of `digest`, made and stored if it is missing.

    Args:
      cache: a folder, or a TensorStore URL such as gs://bucket/folder.

    Returns:
      The tokens, and whether they came from the cache.

    Raises:
      InputError: the cache cannot be opened or written.
    """
    tokens = stored_tokens(cache, digest)
    if tokens is not None:
        return tokens, True
    tokens = make()
    try:
        _write_entry(cache, digest, tokens)
    except (ValueError, OSError) as error:
        raise _unusable(cache, error) from None
    return tokens, False


def stored_tokens(cache: str, digest: str) -> TokenSet | None:
    """The entry of `digest`; None if it is missing or damaged. Raises InputError as `cached_tokens`
    does.
    """
    try:
        return _read_entry(cache, digest)
    except (ValueError, OSError) as error:
        raise _unusable(cache, error) from None


def read_note(cache: str, key: str) -> dict[str, Any] | None:
    """The value that `write_note` stored under `key`; None if it is missing or damaged. Raises
    InputError as `cached_tokens` does.
    """
    try:
        read = ts.KvStore.open(location(cache, key)).result().read("note.json").result()
    except (ValueError, OSError) as error:
        raise _unusable(cache, error) from None
    try:
        note = json.loads(read.value)
        return note["value"] if note["checksum"] == _checksum(note["value"]) else None
    except (ValueError, KeyError, TypeError):
        return None


def write_note(cache: str, key: str, value: dict[str, Any]) -> None:
    """Stores a small JSON value; does nothing if the cache cannot be written, because a note can be
    computed again.
    """
    note = json.dumps({"value": value, "checksum": _checksum(value)})
    with contextlib.suppress(ValueError, OSError):
        ts.KvStore.open(location(cache, key)).result().write("note.json", note.encode()).result()


def _checksum(value: dict[str, Any]) -> int:
    return zlib.crc32(json.dumps(value, sort_keys=True).encode())


def location(cache: str, digest: str, name: str = "") -> str | dict[str, str]:
    """TensorStore's key-value store of an entry, or of the array `name` in it."""
    tail = f"{digest}/{name}/" if name else f"{digest}/"
    if "://" in cache:
        return f"{cache.rstrip('/')}/{tail}"
    # Not a file:// URL, where %, ? and # in a folder's name would have a special meaning.
    return {"driver": "file", "path": f"{Path(cache).expanduser().absolute()}/{tail}"}


def _unusable(cache: str, error: Exception) -> InputError:
    # TensorStore's message lists paths first; the reason comes last.
    reason = str(error).splitlines()[0].split(" [")[0].rpartition(": ")[2]
    return InputError(
        f"data.cache={cache}: cannot be used ({reason}); point data.cache to a folder that can be"
        " written"
    )


def _read_entry(cache: str, digest: str) -> TokenSet | None:
    """The entry, or None if it is missing, incomplete or damaged."""
    read = ts.KvStore.open(location(cache, digest)).result().read("manifest.json").result()
    if read.state != "value":
        return None
    try:
        manifest = json.loads(read.value)
        if manifest["digest"] != digest:
            return None
        arrays = {name: _read(cache, digest, name) for name in _TYPES}
        if manifest["checksums"] != {name: zlib.crc32(array) for name, array in arrays.items()}:
            return None
        ids = json.loads(bytes(arrays.pop("ids")))
    except (ValueError, KeyError, TypeError, OSError):
        return None
    return TokenSet(**arrays, ids=tuple(ids))


def _write_entry(cache: str, digest: str, tokens: TokenSet) -> None:
    values = vars(tokens) | {"ids": np.frombuffer(json.dumps(tokens.ids).encode(), np.uint8)}
    arrays = {name: np.ascontiguousarray(values[name], dtype) for name, dtype in _TYPES.items()}
    for name, array in arrays.items():
        _write(cache, digest, name, array)
    manifest = {
        "digest": digest,
        "examples": len(tokens),
        "tokens": int(tokens.tokens.size),
        "checksums": {name: zlib.crc32(array) for name, array in arrays.items()},
    }
    ts.KvStore.open(location(cache, digest)).result().write(
        "manifest.json", json.dumps(manifest).encode()
    ).result()


def _read(cache: str, digest: str, name: str) -> np.ndarray:
    store = ts.open({"driver": "zarr3", "kvstore": location(cache, digest, name)}).result()
    return np.ascontiguousarray(store.read().result(), _TYPES[name])


def _write(cache: str, digest: str, name: str, value: np.ndarray) -> None:
    open_array = functools.partial(
        ts.open,
        {"driver": "zarr3", "kvstore": location(cache, digest, name)},
        create=True,
        dtype=value.dtype,
        shape=value.shape,
        # A chunk takes its full size on disk, even if partly used.
        chunk_layout=ts.ChunkLayout(chunk_shape=[max(1, min(CHUNK, value.size))]),
    )
    # Overwritten, not deleted first: another process may be writing the same.
    try:
        array = open_array(open=True).result()
    except ValueError:  # left over from a damaged entry
        array = open_array(delete_existing=True).result()
    array.write(value).result()
