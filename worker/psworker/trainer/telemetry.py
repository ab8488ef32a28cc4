"""What a trainer measures: how long a microbatch takes, and what it counts; sampled once a second for the agent."""

from __future__ import annotations

import statistics
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager

from pscluster.agent.link import Phases
from pscluster.v1.plan_pb2 import Counters, Speed

PHASES = ("data", "pull", "forward", "backward", "push", "wait", "evaluate")
NUM_REMEMBERED = 31  # microbatches of one kind, over which the median is taken
RECENT_S = 2.0
AT_LEAST = 5  # the newest so many count, however old: microbatches may take longer than RECENT_S
AT_MOST = 64


class ComputeTimer:
    """The main thread measures, any thread reads."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._lock = threading.Lock()
        self._took: dict[str, deque[float]] = {}
        self._kind = ""  # of what is being computed; empty: nothing
        self._began_s = 0.0
        self._waited_s = 0.0  # of it
        self._waiting_since_s: float | None = None

    @contextmanager
    def computing(self, kind: str) -> Iterator[None]:
        """The block computes one thing of a kind: "train", "evaluate". What raises is not remembered."""
        with self._lock:
            self._kind, self._began_s, self._waited_s = kind, self._clock(), 0.0
        try:
            yield
            with self._lock:
                took = self._took.setdefault(kind, deque(maxlen=NUM_REMEMBERED))
                took.append(self._clock() - self._began_s - self._waited_s)
        finally:
            with self._lock:
                self._kind = ""

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """The block waits for others; it does not count as computing."""
        with self._lock:
            self._waiting_since_s = self._clock()
        try:
            yield
        finally:
            with self._lock:
                assert self._waiting_since_s is not None
                self._waited_s += self._clock() - self._waiting_since_s
                self._waiting_since_s = None

    def now(self) -> tuple[float, float]:
        """Seconds spent so far at what is computed now (0: nothing, or it waits), and the median of its kind (0: not
        known yet)."""
        with self._lock:
            if not self._kind or self._waiting_since_s is not None:
                return 0.0, 0.0
            return self._clock() - self._began_s - self._waited_s, self._median(self._kind)

    def last_s(self, kind: str) -> float:
        """The latest of a kind; 0: none was finished."""
        with self._lock:
            took = self._took.get(kind)
            return took[-1] if took else 0.0

    def _median(self, kind: str) -> float:
        took = self._took.get(kind)
        return statistics.median(took) if took else 0.0


class Speedometer:
    """Seconds that a microbatch takes, waiting left out: the median of recent ones. Not thread-safe; time is an
    argument."""

    def __init__(self) -> None:
        self._taken: deque[tuple[float, float]] = deque(maxlen=AT_MOST)  # (when it ended, seconds)
        self._version = -1
        self._is_first = True
        self.num_measured = 0

    def take(self, version: int, seconds: float, now_s: float) -> None:
        """A microbatch of `version` took so long and ended now. The first one is not counted: it is the warm-up.

        After a step in which this trainer had nothing to do, what it measured before is forgotten: the machine may have
        changed meanwhile."""
        if not self._version <= version <= self._version + 1:
            self._taken.clear()
        self._version = version
        if not self._is_first:
            self._taken.append((now_s, seconds))
            self.num_measured += 1
        self._is_first = False

    def microbatch_s(self, now_s: float) -> float:
        """The median; 0 when nothing was measured."""
        recent = [seconds for ended_s, seconds in self._taken if now_s - ended_s <= RECENT_S]
        if len(recent) < AT_LEAST:
            recent = [seconds for _, seconds in list(self._taken)[-AT_LEAST:]]
        return statistics.median(recent) if recent else 0.0


class TrainerCounters:
    """Absolute values since the start. The main thread adds, the reactor's thread samples."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._phases = Phases(PHASES)
        self.timer = ComputeTimer()
        self._samples = 0.0
        self._weight = 0.0
        self._microbatches = 0
        self._speedometer = Speedometer()

    def phase(self, name: str) -> AbstractContextManager[None]:
        """Time the block as part of a phase; see `Phases.measure`. The main thread's."""
        return self._phases.measure(name)

    def measure(self, version: int) -> None:
        """Take the microbatch of `version` that `timer` has just timed for the trainer's speed."""
        with self._lock:
            self._speedometer.take(version, self.timer.last_s("train"), time.monotonic())

    def microbatch(self, samples: float, weight: float) -> None:
        """One microbatch of training was computed."""
        with self._lock:
            self._samples += samples
            self._weight += weight
            self._microbatches += 1

    def speed(self) -> Speed | None:
        """How fast this trainer computes; None before it is known."""
        with self._lock:
            microbatch_s = self._speedometer.microbatch_s(time.monotonic())
            return (
                Speed(microbatch_s=microbatch_s, microbatches=self._speedometer.num_measured) if microbatch_s else None
            )

    def sample(self, reconnects: int = 0) -> Counters:
        """Every counter as the agent exports it, prefix `ps_` and label `job` left out; `reconnects`: of all peers."""
        with self._lock:
            found = [
                Counters.Sample(name="samples_total", value=self._samples),
                Counters.Sample(name="tokens_total", value=self._weight),
                Counters.Sample(name="microbatches_total", value=self._microbatches),
                Counters.Sample(name="data_reconnects_total", value=reconnects),
                Counters.Sample(
                    name="microbatch_seconds", value=self._speedometer.microbatch_s(time.monotonic()), gauge=True
                ),
            ]
            found += [
                Counters.Sample(name="phase_seconds_total", labels={"phase": name}, value=seconds)
                for name, seconds in self._phases.seconds.items()
            ]
        return Counters(samples=found)
