"""One cluster as a client sees it: submit, look, wait, stop. What psctl and notebooks use."""

from __future__ import annotations

import hashlib
import json
import math
import os
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc

from pscluster import rpc
from pscluster.client import calls, decode
from pscluster.client.goals import Goal, parse_goal, reached, wait_drained
from pscluster.client.reconnecting_stream import STREAM_DEADLINE_S, LogCursor, ReconnectingStream
from pscluster.client.records import Health, Job, LogLine, Node, Snapshot
from pscluster.client.snapshots import choose, fetch
from pscluster.errors import (
    BundleError,
    InternalError,
    NotFoundError,
    PsError,
    StorageError,
    UnreachableError,
    VersionSkewError,
    WaitTimeoutError,
)
from pscluster.job.bundle import Bundle
from pscluster.job.spec import JobSpec
from pscluster.settings import ClientSettings, LocatedCluster, resolve
from pscluster.storage import below
from pscluster.v1 import agents_pb2, agents_pb2_grpc, jobs_pb2, jobs_pb2_grpc

_CONNECT_DEADLINE_S = 5.0
_SUBMIT_PATIENCE_S = 15.0
_MAX_UPLOADS = 3  # of one bundle that is gone again each time


class Cluster:
    """A connection to one cluster's master. Safe to use from several threads; close it, or use it in `with`.

    Every call has a deadline and raises a `PsError`: UnreachableError when nobody answers, AuthError,
    NotFoundError for an unknown job, StateError for what a job cannot do now. A job is named by its id, or by
    a name that only one job has.
    """

    def __init__(self, channel: grpc.Channel, token: str = "") -> None:
        """Wrap an open channel and own it. Use `connect`."""
        self._channel = channel
        self._token = token
        self._jobs = jobs_pb2_grpc.JobsStub(channel)  # type: ignore[no-untyped-call]
        self._agents = agents_pb2_grpc.AgentsStub(channel)  # type: ignore[no-untyped-call]

    @classmethod
    def connect(
        cls,
        address: str | None = None,
        token: str | None = None,
        *,
        state_dir: Path | None = None,
        token_file: Path | None = None,
    ) -> Cluster:
        """Connect to a master and check that it speaks our protocol. Blocks up to 5 seconds.

        What is not given comes from PS_ADDRESS, PS_TOKEN_FILE and PS_STATE_DIR; with nothing given, the local
        cluster. Raises UnreachableError, AuthError or VersionSkewError.
        """
        flags = {"address": address, "state_dir": state_dir, "token_file": token_file}
        located = resolve(ClientSettings, flags, os.environ).located(os.environ)
        return cls.connect_to(located, token)

    @classmethod
    def connect_to(
        cls, located: LocatedCluster, token: str | None = None, *, deadline_s: float = _CONNECT_DEADLINE_S
    ) -> Cluster:
        """The same for settings already resolved, up to `deadline_s`."""
        if located.local and not Path(located.address.removeprefix("unix:")).exists():
            raise UnreachableError(f"no cluster runs with state directory {located.state_dir}")
        known = token or rpc.read_token(located.token_file)
        cluster = cls(rpc.open_channel(located.address, known), known)
        try:
            cluster._check_protocol(located, deadline_s)
        except PsError:
            cluster.close()
            raise
        return cluster

    def _check_protocol(self, located: LocatedCluster, deadline_s: float) -> None:
        try:
            health = self.health(deadline_s)
        except UnreachableError as error:
            if not located.local:
                raise
            raise UnreachableError(
                f"the master of the local cluster in {located.state_dir} does not answer",
                action="start it again with `psctl up`",
                details=error.details,
            ) from None
        if health.protocol != rpc.PROTOCOL:
            raise VersionSkewError(
                f"the master at {located.address} is pscluster {health.version} with protocol "
                f"{health.protocol}; this one speaks protocol {rpc.PROTOCOL}"
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
        """Submit a job and return its id; it is stored durably by then. `bundle`: the task's code, if not
        built in.

        A master that is away for a moment is asked again; the request id makes that harmless. Blocks.
        """
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
            except NotFoundError:  # the last job with this bundle was deleted in between, and the bundle with it
                if bundle is None or uploads == 1:
                    raise
                return attempt(uploads - 1)

        return calls.patiently(attempt, _SUBMIT_PATIENCE_S)

    def _upload(self, bundle: Bundle) -> None:
        asked = jobs_pb2.HasBundleRequest(sha256=bundle.sha256)
        if not calls.unary(self._jobs.HasBundle, asked).present:
            calls.unary(self._jobs.UploadBundle, calls.upload_messages(bundle), rpc.TRANSFER_DEADLINE_S)

    def job(self, job: str) -> Job:
        """One job as it is now, with its plan."""
        return decode.job_of(calls.unary(self._jobs.Get, jobs_pb2.GetRequest(job=job)))

    def jobs(self, deadline_s: float = rpc.DEADLINE_S) -> list[Job]:
        """All jobs, newest first, without plans and events."""
        return [decode.job_of(m) for m in calls.unary(self._jobs.List, jobs_pb2.ListRequest(), deadline_s).jobs]

    def watch(
        self, job: str, tether: ReconnectingStream | None = None, timeout_s: float | None = None
    ) -> Iterator[Job]:
        """The job now, then after each change, until it has ended or `timeout_s` has passed. Blocks in
        between.

        A master that is away is waited for, as `tether` says (ten minutes by default).
        """
        keep = tether or ReconnectingStream()
        deadline = math.inf if timeout_s is None else keep.monotonic() + timeout_s
        newest: Job | None = None

        def left_s() -> float:
            return max(0.001, min(STREAM_DEADLINE_S, deadline - keep.monotonic()))

        def open_stream() -> Any:
            name = newest.job_id if newest else job
            return calls.open_stream(self._jobs.Watch, jobs_pb2.GetRequest(job=name), left_s())

        def expired() -> bool:
            return keep.monotonic() >= deadline

        for message in keep.follow(open_stream, expired, expired):
            if newest is None or message.revision != newest.revision:
                newest = decode.job_of(message)
                yield newest
            if newest.ended:
                return

    def wait(self, job: str, until: Goal | str = "succeeded", timeout_s: float | None = None) -> Job:
        """Block until the job has reached `until`; see `pscluster.client.goals`.

        Raises JobFailedError or JobStoppedError when it ended otherwise, WaitTimeoutError after `timeout_s`.
        """
        goal = parse_goal(until) if isinstance(until, str) else until
        patience_s = 600.0 if timeout_s is None else min(600.0, timeout_s)
        last = ""
        for found in self.watch(job, ReconnectingStream(patience_s=patience_s), timeout_s):
            if reached(found, goal):
                return found
            last = f": it is {found.state} at step {found.step}"
        within = f" within {timeout_s:g} s" if timeout_s is not None else ""
        raise WaitTimeoutError(f"{job} did not reach {goal}{within}{last}")

    def stop(self, job: str) -> Job:
        """Ask a job to stop at its next step boundary. Returns at once; `wait(job, "stopped")` waits.
        Idempotent.
        """
        return decode.job_of(calls.unary(self._jobs.Stop, jobs_pb2.GetRequest(job=job)))

    def resume(self, job: str) -> Job:
        """Queue a stopped or failed job again, from its newest complete snapshot. Idempotent."""
        return decode.job_of(calls.unary(self._jobs.Resume, jobs_pb2.GetRequest(job=job)))

    def delete(self, job: str) -> str:
        """Forget an ended job and remove its files; returns its id. StateError while it runs."""
        return str(calls.unary(self._jobs.Delete, jobs_pb2.GetRequest(job=job)).job_id)

    # --- what a job left ---

    def logs(
        self,
        job: str,
        *,
        follow: bool = False,
        kind: str = "",
        rank: int = -1,
        tail: int = 0,
        since_s: float = 0.0,
        tether: ReconnectingStream | None = None,
    ) -> Iterator[LogLine]:
        """A job's output, oldest first. `kind`: trainer, partition or "" for both; `rank` -1: all; `tail` 0:
        all kept.

        With `follow` it goes on until the job has ended, over restarts of the master. Blocks between lines.
        """
        cursor = LogCursor(since_s)

        def open_stream() -> Any:
            request = jobs_pb2.ReadLogsRequest(job=job, follow=follow, kind=kind, rank=rank)
            request.since_s = cursor.open()
            request.tail = tail if cursor.opened == 1 else 0
            return calls.open_stream(self._jobs.ReadLogs, request, STREAM_DEADLINE_S)

        keep = tether or ReconnectingStream(patience_s=600.0 if follow else 0.0)
        for message in keep.follow(open_stream, lambda: not follow or self.job(job).ended):
            line = decode.log_line_of(message)
            if cursor.is_new(line):
                yield line

    def metrics(self, job: str, from_step: int = 0) -> Iterator[dict[str, Any]]:
        """The committed steps and evaluations above `from_step`, oldest first, as in metrics.jsonl."""
        request = jobs_pb2.ReadMetricsRequest(job=job, from_step=from_step)
        for message in calls.stream(self._jobs.ReadMetrics, request):
            for line in message.lines:
                try:
                    yield json.loads(line)
                except ValueError:
                    raise InternalError(f"a line of {job}'s metrics is no JSON: {line[:80]!r}") from None

    def snapshots(self, job: str) -> list[Snapshot]:
        """The complete snapshots, oldest first."""
        reply = calls.unary(self._jobs.ListSnapshots, jobs_pb2.GetRequest(job=job))
        return [decode.snapshot_of(m) for m in reply.snapshots]

    def snapshot(self, job: str, which: int | str = "last") -> Snapshot:
        """One complete snapshot: "last", "best" or a step. NotFoundError names those there are."""
        return choose(self.snapshots(job), which, job)

    def locate_parts(self, job: Job, snapshot: Snapshot, directory: Path) -> list[str]:
        """Where this machine can read the snapshot's parts, by partition: in the job's store, or fetched into
        `directory` from the nodes that keep them. Blocks. Raises NotFoundError when none of these answers.
        """
        if not any(part.nodes for part in snapshot.parts):
            return [below(job.store, part.path) for part in snapshot.parts]
        depots = {node.node_id: node.depot_address for node in self.nodes()}
        return [str(fetch(depots, self._token, job.job_id, part, directory)) for part in snapshot.parts]

    def download_bundle(self, sha256: str, path: Path) -> None:
        """Write a code bundle to `path`. Raises BundleError when what came is not what the digest names."""
        digest = hashlib.sha256()
        request = agents_pb2.DownloadBundleRequest(sha256=sha256)
        try:
            with path.open("wb") as sink:
                for chunk in calls.stream(self._agents.DownloadBundle, request):
                    digest.update(chunk.data)
                    sink.write(chunk.data)
        except OSError as error:
            raise StorageError(f"cannot write {path}: {error.strerror}") from None
        if digest.hexdigest() != sha256:
            raise BundleError(f"the bundle {sha256[:12]} arrived damaged")

    # --- the cluster ---

    def nodes(self) -> list[Node]:
        """The nodes, by role, then id."""
        reply = calls.unary(self._jobs.ListNodes, jobs_pb2.ListNodesRequest())
        return [decode.node_of(m) for m in reply.nodes]

    def drain(self, node_id: str) -> Node:
        """Have everything moved away from a node and nothing new placed there; returns at once, and `drained` waits.

        It holds until `undrain`, over restarts of the node and the master. Idempotent. NotFoundError."""
        return decode.node_of(calls.unary(self._jobs.Drain, jobs_pb2.DrainRequest(node_id=node_id)))

    def undrain(self, node_id: str) -> Node:
        """Let a node be given processes again. Idempotent. NotFoundError."""
        return decode.node_of(calls.unary(self._jobs.Drain, jobs_pb2.DrainRequest(node_id=node_id, undo=True)))

    def drained(self, asked: Node, timeout_s: float | None = None) -> Iterator[Node]:
        """What `drain` returned, and then the node whenever something has changed, until it is drained; the last one
        is. Blocks in between.

        A node that has left holds nothing any more. Raises WaitTimeoutError after `timeout_s`, StateError when it is
        not, or no longer, to be drained."""
        return wait_drained(self.nodes, asked, timeout_s)

    def health(self, deadline_s: float = rpc.DEADLINE_S) -> Health:
        """Whether master and members are well, and which version runs."""
        return decode.health_of(calls.unary(self._jobs.GetCluster, jobs_pb2.GetClusterRequest(), deadline_s))
