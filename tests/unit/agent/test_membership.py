"""How an agent becomes a member and stays one: joining, its identity, and renewal."""

from __future__ import annotations

import asyncio
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from structlog.testing import capture_logs

from harness.played_authority import CLUSTER, PlayedAuthority, PlayedJoinEndpoint
from pscluster.agent import membership
from pscluster.agent.daemon import AgentSettings
from pscluster.agent.master_connection import MasterConnection
from pscluster.agent.membership import Membership, become_member, default_node_id, must_join, read_join_token, wait_s
from pscluster.errors import AuthError, PsError, SettingsError, StorageError
from pscluster.rpc import Access
from pscluster.security.credentials import Credentials, CredentialSource
from pscluster.security.identity import Role

MASTER = "master.example:7070"
UNUSED: Any = (None, None)  # the registration and the address of a connection that is not opened


@pytest.fixture
def played(tmp_path: Path) -> PlayedAuthority:
    return PlayedAuthority(tmp_path / "certs")


def settings(tmp_path: Path, **fields: Any) -> AgentSettings:
    return AgentSettings(state_dir=tmp_path / "state", **fields)


def become(made: AgentSettings, role: Role = Role.WORKER) -> Membership:
    return asyncio.run(become_member(role, made))


def modes(directory: Path) -> dict[str, int]:
    return {path.name: path.stat().st_mode & 0o777 for path in directory.iterdir()}


# ---- joining ----


def test_a_token_becomes_an_identity_that_others_cannot_read(tmp_path: Path, played: PlayedAuthority) -> None:
    with PlayedJoinEndpoint(played, Role.WORKER) as endpoint:
        token = played.token(Role.WORKER, endpoint.address, master=MASTER)
        member = become(settings(tmp_path, node_id="worker-7", join=token.encode()))
        assert (member.node_id, member.master) == ("worker-7", MASTER)
        assert member.access.source is not None
        assert member.access.source.get().identity.uri == f"pscluster://{CLUSTER}/worker/worker-7"
        directory = tmp_path / "state" / "identity"
        assert directory.stat().st_mode & 0o777 == 0o700
        assert set(modes(directory).values()) == {0o600}
        assert set(modes(directory)) == {"key.pem", "certificate.pem", "authority.pem", "master"}
        assert len(endpoint.requests) == 1

        again = become(settings(tmp_path))
        assert (again.node_id, again.master) == ("worker-7", MASTER)
        become(settings(tmp_path, join=token.encode()))
        assert len(endpoint.requests) == 1, "an agent with an identity does not join again"


def test_a_token_is_read_from_a_file(tmp_path: Path, played: PlayedAuthority) -> None:
    token = played.token(Role.SERVER, "10.0.0.1:7071")
    (tmp_path / "token").write_text(token.encode() + "\n")
    for text in (token.encode(), f"@{tmp_path / 'token'}"):
        given = settings(tmp_path, join=text)
        assert read_join_token(text, given.join_file) == token
    with pytest.raises(SettingsError, match="cannot read"):
        become(settings(tmp_path, join="@/nowhere/token"))


def test_a_join_token_is_not_shown(tmp_path: Path, played: PlayedAuthority) -> None:
    token = played.token(Role.WORKER, "10.0.0.1:7071")
    assert token.encode() not in repr(settings(tmp_path, join=token.encode()))
    assert token.secret not in repr(token)


def test_a_lost_answer_is_asked_for_again_with_the_same_key(
    tmp_path: Path, played: PlayedAuthority, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(membership, "delay_s", lambda *_, **__: 0.0)
    with PlayedJoinEndpoint(played, Role.WORKER) as endpoint:
        endpoint.lost_answers = 2
        token = played.token(Role.WORKER, endpoint.address, master=MASTER)
        with pytest.raises(AuthError):  # a line that never came is no answer
            become(settings(tmp_path, node_id="w", join=token.encode()))
        endpoint.lost_answers = 0
        assert become(settings(tmp_path, node_id="w", join=token.encode())).node_id == "w"
        assert len(endpoint.requests) == 2


def test_it_waits_for_a_master_that_is_away(
    tmp_path: Path, played: PlayedAuthority, monkeypatch: pytest.MonkeyPatch
) -> None:
    with PlayedJoinEndpoint(played, Role.WORKER) as first:
        port = int(first.address.rpartition(":")[2])
    back: list[PlayedJoinEndpoint] = []

    def master_comes_back(failures: int, *_: object, **__: object) -> float:
        if failures == 2:
            back.append(PlayedJoinEndpoint(played, Role.WORKER, port).__enter__())
        return 0.0

    monkeypatch.setattr(membership, "delay_s", master_comes_back)
    token = played.token(Role.WORKER, first.address, master=MASTER)
    try:
        assert become(settings(tmp_path, node_id="w", join=token.encode())).node_id == "w"
    finally:
        for endpoint in back:
            endpoint.__exit__(None, None, None)
    assert len(back) == 1


def test_a_wrong_secret_and_another_clusters_authority_are_refused(tmp_path: Path, played: PlayedAuthority) -> None:
    other = PlayedAuthority(tmp_path / "other")
    with PlayedJoinEndpoint(played, Role.WORKER) as endpoint:
        wrong = played.token(Role.WORKER, endpoint.address, secret="wrong")
        with pytest.raises(AuthError, match="not known"):
            become(settings(tmp_path, node_id="w", join=wrong.encode()))
        foreign = other.token(Role.WORKER, endpoint.address)
        with pytest.raises(AuthError) as caught:
            become(settings(tmp_path, node_id="w", join=foreign.encode()))
        assert caught.value.details["field"] == "authority"
        assert len(endpoint.requests) == 1, "the secret was not sent to the other authority"
    assert not (tmp_path / "state" / "identity" / "key.pem").exists()


# ---- what contradicts itself ----


def test_what_decides_whether_to_join(played: PlayedAuthority) -> None:
    token, now = played.token(Role.WORKER, "x:1"), time.time()
    held = played.member(Role.WORKER, "w")
    assert must_join(None, token, Role.WORKER, None, now)
    assert not must_join(None, None, Role.WORKER, None, now)
    assert not must_join(held, None, Role.WORKER, "w", now)
    assert not must_join(held, token, Role.WORKER, None, now)
    assert must_join(held, token, Role.WORKER, None, now + 3601)
    with pytest.raises(AuthError) as caught:
        must_join(held, None, Role.WORKER, None, now + 3601)
    assert caught.value.details["reason"] == "expired"


def test_a_token_or_identity_of_another_kind_is_refused(played: PlayedAuthority) -> None:
    held, now = played.member(Role.WORKER, "w"), time.time()
    with pytest.raises(SettingsError, match="for the role server"):
        must_join(None, played.token(Role.SERVER, "x:1"), Role.WORKER, None, now)
    with pytest.raises(SettingsError, match="worker w, not of server w"):
        must_join(held, None, Role.SERVER, None, now)
    with pytest.raises(SettingsError, match="not of worker v"):
        must_join(held, None, Role.WORKER, "v", now)
    other = replace(played.token(Role.WORKER, "x:1"), cluster_id="f" * 16)
    with pytest.raises(SettingsError, match="member of cluster"):
        must_join(held, other, Role.WORKER, None, now)


def test_without_identity_and_token_file_it_says_what_to_give(tmp_path: Path) -> None:
    for fields, missing in (({}, "master"), ({"master": "unix:/m"}, "token_file")):
        with pytest.raises(SettingsError, match=missing) as caught:
            become(settings(tmp_path, **fields))
        assert "--join" in caught.value.action


def test_the_token_is_not_sent_over_a_network(tmp_path: Path) -> None:
    (tmp_path / "token").write_text("secret")
    (tmp_path / "token").chmod(0o600)
    with pytest.raises(SettingsError, match="another host"):
        become(settings(tmp_path, master="10.0.0.1:7070", token_file=tmp_path / "token"))
    member = become(settings(tmp_path, master="127.0.0.1:7070", token_file=tmp_path / "token"))
    assert member.access.token == "secret"
    assert member.access.source is None


def test_an_identity_needs_a_master_over_tcp(tmp_path: Path, played: PlayedAuthority) -> None:
    played.member(Role.WORKER, "w").save(tmp_path / "state" / "identity")
    for fields in ({}, {"master": "unix:/m"}):
        with pytest.raises(SettingsError, match="TCP address"):
            become(settings(tmp_path, **fields))
    assert become(settings(tmp_path, master="10.0.0.1:7070")).master == "10.0.0.1:7070"


def test_the_default_name_is_the_hosts_short_one() -> None:
    assert default_node_id("gpu-7.rack.example") == "gpu-7"


# ---- renewal ----


def test_when_to_renew(played: PlayedAuthority) -> None:
    held = played.member(Role.WORKER, "w", lifetime_s=900)
    made_s = held.not_after_s - 900
    assert wait_s(held, held.renew_at_s - 5, 0, 0.5) == pytest.approx(5)
    assert wait_s(held, made_s, 0, 0.5) == 60, "the clock may be set"
    assert wait_s(held, held.renew_at_s, 0, 0.5) == 0
    assert 0 < wait_s(held, held.renew_at_s + 1, 3, 0.5) < 2
    assert wait_s(held, held.renew_at_s + 1, 50, 1.0) == 30
    assert wait_s(held, held.not_after_s - 0.5, 50, 1.0) == pytest.approx(0.5)
    assert wait_s(held, held.not_after_s + 9, 50, 1.0) == 0


def save(secured: Any, lifetime_s: float) -> Credentials:
    held: Credentials = secured.played.member(Role.WORKER, "worker-0", lifetime_s)
    held.save(secured.identity)
    return held


def due_at_once(first: Credentials, monkeypatch: pytest.MonkeyPatch) -> None:
    """Have one certificate be renewed now, and others when they should be."""
    usual = Credentials.renew_at_s.fget
    assert usual is not None
    due = property(lambda held: 0.0 if held.serial == first.serial else usual(held))
    monkeypatch.setattr(Credentials, "renew_at_s", due)


def test_a_certificate_is_renewed_stored_and_used_for_a_new_stream(
    secured: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = save(secured, 3600.0)
    due_at_once(first, monkeypatch)
    shown: list[str] = []

    async def body(master: Any) -> None:
        await master.until(lambda: master.renewals and master.callers and master.callers[-1].serial != first.serial)
        assert master.renewals == [first.serial]
        shown.extend(caller.serial for caller in master.callers)
        assert membership.CERTIFICATE_EXPIRES._value.get() == pytest.approx(time.time() + 3600, abs=60)

    secured.run(body)
    stored = Credentials.load(secured.identity)
    assert shown[-1] == stored.serial
    assert stored.key_pem != first.key_pem


def test_a_failed_renewal_is_repeated(secured: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    first = save(secured, 3600.0)
    due_at_once(first, monkeypatch)

    async def body(master: Any) -> None:
        await master.until(lambda: len(master.renewals) > 1)
        master.renewal_error = None
        await master.until(lambda: master.callers and master.callers[-1].serial != first.serial)

    secured.renewal_error = StorageError("the disk is full")
    with capture_logs() as lines:
        secured.run(body)
    assert [line["code"] for line in lines if line["event"] == "cannot renew the certificate"][:1] == ["PS-4002"]


def test_a_stream_does_not_outlive_its_certificate(secured: Any) -> None:
    """Also when it cannot be renewed: the clock decides, not the next failure."""
    used, expired = (secured.played.member(Role.WORKER, "w", lifetime_s) for lifetime_s in (60.0, -1.0))
    source = CredentialSource(used)
    master = MasterConnection("127.0.0.1:1", Access(source=source), *UNUSED)
    assert not master._is_outdated(used)
    assert master._is_outdated(expired), "another one is in use by now"
    source.replace(expired)
    assert master._is_outdated(expired)


def test_an_agent_whose_certificate_expires_ends_with_the_reason(secured: Any) -> None:
    save(secured, 2.0)

    async def body(master: Any) -> None:
        master.renewal_error = AuthError("this name is not known")
        await asyncio.Event().wait()

    with pytest.raises(PsError) as caught:
        secured.run(body, signal_end=False)
    assert caught.value.details["reason"] == "expired"
    assert "--join" in caught.value.action


def test_an_agent_whose_certificate_is_revoked_ends_with_the_reason(secured: Any) -> None:
    held = save(secured, 3600.0)

    async def body(master: Any) -> None:
        await master.until(lambda: master.beats)
        master.revocations.replace([held.serial])
        await asyncio.Event().wait()

    with pytest.raises(AuthError) as caught:
        secured.run(body, signal_end=False)
    assert caught.value.details["reason"] == "revoked"
