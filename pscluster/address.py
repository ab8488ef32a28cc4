"""Texts of TCP addresses: "host:port", with an IPv6 host in brackets. Pure."""

from __future__ import annotations

import ipaddress

from pscluster.errors import SettingsError


def split_address(text: str) -> tuple[str, int]:
    """("127.0.0.1", 9090) of "127.0.0.1:9090", and ("::1", 9090) of "[::1]:9090". Raises SettingsError."""
    host, separator, port = text.rpartition(":")
    host = host.removeprefix("[").removesuffix("]")
    if not separator or not host or not port.isdecimal() or int(port) > 65535:
        raise SettingsError(f"{text!r} is not HOST:PORT", action='write it like "127.0.0.1:9090"; port 0 is any')
    return host, int(port)


def join_address(host: str, port: int | str) -> str:
    """The inverse of `split_address`; `host` with or without brackets. `port`: also a range, "7100-7199"."""
    return f"[{host}]:{port}" if ":" in host and not host.startswith("[") else f"{host}:{port}"


def is_loopback(host: str) -> bool:
    """Whether a literal address, in brackets or not, or "localhost", is of this machine alone. Another name may be."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.removeprefix("[").removesuffix("]")).is_loopback
    except ValueError:
        return False
