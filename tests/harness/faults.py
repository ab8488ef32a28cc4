"""Faults for real processes: what is hit, how, and a series of them that one seed decides."""

from __future__ import annotations

import os
import random
import signal
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Literal

import psutil

from harness.cluster import LocalCluster, wait_gone

Kind = Literal["trainer", "partition", "worker", "server", "master", "everything"]
Action = Literal["kill", "stop"]
KINDS: tuple[Kind, ...] = ("trainer", "partition", "worker", "server", "master")
LEFT_STOPPED_S = 14.0
"""A process that stays stopped is killed after this time, as an operator or a watchdog would do."""
_MODULES = {"psworker.trainer": "trainer", "psserver.partition": "partition"}


@dataclass(frozen=True, kw_only=True)
class Fault:
    """One fault for a running cluster, due at committed step `step`.

    `pick` in [0, 1) chooses among the processes of its kind. A stopped process is resumed after `resume_s` seconds;
    None: it stays stopped."""

    number: int
    step: int
    kind: Kind
    action: Action
    pick: float
    resume_s: float | None = None


def draw_faults(
    seed: int, count: int, *, kinds: Sequence[Kind] = KINDS, stops: float = 0.3, gap: int = 16
) -> list[Fault]:
    """`count` faults, the same for the same arguments. `stops` is the share of SIGSTOP; two faults are `gap` steps
    apart, give or take half of that."""
    draw = random.Random(seed)
    faults, step = [], 0
    for number in range(count):
        step += draw.randint(max(1, gap // 2), gap + gap // 2)
        kind = kinds[draw.randrange(len(kinds))]
        stopped = draw.random() < stops and kind != "everything"
        pick, resume_s = draw.random(), draw.choice([0.3, 1.5, 4.0, 7.0, None])
        faults.append(
            Fault(
                number=number,
                step=step,
                kind=kind,
                action="stop" if stopped else "kill",
                pick=pick,
                resume_s=resume_s if stopped else None,
            )
        )
    return faults


@dataclass(frozen=True, kw_only=True)
class Victim:
    """One process of a cluster. `name`: "master", "worker-0", "trainer of worker-0"; `node`: the daemon it is or
    belongs to."""

    kind: Kind
    name: str
    node: str
    process: psutil.Process

    def strike(self, action: Action) -> None:
        """SIGKILL or SIGSTOP; returns when it has struck. Raises AssertionError when it has not."""
        if action == "kill":
            self.process.send_signal(signal.SIGKILL)
            wait_gone([self.process])
            return
        self.process.send_signal(signal.SIGSTOP)
        deadline = time.monotonic() + 2
        while self.process.status() != psutil.STATUS_STOPPED:
            assert time.monotonic() < deadline, f"{self.name} is {self.process.status()}, not stopped"
            os.sched_yield()

    def resume(self) -> bool:
        """Send SIGCONT; whether the process still existed."""
        try:
            self.process.send_signal(signal.SIGCONT)
            return self.process.is_running() and self.process.status() != psutil.STATUS_ZOMBIE
        except psutil.NoSuchProcess:
            return False


def victims(cluster: LocalCluster) -> Iterator[Victim]:
    """Every living process of a cluster, by name."""
    for name, daemon in sorted(cluster.daemons().items()):
        with suppress(psutil.NoSuchProcess):
            if daemon.status() == psutil.STATUS_ZOMBIE:
                continue
            kind = name.partition("-")[0]
            yield Victim(kind=kind, name=name, node=name, process=daemon)  # type: ignore[arg-type]
            for child in sorted(daemon.children(), key=lambda process: process.pid):
                yield from _child(name, child)


def _child(node: str, process: psutil.Process) -> Iterator[Victim]:
    """The trainer or partition that a child of an agent is; nothing for one that ended or has not yet exec'd."""
    with suppress(psutil.NoSuchProcess):
        words = process.cmdline()
        kind = _MODULES.get(words[-1]) if words and "pscluster.agent.launch" in words else None
        if kind is not None and process.status() != psutil.STATUS_ZOMBIE:
            yield Victim(kind=kind, name=f"{kind} of {node}", node=node, process=process)  # type: ignore[arg-type]


def chosen(fault: Fault, living: Sequence[Victim], spared: Mapping[str, object]) -> Victim | None:
    """The victim of a fault among the living, those of `spared` nodes left out; None: there is none of its kind."""
    candidates = [victim for victim in living if victim.kind == fault.kind and victim.node not in spared]
    return candidates[int(fault.pick * len(candidates))] if candidates else None
