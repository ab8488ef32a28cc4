"""A network that delays, cuts, and loses in one direction; between processes that may be stopped or gone.

An `End` is one end of an ordered stream, as TCP gives it: what one end sends arrives in order, late, or never, and
then the connection is gone; each end hears of that at a time of its own. A blocked direction holds what is on its way.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import Any

from tests.fault.simulation.schedule import SOON_S, Life, Schedule

GONE = object()  # in place of a message: the other end is closed
CONNECT_S = 0.0005
_LATE_S = 0.4  # by which an unruly message is late at most


class End:
    """One end of a connection. `receive` hears messages, `lost` that the connection is gone, once, unless this end
    was closed before."""

    def __init__(self, network: Network, life: Life, host: str, *, dialled: bool) -> None:
        self.network = network
        self.life = life
        self.host = host
        self.dialled = dialled  # by this end
        self.is_open = True
        self.other: End = self
        self.receive: Callable[[Any], None] = lambda _: None
        self.lost: Callable[[], None] = lambda: None
        self.inbox: deque[Any] = deque()
        self.stalled = 0  # arrivals that a blocked direction holds
        self.arrives_s = 0.0

    def send(self, message: Any, what: str = "") -> None:
        """Never blocks; into a connection that is gone, it is lost."""
        if self.is_open:
            self.network.carry(self.other, message, what)

    def close(self) -> None:
        """Hang up. Repeating it changes nothing."""
        if self.is_open:
            self.is_open = False
            self.inbox.clear()
            self.network.forget(self)
            self.network.carry(self.other, GONE, "")

    def arrive(self) -> None:
        """The oldest message in the inbox is there."""
        if self.network.is_blocked(self.other.host, self.host):
            self.stalled += 1
        else:
            self.life.run(self._take)

    def arrive_late(self, message: Any) -> None:
        """A message that others overtook, or that was there before."""
        if self.network.is_blocked(self.other.host, self.host):
            self.network.schedule.after(_LATE_S, "", lambda: self.arrive_late(message))
        else:
            self.life.run(lambda: self.receive(message) if self.is_open else None)

    def _take(self) -> None:
        if not self.is_open or not self.inbox:
            return
        message = self.inbox.popleft()
        if message is GONE:
            self.is_open = False
            self.network.forget(self)
            self.lost()
        else:
            self.receive(message)


class Network:
    """Hosts are names. `unruly`: the share of messages that arrive late, overtaken by others, or once more, where the
    receiver promises to bear that (`bears`)."""

    def __init__(self, schedule: Schedule, *, latency_s: float, unruly: float = 0.0) -> None:
        self.schedule = schedule
        self.latency_s = latency_s
        self.unruly = unruly
        self.bears: Callable[[Any], bool] = lambda _: False
        self.slow_hosts: dict[str, float] = {}  # by how much their messages take longer
        self.listeners: dict[str, tuple[Life, str, Callable[[End], None]]] = {}
        self._ends: dict[Life, list[End]] = {}
        self._blocked: set[tuple[str, str]] = set()
        self._stalled_dials: list[Callable[[], None]] = []

    def listen(self, address: str, life: Life, host: str, accepted: Callable[[End], None]) -> None:
        """Accept connections at `address` for as long as `life` lasts."""
        self.listeners[address] = (life, host, accepted)
        life.at_end.append(lambda: self.listeners.pop(address, None))

    def dial(self, life: Life, host: str, address: str, done: Callable[[End | None], None]) -> None:
        """Connect; `done` hears of the end, or None when nobody listens."""
        held = self.listeners.get(address)
        if held is None:
            life.after(CONNECT_S, f"finds nobody at {address}", lambda: done(None))
            return
        if self.is_blocked(host, held[1]) or self.is_blocked(held[1], host):
            self._stalled_dials.append(lambda: life.run(lambda: self.dial(life, host, address, done)))
            return
        life.after(self._latency(host, held[1]), "", lambda: self._dialled(life, host, address, done))

    def _dialled(self, life: Life, host: str, address: str, done: Callable[[End | None], None]) -> None:
        held = self.listeners.get(address)
        if held is None:
            done(None)
            return
        near, far = End(self, life, host, dialled=True), End(self, held[0], held[1], dialled=False)
        near.other, far.other = far, near
        for end in (near, far):
            if end.life not in self._ends:
                end.life.at_end.append(lambda gone=end.life: self._ended(gone))
            self._ends.setdefault(end.life, []).append(end)
        held[2](far)  # the kernel accepts, also for a stopped process
        done(near)

    def carry(self, to: End, message: Any, what: str) -> None:
        """Have a message arrive at `to`, after all that were sent there before."""
        to.arrives_s = max(to.arrives_s, self.schedule.now_s + self._latency(to.other.host, to.host))
        label = f"{to.life.name} hears {what}" if what else ""
        wait_s = to.arrives_s - self.schedule.now_s
        if self.unruly and message is not GONE and self.bears(message) and self.schedule.chance(self.unruly):
            late_s = self.schedule.between(0.0, _LATE_S)
            self.schedule.after(wait_s + late_s, label and f"{label}, late", lambda: to.arrive_late(message))
            if self.schedule.chance(0.5):
                return
        to.inbox.append(message)
        self.schedule.after(wait_s, label, to.arrive)

    def _latency(self, source: str, target: str) -> float:
        slow = max(self.slow_hosts.get(source, 1.0), self.slow_hosts.get(target, 1.0))
        return SOON_S + self.latency_s * slow * self.schedule.random.expovariate(1.0)

    # faults

    def connections(self) -> list[End]:
        """One end of every open connection."""
        return [end for ends in self._ends.values() for end in ends if end.is_open and end.dialled]

    def ends_of(self, life: Life) -> list[End]:
        return [end for end in self._ends.get(life, ()) if end.is_open]

    def cut(self, end: End) -> None:
        """The connection breaks: what is on its way is lost, and each end hears of it when it does."""
        for side in (end, end.other):
            side.inbox.clear()
            self.carry(side, GONE, "that a connection is gone")

    def block(self, source: str, target: str) -> None:
        """From now on nothing gets from one host to the other."""
        self._blocked.add((source, target))

    def unblock(self, source: str, target: str) -> None:
        """What was held arrives now."""
        self._blocked.discard((source, target))
        for end in [end for ends in self._ends.values() for end in ends]:
            if (end.other.host, end.host) == (source, target):
                for _ in range(end.stalled):
                    self.schedule.after(SOON_S, "", end.arrive)
                end.stalled = 0
        dials, self._stalled_dials = self._stalled_dials, []
        for dial in dials:
            self.schedule.after(SOON_S, "", dial)

    def is_blocked(self, source: str, target: str) -> bool:
        return (source, target) in self._blocked

    @property
    def blocked(self) -> list[tuple[str, str]]:
        return sorted(self._blocked)

    def forget(self, end: End) -> None:
        ends = self._ends.get(end.life, [])
        if end in ends:
            ends.remove(end)

    def _ended(self, life: Life) -> None:
        """A process is gone: the kernel closes what it held."""
        for end in list(self._ends.pop(life, ())):
            end.close()
