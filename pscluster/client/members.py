"""Who may talk to a cluster: join tokens and certificates, for admins; the renewal of one's own certificate."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import grpc

from pscluster.client import calls
from pscluster.client.records import Record
from pscluster.rpc.codec import Wire
from pscluster.v1 import access_pb2, access_pb2_grpc


@dataclass(frozen=True, kw_only=True)
class Token(Record):
    """A join token without its secret. `uses_left` counts only if `limited`."""

    token_id: str
    role: str
    created_s: float
    expires_s: float
    uses_left: int
    limited: bool


@dataclass(frozen=True, kw_only=True)
class Certificate(Record):
    """A certificate that has not expired. `serial`: hex digits. `revoked`: every daemon refuses it."""

    serial: str
    role: str
    name: str
    issued_s: float
    expires_s: float
    revoked: bool


_wire = Wire()
_TOKEN = _wire.pair(Token, access_pb2.Token)
_CERTIFICATE = _wire.pair(Certificate, access_pb2.Certificate)


class Members:
    """The master's Access service. Every call has a deadline and raises a PsError; AuthError for a caller whose role
    may not do this."""

    def __init__(self, channel: grpc.Channel) -> None:
        self._access: Any = access_pb2_grpc.AccessStub(channel)  # type: ignore[no-untyped-call]

    def create_token(self, role: str, ttl_s: float, uses: int = 0) -> tuple[str, str]:
        """Make a join token; returns its text, which only the caller has, and its id. `uses`: 0 for any number."""
        request = access_pb2.CreateTokenRequest(role=role, ttl_s=ttl_s, uses=uses)
        reply = calls.unary(self._access.CreateToken, request)
        return reply.token, reply.token_id

    def tokens(self) -> list[Token]:
        """The join tokens that can still be used, oldest first."""
        return [_TOKEN.decode(m) for m in calls.unary(self._access.ListTokens, access_pb2.ListTokensRequest()).tokens]

    def revoke_token(self, token_id: str) -> None:
        """Make a join token useless. Idempotent. Raises NotFoundError."""
        calls.unary(self._access.RevokeToken, access_pb2.RevokeTokenRequest(token_id=token_id))

    def certificates(self) -> list[Certificate]:
        """The certificates that have not expired, oldest first."""
        reply = calls.unary(self._access.ListCertificates, access_pb2.ListCertificatesRequest())
        return [_CERTIFICATE.decode(m) for m in reply.certificates]

    def revoke(self, name: str, role: str = "") -> list[Certificate]:
        """Revoke every certificate of a node or user, of one role or of every; returns those that are revoked now.
        Idempotent. Raises NotFoundError."""
        request = access_pb2.RevokeCertificatesRequest(name=name, role=role)
        return [_CERTIFICATE.decode(m) for m in calls.unary(self._access.RevokeCertificates, request).certificates]

    def renew(self, csr_pem: bytes) -> tuple[bytes, bytes]:
        """A new certificate for the caller's own identity and the key of the request, and the authority's, as PEM."""
        reply = calls.unary(self._access.Renew, access_pb2.RenewRequest(csr_pem=csr_pem))
        return reply.certificate_pem, reply.authority_pem
