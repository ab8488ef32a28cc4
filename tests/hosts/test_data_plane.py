"""The data plane between two hosts whose directories have the same paths: no agents and no master."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from typing import Any

from harness.hosts import HostNetwork
from harness.jobs import even_split, lm_spec
from harness.plain import train_plainly
from harness.static_job import StaticJob

sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))
_static = importlib.import_module("_static")


def connections(job: StaticJob, rank: int) -> dict[int, str]:
    """The transport over which a trainer reaches each partition, once it has reported both."""
    reports: list[Any] = []

    def is_complete() -> bool:
        reports[:] = job.reported(f"trainer-{rank}", "connected")
        return bool(reports) and len(reports[-1].connections) == 2

    job.wait(is_complete, f"both connections of trainer-{rank}")
    return {connection.partition: connection.transport for connection in reports[-1].connections}


def test_a_trainer_uses_shared_memory_on_its_own_host_and_tcp_to_the_other(tmp_path: Path) -> None:
    spec = lm_spec(partitions=2, steps=4)
    with HostNetwork(2) as network:
        places = [_static.Place(prefix=h.enter, environment={"PS_SOCKET_DIR": str(h.tmp)}) for h in network.hosts]
        data_hosts = [host.address for host in network.hosts]
        launch = _static.Starter(places=places)
        with StaticJob(spec, 2, tmp_path / "job", launch=launch, data_hosts=data_hosts) as job:
            job.wait_ready()
            job.publish(even_split(job.spec.train.num_shards, 2))
            found = [connections(job, rank) for rank in range(2)]
            digest = job.wait_finished()
        assert found == [{0: "shm", 1: "tcp"}, {0: "tcp", 1: "shm"}]
        assert all(host.sent_bytes() > 1e6 for host in network.hosts)
    assert digest == train_plainly(spec).digest
