"""A trainer's or partition's connection to its agent: orders in, reports out, heartbeats from a separate thread; and
the time by phase that it reports.

Frames on it are 4 bytes of little-endian length, then a protobuf message.
"""

from __future__ import annotations

import os
import socket
import struct
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

from google.protobuf.message import DecodeError

from pscluster.agent.launch import CONTROL_FD, end_with_agent
from pscluster.errors import FrameError, SettingsError, UnreachableError
from pscluster.v1.plan_pb2 import Beat, ProcessOrder, ProcessReport, ProcessSpec

START_DEADLINE_S = 30.0
_READ_BYTES = 1 << 16
LENGTH = struct.Struct("<I")
MAX_FRAME_BYTES = 64 * 1024 * 1024
BEAT_S = 0.5
UNREACHED_S = 2.0
"""A partition that cannot be connected to for this long is reported as unreached."""


class ProcessLink:
    """The socket that the agent passed by number in PS_CONTROL_FD. One thread reads, any may `report`. `start`: the
    first order."""

    start: ProcessSpec

    def __init__(self, control: socket.socket, deadline_s: float = START_DEADLINE_S) -> None:
        """Take ownership of `control` and block until the start order arrives. Raises UnreachableError when it does not
        within `deadline_s`, FrameError when something else arrives first."""
        self._socket = control
        self._splitter = FrameSplitter()
        self._orders: deque[ProcessOrder] = deque()
        self._sending = threading.Lock()
        control.settimeout(deadline_s)
        try:
            first = self.receive()
        except TimeoutError:
            raise UnreachableError(f"no start order from the agent within {deadline_s} s") from None
        if first is None:
            raise UnreachableError("the agent ended before it sent the start order")
        if first.WhichOneof("body") != "start":
            raise FrameError(f"the first order is {first.WhichOneof('body')!r}, not 'start'")
        control.settimeout(None)
        self.start = first.start

    @classmethod
    def from_environment(cls) -> ProcessLink:
        """Take the agent's socket, which processes started from here do not inherit, tie this process's life to the
        agent's, and read the start order. Blocks for at most 30 s. Raises SettingsError when no agent started this
        process."""
        number = os.environ.pop(CONTROL_FD, "")
        if not number.isdigit():
            raise SettingsError(
                f"{CONTROL_FD} names no socket", action="an agent starts this module; it is not started by hand"
            )
        end_with_agent()
        control = socket.socket(fileno=int(number))
        control.set_inheritable(False)
        return cls(control)

    def fileno(self) -> int:
        """For a selector: readable means that `receive_nowait` returns orders, or that the agent is gone."""
        return self._socket.fileno()

    def receive(self) -> ProcessOrder | None:
        """Block for the next order. None: the agent is gone."""
        while not self._orders:
            try:
                data = self._socket.recv(_READ_BYTES)
            except ConnectionError:
                return None
            if not data:
                return None
            self._take(data)
        return self._orders.popleft()

    def receive_nowait(self) -> list[ProcessOrder]:
        """Every order that has arrived, oldest first; never blocks. Raises EOFError once the agent is gone and all
        orders are returned."""
        gone = False
        while not gone:
            try:
                data = self._socket.recv(_READ_BYTES, socket.MSG_DONTWAIT)
            except BlockingIOError:
                break
            except ConnectionError:
                data = b""
            gone = not data
            self._take(data)
        if gone and not self._orders:
            raise EOFError("the agent is gone")
        orders = list(self._orders)
        self._orders.clear()
        return orders

    def report(self, report: ProcessReport) -> None:
        """Send one report; thread-safe. Blocks while the agent does not read. Raises EOFError when it is gone,
        FrameError above 64 MiB."""
        frame = encode_frame(report.SerializeToString())
        with self._sending:
            try:
                self._socket.sendall(frame)
            except ConnectionError:
                raise EOFError("the agent is gone") from None

    def close(self) -> None:
        self._socket.close()

    def _take(self, data: bytes) -> None:
        for message in self._splitter.feed(data):
            try:
                self._orders.append(ProcessOrder.FromString(message))
            except DecodeError as error:
                raise FrameError(f"an order from the agent does not decode: {error}") from None


def encode_frame(message: bytes) -> bytes:
    """One frame around a serialized message. Raises FrameError above 64 MiB."""
    if len(message) > MAX_FRAME_BYTES:
        raise FrameError(f"a control frame of {len(message)} bytes exceeds {MAX_FRAME_BYTES}")
    return LENGTH.pack(len(message)) + message


class FrameSplitter:
    """Splits a byte stream into messages. Buffers at most one unfinished frame."""

    def __init__(self) -> None:
        self._buffer = bytearray()

    def feed(self, data: bytes) -> list[bytes]:
        """The messages that `data` completes, in order. Raises FrameError on a length above 64 MiB."""
        self._buffer += data
        messages = []
        start = 0
        while len(self._buffer) - start >= LENGTH.size:
            (size,) = LENGTH.unpack_from(self._buffer, start)
            if size > MAX_FRAME_BYTES:
                raise FrameError(f"a control frame announces {size} bytes, more than {MAX_FRAME_BYTES}")
            end = start + LENGTH.size + size
            if end > len(self._buffer):
                break
            messages.append(bytes(self._buffer[start + LENGTH.size : end]))
            start = end
        del self._buffer[:start]
        return messages


class HeartbeatThread(threading.Thread):
    """Reports what `beat` returns twice a second, whatever other threads do, until `close` or the end of the agent."""

    def __init__(self, link: ProcessLink, beat: Callable[[], Beat]) -> None:
        """`beat` is called on this thread and must not block."""
        super().__init__(name="heartbeat", daemon=True)
        self._link = link
        self._beat = beat
        self._ended = threading.Event()

    def close(self) -> None:
        """Send no more heartbeats. Safe to repeat, also before `start`."""
        self._ended.set()

    def run(self) -> None:
        try:
            while True:
                self._link.report(ProcessReport(beat=self._beat()))
                if self._ended.wait(BEAT_S):
                    return
        except EOFError:
            return  # the agent is gone, and this process ends with it


class Phases:
    """Wall-clock seconds by phase (ps_phase_seconds_total). One thread measures; any may read `seconds`."""

    def __init__(self, names: Iterable[str]) -> None:
        self.seconds = dict.fromkeys(names, 0.0)
        self._inner_s = 0.0  # spent in phases inside the running one

    @contextmanager
    def measure(self, name: str) -> Iterator[None]:
        """Time the block as part of a phase; a phase within a phase counts as the inner one alone."""
        outer, self._inner_s = self._inner_s, 0.0
        started = time.perf_counter()
        try:
            yield
        finally:
            spent = time.perf_counter() - started
            self.seconds[name] += spent - self._inner_s
            self._inner_s = outer + spent
