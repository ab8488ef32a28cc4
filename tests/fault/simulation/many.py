"""Many histories, over several processes, and what came of them."""

from __future__ import annotations

import multiprocessing
import time
import traceback
from collections import Counter
from collections.abc import Iterable, Iterator
from typing import NamedTuple

import torch

from tests.fault.simulation.simulation import run_seed

_REPORT_EVERY = 250


class Outcome(NamedTuple):
    seed: int
    problem: str  # empty: every promise was kept
    num_events: int
    virtual_s: float
    struck: dict[str, int]


def outcome_of(seed: int) -> Outcome:
    """Run one history, whatever it comes to."""
    torch.set_num_threads(1)
    try:
        simulation = run_seed(seed)
    except BaseException as error:
        if isinstance(error, KeyboardInterrupt):
            raise
        return Outcome(seed, traceback.format_exc(limit=-8), 0, 0.0, {})
    schedule = simulation.schedule
    return Outcome(seed, "", schedule.num_events, schedule.now_s, dict(simulation.faults.struck))


def run_many(first: int, count: int, processes: int) -> int:
    """Run `count` histories; the exit code. Prints each that broke a promise."""
    struck: Counter[str] = Counter()
    failed: list[int] = []
    events = 0
    virtual_s = 0.0
    began_s = time.monotonic()
    for number, outcome in enumerate(_outcomes(range(first, first + count), processes), 1):
        if outcome.problem:
            failed.append(outcome.seed)
            print(f"seed {outcome.seed} breaks a promise:\n{outcome.problem}", flush=True)
        struck.update(outcome.struck)
        events += outcome.num_events
        virtual_s += outcome.virtual_s
        if number % _REPORT_EVERY == 0:
            print(f"{number} of {count} histories, {time.monotonic() - began_s:.0f} s", flush=True)
    print(f"{count} histories, {events} events, {virtual_s / 3600:.1f} hours of virtual time")
    print("faults: " + ", ".join(f"{kind} {times}" for kind, times in sorted(struck.items())))
    if failed:
        print(f"broken: seeds {sorted(failed)}; see one by: make simulate SEED={min(failed)}")
    return 1 if failed else 0


def _outcomes(seeds: Iterable[int], processes: int) -> Iterator[Outcome]:
    if processes == 1:
        yield from map(outcome_of, seeds)
        return
    with multiprocessing.get_context("spawn").Pool(processes) as pool:
        yield from pool.imap_unordered(outcome_of, seeds, chunksize=4)
