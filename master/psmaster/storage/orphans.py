"""Whether files that the database does not know are orphans, or the database is older than the snapshots.

A master removes what its database does not know. So it must not work with one that is gone, or older than the snapshots
beside it. A manifest is written after the transaction that it follows from, under that revision of its job; one of a
later revision, or of a job that was neither there nor deleted, proves that the database has been further than it is."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import structlog

from pscluster.errors import DamagedError, PsError
from pscluster.storage.directory import DirectoryStore
from psmaster.model.job import Job
from psmaster.model.state import Deletions
from psmaster.storage import manifest
from psmaster.storage.manifest import Manifest
from psmaster.storage.sqlite import DATABASE

NUM_READ = 2  # the newest manifests of a job: only the last one follows what becomes of it
_MANIFESTS = "snapshots/step-*.manifest"
_log = structlog.get_logger(__name__)


def refuse_unclaimed(state_dir: Path) -> None:
    """Raises DamagedError when there are snapshots of jobs but no database: starting there would remove them."""
    database = state_dir / DATABASE
    jobs = sorted({path.parts[-3] for path in state_dir.glob(f"jobs/*/{_MANIFESTS}")})
    if jobs and not (database.exists() and database.stat().st_size):
        raise DamagedError(
            f"{database} is gone, but there are snapshots of {', '.join(jobs)}",
            action="run `psmaster rebuild`, which brings these jobs back; or move jobs/ away to begin anew",
        )


def refuse_older(state_dir: Path, jobs: Mapping[str, Job], deletions: Deletions) -> None:
    """Raises DamagedError when a manifest in `state_dir` is newer than the database, which has `jobs` and `deletions`.
    Reads two small files of each job. What cannot be read is warned of and proves nothing."""
    newer = [
        directory.parent.name
        for directory in sorted(state_dir.glob("jobs/*/snapshots"))
        if _tells_more(directory, jobs.get(directory.parent.name), directory.parent.name in deletions)
    ]
    if newer:
        raise DamagedError(
            f"{state_dir / DATABASE} is older than its snapshots of {', '.join(newer)}",
            action="move it away and run `psmaster rebuild`, which brings jobs back as their snapshots tell; or put a "
            "newer one there; of a job that is not to come back, move its directory below jobs/ away",
        )


def may_go(directory: Path, jobs: Mapping[str, Job], deletions: Deletions) -> bool:
    """Whether the directory of a job is not needed: it was deleted, and the publisher is done; or it is unknown and has
    no manifest, sound or not."""
    if directory.name in jobs:
        return False
    if directory.name in deletions:
        return deletions[directory.name].removed
    return not any(directory.glob(_MANIFESTS))


def _tells_more(directory: Path, job: Job | None, deleted: bool) -> bool:
    if deleted:
        return False
    if job is not None and Path(job.store).resolve() != directory.resolve():
        return False  # it was rebuilt from a copy elsewhere: what is here is not its own any more
    known = -1 if job is None else job.revision
    return any(one.job.revision > known for one in _newest(directory))


def _newest(directory: Path) -> list[Manifest]:
    store, found = DirectoryStore(directory), []
    try:
        steps = sorted(step for name in store.names() if (step := manifest.step_of(name)) is not None)
    except PsError as error:
        _log.warning("a job's snapshots cannot be listed", code=error.code, cause=error.cause)
        return []
    for step in steps[-NUM_READ:]:
        try:
            found.append(manifest.read(store, manifest.manifest_name(step)))
        except PsError as error:
            _log.warning("a manifest cannot be read", code=error.code, cause=error.cause)
    return found
