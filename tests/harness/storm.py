"""A storm of faults over a running job: each strikes when it is due and a step was committed since the last one."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import psutil

from harness.cluster import LocalCluster, wait_gone
from harness.commits import Commits
from harness.faults import LEFT_STOPPED_S, Fault, Victim, chosen, victims
from harness.growth import Growth
from pscluster.client import Cluster as Client
from pscluster.client import Job
from pscluster.errors import UnreachableError

STUCK_S = 120.0
"""So long without a committed step is a failure."""
_POLL_S = 0.05
_ASK_S = 0.5
_LOOK_S = 2.0

Say = Callable[[str], None]


class Violation(AssertionError):
    """An invariant does not hold. Its text says which, and where everything was written down."""


@dataclass
class Struck:
    """A fault that has struck: when, whom, and what followed. Times are Unix times; None: it has not (yet) come."""

    fault: Fault
    job: str
    victim: Victim
    at_s: float
    at_step: int
    at_high_step: int
    resumed_s: float | None = None
    next_commit_s: float | None = None

    def to_dict(self) -> dict[str, Any]:
        """As the result shows it; durations in seconds from the moment it struck."""
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
    """Strikes a job after another until every fault has struck."""

    cluster: LocalCluster
    client: Client
    faults: Sequence[Fault]
    say: Say
    growth: Growth = field(default_factory=Growth)
    struck: list[Struck] = field(default_factory=list)
    _stopped: dict[str, Struck] = field(default_factory=dict)  # by node
    _asked_s: float = 0.0
    _looked_s: float = 0.0

    @property
    def over(self) -> bool:
        """Every fault has struck."""
        return len(self.struck) == len(self.faults)

    def weather(self, job: str, offset: int = 0) -> tuple[Job, Commits]:
        """See a job through to its end; the ended job and its commits. Faults are due at their step less `offset`.

        Raises Violation when no step comes for too long."""
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
                raise Violation(f"{job}: no step for {STUCK_S:.0f} s after step {commits.step}")
            if not self.over and self._is_due(job, commits, self.faults[len(self.struck)], offset):
                self._strike(self.faults[len(self.struck)], job, commits)
            time.sleep(_POLL_S)

    def _is_due(self, job: str, commits: Commits, fault: Fault, offset: int) -> bool:
        """Once its step is there, and a step that was not there at the last fault: one that is only computed again does
        not clear the job's count of losses, which is bounded."""
        last = self.struck[-1] if self.struck else None
        since = 0 if last is None or last.job != job else last.at_high_step
        moved = commits.high_step > since and (last is None or commits.newest_s > last.at_s)
        return moved and commits.high_step >= fault.step - offset

    def _strike(self, fault: Fault, job: str, commits: Commits) -> None:
        living = list(victims(self.cluster))
        if fault.kind == "everything":
            self._strike_everything(fault, job, commits, living)
            return
        if fault.action == "stop":  # of each role one node at most is away for long
            self._end_stop(lambda held: held.victim.node.partition("-")[0] == _role(fault.kind))
        victim = chosen(fault, living, self._stopped)
        if victim is None:
            return  # between two processes of its kind; it is tried again at once
        try:
            at_s = time.time()
            victim.strike(fault.action)
        except psutil.NoSuchProcess:
            return  # it had just ended by itself, for instance because it was replaced
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
        name = "everything" if fault.kind == "everything" else victim.name
        self.say(f"{fault.number + 1}/{len(self.faults)} step {commits.step}: {fault.action} {name}")

    def _note(self, commits: Commits) -> None:
        """Take in new commits; each fault learns of the first after it."""
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
        """Let those that were stopped go on; what was to be left stopped is killed, unless it was ended already."""
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
        """The job, now and then; None while the master cannot answer."""
        now = time.monotonic()
        if now - self._asked_s < _ASK_S or "master" in self._stopped:
            return None
        self._asked_s = now
        try:
            return self.client.job(job)
        except UnreachableError:
            return None


def _role(kind: str) -> str:
    """Of the node that a victim of a kind is or runs on."""
    return {"trainer": "worker", "partition": "server"}.get(kind, kind)
