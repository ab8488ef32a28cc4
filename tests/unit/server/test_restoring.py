"""A partition that cannot read its snapshot: it waits for a store that is away, not for a file that is gone."""

from __future__ import annotations

from pathlib import Path

import pytest

from harness.held_pieces import write_part
from harness.played import JOB, Network, dismiss, fill, played_partition, played_plan, played_spec
from harness.played_caller import Caller
from pscluster.step.layout import Layout, TensorSpec
from pscluster.storage.snapshot import part_name
from pscluster.v1.plan_pb2 import Plan, RestorePoint, SnapshotPart
from pscluster.wire.frame import FrameKind
from psserver.partition.checkpoint import saving
from psserver.partition.process import PartitionService

LAYOUT = Layout((TensorSpec(names=("w",), shape=(40,), dtype="float32", kind="trained"),))
STEP = 4


def restore_plan(generation: int = 2, step: int = STEP) -> Plan:
    parts = [SnapshotPart(step=step, partition=0, generation=1, path=part_name(step, 0, 1))] if step else []
    return played_plan(
        LAYOUT, {0: [0]}, generation=generation, restore_generation=generation, resume_step=step,
        restore=RestorePoint(parts=parts),
    )  # fmt: skip


def write_snapshot(store: Path) -> None:
    """A part of step 4, by another partition of the same job, which dies after it."""
    writer = played_partition(Network(), played_spec(1), 0, store)
    writer.adopt(played_plan(LAYOUT, {0: [0]}))
    assert writer.state is not None
    writer.state.values[0].fill_(7.0)
    fill(writer)
    write_part(store / part_name(STEP, 0, 1), writer.state.meta(JOB, STEP, 1, 0, 1), LAYOUT, writer.state.pieces())
    dismiss(writer)


@pytest.fixture
def waiting(network: Network, tmp_path: Path) -> PartitionService:
    """A partition whose store is not there; its plan says to go back to step 4."""
    service = played_partition(network, played_spec(1), 0, tmp_path / "mount")
    service.adopt(restore_plan())
    return service


def reported(service: PartitionService, body: str) -> list[object]:
    return service.link.reported(body)  # type: ignore[attr-defined]


def test_a_store_that_is_away_is_waited_for_and_said_once(
    waiting: PartitionService, network: Network, tmp_path: Path
) -> None:
    for _ in range(3):
        network.fire_timers()
    assert [warning.step for warning in reported(waiting, "warning")] == [STEP]  # type: ignore[attr-defined]
    assert not reported(waiting, "failure") and waiting.plan is None and not waiting.failed
    write_snapshot(tmp_path / "mount")
    network.fire_timers()
    assert waiting.plan is not None and waiting.plan.generation == 2
    assert waiting.state is not None and waiting.version == STEP
    assert waiting.state.values[0][:40].eq(7.0).all()
    assert not network.timers, "nothing is asked for any more"


def test_nobody_is_welcome_meanwhile(waiting: PartitionService, network: Network, tmp_path: Path) -> None:
    early = Caller(network, waiting)
    early.greet("push", restore_generation=2)
    assert not early.near.is_open and not early.received and not network.refused
    write_snapshot(tmp_path / "mount")
    network.fire_timers()
    late = Caller(network, waiting)
    late.greet("push", restore_generation=2)
    assert late.near.is_open and late.kinds() == [FrameKind.WELCOME]


def test_a_newer_plan_comes_first(waiting: PartitionService, network: Network, tmp_path: Path) -> None:
    waiting.adopt(restore_plan(3, step=0))
    assert waiting.plan is not None and waiting.plan.generation == 3
    write_snapshot(tmp_path / "mount")
    network.fire_timers()
    assert waiting.plan.generation == 3 and waiting.version == 0, "the older plan is no more"


def test_patience_has_an_end(waiting: PartitionService, network: Network, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(saving, "RESTORE_PATIENCE_S", 0.0)
    network.fire_timers()
    (failure,) = reported(waiting, "failure")
    assert failure.error.code == "PS-4002" and waiting.failed  # type: ignore[attr-defined]


def test_a_part_that_is_gone_is_not_waited_for(network: Network, tmp_path: Path) -> None:
    (tmp_path / "mount").mkdir()
    service = played_partition(network, played_spec(1), 0, tmp_path / "mount")
    service.adopt(restore_plan())
    (failure,) = reported(service, "failure")
    assert failure.error.details["void_snapshot"] == str(STEP)  # type: ignore[attr-defined]
    assert service.failed and not network.timers
