"""What follows from a spec before the job runs: shards, microbatches a worker, snapshots, evaluations. Pure."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from pscluster.cli import formatting as fmt

if TYPE_CHECKING:
    from pscluster.job.bundle import Bundle
    from pscluster.job.spec import JobSpec

_MOST_ROWS = 16


def calculate(spec: JobSpec, bundle: Bundle | None, *, evaluates: bool = True) -> dict[str, Any]:
    """The arithmetic as plain data; `text` formats it. `evaluates`: the task may have evaluation data."""
    train, steps = spec.train, spec.train.max_steps
    found: dict[str, Any] = {
        "name": spec.name,
        "entrypoint": spec.task.entrypoint,
        "num_shards": train.num_shards,
        "microbatch": train.microbatch,
        "global_batch": train.global_batch,
        "max_steps": steps,
        "epochs": train.epochs,
        "samples": steps * train.global_batch if steps is not None else None,
        "partitions": spec.servers.partitions,
        "standbys": spec.servers.partitions if spec.durability.tier == "replica" else 0,
        "workers": [_split(train.num_shards, workers) for workers in _worker_counts(spec)],
        "snapshot_every_steps": spec.durability.every_steps,
        "snapshots": steps // spec.durability.every_steps if steps is not None else None,
        "evaluates": evaluates,
        "evaluate_every_steps": spec.evaluate.every_steps,
        "bundle": None,
        "spec": spec.model_dump(mode="json"),
    }
    if bundle is not None:
        sizes = {"files": len(bundle.files), "size_bytes": len(bundle.data), "sha256": bundle.sha256}
        found["bundle"] = sizes
    return found


def _worker_counts(spec: JobSpec) -> list[int]:
    """The worker counts that get a row: from min to max, at most one for each shard, many thinned to powers of two."""
    low, high = spec.workers.min, min(spec.workers.max or spec.train.num_shards, spec.train.num_shards)
    counts = list(range(low, high + 1))
    if len(counts) > _MOST_ROWS:
        counts = sorted({low, high, *(2**n for n in range(high.bit_length()) if low <= 2**n <= high)})
    return counts


def _split(shards: int, workers: int) -> dict[str, Any]:
    most, fewest = -(-shards // workers), shards // workers
    return {
        "workers": workers,
        "microbatches_most": most,
        "microbatches_fewest": fewest,
        "balance": round(shards / (workers * most), 4),
    }


def text(found: dict[str, Any]) -> str:
    """The arithmetic for people."""
    batch, micro, shards = found["global_batch"], found["microbatch"], found["num_shards"]
    lines = [
        f"{found['name']}: {found['entrypoint']}",
        f"a step: {shards} shards x {micro} samples = global batch {batch}",
        _length(found),
        f"parameters over {found['partitions']} partition{'s' if found['partitions'] > 1 else ''}"
        + (", each with a standby on another server" if found["standbys"] else "")
        + "; snapshots every "
        f"{found['snapshot_every_steps']} steps" + (f" ({found['snapshots']})" if found["snapshots"] else ""),
        _evaluation(found),
        _code(found["bundle"]),
        "",
        fmt.table(("WORKERS", "MICROBATCHES EACH", "BUSY"), [_row(row) for row in found["workers"]]),
    ]
    return "\n".join(lines)


def _length(found: dict[str, Any]) -> str:
    parts = []
    if found["max_steps"]:
        parts.append(f"{found['max_steps']} steps ({found['samples']:,} samples)")
    if found["epochs"]:
        parts.append(f"{found['epochs']} epochs (steps are known once the data is loaded)")
    return "length: " + ", or ".join(parts) + (", whichever ends first" if len(parts) > 1 else "")


def _evaluation(found: dict[str, Any]) -> str:
    if not found["evaluates"]:
        return "no evaluation: the task has no eval_data"
    every = found["evaluate_every_steps"]
    return f"evaluation every {every} steps and at the end" if every else "evaluation at the end"


def _code(bundle: dict[str, Any] | None) -> str:
    if bundle is None:
        return "code: built in, nothing to upload"
    return f"code: {bundle['files']} files, {fmt.size(bundle['size_bytes'])} packed, sha256 {bundle['sha256'][:12]}"


def _row(row: dict[str, Any]) -> list[str]:
    most, fewest = row["microbatches_most"], row["microbatches_fewest"]
    each = str(most) if most == fewest else f"{fewest} or {most}"
    return [str(row["workers"]), each, f"{100 * row['balance']:.0f} %"]
