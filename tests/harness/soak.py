"""The soak: one job undisturbed, the same job under a storm of kills, and everything that must be the same after it.

The job's number of steps is fixed, since its bits depend on it; the storm lets the job compute only so far ahead of the
next fault (`harness.metered_task`). Every fault therefore strikes a running job, however fast the machine is."""

from __future__ import annotations

import itertools
import math
import os
import platform
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import psutil

from harness import autopsy
from harness.cluster import LocalCluster
from harness.commits import Commits, median_step_s
from harness.faults import KINDS, Fault, Kind, draw_faults
from harness.growth import left_by_jobs
from harness.host_cluster import HostCluster
from harness.hosts import HostNetwork
from harness.keeper import Keeper
from harness.metered_task import metered_spec
from harness.storm import LEAD_STEPS, Log, Storm, Violation
from pscluster import pack
from pscluster.client import Cluster as Client
from pscluster.client import Job
from pscluster.job.spec import parse_spec

TAIL_STEPS = LEAD_STEPS + 12  # of a job after its last fault is due, so that some follow when that strikes late
SETTLE_S = 20.0
DEADLINE_S = 3600.0
_EXTRA_FILES = 8  # an idle daemon may hold so many more than before the storm


@dataclass(frozen=True, kw_only=True)
class Soak:
    """A soak's settings. `seed` decides the faults; `spec` has no number of steps. `hosts`: a worker and a server on
    each of `workers` hosts, the master on another one."""

    spec: Mapping[str, Any]
    kills: int
    seed: int
    workers: int = 3
    servers: int = 3
    hosts: bool = False
    kinds: tuple[Kind, ...] = KINDS
    stops: float = 0.3
    gap: int = 16
    length: int | None = None
    """Steps of a job, which then runs at its own speed; one job follows another. None: one job for all faults."""

    @property
    def faults(self) -> list[Fault]:
        return draw_faults(self.seed, self.kills, kinds=self.kinds, stops=self.stops, gap=self.gap)

    @property
    def steps(self) -> int:
        return self.length or self.faults[-1].step + TAIL_STEPS

    def job_spec(self) -> dict[str, Any]:
        return {**self.spec, "train": {**self.spec["train"], "max_steps": self.steps}}


def lm_job(tier: str, data: Path | None) -> dict[str, Any]:
    """A small language model on the bytes of Shakespeare in `data`, or on synthetic sequences."""
    text = data / "tinyshakespeare" / "input.txt" if data else None
    small = {"layers": 2, "d_model": 64, "heads": 4, "context": 64, "dropout": 0.1}
    synthetic = {"entrypoint": "psworker.tasks.synthetic:SyntheticLm", "args": {**small, "num_samples": 4096}}
    task = {"entrypoint": "psworker.tasks.text_lm:TextLm", "args": small}
    has_text = text is not None and text.exists()
    return {
        "name": "soak",
        "task": task if has_text else synthetic,
        "data": {"uri": str(text) if has_text else ""},
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
    """The runs of a soak; `violations` must be empty."""

    undisturbed: Run
    disturbed: list[Run] = field(default_factory=list)
    violations: list[str] = field(default_factory=list)

    @property
    def goodput(self) -> float:
        """Speed under the storm over the undisturbed speed."""
        return self.undisturbed.seconds * len(self.disturbed) / sum(run.seconds for run in self.disturbed)


def soak(plan: Soak, root: Path, evidence: Path, log: Log, digest: str | None = None) -> dict[str, Any]:
    """Run it in a cluster of its own and return the result as a JSON object. `digest`: the parameters' hash that the
    undisturbed job must have, when it is known. Blocks until the end.

    On any failure the state of all processes is written to `evidence`. Raises Violation for a broken invariant."""
    log(f"seed {plan.seed}: {plan.kills} faults in a job of {plan.steps} steps")
    with _prepared(plan, root) as cluster:
        try:
            cluster.up(plan.workers, plan.servers)
            with cluster.client() as client:
                result = _soaked(plan, cluster, client, log, digest)
        except Exception:
            log(f"the state of all processes is in {autopsy.write_down(cluster, evidence)}")
            _resume_stopped(cluster)
            with suppress(AssertionError):  # it must not hide the first failure
                cluster.down()
            raise
        _resume_stopped(cluster)
        cluster.down()
        left = cluster.remaining()
    if left:
        raise Violation(f"{len(left)} things are left of the cluster, first {left[0]}", "\n".join(left))
    return result


@contextmanager
def _prepared(plan: Soak, root: Path) -> Iterator[LocalCluster]:
    """A cluster that does not run yet: on this machine, or on hosts of its own, which are gone at the end."""
    if not plan.hosts:
        yield LocalCluster(Path(tempfile.mkdtemp(prefix="pst-", dir=root)))
        return
    with HostNetwork(plan.workers + 1) as network:
        yield HostCluster(network)


def _soaked(plan: Soak, cluster: LocalCluster, client: Client, log: Log, digest: str | None) -> dict[str, Any]:
    directory = cluster.shared / "soak-job"
    metered, limit = metered_spec(plan.job_spec(), directory)
    spec, bundle = parse_spec(metered), pack(directory)
    calm = Storm(cluster=cluster, client=client, faults=[], log=log)
    undisturbed = _run(calm, client.submit(spec, bundle), 0)
    outcome = Outcome(undisturbed)
    if digest is not None and undisturbed.job.parameters_sha256 != digest:
        raise Violation(f"the undisturbed job ended with {undisturbed.job.parameters_sha256}, not {digest}")
    log(f"undisturbed: {undisturbed.seconds:.1f} s, {undisturbed.job.parameters_sha256}")
    _settle(lambda: left_by_jobs(cluster))
    files = {name: daemon.num_fds() for name, daemon in cluster.daemons().items()}
    one_job = plan.length is None
    storm = Storm(cluster=cluster, client=client, faults=plan.faults, log=log, limit=limit if one_job else None)
    with ExitStack() as stack:
        keeper = stack.enter_context(Keeper(cluster))
        while not storm.over:
            if one_job and outcome.disturbed:
                raise Violation(f"the job ended after {len(storm.struck)} of {plan.kills} faults")
            job = client.submit(spec, bundle)
            outcome.disturbed.append(_run(storm, job, len(outcome.disturbed) * plan.steps))
            outcome.violations += compared(undisturbed, outcome.disturbed[-1])
        outcome.violations += _settle(lambda: left_by_jobs(cluster))
        outcome.violations += _settle(lambda: _grown_files(cluster, files))
        outcome.violations += storm.growth.violations()
        restarts = len(keeper.restarts)
    result = _result(plan, storm, outcome, restarts)
    if outcome.violations:
        raise Violation(
            f"{len(outcome.violations)} invariants do not hold, first {outcome.violations[0]}",
            "\n".join(outcome.violations),
        )
    return result


def _run(storm: Storm, job: str, offset: int) -> Run:
    ended, commits = storm.disturb(job, offset)
    if ended.state != "SUCCEEDED":
        raise Violation(
            f"{job} ended {ended.state} at step {ended.step}: {ended.reason}",
            storm.cluster.psctl("describe", job, expect=None).stdout,
        )
    return Run(ended, commits, list(storm.client.metrics(job)))


def compared(undisturbed: Run, disturbed: Run) -> list[str]:
    """The differences of a disturbed job from the undisturbed one: result, evaluation, every recorded step's loss."""
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
    """What `look` still finds after it had time to find nothing."""
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


def _resume_stopped(cluster: LocalCluster) -> None:
    """Stopped daemons handle no SIGTERM."""
    for daemon in cluster.daemons().values():
        for process in (daemon, *daemon.children()):
            try:
                process.resume()
            except psutil.NoSuchProcess:
                continue


def _without_place(spec: dict[str, Any]) -> dict[str, Any]:
    """Leave out where the data lie on this machine."""
    return {**spec, "data": {"uri": Path(spec["data"]["uri"]).name}} if spec.get("data") else spec


def _result(plan: Soak, storm: Storm, outcome: Outcome, restarts: int) -> dict[str, Any]:
    waits = sorted(s.next_commit_s - s.at_s for s in storm.struck if s.next_commit_s is not None)
    by_victim: dict[str, int] = {}
    for struck in storm.struck:
        key = f"{struck.fault.action} {struck.fault.kind}"
        by_victim[key] = by_victim.get(key, 0) + 1
    return {
        "name": "soak",
        "seed": plan.seed,
        "keys": {
            "soak_kills_without_violation": 0 if outcome.violations else len(storm.struck),
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
        "growth": storm.growth.worst(),
        "machine": {
            "cores": len(os.sched_getaffinity(0)),
            "kernel": platform.release(),
            "python": platform.python_version(),
            "load_average": os.getloadavg(),
        },
        "plan": {**asdict(plan), "spec": _without_place(plan.job_spec())},
        "struck": [struck.to_dict() for struck in storm.struck],
    }
