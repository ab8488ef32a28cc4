"""Step time of a 12 M-parameter GPT: 2 workers x 2 partitions over DDP, 1 x 1 over a plain loop, on two cores.

    python benchmarks/step_time.py [--rounds 3] [--steps 24] [--only shm ddp ...]

Same model, sequences (64 tokens, 4 a microbatch), clipping and one thread a process everywhere; needs an otherwise idle
machine and takes about ten minutes. Ours is a local cluster as `psctl up` makes it. The baselines are tuned: DDP over
gloo with gradient_as_bucket_view and fused AdamW; a plain loop with fused AdamW. Each runs with defaults and with our
trainers' malloc settings (`*_malloc`), DDP also with these and buckets of 5 MB (`*_tuned`); the best of them counts.

    shm_step_over_ddp     seconds a step, 2 x 2 over shared memory / DDP
    unix_step_over_ddp    the same over Unix sockets
    tcp_step_over_ddp     the same over TCP
    shm_accum_over_ddp    the same over shared memory with 4 microbatches a worker and step / DDP with no_sync()
    shm_cpu_over_ddp      CPU seconds a sample: all trainers and partitions / all ranks of DDP, over the measured steps
    solo_step_over_plain  seconds a step, 1 x 1 over shared memory / the plain loop

Also recorded: the CPU seconds a sample of agents and master, which are not in `shm_cpu_over_ddp`.
"""

from __future__ import annotations

from functools import partial

from _baseline import Loop, baseline, ddp_sides, variants
from _cluster import trained
from _jobs import MALLOC, SKIP, spec
from _measure import Key, Side, options, run

NAME = "step_time"
ACCUMULATE = 4
DDP, DDP_ACCUM, PLAIN = variants("ddp"), variants("ddp_accum"), ("plain", "plain_malloc")
KEYS = {
    "shm_step_over_ddp": Key(what="step_s", of=("shm",), over=DDP),
    "unix_step_over_ddp": Key(what="step_s", of=("unix",), over=DDP),
    "tcp_step_over_ddp": Key(what="step_s", of=("tcp",), over=DDP),
    "shm_accum_over_ddp": Key(what="step_s", of=("shm_accum",), over=DDP_ACCUM),
    "shm_cpu_over_ddp": Key(what="cpu_s_per_sample", of=("shm",), over=DDP),
    "solo_step_over_plain": Key(what="step_s", of=("solo",), over=PLAIN),
}


def sides(steps: int) -> dict[str, Side]:
    """Everything that is measured, in the order of a round."""

    def ours(transport: str, size: int = 2, accumulate: int = 1) -> Side:
        made = spec(workers=size, partitions=size, steps=steps, transport=transport, accumulate=accumulate)
        return lambda: trained(made)

    single = Loop(world=1, steps=steps)
    return {
        **ddp_sides("ddp", Loop(world=2, steps=steps), baseline),
        "shm": ours("shm"),
        "unix": ours("unix"),
        "tcp": ours("tcp"),
        **ddp_sides("ddp_accum", Loop(world=2, steps=steps, accumulate=ACCUMULATE), baseline),
        "shm_accum": ours("shm", accumulate=ACCUMULATE),
        "plain": partial(baseline, single, {}),
        "plain_malloc": partial(baseline, single, MALLOC),
        "solo": ours("shm", size=1),
    }


def main() -> None:
    chosen = options(__doc__ or "", rounds=3, steps=24).parse_args()
    note = "12 M-parameter GPT, sequence 64, microbatch 4, one thread a process"
    run(NAME, sides(max(chosen.steps, SKIP + 2)), KEYS, note, chosen)


if __name__ == "__main__":
    main()
