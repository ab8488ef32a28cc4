"""The Access service: join tokens and certificates. Who may call it stands in `pscluster.rpc.access`; what is decided
stands in `psmaster.model.access`."""

from __future__ import annotations

import secrets
from collections.abc import Iterable
from typing import Any

from pscluster.errors import CallerError, StateError
from pscluster.rpc.access import CALLER
from pscluster.security.identity import JOINABLE, Role
from pscluster.security.join_token import JoinToken
from pscluster.v1 import access_pb2, access_pb2_grpc
from psmaster.control.loop import ControlLoop
from psmaster.control.security import Addresses
from psmaster.model.access import CertificateRecord, TokenRecord, usable_tokens

_SECRET_BYTES = 32


class AccessService(access_pb2_grpc.AccessServicer):
    """Raises PsError from every method; the server's interceptor maps it."""

    def __init__(self, core: ControlLoop, addresses: Addresses) -> None:
        """`addresses`: join tokens name them."""
        self._core = core
        self._addresses = addresses

    async def CreateToken(self, request: access_pb2.CreateTokenRequest, context: Any) -> access_pb2.CreateTokenReply:
        authority, addresses = self._core.security.require_authority(), self._addresses
        if not addresses.joins:
            raise StateError("nobody can join: the master listens at no TCP address", action="give psmaster --listen")
        now_s = self._core.now().unix_s
        made = JoinToken(
            secret=secrets.token_urlsafe(_SECRET_BYTES),
            authority_sha256=authority.sha256,
            cluster_id=authority.cluster_id,
            role=_role(request.role),
            addresses=addresses.joins,
            master=addresses.master,
        )
        token = TokenRecord(
            digest=made.digest,
            role=made.role,
            created_s=now_s,
            expires_s=now_s + request.ttl_s,
            uses_left=request.uses or None,
        )
        await self._core.ask(lambda tx: tx.create_token(token))
        return access_pb2.CreateTokenReply(token=made.encode(), token_id=token.token_id)

    async def ListTokens(self, request: access_pb2.ListTokensRequest, context: Any) -> access_pb2.ListTokensReply:
        found = usable_tokens(self._core.state.access, self._core.now().unix_s)
        return access_pb2.ListTokensReply(
            tokens=[
                access_pb2.Token(
                    token_id=token.token_id,
                    role=token.role,
                    created_s=token.created_s,
                    expires_s=token.expires_s,
                    uses_left=token.uses_left or 0,
                    limited=token.uses_left is not None,
                )
                for token in found
            ]
        )

    async def RevokeToken(self, request: access_pb2.RevokeTokenRequest, context: Any) -> access_pb2.RevokeTokenReply:
        await self._core.ask(lambda tx: tx.revoke_token(request.token_id))
        return access_pb2.RevokeTokenReply()

    async def ListCertificates(
        self, request: access_pb2.ListCertificatesRequest, context: Any
    ) -> access_pb2.ListCertificatesReply:
        now_s = self._core.now().unix_s
        found = [one for one in self._core.state.access.certificates.values() if one.expires_s > now_s]
        return access_pb2.ListCertificatesReply(certificates=_messages(found))

    async def RevokeCertificates(
        self, request: access_pb2.RevokeCertificatesRequest, context: Any
    ) -> access_pb2.RevokeCertificatesReply:
        role = _role(request.role) if request.role else None
        refused = await self._core.ask(lambda tx: tx.revoke_certificates(request.name, role))
        return access_pb2.RevokeCertificatesReply(certificates=_messages(refused))

    async def Renew(self, request: access_pb2.RenewRequest, context: Any) -> access_pb2.RenewReply:
        caller, security = CALLER.get(), self._core.security
        if caller.local:
            raise StateError("the caller has no certificate to renew", action="join with a token first")
        pem, made = security.certify(request.csr_pem, caller.role, caller.name)
        await self._core.ask(lambda tx: tx.renew(made, caller.serial))
        return access_pb2.RenewReply(certificate_pem=pem, authority_pem=security.require_authority().certificate_pem)


def _messages(records: Iterable[CertificateRecord]) -> list[access_pb2.Certificate]:
    return [
        access_pb2.Certificate(
            serial=one.serial,
            role=one.role,
            name=one.name,
            issued_s=one.issued_s,
            expires_s=one.expires_s,
            revoked=one.revoked,
        )
        for one in records
    ]


def _role(name: str) -> Role:
    """Raises CallerError for a role that nobody can join as."""
    if name not in list(JOINABLE):
        raise CallerError(f"{name[:40]!r} is not a role", action=f"choose {', '.join(JOINABLE)}")
    return Role(name)
