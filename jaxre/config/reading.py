"""Reads config files, with `key=value` overrides on top, as checked settings, and writes them.

Resolvers such as `${oc.env:HOME}` are refused, so that no environment value lands in a saved
config. `${name}` refers to another key of the same file; `\\${` is a literal `${`.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import ValidationError

from jaxre.config.problems import first_problem
from jaxre.config.settings import Config, Settings
from jaxre.config.yaml_text import parse_yaml, yaml_text
from jaxre.errors import InputError

Checked = TypeVar("Checked", bound=Settings)


def load_config(path: str | Path, overrides: list[str] | None = None) -> Config:
    """Reads and checks a run's YAML file, with `key=value` overrides on top.

    Raises:
      InputError: missing file, broken YAML, a resolver, an unknown key (with the nearest
        valid one), a wrong type or bound.
    """
    return check_config(load_tree(path, overrides), str(path))


def load_tree(path: str | Path, overrides: list[str] | None = None) -> dict:
    """Reads a YAML file with overrides on top, as plain unchecked values. Raises InputError as
    `load_config`.
    """
    path = Path(path)
    if not path.is_file():
        raise InputError(
            f"{path}: no such config file; give the path of a YAML file, such as"
            " configs/quickstart.yaml"
        )
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(
            f"{path}: cannot be read as UTF-8 text ({error}); save it as UTF-8"
        ) from None
    tree = parse_yaml(text, str(path))
    if not isinstance(tree, dict):
        raise InputError(
            f"{path}: a config is a mapping of keys to values; write lines such as `name: mine`"
        )
    for override in overrides or []:
        _apply_override(tree, override)
    return _interpolate(tree, str(path))


def check_config(tree: dict, place: str) -> Config:
    """Turns a plain dict into a Config; InputError names the first offending key."""
    return check_settings(Config, tree, place)


def check_settings(kind: type[Checked], tree: dict, place: str) -> Checked:
    """Turns a plain dict into settings of a kind; InputError names the first offending key."""
    try:
        return kind.model_validate(tree)
    except ValidationError as error:
        raise InputError(f"{place}: {first_problem(error, kind)}") from None


def save_config(config: Config, path: Path) -> None:
    """Writes the resolved config atomically, as YAML that `load_config` reads back to an equal
    Config.
    """
    # OmegaConf reads `\${` as a literal `${`, and halves the backslashes before it.
    tree = _map_strings(
        config.model_dump(mode="json"), lambda text: re.sub(r"(\\*)\$\{", r"\1\1\\${", text)
    )
    temporary = path.with_name(path.name + ".part")
    temporary.write_text(yaml_text(tree), encoding="utf-8")
    temporary.replace(path)


def _apply_override(tree: dict, override: str) -> None:
    key, separator, value = override.partition("=")
    words = key.strip().split(".")
    if not separator or not all(words):
        raise InputError(f"{override!r} is not an override; write key=value, such as lora.rank=32")
    node, place = tree, []
    while True:
        # Model names contain points: the longest existing key is meant.
        count = next(
            (count for count in range(len(words), 1, -1) if ".".join(words[:count]) in node), 1
        )
        name, words = ".".join(words[:count]), words[count:]
        if not words:
            break
        place.append(name)
        if node.get(name) is None:
            node[name] = {}
        node = node[name]
        if not isinstance(node, dict):
            parent = ".".join(place)
            raise InputError(
                f"override {key}: {parent} is not a mapping but {node!r}; set all of it with"
                f" {parent}=VALUE"
            )
    node[name] = parse_yaml(value, f"override {key}") if value else None


def _interpolate(tree: dict, place: str) -> dict:
    """Resolves `${key}` within the file; refuses resolvers (`${name:...}`, also nested ones that
    build the name).
    """

    def check(text: str) -> str:
        for reference in re.findall(r"(?<!\\)(?:\\\\)*(\$\{[^}]*\}?)", text):
            if ":" in reference or reference.count("${") > 1:
                raise InputError(
                    f"{place}: {reference} is a resolver, which is refused so that no environment"
                    " value lands in a run; write the value itself"
                )
            if not re.fullmatch(r"\$\{[\w.-]+\}", reference):
                raise InputError(
                    f"{place}: {reference!r} is no key of this file; write \\${{ for a literal ${{"
                )
        return text

    try:
        return OmegaConf.to_container(OmegaConf.create(_map_strings(tree, check)), resolve=True)
    except OmegaConfBaseException as error:
        raise InputError(
            f"{place}: {str(error).splitlines()[0]}; write \\${{ for a literal ${{"
        ) from None
    except RecursionError:
        raise InputError(f"{place}: a value refers to itself; write the value itself") from None


def _map_strings(tree: Any, change: Callable[[str], str]) -> Any:
    """The tree with `change` applied to every string, keys included."""
    if isinstance(tree, str):
        return change(tree)
    if isinstance(tree, dict):
        return {
            _map_strings(key, change): _map_strings(value, change) for key, value in tree.items()
        }
    return [_map_strings(value, change) for value in tree] if isinstance(tree, list) else tree
