"""How soon a job continues after a process was killed or stopped, and what it loses: real processes.

    python benchmarks/recovery.py [--rounds 10] [--steps 30] [--only trainer_kill partition_kill_snapshot ...]

One master, three workers and three servers train a small byte-level language model (on the data of $PSCLUSTER_DATA if
set). Before each fault every placement of the job has a process and `--steps` steps were committed undisturbed. The
victim is a random process of its kind, hit at a random moment of a step. The coordinator records the times of commits.
The whole takes half an hour.

    worker_kill_recovery_s             kill -9 of a trainer to the next commit that needed others to take its shards
                                       over, less a normal step
    worker_stop_recovery_s             the same after SIGSTOP of a trainer, which no process reports
    partition_kill_recovery_snapshot_s kill -9 of a partition to the first step committed after the job went back to its
                                       snapshot: what is computed again beyond that one is not counted
    partition_kill_recovery_replica_s  the same with durability.tier replica: the standby takes over
    master_kill_lost_steps             steps committed before a kill -9 of the master that were lost or repeated: the
                                       most in any round
    committed_steps_lost               the same for a kill -9 of a partition with tier replica
    goodput_one_kill_a_minute          new steps a second in a minute with one kill -9 (tier replica; a trainer, a
                                       worker's agent, a partition, a server's agent, the master in turn), over
                                       undisturbed stretches in between: means over the rounds
    soak_kills_without_violation       faults in the last `make soak` (results/soak.json), after which nothing differed
"""

from __future__ import annotations

import itertools
import json
import statistics
from functools import partial

from _bench_cluster import Bench
from _measure import RESULTS, Found, Key, Side, options, run

MINUTE_S = 60.0
CALM_S = 20.0
NAME = "recovery"


class Worst(Key):
    """Of all rounds the highest value: for what must never happen."""

    def value(self, found: Found) -> float:
        return max(found[self.of[0]][self.what])


class Means(Key):
    """Mean over mean, for victims of different cost that are equally frequent."""

    def value(self, found: Found) -> float:
        ours, theirs = self.sides(found)
        return statistics.mean(found[ours][self.what]) / statistics.mean(found[theirs][self.what])


KEYS: dict[str, Key] = {
    "worker_kill_recovery_s": Key(what="recovery_s", of=("trainer_kill",)),
    "worker_stop_recovery_s": Key(what="recovery_s", of=("trainer_stop",)),
    "partition_kill_recovery_snapshot_s": Key(what="recovery_s", of=("partition_kill_snapshot",)),
    "partition_kill_recovery_replica_s": Key(what="recovery_s", of=("partition_kill_replica",)),
    "master_kill_lost_steps": Worst(what="lost_steps", of=("master_kill",)),
    "committed_steps_lost": Worst(what="lost_steps", of=("partition_kill_replica",)),
    "goodput_one_kill_a_minute": Means(what="steps_per_s", of=("one_kill_a_minute",), over=("calm",)),
    "soak_kills_without_violation": Key(what="faults", of=("soak",)),
}


def sides(steps: int, bench: Bench | None = None) -> dict[str, Side]:
    """Everything that is measured, in the order of a round."""
    bench = bench or Bench(steps)
    kinds = itertools.cycle(("trainer", "worker", "partition", "server", "master"))

    def fault(kind: str, action: str, tier: str) -> dict[str, float]:
        step_s = bench.settle(tier)
        struck_s = bench.strike(kind, action)  # type: ignore[arg-type]
        return {"step_s": step_s, **bench.recovered(struck_s, step_s)}

    def calm() -> dict[str, float]:
        bench.settle("replica")
        return {"steps_per_s": bench.rate(CALM_S)}

    def one_kill_a_minute() -> dict[str, float]:
        bench.settle("replica")
        bench.strike(next(kinds), "kill")  # type: ignore[arg-type]
        return {"steps_per_s": bench.rate(MINUTE_S)}

    return {
        "trainer_kill": partial(fault, "trainer", "kill", "snapshot"),
        "trainer_stop": partial(fault, "trainer", "stop", "snapshot"),
        "master_kill": partial(fault, "master", "kill", "snapshot"),
        "partition_kill_snapshot": partial(fault, "partition", "kill", "snapshot"),
        "partition_kill_replica": partial(fault, "partition", "kill", "replica"),
        "calm": calm,
        "one_kill_a_minute": one_kill_a_minute,
        "soak": soaked,
    }


def soaked() -> dict[str, float]:
    """What the last soak came to."""
    path = RESULTS / "soak.json"
    if not path.exists():
        raise SystemExit(
            "results/soak.json does not exist: run `make soak` first, or leave out the side `soak` with --only"
        )
    return {"faults": json.loads(path.read_text())["keys"]["soak_kills_without_violation"]}


def main() -> None:
    chosen = options(__doc__ or "", rounds=10, steps=30).parse_args()
    bench = Bench(chosen.steps)
    note = "Byte-level GPT, 12 shards, 3 workers x 3 servers on one machine, snapshots every 10 steps"
    try:
        run(NAME, sides(chosen.steps, bench), KEYS, note, chosen)
    finally:
        bench.close()


if __name__ == "__main__":
    main()
