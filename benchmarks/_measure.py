"""What the benchmarks share: options, interleaved rounds, keys, and results with machine and versions."""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import platform
import signal
import statistics
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

RESULTS = Path(__file__).parent / "results"
PACKAGES = ("pscluster", "torch", "numpy", "grpcio", "crc32c", "protobuf")
Samples = dict[str, list[float]]  # by what was measured, one a round
Found = Mapping[str, Samples]  # by side
Side = Callable[[], dict[str, float]]


@dataclass(frozen=True, kw_only=True)
class Key:
    """One number that a benchmark claims: the median of `what` over the rounds, of a side against another.

    Of several sides that do the same the best one counts: the one with the lowest (or highest) median. Without `over`
    the number stands for itself."""

    what: str
    of: tuple[str, ...]
    over: tuple[str, ...] = ()
    best: Literal["lowest", "highest"] = "lowest"
    how: Literal["ratio", "difference"] = "ratio"

    def is_measured(self, found: Found) -> bool:
        """Whether of each group that it needs a side was run."""
        return all(any(side in found for side in group) for group in (self.of, self.over) if group)

    def sides(self, found: Found) -> list[str]:
        """The sides that count: one of `of`, and one of `over` if there is any; of those that were run."""
        choose = min if self.best == "lowest" else max
        groups = [[side for side in group if side in found] for group in (self.of, self.over) if group]
        return [choose(group, key=lambda side: statistics.median(found[side][self.what])) for group in groups]

    def compared(self, found: Found) -> str:
        """The sides that count, for people: "shm over ddp_malloc"."""
        return (" over " if self.how == "ratio" else " less ").join(self.sides(found))

    def value(self, found: Found) -> float:
        """The number itself."""
        ours, *theirs = [statistics.median(found[side][self.what]) for side in self.sides(found)]
        if not theirs:
            return ours
        return ours / theirs[0] if self.how == "ratio" else ours - theirs[0]


Keys = Mapping[str, Key]


def options(doc: str, *, rounds: int, steps: int) -> argparse.ArgumentParser:
    """The options that every benchmark has, with its defaults."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=_at_least_one, default=rounds, help=f"how often each side runs ({rounds})")
    parser.add_argument("--steps", type=_at_least_one, default=steps, help=f"steps of each run ({steps})")
    parser.add_argument(
        "--only", nargs="+", metavar="SIDE", help="run these sides alone; keys that need others are left out"
    )
    parser.add_argument("--results", type=Path, default=RESULTS, metavar="DIR", help="where the JSON goes")
    return parser


def run(name: str, sides: Mapping[str, Side], keys: Keys, note: str, chosen: argparse.Namespace) -> Found:
    """The whole of a benchmark once its options are known: measure, print, write; gives the samples."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # what is started is ended, as on Ctrl-C
    load_average = os.getloadavg()
    found = interleaved(selected(sides, chosen.only), chosen.rounds)
    write(chosen.results, name, keys, found, note, load_average)
    return found


def selected(sides: Mapping[str, Side], only: list[str] | None) -> dict[str, Side]:
    """The sides to run; exits with a message for a name that is none of them."""
    unknown = sorted(set(only or ()) - set(sides))
    if unknown:
        raise SystemExit(f"no side {', '.join(unknown)}; there are {', '.join(sides)}")
    return {side: measure for side, measure in sides.items() if not only or side in only}


def interleaved(sides: Mapping[str, Side], rounds: int) -> dict[str, Samples]:
    """Run every side once in each round, in turn; gives, by side and by what it measured, the samples in order."""
    found: dict[str, Samples] = {name: {} for name in sides}
    for number in range(rounds):
        for name, measure in sides.items():
            for key, value in measure().items():
                found[name].setdefault(key, []).append(value)
            shown = ", ".join(f"{key} {values[-1]:.4g}" for key, values in found[name].items())
            print(f"round {number + 1}/{rounds}  {name:12} {shown}", flush=True)
    return found


def write(
    directory: Path, name: str, keys: Keys, found: Found, note: str, load_average: tuple[float, float, float]
) -> None:
    """Write <directory>/<name>.json and print the keys. `load_average`: as it was before the first round."""
    directory.mkdir(parents=True, exist_ok=True)
    measured = {key: claim for key, claim in keys.items() if claim.is_measured(found)}
    values = {key: claim.value(found) for key, claim in measured.items()}
    compared = {key: claim.compared(found) for key, claim in measured.items()}
    record = {
        "name": name,
        "note": f"{note}. Medians over the rounds, and of sides that do the same the best: "
        + ", ".join(f"{key} is {sides}" for key, sides in compared.items()),
        "keys": values,
        "machine": machine() | {"load_average": load_average},
        "samples": found,
    }
    (directory / f"{name}.json").write_text(json.dumps(record, indent=1) + "\n")
    for key, value in values.items():
        print(f"{key} = {value:.3f}  ({compared[key]})")


def machine() -> dict[str, object]:
    """What the numbers were measured on."""
    models = (line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name"))
    return {
        "cpu": next(models, platform.machine()).rpartition(": ")[2],
        "cores": len(os.sched_getaffinity(0)),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "kernel": platform.release(),
        "python": platform.python_version(),
        "versions": {package: importlib.metadata.version(package) for package in PACKAGES},
    }


def _at_least_one(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{number} is less than 1")
    return number
