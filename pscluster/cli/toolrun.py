"""One request to `psworker.tools`, in a process of its own."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

from pscluster.errors import InternalError, from_dict

COMMAND = (sys.executable, "-P", "-m", "psworker.tools")
_LINES = 12


def run_tool(request: dict[str, Any], command: tuple[str, ...] = COMMAND) -> dict[str, Any]:
    """Its answer, without "ok". Blocks for as long as it computes; Ctrl-C ends it too.

    Raises the very error it answers; InternalError with its last words when it gives no answer.
    """
    process = subprocess.run(command, input=json.dumps(request).encode(), capture_output=True, check=False)
    words = process.stderr.decode("utf-8", "replace").splitlines()[-_LINES:]
    reply = _parsed(process.stdout)
    if reply is None:
        raise InternalError(
            f"psworker.tools ended with status {process.returncode} and no answer; its last words:\n  "
            + "\n  ".join(words or ["(none)"])
        )
    if not reply.pop("ok"):
        raise from_dict(reply.get("error") or {})
    return reply


def _parsed(text: bytes) -> dict[str, Any] | None:
    try:
        reply = json.loads(text)
    except ValueError:
        return None
    return reply if isinstance(reply, dict) and "ok" in reply else None
