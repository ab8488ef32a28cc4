"""What a partition is and holds: the data that its parts share."""

from __future__ import annotations

from pscluster.job.spec import JobSpec
from pscluster.v1.plan_pb2 import Plan, ProcessSpec
from pscluster.wire.frame import FrameKind, Header, job_number
from pscluster.wire.protocol import Channel, Hello, process_id
from psserver.partition.coordinator.coordinator import Coordinator
from psserver.partition.ingress.clients import Clients
from psserver.partition.replication.in_sync import ReplicatedMetadata
from psserver.partition.replication.standby import Standby
from psserver.partition.step.machine import StepMachine
from psserver.partition.step.open_step import OpenStep
from psserver.partition.step.state import PartitionState
from psserver.partition.step.voting import Member
from psserver.partition.telemetry import PartitionCounters


class Partition:
    """Partition `index` of one job, or a standby of it. On the partition's thread. `plan` and `state`: None before the
    first plan. `PartitionService`, the subclass that carries out actions, sets them."""

    def __init__(self, spec: JobSpec, start: ProcessSpec, counters: PartitionCounters) -> None:
        self.spec = spec
        self.index = start.rank
        self.attempt = start.attempt  # which process of its placement it is
        self.job_id = start.job_id
        self.job = job_number(start.job_id)
        self.cluster_id = start.cluster_id
        self.counters = counters
        self.clients = Clients(self.header)
        self.machine = StepMachine(self.index)
        self.plan: Plan | None = None
        self.state: PartitionState | None = None
        self.coordinator: Coordinator | None = None  # in partition 0
        self.standby: Standby | None = None  # while this process is one
        self.metadata = ReplicatedMetadata()

    @property
    def step(self) -> OpenStep | None:
        """The sums of the open step."""
        return self.machine.step

    @property
    def member(self) -> Member:
        """The vote on the open step, and the last decision."""
        return self.machine.member

    @property
    def version(self) -> int:
        """The newest committed version whose update is done."""
        return self.machine.version

    @property
    def open_bucket(self) -> int:
        """The bucket whose gradients are needed first; -1: none."""
        return self.step.open_bucket if self.step else -1

    def version_of(self, bucket: int) -> int:
        """Which version a bucket's values are; frozen ones are as new as everything else."""
        assert self.state is not None
        frozen = self.state.layout.buckets[bucket].kind == "frozen"
        return self.version if frozen else self.machine.versions[bucket]

    def header(self, **fields: object) -> Header:
        """A header of this job, generation and sender."""
        generation = self.plan.generation if self.plan else 0
        return Header(job=self.job, generation=generation, sender=self.index, **fields)  # type: ignore[arg-type]

    def process_id_of(self, index: int, attempt: int) -> str:
        """The name of a process that is, or stands by for, a partition of this job."""
        return process_id(self.job_id, "partition", index, attempt)

    def make_hello(self, channel: Channel) -> tuple[Header, Hello]:
        """The HELLO to open a connection with."""
        assert self.plan is not None
        hello = Hello(
            token=self.plan.data_token.hex(),
            role="partition",
            channel=channel,
            attempt=self.attempt,
            restore_generation=self.plan.restore_generation,
            cluster=self.cluster_id,
        )
        return self.header(kind=FrameKind.HELLO), hello
