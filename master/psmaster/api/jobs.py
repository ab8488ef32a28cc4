"""The Jobs service: requests to the core and the files, answers back. Nothing is decided here."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Mapping
from contextlib import aclosing
from operator import attrgetter
from typing import Any

import pscluster
from pscluster.errors import BundleError, NotFoundError
from pscluster.rpc import PROTOCOL
from pscluster.rpc.access import CALLER
from pscluster.v1 import jobs_pb2, jobs_pb2_grpc, probe_pb2
from psmaster.api import log_tail, probe_proto, proto
from psmaster.control import probing
from psmaster.control.loop import ControlLoop
from psmaster.control.security import Addresses
from psmaster.control.submission import new_job
from psmaster.model import membership
from psmaster.model.job import Job
from psmaster.model.membership import Node
from psmaster.model.state import find
from psmaster.scheduling import drain
from psmaster.storage.bundles import BundleShelf
from psmaster.storage.store import Batch, BundleRecord

PROGRESS_INTERVAL_S = 1.0  # how often a watcher receives mere progress
_beside_progress = attrgetter("state", "reason", "generation", "conditions")  # a change of these is sent at once


class JobsService(jobs_pb2_grpc.JobsServicer):
    """Raises PsError from every method; the server's interceptor maps it."""

    def __init__(self, core: ControlLoop, shelf: BundleShelf, metrics_address: str, addresses: Addresses) -> None:
        """`metrics_address`: where the master's metrics are; `GetCluster` reports it, and `addresses`."""
        self._core = core
        self._shelf = shelf
        self._started_s = core.now().unix_s
        self._metrics_address = metrics_address
        self._addresses = addresses
        # Held from the check for a bundle to its use: an accepted job must find its code.
        self._claiming = asyncio.Lock()

    async def Submit(self, request: jobs_pb2.SubmitRequest, context: Any) -> jobs_pb2.SubmitReply:
        sha256, jobs_directory = request.bundle_sha256, self._core.archive.directory("")
        async with self._claiming:
            if sha256 and not await asyncio.to_thread(self._shelf.has, sha256):
                raise NotFoundError(f"there is no bundle {sha256[:80]!r}", action="upload it, then submit")
            job = new_job(
                request.spec_json,
                sha256,
                request.request_id,
                jobs_directory,
                self._core.now(),
                owner=CALLER.get().name,
                cluster_id=self._core.security.cluster_id,
            )
            return jobs_pb2.SubmitReply(job_id=await self._core.ask(lambda tx: tx.submit(job)))

    async def HasBundle(self, request: jobs_pb2.HasBundleRequest, context: Any) -> jobs_pb2.HasBundleReply:
        return jobs_pb2.HasBundleReply(present=await asyncio.to_thread(self._shelf.has, request.sha256))

    async def UploadBundle(
        self, request_iterator: AsyncIterator[jobs_pb2.UploadBundleRequest], context: Any
    ) -> jobs_pb2.UploadBundleReply:
        first = await anext(request_iterator, None)
        if first is None or not first.HasField("header"):
            raise BundleError("an upload begins with its header")
        upload = await asyncio.to_thread(self._shelf.begin, first.header.sha256, first.header.size_bytes)
        try:
            async for message in request_iterator:
                await asyncio.to_thread(upload.add, message.data)
            size = await asyncio.to_thread(upload.commit)
        finally:
            upload.abort()
        created_s = self._core.now().unix_s
        record = BundleRecord(sha256=first.header.sha256, size_bytes=size, created_s=created_s)
        await self._core.on_disk(self._core.archive.store.write, Batch(bundles=(record,)))
        return jobs_pb2.UploadBundleReply(sha256=record.sha256)

    async def Get(self, request: jobs_pb2.GetRequest, context: Any) -> jobs_pb2.Job:
        return self._message(self._find(request.job), full=True)

    async def List(self, request: jobs_pb2.ListRequest, context: Any) -> jobs_pb2.ListReply:
        newest_first = sorted(self._visible().values(), key=lambda job: (-job.created_s, job.job_id))
        return jobs_pb2.ListReply(jobs=[self._message(job, full=False) for job in newest_first])

    async def Watch(self, request: jobs_pb2.GetRequest, context: Any) -> AsyncIterator[jobs_pb2.Job]:
        job_id = self._find(request.job).job_id
        shown: Job | None = None
        shown_at = 0.0
        while True:
            news = self._core.news
            job = self._find(job_id)
            wait_s = shown_at + PROGRESS_INTERVAL_S - self._core.now().mono_s
            if shown is None or (
                job.revision != shown.revision and (wait_s <= 0 or _beside_progress(job) != _beside_progress(shown))
            ):
                yield self._message(job, full=True)
                shown, shown_at = job, self._core.now().mono_s
                continue
            if job.state.ended:
                return
            await log_tail.wait(news, wait_s if job.revision != shown.revision else None)

    async def Stop(self, request: jobs_pb2.GetRequest, context: Any) -> jobs_pb2.Job:
        job_id = self._find(request.job).job_id
        await self._core.ask(lambda tx: tx.stop(job_id))
        return self._message(self._find(job_id), full=True)

    async def Resume(self, request: jobs_pb2.GetRequest, context: Any) -> jobs_pb2.Job:
        job_id = self._find(request.job).job_id
        await self._core.ask(lambda tx: tx.resume(job_id))
        return self._message(self._find(job_id), full=True)

    async def Delete(self, request: jobs_pb2.GetRequest, context: Any) -> jobs_pb2.DeleteReply:
        # To its end even when the caller hangs up: the lock must outlast a removal that has begun.
        return jobs_pb2.DeleteReply(job_id=await asyncio.shield(self._delete(self._find(request.job).job_id)))

    async def _delete(self, job_id: str) -> str:
        """Delete a job, and its bundle if no other has it; the job's id."""
        async with self._claiming:
            job = await self._core.ask(lambda tx: tx.delete(job_id))
            used = {other.bundle_sha256 for other in self._core.state.jobs.values()}
            if job.bundle_sha256 and job.bundle_sha256 not in used:
                await asyncio.to_thread(self._shelf.remove, job.bundle_sha256)
                batch = Batch(deleted_bundles=(job.bundle_sha256,))
                await self._core.on_disk(self._core.archive.store.write, batch)
        return job_id

    async def ReadLogs(self, request: jobs_pb2.ReadLogsRequest, context: Any) -> AsyncIterator[jobs_pb2.LogRecord]:
        async for record in log_tail.logs(self._core, self._find(request.job).job_id, request):
            yield record

    async def ReadMetrics(
        self, request: jobs_pb2.ReadMetricsRequest, context: Any
    ) -> AsyncIterator[jobs_pb2.MetricsLines]:
        async for lines in log_tail.metrics(self._core, self._find(request.job).job_id, request):
            yield lines

    async def ListSnapshots(self, request: jobs_pb2.GetRequest, context: Any) -> jobs_pb2.ListSnapshotsReply:
        state = self._core.state
        job = self._find(request.job)
        return jobs_pb2.ListSnapshotsReply(snapshots=proto.snapshots(job, state.catalogues[job.job_id]))

    async def ListNodes(self, request: jobs_pb2.ListNodesRequest, context: Any) -> jobs_pb2.ListNodesReply:
        nodes = self._core.state.nodes.values()
        ordered = sorted(nodes, key=lambda node: (node.role is not membership.Role.WORKER, node.node_id))
        return jobs_pb2.ListNodesReply(nodes=[self._node(node) for node in ordered])

    async def Drain(self, request: jobs_pb2.DrainRequest, context: Any) -> jobs_pb2.Node:
        await self._core.ask(lambda tx: tx.drain(request.node_id, undo=request.undo))
        node = self._core.state.nodes.get(request.node_id)
        if node is None:  # drained, and away
            return jobs_pb2.Node(node_id=request.node_id, drain="" if request.undo else drain.DRAINED)
        return self._node(node)

    def _node(self, node: Node) -> jobs_pb2.Node:
        state, now, suspicion_s = self._core.state, self._core.now(), self._core.limits.suspicion_s
        running = [
            placement.process_id(job.job_id)
            for job in self._visible().values()
            for placement in job.placements
            if placement.node_id == node.node_id
        ]
        return proto.CLUSTER_NODE.encode(
            node,
            ready=membership.health(node, now.mono_s, suspicion_s) is membership.Health.READY,
            processes=sorted(running),
            drain=drain.status(state, node),
            waits_for=() if CALLER.get().is_user else drain.waits_for(state, node, now, suspicion_s),
        )

    async def GetCluster(self, request: jobs_pb2.GetClusterRequest, context: Any) -> jobs_pb2.Cluster:
        problems = drain.problems(self._core.state, self._core.now(), self._core.limits.suspicion_s)
        return jobs_pb2.Cluster(
            version=pscluster.__version__,
            protocol=PROTOCOL,
            healthy=not problems,
            problems=problems,
            started_s=self._started_s,
            metrics_address=self._metrics_address,
            cluster_id=self._core.security.cluster_id,
            secured=self._core.security.secured,
            time_s=self._core.now().unix_s,
            addresses=self._addresses.listening,
            join_addresses=self._addresses.joins,
        )

    async def Probe(self, request: probe_pb2.ProbeRequest, context: Any) -> AsyncIterator[probe_pb2.ProbeResult]:
        async with aclosing(probing.probe(self._core, request.beside_jobs)) as results:
            async for result in results:
                yield probe_proto.result(result)

    def _visible(self) -> Mapping[str, Job]:
        """The jobs that the caller may know of."""
        caller, jobs = CALLER.get(), self._core.state.jobs
        return {k: job for k, job in jobs.items() if job.owner == caller.name} if caller.is_user else jobs

    def _find(self, name: str) -> Job:
        """Raises NotFoundError, for another user's job too."""
        return find(self._visible(), name, self._core.now())

    def _message(self, job: Job, *, full: bool) -> jobs_pb2.Job:
        state = self._core.state
        events = state.events.get(job.job_id, ())
        return proto.job(job, events, self._core.now(), full=full, processes=state.processes)
