"""Formats numbers, times and tables for people. Pure: `now_s` is an argument."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from datetime import datetime

from pscluster.errors import SettingsError

_UNITS = {"": 1.0, "ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}
_DURATION = re.compile(r"(\d+(?:\.\d+)?)(ms|s|m|h|d)")
_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f]")


def duration(seconds: float | None) -> str:
    """The two largest units: 42s, 3m12s, 2h5m, 4d3h; "-" for an unknown one."""
    if seconds is None or not math.isfinite(seconds):
        return "-"
    left = max(0, int(seconds))
    parts: list[tuple[int, str]] = []
    for size, unit in ((86400, "d"), (3600, "h"), (60, "m"), (1, "s")):
        count, left = divmod(left, size)
        if count or (parts and len(parts) < 2) or (unit == "s" and not parts):
            parts.append((count, unit))
    return "".join(f"{count}{unit}" for count, unit in parts[:2] if count or len(parts) == 1)


def age(then_s: float | None, now_s: float) -> str:
    """How long ago a Unix time is; "-" when unknown."""
    return duration(now_s - then_s) if then_s else "-"


def count(value: float) -> str:
    """A rate or number in at most four characters and a suffix: 7.3, 118, 12.4k, 3.1M."""
    for size, suffix in ((1e9, "G"), (1e6, "M"), (1e4, "k")):
        if abs(value) >= size:
            scaled = value / (1e3 if suffix == "k" else size)
            return f"{scaled:.1f}{suffix}" if scaled < 100 else f"{scaled:.0f}{suffix}"
    return f"{value:.1f}" if 0 < abs(value) < 100 else f"{value:.0f}"


def size(num_bytes: float) -> str:
    """Bytes in binary units: 512 B, 1.5 KiB, 7.8 GiB."""
    for power, unit in ((40, "TiB"), (30, "GiB"), (20, "MiB"), (10, "KiB")):
        if num_bytes >= 1 << power:
            return f"{num_bytes / (1 << power):.1f} {unit}"
    return f"{num_bytes:.0f} B"


def number(value: float | None) -> str:
    """A loss or metric in five significant digits; "-" when there is none."""
    if value is None or not math.isfinite(value):
        return "-"
    return f"{value:.4f}" if 1e-3 <= abs(value) < 1e5 or value == 0 else f"{value:.4g}"


def clock(time_s: float) -> str:
    """A Unix time as local date and time."""
    return datetime.fromtimestamp(time_s).astimezone().strftime("%Y-%m-%d %H:%M:%S")


def one_line(text: str) -> str:
    """Foreign text without characters that would move the cursor or forge a line."""
    return _CONTROL.sub(" ", text)


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Left-aligned columns, three spaces apart, as kubectl has them. No trailing spaces, no final newline."""
    lines = [list(header), *([one_line(cell) or "-" for cell in row] for row in rows)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(header))]
    return "\n".join(
        "   ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines
    )


def parse_duration(text: str) -> float:
    """Seconds in "90", "90s", "1h30m", "250ms". Raises SettingsError for anything else."""
    stripped = text.strip().lower()
    try:
        value = float(stripped)
    except ValueError:
        parts = _DURATION.findall(stripped)
        if not parts or "".join(amount + unit for amount, unit in parts) != stripped:
            raise SettingsError(f"{text!r} is not a duration", action="write 90s, 5m or 1h30m") from None
        value = sum(float(amount) * _UNITS[unit] for amount, unit in parts)
    if not math.isfinite(value) or value < 0:
        raise SettingsError(f"{text!r} is not a duration", action="write 90s, 5m or 1h30m")
    return value


def parse_since(text: str, now_s: float) -> float:
    """The Unix time of "10m" (ago) or of "2026-01-31 08:00" (local, or with its own zone)."""
    try:
        return datetime.fromisoformat(text).astimezone().timestamp()
    except ValueError:
        return now_s - parse_duration(text)
