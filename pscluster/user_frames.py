"""Which frames of a stack are the user's own: neither ours nor those of Python and the packages installed with it."""

from __future__ import annotations

import errno
import importlib.util
import os
import re
import stat
import sysconfig
import traceback
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import BinaryIO


def _directories(package: str) -> Iterator[str]:
    """Where a package of ours is; nowhere if it is not installed here. Does not import it."""
    spec = importlib.util.find_spec(package)
    yield from (f"{place}/" for place in (spec.submodule_search_locations or () if spec else ()))


_WORKER = tuple(_directories("psworker"))
_TASKS = tuple(f"{place}tasks/" for place in _WORKER)  # built-in tasks stand for the user's
_OURS = (*_directories("pscluster"), *_WORKER)
_INSTALLED = tuple(f"{sysconfig.get_path(name)}/" for name in ("stdlib", "platstdlib", "purelib", "platlib"))
_PACKAGES = ("/site-packages/", "/dist-packages/")


OF_FRAME = frozenset({"file", "line", "function"})
"""The details of an error that say where the user's own code raised it."""


@dataclass(frozen=True)
class Frame:
    """One call. `file` is absolute until `below` has made it relative."""

    file: str
    line: int
    function: str
    text: str = ""

    def is_users(self, code: Path) -> bool:
        """Whether it is the user's own. `code`: the directory of the user's files."""
        return self.file.startswith(f"{code}/") or is_users(self.file)

    def below(self, code: Path) -> Frame:
        """With the file relative to `code`, if it is there, and the text of its line."""
        if not self.file.startswith(f"{code}/"):
            return self
        file = self.file.removeprefix(f"{code}/")
        return replace(self, file=file, text=_line(code, file, self.line))


_MAX_SOURCE_BYTES = 4 << 20


def _line(code: Path, file: str, number: int) -> str:
    """One line of a file; empty if it cannot be read. Not by linecache, which would keep the file for ever."""
    try:
        with open_below(code, file) as source:
            lines = source.read(_MAX_SOURCE_BYTES).splitlines()
    except OSError:
        return ""
    return lines[number - 1].decode("utf-8", "replace").strip() if 0 < number <= len(lines) else ""


def open_below(directory: Path, relative: str) -> BinaryIO:
    """Open a regular file below a directory that user code may have written: an agent that followed a link there, or
    `..`, could be made to show what user code must not read. Never blocks. Raises OSError."""
    *folders, name = relative.split("/")
    handle = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        for folder in folders:
            below = os.open(_no_parent(folder), os.O_RDONLY | os.O_DIRECTORY | _CAREFUL, dir_fd=handle)
            os.close(handle)
            handle = below
        found = os.open(_no_parent(name), os.O_RDONLY | os.O_NONBLOCK | _CAREFUL, dir_fd=handle)
    finally:
        os.close(handle)
    file = os.fdopen(found, "rb")
    if not stat.S_ISREG(os.fstat(found).st_mode):
        file.close()
        raise FileNotFoundError(errno.ENOENT, "it is no regular file", relative)
    return file


_CAREFUL = os.O_NOFOLLOW | os.O_CLOEXEC


def _no_parent(name: str) -> str:
    if name in ("", "..") or "\0" in name:
        raise FileNotFoundError(errno.ENOENT, "it is no plain name", name)
    return name


def is_users(file: str) -> bool:
    """Whether a file is neither ours nor installed. Files of the built-in tasks count as the user's."""
    if file.startswith(_TASKS):
        return True
    is_installed = file.startswith(_INSTALLED) or any(name in file for name in _PACKAGES)
    return file.startswith("/") and not is_installed and not file.startswith(_OURS)


def is_ours(file: str) -> bool:
    """Whether a file is a part of pscluster, or of the machinery by which it imports the user's."""
    if file.startswith("<frozen importlib") or file.endswith("importlib/__init__.py"):
        return True
    return file.startswith(_OURS) and not file.startswith(_TASKS)


def traceback_of(frames: Iterable[Frame]) -> str:
    """The frames as Python prints them, without a line for the error; empty without frames."""
    lines = []
    for frame in frames:
        lines.append(f'  File "{frame.file}", line {frame.line}, in {frame.function}')
        if frame.text:
            lines.append(f"    {frame.text}")
    return "\n".join(["Traceback (most recent call last):", *lines, ""]) if lines else ""


def user_traceback(error: BaseException) -> str:
    """The traceback of an error and of those that led to it as Python prints it, with the user's own frames alone.

    Where there are none, as in a task that is an installed package, every frame that is not ours."""
    shown = traceback.TracebackException.from_exception(error)
    linked = list(_linked(shown))
    own = any(is_users(frame.filename) for one in linked for frame in one.stack)
    for one in linked:
        kept = [frame for frame in one.stack if (is_users if own else _is_others)(frame.filename)]
        one.stack = traceback.StackSummary.from_list(kept)
    return "".join(shown.format())


def _is_others(file: str) -> bool:
    return not is_ours(file)


def _linked(shown: traceback.TracebackException | None) -> Iterator[traceback.TracebackException]:
    """An error, and those that are printed with it."""
    while shown is not None:
        yield shown
        for one in getattr(shown, "exceptions", None) or ():
            yield from _linked(one)
        shown = shown.__cause__ or shown.__context__


_FRAME = re.compile(r'^[ |]*File "(?P<file>[^"\n]+)", line (?P<line>\d+)(?:, in (?P<function>[^\n]+))?', re.MULTILINE)


def newest_frame(text: str) -> Frame | None:
    """The last frame of a traceback as text: where the error was raised."""
    frames = list(_FRAME.finditer(text))
    if not frames:
        return None
    return Frame(frames[-1]["file"], int(frames[-1]["line"]), frames[-1]["function"] or "")


def relative_to(code: Path, text: str) -> str:
    """A traceback with the names of the user's files relative to their directory `code`."""
    return text.replace(f'File "{code}/', 'File "')


def place_of(details: Mapping[str, str]) -> str:
    """The place that `frame_details` found, as "task.py:16 in loss"; empty if it found none."""
    if "file" not in details:
        return ""
    function = details.get("function", "")
    return f"{details['file']}:{details.get('line', '?')}" + (f" in {function}" if function else "")


def frame_details(text: str) -> dict[str, str]:
    """The details of an error that say where it was raised: file, line, and function unless it is a syntax error."""
    frame = newest_frame(text)
    if frame is None:
        return {}
    function = {"function": frame.function} if frame.function else {}
    return {"file": frame.file, "line": str(frame.line), **function}
