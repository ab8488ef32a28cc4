"""Who may become a member, and who is one: decisions on join tokens and certificates."""

from __future__ import annotations

from dataclasses import replace

import pytest

from pscluster.errors import AuthError, CallerError, NotFoundError, StateError
from pscluster.security.identity import Role
from psmaster.model import access
from psmaster.model.access import AccessRecords, CertificateRecord, TokenRecord
from tests.harness.master_world import World, make_job

NOW_S = 1000.0
WORKER = TokenRecord(digest="a1" * 32, role=Role.WORKER, created_s=NOW_S, expires_s=NOW_S + 60)
USER = TokenRecord(digest="b2" * 32, role=Role.USER, created_s=NOW_S, expires_s=NOW_S + 60, uses_left=2)


def records(*tokens: TokenRecord) -> AccessRecords:
    found = AccessRecords()
    for token in tokens or (WORKER, USER):
        found = access.add_token(found, token, NOW_S)
    return found


def certificate(
    name: str = "worker-0", role: Role = Role.WORKER, serial: str = "1", key: str = "k"
) -> CertificateRecord:
    return CertificateRecord(serial=serial, role=role, name=name, key_sha256=key, issued_s=NOW_S, expires_s=NOW_S + 100)


@pytest.mark.parametrize(
    ("digest", "now_s", "reason"),
    [("ff" * 32, NOW_S, "unknown"), (WORKER.digest, NOW_S + 60, "expired"), (USER.digest, NOW_S, "used up or revoked")],
)
def test_a_useless_token_lets_nobody_in(digest: str, now_s: float, reason: str) -> None:
    held = records(WORKER, replace(USER, uses_left=0))
    with pytest.raises(AuthError) as caught:
        access.join(held, digest, certificate(), now_s)
    assert caught.value.details["reason"] == reason
    if digest != USER.digest:  # the holder of one that is used up may only repeat what it did
        with pytest.raises(AuthError):
            access.role_of_token(held, digest, now_s)


def test_a_join_whose_answer_is_lost_is_repeated_with_a_token_for_one() -> None:
    once = replace(USER, uses_left=1)
    held = access.join(records(once), once.digest, certificate("u", Role.USER), NOW_S)
    assert access.role_of_token(held, once.digest, NOW_S) is Role.USER
    assert "2" in access.join(held, once.digest, certificate("u", Role.USER, "2"), NOW_S).certificates
    with pytest.raises(AuthError):
        access.join(held, once.digest, certificate("u", Role.USER, "2", key="another"), NOW_S)


def test_a_token_is_used_as_often_as_it_says() -> None:
    held = records()
    for number in range(2):
        held = access.join(held, USER.digest, certificate(f"u{number}", Role.USER, f"{number}"), NOW_S)
    assert held.tokens[USER.digest].uses_left == 0
    with pytest.raises(AuthError):
        access.join(held, USER.digest, certificate("u3", Role.USER, "3"), NOW_S)
    for number in range(5):
        held = access.join(held, WORKER.digest, certificate(f"w{number}", serial=f"w{number}"), NOW_S)
    assert held.tokens[WORKER.digest].uses_left is None
    assert [token.digest for token in access.usable_tokens(held, NOW_S)] == [WORKER.digest]


def test_a_token_gives_its_own_role_alone() -> None:
    with pytest.raises(AuthError) as caught:
        access.join(records(), USER.digest, certificate("x", Role.ADMIN), NOW_S)
    assert caught.value.details == {"missing": "role"}


@pytest.mark.parametrize("role", [Role.MASTER, Role.PROCESS])
def test_nobody_joins_as_what_the_master_makes(role: Role) -> None:
    with pytest.raises(CallerError):
        records(replace(WORKER, role=role))


@pytest.mark.parametrize("ttl_s", [0.0, 400 * 24 * 3600.0, float("nan")])
def test_a_token_lives_for_a_while(ttl_s: float) -> None:
    with pytest.raises(CallerError):
        records(replace(WORKER, expires_s=NOW_S + ttl_s))


def test_a_name_is_one_members() -> None:
    server = replace(WORKER, digest="c3" * 32, role=Role.SERVER)
    held = access.join(records(WORKER, USER, server), WORKER.digest, certificate(), NOW_S)
    again = certificate(serial="2")
    assert set(access.join(held, WORKER.digest, again, NOW_S).certificates) == {"1", "2"}, "the same key may ask again"
    refused: list[tuple[str, CertificateRecord]] = [
        (WORKER.digest, certificate(serial="2", key="another")),
        (server.digest, certificate(role=Role.SERVER, serial="2")),
        (USER.digest, certificate("local", Role.USER)),
        (USER.digest, certificate("master", Role.USER)),
    ]
    for digest, made in refused:
        with pytest.raises(StateError):
            access.join(held, digest, made, NOW_S)
    access.join(held, USER.digest, certificate("worker-0", Role.USER, "3"), NOW_S)  # a person, not a node
    revoked, _ = access.revoke_certificates(held, "worker-0", None)
    another = certificate(serial="2", key="another")
    with pytest.raises(AuthError):  # it may have kept the token
        access.join(revoked, WORKER.digest, another, NOW_S)
    fresh = replace(WORKER, digest="d4" * 32, created_s=NOW_S + 1)
    access.join(access.add_token(revoked, fresh, NOW_S + 1), fresh.digest, another, NOW_S + 1)


def test_revoking_is_repeatable_and_names_what_it_refuses() -> None:
    held = access.join(records(), WORKER.digest, certificate(), NOW_S)
    held = access.renew(held, "1", certificate(serial="2", key="newer"), NOW_S)
    held = access.join(held, USER.digest, certificate("worker-0", Role.USER, "3"), NOW_S)
    held, refused = access.revoke_certificates(held, "worker-0", Role.WORKER)
    assert [one.serial for one in refused] == ["1", "2"]
    assert held.revoked_serials == ("1", "2")
    assert access.revoke_certificates(held, "worker-0", Role.WORKER)[0] == held
    assert access.revoke_certificates(held, "worker-0", None)[0].revoked_serials == ("1", "2", "3")
    for name, role in (("worker-9", None), ("worker-0", Role.ADMIN)):
        with pytest.raises(NotFoundError):
            access.revoke_certificates(held, name, role)
    with pytest.raises(AuthError):
        access.renew(held, "2", certificate(serial="4"), NOW_S)


def test_revoking_a_token_is_repeatable() -> None:
    held = access.revoke_token(records(), WORKER.token_id)
    assert access.revoke_token(held, WORKER.token_id) == held
    with pytest.raises(AuthError):
        access.join(held, WORKER.digest, certificate(), NOW_S)
    with pytest.raises(NotFoundError):
        access.revoke_token(held, "000000")


def test_nothing_grows_without_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    held = access.join(records(), WORKER.digest, certificate(), NOW_S)
    for number in range(2, access.MAX_OF_ONE + 1):
        held = access.renew(held, "1", certificate(serial=f"{number}"), NOW_S)
    with pytest.raises(StateError):
        access.renew(held, "1", certificate(serial="x"), NOW_S)
    monkeypatch.setattr(access, "MAX_CERTIFICATES", len(held.certificates))
    with pytest.raises(StateError):
        access.join(held, WORKER.digest, certificate("worker-1", serial="y"), NOW_S)
    lasting = {key: replace(one, expires_s=NOW_S + 10_000) for key, one in held.certificates.items()}
    later = access.renew(replace(held, certificates=lasting), "1", certificate(serial="x"), NOW_S + access.REPLACE_S)
    assert later.revoked_serials == ("2",) and "x" in later.certificates
    monkeypatch.setattr(access, "MAX_TOKENS", len(held.tokens))
    with pytest.raises(StateError):
        access.add_token(held, replace(WORKER, digest="d4" * 32), NOW_S)


def test_what_has_expired_is_dropped_and_a_revocation_outlives_its_certificate() -> None:
    held = access.join(records(), WORKER.digest, certificate(), NOW_S)
    held, _ = access.revoke_certificates(held, "worker-0", None)
    assert access.prune_access(held, NOW_S + 59) is held
    later = access.prune_access(held, NOW_S + 101)
    assert not later.tokens
    assert later.revoked_serials == ("1",), "a clock that is behind would still accept it"
    assert access.prune_access(held, NOW_S + 101 + access.KEEP_S) == AccessRecords()


def test_a_revoked_node_counts_as_lost_at_once_and_comes_back_with_a_new_certificate() -> None:
    world = World()
    world.cluster(workers=2, servers=2)
    world.take(lambda tx: tx.submit(make_job(workers={"min": 1, "max": 2})))
    world.ready()
    lost = world.wanted()["trainer-0"].placement.node_id
    token = replace(WORKER, created_s=world.now.unix_s, expires_s=world.now.unix_s + 60)
    made = replace(certificate(lost), issued_s=world.now.unix_s, expires_s=world.now.unix_s + 100)
    world.take(lambda tx: tx.create_token(token), lambda tx: tx.join(token.digest, made))
    world.take(lambda tx: tx.revoke_certificates(lost, None))
    assert lost not in world.state.nodes
    assert all(placement.node_id != lost for placement in world.job().placements)
    world.restart()
    assert world.state.access.revoked_serials == (made.serial,)
    world.join(lost, life="2")
    assert world.state.nodes[lost].connected
    world.wait(access.KEEP_S + 200)
    assert world.state.access == AccessRecords()
    assert world.store.access() == AccessRecords()
