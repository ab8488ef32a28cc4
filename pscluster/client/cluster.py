"""A connection to one cluster: submit, inspect, wait, stop. Used by psctl and notebooks."""

from __future__ import annotations

import hashlib
import json
import math
import os
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc

from pscluster import errors, rpc
from pscluster.client import calls, records
from pscluster.client.calls import STREAM_DEADLINE_S, LogCursor, MetricsCursor, ReconnectingStream
from pscluster.client.contexts import resolve_client
from pscluster.client.credentials import access_to, renew_when_due
from pscluster.client.goals import Goal, parse_goal, reached, wait_drained
from pscluster.client.members import Members
from pscluster.client.probe import ProbedNode, ProbedPair, ProbeExtent, result_of
from pscluster.client.reach import check_reachable
from pscluster.client.records import Health, Job, LogLine, Node, Snapshot
from pscluster.job.bundle import Bundle
from pscluster.job.spec import JobSpec
from pscluster.security.identity import Role
from pscluster.settings import LocatedCluster
from pscluster.storage import below
from pscluster.v1 import agents_pb2, agents_pb2_grpc, jobs_pb2, jobs_pb2_grpc, probe_pb2

_CONNECT_DEADLINE_S = 5.0
_SUBMIT_OUTAGE_S = 15.0
_MAX_UPLOADS = 3  # of one bundle that is deleted after each upload


class Cluster:
    """A connection to one cluster's master. Safe to use from several threads; close it, or use it in `with`.

    Every call has a deadline and raises a `PsError`: UnreachableError, AuthError, NotFoundError for an unknown job,
    StateError for what a job cannot do now. A job is named by its id, or by a name that only one job has."""

    def __init__(self, channel: grpc.Channel, access: rpc.Access) -> None:
        """Wrap an open channel and own it. Use `connect`. `members`: who may talk to the cluster."""
        self._channel = channel
        self._access = access
        self.members = Members(channel)
        self._jobs = jobs_pb2_grpc.JobsStub(channel)  # type: ignore[no-untyped-call]
        self._agents = agents_pb2_grpc.AgentsStub(channel)  # type: ignore[no-untyped-call]

    @classmethod
    def connect(
        cls,
        address: str | None = None,
        token: str | None = None,
        *,
        context: str | None = None,
        state_dir: Path | None = None,
        token_file: Path | None = None,
    ) -> Cluster:
        """Connect to a master and check that it speaks our protocol. Blocks up to 5 seconds. Raises UnreachableError,
        AuthError or VersionSkewError. Arguments beat what psctl uses without options: PS_* variables, the settings
        file, the context that it selects (see `pscluster.client.contexts`); without any, the local cluster."""
        flags = {"context": context, "address": address, "state_dir": state_dir, "token_file": token_file}
        located = resolve_client(flags, os.environ).settings.located(os.environ)
        return cls.connect_to(located, token)

    @classmethod
    def connect_to(
        cls, located: LocatedCluster, token: str | None = None, *, deadline_s: float = _CONNECT_DEADLINE_S
    ) -> Cluster:
        """The same for settings already resolved, up to `deadline_s`. A certificate that is due for renewal is renewed
        and stored."""
        if located.local and not Path(located.address.removeprefix("unix:")).exists():
            raise errors.UnreachableError(f"no cluster runs with state directory {located.state_dir}")
        access = rpc.Access(token=token) if token else access_to(located)
        cluster = cls(rpc.open_channel(located.address, access), access)
        try:
            cluster._check_protocol(located, deadline_s)
            renew_when_due(cluster.members, access, located, time.time())
        except errors.PsError:
            cluster.close()
            raise
        return cluster

    def _check_protocol(self, located: LocatedCluster, deadline_s: float) -> None:
        try:
            health = self.health(deadline_s)
        except errors.UnreachableError as error:
            if not located.local:
                check_reachable(located.address, self._access, Role.MASTER, "the master")  # says more than gRPC does
                raise
            raise errors.UnreachableError(
                f"the master of the local cluster in {located.state_dir} does not answer",
                action="start it again with `psctl up`",
                details=error.details,
            ) from None
        if health.protocol != rpc.PROTOCOL:
            raise errors.VersionSkewError(
                f"the master at {located.address} is pscluster {health.version} with protocol "
                f"{health.protocol}; this client needs protocol {rpc.PROTOCOL}"
            )

    def close(self) -> None:
        """Close the connection. Idempotent."""
        self._channel.close()

    def __enter__(self) -> Cluster:
        return self

    def __exit__(self, *_exc: object) -> None:
        self.close()

    # --- jobs ---

    def submit(self, spec: JobSpec, bundle: Bundle | None = None, *, request_id: str = "") -> str:
        """Submit a job and return its id; the job is then stored durably. `bundle`: the task's code, if not built in.
        Blocks. Retried while the master is unreachable for a moment, harmlessly by the request id."""
        request = jobs_pb2.SubmitRequest(
            spec_json=spec.canonical_json(),
            bundle_sha256=bundle.sha256 if bundle else "",
            request_id=request_id or uuid.uuid4().hex,
        )

        def attempt(uploads: int = _MAX_UPLOADS) -> str:
            if bundle is not None:
                self._upload(bundle)
            try:
                return str(calls.unary(self._jobs.Submit, request).job_id)
            except errors.NotFoundError:  # meanwhile the last job with this bundle was deleted, and with it the bundle
                if bundle is None or uploads == 1:
                    raise
                return attempt(uploads - 1)

        return ReconnectingStream(max_outage_s=_SUBMIT_OUTAGE_S).retry(attempt)

    def _upload(self, bundle: Bundle) -> None:
        asked = jobs_pb2.HasBundleRequest(sha256=bundle.sha256)
        if not calls.unary(self._jobs.HasBundle, asked).present:
            calls.unary(self._jobs.UploadBundle, calls.upload_messages(bundle), rpc.TRANSFER_DEADLINE_S)

    def job(self, job: str) -> Job:
        """One job in its current state, with its plan."""
        return records.job_of(calls.unary(self._jobs.Get, jobs_pb2.GetRequest(job=job)))

    def jobs(self, deadline_s: float = rpc.DEADLINE_S) -> list[Job]:
        """All jobs, newest first, without plans and events."""
        return [records.job_of(m) for m in calls.unary(self._jobs.List, jobs_pb2.ListRequest(), deadline_s).jobs]

    def watch(
        self, job: str, stream: ReconnectingStream | None = None, timeout_s: float | None = None
    ) -> Iterator[Job]:
        """The job now, then after each change, until it has ended or `timeout_s` has passed. Blocks in between. An
        unreachable master is waited for as `stream` sets (ten minutes by default)."""
        keep = stream or ReconnectingStream()
        deadline = math.inf if timeout_s is None else keep.monotonic() + timeout_s
        newest: Job | None = None

        def left_s() -> float:
            return max(0.001, min(STREAM_DEADLINE_S, deadline - keep.monotonic()))

        def open_stream() -> Any:
            name = newest.job_id if newest else job
            return calls.stream(self._jobs.Watch, jobs_pb2.GetRequest(job=name), left_s())

        def expired() -> bool:
            return keep.monotonic() >= deadline

        for message in keep.follow(open_stream, expired, expired):
            if newest is None or message.revision != newest.revision:
                newest = records.job_of(message)
                yield newest
            if newest.ended:
                return

    def wait(self, job: str, until: Goal | str = "succeeded", timeout_s: float | None = None) -> Job:
        """Block until the job has reached `until` (see `client.goals`). Raises JobFailedError or JobStoppedError when
        it ended otherwise, WaitTimeoutError after `timeout_s`."""
        goal = parse_goal(until) if isinstance(until, str) else until
        max_outage_s = 600.0 if timeout_s is None else min(600.0, timeout_s)
        last = ""
        for found in self.watch(job, ReconnectingStream(max_outage_s=max_outage_s), timeout_s):
            if reached(found, goal):
                return found
            last = f": it is {found.state} at step {found.step}"
        within = f" within {timeout_s:g} s" if timeout_s is not None else ""
        raise errors.WaitTimeoutError(f"{job} did not reach {goal}{within}{last}")

    def stop(self, job: str) -> Job:
        """Stop a job at its next step boundary. Returns at once; `wait(job, "stopped")` waits. Idempotent."""
        return records.job_of(calls.unary(self._jobs.Stop, jobs_pb2.GetRequest(job=job)))

    def resume(self, job: str) -> Job:
        """Queue a stopped or failed job again, from its newest complete snapshot. Idempotent."""
        return records.job_of(calls.unary(self._jobs.Resume, jobs_pb2.GetRequest(job=job)))

    def delete(self, job: str) -> str:
        """Forget an ended job and remove its files; returns its id. StateError while it runs."""
        return str(calls.unary(self._jobs.Delete, jobs_pb2.GetRequest(job=job)).job_id)

    # --- output of a job ---

    def logs(
        self,
        job: str,
        *,
        follow: bool = False,
        kind: str = "",
        rank: int = -1,
        tail: int = 0,
        since_s: float = 0.0,
        stream: ReconnectingStream | None = None,
    ) -> Iterator[LogLine]:
        """A job's output, oldest first. `kind`: trainer, partition or "" for both; `rank` -1: all; `tail` 0: all kept.
        Blocks between lines. With `follow` until the job has ended, across restarts of the master."""
        cursor = LogCursor(since_s)

        def open_stream() -> Any:
            request = jobs_pb2.ReadLogsRequest(job=job, follow=follow, kind=kind, rank=rank)
            request.since_s = cursor.open()
            request.tail = tail if cursor.opened == 1 else 0
            return calls.stream(self._jobs.ReadLogs, request, STREAM_DEADLINE_S)

        keep = stream or ReconnectingStream(max_outage_s=600.0 if follow else 0.0)
        for message in keep.follow(open_stream, lambda: not follow or self.job(job).ended):
            line = records.log_line_of(message)
            if cursor.is_new(line):
                yield line

    def metrics(self, job: str, from_step: int = 0, cursor: MetricsCursor | None = None) -> Iterator[dict[str, Any]]:
        """The committed steps and evaluations above `from_step`, oldest first, as in metrics.jsonl. With a `cursor`
        only what was added since it was used; it moves when all has been read."""
        cursor = cursor or MetricsCursor()
        request = jobs_pb2.ReadMetricsRequest(job=job, from_step=from_step, position=cursor.position)
        for message in calls.stream(self._jobs.ReadMetrics, request):
            for line in message.lines:
                try:
                    yield json.loads(line)
                except ValueError:
                    raise errors.InternalError(f"a line of {job}'s metrics is not JSON: {line[:80]!r}") from None
            request.position = message.position or request.position
        cursor.position = request.position

    def snapshots(self, job: str) -> list[Snapshot]:
        """The complete snapshots, oldest first."""
        reply = calls.unary(self._jobs.ListSnapshots, jobs_pb2.GetRequest(job=job))
        return [records.snapshot_of(m) for m in reply.snapshots]

    def snapshot(self, job: str, which: int | str = "last") -> Snapshot:
        """One complete snapshot: "last", "best" or a step. NotFoundError names the existing ones."""
        return records.choose(self.snapshots(job), which, job)

    def locate_parts(self, job: Job, snapshot: Snapshot, directory: Path) -> list[str]:
        """Where this machine can read the snapshot's parts, by partition: in the job's store, or fetched into
        `directory` from the nodes that keep them. Blocks. Raises NotFoundError when no node delivers a part."""
        if not any(part.nodes for part in snapshot.parts):
            return [below(job.store, part.path) for part in snapshot.parts]
        depots = {node.node_id: node.depot_address for node in self.nodes()}
        return [str(calls.fetch(depots, self._access, job.job_id, part, directory)) for part in snapshot.parts]

    def download_bundle(self, sha256: str, path: Path) -> None:
        """Write a code bundle to `path`. Raises BundleError when it does not match the digest."""
        digest = hashlib.sha256()
        request = agents_pb2.DownloadBundleRequest(sha256=sha256)
        try:
            with path.open("wb") as sink:
                for chunk in calls.stream(self._agents.DownloadBundle, request):
                    digest.update(chunk.data)
                    sink.write(chunk.data)
        except OSError as error:
            raise errors.StorageError(f"cannot write {path}: {error.strerror}") from None
        if digest.hexdigest() != sha256:
            raise errors.BundleError(f"the bundle {sha256[:12]} does not match its digest")

    # --- the cluster ---

    def nodes(self) -> list[Node]:
        """The nodes, by role, then id."""
        reply = calls.unary(self._jobs.ListNodes, jobs_pb2.ListNodesRequest())
        return [records.node_of(m) for m in reply.nodes]

    def drain(self, node_id: str) -> Node:
        """Move everything away from a node and place nothing new there; returns at once, and `drained` waits.

        Holds until `undrain`, across restarts of the node and the master. Idempotent. Raises NotFoundError."""
        return records.node_of(calls.unary(self._jobs.Drain, jobs_pb2.DrainRequest(node_id=node_id)))

    def undrain(self, node_id: str) -> Node:
        """End a drain: the node gets processes again. Idempotent. Raises NotFoundError."""
        return records.node_of(calls.unary(self._jobs.Drain, jobs_pb2.DrainRequest(node_id=node_id, undo=True)))

    def drained(self, asked: Node, timeout_s: float | None = None) -> Iterator[Node]:
        """Yield `asked`, which `drain` returned, then the node after each change, until it is drained or has left.
        Blocks. Raises WaitTimeoutError after `timeout_s`, StateError when it is not, or no longer, being drained."""
        return wait_drained(self.nodes, asked, timeout_s)

    def probe(self, *, beside_jobs: bool = False) -> Iterator[ProbeExtent | ProbedPair | ProbedNode]:
        """Measure the connection of each pair of nodes that jobs may use, and each worker's devices: first the extent,
        then each result as it is there; `ProbeReport.of` judges them. Blocks in between. Closing it gives up. Raises
        StateError while another probe runs, and while jobs do, which it slows down, unless `beside_jobs`."""
        request = probe_pb2.ProbeRequest(beside_jobs=beside_jobs)
        for message in calls.stream(self._jobs.Probe, request, STREAM_DEADLINE_S):
            if (result := result_of(message)) is not None:
                yield result

    def health(self, deadline_s: float = rpc.DEADLINE_S) -> Health:
        """Whether the master and the nodes are healthy, and which version runs."""
        return records.health_of(calls.unary(self._jobs.GetCluster, jobs_pb2.GetClusterRequest(), deadline_s))
