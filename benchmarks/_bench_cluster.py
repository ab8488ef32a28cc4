"""A cluster with one job at a time, faults in it, and their cost in that job's steps."""

from __future__ import annotations

import itertools
import os
import random
import sys
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))  # `import harness`
from harness.cluster import LocalCluster, local_cluster
from harness.commits import Commits, median_step_s, recovery_s
from harness.faults import Action, Kind, Victim, victims
from harness.keeper import Keeper
from harness.soak import lm_job
from pscluster.client import Cluster, Job
from pscluster.errors import UnreachableError
from pscluster.job.spec import parse_spec

SIZE = 3  # workers, and servers
SETTLE_S = 120.0
ENDLESS_STEPS = 1_000_000
_POLL_S = 0.05


class Bench:
    """Started when it is first needed; `close` takes it down. Ended daemons are started again by a `Keeper`."""

    def __init__(self, calm_steps: int, seed: int = 1) -> None:
        """`calm_steps`: committed undisturbed before each fault."""
        self._calm_steps = calm_steps
        self._draw = random.Random(seed)
        self._stack = ExitStack()
        self._cluster: LocalCluster | None = None
        self._tier = ""
        self._job = ""
        self.commits: Commits

    @property
    def cluster(self) -> LocalCluster:
        if self._cluster is None:
            root = self._stack.enter_context(tempfile.TemporaryDirectory(prefix="psb-"))
            self._cluster = self._stack.enter_context(local_cluster(Path(root), workers=SIZE, servers=SIZE))
            self._stack.enter_context(Keeper(self._cluster))
            self._client: Cluster = self._stack.enter_context(self._cluster.client())
        return self._cluster

    def close(self) -> None:
        """Take the cluster down. Idempotent."""
        self._stack.close()

    def settle(self, tier: str) -> float:
        """Block until a job of this tier has trained on every worker for a while; its median step, in seconds."""
        state_dir = self.cluster.state_dir
        if tier != self._tier:
            self._end_job()
            data = os.environ.get("PSCLUSTER_DATA")
            spec = lm_job(tier, Path(data) if data else None)
            spec |= {"evaluate": {}, "train": {**spec["train"], "max_steps": ENDLESS_STEPS}}
            self._job = self._client.submit(parse_spec(spec))
            self._tier, self.commits = tier, Commits(state_dir, self._job)
        deadline = time.monotonic() + SETTLE_S
        whole_s = 0.0
        while True:
            found = self._look()
            if found is not None and not _is_whole(found):
                whole_s = 0.0
            elif found is not None and not whole_s:
                whole_s = time.time()
            calm = [commit for commit in self.commits.all if whole_s and commit.time_s > whole_s]
            if len(calm) > self._calm_steps:
                return median_step_s(calm)
            if time.monotonic() > deadline:
                raise RuntimeError(
                    f"the job does not become steady: {self.cluster.psctl('describe', self._job).stdout}"
                )
            time.sleep(_POLL_S)

    def strike(self, kind: Kind, action: Action) -> float:
        """Hit a random process of a kind at a random moment of a step; the Unix time of the hit."""
        candidates: list[Victim] = [victim for victim in victims(self.cluster) if victim.kind == kind]
        time.sleep(self._draw.random() * 0.2)
        at_s = time.time()
        self._draw.choice(candidates).strike(action)
        return at_s

    def recovered(self, fault_s: float, step_s: float) -> dict[str, float]:
        """The cost of a fault, once steps continue: seconds beyond a normal step, and steps committed again."""
        deadline = time.monotonic() + SETTLE_S
        while sum(commit.time_s > fault_s for commit in self.commits.all) < 2:
            self._look()
            if time.monotonic() > deadline:
                raise RuntimeError(f"no step after the fault: {self.cluster.psctl('describe', self._job).stdout}")
            time.sleep(_POLL_S)
        return {"recovery_s": recovery_s(self.commits.all, fault_s, step_s), "lost_steps": self.lost_steps(fault_s)}

    def lost_steps(self, fault_s: float) -> int:
        """Steps committed before a fault that were committed again, or never, after it."""
        before = max((commit.step for commit in self.commits.all if commit.time_s <= fault_s), default=0)
        after = [commit.step for commit in self.commits.all if commit.time_s > fault_s]
        steps = list(itertools.chain([before], after))
        return sum(max(0, earlier + 1 - later) for earlier, later in itertools.pairwise(steps))

    def rate(self, seconds: float) -> float:
        """New steps a second over the next so many seconds; steps that are repeated do not count."""
        self._look()
        start_s = time.time()
        first = self.commits.high_step_at(start_s)
        while time.time() < start_s + seconds + 2:  # two more, for late records
            self._look()
            time.sleep(_POLL_S)
        while self.commits.newest_s < start_s + seconds:
            self._look()
            time.sleep(_POLL_S)
        return (self.commits.high_step_at(start_s + seconds) - first) / seconds

    def _look(self) -> Job | None:
        """Read new commits, and return the job; None while the master does not answer."""
        self.commits.look()
        try:
            return self._client.job(self._job)
        except UnreachableError:
            return None

    def _end_job(self) -> None:
        if self._job:
            self._client.stop(self._job)
            self._client.wait(self._job, "stopped", timeout_s=SETTLE_S)


def _is_whole(job: Job) -> bool:
    """Whether every placement of the job has an active process."""
    if job.state != "RUNNING" or job.workers_active != SIZE or job.plan is None:
        return False
    placements = job.plan.trainers
    return len(job.plan.partitions) == SIZE and sum(placement.active for placement in placements) == SIZE
