"""Greetings: who may talk to a partition, and the memory that it shares with callers on its host."""

from __future__ import annotations

import hmac
from typing import Protocol

from pscluster.errors import AuthError, FrameError
from pscluster.job.spec import JobSpec
from pscluster.v1.plan_pb2 import Plan
from pscluster.wire.frame import FrameKind, Header
from pscluster.wire.memory import Lanes
from pscluster.wire.protocol import Hello, Welcome
from psserver.partition.coordinator.transport import CoordinatorTransport
from psserver.partition.ingress.clients import Client, Clients
from psserver.partition.replication.standby import Standby
from psserver.partition.step.state import PartitionState
from psserver.partition.telemetry import PartitionCounters

MIN_CREDIT_BYTES = 64 << 20
MAX_LANES = 8  # nodes of one bucket that a trainer may leave in shared memory at a time


class Host(Protocol):
    """The partition that is greeted. Everything on its thread."""

    index: int
    spec: JobSpec
    plan: Plan | None
    state: PartitionState | None
    clients: Clients
    counters: PartitionCounters
    coordinator_transport: CoordinatorTransport | None
    standby: Standby | None

    @property
    def open_bucket(self) -> int:
        """The bucket of gradients that is waited for first; -1: none."""

    def header(self, **fields: object) -> Header:
        """A header of this job, generation and sender."""


def greet(host: Host, client: Client, header: Header, hello: Hello) -> None:
    """A HELLO: check it, and welcome the caller. A caller of another timeline is sent away and comes again."""
    plan, state = host.plan, host.state
    if plan is None or state is None:
        client.connection.close()  # no plan yet; the caller dials again
        return
    if not hmac.compare_digest(hello.token.encode(errors="replace"), plan.data_token.hex().encode()):
        raise AuthError("a data connection without the job's token")
    if hello.restore_generation != plan.restore_generation:
        if hello.restore_generation < plan.restore_generation:
            reject_stale(host, client)
        client.connection.close()
        return
    if not _is_of_the_plan(host, client, plan, header, hello):
        client.connection.close()
        return
    client.channel, client.index = hello.channel, header.sender
    client.connection.context = hello.channel  # greeted: the reactor's deadline is met
    if host.standby is not None:
        client.connection.send(host.header(kind=FrameKind.WELCOME), [host.standby.welcome().pack()])
    else:
        _welcome(host, client, state, hello)


def _is_of_the_plan(host: Host, client: Client, plan: Plan, header: Header, hello: Hello) -> bool:
    """Whether the caller is who the plan says, and this is who it takes it for.

    A standby hears its partition alone, and a partition hears nobody who stood before it: the one whose place it took,
    stopped and woken up, is sent away. Who has a newer plan than this comes again."""
    channel = hello.channel
    if channel in ("push", "pull"):
        return host.standby is None
    if channel == "replica" and header.sender != host.index:
        raise FrameError(f"the state of partition {header.sender}", details={"field": "sender"})
    if header.sender >= len(plan.partitions):
        raise FrameError(f"partition {header.sender} of {len(plan.partitions)}", details={"field": "sender"})
    known = plan.partitions[header.sender].attempt
    if known and hello.attempt != known:
        if hello.attempt < known:
            reject_stale(host, client)
        return False
    if (channel == "replica") != (host.standby is not None):
        return False
    for other in host.clients.on(channel):
        if other.index == header.sender and channel == "replica":
            other.connection.close()  # it has dialled again
    return True


def reject_stale(host: Host, client: Client) -> None:
    """Tell a caller that its generation is out of date."""
    client.connection.send(host.header(kind=FrameKind.FENCED))
    host.counters.fenced += 1


def _welcome(host: Host, client: Client, state: PartitionState, hello: Hello) -> None:
    client.granted_bytes = client.told_bytes = max(MIN_CREDIT_BYTES, 2 * host.clients.largest_bytes)
    fds = _share_memory(host, client, state, hello.num_lanes) if hello.share else []
    welcome = Welcome(
        granted_bytes=client.granted_bytes,
        open_bucket=host.open_bucket,
        needs_values=not state.is_filled,
        num_lanes=client.lanes.num_lanes if client.lanes else 0,
    )
    client.connection.send(host.header(kind=FrameKind.WELCOME), [welcome.pack()], fds=fds)
    if client.channel == "pull" and host.coordinator_transport is not None:
        host.coordinator_transport.welcome(client)


def _share_memory(host: Host, client: Client, state: PartitionState, num_lanes: int) -> list[int]:
    """Agree to share memory with a caller on this host; what it is to map."""
    network = host.spec.network
    if not client.connection.is_local or network.transport not in ("auto", "shm"):
        return []
    if client.channel == "pull":
        client.reads_memory = True
        return [state.segment.fd]
    if not 1 <= num_lanes <= MAX_LANES:
        raise FrameError(f"a greeting that asks for {num_lanes} lanes", details={"field": "body"})
    client.lanes = Lanes.create(state.layout.gradient_bytes(state.spans, network.push_codec), num_lanes)
    return [client.lanes.fd]
