"""The cost of durability: steps with a standby for each partition over steps without, and the pause of a snapshot.

    python benchmarks/durability.py [--rounds 3] [--steps 48] [--only replica snapshot ...]

A 12 M-parameter GPT, 2 workers and 2 partitions on 2 servers, shared memory, in a local cluster as `psctl up` makes it.
Needs an otherwise idle machine; on two cores the standbys, which receive and apply each step too, use the same cores,
where a real cluster has another machine for them.

    replica_step_over_snapshot  seconds a step with `durability.tier: replica`, while every standby is in sync / with
                                `snapshot`, while none is written
    snapshot_pause_over_step    the fraction of a step by which a step is longer during which a snapshot is begun and
                                written, where trainers leave no core free: the pause, and the cost of writing
    snapshot_pause_beside_a_free_core  the same with 1 worker and 1 partition: of two cores, one is free

Also recorded: `spread_over_step`, the fraction of a step by which all steps from one snapshot to the next are longer.
"""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Mapping
from typing import Any

from _cluster import committed
from _jobs import SKIP, spec
from _measure import Key, Side, options, run

NAME = "durability"
EVERY_STEPS = 6  # a snapshot is written within one step, and half of the steps after it are undisturbed
KEYS = {
    "replica_step_over_snapshot": Key(what="step_s", of=("replica",), over=("snapshot",)),
    "snapshot_pause_over_step": Key(what="pause_over_step", of=("written",)),
    "snapshot_pause_beside_a_free_core": Key(what="pause_over_step", of=("written_core_free",)),
}


def sides(steps: int) -> dict[str, Side]:
    """Everything that is measured, in the order of a round."""
    made = spec(workers=2, partitions=2, steps=steps, transport="shm")
    return {
        "snapshot": lambda: {"step_s": statistics.median(lengths(_measured(made)).values())},
        "replica": lambda: _replicated(_durable(made, tier="replica")),
        "written": lambda: _written(made),
        "written_core_free": lambda: _written(spec(workers=1, partitions=1, steps=steps, transport="shm")),
    }


def _written(made: Mapping[str, Any]) -> dict[str, float]:
    return pauses(_measured(_durable(made, every_steps=EVERY_STEPS)), EVERY_STEPS)


def _durable(made: Mapping[str, Any], **changes: Any) -> dict[str, Any]:
    return {**made, "durability": {**made["durability"], **changes}}


def _measured(made: Mapping[str, Any]) -> dict[int, float]:
    """When each step was committed, without the first ones and the last, at which every job is written."""
    times, _ = committed(made)
    return {step: at for step, at in times.items() if SKIP <= step < made["train"]["max_steps"]}


def _replicated(made: Mapping[str, Any]) -> dict[str, float]:
    """The steps that were made while every standby was in sync; fails when there were too few of them."""
    times, job = committed(made)
    synced = [event.time_s for event in job.events if event.reason == "StandbyInSync"]
    lost = [event.reason for event in job.events if event.reason in ("StandbyLost", "PartitionLost")]
    if len(synced) < made["servers"]["partitions"] or lost:
        raise SystemExit(f"{len(synced)} standbys came into sync; {', '.join(lost) or 'none was lost'}")
    last = made["train"]["max_steps"]
    kept = {step: at for step, at in times.items() if step >= SKIP and at > max(synced) and step < last}
    if len(kept) < (last - SKIP) // 2:
        raise SystemExit(f"only {len(kept)} steps were made with standbys in sync; give more --steps")
    return {"step_s": statistics.median(lengths(kept).values())}


def lengths(times: Mapping[int, float]) -> dict[int, float]:
    """Seconds that each step took, by the version that it made, where the one before it is there too."""
    pairs = itertools.pairwise(sorted(times))
    return {later: times[later] - times[earlier] for earlier, later in pairs if later == earlier + 1}


def pauses(times: Mapping[int, float], every: int) -> dict[str, float]:
    """The step after version n * `every`, which is written meanwhile, against undisturbed ones: those of the second
    half of the steps between two snapshots."""
    took = lengths(times)
    plain = statistics.median(s for step, s in took.items() if step % every == 0 or step % every > every // 2)
    writing = statistics.median(s for step, s in took.items() if step % every == 1)
    whole = [sum(took[step + i] for i in range(1, every + 1)) for step in took if _is_whole(took, step, every)]
    spread = (statistics.median(whole) - every * plain) / plain if whole else float("nan")
    return {"step_s": plain, "pause_over_step": (writing - plain) / plain, "spread_over_step": spread}


def _is_whole(took: Mapping[int, float], step: int, every: int) -> bool:
    """Whether every step from one snapshot to the next was measured."""
    return step % every == 0 and all(step + i in took for i in range(1, every + 1))


def main() -> None:
    chosen = options(__doc__ or "", rounds=3, steps=48).parse_args()
    note = "12 M-parameter GPT, sequence 64, microbatch 4, one thread a process, shared memory"
    run(NAME, sides(max(chosen.steps, SKIP + 3 * EVERY_STEPS)), KEYS, note, chosen)


if __name__ == "__main__":
    main()
