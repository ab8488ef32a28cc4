"""A secured master as its members meet it: TLS on 127.0.0.1, join tokens, roles, revocation. Nothing is faked but the
agents."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Coroutine
from dataclasses import replace
from pathlib import Path
from typing import Any

import grpc
import pytest

from pscluster import rpc
from pscluster.errors import AuthError, NotFoundError, PsError, StateError, UnreachableError
from pscluster.rpc import open_aio_channel
from pscluster.rpc.access import ROLES
from pscluster.security.authority import Authority
from pscluster.security.credentials import Credentials, new_request
from pscluster.security.identity import JOINABLE, Identity, Role
from pscluster.v1 import access_pb2, access_pb2_grpc, jobs_pb2, plan_pb2
from psmaster.control.security import PROCESS_LIFETIME_S
from psmaster.server import MasterSettings
from tests.harness.every_rpc import METHODS, call
from tests.unit.master.fake_agent import DEADLINE_S, FakeAgent
from tests.unit.master.members import Members, shown, with_members
from tests.unit.master.test_service import LOCAL, Client, has

OF_THE_MASTER = [method for method in METHODS if method.service != "Depot"]


def missing(error: PsError | None) -> str:
    """What an AuthError says was missing; empty for any other outcome."""
    return error.details.get("missing", "") if isinstance(error, AuthError) else ""


def test_every_method_has_its_roles() -> None:
    assert {method.path for method in METHODS} == set(ROLES)
    assert all(roles and Role.PROCESS not in roles and Role.MASTER not in roles for roles in ROLES.values())


@pytest.mark.parametrize("role", list(Role), ids=str)
def test_a_role_may_call_its_methods_and_no_others(secured: MasterSettings, role: Role) -> None:
    async def test(members: Members) -> None:
        name = "job-aaaaaa/trainer-0/1" if role is Role.PROCESS else "someone"
        identity = Identity(cluster_id=members.core.security.cluster_id, role=role, name=name)
        own = members.core.security.require_authority().issue(identity, 600.0)
        async with open_aio_channel(await members.address(), shown(own)) as channel:
            for method in OF_THE_MASTER:
                error = await call(channel, method)
                refused = role not in ROLES[method.path]
                assert (missing(error) == "role") is refused, (method.path, error)
                if refused and error is not None:
                    assert error.details["caller"] == f"{role} {name}"

    with_members(secured, test)


def test_nobody_else_gets_an_answer(secured: MasterSettings, tmp_path: Path) -> None:
    """No certificate, one of another cluster, an expired one, and the token, which is for Unix sockets alone."""

    async def test(members: Members) -> None:
        address, authority = await members.address(), members.core.security.require_authority()
        identity = Identity(cluster_id=authority.cluster_id, role=Role.ADMIN, name="mallory")
        other = Authority.create(tmp_path / "other", authority.cluster_id).issue(identity, 600.0)
        stolen = replace(other, authority_pem=authority.certificate_pem)
        expired = authority.issue(identity, 0.0)
        root = grpc.ssl_channel_credentials(authority.certificate_pem)
        named = [("grpc.ssl_target_name_override", "master.pscluster")]
        strangers: dict[str, Any] = {
            "no certificate": grpc.aio.secure_channel(address, root, options=named),
            "another cluster's": open_aio_channel(address, shown(other)),
            "another cluster's, of one who trusts ours": open_aio_channel(address, shown(stolen)),
            "expired": open_aio_channel(address, shown(expired)),
            "token": open_aio_channel(address, LOCAL),
        }
        for what, channel in strangers.items():
            async with channel:
                for method in OF_THE_MASTER:
                    assert type(await call(channel, method)) is UnreachableError, (what, method.path)
        assert not members.core.state.jobs

    with_members(secured, test)


def test_a_certificate_of_another_cluster_id_is_refused_by_name(secured: MasterSettings) -> None:
    async def test(members: Members) -> None:
        identity = Identity(cluster_id="f" * 16, role=Role.ADMIN, name="mallory")
        own = members.core.security.require_authority().issue(identity, 600.0)
        async with open_aio_channel(await members.address(), shown(own)) as channel:
            for method in OF_THE_MASTER:
                assert missing(await call(channel, method)) == "cluster", method.path

    with_members(secured, test)


@pytest.mark.parametrize("role", JOINABLE, ids=str)
def test_whoever_is_revoked_is_refused_everywhere(secured: MasterSettings, role: Role) -> None:
    async def test(members: Members) -> None:
        own = await members.joined(role, "someone")
        assert own.identity == Identity(cluster_id=members.core.security.cluster_id, role=role, name="someone")
        async with open_aio_channel(await members.address(), shown(own)) as channel:
            allowed = next(method for method in OF_THE_MASTER if role in ROLES[method.path])
            assert missing(await call(channel, allowed)) == ""
            refused = await members.ask("RevokeCertificates", access_pb2.RevokeCertificatesRequest(name="someone"))
            assert [(one.serial, one.revoked) for one in refused.certificates] == [(own.serial, True)]
            for method in OF_THE_MASTER:
                error = await call(channel, method)
                assert missing(error) == ("valid certificate" if role in ROLES[method.path] else "role"), method.path

    with_members(secured, test)


def test_an_agent_speaks_for_its_own_node_and_loses_its_stream_when_it_is_revoked(secured: MasterSettings) -> None:
    async def test(members: Members) -> None:
        address, own = await members.address(), await members.joined(Role.WORKER, "worker-0")
        for node_id in ("worker-1", "server-0"):
            with pytest.raises(AuthError) as caught:
                await _as_error(FakeAgent(address, shown(own), node_id).open_stream())
            assert caught.value.details["missing"] == "node"
        agent = FakeAgent(address, shown(own), "worker-0")
        await agent.open_stream()
        await agent.until(lambda _: bool(agent.revisions))
        assert members.core.state.nodes["worker-0"].connected
        await members.ask("RevokeCertificates", access_pb2.RevokeCertificatesRequest(name="worker-0"))
        error = await asyncio.wait_for(agent.ended(), DEADLINE_S)
        assert isinstance(error, AuthError) and error.details["reason"] == "revoked"
        assert "worker-0" not in members.core.state.nodes
        with pytest.raises(AuthError):
            await _as_error(FakeAgent(address, shown(own), "worker-0", life="2").open_stream())
        await agent.leave()
        again = FakeAgent(address, shown(await members.joined(Role.WORKER, "worker-0")), "worker-0", life="3")
        await again.open_stream()
        await again.leave()

    with_members(secured, test)


async def _as_error(call: Coroutine[Any, Any, None]) -> None:
    try:
        await call
    except grpc.RpcError as error:
        raise rpc.error_of(error) from None


def test_a_stream_ends_with_its_certificate_and_begins_again_with_the_renewed_one(secured: MasterSettings) -> None:
    async def test(members: Members) -> None:
        address, authority = await members.address(), members.core.security.require_authority()
        identity = Identity(cluster_id=authority.cluster_id, role=Role.SERVER, name="server-0")
        short = authority.issue(identity, 2.0)
        agent = FakeAgent(address, shown(short), "server-0")
        await agent.open_stream()
        key_pem, csr_pem = new_request("server-0")
        async with open_aio_channel(address, shown(short)) as channel:
            stub: Any = access_pb2_grpc.AccessStub(channel)  # type: ignore[no-untyped-call]
            reply = await stub.Renew(access_pb2.RenewRequest(csr_pem=csr_pem), timeout=DEADLINE_S)
        renewed = Credentials(key_pem=key_pem, certificate_pem=reply.certificate_pem, authority_pem=reply.authority_pem)
        assert (renewed.identity, renewed.not_after_s > short.not_after_s) == (identity, True)
        error = await asyncio.wait_for(agent.ended(), DEADLINE_S)
        assert isinstance(error, AuthError) and error.details["reason"] == "expired"
        await agent.leave()
        again = FakeAgent(address, shown(renewed), "server-0")
        await again.open_stream()
        await again.leave()

    with_members(secured, test)


def test_users_see_and_end_their_own_jobs_and_admins_all(secured: MasterSettings) -> None:
    async def test(members: Members) -> None:
        address = await members.address()
        alice, bob, root = [
            Client(address, shown(await members.joined(role, name)))
            for role, name in ((Role.USER, "alice"), (Role.USER, "bob"), (Role.ADMIN, "root"))
        ]
        job_id = await alice.submit("r1")
        assert (await alice.job(job_id)).owner == "alice"
        with pytest.raises(StateError):
            await bob.submit("r1")
        named = jobs_pb2.GetRequest(job=job_id)
        for method in ("Get", "Stop", "Resume", "Delete", "ListSnapshots"):
            with pytest.raises(NotFoundError):
                await bob.call(method, named)
        for method, request in (
            ("Watch", named),
            ("ReadLogs", jobs_pb2.ReadLogsRequest(job=job_id)),
            ("ReadMetrics", jobs_pb2.ReadMetricsRequest(job="job")),
        ):
            with pytest.raises(grpc.RpcError) as caught:
                await bob.stream(method, request)
            assert type(rpc.error_of(caught.value)) is NotFoundError
        seen = {who: len((await who.call("List", jobs_pb2.ListRequest())).jobs) for who in (alice, bob, root)}
        assert [seen[alice], seen[bob], seen[root]] == [1, 0, 1]
        assert (await root.call("Stop", named)).owner == "alice"
        await alice.until(job_id, "STOPPED")
        assert (await alice.call("Delete", named)).job_id == job_id
        local = Client(secured.listen[0])
        assert (await local.job(await local.submit())).owner == "local"
        for client in (alice, bob, root, local):
            await client.close()

    with_members(secured, test)


def test_a_node_cannot_speak_for_a_job_that_it_has_no_place_in(secured: MasterSettings) -> None:
    async def test(members: Members) -> None:
        address = await members.address()
        names = ("worker-0", "server-0", "server-1")
        agents = [
            FakeAgent(address, shown(await members.joined(Role(name.partition("-")[0]), name)), name) for name in names
        ]
        for agent in agents:
            await agent.open_stream()
        client = Client(secured.listen[0])
        job_id = await client.submit(servers={"partitions": 1})
        owner = await _first_with(agents[1:], "partition-0")
        stranger = next(agent for agent in agents[1:] if agent is not owner)
        for agent in (stranger, owner):
            process_id = f"{job_id}/partition-0/1"
            part = plan_pb2.SnapshotPart(step=10, partition=0, generation=1, path="p", size_bytes=1, checksum="c")
            await agent.report(process_id, snapshot_part=part)
            await agent.log(process_id, f"from {agent.node.node_id}")
            await agent.flushed()
        lines = await client.stream("ReadLogs", jobs_pb2.ReadLogsRequest(job=job_id, rank=-1))
        assert [record.line.text for record in lines] == [f"from {owner.node.node_id}"]
        for agent in agents:
            await agent.leave()
        await client.close()

    with_members(secured, test)


async def _first_with(agents: list[FakeAgent], placement: str) -> FakeAgent:
    """The agent that is assigned a placement."""
    waits = {asyncio.create_task(agent.until(lambda a: placement in a)): agent for agent in agents}
    done, rest = await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
    for wait in rest:
        wait.cancel()
    await asyncio.gather(*rest, return_exceptions=True)
    return waits[done.pop()]


def test_every_process_gets_credentials_of_its_own(secured: MasterSettings, monkeypatch: pytest.MonkeyPatch) -> None:
    async def test(members: Members) -> None:
        address = await members.address()
        agents = [
            FakeAgent(address, shown(await members.joined(Role(kind), f"{kind}-0")), f"{kind}-0")
            for kind in ("worker", "server")
        ]
        for agent in agents:
            await agent.open_stream()
        client = Client(secured.listen[0])
        job_id = await client.submit(servers={"partitions": 1})
        specs = {**(await agents[0].until(has("trainer-0/1"))), **(await agents[1].until(has("partition-0/1")))}
        authority = members.core.security.require_authority()
        for placement, spec in specs.items():
            own = Credentials(
                key_pem=spec.credentials.key_pem,
                certificate_pem=spec.credentials.certificate_pem,
                authority_pem=spec.credentials.authority_pem,
            )
            assert own.identity.uri == f"pscluster://{authority.cluster_id}/process/{job_id}/{placement}/1"
            assert (spec.cluster_id, spec.data_security) == (authority.cluster_id, "tls")
            assert 0 < own.not_after_s - time.time() <= PROCESS_LIFETIME_S
        first = specs["trainer-0"].credentials.certificate_pem
        later_s = members.core.now().unix_s + PROCESS_LIFETIME_S * 0.6
        now = members.core.now
        monkeypatch.setattr(members.core, "now", lambda: replace(now(), unix_s=later_s))
        newer = await agents[0].until(lambda a: a["trainer-0"].credentials.certificate_pem != first)
        assert newer["trainer-0"].process_id == specs["trainer-0"].process_id
        for agent in agents:
            await agent.leave()
        await client.close()

    with_members(secured, test)
