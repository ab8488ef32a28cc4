"""The public client library, used by psctl and notebooks.

    with Cluster.connect() as cluster:
        job_id = cluster.submit(load_spec(Path("spec.yaml")), pack(Path(".")))
        for job in cluster.watch(job_id):
            print(job.state, job.step, job.loss)

Results are the records of `pscluster.client.records`, and all errors `pscluster.errors.PsError`s.
"""

from pscluster.client.calls import ReconnectingStream
from pscluster.client.cluster import Cluster
from pscluster.client.goals import Goal, end_error, parse_goal, reached
from pscluster.client.records import ENDED, Event, Job, LogLine, Node, PartitionPlacement, Snapshot, TrainerPlacement

__all__ = [
    "ENDED", "Cluster", "Event", "Goal", "Job", "LogLine", "Node", "PartitionPlacement", "ReconnectingStream",
    "Snapshot", "TrainerPlacement", "end_error", "parse_goal", "reached",
]  # fmt: skip
