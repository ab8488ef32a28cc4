"""A job over three hosts, undisturbed: the bits of one machine, over connections between the hosts' own addresses."""

from __future__ import annotations

import ipaddress
import time
from pathlib import Path

import pytest

from harness.commits import Commits
from harness.host_cluster import HostCluster, host_cluster
from harness.host_job import HOSTS, PacedJob

FIRST_STEP_S = 20.0
_ESTABLISHED = "01"  # in /proc/net/tcp
Socket = tuple[str, str, str]


def sockets(pid: int) -> list[Socket]:
    """(state, local address, remote address) of every TCP socket in the network of a process."""
    found = []
    for name in ("tcp", "tcp6"):
        for line in Path(f"/proc/{pid}/net/{name}").read_text().splitlines()[1:]:
            _, local, remote, state = line.split()[:4]
            found.append((state, _address(local), _address(remote)))
    return found


def _address(text: str) -> str:
    """Of the kernel's hex digits, each word of which has the machine's byte order."""
    digits = text.partition(":")[0]
    raw = b"".join(bytes.fromhex(digits[at : at + 8])[::-1] for at in range(0, len(digits), 8))
    address = ipaddress.ip_address(raw)
    mapped = address.ipv4_mapped if isinstance(address, ipaddress.IPv6Address) else None
    return str(mapped or address)


def check_sockets(cluster: HostCluster) -> None:
    """Fail unless every connection is between addresses of the hosts, each trainer's to both other hosts among
    them: none to a loopback address."""
    known = {host.address for host in cluster.network.hosts}
    for host in cluster.network.hosts[1:]:
        trainer = cluster.child(f"worker-{host.number - 1}")
        seen = sockets(trainer.pid)
        peers = {remote for state, _, remote in seen if state == _ESTABLISHED}
        assert peers <= known, f"{host.name} is connected to {peers}"
        assert {other.address for other in cluster.network.hosts[1:] if other is not host} <= peers


def check_addresses(cluster: HostCluster, job_id: str) -> None:
    """Fail if the plan or a node names a loopback address to other hosts."""
    with cluster.client() as client:
        plan, nodes = client.job(job_id).plan, client.nodes()
    assert plan is not None
    advertised = [address for placement in plan.partitions for address in placement.addresses]
    advertised += [node.depot_address for node in nodes if node.depot_address]
    assert len([address for address in advertised if address.startswith("tcp:")]) == HOSTS
    assert not [address for address in advertised if "127.0.0." in address or "::1" in address.split("]")[0] == "[::1"]


def check_export(cluster: HostCluster, job_id: str, digest: str) -> None:
    """Fail unless a user on another host can export the job: the parts lie on the servers' disks."""
    target = cluster.user_host.home / f"{job_id}.safetensors"
    shown = cluster.psctl("export", job_id, "--format", "safetensors", "-o", str(target))
    assert digest in shown.stdout + shown.stderr
    assert (cluster.user_host.outside / "home" / target.name).stat().st_size > 10_000


def train(cluster: HostCluster, digest: str) -> None:
    job = PacedJob(cluster, digest)
    began_s = time.time()
    job_id = job.submit()
    check_sockets(cluster)
    check_addresses(cluster, job_id)
    transports = {connection["transport"] for connection in cluster.describe(job_id)["connections"]}
    assert transports == {"shm", "tcp"}
    assert not {"TrainerLost", "PartitionLost", "RolledBack"} & set(job.finish())
    commits = Commits(cluster.state_dir, job_id)
    commits.look()
    assert commits.all[0].time_s - began_s < FIRST_STEP_S
    check_export(cluster, job_id, digest)


@pytest.mark.slow
def test_three_hosts_give_the_bits_of_one_machine(cluster: HostCluster, digest: str) -> None:
    train(cluster, digest)


@pytest.mark.slow
def test_the_same_over_ipv6_alone(digest: str) -> None:
    with host_cluster(HOSTS, families=("ipv6",)) as cluster:
        assert all(":" in host.address for host in cluster.network.hosts)
        train(cluster, digest)


@pytest.mark.slow
def test_daemons_that_start_before_the_master_join_when_it_comes(digest: str, cluster: HostCluster) -> None:
    for name in cluster.names:
        cluster.kill(cluster.daemon(name))
    for name in reversed(cluster.names):
        cluster.start_daemon(name)
    cluster.wait_ready()
    train(cluster, digest)
