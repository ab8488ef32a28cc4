"""Greetings: who may talk to a partition, and the memory that it shares with callers on its host."""

from __future__ import annotations

import hmac
import json
from collections.abc import Mapping
from typing import Protocol

from pscluster.errors import AuthError, FrameError
from pscluster.job.spec import JobSpec
from pscluster.v1.plan_pb2 import Plan
from pscluster.wire.frame import FrameKind, Header
from pscluster.wire.memory import Lanes
from psserver.partition.coordinator.transport import CoordinatorTransport
from psserver.partition.ingress.clients import Client, Clients
from psserver.partition.replication.standby import Standby
from psserver.partition.step.state import PartitionState
from psserver.partition.telemetry import PartitionCounters

MIN_CREDIT_BYTES = 64 << 20
MAX_LANES = 8  # nodes of one bucket that a trainer may leave in shared memory at a time
CHANNELS = ("push", "pull", "vote", "replica")


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


def greet(host: Host, client: Client, header: Header, told: Mapping[str, object]) -> None:
    """A HELLO: check it, and welcome the caller. A caller of another timeline is sent away and comes again."""
    plan, state = host.plan, host.state
    if plan is None or state is None:
        client.connection.close()  # no plan yet; the caller dials again
        return
    if not hmac.compare_digest(str(told.get("token", "")).encode(errors="replace"), plan.data_token.hex().encode()):
        raise AuthError("a data connection without the job's token")
    timeline = told.get("restore_generation")
    if not isinstance(timeline, int):
        raise FrameError("a greeting without a restore_generation", details={"field": "body"})
    if timeline != plan.restore_generation:
        if timeline < plan.restore_generation:
            reject_stale(host, client)
        client.connection.close()
        return
    channel = str(told.get("channel", ""))
    if channel not in CHANNELS:
        raise FrameError(f"a connection for {channel!r}", details={"field": "channel"})
    if not _is_of_the_plan(host, client, plan, header, channel, told.get("attempt")):
        client.connection.close()
        return
    client.channel, client.index = channel, header.sender
    client.connection.context = channel  # greeted: the reactor's deadline is met
    if host.standby is not None:
        client.connection.send(host.header(kind=FrameKind.WELCOME), [json.dumps(host.standby.welcome()).encode()])
    else:
        _welcome(host, client, state, told)


def _is_of_the_plan(host: Host, client: Client, plan: Plan, header: Header, channel: str, attempt: object) -> bool:
    """Whether the caller is who the plan says, and this is who it takes it for.

    A standby hears its partition alone, and a partition hears nobody who stood before it: the one whose place it took,
    stopped and woken up, is sent away. Who has a newer plan than this comes again."""
    if channel in ("push", "pull"):
        return host.standby is None
    if channel == "replica" and header.sender != host.index:
        raise FrameError(f"the state of partition {header.sender}", details={"field": "sender"})
    if header.sender >= len(plan.partitions):
        raise FrameError(f"partition {header.sender} of {len(plan.partitions)}", details={"field": "sender"})
    known = plan.partitions[header.sender].attempt
    if known and attempt != known:
        if isinstance(attempt, int) and attempt < known:
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
    assert host.plan is not None
    body = json.dumps({"generation": host.plan.generation}).encode()
    client.connection.send(host.header(kind=FrameKind.FENCED), [body])
    host.counters.fenced += 1


def _welcome(host: Host, client: Client, state: PartitionState, told: Mapping[str, object]) -> None:
    client.granted_bytes = client.told_bytes = max(MIN_CREDIT_BYTES, 2 * host.clients.largest_bytes)
    fds = _share_memory(host, client, state, told.get("num_lanes")) if told.get("share") is True else []
    welcome = {
        "granted_bytes": client.granted_bytes,
        "open_bucket": host.open_bucket,
        "needs_values": not state.is_filled,
        "num_lanes": client.lanes.num_lanes if client.lanes else 0,
    }
    client.connection.send(host.header(kind=FrameKind.WELCOME), [json.dumps(welcome).encode()], fds=fds)
    if client.channel == "pull" and host.coordinator_transport is not None:
        host.coordinator_transport.welcome(client)


def _share_memory(host: Host, client: Client, state: PartitionState, num_lanes: object) -> list[int]:
    """Agree to share memory with a caller on this host; what it is to map."""
    network = host.spec.network
    if not client.connection.is_local or network.transport not in ("auto", "shm"):
        return []
    if client.channel == "pull":
        client.reads_memory = True
        return [state.segment.fd]
    if not isinstance(num_lanes, int) or not 1 <= num_lanes <= MAX_LANES:
        raise FrameError(f"a greeting that asks for {num_lanes} lanes", details={"field": "body"})
    client.lanes = Lanes.create(state.layout.gradient_bytes(state.spans, network.push_codec), num_lanes)
    return [client.lanes.fd]
