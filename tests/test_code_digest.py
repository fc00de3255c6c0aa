"""A digest of code changes only with the behaviour of the code."""

from __future__ import annotations

from pathlib import Path

import pytest

from jaxre.code_digest import code_digest

CODE = '''"""A module."""
# a comment


class Kind:
    """A class."""

    size = 3


def double(x):
    """A function."""
    return 2 * x


def nothing():
    """Only a docstring."""
'''


@pytest.mark.parametrize(
    ("old", "new", "changes"),
    [
        ("# a comment", "# another one", False),
        ("A module.", "Another module.", False),
        ("    # a comment", "", False),
        ('    """A function."""\n', "", False),
        ("A class.", "Other words.", False),
        ("2 * x", "(2 * x)", False),
        ("2 * x", "3 * x", True),
        ("size = 3", "size = 4", True),
        ("double", "twice", True),
    ],
)
def test_a_digest_changes_with_what_the_code_does_and_with_nothing_else(
    tmp_path: Path, old: str, new: str, changes: bool
) -> None:
    file = tmp_path / "code.py"
    file.write_text(CODE)
    before = code_digest([file])
    file.write_text(CODE.replace(old, new))
    assert (code_digest([file]) != before) == changes


def test_files_count_by_name_and_order(tmp_path: Path) -> None:
    one, other = tmp_path / "one.py", tmp_path / "other.py"
    for file in (one, other):
        file.write_text(CODE)
    digests = {code_digest(files) for files in ([one], [other], [one, other], [other, one])}
    assert len(digests) == 4
