"""The first problem of a config, as one line with the fix."""

from __future__ import annotations

import difflib
from typing import Any, get_args

from pydantic import BaseModel, ValidationError

from jaxre.config.settings import Settings, Source


def _valid_keys(model: type[BaseModel], prefix: str = "") -> list[str]:
    keys = []
    for name, field in model.model_fields.items():
        keys.append(prefix + name)
        for part in _parts(field.annotation):
            if isinstance(part, type) and issubclass(part, Settings):
                keys += _valid_keys(part, prefix + name + ".")
    return keys


def _parts(annotation: Any) -> list[Any]:
    """A type and all types nested in it."""
    return [annotation, *(inner for part in get_args(annotation) for inner in _parts(part))]


def _nearest_key(key: str, kind: type[BaseModel]) -> str:
    """The valid key nearest to an unknown one: a key of the same name in any section (`rank` is
    lora.rank), else by spelling.
    """
    valid, (section, _, name) = _valid_keys(kind), key.rpartition(".")
    same_name = [candidate for candidate in valid if candidate.rpartition(".")[2] == name]
    same_section = [candidate for candidate in valid if candidate.rpartition(".")[0] == section]
    for candidates, cutoff in ((same_name, 0.0), (same_section, 0.8), (valid, 0.0)):
        nearest = difflib.get_close_matches(key, candidates, n=1, cutoff=cutoff)
        if nearest:
            return nearest[0]
    return valid[0]


def first_problem(error: ValidationError, kind: type[BaseModel]) -> str:
    """The message of the first problem, without the name of the file."""
    problems = error.errors(include_url=False)
    # A misspelt key goes before the required key that is missing because of it.
    problem = next(
        (problem for problem in problems if problem["type"] == "extra_forbidden"), problems[0]
    )
    place = [part for part in problem["loc"] if not str(part).startswith("<")]
    key = ".".join(map(str, place))
    if problem["type"] == "extra_forbidden":
        plain = ".".join(part for part in place if isinstance(part, str))
        if "<mixture>" in problem["loc"] and place[-1] in Source.model_fields:
            return f"{key}: unknown key; a mixture has it in each of its sources"
        return f"{key}: unknown key; the nearest valid key is {_nearest_key(plain, kind)}"
    if problem["type"] == "missing":
        return f"{key}: missing; add it"
    message = {
        "model_type": "should be a mapping of keys to values",
        "dict_type": "should be a mapping of keys to values",
        "tuple_type": "should be a list",
        "too_short": "should not be empty",
        "string_type": "should be text; put it in quotes",
        "int_type": "should be a whole number",
        "float_type": "should be a number",
        "bool_type": "should be true or false",
    }.get(problem["type"], problem["msg"].removeprefix("Value error, "))
    # The input of a check over several keys is all of them: too long to print.
    several_keys = problem["type"] == "value_error" and isinstance(problem["input"], dict)
    given = "" if several_keys else f" (given: {problem['input']!r})"
    return f"{key + ': ' if key else ''}{message}{given}"
