"""Many histories, or one in full: `python -m tests.fault.simulation --seeds 5000`, or with a seed alone."""

from __future__ import annotations

import argparse
import sys

import torch

from tests.fault.simulation.many import run_many
from tests.fault.simulation.simulation import run_seed

PROCESSES = 2


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("seed", nargs="?", type=int, help="print the history of this seed")
    parser.add_argument("--seeds", type=int, default=300, help="how many histories to run")
    parser.add_argument("--first", type=int, default=0, help="the first seed")
    parser.add_argument("--processes", type=int, default=PROCESSES)
    given = parser.parse_args()
    if given.seed is None:
        return run_many(given.first, given.seeds, given.processes)
    torch.set_num_threads(1)
    run_seed(given.seed, print)
    return 0


if __name__ == "__main__":
    sys.exit(main())
