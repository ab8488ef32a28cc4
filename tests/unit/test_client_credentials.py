"""The client of a cluster with certificates: whom it calls, how it renews, what it says when it is refused."""

from __future__ import annotations

import socket
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from pscluster import rpc
from pscluster.client import Cluster
from pscluster.client.credentials import join_as_user
from pscluster.client.reach import check_reachable
from pscluster.errors import AuthError, StorageError, UnreachableError
from pscluster.security.authority import Authority
from pscluster.security.credentials import Credentials, CredentialSource
from pscluster.security.identity import Identity, Role
from pscluster.security.join_token import JoinToken
from pscluster.settings import ClientSettings, LocatedCluster
from tests.unit.cli.fake_master import FakeMaster, Serving

CLUSTER_ID = "0123456789abcdef"
ADA = Identity(cluster_id=CLUSTER_ID, role=Role.USER, name="ada")


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority.create(tmp_path_factory.mktemp("certs"), CLUSTER_ID)


@pytest.fixture
def serving(authority: Authority, tmp_path: Path) -> Iterator[Serving]:
    fake = FakeMaster()
    fake.authority = authority
    served = Serving(fake, tmp_path)
    yield served
    served.stop()


def located(serving: Serving, directory: Path) -> LocatedCluster:
    return ClientSettings(address=serving.address, credentials_dir=directory).located({})


def source_of(credentials: Credentials) -> rpc.Access:
    return rpc.Access(source=CredentialSource(credentials))


def test_a_member_calls_over_tls_and_renews_when_due_only(
    authority: Authority, serving: Serving, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = authority.issue(ADA, 3600.0)
    first.save(tmp_path / "ada")
    with Cluster.connect_to(located(serving, tmp_path / "ada")) as cluster:
        assert cluster.jobs() == []
    assert serving.fake.renewals == 0
    monkeypatch.setattr(time, "time", lambda: first.renew_at_s + 1)
    for _ in range(2):
        with Cluster.connect_to(located(serving, tmp_path / "ada")) as cluster:
            assert cluster.jobs() == []
        stored = Credentials.load(tmp_path / "ada")
        assert (stored.identity, stored.serial == first.serial) == (ADA, False)
        # What was renewed at the real time is due again at the patched one, unless it lasts longer.
        monkeypatch.setattr(time, "time", lambda: stored.renew_at_s - 1)  # noqa: B023 - called in this turn
    assert serving.fake.renewals == 1


def test_a_renewal_that_fails_is_a_warning_and_does_not_fail_the_call(
    authority: Authority, serving: Serving, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = authority.issue(ADA, 3600.0)
    first.save(tmp_path / "ada")
    monkeypatch.setattr(time, "time", lambda: first.renew_at_s + 1)
    serving.fake.failures["Renew"] = [StorageError("the disk is full")]
    with pytest.warns(UserWarning, match="PS-4002"):
        cluster = Cluster.connect_to(located(serving, tmp_path / "ada"))
    with cluster:
        assert cluster.jobs() == []
    assert serving.fake.failures["Renew"] == []
    assert Credentials.load(tmp_path / "ada").serial == first.serial


def test_an_expired_certificate_is_refused_before_the_call(
    authority: Authority, serving: Serving, tmp_path: Path
) -> None:
    authority.issue(ADA, -10.0).save(tmp_path / "ada")
    with pytest.raises(AuthError) as caught:
        Cluster.connect_to(located(serving, tmp_path / "ada"))
    assert caught.value.details["field"] == "expired"


def test_a_stranger_is_told_that_tls_refused(serving: Serving, tmp_path: Path) -> None:
    other = Authority.create(tmp_path / "other", CLUSTER_ID)
    other.issue(ADA, 3600.0).save(tmp_path / "ada")
    with pytest.raises(UnreachableError) as caught:
        Cluster.connect_to(located(serving, tmp_path / "ada"))
    assert caught.value.details["reason"] == "tls"


def test_a_probe_tells_the_causes_apart(authority: Authority, serving: Serving, tmp_path: Path) -> None:
    member = source_of(authority.issue(ADA, 3600.0))
    check_reachable(serving.address, member, Role.MASTER, "the master")
    with pytest.raises(AuthError):
        check_reachable(serving.address, member, Role.SERVER, "a depot")
    stranger = source_of(Authority.create(tmp_path / "x", CLUSTER_ID).issue(ADA, 3600.0))
    mixed = source_of(replace(stranger.source.get(), authority_pem=authority.certificate_pem))  # type: ignore[union-attr]
    reasons = {}
    with socket.create_server(("127.0.0.1", 0)) as silent:
        silent_at = f"127.0.0.1:{silent.getsockname()[1]}"
        for name, address, access in (
            ("stranger", serving.address, stranger),
            ("stranger that trusts", serving.address, mixed),
            ("nobody", "127.0.0.1:1", member),
            ("no name", "no-such-host.invalid:1", member),
            ("silent", silent_at, member),
            ("no socket", f"unix:{tmp_path}/none", rpc.Access(token="t")),
        ):
            with pytest.raises(UnreachableError) as caught:
                check_reachable(address, access, Role.MASTER, "the master", 0.5)
            reasons[name] = caught.value.details["reason"]
    assert reasons.pop("no socket") in ("other", "refused")
    assert reasons == {
        "stranger": "tls", "stranger that trusts": "tls", "nobody": "refused", "no name": "dns", "silent": "timed out"
    }  # fmt: skip


def test_a_node_s_token_makes_no_user(authority: Authority) -> None:
    token = JoinToken(
        secret="s", authority_sha256=authority.sha256, cluster_id=CLUSTER_ID, role=Role.WORKER,
        addresses=("127.0.0.1:1",), master="127.0.0.1:2",
    )  # fmt: skip
    with pytest.raises(AuthError) as caught:
        join_as_user(token.encode(), "ada")
    assert caught.value.details["field"] == "role"
    with pytest.raises(UnreachableError):
        join_as_user(replace(token, role=Role.USER).encode(), "ada")
