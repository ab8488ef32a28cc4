"""Training without a master: a real minute, and ten by an injected clock; followers and agents reconnect."""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from pathlib import Path
from typing import Any

from harness.cluster import local_cluster
from harness.jobs import lm_spec
from harness.paced_task import paced_spec
from harness.plain import train_plainly
from pscluster.agent.report_queue import ReportQueue
from pscluster.v1.agents_pb2 import AgentMessage, LogLine, LogLines, ProcessEvent
from pscluster.v1.plan_pb2 import ProcessReport, Progress, SnapshotPart, StepRecord
from psmaster.api import proto
from tests.harness.master_world import PARTITION, World

AWAY_S = float(os.environ.get("PSCLUSTER_MASTER_AWAY_S", "60"))
STEPS = 400


def test_steps_go_on_for_a_minute_and_a_follower_sees_the_end(tmp_path: Path) -> None:
    digest = train_plainly(lm_spec(steps=STEPS, layers=1, d_model=32, heads=2)).digest
    spec, pace = paced_spec(lm_spec(steps=STEPS, layers=1, d_model=32, heads=2, partitions=2), tmp_path, slow_s=0.1)
    with local_cluster(tmp_path, workers=2, servers=2) as cluster:
        job = cluster.submit(spec | {"workers": {"min": 1, "max": 2}}, tmp_path)
        follower = cluster.start("follow", job)
        cluster.wait(job, "step=5")
        names = ("worker-0", "worker-1", "server-0", "server-1")
        running = {cluster.child(name).pid for name in names}
        cluster.kill(cluster.daemon("master"))
        killed_s = time.time()
        threading.Event().wait(AWAY_S)  # the time without a master is what is tested
        assert {cluster.child(name).pid for name in names} == running
        cluster.up(2, 2)
        back_s = time.time()
        pace.unlink()
        cluster.wait(job, "succeeded")
        answer = cluster.describe(job)
        assert answer["parameters_sha256"] == digest
        assert answer["generation"] == 1  # no process was lost, moved or restarted
        out, lines = follower.communicate(timeout=60)
        assert (follower.returncode, out) == (0, ""), lines
        assert f"{job} SUCCEEDED at step {STEPS}" in lines
        text = (cluster.state_dir / "master" / "jobs" / job / "metrics.jsonl").read_text()
    times = {line["step"]: line["time_s"] for line in map(json.loads, text.splitlines()) if "time_s" in line}
    assert sorted(times) == list(range(1, STEPS + 1))  # later reports include what happened meanwhile
    meanwhile = sorted(time_s for time_s in times.values() if killed_s < time_s < back_s)
    assert len(meanwhile) > AWAY_S  # steps of a third of a second
    pauses = [later - earlier for earlier, later in zip([killed_s, *meanwhile], [*meanwhile, back_s], strict=True)]
    assert max(pauses) < 5.0  # it never stalled


def test_a_partition_that_was_silent_meanwhile_and_recovered_is_no_loss(
    paced: tuple[dict[str, Any], Path], digest: str, tmp_path: Path
) -> None:
    """The silence that its agent would have reported is over before a master runs."""
    spec, pace = paced
    with local_cluster(tmp_path, workers=2, servers=2) as cluster:
        job = cluster.submit(spec, tmp_path)
        cluster.wait(job, "step=3")
        partition, answer = cluster.child("server-1"), cluster.state_dir / "logs" / "server-1.log"
        cluster.kill(cluster.daemon("master"))
        partition.send_signal(signal.SIGSTOP)
        for said in ("a process is silent", "a process recovered"):
            deadline_s = time.monotonic() + 30
            while said not in answer.read_text():
                assert time.monotonic() < deadline_s, f"its agent does not say: {said}"
            partition.send_signal(signal.SIGCONT)
        cluster.up(2, 2)
        pace.unlink()
        cluster.wait(job, "succeeded")
        found = cluster.describe(job)
    assert found["parameters_sha256"] == digest
    assert found["plan"]["restore_generation"] == 1
    assert "PartitionLost" not in [event["reason"] for event in found["events"]]


def test_ten_minutes_of_reports_wait_and_a_new_master_takes_them_in_order() -> None:
    """By an injected clock: what the coordinator's agent keeps in that time, and what the master makes of it."""
    world = World()
    world.running(durability={"every_steps": 100}, train={"max_steps": 10_000})
    coordinator = world.wanted()["partition-0"]
    before, queue = world.job(), ReportQueue()
    step = before.step
    for second in range(600):
        records = [StepRecord(step=step + n, loss=0.5, time_s=2_000 + second + n / 10) for n in range(1, 11)]
        step += 10
        reports = [ProcessReport(progress=Progress(generation=1, step=step, records=records))]
        if step % 100 < 10:
            reports += [ProcessReport(snapshot_part=SnapshotPart(step=step, partition=0, generation=1, path="p"))]
        for report in reports:
            queue.add(AgentMessage(event=ProcessEvent(process_id=coordinator.process_id, report=report)))
        line = LogLine(time_s=2_000 + second, stream="stdout", text="x" * 200)
        queue.add(AgentMessage(log=LogLines(process_id=coordinator.process_id, lines=[line] * 5)))
    assert queue.num_dropped == 0
    world.now = type(world.now)(mono_s=world.now.mono_s + 600, unix_s=world.now.unix_s + 600)
    world.restart()
    facts = {name: (process.process_id, process.placement.node_id) for name, process in world.wanted().items()}
    for node_id in {node for _, node in facts.values()}:
        world.rejoin(node_id, *(_process(id_, node) for id_, node in facts.values() if node == node_id))
    lines = 0
    for message in queue.after(0, 10_000):
        report = proto.report(message.event.report) if message.HasField("event") else None
        if report is not None:
            lines += len(world.report_as(coordinator.placement.node_id, coordinator.process_id, report).lines)
    assert (world.job().step, lines) == (step, 6_000)
    assert world.job().generation == before.generation
    assert world.wanted().keys() == facts.keys()
    assert not [event for event in world.events if event.reason.endswith("Lost")]
    world.wait(10)
    assert world.job().generation == before.generation


def _process(process_id: str, node_id: str) -> object:
    from psmaster.model.process import Process
    from tests.harness.master_world import TRAINER

    facts = {"trainer": TRAINER} if "trainer" in process_id else {"partition": PARTITION}
    return Process(process_id=process_id, node_id=node_id, **facts)  # type: ignore[arg-type]
