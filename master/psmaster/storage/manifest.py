"""The manifest of a complete snapshot: what makes it findable without the master's database.

    PSMANIFEST 1 crc32c:<8 hex digits over the rest>
    {"step", "parts", "job": what is known of the job but for who runs it, "layout"}

It lies beside its parts. Secrets are not in it: a rebuilt job gets a new data token.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, replace

import crc32c

from pscluster.errors import DamagedError
from pscluster.storage import SnapshotStore
from psmaster.model.job import VOLATILE, Job
from psmaster.model.plan import Part, RestorePoint
from psmaster.storage import records

_HEAD = b"PSMANIFEST 1 crc32c:"
_NAME = re.compile(r"^step-(\d{10,})\.manifest$")
# What runs a job and what it waits for ended with the database; the layout stands beside the record.
_LEFT_OUT = VOLATILE | {
    "data_token", "trainers", "partitions", "excluded", "plan", "checks", "connections", "conditions", "finished",
    "stopping", "layout_json",
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """One complete snapshot, and the job as it was when this was written."""

    job: Job
    point: RestorePoint


def manifest_name(step: int) -> str:
    return f"step-{step:010d}.manifest"


def step_of(name: str) -> int | None:
    """The step of a manifest's file name; None for another file."""
    match = _NAME.match(name)
    return int(match[1]) if match else None


def bundle_name(sha256: str) -> str:
    """The file of a job's code bundle, beside its manifests."""
    return f"bundle-{sha256}.tar.gz"


def encode(manifest: Manifest) -> bytes:
    """The file. Equal manifests give equal bytes."""
    data = {
        "step": manifest.point.step,
        "parts": [records.plain(part) for part in manifest.point.parts],
        "job": records.plain(manifest.job, _LEFT_OUT),
        "layout": manifest.job.layout_json.decode(),
    }
    body = json.dumps(data, separators=(",", ":")).encode()
    return _HEAD + f"{crc32c.crc32c(body):08x}\n".encode() + body + b"\n"


def read(store: SnapshotStore, name: str) -> Manifest:
    """The manifest in a file of a store. Blocks. Raises what `decode` raises; StorageError when it cannot be read."""
    with store.reading(name) as file:
        data = file.read()
    return decode(data, f"{store.location}/{name}")


def decode(data: bytes, where: str) -> Manifest:
    """What a file says. Raises DamagedError, naming `where`, for anything that `encode` did not make."""
    head, _, body = data.partition(b"\n")
    body = body.removesuffix(b"\n")
    if head != _HEAD + f"{crc32c.crc32c(body):08x}".encode():
        raise DamagedError(f"{where} is no manifest, or is torn")
    try:
        found = json.loads(body)
        job = replace(records.typed(Job, found["job"]), layout_json=found["layout"].encode())
        parts = tuple(records.typed(Part, part) for part in found["parts"])
        step = int(found["step"])
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise DamagedError(f"{where} cannot be read: {error!r}") from None
    wanted = [(step, index) for index in range(job.spec.servers.partitions)]
    if [(part.step, part.partition) for part in parts] != wanted:
        raise DamagedError(f"{where} does not name one part of step {step} for each partition")
    return Manifest(job=job, point=RestorePoint(step=step, parts=parts))
