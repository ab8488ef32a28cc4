"""A probe: which pairs are measured in which round, and what the master does with nodes that do not answer."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from itertools import chain
from typing import Any

import pytest

from pscluster.errors import StateError
from pscluster.v1 import probe_pb2
from psmaster.control.loop import ControlLoop
from psmaster.control.probing import ProbeTimeouts, probe
from psmaster.model.membership import Node, Role
from psmaster.model.probe import ComputeProbe, PairProbe, ProbeExtent
from psmaster.scheduling.probe import ProbeSchedule, rounds, schedule
from psmaster.server import MasterSettings
from tests.unit.master.fake_agent import FakeAgent
from tests.unit.master.test_service import LOCAL, Client, master, run

SHORT = ProbeTimeouts(listen_s=0.2, dial_s=0.2, compute_s=0.2)
FIGURES = probe_pb2.PairFigures(up_bytes_per_s=1e8, down_bytes_per_s=2e8, round_trip_s=0.001, round_trip_p99_s=0.002)


def node(node_id: str, hostname: str = "", **changes: Any) -> Node:
    role = Role.WORKER if node_id.startswith("worker") else Role.SERVER
    fields: dict[str, Any] = {"connected": True, "seen_s": 100.0, "hostname": hostname or node_id, **changes}
    return Node(node_id=node_id, role=role, incarnation="1", **fields)


def scheduled(*nodes: Node) -> ProbeSchedule:
    return schedule({found.node_id: found for found in nodes}, now_s=100.0, suspicion_s=3.0)


def ends(found: ProbeSchedule) -> list[tuple[str, str]]:
    return sorted((pair.dialer.node_id, pair.listener.node_id) for pair in chain(*found.pairs))


def test_each_pair_that_jobs_connect_is_measured_once() -> None:
    found = scheduled(node("worker-0"), node("worker-1"), node("server-0"), node("server-1"))
    assert ends(found) == [
        ("server-0", "server-1"),
        ("worker-0", "server-0"),
        ("worker-0", "server-1"),
        ("worker-1", "server-0"),
        ("worker-1", "server-1"),
    ]
    assert [worker.node_id for worker in chain(*found.workers)] == ["worker-0", "worker-1"]
    assert (found.extent.num_pairs, found.extent.num_nodes) == (5, 2)
    assert found.extent.expected_s > 0


def test_no_host_takes_part_twice_in_a_round() -> None:
    workers = [node(f"worker-{n}", f"host-{n % 4}") for n in range(8)]
    servers = [node(f"server-{n}", f"host-{n}") for n in range(3)]
    found = scheduled(*workers, *servers)
    for pairs in found.pairs:
        used = [host for pair in pairs for host in pair.hosts]
        assert len(used) == len(set(used))
    for computing in found.workers:
        assert len({worker.hostname for worker in computing}) == len(computing)
    assert any(len(pairs) > 1 for pairs in found.pairs)
    assert len(ends(found)) == 8 * 3 + 3


def test_on_one_host_everything_is_measured_one_by_one() -> None:
    found = scheduled(*(node(name, "here") for name in ("worker-0", "worker-1", "server-0")))
    assert [len(pairs) for pairs in found.pairs] == [1, 1]
    assert [len(workers) for workers in found.workers] == [1, 1]


def test_nodes_that_are_not_ready_are_named() -> None:
    found = scheduled(node("worker-0"), node("worker-1", connected=False), node("server-0", seen_s=0.0))
    assert ends(found) == []
    assert found.extent.left_out == ("server-0", "worker-1")


@pytest.mark.parametrize("items", [(), ("a",), ("ab", "cd", "ac", "bd"), ("ab", "ab", "ab")])
def test_rounds_lose_nothing(items: tuple[str, ...]) -> None:
    found = rounds(items, set)
    assert sorted(chain(*found)) == sorted(items)
    assert all(len("".join(chosen)) == len(set("".join(chosen))) for chosen in found)


# ---- with agents ----


def answers(order: probe_pb2.ProbeOrder) -> probe_pb2.ProbeAnswer:
    """What an agent answers that measures."""
    answer = probe_pb2.ProbeAnswer(order_id=order.order_id)
    if order.kind == order.KIND_LISTEN:
        answer.address = f"10.0.0.1:{len(order.token)}"
    elif order.kind == order.KIND_DIAL:
        answer.figures.CopyFrom(FIGURES)
    else:
        answer.devices.add(device="cpu", flops_per_s=5e9, threads=2)
    return answer


@asynccontextmanager
async def cluster(site: MasterSettings, *names: str) -> AsyncIterator[tuple[ControlLoop, dict[str, FakeAgent]]]:
    """A master with connected agents that answer."""
    agents = {name: FakeAgent(site.listen[0], LOCAL, name) for name in names}
    async with AsyncExitStack() as stack:
        for agent in agents.values():
            agent.answers = answers
            stack.push_async_callback(agent.leave)
        core = await stack.enter_async_context(master(site))
        for agent in agents.values():
            await agent.open_stream()
        while not {name for name, node in core.state.nodes.items() if node.connected} >= agents.keys():
            await core.news.wait()
        yield core, agents


async def probed(core: ControlLoop, **arguments: Any) -> list[Any]:
    return [result async for result in probe(core, False, SHORT, **arguments)]


def test_both_sides_get_one_token_and_the_dialler_the_address(site: MasterSettings) -> None:
    async def body() -> None:
        async with cluster(site, "worker-0", "server-0") as (_, agents):
            client = Client(site.listen[0])
            extent, pair, compute = await client.stream("Probe", probe_pb2.ProbeRequest())
            await client.close()
            (listen,), (dial, measure) = agents["server-0"].probes, agents["worker-0"].probes
            assert listen.token == dial.token
            assert (listen.peer, dial.peer, dial.address) == ("worker-0", "server-0", f"10.0.0.1:{len(listen.token)}")
            assert len({listen.order_id, dial.order_id, measure.order_id}) == 3
            assert (extent.extent.num_pairs, extent.extent.num_nodes) == (1, 1)
            assert (pair.pair.dialer, pair.pair.listener, pair.pair.same_host) == ("worker-0", "server-0", True)
            assert pair.pair.figures == FIGURES
            assert compute.compute.devices[0].flops_per_s == 5e9

    run(body())


def test_an_agent_that_does_not_know_the_order_is_named_and_the_rest_is_measured(site: MasterSettings) -> None:
    async def body() -> None:
        async with cluster(site, "worker-0", "worker-1", "server-0") as (core, agents):
            agents["worker-0"].answers = None
            extent, *results = await probed(core)
            assert isinstance(extent, ProbeExtent)
            pairs = {found.dialer: found for found in results if isinstance(found, PairProbe)}
            nodes = {found.node_id: found for found in results if isinstance(found, ComputeProbe)}
            for late in (pairs["worker-0"], nodes["worker-0"]):
                assert late.error is not None
                assert (late.error.code, late.error.detail("reason")) == ("PS-3001", "timed out")
                assert "worker-0" in late.error.cause
            assert len(agents["worker-0"].probes) == 1
            assert pairs["worker-1"].figures is not None
            assert nodes["worker-1"].devices[0].device == "cpu"

    run(body())


def test_the_error_of_a_listener_is_the_pairs(site: MasterSettings) -> None:
    def refuses(order: probe_pb2.ProbeOrder) -> probe_pb2.ProbeAnswer:
        answer = probe_pb2.ProbeAnswer(order_id=order.order_id)
        answer.error.code, answer.error.cause = "PS-4001", "no port"
        return answer

    async def body() -> None:
        async with cluster(site, "worker-0", "server-0") as (core, agents):
            agents["server-0"].answers = refuses
            _, pair, _ = await probed(core)
            assert (pair.figures, pair.error.code) == (None, "PS-4001")
            assert [order.kind for order in agents["worker-0"].probes] == [probe_pb2.ProbeOrder.KIND_COMPUTE]

    run(body())


def test_one_probe_at_a_time(site: MasterSettings) -> None:
    async def body() -> None:
        async with cluster(site, "worker-0", "server-0") as (core, _):
            first = probe(core, False, SHORT)
            assert isinstance(await anext(first), ProbeExtent)
            with pytest.raises(StateError):
                await probed(core)
            await first.aclose()
            assert len(await probed(core)) == 3

    run(body())


def test_a_probe_beside_jobs_must_be_allowed(site: MasterSettings) -> None:
    async def body() -> None:
        async with cluster(site, "worker-0", "server-0", "server-1") as (core, agents):
            client = Client(site.listen[0])
            job_id = await client.submit(workers={"max": 1})
            await agents["worker-0"].until(bool)
            with pytest.raises(StateError) as caught:
                await probed(core)
            assert caught.value.details["jobs"] == job_id
            assert len([result async for result in probe(core, True, SHORT)]) == 5
            await client.close()

    run(body())
