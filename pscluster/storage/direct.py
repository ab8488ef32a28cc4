"""A file that is written past the page cache.

A snapshot is written often and read only after a loss: in the page cache it would push out what is in use, and copying
it there costs more of a processor than everything else about it.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import mmap
import os
import signal
import stat
from collections.abc import Sequence
from pathlib import Path

ALIGNMENT = 4096
"""Of offset, length and memory, in bytes: more than disks ask for."""
_BLOCK_BYTES = 1 << 20


class DirectFile:
    """Created, or emptied; written from start to end. Where the file system or the disk does not take such writes, or
    wants another alignment, they are ordinary ones.

    `room`: a file of the same file system that is no longer wanted; it is gone afterwards. If nobody else has it, the
    new one takes its place on the disk (measured: 37 ms for 72 MB, where finding and freeing places made it 60).

    A megabyte or more at a multiple of `ALIGNMENT`, in the file as in memory, is written from where it lies, unless it
    is read-only; the rest is gathered first. Every method blocks on the disk and raises OSError; always `close`."""

    def __init__(self, path: Path, room: Path | None = None) -> None:
        self._block = memoryview(mmap.mmap(-1, _BLOCK_BYTES))  # begins with a page
        self._end = 0  # of what was put into the file
        self._filled = 0  # how many bytes of the block come after that
        taken = None if room is None else _taken_over(room, path)
        self._descriptor = _open(path, os.O_CREAT | os.O_TRUNC) if taken is None else taken

    def fileno(self) -> int:
        return self._descriptor

    def write(self, data: memoryview) -> None:
        """Append bytes, of which nothing is needed on return."""
        while data.nbytes:
            if whole := self._as_it_lies(data):
                self._put_block(self._filled, data[:whole])
                data = data[whole:]
                continue
            part = data[: _BLOCK_BYTES - self._filled]
            self._block[self._filled : self._filled + part.nbytes] = part
            self._filled += part.nbytes
            data = data[part.nbytes :]
            if self._filled == _BLOCK_BYTES:
                self._put_block(self._filled)

    def rewrite(self, data: memoryview) -> None:
        """Put other bytes in the place of the last ones, as many."""
        on_disk = max(0, data.nbytes - self._filled)
        self._block[self._filled - (data.nbytes - on_disk) : self._filled] = data[on_disk:]
        self._put([data[:on_disk]], self._end - on_disk)

    def flush(self) -> None:
        """The file system has all of it, and the file its length; nothing can be written any more."""
        self._put_block(-(-self._filled // ALIGNMENT) * ALIGNMENT)
        os.ftruncate(self._descriptor, self._end)

    def close(self) -> None:
        """Safe to repeat."""
        if self._descriptor >= 0:
            descriptor, self._descriptor = self._descriptor, -1
            os.close(descriptor)

    def _as_it_lies(self, data: memoryview) -> int:
        """How many of the first bytes need not be gathered."""
        if self._filled % ALIGNMENT or data.readonly or data.nbytes < _BLOCK_BYTES:
            return 0
        address = ctypes.addressof(ctypes.c_char.from_buffer(data))
        return 0 if address % ALIGNMENT else data.nbytes // ALIGNMENT * ALIGNMENT

    def _put_block(self, length: int, *further: memoryview) -> None:
        """So much of the block, and what comes after its filled bytes. What lies beyond those is cut off by `flush`."""
        data = [self._block[:length], *further]
        self._put(data, self._end)
        self._end += self._filled + sum(view.nbytes for view in further)
        self._filled = 0

    def _put(self, data: Sequence[memoryview], at: int) -> None:
        """One after the other. In one call: each takes the disk as long as half a megabyte does."""
        left = [view for view in data if view.nbytes]
        while left:
            try:
                written = os.pwritev(self._descriptor, left, at)
                at += written
                while left and written >= left[0].nbytes:
                    written -= left.pop(0).nbytes
                if written:
                    left[0] = left[0][written:]
            except OSError as error:
                flags = fcntl.fcntl(self._descriptor, fcntl.F_GETFL)
                if error.errno != errno.EINVAL or not flags & os.O_DIRECT:
                    raise
                fcntl.fcntl(self._descriptor, fcntl.F_SETFL, flags & ~os.O_DIRECT)


def _open(path: Path, flags: int) -> int:
    flags |= os.O_WRONLY | os.O_CLOEXEC
    try:
        return os.open(path, flags | os.O_DIRECT, 0o666)
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
        return os.open(path, flags, 0o666)


def _taken_over(room: Path, path: Path) -> int | None:
    """The file at `room`, as it is, under its new name; None: that could not be had, and is gone."""
    try:
        descriptor = _open(room, os.O_NOFOLLOW)
        try:
            if _is_ours_alone(descriptor):
                room.rename(path)
                return descriptor
        except OSError:
            pass  # maybe it cannot be told
        os.close(descriptor)
    except OSError:
        pass  # it is not there, or a link to elsewhere
    with contextlib.suppress(OSError):
        room.unlink()
    return None


def _is_ours_alone(descriptor: int) -> bool:
    """Whether it is a file of our own that has one name and that nobody else has open: what is written to it changes
    nothing of others. Raises OSError where that cannot be known.

    The kernel grants a lease to write only for what nobody else has open. It tells us when somebody comes to open it,
    by a signal that would end this process, were it not one that is ignored."""
    found = os.fstat(descriptor)
    if not stat.S_ISREG(found.st_mode) or found.st_nlink != 1 or found.st_uid != os.geteuid():
        return False
    fcntl.fcntl(descriptor, fcntl.F_SETSIG, signal.SIGURG)
    fcntl.fcntl(descriptor, fcntl.F_SETLEASE, fcntl.F_WRLCK)
    fcntl.fcntl(descriptor, fcntl.F_SETLEASE, fcntl.F_UNLCK)
    return True
