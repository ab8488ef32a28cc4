"""One process of an agent: its start, its socket, its output, its end. Start children from the loop's thread: the
kernel kills them when that thread ends."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import subprocess
import threading
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import structlog
from google.protobuf.message import DecodeError

from pscluster.agent.launch import AGENT_PID, CONTROL_FD
from pscluster.agent.link import FrameSplitter, encode_frame
from pscluster.agent.report_queue import LineSplitter
from pscluster.agent.status import Exit
from pscluster.errors import FrameError
from pscluster.v1.plan_pb2 import Credentials, PartSettled, Plan, ProcessOrder, ProcessReport, ProcessSpec, Shutdown

_READ_BYTES = 1 << 16
_STDERR_TAIL_LINES = 40
_DRAIN_S = 1.0
OnReport = Callable[[ProcessReport], None]
OnLine = Callable[[str, str], None]
"""Called with the stream, "stdout" or "stderr", and the line. Both run on the loop's thread and must not block."""

_log = structlog.get_logger(__name__)


@dataclass(frozen=True, kw_only=True)
class GracePeriods:
    """Seconds from the shutdown order until SIGTERM, and until SIGKILL. `leave_s`: how long an agent that ends first
    waits for the master to move its processes to other nodes."""

    terminate_s: float = 3.0
    kill_s: float = 5.0
    leave_s: float = 0.0


class Child:
    """A running process in its own session. Used from the loop it was started on."""

    def __init__(
        self, process: subprocess.Popen[bytes], control: socket.socket, on_report: OnReport, on_line: OnLine
    ) -> None:
        self._process = process
        self._control = control
        self._on_report = on_report
        self._on_line = on_line
        self._loop = asyncio.get_running_loop()
        self._exited = asyncio.Event()
        self._reaped = False
        self._expected = False
        self._last_words: deque[str] = deque(maxlen=_STDERR_TAIL_LINES)
        self._wake = asyncio.Event()
        self._start: ProcessSpec | None = None
        self._plan: Plan | None = None
        self._credentials: Credentials | None = None
        self._settled: list[str] = []
        self._shutdown = False

    @classmethod
    def start(
        cls,
        spec: ProcessSpec,
        command: Sequence[str],
        directory: Path,
        environment: Mapping[str, str],
        on_report: OnReport,
        on_line: OnLine,
    ) -> Child:
        """Start `command` in `directory` and send it `spec`; `wait` must follow. Blocks for milliseconds. Raises
        OSError."""
        ours, theirs = socket.socketpair()
        ours.setblocking(False)
        with theirs:
            variables = {CONTROL_FD: str(theirs.fileno()), AGENT_PID: str(os.getpid())}
            try:
                process = subprocess.Popen(
                    list(command),
                    cwd=directory,
                    env={**environment, **variables},
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.PIPE,
                    stderr=subprocess.PIPE,
                    pass_fds=(theirs.fileno(),),
                    start_new_session=True,
                )
            except OSError:
                ours.close()
                raise
        child = cls(process, ours, on_report, on_line)
        child._start = spec
        child._wake.set()
        child._begin()
        return child

    @property
    def pid(self) -> int:
        return self._process.pid

    def forward(self, plan: Plan) -> None:
        """Send a newer plan; never blocks. Of the plans not sent yet only the newest is sent."""
        self._plan = plan
        self._wake.set()

    def renew(self, credentials: Credentials) -> None:
        """Send newer credentials, for connections that it opens from then on; never blocks."""
        self._credentials = credentials
        self._wake.set()

    def kill(self) -> None:
        """End the whole group at once; `wait` returns soon after. Safe to repeat."""
        self._signal(signal.SIGKILL)

    def settle(self, path: str) -> None:
        """Send a partition that the transfer of a part is over; never blocks."""
        self._settled.append(path)
        self._wake.set()

    async def wait(self) -> Exit:
        """Wait until the process has exited, its output is read, and the rest of its group is killed. Call once."""
        await self._exited.wait()
        # The leader is still a zombie: the number of its group cannot be reused yet.
        self._signal(signal.SIGKILL)
        self._reaped = True
        returncode = self._process.wait()
        await asyncio.wait(self._readers, timeout=_DRAIN_S)
        await self._close()
        return Exit(returncode=returncode, expected=self._expected, stderr_tail=tuple(self._last_words))

    async def end(self, grace: GracePeriods) -> None:
        """Send the shutdown order, then SIGTERM, then SIGKILL to the whole group; returns when it has exited."""
        self._expected = True
        self._shutdown = True
        self._wake.set()
        for wait_s, number in ((grace.terminate_s, signal.SIGTERM), (grace.kill_s - grace.terminate_s, signal.SIGKILL)):
            try:
                await asyncio.wait_for(self._exited.wait(), wait_s)
                return
            except TimeoutError:
                self._signal(number)
        await self._exited.wait()

    def _signal(self, number: signal.Signals) -> None:
        if not self._reaped:
            try:
                os.killpg(self._process.pid, number)
            except (ProcessLookupError, PermissionError) as error:
                _log.debug("no group to signal", pid=self.pid, signal=number.name, error=str(error))

    def _begin(self) -> None:
        threading.Thread(target=self._await_exit, name=f"exit-{self.pid}", daemon=True).start()
        output = (("stdout", self._process.stdout), ("stderr", self._process.stderr))
        readers = [self._read_reports(), *(self._read_output(name, pipe) for name, pipe in output)]
        self._readers = [asyncio.create_task(reader) for reader in readers]
        self._writer = asyncio.create_task(self._write_orders())

    def _await_exit(self) -> None:
        """Run on a separate thread: wait for the exit without reaping, so that the pid is not reused."""
        os.waitid(os.P_PID, self._process.pid, os.WEXITED | os.WNOWAIT)
        try:
            self._loop.call_soon_threadsafe(self._exited.set)
        except RuntimeError:
            _log.debug("the loop ended before its child", pid=self.pid)

    async def _read_output(self, name: str, pipe: Any) -> None:
        cutter = LineSplitter()
        reader = asyncio.StreamReader(limit=_READ_BYTES)
        transport, _ = await self._loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), pipe)
        try:
            while data := await reader.read(_READ_BYTES):
                self._take_lines(name, cutter.feed(data))
        finally:
            self._take_lines(name, cutter.flush())
            transport.close()

    def _take_lines(self, name: str, lines: list[str]) -> None:
        for line in lines:
            if name == "stderr":
                self._last_words.append(line)
            self._on_line(name, line)

    async def _read_reports(self) -> None:
        splitter = FrameSplitter()
        try:
            while data := await self._loop.sock_recv(self._control, _READ_BYTES):
                for message in splitter.feed(data):
                    self._on_report(ProcessReport.FromString(message))
        except ConnectionError:
            return
        except (FrameError, DecodeError) as error:
            _log.error("a process sent an invalid frame and is killed", pid=self.pid, error=str(error))
            self._signal(signal.SIGKILL)

    async def _write_orders(self) -> None:
        try:
            while True:
                await self._wake.wait()
                self._wake.clear()
                for order in self._take_orders():
                    await self._loop.sock_sendall(self._control, encode_frame(order.SerializeToString()))
        except ConnectionError:
            return

    def _take_orders(self) -> list[ProcessOrder]:
        orders = []
        if self._start is not None:
            orders.append(ProcessOrder(start=self._start))
        if self._credentials is not None:  # before the plan, which may name peers that trust only these
            orders.append(ProcessOrder(credentials=self._credentials))
        if self._plan is not None:
            orders.append(ProcessOrder(plan=self._plan))
        orders += [ProcessOrder(settled=PartSettled(path=path)) for path in self._settled]
        if self._shutdown:
            orders.append(ProcessOrder(shutdown=Shutdown()))
        self._start, self._credentials, self._plan, self._settled, self._shutdown = None, None, None, [], False
        return orders

    async def _close(self) -> None:
        tasks = [*self._readers, self._writer]
        for task in tasks:
            task.cancel()
        for outcome in await asyncio.gather(*tasks, return_exceptions=True):
            if isinstance(outcome, Exception):
                _log.error("reading from a process failed", pid=self.pid, exc_info=outcome)
        self._control.close()
