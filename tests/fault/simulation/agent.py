"""An agent and the processes it starts. What it decides is the product's (`reconcile`, `ReportQueue`, `classify`); what
surrounds that is modelled after the supervisor, the attendant and the process of pscluster.agent."""

from __future__ import annotations

from collections import OrderedDict
from typing import Any

from pscluster.agent.master_connection import SILENCE_S
from pscluster.agent.process import LastSent
from pscluster.agent.report_queue import ReportQueue
from pscluster.agent.supervisor import WATCH_S, reconcile
from pscluster.errors import PsError, StateError
from pscluster.rpc import DEADLINE_S, PROTOCOL
from pscluster.v1.agents_pb2 import (
    AgentMessage,
    Assignment,
    Goodbye,
    Hello,
    MasterMessage,
    NodeBeat,
    RegisterReply,
    RegisterRequest,
    Resources,
    Role,
)
from pscluster.v1.plan_pb2 import ProcessSpec
from pscluster.wire.backoff import delay_s
from tests.fault.simulation.child import Child
from tests.fault.simulation.model import SLOTS
from tests.fault.simulation.network import End
from tests.fault.simulation.schedule import SOON_S, Life

_BATCH = 100
_FLUSH_S = 5.0
_RESTART_S = (0.1, 1.5)  # how soon a supervisor starts a daemon again


class Agent:
    """One life of one node's agent. When it ends, its processes end."""

    def __init__(self, sim: Any, node_id: str) -> None:
        self.sim = sim
        self.node_id = self.host = node_id
        self.life = Life(sim.schedule, node_id)
        self.children: dict[str, Child] = {}
        self.report_queue = ReportQueue()
        self.incarnation = f"{node_id}:{sim.new_number()}"
        self._node = RegisterRequest(
            node_id=node_id,
            role=Role.ROLE_WORKER if node_id.startswith("worker") else Role.ROLE_SERVER,
            incarnation=self.incarnation,
            resources=Resources(cpu_cores=2, slots=SLOTS),
            version="simulated",
            protocol=PROTOCOL,
        )
        self._ever_ran: OrderedDict[str, None] = OrderedDict()
        self._end: End | None = None
        self._attends = False
        self._sent = 0
        self._failures = 0
        self._heard_s = 0.0
        self._leaving = False
        self.life.at_end += [self._orphan, lambda: sim.agent_ended(self)]
        self.life.after(SOON_S, "starts", self._connect)
        self._looked_s = sim.schedule.now_s
        self._watch()

    # what runs here

    def apply(self, assignment: Assignment) -> None:
        """See Supervisor.apply."""
        if self._leaving:
            return
        living = {id_: LastSent(plan=child.plan) for id_, child in self.children.items() if child.living}
        actions = reconcile(assignment.processes, living, self._ever_ran)
        for process_id in actions.stop:
            self.children[process_id].end()
        for spec in actions.start:
            self._ever_ran[spec.process_id] = None
            own = ProcessSpec()
            own.CopyFrom(spec)
            child = self.children[spec.process_id] = Child(self, own)
            self.life.after(self.sim.schedule.between(0.01, 0.1), f"starts {spec.process_id}", child.start)
        for process_id, plan in actions.forward:
            self.children[process_id].forward(plan)
        named = {spec.process_id for spec in assignment.processes}
        for process_id in [id_ for id_, child in self.children.items() if not child.living and id_ not in named]:
            del self.children[process_id]

    def _watch(self) -> None:
        """See Supervisor.watch."""
        now_s = self.sim.schedule.now_s
        if now_s - self._looked_s < 2 * WATCH_S:  # else it was itself stopped, and first reads what was said
            for child in self.children.values():
                if child.living:
                    child.look(now_s)
        self._looked_s = now_s
        self.life.after(WATCH_S, "", self._watch)

    def leave(self) -> None:
        """SIGTERM: end every process, say goodbye, end."""
        self._leaving = True
        for child in self.children.values():
            child.end()
        self.concluded()

    def concluded(self) -> None:
        """A process is gone for good."""
        if self._leaving and not any(child.living for child in self.children.values()):
            self.emit(AgentMessage(goodbye=Goodbye()))
            self.life.after(_FLUSH_S, "gives up flushing", self.life.end)

    def _orphan(self) -> None:
        """Its processes die with it, stopped ones too."""
        for child in self.children.values():
            if child.life is not None:
                child.life.end()

    # the master

    def emit(self, message: AgentMessage) -> None:
        """Keep a durable message until it is acknowledged."""
        self.report_queue.add(message)
        self.life.after(SOON_S, "", self._send)

    def _connect(self) -> None:
        self.sim.network.dial(self.life, self.host, "master", self._connected)

    def _connected(self, end: End | None) -> None:
        if end is None:
            self._lost()
            return
        self._end = end
        end.receive = self._hear
        end.lost = self._lost
        end.send(self._node, "a registration")
        self.life.after(DEADLINE_S, "", lambda: self._overdue(end))

    def _overdue(self, end: End) -> None:
        if end is self._end and not self._attends:
            end.close()
            self._lost()

    def _lost(self) -> None:
        """The session is over; another one begins after a while."""
        self._end, self._attends = None, False
        self._failures += 1
        wait_s = delay_s(self._failures, self.sim.schedule.random.random())
        self.life.after(wait_s, "dials the master", self._connect)

    def _hear(self, message: Any) -> None:
        self._heard_s = self.sim.schedule.now_s
        if isinstance(message, PsError):
            self._refused(message)
        elif isinstance(message, RegisterReply):
            self._registered(message)
        else:
            self._receive(message)

    def _refused(self, error: PsError) -> None:
        if self._end is not None:
            self._end.close()
        if isinstance(error, StateError) and not self._attends:
            self.sim.schedule.tell(f"{self.node_id} is superseded: {error.cause}")
            self.life.end()
        else:
            self._lost()

    def _registered(self, reply: RegisterReply) -> None:
        assert self._end is not None
        self._attends, self._sent, self._failures = True, 0, 0
        states = [child.state() for child in self.children.values()]
        hello = Hello(node_id=self.node_id, incarnation=self.incarnation, processes=states)
        self._end.send(AgentMessage(hello=hello), "a hello")
        self._send()
        self._beat(self._end, reply.beat_interval_s)

    def _beat(self, end: End, interval_s: float) -> None:
        if end is not self._end or not end.is_open:
            return
        if self.sim.schedule.now_s - self._heard_s > SILENCE_S:
            end.close()
            self._lost()
        else:
            children = self.children.items()
            speeds = {id_: child.speed for id_, child in children if child.living and child.speed is not None}
            end.send(AgentMessage(beat=NodeBeat(sent_s=self.sim.schedule.wall_s, speeds=speeds)))
            self.life.after(interval_s, "", lambda: self._beat(end, interval_s))

    def _send(self) -> None:
        if self._end is None or not self._attends:
            return
        while batch := self.report_queue.after(self._sent, _BATCH):
            for message in batch:
                self._end.send(message, _describe(message) if self.sim.schedule.reported is not None else "")
                self._sent = message.sequence

    def _receive(self, message: MasterMessage) -> None:
        if message.HasField("assignment"):
            self.apply(message.assignment)
        if message.HasField("ack"):
            self.report_queue.acknowledge(message.ack.sequence)
            if self._leaving and not len(self.report_queue):
                self.life.end()


def restart_after_s(sim: Any) -> float:
    """How long a daemon that ended stays away."""
    return float(sim.schedule.between(*_RESTART_S))


def _describe(message: AgentMessage) -> str:
    body = message.WhichOneof("body")
    if body == "event":
        return f"{message.event.process_id} {message.event.report.WhichOneof('body')}"
    if body == "status":
        return f"{message.status.process_id} phase {message.status.phase}"
    return str(body)
