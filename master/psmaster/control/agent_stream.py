"""The open stream of one agent, as the loop writes to it: the newest assignment, the newest acknowledgement, which
also answers heartbeats, and orders to measure. `psmaster.api` converts them to protobuf."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator, Mapping
from dataclasses import dataclass, field

from pscluster.security.credentials import Credentials
from psmaster.control.security import ClusterSecurity
from psmaster.model.probe import ProbeOrder
from psmaster.model.state import State
from psmaster.scheduling.reconcile import Desired, desired


@dataclass(frozen=True, kw_only=True)
class Assignment:
    """All that one node is to run. `depots`: (node, address) of those with copies; `deleted`: jobs whose may go;
    `revoked`: serials of certificates that its depot must refuse; `credentials`: of its processes, by process id;
    `cluster_id`, `data_security`: the same for all of them."""

    revision: int
    processes: tuple[Desired, ...]
    depots: tuple[tuple[str, str], ...] = ()
    deleted: tuple[str, ...] = ()
    revoked: tuple[str, ...] = ()
    cluster_id: str = ""
    data_security: str = ""
    credentials: Mapping[str, Credentials] = field(default_factory=dict, repr=False)

    def names(self) -> tuple[object, ...]:
        """What an agent acts on; an assignment with equal names need not be sent."""
        issued = {process_id: credentials.serial for process_id, credentials in self.credentials.items()}
        processes = ((own.process_id, own.plan, issued.get(own.process_id)) for own in self.processes)
        return self.depots, self.deleted, self.revoked, *processes


def assignment_of(
    state: State, node_id: str, all_deleted: tuple[str, ...], security: ClusterSecurity, now_s: float
) -> Assignment:
    """A node's assignment, still without a revision. Its processes get their credentials here."""
    wanted = tuple(
        process for job in state.jobs.values() for process in desired(job) if process.placement.node_id == node_id
    )
    has_depot = bool(state.nodes[node_id].depot_address)
    nodes = state.nodes.values() if has_depot else ()
    issued = {own.process_id: security.process_credentials(own.process_id, now_s) for own in wanted}
    return Assignment(
        revision=0,
        processes=wanted,
        depots=tuple(sorted((other.node_id, other.depot_address) for other in nodes if other.depot_address)),
        deleted=all_deleted if has_depot else (),
        revoked=state.access.revoked_serials if has_depot else (),
        cluster_id=security.cluster_id,
        data_security=security.data_security if security.secured else "",
        credentials={process_id: held for process_id, held in issued.items() if held is not None},
    )


@dataclass(frozen=True, kw_only=True)
class Acknowledgement:
    """Everything up to `sequence` is durable."""

    sequence: int


StreamMessage = Assignment | Acknowledgement | ProbeOrder


class AgentStream:
    """Belongs to the master's loop. Pending messages are bounded: newer ones replace older ones, and who orders to
    measure waits for the answer. No method blocks."""

    def __init__(self, node_id: str, incarnation: str) -> None:
        self.node_id = node_id
        self.incarnation = incarnation
        self.assigned: tuple[object, ...] | None = None  # `names` of the newest assignment
        self.closed = False
        self._assignment: Assignment | None = None
        self._sequence = 0
        self._acknowledged = 0
        self._beat_received = False
        self._probes: list[ProbeOrder] = []
        self._changed = asyncio.Event()

    def assign(self, assignment: Assignment) -> None:
        self.assigned = assignment.names()
        self._assignment = assignment
        self._changed.set()

    def acknowledge(self, sequence: int) -> None:
        """Send that everything up to `sequence` is durable."""
        self._sequence = max(self._sequence, sequence)
        self._changed.set()

    def answer_beat(self) -> None:
        """Answer a heartbeat, so that the agent notices a network that only carries its own messages."""
        self._beat_received = True
        self._changed.set()

    def probe(self, order: ProbeOrder) -> None:
        """Have the node measure something. It is lost with the stream."""
        self._probes.append(order)
        self._changed.set()

    def close(self) -> None:
        """End the stream. Safe to repeat."""
        self.closed = True
        self._changed.set()

    def pending(self) -> Iterator[StreamMessage]:
        """Take what is to be sent now."""
        if self._assignment is not None:
            assignment, self._assignment = self._assignment, None
            yield assignment
        if self._sequence > self._acknowledged or self._beat_received:
            self._acknowledged, self._beat_received = self._sequence, False
            yield Acknowledgement(sequence=self._acknowledged)
        probes, self._probes = self._probes, []
        yield from probes

    async def messages(self) -> AsyncIterator[StreamMessage]:
        """What to send, until the stream is closed."""
        while True:
            await self._changed.wait()
            self._changed.clear()
            if self.closed:
                return
            for message in self.pending():
                yield message
