"""A storm of faults over a running job: each strikes when it is due and a step was committed since the last one.

With a limit file the storm also paces the job: no step is computed more than `LEAD_STEPS` after the next fault is due,
so that the job cannot end before the last fault."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

from harness.cluster import LocalCluster, wait_gone
from harness.commits import Commits
from harness.faults import LEFT_STOPPED_S, Fault, Victim, chosen, victims
from harness.growth import Growth
from harness.metered_task import set_limit
from pscluster.client import Cluster as Client
from pscluster.client import Job
from pscluster.errors import UnreachableError

STUCK_S = 120.0
"""A job without a committed step for this long is a failure."""
LEAD_STEPS = 48
"""How far a job may run ahead of a fault that is due: records of its steps arrive up to a second late, and later while
the master is stopped."""
_POLL_S = 0.05
_ASK_S = 0.5
_LOOK_S = 2.0

Log = Callable[[str], None]


class Violation(AssertionError):
    """An invariant does not hold: `reason` in one line, `detail` in as many as it takes."""

    def __init__(self, reason: str, detail: str = "") -> None:
        super().__init__("\n".join(filter(None, (detail, reason))))
        self.reason = reason
        self.detail = detail


@dataclass
class Struck:
    """A fault that has struck: when, whom, and what followed. Times are Unix times; None: it has not happened (yet)."""

    fault: Fault
    job: str
    victim: Victim
    at_s: float
    at_step: int
    at_high_step: int
    resumed_s: float | None = None
    next_commit_s: float | None = None

    def to_dict(self) -> dict[str, Any]:
        """Its entry in the result; durations are seconds since it struck."""
        return {
            "number": self.fault.number,
            "action": self.fault.action,
            "victim": self.victim.name if self.fault.kind != "everything" else "everything",
            "pid": self.victim.process.pid,
            "at_step": self.at_step,
            "at_s": round(self.at_s, 3),
            "resumed_after_s": _since(self.resumed_s, self.at_s),
            "next_commit_after_s": _since(self.next_commit_s, self.at_s),
        }


def _since(moment_s: float | None, start_s: float) -> float | None:
    return None if moment_s is None else round(moment_s - start_s, 3)


@dataclass
class Storm:
    """Strikes one job after another until every fault has struck. `limit`: the file that paces a metered job."""

    cluster: LocalCluster
    client: Client
    faults: Sequence[Fault]
    log: Log
    limit: Path | None = None
    growth: Growth = field(default_factory=Growth)
    struck: list[Struck] = field(default_factory=list)
    _stopped: dict[str, Struck] = field(default_factory=dict)  # by node
    _asked_s: float = 0.0
    _looked_s: float = 0.0

    def __post_init__(self) -> None:
        self._pace()

    @property
    def over(self) -> bool:
        """Every fault has struck."""
        return len(self.struck) == len(self.faults)

    def disturb(self, job: str, offset: int = 0) -> tuple[Job, Commits]:
        """Disturb a job until it ends; the ended job and its commits. Faults are due at their step less `offset`.

        Blocks. Raises Violation when no step is committed for `STUCK_S`."""
        commits = Commits(self.cluster.state_dir, job)
        started_s = time.time()
        while True:
            self._note(commits)
            self._resume_due()
            self._sample()
            found = self._ask(job)
            if found is not None and found.ended:
                self._resume_all()
                self._note(commits)
                return found, commits
            if time.time() - max(commits.newest_s, started_s) > STUCK_S:
                raise Violation(f"{job} committed no step for {STUCK_S:.0f} s after step {commits.step}")
            if not self.over and self._is_due(job, commits, self.faults[len(self.struck)], offset):
                self._strike(self.faults[len(self.struck)], job, commits)
            time.sleep(_POLL_S)

    def _pace(self) -> None:
        """Let the job compute as far as the next fault allows."""
        if self.limit is not None:
            set_limit(self.limit, None if self.over else self.faults[len(self.struck)].step + LEAD_STEPS)

    def _is_due(self, job: str, commits: Commits, fault: Fault, offset: int) -> bool:
        """Once its step is committed, and a step beyond those committed at the last fault: a step that is only computed
        again does not clear the job's count of losses, which is bounded."""
        last = self.struck[-1] if self.struck else None
        since = 0 if last is None or last.job != job else last.at_high_step
        moved = commits.high_step > since and (last is None or commits.newest_s > last.at_s)
        return moved and commits.high_step >= fault.step - offset

    def _strike(self, fault: Fault, job: str, commits: Commits) -> None:
        living = list(victims(self.cluster))
        if fault.kind == "everything":
            self._strike_everything(fault, job, commits, living)
            return
        if fault.action == "stop":  # at most one node of each role is stopped for long
            self._end_stop(lambda held: held.victim.node.partition("-")[0] == _role(fault.kind))
        victim = chosen(fault, living, self._stopped)
        if victim is None:
            return  # none of its kind runs at this moment; the caller tries again
        try:
            at_s = time.time()
            victim.strike(fault.action)
        except psutil.NoSuchProcess:
            return  # it has just ended, for instance because it was replaced
        self._record(fault, job, commits, victim, at_s)

    def _strike_everything(self, fault: Fault, job: str, commits: Commits, living: Sequence[Victim]) -> None:
        self._stopped.clear()
        at_s = time.time()
        for victim in living:
            with suppress(psutil.NoSuchProcess):
                victim.process.kill()
        wait_gone([victim.process for victim in living])
        self._record(fault, job, commits, living[0], at_s)

    def _record(self, fault: Fault, job: str, commits: Commits, victim: Victim, at_s: float) -> None:
        struck = Struck(
            fault=fault, job=job, victim=victim, at_s=at_s, at_step=commits.step, at_high_step=commits.high_step
        )
        self.struck.append(struck)
        if fault.action == "stop":
            self._stopped[victim.node] = struck
        elif victim.kind == "worker" or victim.kind == "server" or victim.kind == "master":
            self._stopped.pop(victim.node, None)
        self._pace()
        name = "everything" if fault.kind == "everything" else victim.name
        self.log(f"{fault.number + 1}/{len(self.faults)} step {commits.step}: {fault.action} {name}")

    def _note(self, commits: Commits) -> None:
        """Read new commits, and note for each fault the first one after it."""
        if not commits.look():
            return
        for struck in self.struck[-8:]:
            if struck.next_commit_s is None and (found := commits.after(struck.at_s)):
                struck.next_commit_s = found.time_s

    def _resume_due(self) -> None:
        now = time.time()
        self._end_stop(lambda held: now - held.at_s >= (held.fault.resume_s or LEFT_STOPPED_S))

    def _resume_all(self) -> None:
        self._end_stop(lambda _: True)

    def _end_stop(self, which: Callable[[Struck], bool]) -> None:
        """Resume stopped processes; kill those that were to stay stopped, unless they have ended."""
        for node, held in [(node, held) for node, held in self._stopped.items() if which(held)]:
            del self._stopped[node]
            if held.fault.resume_s is None and time.time() - held.at_s >= LEFT_STOPPED_S:
                with suppress(psutil.NoSuchProcess):
                    held.victim.process.kill()
            elif held.victim.resume():
                held.resumed_s = time.time()

    def _sample(self) -> None:
        now = time.monotonic()
        if now - self._looked_s >= _LOOK_S:
            self._looked_s = now
            self.growth.look(victims(self.cluster))
            self.cluster.note_processes()

    def _ask(self, job: str) -> Job | None:
        """The job, at most every `_ASK_S` seconds; None in between and while the master does not answer."""
        now = time.monotonic()
        if now - self._asked_s < _ASK_S or "master" in self._stopped:
            return None
        self._asked_s = now
        try:
            return self.client.job(job)
        except UnreachableError:
            return None


def _role(kind: str) -> str:
    """The role of the node that a victim of a kind is or runs on."""
    return {"trainer": "worker", "partition": "server"}.get(kind, kind)
