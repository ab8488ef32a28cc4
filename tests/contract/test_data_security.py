"""TLS under data connections: who gets one, what is refused by name, and what a cluster with plain data sends."""

from __future__ import annotations

import socket
import ssl
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest

from harness.certificates import CLUSTER, authority, credentials, expired, message, security, trusting
from harness.wire import DEADLINE_S, MIB, PROCESS, Recorder, header
from pscluster.errors import AuthError, FrameError, PsError
from pscluster.security.credentials import Credentials
from pscluster.security.identity import Role
from pscluster.security.tls import server_context
from pscluster.v1.plan_pb2 import ProcessSpec
from pscluster.wire.connection import Connection
from pscluster.wire.frame import HEADER_BYTES, pack
from pscluster.wire.reactor import Reactor
from pscluster.wire.tls import DataSecurity

PARTITION = "job-a/partition-0/1"
OTHER_CLUSTER = "0123456789abcdef"


class Pair:
    """A partition that listens and a trainer that dials, each with a reactor and credentials of its own."""

    def __init__(
        self, dialler: Credentials | None = None, listener: Credentials | None = None, *, encrypts: bool = True
    ) -> None:
        self.security = security(listener or credentials(PARTITION), encrypts=encrypts)
        self.near = Reactor(security=self.security)
        self.far = Reactor(security=security(dialler or credentials(PROCESS), encrypts=encrypts))
        self.listening, self.dialling = Recorder(), Recorder()
        self.address = self.near.listen("tcp:127.0.0.1:0", self.listening)

    def until(self, condition: Callable[[], bool]) -> None:
        deadline_s = time.monotonic() + DEADLINE_S
        while not condition():
            assert time.monotonic() < deadline_s, "nothing more happens"
            self.turn()

    def turn(self) -> None:
        self.near.poll(0.01)
        self.far.poll(0.01)

    def dial(self, address: str = "", peer: str = PARTITION) -> tuple[Connection | None, PsError | None]:
        answers: list[tuple[Connection | None, PsError | None]] = []
        self.far.dial(address or self.address, self.dialling, lambda *answer: answers.append(answer), peer)
        self.until(lambda: bool(answers))
        return answers[0]

    def connected(self) -> Connection:
        connection, why = self.dial()
        assert connection is not None, why
        return connection

    def raw(self) -> socket.socket:
        return socket.create_connection(("127.0.0.1", int(self.address.rpartition(":")[2])), DEADLINE_S)

    def end(self) -> PsError:
        """Why the listener closed its first connection."""
        self.until(lambda: bool(self.listening.ends))
        assert self.listening.frames == [] and self.listening.given_bytes == 0
        assert self.listening.ends[0] is not None
        return self.listening.ends[0]

    def close(self) -> None:
        self.near.close()
        self.far.close()


@pytest.fixture
def opened() -> Iterator[Callable[..., Pair]]:
    made: list[Pair] = []

    def open_pair(*held: Credentials | None, encrypts: bool = True) -> Pair:
        made.append(Pair(*held, encrypts=encrypts))
        return made[-1]

    yield open_pair
    for pair in made:
        pair.close()


def test_each_end_knows_the_others_process(opened: Callable[..., Pair]) -> None:
    pair = opened()
    connection = pair.connected()
    connection.send(header(1), [b"hello"])
    pair.until(lambda: bool(pair.listening.frames))

    assert connection.identity is not None and connection.identity.name == PARTITION
    seen = pair.listening.connections[0].identity
    assert seen is not None and (seen.cluster_id, seen.role, seen.name) == (CLUSTER, Role.PROCESS, PROCESS)


STRANGERS: dict[str, tuple[Callable[[], Credentials], str]] = {
    "a worker": (lambda: credentials("node-a", Role.WORKER), "identity"),
    "an admin": (lambda: credentials("root", Role.ADMIN), "identity"),
    "the master": (lambda: credentials("master", Role.MASTER), "identity"),
    "another cluster of this authority": (
        lambda: credentials(PROCESS, cluster_id=OTHER_CLUSTER, of=authority()),
        "cluster",
    ),
    "another authority": (lambda: credentials(PROCESS, key=1), "tls"),
    "another cluster": (lambda: credentials(PROCESS, cluster_id=OTHER_CLUSTER), "tls"),
    "expired": (lambda: expired(PROCESS), "tls"),
}


@pytest.mark.parametrize("who", STRANGERS)
def test_a_listener_refuses_whom_it_does_not_know(who: str, opened: Callable[..., Pair]) -> None:
    """Each of them takes the listener for a member, so that it is the listener who refuses."""
    make, field = STRANGERS[who]
    listener = credentials(PARTITION)
    pair = opened(trusting(make(), listener), listener)
    connection, why = pair.dial()
    end = pair.end()
    if connection is not None:
        pair.until(lambda: bool(pair.dialling.ends))

    assert isinstance(end, AuthError)
    assert (end.details["field"], end.details["side"]) == (field, "listener")
    assert connection is not None or why is not None


@pytest.mark.parametrize(
    ("make", "code", "what"),
    [
        (lambda: credentials("job-a/partition-0/2"), "PS-1005", ("field", "identity")),
        (lambda: credentials("job-b/partition-0/1"), "PS-1005", ("field", "identity")),
        (lambda: credentials("node-b", Role.SERVER), "PS-1005", ("field", "identity")),
        (lambda: credentials(PARTITION, key=1), "PS-3001", ("reason", "tls")),
        (lambda: expired(PARTITION), "PS-3001", ("reason", "tls")),
    ],
    ids=["another attempt", "another job", "a node", "another authority", "expired"],
)
def test_who_dials_sends_nothing_to_another_process(
    make: Callable[[], Credentials], code: str, what: tuple[str, str], opened: Callable[..., Pair]
) -> None:
    dialler = credentials(PROCESS)
    pair = opened(dialler, trusting(make(), dialler))
    connection, why = pair.dial()
    pair.until(lambda: bool(pair.listening.ends))

    assert connection is None and why is not None and why.code == code
    assert why.details[what[0]] == what[1]
    assert pair.listening.frames == [] and pair.listening.given_bytes == 0


@pytest.mark.parametrize("version", [ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3])
def test_a_caller_without_a_certificate_is_refused(version: ssl.TLSVersion, opened: Callable[..., Pair]) -> None:
    pair = opened()
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    context.maximum_version = version
    with ThreadPoolExecutor(1) as thread, pair.raw() as sock:
        said = thread.submit(_say, context, sock)
        end = pair.end()
        with pytest.raises(ssl.SSLError):
            said.result(DEADLINE_S)

    assert isinstance(end, AuthError) and end.details["field"] == "tls"


def _say(context: ssl.SSLContext, sock: socket.socket) -> bytes:
    with context.wrap_socket(sock) as tls:
        tls.sendall(pack(header(1)))
        return tls.recv(1)


def test_plain_frames_are_refused_where_tls_is(opened: Callable[..., Pair]) -> None:
    pair = opened()
    with pair.raw() as peer:
        peer.sendall(pack(header(1)))
        end = pair.end()

    assert isinstance(end, AuthError) and end.details["field"] == "tls"


def test_a_record_that_was_changed_on_its_way_ends_the_connection(opened: Callable[..., Pair]) -> None:
    pair = opened()
    connection = pair.connected()
    connection.send(header(1), [b"hello"])
    pair.until(lambda: bool(pair.listening.frames))
    assert connection.tls is not None
    socket.socket.send(connection.tls._socket, b"\x17\x03\x03\x00\x20" + bytes(32))  # claims to be application data
    pair.until(lambda: bool(pair.listening.ends))

    end = pair.listening.ends[0]
    assert isinstance(end, FrameError) and end.details["field"] == "tls" and len(pair.listening.frames) == 1


def test_what_was_decrypted_is_delivered_after_a_pause(opened: Callable[..., Pair]) -> None:
    """Both frames are in one record: the kernel has nothing more to read when the reader goes on."""
    pair = opened()
    connection = pair.connected()
    pair.listening.on_frame = lambda c, head: c.pause_reading() if head.step == 1 else None
    both = pack(header(1)) + pack(header(2))
    assert connection.tls is not None and connection.tls.sendmsg([memoryview(both)]) == len(both)
    pair.until(lambda: bool(pair.listening.frames))
    pair.turn()
    assert pair.listening.steps == [1]

    pair.listening.connections[0].resume_reading()
    pair.until(lambda: pair.listening.steps == [1, 2])


def test_new_credentials_are_for_new_connections_and_open_ones_stay(opened: Callable[..., Pair]) -> None:
    old, new = credentials(PARTITION), credentials(PARTITION)
    pair = opened(None, old)
    first = pair.connected()
    first.send(header(0), [b"x"])
    pair.security.renew(message(new))
    second = pair.connected()
    for step, connection in enumerate((first, second), 1):
        connection.send(header(step), [b"x"])
    pair.until(lambda: len(pair.listening.frames) == 3)

    assert [_serial(connection) for connection in (first, second)] == [old.serial, new.serial]


def _serial(connection: Connection) -> str:
    assert connection.tls is not None and connection.tls._tls is not None
    found = connection.tls._tls.getpeercert() or {}
    return str(found["serialNumber"]).lower().lstrip("0")


# ---- a cluster whose operator wants plain data ----


def test_frames_that_follow_the_first_ones_at_once_are_plain_and_whole(opened: Callable[..., Pair]) -> None:
    pair = opened(encrypts=False)
    bodies = [bytes([step]) * size for step, size in enumerate((7, 0, 5, 3 * MIB, 100_000, 1))]

    def send_all(connection: Connection) -> None:
        for step, body in enumerate(bodies):
            connection.send(header(step), [body])

    pair.listening.on_frame = lambda connection, head: send_all(connection) if head.step == 0 else None
    connection = pair.connected()
    send_all(connection)
    pair.until(lambda: len(pair.listening.frames) == len(pair.dialling.frames) == len(bodies))

    assert [body for _, body in pair.listening.frames] == bodies == [body for _, body in pair.dialling.frames]
    assert connection.identity is not None and connection.identity.name == PARTITION
    assert connection.tls is not None and connection.tls.reads_plainly


def test_the_first_frame_is_one_record_and_the_next_byte_is_plain(opened: Callable[..., Pair]) -> None:
    pair = opened(encrypts=False)
    with socket.create_server(("127.0.0.1", 0)) as listener, ThreadPoolExecutor(1) as thread:
        answer = thread.submit(_answer, listener)
        connection, why = pair.dial(f"tcp:127.0.0.1:{listener.getsockname()[1]}")
        assert connection is not None, why
        for step, body in enumerate((b"token", b"gradient")):
            connection.send(header(step), [body])
        with answer.result(DEADLINE_S) as peer:
            assert peer.recv(1 << 16)[HEADER_BYTES:] == b"token" and not peer.pending()
            assert socket.socket.recv(peer, 1 << 16)[HEADER_BYTES:] == b"gradient"


def _answer(listener: socket.socket) -> ssl.SSLSocket:
    sock, _ = listener.accept()
    sock.settimeout(DEADLINE_S)
    return server_context(credentials(PARTITION)).wrap_socket(sock, server_side=True)


def test_strangers_are_refused_where_data_is_plain(opened: Callable[..., Pair]) -> None:
    pair = opened(encrypts=False)
    with pair.raw() as peer:
        peer.sendall(pack(header(1)))
        assert isinstance(pair.end(), AuthError)


# ---- what a process is told ----


def test_a_process_is_told_its_security_with_its_start() -> None:
    held = message(credentials(PROCESS))

    assert DataSecurity.of(ProcessSpec()) is None
    both = [DataSecurity.of(ProcessSpec(credentials=held, data_security=word)) for word in ("tls", "plain")]
    assert [made.encrypts for made in both if made is not None] == [True, False]
