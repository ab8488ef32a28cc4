"""Invalid and hostile data at a partition's socket in the middle of a step: refused, and the job keeps its bits."""

from __future__ import annotations

import json
import socket
import struct
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, suppress

import crc32c
import psutil
import pytest

from harness.jobs import even_split, lm_spec
from harness.plain import train_plainly
from harness.static_job import JOB, TOKEN, StaticJob
from pscluster.step.layout import Layout
from pscluster.wire.frame import job_number

NUM_SHARDS = 7
SUMMARY = 0xFFFF_FFFF
FRAME, PEER_SKEW, AUTH = "PS-3002", "PS-3004", "PS-1005"
HELLO, WELCOME, INIT, PUSH, PULL, DIRECTIVE, VOTE, STATISTICS, OUTCOME = 1, 2, 3, 4, 6, 8, 9, 12, 14
PATIENCE_S = 20.0
_FIELDS = struct.Struct("<4sHBBHHQQQIIIQI")
_HEADER_BYTES = _FIELDS.size + 4


def frame(
    kind: int,
    body: bytes = b"",
    *,
    magic: bytes = b"PSDP",
    protocol: int = 3,
    codec: int = 0,
    job: str = JOB,
    step: int = 0,
    bucket: int = 0,
    node: tuple[int, int] = (0, 0),
    length: int | None = None,
    checksum: int | None = None,
    header_checksum: int | None = None,
    sender: int = 5,
) -> bytes:
    """A frame built from the wire format alone; omitted fields are valid."""
    fields_bytes = _FIELDS.pack(
        magic, protocol, kind, codec, 0, sender, job_number(job), 1, step, bucket, *node,
        len(body) if length is None else length, crc32c.crc32c(body) if checksum is None else checksum,
    )  # fmt: skip
    own = crc32c.crc32c(fields_bytes) if header_checksum is None else header_checksum
    return fields_bytes + struct.pack("<I", own) + body


def hello(channel: str = "push", token: object = TOKEN.hex(), **fields: object) -> bytes:
    fields = {"token": token, "role": "trainer", "channel": channel, "restore_generation": 1, "attempt": 1, **fields}
    return frame(HELLO, json.dumps(fields).encode(), sender=0 if channel == "vote" else 5)  # there is one partition


class Target:
    """The partition of a job that waits for the test: four of seven shards are not assigned."""

    def __init__(self, job: StaticJob) -> None:
        self.job = job
        ready = job.reported("trainer-0", "trainer_ready")[-1]
        self.layout = Layout.from_json(ready.layout_json)
        self.addresses = list(job.reported("partition-0", "partition_ready")[-1].addresses)
        self.process = psutil.Process(job.children["partition-0"].process.pid)
        self.expected: Counter[str] = Counter()
        self.rss_before = 0

    def connect(self, kind: str = "unix") -> socket.socket:
        address = next(a for a in self.addresses if a.startswith(kind)).partition(":")[2]
        if kind == "unix":
            sock = socket.socket(socket.AF_UNIX)
            sock.settimeout(PATIENCE_S)
            sock.connect(address)
            return sock
        host, _, port = address.rpartition(":")
        return socket.create_connection((host, int(port)), PATIENCE_S)

    def greet(self, sock: socket.socket, channel: str = "push") -> None:
        """Fails unless the partition accepts the handshake."""
        sock.sendall(hello(channel))
        header = receive(sock, _HEADER_BYTES)
        assert header[6] == WELCOME
        receive(sock, _FIELDS.unpack_from(header)[12])

    def abuse(self, data: bytes, code: str, channel: str = "", kind: str = "unix") -> None:
        """Send `data` (after a handshake on `channel`): the connection is closed, and a well-behaved one is served."""
        with self.connect(kind) as sock:
            if channel:
                self.greet(sock, channel)
            with suppress(BrokenPipeError, ConnectionResetError):  # refused before it was all sent
                sock.sendall(data)
            drain(sock)
        self.expected[code] += 1
        with self.connect() as sock:
            self.greet(sock)

    def counted(self) -> Counter[str]:
        """The refused connections that the partition reports, by code."""
        found: Counter[str] = Counter()
        for key, value in self.job.children["partition-0"].counters.items():
            if key.startswith("refused_connections_total"):
                found[json.loads(key.removeprefix("refused_connections_total"))["code"]] = int(value)
        return found


def receive(sock: socket.socket, length: int) -> bytes:
    data = b""
    while len(data) < length:
        more = sock.recv(length - len(data))
        assert more, f"closed after {len(data)} of {length} bytes"
        data += more
    return data


def drain(sock: socket.socket) -> None:
    """Block until the partition closes the connection; fails when it does not."""
    try:
        while sock.recv(1 << 16):
            pass
    except ConnectionResetError:
        return  # it closed with something of ours unread


@pytest.fixture(scope="module")
def digest() -> str:
    return train_plainly(lm_spec()).digest


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Target]:
    with StaticJob(lm_spec(), 1, tmp_path_factory.mktemp("abuse")) as job:
        job.wait_ready()
        job.publish([[(0, 3)]])
        held = 'pushes_total{"partition": "0", "result": "applied"}'
        job.wait(lambda: job.children["partition-0"].counters.get(held, 0) > 0, "the first pushes")
        found = Target(job)
        found.rss_before = found.process.memory_info().rss
        yield found


GOOD = hello()
STRANGERS = {
    "garbage": (bytes(range(1, 256)), FRAME),
    "wrong magic": (frame(HELLO, b"{}", magic=b"HTTP"), FRAME),
    "damaged header": (frame(HELLO, b"{}", header_checksum=1), FRAME),
    "another protocol": (frame(HELLO, b"{}", protocol=1), PEER_SKEW),
    "another job": (frame(HELLO, b"{}", job="job-other1"), FRAME),
    "unknown kind": (frame(99, b"{}"), FRAME),
    "unknown codec": (frame(HELLO, b"{}", codec=9), FRAME),
    "a kind that only partitions send": (frame(DIRECTIVE, b"{}"), AUTH),
    "lying length": (frame(HELLO, b"{}", length=1 << 40), FRAME),
    "damaged body": (frame(HELLO, b"{}", checksum=7), FRAME),
    "empty greeting": (frame(HELLO), FRAME),
    "greeting that is no JSON": (frame(HELLO, b"\xff\xfe{"), FRAME),
    "greeting that is no mapping": (frame(HELLO, b"[1]"), FRAME),
    "greeting nested too deep": (frame(HELLO, b"[" * 4000), FRAME),
    "no token": (frame(HELLO, b"{}"), AUTH),
    "another cluster": (hello(cluster="0123456789abcdef"), AUTH),
    "wrong token": (hello(token="00" * 16), AUTH),
    "token that is no ASCII": (hello(token="naïve"), AUTH),
    "token that is no text": (hello(token=[1, {}]), AUTH),
    "push before the greeting": (frame(PUSH, bytes(64)), AUTH),
    "huge push before the greeting": (frame(PUSH, b"", length=1 << 40), AUTH),
    "pull before the greeting": (frame(PULL), AUTH),
    "unknown channel": (hello("shell"), FRAME),
    "restore generation that is no number": (hello(restore_generation="x"), FRAME),
    "restore generation that is a list": (hello(restore_generation=[]), FRAME),
}


@pytest.mark.parametrize("name", STRANGERS)
def test_what_a_stranger_sends_is_refused(name: str, target: Target) -> None:
    data, code = STRANGERS[name]
    target.abuse(data, code)


@pytest.mark.parametrize("name", ["garbage", "another protocol", "lying length", "no token"])
def test_tcp_refuses_alike(name: str, target: Target) -> None:
    data, code = STRANGERS[name]
    target.abuse(data, code, kind="tcp")


def test_the_length_of_a_handshake_is_checked_before_it_is_read(target: Target) -> None:
    target.abuse(frame(HELLO, b" " * 4097), FRAME)


@pytest.mark.parametrize(
    ("channel", "data"),
    [
        ("push", frame(PULL)),
        ("push", frame(VOTE, b"\x01")),
        ("push", frame(DIRECTIVE, b"{}")),
        ("push", GOOD),
        ("pull", frame(PUSH, bytes(4), node=(5, 1))),
        ("pull", frame(OUTCOME, b"{}")),
        ("vote", frame(PULL)),
        ("pull", frame(PULL, b"body")),
    ],
    ids=["pull on push", "vote on push", "directive", "greeting twice", "push on pull", "outcome on pull",
         "pull on vote", "pull with a body"],
)  # fmt: skip
def test_a_kind_on_the_wrong_channel_is_refused(channel: str, data: bytes, target: Target) -> None:
    target.abuse(data, FRAME, channel)


def test_a_push_that_does_not_fit_is_refused_and_leaves_nothing(target: Target) -> None:
    """Shard 5 is not assigned yet: if one of these had been added, the final bits would differ."""
    size = 4 * target.layout.buckets[0].num_words
    wrong = {
        "too short": frame(PUSH, bytes(size - 4), node=(5, 1)),
        "too long": frame(PUSH, b"", node=(5, 1), length=size + 4),
        "lying length": frame(PUSH, b"", node=(5, 1), length=1 << 40),
        "unknown bucket": frame(PUSH, bytes(size), bucket=999, node=(5, 1)),
        "no node of the tree": frame(PUSH, bytes(size), node=(5, 3)),
        "damaged body": frame(PUSH, b"\x7f" * size, node=(5, 1), checksum=1),
        "damaged body, other shard": frame(PUSH, b"\x7f" * size, node=(6, 1), checksum=1),
    }
    for data in wrong.values():
        target.abuse(data, FRAME, "push")
    with target.connect() as sock:  # hangs up in the middle of a body
        target.greet(sock)
        sock.sendall(frame(PUSH, b"\x7f" * size, node=(5, 1))[: size // 2])
    target.abuse(frame(PULL), FRAME, "push")


def test_a_body_that_is_not_what_its_kind_says_is_refused(target: Target) -> None:
    """From a peer with the token: a faulty trainer must not end the partition."""
    count = len(target.layout.tensors)
    summary = bytes(24 + -(-count // 8))
    wrong = {
        "empty push": frame(PUSH, b"", node=(5, 1)),
        "empty push of no bucket": frame(PUSH, b"", bucket=999, node=(5, 1)),
        "empty summary": frame(PUSH, b"", bucket=SUMMARY, node=(5, 1)),
        "summary of no node": frame(PUSH, summary, bucket=SUMMARY, node=(5, 3)),
        "summary too long": frame(PUSH, summary + b"\0", bucket=SUMMARY, node=(5, 1)),
        "empty first values": frame(INIT, b"", node=(0, 1)),
        "statistics of half a number": frame(STATISTICS, bytes(12), node=(0, 7)),
        "statistics of no node": frame(STATISTICS, bytes(16), node=(5, 3)),
        "outcome that is no JSON": frame(OUTCOME, b"\xff"),
        "outcome that is no mapping": frame(OUTCOME, b"[]"),
        "outcome nested too deep": frame(OUTCOME, b"[" * 100_000),
    }
    refused = {}
    for name, data in wrong.items():
        try:
            target.abuse(data, FRAME, "push")
        except (AssertionError, OSError) as error:
            refused[name] = error
    assert refused == {}
    target.abuse(frame(VOTE, b"\x01\x02"), FRAME, "vote")


def test_half_open_connections_block_no_other(target: Target) -> None:
    descriptors = target.process.num_fds()
    with ExitStack() as stack:
        for number in range(200):
            sock = stack.enter_context(target.connect("tcp" if number % 4 == 0 else "unix"))
            sock.sendall(GOOD[: number % len(GOOD)])
        with target.connect() as served:
            target.greet(served)
        assert target.process.num_fds() >= 200  # an earlier test's connection may have ended meanwhile
    target.abuse(frame(PULL), FRAME, "push")  # answered after the closing of those before it was noticed
    assert target.process.num_fds() <= descriptors + 8


def test_every_refusal_was_counted_and_no_memory_kept(target: Target) -> None:
    total = sum(target.expected.values())
    target.job.wait(lambda: sum(target.counted().values()) >= total, f"{target.expected} in the counters")
    assert target.counted() == target.expected
    grown = target.process.memory_info().rss - target.rss_before
    assert grown < 8 << 20, f"{grown >> 10} KiB more"


def test_the_job_ends_with_the_undisturbed_bits(target: Target, digest: str) -> None:
    assert target.job.step == 0
    target.job.publish(even_split(NUM_SHARDS, 1))
    assert target.job.wait_finished() == digest
