"""A network that drops or damages data: each shard and partition has one owner, and the bits are the same."""

from __future__ import annotations

import signal
import subprocess
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import psutil
import pytest

from harness.cluster import LocalCluster, local_cluster, wait_gone
from harness.jobs import even_split, lm_spec
from harness.plain import train_plainly
from harness.proxy import BitFlips, CuttingProxy, Direction
from harness.static_job import StaticJob
from pscluster.cli.local.processes import command, daemon_dir
from pscluster.settings import master_address, token_file


class Remote:
    """A node whose agent reaches the master through a proxy. Ended by SIGTERM."""

    def __init__(self, cluster: LocalCluster, name: str) -> None:
        self.proxy = CuttingProxy(master_address(cluster.state_dir))
        words = command(name, cluster.state_dir, self.proxy.address, token_file(cluster.state_dir))
        directory = daemon_dir(name, cluster.state_dir)
        directory.mkdir(exist_ok=True)
        with (cluster.state_dir / "logs" / f"{name}.log").open("ab") as log:
            self.agent = subprocess.Popen(words, cwd=directory, env=cluster.environment, stdout=log, stderr=log)

    def __enter__(self) -> Remote:
        return self

    def __exit__(self, *_: object) -> None:
        self.proxy.heal()
        self.agent.send_signal(signal.SIGTERM)
        assert self.agent.wait(30) == 0
        self.proxy.close()

    @property
    def children(self) -> list[psutil.Process]:
        return psutil.Process(self.agent.pid).children()


@pytest.fixture
def halves(tmp_path: Path) -> Iterator[tuple[LocalCluster, Remote, Remote]]:
    """A cluster of one worker and one server, with one more of each behind proxies of their own."""
    with local_cluster(tmp_path, workers=1, servers=1) as cluster, ExitStack() as stack:
        worker = stack.enter_context(Remote(cluster, "worker-7"))
        server = stack.enter_context(Remote(cluster, "server-7"))
        with cluster.client() as client:
            while sum(node.ready for node in client.nodes()) < 4:
                assert worker.agent.poll() is None and server.agent.poll() is None
        yield cluster, worker, server


@pytest.mark.parametrize(("cut_off", "direction"), [("server", "there"), ("worker", "back")])
def test_a_node_is_cut_off_in_one_direction_and_comes_back(
    cut_off: str,
    direction: Direction,
    halves: tuple[LocalCluster, Remote, Remote],
    paced: tuple[dict[str, Any], Path],
    digest: str,
    tmp_path: Path,
) -> None:
    """Late messages that arrive when the network recovers have no effect."""
    cluster, worker, server = halves
    spec, pace = paced
    job = cluster.submit(spec, tmp_path)
    cluster.wait(job, "step=3")
    remote = {"worker": worker, "server": server}[cut_off]
    (orphan,) = remote.children
    remote.proxy.stall(direction)
    lost = {"worker": "TrainerLost", "server": "PartitionLost"}[cut_off]
    node = f"{cut_off}-7"
    cluster.until(job, lambda found: any(e.reason == lost and node in e.message for e in found.events))
    cluster.until(job, lambda found: any(event.reason == "Recovered" for event in found.events))
    at = cluster.describe(job)["step"]
    cluster.until(job, lambda found: found.step > at + 1)
    if direction == "back":  # its order to end has not arrived: its work has no effect
        assert orphan.is_running()
    remote.proxy.heal()
    wait_gone([orphan])
    pace.unlink()
    cluster.wait(job, "succeeded")
    assert cluster.describe(job)["parameters_sha256"] == digest


def test_a_slow_link_to_the_master_is_no_death(
    halves: tuple[LocalCluster, Remote, Remote], paced: tuple[dict[str, Any], Path], digest: str, tmp_path: Path
) -> None:
    """Twenty kilobytes a second, and half a second from a message to its answer."""
    cluster, worker, server = halves
    spec, pace = paced
    for remote in (worker, server):
        remote.proxy.slow_down(bytes_per_s=20_000, delay_s=0.2)
    job = cluster.submit(spec, tmp_path)
    cluster.wait(job, "step=10")
    assert worker.children and server.children
    pace.unlink()
    cluster.wait(job, "succeeded")
    message = cluster.describe(job)
    assert message["parameters_sha256"] == digest
    # Shards may move on a busy machine; nothing may be lost.
    assert [e["message"] for e in message["events"] if e["warning"] and e["reason"] != "ShardsMoved"] == []


def test_a_payload_that_is_damaged_on_the_way_is_refused_and_sent_again(tmp_path: Path) -> None:
    spec = lm_spec(partitions=2, transport="tcp", d_model=64, steps=30)
    flips = BitFlips(seed=5, one_in=40)
    proxies: dict[str, CuttingProxy] = {}

    def through_proxy(address: str) -> str:
        if address not in proxies:
            proxies[address] = CuttingProxy(address, flips)
        return proxies[address].address

    with StaticJob(spec, 2, tmp_path) as job:
        job.reroute = through_proxy
        job.wait_ready()
        job.publish(even_split(7, 2))
        assert job.wait_finished() == train_plainly(spec).digest
    assert flips.flipped >= 10
    for proxy in proxies.values():
        assert proxy.accepted > 5  # damage closes a connection; another is opened
        proxy.close()
