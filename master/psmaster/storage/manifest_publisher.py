"""Keeps the manifests in each job's store as its catalogue is: one for each complete snapshot, none for any other.

One thread, because a store may be far away, or full, or hang: the master waits for it a moment and continues. What
could not be written is reported and tried again. A job's code bundle is copied before its first manifest, so that no
manifest names what is not there.
"""

from __future__ import annotations

import contextlib
import re
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import structlog

from pscluster.errors import InternalError, PsError, StorageError
from pscluster.storage import SnapshotStore, open_store
from pscluster.storage.directory import DirectoryStore
from pscluster.wire.backoff import delay_s
from psmaster.model.job import Job
from psmaster.model.plan import RestorePoint
from psmaster.model.snapshot_catalog import Catalogue
from psmaster.model.state import Deletion
from psmaster.storage import manifest
from psmaster.storage.manifest import Manifest

PATIENCE_S = 5.0  # how long a transaction waits for its manifests
RETRY_S = 5.0
MAX_RETRY_S = 600.0  # of a removal, which is not urgent: a store that hangs must not delay other writes
_CLUSTER = re.compile(r"[0-9a-f]{16}")  # the id of a cluster: the directory of its jobs in a shared store
_log = structlog.get_logger(__name__)

_Held = dict[str, tuple[RestorePoint, int] | None]
"""By name: what this process wrote, and under which revision of the job; None: an earlier one did."""


@dataclass(kw_only=True)
class _ManifestRequest:
    """How a job's store should look. `job` None: it should be gone, if it is named, and `directory` with it."""

    store: str
    job: Job | None
    catalogue: Catalogue | None = None
    directory: Path | None = None
    retry_at_s: float = 0.0
    reported: str = ""  # the cause that was reported last
    failures: int = 0
    done: threading.Event = field(default_factory=threading.Event)


class Publisher:
    """It calls `report_error` (job id, step, why) and `report_removed` (job id) on its own thread."""

    def __init__(self, bundle_file: Callable[[str], Path], patience_s: float = PATIENCE_S) -> None:
        self.report_error: Callable[[str, int, PsError], None] = lambda *_: None
        self.report_removed: Callable[[str], None] = lambda _: None
        self._bundle_file = bundle_file
        self._patience_s = patience_s
        self._changed = threading.Condition()
        self._requests: dict[str, _ManifestRequest] = {}  # the newest of each job
        self._published: dict[str, _Held] = {}  # by job: which files there are
        self._closing = False
        self._thread = threading.Thread(target=self._run, name="manifests", daemon=True)
        self._thread.start()

    def publish(self, jobs: Mapping[str, tuple[Job, Catalogue]], *, wait: bool = True) -> None:
        """Bring these jobs' manifests up to date. Blocks until they are, or patience is at an end; or not at all."""
        found = {k: _ManifestRequest(store=job.store, job=job, catalogue=held) for k, (job, held) in jobs.items()}
        self._request(found, wait=wait)

    def remove(self, deletion: Deletion, directory: Path, *, wait: bool = True) -> None:
        """Remove a deleted job's `directory` and, unless that was done, its store. Blocks as `publish` does."""
        store = "" if deletion.removed else deletion.store
        # What an earlier master left undone comes after the manifests that jobs are waiting for.
        due_s = 0.0 if wait else time.monotonic()
        request = _ManifestRequest(store=store, job=None, directory=directory, retry_at_s=due_s)
        self._request({deletion.job_id: request}, wait=wait)

    def close(self) -> None:
        """End after what is being written. Safe to repeat."""
        with self._changed:
            self._closing = True
            self._changed.notify()
        self._thread.join(self._patience_s)

    def _request(self, requests: dict[str, _ManifestRequest], *, wait: bool = True) -> None:
        with self._changed:
            self._requests |= requests
            self._changed.notify()
        until = time.monotonic() + self._patience_s
        for job_id, request in requests.items() if wait else ():
            if not request.done.wait(max(0.0, until - time.monotonic())):
                _log.warning("a job's store is slow", job=job_id, store=request.store)

    def _run(self) -> None:
        while (found := self._next()) is not None:
            job_id, request = found
            try:
                self._carry_out(job_id, request)
                error: PsError | None = None
            except PsError as failure:
                error = failure
            except Exception as failure:  # this thread must live: without it no snapshot is findable
                error = InternalError(f"publishing the snapshots of {job_id} failed: {failure!r}")
            self._settle(job_id, request, error)

    def _next(self) -> tuple[str, _ManifestRequest] | None:
        with self._changed:
            while not self._closing:
                now = time.monotonic()
                due = [(request.retry_at_s, job_id) for job_id, request in self._requests.items()]
                if due and min(due)[0] <= now:
                    return min(due)[1], self._requests[min(due)[1]]
                self._changed.wait(min(due)[0] - now if due else None)
        return None

    def _settle(self, job_id: str, request: _ManifestRequest, error: PsError | None) -> None:
        with self._changed:
            if error is None and self._requests.get(job_id) is request:
                del self._requests[job_id]
        if error is None and request.job is None:
            self.report_removed(job_id)
        if error is not None:
            request.retry_at_s = time.monotonic() + _pause_s(request)
            request.failures += 1
            newest = request.catalogue.newest() if request.catalogue else None
            if request.reported != error.cause:
                request.reported = error.cause
                self.report_error(job_id, newest.step if newest else 0, error)
        request.done.set()

    def _carry_out(self, job_id: str, request: _ManifestRequest) -> None:
        if request.job is None:
            self._published.pop(job_id, None)
            _remove(request)
            return
        store = open_store(request.store)
        points = request.catalogue.restore_points() if request.catalogue else []
        held = self._published.get(job_id)
        if held is None:  # the first time since this process started: an earlier one may have left others
            held = self._published[job_id] = {n: None for n in store.names() if manifest.step_of(n) is not None}
        if points:
            self._copy_bundle(store, request.job.bundle_sha256, held)
        for point in points:
            name, current = manifest.manifest_name(point.step), (point, request.job.revision)
            known = held.get(name)
            # Only the newest follows what becomes of the job: its end, its best step.
            if known is None or known[0] != point or (point is points[-1] and known != current):
                store.write(name, [manifest.encode(Manifest(job=request.job, point=point))])
                held[name] = current
        wanted = {manifest.manifest_name(point.step) for point in points}
        for name in [name for name in held if name not in wanted and manifest.step_of(name) is not None]:
            store.delete(name)
            del held[name]

    def _copy_bundle(self, store: SnapshotStore, sha256: str, held: _Held) -> None:
        name = manifest.bundle_name(sha256)
        if not sha256 or name in held:
            return
        if name not in store.names():
            try:
                data = self._bundle_file(sha256).read_bytes()
            except OSError as error:
                raise StorageError(f"cannot read the bundle {sha256[:12]}: {error.strerror}") from None
            store.write(name, [data])
        held[name] = None


def _pause_s(request: _ManifestRequest) -> float:
    cap_s = MAX_RETRY_S if request.job is None else RETRY_S
    return delay_s(request.failures + 1, 0.0, first_s=RETRY_S, cap_s=cap_s, jitter=0.0)


def _remove(request: _ManifestRequest) -> None:
    """The directory first: it can be reached. Raises StorageError when the store cannot: what is not mounted here looks
    as if it had been removed."""
    if request.directory is not None:
        DirectoryStore(request.directory).remove()
        if Path(request.store).is_relative_to(request.directory):
            return
    if not request.store:
        return
    root = Path(request.store.removeprefix("file://")).parent
    if _CLUSTER.fullmatch(root.name) and not root.exists():  # nothing of this cluster is there: is the store itself?
        root = root.parent
    if not request.store.startswith("s3://") and not root.is_dir():
        what = f"cannot remove {request.store}: there is no directory {root}"
        raise StorageError(what, action="mount it where psmaster runs")
    open_store(request.store).remove()
    if _CLUSTER.fullmatch(root.name) and not request.store.startswith("s3://"):
        with contextlib.suppress(OSError):  # another job of the cluster is there
            root.rmdir()
