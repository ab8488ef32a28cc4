"""From the text of a spec that a client sent to a queued job."""

from __future__ import annotations

import base64
import json
import secrets
from collections.abc import Callable
from pathlib import Path

from pscluster.errors import SpecError
from pscluster.job.spec import JobSpec, parse_spec
from pscluster.storage import below
from psmaster.model.job import LOCAL_OWNER, Instant, Job


def new_job(
    spec_json: str,
    bundle_sha256: str,
    request_id: str,
    jobs_directory: Path,
    now: Instant,
    random_bytes: Callable[[int], bytes] = secrets.token_bytes,
    *,
    owner: str = LOCAL_OWNER,
    cluster_id: str = "",
) -> Job:
    """A queued job of a name of its own: "<spec's name>-<6 characters>". In a store that clusters may share, its files
    are below the cluster's id. Raises SpecError."""
    spec = read_spec(spec_json)
    suffix = base64.b32encode(random_bytes(4)).decode().lower()[:6]
    job_id = f"{spec.name}-{suffix}"
    directory, chosen = jobs_directory / job_id, spec.durability.store
    return Job(
        job_id=job_id,
        name=spec.name,
        spec=spec,
        created_s=now.unix_s,
        request_id=request_id or random_bytes(16).hex(),
        bundle_sha256=bundle_sha256,
        data_token=random_bytes(32),
        owner=owner,
        store=below(_of_cluster(chosen, cluster_id), job_id) if chosen is not None else str(directory / "snapshots"),
        directory=str(directory),
        reason="waits for its turn",
    )


def _of_cluster(store: str, cluster_id: str) -> str:
    return below(store, cluster_id) if cluster_id else store


def read_spec(spec_json: str) -> JobSpec:
    """The spec that a client sent. Raises SpecError."""
    try:
        data = json.loads(spec_json)
    except (ValueError, RecursionError) as error:
        raise SpecError(f"the spec is not JSON: {error}") from None
    return parse_spec(data)
