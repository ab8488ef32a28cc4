"""The Depot service of a server node: fetches copies of snapshot parts from other nodes on request, and serves them.

A copy is not pushed: when a server ends a call to which the client still writes, grpc.aio may lose the status; and a
part that is refused is not transferred in vain."""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import grpc

from pscluster.errors import AddressInUseError, DamagedError, FrameError, NotFoundError, StateError, StorageError
from pscluster.rpc import EXPOSED_OPTIONS, Access, error_of, open_aio_channel
from pscluster.rpc.server import (
    CertificateInterceptor,
    ErrorInterceptor,
    Revocations,
    TokenInterceptor,
    server_credentials,
)
from pscluster.security.identity import Role
from pscluster.storage import Written
from pscluster.storage.directory import DirectoryStore, Incoming
from pscluster.storage.snapshot import parse_part_name, verify_file
from pscluster.v1 import depot_pb2, depot_pb2_grpc
from pscluster.v1.plan_pb2 import SnapshotPart

CHUNK_BYTES = 1 << 20
MIN_DEADLINE_S = 30.0
SLOWEST_BYTES_PER_S = 4 << 20  # a slower transfer exceeds its deadline
_STOP_GRACE_S = 0.5
_JOB = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")


class DepotService(depot_pb2_grpc.DepotServicer):
    """Keeps files in `directory`/JOB, beside those of this node's partitions. A transfer holds one chunk in memory."""

    def __init__(self, directory: Path, access: Access) -> None:
        self._directory = directory
        self._access = access
        self._arriving: set[tuple[str, str]] = set()

    async def TakePart(  # noqa: N802
        self,
        request: depot_pb2.TakePartRequest,
        context: Any,  # noqa: ARG002
    ) -> depot_pb2.TakePartReply:
        job, name = job_directory(self._directory, request.job_id), written_of(request.part).name
        key = (request.job_id, name)
        if key in self._arriving:
            raise StateError(f"{name} is being transferred already", action="try again in a moment")
        self._arriving.add(key)
        try:
            await asyncio.to_thread(tidy, job, request.part.partition, list(request.kept_steps))
            await get(request.source, self._access, request.job_id, request.part, job)
        finally:
            self._arriving.discard(key)
        return depot_pb2.TakePartReply()

    async def GetPart(  # noqa: N802
        self,
        request: depot_pb2.GetPartRequest,
        context: Any,  # noqa: ARG002
    ) -> AsyncIterator[depot_pb2.PartChunk]:
        path = job_directory(self._directory, request.job_id) / written_of(request.part).name
        if not await asyncio.to_thread(path.is_file):
            raise NotFoundError(f"{path.name} of {request.job_id} is not here")
        async for data in _chunks(path):
            yield depot_pb2.PartChunk(data=data)


@asynccontextmanager
async def serving(
    directory: Path, choices: Sequence[str], access: Access, revocations: Revocations
) -> AsyncIterator[str]:
    """Serve the depot of `directory` while the context lasts, at the first of these addresses that is free, which it
    yields. With a certificate only TLS is served, to members whose role allows it and that are not revoked; without
    one, holders of the token. Raises AddressInUseError."""
    admission: grpc.aio.ServerInterceptor = TokenInterceptor(access.token)
    if access.source is not None:
        admission = CertificateInterceptor(access.source.get().identity.cluster_id, revocations)
    server = grpc.aio.server(interceptors=[ErrorInterceptor(), admission], options=EXPOSED_OPTIONS)
    depot_pb2_grpc.add_DepotServicer_to_server(DepotService(directory, access), server)  # type: ignore[no-untyped-call]
    address = _bind(server, choices, access)
    await server.start()
    try:
        yield address
    finally:
        await server.stop(_STOP_GRACE_S)


def _bind(server: grpc.aio.Server, choices: Sequence[str], access: Access) -> str:
    for listen in choices:
        try:
            if access.source is None:
                port = server.add_insecure_port(listen)
            else:
                port = server.add_secure_port(listen, server_credentials(access.source))
        except RuntimeError:
            continue  # grpc does not say why; the others are tried
        return f"{listen.rpartition(':')[0]}:{port}"
    raise AddressInUseError(f"cannot listen on {' or '.join(choices[:3])}: it is taken, or no address of this machine")


async def give(address: str, access: Access, request: depot_pb2.TakePartRequest) -> None:
    """Have the depot at `address` fetch a copy of a part; it is durable there on return. Raises PsError."""
    async with _connected(address, access) as stub:
        await stub.TakePart(request, timeout=_deadline_s(request.part))


async def get(address: str, access: Access, job_id: str, part: SnapshotPart, directory: Path) -> None:
    """Copy a part from another node into `directory`, complete and verified. Raises PsError."""
    async with _connected(address, access) as stub:
        call = stub.GetPart(depot_pb2.GetPartRequest(job_id=job_id, part=part), timeout=_deadline_s(part))
        await _receive(directory, written_of(part), (chunk.data async for chunk in call))


@asynccontextmanager
async def _connected(address: str, access: Access) -> AsyncIterator[Any]:
    async with open_aio_channel(address, access, Role.SERVER) as channel:
        try:
            yield depot_pb2_grpc.DepotStub(channel)  # type: ignore[no-untyped-call]
        except grpc.RpcError as failure:
            raise error_of(failure, f"the depot at {address}") from None


def is_sound(directory: Path, part: SnapshotPart) -> bool:
    """Whether the directory holds the complete part. Blocks. Raises StorageError when it cannot be read."""
    try:
        verify_file(DirectoryStore(directory), part.path, part.size_bytes, part.checksum)
    except DamagedError:
        return False
    except StorageError:
        if directory.is_dir():
            raise
        return False
    return True


def is_job(text: str) -> bool:
    """Whether a text is a valid job id, and so safe as the name of a directory."""
    return _JOB.fullmatch(text) is not None


def job_directory(directory: Path, job_id: str) -> Path:
    """Where a job's parts are kept. Raises FrameError for an invalid job id."""
    if not is_job(job_id):
        raise FrameError(f"{job_id[:80]!r} is not a job id", details={"field": "job_id"})
    return directory / job_id


def written_of(part: SnapshotPart) -> Written:
    """The file of a part. Raises FrameError for another name, which could be any path."""
    if parse_part_name(part.path) is None:
        raise FrameError(f"{part.path[:80]!r} is not the name of a part", details={"field": "path"})
    return Written(name=part.path, size_bytes=part.size_bytes, checksum=part.checksum)


def tidy(job: Path, partition: int, kept_steps: list[int]) -> None:
    """Delete copies of a partition's parts that are older than the newest kept step and not kept. Blocks."""
    store = DirectoryStore(job)
    for name in store.names() if kept_steps else ():
        part = parse_part_name(name)
        if part and part.partition == partition and part.step < max(kept_steps) and part.step not in kept_steps:
            store.delete(name)


async def _receive(directory: Path, expected: Written, chunks: AsyncIterator[bytes]) -> None:
    incoming = await asyncio.to_thread(Incoming, directory, expected.name)
    try:
        size = 0
        async for data in chunks:
            size += len(data)
            if size > expected.size_bytes:
                raise FrameError(f"{expected.name} is longer than announced", details={"field": "size_bytes"})
            await asyncio.to_thread(incoming.add, data)
        await asyncio.to_thread(incoming.commit, expected)
    finally:
        await asyncio.to_thread(incoming.abort)


async def _chunks(path: Path) -> AsyncIterator[bytes]:
    try:
        with await asyncio.to_thread(path.open, "rb") as file:
            while data := await asyncio.to_thread(file.read, CHUNK_BYTES):
                yield data
    except OSError as error:
        raise StorageError(f"cannot read {path}: {error.strerror}") from None


def _deadline_s(part: SnapshotPart) -> float:
    return MIN_DEADLINE_S + part.size_bytes / SLOWEST_BYTES_PER_S
