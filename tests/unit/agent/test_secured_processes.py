"""Certificates and addresses of a node's processes: what they are sent, where they listen, and when they are lost."""

from __future__ import annotations

import hashlib
import ipaddress
import time
from dataclasses import replace
from typing import Any

import pytest
from structlog.testing import capture_logs

from harness.supervised import LOCAL, Received, supervise
from pscluster.agent.addresses import Interface, NodeAddress, PortRange
from pscluster.agent.context import NodeNetwork
from pscluster.agent.supervisor import Supervisor
from pscluster.errors import AuthError
from pscluster.rpc.access import Caller
from pscluster.security.identity import Role
from pscluster.v1.agents_pb2 import Assignment, ProcessStatus
from pscluster.v1.plan_pb2 import Credentials, ProcessSpec

pytestmark = pytest.mark.timeout(60)


def partition(bench: Any, certificate: bytes = b"") -> ProcessSpec:
    spec: ProcessSpec = bench.trainer("partition-0", "listening")
    spec.kind = ProcessSpec.KIND_PARTITION
    if certificate:
        spec.credentials.CopyFrom(Credentials(key_pem=b"SECRET-KEY", certificate_pem=certificate))
    return spec


def ready(received: Received) -> list[str]:
    events = [message.event.report for message in received.messages if message.HasField("event")]
    return [address for event in events for address in event.partition_ready.addresses]


def shown(received: Received) -> list[tuple[str, bool]]:
    """The digest of the credentials that a process has been sent, and whether its environment has the key."""
    events = [message.event.report.evaluated for message in received.messages if message.HasField("event")]
    return [(digest, bool(event.step)) for event in events for digest in event.metrics]


def digest_of(spec: ProcessSpec) -> str:
    return hashlib.sha256(spec.credentials.key_pem + spec.credentials.certificate_pem).hexdigest()


def test_credentials_reach_a_process_over_its_socket_alone(bench: Any, capsys: pytest.CaptureFixture[str]) -> None:
    first, second = partition(bench, b"first"), partition(bench, b"second")

    async def body(supervisor: Supervisor, received: Received) -> None:
        for spec, count in ((first, 1), (second, 2), (second, 2)):
            supervisor.apply(Assignment(processes=[spec]))
            await received.until(lambda count=count: len(shown(received)) == count)  # type: ignore[misc]
        assert shown(received) == [(digest_of(first), False), (digest_of(second), False)]
        kept = [path for path in bench.directory.rglob("*") if path.is_file() and b"SECRET-KEY" in path.read_bytes()]
        assert kept == []

    with capture_logs() as lines:
        supervise(bench, body)
    output = capsys.readouterr()
    assert "process started" in [line["event"] for line in lines]
    assert "SECRET-KEY" not in f"{lines}{output.out}{output.err}"


def test_a_partition_with_a_certificate_listens_where_its_node_is_reached(bench: Any) -> None:
    async def body(supervisor: Supervisor, received: Received) -> None:
        supervisor.apply(Assignment(processes=[partition(bench, b"one")]))
        await received.until(lambda: bool(ready(received)))
        assert ready(received) == ["127.0.0.1", "7100-7109"]

    supervise(bench, body, network=NodeNetwork(address=LOCAL.address, data_ports=PortRange(first=7100, last=7109)))


def test_a_partition_without_a_certificate_listens_on_loopback_alone(bench: Any) -> None:
    async def body(supervisor: Supervisor, received: Received) -> None:
        supervisor.apply(Assignment(processes=[partition(bench)]))
        await received.until(lambda: bool(ready(received)))
        assert ready(received) == ["", "0-0"]

    supervise(bench, body, network=NodeNetwork(address=NodeAddress(master="unix:/m", interface="eth99")))


def test_a_partition_of_a_node_without_an_address_is_not_started_and_says_why(bench: Any) -> None:
    async def body(supervisor: Supervisor, received: Received) -> None:
        supervisor.apply(Assignment(processes=[partition(bench, b"one")]))
        await received.until(lambda: "status" in received.bodies())
        status = received.messages[-1].status
        assert (status.exit_code, status.error.code) == (127, "PS-1006")
        assert "eth99" in status.error.cause

    supervise(bench, body, network=NodeNetwork(address=NodeAddress(master="unix:/m", interface="eth99")))


def test_a_partition_whose_address_is_gone_is_lost_and_others_are_not(bench: Any) -> None:
    async def body(supervisor: Supervisor, received: Received) -> None:
        supervisor.apply(Assignment(processes=[partition(bench, b"one"), bench.trainer("trainer-0", "serve")]))
        await received.until(lambda: len(ready(received)) == 2 and "trainer_ready" in received.bodies())
        process = supervisor._processes["job/partition-0/1"]
        process.spec.data_host = "10.0.0.5"
        there = Interface(name="eth0", address=ipaddress.ip_address("10.0.0.5"))
        supervisor.relocate("", [there])
        assert process.is_active
        supervisor.relocate("10.0.0.6:7100", [replace(there, address=ipaddress.ip_address("10.0.0.6"))])
        await received.until(lambda: received.messages[-1].status.phase == ProcessStatus.PHASE_EXITED)
        status = received.messages[-1].status
        assert (status.process_id, status.expected, status.error.code) == ("job/partition-0/1", False, "PS-3005")
        assert status.error.details["address"] == "10.0.0.5"
        assert [state.status.phase for state in supervisor.states()].count(ProcessStatus.PHASE_RUNNING) == 1
        assert supervisor._context.copies.address == "10.0.0.6:7100"

    supervise(bench, body)


def test_revoked_certificates_are_known_from_the_assignment(bench: Any) -> None:
    network = NodeNetwork(address=LOCAL.address)
    caller = Caller(role=Role.SERVER, name="server-1", serial="ab12", expires_s=time.time() + 60)

    async def body(supervisor: Supervisor, _received: Received) -> None:
        supervisor.apply(Assignment(revoked_serials=["ab12"]))
        with pytest.raises(AuthError, match="revoked"), network.revocations.watching(caller):
            pass
        supervisor.apply(Assignment())
        with network.revocations.watching(caller):
            pass

    supervise(bench, body, network=network)
