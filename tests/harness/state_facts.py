"""The facts of a job that a client reads: recorded with a state fixture, compared by its test."""

from __future__ import annotations

from typing import Any

from pscluster.client import Cluster


def facts_of(client: Cluster, job_id: str) -> dict[str, Any]:
    """The stored facts of one job, as plain JSON. Without a running cluster only events of live jobs change."""
    job = client.job(job_id)
    snapshots = client.snapshots(job_id)
    lines = list(client.metrics(job_id))
    error = job.error
    return {
        "job_id": job.job_id,
        "name": job.name,
        "state": job.state,
        "created_s": job.created_s,
        "started_s": job.started_s,
        "ended_s": job.ended_s,
        "step": job.step,
        "final_step": job.final_step,
        "loss": job.loss,
        "generation": job.generation,
        "numerics": job.numerics,
        "parameters_sha256": job.parameters_sha256,
        "metrics": job.metrics,
        "metrics_step": job.metrics_step,
        "best": {"step": job.best.step, "value": job.best.value} if job.best else None,
        "error": {"code": error.code, "cause": error.cause, "details": dict(error.details)} if error else None,
        "traceback": job.traceback.splitlines()[-1:],
        "bundle_sha256": job.bundle_sha256,
        "store": job.store,
        "directory": job.directory,
        "spec": job.spec,
        "checks": [[check.node_id, check.name, check.ok] for check in job.checks],
        "events": [[event.reason, event.warning, event.message] for event in job.events],
        "num_snapshots": len(snapshots),
        "kept_steps": [one.step for one in snapshots],
        "best_snapshots": [one.step for one in snapshots if one.best],
        "parts": [[one.step, part.partition, part.path, part.checksum] for one in snapshots for part in one.parts],
        "standbys": [placement.index for placement in job.plan.partitions if placement.standby] if job.plan else [],
        "steps": [[line["step"], line["loss"]] for line in lines if "grad_norm" in line],
        "evaluated": [line["step"] for line in lines if "grad_norm" not in line],
        "num_log_lines": sum(1 for _ in client.logs(job_id)),
    }
