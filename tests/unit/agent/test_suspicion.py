"""When a living process is suspected: silence, and a microbatch without end."""

from __future__ import annotations

import pytest

from pscluster.agent.status import NONE, SILENT, STALLED, LastHeartbeat, suspicion_of
from pscluster.v1.plan_pb2 import Beat

SILENCE_S = 2.0


def test_silence_is_counted_from_the_last_beat() -> None:
    assert suspicion_of(1000.0, None, SILENCE_S) == NONE, "it is not started yet"
    assert suspicion_of(12.0, LastHeartbeat(at_s=10.0), SILENCE_S) == NONE
    assert suspicion_of(12.1, LastHeartbeat(at_s=10.0), SILENCE_S) == SILENT


@pytest.mark.parametrize(
    ("busy_s", "typical_s", "found"),
    [
        (29.0, 0.0, NONE),  # its first microbatch: nobody knows how long it may take
        (31.0, 0.0, STALLED),
        (2.9, 0.01, NONE),  # short ones may be held up for a moment
        (3.1, 0.01, STALLED),
        (49.0, 10.0, NONE),
        (51.0, 10.0, STALLED),
        (0.0, 10.0, NONE),
    ],
)
def test_a_microbatch_may_take_five_times_the_median(busy_s: float, typical_s: float, found: int) -> None:
    assert (
        suspicion_of(10.0, LastHeartbeat(at_s=10.0, beat=Beat(busy_s=busy_s, typical_s=typical_s)), SILENCE_S) == found
    )


def test_who_is_silent_is_not_called_stalled() -> None:
    assert suspicion_of(20.0, LastHeartbeat(at_s=10.0, beat=Beat(busy_s=50.0, typical_s=1.0)), SILENCE_S) == SILENT
