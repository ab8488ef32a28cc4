"""The supervisor without a master: silence of a living process, an end that waits for every exit, and devices."""

from __future__ import annotations

import asyncio
import os
import signal
from dataclasses import replace
from typing import Any

import pytest

from harness.supervised import Received, supervise
from pscluster.agent import metrics
from pscluster.agent.child import GracePeriods
from pscluster.agent.status import NONE, SILENT
from pscluster.agent.supervisor import Supervisor
from pscluster.v1.agents_pb2 import Assignment, ProcessStatus
from pscluster.v1.plan_pb2 import Beat, ProcessReport, ProcessSpec, TrainerReady

pytestmark = pytest.mark.timeout(60)


def test_a_stopped_process_is_noticed_once(bench: Any) -> None:
    async def body(supervisor: Supervisor, received: Received) -> None:
        supervisor.apply(Assignment(processes=[bench.trainer("trainer-0", "count")]))
        await received.until(lambda: "trainer_ready" in received.bodies())
        os.kill(supervisor.states()[0].status.pid, signal.SIGSTOP)
        now = asyncio.get_running_loop().time()
        counter = metrics.SUSPICIONS.labels(kind="silent")._value
        before = counter.get()
        supervisor.check_heartbeats(now + 1.5)
        assert counter.get() == before
        supervisor.check_heartbeats(now + 20)
        supervisor.check_heartbeats(now + 30)
        assert counter.get() == before + 1
        statuses = [message.status for message in received.messages if message.HasField("status")]
        assert [status.suspicion for status in statuses] == [NONE, SILENT]
        assert statuses[-1].phase == ProcessStatus.PHASE_RUNNING
        assert supervisor.states()[0].status.suspicion == SILENT

    supervise(bench, body)


def test_a_process_that_stops_before_it_is_ready_is_noticed_later(bench: Any) -> None:
    async def body(supervisor: Supervisor, received: Received) -> None:
        supervisor.apply(Assignment(processes=[bench.trainer("trainer-0", "mute")]))
        await received.until(lambda: bool(received.messages))
        (process,) = supervisor._processes.values()
        assert process.last_heartbeat is not None
        supervisor.check_heartbeats(process.last_heartbeat.at_s + 119)
        assert supervisor.states()[0].status.suspicion == NONE
        supervisor.check_heartbeats(process.last_heartbeat.at_s + 121)
        assert supervisor.states()[0].status.suspicion == SILENT

    supervise(bench, body)


def test_a_process_slow_to_load_has_time_for_its_first_heartbeat(bench: Any) -> None:
    async def body(supervisor: Supervisor, received: Received) -> None:
        supervisor.apply(Assignment(processes=[bench.trainer("trainer-0", "mute")]))
        await received.until(lambda: bool(received.messages))
        (process,) = supervisor._processes.values()
        assert process.last_heartbeat is not None
        process.last_heartbeat = replace(
            process.last_heartbeat, at_s=process.last_heartbeat.at_s - 60
        )  # so long it has loaded
        process._handle_report(ProcessReport(trainer_ready=TrainerReady()))
        supervisor.check_heartbeats(asyncio.get_running_loop().time())
        assert supervisor.states()[0].status.suspicion == NONE

    supervise(bench, body)


def test_a_process_that_sends_heartbeats_again_is_no_longer_suspected(bench: Any) -> None:
    async def body(supervisor: Supervisor, received: Received) -> None:
        supervisor.apply(Assignment(processes=[bench.trainer("trainer-0", "beating")]))
        await received.until(lambda: "trainer_ready" in received.bodies())
        supervisor.check_heartbeats(asyncio.get_running_loop().time() + 20)
        assert supervisor.states()[0].status.suspicion == SILENT
        watching = asyncio.create_task(supervisor.watch())
        await received.until(
            lambda: received.messages[-1].HasField("status") and not received.messages[-1].status.suspicion
        )
        watching.cancel()

    supervise(bench, body)


def test_unreached_partitions_are_reported_once_and_when_reached_again(bench: Any) -> None:
    async def body(supervisor: Supervisor, received: Received) -> None:
        supervisor.apply(Assignment(processes=[bench.trainer("trainer-0", "cut_off")]))
        await received.until(lambda: "trainer_ready" in received.bodies())
        (process,) = supervisor._processes.values()
        assert process.last_heartbeat is not None
        now = process.last_heartbeat.at_s
        for _ in range(2):
            supervisor.check_heartbeats(now)
        process.last_heartbeat = replace(process.last_heartbeat, beat=Beat())
        supervisor.check_heartbeats(now)
        statuses = [message.status.unreached for message in received.messages if message.HasField("status")]
        assert [(status.generation, list(status.partitions)) for status in statuses] == [(0, []), (3, [1]), (0, [])]
        assert not any(message.status.suspicion for message in received.messages)

    supervise(bench, body)


def test_a_suspected_process_is_killed_at_once(bench: Any) -> None:
    async def body(supervisor: Supervisor, received: Received) -> None:
        supervisor._grace = GracePeriods(terminate_s=1000, kill_s=1000)
        supervisor.apply(Assignment(processes=[bench.trainer("trainer-0", "count")]))
        await received.until(lambda: "trainer_ready" in received.bodies())
        os.kill(supervisor.states()[0].status.pid, signal.SIGSTOP)
        supervisor.check_heartbeats(asyncio.get_running_loop().time() + 20)
        supervisor.apply(Assignment())
        await received.until(lambda: received.messages[-1].status.phase == ProcessStatus.PHASE_EXITED)
        assert received.messages[-1].status.signal == signal.SIGKILL

    supervise(bench, body)


def test_close_waits_for_every_exit_and_starts_nothing_more(bench: Any) -> None:
    async def body(supervisor: Supervisor, received: Received) -> None:
        named = Assignment(processes=[bench.trainer("trainer-0", "serve"), bench.trainer("trainer-1", "be_stubborn")])
        supervisor.apply(named)
        await received.until(lambda: received.bodies().count("trainer_ready") == 2)
        await supervisor.close()
        assert [m.status.phase for m in received.messages if m.HasField("status")][-2:] == [
            ProcessStatus.PHASE_EXITED
        ] * 2
        supervisor.apply(Assignment(processes=[bench.trainer("trainer-2", "serve")]))
        assert len(supervisor.states()) == 2

    supervise(bench, body)


def test_a_process_ended_before_its_start_is_reported(bench: Any) -> None:
    async def body(supervisor: Supervisor, received: Received) -> None:
        supervisor.apply(Assignment(processes=[bench.trainer("trainer-0", "serve", bundle_sha256="0" * 64)]))
        supervisor.apply(Assignment())
        await received.until(lambda: "status" in received.bodies())
        status = received.messages[-1].status
        assert (status.phase, status.expected, status.exit_code) == (ProcessStatus.PHASE_EXITED, True, 127)
        supervisor.apply(Assignment())
        assert supervisor.states() == []

    supervise(bench, body)


def test_a_master_with_an_older_database_hears_that_what_it_asks_for_is_over(bench: Any) -> None:
    async def body(supervisor: Supervisor, received: Received) -> None:
        named = Assignment(processes=[bench.trainer("trainer-0", "fail")])
        supervisor.apply(named)
        await received.until(lambda: "status" in received.bodies() and received.messages[-1].status.exit_code == 3)
        statuses = len(received.messages)
        supervisor.apply(named)
        assert len(received.messages) == statuses, "it was reported, and waits to be acknowledged"
        supervisor.apply(Assignment())
        supervisor.apply(named)
        status = received.messages[-1].status
        assert (status.phase, status.expected, status.exit_code) == (ProcessStatus.PHASE_EXITED, True, 127)
        assert supervisor.states() == []

    supervise(bench, body)


def test_an_unreadable_spec_is_reported(bench: Any) -> None:
    async def body(supervisor: Supervisor, received: Received) -> None:
        spec = bench.trainer("trainer-0", "serve")
        spec.spec_json = "{"
        supervisor.apply(Assignment(processes=[spec]))
        await received.until(lambda: "status" in received.bodies())
        assert received.messages[-1].status.error.code == "PS-9001"

    supervise(bench, body)


# ---- devices ----


def on_device(bench: Any, name: str, device: str, mode: str = "serve") -> ProcessSpec:
    spec: ProcessSpec = bench.trainer(name, mode)
    spec.spec_json = f'{{"mode": "{mode}", "workers": {{"device": "{device}"}}}}'
    return spec


def reported(received: Received) -> dict[str, str]:
    """Where each trainer that is ready computes, as it was told."""
    events = [message.event for message in received.messages if message.HasField("event")]
    return {event.process_id.split("/")[1]: event.report.trainer_ready.device for event in events}


def test_each_trainer_gets_a_device_of_its_own(bench: Any) -> None:
    async def body(supervisor: Supervisor, received: Received) -> None:
        wanted = {"trainer-0": "auto", "trainer-1": "auto", "trainer-2": "cpu", "trainer-3": "cuda:0"}
        supervisor.apply(Assignment(processes=[on_device(bench, name, device) for name, device in wanted.items()]))
        await received.until(lambda: len(reported(received)) == 4)
        given = {"trainer-0": "cuda:1", "trainer-1": "cpu", "trainer-2": "cpu", "trainer-3": "cuda:0"}
        assert reported(received) == given

    supervise(bench, body, ["cuda:0", "cuda:1"])


def test_a_partition_gets_no_device(bench: Any) -> None:
    async def body(supervisor: Supervisor, received: Received) -> None:
        partition = on_device(bench, "partition-0", "cuda")
        partition.kind = ProcessSpec.KIND_PARTITION
        supervisor.apply(Assignment(processes=[partition]))
        await received.until(lambda: bool(reported(received)))
        assert reported(received) == {"partition-0": ""}

    supervise(bench, body, ["cuda:0"])


@pytest.mark.parametrize(
    ("device", "present", "cause"), [("cuda", [], "no CUDA device"), ("cuda:3", ["cuda:0", "cuda:1"], "cuda:0..1")]
)
def test_a_trainer_without_its_device_is_not_started_and_says_why(
    bench: Any, device: str, present: list[str], cause: str
) -> None:
    async def body(supervisor: Supervisor, received: Received) -> None:
        supervisor.apply(Assignment(processes=[on_device(bench, "trainer-0", device)]))
        await received.until(lambda: "status" in received.bodies())
        status = received.messages[-1].status
        assert (status.exit_code, status.pid, status.error.code) == (127, 0, "PS-4004")
        assert cause in status.error.cause

    supervise(bench, body, present)


def test_the_next_trainer_waits_until_the_former_one_is_gone(bench: Any) -> None:
    async def body(supervisor: Supervisor, received: Received) -> None:
        supervisor.apply(Assignment(processes=[on_device(bench, "trainer-0", "cuda", "be_stubborn")]))
        await received.until(lambda: "trainer_ready" in received.bodies())
        supervisor.apply(Assignment(processes=[on_device(bench, "trainer-1", "cuda")]))
        await received.until(lambda: len(reported(received)) == 2)
        assert reported(received)["trainer-1"] == "cuda:0"
        statuses = [
            (m.status.process_id.split("/")[1], m.status.phase) for m in received.messages if m.HasField("status")
        ]
        assert statuses.index(("trainer-0", ProcessStatus.PHASE_EXITED)) < statuses.index(
            ("trainer-1", ProcessStatus.PHASE_RUNNING)
        )

    supervise(bench, body, ["cuda:0"])
