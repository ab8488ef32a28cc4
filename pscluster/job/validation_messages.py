"""What is wrong with a spec, in words: each problem with its key and, for a key there is not, those that may be meant.
Pure."""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from pydantic import BaseModel, ValidationError

_LONGEST_SHOWN = 80


def explain(error: ValidationError, root: type[BaseModel]) -> str:
    """Every problem of `error`, which validating `root` raised."""
    return "; ".join(_explain_one(problem, root) for problem in error.errors())


def _explain_one(problem: Mapping[str, Any], root: type[BaseModel]) -> str:
    where = ".".join(str(part) for part in problem["loc"])
    if problem["type"] == "extra_forbidden":
        near = _near(problem["loc"], root)
        hint = f"; did you mean {' or '.join(near)}?" if near else ""
        return f"unknown key {where}{hint}"
    if problem["type"] == "missing":
        return f"{where} is missing"
    message = str(problem["msg"]).removeprefix("Value error, ")
    if problem["type"] == "value_error":
        return f"{where}: {message}" if where else message
    given = repr(problem["input"])
    return f"{where}: {message}, not {given if len(given) <= _LONGEST_SHOWN else given[:_LONGEST_SHOWN] + '...'}"


def _near(location: Sequence[int | str], root: type[BaseModel]) -> list[str]:
    """The key of the same section that is spelt most like it, then those of the very same name in other sections:
    people know a key before they know where it stands."""
    *section, key = map(str, location)
    model: Any = root
    for part in section:
        model = model.model_fields[part].annotation
    elsewhere = [path for path in _paths(root) if path.rpartition(".")[2] == key]
    return difflib.get_close_matches(key, list(model.model_fields), n=1, cutoff=0.5) + elsewhere


def _paths(model: type[BaseModel], prefix: str = "") -> Iterator[str]:
    """Every key of a model and of the sections in it, as "train.optimizer.lr"."""
    for name, field in model.model_fields.items():
        yield prefix + name
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            yield from _paths(field.annotation, f"{prefix}{name}.")
