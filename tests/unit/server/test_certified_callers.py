"""Over TLS a caller is the process that its certificate names, and the plan must name it, too."""

from __future__ import annotations

from typing import Any

import pytest

from harness.played import JOB, Network, fill, job_header, played_partition, played_plan, played_spec
from harness.played_caller import Caller
from pscluster.security.identity import Identity, Role
from pscluster.step.layout import Layout, TensorSpec
from pscluster.wire.frame import FrameKind
from pscluster.wire.protocol import Hello
from psserver.partition.process import PartitionService

CLUSTER = "00c1a57e00c1a57e"
LAYOUT = Layout((TensorSpec(names=("w",), shape=(16,), dtype="float32", kind="trained"),))


@pytest.fixture
def service(network: Network) -> PartitionService:
    """Partition 0 of 2, in generation 1: attempt 3 of trainer 0, attempt 2 of partition 1."""
    made = played_partition(network, played_spec(1, 2))
    plan = played_plan(LAYOUT, {0: [0]}, partitions=2)
    plan.trainers[0].attempt, plan.partitions[1].attempt = 3, 2
    made.adopt(plan)
    fill(made)
    return made


def call(network: Network, service: PartitionService, name: str, sender: int, **fields: Any) -> Caller:
    """A HELLO of `sender` over a connection with the certificate of `name`."""
    caller = Caller(network, service, index=sender)
    if name:
        caller.far.identity = Identity(cluster_id=CLUSTER, role=Role.PROCESS, name=name)  # type: ignore[assignment]
    made: dict[str, Any] = {"role": "trainer", "channel": "push", "attempt": 3, "restore_generation": 1, **fields}
    hello = Hello(token=b"0123456789abcdef".hex(), **made)
    caller.say(job_header(FrameKind.HELLO, generation=1, sender=sender), hello.pack())
    return caller


@pytest.mark.parametrize("channel", ["push", "pull"])
def test_the_planned_trainer_is_welcome(channel: str, network: Network, service: PartitionService) -> None:
    caller = call(network, service, f"{JOB}/trainer-0/3", 0, channel=channel)

    assert caller.received[0][0].kind is FrameKind.WELCOME


def test_the_planned_partition_is_welcome_to_vote(network: Network, service: PartitionService) -> None:
    caller = call(network, service, f"{JOB}/partition-1/2", 1, role="partition", channel="vote", attempt=2)

    assert caller.received[0][0].kind is FrameKind.WELCOME


OTHERS: dict[str, tuple[str, dict[str, Any]]] = {
    "another rank": (f"{JOB}/trainer-1/3", {}),
    "another attempt": (f"{JOB}/trainer-0/2", {}),
    "another job": ("job-other/trainer-0/3", {}),
    "a partition that says it is a trainer": (f"{JOB}/partition-0/3", {}),
    "a partition that pushes": (f"{JOB}/partition-0/3", {"role": "partition"}),
    "a trainer that votes": (f"{JOB}/trainer-0/3", {"channel": "vote"}),
    "a trainer that says it is a partition": (f"{JOB}/trainer-0/3", {"channel": "vote", "role": "partition"}),
    "a trainer that replicates": (f"{JOB}/trainer-0/3", {"channel": "replica", "role": "partition"}),
}


@pytest.mark.parametrize("who", OTHERS)
def test_who_says_what_its_certificate_does_not_is_refused(
    who: str, network: Network, service: PartitionService
) -> None:
    name, fields = OTHERS[who]
    caller = call(network, service, name, 0, **fields)

    assert caller.far.error is not None and caller.far.error.details["field"] == "identity"
    assert service.counters.invalid == {"PS-1005": 1} and caller.received == []


def test_a_trainer_that_the_plan_replaced_is_fenced(network: Network, service: PartitionService) -> None:
    caller = call(network, service, f"{JOB}/trainer-0/2", 0, attempt=2)

    assert not caller.far.is_open and service.counters.fenced == 1 and not service.counters.invalid


@pytest.mark.parametrize(("name", "attempt", "rank"), [("trainer-0/4", 4, 0), ("trainer-7/1", 1, 7)])
def test_a_trainer_of_a_newer_plan_dials_again(
    name: str, attempt: int, rank: int, network: Network, service: PartitionService
) -> None:
    caller = call(network, service, f"{JOB}/{name}", rank, attempt=attempt)

    assert not caller.far.is_open and not caller.received
    assert not service.counters.invalid and service.counters.fenced == 0


def test_without_certificates_the_token_is_enough(network: Network, service: PartitionService) -> None:
    caller = call(network, service, "", 5, attempt=1)

    assert caller.received[0][0].kind is FrameKind.WELCOME
