"""Authority, identities, credentials, TLS contexts and join tokens."""

from __future__ import annotations

import socket
import ssl
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from pscluster.errors import AuthError, StateError
from pscluster.security.authority import Authority, cluster_id_of
from pscluster.security.credentials import Credentials, CredentialSource, new_request
from pscluster.security.identity import Identity, Role
from pscluster.security.join_token import JoinToken
from pscluster.security.tls import client_context, identity_of, server_context

CLUSTER = "0123456789abcdef"
WORKER = Identity(cluster_id=CLUSTER, role=Role.WORKER, name="worker-0")
TRAINER = Identity(cluster_id=CLUSTER, role=Role.PROCESS, name="lm-abc123/trainer-0/1")


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority.create(tmp_path_factory.mktemp("ca") / "certs", CLUSTER)


@pytest.mark.parametrize("identity", [WORKER, TRAINER], ids=str)
def test_an_identity_survives_its_uri(identity: Identity) -> None:
    assert Identity.parse(identity.uri) == identity


@pytest.mark.parametrize(
    "uri",
    [
        "",
        "https://0123456789abcdef/worker/w",
        f"pscluster://{CLUSTER}/worker",
        f"pscluster://{CLUSTER}/root/w",
        f"pscluster://{CLUSTER}/worker/a/b",
        f"pscluster://{CLUSTER}/worker/",
        f"pscluster://{CLUSTER}/process/trainer-0",
        f"pscluster://{CLUSTER}/worker/a b",
        f"pscluster://{CLUSTER}/worker/../x",
        "pscluster://0123/worker/w",
    ],
)
def test_other_uris_are_refused(uri: str) -> None:
    with pytest.raises(AuthError):
        Identity.parse(uri)


def test_an_authority_is_loaded_and_never_replaced(tmp_path: Path) -> None:
    made = Authority.create(tmp_path / "certs", CLUSTER)
    loaded = Authority.load(tmp_path / "certs")
    assert (loaded.sha256, loaded.cluster_id) == (made.sha256, CLUSTER)
    assert (tmp_path / "certs").stat().st_mode & 0o777 == 0o700
    assert (tmp_path / "certs" / "ca.key").stat().st_mode & 0o777 == 0o600
    with pytest.raises(StateError):
        Authority.create(tmp_path / "certs", CLUSTER)
    (tmp_path / "certs" / "ca.key").chmod(0o644)
    with pytest.raises(AuthError):
        Authority.load(tmp_path / "certs")


def test_the_key_of_another_authority_is_refused(tmp_path: Path) -> None:
    Authority.create(tmp_path / "a", CLUSTER)
    Authority.create(tmp_path / "b", CLUSTER)
    (tmp_path / "a" / "ca.key").write_bytes((tmp_path / "b" / "ca.key").read_bytes())
    with pytest.raises(AuthError):
        Authority.load(tmp_path / "a")


def test_a_cluster_id_is_made_once(tmp_path: Path) -> None:
    made = cluster_id_of(tmp_path / "master")
    assert made == cluster_id_of(tmp_path / "master")
    Identity(cluster_id=made, role=Role.MASTER, name="master")


def test_credentials_are_stored_for_their_owner_alone(authority: Authority, tmp_path: Path) -> None:
    made = authority.issue(WORKER, 3600)
    made.save(tmp_path / "identity")
    assert Credentials.load(tmp_path / "identity") == made
    assert all(path.stat().st_mode & 0o777 == 0o600 for path in (tmp_path / "identity").iterdir())
    assert made.not_before_s < made.renew_at_s < made.not_after_s
    assert "PRIVATE" not in repr(made) and "PRIVATE" not in str(made)
    (tmp_path / "identity" / "key.pem").chmod(0o640)
    with pytest.raises(AuthError):
        Credentials.load(tmp_path / "identity")


def test_a_source_has_the_newest_credentials(authority: Authority) -> None:
    first, second = authority.issue(WORKER, 3600), authority.issue(WORKER, 3600)
    source = CredentialSource(first)
    source.replace(second)
    assert source.get() is second


@pytest.mark.parametrize(
    "csr", [b"", b"-----BEGIN CERTIFICATE REQUEST-----\nAAAA\n-----END CERTIFICATE REQUEST-----\n"]
)
def test_a_request_that_is_none_is_refused(authority: Authority, csr: bytes) -> None:
    with pytest.raises(AuthError):
        authority.sign(csr, WORKER, 60)


def test_the_name_in_a_request_is_not_used(authority: Authority) -> None:
    key_pem, csr_pem = new_request("master")
    signed = authority.sign(csr_pem, WORKER, 60)
    made = Credentials(key_pem=key_pem, certificate_pem=signed, authority_pem=authority.certificate_pem)
    assert made.identity == WORKER


def handshake(server: ssl.SSLContext, client: ssl.SSLContext) -> tuple[ssl.SSLSocket, ssl.SSLSocket]:
    """Both ends of a connection after the handshake. Raises what either end raises."""
    one, other = socket.socketpair()
    one.settimeout(10)
    other.settimeout(10)

    def accept() -> ssl.SSLSocket:
        with_client = server.wrap_socket(one, server_side=True)
        with_client.sendall(b"x")  # in TLS 1.3 a client learns of a refusal when it reads
        return with_client

    with ThreadPoolExecutor(1) as pool:
        accepted = pool.submit(accept)
        try:
            dialled = client.wrap_socket(other)
            dialled.recv(1)
        except OSError:
            other.close()
            accepted.exception()
            raise
        return accepted.result(), dialled


def test_both_ends_know_each_other(authority: Authority) -> None:
    master = authority.issue(Identity(cluster_id=CLUSTER, role=Role.MASTER, name="master"), 60)
    trainer = authority.issue(TRAINER, 60)
    accepted, dialled = handshake(server_context(master), client_context(trainer))
    with accepted, dialled:
        assert identity_of(accepted) == TRAINER
        assert identity_of(dialled).role is Role.MASTER
        assert accepted.version() == "TLSv1.3"


def test_another_clusters_certificate_is_refused(authority: Authority, tmp_path: Path) -> None:
    stranger = Authority.create(tmp_path / "certs", CLUSTER).issue(WORKER, 60)
    ours = authority.issue(WORKER, 60)
    with pytest.raises(ssl.SSLError):
        handshake(server_context(ours), client_context(stranger))
    with pytest.raises(ssl.SSLError):
        handshake(server_context(stranger), client_context(ours))


def test_an_expired_certificate_is_refused(authority: Authority) -> None:
    expired = authority.issue(WORKER, -1)
    with pytest.raises(ssl.SSLError):
        handshake(server_context(authority.issue(WORKER, 60)), client_context(expired))


def test_a_join_token_survives_its_text(authority: Authority) -> None:
    token = JoinToken(
        secret="s" * 32,
        authority_sha256=authority.sha256,
        cluster_id=CLUSTER,
        role=Role.WORKER,
        addresses=("10.0.0.1:7071", "[fd00::1]:7071"),
        master="10.0.0.1:7070",
    )
    assert JoinToken.parse(token.encode() + "\n") == token
    assert token.secret not in repr(token)
    assert token.encode().replace("-", "").replace("_", "").isalnum()


@pytest.mark.parametrize("text", ["", "psj1-", "psj1-!!!", "psj1-e30", "psj2-e30", "psj1-" + "A" * 5000, "psj1-W10"])
def test_what_is_no_join_token_is_refused(text: str) -> None:
    with pytest.raises(AuthError) as raised:
        JoinToken.parse(text)
    assert not text or text not in str(raised.value) or text == "psj1-"
