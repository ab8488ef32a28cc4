"""Files that trained parameters are exported to: their formats and suffixes, that none is overwritten unasked, and
where they lie until they are complete."""

from __future__ import annotations

import fcntl
import glob
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
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


_SUFFIX = ".writing"


@contextmanager
def aside(path: Path) -> Iterator[str]:
    """A directory beside `path` to write it in, removed with all that is left in it: a process that is killed by
    Ctrl-C, or for its memory, removes nothing. Those of earlier exports to `path` that were killed are removed as well:
    nobody has them locked. Raises StorageError."""
    try:
        _remove_stale(path)
        directory, lock = _locked(path)
    except OSError as error:
        raise StorageError(f"cannot write {path}: {error.strerror}") from None
    try:
        yield directory
    finally:
        shutil.rmtree(directory, ignore_errors=True)
        os.close(lock)


def _locked(path: Path) -> tuple[str, int]:
    """A new directory beside `path`, and the descriptor that locks it."""
    while True:
        directory = tempfile.mkdtemp(prefix=f".{path.name}.", suffix=_SUFFIX, dir=path.parent)
        try:
            lock = _open(directory)
        except FileNotFoundError:  # another export was faster, and took it for stale
            continue
        try:
            fcntl.flock(lock, fcntl.LOCK_EX)
        except OSError:  # a file system without locks, on which nobody takes it for stale
            return directory, lock
        if os.path.isdir(directory):
            return directory, lock
        os.close(lock)


def _remove_stale(path: Path) -> None:
    for stale in path.parent.glob(f".{glob.escape(path.name)}.*{_SUFFIX}"):
        try:
            lock = _open(stale)
        except (FileNotFoundError, NotADirectoryError, PermissionError):
            continue  # it is gone, or not ours
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            continue  # it is being written to
        else:
            shutil.rmtree(stale, ignore_errors=True)
        finally:
            os.close(lock)


def _open(directory: str | Path) -> int:
    return os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC | os.O_NOFOLLOW)
