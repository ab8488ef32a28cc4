"""Code bundles: a user's directory as one content-addressed archive, and its safe extraction elsewhere.

A bundle is a gzipped tar of regular files, sorted, with times and owners zeroed, so that equal directories
give equal bytes and one sha256. `.gitignore` files (nested ones, too) exclude files; version control,
caches and virtual environments are always excluded. Neither side follows or makes a link, or exceeds `CAP_BYTES`.
"""

from __future__ import annotations

import gzip
import hashlib
import io
import os
import shutil
import stat
import tarfile
import tempfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import pathspec

from pscluster.errors import BundleError, StorageError

CAP_BYTES = 64 << 20
"""The limit of a bundle, packed and unpacked."""

MAX_FILES = 20_000
ALWAYS_SKIPPED = frozenset(
    {".git", ".hg", ".svn", "__pycache__", ".venv", ".mypy_cache", ".pytest_cache", ".ruff_cache"}
)
_COPY_BYTES = 1 << 20
_BLOCK = tarfile.BLOCKSIZE


@dataclass(frozen=True, kw_only=True)
class Bundle:
    """`data` is the archive, `sha256` its hex digest, `files` the relative paths in it, sorted."""

    data: bytes
    sha256: str
    files: tuple[str, ...]


def pack(directory: Path) -> Bundle:
    """Pack `directory`. Blocks while its files are read; deterministic. Raises BundleError for a link, a special file,
    an unreadable one, or more than CAP_BYTES."""
    if not directory.is_dir():
        raise BundleError(f"{directory} is not a directory")
    sizes = dict(sorted(_collect(directory)))
    _refuse_too_big(sizes, directory)
    buffer = io.BytesIO()
    with gzip.GzipFile(fileobj=buffer, mode="wb", mtime=0, filename="", compresslevel=6) as stream:
        with tarfile.open(fileobj=stream, mode="w", format=tarfile.GNU_FORMAT) as archive:
            for name in sizes:
                _add(archive, directory / name, name)
    data = buffer.getvalue()
    return Bundle(data=data, sha256=hashlib.sha256(data).hexdigest(), files=tuple(sizes))


def extract(data_path: Path, directory: Path) -> None:
    """Unpack a bundle into `directory` atomically, unless it exists. Idempotent. Blocks. Raises StorageError.

    Anything but regular files with plain relative names (absolute paths, `..`, links, devices, a name twice), or more
    than CAP_BYTES unpacked, is a BundleError and leaves nothing behind."""
    if directory.exists():
        return
    try:
        directory.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=".extract-", dir=directory.parent))
    except OSError as error:
        raise StorageError(f"cannot extract a bundle to {directory}: {error.strerror}") from None
    try:
        _extract_into(data_path, temporary)
        _publish(temporary, directory)
    except (tarfile.TarError, EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise BundleError(f"the bundle {data_path.name} is damaged: {error}") from None
    except OSError as error:
        raise StorageError(f"cannot extract a bundle to {directory}: {error.strerror}") from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _collect(root: Path) -> Iterator[tuple[str, int]]:
    """(relative posix path, size in bytes) of each file to pack."""
    waiting: list[tuple[Path, tuple[_Ignore, ...]]] = [(root, ())]
    count = 0
    while waiting:
        folder, ignores = waiting.pop()
        ignores = _with_ignore_file(folder, ignores)
        for entry in _entries(folder):
            relative = Path(entry.path).relative_to(root).as_posix()
            is_folder = entry.is_dir(follow_symlinks=False)
            if entry.name in ALWAYS_SKIPPED or _ignored(Path(entry.path), is_folder, ignores):
                continue
            if is_folder:
                waiting.append((Path(entry.path), ignores))
                continue
            count += 1
            if count > MAX_FILES:
                raise BundleError(f"{root} holds more than {MAX_FILES} files", action=_LEAVE_OUT)
            yield relative, _size_of_regular(entry, relative)


_LEAVE_OUT = "exclude what is not code with a .gitignore, and refer to data with data.uri"


_Ignore = tuple[Path, pathspec.GitIgnoreSpec]
"""A folder, and the patterns of its .gitignore."""


def _with_ignore_file(folder: Path, ignores: tuple[_Ignore, ...]) -> tuple[_Ignore, ...]:
    file = folder / ".gitignore"
    if not file.is_file() or file.is_symlink():
        return ignores
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
        spec = pathspec.GitIgnoreSpec.from_lines(lines)
    except (OSError, ValueError) as error:
        raise BundleError(f"cannot read {file}: {error}") from None
    return (*ignores, (folder, spec))


def _ignored(path: Path, is_folder: bool, ignores: tuple[_Ignore, ...]) -> bool:
    """Git's rule: the last matching pattern decides, a deeper .gitignore after a shallower one."""
    decision = False
    for folder, spec in ignores:
        name = path.relative_to(folder).as_posix() + ("/" if is_folder else "")
        match = spec.check_file(name)
        if match.include is not None:
            decision = match.include
    return decision


def _entries(folder: Path) -> list[os.DirEntry[str]]:
    try:
        with os.scandir(folder) as found:
            return sorted(found, key=lambda entry: entry.name)
    except OSError as error:
        raise BundleError(f"cannot read {folder}: {error.strerror}") from None


def _size_of_regular(entry: os.DirEntry[str], relative: str) -> int:
    if entry.is_symlink():
        raise BundleError(f"{relative} is a link", action="replace it with the file, or list it in .gitignore")
    found = entry.stat(follow_symlinks=False)
    if not stat.S_ISREG(found.st_mode):
        raise BundleError(f"{relative} is not a regular file", action="list it in .gitignore")
    return found.st_size


def _refuse_too_big(sizes: dict[str, int], directory: Path) -> None:
    total = sum(sizes.values())
    if total <= CAP_BYTES:
        return
    biggest = sorted(sizes.items(), key=lambda item: -item[1])[:5]
    names = ", ".join(f"{name} ({size / 2**20:.1f} MiB)" for name, size in biggest)
    raise BundleError(
        f"{directory} holds {total / 2**20:.1f} MiB, more than the {CAP_BYTES >> 20} MiB a bundle may have; "
        f"the biggest: {names}",
        action=_LEAVE_OUT,
        details={"size_bytes": str(total)},
    )


def _add(archive: tarfile.TarFile, path: Path, name: str) -> None:
    info = tarfile.TarInfo(name)
    try:
        # O_NOFOLLOW: the file may have been replaced by a link since it was listed.
        with open(os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC), "rb") as source:
            found = os.fstat(source.fileno())
            info.size = found.st_size
            info.mode = 0o755 if found.st_mode & 0o100 else 0o644
            archive.addfile(info, source)
    except OSError as error:
        raise BundleError(f"cannot read {name}: {error.strerror or error}") from None


def _extract_into(data_path: Path, root: Path) -> None:
    left = CAP_BYTES
    count = 0
    with gzip.open(data_path, "rb") as stream:
        capped = _Capped(stream)
        with tarfile.open(fileobj=capped, mode="r|") as archive:
            for member in archive:
                count += 1
                if count > MAX_FILES:
                    raise BundleError(f"the bundle holds more than {MAX_FILES} files")
                target = root.joinpath(*_safe_parts(member))
                left -= member.size
                if left < 0:
                    raise BundleError(f"the bundle unpacks to more than {CAP_BYTES >> 20} MiB")
                _write(archive, member, target)
        # To the end: only there does gzip compare its checksum.
        while capped.read(_COPY_BYTES):
            pass


class _Capped(io.RawIOBase):
    """Reads at most what a valid bundle can hold: headers and padding can be a bomb as well as contents."""

    def __init__(self, stream: gzip.GzipFile) -> None:
        super().__init__()
        self._stream = stream
        self._left = CAP_BYTES + 4 * _BLOCK * MAX_FILES

    def readable(self) -> bool:
        return True

    def read(self, size: int = -1) -> bytes:
        data = self._stream.read(size if size >= 0 else _COPY_BYTES)
        self._left -= len(data)
        if self._left < 0:
            raise BundleError(f"the bundle unpacks to more than {CAP_BYTES >> 20} MiB")
        return data


def _safe_parts(member: tarfile.TarInfo) -> tuple[str, ...]:
    name = member.name
    if not member.isreg() or member.issparse():
        raise BundleError(f"the bundle holds {name!r}, which is not a regular file")
    parts = PurePosixPath(name).parts
    if not parts or name.startswith("/") or ".." in parts or "\x00" in name:
        raise BundleError(f"the bundle holds {name!r}, which leads outside its directory")
    return parts


def _write(archive: tarfile.TarFile, member: tarfile.TarInfo, target: Path) -> None:
    source = archive.extractfile(member)
    if source is None:
        raise BundleError(f"the bundle holds {member.name!r}, which is not a regular file")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        mode = 0o700 if member.mode & 0o100 else 0o600
        descriptor = os.open(target, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, mode)
    except (FileExistsError, NotADirectoryError):
        raise BundleError(f"the bundle holds {member.name!r} twice") from None
    with open(descriptor, "wb") as sink:
        shutil.copyfileobj(source, sink, _COPY_BYTES)


def _publish(temporary: Path, directory: Path) -> None:
    try:
        temporary.rename(directory)
    except OSError:
        # Another process has extracted the same content-addressed bundle meanwhile.
        if not directory.is_dir():
            raise
