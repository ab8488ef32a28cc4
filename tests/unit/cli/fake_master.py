"""A master in this process that answers from a script, for tests of the client and of psctl."""

# ruff: noqa: N802, ARG002 - the methods and their arguments are the service's

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import grpc

from pscluster import rpc
from pscluster.errors import AuthError, NotFoundError, PsError, StateError
from pscluster.security.authority import Authority
from pscluster.security.credentials import identity_in, parse_certificate
from pscluster.security.identity import Identity, Role
from pscluster.v1 import (
    access_pb2,
    access_pb2_grpc,
    agents_pb2,
    agents_pb2_grpc,
    jobs_pb2,
    jobs_pb2_grpc,
    plan_pb2,
    probe_pb2,
)

TOKEN = "a-token"
SPEC_JSON = (
    '{"name":"lm","task":{"entrypoint":"psworker.tasks.text_lm:TextLm","args":{"layers":2}},'
    '"train":{"global_batch":32,"microbatch":8,"optimizer":{"name":"adamw","lr":0.001}},'
    '"data":{"uri":"text.txt"},"durability":{"tier":"snapshot","every_steps":50},"evaluate":{"metric":"loss"}}'
)


def job_message(**changes: Any) -> jobs_pb2.Job:
    """A running job; `changes` replace fields."""
    fields: dict[str, Any] = {
        "job_id": "lm-abc123",
        "name": "lm",
        "state": jobs_pb2.JOB_STATE_RUNNING,
        "created_s": 1_700_000_000.0,
        "started_s": 1_700_000_010.0,
        "spec_json": SPEC_JSON,
        "generation": 3,
        "step": 20,
        "final_step": 100,
        "loss": 2.5,
        "steps_per_s": 4.0,
        "samples_per_s": 128.0,
        "weight_per_s": 8192.0,
        "workers_active": 2,
        "workers_wanted": 2,
        "numerics": "strict: the same bits on any number of workers",
        "revision": 1,
    }
    return jobs_pb2.Job(**{**fields, **changes})


def ended_message(state: int = jobs_pb2.JOB_STATE_SUCCEEDED, **changes: Any) -> jobs_pb2.Job:
    """A job that has ended."""
    fields: dict[str, Any] = {
        "state": state,
        "step": 100,
        "ended_s": 1_700_000_035.0,
        "revision": 99,
        "parameters_sha256": "f" * 64,
    }
    return job_message(**{**fields, **changes})


class FakeMaster(jobs_pb2_grpc.JobsServicer, agents_pb2_grpc.AgentsServicer, access_pb2_grpc.AccessServicer):
    """Holds jobs by id; each call of Watch plays the next of `watches` (the last one again and again)."""

    def __init__(self) -> None:
        self.jobs: dict[str, jobs_pb2.Job] = {}
        self.watches: list[Callable[[], Iterator[jobs_pb2.Job]]] = []
        self.watched: list[str] = []
        self.bundles: dict[str, bytes] = {}
        self.submitted: list[jobs_pb2.SubmitRequest] = []
        self.log_streams: list[list[jobs_pb2.LogRecord | PsError]] = []
        self.log_requests: list[jobs_pb2.ReadLogsRequest] = []
        self.metric_lines: list[str] = []
        self.metric_reads: list[list[str]] = []
        """What the first calls of ReadMetrics find instead of `metric_lines`."""
        self.snapshots: list[jobs_pb2.Snapshot] = []
        self.drain_states = ["draining"]
        self.drained_away: set[str] = set()
        self.node_list: list[jobs_pb2.Node] = []
        self.cluster = jobs_pb2.Cluster(version="0.1.0", protocol=rpc.PROTOCOL, healthy=True)
        self.failures: dict[str, list[PsError]] = {}
        self.deleted: list[str] = []
        self.tokens_created: list[access_pb2.CreateTokenRequest] = []
        self.tokens: list[access_pb2.Token] = []
        self.tokens_revoked: list[str] = []
        self.certificates: list[access_pb2.Certificate] = []
        self.authority: Authority | None = None
        """Set: the master asks no token, because only members with its certificates can connect."""
        self.renewals = 0
        self.probe_requests: list[probe_pb2.ProbeRequest] = []
        self.probe_results: list[probe_pb2.ProbeResult] = []

    # --- the service ---

    def Submit(self, request: Any, context: Any) -> Any:
        self._enter("Submit", context)
        if request.bundle_sha256 and request.bundle_sha256 not in self.bundles:
            self._fail(context, NotFoundError("no such bundle"))
        self.submitted.append(request)
        self.jobs.setdefault("lm-abc123", job_message(spec_json=request.spec_json))
        return jobs_pb2.SubmitReply(job_id="lm-abc123")

    def HasBundle(self, request: Any, context: Any) -> Any:
        self._enter("HasBundle", context)
        return jobs_pb2.HasBundleReply(present=request.sha256 in self.bundles)

    def UploadBundle(self, requests: Any, context: Any) -> Any:
        self._enter("UploadBundle", context)
        header = next(requests).header
        data = b"".join(message.data for message in requests)
        if len(data) != header.size_bytes or hashlib.sha256(data).hexdigest() != header.sha256:
            self._fail(context, StateError("a wrong digest"))
        self.bundles[header.sha256] = data
        return jobs_pb2.UploadBundleReply(sha256=header.sha256)

    def DownloadBundle(self, request: Any, context: Any) -> Any:
        self._enter("DownloadBundle", context)
        yield agents_pb2.BundleChunk(data=self.bundles[request.sha256])

    def Get(self, request: Any, context: Any) -> Any:
        self._enter("Get", context)
        return self._find(request.job, context)

    def List(self, request: Any, context: Any) -> Any:
        self._enter("List", context)
        return jobs_pb2.ListReply(jobs=list(self.jobs.values()))

    def Watch(self, request: Any, context: Any) -> Any:
        self._enter("Watch", context)
        self.watched.append(request.job)
        if not self.watches:
            yield self._find(request.job, context)
            return
        script = self.watches.pop(0) if len(self.watches) > 1 else self.watches[0]
        try:
            yield from script()
        except PsError as error:
            self._fail(context, error)

    def Stop(self, request: Any, context: Any) -> Any:
        self._enter("Stop", context)
        return self._find(request.job, context)

    def Resume(self, request: Any, context: Any) -> Any:
        self._enter("Resume", context)
        return self._find(request.job, context)

    def Delete(self, request: Any, context: Any) -> Any:
        self._enter("Delete", context)
        found = self._find(request.job, context)
        self.deleted.append(found.job_id)
        return jobs_pb2.DeleteReply(job_id=found.job_id)

    def ReadLogs(self, request: Any, context: Any) -> Any:
        self._enter("ReadLogs", context)
        self.log_requests.append(request)
        for record in self.log_streams.pop(0) if self.log_streams else []:
            if isinstance(record, PsError):
                self._fail(context, record)
            yield record

    def ReadMetrics(self, request: Any, context: Any) -> Any:
        self._enter("ReadMetrics", context)
        lines = self.metric_reads.pop(0) if self.metric_reads else self.metric_lines
        lines = [line for line in lines if json.loads(line)["step"] > request.from_step]
        yield jobs_pb2.MetricsLines(lines=lines)

    def ListSnapshots(self, request: Any, context: Any) -> Any:
        self._enter("ListSnapshots", context)
        return jobs_pb2.ListSnapshotsReply(snapshots=self.snapshots)

    def ListNodes(self, request: Any, context: Any) -> Any:
        self._enter("ListNodes", context)
        return jobs_pb2.ListNodesReply(nodes=self.node_list)

    def Drain(self, request: Any, context: Any) -> Any:
        self._enter("Drain", context)
        for node in self.node_list:
            if node.node_id == request.node_id:
                node.drain = "" if request.undo else self.drain_states.pop(0)
                node.waits_for[:] = ["job: moves"] if node.drain == "draining" else []
                return node
        if request.node_id in self.drained_away:
            return jobs_pb2.Node(node_id=request.node_id, drain="" if request.undo else "drained")
        self._fail(context, NotFoundError(f"no node {request.node_id}"))
        raise AssertionError

    def GetCluster(self, request: Any, context: Any) -> Any:
        self._enter("GetCluster", context)
        return self.cluster

    # --- members ---

    def CreateToken(self, request: Any, context: Any) -> Any:
        self._enter("CreateToken", context)
        self.tokens_created.append(request)
        return access_pb2.CreateTokenReply(token="psj1-abc", token_id="0123")

    def ListTokens(self, request: Any, context: Any) -> Any:
        self._enter("ListTokens", context)
        return access_pb2.ListTokensReply(tokens=self.tokens)

    def RevokeToken(self, request: Any, context: Any) -> Any:
        self._enter("RevokeToken", context)
        self.tokens_revoked.append(request.token_id)
        return access_pb2.RevokeTokenReply()

    def ListCertificates(self, request: Any, context: Any) -> Any:
        self._enter("ListCertificates", context)
        return access_pb2.ListCertificatesReply(certificates=self.certificates)

    def RevokeCertificates(self, request: Any, context: Any) -> Any:
        self._enter("RevokeCertificates", context)
        found = [c for c in self.certificates if c.name == request.name and request.role in ("", c.role)]
        for certificate in found:
            certificate.revoked = True
        return access_pb2.RevokeCertificatesReply(certificates=found)

    def Renew(self, request: Any, context: Any) -> Any:
        self._enter("Renew", context)
        assert self.authority is not None
        self.renewals += 1
        caller = context.auth_context()["x509_pem_cert"][0]
        identity = identity_in(parse_certificate(caller))
        made = self.authority.sign(request.csr_pem, identity, 3600.0)
        return access_pb2.RenewReply(certificate_pem=made, authority_pem=self.authority.certificate_pem)

    def Probe(self, request: Any, context: Any) -> Any:
        self._enter("Probe", context)
        self.probe_requests.append(request)
        yield from self.probe_results

    # --- what stands in for the interceptors ---

    def _enter(self, method: str, context: Any) -> None:
        shown = dict(context.invocation_metadata()).get("authorization")
        if self.authority is None and shown != f"Bearer {TOKEN}":
            self._fail(context, AuthError("the call carries no token, or a wrong one"))
        if self.failures.get(method):
            self._fail(context, self.failures[method].pop(0))

    def _find(self, name: str, context: Any) -> jobs_pb2.Job:
        for job in self.jobs.values():
            if name in (job.job_id, job.name):
                return job
        self._fail(context, NotFoundError(f"no job {name}"))
        raise AssertionError

    def _fail(self, context: Any, error: PsError) -> None:
        context.abort_with_status(rpc.status_of(error))


def server_credentials(authority: Authority) -> grpc.ServerCredentials:
    """Of a master that only members can call."""
    identity = Identity(cluster_id=authority.cluster_id, role=Role.MASTER, name="master")
    own = authority.issue(identity, 3600.0)
    pair = (own.key_pem, own.certificate_pem)
    return grpc.ssl_server_credentials([pair], own.authority_pem, require_client_auth=True)


class Serving:
    """A fake master that listens on a loopback port; `stop` and `start` play its death and return."""

    def __init__(self, fake: FakeMaster, directory: Path) -> None:
        self.fake = fake
        self.token_file = directory / "token"
        self.token_file.write_text(TOKEN)
        self.token_file.chmod(0o600)
        self._lock = threading.Lock()
        self._port = 0
        self.start()

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self._port}"

    def start(self) -> None:
        self._server = grpc.server(ThreadPoolExecutor(8), options=[("grpc.so_reuseport", 0)])
        jobs_pb2_grpc.add_JobsServicer_to_server(self.fake, self._server)
        agents_pb2_grpc.add_AgentsServicer_to_server(self.fake, self._server)
        access_pb2_grpc.add_AccessServicer_to_server(self.fake, self._server)
        address = f"127.0.0.1:{self._port}"
        if self.fake.authority is None:
            self._port = self._server.add_insecure_port(address)
        else:
            self._port = self._server.add_secure_port(address, server_credentials(self.fake.authority))
        self._server.start()

    def stop(self) -> None:
        self._server.stop(None).wait(10)

    @property
    def arguments(self) -> list[str]:
        """psctl's global options for this master."""
        return ["--address", self.address, "--token-file", str(self.token_file)]


def snapshot_message(step: int, best: bool = False) -> jobs_pb2.Snapshot:
    """A complete snapshot of two parts, given out of order."""
    parts = [plan_pb2.SnapshotPart(step=step, partition=n, path=f"{step}/part-{n}") for n in (1, 0)]
    return jobs_pb2.Snapshot(step=step, best=best, parts=parts)


def log_record(source: str, time_s: float, text: str) -> jobs_pb2.LogRecord:
    line = agents_pb2.LogLine(time_s=time_s, stream="stdout", text=text)
    return jobs_pb2.LogRecord(source=source, line=line)
