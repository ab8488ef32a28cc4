"""How long a client bears an absent master, and when it asks again. Pure: time and chance are passed in."""

from __future__ import annotations

from dataclasses import dataclass

from pscluster.wire.backoff import delay_s

FIRST_DELAY_S = 0.1
LONGEST_DELAY_S = 5.0


@dataclass(frozen=True, kw_only=True)
class Outage:
    """A master that has not answered since `since_s` (monotonic), after `attempts` tries."""

    since_s: float
    attempts: int = 0


def next_delay_s(outage: Outage, now_s: float, patience_s: float, chance: float) -> float | None:
    """Seconds to wait before the next try, or None when patience is at an end.

    Doubles from FIRST_DELAY_S up to LONGEST_DELAY_S; `chance` in [0, 1) spreads each over its upper half, so
    that clients of a restarted master do not come all at once. Never waits past the end of patience.
    """
    left = outage.since_s + patience_s - now_s
    if left <= 0:
        return None
    return min(left, delay_s(outage.attempts + 1, chance, first_s=FIRST_DELAY_S, cap_s=LONGEST_DELAY_S))
