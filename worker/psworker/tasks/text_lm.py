"""A language model of any UTF-8 text."""

from __future__ import annotations

import gzip
import lzma
import zlib
from collections.abc import Callable
from functools import cache
from pathlib import Path

from pscluster.errors import DataError
from psworker.tasks.byte_lm import ByteLm

_UNPACK: dict[str, Callable[[bytes], bytes]] = {".xz": lzma.decompress, ".gz": gzip.decompress}


class TextLm(ByteLm):
    """Byte-level GPT on the file at data.uri, or on every file of the directory there, in order of name.

    .xz and .gz files are unpacked. The last tenth of the whole text is held out."""

    def texts(self) -> tuple[bytes, bytes]:
        text = read_text(Path(self.data_uri))
        cut = len(text) - len(text) // 10
        return text[:cut], text[cut:]


@cache
def read_text(path: Path) -> bytes:
    """The text at `path`. Raises DataError when it is missing, damaged, or not UTF-8."""
    if not str(path) or str(path) == ".":
        raise DataError("data.uri is empty", action="set data.uri to a text file or a directory of them")
    if not path.exists():
        raise DataError(f"there is nothing at {path}")
    files = sorted(p for p in path.iterdir() if p.is_file()) if path.is_dir() else [path]
    return b"".join(_read_file(file) for file in files)


def _read_file(path: Path) -> bytes:
    try:
        stored = path.read_bytes()
        text = _UNPACK[path.suffix](stored) if path.suffix in _UNPACK else stored
        text.decode("utf-8")
    except (OSError, EOFError, lzma.LZMAError, zlib.error) as error:
        raise DataError(f"{path} cannot be read: {error}") from error
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8 text: {error.reason} at byte {error.start}") from error
    return text
