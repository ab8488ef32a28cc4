"""The handshake: who may connect to a partition, and the memory that it shares with callers on its host."""

from __future__ import annotations

import hmac

from pscluster.errors import AuthError, FrameError
from pscluster.v1.plan_pb2 import Plan
from pscluster.wire.frame import FrameKind, Header
from pscluster.wire.memory import Lanes
from pscluster.wire.protocol import Hello, Welcome, process_id
from psserver.partition.actions import Action
from psserver.partition.ingress.clients import Client
from psserver.partition.partition import Partition
from psserver.partition.step.state import PartitionState

MIN_CREDIT_BYTES = 64 << 20
MAX_LANES = 8  # nodes of one bucket that a trainer may leave in shared memory at a time


def shake_hands(partition: Partition, client: Client, header: Header, hello: Hello) -> list[Action]:
    """A HELLO: check it, and welcome the caller. The connection of a caller with another plan is closed; it redials."""
    plan, state = partition.plan, partition.state
    if plan is None or state is None:
        client.connection.close()  # no plan yet
        return []
    if hello.cluster != partition.cluster_id:
        raise AuthError(f"a data connection of the cluster {hello.cluster!r}", details={"field": "cluster"})
    if not hmac.compare_digest(hello.token.encode(errors="replace"), plan.data_token.hex().encode()):
        raise AuthError("a data connection without the job's token")
    _check_certificate(partition, client, header, hello)
    if hello.restore_generation != plan.restore_generation:
        if hello.restore_generation < plan.restore_generation:
            reject_stale(partition, client)
        client.connection.close()
        return []
    if not _fits_plan(partition, client, plan, header, hello):
        client.connection.close()
        return []
    client.channel, client.index = hello.channel, header.sender
    client.connection.context = hello.channel  # the reactor's deadline for the handshake is met
    if partition.standby is not None:
        client.connection.send(partition.header(kind=FrameKind.WELCOME), [partition.standby.welcome().pack()])
        return []
    return _welcome(partition, client, state, hello)


def _fits_plan(partition: Partition, client: Client, plan: Plan, header: Header, hello: Hello) -> bool:
    """Whether the caller is the process that the plan names, and this process the one that the caller wants. A standby
    accepts its primary alone, a partition rejects every process that the plan replaced, such as a primary that was
    stopped and resumed. A caller with a newer plan dials again."""
    channel = hello.channel
    if channel in ("push", "pull"):
        return partition.standby is None and _is_planned_trainer(partition, client, plan, header, hello)
    if channel == "replica" and header.sender != partition.index:
        raise FrameError(
            f"partition {header.sender} replicates to the standby of another partition", details={"field": "sender"}
        )
    if header.sender >= len(plan.partitions):
        raise FrameError(f"partition {header.sender} of {len(plan.partitions)}", details={"field": "sender"})
    known = plan.partitions[header.sender].attempt
    if known and hello.attempt != known:
        if hello.attempt < known:
            reject_stale(partition, client)
        return False
    if (channel == "replica") != (partition.standby is not None):
        return False
    for other in partition.clients.on(channel):
        if other.index == header.sender and channel == "replica":
            other.connection.close()  # it has reconnected
    return True


def _is_planned_trainer(partition: Partition, client: Client, plan: Plan, header: Header, hello: Hello) -> bool:
    """Whether the plan names this very process, where a certificate shows which one it is. One that the plan replaced
    is rejected; one that is newer than this partition's plan dials again."""
    if client.connection.identity is None:
        return True
    known = next((trainer.attempt for trainer in plan.trainers if trainer.rank == header.sender), 0)
    if hello.attempt < known:
        reject_stale(partition, client)
    return hello.attempt == known


def _check_certificate(partition: Partition, client: Client, header: Header, hello: Hello) -> None:
    """Over TLS a caller is what its certificate says, and nothing else."""
    identity = client.connection.identity
    if identity is None:
        return
    role = "trainer" if hello.channel in ("push", "pull") else "partition"
    claimed = process_id(partition.job_id, role, header.sender, hello.attempt)
    if hello.role != role or identity.name != claimed:
        raise AuthError(
            f"a {hello.channel} connection in the name of {claimed} with the certificate of {identity.name}",
            details={"field": "identity"},
        )


def reject_stale(partition: Partition, client: Client) -> None:
    """Send a caller that its generation is out of date."""
    client.connection.send(partition.header(kind=FrameKind.FENCED))
    partition.counters.fenced += 1


def _welcome(partition: Partition, client: Client, state: PartitionState, hello: Hello) -> list[Action]:
    client.granted_bytes = client.announced_bytes = max(MIN_CREDIT_BYTES, 2 * partition.clients.largest_bytes)
    fds = _share_memory(partition, client, state, hello.num_lanes) if hello.share else []
    welcome = Welcome(
        granted_bytes=client.granted_bytes,
        open_bucket=partition.open_bucket,
        needs_values=not state.is_filled,
        num_lanes=client.lanes.num_lanes if client.lanes else 0,
    )
    client.connection.send(partition.header(kind=FrameKind.WELCOME), [welcome.pack()], fds=fds)
    coordinator = partition.coordinator
    if client.channel != "pull" or coordinator is None or not coordinator.is_open:
        return []
    partition.clients.broadcast([client], FrameKind.DIRECTIVE, coordinator.version, coordinator.directive.pack())
    return [*coordinator.send_merged(), *coordinator.audits.requests()]


def _share_memory(partition: Partition, client: Client, state: PartitionState, num_lanes: int) -> list[int]:
    """Agree to share memory with a caller on this host; what it is to map."""
    network = partition.spec.network
    if not client.connection.is_local or network.transport not in ("auto", "shm"):
        return []
    if client.channel == "pull":
        client.reads_memory = True
        return [state.segment.fd]
    if not 1 <= num_lanes <= MAX_LANES:
        raise FrameError(f"a HELLO that asks for {num_lanes} lanes", details={"field": "body"})
    client.lanes = Lanes.create(state.layout.gradient_bytes(state.spans, network.push_codec), num_lanes)
    return [client.lanes.fd]
