"""gRPC streams that carry a model's bytes: every client sends a part to each server, then receives a part from each.

One bidirectional stream a pair for the whole run; identity serializers, so that protobuf copies no message; no limit of
message size, frames as large as HTTP/2 allows. There is no checksum, no sum and no optimizer. As a script this is one
server or client; `grpc_stream` starts them all.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import grpc

from _marks import Marks

MESSAGE_BYTES = 2 << 20
DEADLINE_S = 120.0
METHOD = "/bench.Parts/Exchange"
OPTIONS = (  # with the message size, the fastest of those tried
    ("grpc.max_send_message_length", -1),
    ("grpc.max_receive_message_length", -1),
    ("grpc.http2.max_frame_size", (1 << 24) - 1),
    ("grpc.http2.lookahead_bytes", 64 << 20),
    ("grpc.optimization_target", "throughput"),
    ("grpc.experimental.tcp_read_chunk_size", 1 << 20),
    ("grpc.experimental.tcp_min_read_chunk_size", 1 << 18),
    ("grpc.experimental.tcp_max_read_chunk_size", 8 << 20),
)


def grpc_stream(size_bytes: int, steps: int, skip: int, *, clients: int, servers: int) -> dict[str, float]:
    """`size_bytes` from each client and back, `steps` times: bytes a second of all, both directions together."""
    ends: list[subprocess.Popen[str]] = []
    command = [sys.executable, __file__]
    numbers = [str(size_bytes // servers), str(steps), str(skip)]
    try:
        ports = []
        for _ in range(servers):
            server = subprocess.Popen([*command, "server", *numbers], stdout=subprocess.PIPE, text=True)
            ends.append(server)
            assert server.stdout is not None
            ports.append(server.stdout.readline().strip())
        started = [
            subprocess.Popen([*command, "client", *numbers, *ports], stdout=subprocess.PIPE, text=True)
            for _ in range(clients)
        ]
        ends += started
        outputs = [client.communicate(timeout=DEADLINE_S)[0] for client in started]
    finally:
        for end in ends:
            end.kill()
            end.wait()
    if any(client.returncode for client in started):
        raise RuntimeError(f"a gRPC client failed: {[client.returncode for client in started]}")
    measured = [json.loads(output) for output in outputs]
    return {"bytes_per_s": 2 * clients * size_bytes / statistics.mean(one["step_s"] for one in measured)}


def messages(size_bytes: int) -> list[bytes]:
    """What one direction carries in one step."""
    return [os.urandom(min(MESSAGE_BYTES, size_bytes - at)) for at in range(0, size_bytes, MESSAGE_BYTES)]


class Parts(grpc.GenericRpcHandler):
    """The server: takes a step's messages of a client, then sends as many."""

    def __init__(self, size_bytes: int) -> None:
        self._answer = messages(size_bytes)

    def service(self, _: grpc.HandlerCallDetails) -> grpc.RpcMethodHandler[bytes, bytes]:
        """No serializers: bytes in, bytes out."""
        return grpc.stream_stream_rpc_method_handler(self._exchange)

    def _exchange(self, requests: Iterator[bytes], _: grpc.ServicerContext) -> Iterator[bytes]:
        for count, _message in enumerate(requests, 1):
            if count % len(self._answer) == 0:
                yield from self._answer


class Stream:
    """A client's stream to one server, on a thread of its own."""

    def __init__(self, port: str, size_bytes: int) -> None:
        self._messages = messages(size_bytes)
        self._channel = grpc.insecure_channel(f"127.0.0.1:{port}", options=OPTIONS)
        self._may_send = threading.Semaphore(0)
        call: grpc.StreamStreamMultiCallable[bytes, bytes] = self._channel.stream_stream(METHOD)
        self._answers = call(self._requests(), wait_for_ready=True)

    def step(self) -> None:
        """Send and receive one step's messages; blocks."""
        self._may_send.release()
        for _ in self._messages:
            next(self._answers)

    def _requests(self) -> Iterator[bytes]:
        while True:
            self._may_send.acquire()
            yield from self._messages


def be_server(size_bytes: int) -> None:
    """Print the port, then serve until killed."""
    server = grpc.server(ThreadPoolExecutor(8), options=OPTIONS, handlers=[Parts(size_bytes)])
    print(server.add_insecure_port("127.0.0.1:0"), flush=True)
    server.start()
    server.wait_for_termination()


def be_client(size_bytes: int, steps: int, skip: int, ports: list[str]) -> None:
    """Exchange with all servers at once, step by step; print the median step as JSON."""
    streams = [Stream(port, size_bytes) for port in ports]
    marks = Marks()
    with ThreadPoolExecutor(len(streams)) as pool:
        for _ in range(steps):
            list(pool.map(Stream.step, streams))
            marks.mark()
    marks.print_from(skip)


def main() -> None:
    role, size_bytes, steps, skip = sys.argv[1], *(int(word) for word in sys.argv[2:5])
    if role == "server":
        be_server(size_bytes)
    else:
        be_client(size_bytes, steps, skip, sys.argv[5:])


if __name__ == "__main__":
    main()
