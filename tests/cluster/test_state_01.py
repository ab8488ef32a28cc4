"""A state directory of version 0.1 is read completely, and its jobs continue to the bits that 0.1 would have reached.

The fixture and the facts that 0.1 reported are described in tests/fixtures/README.md. Everything here goes through
psctl, psmaster's command line and the client library.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import subprocess
import sys
import tarfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from harness.cluster import DEADLINE_S, local_cluster
from harness.state_facts import facts_of
from pscluster.client import ENDED, Cluster, Job
from pscluster.errors import NotFoundError, UnreachableError

FIXTURES = Path(__file__).parents[1] / "fixtures"
PSMASTER = str(Path(sys.executable).parent / "psmaster")
RECORDED: dict[str, Any] = json.loads((FIXTURES / "state-0.1.json").read_text())
JOBS: dict[str, dict[str, Any]] = RECORDED["jobs"]
SAFELY: Any = {"filter": "data"} if hasattr(tarfile, "data_filter") else {}  # not before Python 3.11.4


# ---- the fixture, in its place ----


@pytest.fixture
def state() -> Iterator[Path]:
    """The fixture, unpacked where its jobs have their stores. One test at a time uses it; it is removed afterwards."""
    with _owned(Path(RECORDED["path"])) as root:
        with tarfile.open(FIXTURES / "state-0.1.tar.gz") as archive:
            archive.extractall(root, **SAFELY)
        yield root


@contextmanager
def _owned(root: Path) -> Iterator[Path]:
    """An empty directory at a fixed path for exclusive use; blocks until it is free."""
    while True:
        root.mkdir(mode=0o700, exist_ok=True)
        held = os.open(root, os.O_RDONLY | os.O_DIRECTORY)
        try:
            fcntl.flock(held, fcntl.LOCK_EX)
            if not _is_at(root, held):
                continue  # who had it before has removed it
            for path in root.iterdir():
                shutil.rmtree(path) if path.is_dir() else path.unlink()
            try:
                yield root
            finally:
                shutil.rmtree(root)
            return
        finally:
            os.close(held)


def _is_at(root: Path, held: int) -> bool:
    try:
        return os.path.samestat(root.stat(), os.fstat(held))
    except FileNotFoundError:
        return False


@contextmanager
def lone_master(root: Path) -> Iterator[Cluster]:
    """A client of a master without nodes, which suspects none of the nodes that its jobs were placed on."""
    token, address = root / "token", f"unix:{root}/master.sock"
    token.touch(mode=0o600)
    token.write_text("a token of this test alone, for one master\n")
    words = ["--state-dir", str(root / "master"), "--listen", address, "--token-file", str(token)]
    words += ["--metrics-listen", "127.0.0.1:0", "--suspicion-s", "3600"]
    with (root / "master.log").open("wb") as log:
        master = subprocess.Popen([PSMASTER, *words], env=_environment(), stdout=log, stderr=log)
    try:
        with _connected(master, address, token, root / "master.log") as client:
            yield client
    finally:
        master.terminate()
        assert master.wait(DEADLINE_S) == 0, (root / "master.log").read_text()


def _connected(master: subprocess.Popen[bytes], address: str, token: Path, log: Path) -> Cluster:
    """A client as soon as the master answers; fails when it ends before."""
    give_up_s = time.monotonic() + DEADLINE_S
    while time.monotonic() < give_up_s:
        try:
            return Cluster.connect(address, token_file=token)
        except UnreachableError:
            try:
                code = master.wait(0.05)
            except subprocess.TimeoutExpired:
                continue
            raise AssertionError(f"the master ended with {code}: {log.read_text()}") from None
    raise AssertionError(f"the master does not answer: {log.read_text()}")


def _environment() -> dict[str, str]:
    return {key: value for key, value in os.environ.items() if not key.startswith("PS_")}


# ---- what is compared ----


def is_within(expected: Any, found: Any) -> bool:
    """Whether `found` has everything that `expected` has: later versions may add keys."""
    if isinstance(expected, dict) and isinstance(found, dict):
        return all(key in found and is_within(value, found[key]) for key, value in expected.items())
    return bool(expected == found)


def assert_same(expected: dict[str, Any], found: dict[str, Any]) -> None:
    """Compare every recorded fact; a live job may have more events and plans by now."""
    name, events = expected["name"], found["events"]
    if expected["state"] not in ENDED:
        events = events[: len(expected["events"])]
        assert found["generation"] >= expected["generation"], name
        found = found | {"generation": expected["generation"]}
    assert events == expected["events"], name
    compared = {key: value for key, value in expected.items() if key != "events"}
    different = {key: (value, found[key]) for key, value in compared.items() if not is_within(value, found[key])}
    assert not different, f"{name}: {different}"


def assert_bits(name: str, found: Job, undisturbed: str) -> None:
    """The job reached its end with the parameters of an undisturbed one, if this machine is of its numerics class."""
    assert (found.state, found.step) == ("SUCCEEDED", JOBS[undisturbed]["final_step"]), name
    if found.numerics.rpartition("(class ")[2] == JOBS[undisturbed]["numerics"].rpartition("(class ")[2]:
        assert found.parameters_sha256 == JOBS[undisturbed]["parameters_sha256"], name


def goes_on(client: Cluster, job_id: str) -> Job:
    """The job at its end, resumed when it has stopped.

    A live job leaves out nodes of another numerics class than it began in, all of them where this machine is of one. It
    is stopped then and resumed, which takes whatever class there is."""
    found = client.job(job_id)
    if found.state == "STOPPED":
        client.resume(job_id)
    elsewhere = False
    for found in client.watch(job_id, timeout_s=DEADLINE_S):
        if not elsewhere and any(event.reason == "NodeLeftOut" for event in found.events):
            elsewhere = True
            client.stop(job_id)
    if elsewhere and found.state == "STOPPED":
        client.resume(job_id)
        found = client.wait(job_id, "succeeded", DEADLINE_S)
    return found


# ---- the tests ----


def test_every_job_is_read_as_it_was(state: Path) -> None:
    away = state / "away"
    assert any(away.iterdir()), "the fixture has no store of a deleted job"
    with lone_master(state) as client:
        assert {job.job_id for job in client.jobs()} == {facts["job_id"] for facts in JOBS.values()}
        for facts in JOBS.values():
            assert_same(facts, facts_of(client, facts["job_id"]))
        for node_id in RECORDED["drained_nodes"]:
            assert client.drain(node_id).drain  # which it was already: a node that is away can only be drained on
        with pytest.raises(NotFoundError):
            client.drain("worker-9")
        for job_id in RECORDED["deleted_jobs"]:
            with pytest.raises(NotFoundError):
                client.job(job_id)
        give_up_s = time.monotonic() + DEADLINE_S
        while any(away.iterdir()):  # it was away when its job was deleted, and is here again
            assert time.monotonic() < give_up_s, "the deletion does not go on"
            client.health()


@pytest.mark.slow
def test_live_and_stopped_jobs_go_on_to_the_same_bits(state: Path, tmp_path: Path) -> None:
    assert {facts["state"] for facts in JOBS.values()} == {"QUEUED", "STARTING", "RUNNING", *ENDED}
    ids = {name: facts["job_id"] for name, facts in JOBS.items()}
    with local_cluster(tmp_path, workers=4, servers=2, master_dir=state / "master") as cluster:
        with cluster.client() as client:
            client.resume(ids["rough"])
            client.wait(ids["stopping"], "stopped", DEADLINE_S)
            assert client.job(ids["queued"]).state == "QUEUED"
            for name in ("rough", "moving", "recovering", "replicated", "starting"):
                assert_bits(name, goes_on(client, ids[name]), "undisturbed")
        model = str(tmp_path / "model.safetensors")
        assert JOBS["stored"]["parameters_sha256"] in cluster.psctl("export", ids["stored"], "-o", model).stderr
        cluster.psctl("stop", ids["queued"])
        cluster.psctl("delete", ids["queued"], ids["undisturbed"])


@pytest.mark.slow
def test_the_manifests_alone_give_the_jobs_back(state: Path, tmp_path: Path) -> None:
    for path in (state / "master").glob("master.db*"):
        path.unlink()
    words = ["rebuild", "--state-dir", str(state / "master"), "--store", str(state / "store")]
    done = subprocess.run([PSMASTER, *words], env=_environment(), capture_output=True, text=True, timeout=DEADLINE_S)
    assert done.returncode == 0, done.stderr
    back = {name: facts for name, facts in JOBS.items() if facts["kept_steps"]}
    with local_cluster(tmp_path, workers=1, servers=1, master_dir=state / "master") as cluster:
        with cluster.client() as client:
            assert {job.job_id for job in client.jobs()} == {facts["job_id"] for facts in back.values()}
            for facts in back.values():
                assert facts["job_id"] in done.stdout
                assert_brought_back(facts, facts_of(client, facts["job_id"]))
            assert_bits("builtin-stopped", goes_on(client, back["builtin-stopped"]["job_id"]), "builtin-undisturbed")


def assert_brought_back(facts: dict[str, Any], found: dict[str, Any]) -> None:
    """The job is as it ended, or stopped at its newest snapshot; it has the snapshots whose parts all exist."""
    name, ended = facts["name"], facts["state"] in ENDED
    gone = {step for step, _, path, _ in facts["parts"] if not (Path(facts["store"]) / path).exists()}
    kept = [step for step in facts["kept_steps"] if step not in gone]
    assert (found["step"], found["kept_steps"]) == (facts["kept_steps"][-1], kept), name
    assert found["state"] == (facts["state"] if ended else "STOPPED"), name
    same = ["name", "created_s", "final_step", "best", "bundle_sha256", "store", "directory", "spec", "numerics"]
    same += ["parameters_sha256", "error", "traceback", "loss", "ended_s"] if ended else []
    different = {key: (facts[key], found[key]) for key in same if not is_within(facts[key], found[key])}
    assert not different, f"{name}: {different}"
    assert "Rebuilt" in [reason for reason, _, _ in found["events"]], name
