"""A trainer's or partition's line to its agent: orders in, reports out."""

from __future__ import annotations

import os
import socket
import threading
from collections import deque

from google.protobuf.message import DecodeError

from pscluster.agent import frames
from pscluster.agent.launch import CONTROL_FD, end_with_agent
from pscluster.errors import FrameError, SettingsError, UnreachableError
from pscluster.v1.plan_pb2 import ProcessOrder, ProcessReport, ProcessSpec

START_DEADLINE_S = 30.0
_READ_BYTES = 1 << 16


class ProcessLink:
    """The socket that the agent passed by number in PS_CONTROL_FD.

    One thread reads (`receive`, `receive_nowait`, `fileno`); any thread may `report`. `start` is the first
    order.
    """

    start: ProcessSpec

    def __init__(self, control: socket.socket, deadline_s: float = START_DEADLINE_S) -> None:
        """Take ownership of `control` and block until the start order is here.

        Raises UnreachableError when it does not come within `deadline_s` or the agent goes away first,
        FrameError when something else comes first.
        """
        self._socket = control
        self._splitter = frames.Splitter()
        self._orders: deque[ProcessOrder] = deque()
        self._sending = threading.Lock()
        control.settimeout(deadline_s)
        try:
            first = self.receive()
        except TimeoutError:
            raise UnreachableError(f"no start order from the agent within {deadline_s} s") from None
        if first is None:
            raise UnreachableError("the agent went away before it sent the start order")
        if first.WhichOneof("body") != "start":
            raise FrameError(f"the first order is {first.WhichOneof('body')!r}, not 'start'")
        control.settimeout(None)
        self.start = first.start

    @classmethod
    def from_environment(cls) -> ProcessLink:
        """Adopt the agent's socket, bind this process's life to the agent's, and read the start order.

        Blocks for at most 30 s. The number is taken out of the environment and the socket is not inherited by
        processes started from here. Raises SettingsError when no agent started this process.
        """
        number = os.environ.pop(CONTROL_FD, "")
        if not number.isdigit():
            raise SettingsError(
                f"{CONTROL_FD} names no socket", action="this module is started by an agent, not by hand"
            )
        end_with_agent()
        control = socket.socket(fileno=int(number))
        control.set_inheritable(False)
        return cls(control)

    def fileno(self) -> int:
        """For a selector: readable means that `receive_nowait` has something, or the agent is gone."""
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
        """Every order that is here, oldest first; never blocks. Raises EOFError when the agent is gone.

        Orders that arrived before the end are returned first; the call after that raises.
        """
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
        """Hand one report to the agent; thread-safe. Blocks while the agent does not read.

        Raises EOFError when the agent is gone, FrameError above 64 MiB.
        """
        frame = frames.encode(report.SerializeToString())
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
