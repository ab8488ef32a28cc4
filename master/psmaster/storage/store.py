"""The durable state of the master, behind one interface. Every store passes `tests/contract/test_store.py`.

A `Batch` is written as a whole or not at all, and is durable when `write` returns: only then may anything be
acknowledged or sent. Stores are used from one thread at a time; every method blocks on the disk.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass

from psmaster.model.access import AccessRecords, CertificateRecord, TokenRecord
from psmaster.model.job import Event, Job
from psmaster.model.plan import Part
from psmaster.model.state import Deletion, Deletions

SCHEMA_VERSION = 6


@dataclass(frozen=True, kw_only=True, slots=True)
class BundleRecord:
    """A stored bundle: its digest, length and the Unix time of its upload."""

    sha256: str
    size_bytes: int
    created_s: float


@dataclass(frozen=True, kw_only=True)
class Batch:
    """Changes that belong together. Jobs replace what was held under their id; parts what was held under their
    (job, step, partition); events are appended, and of each job the newest 200 are kept."""

    jobs: tuple[Job, ...] = ()
    events: tuple[tuple[str, Event], ...] = ()
    parts: tuple[tuple[str, Part], ...] = ()
    dropped_parts: tuple[tuple[str, int, int], ...] = ()  # (job id, step, partition)
    deleted_jobs: tuple[str, ...] = ()  # with all that is theirs
    bundles: tuple[BundleRecord, ...] = ()
    deleted_bundles: tuple[str, ...] = ()
    drained: tuple[tuple[str, float], ...] = ()  # (node id, Unix time of the request)
    undrained: tuple[str, ...] = ()
    deletions: tuple[Deletion, ...] = ()  # replace what was held under their job's id
    forgotten_deletions: tuple[str, ...] = ()
    tokens: tuple[TokenRecord, ...] = ()  # replace what was held under their digest
    dropped_tokens: tuple[str, ...] = ()  # digests
    certificates: tuple[CertificateRecord, ...] = ()  # replace what was held under their serial
    dropped_certificates: tuple[str, ...] = ()  # serials

    @property
    def empty(self) -> bool:
        return self == Batch()


class Store(ABC):
    """Jobs, their events and snapshot parts, which bundles there are, and who may be a member."""

    @abstractmethod
    def write(self, batch: Batch) -> None:
        """Apply `batch` durably. Raises StorageError, then nothing of it is written; StateError when a job brings a
        request id that another job has."""

    @abstractmethod
    def jobs(self) -> tuple[Job, ...]:
        """All jobs, oldest first."""

    @abstractmethod
    def events(self, job_id: str) -> tuple[Event, ...]:
        """A job's newest 200 events, oldest first."""

    @abstractmethod
    def parts(self, job_id: str) -> tuple[Part, ...]:
        """A job's snapshot parts, by step and partition."""

    @abstractmethod
    def bundles(self) -> tuple[BundleRecord, ...]:
        """All bundles, by digest."""

    @abstractmethod
    def drains(self) -> Mapping[str, float]:
        """The nodes that are drained, with the Unix time of the request."""

    @abstractmethod
    def deletions(self) -> Deletions:
        """The jobs that were deleted and are not forgotten yet, by id, in the order of their deletion."""

    @abstractmethod
    def access(self) -> AccessRecords:
        """The join tokens and certificates, oldest first."""

    @abstractmethod
    def close(self) -> None:
        """Release what is held. What was written stays. Safe to repeat."""
