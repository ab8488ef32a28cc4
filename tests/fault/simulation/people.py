"""The people: they submit jobs, repeat what was not answered, and resume what ended before its last step."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

from pscluster.errors import CallerError, ProcessLostError, PsError, StorageError, UnreachableError
from psmaster.control.submission import new_job
from psmaster.control.transaction import Transaction
from psmaster.model.job import JobState
from tests.fault.simulation.invariants import require

PATIENCE_S = 2.0  # after which an unanswered question is asked again
_EXPECTED = {ProcessLostError.code, StorageError.code}  # what faults may make a job fail of; a person resumes it


class People:
    """`jobs`: the ids of the jobs that they were told of, by the request that asked for them."""

    def __init__(self, sim: Any) -> None:
        self.sim = sim
        self.jobs: dict[str, str] = {}
        self.drained: set[str] = set()  # nodes that they want empty
        self.num_resumed = 0

    def submit(self, spec: Any, request_id: str) -> None:
        """Ask until the job is taken in."""
        text = json.dumps(spec.model_dump(mode="json"))

        def apply(tx: Transaction) -> str:
            directory = self.sim.disk.directory / "jobs"
            random_bytes = self.sim.schedule.random.randbytes
            return tx.submit(new_job(text, "", request_id, directory, tx.now, random_bytes))

        def taken(job_id: str) -> None:
            known = self.jobs.setdefault(request_id, job_id)
            require(known == job_id, f"one request became two jobs, {known} and {job_id}")
            self.sim.monitor.acknowledged.add(job_id)
            self.sim.schedule.tell(f"{job_id} is taken in")

        def again() -> None:
            if request_id not in self.jobs:
                self._ask(apply, taken)
                self.sim.schedule.after(PATIENCE_S, "", again)

        again()

    def stop(self, job_id: str) -> None:
        """Ask once."""
        self._ask(lambda tx: tx.stop(job_id), lambda _: None)

    def look_after(self) -> None:
        """Resume what ended before its last step, and have those nodes drained that should be, for ever."""
        self._tell_drains()
        for job in self.sim.jobs():
            if job.state is JobState.FAILED:
                require(job.error.code in _EXPECTED, f"{job.job_id} failed: {job.error}")
            if job.state in (JobState.FAILED, JobState.STOPPED):
                self.num_resumed += 1
                self._ask(lambda tx, job_id=job.job_id: tx.resume(job_id), lambda _: None)  # type: ignore[misc]
        self.sim.schedule.after(0.5, "", self.look_after)

    def _tell_drains(self) -> None:
        master = self.sim.master
        if master is None:
            return
        asked, known = set(master.core.state.drains), set(master.core.state.nodes)
        for node_id in sorted((self.drained - asked) & known):
            self._ask(lambda tx, node_id=node_id: tx.drain(node_id), lambda _: None)  # type: ignore[misc]
        for node_id in sorted(asked - self.drained):
            self._ask(lambda tx, node_id=node_id: tx.drain(node_id, undo=True), lambda _: None)  # type: ignore[misc]

    def _ask(self, apply: Callable[[Transaction], Any], done: Callable[[Any], None]) -> None:
        """Whoever gets no answer, or a refusal, may ask again."""
        master = self.sim.master
        if master is not None and not master._loading:
            master.life.run(lambda: master.ask(apply, done, _refused))


def _refused(error: PsError) -> None:
    require(isinstance(error, CallerError | StorageError | UnreachableError), f"a person was told {error}")
