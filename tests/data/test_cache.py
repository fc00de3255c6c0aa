"""The token cache gives back what was written, or nothing: never half an entry, never zeros for a
lost chunk.
"""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from jaxre.data import cache as cache_module
from jaxre.data.cache import cached_tokens, location
from jaxre.data.template import Encoded
from jaxre.data.tokens import TokenSet
from jaxre.errors import InputError

DIGEST = "0123abcd" * 8


def tokens_of(count: int = 5, first_id: str = "a\nb") -> TokenSet:
    draw = np.random.default_rng(count)
    encoded = [
        Encoded(draw.integers(0, 50_000, int(draw.integers(2, 40))).tolist(), 1)
        for _ in range(count)
    ]
    return TokenSet.of(
        encoded, [first_id, "ä/é", "\ud800", *(f"id-{n}" for n in range(count))][:count]
    )


def assert_equal(found: TokenSet, expected: TokenSet) -> None:
    assert found.ids == expected.ids
    for name in ("tokens", "starts", "prompt_lengths"):
        np.testing.assert_array_equal(getattr(found, name), getattr(expected, name))
        assert getattr(found, name).dtype == getattr(expected, name).dtype


def never() -> TokenSet:
    raise AssertionError("made again")


@pytest.mark.parametrize("count", [0, 1, 5, 300])
@pytest.mark.parametrize("folder", ["cache", "a b/%41#?é"])
def test_the_second_load_comes_from_the_cache_and_is_equal(
    tmp_path: Path, count: int, folder: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cache_module, "CHUNK", 64)  # several chunks an array
    made = tokens_of(count)
    first, cached = cached_tokens(str(tmp_path / folder), DIGEST, lambda: made)
    assert first is made and not cached
    second, cached = cached_tokens(str(tmp_path / folder), DIGEST, never)
    assert cached
    assert_equal(second, made)
    assert [path.name for path in (tmp_path / folder).iterdir()] == [DIGEST]


def test_a_small_entry_takes_little_room(tmp_path: Path) -> None:
    cached_tokens(str(tmp_path), DIGEST, lambda: tokens_of(5))
    assert sum(path.stat().st_size for path in tmp_path.rglob("*") if path.is_file()) < 10_000


def test_another_digest_is_another_entry(tmp_path: Path) -> None:
    cached_tokens(str(tmp_path), DIGEST, lambda: tokens_of(3))
    other, cached = cached_tokens(str(tmp_path), DIGEST[::-1], lambda: tokens_of(4))
    assert not cached and len(other) == 4
    assert len(cached_tokens(str(tmp_path), DIGEST, never)[0]) == 3


KILLED = """
import os, signal, sys
from jaxre.data import cache
from test_cache import DIGEST, tokens_of
written = cache._write
def write(*given):
    written(*given)
    if given[2] == sys.argv[2]:
        os.kill(os.getpid(), signal.SIGKILL)
cache._write = write
cache.cached_tokens(sys.argv[1], DIGEST, lambda: tokens_of(7))
"""


@pytest.mark.parametrize("after", ["tokens", "ids"])
def test_the_entry_of_a_killed_writer_is_written_again(tmp_path: Path, after: str) -> None:
    here = Path(__file__).parent
    killed = subprocess.run(
        [sys.executable, "-c", KILLED, str(tmp_path), after],
        env={"PYTHONPATH": f"{here}:{here.parents[1]}", "PATH": "/usr/bin"},
    )
    assert killed.returncode == -signal.SIGKILL and (tmp_path / DIGEST).is_dir()
    # What is there is of another size, as if an older version had left it.
    found, cached = cached_tokens(str(tmp_path), DIGEST, lambda: tokens_of(9))
    assert not cached and len(found) == 9
    assert_equal(cached_tokens(str(tmp_path), DIGEST, never)[0], tokens_of(9))


def lose_a_chunk(entry: Path) -> None:
    chunk = next(
        path
        for path in sorted((entry / "tokens").rglob("*"))
        if path.is_file() and path.name != "zarr.json"
    )
    chunk.unlink()


def flip_a_bit(entry: Path) -> None:
    chunk = next(
        path
        for path in sorted((entry / "starts").rglob("*"))
        if path.is_file() and path.name != "zarr.json"
    )
    content = bytearray(chunk.read_bytes())
    content[-1] ^= 1
    chunk.write_bytes(content)


DAMAGES = {
    "manifest cut": lambda entry: (entry / "manifest.json").write_text('{"digest": "0123'),
    "manifest empty": lambda entry: (entry / "manifest.json").write_text(""),
    "manifest of another kind": lambda entry: (entry / "manifest.json").write_text("[1]"),
    "manifest of another digest": (
        lambda entry: (entry / "manifest.json").write_text(json.dumps({"digest": "other"}))
    ),
    "manifest of an older format": (
        lambda entry: (entry / "manifest.json").write_text(json.dumps({"digest": DIGEST}))
    ),
    "array missing": lambda entry: shutil.rmtree(entry / "ids"),
    "array's description cut": lambda entry: (entry / "ids" / "zarr.json").write_text("{"),
    "chunk missing": lose_a_chunk,
    "bit flipped": flip_a_bit,
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_entry_is_made_again(tmp_path: Path, damage: str) -> None:
    made = tokens_of(20)
    cached_tokens(str(tmp_path), DIGEST, lambda: made)
    DAMAGES[damage](tmp_path / DIGEST)
    found, cached = cached_tokens(str(tmp_path), DIGEST, lambda: made)
    assert not cached and found is made
    assert_equal(cached_tokens(str(tmp_path), DIGEST, never)[0], made)


def test_processes_may_write_an_entry_at_once(tmp_path: Path) -> None:
    here = Path(__file__).parent
    code = (
        "import sys; from test_cache import *; cached_tokens(sys.argv[1], DIGEST, lambda:"
        " tokens_of(300))"
    )
    env = {"PYTHONPATH": f"{here}:{here.parents[1]}", "PATH": "/usr/bin"}
    writers = [
        subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], env=env) for _ in range(2)
    ]
    assert [writer.wait(timeout=120) for writer in writers] == [0, 0]
    assert_equal(cached_tokens(str(tmp_path), DIGEST, never)[0], tokens_of(300))


@pytest.mark.parametrize("below", ["", "deeper"])
def test_a_folder_that_cannot_be_written_is_one_line(tmp_path: Path, below: str) -> None:
    (tmp_path / "file").write_text("not a folder")
    cache = str(tmp_path / "file" / below)
    with pytest.raises(InputError) as caught:
        cached_tokens(cache, DIGEST, lambda: tokens_of(2))
    message = str(caught.value)
    assert (
        message.startswith(f"data.cache={cache}: cannot be used (")
        and "point data.cache to a folder" in message
    )
    assert len(message.splitlines()) == 1


def test_an_unknown_kind_of_url_is_one_line() -> None:
    with pytest.raises(InputError, match=r"^data.cache=ftp://x/y: cannot be used"):
        cached_tokens("ftp://x/y", DIGEST, lambda: tokens_of(2))


def test_an_error_while_making_leaves_no_entry(tmp_path: Path) -> None:
    def faulty() -> TokenSet:
        raise InputError("a faulty template")

    with pytest.raises(InputError, match="a faulty template"):
        cached_tokens(str(tmp_path / "cache"), DIGEST, faulty)
    assert not (tmp_path / "cache").exists()


def test_urls_are_passed_on_and_folders_made_absolute(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert (
        location("gs://bucket/tokens", "d")
        == location("gs://bucket/tokens/", "d")
        == "gs://bucket/tokens/d/"
    )
    assert location("gs://bucket/tokens", "d", "ids") == "gs://bucket/tokens/d/ids/"
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    assert (
        location("~/c", "d") == location("c", "d") == {"driver": "file", "path": f"{tmp_path}/c/d/"}
    )
