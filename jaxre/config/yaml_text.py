"""YAML with the rules of configs: `no` stays the string "no" (a label), dates stay strings."""

from __future__ import annotations

import re
from typing import Any

import yaml

from jaxre.errors import InputError


class _StringLoader(yaml.SafeLoader):
    """Safe YAML in which only true/false are booleans, dates stay text and keys are unique."""

    yaml_implicit_resolvers = {  # noqa: RUF012
        first: [
            (tag, pattern)
            for tag, pattern in resolvers
            if tag.rpartition(":")[2] not in ("bool", "timestamp", "int", "float")
        ]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }

    def construct_mapping(self, node, deep=False):
        seen = set()
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                raise yaml.constructor.ConstructorError(
                    None, None, "a key must be a plain word", key.start_mark
                )
            if key.value in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"key {key.value!r} occurs twice", key.start_mark
                )
            seen.add(key.value)
        return super().construct_mapping(node, deep)


class _StringDumper(yaml.SafeDumper):
    """Safe YAML that escapes line breaks other than a line feed, which PyYAML itself does not read
    back as they were.
    """

    def represent_str(self, text: str) -> yaml.ScalarNode:
        style = '"' if re.search("[\r\x85\u2028\u2029]", text) else None
        return self.represent_scalar("tag:yaml.org,2002:str", text, style=style)


# YAML 1.1 reads `no` as false, 1e-4 as text, 007 as 7 and 1:30 as 90. Here only digits that print
# as they were written are a whole number, and a fraction has a point or an exponent (YAML 1.2);
# everything else is text.
for _tag, _pattern, _first in (
    ("bool", r"^(?:true|True|false|False)$", "tTfF"),
    ("int", r"^(?:0|-?[1-9][0-9]*)$", "-0123456789"),
    (
        "float",
        r"^[-+]?(?:[0-9]+\.[0-9]*|\.[0-9]+|[0-9]+(?=[eE]))(?:[eE][-+]?[0-9]+)?$",
        "-+.0123456789",
    ),
):
    # The dumper keeps the rules of YAML 1.1 too, and so quotes text that either version misreads.
    for _yaml in (_StringLoader, _StringDumper):
        _yaml.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(_pattern), list(_first))
_StringDumper.add_representer(str, _StringDumper.represent_str)


def parse_yaml(text: str, place: str) -> Any:
    """Plain YAML to Python values, with the rules of this module. Raises InputError."""
    try:
        return yaml.load(text, Loader=_StringLoader)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f":{mark.line + 1}" if mark else ""
        problem = getattr(error, "problem", None) or str(error).splitlines()[0]
        raise InputError(
            f"{place}{line}: not valid YAML: {problem}; correct it, or put the value in quotes"
        ) from None
    except RecursionError:
        raise InputError(
            f"{place}: not a config: nested too deep; take some brackets out"
        ) from None


def yaml_text(tree: Any) -> str:
    """YAML that `parse_yaml` reads back to an equal tree."""
    return yaml.dump(tree, Dumper=_StringDumper, sort_keys=False, allow_unicode=True)
