"""What a trainer counts: time by phase, samples, bytes. Sampled once a second and handed to the agent."""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING

from pscluster.phases import Phases
from pscluster.v1.plan_pb2 import Counters, Speed
from psworker.trainer.pace import ComputeTimer
from psworker.trainer.speed import Speedometer

if TYPE_CHECKING:
    from psworker.trainer.peer import Peer

PHASES = ("data", "pull", "forward", "backward", "push", "wait", "evaluate")


class TrainerCounters:
    """Absolute values since the start. The main thread adds, the reactor's thread samples."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._phases = Phases(PHASES)
        self.pace = ComputeTimer()
        self._samples = 0.0
        self._weight = 0.0
        self._microbatches = 0
        self._reconnects = 0
        self._speedometer = Speedometer()

    def phase(self, name: str) -> AbstractContextManager[None]:
        """Time the block as part of a phase; see `Phases.measure`. The main thread's."""
        return self._phases.measure(name)

    def measure(self, version: int) -> None:
        """The microbatch of `version` that `pace` has just timed tells how fast this trainer is."""
        with self._lock:
            self._speedometer.take(version, self.pace.last_s("train"), time.monotonic())

    def microbatch(self, samples: float, weight: float) -> None:
        """One microbatch of training was computed."""
        with self._lock:
            self._samples += samples
            self._weight += weight
            self._microbatches += 1

    def observe(self, peers: Sequence[Peer]) -> None:
        """Take what the peers count themselves."""
        with self._lock:
            self._reconnects = sum(peer.reconnects for peer in peers)

    def speed(self) -> Speed | None:
        """How fast this trainer computes; None before it is known."""
        with self._lock:
            microbatch_s = self._speedometer.microbatch_s(time.monotonic())
            return (
                Speed(microbatch_s=microbatch_s, microbatches=self._speedometer.num_measured) if microbatch_s else None
            )

    def sample(self) -> Counters:
        """Every counter as the agent exports it, prefix `ps_` and label `job` left out."""
        with self._lock:
            found = [
                Counters.Sample(name="samples_total", value=self._samples),
                Counters.Sample(name="tokens_total", value=self._weight),
                Counters.Sample(name="microbatches_total", value=self._microbatches),
                Counters.Sample(name="data_reconnects_total", value=self._reconnects),
                Counters.Sample(
                    name="microbatch_seconds", value=self._speedometer.microbatch_s(time.monotonic()), gauge=True
                ),
            ]
            found += [
                Counters.Sample(name="phase_seconds_total", labels={"phase": name}, value=seconds)
                for name, seconds in self._phases.seconds.items()
            ]
        return Counters(samples=found)
