"""An agent measures: both ends of a real connection, in this process; devices, in a child that the test defines."""

from __future__ import annotations

import asyncio
import os
import socket
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from pscluster.agent.probe import compute, pairs, session
from pscluster.agent.probe.compute import DeviceMeter
from pscluster.agent.probe.pairs import ListenPlace, OpenSockets, PairListener
from pscluster.agent.probe.prober import MAX_ORDERS, Prober
from pscluster.agent.probe.session import CHUNK_BYTES, MeasuredPair, ProbeLimits
from pscluster.errors import AddressInUseError, AuthError, DeviceError, FrameError, UnreachableError
from pscluster.security.authority import Authority
from pscluster.security.credentials import CredentialSource
from pscluster.security.identity import Identity, Role
from pscluster.v1.agents_pb2 import AgentMessage
from pscluster.v1.probe_pb2 import ProbeAnswer, ProbeOrder

pytestmark = pytest.mark.timeout(60)

TOKEN = "f" * 32
LIMITS = ProbeLimits(bulk_bytes=16 * CHUNK_BYTES, pings=20, connect_s=10.0, wait_s=10.0)
Sources = Callable[[Role, str], CredentialSource]


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Sources:
    """Credentials of a cluster's members."""
    authority = Authority.create(tmp_path_factory.mktemp("ca") / "certs", "0123456789abcdef")

    def source(role: Role, name: str) -> CredentialSource:
        identity = Identity(cluster_id=authority.cluster_id, role=role, name=name)
        return CredentialSource(authority.issue(identity, 3600))

    return source


class Site:
    """A listener that waits for worker-0 in a thread, and what dials it."""

    def __init__(self, pool: ThreadPoolExecutor, source: CredentialSource | None, limits: ProbeLimits) -> None:
        self.sockets = OpenSockets()
        self.listener = PairListener(ListenPlace(source=source), self.sockets)
        self.address = self.listener.address
        self.served: Future[None] = pool.submit(self.listener.serve, TOKEN, "worker-0", limits)

    def dial(self, token: str = TOKEN, source: CredentialSource | None = None, peer: str = "server-0") -> MeasuredPair:
        return pairs.dial(self.address, token, peer, LIMITS, source, OpenSockets())

    def connect(self) -> socket.socket:
        host, _, port = self.address.rpartition(":")
        return socket.create_connection((host, int(port)), timeout=10)


@pytest.fixture
def listen() -> Any:
    """Makes sites; whatever still listens at the end is ended."""
    made: list[Site] = []
    with ThreadPoolExecutor(4) as pool:

        def make(source: CredentialSource | None = None, limits: ProbeLimits = LIMITS) -> Site:
            made.append(Site(pool, source, limits))
            return made[-1]

        yield make
        for site in made:
            site.sockets.shut()


def assert_plausible(measured: MeasuredPair) -> None:
    assert measured.up_bytes_per_s > 0
    assert measured.down_bytes_per_s > 0
    assert 0 < measured.round_trip_s <= measured.round_trip_p99_s


def test_a_pair_is_measured_both_ways(listen: Any) -> None:
    site = listen()
    assert_plausible(site.dial())
    site.served.result(10)


def test_a_secured_pair_is_measured_over_tls(listen: Any, sources: Sources) -> None:
    site = listen(sources(Role.SERVER, "server-0"))
    assert_plausible(site.dial(source=sources(Role.WORKER, "worker-0")))
    site.served.result(10)


@pytest.mark.parametrize(("role", "name"), [(Role.WORKER, "worker-1"), (Role.USER, "worker-0")], ids=str)
def test_another_member_is_turned_away_and_the_peer_still_served(
    listen: Any, sources: Sources, role: Role, name: str
) -> None:
    site = listen(sources(Role.SERVER, "server-0"))
    with pytest.raises((AuthError, UnreachableError)):
        site.dial(source=sources(role, name))
    assert_plausible(site.dial(source=sources(Role.WORKER, "worker-0")))
    site.served.result(10)


def test_a_listener_with_another_identity_is_refused(listen: Any, sources: Sources) -> None:
    site = listen(sources(Role.SERVER, "server-1"))
    with pytest.raises(AuthError, match="server-1"):
        site.dial(source=sources(Role.WORKER, "worker-0"))


def test_without_a_certificate_nobody_is_served(listen: Any, sources: Sources) -> None:
    site = listen(sources(Role.SERVER, "server-0"))
    with pytest.raises((AuthError, UnreachableError)):
        site.dial()
    assert not site.served.done()


def test_a_wrong_token_is_turned_away_and_the_peer_still_served(listen: Any) -> None:
    site = listen()
    with pytest.raises(AuthError):
        site.dial(token="0" * 32)
    with site.connect() as stranger:
        stranger.sendall(b"GET / HTTP/1.1\r\nHost: somewhere\r\n\r\n")
    assert_plausible(site.dial())
    site.served.result(10)


def test_nobody_listens(listen: Any) -> None:
    site = listen()
    site.sockets.shut()
    assert site.served.exception(10) is not None
    with pytest.raises(UnreachableError) as caught:
        site.dial()
    assert caught.value.details == {"reason": "refused", "address": site.address}


def test_a_peer_that_does_not_come_is_not_waited_for_long(listen: Any) -> None:
    site = listen(limits=replace(LIMITS, wait_s=0.05))
    with pytest.raises(TimeoutError):
        site.served.result(10)


def test_a_silent_peer_is_given_up(listen: Any) -> None:
    site = listen(limits=replace(LIMITS, total_s=0.05))
    with site.connect() as peer:
        peer.sendall(TOKEN.encode())
        assert peer.recv(1) == b"R"
        with pytest.raises(TimeoutError):
            site.served.result(10)


def test_a_peer_that_sends_without_end_is_cut_off(listen: Any) -> None:
    site = listen()
    chunk = bytes([1]) + bytes(CHUNK_BYTES - 1)
    with site.connect() as peer:
        peer.sendall(TOKEN.encode() + b"U" + chunk * (LIMITS.bulk_bytes // CHUNK_BYTES))
        with pytest.raises(FrameError):
            site.served.result(10)


def test_the_ports_of_a_place_are_tried_in_turn() -> None:
    sockets = OpenSockets()
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(AddressInUseError):
            PairListener(ListenPlace(ports=range(port, port + 1)), sockets)
        found = PairListener(ListenPlace(ports=range(port, port + 50)), sockets)
        assert port < int(found.address.rpartition(":")[2]) < port + 50
        sockets.shut()
        with pytest.raises(ConnectionAbortedError):
            found.serve(TOKEN, "worker-0", LIMITS)


def test_an_ipv6_address_is_bracketed() -> None:
    sockets = OpenSockets()
    listener = PairListener(ListenPlace(host="::1"), sockets)
    with ThreadPoolExecutor(1) as pool:
        served = pool.submit(listener.serve, TOKEN, "worker-0", LIMITS)
        assert listener.address.startswith("[::1]:")
        assert_plausible(pairs.dial(listener.address, TOKEN, "server-0", LIMITS, None, OpenSockets()))
        served.result(10)


@pytest.mark.parametrize(
    ("num_bytes", "elapsed_s", "round_trip_s", "expected"),
    [(100, 1.5, 0.5, 100), (100, 1.0, 0.9, 200), (0, 1.0, 0.0, 0)],
)
def test_a_round_trip_is_not_transfer(num_bytes: int, elapsed_s: float, round_trip_s: float, expected: float) -> None:
    assert session.rate(num_bytes, elapsed_s, round_trip_s) == pytest.approx(expected)


def test_percentiles() -> None:
    assert session.percentile([3, 1, 2], 0.99) == 3
    assert session.percentile(range(1, 201), 0.99) == 198
    assert session.percentile([5], 0.5) == 5


# ---- orders ----


class Desk:
    """A prober whose answers the test awaits."""

    def __init__(self, module: str = "") -> None:
        self.answers: asyncio.Queue[ProbeAnswer] = asyncio.Queue()
        meter = DeviceMeter(module=module, devices=(), threads=1, environ=dict(os.environ))
        self.prober = Prober(self._emit, ListenPlace(), meter, LIMITS)

    def _emit(self, message: AgentMessage) -> None:
        self.answers.put_nowait(message.probe)

    async def ask(self, *, busy: bool = False, **fields: Any) -> ProbeAnswer:
        self.prober.handle(ProbeOrder(**fields), "", busy=busy)
        async with asyncio.timeout(30):
            return await self.answers.get()


def on_a_loop(body: Callable[[Desk, Desk], Any]) -> None:
    async def run() -> None:
        worker, server = Desk(), Desk()
        try:
            await body(worker, server)
        finally:
            await worker.prober.close()
            await server.prober.close()

    asyncio.run(run())


def test_two_agents_measure_each_other_on_order() -> None:
    async def body(worker: Desk, server: Desk) -> None:
        ready = await server.ask(order_id="1", kind=ProbeOrder.KIND_LISTEN, token=TOKEN, peer="worker-0")
        assert (ready.order_id, ready.HasField("error")) == ("1", False)
        dial = {"kind": ProbeOrder.KIND_DIAL, "token": TOKEN, "peer": "server-0", "address": ready.address}
        measured = await worker.ask(order_id="2", **dial)
        assert measured.order_id == "2"
        assert measured.figures.up_bytes_per_s > 0
        again = await worker.ask(order_id="3", **dial)  # a token is for one connection
        # Nobody listens any more, or the listener closes what the kernel had accepted for it.
        assert again.error.code in ("PS-3001", "PS-1005")

    on_a_loop(body)


def test_what_an_agent_does_not_know_is_answered_with_an_error() -> None:
    async def body(worker: Desk, server: Desk) -> None:
        assert (await worker.ask(kind=99)).error.code == "PS-3002"
        assert (await server.ask(kind=ProbeOrder.KIND_COMPUTE)).error.code == DeviceError.code
        assert (await worker.ask(kind=ProbeOrder.KIND_COMPUTE, busy=True)).busy

    on_a_loop(body)


def test_an_agent_that_ends_gives_up_and_takes_few_orders_at_once() -> None:
    async def body(_worker: Desk, server: Desk) -> None:
        for _ in range(MAX_ORDERS):
            assert (await server.ask(kind=ProbeOrder.KIND_LISTEN, token=TOKEN, peer="worker-0")).address
        refused = await server.ask(kind=ProbeOrder.KIND_LISTEN, token=TOKEN, peer="worker-0")
        assert refused.error.code == "PS-1004"

    on_a_loop(body)


# ---- devices ----


def measured_by(directory: Path, code: str) -> Any:
    """What a meter finds whose child runs `code`."""
    package = directory / "played"
    package.mkdir()
    (package / "__init__.py").touch()
    (package / "meter.py").write_text(code)
    environ = {**os.environ, "PYTHONPATH": os.pathsep.join([str(directory), os.environ.get("PYTHONPATH", "")])}
    meter = DeviceMeter(module="played.meter", devices=("cpu",), threads=3, environ=environ)
    (figures,) = asyncio.run(meter.measure())
    return figures


def test_a_device_is_measured_in_a_child(tmp_path: Path) -> None:
    code = "import json, sys\nprint(json.dumps({'flops_per_s': 2.5, 'threads': int(sys.argv[2])}))"
    figures = measured_by(tmp_path, code)
    assert (figures.device, figures.flops_per_s, figures.threads) == ("cpu", 2.5, 3)
    assert not figures.HasField("error")


def test_a_device_that_fails_is_named_with_the_last_words(tmp_path: Path) -> None:
    figures = measured_by(tmp_path, "raise RuntimeError('no kernel image')")
    assert figures.error.code == DeviceError.code
    assert "no kernel image" in figures.error.cause


def test_a_device_that_hangs_is_given_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compute, "DEADLINE_S", 0.2)
    figures = measured_by(tmp_path, "import signal\nsignal.pause()")
    assert figures.error.code == DeviceError.code
