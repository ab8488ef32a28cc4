"""When and where a process is tried again that was lost before it ever became ready. Pure.

One that had worked is replaced at once, and where it was: its end says little about its node. One that never became
ready says that something may be missing there, such as room on the disk, which comes back in a moment or not at all.
So the next one goes to another node if one has room, and starts only after a wait that doubles: a fault of some seconds
does not use up all the losses that a placement may have. The placement has its place meanwhile, lest another job take
it."""

from __future__ import annotations

from dataclasses import replace

from pscluster.wire import backoff
from psmaster.model.plan import Placement
from psmaster.model.process import Loss, was_ready
from psmaster.scheduling.draft import Draft, View

FIRST_S = 0.5
MAX_S = 30.0


def delay_s(losses: int) -> float:
    """The wait after so many losses, from 1. With the five that a placement may have, all waits together are 15.5 s."""
    return backoff.delay_s(losses, 0.0, first_s=FIRST_S, cap_s=MAX_S, jitter=0.0)


def unseat(draft: Draft, view: View, placement: Placement, loss: Loss, losses: int) -> None:
    """Empty a placement whose process was lost, the `losses`th of it (0: the count begins anew), and note what that
    means for the next one."""
    if loss.counted and losses and not was_ready(placement, draft.job, view.processes):
        others = tuple(node_id for node_id in placement.failed_on if node_id != placement.node_id)
        until_s = draft.now.mono_s + delay_s(losses)
        placement = replace(placement, failed_on=(*others, placement.node_id), not_before_s=until_s)
    draft.unseat(placement, losses=losses)


def avoided(placement: Placement) -> tuple[frozenset[str], ...]:
    """The nodes where it is not tried again if there is another one: those where it failed, else the last of them,
    else none."""
    failed_on = placement.failed_on
    return tuple(dict.fromkeys((frozenset(failed_on), frozenset(failed_on[-1:]), frozenset())))


def let_start(draft: Draft, _view: View) -> None:
    """End the waits that are over. One that would be longer than any was begun on another clock, before the master's
    machine was started anew."""
    for placement in draft.job.placements:
        if placement.held_back and not 0.0 < placement.not_before_s - draft.now.mono_s <= MAX_S:
            draft.put(replace(placement, not_before_s=0.0))
