"""Contexts: clusters that the user's settings file describes under names, one of which may be the selected one.

    context = "lab"

    [contexts.lab]
    address = "10.0.0.5:7070"
    credentials_dir = "/home/ada/.config/pscluster/contexts/lab"

A flag beats the environment, which beats the file's own keys, which beat a context's. But a context that was selected
by one of these is not changed by what has a lower rank: `--context lab` is not led elsewhere by PS_ADDRESS."""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
import tomllib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pscluster.client.exclusive import exclusive
from pscluster.errors import NotFoundError, SettingsError, StateError, StorageError
from pscluster.settings import (
    ClientSettings,
    Origin,
    Resolved,
    client_config_file,
    default_state_dir,
    read_table,
    resolve_with_origins,
)

LOCAL = "local"
"""The context of the local cluster, which exists without being written down."""
_SECTION = "contexts"
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,63}")
_RANK = {"default": 0, "context": 0, "file": 1, "environment": 2, "flag": 3}
_SELECTING = ("address", "state_dir")
_CREDENTIALS = ("token_file", "credentials_dir")


@dataclass(frozen=True, kw_only=True)
class Context:
    """One cluster. Without `address`: the local one of `state_dir`, or of the default state directory."""

    name: str
    address: str | None = None
    token_file: Path | None = None
    credentials_dir: Path | None = None
    state_dir: Path | None = None

    def __post_init__(self) -> None:
        if not _NAME.fullmatch(self.name):
            raise SettingsError(
                f"{self.name[:80]!r} cannot be the name of a context", action="use letters, digits, '-' and '_'"
            )

    def values(self) -> dict[str, str]:
        """What is set, by key of the settings file."""
        fields = {key: value for key, value in dataclasses.asdict(self).items() if key != "name" and value is not None}
        return {key: str(value) for key, value in fields.items()}


@dataclass(frozen=True, kw_only=True)
class Contexts:
    """What a settings file says of contexts. `overridden_by`: keys of the file itself, which beat those of a context
    that the file selects."""

    current: str | None
    by_name: Mapping[str, Context]
    overridden_by: tuple[str, ...] = ()

    def get(self, name: str) -> Context:
        """Raises NotFoundError."""
        if name in self.by_name:
            return self.by_name[name]
        if name == LOCAL:
            return Context(name=LOCAL)
        raise NotFoundError(f"no context {name}", action="see `psctl context list`")


class ContextFile:
    """The contexts of one settings file, which is 0600 once it was written here. Methods block.
    Writers exclude each other by a lock, and readers find the old or the new file. What else the file says, comments
    included, stays as it is."""

    def __init__(self, path: Path) -> None:
        self.path = path

    @classmethod
    def of(cls, environ: Mapping[str, str]) -> ContextFile:
        """That of psctl and notebooks with this environment."""
        return cls(client_config_file(environ))

    def credentials_dir(self, name: str) -> Path:
        """Where the credentials of a context are kept."""
        return self.path.parent / _SECTION / name

    def read(self) -> Contexts:
        """The contexts; none if there is no file. Raises SettingsError."""
        return _contexts_in(read_table(self.path) if self.path.exists() else {}, self.path)

    def add(self, context: Context) -> None:
        """Write a new context. Raises StateError when there is one of this name, SettingsError, StorageError."""
        with self._changing() as (before, write):
            refuse_known(before, context.name)
            write(context.name, context, before.current)

    def replace(self, context: Context) -> None:
        """Write a context, whether or not there is one of this name. Writes nothing when it is so already."""
        with self._changing() as (before, write):
            if before.by_name.get(context.name) != context:
                write(context.name, context, before.current)

    def use(self, name: str) -> Contexts:
        """Select a context; returns what the file says then. Raises NotFoundError, SettingsError, StorageError."""
        with self._changing() as (before, write):
            before.get(name)
            write(name, before.by_name.get(name), name)
        return self.read()

    def remove(self, name: str) -> Context:
        """Forget a context and delete the credentials that are kept for it here; returns what it was. Nothing is
        selected afterwards if it was the selected one."""
        with self._changing() as (before, write):
            found = before.get(name)
            write(name, None, None if before.current == name else before.current)
            if found.credentials_dir == self.credentials_dir(name):
                shutil.rmtree(found.credentials_dir, ignore_errors=True)
        return found

    @contextmanager
    def _changing(self) -> Iterator[tuple[Contexts, Callable[[str, Context | None, str | None], None]]]:
        """What the file says, and a function that replaces one context and the selection."""
        try:
            self.path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)  # one that is there stays as it is
            with exclusive(self.path.with_name("config.lock")):
                yield self.read(), self._write
        except OSError as error:
            raise StorageError(f"cannot write {self.path}: {error.strerror}") from None

    def _write(self, name: str, context: Context | None, current: str | None) -> None:
        text = self.path.read_text(encoding="utf-8") if self.path.exists() else ""
        wanted = tomllib.loads(text)
        sections = {key: value for key, value in wanted.pop(_SECTION, {}).items() if key != name}
        sections |= {name: context.values()} if context else {}
        wanted.pop("context", None)
        wanted |= ({_SECTION: sections} if sections else {}) | ({"context": current} if current else {})
        edited = _selected(_without(text, name), current)
        edited += _written(context, edited) if context else ""
        # An edit of text may meet a layout that it does not know; the parser says whether it did.
        if _parsed(edited) != wanted:
            raise SettingsError(f"{self.path} is laid out in a way that psctl cannot edit", action="edit it by hand")
        from pscluster.security.credentials import write_private  # loads cryptography

        write_private(self.path, edited.encode())


def resolve_client(flags: Mapping[str, Any], environ: Mapping[str, str]) -> Resolved[ClientSettings]:
    """The settings of a client with their origins: flag, environment, file, selected context, default. A `context`
    that something of a higher rank overrides is left out. Raises SettingsError, NotFoundError."""
    path = client_config_file(environ)
    file = path if environ.get("PS_CONFIG") or path.is_file() else None
    given = resolve_with_origins(ClientSettings, flags, environ, file, sections=(_SECTION,))
    name = given.settings.context
    if name is None:
        return given
    rank = {key: _RANK[origin.kind] for key, origin in given.origins.items()}
    if any(rank[key] > rank["context"] for key in _SELECTING):
        kept = dataclasses.replace(given.settings, context=None)
        return Resolved(settings=kept, origins={**given.origins, "context": Origin(kind="default", name="")})
    context = ContextFile(path).read().get(name)
    settings, origins = given.settings, dict(given.origins)
    keeps = {key for key in (*_SELECTING, *_CREDENTIALS) if rank[key] >= rank["context"]}
    keeps |= set(_CREDENTIALS) if keeps & set(_CREDENTIALS) else set()  # one of them replaces the other
    for key in (*_SELECTING, *_CREDENTIALS):
        value = getattr(context, key)
        if key not in keeps:
            settings = dataclasses.replace(settings, **{key: value})
            origins[key] = Origin(kind="default", name="") if value is None else Origin(kind="context", name=name)
    return Resolved(settings=settings, origins=origins)


def register_local(state_dir: Path, environ: Mapping[str, str]) -> None:
    """Write the context of the local cluster, if `state_dir` is the user's own default: a cluster elsewhere, which
    --state-dir or PS_STATE_DIR names, is selected by its path. Raises SettingsError, StorageError."""
    if state_dir == default_state_dir({name: value for name, value in environ.items() if name != "PS_STATE_DIR"}):
        ContextFile.of(environ).replace(Context(name=LOCAL, state_dir=state_dir))


def refuse_known(contexts: Contexts, name: str) -> None:
    """Raises StateError when there is a context of this name."""
    if name in contexts.by_name:
        raise StateError(f"there is a context {name} already", action=f"psctl context remove {name}")


def _contexts_in(table: Mapping[str, Any], path: Path) -> Contexts:
    known = {field.name: field.type for field in dataclasses.fields(Context) if field.name != "name"}
    sections, current = table.get(_SECTION, {}), table.get("context")
    if not isinstance(sections, dict) or not isinstance(current, str | None):
        raise SettingsError(f"`context` must be a name, and `contexts` a table, in {path}")
    by_name = {}
    for name, found in sections.items():
        keys = {key.replace("-", "_"): value for key, value in found.items()} if isinstance(found, dict) else {"": ""}
        if wrong := [key for key, value in keys.items() if key not in known or not isinstance(value, str)]:
            raise SettingsError(f"context {name} in {path} has a key that does not exist, or no text: {wrong[0]!r}")
        given: dict[str, Any] = {
            key: value if key == "address" else Path(value).expanduser() for key, value in keys.items()
        }
        by_name[name] = Context(name=name, **given)
    overriding = tuple(key for key in (*_SELECTING, *_CREDENTIALS) if key in table)
    return Contexts(current=current, by_name=by_name, overridden_by=overriding)


def _without(text: str, name: str) -> str:
    """The settings file without the section of a context."""
    kept, inside = [], False
    for line in text.splitlines(keepends=True):
        if line.lstrip().startswith("["):
            inside = re.fullmatch(rf"\s*\[\s*{_SECTION}\s*\.\s*{name}\s*\]\s*(#.*)?", line.rstrip("\n")) is not None
        kept += [] if inside else [line]
    return "".join(kept)


def _selected(text: str, current: str | None) -> str:
    """The settings file with this context selected, or none."""
    lines = text.splitlines(keepends=True)
    first = next((n for n, line in enumerate(lines) if line.lstrip().startswith("[")), len(lines))
    own = [line for line in lines[:first] if not re.match(r"\s*context\s*=", line)]
    return "".join([*([f"context = {json.dumps(current)}\n"] if current else []), *own, *lines[first:]])


def _written(context: Context, before: str) -> str:
    """The section of a context, to be appended to `before`."""
    gap = "" if not before else "\n" if before.endswith("\n") else "\n\n"
    gap = "" if before.endswith("\n\n") else gap
    lines = [f"[{_SECTION}.{context.name}]"]
    lines += [f"{key} = {json.dumps(value, ensure_ascii=False)}" for key, value in context.values().items()]
    return gap + "\n".join(lines) + "\n"


def _parsed(text: str) -> dict[str, Any] | None:
    try:
        found = tomllib.loads(text)
    except tomllib.TOMLDecodeError:
        return None
    if not found.get(_SECTION, True):
        del found[_SECTION]
    return found
