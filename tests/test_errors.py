"""Every refusal is a single line that names the fix."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

from jaxre.errors import InputError

ROOT = Path(__file__).resolve().parents[1]


def refusals(path: Path) -> list[ast.Call]:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    return [
        node
        for node in ast.walk(tree)
        if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "InputError"
    ]


def passed_on(message: ast.expr) -> bool:
    """True if the message is or ends with another message: `{place}: {error}`."""
    return not isinstance(message, ast.Constant) and (
        not isinstance(message, ast.JoinedStr) or isinstance(message.values[-1], ast.FormattedValue)
    )


@pytest.mark.parametrize(
    "package",
    [
        "relations",
        "data",
        "models",
        "checkpoints",
        "training",
        "inference",
        "evaluation",
        "profiling",
        ".",
    ],
)
def test_every_refusal_names_the_fix_after_a_semicolon(package: str) -> None:
    without = [
        f"{path.name}:{call.lineno}: {ast.unparse(call)}"
        for path in sorted((ROOT / "jaxre" / package).glob("*.py"))
        for call in refusals(path)
        if ";" not in ast.unparse(call) and not passed_on(call.args[0])
    ]
    assert not without, "\n".join(without)


@pytest.mark.parametrize("name", ["two\nlines", "a\r\nb", "a\x1b[31mb", "a\u2028b", "tab\there"])
def test_an_id_with_line_ends_or_control_characters_stays_one_printable_line(name: str) -> None:
    message = str(InputError(f"data.train: example {name} has no label; add it"))
    assert message == f"data.train: example {repr(name)[1:-1]} has no label; add it"
    assert message.isprintable()
    assert str(InputError("prägnant: 日本語")) == "prägnant: 日本語"
