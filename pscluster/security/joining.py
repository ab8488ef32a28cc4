"""The client of the master's join endpoint: a join token becomes a certificate.

The first connection asks for the authority's certificate and does not trust the answer: it must have the hash that the
token carries. The second is verified with it, and sends the secret."""

from __future__ import annotations

import hmac
import socket
import ssl

from pscluster.address import split_address
from pscluster.errors import AuthError, PsError
from pscluster.reachability import reason_of, unreachable
from pscluster.security.authority import sha256_of
from pscluster.security.credentials import Credentials, new_request, parse_certificate
from pscluster.security.identity import Identity, Role
from pscluster.security.join_protocol import (
    DEADLINE_S,
    MAX_LINE_BYTES,
    JoinAnswer,
    JoinRequest,
    pack_request,
    unpack_answer,
)
from pscluster.security.join_token import JoinToken
from pscluster.security.tls import identity_of, joining_context


def join(token: JoinToken, name: str, protocol: int, key_pem: bytes = b"") -> Credentials:
    """Become the member `name` in the token's role. Tries the token's addresses in turn; blocks up to 20 s for each.
    The key is made here, unless it is given, and never sent; with the same key it is safe to repeat. Raises
    AuthError when the token or the name is refused, or the authority there is another one; UnreachableError when
    nobody answers."""
    Identity(cluster_id=token.cluster_id, role=token.role, name=name)  # or say what is wrong with the name at once
    failure: PsError = AuthError("the join token names no address")
    for address in token.addresses:
        try:
            return _join_at(address, token, name, protocol, key_pem)
        except OSError as error:
            failure = unreachable(error, "the master", address)
            if reason_of(error) == "tls":
                raise failure from None
    raise failure


def _join_at(address: str, token: JoinToken, name: str, protocol: int, key_pem: bytes) -> Credentials:
    authority_pem = _ask(address, None, None).authority_pem.encode()
    found = sha256_of(parse_certificate(authority_pem))
    if not hmac.compare_digest(found, token.authority_sha256):
        raise AuthError(
            f"the master at {address} belongs to another cluster, or somebody answers in its place: its certificate "
            f"authority has the SHA-256 {found[:16]}..., the token names {token.authority_sha256[:16]}...",
            action="make a new token on the master's host: psctl token create",
            details={"field": "authority"},
        )
    key_pem, csr_pem = new_request(name, key_pem)
    request = JoinRequest(secret=token.secret, name=name, csr_pem=csr_pem.decode(), protocol=protocol)
    certificate_pem = _ask(address, request, authority_pem).certificate_pem.encode()
    made = Credentials(key_pem=key_pem, certificate_pem=certificate_pem, authority_pem=authority_pem)
    wanted = Identity(cluster_id=token.cluster_id, role=token.role, name=name)
    if made.identity != wanted:
        raise AuthError(f"the master made a certificate for {made.identity.uri}, not {wanted.uri}")
    return made


def _ask(address: str, request: JoinRequest | None, authority_pem: bytes | None) -> JoinAnswer:
    """One request on a connection of its own. Raises OSError, or the PsError that the master answers with."""
    with socket.create_connection(split_address(address), DEADLINE_S) as plain:
        with joining_context(authority_pem).wrap_socket(plain) as tls:
            if authority_pem is not None and identity_of(tls).role is not Role.MASTER:
                raise AuthError(f"{address} is answered by {identity_of(tls).uri}, which is not the master")
            tls.sendall(pack_request(request))
            line = _read_line(tls)
    return unpack_answer(line, address)


def _read_line(tls: ssl.SSLSocket) -> bytes:
    line = bytearray()
    while not line.endswith(b"\n") and len(line) <= MAX_LINE_BYTES:
        data = tls.recv(4096)
        if not data:
            break
        line += data
    return bytes(line)
