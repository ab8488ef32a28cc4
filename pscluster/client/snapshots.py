"""A job's snapshots: choosing one, and fetching its parts from nodes whose disk is not shared."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pscluster import rpc
from pscluster.client import calls
from pscluster.client.records import Snapshot, SnapshotPart
from pscluster.errors import NotFoundError, PsError
from pscluster.storage import Written
from pscluster.storage.directory import Incoming
from pscluster.v1 import depot_pb2, depot_pb2_grpc, plan_pb2


def choose(snapshots: list[Snapshot], which: int | str, job: str) -> Snapshot:
    """Choose by "last", "best" or step. Raises NotFoundError naming the existing steps."""
    for snapshot in reversed(snapshots):
        if which in ("last", snapshot.step) or (which == "best" and snapshot.best):
            return snapshot
    wanted = {"last": "yet", "best": "of its best step yet"}.get(str(which), f"of step {which}")
    steps = ", ".join(f"{s.step} (best)" if s.best else str(s.step) for s in snapshots)
    none = "one is written every durability.every_steps and at the end"
    raise NotFoundError(f"{job} has no complete snapshot {wanted}", action=f"there are: {steps}" if steps else none)


def fetch(depots: Mapping[str, str], token: str, job_id: str, part: SnapshotPart, directory: Path) -> Path:
    """Write the part into `directory`, complete and verified, from any node that has it. Blocks.

    `depots`: the addresses of nodes, by name. Raises NotFoundError when no node delivers it."""
    why = "none of them is connected"
    for address in (depots[node_id] for node_id in part.nodes if depots.get(node_id)):
        try:
            return _fetch(address, token, job_id, part, directory)
        except PsError as error:
            why = str(error)
    raise NotFoundError(
        f"{part.path} of {job_id} is on {', '.join(part.nodes)}: {why}", action="start one of these servers"
    )


def _fetch(address: str, token: str, job_id: str, part: SnapshotPart, directory: Path) -> Path:
    wanted = plan_pb2.SnapshotPart(path=part.path, size_bytes=part.size_bytes, checksum=part.checksum)
    incoming = Incoming(directory, part.path)
    try:
        with rpc.open_channel(address, token) as channel:
            stub: Any = depot_pb2_grpc.DepotStub(channel)  # type: ignore[no-untyped-call]
            request = depot_pb2.GetPartRequest(job_id=job_id, part=wanted)
            for chunk in calls.stream(stub.GetPart, request, server=f"the depot at {address}"):
                incoming.add(chunk.data)
        incoming.commit(Written(name=part.path, size_bytes=part.size_bytes, checksum=part.checksum))
    finally:
        incoming.abort()
    return directory / part.path
