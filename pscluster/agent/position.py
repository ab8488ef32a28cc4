"""Where a trainer is, noted in two files beside its sockets that outlive it: its agent reads them when it has ended.

    <sockets>/position   what it computes, of which step and shard, and which user code it calls
    <sockets>/stack      its Python stack at a fatal signal (by faulthandler) or at os._exit

Both are written whether or not anything goes wrong, so a note is two stores into mapped memory, no system call.
"""

from __future__ import annotations

import faulthandler
import mmap
import os
import re
import struct
from collections.abc import Iterator, MutableSequence
from contextlib import contextmanager
from pathlib import Path
from typing import NoReturn

from pscluster.user_frames import Frame, open_below, traceback_of
from pscluster.v1.plan_pb2 import LastPosition

POSITION, STACK = "position", "stack"
_PLACE = struct.Struct("<16sQi")  # activity, version, shard
_CALL = slice(32, 96)
_SIZE = 96
_MAX_STACK_BYTES = 256 * 1024
_STACK = re.compile(r"^(?:Current thread |Stack )[^\n]*\n", re.MULTILINE)
_FRAME = re.compile(r'  File "(?P<file>[^"\n]+)", line (?P<line>\d+) in (?P<function>[^\n]+)')


class Position:
    """Of this process. Used from its main thread; others may read it."""

    def __init__(self) -> None:
        self._memory: MutableSequence[int] | mmap.mmap = bytearray(_SIZE)
        self.activity = ""
        self.version = 0
        self.shard = -1
        self._call = ""

    def keep_in(self, directory: Path) -> None:
        """Note it in this directory from here on, and the stack at a fatal signal or os._exit as well.

        Called once, before user code is loaded. Raises OSError."""
        with (directory / POSITION).open("w+b") as file:
            file.truncate(_SIZE)
            self._memory = mmap.mmap(file.fileno(), _SIZE)
        stack = os.open(directory / STACK, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
        faulthandler.enable(stack, all_threads=True)
        _dump_at_exit(stack)

    def begin(self, activity: str, version: int = 0, shard: int = -1) -> None:
        """What is computed from here on; see LastPosition."""
        self.activity, self.version, self.shard = activity, version, shard
        _PLACE.pack_into(self._memory, 0, activity.encode(), version, shard)  # type: ignore[arg-type]

    @contextmanager
    def calling(self, what: str) -> Iterator[None]:
        """The block calls user code. A call within a call is noted while it lasts."""
        outer = self._call
        self._note_call(what)
        try:
            yield
        finally:
            self._note_call(outer)

    def _note_call(self, what: str) -> None:
        self._call = what
        self._memory[_CALL] = what.encode()[:64].ljust(64, b"\0")

    @property
    def step(self) -> int:
        """The step that is being made, or the committed one that is evaluated; 0 before the first."""
        return self.version + (self.activity == "train")


position = Position()
"""This process's."""


def _dump_at_exit(stack: int) -> None:
    """Have os._exit write the caller's stack first: it ends the process without a trace otherwise. Processes that are
    forked from this one, as a DataLoader's workers are, end as ever."""
    exit_at_once, owner = os._exit, os.getpid()

    def _exit(status: int) -> NoReturn:
        if os.getpid() == owner:
            faulthandler.dump_traceback(stack, all_threads=False)
        exit_at_once(status)

    os._exit = _exit


def last_position(directory: Path, code: Path) -> LastPosition | None:
    """Where the process that kept its position in `directory` was when it ended; None: it kept none, or no user code
    was loaded by then. `code`: where the user's own files are."""
    try:
        with open_below(directory, POSITION) as file:
            noted = file.read(_SIZE)
    except OSError:
        return None
    if len(noted) < _SIZE:
        return None
    activity, version, shard = _PLACE.unpack_from(noted)
    if not activity.rstrip(b"\0"):
        return None
    return LastPosition(
        activity=_text(activity),
        version=version,
        shard=shard,
        call=_text(noted[_CALL]),
        # Not what user code may have put in the place of the directory since: a link to what it must not read.
        traceback=traceback_of(user_frames_of(stack_of(directory), code.parent.resolve() / code.name)),
    )


def stack_of(directory: Path) -> str:
    """What was written to the stack file; empty: nothing was."""
    try:
        with open_below(directory, STACK) as file:
            return file.read(_MAX_STACK_BYTES).decode("utf-8", "replace")
    except OSError:
        return ""


def user_frames_of(stack: str, code: Path) -> list[Frame]:
    """The user's own frames in the last stack of a file that faulthandler wrote, the newest last."""
    starts = [match.end() for match in _STACK.finditer(stack)]
    if not starts:
        return []
    newest_first = []
    for line in stack[starts[-1] :].splitlines():
        match = _FRAME.match(line)
        if match is None:
            break
        newest_first.append(Frame(match["file"], int(match["line"]), match["function"]))
    return [frame.below(code) for frame in reversed(newest_first) if frame.is_users(code)]


def _text(field: bytes) -> str:
    return field.rstrip(b"\0").decode("utf-8", "ignore")
