"""The soak: one job undisturbed, the same job under a storm of kills, and everything that must be the same after it."""

from __future__ import annotations

import itertools
import math
import os
import platform
import tempfile
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import psutil

from harness import autopsy
from harness.cluster import LocalCluster
from harness.commits import Commits, median_step_s
from harness.faults import KINDS, Fault, Kind, storm
from harness.growth import left_by_jobs
from harness.keeper import Keeper
from harness.storm import Say, Storm, Violation
from pscluster.client import Cluster as Client
from pscluster.client import Job
from pscluster.job.spec import parse_spec

TAIL_STEPS = 60  # after the last fault is due; each strikes later by as much as nobody saw how far the job was
SETTLE_S = 20.0
DEADLINE_S = 3600.0
_EXTRA_FILES = 8  # an idle daemon may hold so many more than before the storm


@dataclass(frozen=True, kw_only=True)
class Soak:
    """What is to be done. `seed` decides the faults; `spec` without its number of steps."""

    spec: Mapping[str, Any]
    kills: int
    seed: int
    workers: int = 3
    servers: int = 3
    kinds: tuple[Kind, ...] = KINDS
    stops: float = 0.3
    gap: int = 16
    length: int | None = None
    """Steps of a job; None: one job is long enough for all faults. With less there is one job after another."""

    @property
    def faults(self) -> list[Fault]:
        return storm(self.seed, self.kills, kinds=self.kinds, stops=self.stops, gap=self.gap)

    @property
    def steps(self) -> int:
        return self.length or self.faults[-1].step + TAIL_STEPS

    def job_spec(self) -> dict[str, Any]:
        return {**self.spec, "train": {**self.spec["train"], "max_steps": self.steps}}


def lm_job(tier: str, data: Path | None) -> dict[str, Any]:
    """The language model that is trained: bytes of Shakespeare when `data` has them, else made-up sequences."""
    text = data / "tinyshakespeare" / "input.txt" if data else None
    small = {"layers": 2, "d_model": 64, "heads": 4, "context": 64, "dropout": 0.1}
    synthetic = {"entrypoint": "psworker.tasks.synthetic:SyntheticLm", "args": {**small, "num_samples": 4096}}
    task = {"entrypoint": "psworker.tasks.text_lm:TextLm", "args": small}
    there = text is not None and text.exists()
    return {
        "name": "soak",
        "task": task if there else synthetic,
        "data": {"uri": str(text) if there else ""},
        "train": {
            "global_batch": 48,
            "microbatch": 4,
            "seed": 7,
            "clip_norm": 1.0,
            "optimizer": {"name": "adamw", "lr": 1e-3, "weight_decay": 0.1},
            "schedule": {"name": "cosine", "warmup_steps": 20},
        },
        "workers": {"min": 1, "max": 3},
        "servers": {"partitions": 3},
        "durability": {"tier": tier, "every_steps": 10},
        "evaluate": {"every_steps": 200},
    }


@dataclass
class Run:
    """One job, from its first commit to its last."""

    job: Job
    commits: Commits
    lines: list[dict[str, Any]]

    @property
    def seconds(self) -> float:
        return self.commits.all[-1].time_s - self.commits.all[0].time_s

    @property
    def repeated(self) -> int:
        """Steps that were committed again, after a rollback."""
        return len(self.commits.all) - len({commit.step for commit in self.commits.all})


@dataclass
class Outcome:
    """What a soak found; `violations` must be empty."""

    undisturbed: Run
    disturbed: list[Run] = field(default_factory=list)
    violations: list[str] = field(default_factory=list)

    @property
    def goodput(self) -> float:
        """Speed under the storm over the undisturbed speed."""
        return self.undisturbed.seconds * len(self.disturbed) / sum(run.seconds for run in self.disturbed)


def soak(plan: Soak, root: Path, evidence: Path, say: Say, digest: str | None = None) -> dict[str, Any]:
    """Run it in a cluster of its own; the result, as JSON holds it. `digest`: what the undisturbed job must have ended
    with, when that is known. Raises Violation; what was seen is then in `evidence`."""
    say(f"seed {plan.seed}: {plan.kills} faults in a job of {plan.steps} steps")
    state_dir = Path(tempfile.mkdtemp(prefix="pst-", dir=root))
    cluster = LocalCluster(state_dir)
    try:
        cluster.up(plan.workers, plan.servers)
        with cluster.client() as client:
            result = _soaked(plan, cluster, client, say, digest)
    except Exception:
        say(f"what is seen now is in {autopsy.write_down(cluster, evidence)}")
        raise
    finally:
        _let_go_on(cluster)
        cluster.psctl("down")
    left = cluster.leftovers()
    if left:
        raise Violation(f"seed {plan.seed}: left after `psctl down`: {left}")
    return result


def _soaked(plan: Soak, cluster: LocalCluster, client: Client, say: Say, digest: str | None) -> dict[str, Any]:
    calm = Storm(cluster=cluster, client=client, faults=[], say=say)
    undisturbed = _run(calm, client.submit(parse_spec(plan.job_spec())), 0)
    outcome = Outcome(undisturbed)
    if digest is not None and undisturbed.job.parameters_sha256 != digest:
        raise Violation(f"the undisturbed job ended with {undisturbed.job.parameters_sha256}, not {digest}")
    say(f"undisturbed: {undisturbed.seconds:.1f} s, {undisturbed.job.parameters_sha256}")
    _settle(lambda: left_by_jobs(cluster))
    files = {name: daemon.num_fds() for name, daemon in cluster.daemons().items()}
    weather = Storm(cluster=cluster, client=client, faults=plan.faults, say=say)
    with ExitStack() as stack:
        keeper = stack.enter_context(Keeper(cluster))
        while not weather.over:
            job = client.submit(parse_spec(plan.job_spec()))
            outcome.disturbed.append(_run(weather, job, len(outcome.disturbed) * plan.steps))
            outcome.violations += compared(undisturbed, outcome.disturbed[-1])
        outcome.violations += _settle(lambda: left_by_jobs(cluster))
        outcome.violations += _settle(lambda: _grown_files(cluster, files))
        outcome.violations += weather.growth.violations()
        restarts = len(keeper.restarts)
    result = _result(plan, weather, outcome, restarts)
    if outcome.violations:
        raise Violation(f"seed {plan.seed}: " + "; ".join(outcome.violations))
    return result


def _run(weather: Storm, job: str, offset: int) -> Run:
    ended, commits = weather.weather(job, offset)
    if ended.state != "SUCCEEDED":
        told = weather.cluster.psctl("describe", job, expect=None).stdout
        raise Violation(f"{job} ended {ended.state} at step {ended.step}: {ended.reason}\n{told}")
    return Run(ended, commits, list(weather.client.metrics(job)))


def compared(undisturbed: Run, disturbed: Run) -> list[str]:
    """Where a disturbed job differs from the undisturbed one: result, evaluation, and every recorded step's loss."""
    ours, theirs = disturbed.job, undisturbed.job
    found = []
    for what in ("parameters_sha256", "step", "metrics"):
        if getattr(ours, what) != getattr(theirs, what):
            found.append(f"{ours.job_id}: {what} is {getattr(ours, what)}, not {getattr(theirs, what)}")
    steps = [line["step"] for line in disturbed.lines if "loss" in line]
    if steps != sorted(set(steps)):
        repeated = [later for earlier, later in itertools.pairwise(steps) if later <= earlier]
        found.append(f"{ours.job_id}: steps are recorded twice or out of order: {repeated[:10]}")
    wanted = {line["step"]: line for line in undisturbed.lines if "loss" in line}
    if missing := sorted(wanted.keys() - set(steps)):
        found.append(f"{ours.job_id}: {len(missing)} steps were committed and are not in the record: {missing[:10]}")
    for line in disturbed.lines:
        if "loss" in line and any(line[key] != wanted[line["step"]][key] for key in ("loss", "grad_norm", "lr")):
            found.append(f"{ours.job_id}: step {line['step']} was recorded as {line}, not {wanted[line['step']]}")
            break
    return found


def _settle(look: Callable[[], list[str]]) -> list[str]:
    """What is still wrong after a while in which it may come right."""
    deadline = time.monotonic() + SETTLE_S
    while (found := look()) and time.monotonic() < deadline:
        time.sleep(0.2)
    return found


def _grown_files(cluster: LocalCluster, before: Mapping[str, int]) -> list[str]:
    now = {name: daemon.num_fds() for name, daemon in cluster.daemons().items()}
    return [
        f"{name} holds {now.get(name)} files when idle, {count} before the storm"
        for name, count in before.items()
        if now.get(name, math.inf) > count + _EXTRA_FILES
    ]


def _let_go_on(cluster: LocalCluster) -> None:
    """A stopped daemon would not hear that it is to end."""
    for daemon in cluster.daemons().values():
        for process in (daemon, *daemon.children()):
            try:
                process.resume()
            except psutil.NoSuchProcess:
                continue


def _without_place(spec: dict[str, Any]) -> dict[str, Any]:
    """Where the data lie on this machine is nobody's concern."""
    return {**spec, "data": {"uri": Path(spec["data"]["uri"]).name}} if spec.get("data") else spec


def _result(plan: Soak, weather: Storm, outcome: Outcome, restarts: int) -> dict[str, Any]:
    waits = sorted(s.next_commit_s - s.at_s for s in weather.struck if s.next_commit_s is not None)
    by_victim: dict[str, int] = {}
    for struck in weather.struck:
        key = f"{struck.fault.action} {struck.fault.kind}"
        by_victim[key] = by_victim.get(key, 0) + 1
    return {
        "name": "soak",
        "seed": plan.seed,
        "keys": {
            "soak_kills_without_violation": 0 if outcome.violations else len(weather.struck),
            "soak_goodput": round(outcome.goodput, 4),
        },
        "violations": outcome.violations,
        "tier": parse_spec(plan.job_spec()).durability.tier,
        "faults": by_victim,
        "parameters_sha256": outcome.undisturbed.job.parameters_sha256,
        "undisturbed_s": round(outcome.undisturbed.seconds, 3),
        "undisturbed_step_s": round(median_step_s(outcome.undisturbed.commits.all), 4),
        "disturbed_s": [round(run.seconds, 3) for run in outcome.disturbed],
        "steps": plan.steps,
        "steps_repeated": sum(run.repeated for run in outcome.disturbed),
        "generations": [run.job.generation for run in outcome.disturbed],
        "daemons_restarted": restarts,
        "next_commit_after_s": {
            "median": round(waits[len(waits) // 2], 3) if waits else None,
            "most": round(waits[-1], 3) if waits else None,
        },
        "growth": weather.growth.worst(),
        "machine": {
            "cores": len(os.sched_getaffinity(0)),
            "kernel": platform.release(),
            "python": platform.python_version(),
            "load_average": os.getloadavg(),
        },
        "plan": {**asdict(plan), "spec": _without_place(plan.job_spec())},
        "struck": [struck.to_dict() for struck in weather.struck],
    }
