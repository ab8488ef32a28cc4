"""The public client library, used by psctl and notebooks.

    with Cluster.connect() as cluster:
        job_id = cluster.submit(load_spec(Path("spec.yaml")), pack(Path(".")))
        for job in cluster.watch(job_id):
            print(job.state, job.step, job.loss)

All errors are `pscluster.errors.PsError`s.
"""

from pscluster.client.cluster import Cluster
from pscluster.client.goals import Goal, end_error, parse_goal, reached
from pscluster.client.reconnecting_stream import ReconnectingStream
from pscluster.client.records import (
    ENDED,
    Best,
    Condition,
    DataConnection,
    Event,
    Health,
    Job,
    LogLine,
    Node,
    PartitionPlacement,
    Plan,
    PreflightCheck,
    Snapshot,
    SnapshotPart,
    Standby,
    TrainerPlacement,
)

__all__ = [
    "ENDED",
    "Best",
    "Cluster",
    "Condition",
    "DataConnection",
    "Event",
    "Goal",
    "Health",
    "Job",
    "LogLine",
    "Node",
    "PartitionPlacement",
    "Plan",
    "PreflightCheck",
    "ReconnectingStream",
    "Snapshot",
    "SnapshotPart",
    "Standby",
    "TrainerPlacement",
    "end_error",
    "parse_goal",
    "reached",
]
