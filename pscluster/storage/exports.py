"""Files that trained parameters are exported to: their formats and suffixes, and that none is overwritten unasked."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

from pscluster.errors import SettingsError, StateError, StorageError

SUFFIXES: Mapping[str, tuple[str, ...]] = {"safetensors": (".safetensors",), "pth": (".pth", ".pt")}
"""By format, the suffixes of its files."""
DEFAULT_FORMAT = "safetensors"


def format_of(path: Path, asked: str | None) -> str:
    """The format to write at `path`: the one asked for, else that of its suffix; without a suffix the default.

    Raises SettingsError for a suffix that says something else than what would be written."""
    forms = [asked] if asked else list(SUFFIXES)
    if not path.suffix:
        return asked or DEFAULT_FORMAT
    for form in forms:
        if path.suffix.lower() in SUFFIXES[form]:
            return form
    work = ", ".join(suffix for form in forms for suffix in SUFFIXES[form])
    what = f"a {asked} file" if asked else "a file that psctl writes"
    raise SettingsError(
        f"{path.name}: {path.suffix} is not the suffix of {what}", action=f"give one of {work}, or none"
    )


def check_free(path: Path, *, force: bool) -> None:
    """Raise StateError when something is at `path` already, with `force` only when it is no regular file; StorageError
    when the directory to write it in is missing."""
    if not path.parent.is_dir():
        raise StorageError(f"cannot write {path}: there is no such directory", action=f"mkdir -p {path.parent}")
    if force and os.path.lexists(path) and not path.is_file():
        raise StateError(f"{path} is not a regular file, and is not overwritten", action="give another path")
    if not force and os.path.lexists(path):
        raise StateError(f"{path} exists already", action="give another path, or --force to overwrite it")
