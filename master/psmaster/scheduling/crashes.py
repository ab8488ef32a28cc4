"""Fatal signals in trainers: the first one at a place may be a fault of the machine, the second is the code's. Pure.

A place is a microbatch of a step, whoever computes it, or the loading of the task. SIGKILL and SIGTERM come from
outside and say nothing about the code."""

from __future__ import annotations

import signal

from pscluster.errors import TaskExitError
from pscluster.user_frames import frame_details
from psmaster.model.job import ErrorInfo
from psmaster.model.plan import Placement
from psmaster.model.process import Exit, LastPosition, exit_failure, with_place
from psmaster.scheduling.draft import Draft, View

FATAL = frozenset({signal.SIGSEGV, signal.SIGBUS, signal.SIGILL, signal.SIGFPE, signal.SIGABRT})
MAX_REMEMBERED = 64
"""How many places of a job are remembered, the newest: the second signal at one comes within a few attempts."""


def fail_if_repeated(draft: Draft, view: View, placement: Placement) -> bool:
    """Remember that a trainer was ended by a fatal signal. True if it is the second one at that place: the job is
    FAILED then, once the steps before it are recorded."""
    process = view.processes.get(placement.process_id(draft.job.job_id))
    exit_ = process.exit if process is not None else None
    if exit_ is None or exit_.position is None or not is_fatal(exit_):
        return False
    place = (exit_.position.activity, exit_.position.version, exit_.position.shard)
    if place not in draft.job.crashes:
        draft.update(crashes=(*draft.job.crashes, place)[-MAX_REMEMBERED:])
        return False
    if not draft.awaits_record(exit_.position.version, view.limits.record_s):
        failure = exit_failure(_error(exit_, exit_.position), exit_.position)
        draft.fail(with_place(placement, failure, [placement]), failure.traceback)
    return True


def is_fatal(exit_: Exit) -> bool:
    """Whether the code itself may have caused the signal that ended a process."""
    return exit_.signal in FATAL and not exit_.out_of_memory and not exit_.expected


def _error(exit_: Exit, position: LastPosition) -> ErrorInfo:
    name = signal.Signals(exit_.signal).name
    where = f" in {position.call}" if position.call else ""
    cause = f"the task was ended by {name}{where}, twice at the same place"
    details = {**frame_details(position.traceback), "signal": name}
    return ErrorInfo.of(TaskExitError(cause, action=exit_.error.action if exit_.error else "", details=details))
