"""An agent in a cluster with certificates: what it registers, and how it says that it cannot."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from structlog.testing import capture_logs

from harness.played_authority import PlayedJoinEndpoint
from pscluster.agent import daemon, master_connection
from pscluster.agent.addresses import NodeAddress
from pscluster.agent.daemon import AgentRole
from pscluster.errors import SettingsError
from pscluster.security.identity import Role

pytestmark = pytest.mark.timeout(60)
SERVER = AgentRole(name="server", module="played_process", runs="partitions", default_slots=2, keeps_snapshots=True)


def member(secured: Any, role: Role = Role.WORKER, name: str = "worker-0") -> None:
    secured.played.member(role, name).save(secured.identity)


def test_it_registers_by_its_certificate_with_its_address(secured: Any) -> None:
    member(secured)

    async def body(master: Any) -> None:
        await master.until(lambda: master.hellos)
        node = master.registered[0]
        assert (node.node_id, node.advertised_host, node.depot_address) == ("worker-0", "127.0.0.1", "")
        assert str(master.callers[0]) == "worker worker-0"

    secured.run(body)


def test_a_server_advertises_its_depot_where_it_is_reached(secured: Any) -> None:
    member(secured, Role.SERVER, "server-0")
    secured.role = SERVER
    secured.overrides = {"own_store": True}

    async def body(master: Any) -> None:
        await master.until(lambda: master.hellos)
        host, _, port = master.registered[0].depot_address.rpartition(":")
        assert host == "127.0.0.1"
        assert int(port) > 0

    secured.run(body)


def test_it_comes_back_with_another_address(secured: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    member(secured, Role.SERVER, "server-0")
    secured.role = SERVER
    secured.overrides = {"own_store": True}
    hosts = ["10.0.0.5", "10.0.0.6"]
    monkeypatch.setattr(NodeAddress, "locate", lambda _: hosts[0])

    async def body(master: Any) -> None:
        await master.until(lambda: master.hellos)
        hosts.pop(0)
        await master.stop()
        await master.start()
        await master.until(lambda: len(master.hellos) > 1)
        assert [node.advertised_host for node in master.registered] == ["10.0.0.5", "10.0.0.6"]
        assert [node.depot_address.rpartition(":")[0] for node in master.registered] == ["10.0.0.5", "10.0.0.6"]

    secured.run(body)


def test_it_joins_and_then_registers(secured: Any) -> None:
    with PlayedJoinEndpoint(secured.played, Role.WORKER) as endpoint:
        token = secured.played.token(Role.WORKER, endpoint.address, master="not used:1")
        secured.overrides = {"node_id": "w-7", "join": token.encode()}

        async def body(master: Any) -> None:
            await master.until(lambda: master.hellos)
            assert [str(caller) for caller in master.callers] == ["worker w-7"]

        secured.run(body)


def test_a_process_does_not_inherit_the_join_token(secured: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    inherited: dict[str, str] = {}
    monkeypatch.setattr(daemon, "_run_agent", lambda _role, _settings, environ: inherited.update(environ) or 0)
    monkeypatch.setenv("PS_JOIN", "psj1-secret")
    monkeypatch.setenv("PS_STATE_DIR", str(secured.state_dir))
    monkeypatch.setenv("OTHER", "kept")
    assert daemon.run(SERVER, []) == 0
    assert inherited["OTHER"] == "kept"
    assert "PS_JOIN" not in inherited


def test_an_outage_is_told_once_with_its_reason(secured: Any) -> None:
    member(secured)

    async def body(master: Any) -> None:
        await master.until(lambda: master.hellos)
        await master.stop()
        failed = asyncio.Event()
        count = 0

        def delay(*_: Any, **__: Any) -> float:
            nonlocal count
            count += 1
            if count == 4:
                failed.set()
            return 0.0

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(master_connection, "delay_s", delay)
            async with asyncio.timeout(30):
                await failed.wait()
        await master.start()
        await master.until(lambda: len(master.hellos) > 1)

    with capture_logs() as lines:
        secured.run(body)
    outages = [line for line in lines if line["event"] == "waiting for the master"]
    refused = [line for line in outages if line["reason"] == "refused"]
    assert len(refused) == 1
    assert refused[0]["address"] in refused[0]["cause"]
    assert len(outages) <= 2, "the end of the stream, and the refusal"


def test_an_agent_without_an_address_says_so_and_tries_again(secured: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    member(secured)
    problems: list[Exception] = [SettingsError("no interface 'eth9'")] * 2

    def locate(_: NodeAddress) -> str:
        if problems:
            raise problems.pop()
        return "10.0.0.5"

    monkeypatch.setattr(NodeAddress, "locate", locate)

    async def body(master: Any) -> None:
        await master.until(lambda: master.hellos)
        assert master.registered[0].advertised_host == "10.0.0.5"

    secured.run(body)
    assert not problems


def test_settings_that_contradict_each_other_end_it(secured: Any) -> None:
    member(secured)
    for overrides in ({"data_ports": "9-1"}, {"interface": "eth0"}, {"advertise": "host.example"}):
        secured.overrides = overrides
        with pytest.raises(SettingsError):
            secured.run(lambda _master: asyncio.Event().wait(), signal_end=False)
