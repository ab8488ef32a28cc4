"""What the control group of this process tells about memory: its limit and its out-of-memory kills.

Both hierarchies are understood, and a container that shows its own group at the root. Where there is none,
the answers are "no limit" and the machine's own count.
"""

from __future__ import annotations

from pathlib import Path

_ROOT = Path("/sys/fs/cgroup")
_UNLIMITED_BYTES = 1 << 60


def memory_limit_bytes(proc: Path = Path("/proc"), root: Path = _ROOT) -> int | None:
    """The group's memory limit in bytes; None: it has none."""
    for group, version in _groups(proc, root):
        text = _read(group / ("memory.max" if version == 2 else "memory.limit_in_bytes")).strip()
        if text.isdecimal() and int(text) < _UNLIMITED_BYTES:
            return int(text)
    return None


def oom_kills(proc: Path = Path("/proc"), root: Path = _ROOT) -> int:
    """How many processes of the group, else of the machine, the kernel killed for want of memory so far."""
    for group, version in _groups(proc, root):
        count = _field(_read(group / ("memory.events" if version == 2 else "memory.oom_control")), "oom_kill")
        if count is not None:
            return count
    return _field(_read(proc / "vmstat"), "oom_kill") or 0


def _groups(proc: Path, root: Path) -> list[tuple[Path, int]]:
    """Directories that may be ours, most specific first, each with its hierarchy's version."""
    found: list[tuple[Path, int]] = []
    for line in _read(proc / "self" / "cgroup").splitlines():
        _, controllers, path = line.split(":", 2)
        inside = path.lstrip("/")
        if controllers == "":
            found += [(root / inside, 2), (root, 2)]
        elif "memory" in controllers.split(","):
            found = [(root / "memory" / inside, 1), (root / "memory", 1), *found]
    return found


def _field(text: str, name: str) -> int | None:
    for line in text.splitlines():
        key, _, value = line.partition(" ")
        if key == name and value.strip().isdecimal():
            return int(value)
    return None


def _read(path: Path) -> str:
    """The file's text; empty when the kernel has no such file."""
    try:
        return path.read_text(encoding="ascii", errors="replace")
    except OSError:
        return ""
