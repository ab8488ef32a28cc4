"""A partition listens on the TCP host that its agent gives it."""

from __future__ import annotations

from pathlib import Path

from harness.jobs import even_split, lm_spec
from harness.static_job import StaticJob


def test_a_job_trains_over_the_hosts_that_its_partitions_were_given(tmp_path: Path) -> None:
    hosts = ["127.0.0.2", "127.0.0.3"]
    with StaticJob(lm_spec(partitions=2, steps=3, transport="tcp"), 2, tmp_path, data_hosts=hosts) as job:
        job.wait_ready()
        for index, host in enumerate(hosts):
            (address,) = job.reported(f"partition-{index}", "partition_ready")[-1].addresses
            assert address.startswith(f"tcp:{host}:")
        job.publish(even_split(7, 2))
        assert job.wait_finished()
