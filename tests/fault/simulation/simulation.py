"""A whole cluster in one process: master, agents, partitions, trainers and people, on one virtual clock.

A seed is a history: `Setting.of(seed)` says how big the cluster is and what goes wrong, `Simulation.run` lets it
happen. `python -m tests.fault.simulation 1234` prints the history of seed 1234 until it ends or a promise is broken.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from functools import lru_cache
from typing import Any

from psmaster.model.job import Job
from tests.fault.simulation import ending, model
from tests.fault.simulation.agent import Agent, restart_after_s
from tests.fault.simulation.child import Child
from tests.fault.simulation.dataplane import bears_unruliness
from tests.fault.simulation.disk import Disks
from tests.fault.simulation.faults import Faults
from tests.fault.simulation.installed import installed
from tests.fault.simulation.invariants import Monitor, Violation
from tests.fault.simulation.master import Master
from tests.fault.simulation.model import Reference
from tests.fault.simulation.network import Network
from tests.fault.simulation.people import People
from tests.fault.simulation.schedule import Life, Schedule
from tests.fault.simulation.setting import Setting

MOST_EVENTS = 400_000


@lru_cache(maxsize=16)
def reference_of(shards: int) -> Reference:
    """What every version of a job of so many shards is: one trainer, one partition, nothing goes wrong."""
    simulation = Simulation(Setting(shards=shards, seed=shards), None)
    simulation.run()
    return replace(simulation.monitor.recorded, losses=simulation.losses)


class Simulation:
    """One history. `reported` hears its trace, line by line."""

    def __init__(
        self, setting: Setting, reference: Reference | None, reported: Callable[[str], None] | None = None
    ) -> None:
        self.setting = setting
        self.schedule = Schedule(setting.seed)
        self.schedule.reported = reported
        self.network = Network(self.schedule, latency_s=setting.latency_s, unruly=setting.unruly)
        self.network.bears = bears_unruliness
        self.disk = Disks(self, sqlite=setting.sqlite)
        self.monitor = Monitor(reference)
        self.faults = Faults(self)
        self.people = People(self)
        self.agents: dict[str, Agent] = {}
        self.former: list[Agent] = []  # frozen, and replaced meanwhile
        self.stalls: dict[Life, float] = {}  # how long a process's next microbatch takes
        self.sluggish: dict[Life, float] = {}  # how many times as long each of a process's microbatches takes
        self.master: Master | None = None
        self.losses: dict[int, float] = {}
        self.deadline_s = setting.storm_s + setting.liveness_s
        self._numbers = 0
        self._is_calm = False
        self._is_closing = False
        workers = [f"worker-{index}" for index in range(setting.workers)]
        self.nodes = workers + [f"server-{index}" for index in range(setting.servers)]
        self.hosts = ["master", *self.nodes]

    # a history

    def run(self) -> None:
        """Let it happen. Raises Violation, or whatever a process of the product raised."""
        with installed(self):
            try:
                self._begin()
                looked_at = 0
                while self.monitor.num_turns == looked_at or not ending.is_over(self):
                    looked_at = self.monitor.num_turns
                    self._step()
                ending.check(self)
            finally:
                self._clear_away()

    def _step(self) -> None:
        schedule = self.schedule
        if schedule.now_s >= self.deadline_s:
            raise Violation(f"not over {self.setting.liveness_s:.0f} s after the faults: {ending.describe(self)}")
        if schedule.num_events >= MOST_EVENTS or not schedule.step():
            raise Violation(f"nothing happens any more, or the same for ever: {ending.describe(self)}")
        self.monitor.check()

    def settle(self, seconds: float, until: Callable[[], bool]) -> None:
        """Let time pass until something holds, but no longer than that."""
        until_s = self.schedule.now_s + seconds
        self.deadline_s = max(self.deadline_s, until_s + 1.0)
        while self.schedule.now_s < until_s and not until():
            self._step()

    def _begin(self) -> None:
        self.master = Master(self)
        for node_id in self.nodes:
            self.schedule.after(self.schedule.between(0.0, 0.05), "", lambda node_id=node_id: self._start(node_id))
        for number in range(self.setting.jobs):
            self.schedule.after(0.05, "", lambda number=number: self._submit(number))
        self.schedule.after(0.5, "", self.people.look_after)
        if self.setting.faults:
            self._next_fault()
            self.schedule.after(self.setting.storm_s, "the storm is over", self.calm)

    def _submit(self, number: int) -> None:
        setting = self.setting
        evaluate = {"every_steps": setting.evaluate_every} if setting.evaluate_every else {}
        spec = model.make_spec(
            f"job{number}",
            shards=setting.shards,
            steps=setting.steps,
            workers=setting.workers,
            partitions=setting.partitions,
            durability={"every_steps": setting.snapshot_every, "tier": setting.tier},
            evaluate=evaluate,
            audit={"share": setting.audit_share},
        )
        self.people.submit(spec, f"request {number}")

    def _next_fault(self) -> None:
        wait_s = self.schedule.random.expovariate(1.0 / self.setting.every_s)
        if self.schedule.now_s + wait_s < self.setting.storm_s:
            self.schedule.after(wait_s, "", self._strike)

    def _strike(self) -> None:
        if self._is_calm:
            return
        kinds, weights = zip(*self.setting.faults.items(), strict=True)
        self.faults.strike(self.schedule.random.choices(kinds, weights)[0])
        self._next_fault()

    def calm(self) -> None:
        """No fault goes on, and no other comes."""
        self._is_calm = True
        self.faults.mend_all()

    # who is there

    def jobs(self) -> list[Job]:
        """As the master shows them; none while there is no master."""
        return list(self.master.core.state.jobs.values()) if self.master is not None else []

    def children(self) -> list[Child]:
        """The living processes of jobs."""
        return [
            child
            for agent in (*self.agents.values(), *self.former)
            for child in agent.children.values()
            if child.life is not None and child.life.alive
        ]

    def lives(self) -> list[Life]:
        """Every living process."""
        lives = [agent.life for agent in (*self.agents.values(), *self.former)]
        lives += [child.life for child in self.children() if child.life is not None]
        return [*lives, *([self.master.life] if self.master is not None else [])]

    def compute_s(self, life: Life) -> float:
        """How long a microbatch takes."""
        stall_s = self.stalls.pop(life, 0.0)
        return stall_s + self.sluggish.get(life, 1.0) * self.setting.compute_s * self.schedule.between(0.5, 1.5)

    def new_number(self) -> int:
        """One that was never given before."""
        self._numbers += 1
        return self._numbers

    def new_address(self, host: str) -> str:
        return f"tcp:{host}:{self.new_number()}"

    # daemons are started again

    def _start(self, node_id: str) -> None:
        self.agents[node_id] = Agent(self, node_id)

    def agent_ended(self, agent: Agent) -> None:
        if self._is_closing:
            return
        if agent in self.former:
            self.former.remove(agent)
            return
        del self.agents[agent.node_id]
        self._start_later(agent.node_id)

    def replace(self, agent: Agent) -> None:
        """Another machine takes the place of one that still lives."""
        del self.agents[agent.node_id]
        self.former.append(agent)
        self._start_later(agent.node_id)

    def _start_later(self, node_id: str) -> None:
        self.schedule.after(restart_after_s(self), f"{node_id} is started", lambda: self._start(node_id))

    def master_ended(self) -> None:
        if self._is_closing:
            return
        self.master = None
        self.schedule.after(restart_after_s(self), "the master is started", self._start_master)

    def _start_master(self) -> None:
        self.master = Master(self)

    # the world around it

    def _clear_away(self) -> None:
        self._is_closing = True
        for life in self.lives():
            life.end()
        shutil.rmtree(self.disk.directory, ignore_errors=True)


def run_seed(seed: int, reported: Callable[[str], None] | None = None, **changes: Any) -> Simulation:
    """The history of a seed, `changes` made to its setting. What ends it too early, a Violation most of all, names the
    seed."""
    setting = replace(Setting.of(seed), **changes)
    simulation = Simulation(setting, reference_of(setting.shards), reported)
    try:
        simulation.run()
    except BaseException as error:
        error.add_note(f"at {simulation.schedule.now_s:.5f} s of seed {seed}; see it by: make simulate SEED={seed}")
        raise
    return simulation
