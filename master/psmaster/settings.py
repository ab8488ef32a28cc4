"""The master's settings."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

_LOOPBACK = ("127.0.0.1", "localhost", "[::1]")


@dataclass(frozen=True, kw_only=True)
class MasterSettings:
    """`listen`: "unix:/path" or "host:port", each; a host is a loopback one, because nothing encrypts the token yet.

    `suspicion_s`: silence after which a node is taken for dead.
    """

    state_dir: Path
    token_file: Path
    listen: tuple[str, ...] = ("127.0.0.1:7070",)
    metrics_listen: str = "127.0.0.1:0"
    suspicion_s: float = 3.0
    log_level: str = "info"

    def __post_init__(self) -> None:
        if not self.listen:
            raise ValueError("listen names no address")
        for address in self.listen:
            self._check(address)
        if not 0.5 <= self.suspicion_s <= 3600:
            raise ValueError(f"suspicion_s must lie between 0.5 and 3600, not {self.suspicion_s:g}")

    def _check(self, address: str) -> None:
        if address.startswith("unix:"):
            if len(address) <= len("unix:") or len(address) > len("unix:") + 107:
                raise ValueError(f"{address!r} is no path that a Unix socket can have (1 to 107 characters)")
            return
        host, separator, port = address.rpartition(":")
        if not separator or not port.isdecimal() or int(port) > 65535:
            raise ValueError(f"{address!r} is neither host:port nor unix:/path")
        if host not in _LOOPBACK:
            raise ValueError(f"{address!r} is not a loopback address; other hosts must wait for encrypted connections")


@dataclass(frozen=True, kw_only=True)
class RebuildSettings:
    """Of `psmaster rebuild`. `store`: where jobs with a durability.store of their own have their snapshots."""

    state_dir: Path
    store: tuple[str, ...] = ()
