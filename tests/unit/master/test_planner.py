"""Admission and seating."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest

from psmaster.model.membership import NodeView, Role
from psmaster.model.plan import Placement, ProcessKind
from psmaster.scheduling.admission import admit, choose_node, max_trainers
from tests.harness.master_world import make_job, make_spec


def view(
    node_id: str,
    slots: int = 1,
    available: int | None = None,
    ready: bool = True,
    devices: int = 0,
    held: str = "",
    undecided: int = 0,
) -> NodeView:
    """`devices`: how many CUDA devices it has; `held`: the numbers of those that other jobs hold."""
    return NodeView(
        node_id=node_id,
        role=Role.WORKER if node_id.startswith("worker") else Role.SERVER,
        incarnation="1",
        alive=True,
        ready=ready,
        slots=slots,
        available=slots if available is None else available,
        devices=tuple(f"cuda:{index}" for index in range(devices)),
        held=frozenset(f"cuda:{index}" for index in held),
        undecided=undecided,
    )


def views(*nodes: NodeView) -> dict[str, NodeView]:
    return {node.node_id: node for node in nodes}


def test_all_or_nothing_is_admitted() -> None:
    spec = make_spec(workers={"min": 3, "max": None}, servers={"partitions": 2})
    few = admit(spec, views(view("worker-0"), view("worker-1"), view("server-0", 2)))
    assert not few.trainers
    assert re.search("3 workers.* 2 ready", few.reason)
    assert not few.possible
    enough = admit(spec, views(*(view(f"worker-{i}") for i in range(4)), view("server-0", 2)))
    assert enough.trainers == ("worker-0", "worker-1", "worker-2", "worker-3")
    assert enough.partitions == ("server-0", "server-0")


def test_what_other_jobs_hold_is_waited_for_by_name_of_the_resource() -> None:
    spec = make_spec(workers={"min": 2}, servers={"partitions": 1})
    waits = admit(spec, views(view("worker-0"), view("worker-1", available=0), view("server-0")))
    assert re.search("2 workers.* 1 free", waits.reason)
    assert waits.possible


def test_both_shortages_are_told() -> None:
    reason = admit(make_spec(workers={"min": 2}), {}).reason
    assert reason == "waits for 2 workers: 0 ready and 2 servers: 0 ready"


def test_a_node_that_is_not_ready_gets_nothing() -> None:
    spec = make_spec(servers={"partitions": 1})
    assert not admit(spec, views(view("worker-0", ready=False), view("server-0"))).trainers


def test_partitions_go_round_the_servers() -> None:
    spec = make_spec(servers={"partitions": 5})
    nodes = views(view("worker-0"), view("server-0", 1), view("server-1", 3), view("server-10", 3))
    assert admit(spec, nodes).partitions == ("server-0", "server-1", "server-10", "server-1", "server-10")


def test_no_more_trainers_than_shards() -> None:
    assert max_trainers(make_spec(workers={"max": None})) == 8
    assert max_trainers(make_spec(workers={"max": 3})) == 3
    assert max_trainers(make_spec(workers={"max": 30})) == 8


def test_a_replacement_prefers_its_former_node() -> None:
    job, nodes = make_job(), views(view("worker-0", 4), view("worker-1", 1))
    trainer, none = ProcessKind.TRAINER, frozenset[str]()
    assert choose_node(job, nodes, trainer, none, "worker-1") is nodes["worker-1"]
    assert choose_node(job, nodes, trainer, none, "worker-1", ["worker-1"]) is nodes["worker-0"]
    assert choose_node(job, nodes, trainer, none, planned=[*["worker-0"] * 4, "worker-1"]) is None
    assert choose_node(job, nodes, trainer, frozenset({"worker-0", "worker-1"})) is None
    assert choose_node(job, nodes, ProcessKind.PARTITION, none) is None


def test_what_the_job_itself_holds_is_taken() -> None:
    nodes = views(view("worker-0", 1), view("worker-1", 1))
    held = Placement(kind=ProcessKind.TRAINER, rank=0, node_id="worker-0")
    job = replace(make_job(), trainers=(held,))
    assert choose_node(job, nodes, ProcessKind.TRAINER, frozenset(), "worker-0") is nodes["worker-1"]


# ---- devices ----


@pytest.mark.parametrize(
    ("device", "node", "space"),
    [
        ("auto", view("worker-0", 3), 3),
        ("auto", view("worker-0", 3, devices=2, held="01"), 3),
        ("cpu", view("worker-0", 3, available=1, devices=2), 1),
        ("cuda", view("worker-0", 3), 0),
        ("cuda", view("worker-0", 3, devices=2), 2),
        ("cuda", view("worker-0", 1, devices=2), 1),
        ("cuda", view("worker-0", 3, available=2, devices=2, held="1"), 1),
        ("cuda", view("worker-0", 2, available=-1, devices=2), 0),
        ("cuda", view("worker-0", 3, devices=3, held="1", undecided=1), 1),
        ("cuda", view("worker-0", 3, devices=2, held="1", undecided=2), 0),
        ("auto", view("worker-0", 3, devices=2, held="1", undecided=2), 3),
        ("cuda:1", view("worker-0", 3, devices=2), 1),
        ("cuda:1", view("worker-0", 3, devices=2, undecided=1), 0),
        ("cuda:1", view("worker-0", 3, devices=2, held="0"), 1),
        ("cuda:1", view("worker-0", 3, devices=2, held="1"), 0),
        ("cuda:2", view("worker-0", 3, devices=2), 0),
    ],
)
def test_a_device_each_where_one_is_asked_for(device: str, node: NodeView, space: int) -> None:
    assert node.free_slots(device) == space


def test_only_workers_with_the_device_are_counted() -> None:
    spec = make_spec(workers={"min": 2, "max": None, "device": "cuda"}, servers={"partitions": 1})
    nodes = views(view("worker-0", 4), view("worker-1", 4, devices=1), view("server-0"))
    waits = admit(spec, nodes)
    assert (waits.reason, waits.possible) == ("waits for 2 workers with a CUDA device: 1 ready", False)
    admitted = admit(spec, nodes | views(view("worker-2", 4, devices=2)))
    assert admitted.trainers == ("worker-1", "worker-2", "worker-2")
    assert admitted.partitions == ("server-0",)


def test_devices_that_other_jobs_hold_are_waited_for() -> None:
    nodes = views(view("worker-0", 2, devices=2, held="0"), view("server-0"))
    two = admit(make_spec(workers={"min": 2, "device": "cuda"}, servers={"partitions": 1}), nodes)
    assert re.search("2 workers.*CUDA.* 1 free", two.reason)
    assert two.possible
    first = admit(make_spec(workers={"min": 1, "device": "cuda:0"}, servers={"partitions": 1}), nodes)
    assert re.search("1 worker .*cuda:0.* 0 free", first.reason)


def test_one_trainer_a_node_where_the_device_is_named() -> None:
    spec = make_spec(workers={"min": 1, "max": None, "device": "cuda:1"}, servers={"partitions": 1})
    nodes = views(view("worker-0", 4, devices=4), view("worker-1", 4, devices=2), view("worker-2", 4, devices=1))
    assert admit(spec, nodes | views(view("server-0"))).trainers == ("worker-0", "worker-1")


def test_a_replacement_goes_where_its_device_is() -> None:
    none = frozenset[str]()
    nodes = views(view("worker-0", 4), view("worker-1", 2, devices=2, held="0"))

    def chosen(device: str, taken: int = 0, preferred: str = "") -> NodeView | None:
        job = make_job(workers={"device": device})
        return choose_node(job, nodes, ProcessKind.TRAINER, none, preferred, ["worker-1"] * taken)

    assert chosen("auto") is nodes["worker-0"]
    assert chosen("cuda") is nodes["worker-1"]
    assert chosen("cuda", preferred="worker-0") is nodes["worker-1"]
    assert chosen("cuda", taken=1) is None
    assert chosen("cuda:0") is None
    assert chosen("cuda:1") is nodes["worker-1"]
