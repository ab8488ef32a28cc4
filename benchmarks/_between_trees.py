"""CPU seconds and wall time of a step, one checkout against another: whether a change of the code costs anything.

    python benchmarks/_between_trees.py OLD NEW [--rounds 10] [--steps 24] [--side shm] [--together]

OLD and NEW are directories of two checkouts. Each round runs one side of step_time.py in both, in alternating order;
both run under this interpreter, so that the libraries are the same. Prints the geometric mean of the ratios new/old
and the bounds of its 95 % confidence interval (Student's t over the logarithms), and writes them with the samples to
results/between_trees.json. Needs an otherwise idle machine.

The speed of a shared or virtual machine changes by a tenth from one minute to the next, and with it every pair of
runs that follow one another. With --together both sides of a round run at the same time and share that speed; CPU
seconds then compare to a few per cent, and wall time, which each side takes from the other, only roughly.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from _measure import RESULTS, machine

HOMES = (".", "master", "worker", "paramserver")
MEASURED = ("cpu_s_per_sample", "step_s")
# Student's t, two-sided 95 %, by degrees of freedom; larger samples use the last entry, which is on the safe side.
_T = (12.71, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131)


def measured(tree: Path, side: str, steps: int) -> dict[str, float]:
    """One round of one side of step_time.py in a checkout. Raises CalledProcessError when it fails."""
    path = os.pathsep.join(str(tree / home) for home in HOMES)
    with tempfile.TemporaryDirectory(prefix="ps-between-") as directory:
        words = ["--only", side, "--rounds", "1", "--steps", str(steps), "--results", directory]
        subprocess.run(
            [sys.executable, str(tree / "benchmarks" / "step_time.py"), *words],
            env={**os.environ, "PYTHONPATH": path},
            cwd=tree,
            check=True,
            stdout=subprocess.DEVNULL,
        )
        found = json.loads((Path(directory) / "step_time.json").read_text())["samples"][side]
    return {what: found[what][0] for what in MEASURED}


def interval(ratios: list[float]) -> tuple[float, float, float]:
    """(lower bound, geometric mean, upper bound) of the ratios' 95 % confidence interval; needs two ratios."""
    logs = [math.log(ratio) for ratio in ratios]
    mean = statistics.fmean(logs)
    half = _T[min(len(logs) - 2, len(_T) - 1)] * statistics.stdev(logs) / math.sqrt(len(logs))
    return math.exp(mean - half), math.exp(mean), math.exp(mean + half)


def a_round(
    trees: dict[str, Path], order: list[str], side: str, steps: int, together: bool
) -> dict[str, dict[str, float]]:
    """One round of every tree, by name: one after another in `order`, or all at once, begun in that order."""
    with ThreadPoolExecutor(max_workers=len(order) if together else 1) as pool:
        running = {name: pool.submit(measured, trees[name], side, steps) for name in order}
        return {name: future.result() for name, future in running.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("old", type=Path)
    parser.add_argument("new", type=Path)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--steps", type=int, default=24)
    parser.add_argument("--side", default="shm")
    parser.add_argument("--together", action="store_true", help="run both sides of a round at the same time")
    chosen = parser.parse_args()
    trees = {"old": chosen.old.resolve(), "new": chosen.new.resolve()}
    samples: dict[str, list[dict[str, float]]] = {name: [] for name in trees}
    for number in range(max(2, chosen.rounds)):
        order = sorted(trees, reverse=bool(number % 2))
        for name, found in a_round(trees, order, chosen.side, chosen.steps, chosen.together).items():
            samples[name].append(found)
            shown = ", ".join(f"{what} {value:.4g}" for what, value in samples[name][-1].items())
            print(f"round {number + 1}/{chosen.rounds}  {name:4} {shown}", flush=True)
    keys = {}
    for what in MEASURED:
        ratios = [new[what] / old[what] for old, new in zip(samples["old"], samples["new"], strict=True)]
        low, mean, high = interval(ratios)
        keys[what] = {"ratio": mean, "low": low, "high": high}
        print(f"{what}: new/old = {mean:.3f}, 95 % between {low:.3f} and {high:.3f}")
    record = {
        "name": "between_trees",
        "side": chosen.side,
        "together": chosen.together,
        "keys": keys,
        "machine": machine(),
        "samples": samples,
    }
    (RESULTS / "between_trees.json").write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
