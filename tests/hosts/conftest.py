"""Tests on several hosts are skipped, by name, where the machine cannot have them; and the job that they train."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from harness import hosts
from harness.host_cluster import HostCluster, host_cluster
from harness.host_job import HOSTS, SMALL, PacedJob
from harness.jobs import lm_spec
from harness.plain import train_plainly


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    here = [item for item in items if Path(__file__).parent in item.path.parents]
    if here and (reason := hosts.missing()):
        for item in here:
            item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture(scope="session")
def digest() -> str:
    """Of a plain loop over the same data, which is that of the job on one machine."""
    return train_plainly(lm_spec(**SMALL)).digest


@pytest.fixture(scope="module")
def cluster() -> Iterator[HostCluster]:
    """A master's host and three more, over IPv4. What a test kills or cuts it starts and heals again."""
    with host_cluster(HOSTS) as made:
        yield made


@pytest.fixture
def paced(cluster: HostCluster, digest: str) -> PacedJob:
    return PacedJob(cluster, digest)
