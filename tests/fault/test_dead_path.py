"""A path that silently drops everything: its connections are closed, and opened again when it recovers."""

from __future__ import annotations

import importlib
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from harness.hosts import HostNetwork, missing
from harness.jobs import even_split, lm_spec
from harness.plain import train_plainly
from harness.static_job import StaticJob
from pscluster.wire.transport import DEAD_S

sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))
_static = importlib.import_module("_static")

_ESTABLISHED = "01"  # in /proc/net/tcp


@pytest.fixture
def network() -> Iterator[HostNetwork]:
    """Two hosts with a link between them."""
    if reason := missing():
        pytest.skip(reason)
    with HostNetwork(2, rate="1gbit") as made:
        yield made


def established(pid: int) -> int:
    """TCP connections in the network namespace of a process."""
    lines = Path(f"/proc/{pid}/net/tcp").read_text().splitlines()[1:]
    return sum(line.split()[3] == _ESTABLISHED for line in lines)


def seconds_until(condition: Callable[[], bool], what: str) -> float:
    began = time.monotonic()
    while not condition():
        assert time.monotonic() < began + 3 * DEAD_S, f"timed out waiting until {what}"
        time.sleep(0.05)
    return time.monotonic() - began


def test_connections_over_a_dead_path_are_closed_and_the_job_continues_when_it_recovers(
    network: HostNetwork, tmp_path: Path
) -> None:
    spec = lm_spec(partitions=1, pause_s=0.05)
    hosts = network.hosts
    places = [_static.Place(prefix=h.enter, environment={"PS_SOCKET_DIR": str(h.tmp)}) for h in hosts]
    starter = _static.Starter(places=places)
    with StaticJob(spec, 2, tmp_path / "job", launch=starter, data_hosts=[hosts[0].address]) as job:
        job.wait_ready()
        pids = [job.children[name].process.pid for name in ("partition-0", "trainer-1")]
        job.publish(even_split(job.spec.train.num_shards, 2))
        job.wait_step(2)
        assert all(established(pid) for pid in pids), "the far trainer is not connected over the cable"
        network.cut(hosts[1], "both")
        took = [seconds_until(lambda pid=pid: not established(pid), f"{pid} gives up") for pid in pids]  # type: ignore[misc]
        assert DEAD_S / 2 < sum(took) < 2 * DEAD_S
        stood = job.step
        assert network.heal(hosts[1]) > 0
        assert job.wait_finished() == train_plainly(spec).digest
        assert stood < job.step
