"""`make soak`: a job under a storm of kill -9 and SIGSTOP is compared with the same job undisturbed.

    python tests/fault/soak.py [--kills 200] [--seed N] [--tier snapshot] [--power-loss] [--hosts]

A cluster of one master, three workers and three servers trains a byte-level language model on the data of
$PSCLUSTER_DATA, or on synthetic sequences without it: first undisturbed, then while trainers, partitions, agents and
the master are killed or stopped, each time after at least one step was committed since the last fault. Daemons that
ended are started again, as a service manager would do; stopped processes are resumed after a while, or stay stopped.
With --hosts the cluster is a secured one of four hosts (namespaces of this machine, which needs root): the master on
one, a worker and a server on each of the others, TLS between them.

It fails unless the job ends SUCCEEDED with the same parameters, evaluation and losses of every step, no process grew,
and nothing is left. A seed gives the same faults at the same steps; the clock decides what they interrupt. The job is
paced so that it cannot end before the last fault. A job without a step for two minutes fails; the state of every
process is then written to the temporary directory. The last line of a failed run is the reason.
"""

from __future__ import annotations

import argparse
import json
import os
import secrets
import sys
import tempfile
import time
import traceback
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))  # `import harness`
from harness.faults import KINDS
from harness.hosts import missing
from harness.soak import Soak, lm_job, soak
from harness.storm import Violation

RESULTS = Path(__file__).parents[2] / "benchmarks" / "results"


def main() -> int:
    chosen = _arguments()
    data = os.environ.get("PSCLUSTER_DATA")
    plan = Soak(
        spec=lm_job(chosen.tier, Path(data) if data else None),
        kills=chosen.kills,
        seed=chosen.seed,
        gap=chosen.gap,
        length=chosen.length,
        hosts=chosen.hosts,
        kinds=(*chosen.kinds, "everything") if chosen.power_loss else tuple(chosen.kinds),
    )
    started = time.monotonic()

    def log(text: str) -> None:
        print(f"{time.monotonic() - started:7.1f} s  {text}", flush=True)

    with tempfile.TemporaryDirectory(prefix="soak-") as root:
        evidence = Path(tempfile.gettempdir()) / f"soak-evidence-{plan.seed}"
        try:
            result = soak(plan, Path(root), evidence, log)
        except Violation as violation:
            return _failed(plan.seed, violation.detail, violation.reason)
        except Exception as error:
            return _failed(plan.seed, traceback.format_exc(), f"{type(error).__name__}: {error}")
    chosen.results.mkdir(parents=True, exist_ok=True)
    variant = [word for word in (chosen.tier, "hosts" if chosen.hosts else "snapshot") if word != "snapshot"]
    name = "_".join(["soak", *variant]) + ".json"
    (chosen.results / name).write_text(json.dumps(result, indent=1) + "\n")
    for key, value in result["keys"].items():
        print(f"{key} = {value}")
    return 0


def _failed(seed: int, detail: str, reason: str) -> int:
    """Print the detail, and the reason in one line after it; the exit code."""
    if detail:
        print(detail, file=sys.stderr)
    print(f"the soak with seed {seed} failed: {' '.join(reason.split())}", file=sys.stderr, flush=True)
    return 1


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=200, help="how many faults (200)")
    parser.add_argument("--seed", type=int, default=secrets.randbelow(1_000_000), help="decides the faults (random)")
    parser.add_argument("--tier", default="snapshot", help="durability.tier of the job (snapshot)")
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=KINDS, help="who is hit (all)")
    parser.add_argument("--gap", type=int, default=16, metavar="STEPS", help="between two faults, about (16)")
    parser.add_argument("--length", type=int, metavar="STEPS", help="of a job; one job then follows another")
    parser.add_argument("--power-loss", action="store_true", help="now and then kill everything at once")
    parser.add_argument("--hosts", action="store_true", help="four hosts in place of this one")
    parser.add_argument(
        "--results",
        type=Path,
        default=RESULTS,
        metavar="DIR",
        help="where soak.json, soak_TIER.json or soak_hosts.json goes",
    )
    chosen = parser.parse_args()
    if chosen.hosts and (reason := missing()):
        parser.error(reason)
    if chosen.kills < 1:
        parser.error("--kills must be at least 1")
    return chosen


if __name__ == "__main__":
    sys.exit(main())
