"""Memory that two processes of one host share, and the memory of a replica, parts of which can be windows onto it.

A `Segment` is an anonymous file that its maker passes over a Unix socket. It has no name anywhere: the kernel frees it
with the last process that maps it, however that process ended."""

from __future__ import annotations

import ctypes
import fcntl
import mmap
import os
from collections.abc import Iterable, Sequence

from pscluster.errors import FrameError

PAGE_BYTES = mmap.PAGESIZE
_F_SEAL_FUTURE_WRITE = 0x0010  # linux/fcntl.h; since Linux 5.1
_FIXED_SIZE = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW
_MAP_FIXED = 0x10  # mman.h; Python's mmap does not offer it
_MAP_FAILED = ctypes.c_void_p(-1).value


def page_offsets(sizes_bytes: Iterable[int]) -> tuple[list[int], int]:
    """Where things of these sizes begin when each starts on a page of its own, and the length of them all."""
    offsets, end = [], 0
    for size in sizes_bytes:
        offsets.append(end)
        end += -(-size // PAGE_BYTES) * PAGE_BYTES
    return offsets, end


class Segment:
    """Shared memory of a fixed size. `view` is all of it, zeroed at first; what refers to it keeps it."""

    def __init__(self, fd: int, memory: mmap.mmap) -> None:
        self.fd = fd
        self.view = memoryview(memory)

    def __del__(self) -> None:
        os.close(self.fd)

    @classmethod
    def create(cls, size_bytes: int, *, writable_by_others: bool) -> Segment:
        """New memory of at least a page. A process that gets `fd` may map it; `writable_by_others`: and write to it.

        With `writable_by_others=False` the pages are touched now: no step pays for that. Raises OSError."""
        fd = os.memfd_create("pscluster", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        try:
            os.ftruncate(fd, max(size_bytes, PAGE_BYTES))
            touch = 0 if writable_by_others else mmap.MAP_POPULATE
            memory = mmap.mmap(fd, max(size_bytes, PAGE_BYTES), flags=mmap.MAP_SHARED | touch)
            seals = _FIXED_SIZE | (0 if writable_by_others else _F_SEAL_FUTURE_WRITE)
            fcntl.fcntl(fd, fcntl.F_ADD_SEALS, seals | fcntl.F_SEAL_SEAL)
        except OSError:
            os.close(fd)
            raise
        return cls(fd, memory)

    @classmethod
    def open(cls, fd: int, size_bytes: int, *, writable: bool) -> Segment:
        """Map what another process created; takes over `fd`, also when it fails.

        Raises FrameError when it is smaller than promised or could shrink: touching a page that is gone would kill
        this process."""
        try:
            fixed = fcntl.fcntl(fd, fcntl.F_GET_SEALS) & _FIXED_SIZE == _FIXED_SIZE
            size = os.fstat(fd).st_size
            if not fixed or size < max(size_bytes, PAGE_BYTES):
                raise FrameError(f"shared memory of {size} bytes where {size_bytes} of a fixed size were promised")
            access = mmap.PROT_READ | (mmap.PROT_WRITE if writable else 0)
            memory = mmap.mmap(fd, size, flags=mmap.MAP_SHARED, prot=access)
        except FrameError:
            os.close(fd)
            raise
        except OSError as error:
            os.close(fd)
            raise FrameError(f"shared memory cannot be mapped: {error}") from None
        return cls(fd, memory)


class Arena:
    """A contiguous range of memory whose pages are private, or windows onto segments, read-only.

    Either kind may be put anywhere at any time; the addresses stay, so that tensors over the arena stay valid."""

    def __init__(self, size_bytes: int) -> None:
        self._memory = mmap.mmap(-1, max(size_bytes, PAGE_BYTES), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        self._address = ctypes.addressof(ctypes.c_char.from_buffer(self._memory))
        self.view = memoryview(self._memory)

    def show(self, offset: int, segment: Segment, segment_offset: int, size_bytes: int) -> None:
        """Turn `size_bytes` at `offset` into a window onto the segment; whole pages, maybe none: what was there is
        gone, a write there ends the process with SIGSEGV. Raises OSError."""
        self._map(offset, size_bytes, mmap.PROT_READ, mmap.MAP_SHARED, segment.fd, segment_offset)

    def make_private(self, offset: int, size_bytes: int) -> None:
        """Turn `size_bytes` at `offset` into zeroed memory of this process; whole pages. Raises OSError."""
        access = mmap.PROT_READ | mmap.PROT_WRITE
        self._map(offset, size_bytes, access, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS, -1, 0)

    def _map(self, offset: int, size_bytes: int, access: int, flags: int, fd: int, fd_offset: int) -> None:
        end = offset + -(-size_bytes // PAGE_BYTES) * PAGE_BYTES
        if end == offset:
            return
        assert 0 <= offset < end <= len(self._memory) and not offset % PAGE_BYTES and not fd_offset % PAGE_BYTES
        result = _libc.mmap(self._address + offset, end - offset, access, flags | _MAP_FIXED, fd, fd_offset)
        if result == _MAP_FAILED:
            raise OSError(ctypes.get_errno(), "mmap failed")


class Lanes:
    """Gradients on their way from one trainer to one partition: for each bucket `num_lanes` places in a segment.

    One byte a place holds who may use it: the trainer takes a free one and writes, the partition reads it in place, may
    sum there, and frees it. No message is needed for that; the byte changes last."""

    def __init__(self, segment: Segment, sizes_bytes: Sequence[int], num_lanes: int) -> None:
        """`sizes_bytes[b]`: of bucket b's place. Pages of a lane cost memory from its first use on."""
        self._segment = segment  # owns `fd`
        self._sizes = list(sizes_bytes)
        self.num_lanes, self.fd = num_lanes, segment.fd
        self.view = segment.view  # the whole segment
        self._offsets, _ = page_offsets(_lane_sizes(sizes_bytes, num_lanes))
        self._taken = segment.view[: len(self._sizes) * num_lanes]

    @classmethod
    def create(cls, sizes_bytes: Sequence[int], num_lanes: int) -> Lanes:
        """The partition's side. Raises OSError."""
        segment = Segment.create(lanes_bytes(sizes_bytes, num_lanes), writable_by_others=True)
        return cls(segment, sizes_bytes, num_lanes)

    @classmethod
    def open(cls, fd: int, sizes_bytes: Sequence[int], num_lanes: int) -> Lanes:
        """The trainer's side; takes over `fd`. Raises FrameError when its size does not fit the layout."""
        size = lanes_bytes(sizes_bytes, num_lanes)
        return cls(Segment.open(fd, size, writable=True), sizes_bytes, num_lanes)

    def take(self, bucket: int) -> int | None:
        """A free lane of a bucket, taken; the lowest, whose pages were touched before. None: all are in use."""
        first = bucket * self.num_lanes
        for lane in range(self.num_lanes):
            if not self._taken[first + lane]:
                self._taken[first + lane] = 1
                return lane
        return None

    def give_back(self, bucket: int, lane: int) -> None:
        """The place may be written to again."""
        self._taken[bucket * self.num_lanes + lane] = 0

    def place(self, bucket: int, lane: int) -> memoryview:
        """The memory of one lane of a bucket."""
        start = self._offsets[1 + bucket * self.num_lanes + lane]
        return self.view[start : start + self._sizes[bucket]]


def lanes_bytes(sizes_bytes: Sequence[int], num_lanes: int) -> int:
    """Length of the segment behind `Lanes` of these sizes."""
    return page_offsets(_lane_sizes(sizes_bytes, num_lanes))[1]


def _lane_sizes(sizes_bytes: Sequence[int], num_lanes: int) -> list[int]:
    """Of everything in the segment, in order: the bytes that mark what is taken, then each bucket's lanes."""
    return [len(sizes_bytes) * num_lanes, *(size for size in sizes_bytes for _ in range(num_lanes))]


_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = (
    ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long,
)  # fmt: skip
