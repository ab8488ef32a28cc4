"""Takes from this process what would let user code reach an agent's key: run by `launch`, before user code is imported.

    uid         another user than the agent's: the kernel keeps its files and its memory from this process
    namespace   the hidden paths are covered by empty mounts, in a mount namespace that only this process has
    landlock    every path but the hidden ones is allowed; a Landlock domain cannot ptrace processes outside it
    none        nothing

In each mode but `none` the process and its descendants have no capabilities and cannot gain any: no setuid program
gives them some. Only system calls and the standard library: nothing slow is imported before the process is confined.
"""

from __future__ import annotations

import ctypes
import json
import os
import stat
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from enum import StrEnum
from pathlib import Path

CONFINEMENT = "PS_CONFINEMENT"
"""The environment variable that hands a Confinement to the process."""


class Mode(StrEnum):
    UID = "uid"
    NAMESPACE = "namespace"
    LANDLOCK = "landlock"
    NONE = "none"


@dataclass(frozen=True, kw_only=True)
class Confinement:
    """`hidden`: absolute paths without links, which `namespace` and `landlock` put out of reach with all below them;
    those that do not exist are passed over. `uid` and `gid`: whom the process becomes in mode `uid`."""

    mode: Mode
    hidden: tuple[str, ...] = ()
    uid: int = 0
    gid: int = 0

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Confinement:
        found = json.loads(text)
        return cls(**{**found, "mode": Mode(found["mode"]), "hidden": tuple(found["hidden"])})


def confine(confinement: Confinement) -> None:
    """Confine this process, for good. It must have one thread. Raises OSError when the kernel refuses a part of it: the
    process must then end."""
    if confinement.mode is Mode.NONE:
        return
    _prctl(_PR_SET_NO_NEW_PRIVS, 1)
    hidden = [Path(path) for path in confinement.hidden if os.path.lexists(path)]
    if confinement.mode is Mode.UID:
        _become(confinement.uid, confinement.gid)
    elif confinement.mode is Mode.NAMESPACE:
        _cover(hidden)
    else:
        _allow_all_but(hidden)
    _drop_capabilities()


def ancestors_of(paths: Sequence[Path]) -> list[Path]:
    """All directories above these paths, each before those below it."""
    return sorted({parent for path in paths for parent in path.parents}, key=lambda path: len(path.parts))


# ---- uid ----


def _become(uid: int, gid: int) -> None:
    os.setgroups([])
    os.setresgid(gid, gid, gid)
    os.setresuid(uid, uid, uid)
    _prctl(_PR_SET_DUMPABLE, 1)  # the change of user cleared it: /proc/self would belong to root


# ---- namespace ----

_CLONE_NEWNS, _CLONE_NEWUSER = 0x0002_0000, 0x1000_0000
_MS_RDONLY, _MS_NOSUID, _MS_NODEV, _MS_NOEXEC = 1, 2, 4, 8
_MS_BIND, _MS_REC, _MS_PRIVATE = 0x1000, 0x4000, 0x4_0000


def _cover(hidden: Sequence[Path]) -> None:
    uid, gid, directory = os.geteuid(), os.getegid(), os.getcwd()
    _call("unshare", _CLONE_NEWUSER | _CLONE_NEWNS)
    Path("/proc/self/setgroups").write_text("deny")
    Path("/proc/self/uid_map").write_text(f"{uid} {uid} 1")
    Path("/proc/self/gid_map").write_text(f"{gid} {gid} 1")
    _mount("none", "/", None, _MS_REC | _MS_PRIVATE)
    for path in hidden:
        if path.is_dir():
            _mount("none", str(path), "tmpfs", _MS_RDONLY | _MS_NOSUID | _MS_NODEV | _MS_NOEXEC, "size=4k,mode=0555")
        else:
            _mount("/dev/null", str(path), None, _MS_BIND)
    # A directory that is a mount point cannot be renamed: the agent would write its next key into one put in its place.
    for above in ancestors_of(hidden)[1:]:
        _mount(str(above), str(above), None, _MS_BIND | _MS_REC)
    os.chdir(directory)  # from the mount that is now covered, "../.." would lead past what hides the paths


def _mount(source: str, target: str, kind: str | None, flags: int, options: str = "") -> None:
    name = kind.encode() if kind is not None else None
    _call("mount", source.encode(), os.fsencode(target), name, ctypes.c_ulong(flags), options.encode())


# ---- landlock ----

_CREATE_RULESET, _ADD_RULE, _RESTRICT_SELF = 444, 445, 446  # the same on every architecture
_CREATE_RULESET_VERSION, _RULE_PATH_BENEATH = 1, 1
_MIN_ABI = 2  # the first one denies every rename and link from one directory to another
_READ_DIR = 1 << 3
_OF_FILES = 1 << 0 | 1 << 1 | 1 << 2 | 1 << 14 | 1 << 15  # execute, write, read, truncate, ioctl on devices
_RIGHTS = {2: 14, 3: 15, 4: 15}  # by ABI, how many kinds of access it knows; 16 from the fifth on
_SCOPE_SIGNAL = 1 << 1


class _Ruleset(ctypes.Structure):
    _fields_ = (("fs", ctypes.c_uint64), ("net", ctypes.c_uint64), ("scoped", ctypes.c_uint64))


class _PathBeneath(ctypes.Structure):
    _pack_ = 1
    _fields_ = (("allowed", ctypes.c_uint64), ("parent", ctypes.c_int32))


def _allow_all_but(hidden: Sequence[Path]) -> None:
    """Rights over a directory hold for all that is below it, so each entry beside the hidden paths and beside their
    ancestors gets its own. In the ancestors themselves nothing can be made, renamed or removed, and what others make
    there later is out of reach: among it another agent's new state directory."""
    abi = _call("syscall", _CREATE_RULESET, None, ctypes.c_size_t(0), _CREATE_RULESET_VERSION)
    if abi < _MIN_ABI:
        raise OSError(0, f"Landlock of this kernel has version {abi}, not {_MIN_ABI}")
    rights = (1 << _RIGHTS.get(abi, 16)) - 1
    attributes = _Ruleset(fs=rights, scoped=_SCOPE_SIGNAL if abi >= 6 else 0)
    size = ctypes.sizeof(attributes) if abi >= 6 else 16 if abi >= 4 else 8
    ruleset = _call("syscall", _CREATE_RULESET, ctypes.byref(attributes), ctypes.c_size_t(size), 0)
    try:
        _allow(ruleset, Path("/"), _READ_DIR)
        for path in _beside(hidden):
            _allow(ruleset, path, rights)
        _call("syscall", _RESTRICT_SELF, ruleset, 0)
    finally:
        os.close(ruleset)


def _beside(hidden: Sequence[Path]) -> Iterator[Path]:
    """The entries of every ancestor of the hidden paths that are neither hidden nor an ancestor. Links are left out:
    one may lead to an ancestor; what it leads to has its own rights."""
    above = [path for path in ancestors_of(hidden) if not any(path.is_relative_to(other) for other in hidden)]
    closed = {*hidden, *above}
    for directory in above:
        try:
            entries = list(os.scandir(directory))
        except PermissionError:
            continue  # it can be passed through, not listed
        yield from (Path(entry.path) for entry in entries if Path(entry.path) not in closed and not entry.is_symlink())


def _allow(ruleset: int, path: Path, rights: int) -> None:
    try:
        descriptor = os.open(path, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC)
    except FileNotFoundError:
        return  # it went meanwhile
    try:
        if not stat.S_ISDIR(os.fstat(descriptor).st_mode):
            rights &= _OF_FILES
        rule = _PathBeneath(allowed=rights, parent=descriptor)
        _call("syscall", _ADD_RULE, ruleset, _RULE_PATH_BENEATH, ctypes.byref(rule), 0)
    finally:
        os.close(descriptor)


# ---- capabilities ----

_PR_SET_DUMPABLE, _PR_SET_NO_NEW_PRIVS = 4, 38
_CAPABILITY_VERSION_3 = 0x2008_0522


def _drop_capabilities() -> None:
    """None are left, and with no_new_privs no program that it runs has any."""
    header = (ctypes.c_uint32 * 2)(_CAPABILITY_VERSION_3, 0)
    none = (ctypes.c_uint32 * 6)()
    _call("capset", header, none)


def protect_memory() -> None:
    """Keep other processes of the same user from this one's memory, environment and descriptors (/proc/PID/mem,
    environ, fd, root; ptrace), and its memory from core dumps. Programs that it starts are not affected."""
    _prctl(_PR_SET_DUMPABLE, 0)


def conceal_argument(secret: str) -> None:
    """Overwrite a secret in this process's command line, which every user of the host can read while it runs."""
    fields = Path("/proc/self/stat").read_text().rpartition(")")[2].split()
    start, end = (int(field) for field in fields[45:47])  # arg_start, arg_end: see proc(5)
    shown = ctypes.string_at(start, end - start) if start else b""
    at = shown.find(secret.encode())
    while secret and at >= 0:
        ctypes.memset(start + at, ord("x"), len(secret.encode()))
        at = shown.find(secret.encode(), at + 1)


def _prctl(option: int, value: int) -> None:
    zero = ctypes.c_ulong(0)
    _call("prctl", option, ctypes.c_ulong(value), zero, zero, zero)


def _call(name: str, *arguments: object) -> int:
    result = int(getattr(_libc, name)(*arguments))
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{name}: {os.strerror(number)}")
    return result


_libc = ctypes.CDLL(None, use_errno=True)
