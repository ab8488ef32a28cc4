"""One process of a simulated agent: started, sent plans, read from, ended. Models pscluster.agent.process."""

from __future__ import annotations

from typing import Any

from pscluster.agent.child import GracePeriods
from pscluster.agent.status import LOADING_SILENCE_S, SILENCE_S, Exit, LastHeartbeat, classify, suspicion_of
from pscluster.agent.supervisor import AT_ONCE
from pscluster.v1.agents_pb2 import AgentMessage, ProcessEvent, ProcessState, ProcessStatus
from pscluster.v1.plan_pb2 import Beat, Failure, Plan, ProcessReport, ProcessSpec, Speed
from tests.fault.simulation.partition import PartitionProcess
from tests.fault.simulation.schedule import SOON_S, Life
from tests.fault.simulation.trainer import TrainerProcess

SIGKILL = 9
_GRACE = GracePeriods()


class Child:
    """The process of one ProcessSpec; started once."""

    def __init__(self, agent: Any, spec: ProcessSpec) -> None:
        self.spec = spec
        self.plan: Plan | None = spec.plan if spec.HasField("plan") else None
        self.process: TrainerProcess | PartitionProcess | None = None
        self.life: Life | None = None
        self._agent = agent
        self._status = ProcessStatus(process_id=spec.process_id)
        self._ready: ProcessReport | None = None
        self._failure: Failure | None = None
        self._ending = False
        self._begun = False
        self.last_heartbeat: LastHeartbeat | None = None
        self.speed: Speed | None = None

    @property
    def living(self) -> bool:
        return self._status.phase != ProcessStatus.PHASE_EXITED

    def state(self) -> ProcessState:
        generation = self.plan.generation if self.plan is not None else 0
        return ProcessState(status=self._status, ready=self._ready, generation=generation)

    def start(self) -> None:
        """Prepared, then started, then loading."""
        agent = self._agent
        if self._ending:
            self._conclude(None)
            return
        sim = agent.sim
        self.life = Life(sim.schedule, self.spec.process_id)
        kind = TrainerProcess if self.spec.kind == ProcessSpec.KIND_TRAINER else PartitionProcess
        self.process = kind(sim, self.life, agent.host, self.spec, self._report, self._ended)
        self._status.phase = ProcessStatus.PHASE_RUNNING
        self.last_heartbeat = LastHeartbeat(at_s=sim.schedule.now_s)
        agent.emit(AgentMessage(status=self._status))
        loads_s = sim.schedule.between(0.05, 0.8 if kind is TrainerProcess else 0.2)
        self.life.after(loads_s, "has loaded", self._begin)

    def forward(self, plan: Plan) -> None:
        self.plan = plan
        if self.process is None:
            self.spec.plan.CopyFrom(plan)
        else:
            self._order(plan)

    def end(self) -> None:
        """Shutdown order, then SIGKILL. Safe to repeat."""
        if self._ending:
            return
        self._ending = True
        if self.process is not None:
            self._order(None)
            grace = AT_ONCE if self._status.suspicion else _GRACE
            self._agent.life.after(grace.kill_s, "", self.kill)

    def look(self, now_s: float) -> None:
        """Report to the master when the process becomes silent or stalled, or recovers, and what it cannot reach."""
        silence_s = LOADING_SILENCE_S if self._ready is None else SILENCE_S[self.spec.kind]
        found = suspicion_of(now_s, self.last_heartbeat, silence_s)
        beat = self.last_heartbeat.beat if self.last_heartbeat is not None else Beat()
        unreached = beat.unreached if beat.HasField("unreached") else None
        reported = self._status.unreached if self._status.HasField("unreached") else None
        if (found, unreached) != (self._status.suspicion, reported):
            self._status.suspicion = found
            self._status.ClearField("unreached")
            if unreached is not None:
                self._status.unreached.CopyFrom(unreached)
            self._agent.emit(AgentMessage(status=self._status))

    def kill(self) -> None:
        """SIGKILL, by anyone. Safe to repeat."""
        if self.life is not None and self.life.alive:
            self._ended(-SIGKILL)

    def _begin(self) -> None:
        assert self.process is not None
        self._begun = True
        self.process.begin()
        self.process.hear_orders()

    def _order(self, plan: Plan | None) -> None:
        assert self.process is not None and self.life is not None
        self.process.link.order(plan)
        if self._begun:
            what = "is told to end" if plan is None else f"is told plan {plan.generation}"
            self.life.after(SOON_S, what, self.process.hear_orders)

    def _report(self, report: ProcessReport) -> None:
        self._agent.life.after(SOON_S, "", lambda: self._reported(report))

    def _reported(self, report: ProcessReport) -> None:
        body = report.WhichOneof("body")
        if body == "beat":
            beat = report.beat
            self.last_heartbeat = LastHeartbeat(at_s=self._agent.sim.schedule.now_s, beat=beat)
            self.speed = beat.speed if beat.HasField("speed") else None
        if body in ("counters", "beat"):
            return
        if body in ("trainer_ready", "partition_ready"):
            self._ready = report
        if body == "failure":
            self._failure = report.failure
        self._agent.emit(AgentMessage(event=ProcessEvent(process_id=self.spec.process_id, report=report)))

    def _ended(self, returncode: int) -> None:
        """The process is gone; its agent sees that after all its reports."""
        assert self.life is not None
        self._agent.sim.schedule.tell(f"{self.life.name} ends ({returncode})")
        self.life.end()
        self._agent.life.after(SOON_S, "", lambda: self._conclude(returncode))

    def _conclude(self, returncode: int | None) -> None:
        """`returncode` None: it never started."""
        seen = Exit(returncode=returncode or 0, expected=self._ending, failure=self._failure)
        self._status = classify(self.spec.process_id, 1, seen)
        self._agent.emit(AgentMessage(status=self._status))
        self._agent.concluded()
