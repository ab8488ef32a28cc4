"""The side thread of a trainer or partition that beats to its agent, whatever the other threads are busy with."""

from __future__ import annotations

import threading
from collections.abc import Callable

from pscluster.agent.link import ProcessLink
from pscluster.v1.plan_pb2 import Beat, ProcessReport

BEAT_S = 0.5
UNREACHED_S = 2.0
"""For so long a partition is dialled again and again before a beat says that it cannot be reached."""


class HeartbeatThread:
    """Calls `beat` and reports what it returns, twice a second, from `start` until `close` or the agent's end."""

    def __init__(self, link: ProcessLink, beat: Callable[[], Beat]) -> None:
        """`beat` runs on the side thread and must not block."""
        self._link = link
        self._beat = beat
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, name="heart", daemon=True)

    def start(self) -> None:
        """Begin to beat; the first beat is sent at once. Called once."""
        self._thread.start()

    def close(self) -> None:
        """Stop beating. Safe to repeat, also before `start`."""
        self._ended.set()

    def _run(self) -> None:
        try:
            while True:
                self._link.report(ProcessReport(beat=self._beat()))
                if self._ended.wait(BEAT_S):
                    return
        except EOFError:
            return  # the agent is gone, and this process with it
