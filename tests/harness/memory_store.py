"""A store that forgets with the process: for tests and simulations."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

from pscluster.errors import StateError
from psmaster.model.access import AccessRecords
from psmaster.model.job import MAX_EVENTS, VOLATILE, Event, Job
from psmaster.model.plan import Part
from psmaster.model.state import Changes, Deletion, Deletions
from psmaster.storage.persistence import Archive, Writes
from psmaster.storage.store import Batch, BundleRecord, Store

T = TypeVar("T")


class MemoryStore(Store):
    """Keeps what a durable store would keep, and drops what it would drop."""

    def __init__(self) -> None:
        self._jobs: dict[str, Job] = {}
        self._events: dict[str, list[Event]] = {}
        self._parts: dict[tuple[str, int, int], Part] = {}
        self._bundles: dict[str, BundleRecord] = {}
        self._drains: dict[str, float] = {}
        self._deletions: dict[str, Deletion] = {}
        self._access = AccessRecords()

    def write(self, batch: Batch) -> None:
        self._refuse_conflicts(batch)
        for job in batch.jobs:
            self._jobs[job.job_id] = replace(job, **_FORGOTTEN)
        for job_id, event in batch.events:
            self._events.setdefault(job_id, []).append(event)
            del self._events[job_id][:-MAX_EVENTS]
        for key in batch.dropped_parts:
            self._parts.pop(key, None)
        for job_id, part in batch.parts:
            self._parts[job_id, part.step, part.partition] = part
        self._bundles |= {bundle.sha256: bundle for bundle in batch.bundles}
        for sha256 in batch.deleted_bundles:
            self._bundles.pop(sha256, None)
        self._drains |= dict(batch.drained)
        for node_id in batch.undrained:
            self._drains.pop(node_id, None)
        self._deletions |= {one.job_id: one for one in batch.deletions}
        for job_id in batch.forgotten_deletions:
            self._deletions.pop(job_id, None)
        self._access = AccessRecords(
            tokens=_updated(self._access.tokens, {one.digest: one for one in batch.tokens}, batch.dropped_tokens),
            certificates=_updated(
                self._access.certificates, {one.serial: one for one in batch.certificates}, batch.dropped_certificates
            ),
        )
        for job_id in batch.deleted_jobs:
            self._jobs.pop(job_id, None)
            self._events.pop(job_id, None)
            self._parts = {key: part for key, part in self._parts.items() if key[0] != job_id}

    def _refuse_conflicts(self, batch: Batch) -> None:
        for job in batch.jobs:
            for held in self._jobs.values():
                if job.request_id and held.request_id == job.request_id and held.job_id != job.job_id:
                    raise StateError(f"request {job.request_id} has created job {held.job_id} already")

    def jobs(self) -> tuple[Job, ...]:
        return tuple(sorted(self._jobs.values(), key=lambda job: (job.created_s, job.job_id)))

    def events(self, job_id: str) -> tuple[Event, ...]:
        return tuple(self._events.get(job_id, ()))

    def parts(self, job_id: str) -> tuple[Part, ...]:
        return tuple(part for key, part in sorted(self._parts.items()) if key[0] == job_id)

    def bundles(self) -> tuple[BundleRecord, ...]:
        return tuple(record for _, record in sorted(self._bundles.items()))

    def drains(self) -> Mapping[str, float]:
        return dict(self._drains)

    def deletions(self) -> Deletions:
        ordered = sorted(self._deletions.values(), key=lambda one: (one.deleted_s, one.job_id))
        return {one.job_id: one for one in ordered}

    def access(self) -> AccessRecords:
        tokens = sorted(self._access.tokens.values(), key=lambda one: (one.created_s, one.digest))
        certificates = sorted(self._access.certificates.values(), key=lambda one: (one.issued_s, one.serial))
        return AccessRecords(
            tokens={one.digest: one for one in tokens}, certificates={one.serial: one for one in certificates}
        )

    def close(self) -> None:
        """Nothing is held."""


def _updated(held: Mapping[str, T], new: Mapping[str, T], dropped: Iterable[str]) -> dict[str, T]:
    gone = set(dropped)
    return {key: one for key, one in {**held, **new}.items() if key not in gone}


class MemoryArchive(Archive):
    """A store alone, without files. `written`: the newest changes that had something to write."""

    def __init__(self, store: MemoryStore) -> None:
        self.store = store
        self.publisher = _NoManifests()  # type: ignore[assignment]
        self.written: Changes | None = None
        self._jobs = Path("/nonexistent/jobs")
        self._metrics = {}

    def save(self, writes: Writes) -> None:
        self.store.write(writes.batch)
        self.written = writes.changes


class _NoManifests:
    """Stands in for the publisher of manifests."""

    def publish(self, jobs: object, *, wait: bool = True) -> None:
        """There is nowhere to publish them."""

    def remove(self, deletion: object, directory: object, *, wait: bool = True) -> None:
        """There is nothing to remove."""


_FORGOTTEN: Mapping[str, Any] = {name: Job.__dataclass_fields__[name].default for name in VOLATILE}
