"""`psmaster rebuild`: the master's database made again from the manifests in the jobs' stores. Blocks on everything.

A manifest counts only when it fits its checksum, and a snapshot only when every part of it was read and fits what the
manifest says. Jobs that had not ended come back STOPPED, at their newest sound snapshot; a job without one must be
submitted again."""

from __future__ import annotations

import secrets
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType

from pscluster.errors import DamagedError, PsError, StateError, StorageError
from pscluster.security.authority import cluster_id_of
from pscluster.storage import SnapshotStore, below, open_store
from pscluster.storage.snapshot import verify_file
from psmaster.model.access import AccessRecords
from psmaster.model.job import Event, Job, JobState
from psmaster.model.plan import RestorePoint
from psmaster.model.snapshot_catalog import Catalogue
from psmaster.model.state import Deletions
from psmaster.storage import manifest
from psmaster.storage.bundles import CHUNK_BYTES, BundleShelf, bundle_file
from psmaster.storage.manifest import Manifest
from psmaster.storage.sqlite import DATABASE, SqliteStore
from psmaster.storage.store import Batch, BundleRecord

LEAP = 1000  # added to generation and attempts, so that whatever is still alive from before is of the past


@dataclass(frozen=True, kw_only=True)
class RebuildSettings:
    """Of `psmaster rebuild`. `store`: where jobs with a durability.store of their own have their snapshots."""

    state_dir: Path
    store: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Found:
    """One job as found in its store. `problems`: what was left out, one line each."""

    job: Job
    catalogue: Catalogue
    problems: tuple[str, ...]


def rebuild(state_dir: Path, stores: Iterable[str], now_s: float) -> list[Found]:
    """Make the database of `state_dir` again; what came back. The caller holds the directory's lock.

    A damaged database is kept beside the new one. Raises StateError when there is a sound one with jobs in it,
    StorageError when a store cannot be read: then nothing was changed."""
    deletions, access = _refuse_a_sound_one(state_dir / DATABASE)
    locations = [str(path) for path in sorted(state_dir.glob("jobs/*/snapshots"))]
    cluster_id = cluster_id_of(state_dir)
    for root in stores:
        # Jobs of version 0.1 lie in the store itself, later ones below their cluster's id.
        locations += [*open_store(root).below(), *open_store(below(root, cluster_id)).below()]
    found: dict[str, Found] = {}
    for location in locations:
        one = read_job(open_store(location), now_s)
        if one is None or one.job.job_id in deletions:
            continue
        other = found.get(one.job.job_id)  # in a copy of the store, say: the one that knows more counts
        if other is None or one.job.revision > other.job.revision:
            found[one.job.job_id] = one
    shelf = BundleShelf(state_dir / "bundles")
    kept = [
        _with_bundle(replace(one, job=replace(one.job, directory=str(state_dir / "jobs" / k))), shelf)
        for k, one in found.items()
    ]
    _put_aside(state_dir, {one.job.job_id for one in kept}, now_s)
    batch = replace(
        _batch(kept, state_dir, now_s),
        deletions=tuple(deletions.values()),
        tokens=tuple(access.tokens.values()),
        certificates=tuple(access.certificates.values()),
    )
    _write(state_dir / DATABASE, batch)
    return sorted(kept, key=lambda one: (one.job.created_s, one.job.job_id))


def read_job(store: SnapshotStore, now_s: float) -> Found | None:
    """The job that a store holds snapshots of; None when it holds no sound one. Raises StorageError when it cannot be
    read; damage is no error here: what is damaged is left out, and named."""
    problems: list[str] = []
    sound: list[Manifest] = []
    readable: list[Manifest] = []
    for name in reversed(store.names()):
        if manifest.step_of(name) is None:
            continue
        try:
            one = manifest.read(store, name)
            readable.append(one)
            for part in one.point.parts:
                if not part.nodes:  # one on nodes is verified by the partition that restores it
                    verify_file(store, part.path, part.size_bytes, part.checksum)
            sound.append(one)
        except DamagedError as error:
            problems.append(str(error))
    if not sound:
        return None
    points = {one.point.step: one.point for one in sound}
    record = max(readable, key=lambda one: one.job.revision).job
    parts = {(part.step, part.partition): part for point in points.values() for part in point.parts}
    catalogue = Catalogue(num_partitions=record.spec.servers.partitions, parts=MappingProxyType(parts))
    return Found(job=_come_back(record, points, store, now_s), catalogue=catalogue, problems=tuple(problems))


def _come_back(record: Job, points: dict[int, RestorePoint], store: SnapshotStore, now_s: float) -> Job:
    """The job to store: as it ended, or STOPPED; it refers to nothing that is missing."""
    newest = max(points)
    ended = record.state.ended and record.step <= newest
    best = record.best if record.best is not None and record.best.step in points else None
    stale = record.metrics_step > newest
    return replace(
        record,
        store=store.location,
        data_token=secrets.token_bytes(32),
        state=record.state if ended else JobState.STOPPED,
        reason=record.reason if ended else f"brought back by psmaster rebuild; it resumes from step {newest}",
        ended_s=record.ended_s if ended else now_s,
        parameters_sha256=record.parameters_sha256 if ended else "",
        generation=max([record.generation, *(part.generation for p in points.values() for part in p.parts)]) + LEAP,
        attempts=tuple((name, attempt + LEAP) for name, attempt in record.attempts),
        step=newest,
        high_step=min(record.high_step, newest),
        best=best,
        next_best=None,
        metrics=() if stale else record.metrics,
        metrics_step=0 if stale else record.metrics_step,
    )


def _with_bundle(one: Found, shelf: BundleShelf) -> Found:
    """Put the job's bundle back on the shelf, if it is not there; problems are reported."""
    sha256 = one.job.bundle_sha256
    if not sha256 or shelf.has(sha256):
        return one
    store, name = open_store(one.job.store), manifest.bundle_name(sha256)
    try:
        with store.reading(name) as file:
            size = file.seek(0, 2)
            file.seek(0)
            upload = shelf.begin(sha256, size)
            try:
                while data := file.read(CHUNK_BYTES):
                    upload.add(data)
                upload.commit()
            finally:
                upload.abort()
    except PsError as error:
        return replace(one, problems=(*one.problems, f"its code cannot be restored: {error}"))
    return one


def _refuse_a_sound_one(database: Path) -> tuple[Deletions, AccessRecords]:
    """Raises StateError for one that has jobs. The deletions of a sound one, whose jobs must not come back, and who is
    a member."""
    if not database.exists():
        return {}, AccessRecords()
    try:
        store = SqliteStore(database)
    except DamagedError:
        return {}, AccessRecords()
    try:
        jobs, deletions, access = store.jobs(), store.deletions(), store.access()
    finally:
        store.close()
    if jobs:
        raise StateError(
            f"{database} is sound and has {len(jobs)} jobs", action="start psmaster; or move the file away first"
        )
    return deletions, access


def _put_aside(state_dir: Path, kept: set[str], now_s: float) -> None:
    """Move a damaged database, and the files of jobs that do not come back, out of the way. Nothing is deleted."""
    stamp = f"{int(now_s)}"
    try:
        for path in [state_dir / f"{DATABASE}{end}" for end in ("", "-wal", "-shm")]:
            if path.exists():
                path.rename(path.with_name(f"{path.name}.damaged-{stamp}"))
        for path in sorted(state_dir.glob("jobs/*")):
            if path.name not in kept:
                target = state_dir / "not-rebuilt" / f"{path.name}-{stamp}"
                target.parent.mkdir(exist_ok=True)
                path.rename(target)
    except OSError as error:
        raise StorageError(f"cannot move what is damaged out of the way in {state_dir}: {error.strerror}") from None


def _write(database: Path, batch: Batch) -> None:
    """Into a file of another name first: a rebuild that is killed leaves no database that is half there."""
    temporary = database.with_name(f".{database.name}.rebuilding")
    for end in ("", "-wal", "-shm"):
        temporary.with_name(temporary.name + end).unlink(missing_ok=True)
    store = SqliteStore(temporary)
    try:
        store.write(batch)
    finally:
        store.close()  # merges the log into the file
    temporary.rename(database)


def _batch(found: Iterable[Found], state_dir: Path, now_s: float) -> Batch:
    jobs, events, parts, bundles = [], [], [], {}
    for one in found:
        job_id = one.job.job_id
        jobs.append(one.job)
        steps = ", ".join(map(str, one.catalogue.complete_steps()))
        messages = [f"brought back with the snapshots of steps {steps}", *one.problems]
        events += [
            (job_id, Event(time_s=now_s, reason="Rebuilt", message=message, warning=bool(index)))
            for index, message in enumerate(messages)
        ]
        parts += [(job_id, part) for part in one.catalogue.parts.values()]
        path = bundle_file(state_dir / "bundles", one.job.bundle_sha256)
        if one.job.bundle_sha256 and path.exists():
            record = BundleRecord(sha256=one.job.bundle_sha256, size_bytes=path.stat().st_size, created_s=now_s)
            bundles[record.sha256] = record
    return Batch(jobs=tuple(jobs), events=tuple(events), parts=tuple(parts), bundles=tuple(bundles.values()))


def report(found: Iterable[Found]) -> str:
    """What came back, a line each, with what is wrong below it."""
    lines = []
    for one in found:
        lines.append(f"{one.job.job_id}  {one.job.state}  step {one.job.step}")
        lines += [f"  {line}" for line in one.problems]
    return "\n".join(lines) or "no snapshots were found: give the durability.store of the jobs with --store"
