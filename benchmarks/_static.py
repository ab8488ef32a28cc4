"""Trainers and partitions without agents and master, started by commands of the benchmark.

As in the tests' harness this module writes the plan; the processes are the product's own, started as agents start them.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from _jobs import ONE_THREAD

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))  # `import harness`
from harness.jobs import even_split
from harness.static_job import StaticJob

_AS_AGENT = ("-P", "-m", "pscluster.agent.launch")
TRAINER = (*_AS_AGENT, "psworker.trainer")
PARTITION = (*_AS_AGENT, "psserver.partition")


@dataclass(frozen=True, kw_only=True)
class Place:
    """Where one process runs: words before its command, and variables on top of what it has anyway."""

    prefix: Sequence[str] = ()
    environment: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Starter:
    """Starts a job's processes; `places[i]` is where trainer and partition i run. They end with this process."""

    trainer: Sequence[str] = TRAINER
    places: Sequence[Place] = ()

    def __call__(self, name: str, environment: Mapping[str, str], control: int, output: int) -> subprocess.Popen[bytes]:
        """The harness's `Launch`."""
        kind, _, number = name.partition("-")
        place = self.places[int(number)] if self.places else Place()
        variables = {**os.environ, **ONE_THREAD, **environment, **place.environment}
        variables |= {"PS_CONTROL_FD": str(control), "PS_AGENT_PID": str(os.getpid())}
        command = [*place.prefix, sys.executable, *(self.trainer if kind == "trainer" else PARTITION)]
        return subprocess.Popen(
            command, env=variables, pass_fds=[control], stdout=output, stderr=output, start_new_session=True
        )


@contextmanager
def started(
    spec: Mapping[str, Any],
    starter: Starter,
    *,
    data_hosts: Sequence[str] = (),
    device: str = "",
    data_security: str = "",
) -> Iterator[tuple[StaticJob, dict[str, int]]]:
    """A job's processes, ready and without a plan, and their pids by name; all are gone at the end.

    `device` is the trainers'; `data_security`: as in ProcessSpec. The store is in memory, so that no disk disturbs
    what is measured."""
    workers = spec["workers"]["max"]
    with tempfile.TemporaryDirectory(prefix="psb-", dir="/dev/shm") as directory:
        root = Path(directory)
        with StaticJob(
            spec, workers, root, launch=starter, data_hosts=data_hosts, device=device, data_security=data_security
        ) as job:
            job.wait_ready()
            yield job, {name: child.process.pid for name, child in job.children.items()}


def fill(job: StaticJob) -> None:
    """Block until the partitions have the initial values and the first snapshot is written; no shards are assigned."""
    job.publish([[] for _ in range(job.workers)])
    job.wait(lambda: len(job.parts.get(0, {})) == job.spec.servers.partitions, "the first snapshot")


def train(job: StaticJob, skip: int) -> list[float]:
    """Give out the shards and block until the job's end; Unix times of its commits, without the first `skip`."""
    job.publish(even_split(job.spec.train.num_shards, job.workers))
    job.wait_finished()
    records = [record for progress in job.reported("partition-0", "progress") for record in progress.records]
    return [record.time_s for record in sorted(records, key=lambda record: record.step)][skip:]
