"""What an exit means: told from the status, the kernel's counters and the last words. Pure."""

from __future__ import annotations

import re
import signal
from collections.abc import Sequence
from dataclasses import dataclass

from pscluster.errors import OutOfMemoryError, ProcessLostError, PsError
from pscluster.v1.agents_pb2 import ProcessStatus
from pscluster.v1.plan_pb2 import ErrorDetail, Failure, ProcessSpec, Unreached

NOT_STARTED = 127
"""The exit code reported for a process that could not be started."""

_MAX_WORDS = 4096
_MEMORY_WORDS = re.compile(
    r"\bMemoryError\b|can't allocate memory|cannot allocate memory|CUDA out of memory|OutOfMemoryError"
    r"|std::bad_alloc",
    re.IGNORECASE,
)
_OF_SEGFAULTS = (
    "its log has the Python lines; besides a fault in an extension, that is how a write to the model's parameters "
    "ends, which are shared memory: change no parameter in the task's own code"
)
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
class Exit:
    """The facts about a process that ended.

    `returncode` is the exit code, or minus the signal. `expected`: its agent was told to end it. `oom_kills`:
    how many processes the kernel killed for want of memory in this control group while it ran. `failure`:
    its last report of that kind. `last_words`: its last lines on stderr, oldest first.
    """

    returncode: int
    expected: bool
    oom_kills: int = 0
    failure: Failure | None = None
    last_words: Sequence[str] = ()


def classify(process_id: str, pid: int, seen: Exit) -> ProcessStatus:
    """The status to report for an exit. An expected or clean one carries no error."""
    number = max(0, -seen.returncode)
    memory = seen.returncode != 0 and not (seen.expected and number) and _out_of_memory(seen, number)
    status = ProcessStatus(
        process_id=process_id,
        phase=ProcessStatus.PHASE_EXITED,
        exit_code=max(0, seen.returncode),
        signal=number,
        out_of_memory=memory,
        pid=pid,
        expected=seen.expected,
    )
    if seen.returncode != 0 and not seen.expected:
        status.error.CopyFrom(detail_of(_error(process_id, seen, number, memory)))
    return status


def detail_of(error: PsError) -> ErrorDetail:
    """The error as a message; `pscluster.client.decode` has the inverse."""
    return ErrorDetail(**error.to_dict())


def _out_of_memory(seen: Exit, number: int) -> bool:
    if number == signal.SIGKILL:
        return seen.oom_kills > 0
    words = list(seen.last_words)
    if seen.failure is not None:
        if seen.failure.error.code == OutOfMemoryError.code:
            return True
        words += [seen.failure.error.cause, seen.failure.traceback]
    return any(_MEMORY_WORDS.search(line) for line in words)


def _error(process_id: str, seen: Exit, number: int, memory: bool) -> PsError:
    words = "\n".join(seen.last_words)[-_MAX_WORDS:]
    details = {"process_id": process_id, "stderr": words} if words else {"process_id": process_id}
    how = f"ended by {_signal_name(number)}" if number else f"exited with code {seen.returncode}"
    if memory:
        return OutOfMemoryError(f"{_short(process_id)} ran out of memory ({how})", details=details)
    last = next((line.strip() for line in reversed(seen.last_words) if line.strip()), "")
    said = f': "{last[:200]}"' if last else ""
    action = _OF_SEGFAULTS if number == signal.SIGSEGV and _short(process_id).startswith("trainer") else ""
    return ProcessLostError(f"{_short(process_id)} {how}{said}", action=action, details=details)


def _short(process_id: str) -> str:
    """ "trainer-0" of "job/trainer-0/1"."""
    parts = process_id.split("/")
    return parts[-2] if len(parts) > 1 else process_id


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


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
