"""Small disks for tests: a tmpfs each, and ways to fill it."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

import pytest

MIB = 1 << 20


@contextmanager
def small_disk(directory: Path, size_bytes: int = MIB) -> Iterator[Path]:
    """A file system of that size at `directory`; skips the test by name where none can be mounted."""
    directory.mkdir(parents=True, exist_ok=True)
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={size_bytes},mode=700", "tmpfs", str(directory)],
        capture_output=True,
        text=True,
        check=False,
    )
    if mounted.returncode:
        pytest.skip(f"a tmpfs cannot be mounted here: {mounted.stderr.strip()}")
    try:
        yield directory
    finally:
        subprocess.run(["umount", "-l", str(directory)], check=True)


def fill(disk: Path) -> Path:
    """Write until the disk is full, which the last write must report; returns the file."""
    ballast = disk / "ballast"
    with ballast.open("wb", buffering=0) as file:
        for size in (64 << 10, 512, 1):
            with pytest.raises(OSError, match="No space left on device"):
                _write_for_ever(file, size)
    free = os.statvfs(disk).f_bavail
    assert free == 0, f"{free} blocks are free on a full disk"
    return ballast


def _write_for_ever(file: IO[bytes], size_bytes: int) -> None:
    while True:
        file.write(b"\1" * size_bytes)
