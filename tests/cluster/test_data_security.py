"""A job whose TCP data connections are secured, as several hosts have them: the same bits, and nobody else gets in."""

from __future__ import annotations

import json
import socket
import ssl
from pathlib import Path

import pytest

from harness.certificates import CLUSTER, authority, credentials, trusting
from harness.jobs import even_split, lm_spec
from harness.plain import train_plainly
from harness.static_job import JOB, TOKEN, StaticJob
from pscluster.security.credentials import Credentials
from pscluster.security.identity import Role
from pscluster.security.tls import client_context
from pscluster.wire.frame import HEADER_BYTES, FrameKind, Header, checksum, job_number, pack, unpack
from pscluster.wire.protocol import Hello

DEADLINE_S = 20.0


@pytest.fixture(scope="module")
def digest() -> str:
    return train_plainly(lm_spec()).digest


@pytest.mark.parametrize("data_security", ["tls", "plain"])
def test_a_secured_job_has_the_bits_of_any_other(data_security: str, digest: str, tmp_path: Path) -> None:
    """With new certificates in the middle, and a trainer that is replaced by one that connects with them."""
    with StaticJob(lm_spec(partitions=2, transport="tcp"), 2, tmp_path, data_security=data_security) as job:
        job.wait_ready()
        job.publish(even_split(7, 2))
        job.wait_step(1)
        job.renew_credentials()
        job.kill("trainer-1")
        job.start("trainer", 1)
        job.wait_ready()
        job.publish(even_split(7, 2))
        assert job.wait_finished() == digest
        assert rejected(job) == {}


STRANGERS = {
    "no certificate": None,
    "another attempt": credentials(f"{JOB}/trainer-0/2"),
    "another job": credentials("job-other1/trainer-0/1"),
    "a node": credentials("node-a", Role.WORKER),
    "another authority": credentials(f"{JOB}/trainer-0/1", key=1),
    "another cluster": credentials(f"{JOB}/trainer-0/1", cluster_id="0123456789abcdef", of=authority()),
}


def test_a_partition_refuses_and_counts_everybody_else(tmp_path: Path) -> None:
    """Each of them knows the job's token and what to say."""
    with StaticJob(lm_spec(transport="tcp"), 1, tmp_path, data_security="tls") as job:
        job.wait_ready()
        job.publish([[(0, 3)]])
        job.wait(lambda: bool(job.reported("trainer-0", "connected")), "the trainer's connections")
        address = job.reported("partition-0", "partition_ready")[-1].addresses[0]
        assert greet(address, credentials(f"{JOB}/trainer-0/1")) is FrameKind.WELCOME
        for who, held in STRANGERS.items():
            assert greet(address, held) is None, who
        job.wait(lambda: sum(rejected(job).values()) >= len(STRANGERS), f"{len(STRANGERS)} rejected callers")
        assert rejected(job) == {"PS-1005": len(STRANGERS)}
        job.publish(even_split(7, 1))
        job.wait_finished()


def rejected(job: StaticJob) -> dict[str, float]:
    """The refused connections that the partition reports, by code."""
    name = "refused_connections_total"
    counters = job.children["partition-0"].counters
    return {json.loads(key.removeprefix(name))["code"]: n for key, n in counters.items() if key.startswith(name)}


def greet(address: str, held: Credentials | None) -> FrameKind | None:
    """Say HELLO as attempt 1 of trainer 0; the answer's kind, None: the connection ended instead."""
    hello = Hello(
        token=TOKEN.hex(), role="trainer", channel="push", attempt=1, restore_generation=1, cluster=CLUSTER
    ).pack()
    header = Header(kind=FrameKind.HELLO, job=job_number(JOB), length=len(hello), checksum=checksum([hello]))
    host, _, port = address.removeprefix("tcp:").rpartition(":")
    if held is None:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    else:
        context = client_context(trusting(held, credentials(f"{JOB}/trainer-0/1")))
    try:
        with context.wrap_socket(socket.create_connection((host, int(port)), DEADLINE_S)) as tls:
            tls.sendall(pack(header) + hello)
            answer = tls.recv(HEADER_BYTES)
    except (ssl.SSLError, ConnectionError):
        return None
    return unpack(answer).kind if answer else None
