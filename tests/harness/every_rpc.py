"""Every method of every service of ours, called with nothing: who is let in, and who is not."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import grpc

from pscluster.errors import PsError
from pscluster.rpc import error_of
from pscluster.v1 import access_pb2, agents_pb2, depot_pb2, jobs_pb2, plan_pb2

DEADLINE_S = 20.0
_FILES = (access_pb2, agents_pb2, depot_pb2, jobs_pb2, plan_pb2)


@dataclass(frozen=True)
class Method:
    """`path` as on the wire, "/pscluster.v1.Jobs/Get"."""

    path: str
    sends_stream: bool
    receives_stream: bool

    @property
    def service(self) -> str:
        return self.path.rpartition("/")[0].rpartition(".")[2]


METHODS = tuple(
    Method(f"/{service.full_name}/{method.name}", method.client_streaming, method.server_streaming)
    for file in _FILES
    for service in file.DESCRIPTOR.services_by_name.values()
    for method in service.methods
)


async def call(channel: Any, method: Method) -> PsError | None:
    """The error that a call with empty messages ends with; None when it is answered."""
    kind = f"{'stream' if method.sends_stream else 'unary'}_{'stream' if method.receives_stream else 'unary'}"
    request: Any = _nothing() if method.sends_stream else b""
    answer = getattr(channel, kind)(method.path)(request, timeout=DEADLINE_S)
    try:
        if method.receives_stream:
            async for _ in answer:
                return None
        else:
            await answer
    except grpc.RpcError as error:
        return error_of(error)
    except asyncio.CancelledError:
        task = asyncio.current_task()
        if task is not None and task.cancelling():
            raise
        # A call that could not send its stream is cancelled by grpc.aio itself.
        nothing = grpc.aio.Metadata()
        return error_of(grpc.aio.AioRpcError(await answer.code(), nothing, nothing, await answer.details()))
    return None


def _nothing() -> Iterator[bytes]:
    return iter(())
