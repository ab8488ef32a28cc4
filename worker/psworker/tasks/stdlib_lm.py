"""A language model of Python's own standard library: real text that is on every machine that runs this."""

from __future__ import annotations

import os
import sysconfig
from dataclasses import dataclass
from functools import cache
from hashlib import blake2b
from pathlib import Path

from pscluster.errors import DataError
from psworker.tasks.byte_lm import ByteLm

_LEFT_OUT = {"site-packages", "dist-packages", "test", "tests", "idlelib", "lib2to3", "__pycache__"}
_HELD_OUT_PER_MILLE = 50


@dataclass(eq=False)
class StdlibLm(ByteLm):
    """Byte-level GPT on the *.py files of the standard library, train and held-out split by file.

    `train_bytes` and `held_out_bytes` cap the texts, so that start and evaluation stay quick. `data.uri` may name
    another directory of Python files."""

    train_bytes: int = 8_000_000
    held_out_bytes: int = 250_000

    def texts(self) -> tuple[bytes, bytes]:
        root = Path(self.data_uri or sysconfig.get_path("stdlib"))
        return stdlib_text(root, False, self.train_bytes), stdlib_text(root, True, self.held_out_bytes)


@cache
def stdlib_text(root: Path, held_out: bool, max_bytes: int) -> bytes:
    """The sources of one side of the split, each after a NUL byte, in order of a hash of their relative paths.

    The hash decides the side too (about 5 % are held out), so that an added file moves no other one. A file that
    would pass `max_bytes` is left out. Raises DataError when none is left."""
    parts: list[bytes] = []
    size = 0
    for _, path in sorted((_path_hash(path.relative_to(root)), path) for path in _sources(root)):
        if (_path_hash(path.relative_to(root)) % 1000 < _HELD_OUT_PER_MILLE) != held_out:
            continue
        source = path.read_bytes()
        if size + len(source) + 1 <= max_bytes and _is_utf8(source):
            parts.append(b"\0" + source)
            size += len(source) + 1
    if not parts:
        raise DataError(f"no Python source files under {root} for {max_bytes} bytes of text")
    return b"".join(parts)


def _sources(root: Path) -> list[Path]:
    found: list[Path] = []
    for directory, below, files in os.walk(root):
        below[:] = [name for name in below if name not in _LEFT_OUT]
        found.extend(Path(directory, name) for name in files if name.endswith(".py"))
    return found


def _path_hash(relative: Path) -> int:
    return int.from_bytes(blake2b(relative.as_posix().encode(), digest_size=8).digest(), "little")


def _is_utf8(source: bytes) -> bool:
    try:
        source.decode("utf-8")
    except UnicodeDecodeError:
        return False
    return True
