"""The baselines: DistributedDataParallel over gloo, and a plain loop, both tuned.

gradient_as_bucket_view, fused AdamW, no_sync() while gradients accumulate, one thread a process. As a script this is
one rank; `baseline` starts the ranks and returns their measurements.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import bf16_compress_hook
from torch.nn.parallel import DistributedDataParallel

from _handicap import twice
from _jobs import CLIP_NORM, GPT_12M, MALLOC, MICROBATCH, ONE_THREAD, OPTIMIZER, SKIP, task
from _marks import Marks
from _measure import Side

DEADLINE_S = 300.0
TUNED_BUCKET_MB = 5  # the fastest of 2, 5, 10 and 25, which is the default, here and over a slow link


@dataclass(frozen=True, kw_only=True)
class Loop:
    """What the ranks do. `world` 1 is the plain loop; `updates=False` leaves out clipping and optimizer; `bucket_mb`
    is DDP's bucket_cap_mb, None its default; `handicapped` is the rank that computes everything twice, -1: none."""

    world: int
    steps: int
    accumulate: int = 1
    bf16: bool = False
    bucket_mb: int | None = None
    updates: bool = True
    model: Mapping[str, Any] = field(default_factory=lambda: GPT_12M)
    microbatch: int = MICROBATCH
    handicapped: int = -1


def variants(side: str) -> tuple[str, ...]:
    """The sides that `ddp_sides` makes, the best of which is the baseline."""
    return (side, f"{side}_malloc", f"{side}_tuned")


def ddp_sides(side: str, loop: Loop, measure: Callable[[Loop, Mapping[str, str]], dict[str, float]]) -> dict[str, Side]:
    """DDP with defaults, with our trainers' malloc settings, and with these and smaller buckets."""
    tuned = replace(loop, bucket_mb=TUNED_BUCKET_MB)
    runs = (partial(measure, loop, {}), partial(measure, loop, MALLOC), partial(measure, tuned, MALLOC))
    return dict(zip(variants(side), runs, strict=True))


def baseline(
    loop: Loop, environment: Mapping[str, str], *, prefixes: Sequence[Sequence[str]] = (), interface: str = "lo"
) -> dict[str, float]:
    """Seconds a step (median, of rank 0) and CPU seconds a sample (all ranks, over the measured steps)."""
    with started(loop, environment, prefixes=prefixes, interface=interface) as ranks:
        outputs = [rank.communicate(timeout=DEADLINE_S)[0] for rank in ranks]
    if any(rank.returncode for rank in ranks):
        raise RuntimeError(f"a baseline process failed: {[rank.returncode for rank in ranks]}")
    measured = [json.loads(output) for output in outputs]
    samples = (loop.steps - SKIP - 1) * loop.world * loop.accumulate * loop.microbatch
    return {"step_s": measured[0]["step_s"], "cpu_s_per_sample": sum(one["cpu_s"] for one in measured) / samples}


@contextmanager
def started(
    loop: Loop, environment: Mapping[str, str], *, prefixes: Sequence[Sequence[str]] = (), interface: str = "lo"
) -> Iterator[list[subprocess.Popen[str]]]:
    """Run the ranks as processes with additional variables `environment`; none is left at the end.

    `prefixes[rank]` are words before the command of a rank, such as nsenter's."""
    variables = {**os.environ, **ONE_THREAD, "GLOO_SOCKET_IFNAME": interface, **environment}
    ranks: list[subprocess.Popen[str]] = []
    with tempfile.TemporaryDirectory(prefix="psb-") as directory:
        try:
            for rank in range(loop.world):
                prefix = prefixes[rank] if prefixes else ()
                command = [*prefix, sys.executable, __file__, json.dumps(asdict(loop)), str(rank), f"{directory}/store"]
                ranks.append(subprocess.Popen(command, env=variables, stdout=subprocess.PIPE, text=True))
            yield ranks
        finally:
            for process in ranks:
                process.kill()
                process.wait()


def be_rank(loop: Loop, rank: int, rendezvous: str) -> None:
    """One process of the baseline; prints what it measured as JSON."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    made = task(loop.model)
    loss = twice(made.loss) if rank == loop.handicapped else made.loss
    model = made.build_model()
    if loop.world > 1:
        store = f"file://{rendezvous}"
        torch.distributed.init_process_group("gloo", init_method=store, rank=rank, world_size=loop.world)
        model = DistributedDataParallel(model, gradient_as_bucket_view=True, bucket_cap_mb=loop.bucket_mb)
        if loop.bf16:
            model.register_comm_hook(None, _in_bf16)
    optimizer = torch.optim.AdamW(model.parameters(), fused=True, **OPTIMIZER)
    marks = Marks()
    for step in range(loop.steps):
        for part in range(loop.accumulate):
            with _quiet(model, part + 1 < loop.accumulate):
                loss_sum, weight = loss(model, _batch(made, loop, step * loop.accumulate + part, rank))
                (loss_sum / (weight * loop.accumulate)).backward()  # type: ignore[no-untyped-call]
        if loop.updates:
            nn.utils.clip_grad_norm_(model.parameters(), CLIP_NORM)
            optimizer.step()
        optimizer.zero_grad()
        marks.mark()
    marks.print_from(SKIP)
    if loop.world > 1:
        torch.distributed.destroy_process_group()


def _batch(made: Any, loop: Loop, number: int, rank: int) -> Tensor:
    """Microbatch `number` of a rank: other samples for each."""
    data = made.train_data()
    first = (number * loop.world + rank) * loop.microbatch
    batch: Tensor = made.collate([data[(first + i) % len(data)] for i in range(loop.microbatch)])
    return batch


def _in_bf16(group, bucket):  # type: ignore[no-untyped-def]  # DDP wants its own types, evaluated, or none
    """torch's hook under another name: by its own name DDP refuses it without CUDA, though gloo adds bf16 well."""
    return bf16_compress_hook(group, bucket)


def _quiet(model: nn.Module, more_to_come: bool) -> AbstractContextManager[None]:
    """DDP sends nothing while there are more microbatches to add."""
    if more_to_come and isinstance(model, DistributedDataParallel):
        quiet: AbstractContextManager[None] = model.no_sync()
        return quiet
    return contextlib.nullcontext()


if __name__ == "__main__":
    be_rank(Loop(**json.loads(sys.argv[1])), int(sys.argv[2]), sys.argv[3])
