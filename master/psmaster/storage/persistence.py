"""The store and the files beside it, written as one: the changes of a transaction are durable when `save` returns.

Used from one thread (the master's disk thread); everything blocks. Order matters: metrics and logs first, because
repeating them is harmless; then the store, which decides; then the manifests of what is complete, before that is
published; cuts last, because only a stored rollback voids metrics.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import structlog

from pscluster.errors import StorageError
from psmaster.model.access import AccessRecords
from psmaster.model.job import Instant, Job
from psmaster.model.membership import presumed
from psmaster.model.plan import Part
from psmaster.model.snapshot_catalog import Catalogue
from psmaster.model.state import Changes, State
from psmaster.storage.bundles import bundle_file
from psmaster.storage.logs import LogMessage, ProcessLog
from psmaster.storage.manifest_publisher import Publisher
from psmaster.storage.metrics_file import MetricsFile
from psmaster.storage.orphans import refuse_older
from psmaster.storage.store import Batch, Store

_log = structlog.get_logger(__name__)


def batch_of(before: State, changes: Changes) -> Batch:
    """What the store must write for a transaction. Pure."""
    after = changes.state
    put: list[tuple[str, Part]] = []
    dropped: list[tuple[str, int, int]] = []
    for job_id, catalogue in after.catalogues.items():
        held = before.catalogues.get(job_id)
        if held is catalogue:
            continue
        old = held.parts if held else {}
        put += [(job_id, part) for key, part in catalogue.parts.items() if old.get(key) != part]
        dropped += [(job_id, *key) for key in old if key not in catalogue.parts]
    return Batch(
        jobs=tuple(job for job_id, job in after.jobs.items() if before.jobs.get(job_id) is not job),
        events=changes.events,
        parts=tuple(put),
        dropped_parts=tuple(dropped),
        deleted_jobs=tuple(job_id for job_id in before.jobs if job_id not in after.jobs),
        drained=tuple(entry for entry in after.drains.items() if entry not in before.drains.items()),
        undrained=tuple(node_id for node_id in before.drains if node_id not in after.drains),
        deletions=tuple(one for job_id, one in after.deletions.items() if before.deletions.get(job_id) != one),
        forgotten_deletions=tuple(job_id for job_id in before.deletions if job_id not in after.deletions),
        **_access_changes(before.access, after.access),
    )


def _access_changes(before: AccessRecords, after: AccessRecords) -> dict[str, Any]:
    """The fields of a Batch."""
    if before is after:
        return {}
    return {
        "tokens": tuple(one for key, one in after.tokens.items() if before.tokens.get(key) != one),
        "dropped_tokens": tuple(key for key in before.tokens if key not in after.tokens),
        "certificates": tuple(one for key, one in after.certificates.items() if before.certificates.get(key) != one),
        "dropped_certificates": tuple(key for key in before.certificates if key not in after.certificates),
    }


@dataclass(frozen=True, kw_only=True)
class Writes:
    """What one transaction writes, which started from the state `before`."""

    before: State
    batch: Batch
    changes: Changes
    logs: tuple[tuple[str, LogMessage], ...] = ()

    @property
    def empty(self) -> bool:
        return self.batch.empty and not (self.changes.lines or self.changes.cuts or self.logs)


def to_publish(before: State, after: State) -> dict[str, tuple[Job, Catalogue]]:
    """The jobs whose manifests a transaction makes out of date: new complete snapshots, a new best, the end. Pure."""
    found = {}
    for job_id, job in after.jobs.items():
        held, snapshots, former = before.jobs.get(job_id), after.catalogues[job_id], before.catalogues.get(job_id)
        points = snapshots.restore_points()
        ends = held is not None and (held.state.ended, held.best) != (job.state.ended, job.best)
        if (former is not snapshots and points != (former.restore_points() if former else [])) or (ends and points):
            found[job_id] = (job, snapshots)
    return found


class Archive:
    """Owns the store, a job's files below `directory`/jobs, and the manifests in each job's store."""

    def __init__(self, store: Store, directory: Path) -> None:
        self.store = store
        self.publisher = Publisher(lambda sha256: bundle_file(directory / "bundles", sha256))
        self._jobs = directory / "jobs"
        self._metrics: dict[str, MetricsFile] = {}
        self._logs: dict[tuple[str, str], ProcessLog] = {}
        self._cuts: dict[str, int] = {}  # stored rollbacks whose metrics could not be cut yet

    def directory(self, job_id: str) -> Path:
        """Where a job's metrics and logs are."""
        return self._jobs / job_id

    def logs_directory(self, job_id: str) -> Path:
        return self._jobs / job_id / "logs"

    def load(self, now: Instant) -> State:
        """What was there before. Metrics that were written but whose step was not stored are cut: they will be reported
        again. Raises DamagedError, before anything is changed, for a store that is older than the snapshots."""
        jobs = {job.job_id: job for job in self.store.jobs()}
        deleted = self.store.deletions()
        refuse_older(self._jobs.parent, jobs, deleted)
        for job in jobs.values():
            if job.state.live:
                self._metrics_of(job.job_id).cut(max(job.step, job.metrics_step))
        catalogues = {job_id: self._catalogue(job) for job_id, job in jobs.items()}
        # A kill may have come between the store and a manifest.
        self.publisher.publish({k: (job, catalogues[k]) for k, job in jobs.items() if catalogues[k].parts}, wait=False)
        for deletion in deleted.values():
            if not deletion.removed:
                self.publisher.remove(deletion, self.directory(deletion.job_id), wait=False)
        return State(
            jobs=jobs,
            catalogues=catalogues,
            events={job_id: self.store.events(job_id) for job_id in jobs},
            nodes=presumed(jobs, now),
            drains=self.store.drains(),
            deletions=deleted,
            access=self.store.access(),
        )

    def _catalogue(self, job: Job) -> Catalogue:
        parts = {(part.step, part.partition): part for part in self.store.parts(job.job_id)}
        return Catalogue(num_partitions=job.spec.servers.partitions, parts=parts)

    def save(self, writes: Writes) -> None:
        """Make a transaction durable. Raises StorageError; then it may be tried again."""
        lines = writes.changes.lines
        self._cut_pending()
        for job_id in dict.fromkeys(job_id for job_id, _ in lines):
            self._metrics_of(job_id).append(line for owner, line in lines if owner == job_id)
        for job_id, message in writes.logs:
            self._log_of(job_id, message.source).append(message)
        if not writes.batch.empty:
            self.store.write(writes.batch)
        self.publisher.publish(to_publish(writes.before, writes.changes.state))
        self._cuts |= writes.changes.cuts
        try:
            self._cut_pending()
        except StorageError as error:
            _log.error("metrics of a rolled back job cannot be cut yet", cause=error.cause)
        self._release(writes.changes.state.jobs)
        for job_id in writes.batch.deleted_jobs:
            # The record is gone already: the publisher reports a failure, and this or the next master tries again.
            self._cuts.pop(job_id, None)
            self.publisher.remove(writes.changes.state.deletions[job_id], self.directory(job_id))

    def _cut_pending(self) -> None:
        for job_id, step in list(self._cuts.items()):
            self._metrics_of(job_id).cut(step)
            del self._cuts[job_id]

    def _metrics_of(self, job_id: str) -> MetricsFile:
        if job_id not in self._metrics:
            self._metrics[job_id] = MetricsFile(self.directory(job_id))
        return self._metrics[job_id]

    def _log_of(self, job_id: str, source: str) -> ProcessLog:
        if (job_id, source) not in self._logs:
            self._logs[job_id, source] = ProcessLog(self.logs_directory(job_id) / f"{source}.log")
        return self._logs[job_id, source]

    def _release(self, jobs: Mapping[str, Job]) -> None:
        """Drop what is cached about the files of jobs that have ended or are gone."""
        live = {job_id for job_id, job in jobs.items() if not job.state.ended}
        self._metrics = {job_id: file for job_id, file in self._metrics.items() if job_id in live}
        self._logs = {key: file for key, file in self._logs.items() if key[0] in live}

    def close(self) -> None:
        """Release the store. Safe to repeat."""
        self.publisher.close()
        self.store.close()
