"""How long to wait before the next try. Pure."""

from __future__ import annotations

FIRST_S = 0.1
CAP_S = 2.0


def delay_s(
    failures: int,
    draw: float,
    *,
    first_s: float = FIRST_S,
    cap_s: float = CAP_S,
    factor: float = 2.0,
    jitter: float = 0.5,
) -> float:
    """The wait after so many failures in a row (from 1): `first_s`, growing by `factor` up to `cap_s`.

    `draw` is uniform in [0, 1). It takes up to the fraction `jitter` off the wait, so that the processes of a cluster
    do not all retry at the same instant."""
    bound = min(cap_s, first_s * factor ** min(failures - 1, 64))
    return bound * (1.0 - jitter * (1.0 - draw))
