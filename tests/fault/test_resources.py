"""A trainer that runs out of memory, and daemons of another protocol version: a named error, a limit of attempts."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from harness.cluster import LocalCluster, local_cluster
from harness.jobs import lm_spec
from pscluster.cli.local.processes import command, daemon_dir
from pscluster.rpc import PROTOCOL
from pscluster.settings import master_address, token_file
from psmaster.scheduling.draft import Limits

HUNGRY = """
import resource
from pathlib import Path

import torch

from psworker.tasks.synthetic import SyntheticLm


class Hungry(SyntheticLm):
    computed = 0

    def loss(self, model, batch):
        if model.training:
            self.computed += 1
        if self.computed == 5:  # in the first step: the preflight computes three
            pages = int(Path("/proc/self/statm").read_text().split()[0])
            limit = pages * resource.getpagesize() + (64 << 20)
            resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
            torch.ones(1 << 30)
        return super().loss(model, batch)
"""


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalCluster]:
    with local_cluster(tmp_path_factory.mktemp("resources"), workers=1, servers=1) as cluster:
        yield cluster


def test_memory_that_runs_out_each_time_is_tried_again_and_fails_with_the_reason(
    cluster: LocalCluster, tmp_path: Path
) -> None:
    (tmp_path / "hungry.py").write_text(HUNGRY)
    spec = lm_spec(steps=4, layers=1, d_model=32, heads=2)
    spec |= {"task": {"entrypoint": "hungry:Hungry", "args": spec["task"]["args"]}, "workers": {"max": 1}}
    job = cluster.submit(spec, tmp_path)
    cluster.psctl("wait", job, "--timeout=120", expect=100)
    answer = cluster.describe(job)
    losses = [event["message"] for event in answer["events"] if event["reason"] == "TrainerLost"]
    assert len(losses) == Limits().max_losses + 1
    assert all("out of memory" in message for message in losses), losses
    assert (answer["state"], answer["error"]["code"]) == ("FAILED", "PS-3006"), answer["error"]
    assert "out of memory" in answer["error"]["cause"]
    with cluster.client() as client:
        assert client.health().problems == ()


@pytest.mark.parametrize("role", ["worker", "server"])
def test_an_agent_of_another_protocol_is_refused_by_name(role: str, cluster: LocalCluster) -> None:
    name = f"{role}-9"
    words = command(name, cluster.state_dir, master_address(cluster.state_dir), token_file(cluster.state_dir))
    module, flags = f"ps{role}.daemon", words[words.index("--state-dir") :]
    newer = f"import pscluster.rpc as r; r.PROTOCOL += 1; from {module} import main; main()"
    daemon_dir(name, cluster.state_dir).mkdir(exist_ok=True)
    agent = subprocess.Popen(
        [sys.executable, "-P", "-c", newer, *flags],
        cwd=daemon_dir(name, cluster.state_dir),
        env=cluster.environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    try:
        assert agent.stdout is not None
        refused = next(line for line in agent.stdout if "PS-" in line)
    finally:
        agent.terminate()
        agent.communicate(timeout=30)
    assert f"protocol {PROTOCOL + 1}" in refused and f"this master {PROTOCOL}" in refused
    with cluster.client() as client:
        assert name not in [node.node_id for node in client.nodes()]


def test_a_psctl_of_another_protocol_is_refused_by_name(cluster: LocalCluster) -> None:
    newer = "import pscluster.rpc as r; r.PROTOCOL += 1; from pscluster.cli.main import main; main()"
    done = subprocess.run(
        [sys.executable, "-P", "-c", newer, "nodes"],
        env=cluster.environment,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode != 0
    assert "PS-3004" in done.stderr and all(f"protocol {number}" in done.stderr for number in (PROTOCOL, PROTOCOL + 1))
