"""What the master knows of devices: who holds which, and that no agent is asked for one that it cannot give."""

from __future__ import annotations

import random
import re
from dataclasses import replace

import pytest

from pscluster.devices import choose_device, device_priority
from psmaster.api import proto
from psmaster.model.job import ErrorInfo, JobState
from psmaster.model.plan import ProcessKind
from psmaster.model.state import node_views
from psmaster.scheduling.reconcile import desired
from tests.harness.master_world import PARTITION, TRAINER, World

ONE = {"min": 1, "max": 1}


def rooms(world: World, node_id: str = "worker-0") -> tuple[int, int, int]:
    """How many trainers of a job that is not there yet a node has room for: "cuda", "cuda:0", "cuda:1"."""
    state = world.state
    node = node_views(state.jobs, state.nodes, "", world.now, world.limits.suspicion_s)[node_id]
    return node.free_slots("cuda"), node.free_slots("cuda:0"), node.free_slots("cuda:1")


@pytest.fixture
def world() -> World:
    """One worker with two devices and three slots, and a server with room for all."""
    world = World()
    world.join("worker-0", slots=3, num_devices=2)
    world.join("server-0", slots=99)
    return world


def test_a_job_waits_for_a_device_and_says_so(world: World) -> None:
    world.submit(workers={"min": 3, "device": "cuda"})
    assert re.search("3 workers.*CUDA.* 2 ", world.job().reason)
    world.join("worker-1", num_devices=1)
    assert world.job().state is JobState.STARTING


@pytest.mark.parametrize(
    ("device", "left"), [("cpu", (2, 1, 1)), ("auto", (1, 0, 0)), ("cuda", (1, 0, 0)), ("cuda:1", (1, 1, 0))]
)
def test_a_starting_trainer_may_take_any_that_fits(world: World, device: str, left: tuple[int, int, int]) -> None:
    world.submit(workers=ONE | {"device": device})
    assert rooms(world) == left


@pytest.mark.parametrize(("received", "left"), [("cpu", (2, 1, 1)), ("cuda:1", (1, 1, 0))])
def test_what_a_ready_trainer_told_is_what_it_holds(world: World, received: str, left: tuple[int, int, int]) -> None:
    world.submit(workers=ONE)
    world.report("trainer-0", replace(TRAINER, device=received))
    assert rooms(world) == (1, 0, 0), "not counted on yet"
    world.ready()
    assert rooms(world) == left
    assert [placement.device for placement in world.job().trainers] == [received]
    world.restart()
    assert [placement.device for placement in world.job().trainers] == [received]


def test_a_device_is_free_again_when_its_trainer_is_lost(world: World) -> None:
    world.submit(workers=ONE | {"device": "cuda"})
    world.report("trainer-0", replace(TRAINER, device="cuda:1"))
    world.ready()
    world.exit("trainer-0", signal=9)
    assert world.job().trainers[0].device == ""
    assert rooms(world) == (1, 0, 0), "its replacement may take either"


def test_the_jobs_placements_are_shown_with_their_devices(world: World) -> None:
    world.submit(workers={"min": 1, "max": 3})
    for rank, device in enumerate(("cuda:0", "cuda:1", "cpu")):
        world.report(f"trainer-{rank}", replace(TRAINER, device=device))
    world.ready()
    message = proto.job(world.job(), (), world.now, full=True)
    assert [placement.device for placement in message.plan.trainers] == ["cuda:0", "cuda:1", "cpu"]


def test_a_placement_without_a_node_says_which_worker_it_waits_for(world: World) -> None:
    world.submit(workers=ONE | {"device": "cuda"})
    world.ready()
    world.snapshot(0)
    world.commit(1)
    world.take(lambda tx: tx.detach("worker-0", world.lives["worker-0"], for_good=True))
    world.join("worker-1", slots=3)
    assert re.search("CUDA.*trainer-0", world.job().reason)


def test_an_agent_that_had_none_is_quoted(world: World) -> None:
    world.submit(workers=ONE | {"device": "cuda"})
    for _ in range(6):
        info = ErrorInfo(code="PS-4004", cause="all 2 CUDA devices here are taken by other trainers")
        world.exit("trainer-0", exit_code=127, error=info)
        world.wait(8)
    job = world.job()
    assert job.state is JobState.FAILED
    assert job.error is not None
    assert job.error.code == "PS-4004"
    received = [event.message for event in world.events if event.reason == "TrainerLost"]
    assert received[0].startswith(
        "trainer-0 on worker-0 could not be started: PS-4004: all 2 CUDA devices here are taken"
    )


@pytest.mark.parametrize("seed", range(60))
def test_no_agent_is_asked_for_a_device_that_it_cannot_give(seed: int) -> None:
    """Jobs come, become ready, lose trainers and end in any order; each agent chooses as the real one does."""
    chance = random.Random(seed)
    world = World()
    world.join("server-0", slots=999)
    present = {f"worker-{index}": tuple(f"cuda:{n}" for n in range(index)) for index in range(4)}
    for index, node_id in enumerate(present):
        world.join(node_id, slots=3, num_devices=index)
    agents: dict[str, dict[str, str]] = {node_id: {} for node_id in present}  # of each: process -> its device
    for number in range(60):
        act(world, chance, number, agents)
        follow(world, agents, present)
        if chance.random() < 0.3:
            world.wait(0.5)  # who was lost before it was ready starts again after a while
            follow(world, agents, present)


def test_the_modest_choose_first_when_all_come_at_once() -> None:
    """Admitted in one turn, by priority; an assignment lists jobs by age."""
    world = World()
    world.join("server-0", slots=99)
    for job_id, device, priority in (("a", "auto", 0), ("b", "cuda", 1), ("c", "cuda:0", 2)):
        world.submit(job_id, workers=ONE | {"device": device}, priority=priority)
    world.join("worker-0", slots=3, num_devices=2)
    assert [world.job(name).state for name in "abc"] == [JobState.STARTING] * 3
    agents: dict[str, dict[str, str]] = {"worker-0": {}}
    follow(world, agents, {"worker-0": ("cuda:0", "cuda:1")})
    assert sorted(agents["worker-0"].items()) == [
        ("a/trainer-0/1", "cpu"),
        ("b/trainer-0/1", "cuda:1"),
        ("c/trainer-0/1", "cuda:0"),
    ]


def act(world: World, chance: random.Random, number: int, agents: dict[str, dict[str, str]]) -> None:
    """One thing happens."""
    live = [job for job in world.state.jobs.values() if not job.state.ended]
    if not live or chance.random() < 0.3:
        device = chance.choice(["auto", "cpu", "cuda", "cuda:0", "cuda:1", "cuda:2"])
        workers = {"min": chance.randint(1, 3), "max": 4, "device": device}
        world.submit(f"job-{number:06}", workers=workers, servers={"partitions": 1}, priority=chance.randint(0, 9))
        return
    job = chance.choice(live)
    placements = [placement for placement in job.trainers if placement.placed and not placement.held_back]
    if placements and chance.random() < 0.3:
        world.exit(chance.choice(placements).name, job.job_id, signal=9)
    elif chance.random() < 0.2:
        world.take(lambda tx: tx.stop(job.job_id))
    else:
        for name, process in world.wanted(job.job_id).items():
            if name not in world.wanted(job.job_id) or process.placement.active:
                continue
            if process.placement.kind is ProcessKind.PARTITION:
                world.report(name, PARTITION, job.job_id)
            elif process.process_id not in world.state.processes:
                device = agents[process.placement.node_id][process.process_id]
                world.report(name, replace(TRAINER, device=device), job.job_id)


def follow(world: World, agents: dict[str, dict[str, str]], present: dict[str, tuple[str, ...]]) -> None:
    """Each agent ends what it is no longer to run, then gives each new trainer a device, the modest ones first."""
    wanted = {node_id: dict[str, str]() for node_id in present}
    for job in world.state.jobs.values():
        for process in desired(job):
            if process.placement.kind is ProcessKind.TRAINER:
                wanted[process.placement.node_id][process.process_id] = job.spec.workers.device
    for node_id, processes in wanted.items():
        agents[node_id] = {name: device for name, device in agents[node_id].items() if name in processes}
        for process_id, device in sorted(processes.items(), key=lambda item: device_priority(item[1])):
            given = agents[node_id]
            if process_id not in given:
                chosen = choose_device(device, present[node_id], given.values())
                assert chosen is not None
                given[process_id] = chosen
        cuda = [device for device in agents[node_id].values() if device != "cpu"]
        assert len(cuda) == len(set(cuda))
