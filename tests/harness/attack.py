"""User code that wants its agent's key: tries every way that we know, and prints what it got, as JSON by attempt.

Run as a module by `pscluster.agent.launch` in the place of a trainer. Arguments: the path of the key, the secret in it
backwards (a real attacker would recognise a key), a directory that it may write to, the user id that it should have.
Only the standard library."""

from __future__ import annotations

import ctypes
import json
import os
import stat
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

KEY, SECRET, OWN = Path(sys.argv[1]), sys.argv[2].encode()[::-1], Path(sys.argv[3])  # reversed: not in our own cmdline
AGENT = os.getppid()
STATE_DIR = KEY.parent.parent
_libc = ctypes.CDLL(None, use_errno=True)
_PTRACE_ATTACH, _PTRACE_DETACH, _PIDFD_GETFD = 16, 17, 438
_IN_NEW_NAMESPACES = """
umount {identity}; cat {key}
mkdir -p {own}/bound; mount --bind {state} {own}/bound; cat {own}/bound/{identity_name}/{key_name}
mount -t proc proc {own}/bound; cat {own}/bound/{agent}/environ
"""


def read(path: Path | str, limit: int = 1 << 20) -> bytes:
    handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    try:
        return os.read(handle, limit)
    finally:
        os.close(handle)


def has_secret(data: bytes) -> bool:
    return SECRET in data


def by_link() -> bool:
    (OWN / "link").symlink_to(KEY)
    return has_secret(read(OWN / "link"))


def by_hard_link() -> bool:
    os.link(KEY, OWN / "hard")
    return has_secret(read(OWN / "hard"))


def by_rename() -> bool:
    os.rename(KEY.parent, OWN / "moved")
    return True


def by_rename_of_the_state_directory() -> bool:
    """The agent would write its next key into a directory of ours."""
    os.rename(STATE_DIR, STATE_DIR.with_name("moved"))
    return True


def by_overwriting() -> bool:
    with KEY.open("r+b") as file:
        return file.write(SECRET) > 0


def by_planting() -> bool:
    (KEY.parent / "planted").write_text("")
    return True


def by_removing() -> bool:
    KEY.unlink()
    return True


def in_descriptors(pid: str) -> bool:
    found = [f"/proc/{pid}/fd/{name}" for name in os.listdir(f"/proc/{pid}/fd")]
    return any(has_secret(data) for data in readable(found))


def readable(paths: list[str]) -> Iterator[bytes]:
    for path in paths:
        try:
            yield read(path)
        except OSError:
            continue


def in_memory() -> bool:
    with open(f"/proc/{AGENT}/mem", "rb", buffering=0) as memory:
        for line in Path(f"/proc/{AGENT}/maps").read_text().splitlines():
            span, access = line.split()[:2]
            start, end = (int(part, 16) for part in span.split("-"))
            if access.startswith("rw") and end - start < 1 << 28:
                memory.seek(start)
                if has_secret(memory.read(end - start)):
                    return True
    return False


def by_reading_its_memory() -> bool:
    """process_vm_readv needs no file."""
    buffer = ctypes.create_string_buffer(8)

    class Piece(ctypes.Structure):
        _fields_ = (("base", ctypes.c_void_p), ("length", ctypes.c_size_t))

    here = Piece(ctypes.addressof(buffer), 8)
    there = Piece(ctypes.addressof(buffer), 8)  # an address that need not exist there: EFAULT would mean that we may
    moved = _libc.process_vm_readv(AGENT, ctypes.byref(here), 1, ctypes.byref(there), 1, 0)
    return moved >= 0 or ctypes.get_errno() != 1  # EPERM


def by_ptrace() -> bool:
    if _libc.ptrace(_PTRACE_ATTACH, AGENT, None, None) != 0:
        return False
    os.waitpid(AGENT, 0x4000_0000)
    _libc.ptrace(_PTRACE_DETACH, AGENT, None, None)
    return True


def by_its_descriptors() -> bool:
    handle = os.pidfd_open(AGENT)
    return any(_libc.syscall(_PIDFD_GETFD, handle, number, 0) >= 0 for number in range(64))


def in_new_namespaces() -> bool:
    names = {"identity": KEY.parent, "key": KEY, "state": STATE_DIR, "own": OWN, "agent": AGENT}
    script = _IN_NEW_NAMESPACES.format(**names, identity_name=KEY.parent.name, key_name=KEY.name)
    done = subprocess.run(["unshare", "-Urmpf", "sh", "-c", script], capture_output=True, timeout=20)
    return has_secret(done.stdout)


def below(directory: Path) -> bool:
    for folder, _, names in os.walk(directory):
        if any(has_secret(data) for data in readable([os.path.join(folder, name) for name in names])):
            return True
    return False


def by_raw_devices() -> bool:
    for entry in os.scandir("/dev"):
        try:
            handle = os.open(entry.path, os.O_RDONLY | os.O_NONBLOCK)
        except OSError:
            continue
        found = os.fstat(handle)
        os.close(handle)
        if stat.S_ISBLK(found.st_mode) or entry.name in ("mem", "kmem"):
            return not (stat.S_ISCHR(found.st_mode) and found.st_rdev == os.stat("/dev/null").st_rdev)
    return False


def by_becoming_root() -> bool:
    os.setresuid(0, 0, 0)
    return os.getuid() != int(sys.argv[4])


ATTEMPTS: dict[str, Callable[[], bool]] = {
    "path": lambda: has_secret(read(KEY)),
    "relative path": lambda: has_secret(read(os.path.relpath(KEY))),
    "link": by_link,
    "hard link": by_hard_link,
    "root of the agent": lambda: has_secret(read(f"/proc/{AGENT}/root{KEY}")),
    "directory of the agent": lambda: has_secret(read(f"/proc/{AGENT}/cwd/{KEY.parent.name}/{KEY.name}")),
    "descriptors": lambda: in_descriptors(str(AGENT)),
    "memory file": in_memory,
    "memory": by_reading_its_memory,
    "environment": lambda: has_secret(read(f"/proc/{AGENT}/environ")),
    "ptrace": by_ptrace,
    "pidfd": by_its_descriptors,
    "new namespaces": in_new_namespaces,
    "raw devices": by_raw_devices,
    "root": by_becoming_root,
    "own environment": lambda: has_secret(read("/proc/self/environ")),
    "own descriptors": lambda: in_descriptors("self"),
    "state directory": lambda: below(STATE_DIR),
    "own directory": lambda: below(Path.cwd()),
    "plant": by_planting,
    "overwrite": by_overwriting,
    "rename of the state directory": by_rename_of_the_state_directory,
    "rename": by_rename,
    "remove": by_removing,
}


def main() -> None:
    found = {}
    for name, attempt in ATTEMPTS.items():
        try:
            found[name] = attempt()
        except (OSError, subprocess.SubprocessError):
            found[name] = False
    print(json.dumps(found))


if __name__ == "__main__":
    main()
