"""A stranger becomes a member: join tokens, the join endpoint, and where the master listens."""

from __future__ import annotations

import asyncio
import socket
import ssl
from dataclasses import replace

import pytest

from pscluster import rpc
from pscluster.errors import AuthError, SettingsError, StateError
from pscluster.rpc import Access, open_aio_channel
from pscluster.security.identity import Role
from pscluster.security.joining import join
from pscluster.v1 import access_pb2, jobs_pb2
from psmaster.api.join import MAX_OF_ONE_HOST
from psmaster.server import MasterSettings, assembled
from tests.unit.master.fake_agent import DEADLINE_S
from tests.unit.master.members import Members, jobs_stub, shown, with_members
from tests.unit.master.test_service import Client, master, run

# ---- joining ----


def test_a_join_token_is_listed_used_and_revoked(secured: MasterSettings) -> None:
    async def test(members: Members) -> None:
        token = await members.token(Role.USER, uses=2)
        (listed,) = (await members.ask("ListTokens", access_pb2.ListTokensRequest())).tokens
        assert (listed.role, listed.uses_left, listed.limited) == ("user", 2, True)
        assert token.secret not in str(listed) and token.master == await members.address()
        alice = await asyncio.to_thread(join, token, "alice", rpc.PROTOCOL)
        with pytest.raises(StateError):
            await asyncio.to_thread(join, token, "alice", rpc.PROTOCOL)
        (held,) = (await members.ask("ListCertificates", access_pb2.ListCertificatesRequest())).certificates
        assert (held.serial, held.role, held.name, held.revoked) == (alice.serial, "user", "alice", False)
        for _ in range(2):
            await members.ask("RevokeToken", access_pb2.RevokeTokenRequest(token_id=listed.token_id))
        assert not (await members.ask("ListTokens", access_pb2.ListTokensRequest())).tokens
        with pytest.raises(AuthError) as caught:
            await asyncio.to_thread(join, token, "bob", rpc.PROTOCOL)
        assert caught.value.details["missing"] == "join token"

    with_members(secured, test)


def test_a_wrong_secret_or_authority_or_name_is_refused(secured: MasterSettings) -> None:
    async def test(members: Members) -> None:
        token = await members.token(Role.WORKER)
        for wrong, name in (
            (replace(token, secret="guessed"), "worker-0"),
            (replace(token, authority_sha256="0" * 64), "worker-0"),
            (token, "a b"),
        ):
            with pytest.raises(AuthError):
                await asyncio.to_thread(join, wrong, name, rpc.PROTOCOL)
        assert not members.core.state.access.certificates

    with_members(secured, test)


def test_half_open_and_silent_connections_do_not_keep_others_out(secured: MasterSettings) -> None:
    async def test(members: Members) -> None:
        token = await members.token(Role.WORKER)
        host, _, port = token.addresses[0].rpartition(":")
        silent = [socket.create_connection((host, int(port)), DEADLINE_S) for _ in range(4 * MAX_OF_ONE_HOST)]
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
        with context.wrap_socket(
            socket.create_connection((host, int(port)), DEADLINE_S), do_handshake_on_connect=False
        ):
            assert (await asyncio.to_thread(join, token, "worker-0", rpc.PROTOCOL)).identity.name == "worker-0"
        for one in silent:
            one.close()

    with_members(secured, test)


# ---- where it listens ----


@pytest.mark.parametrize("address", ["0.0.0.0:0", "[::]:0", "10.0.0.1:7070"])
def test_other_hosts_are_let_near_with_certificates_alone(site: MasterSettings, address: str) -> None:
    async def test() -> None:
        with pytest.raises(SettingsError) as caught:
            async with assembled(replace(site, listen=(address,))):
                raise AssertionError("it listens")
        assert caught.value.details["listen"] == address

    run(test())


def test_without_certificates_nobody_joins(site: MasterSettings) -> None:
    async def test(members: Members) -> None:
        with pytest.raises(StateError):
            await members.token(Role.WORKER)

    with_members(site, test)


def test_it_listens_on_ipv6(secured: MasterSettings) -> None:
    async def test(members: Members) -> None:
        token = await members.token(Role.ADMIN)
        assert token.addresses[0].startswith("[::1]:")
        own = await asyncio.to_thread(join, token, "root", rpc.PROTOCOL)
        async with open_aio_channel(token.master, shown(own)) as channel:
            assert (await jobs_stub(channel).GetCluster(jobs_pb2.GetClusterRequest(), timeout=DEADLINE_S)).secured

    with_members(replace(secured, listen=(secured.listen[0], "[::1]:0"), join_listen="[::1]:0"), test)


def test_the_token_is_made_where_none_is_named(secured: MasterSettings) -> None:
    async def test() -> None:
        async with master(replace(secured, token_file=None)):
            path = secured.state_dir / "token"
            assert path.stat().st_mode & 0o777 == 0o600
            client = Client(secured.listen[0], Access(token=path.read_text().strip()))
            await client.submit()
            await client.close()

    run(test())
