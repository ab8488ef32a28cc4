"""A master that the test holds in its hand, and a process that does as the test says."""

from __future__ import annotations

import asyncio
import contextlib
import os
import select
import shutil
import signal
import tempfile
from collections.abc import AsyncIterator, Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import grpc
import pytest

from harness.played_authority import PlayedAuthority
from pscluster.agent.child import GracePeriods
from pscluster.agent.daemon import AgentRole, AgentSettings
from pscluster.agent.node import run_agent
from pscluster.errors import NotFoundError, StateError
from pscluster.rpc import SERVER_OPTIONS
from pscluster.rpc.access import CALLER, Caller
from pscluster.rpc.server import (
    CertificateInterceptor,
    ErrorInterceptor,
    Revocations,
    TokenInterceptor,
    server_credentials,
)
from pscluster.security.credentials import CredentialSource
from pscluster.security.identity import Identity, Role
from pscluster.settings import runtime_dir
from pscluster.v1 import agents_pb2 as pb
from pscluster.v1 import plan_pb2 as plan
from pscluster.v1.access_pb2 import RenewReply, RenewRequest
from pscluster.v1.access_pb2_grpc import AccessServicer, add_AccessServicer_to_server
from pscluster.v1.agents_pb2_grpc import AgentsServicer, add_AgentsServicer_to_server

TOKEN = "secret"
DEADLINE_S = 30.0
CHILD = Path(__file__).parent / "played_process.py"
ROLE = AgentRole(name="worker", module="played_process", runs="trainers", default_slots=2)


class FakeMaster(AgentsServicer):
    """Records all that an agent says; acknowledges it and answers beats unless told not to."""

    def __init__(self, address: str) -> None:
        self.address = address
        self.registered: list[pb.RegisterRequest] = []
        self.hellos: list[pb.Hello] = []
        self.beats = 0
        self.speeds: list[dict[str, float]] = []
        self.durable: dict[int, pb.AgentMessage] = {}
        self.num_repeats = 0
        self.acknowledges = True
        self.answers = True
        self.bundles: dict[str, bytes | Exception] = {}
        self.downloads: list[str] = []
        self.refusal: Exception | None = None
        self._assignment = pb.Assignment()
        self._streams: set[Any] = set()
        self._changed = asyncio.Condition()
        self._writing = asyncio.Lock()
        self._server: grpc.aio.Server | None = None

    async def start(self) -> None:
        self._server = grpc.aio.server(interceptors=[ErrorInterceptor(), self._admission()], options=SERVER_OPTIONS)
        add_AgentsServicer_to_server(self, self._server)  # type: ignore[no-untyped-call]
        self._bind(self._server)
        await self._server.start()

    def _admission(self) -> grpc.aio.ServerInterceptor:
        return TokenInterceptor(TOKEN)

    def _bind(self, server: grpc.aio.Server) -> None:
        server.add_insecure_port(self.address)

    async def stop(self) -> None:
        if self._server is not None:
            await self._server.stop(None)
            self._server = None

    async def assign(self, *specs: plan.ProcessSpec) -> None:
        self._assignment = pb.Assignment(revision=self._assignment.revision + 1, processes=specs)
        for stream in list(self._streams):
            await self._tell(stream, pb.MasterMessage(assignment=self._assignment))

    async def until(self, seen: Callable[[], Any]) -> Any:
        """Wait until `seen()` is true after some message; its value."""
        async with asyncio.timeout(DEADLINE_S):
            async with self._changed:
                while not (value := seen()):
                    await self._changed.wait()
                return value

    # What was heard, in order of sequence.

    def messages(self, body: str) -> list[Any]:
        ordered = [self.durable[number] for number in sorted(self.durable)]
        return [getattr(message, body) for message in ordered if message.WhichOneof("body") == body]

    def reports(self, body: str) -> list[Any]:
        reports = [event.report for event in self.messages("event")]
        return [getattr(report, body) for report in reports if report.WhichOneof("body") == body]

    def exit_of(self, process_id: str) -> pb.ProcessStatus | None:
        exited = [s for s in self.messages("status") if s.phase == pb.ProcessStatus.PHASE_EXITED]
        return next((status for status in exited if status.process_id == process_id), None)

    def lines(self, stream: str = "stdout") -> list[str]:
        return [line.text for log in self.messages("log") for line in log.lines if line.stream == stream]

    # The service.

    async def Register(self, request: pb.RegisterRequest, _context: Any) -> pb.RegisterReply:  # noqa: N802 - the contract's name
        if self.refusal is not None:
            raise self.refusal
        await self._note(lambda: self.registered.append(request))
        return pb.RegisterReply(beat_interval_s=0.05, suspicion_s=3.0)

    async def Attend(self, _requests: Any, context: Any) -> None:  # noqa: N802 - the contract's name
        try:
            while (message := await context.read()) is not grpc.aio.EOF:
                if message.HasField("hello"):
                    self._streams.add(context)
                    await self._tell(context, pb.MasterMessage(assignment=self._assignment))
                await self._note(partial(self._hear, message))
                if message.HasField("beat") and self.answers:
                    await self._tell(context, pb.MasterMessage(ack=pb.Acknowledged()))
                if message.sequence and self.acknowledges:
                    ack = pb.Acknowledged(sequence=message.sequence)
                    await self._tell(context, pb.MasterMessage(ack=ack))
        finally:
            self._streams.discard(context)

    async def DownloadBundle(self, request: pb.DownloadBundleRequest, _context: Any) -> AsyncIterator[pb.BundleChunk]:  # noqa: N802 - the contract's name
        self.downloads.append(request.sha256)
        if request.sha256 not in self.bundles:
            raise NotFoundError(f"no bundle {request.sha256}")
        data = self.bundles[request.sha256]
        if isinstance(data, Exception):
            await self._note(lambda: None)
            raise data
        for start in range(0, len(data), 100):
            yield pb.BundleChunk(data=data[start : start + 100])

    async def _tell(self, stream: Any, message: pb.MasterMessage) -> None:
        async with self._writing:  # a stream takes one write at a time
            with contextlib.suppress(grpc.aio.InternalError):  # it ended with its agent, which was killed a moment ago
                await stream.write(message)

    async def _note(self, change: Callable[[], Any]) -> None:
        async with self._changed:
            change()
            self._changed.notify_all()

    def _hear(self, message: pb.AgentMessage) -> None:
        if message.HasField("hello"):
            self.hellos.append(message.hello)
        elif message.HasField("beat"):
            self.beats += 1
            self.speeds.append({id_: speed.microbatch_s for id_, speed in message.beat.speeds.items()})
        else:
            self.num_repeats += message.sequence in self.durable
            self.durable[message.sequence] = message


class SecuredMaster(FakeMaster, AccessServicer):
    """The same over TLS, for members; it renews certificates, for `lifetime_s`, unless there is a `renewal_error`."""

    def __init__(self, played: PlayedAuthority, renewal_error: Exception | None) -> None:
        super().__init__("127.0.0.1:0")
        self.played = played
        self.revocations = Revocations()
        self.renewals: list[str] = []
        self.callers: list[Caller] = []
        self.lifetime_s = 3600.0
        self.renewal_error = renewal_error
        self._source = CredentialSource(played.member(Role.MASTER, "master"))

    async def Register(self, request: pb.RegisterRequest, context: Any) -> pb.RegisterReply:  # noqa: N802 - the contract's name
        self.callers.append(CALLER.get())
        return await super().Register(request, context)

    async def Renew(self, request: RenewRequest, _context: Any) -> RenewReply:  # noqa: N802 - the contract's name
        caller = CALLER.get()
        await self._note(lambda: self.renewals.append(caller.serial))
        if self.renewal_error is not None:
            raise self.renewal_error
        authority = self.played.authority
        identity = Identity(cluster_id=self.played.cluster_id, role=caller.role, name=caller.name)
        made = authority.sign(request.csr_pem, identity, self.lifetime_s)
        return RenewReply(certificate_pem=made, authority_pem=authority.certificate_pem)

    def _admission(self) -> grpc.aio.ServerInterceptor:
        return CertificateInterceptor(self.played.cluster_id, self.revocations)

    def _bind(self, server: grpc.aio.Server) -> None:
        add_AccessServicer_to_server(self, server)  # type: ignore[no-untyped-call]
        port = server.add_secure_port(self.address, server_credentials(self._source))
        self.address = f"127.0.0.1:{port}"


class Bench:
    """Directories of one test, a master, and agents against it."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.state_dir = directory / "state"
        self.token_file = directory / "token"
        self.token_file.write_text(TOKEN)
        self.token_file.chmod(0o600)
        self.runtime_dir = runtime_dir(self.state_dir)
        self.role = ROLE

    async def gone(self, pid: int) -> bool:
        """Wait until a process that is not a child of ours has ended."""
        try:
            descriptor = os.pidfd_open(pid)
        except ProcessLookupError:
            return True
        try:
            ready, _, _ = await asyncio.to_thread(select.select, [descriptor], [], [], DEADLINE_S)
            return bool(ready)
        finally:
            os.close(descriptor)

    def supersede(self, master: FakeMaster) -> None:
        """From now on the master knows a newer incarnation."""
        master.refusal = StateError("node worker-0 is held by a newer incarnation")

    def run(
        self, body: Callable[[FakeMaster], Any], grace: GracePeriods | None = None, signal_end: bool = True
    ) -> None:
        """Run `body(master)` beside an agent on this loop; the agent ends by SIGTERM afterwards (or, without
        `signal_end`, by itself), and leaves nothing."""
        try:
            asyncio.run(self._run(body, grace or GracePeriods(), signal_end))
        finally:
            assert not self.runtime_dir.exists()

    @staticmethod
    def trainer(name: str, mode: str, generation: int = 0, **fields: Any) -> plan.ProcessSpec:
        """A process of the job "job" that plays `mode` (see played_process.py)."""
        spec = plan.ProcessSpec(
            process_id=f"job/{name}/1",
            kind=plan.ProcessSpec.KIND_TRAINER,
            job_id="job",
            spec_json=f'{{"mode": "{mode}", "workers": {{"threads": 3}}}}',
            **fields,
        )
        if generation:
            spec.plan.CopyFrom(plan.Plan(job_id="job", generation=generation))
        return spec

    def settings(self, master: FakeMaster) -> AgentSettings:
        return AgentSettings(
            node_id="worker-0", master=master.address, state_dir=self.state_dir, token_file=self.token_file
        )

    def master(self) -> FakeMaster:
        """To be made within a loop, and started there."""
        return FakeMaster(f"unix:{self.directory / 'm.sock'}")

    def environ(self) -> dict[str, str]:
        path = os.pathsep.join([str(CHILD.parent), *filter(None, [os.environ.get("PYTHONPATH")])])
        return {**os.environ, "PYTHONPATH": path}

    async def _run(self, body: Callable[[FakeMaster], Any], grace: GracePeriods, signal_end: bool) -> None:
        master = self.master()
        await master.start()
        agent = asyncio.create_task(run_agent(self.role, self.settings(master), self.environ(), grace))
        try:
            await _beside(agent, body(master))
            if signal_end:
                os.kill(os.getpid(), signal.SIGTERM)
            async with asyncio.timeout(DEADLINE_S):
                await agent
        finally:
            agent.cancel()
            await asyncio.gather(agent, return_exceptions=True)
            await master.stop()


async def _beside(agent: asyncio.Task[None], body: Any) -> None:
    """Run `body`, but give up at once when the agent ends before it does."""
    working = asyncio.ensure_future(body)
    await asyncio.wait({agent, working}, return_when=asyncio.FIRST_COMPLETED)
    if not working.done():
        working.cancel()
        await agent
        raise RuntimeError("the agent ended before the test did")
    await working


class SecuredBench(Bench):
    """The same in a cluster with certificates. The agent is worker-0 by the identity that `identity` has, or joins."""

    def __init__(self, directory: Path) -> None:
        super().__init__(directory)
        self.played = PlayedAuthority(directory / "certs")
        self.identity = self.state_dir / "identity"
        self.overrides: dict[str, Any] = {}
        self.renewal_error: Exception | None = None

    def settings(self, master: FakeMaster) -> AgentSettings:
        return AgentSettings(
            state_dir=self.state_dir, **{"master": master.address, "advertise": "127.0.0.1", **self.overrides}
        )

    def master(self) -> SecuredMaster:
        return SecuredMaster(self.played, self.renewal_error)


@pytest.fixture
def secured(bench: Bench) -> SecuredBench:
    return SecuredBench(bench.directory)


@pytest.fixture
def bench() -> Iterator[Bench]:
    """Below a short path: Unix sockets hold no long ones."""
    directory = Path(tempfile.mkdtemp(prefix="ps-test-"))
    try:
        yield Bench(directory)
    finally:
        shutil.rmtree(directory)
