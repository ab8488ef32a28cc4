"""What an agent runs confined, before it runs user code so: tries to reach what must be out of reach, and to use what
trainers need. Prints why it is not as it should be, and exits with 1."""

from __future__ import annotations

import importlib.util
import json
import os
import stat
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any


def faults(question: dict[str, Any]) -> Iterator[str]:
    """One line for each thing that is wrong."""
    for name in ("mem", "environ"):
        if _opens(f"/proc/{question['agent']}/{name}"):
            yield f"/proc/AGENT/{name} can be read"
    for path in question["hidden"]:
        yield from (f"{file} can be read" for file in _files(path) if _opens(file))
    for path in question["passable"]:
        if not os.access(path, os.X_OK):
            yield f"{path} or a directory above it cannot be entered"
    for path in question["fixed"]:
        yield from (f"this user can rename {one}" for one in (Path(path), *Path(path).parents) if _can_rename(one))
    for path in question["usable"]:
        try:
            tempfile.TemporaryFile(dir=path).close()
        except OSError as error:
            yield f"{path} cannot be written to: {error.strerror}"
    for module in question["modules"]:
        try:
            if importlib.util.find_spec(module) is None:
                yield f"the module {module} cannot be found by this user"
        except (OSError, ImportError) as error:
            yield f"the module {module} cannot be loaded: {error}"


def _files(path: str) -> Iterator[str]:
    """The path, if it is no directory, and all files below it that can be listed."""
    if not os.path.isdir(path):
        yield path
    for folder, _, names in os.walk(path):
        yield from (os.path.join(folder, name) for name in names)


def _can_rename(path: Path) -> bool:
    above = path.parent.stat()
    return path.parent != path and os.access(path.parent, os.W_OK) and not above.st_mode & stat.S_ISVTX


def _opens(path: str) -> bool:
    """Whether a file can be read. The device that covers a hidden file is no file."""
    try:
        handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOFOLLOW | os.O_CLOEXEC)
    except OSError:
        return False
    try:
        found = os.fstat(handle)
    finally:
        os.close(handle)
    return not (stat.S_ISCHR(found.st_mode) and found.st_rdev == Path("/dev/null").stat().st_rdev)


def main() -> int:
    found = list(faults(json.loads(sys.argv[1])))
    print("; ".join(found))
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
