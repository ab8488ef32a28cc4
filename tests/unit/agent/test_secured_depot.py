"""A depot of a cluster with certificates: who may read and write copies, and where it listens."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Coroutine
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from harness.played_authority import PlayedAuthority
from pscluster.agent import depot
from pscluster.agent.addresses import PortRange, depot_choices
from pscluster.errors import AuthError, SettingsError, UnreachableError
from pscluster.rpc import Access
from pscluster.rpc.server import Revocations
from pscluster.security.credentials import Credentials, CredentialSource
from pscluster.security.identity import Role
from pscluster.storage import open_store
from pscluster.storage.snapshot import part_name
from pscluster.v1.depot_pb2 import TakePartRequest
from pscluster.v1.plan_pb2 import SnapshotPart

DATA = bytes(range(256)) * 5_000


def run(test: Coroutine[Any, Any, None]) -> None:
    async def bounded() -> None:
        async with asyncio.timeout(60):
            await test

    asyncio.run(bounded())


def access(credentials: Credentials) -> Access:
    return Access(source=CredentialSource(credentials))


def write(directory: Path) -> SnapshotPart:
    name = part_name(4, 0, 1)
    written = open_store(directory / "job-a").write(name, [DATA])
    return SnapshotPart(step=4, generation=1, path=name, size_bytes=written.size_bytes, checksum=written.checksum)


class Depots:
    """Two depots; server-0 has a part."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.played = PlayedAuthority(root / "certs")
        self.revocations = Revocations()
        self.sources: dict[str, CredentialSource] = {}
        self.addresses: dict[str, str] = {}
        self.part = write(root / "server-0")

    def access(self, role: Role, name: str, lifetime_s: float = 3600.0) -> Access:
        return access(self.played.member(role, name, lifetime_s))

    async def get(self, caller: Access) -> bytes:
        """Server-0's part, copied by a caller."""
        here = self.root / "here"
        await depot.get(self.addresses["server-0"], caller, "job-a", self.part, here)
        return (here / self.part.path).read_bytes()


@asynccontextmanager
async def depots(root: Path) -> AsyncIterator[Depots]:
    made = Depots(root)
    made.sources = {n: CredentialSource(made.played.member(Role.SERVER, n)) for n in ("server-0", "server-1")}
    first, second = (
        depot.serving(root / name, ["127.0.0.1:0"], Access(source=source), made.revocations)
        for name, source in made.sources.items()
    )
    async with first as here, second as there:
        made.addresses = {"server-0": here, "server-1": there}
        yield made


def test_servers_copy_from_each_other_over_tls(tmp_path: Path) -> None:
    async def test() -> None:
        async with depots(tmp_path) as made:
            request = TakePartRequest(job_id="job-a", part=made.part, source=made.addresses["server-0"])
            await depot.give(made.addresses["server-1"], made.access(Role.SERVER, "server-0"), request)
            assert (tmp_path / "server-1" / "job-a" / made.part.path).read_bytes() == DATA

    run(test())


def test_a_worker_a_process_and_a_user_may_not_write_copies(tmp_path: Path) -> None:
    async def test() -> None:
        async with depots(tmp_path) as made:
            request = TakePartRequest(job_id="job-a", part=made.part, source=made.addresses["server-0"])
            for role, name in ((Role.WORKER, "w"), (Role.PROCESS, "job-a/trainer-0/1"), (Role.USER, "u")):
                with pytest.raises(AuthError) as caught:
                    await depot.give(made.addresses["server-1"], made.access(role, name), request)
                assert caught.value.details["missing"] == "role"
            for role, name in ((Role.WORKER, "w"), (Role.PROCESS, "job-a/trainer-0/1")):
                with pytest.raises(AuthError):
                    await made.get(made.access(role, name))
            for role in (Role.USER, Role.ADMIN):
                assert await made.get(made.access(role, "u")) == DATA
        assert not (tmp_path / "server-1").exists()

    run(test())


def test_strangers_do_not_get_beyond_the_handshake(tmp_path: Path) -> None:
    async def test() -> None:
        async with depots(tmp_path) as made:
            other = PlayedAuthority(tmp_path / "other").member(Role.SERVER, "server-9")
            impostor = Credentials(
                key_pem=other.key_pem,
                certificate_pem=other.certificate_pem,
                authority_pem=made.played.authority.certificate_pem,
            )
            for caller, reason in ((access(other), "tls"), (access(impostor), "closed"), (Access(token="x"), "closed")):
                with pytest.raises(UnreachableError) as caught:
                    await made.get(caller)
                assert caught.value.details["reason"] == reason

    run(test())


def test_a_revoked_server_is_refused_at_once(tmp_path: Path) -> None:
    async def test() -> None:
        async with depots(tmp_path) as made:
            caller = made.access(Role.SERVER, "server-1")
            assert await made.get(caller) == DATA
            assert caller.source is not None
            made.revocations.replace([caller.source.get().serial])
            with pytest.raises(AuthError) as caught:
                await made.get(caller)
            assert caught.value.details["reason"] == "revoked"

    run(test())


def test_a_renewed_certificate_is_shown_without_a_restart(tmp_path: Path) -> None:
    async def test() -> None:
        async with depots(tmp_path) as made:
            caller = made.access(Role.SERVER, "server-1")
            made.sources["server-0"].replace(made.played.member(Role.WORKER, "worker-0"))
            with pytest.raises(UnreachableError) as caught:  # a worker has no name that a depot has
                await made.get(caller)
            assert caught.value.details["reason"] == "tls"
            made.sources["server-0"].replace(made.played.member(Role.SERVER, "server-0"))
            assert await made.get(caller) == DATA

    run(test())


def test_where_a_depot_listens() -> None:
    ports = PortRange(first=7100, last=7101)
    assert depot_choices(None, secured=False, ports=ports) == ["127.0.0.1:0"]
    assert depot_choices(None, secured=True, ports=None) == ["[::]:0", "0.0.0.0:0"]
    assert depot_choices(None, secured=True, ports=ports)[:2] == ["[::]:7100", "[::]:7101"]
    assert depot_choices("10.0.0.5:7000", secured=True, ports=ports) == ["10.0.0.5:7000"]
    assert depot_choices("127.0.0.2:7000", secured=False, ports=None) == ["127.0.0.2:7000"]
    with pytest.raises(SettingsError, match="loopback"):
        depot_choices("10.0.0.5:7000", secured=False, ports=None)
