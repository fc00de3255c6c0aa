"""The token cache: TensorStore arrays in a folder or a gs:// bucket, one entry per digest.

An entry is complete once its `manifest.json` exists, which is written last; a killed writer
leaves an entry that the next run writes again. The manifest holds a checksum of each array,
because a lost chunk of an array reads as zeros. Writers of one digest write the same bytes, so
several processes may write an entry at once.
"""

from __future__ import annotations

import contextlib
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
    """The entry of `digest`, made and stored if it is not there.

    Args:
      cache: a folder, or a TensorStore URL such as gs://bucket/folder.

    Returns:
      The tokens, and whether they came from the cache.

    Raises:
      InputError: the cache cannot be opened or written.
    """
    found = stored_tokens(cache, digest)
    if found is not None:
        return found, True
    made = make()
    try:
        _write_entry(cache, digest, made)
    except (ValueError, OSError) as error:
        raise _unusable(cache, error) from None
    return made, False


def stored_tokens(cache: str, digest: str) -> TokenSet | None:
    """The entry of `digest`, None if there is none or it is damaged. Raises InputError as
    `cached_tokens`.
    """
    try:
        return _read_entry(cache, digest)
    except (ValueError, OSError) as error:
        raise _unusable(cache, error) from None


def read_note(cache: str, key: str) -> dict[str, Any] | None:
    """What `write_note` left under `key`, None if there is nothing or it is damaged. Raises
    InputError as `cached_tokens`.
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
    """Keeps a small JSON value, unless the cache cannot be written: what a note tells can be found
    out again.
    """
    note = json.dumps({"value": value, "checksum": _checksum(value)})
    with contextlib.suppress(ValueError, OSError):
        ts.KvStore.open(location(cache, key)).result().write("note.json", note.encode()).result()


def _checksum(value: dict[str, Any]) -> int:
    return zlib.crc32(json.dumps(value, sort_keys=True).encode())


def location(cache: str, digest: str, name: str = "") -> str | dict[str, str]:
    """TensorStore's key-value store of an entry, or of one of its arrays."""
    tail = f"{digest}/{name}/" if name else f"{digest}/"
    if "://" in cache:
        return f"{cache.rstrip('/')}/{tail}"
    # Not a file:// URL, in which %, ? and # of a folder's name would mean something else.
    return {"driver": "file", "path": f"{Path(cache).expanduser().absolute()}/{tail}"}


def _unusable(cache: str, error: Exception) -> InputError:
    # TensorStore's message repeats every path on the way to the reason, which comes last.
    told = str(error).splitlines()[0].split(" [")[0].rpartition(": ")[2]
    return InputError(
        f"data.cache={cache}: cannot be used ({told}); point data.cache to a folder that can be"
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


def _write_entry(cache: str, digest: str, made: TokenSet) -> None:
    ids = np.frombuffer(json.dumps(made.ids).encode(), np.uint8)
    arrays = {
        "tokens": made.tokens,
        "starts": made.starts,
        "prompt_lengths": made.prompt_lengths,
        "ids": ids,
    }
    arrays = {name: np.ascontiguousarray(arrays[name], kind) for name, kind in _TYPES.items()}
    for name, array in arrays.items():
        _write(cache, digest, name, array)
    manifest = {
        "digest": digest,
        "examples": len(made),
        "tokens": int(made.tokens.size),
        "checksums": {name: zlib.crc32(array) for name, array in arrays.items()},
    }
    ts.KvStore.open(location(cache, digest)).result().write(
        "manifest.json", json.dumps(manifest).encode()
    ).result()


def _read(cache: str, digest: str, name: str) -> np.ndarray:
    array = (
        ts.open({"driver": "zarr3", "kvstore": location(cache, digest, name)})
        .result()
        .read()
        .result()
    )
    return np.ascontiguousarray(array, _TYPES[name])


def _write(cache: str, digest: str, name: str, value: np.ndarray) -> None:
    spec = {"driver": "zarr3", "kvstore": location(cache, digest, name)}
    # A chunk is stored at its full size, however little of it is used.
    layout = ts.ChunkLayout(chunk_shape=[max(1, min(CHUNK, value.size))])
    # Written over, not deleted first: another process may be writing the same.
    try:
        array = ts.open(
            spec, create=True, open=True, dtype=value.dtype, shape=value.shape, chunk_layout=layout
        ).result()
    except ValueError:  # what a damaged entry left
        array = ts.open(
            spec,
            create=True,
            delete_existing=True,
            dtype=value.dtype,
            shape=value.shape,
            chunk_layout=layout,
        ).result()
    array.write(value).result()
