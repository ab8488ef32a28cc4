"""A cluster with certificates in the test's hand: its authority, and a join endpoint that answers as a master does."""

from __future__ import annotations

import socket
import socketserver
import ssl
import threading
from pathlib import Path
from types import TracebackType

from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from pscluster.errors import AuthError, PsError
from pscluster.security.authority import Authority
from pscluster.security.credentials import Credentials
from pscluster.security.identity import Identity, Role
from pscluster.security.join_protocol import JoinAnswer, JoinRequest, pack_answer, unpack_request
from pscluster.security.join_token import JoinToken
from pscluster.security.tls import public_server_context

CLUSTER = "0123456789abcdef"
_PUBLIC = (Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
SECRET = "a secret of a join token"


class PlayedAuthority:
    """Makes members. `directory`: for the authority's files."""

    def __init__(self, directory: Path, cluster_id: str = CLUSTER) -> None:
        self.authority = Authority.create(directory, cluster_id)
        self.cluster_id = cluster_id

    def member(self, role: Role, name: str, lifetime_s: float = 3600.0) -> Credentials:
        return self.authority.issue(Identity(cluster_id=self.cluster_id, role=role, name=name), lifetime_s)

    def token(self, role: Role, *addresses: str, master: str = "", secret: str = SECRET) -> JoinToken:
        return JoinToken(
            secret=secret,
            authority_sha256=self.authority.sha256,
            cluster_id=self.cluster_id,
            role=role,
            addresses=addresses,
            master=master,
        )


class PlayedJoinEndpoint:
    """Listens while the context lasts. `lost_answers`: how many joins it still serves without answering."""

    def __init__(self, played: PlayedAuthority, role: Role, port: int = 0) -> None:
        self.requests: list[JoinRequest] = []
        self.lost_answers = 0
        self.lifetime_s = 3600.0
        self._played = played
        self._role = role
        self._keys: dict[str, bytes] = {}
        self._context = public_server_context(played.member(Role.MASTER, "master"))
        self._server = _Server(("127.0.0.1", port), _Handler)
        self._server.endpoint = self
        self.address = f"127.0.0.1:{self._server.server_address[1]}"
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True)

    def __enter__(self) -> PlayedJoinEndpoint:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def serve(self, plain: socket.socket) -> None:
        plain.settimeout(10)
        with self._context.wrap_socket(plain, server_side=True) as tls:
            request = unpack_request(tls.makefile("rb").readline())
            answer: JoinAnswer | PsError
            try:
                answer = self._answer(request)
            except PsError as error:
                answer = error
            if request is not None and self.lost_answers:
                self.lost_answers -= 1
                return
            tls.sendall(pack_answer(answer))

    def _answer(self, request: JoinRequest | None) -> JoinAnswer:
        authority = self._played.authority
        authority_pem = authority.certificate_pem.decode()
        if request is None:
            return JoinAnswer(authority_pem=authority_pem)
        self.requests.append(request)
        if request.secret != SECRET:
            raise AuthError("the join token is not known, or has expired")
        key = x509.load_pem_x509_csr(request.csr_pem.encode()).public_key().public_bytes(*_PUBLIC)
        if self._keys.setdefault(request.name, key) != key:
            raise AuthError(f"{request.name} is a member already, with another key")
        identity = Identity(cluster_id=self._played.cluster_id, role=self._role, name=request.name)
        made = authority.sign(request.csr_pem.encode(), identity, self.lifetime_s)
        return JoinAnswer(authority_pem=authority_pem, certificate_pem=made.decode())


class _Server(socketserver.ThreadingTCPServer):
    allow_reuse_address = True
    daemon_threads = True
    endpoint: PlayedJoinEndpoint


class _Handler(socketserver.BaseRequestHandler):
    server: _Server

    def handle(self) -> None:
        try:
            self.server.endpoint.serve(self.request)
        except (OSError, ssl.SSLError, ValueError):
            return  # the peer gave up: the client under test says why
