"""How long to wait before the next try. Pure."""

from __future__ import annotations

FIRST_S = 0.1
CAP_S = 2.0


def delay_s(failures: int, draw: float) -> float:
    """The wait after so many failures in a row (from 1): exponential from 0.1 s, never above 2 s.

    `draw` is uniform in [0, 1): the wait lies between half and all of the bound, so that the nodes of a
    cluster do not come back in one instant.
    """
    bound = min(CAP_S, FIRST_S * 2.0 ** min(failures - 1, 16))
    return bound * (0.5 + 0.5 * draw)
