"""The status of a process as its agent reports it: suspected while it runs, classified when it exits. Pure.

The agent only reports; the master decides what follows. Shards of a suspected trainer move to others until it recovers.
"""

from __future__ import annotations

import re
import signal
from collections.abc import Sequence
from dataclasses import dataclass, field

from pscluster.errors import OutOfMemoryError, ProcessLostError, PsError, TaskExitError
from pscluster.user_frames import frame_details
from pscluster.v1.agents_pb2 import ProcessStatus
from pscluster.v1.plan_pb2 import Beat, ErrorDetail, Failure, LastPosition, ProcessSpec

NOT_STARTED = 127
"""The exit code reported for a process that could not be started."""

_MAX_STDERR = 4096
_OUT_OF_MEMORY = re.compile(
    r"\bMemoryError\b|can't allocate memory|cannot allocate memory|CUDA out of memory|OutOfMemoryError"
    r"|std::bad_alloc",
    re.IGNORECASE,
)
_SEGFAULT_ACTION = (
    "see the Python stack in its log; the cause is a fault in an extension, or a write to the model's parameters: "
    "these are read-only shared memory, and a task must not change them"
)
NONE = ProcessStatus.SUSPICION_NONE
SILENT = ProcessStatus.SUSPICION_SILENT
STALLED = ProcessStatus.SUSPICION_STALLED
SUSPICION_NAMES = {NONE: "", SILENT: "silent", STALLED: "stalled"}
SILENCE_S = {ProcessSpec.KIND_TRAINER: 3.0, ProcessSpec.KIND_PARTITION: 4.0}
"""A process without a heartbeat for this long is silent. Heartbeats are sent every half second by a separate thread.
The limit is lower for a trainer, which gets its shards back when it recovers; a partition is replaced."""
LOADING_SILENCE_S = 120.0
"""The limit before a process is ready: loading libraries from a slow disk, or data under the interpreter's lock, blocks
the heartbeat thread."""
STALL_FACTOR = 5.0
MIN_STALL_S = 3.0
"""A trainer is stalled when one microbatch takes this many times the median, and at least this long."""
FIRST_STALL_S = 30.0
"""The limit before a median is known: compilation and cold devices are slow."""


@dataclass(frozen=True, kw_only=True)
class Exit:
    """How a process exited. `returncode` is the exit code, or minus the signal. `expected`: its agent ended it.
    `oom_kills`: processes of this control group that the kernel killed for lack of memory meanwhile. `failure`: the
    last one that it reported. `stderr_tail`: oldest line first. `position`: where a trainer was. `lost`: why its agent
    killed it, and counts it as lost."""

    returncode: int
    expected: bool
    oom_kills: int = 0
    failure: Failure | None = None
    stderr_tail: Sequence[str] = ()
    position: LastPosition | None = None
    lost: PsError | None = None

    @property
    def by_user_code(self) -> bool:
        """Whether user code ended the process by an exit: it exited while user code ran, or its stack was written by
        os._exit, and it reported nothing."""
        at_user_code = self.position is not None and bool(self.position.call or self.position.traceback)
        return at_user_code and self.returncode >= 0 and not self.expected and self.failure is None


def classify(process_id: str, pid: int, seen: Exit) -> ProcessStatus:
    """The status to report for an exit. An expected or clean exit carries no error."""
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
        position=seen.position,
    )
    if (seen.returncode != 0 or seen.by_user_code) and not seen.expected:
        status.error.CopyFrom(detail_of(_error(process_id, seen, number, memory)))
    return status


def not_started(process_id: str, error: PsError | None = None, *, expected: bool) -> ProcessStatus:
    """The exit of a process that does not run: it could not be started, or was ended before it was."""
    status = ProcessStatus(
        process_id=process_id, phase=ProcessStatus.PHASE_EXITED, exit_code=NOT_STARTED, expected=expected
    )
    if error is not None:
        status.error.CopyFrom(detail_of(error))
    return status


def address_gone(process_id: str, host: str) -> PsError:
    """Why a partition is lost whose node has another address now."""
    return ProcessLostError(
        f"{_short(process_id)} listened on {host}, which is no longer an address of its node",
        details={"process_id": process_id, "address": host},
    )


def detail_of(error: PsError) -> ErrorDetail:
    """The error as a message; `pscluster.client.records` has the inverse."""
    return ErrorDetail(**error.to_dict())


def _out_of_memory(seen: Exit, number: int) -> bool:
    if seen.lost is not None:
        return False
    if number == signal.SIGKILL:
        return seen.oom_kills > 0
    lines = list(seen.stderr_tail)
    if seen.failure is not None:
        if seen.failure.error.code == OutOfMemoryError.code:
            return True
        lines += [seen.failure.error.cause, seen.failure.traceback]
    return any(_OUT_OF_MEMORY.search(line) for line in lines)


def _error(process_id: str, seen: Exit, number: int, memory: bool) -> PsError:
    stderr = "\n".join(seen.stderr_tail)[-_MAX_STDERR:]
    details = {"process_id": process_id, "stderr": stderr} if stderr else {"process_id": process_id}
    if seen.lost is not None:
        return seen.lost
    how = f"ended by {_signal_name(number)}" if number else f"exited with code {seen.returncode}"
    if memory:
        return OutOfMemoryError(f"{_short(process_id)} ran out of memory ({how})", details=details)
    if seen.by_user_code and seen.position is not None:
        return _exit_by_user_code(seen.position, how, details)
    last = next((line.strip() for line in reversed(seen.stderr_tail) if line.strip()), "")
    shown = f': "{last[:200]}"' if last else ""
    action = _SEGFAULT_ACTION if number == signal.SIGSEGV and _short(process_id).startswith("trainer") else ""
    return ProcessLostError(f"{_short(process_id)} {how}{shown}", action=action, details=details)


def _exit_by_user_code(position: LastPosition, how: str, details: dict[str, str]) -> PsError:
    details = {**details, **frame_details(position.traceback)}
    return TaskExitError(f"{position.call or 'a thread of the task'} ended the process: it {how}", details=details)


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
    """The last heartbeat, or the start, whose beat is empty; `at_s`: when it arrived (loop time)."""

    at_s: float
    beat: Beat = field(default_factory=Beat)


def suspicion_of(now_s: float, last: LastHeartbeat | None, silence_s: float) -> ProcessStatus.Suspicion:
    """Whether a running process is silent or stalled at `now_s`. `last` None: it has not started."""
    if last is None:
        return NONE
    if now_s - last.at_s > silence_s:
        return SILENT
    typical_s = last.beat.typical_s
    limit_s = max(MIN_STALL_S, STALL_FACTOR * typical_s) if typical_s > 0 else FIRST_STALL_S
    return STALLED if last.beat.busy_s > limit_s else NONE
