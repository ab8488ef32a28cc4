"""The cost of audits: a job one quarter of whose steps are audited, against the same job without audits.

    python benchmarks/audit.py [--rounds 3] [--steps 60]

A 12 M-parameter GPT, 2 trainers and 2 partitions over shared memory, 2 microbatches a trainer and step. Each round runs
the job without audits and with them, one after the other. In an audited step one trainer computes one microbatch more.

    step_over_allowed  seconds a step that audits cost, on average / share x one microbatch + 2 % of a step
    cpu_over_allowed   the same in CPU seconds of all trainers and partitions: others on the machine matter less to it

Also recorded: `plain_over_off`, seconds a step that is not audited / a step without audits; `audit_over_microbatch`,
how much longer an audited step is than the others of its job, in microbatches.
"""

from __future__ import annotations

import itertools
import statistics
from dataclasses import dataclass
from typing import Any

import psutil

from _jobs import SKIP, spec
from _measure import Key, Side, options, run
from _static import Starter, even_split, fill, started
from pscluster.step.audit import audited_shard

NAME = "audit"
SHARE = 0.25
ALLOWED = 0.02  # of a step, beside the microbatch that is computed twice
KEYS = {name: Key(what=name, of=("audits",)) for name in ("step_over_allowed", "cpu_over_allowed")}


@dataclass(frozen=True, kw_only=True)
class Measured:
    """One run. `lengths`: seconds of each step by the version that it made, without the first ones. `cpu_s`: of one
    step, of all processes. `microbatch_s`: as the slower trainer measured it."""

    lengths: dict[int, float]
    cpu_s: float
    microbatch_s: float


def sides(steps: int) -> dict[str, Side]:
    """The one comparison that there is."""
    return {"audits": lambda: _compared(steps)}


def _compared(steps: int) -> dict[str, float]:
    made = spec(workers=2, partitions=2, steps=steps, transport="shm", accumulate=2)
    shards = made["train"]["global_batch"] // made["train"]["microbatch"]
    off, on = _measured(made), _measured(made | {"audit": {"share": SHARE}})
    is_audited = {version: audited_shard(0, version - 1, SHARE, shards) is not None for version in range(1, steps + 1)}
    audited = [s for version, s in on.lengths.items() if is_audited[version]]
    plain = [s for version, s in on.lengths.items() if not is_audited[version]]
    if len(audited) < 3 or len(plain) < 3:
        raise SystemExit(f"{len(audited)} audited steps and {len(plain)} others; give more --steps")
    share = sum(is_audited.values()) / steps
    off_s, plain_s, audited_s = (statistics.median(lengths) for lengths in (off.lengths.values(), plain, audited))
    cost_s = plain_s - off_s + share * (audited_s - plain_s)
    microbatch_cpu_s = off.cpu_s / shards  # with its part of everything else
    return {
        "off_s": off_s,
        "microbatch_s": off.microbatch_s,
        "plain_over_off": plain_s / off_s,
        "audit_over_microbatch": (audited_s - plain_s) / off.microbatch_s,
        "step_over_allowed": cost_s / (share * off.microbatch_s + ALLOWED * off_s),
        "cpu_over_allowed": (on.cpu_s - off.cpu_s) / (share * microbatch_cpu_s + ALLOWED * off.cpu_s),
    }


def _measured(made: dict[str, Any]) -> Measured:
    with started(made, Starter()) as (job, pids):
        fill(job)
        processes = [psutil.Process(pid) for pid in pids.values()]
        before_s = sum(sum(process.cpu_times()[:2]) for process in processes)
        job.publish(even_split(job.spec.train.num_shards, job.workers))
        job.wait_finished()
        spent_s = sum(sum(process.cpu_times()[:2]) for process in processes) - before_s
        records = [record for progress in job.reported("partition-0", "progress") for record in progress.records]
        counters = [item for child in job.children.values() for item in child.counters.items()]
    times = {record.step: record.time_s for record in records if record.step >= SKIP}
    return Measured(
        lengths={later: times[later] - times[earlier] for earlier, later in itertools.pairwise(sorted(times))},
        cpu_s=spent_s / len(records),
        microbatch_s=max(value for name, value in counters if name.startswith("microbatch_seconds")),
    )


def main() -> None:
    chosen = options(__doc__ or "", rounds=3, steps=60).parse_args()
    note = f"12 M-parameter GPT, sequence 64, microbatch 4, one thread a process, {SHARE:g} of the steps audited"
    run(NAME, sides(max(chosen.steps, SKIP + 24)), KEYS, note, chosen)


if __name__ == "__main__":
    main()
