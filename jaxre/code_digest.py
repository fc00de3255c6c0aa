"""A digest of source files that changes when what they do may change, and not with a comment."""

from __future__ import annotations

import ast
import hashlib
from collections.abc import Iterable
from pathlib import Path

WITH_DOCSTRING = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)


def code_digest(files: Iterable[Path]) -> str:
    """SHA-256 of the syntax trees of Python files in order, and their names; comments, docstrings
    and layout have no part in it.
    """
    found = hashlib.sha256()
    for file in files:
        tree = ast.parse(file.read_bytes())
        for node in ast.walk(tree):
            if (
                isinstance(node, WITH_DOCSTRING)
                and ast.get_docstring(node, clean=False) is not None
            ):
                del node.body[0]
        found.update(f"{file.name}\n{ast.dump(tree)}\n".encode())
    return found.hexdigest()
