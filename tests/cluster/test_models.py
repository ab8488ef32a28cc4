"""Models of unusual kinds: the same bits for one worker and two, or the same named error. See docs/models.md."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable, Iterator
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


def few(cases: Iterable[str], *quick: str) -> list[Any]:
    """The cases; all but the `quick` ones are slow tests."""
    return [case if case in quick else pytest.param(case, marks=pytest.mark.slow) for case in cases]


@pytest.mark.parametrize("case", few(LIKE_PYTORCH, "thawed by the spec", "tied through data"))
def test_a_model_has_the_bits_of_a_plain_loop_on_any_number_of_workers(case: str, tmp_path: Path) -> None:
    data, reference = LIKE_PYTORCH[case]
    plain = train_plainly(reference or data)
    for workers in (1, 2):
        assert trained(data, workers, tmp_path / str(workers))[0] == plain.digest, workers


@pytest.mark.parametrize("name", few(["Lazy", "Grows", "Graphs", "Masked"], "Lazy"))
def test_a_model_has_the_same_bits_on_any_number_of_workers(name: str, tmp_path: Path) -> None:
    (one, tensors), (two, _) = (trained(spec(name), workers, tmp_path / str(workers)) for workers in (1, 2))

    assert one == two
    if name == "Graphs":
        torch.manual_seed(5)
        for key, built in odd_models.Graph().named_buffers():
            moved = key.startswith("norm")
            assert torch.equal(tensors[key].to_dense(), built.to_dense()) is not moved, key
            assert tensors[key].layout == built.layout


@pytest.mark.slow
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


@pytest.mark.slow
@pytest.mark.parametrize("name", ["Line", "Prebuilt"])
def test_a_job_that_goes_back_to_its_first_values_has_them_again(name: str, tmp_path: Path) -> None:
    data = {**spec(name, max_steps=400), "durability": {"every_steps": 1000}}
    undisturbed, _ = trained({**data, "task": spec("Line")["task"]}, 1, tmp_path / "undisturbed")
    with StaticJob(data, 2, tmp_path / "disturbed") as job:
        job.wait_ready()
        job.publish(crossed_split(NUM_SHARDS, 2))
        job.wait_step(3)
        job.kill("partition-1")
        assert job.complete_steps() == [] and job.step < 400
        job.start("partition", 1)
        job.wait_ready()
        job.publish(crossed_split(NUM_SHARDS, 2), restore=True)
        assert job.wait_finished() == undisturbed


@pytest.mark.slow
def test_a_thaw_that_never_comes_leaves_first_values(tmp_path: Path) -> None:
    _, tensors = trained(spec("Line", unfreeze_at={"0.weight": 5}), 1, tmp_path)
    torch.manual_seed(5)
    first = odd_models.Line().build_model().state_dict()
    assert [name for name, value in tensors.items() if torch.equal(value, first[name])] == ["0.weight"]


@pytest.mark.slow
def test_a_buffer_that_the_first_batch_initialises_is_exact(tmp_path: Path) -> None:
    (one, tensors), (two, _) = (trained(spec("Fits"), workers, tmp_path / str(workers)) for workers in (1, 2))
    assert one == two
    assert bool(tensors["0.ready"]) and abs(float(tensors["0.mean"])) > 0


# ---- what is refused ----

REFUSED: dict[str, tuple[dict[str, Any], str, str]] = {  # a job, its code, what the error names
    "thawed by the task": (spec("Thaws"), "PS-2008", "parameter 0.weight"),
    "written past torch": (spec("Swaps"), "PS-2008", "parameter 2.weight"),
    "a constant that moves": (spec("Moves"), "PS-2008", "buffer scale"),
    "a cache in the state dict": (spec("Grows", {"persistent": True}), "PS-2008", "buffer positions"),
    "on meta": (spec("OnMeta"), "PS-2004", "parameter weight"),
    "a pattern without a match": (spec("Line", freeze=["0.wieght"]), "PS-1001", "did you mean 0.weight?"),
}


@pytest.mark.parametrize("case", few(REFUSED, "thawed by the task"))
@pytest.mark.parametrize("workers", [1, 2])
def test_a_model_is_refused_by_the_same_name_on_any_number_of_workers(case: str, workers: int, tmp_path: Path) -> None:
    data, code, named = REFUSED[case]
    with pytest.raises(AssertionError) as caught:
        trained(data, workers, tmp_path)
    said = str(caught.value)
    assert f'code: "{code}"' in said and named in said, said
    if code == "PS-2008":
        assert 'cause: "in step ' in said


# ---- on a cluster of daemons ----


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


def of_directory(name: str, workers: int, **train: Any) -> dict[str, Any]:
    data = spec(name, entrypoint=f"odd_models:{name}", **train)
    return {**data, "servers": {"partitions": 1}, "workers": {"min": workers, "max": workers}}


@pytest.mark.parametrize(("name", "code"), [("Thaws", "PS-2008"), ("OnMeta", "PS-2004")])
def test_what_is_refused_fails_at_once_without_another_attempt(
    cluster: LocalCluster, directory: Path, name: str, code: str
) -> None:
    job = cluster.submit(of_directory(name, 2), directory)
    found = cluster.until(job, lambda found: found.ended)
    assert found.error is not None
    assert (found.state, found.error.code) == ("FAILED", code), found.error
    assert "weight" in found.error.cause and found.error.action
    assert not [event for event in found.events if event.reason == "TrainerLost"]
    assert found.traceback == ""
    if code == "PS-2008":
        assert found.step < int(found.error.details["step"]) <= 5
        assert found.error.details["parameter"] == "0.weight"


def test_what_freezes_is_counted_in_describe_and_shown_in_a_dry_run(cluster: LocalCluster, directory: Path) -> None:
    data = of_directory("Line", 1, unfreeze_at={"0.*": 3})
    job = cluster.submit(data, directory, "--wait")
    checks = {check["name"]: check["detail"] for check in cluster.describe(job)["checks"]}
    assert checks["trainable"] == "2 of 4 parameters train, 2 more from step 3 on"
    path = directory / "dry.json"
    path.write_text(json.dumps(data))
    assert "frozen: 0.* until step 3\n" in cluster.psctl("submit", str(path), "--dry-run").stdout
