"""Why a daemon ended, from the end of its log. Pure, but for reading the file."""

from __future__ import annotations

import re
from pathlib import Path

from pscluster.errors import PsError, UnhealthyError, from_dict

_NAMED = re.compile(r"^(PS-\d{4}): (.*?)(?: \(([^()]*(?:\([^()]*\)[^()]*)*)\))?$")
_LINES = 8
_TAIL_BYTES = 16 << 10


def size_of(log: Path) -> int:
    """Where the log ends now: what comes later is the next start's."""
    try:
        return log.stat().st_size
    except OSError:
        return 0


def exit_error(name: str, log: Path, offset: int) -> PsError:
    """The named error the daemon printed after `offset`, else one that shows its last lines."""
    lines = _last_lines(log, offset)
    for line in reversed(lines):
        match = _NAMED.match(line.strip())
        if match:
            code, cause, action = match.groups()
            return from_dict(
                {"code": code, "cause": f"{name} could not start: {cause}", "action": action or f"see {log}"}
            )
    shown = "\n  ".join(lines[-_LINES:]) or "(it wrote nothing)"
    return UnhealthyError(f"{name} ended while starting; its last words:\n  {shown}", action=f"see {log}")


def _last_lines(log: Path, offset: int) -> list[str]:
    try:
        with log.open("rb") as source:
            end = source.seek(0, 2)
            source.seek(max(offset if offset <= end else 0, end - _TAIL_BYTES))
            text = source.read().decode("utf-8", "replace")
    except OSError:
        return []
    return [line for line in text.splitlines() if line.strip()]
