"""How an agent becomes a member of a cluster with certificates, and stays one: it joins with a token, keeps its
identity in its state directory, and renews its certificate before that expires.

    <state_dir>/identity/key.pem, certificate.pem, authority.pem   its credentials
    <state_dir>/identity/request.pem                               its key while it joins: so a retry asks for the same
    <state_dir>/identity/master                                    where the master takes members, as the token said
"""

from __future__ import annotations

import asyncio
import random
import socket
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import grpc
import structlog

from pscluster.agent.addresses import is_local
from pscluster.agent.isolation import IDENTITY
from pscluster.errors import AuthError, PsError, SettingsError, StorageError, UnreachableError
from pscluster.rpc import DEADLINE_S, PROTOCOL, Access, error_of, open_aio_channel, read_token
from pscluster.security import credentials as stored
from pscluster.security.credentials import Credentials, CredentialSource, new_request, write_private
from pscluster.security.identity import Role
from pscluster.security.join_token import JoinToken
from pscluster.security.joining import join
from pscluster.telemetry import CERTIFICATE_EXPIRES
from pscluster.v1.access_pb2 import RenewRequest
from pscluster.v1.access_pb2_grpc import AccessStub
from pscluster.wire.backoff import delay_s

if TYPE_CHECKING:
    from pscluster.agent.daemon import AgentSettings

REQUEST, MASTER = "request.pem", "master"
RETRY_CAP_S = 30.0
LOOK_S = 60.0
"""The longest wait before the clock is read again: it may be set, or stand still while the host sleeps."""
_log = structlog.get_logger(__name__)


@dataclass(frozen=True, kw_only=True)
class Membership:
    """Who this agent is, where its master is, and how it shows itself there. `directory`: of its identity."""

    node_id: str
    master: str
    access: Access
    directory: Path


async def become_member(role: Role, settings: AgentSettings) -> Membership:
    """What the identity in the state directory, the join token and the settings make of this agent. Without an identity
    it joins, and waits as long as the master is away. Raises SettingsError, and AuthError when the token or the name is
    refused, or another cluster answers."""
    directory = settings.state_dir / IDENTITY
    token = read_join_token(settings.join, settings.join_file) if settings.join else None
    held = Credentials.load(directory) if (directory / stored.KEY).exists() else None
    if must_join(held, token, role, settings.node_id, time.time()):
        assert token is not None, "there is nothing to join with"
        known = held.identity.name if held is not None else default_node_id(socket.gethostname())
        held = await _join(token, settings.node_id or known, directory)
    if held is None:
        return _by_token(settings, directory)
    master = settings.master or (token.master if token is not None else "") or _known_master(directory)
    if not master or master.startswith("unix:"):
        raise SettingsError(
            f"{held.identity.name} has a certificate, and needs the TCP address of the master",
            action="give --master HOST:PORT" if not master else f"remove {directory}, or give --master HOST:PORT",
        )
    access = Access(source=CredentialSource(held))
    return Membership(node_id=held.identity.name, master=master, access=access, directory=directory)


def read_join_token(text: str, path: Path | None) -> JoinToken:
    """The token in the file `path`, if there is one, else in `text`. Blocks. Raises SettingsError, AuthError."""
    if path is None:
        return JoinToken.parse(text)
    try:
        return JoinToken.parse(path.read_text(encoding="ascii"))
    except (OSError, UnicodeDecodeError) as error:
        raise SettingsError(f"cannot read the join token in {path}: {error}") from None


def default_node_id(hostname: str) -> str:
    """The host's short name."""
    return hostname.partition(".")[0]


def must_join(held: Credentials | None, token: JoinToken | None, role: Role, node_id: str | None, now_s: float) -> bool:
    """Whether an agent needs a new certificate: it has none that is valid, and a token. Pure. Raises SettingsError when
    identity, token and settings contradict each other, AuthError when the identity has expired and there is no
    token."""
    if token is not None and token.role is not role:
        raise SettingsError(
            f"the join token is for the role {token.role}, this daemon is a {role}",
            action=f"psctl token create --role {role}",
        )
    if held is None:
        return token is not None
    own = held.identity
    if own.role is not role or node_id not in (None, own.name):
        raise SettingsError(
            f"this state directory is that of {own.role} {own.name}, not of {role} {node_id or own.name}",
            action="give each daemon its own --state-dir and --node-id",
        )
    if token is not None and token.cluster_id != own.cluster_id:
        raise SettingsError(
            f"{own.name} is a member of cluster {own.cluster_id}, the join token is for {token.cluster_id}",
            action="give another --state-dir, or remove the directory `identity` in this one to change clusters",
        )
    if now_s < held.not_after_s:
        return False
    if token is None:
        raise expired(held)
    return True


def expired(held: Credentials) -> AuthError:
    at = time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime(held.not_after_s))
    return AuthError(
        f"the certificate of {held.identity.name} expired at {at}",
        action="check the clock, or join again: psctl token create, and start with --join TOKEN",
        details={"reason": "expired"},
    )


def _by_token(settings: AgentSettings, directory: Path) -> Membership:
    """Of a cluster without certificates, or on the master's own host. Raises SettingsError, AuthError."""
    join_it = "a join token (psctl token create) with --join TOKEN"
    if settings.master is None:
        raise SettingsError("master is not set", action=f"give --master or PS_MASTER, or {join_it}")
    if settings.token_file is None:
        raise SettingsError("token_file is not set", action=f"give --token-file or PS_TOKEN_FILE, or {join_it}")
    if not is_local(settings.master):
        raise SettingsError(
            f"the master at {settings.master} is on another host: its token is not sent over a network",
            action=f"give {join_it}",
        )
    node_id = settings.node_id or default_node_id(socket.gethostname())
    access = Access(token=read_token(settings.token_file))
    return Membership(node_id=node_id, master=settings.master, access=access, directory=directory)


async def _join(token: JoinToken, name: str, directory: Path) -> Credentials:
    """Ask until the master answers. Raises AuthError, StorageError."""
    key_pem = await asyncio.to_thread(_request_key, name, directory)
    failures, reported = 0, ""
    while True:
        try:
            made = await asyncio.to_thread(join, token, name, PROTOCOL, key_pem)
            break
        except UnreachableError as error:
            if error.cause != reported:
                reported = error.cause
                _log.warning("waiting for the master, to join", addresses=token.addresses, cause=error.cause)
        failures += 1
        await asyncio.sleep(delay_s(failures, random.random(), cap_s=RETRY_CAP_S))
    await asyncio.to_thread(_keep, made, token.master, directory)
    _log.info("joined the cluster", cluster_id=token.cluster_id, role=str(token.role), name=name)
    return made


def _request_key(name: str, directory: Path) -> bytes:
    """The key of a join that was begun, or a new one, which is stored first: when the answer is lost the master admits
    no other key under this name."""
    path = directory / REQUEST
    try:
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        directory.chmod(0o700)
        if path.exists():
            return path.read_bytes()
        key_pem, _ = new_request(name)
        write_private(path, key_pem)
    except OSError as error:
        raise StorageError(f"cannot use {directory}: {error.strerror}") from None
    return key_pem


def _keep(made: Credentials, master: str, directory: Path) -> None:
    made.save(directory)
    try:
        write_private(directory / MASTER, f"{master}\n".encode())
        (directory / REQUEST).unlink(missing_ok=True)
    except OSError as error:
        raise StorageError(f"cannot write in {directory}: {error.strerror}") from None


def _known_master(directory: Path) -> str:
    try:
        return (directory / MASTER).read_text(encoding="ascii").strip()
    except FileNotFoundError:
        return ""  # without it, --master must be given
    except (OSError, UnicodeDecodeError) as error:
        raise StorageError(f"cannot read {directory / MASTER}: {error}") from None


class Renewal:
    """Renews the certificate of an agent over its master's channel. Used from the agent's loop."""

    def __init__(self, member: Membership, source: CredentialSource) -> None:
        self._member = member
        self._source = source

    async def run(self) -> None:
        """Renew whenever two thirds of a certificate's life are over; never returns. Connections that are opened later
        use the new one. Raises AuthError when the certificate expires: the master accepts no renewal any more."""
        CERTIFICATE_EXPIRES.set(self._source.get().not_after_s)
        failures = 0
        while True:
            held = self._source.get()
            await asyncio.sleep(wait_s(held, time.time(), failures, random.random()))
            now_s = time.time()
            if now_s < held.renew_at_s:
                continue
            if now_s >= held.not_after_s:
                raise expired(held)
            try:
                await self._renew(held)
                failures = 0
            except PsError as error:
                failures += 1
                left_s = round(held.not_after_s - now_s)
                _log.warning("cannot renew the certificate", code=error.code, cause=error.cause, expires_in_s=left_s)

    async def _renew(self, held: Credentials) -> None:
        name = held.identity.name
        key_pem, csr_pem = new_request(name)
        async with open_aio_channel(self._member.master, self._member.access) as channel:
            stub: Any = AccessStub(channel)  # type: ignore[no-untyped-call]
            try:
                reply = await stub.Renew(RenewRequest(csr_pem=csr_pem), timeout=DEADLINE_S)
            except grpc.RpcError as failure:
                raise error_of(failure) from None
        made = held.renewed(key_pem, reply.certificate_pem, reply.authority_pem)
        self._source.replace(made)
        CERTIFICATE_EXPIRES.set(made.not_after_s)
        _log.info("renewed the certificate", serial=made.serial, expires_s=round(made.not_after_s))
        try:
            await asyncio.to_thread(made.save, self._member.directory)
        except StorageError as error:  # it is in use all the same; the stored one is valid until it expires
            _log.warning("cannot store the renewed certificate", code=error.code, cause=error.cause)


def wait_s(held: Credentials, now_s: float, failures: int, draw: float) -> float:
    """How long to wait before a certificate is renewed, or before the next try after so many failures. Pure."""
    if now_s < held.renew_at_s:
        return min(held.renew_at_s - now_s, LOOK_S)
    if not failures:
        return 0.0
    left_s = max(0.0, held.not_after_s - now_s)
    return min(left_s, delay_s(failures, draw, cap_s=RETRY_CAP_S))
