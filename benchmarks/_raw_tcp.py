"""One raw TCP connection that carries a model's bytes there and back, as fast as blocking Python sockets can.

Each 4 MiB has a CRC-32C that both ends compute, piece by piece while the bytes are in cache. (These sizes were the
fastest of those tried; larger socket buffers and MSG_WAITALL were slower.) As a script this is one end; `raw_tcp`
starts both.
"""

from __future__ import annotations

import json
import os
import socket
import struct
import subprocess
import sys

from crc32c import crc32c

from _marks import Marks

CHUNK_BYTES = 4 << 20
PIECE_BYTES = 1 << 20  # what is summed and sent, or received and summed, at a time
DEADLINE_S = 120.0
_CHECKSUM = struct.Struct("<I")


def raw_tcp(size_bytes: int, steps: int, skip: int) -> dict[str, float]:
    """`size_bytes` there, then back, `steps` times: bytes a second in both directions together, CPU seconds a GB."""
    command = [sys.executable, __file__, str(size_bytes), str(steps), str(skip)]
    listener = socket.create_server(("127.0.0.1", 0))
    with listener:
        far = subprocess.Popen(
            [*command, "far", str(listener.fileno())], pass_fds=[listener.fileno()], stdout=subprocess.PIPE
        )
        near = subprocess.Popen([*command, "near", str(listener.getsockname()[1])], stdout=subprocess.PIPE)
        try:
            outputs = [end.communicate(timeout=DEADLINE_S)[0] for end in (near, far)]
        finally:
            for end in (near, far):
                end.kill()
                end.wait()
    if near.returncode or far.returncode:
        raise RuntimeError(f"a raw end failed: {near.returncode}, {far.returncode}")
    measured = [json.loads(output) for output in outputs]
    moved_gb = 2 * size_bytes * (steps - skip - 1) / 1e9
    return {
        "bytes_per_s": 2 * size_bytes / measured[0]["step_s"],
        "cpu_s_per_gb": sum(one["cpu_s"] for one in measured) / moved_gb,
    }


def send(connection: socket.socket, data: memoryview) -> None:
    """Send all, each chunk followed by its checksum."""
    for start in range(0, len(data), CHUNK_BYTES):
        chunk = data[start : start + CHUNK_BYTES]
        checksum = 0
        for at in range(0, len(chunk), PIECE_BYTES):
            piece = chunk[at : at + PIECE_BYTES]
            checksum = crc32c(piece, checksum)
            connection.sendall(piece)
        connection.sendall(_CHECKSUM.pack(checksum))


def receive(connection: socket.socket, data: memoryview) -> None:
    """Receive all into `data`; raises ValueError when a checksum does not fit."""
    trailer = bytearray(_CHECKSUM.size)
    for start in range(0, len(data), CHUNK_BYTES):
        chunk = data[start : start + CHUNK_BYTES]
        checksum, at = 0, 0
        while at < len(chunk):
            count = connection.recv_into(chunk[at : at + PIECE_BYTES])
            if not count:
                raise EOFError("the other end is gone")
            checksum = crc32c(chunk[at : at + count], checksum)
            at += count
        connection.recv_into(trailer, len(trailer), socket.MSG_WAITALL)
        if _CHECKSUM.unpack(trailer)[0] != checksum:
            raise ValueError("a checksum does not fit")


def be_end(size_bytes: int, steps: int, skip: int, role: str, number: int) -> None:
    """One end: `near` sends first. Prints what it measured as JSON."""
    if role == "far":
        with socket.socket(fileno=number) as listener:
            connection, _ = listener.accept()
    else:
        connection = socket.create_connection(("127.0.0.1", number))
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    ours, theirs = memoryview(os.urandom(size_bytes)), memoryview(bytearray(size_bytes))
    marks = Marks()
    for _ in range(steps):
        if role == "near":
            send(connection, ours)
            receive(connection, theirs)
        else:
            receive(connection, theirs)
            send(connection, ours)
        marks.mark()
    marks.print_from(skip)


def main() -> None:
    size_bytes, steps, skip = (int(word) for word in sys.argv[1:4])
    be_end(size_bytes, steps, skip, sys.argv[4], int(sys.argv[5]))


if __name__ == "__main__":
    main()
