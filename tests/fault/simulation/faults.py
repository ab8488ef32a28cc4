"""What may go wrong: each fault strikes somebody who is there, and says so; `Faults` knows how often each did."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.fault.simulation.schedule import Life

KILLS = ("kill_trainer", "kill_partition", "kill_worker", "kill_server", "kill_master", "kill_while_writing")
OTHERS = (
    "stop",
    "stall_trainer",
    "slow_trainer",
    "replace_node",
    "cut_data",
    "cut_votes",
    "sever",
    "cut_control",
    "block_one_way",
    "block_both_ways",
    "isolate",
    "slow_host",
    "slow_disk",
    "disk_full",
    "clock_jump",
    "leave",
    "drain",
    "power_loss",
    "damage_snapshot",
    "user_stops",
)
KINDS = KILLS + OTHERS


class Faults:
    """Strikes a simulation. Each kind is a method that returns whom it struck; empty: nobody was there."""

    def __init__(self, sim: Any) -> None:
        self.sim = sim
        self.struck: Counter[str] = Counter()
        self._random = sim.schedule.random
        self._mended: dict[int, Callable[[], None]] = {}
        self._numbers = 0

    def strike(self, kind: str) -> None:
        whom = getattr(self, kind)()
        if whom:
            self.struck[kind] += 1
            self.sim.schedule.tell(f"FAULT {kind}: {whom}")

    def mend_all(self) -> None:
        """No fault goes on."""
        for mend in list(self._mended.values()):
            mend()
        self._mended.clear()

    def _for_a_while(self, low_s: float, high_s: float, mend: Callable[[], None]) -> None:
        """Have a fault end by itself, or with all of them."""
        self._numbers += 1
        number = self._numbers
        self._mended[number] = mend

        def ends() -> None:
            if self._mended.pop(number, None) is not None:
                mend()

        self.sim.schedule.after(self.sim.schedule.between(low_s, high_s), "a fault ends", ends)

    def _one(self, candidates: list[Any]) -> Any:
        return self._random.choice(candidates) if candidates else None

    # kills; whoever restarts daemons does

    def _kill_child(self, kind: str) -> str:
        child = self._one([child for child in self.sim.children() if f"/{kind}-" in child.spec.process_id])
        if child is None:
            return ""
        child.kill()
        return str(child.spec.process_id)

    def kill_trainer(self) -> str:
        return self._kill_child("trainer")

    def kill_partition(self) -> str:
        return self._kill_child("partition")

    def _kill_agent(self, role: str) -> str:
        agent = self._one([agent for agent in self.sim.agents.values() if agent.node_id.startswith(role)])
        if agent is None:
            return ""
        agent.life.end()
        return str(agent.node_id)

    def kill_worker(self) -> str:
        return self._kill_agent("worker")

    def kill_server(self) -> str:
        return self._kill_agent("server")

    def kill_master(self) -> str:
        if self.sim.master is None:
            return ""
        self.sim.master.life.end()
        return "master"

    def kill_while_writing(self) -> str:
        """The master, the next time that something is on its way to its disk."""
        if self.sim.master is None:
            return ""
        self.sim.disk.kills_next_write = True
        self._for_a_while(2.0, 2.0, self._spare)
        return "master"

    def _spare(self) -> None:
        self.sim.disk.kills_next_write = False

    def power_loss(self) -> str:
        for agent in list(self.sim.agents.values()):
            agent.life.end()
        self.kill_master()
        self.sim.disk.power_loss()
        self.sim.monitor.files_survived()
        return "everybody"

    def leave(self) -> str:
        """An agent is told to end, and does so properly."""
        agent = self._one([agent for agent in self.sim.agents.values() if not agent.life.stopped])
        if agent is None:
            return ""
        agent.leave()
        return str(agent.node_id)

    def drain(self) -> str:
        """People want a node empty, and after a while no longer."""
        drained = self.sim.people.drained
        node_id = self._one([node_id for node_id in self.sim.nodes if node_id not in drained])
        if node_id is None:
            return ""
        drained.add(node_id)
        self._for_a_while(1.0, 10.0, lambda: drained.discard(node_id))
        return str(node_id)

    # what goes on by itself after a while

    def stop(self) -> str:
        """SIGSTOP, and SIGCONT after a while."""
        life: Life | None = self._one([life for life in self.sim.lives() if not life.stopped])
        if life is None:
            return ""
        life.stop()
        self._for_a_while(0.1, 6.0, life.go_on)
        return life.name

    def stall_trainer(self) -> str:
        """A microbatch takes for ever, or nearly; the process beats on."""
        child = self._one([child for child in self.sim.children() if "/trainer-" in child.spec.process_id])
        if child is None:
            return ""
        self.sim.stalls[child.life] = self.sim.schedule.between(1.0, 15.0)
        return str(child.spec.process_id)

    def slow_trainer(self) -> str:
        """It computes much more slowly than the others, for a while."""
        child = self._one([child for child in self.sim.children() if "/trainer-" in child.spec.process_id])
        if child is None:
            return ""
        life, sluggish = child.life, self.sim.sluggish
        sluggish[life] = self._random.choice((3.0, 10.0))
        self._for_a_while(2.0, 20.0, lambda: sluggish.pop(life, None))
        return str(child.spec.process_id)

    def replace_node(self) -> str:
        """A machine freezes and another one takes its name; then it thaws, and believes what it believed."""
        agent = self._one([agent for agent in self.sim.agents.values() if not agent.life.stopped])
        if agent is None:
            return ""
        lives = [agent.life, *(child.life for child in agent.children.values() if child.life is not None)]
        for life in lives:
            life.stop()
        self.sim.replace(agent)

        def thaw() -> None:
            for life in lives:
                life.go_on()

        self._for_a_while(0.5, 6.0, thaw)
        return str(agent.node_id)

    def cut_data(self) -> str:
        return self._cut([end for end in self.sim.network.connections() if end.other.host != "master"])

    def cut_votes(self) -> str:
        """Between a partition and the coordinator."""
        ends = [end for end in self.sim.network.connections() if "/partition-" in end.life.name]
        return self._cut(ends)

    def cut_control(self) -> str:
        return self._cut([end for end in self.sim.network.connections() if end.other.host == "master"])

    def sever(self) -> str:
        """A worker and a server no longer reach each other, though the master hears both: connections break, and none
        can be made for a while."""
        workers = [host for host in self.sim.hosts if host.startswith("worker")]
        server = self._random.choice([host for host in self.sim.hosts if host.startswith("server")])
        worker = self._random.choice(workers)
        struck = self._block([(worker, server), (server, worker)])
        for end in self.sim.network.connections() if struck else ():
            if {end.host, end.other.host} == {worker, server}:
                self.sim.network.cut(end)
        return struck

    def _cut(self, ends: list[Any]) -> str:
        end = self._one(ends)
        if end is None:
            return ""
        self.sim.network.cut(end)
        return f"{end.life.name} and {end.other.life.name}"

    def block_one_way(self) -> str:
        source, target = self._random.sample(self.sim.hosts, 2)
        return self._block([(source, target)])

    def block_both_ways(self) -> str:
        source, target = self._random.sample(self.sim.hosts, 2)
        return self._block([(source, target), (target, source)])

    def isolate(self) -> str:
        """One host from all others, in one direction or in both."""
        host = self._random.choice(self.sim.hosts)
        others = [other for other in self.sim.hosts if other != host]
        out, back = [(host, other) for other in others], [(other, host) for other in others]
        return self._block(self._random.choice((out, back, out + back)))

    def _block(self, pairs: list[tuple[str, str]]) -> str:
        network = self.sim.network
        fresh = [pair for pair in pairs if not network.is_blocked(*pair)]
        if not fresh:
            return ""
        for source, target in fresh:
            network.block(source, target)

        def heal() -> None:
            for source, target in fresh:
                network.unblock(source, target)

        self._for_a_while(0.2, 7.0, heal)
        return ", ".join(f"{source} to {target}" for source, target in fresh)

    def slow_host(self) -> str:
        host = self._random.choice(self.sim.hosts)
        slow = self.sim.network.slow_hosts
        slow[host] = self._random.choice((5.0, 50.0))
        self._for_a_while(0.5, 5.0, lambda: slow.pop(host, None))
        return host

    def slow_disk(self) -> str:
        self.sim.disk.slowness = 10.0
        self._for_a_while(0.5, 4.0, self._hasten)
        return "all disks"

    def _hasten(self) -> None:
        self.sim.disk.slowness = 1.0

    def disk_full(self) -> str:
        self.sim.disk.is_full = True
        self._for_a_while(0.2, 3.0, self._free)
        return "all disks"

    def _free(self) -> None:
        self.sim.disk.is_full = False

    def clock_jump(self) -> str:
        by_s = self._random.choice((-3600.0, -5.0, 5.0, 3600.0))
        self.sim.schedule.wall_offset_s += by_s
        return f"wall clocks by {by_s:+.0f} s"

    def damage_snapshot(self) -> str:
        """Tear a file that the catalogue counts, or flip one of its bits."""
        found = [
            Path(job.store) / part.path
            for job in self.sim.jobs()
            if not job.state.ended
            for part in self.sim.master.core.state.catalogues[job.job_id].parts.values()
        ]
        path = self._one([path for path in found if path.exists() and str(path) not in self.sim.monitor.damaged])
        if path is None:
            return ""
        self.sim.monitor.damaged.add(str(path))
        place = self._random.randrange(path.stat().st_size)
        if self._random.random() < 0.5:
            os.truncate(path, place)
        else:
            data = bytearray(path.read_bytes())
            data[place] ^= 1 << self._random.randrange(8)
            path.write_bytes(data)
        return str(path.name)

    def user_stops(self) -> str:
        job = self._one([job for job in self.sim.jobs() if not job.state.ended and not job.stopping])
        if job is None:
            return ""
        self.sim.people.stop(job.job_id)
        return str(job.job_id)
