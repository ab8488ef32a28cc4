"""The master as its clients and agents meet it: real gRPC over a Unix socket, real files, fake agents."""

from __future__ import annotations

import asyncio
import hashlib
import json
import urllib.request
from collections.abc import AsyncIterator, Coroutine
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from pscluster import rpc
from pscluster.errors import (
    AuthError,
    BundleError,
    NotFoundError,
    SpecError,
    StateError,
    StorageError,
    VersionSkewError,
)
from pscluster.rpc import Access
from pscluster.v1 import agents_pb2, agents_pb2_grpc, jobs_pb2, jobs_pb2_grpc, plan_pb2
from psmaster.control.agent_stream import AgentStream
from psmaster.control.loop import ControlLoop
from psmaster.model.job import Instant
from psmaster.server import MasterSettings, assembled, run_transactions
from tests.harness.master_world import make_spec
from tests.unit.master.fake_agent import DEADLINE_S, FakeAgent

TOKEN = "a-token"
LOCAL = Access(token=TOKEN)


@asynccontextmanager
async def master(settings: MasterSettings) -> AsyncIterator[ControlLoop]:
    """A working master; its end is an orderly one."""
    async with assembled(settings) as (core, health):
        ending = asyncio.Event()
        turns = asyncio.create_task(run_transactions(core, health, ending))
        try:
            yield core
        finally:
            ending.set()
            await turns


class Client:
    """The Jobs service, with errors as they were raised."""

    def __init__(self, address: str, access: Access = LOCAL) -> None:
        self._channel = rpc.open_aio_channel(address, access)
        self._stub: Any = jobs_pb2_grpc.JobsStub(self._channel)  # type: ignore[no-untyped-call]

    async def close(self) -> None:
        await self._channel.close()

    async def call(self, method: str, request: Any) -> Any:
        try:
            return await getattr(self._stub, method)(request, timeout=DEADLINE_S)
        except grpc.RpcError as error:
            raise rpc.error_of(error) from None

    async def stream(self, method: str, request: Any) -> list[Any]:
        return [message async for message in getattr(self._stub, method)(request, timeout=DEADLINE_S)]

    async def submit(self, request_id: str = "", **changes: Any) -> str:
        spec = make_spec(**{"train": {"max_steps": 30}, "workers": {"max": 2}, **changes}).canonical_json()
        return str((await self.call("Submit", jobs_pb2.SubmitRequest(spec_json=spec, request_id=request_id))).job_id)

    async def job(self, name: str) -> jobs_pb2.Job:
        found: jobs_pb2.Job = await self.call("Get", jobs_pb2.GetRequest(job=name))
        return found

    async def until(self, name: str, state: str) -> jobs_pb2.Job:
        """Watch until the job is in a state; AssertionError when it ends in another."""
        request = jobs_pb2.GetRequest(job=name)
        last = jobs_pb2.Job()
        async for last in self._stub.Watch(request, timeout=DEADLINE_S):
            if last.state == jobs_pb2.JobState.Value(f"JOB_STATE_{state}"):
                return last
        raise AssertionError(f"ended as {last.state}: {last.reason}")


def run(test: Coroutine[Any, Any, None]) -> None:
    asyncio.run(_bounded(test))


async def _bounded(test: Coroutine[Any, Any, None]) -> None:
    async with asyncio.timeout(60):
        await test


def progress(generation: int, *steps: int) -> plan_pb2.Progress:
    records = [plan_pb2.StepRecord(step=step, loss=1.0, weight=2.0, samples=16, time_s=1.0 + step) for step in steps]
    return plan_pb2.Progress(generation=generation, step=steps[-1], records=records)


def part(generation: int, step: int, index: int) -> plan_pb2.SnapshotPart:
    return plan_pb2.SnapshotPart(
        step=step, partition=index, generation=generation, path=f"{step}.{index}", size_bytes=1, checksum="crc32c:0"
    )


def planned(generation: int) -> Any:
    return lambda a: bool(a) and all(s.HasField("plan") and s.plan.generation == generation for s in a.values())


def has(*process_ids: str) -> Any:
    """Waits for these attempts: "trainer-0/2"."""
    return lambda a: {spec.process_id.split("/", 1)[1] for spec in a.values()} == set(process_ids)


def test_a_job_from_submission_over_deaths_and_a_new_master_to_its_end(site: MasterSettings) -> None:
    run(_whole_life(site))


async def _whole_life(site: MasterSettings) -> None:
    address = site.listen[0]
    names = ("worker-0", "worker-1", "server-0", "server-1")
    w0, w1, s0, s1 = agents = [FakeAgent(address, LOCAL, name) for name in names]
    async with AsyncExitStack() as stack:
        for agent in agents:
            stack.push_async_callback(agent.leave)
        async with master(site):
            client = Client(address)
            stack.push_async_callback(client.close)
            job_id = await client.submit(request_id="r1")
            assert "waits for 1 worker: 0 ready" in (await client.job(job_id)).reason
            for agent in agents:
                await agent.open_stream()
            await _start(agents)
            await s0.report(s0.assignment["partition-0"].process_id, progress=progress(1, 1, 2, 3))
            await client.until(job_id, "RUNNING")
            await _snapshot(s0, s1, 1, 10)
            await _lose_a_trainer(w0, w1, s0)
            await s0.report(s0.assignment["partition-0"].process_id, progress=progress(3, *range(4, 13)))
            await w0.log(w0.assignment["trainer-0"].process_id, "hello", "world")
            await asyncio.gather(*(agent.flushed() for agent in agents))
            before = [dict(agent.assignment) for agent in agents]
        # The master is away; what processes do meanwhile is kept by their agents.
        for agent in agents:
            await agent.leave()
        async with master(site):
            for agent in agents:
                await agent.open_stream(agent.states())
                await agent.until(lambda a: bool(a))
            assert [dict(agent.assignment) for agent in agents] == before, "the same processes, the same plan"
            assert max(w0.revisions[:-1]) < w0.revisions[-1]
            assert await client.submit(request_id="r1") == job_id
            await _lose_a_partition(w0, s0, s1)
            await s0.report(s0.assignment["partition-0"].process_id, progress=progress(3, 13))  # late: void
            await s0.report(s0.assignment["partition-0"].process_id, progress=progress(4, *range(11, 31)))
            await _snapshot(s0, s1, 4, 30)
            finished = plan_pb2.Finished(generation=4, step=30, parameters_sha256="f00d")
            await s0.report(s0.assignment["partition-0"].process_id, finished=finished)
            job = await client.until(job_id, "SUCCEEDED")
            await _check_the_end(client, job, agents)


async def _start(agents: list[FakeAgent]) -> None:
    placements = ("trainer-0", "trainer-1", "partition-0", "partition-1")
    for agent, placement in zip(agents, placements, strict=True):
        await agent.until(lambda a, placement=placement: placement in a)  # type: ignore[misc]
        assert not agent.assignment[placement].HasField("plan")
        await agent.ready(placement)
    for agent in agents:
        await agent.until(planned(1))
    plan = agents[0].assignment["trainer-0"].plan
    assert plan.layout_json == b"{}"
    assert len(plan.data_token) == 32
    assert plan.final_step == 30
    assert [list(placement.addresses) for placement in plan.partitions] == [["unix:/x", "tcp:127.0.0.1:1"]] * 2
    assert [(run.first, run.count) for placement in plan.trainers for run in placement.shards] == [(0, 4), (4, 4)]


async def _snapshot(s0: FakeAgent, s1: FakeAgent, generation: int, step: int) -> None:
    for index, agent in enumerate((s0, s1)):
        placement = agent.assignment[f"partition-{index}"]
        await agent.report(placement.process_id, snapshot_part=part(generation, step, index))


async def _lose_a_trainer(w0: FakeAgent, w1: FakeAgent, s0: FakeAgent) -> None:
    await w0.exited(w0.assignment["trainer-0"].process_id, signal=9)
    await w0.until(has("trainer-0/2"))
    await w1.until(planned(2))
    assert [(run.first, run.count) for run in w1.assignment["trainer-1"].plan.trainers[1].shards] == [(0, 8)]
    await w0.ready("trainer-0")
    for agent in (w0, w1, s0):
        await agent.until(planned(3))
    assert s0.assignment["partition-0"].plan.restore_generation == 1


async def _lose_a_partition(w0: FakeAgent, s0: FakeAgent, s1: FakeAgent) -> None:
    await s1.exited(s1.assignment["partition-1"].process_id, signal=9)
    await s1.until(has("partition-1/2"))
    assert not s1.assignment["partition-1"].HasField("plan")
    await s1.ready("partition-1")
    for agent in (w0, s0, s1):
        await agent.until(planned(4))
    plan = s1.assignment["partition-1"].plan
    assert (plan.restore_generation, plan.resume_step) == (4, 10)
    assert [one.path for one in plan.restore.parts] == ["10.0", "10.1"]


async def _check_the_end(client: Client, job: jobs_pb2.Job, agents: list[FakeAgent]) -> None:
    for agent in agents:
        await agent.until(lambda a: not a)
    assert (job.step, job.parameters_sha256, job.workers_wanted) == (30, "f00d", 0)
    reasons = [event.reason for event in job.events]
    for reason in ("Submitted", "Admitted", "Running", "TrainerLost", "PartitionLost", "RolledBack", "Succeeded"):
        assert reasons.count(reason) == 1, reasons
    request = jobs_pb2.ReadMetricsRequest(job=job.job_id, follow=True)
    lines = [json.loads(line) for m in await client.stream("ReadMetrics", request) for line in m.lines]
    assert [line["step"] for line in lines] == list(range(1, 31))
    logs = await client.stream("ReadLogs", jobs_pb2.ReadLogsRequest(job=job.job_id, rank=-1, follow=True))
    assert [(record.source, record.line.text) for record in logs] == [("trainer-0", "hello"), ("trainer-0", "world")]
    snapshots = (await client.call("ListSnapshots", jobs_pb2.GetRequest(job=job.job_id))).snapshots
    assert [snapshot.step for snapshot in snapshots] == [10, 30]
    assert await asyncio.to_thread(Path(job.directory).is_dir)
    assert (await client.call("Delete", jobs_pb2.GetRequest(job=job.job_id))).job_id == job.job_id
    assert not await asyncio.to_thread(Path(job.directory).exists)
    with pytest.raises(NotFoundError):
        await client.job(job.job_id)


def with_master(site: MasterSettings, test: Any) -> None:
    """Run `test(client, core)` against a working master."""

    async def serve() -> None:
        async with master(site) as core:
            client = Client(site.listen[0])
            try:
                await test(client, core)
            finally:
                await client.close()

    run(serve())


def test_wrong_requests_get_their_own_errors(site: MasterSettings) -> None:
    async def test(client: Client, _core: ControlLoop) -> None:
        with pytest.raises(SpecError, match="did you mean"):
            await client.call("Submit", jobs_pb2.SubmitRequest(spec_json='{"naem": "x"}'))
        with pytest.raises(SpecError, match="not JSON"):
            await client.call("Submit", jobs_pb2.SubmitRequest(spec_json="{"))
        with pytest.raises(NotFoundError):
            await client.job("nobody")
        unknown = jobs_pb2.SubmitRequest(spec_json=make_spec().canonical_json(), bundle_sha256="ab" * 32)
        with pytest.raises(NotFoundError, match="bundle"):
            await client.call("Submit", unknown)
        with pytest.raises(SpecError, match="absolute"):
            await client.submit(durability={"store": "relative"})
        job_id = await client.submit()
        with pytest.raises(StateError):
            await client.call("Delete", jobs_pb2.GetRequest(job=job_id))
        assert len((await client.call("List", jobs_pb2.ListRequest())).jobs) == 1

    with_master(site, test)


def test_nobody_without_the_token_is_heard_but_health_is_open(site: MasterSettings) -> None:
    async def test(_client: Client, _core: ControlLoop) -> None:
        stranger = Client(site.listen[0], Access(token="another-token"))
        with pytest.raises(AuthError):
            await stranger.submit()
        await stranger.close()
        with pytest.raises(AuthError):
            await _as_error(FakeAgent(site.listen[0], Access(token="another-token"), "worker-0").open_stream())
        async with grpc.aio.insecure_channel(site.listen[0]) as channel:
            health: Any = health_pb2_grpc.HealthStub(channel)  # type: ignore[no-untyped-call]
            for service in ("", "ready"):
                answer = await health.Check(health_pb2.HealthCheckRequest(service=service), timeout=DEADLINE_S)
                assert answer.status == health_pb2.HealthCheckResponse.SERVING

    with_master(site, test)


async def _as_error(call: Coroutine[Any, Any, None]) -> None:
    try:
        await call
    except grpc.RpcError as error:
        raise rpc.error_of(error) from None


def test_bundles_go_up_and_come_down(site: MasterSettings) -> None:
    data = b"code" * 700_000
    digest = hashlib.sha256(data).hexdigest()

    def messages(sha256: str) -> list[jobs_pb2.UploadBundleRequest]:
        header = jobs_pb2.BundleHeader(sha256=sha256, size_bytes=len(data))
        chunks = [data[at : at + (1 << 20)] for at in range(0, len(data), 1 << 20)]
        return [jobs_pb2.UploadBundleRequest(header=header), *(jobs_pb2.UploadBundleRequest(data=c) for c in chunks)]

    async def test(client: Client, core: ControlLoop) -> None:
        with pytest.raises(BundleError):
            await client.call("UploadBundle", iter(messages("ab" * 32)))
        assert not (await client.call("HasBundle", jobs_pb2.HasBundleRequest(sha256=digest))).present
        for _ in range(2):
            assert (await client.call("UploadBundle", iter(messages(digest)))).sha256 == digest
        assert (await client.call("HasBundle", jobs_pb2.HasBundleRequest(sha256=digest))).present
        spec = make_spec().canonical_json()
        request = jobs_pb2.SubmitRequest(spec_json=spec, bundle_sha256=digest)
        job_id = (await client.call("Submit", request)).job_id
        async with rpc.open_aio_channel(site.listen[0], LOCAL) as channel:
            stub: Any = agents_pb2_grpc.AgentsStub(channel)  # type: ignore[no-untyped-call]
            down = agents_pb2.DownloadBundleRequest(sha256=digest)
            assert b"".join([chunk.data async for chunk in stub.DownloadBundle(down)]) == data
        await client.call("Stop", jobs_pb2.GetRequest(job=job_id))
        await client.call("Delete", jobs_pb2.GetRequest(job=job_id))
        assert not (await client.call("HasBundle", jobs_pb2.HasBundleRequest(sha256=digest))).present
        assert core.archive.store.bundles() == ()

    with_master(site, test)


def test_other_protocols_and_older_lives_are_refused(site: MasterSettings) -> None:
    async def test(_client: Client, core: ControlLoop) -> None:
        stranger = FakeAgent(site.listen[0], LOCAL, "worker-0")
        stranger.node.protocol = rpc.PROTOCOL + 1
        with pytest.raises(VersionSkewError):
            await _as_error(stranger.open_stream())
        await FakeAgent(site.listen[0], LOCAL, "worker-0", life="1").open_stream()
        newer = FakeAgent(site.listen[0], LOCAL, "worker-0", life="2")
        await newer.open_stream()
        await newer.until(lambda _: bool(newer.revisions))
        with pytest.raises(StateError):
            await _as_error(FakeAgent(site.listen[0], LOCAL, "worker-0", life="1").open_stream())
        assert core.state.nodes["worker-0"].connected
        await newer.leave()

    with_master(site, test)


def test_nodes_cluster_and_metrics_tell_the_same(site: MasterSettings) -> None:
    async def test(client: Client, _core: ControlLoop) -> None:
        job_id = await client.submit()
        agents = [FakeAgent(site.listen[0], LOCAL, name) for name in ("worker-0", "server-0")]
        for agent in agents:
            await agent.open_stream()
            await agent.beat()
            await agent.until(lambda _, agent=agent: bool(agent.revisions))  # type: ignore[misc]
        nodes = (await client.call("ListNodes", jobs_pb2.ListNodesRequest())).nodes
        assert [(node.node_id, node.ready) for node in nodes] == [("worker-0", True), ("server-0", True)]
        cluster = await client.call("GetCluster", jobs_pb2.GetClusterRequest())
        assert cluster.healthy
        text = await asyncio.to_thread(_scrape, cluster.metrics_address)
        assert 'ps_nodes{role="worker",state="ready"} 1.0' in text
        assert 'ps_jobs{state="queued"} 1.0' in text
        assert "ps_queue_depth 1.0" in text
        assert f'ps_job_step{{job="{job_id}"}} 0.0' in text
        assert 'ps_failovers_total{cause="trainer"} 0.0' in text
        await client.call("Stop", jobs_pb2.GetRequest(job=job_id))
        assert job_id not in await asyncio.to_thread(_scrape, cluster.metrics_address)
        for agent in agents:
            await agent.leave()

    with_master(site, test)


def _scrape(address: str) -> str:
    with urllib.request.urlopen(f"http://{address}/metrics", timeout=DEADLINE_S) as answer:
        return bytes(answer.read()).decode()


def test_messages_that_make_no_sense_are_acknowledged_and_dropped(site: MasterSettings) -> None:
    async def test(_client: Client, core: ControlLoop) -> None:
        agent = FakeAgent(site.listen[0], LOCAL, "worker-0")
        await agent.open_stream()
        await agent.log("../../etc/trainer-0/1", "escape")
        await agent.log("nobody/trainer-0/1", "stray")
        await agent.report("nobody/trainer-0/1", progress=progress(1, 1))
        await agent.report("", finished=plan_pb2.Finished(step=1))
        await agent.exited("nonsense", signal=9)
        await agent.flushed()
        assert core.state.jobs == {}
        assert sorted(path.name for path in site.state_dir.rglob("*.log")) == []
        await agent.leave()

    with_master(site, test)


def test_a_disk_that_cannot_be_written_acknowledges_nothing_and_heals(
    site: MasterSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def test(client: Client, core: ControlLoop) -> None:
        monkeypatch.setattr("psmaster.control.loop.RETRY_S", 0.01)
        job_id = await client.submit()
        agent = FakeAgent(site.listen[0], LOCAL, "worker-0")
        await agent.open_stream()
        await agent.until(lambda _: bool(agent.revisions))
        healthy, tried = core.archive.save, asyncio.Event()
        loop = asyncio.get_running_loop()

        def full(_writes: object) -> None:
            loop.call_soon_threadsafe(tried.set)
            raise StorageError("no space left on device")

        core.archive.save = full  # type: ignore[method-assign]
        with pytest.raises(StorageError, match="no space left"):
            await client.submit()
        tried.clear()
        await agent.log(f"{job_id}/trainer-0/1", "kept")
        await tried.wait()
        assert agent.kept
        assert [job.job_id for job in core.state.jobs.values()] == [job_id]
        core.archive.save = healthy  # type: ignore[method-assign]
        await agent.flushed()
        logs = await client.stream("ReadLogs", jobs_pb2.ReadLogsRequest(job=job_id, rank=-1))
        assert [record.line.text for record in logs] == ["kept"]
        await agent.leave()

    with_master(site, test)


def test_a_master_that_was_stopped_hears_what_was_said_meanwhile_before_it_judges(site: MasterSettings) -> None:
    """That a process is silent, and that this is over, must not get a turn each."""
    turns: list[object] = []

    async def reported(core: ControlLoop) -> None:
        await core.submit(AgentStream("server-0", "its life"), 0, turns.append)

    async def test(_client: Client, core: ControlLoop) -> None:
        clock = core.now
        core.now = lambda: Instant(mono_s=clock().mono_s + 60, unix_s=clock().unix_s + 60)
        await reported(core)
        for _ in range(10):
            await asyncio.sleep(0)
        await reported(core)
        await core.ask(turns.append)
        assert len({id(tx) for tx in turns}) == 1

    with_master(site, test)
