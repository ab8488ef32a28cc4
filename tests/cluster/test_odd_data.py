"""Tasks with odd data or losses: the same bits with one worker and with two, or the same named error before step 0."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from harness.cluster import LocalCluster, local_cluster
from pscluster.client import Job
from pscluster.job.bundle import pack
from pscluster.job.spec import parse_spec

TASKS = """
import os

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from pscluster import Task


class Line(Task):
    def build_model(self):
        return nn.Sequential(nn.Linear(1, 8), nn.Tanh(), nn.Linear(8, 1))

    def train_data(self):
        return [(x, x.sin()) for x in torch.linspace(-3, 3, 33).reshape(-1, 1)]

    def loss(self, model, batch):
        x, y = batch
        return F.mse_loss(model(x), y, reduction="sum"), len(x)


class OwnGenerator(Line):
    def train_data(self):
        class Noisy:
            def __init__(self):
                self.generator = np.random.default_rng()

            def __len__(self):
                return 33

            def __getitem__(self, index):
                x = torch.tensor([index / 8 - 2 + 0.1 * self.generator.normal()], dtype=torch.float32)
                return x, x.sin()

        return Noisy()


class NoisyLoss(Line):
    def loss(self, model, batch):
        x, y = batch
        return super().loss(model, (x + 0.5 * torch.randn_like(x), y))


class OfProcess(Line):
    def loss(self, model, batch):
        x, y = batch
        return super().loss(model, (x + 1e-3 * os.getpid(), y))


class LastOne(Line):
    def build_model(self):
        return nn.Sequential(nn.Linear(1, 8), nn.BatchNorm1d(8), nn.Linear(8, 1))


class OfWords(Line):
    def train_data(self):
        words = list({word for word in "the order of a set of words is another in each process".split()})
        return [(torch.tensor([float(len(words[i % len(words)]))]), torch.ones(1)) for i in range(33)]


class OwnOptimizer(Line):
    def configure_optimizers(self):
        return torch.optim.RMSprop


class Misspelt(Line):
    def evaldata(self):
        return self.train_data()
"""


def spec(name: str, kind: str, workers: int, **sections: Any) -> dict[str, Any]:
    train = {"global_batch": 16, "microbatch": 8, "epochs": 2, **sections.pop("train", {})}
    workers_wanted = {"min": workers, "max": workers}
    return {"name": name, "task": {"entrypoint": f"odd:{kind}"}, "train": train, "workers": workers_wanted, **sections}


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalCluster]:
    with local_cluster(tmp_path_factory.mktemp("cluster"), workers=2, servers=1) as cluster:
        yield cluster


@pytest.fixture(scope="module")
def jobs(cluster: LocalCluster, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Every job of this file, submitted at once."""
    directory = tmp_path_factory.mktemp("odd")
    (directory / "odd.py").write_text(TASKS)
    mixed = {"train": {"numerics": "mixed"}}
    specs = [
        spec("mixed", "OwnGenerator", 2, **mixed),
        spec("optimizer", "OwnOptimizer", 1),
        spec("word", "Misspelt", 1),
        spec("process", "OfProcess", 2),
    ]
    for workers in (1, 2):
        specs += [
            spec(f"own-{workers}", "OwnGenerator", workers),
            spec(f"noisy-{workers}", "NoisyLoss", workers),
            spec(f"last-{workers}", "LastOne", workers),
            spec(f"dropped-{workers}", "LastOne", workers, data={"drop_last": True}),
            spec(f"set-{workers}", "OfWords", workers),
        ]
    bundle = pack(directory)
    with cluster.client() as client:
        return {found["name"]: client.submit(parse_spec(found), bundle) for found in specs}


def ended(cluster: LocalCluster, job: str) -> Job:
    with cluster.client() as client:
        return client.wait(job, "ended", 120)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["noisy", "dropped", "set"])
def test_the_bits_are_the_same_with_one_worker_and_with_two(
    cluster: LocalCluster, jobs: dict[str, str], name: str
) -> None:
    one, two = (ended(cluster, jobs[f"{name}-{workers}"]) for workers in (1, 2))
    assert (one.state, two.state) == ("SUCCEEDED", "SUCCEEDED")
    assert one.parameters_sha256 == two.parameters_sha256
    assert two.numerics.startswith("strict: checked by a canary gradient and the preflight on 2 nodes")


@pytest.mark.slow
@pytest.mark.parametrize(("name", "code", "check"), [("own", "PS-2007", "purity"), ("last", "PS-2001", "smallest")])
def test_what_cannot_be_right_fails_before_step_0_in_the_same_way(
    cluster: LocalCluster, jobs: dict[str, str], name: str, code: str, check: str
) -> None:
    for workers in (1, 2):
        found = ended(cluster, jobs[f"{name}-{workers}"])
        assert (found.state, found.step) == ("FAILED", 0)
        assert found.error is not None
        assert found.error.code == code
        assert [c.name for c in found.checks if not c.ok] == [check] * workers
        hint = {"own": "train.numerics: mixed", "last": "data.drop_last: true"}[name]
        assert hint in found.error.action


@pytest.mark.slow
def test_bits_that_differ_between_processes_are_found_before_step_0(
    cluster: LocalCluster, jobs: dict[str, str]
) -> None:
    found = ended(cluster, jobs["process"])
    assert (found.state, found.step) == ("FAILED", 0)
    assert found.error is not None
    assert (found.error.code, found.error.details["part"]) == ("PS-2007", "process")
    assert "trainer-0 on worker-" in found.error.cause and "trainer-1 on worker-" in found.error.cause


@pytest.mark.slow
def test_the_samples_that_are_left_out_are_counted(cluster: LocalCluster, jobs: dict[str, str]) -> None:
    found = ended(cluster, jobs["dropped-1"])
    assert found.step == found.final_step == 4  # two epochs of two steps, the 33rd sample left out
    (detail,) = [check.detail for check in found.checks if check.name == "data"]
    assert "1 of them left out of each epoch by data.drop_last" in detail


@pytest.mark.slow
def test_who_declares_mixed_trains_and_no_bits_are_promised(cluster: LocalCluster, jobs: dict[str, str]) -> None:
    found = ended(cluster, jobs["mixed"])
    assert found.state == "SUCCEEDED"
    assert found.numerics.startswith("mixed")
    assert all(check.detail.startswith("impure: ") for check in found.checks if check.name == "purity")
    assert any(event.reason == "PreflightWarning" and event.warning for event in found.events)


@pytest.mark.slow
def test_a_hook_of_another_framework_is_named_on_the_screen(cluster: LocalCluster, jobs: dict[str, str]) -> None:
    assert ended(cluster, jobs["optimizer"]).state == "SUCCEEDED"
    followed = cluster.psctl("follow", jobs["optimizer"]).stderr
    assert "PreflightWarning: OwnOptimizer.configure_optimizers() is never called" in followed
    assert "configure_optimizers" in cluster.psctl("describe", jobs["optimizer"]).stdout


@pytest.mark.slow
def test_a_misspelt_hook_is_refused(cluster: LocalCluster, jobs: dict[str, str]) -> None:
    found = ended(cluster, jobs["word"])
    assert found.error is not None
    assert (found.error.code, found.step) == ("PS-2001", 0)
    assert "did you mean eval_data()?" in found.error.cause
