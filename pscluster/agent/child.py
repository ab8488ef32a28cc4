"""One process of an agent: its start, its socket, its output, its end.

Start children from the loop's own thread and keep that thread alive: the kernel ends them when it ends.
"""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import subprocess
import threading
from collections import deque
from collections.abc import Coroutine, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import structlog
from google.protobuf.message import DecodeError

from pscluster.agent import link
from pscluster.agent.launch import AGENT_PID, CONTROL_FD
from pscluster.agent.output import LineCutter
from pscluster.errors import FrameError
from pscluster.v1.plan_pb2 import PartSettled, Plan, ProcessOrder, ProcessReport, ProcessSpec, Shutdown

_READ_BYTES = 1 << 16
_NUM_LAST_WORDS = 40
_DRAIN_S = 1.0
_log = structlog.get_logger(__name__)


@dataclass(frozen=True, kw_only=True)
class Patience:
    """Seconds from the shutdown order until SIGTERM, and until SIGKILL. `leave_s`: before those, how long an agent that
    was told to end lets the master move its processes elsewhere."""

    terminate_s: float = 3.0
    kill_s: float = 5.0
    leave_s: float = 0.0


class ChildListener(Protocol):
    """Who hears a child. Called on the loop's thread; must not block."""

    def reported(self, report: ProcessReport) -> None: ...

    def wrote(self, stream: str, text: str) -> None: ...


@dataclass(frozen=True, kw_only=True)
class Ended:
    """How a child ended: `returncode` is the exit code, or minus the signal."""

    returncode: int
    expected: bool
    last_words: tuple[str, ...]


class Child:
    """A running process in a session of its own. Belongs to the loop it was started on."""

    def __init__(self, process: subprocess.Popen[bytes], control: socket.socket, listener: ChildListener) -> None:
        self._process = process
        self._control = control
        self._listener = listener
        self._loop = asyncio.get_running_loop()
        self._exited = asyncio.Event()
        self._reaped = False
        self._expected = False
        self._last_words: deque[str] = deque(maxlen=_NUM_LAST_WORDS)
        self._wake = asyncio.Event()
        self._start: ProcessSpec | None = None
        self._plan: Plan | None = None
        self._settled: list[str] = []
        self._shutdown = False
        self._pumps: list[asyncio.Task[None]] = []

    @classmethod
    def start(
        cls,
        spec: ProcessSpec,
        command: Sequence[str],
        directory: Path,
        environment: Mapping[str, str],
        listener: ChildListener,
    ) -> Child:
        """Start `command` in `directory` with `environment` and hand it `spec`. Blocks for milliseconds.

        Raises OSError when the process cannot be started. The caller must await `wait` afterwards.
        """
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
        child = cls(process, ours, listener)
        child._start = spec
        child._wake.set()
        child._begin()
        return child

    @property
    def pid(self) -> int:
        return self._process.pid

    def forward(self, plan: Plan) -> None:
        """Hand over a newer plan; never blocks. Only the newest of those not yet sent is sent."""
        self._plan = plan
        self._wake.set()

    def settle(self, path: str) -> None:
        """Tell a partition that nothing is under way for a part any more; never blocks."""
        self._settled.append(path)
        self._wake.set()

    async def wait(self) -> Ended:
        """Wait until the process is gone and everything it said was heard. Call once.

        Whatever it left in its process group is killed first.
        """
        await self._exited.wait()
        # The leader is still a zombie: its group's number cannot belong to anyone else yet.
        self._signal(signal.SIGKILL)
        self._reaped = True
        returncode = self._process.wait()
        await asyncio.wait(self._pumps, timeout=_DRAIN_S)
        await self._close()
        return Ended(returncode=returncode, expected=self._expected, last_words=tuple(self._last_words))

    async def end(self, patience: Patience) -> None:
        """Order it to shut down, then SIGTERM, then SIGKILL to its whole group; returns when it is gone."""
        self._expected = True
        self._shutdown = True
        self._wake.set()
        if await self._gone_within(patience.terminate_s):
            return
        self._signal(signal.SIGTERM)
        if await self._gone_within(patience.kill_s - patience.terminate_s):
            return
        self._signal(signal.SIGKILL)
        await self._exited.wait()

    async def _gone_within(self, seconds: float) -> bool:
        try:
            await asyncio.wait_for(self._exited.wait(), seconds)
        except TimeoutError:
            return False
        return True

    def _signal(self, number: signal.Signals) -> None:
        if not self._reaped:
            try:
                os.killpg(self._process.pid, number)
            except (ProcessLookupError, PermissionError) as error:
                _log.debug("no group to signal", pid=self.pid, signal=number.name, error=str(error))

    def _begin(self) -> None:
        threading.Thread(target=self._await_exit, name=f"exit-{self.pid}", daemon=True).start()
        for name, pipe in (("stdout", self._process.stdout), ("stderr", self._process.stderr)):
            self._pump(self._read_output(name, pipe))
        self._pump(self._read_reports())
        self._pump(self._write_orders(), awaited=False)

    def _pump(self, work: Coroutine[Any, Any, None], awaited: bool = True) -> None:
        task = asyncio.create_task(work)
        if awaited:
            self._pumps.append(task)
        else:
            self._writer = task

    def _await_exit(self) -> None:
        """On a thread of its own: see the exit without reaping, so that the number stays taken."""
        os.waitid(os.P_PID, self._process.pid, os.WEXITED | os.WNOWAIT)
        try:
            self._loop.call_soon_threadsafe(self._exited.set)
        except RuntimeError:
            _log.debug("the loop ended before its child", pid=self.pid)

    async def _read_output(self, name: str, pipe: Any) -> None:
        cutter = LineCutter()
        reader = asyncio.StreamReader(limit=_READ_BYTES)
        transport, _ = await self._loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), pipe)
        try:
            while data := await reader.read(_READ_BYTES):
                self._heard(name, cutter.feed(data))
        finally:
            self._heard(name, cutter.flush())
            transport.close()

    def _heard(self, name: str, lines: list[str]) -> None:
        for line in lines:
            if name == "stderr":
                self._last_words.append(line)
            self._listener.wrote(name, line)

    async def _read_reports(self) -> None:
        splitter = link.Splitter()
        try:
            while data := await self._loop.sock_recv(self._control, _READ_BYTES):
                for message in splitter.feed(data):
                    self._listener.reported(ProcessReport.FromString(message))
        except ConnectionError:
            return
        except (FrameError, DecodeError) as error:
            _log.error("a process speaks nonsense and is ended", pid=self.pid, error=str(error))
            self._signal(signal.SIGKILL)

    async def _write_orders(self) -> None:
        try:
            while True:
                await self._wake.wait()
                self._wake.clear()
                for order in self._take_orders():
                    await self._loop.sock_sendall(self._control, link.encode(order.SerializeToString()))
        except ConnectionError:
            return

    def _take_orders(self) -> list[ProcessOrder]:
        orders = []
        if self._start is not None:
            orders.append(ProcessOrder(start=self._start))
        if self._plan is not None:
            orders.append(ProcessOrder(plan=self._plan))
        orders += [ProcessOrder(settled=PartSettled(path=path)) for path in self._settled]
        if self._shutdown:
            orders.append(ProcessOrder(shutdown=Shutdown()))
        self._start, self._plan, self._settled, self._shutdown = None, None, [], False
        return orders

    async def _close(self) -> None:
        tasks = [*self._pumps, self._writer]
        for task in tasks:
            task.cancel()
        for outcome in await asyncio.gather(*tasks, return_exceptions=True):
            if isinstance(outcome, Exception):
                _log.error("reading from a process failed", pid=self.pid, exc_info=outcome)
        self._control.close()
