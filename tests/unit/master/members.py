"""A secured master and its members, for tests: TLS on 127.0.0.1, join tokens, certificates."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

import grpc

from pscluster import rpc
from pscluster.rpc import Access, open_aio_channel
from pscluster.security.credentials import Credentials, CredentialSource
from pscluster.security.identity import Role
from pscluster.security.join_token import JoinToken
from pscluster.security.joining import join
from pscluster.v1 import access_pb2, access_pb2_grpc, jobs_pb2, jobs_pb2_grpc
from psmaster.control.loop import ControlLoop
from psmaster.server import MasterSettings
from tests.unit.master.fake_agent import DEADLINE_S
from tests.unit.master.test_service import LOCAL, master, run


@dataclass
class Members:
    """Who has joined a master, and how; `local` holds the token of its Unix socket."""

    core: ControlLoop
    local: Any
    channel: Any

    async def ask(self, method: str, request: Any) -> Any:
        return await _answer(getattr(self.local, method)(request, timeout=DEADLINE_S))

    async def token(self, role: Role, **fields: Any) -> JoinToken:
        request = access_pb2.CreateTokenRequest(role=role, ttl_s=60, **fields)
        return JoinToken.parse((await self.ask("CreateToken", request)).token)

    async def joined(self, role: Role, name: str) -> Credentials:
        return await asyncio.to_thread(join, await self.token(role), name, rpc.PROTOCOL)

    async def address(self) -> str:
        cluster = await _answer(jobs_stub(self.channel).GetCluster(jobs_pb2.GetClusterRequest(), timeout=DEADLINE_S))
        return next(str(one) for one in cluster.addresses if not one.startswith("unix:"))


def jobs_stub(channel: Any) -> Any:
    return jobs_pb2_grpc.JobsStub(channel)  # type: ignore[no-untyped-call]


async def _answer(awaited: Any) -> Any:
    try:
        return await awaited
    except grpc.RpcError as error:
        raise rpc.error_of(error) from None


@asynccontextmanager
async def members_of(settings: MasterSettings) -> AsyncIterator[Members]:
    async with master(settings) as core, open_aio_channel(settings.listen[0], LOCAL) as channel:
        stub = access_pb2_grpc.AccessStub(channel)  # type: ignore[no-untyped-call]
        yield Members(core, stub, channel)


def with_members(settings: MasterSettings, test: Callable[[Members], Coroutine[Any, Any, None]]) -> None:
    async def serve() -> None:
        async with members_of(settings) as members:
            await test(members)

    run(serve())


def shown(credentials: Credentials) -> Access:
    return Access(source=CredentialSource(credentials))
