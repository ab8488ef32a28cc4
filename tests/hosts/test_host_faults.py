"""Faults of processes, links, certificates and addresses in a job over three hosts: the bits of one machine."""

from __future__ import annotations

import pytest

from harness.cluster import wait_gone
from harness.host_cluster import HostCluster, host_cluster
from harness.host_job import HOSTS, PacedJob
from harness.hosts import Direction
from pscluster.client import Job

pytestmark = pytest.mark.slow


def is_in_sync(job: Job) -> bool:
    """Whether every partition has a standby that may take over."""
    placements = job.plan.partitions if job.plan else ()
    return bool(placements) and all(p.standby is not None and p.standby.in_sync for p in placements)


@pytest.mark.parametrize(
    ("daemon", "lost"), [("worker-1", "TrainerLost"), ("server-1", "PartitionLost")], ids=["trainer", "partition"]
)
def test_a_process_is_killed(daemon: str, lost: str, cluster: HostCluster, paced: PacedJob) -> None:
    paced.submit()
    cluster.kill(cluster.child(daemon))
    paced.until_events(lost)
    paced.advance()
    assert ("RolledBack" in paced.finish()) == (lost == "PartitionLost")


@pytest.mark.parametrize(("daemon", "lost"), [("worker-2", "TrainerLost"), ("server-2", "PartitionLost")])
def test_an_agent_is_killed_and_rejoins_with_its_certificate(
    daemon: str, lost: str, cluster: HostCluster, paced: PacedJob
) -> None:
    paced.submit()
    certificate = cluster.certificates(daemon)
    children = cluster.daemon(daemon).children()
    cluster.kill(cluster.daemon(daemon))
    wait_gone(children)
    cluster.start_daemon(daemon)
    cluster.wait_ready()
    assert cluster.certificates(daemon) == certificate
    paced.until_events(lost)
    paced.advance()
    assert ("RolledBack" in paced.finish()) == (lost == "PartitionLost")


def test_the_master_is_killed(cluster: HostCluster, paced: PacedJob) -> None:
    paced.submit()
    cluster.kill(cluster.daemon("master"))
    cluster.start_daemon("master")
    cluster.wait_ready()
    paced.advance()
    assert not {"TrainerLost", "PartitionLost", "RolledBack"} & set(paced.finish())


@pytest.mark.parametrize("direction", ["in", "out", "both"])
def test_a_link_is_cut_and_heals(direction: Direction, cluster: HostCluster, paced: PacedJob) -> None:
    paced.submit()
    host = cluster.host_of("worker-1")
    cluster.network.cut(host, direction)
    paced.until_events("TrainerLost", words="worker-1")
    paced.until_events("RolledBack")
    paced.advance()
    assert cluster.network.heal(host) > 0
    cluster.wait_ready()
    paced.advance()
    assert "PartitionLost" in paced.finish()


def test_a_host_comes_back_with_another_address(cluster: HostCluster, paced: PacedJob) -> None:
    paced.submit()
    host = cluster.host_of("server-1")
    cluster.kill_host(host.number)
    cluster.network.change_address(host, 20 + host.number)
    paced.until_events("PartitionLost", "RolledBack")
    for name in ("worker-1", "server-1"):
        cluster.start_daemon(name)
    cluster.wait_ready()
    with cluster.client() as client:
        (node,) = [node for node in client.nodes() if node.node_id == "server-1"]
    assert node.depot_address.startswith(f"{host.address}:")
    paced.advance()
    paced.finish()


def test_a_host_gets_another_address_while_its_daemons_run(cluster: HostCluster, paced: PacedJob) -> None:
    paced.submit()
    host = cluster.host_of("server-2")
    cluster.network.change_address(host, 30 + host.number)
    paced.until_events("PartitionLost", "RolledBack")
    cluster.wait_ready()
    paced.until(lambda found: found.workers_active == HOSTS)
    paced.advance()
    paced.finish()


def test_certificates_are_renewed_in_mid_run(digest: str) -> None:
    """Each agent's certificate lives twelve seconds; what connects after the first ones have expired uses others."""
    with host_cluster(HOSTS, master_flags=("--certificate-lifetime-s", "12")) as cluster:
        cluster.is_admin = True  # nobody calls psctl often enough to renew the user's
        paced = PacedJob(cluster, digest)
        nodes = cluster.names[1:]
        first = {name: cluster.certificates(name) for name in nodes}
        paced.submit()
        paced.until(lambda _: all(cluster.certificates(name) != first[name] for name in nodes))
        second = {name: cluster.certificates(name) for name in nodes}
        paced.until(lambda _: all(cluster.certificates(name) != second[name] for name in nodes))
        cluster.kill(cluster.child("worker-1"))
        paced.until_events("TrainerLost")
        paced.until(lambda found: found.workers_active == HOSTS)
        paced.advance()
        assert "PartitionLost" not in paced.finish()


def test_a_host_with_a_partition_is_lost_and_its_standby_takes_over(cluster: HostCluster, paced: PacedJob) -> None:
    paced.submit(durability={"tier": "replica", "every_steps": 25})
    paced.until(is_in_sync)
    cluster.kill_host(2)
    paced.until_events("PartitionLost")
    paced.advance()
    for name in ("worker-1", "server-1"):
        cluster.start_daemon(name)
    cluster.wait_ready()
    assert "RolledBack" not in paced.finish()
