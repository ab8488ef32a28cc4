"""The master: the real `ControlLoop`, `AgentsService`, `Transaction` and stores, driven without an event loop, on a
disk that takes time and may be lost in the middle of a write."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from pscluster.errors import PsError, StorageError
from pscluster.rpc.access import CALLER, LOCAL
from pscluster.v1.agents_pb2 import AgentMessage, RegisterRequest
from psmaster.api import proto
from psmaster.api.agents import AgentsService
from psmaster.control.agent_stream import AgentStream, Assignment
from psmaster.control.loop import RETRY_S
from psmaster.control.transaction import Transaction
from psmaster.model.job import Instant
from psmaster.scheduling.draft import Limits
from tests.fault.simulation.network import End
from tests.fault.simulation.schedule import SOON_S, Life
from tests.harness.driven_loop import Awaited, DrivenLoop, drive

LIMITS = Limits(trainer_grace_s=8.0, gather_s=2.0, finish_grace_s=10.0, stop_grace_s=15.0, stop_idle_grace_s=5.0)
_TICK_S = 0.5  # half as often as the product's: most of what happens, happens when it is told of something


class SimulatedLoop(DrivenLoop):
    """The product's loop, whose disk work takes virtual time."""

    master: Master

    def write(self, work: Callable[[], Any]) -> Awaited:
        return self.master.write(work)

    def wake(self) -> None:
        self.master.wake()


class Master:
    """One life of the master."""

    def __init__(self, sim: Any) -> None:
        self.sim = sim
        self.host = "master"
        self.life = Life(sim.schedule, "master")
        self.core = SimulatedLoop(sim.disk.archive(), LIMITS, self.now)
        self.core.master = self
        self.service = AgentsService(self.core, None)  # type: ignore[arg-type]
        CALLER.set(LOCAL)
        self._streams: dict[AgentStream, End] = {}
        self._is_busy = False  # a transaction is on its way to the disk
        self._is_awake = False  # one is due
        self._loading = True
        self.life.at_end += [self._crash, sim.master_ended]
        drive(self.core.load(), self._loaded)

    def now(self) -> Instant:
        schedule = self.sim.schedule
        return Instant(mono_s=schedule.now_s, unix_s=schedule.wall_s)

    def _loaded(self, _nothing: Any) -> None:
        self._loading = False
        self.sim.monitor.master_loaded(self.core)
        self.sim.network.listen("master", self.life, self.host, self._accepted)
        self.sim.schedule.tell("master: has loaded its state")
        self._tick()

    # transactions

    def wake(self) -> None:
        """Commit a transaction soon."""
        if not self._is_awake and not self._loading:
            self._is_awake = True
            self.life.after(SOON_S, "", self._commit_next)

    def _tick(self) -> None:
        self.wake()
        self.life.after(_TICK_S, "", self._tick)

    def _commit_next(self) -> None:
        self._is_awake = False
        if not self._is_busy:
            self._is_busy = True
            self.core.commit(self._committed)

    def _committed(self, durable: bool) -> None:
        self.sim.monitor.master_committed(self.core)
        for stream, end in list(self._streams.items()):
            self._flush(stream, end)
        if durable:
            self._rested()
        else:
            self.life.after(RETRY_S, "", self._rested)

    def _rested(self) -> None:
        self._is_busy = False
        if self.core.has_inputs():
            self.wake()

    def write(self, work: Callable[[], Any]) -> Awaited:
        """Have work done on the disk, in a moment; lost, or half done, when the master ends before."""
        awaited = Awaited()
        disk = self.sim.disk

        def do() -> None:
            disk.master_writes = None
            try:
                result = work()
            except StorageError as error:
                awaited.set_exception(error)
            else:
                awaited.set_result(result)

        if self._loading:
            do()
        else:
            disk.master_writes = work
            latency_s = disk.master_latency_s()
            self.life.after(latency_s, "its disk has done it", do)
            if disk.kills_next_write:
                disk.kills_next_write = False
                self.life.after(latency_s / 2, "is killed while it writes", self.life.end)
        return awaited

    def _crash(self) -> None:
        self.sim.disk.master_crashes()

    # agents

    def _accepted(self, end: End) -> None:
        end.receive = lambda message: self._hear(end, message)

    def _hear(self, end: End, message: Any) -> None:
        if isinstance(message, RegisterRequest):
            drive(self.service.Register(message, None), end.send, end.send)
        elif message.HasField("hello"):
            self._open_stream(end, message)
        else:
            raise AssertionError(f"a stream begins with {message.WhichOneof('body')}")

    def _open_stream(self, end: End, message: AgentMessage) -> None:
        """AgentsService.Attend, without its tasks."""
        hello = message.hello
        processes = proto.processes(hello.node_id, hello.processes)
        waiting: list[AgentMessage] = []
        end.receive = waiting.append  # until the hello was taken in

        def opened(stream: AgentStream) -> None:
            if not end.is_open:
                self.core.close_stream(stream)
                return
            self._streams[stream] = end
            end.receive = lambda received: self._take(stream, end, received)
            end.lost = lambda: self._leave(stream)
            for received in waiting:
                self._take(stream, end, received)
            self._flush(stream, end)

        drive(self.core.open_stream(hello.node_id, hello.incarnation, processes), opened, end.send)

    def _take(self, stream: AgentStream, end: End, message: AgentMessage) -> None:
        if stream.closed:
            end.close()
            return
        assert self.core._accepts.is_set(), "the master is drowned in messages"
        drive(self.service._submit(stream, message), lambda _: self.wake())

    def _leave(self, stream: AgentStream) -> None:
        self._streams.pop(stream, None)
        self.core.close_stream(stream)
        self.wake()

    def _flush(self, stream: AgentStream, end: End) -> None:
        """AgentStream.messages, as far as it goes without waiting."""
        if stream.closed:
            self._streams.pop(stream, None)
            end.close()
            self.core.close_stream(stream)
            return
        for message in stream.pending():
            names = ", ".join(process.process_id for process in getattr(message, "processes", ()))
            what = f"that it is to run {names or 'nothing'}" if isinstance(message, Assignment) else ""
            end.send(proto.master_message(message), what)

    # people

    def ask(
        self, apply: Callable[[Transaction], Any], done: Callable[[Any], None], failed: Callable[[PsError], None]
    ) -> None:
        """A person asks something; the answer comes once it is durable."""
        drive(self.core.ask(apply), done, failed)
