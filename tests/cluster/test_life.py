"""The life of a job as its owner sees it: submit, queue, stop, resume, inspect, use the result, delete."""

from __future__ import annotations

import csv
import io
import json
import re
import signal
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import yaml
from safetensors.torch import load_file

from harness.cluster import LocalCluster, local_cluster
from harness.held_task import held_spec
from harness.jobs import lm_spec
from harness.plain import Plain, train_plainly
from pscluster.job.spec import parse_spec
from pscluster.step.layout import NamedBytes, parameters_sha256
from psworker.trainer.data.loading import build_model, load_task

STEPS = 6
SMALL: dict[str, Any] = {"layers": 1, "d_model": 32, "heads": 2, "context": 8, "vocabulary": 64}
JOB_ID = re.compile(r"exact-[a-z2-7]{6}")


def spec(**changes: Any) -> dict[str, Any]:
    return {**lm_spec(steps=STEPS, **SMALL), "workers": {"max": 2}, "evaluate": {"every_steps": 2}, **changes}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("life")


@pytest.fixture(scope="module")
def cluster(root: Path) -> Iterator[LocalCluster]:
    with local_cluster(root, workers=2, servers=1) as cluster:
        yield cluster


@pytest.fixture(scope="module")
def plain() -> Plain:
    """The result of a plain single-process loop on the same spec."""
    return train_plainly(spec())


class Results(NamedTuple):
    """What psctl reported and wrote for a finished job."""

    job: str
    described: dict[str, Any]
    files: dict[str, Path]
    evaluation: dict[str, Any]
    text: str


@pytest.fixture(scope="module")
def results(cluster: LocalCluster, root: Path) -> Results:
    path = root / "spec.yaml"
    path.write_text(yaml.safe_dump(spec()))
    done = cluster.psctl("submit", str(path), "--wait")
    job = done.stdout.strip()
    assert (done.stdout, done.stderr) == (f"{job}\n", "")
    files = {"last.safetensors": "last", "last.pth": "last", "best.safetensors": "best"}
    calls = [["export", job, "--step", step, "-o", str(root / name)] for name, step in files.items()]
    calls.append(["eval", job, "-o", "json"])
    calls.append(["generate", job, "--prompt", "1 2 3", "--max-new-tokens", "4", "--temperature", "0"])
    with ThreadPoolExecutor(2) as pool:
        *exports, evaluated, generated = pool.map(lambda call: cluster.psctl(*call).stdout, calls)
    assert exports == [f"{root / name}\n" for name in files]
    paths = {name: root / name for name in files}
    return Results(job, cluster.describe(job), paths, json.loads(evaluated), generated)


def tensors_of(path: Path) -> dict[str, torch.Tensor]:
    return load_file(path) if path.suffix == ".safetensors" else torch.load(path, weights_only=True)


def digest_of(tensors: Mapping[str, torch.Tensor]) -> str:
    """The digest as its docstring defines it, from the tensors alone."""
    return parameters_sha256(
        NamedBytes(name, str(t.dtype).removeprefix("torch."), tuple(t.shape), t.contiguous().numpy().tobytes())
        for name, t in tensors.items()
    )


# ---- what was trained ----


def test_the_job_its_files_and_a_plain_loop_agree_to_the_bit(results: Results, plain: Plain) -> None:
    assert JOB_ID.fullmatch(results.job)
    assert results.described["parameters_sha256"] == plain.digest
    for name in ("last.safetensors", "last.pth"):
        tensors = tensors_of(results.files[name])
        assert digest_of(tensors) == plain.digest, name
        model = build_model(load_task(parse_spec(spec()), None))
        assert digest_of(model.state_dict()) != plain.digest
        model.load_state_dict(tensors, strict=True)
        assert digest_of(model.state_dict()) == plain.digest, name


def test_evaluation_is_the_jobs_own(results: Results, plain: Plain) -> None:
    assert results.described["metrics"] == plain.evaluations[STEPS]
    assert results.evaluation["metrics"] == plain.evaluations[STEPS]
    assert (results.evaluation["kind"], results.evaluation["step"]) == ("Evaluation", STEPS)
    assert results.evaluation["parameters_sha256"] == plain.digest


def test_the_best_is_the_step_with_the_lowest_loss(results: Results, plain: Plain) -> None:
    best = min(plain.evaluations, key=lambda step: plain.evaluations[step]["loss"])
    assert results.described["best"] == {"step": best, "value": plain.evaluations[best]["loss"]}
    same = digest_of(tensors_of(results.files["best.safetensors"])) == plain.digest
    assert same == (best == STEPS)


def test_generate_continues_the_prompt(results: Results) -> None:
    words = results.text.split()
    assert words[:3] == ["1", "2", "3"]
    assert len(words) == 7


# ---- looking ----


def test_answers_are_versioned_and_agree(cluster: LocalCluster, results: Results) -> None:
    def ask(*arguments: str) -> Any:
        return json.loads(cluster.psctl(*arguments, "-o", "json").stdout)

    job = results.job
    assert (results.described["apiVersion"], results.described["kind"]) == ("ps/v1", "Job")
    status = ask("status", job)
    assert (status["state"], status["step"], status["final_step"]) == ("SUCCEEDED", STEPS, STEPS)
    listed = ask("list")
    assert listed["kind"] == "JobList"
    assert job in [item["job_id"] for item in listed["items"]]
    assert job in cluster.psctl("list", "-o", "name").stdout.split()
    assert f"{job} " in cluster.psctl("list").stdout
    nodes = ask("nodes")
    assert [(n["kind"], n["node_id"], n["ready"]) for n in nodes["items"]][:2] == [
        ("Node", "worker-0", True), ("Node", "worker-1", True),
    ]  # fmt: skip
    assert cluster.psctl("wait", job).stdout == f"{job}\n"
    assert cluster.psctl("health").stdout == "healthy\n"


def test_metrics_are_every_step_and_evaluation_in_order(cluster: LocalCluster, results: Results, plain: Plain) -> None:
    listed = json.loads(cluster.psctl("metrics", results.job, "-o", "json").stdout)
    steps = [item for item in listed["items"] if "loss" in item]
    assert [item["step"] for item in steps] == list(range(1, STEPS + 1))
    assert [item["loss"] for item in steps] == pytest.approx(plain.losses, rel=1e-12)
    assert {item["step"]: item["eval"] for item in listed["items"] if "eval" in item} == plain.evaluations
    table = list(csv.DictReader(io.StringIO(cluster.psctl("metrics", results.job, "-o", "csv").stdout)))
    assert [row["step"] for row in table] == [str(item["step"]) for item in listed["items"]]


def test_describe_names_the_nodes_of_its_checks(cluster: LocalCluster, results: Results) -> None:
    by_node: dict[str, list[str]] = {"worker-0": [], "worker-1": []}
    for check in results.described["checks"]:
        by_node[check["node_id"]].append(check["name"])
    assert by_node["worker-0"] == by_node["worker-1"] != []
    text = cluster.psctl("describe", results.job).stdout
    assert re.search(r"worker-1 +canary +ok", text)


def test_an_unknown_job_and_a_goal_that_is_not_met(cluster: LocalCluster, results: Results) -> None:
    unknown = cluster.psctl("wait", "nobody-abcdef", expect=102)
    assert (unknown.stdout, "PS-1003" in unknown.stderr) == ("", True)
    assert "PS-1004" in cluster.psctl("wait", results.job, "--for=failed", expect=1).stderr


def test_following_a_job_that_fails_exits_100_with_the_reason(cluster: LocalCluster, root: Path) -> None:
    path = root / "wrong.json"
    path.write_text(json.dumps(spec(name="wrong", task={**spec()["task"], "args": {"layer": 1}})))
    done = cluster.psctl("submit", str(path), "--follow", expect=100)
    assert re.fullmatch(r"wrong-[a-z2-7]{6}\n", done.stdout)
    assert "PS-4100" in done.stderr
    assert "PS-2001" in done.stderr
    assert "did you mean layers?" in done.stderr


# ---- queue, stop, resume, delete ----


class Wide(NamedTuple):
    """A job of three trainers, held in mid-run; `gate` holds it."""

    job: str
    gate: Path
    waited_for: str


@pytest.fixture(scope="module")
def wide(cluster: LocalCluster, root: Path) -> Wide:
    directory = root / "wide"
    directory.mkdir()
    held, gate = held_spec(spec(workers={"min": 3, "max": 3}), directory, free=7)
    job = cluster.submit(held, directory)
    waited_for = cluster.until(job, lambda found: found.reason.startswith("waits for")).reason
    assert cluster.describe(job)["state"] == "QUEUED"
    cluster.up(3, 1)
    cluster.wait(job, "step=1")
    return Wide(job, gate, waited_for)


def test_a_job_that_needs_more_workers_names_them_and_starts_when_one_joins(wide: Wide, cluster: LocalCluster) -> None:
    assert "3 workers" in wide.waited_for
    assert "2" in wide.waited_for
    assert cluster.describe(wide.job)["workers_active"] == 3


def test_describe_shows_how_trainers_and_partitions_are_connected(wide: Wide, cluster: LocalCluster) -> None:
    cluster.until(wide.job, lambda found: len(found.connections) == 3)
    text = cluster.psctl("describe", wide.job).stdout
    assert re.search(r"Transports:\n  shm: +trainer-partition 0-0, 1-0, 2-0", text)


def test_a_live_job_cannot_be_deleted_and_waiting_for_it_has_a_limit(wide: Wide, cluster: LocalCluster) -> None:
    refused = cluster.psctl("delete", wide.job, expect=1)
    assert (refused.stdout, "PS-1004" in refused.stderr, "psctl stop" in refused.stderr) == ("", True, True)
    late = cluster.psctl("wait", wide.job, "--timeout", "0.2s", expect=101)
    assert (late.stdout, "PS-4101" in late.stderr) == ("", True)
    assert cluster.describe(wide.job)["state"] == "RUNNING"


def test_ctrl_c_detaches_a_follower_and_the_job_continues(wide: Wide, cluster: LocalCluster) -> None:
    follower = cluster.start("follow", wide.job)
    assert follower.stderr is not None
    while "RUNNING" not in (line := follower.stderr.readline()):
        assert line.startswith("!"), line  # earlier warnings, such as that all trainers are stuck
    follower.send_signal(signal.SIGINT)
    out, shown = follower.communicate(timeout=60)
    assert (follower.returncode, out) == (130, "")
    assert "detached" in shown and wide.job in shown
    assert cluster.describe(wide.job)["state"] == "RUNNING"


@pytest.mark.slow
def test_the_next_job_is_queued_and_a_stopped_one_resumes_with_the_same_bits(
    wide: Wide, cluster: LocalCluster, root: Path, plain: Plain
) -> None:
    path = root / "next.json"
    path.write_text(json.dumps(spec(name="next", workers={"max": 1}, evaluate={"every_steps": 1})))
    follower = cluster.start("submit", str(path), "--follow")
    assert follower.stdout is not None
    following = follower.stdout.readline().strip()
    waits = cluster.until(following, lambda found: found.reason.startswith("waits for"))
    assert waits.state == "QUEUED"
    assert "worker" in waits.reason
    stopping = cluster.start("stop", wide.job)
    cluster.until(wide.job, lambda found: "stops" in found.reason)
    wide.gate.unlink()
    stopped, shown = stopping.communicate(timeout=60)
    assert (stopping.returncode, stopped) == (0, f"{wide.job}\n"), shown
    at = cluster.describe(wide.job)
    assert at["state"] == "STOPPED"
    assert 1 <= at["step"] < STEPS
    assert "PS-4103" in cluster.psctl("wait", wide.job, expect=103).stderr
    rest, lines = follower.communicate(timeout=60)
    assert (follower.returncode, rest) == (0, ""), lines
    assert waits.reason in lines
    assert "\x1b" not in lines + rest
    assert "\r" not in lines
    assert re.search(rf"{following} SUCCEEDED at step {STEPS}", lines)
    evaluated = [int(step) for step in re.findall(r"^evaluated step (\d+): ", lines, re.MULTILINE)]
    assert evaluated == list(range(1, STEPS + 1))
    assert cluster.psctl("resume", wide.job).stdout == f"{wide.job}\n"
    cluster.wait(wide.job, "succeeded")
    assert cluster.describe(wide.job)["parameters_sha256"] == plain.digest
    assert "PS-1004" in cluster.psctl("resume", wide.job, expect=1).stderr


def test_delete_removes_an_ended_job_and_its_files(cluster: LocalCluster, results: Results) -> None:
    places = [Path(results.described["store"]), Path(results.described["directory"])]
    assert all(place.is_dir() for place in places)
    assert cluster.psctl("delete", results.job).stdout == f"{results.job}\n"
    assert not any(place.exists() for place in places)
    assert results.job not in cluster.psctl("list", "-o", "name").stdout
    cluster.psctl("status", results.job, expect=102)
