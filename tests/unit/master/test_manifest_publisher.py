"""Manifests are in a job's store when its snapshot is told of, and say all that the job needs to come back."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from queue import Queue

import pytest

from pscluster.errors import DamagedError, PsError, StorageError
from psmaster.model import snapshot_catalog
from psmaster.model.job import Best, Job, JobState
from psmaster.model.plan import Part
from psmaster.model.snapshot_catalog import Catalogue
from psmaster.model.state import Deletion, State
from psmaster.storage import manifest, manifest_publisher
from psmaster.storage.manifest import Manifest
from psmaster.storage.manifest_publisher import Publisher
from psmaster.storage.persistence import to_publish
from tests.harness.master_world import make_job

BUNDLE = b"code"
SHA256 = hashlib.sha256(BUNDLE).hexdigest()


def make(tmp_path: Path, **changes: object) -> Job:
    job = replace(make_job("a"), store=str(tmp_path / "store"), layout_json=b'{"tensors":[]}', layout_sha256="L")
    return replace(job, **changes)  # type: ignore[arg-type]


def complete(job: Job, *steps: int) -> Catalogue:
    found = Catalogue(num_partitions=job.spec.servers.partitions)
    for step in steps:
        for index in range(job.spec.servers.partitions):
            part = Part(step=step, partition=index, generation=2, path=f"{step}-{index}", size_bytes=9, checksum="c")
            found = snapshot_catalog.add(found, part)
    return found


def names(job: Job) -> list[str]:
    return sorted(os.listdir(job.store))


def read(job: Job, step: int) -> Manifest:
    path = Path(job.store) / manifest.manifest_name(step)
    return manifest.decode(path.read_bytes(), str(path))


@contextmanager
def publishing(tmp_path: Path, patience_s: float = 20.0) -> Iterator[Publisher]:
    (tmp_path / "bundle").write_bytes(BUNDLE)
    made = Publisher(lambda _: tmp_path / "bundle", patience_s)
    try:
        yield made
    finally:
        made.close()


def test_a_manifest_says_all_but_who_runs_the_job_and_its_secrets(tmp_path: Path) -> None:
    job = make(tmp_path, state=JobState.RUNNING, best=Best(step=5, value=0.5), data_token=b"secret", numerics_class="n")
    point = complete(job, 5).restore_point(5)
    data = manifest.encode(Manifest(job=job, point=point))

    found = manifest.decode(data, "x")

    assert found.point == point
    assert found.job == replace(job, data_token=b"")
    assert b"secret".hex().encode() not in data


def test_a_manifest_is_never_garbage_wherever_it_is_cut_or_changed(tmp_path: Path) -> None:
    job = make(tmp_path)
    data = manifest.encode(Manifest(job=job, point=complete(job, 5).restore_point(5)))
    for at in range(len(data) - 1):  # without its last line's end it is whole
        for wrong in (data[:at], data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :]):
            with pytest.raises(DamagedError, match="somewhere"):
                manifest.decode(wrong, "somewhere")


def test_there_is_one_for_each_complete_snapshot_and_none_for_another(tmp_path: Path) -> None:
    job = make(tmp_path)
    with publishing(tmp_path) as made:
        made.publish({"a": (job, complete(job, 0, 5))})
        assert names(job) == [manifest.manifest_name(0), manifest.manifest_name(5)]
        made.publish({"a": (job, complete(job, 5, 10))})
        assert names(job) == [manifest.manifest_name(5), manifest.manifest_name(10)]
    with publishing(tmp_path) as made:  # a restarted master knows of those that it must remove
        made.publish({"a": (job, complete(job, 10))})
        assert names(job) == [manifest.manifest_name(10)]


def test_the_newest_follows_what_becomes_of_the_job(tmp_path: Path) -> None:
    job = make(tmp_path, revision=1)
    with publishing(tmp_path) as made:
        made.publish({"a": (job, complete(job, 5, 10))})
        ended = replace(job, state=JobState.SUCCEEDED, parameters_sha256="f00d", revision=2)
        made.publish({"a": (ended, complete(job, 5, 10))})
    assert read(job, 10).job.parameters_sha256 == "f00d"
    assert read(job, 5).job.revision == 1


def test_the_code_is_there_before_the_manifest_that_names_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    job = make(tmp_path, bundle_sha256=SHA256)
    order: list[str] = []
    real = manifest_publisher.open_store(job.store).__class__.write
    monkeypatch.setattr(
        "pscluster.storage.directory.DirectoryStore.write",
        lambda self, name, data: (order.append(name), real(self, name, data))[1],
    )
    with publishing(tmp_path) as made:
        made.publish({"a": (job, complete(job, 5))})
        made.publish({"a": (job, complete(job, 5, 10))})
    assert order == [manifest.bundle_name(SHA256), manifest.manifest_name(5), manifest.manifest_name(10)]
    assert (Path(job.store) / manifest.bundle_name(SHA256)).read_bytes() == BUNDLE


def test_what_cannot_be_written_is_told_and_tried_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(manifest_publisher, "RETRY_S", 0.01)
    job = make(tmp_path)
    Path(job.store).write_text("in the way")
    received: Queue[tuple[str, int, PsError]] = Queue()
    with publishing(tmp_path) as made:
        made.report_error = lambda *what: received.put(what)
        made.publish({"a": (job, complete(job, 5))})
        job_id, step, error = received.get(timeout=20)
        assert (job_id, step) == ("a", 5) and isinstance(error, StorageError)
        Path(job.store).unlink()
        made.publish({"a": (job, complete(job, 5))})
        assert read(job, 5).point.step == 5
    assert received.empty(), "the same is told once"


def test_a_store_that_hangs_holds_the_master_up_for_a_moment_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = make(tmp_path)
    gate: Queue[None] = Queue()
    hung: Queue[None] = Queue()
    real = manifest_publisher.open_store

    def slowly(location: str) -> object:
        hung.put(None)
        gate.get(timeout=20)
        return real(location)

    monkeypatch.setattr(manifest_publisher, "open_store", slowly)
    with publishing(tmp_path, patience_s=0.05) as made:
        made.publish({"a": (job, complete(job, 5))})  # returns
        hung.get(timeout=20)
        assert not Path(job.store).exists()
        made._patience_s = 20.0
        gate.put(None)
        gate.put(None)
        made.publish({"a": (job, complete(job, 5, 10))})
        assert len(names(job)) == 2


def deleted(job: Job) -> Deletion:
    return Deletion(job_id=job.job_id, store=job.store, deleted_s=1.0)


def test_removing_a_job_removes_its_store_and_its_directory(tmp_path: Path) -> None:
    job = make(tmp_path)
    directory = tmp_path / "jobs" / "a"
    directory.mkdir(parents=True)
    gone: list[str] = []
    with publishing(tmp_path) as made:
        made.report_removed = gone.append
        made.publish({"a": (job, complete(job, 5))})
        made.remove(deleted(job), directory)
        assert not Path(job.store).exists() and not directory.exists()
        made.remove(deleted(job), directory)
    assert gone == ["a", "a"]


@pytest.mark.parametrize("away", ["no directory", "not mounted"])
def test_a_store_that_is_away_is_removed_when_it_is_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, away: str
) -> None:
    monkeypatch.setattr(manifest_publisher, "RETRY_S", 0.01)
    root, elsewhere, directory = tmp_path / "shared", tmp_path / "elsewhere", tmp_path / "jobs" / "a"
    job = make(tmp_path, store=str(root / "a"))
    directory.mkdir(parents=True)
    received: Queue[tuple[str, int, PsError]] = Queue()
    gone: Queue[str] = Queue()
    with publishing(tmp_path) as made:
        made.report_error, made.report_removed = lambda *what: received.put(what), gone.put
        made.publish({"a": (job, complete(job, 5))})
        root.rename(elsewhere)
        if away == "no directory":
            root.touch()
        made.remove(deleted(job), directory)
        assert isinstance(received.get(timeout=20)[2], StorageError)
        assert not directory.exists(), "what can be removed is"
        assert gone.empty(), "nobody knows whether it is gone"
        root.unlink(missing_ok=True)
        elsewhere.rename(root)
        assert gone.get(timeout=20) == "a"
    assert os.listdir(root) == []


@pytest.mark.parametrize("mounted", [True, False])
def test_a_job_that_wrote_nothing_below_its_clusters_id_is_gone_if_the_store_is_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mounted: bool
) -> None:
    monkeypatch.setattr(manifest_publisher, "RETRY_S", 0.01)
    root = tmp_path / "shared"
    if mounted:
        root.mkdir()
    job = make(tmp_path, store=str(root / ("0" * 16) / "a"))
    outcome: Queue[str] = Queue()
    with publishing(tmp_path) as made:
        made.report_error, made.report_removed = lambda *what: outcome.put(what[2].code), outcome.put
        made.remove(deleted(job), tmp_path / "jobs" / "a")
        assert outcome.get(timeout=20) == ("a" if mounted else StorageError.code)


def test_the_last_job_of_a_cluster_takes_its_directory_in_the_store_with_it(tmp_path: Path) -> None:
    root = tmp_path / "shared"
    jobs = [replace(make(tmp_path, store=str(root / ("0" * 16) / job_id)), job_id=job_id) for job_id in ("a", "b")]
    left = []
    with publishing(tmp_path) as made:
        for job in jobs:
            made.publish({job.job_id: (job, complete(job, 5))})
        for job in jobs:
            made.remove(deleted(job), tmp_path / "jobs" / job.job_id)
            left.append([path.name for path in root.glob("*/*")])
    assert left == [["b"], []]
    assert os.listdir(root) == []


def test_what_was_removed_before_is_not_looked_for_again(tmp_path: Path) -> None:
    job = make(tmp_path, store=str(tmp_path / "never" / "a"))
    gone: list[str] = []
    with publishing(tmp_path) as made:
        made.report_removed = gone.append
        made.remove(replace(deleted(job), removed=True), tmp_path / "jobs" / "a")
    assert gone == ["a"]


def test_a_store_that_stays_away_is_asked_less_and_less_often(tmp_path: Path) -> None:
    job = make(tmp_path)
    wanted = manifest_publisher._ManifestRequest(store=job.store, job=None)
    pauses = []
    for wanted.failures in range(40):
        pauses.append(manifest_publisher._pause_s(wanted))
    assert pauses[:3] == [5.0, 10.0, 20.0] and pauses[-1] == manifest_publisher.MAX_RETRY_S


# ---- which jobs a turn makes out of date ----


def state(job: Job, snapshots: Catalogue) -> State:
    return State(jobs={"a": job}, catalogues={"a": snapshots})


def test_only_a_complete_snapshot_the_best_or_the_end_is_published(tmp_path: Path) -> None:
    job = make(tmp_path, state=JobState.RUNNING)
    whole = complete(job, 5)
    none = Catalogue(num_partitions=1)
    assert to_publish(State(), state(job, none)) == {}
    assert to_publish(state(job, none), state(job, whole)) == {"a": (job, whole)}
    assert to_publish(state(job, whole), state(replace(job, step=9), whole)) == {}
    two = Catalogue(num_partitions=2)
    half = snapshot_catalog.add(two, Part(step=6, partition=0, generation=2, path="p", size_bytes=1, checksum="c"))
    assert to_publish(state(job, two), state(job, half)) == {}
    better = replace(job, best=Best(step=5, value=1.0))
    assert to_publish(state(job, whole), state(better, whole)) == {"a": (better, whole)}
    ended = replace(job, state=JobState.SUCCEEDED)
    assert to_publish(state(job, whole), state(ended, whole)) == {"a": (ended, whole)}
    assert to_publish(state(job, none), state(ended, none)) == {}
    assert to_publish(state(job, whole), state(job, none)) == {"a": (job, none)}
    assert to_publish(state(job, whole), State()) == {}
