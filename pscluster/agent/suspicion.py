"""When a living process is suspected: it no longer beats, or it beats and does not get on. Pure; time is an argument.

What follows from it is the master's: shards of a suspected trainer go to others until it is heard again.
"""

from __future__ import annotations

from dataclasses import dataclass

from pscluster.v1.agents_pb2 import ProcessStatus
from pscluster.v1.plan_pb2 import ProcessSpec, Unreached

NONE = ProcessStatus.SUSPICION_NONE
SILENT = ProcessStatus.SUSPICION_SILENT
STALLED = ProcessStatus.SUSPICION_STALLED
WORDS = {NONE: "", SILENT: "silent", STALLED: "stalled"}

SILENCE_S = {ProcessSpec.KIND_TRAINER: 3.0, ProcessSpec.KIND_PARTITION: 4.0}
"""How long no beat may come. Beats come every half second from a thread of their own. A trainer is taken back when it
is heard again, so it costs little to suspect one; a partition is replaced."""
LOADING_SILENCE_S = 120.0
"""The same before a process is ready: libraries that come from a slow disk, and what holds the interpreter's lock while
it loads data, keep the other thread from beating."""
STALL_FACTOR = 5.0
MIN_STALL_S = 3.0
"""A microbatch that takes so many times the median, and at least so long, is stuck."""
FIRST_STALL_S = 30.0
"""The same where there is no median yet: compilers and cold devices take their time, and others can do the work."""


@dataclass(frozen=True, kw_only=True)
class LastHeartbeat:
    """The last beat, or the start: when it came (loop time), and what it said; see plan_pb2.Beat."""

    at_s: float
    busy_s: float = 0.0
    typical_s: float = 0.0
    unreached: Unreached | None = None


def suspicion_of(now_s: float, heard: LastHeartbeat | None, silence_s: float) -> ProcessStatus.Suspicion:
    """How a living process looks at `now_s`. None: it is not started yet."""
    if heard is None:
        return NONE
    if now_s - heard.at_s > silence_s:
        return SILENT
    limit_s = max(MIN_STALL_S, STALL_FACTOR * heard.typical_s) if heard.typical_s > 0 else FIRST_STALL_S
    if heard.busy_s > limit_s:
        return STALLED
    return NONE
