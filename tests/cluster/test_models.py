"""Models of unusual kinds: the same bits for one worker and two, or the same named error. See docs/models.md."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from harness import odd_models
from harness.cluster import LocalCluster, local_cluster
from harness.jobs import crossed_split
from harness.plain import train_plainly
from harness.static_job import StaticJob, final_tensors

NUM_SHARDS = 4


def spec(name: str, args: dict[str, Any] | None = None, *, entrypoint: str = "", **train: Any) -> dict[str, Any]:
    """A job of five steps. AdamW with weight decay: a parameter that must not train would decay if it did."""
    return {
        "name": name.lower(),
        "task": {"entrypoint": entrypoint or f"harness.odd_models:{name}", "args": args or {}},
        "train": {
            "global_batch": 12,
            "microbatch": 3,
            "max_steps": 5,
            "seed": 5,
            "optimizer": {"name": "adamw", "lr": 0.01, "weight_decay": 0.1, "decay_norms_and_biases": True},
            **train,
        },
        "servers": {"partitions": 2},
        "durability": {"every_steps": 2},
    }


def trained(data: dict[str, Any], workers: int, root: Path) -> tuple[str, dict[str, torch.Tensor]]:
    """Digest and final tensors of the job on this many workers."""
    with StaticJob(data, workers, root) as job:
        job.wait_ready()
        job.publish(crossed_split(NUM_SHARDS, workers))
        return job.wait_finished(), {name: tensor.clone() for name, tensor in final_tensors(job).items()}


# ---- what trains to exact bits ----

LIKE_PYTORCH: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {  # a job, and that of the plain loop
    "frozen by the spec": (spec("Line", freeze=["2.*"]), {}),
    "thawed by the spec": (spec("Line", unfreeze_at={"0.*": 3, "2.bias": 1}), {}),
    "tied through data": (spec("Tied"), spec("Tied", {"through": "parameter"})),
    "bfloat16 base": (spec("Adapted"), {}),
    "channels_last": (spec("Images"), {}),
    "batches of its own": (spec("Batched"), spec("Line")),
}


@pytest.mark.parametrize("case", LIKE_PYTORCH)
def test_a_model_has_the_bits_of_a_plain_loop_on_any_number_of_workers(case: str, tmp_path: Path) -> None:
    data, reference = LIKE_PYTORCH[case]
    plain = train_plainly(reference or data)
    for workers in (1, 2):
        assert trained(data, workers, tmp_path / str(workers))[0] == plain.digest, workers


@pytest.mark.parametrize("name", ["Lazy", "Grows", "Graphs"])
def test_a_model_has_the_same_bits_on_any_number_of_workers(name: str, tmp_path: Path) -> None:
    (one, tensors), (two, _) = (trained(spec(name), workers, tmp_path / str(workers)) for workers in (1, 2))

    assert one == two
    if name == "Graphs":
        torch.manual_seed(5)
        for key, built in odd_models.Graph().named_buffers():
            moved = key.startswith("norm")
            assert torch.equal(tensors[key].to_dense(), built.to_dense()) is not moved, key
            assert tensors[key].layout == built.layout


def test_a_step_that_thaws_is_computed_alike_after_kills_and_a_restore(tmp_path: Path) -> None:
    data = spec("Line", unfreeze_at={"0.*": 6}, max_steps=12)
    plain = train_plainly(data)
    with StaticJob(data, 2, tmp_path) as job:
        job.wait_ready()
        job.publish(crossed_split(NUM_SHARDS, 2))
        job.wait(lambda: bool(job.complete_steps()) and job.step >= 3, "a snapshot before the thaw")
        for name in ("partition-1", "trainer-0"):
            job.kill(name)
            job.start(name.partition("-")[0], int(name[-1]))
        job.wait_ready()
        job.publish(crossed_split(NUM_SHARDS, 2), restore=True)
        assert job.wait_finished() == plain.digest


def test_a_thaw_that_never_comes_leaves_first_values(tmp_path: Path) -> None:
    _, tensors = trained(spec("Line", unfreeze_at={"0.weight": 5}), 1, tmp_path)
    torch.manual_seed(5)
    first = odd_models.Line().build_model().state_dict()
    assert [name for name, value in tensors.items() if torch.equal(value, first[name])] == ["0.weight"]


# ---- what is refused, on a cluster of daemons ----

REFUSED = {
    "Thaws": ("PS-2010", "parameter", "0.weight"),
    "Swaps": ("PS-2010", "parameter", "2.weight"),
    "Moves": ("PS-2010", "buffer", "scale"),
    "OnMeta": ("PS-2004", "", "weight"),
}


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalCluster]:
    with local_cluster(tmp_path_factory.mktemp("models"), workers=2, servers=1) as cluster:
        yield cluster


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("own") / "work"
    root.mkdir()
    shutil.copy(odd_models.__file__, root / "odd_models.py")
    return root


def of_directory(name: str, workers: int, args: dict[str, Any] | None = None, **train: Any) -> dict[str, Any]:
    data = spec(name, args, entrypoint=f"odd_models:{name}", **train)
    return {**data, "servers": {"partitions": 1}, "workers": {"min": workers, "max": workers}}


@pytest.mark.parametrize("workers", [1, 2])
def test_what_is_refused_fails_by_name_at_once(cluster: LocalCluster, directory: Path, workers: int) -> None:
    jobs = {name: cluster.submit(of_directory(name, workers), directory) for name in REFUSED}
    jobs["Grows"] = cluster.submit(of_directory("Grows", workers, {"persistent": True}), directory)
    for name, job in jobs.items():
        code, key, tensor = REFUSED.get(name, ("PS-2010", "buffer", "positions"))
        found = cluster.until(job, lambda found: found.ended)
        assert found.error is not None
        assert (found.state, found.error.code) == ("FAILED", code), found.error
        assert tensor in found.error.cause and found.error.action
        assert not [event for event in found.events if event.reason == "TrainerLost"], "no attempt is repeated"
        assert found.traceback == ""
        if key:
            assert found.error.details[key] == tensor
            assert found.step < int(found.error.details["step"]) <= 5


def test_a_pattern_that_matches_nothing_fails_and_what_freezes_is_counted(
    cluster: LocalCluster, directory: Path
) -> None:
    wrong = cluster.submit(of_directory("Line", 1, freeze=["0.wieght"]), directory)
    right = cluster.submit(of_directory("Line", 1, unfreeze_at={"0.*": 3}), directory)

    found = cluster.until(wrong, lambda found: found.ended)
    assert found.error is not None
    assert (found.error.code, [check.name for check in found.checks if not check.ok]) == ("PS-1001", ["trainable"])
    assert "did you mean 0.weight?" in found.error.cause
    cluster.wait(right, "succeeded")
    checks = {check["name"]: check["detail"] for check in cluster.describe(right)["checks"]}
    assert checks["trainable"] == "2 of 4 parameters train, 2 more from step 3 on"
    dry = cluster.psctl("submit", str(spec_file(directory)), "--dry-run", "--set", "train.unfreeze_at={'0.*': 3}")
    assert "frozen: 0.* until step 3\n" in dry.stdout


def spec_file(directory: Path) -> Path:
    path = directory / "dry.json"
    path.write_text(json.dumps(of_directory("Line", 1)))
    return path
