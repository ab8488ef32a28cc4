"""An S3 server for tests: moto in its own process, on its own port."""

from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import psutil
import s3fs

_SERVE = """
import sys
from moto.server import ThreadedMotoServer
server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
server.start()
print(server.get_host_and_port()[1], flush=True)
sys.stdin.read()  # until the process that started it ends
"""
BUCKET = "snapshots"


@dataclass(frozen=True)
class S3:
    """A running server. `environment` is what a client, or a daemon, needs to find it."""

    environment: dict[str, str]
    process: psutil.Process

    def lose_bucket(self) -> None:
        """Remove the bucket and its objects, even while others write to it."""
        for _ in range(100):
            try:
                self.file_system().rm(BUCKET, recursive=True)
            except OSError:
                continue  # something was written meanwhile
            return
        raise AssertionError("the bucket is never empty")

    def make_bucket(self) -> None:
        self.file_system().mkdir(BUCKET)

    def file_system(self) -> s3fs.S3FileSystem:
        """A client for the test, without caches."""
        return s3fs.S3FileSystem(
            key=self.environment["AWS_ACCESS_KEY_ID"],
            secret=self.environment["AWS_SECRET_ACCESS_KEY"],
            endpoint_url=self.environment["AWS_ENDPOINT_URL"],
            use_listings_cache=False,
            skip_instance_cache=True,
        )


@contextmanager
def s3_server() -> Iterator[S3]:
    """A server with an empty bucket; it ends with the context, and with this process."""
    process = subprocess.Popen(
        [sys.executable, "-c", _SERVE],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    assert process.stdin is not None and process.stdout is not None
    try:
        port = int(process.stdout.readline())
        made = S3(
            {
                "AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}",
                "AWS_ACCESS_KEY_ID": "test",
                "AWS_SECRET_ACCESS_KEY": "secret",
                "AWS_DEFAULT_REGION": "us-east-1",
            },
            psutil.Process(process.pid),
        )
        made.make_bucket()
        yield made
    finally:
        process.send_signal(signal.SIGCONT)  # a test may have stopped it
        process.stdin.close()
        process.wait(20)
        process.stdout.close()
        s3fs.S3FileSystem.clear_instance_cache()  # cached clients would ignore a changed environment
