"""Steps a second with one of two workers at half speed, over DDP with the same rank at half speed.

    python benchmarks/straggler.py [--rounds 3] [--steps 40] [--only relieved ddp ...]

A step is 12 microbatches of a 12 M-parameter GPT (64 tokens, 4 sequences each, one thread a process, two cores). DDP
has 6 of them on each rank, accumulated in no_sync(); ours begins with 6 and 6 shards and moves them by measured speed.
The handicapped side computes every forward and backward twice. At best the shards are divided 8 and 4: a step takes the
time of 8 microbatches instead of 12, so that 1.5 is the limit. The median step counts, of those after the first few;
the master moves shards after some seconds, which half of `--steps` must outlast.

    straggler_speedup     DDP's seconds a step / ours
    relief_over_even      ours / ours without a handicap: what the straggler still costs (1.33 is the limit)
"""

from __future__ import annotations

from functools import partial
from pathlib import Path

from _baseline import Loop, baseline, ddp_sides, variants
from _cluster import trained
from _jobs import SKIP, spec
from _measure import Key, Side, options, run
from pscluster.job.bundle import pack

NAME = "straggler"
WORKERS, SHARDS_EACH = 2, 6
DDP = variants("ddp")
KEYS = {
    "straggler_speedup": Key(what="step_s", of=DDP, over=("relieved",)),
    "relief_over_even": Key(what="step_s", of=("relieved",), over=("even",)),
}


def sides(steps: int) -> dict[str, Side]:
    """Everything that is measured, in the order of a round."""
    made = spec(workers=WORKERS, partitions=WORKERS, steps=steps, transport="shm", accumulate=SHARDS_EACH)
    slow = {**made, "task": {**made["task"], "entrypoint": "_handicap:Handicapped"}}
    loop = Loop(world=WORKERS, steps=steps, accumulate=SHARDS_EACH, handicapped=1)
    return {
        **ddp_sides("ddp", loop, baseline),
        "relieved": lambda: trained(slow, pack(Path(__file__).parent)),
        "even": partial(trained, made),
    }


def main() -> None:
    chosen = options(__doc__ or "", rounds=3, steps=40).parse_args()
    note = "12 M-parameter GPT, sequence 64, microbatch 4, 12 microbatches a step, one thread a process"
    run(NAME, sides(max(chosen.steps, SKIP + 2)), KEYS, note, chosen)


if __name__ == "__main__":
    main()
