"""Where snapshots may live, as text: an absolute directory, or the URL of a store that every node reaches. Pure."""

from __future__ import annotations

from urllib.parse import urlsplit


def check_location(text: str) -> str:
    """`text`, when it names a directory or store that can be shared. Raises ValueError saying what is wrong with it."""
    scheme, separator, rest = text.partition("://")
    if not separator:
        if not text.startswith("/"):
            raise ValueError(f"{text!r} is not an absolute directory, nor a URL like s3://bucket/prefix")
        return text
    if scheme == "memory":
        raise ValueError("memory:// is the memory of one process: no other would see what was written there")
    if scheme not in ("file", "s3"):
        raise ValueError(f"{scheme}:// is not supported: give a directory, file:///directory or s3://bucket/prefix")
    if scheme == "file" and not rest.startswith("/"):
        raise ValueError(f"{text!r} names a host: write file:///directory")
    if scheme == "s3":
        _check_bucket(text)
    return text


def below(location: str, name: str) -> str:
    """The location of `name` under `location`."""
    return f"{location.rstrip('/')}/{name}"


def _check_bucket(text: str) -> None:
    parts = urlsplit(text)
    if "@" in parts.netloc:
        raise ValueError("credentials do not belong in a spec: daemons take them from their environment")
    if not parts.netloc or parts.query or parts.fragment:
        raise ValueError("write s3://bucket/prefix")
