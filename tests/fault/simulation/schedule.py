"""Virtual time: what is yet to happen, whose life it belongs to, and threads that run only when they are told to.

Every choice comes from one seeded generator, and events of one instant happen in the order in which they were asked
for. So a seed is a whole history, and running it again gives the same one.
"""

from __future__ import annotations

import heapq
import itertools
import random
from collections import deque
from collections.abc import Callable

from greenlet import getcurrent, greenlet

Call = Callable[[], None]
SOON_S = 20e-6  # from one thing to the next in the same process
EPOCH_S = 1_700_000_000.0  # what wall clocks show at the beginning


class Schedule:
    """The clock, and the events that wait for it."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        self.now_s = 0.0
        self.wall_offset_s = EPOCH_S  # a clock that is set changes this, and nothing else
        self.num_events = 0
        self.reported: Callable[[str], None] | None = None  # hears what happens, when somebody wants to read it
        self._waiting: list[tuple[float, int, str, Call]] = []
        self._order = itertools.count()

    @property
    def wall_s(self) -> float:
        """What the wall clock shows."""
        return self.now_s + self.wall_offset_s

    def after(self, delay_s: float, what: str, call: Call) -> None:
        """Have `call` happen `delay_s` from now; `what` names it in a trace."""
        heapq.heappush(self._waiting, (self.now_s + delay_s, next(self._order), what, call))

    def step(self) -> bool:
        """Let the next thing happen. False: nothing is left."""
        if not self._waiting:
            return False
        self.now_s, _, what, call = heapq.heappop(self._waiting)
        self.num_events += 1
        self.tell(what)
        call()
        return True

    def tell(self, what: str) -> None:
        """Write a line of the trace, if anybody reads it."""
        if self.reported is not None and what:
            self.reported(f"{self.now_s:10.5f}  {what}")

    def between(self, low: float, high: float) -> float:
        return low + (high - low) * self.random.random()

    def chance(self, probability: float) -> bool:
        return self.random.random() < probability


class Life:
    """One process from its start to its end. What happens to it while it is stopped happens when it goes on, in order;
    what happens after its end does not."""

    def __init__(self, schedule: Schedule, name: str) -> None:
        self.schedule = schedule
        self.name = name
        self.alive = True
        self.stopped = False
        self.at_end: list[Call] = []  # called once, in order
        self._held: deque[Call] = deque()

    def after(self, delay_s: float, what: str, call: Call) -> None:
        """Have the process do something later."""
        self.schedule.after(delay_s, f"{self.name}: {what}" if what else "", lambda: self.run(call))

    def run(self, call: Call) -> None:
        """The process does something now, unless it is stopped or gone."""
        if not self.alive:
            return
        if self.stopped:
            self._held.append(call)
        else:
            call()

    def stop(self) -> None:
        """SIGSTOP."""
        self.stopped = True

    def go_on(self) -> None:
        """SIGCONT: it believes what it believed when it was stopped."""
        self.stopped = False
        held, self._held = self._held, deque()
        for call in held:
            self.after(0.0, "", call)

    def end(self) -> None:
        """It is gone: killed, or done. Repeating it changes nothing."""
        if not self.alive:
            return
        self.alive = False
        self._held.clear()
        for call in self.at_end:
            call()


class Strand:
    """A thread of a process that blocks: it runs until it waits for something, and again when that has come."""

    def __init__(self, life: Life, body: Call) -> None:
        self.life = life
        self._greenlet = greenlet(body)
        self._waits = False
        life.at_end.append(self._kill)

    @property
    def is_running(self) -> bool:
        """Whether it is this thread that asks."""
        return getcurrent() is self._greenlet

    def begin(self) -> None:
        self.life.after(SOON_S, "begins", self._resume)

    def spend(self, duration_s: float) -> None:
        """Be busy for a while; others have their turn. Only in the thread itself."""
        self.life.after(duration_s, "", self._resume)
        self._greenlet.parent.switch()

    def wait(self) -> None:
        """Block until `notify`. Only in the thread itself."""
        self._waits = True
        self._greenlet.parent.switch()

    def notify(self) -> None:
        """Wake the thread soon, if it waits."""
        if self._waits:
            self._waits = False
            self.life.after(SOON_S, "", self._resume)

    def _resume(self) -> None:
        if not self._greenlet.dead:
            self._greenlet.switch()

    def _kill(self) -> None:
        if self._greenlet and not self.is_running:
            self._greenlet.throw()


class Condition:
    """Stands in for threading.Condition between a strand and the rest of its process.

    Whenever the strand takes the lock, others may come first: what they may not do is come while it is held."""

    def __init__(self, strand: Strand, preemption: float) -> None:
        self._strand = strand
        self._preemption = preemption
        self._depth = 0

    def __enter__(self) -> Condition:
        schedule = self._strand.life.schedule
        if not self._depth and self._strand.is_running and schedule.chance(self._preemption):
            self._strand.spend(schedule.between(SOON_S, 0.01))
        self._depth += 1
        return self

    def __exit__(self, *_error: object) -> None:
        self._depth -= 1

    def wait(self) -> None:
        depth, self._depth = self._depth, 0
        self._strand.wait()
        self._depth = depth

    def wait_for(self, holds: Callable[[], object]) -> None:
        while not holds():
            self.wait()

    def notify_all(self) -> None:
        self._strand.notify()

    notify = notify_all
