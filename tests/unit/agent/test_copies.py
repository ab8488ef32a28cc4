"""Copies of snapshot parts: complete or refused, on a second node before they are reported, fetched when missing."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Coroutine
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from pscluster.agent import copies, depot
from pscluster.agent.copies import Copies
from pscluster.client import calls
from pscluster.client.records import SnapshotPart as PartRecord
from pscluster.errors import AuthError, DamagedError, FrameError, NotFoundError, UnreachableError
from pscluster.rpc import Access
from pscluster.rpc.server import Revocations
from pscluster.storage import open_store
from pscluster.storage.snapshot import part_name, read_part
from pscluster.v1.agents_pb2 import DepotAddress
from pscluster.v1.depot_pb2 import TakePartRequest
from pscluster.v1.plan_pb2 import PartitionPlacement, Plan, ProcessReport, ProcessSpec, RestorePoint, SnapshotPart

TOKEN = "a-token"
ACCESS = Access(token=TOKEN)
DATA = bytes(range(256)) * 10_000  # several chunks


def run(test: Coroutine[Any, Any, None]) -> None:
    async def bounded() -> None:
        async with asyncio.timeout(60):
            await test

    asyncio.run(bounded())


def write(directory: Path, step: int = 4, partition: int = 0, data: bytes = DATA) -> SnapshotPart:
    name = part_name(step, partition, 1)
    written = open_store(directory / "job-a").write(name, [data])
    return SnapshotPart(
        step=step,
        partition=partition,
        generation=1,
        path=name,
        size_bytes=written.size_bytes,
        checksum=written.checksum,
    )


class Nodes:
    """Nodes with depots, by name; `stop` ends one's depot, as its death would."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.addresses: dict[str, str] = {}
        self._stacks: dict[str, AsyncExitStack] = {}

    async def start(self, node_id: str) -> None:
        stack = self._stacks[node_id] = AsyncExitStack()
        self.addresses[node_id] = await stack.enter_async_context(
            depot.serving(self.root / node_id, ["127.0.0.1:0"], ACCESS, Revocations())
        )

    async def stop(self, node_id: str) -> None:
        await self._stacks.pop(node_id).aclose()

    async def take(self, node_id: str, part: SnapshotPart, job_id: str = "job-a", access: Access = ACCESS) -> None:
        """Have a node get server-0's part."""
        request = TakePartRequest(job_id=job_id, part=part, source=self.addresses["server-0"])
        await depot.give(self.addresses[node_id], access, request)

    def copies(self, node_id: str) -> Copies:
        made = Copies(node_id, ACCESS, self.root / node_id, self.addresses[node_id])
        made.update_peers(DepotAddress(node_id=name, address=address) for name, address in self.addresses.items())
        return made


@asynccontextmanager
async def nodes(root: Path, *names: str) -> AsyncIterator[Nodes]:
    made = Nodes(root)
    try:
        for name in names:
            await made.start(name)
        yield made
    finally:
        for name in list(made._stacks):
            await made.stop(name)


def spec(store: object = None) -> ProcessSpec:
    return ProcessSpec(
        process_id="job-a/partition-0/1",
        kind=ProcessSpec.KIND_PARTITION,
        job_id="job-a",
        rank=0,
        attempt=1,
        store="/shared/job-a",
        spec_json=json.dumps({"durability": {"store": store}}),
    )


def plan(part: SnapshotPart, generation: int = 2, **fields: Any) -> Plan:
    placements = fields.pop("partitions", [PartitionPlacement(attempt=1)])
    restore = RestorePoint(step=part.step, parts=[part])
    return Plan(generation=generation, restore_generation=generation, restore=restore, partitions=placements, **fields)


async def copied(
    held: Copies, process_spec: ProcessSpec, part: SnapshotPart, newest: Plan | None = None
) -> ProcessReport:
    reports: asyncio.Queue[ProcessReport] = asyncio.Queue()
    done: asyncio.Queue[str] = asyncio.Queue()
    held.copy(process_spec, newest, ProcessReport(snapshot_part=part), reports.put_nowait, done.put_nowait)
    report = await reports.get()
    assert await done.get() == part.path
    return report


def nothing(_report: ProcessReport) -> None:
    raise AssertionError("there is nothing to tell")


def test_only_partitions_of_jobs_without_a_store_keep_their_own(tmp_path: Path) -> None:
    held = Copies("server-0", ACCESS, tmp_path)
    mine = spec()
    assert held.use_own_store(mine) and mine.own_store and mine.store == str(tmp_path / "job-a")
    for other in (spec("s3://bucket/x"), ProcessSpec(kind=ProcessSpec.KIND_TRAINER, job_id="job-a", spec_json="{}")):
        before = other.store
        assert not held.use_own_store(other) and not other.own_store and other.store == before
    assert not Copies("server-0", ACCESS, None).use_own_store(spec())


def test_a_part_is_reported_once_a_second_node_has_it(tmp_path: Path) -> None:
    async def test() -> None:
        async with nodes(tmp_path, "server-0", "server-1", "server-2") as made:
            held, process_spec, part = made.copies("server-1"), spec(), write(tmp_path / "server-1")
            held.use_own_store(process_spec)
            report = await copied(held, process_spec, part)
            assert list(report.snapshot_part.nodes) == ["server-1", "server-2"], "the next in the ring"
            assert (tmp_path / "server-2" / "job-a" / part.path).read_bytes() == DATA

    run(test())


def test_a_node_that_is_away_is_passed_over(tmp_path: Path) -> None:
    async def test() -> None:
        async with nodes(tmp_path, "server-0", "server-1", "server-2") as made:
            held, process_spec, part = made.copies("server-1"), spec(), write(tmp_path / "server-1")
            held.use_own_store(process_spec)
            await made.stop("server-2")
            report = await copied(held, process_spec, part)
            assert list(report.snapshot_part.nodes) == ["server-1", "server-0"]

    run(test())


def test_a_part_that_nobody_takes_is_a_warning_and_does_not_count(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(copies, "COPY_TIMEOUT_S", 0.0)

    async def test() -> None:
        async with nodes(tmp_path, "server-0") as made:
            held, process_spec, part = made.copies("server-0"), spec(), write(tmp_path / "server-0")
            held.use_own_store(process_spec)
            report = await copied(held, process_spec, part)
            assert report.WhichOneof("body") == "warning"
            assert report.warning.error.code == "PS-4002"
            assert report.warning.error.details == {"unwritten": "4", "generation": "1"}
            assert "server-0" in report.warning.error.cause

    run(test())


def test_heldthat_are_done_with_go_with_the_next_one(tmp_path: Path) -> None:
    async def test() -> None:
        async with nodes(tmp_path, "server-0", "server-1") as made:
            held, process_spec = made.copies("server-0"), spec()
            held.use_own_store(process_spec)
            for step in (4, 8, 12):
                await copied(held, process_spec, write(tmp_path / "server-0", step, data=b"x"), Plan(kept_steps=[8]))
            write(tmp_path / "server-1", 4, partition=1, data=b"its own")
            await copied(held, process_spec, write(tmp_path / "server-0", 16, data=b"x"), Plan(kept_steps=[8, 12]))
            left = open_store(tmp_path / "server-1" / "job-a").names()
            assert left == sorted([part_name(4, 1, 1), *(part_name(step, 0, 1) for step in (8, 12, 16))])

    run(test())


@pytest.mark.parametrize("damage", ["gone", "flipped"])
def test_a_part_comes_back_from_whichever_node_has_it(damage: str, tmp_path: Path) -> None:
    async def test() -> None:
        async with nodes(tmp_path, "server-0", "server-1") as made:
            held, process_spec, part = made.copies("server-0"), spec(), write(tmp_path / "server-1")
            held.use_own_store(process_spec)
            part.nodes.extend(["server-9", "server-0", "server-1"])
            if damage == "flipped":
                write(tmp_path / "server-0", data=b"\1" + DATA[1:])
            order = plan(part)
            assert held.must_fetch(process_spec, None, order)
            reported: asyncio.Queue[Plan] = asyncio.Queue()
            held.fetch(process_spec, order, reported.put_nowait, nothing)
            newer = plan(part, kept_steps=[4])
            assert held.must_fetch(process_spec, order, newer), "plans keep their order"
            held.fetch(process_spec, newer, reported.put_nowait, nothing)
            assert await reported.get() == newer and reported.empty()
            assert (tmp_path / "server-0" / "job-a" / part.path).read_bytes() == DATA
            assert not held.must_fetch(process_spec, newer, plan(part, kept_steps=[4, 8]))

    run(test())


def test_a_part_that_every_node_has_lost_is_left_to_the_partition(tmp_path: Path) -> None:
    async def test() -> None:
        async with nodes(tmp_path, "server-0", "server-1", "server-2") as made:
            held, process_spec, part = made.copies("server-0"), spec(), write(tmp_path / "elsewhere")
            held.use_own_store(process_spec)
            write(tmp_path / "server-1", data=b"\1" + DATA[1:])
            part.nodes.extend(["server-1", "server-2"])
            assert await held.wait_for_part(process_spec, lambda: plan(part), nothing) == part
            with pytest.raises(DamagedError, match="is gone"):  # and so the job falls back to an older snapshot
                read_part(tmp_path / "server-0" / "job-a" / part.path)

    run(test())


def test_waiting_for_unreachable_nodes_is_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(copies, "AWAY_REPORT_AFTER_S", 0.0)

    async def test() -> None:
        async with nodes(tmp_path, "server-0", "server-1", "server-2") as made:
            held, process_spec, part = made.copies("server-0"), spec(), write(tmp_path / "server-2")
            held.use_own_store(process_spec)
            part.nodes.extend(["server-1", "server-2", "server-9"])  # the first has it no more
            await made.stop("server-2")
            reported: asyncio.Queue[Plan] = asyncio.Queue()
            reports: asyncio.Queue[ProcessReport] = asyncio.Queue()
            held.fetch(process_spec, plan(part), reported.put_nowait, reports.put_nowait)
            warning = (await reports.get()).warning
            assert warning.step == 4 and not warning.error.details
            assert warning.error.code == "PS-3001"
            assert all(name in warning.error.cause for name in ("partition-0", "server-2", "server-9"))
            assert "server-1" not in warning.error.cause
            assert reported.empty()
            await made.start("server-2")
            held.update_peers(DepotAddress(node_id=name, address=address) for name, address in made.addresses.items())
            assert (await reported.get()).restore.parts[0] == part
            assert (tmp_path / "server-0" / "job-a" / part.path).read_bytes() == DATA
            assert reports.empty()

    run(test())


def test_nodes_that_are_away_for_an_hour_count_as_lost(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(copies, "AWAY_TIMEOUT_S", 0.0)

    async def test() -> None:
        async with nodes(tmp_path, "server-0") as made:
            held, process_spec, part = made.copies("server-0"), spec(), write(tmp_path / "elsewhere")
            held.use_own_store(process_spec)
            part.nodes.extend(["server-1", "server-2"])
            await held.wait_for_part(process_spec, lambda: plan(part), nothing)
            with pytest.raises(DamagedError, match="is gone"):
                read_part(tmp_path / "server-0" / "job-a" / part.path)

    run(test())


def test_a_process_without_a_plan_needs_no_part(tmp_path: Path) -> None:
    process_spec, held = spec(), Copies("server-0", ACCESS, tmp_path)
    held.use_own_store(process_spec)
    run(_nothing_to_wait_for(held, process_spec))


async def _nothing_to_wait_for(held: Copies, process_spec: ProcessSpec) -> None:
    assert await held.wait_for_part(process_spec, lambda: process_spec.plan, nothing) is None


def test_a_standby_needs_no_part(tmp_path: Path) -> None:
    part = write(tmp_path / "server-0")
    part.nodes.extend(["server-1", "server-2"])
    process_spec, held = spec(), Copies("server-0", ACCESS, tmp_path)
    held.use_own_store(process_spec)
    assert held.must_fetch(process_spec, None, plan(part))
    assert not held.must_fetch(process_spec, None, plan(part, partitions=[PartitionPlacement(attempt=2)]))


def test_a_copy_that_fails_in_any_way_is_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def test() -> None:
        async with nodes(tmp_path, "server-0", "server-1", "server-2") as made:
            held, process_spec, part = made.copies("server-0"), spec(), write(tmp_path / "server-0")
            held.use_own_store(process_spec)

            async def leaves(*_: object) -> None:
                held.update_peers([])  # no other node is left
                raise UnreachableError("it is gone")

            monkeypatch.setattr(copies, "COPY_TIMEOUT_S", 0.0)
            monkeypatch.setattr(depot, "give", leaves)
            assert "server-2" in (await copied(held, process_spec, part)).warning.error.cause

            async def breaks(*_: object) -> None:
                raise KeyError("a bug")

            held = made.copies("server-0")
            monkeypatch.setattr(depot, "give", breaks)
            warning = (await copied(held, process_spec, part)).warning
            assert (warning.error.code, warning.error.details["unwritten"]) == ("PS-9001", "4"), warning

    run(test())


@pytest.mark.parametrize("ends", ["newer plan", "process gone"])
def test_nobody_waits_for_a_part_that_is_no_longer_asked_for(ends: str, tmp_path: Path) -> None:
    async def test() -> None:
        async with nodes(tmp_path, "server-0") as made:
            held, process_spec, part = made.copies("server-0"), spec(), write(tmp_path / "elsewhere")
            held.use_own_store(process_spec)
            part.nodes.extend(["server-1"])
            reported: asyncio.Queue[Plan] = asyncio.Queue()
            held.fetch(process_spec, plan(part), reported.put_nowait, nothing)
            if ends == "newer plan":
                held.fetch(process_spec, plan(write(tmp_path / "server-0", step=2), 3), reported.put_nowait, nothing)
            else:
                held.cancel_fetch(process_spec.process_id)
            await asyncio.wait(held._tasks)
            assert reported.qsize() == (ends == "newer plan")

    run(test())


@pytest.mark.parametrize(
    ("change", "error"),
    [
        ({"path": "../../escape"}, FrameError),
        ({"path": "step-1.part-0.generation-1.snapshot/../../x"}, FrameError),
        ({"checksum": "crc32c:00000000"}, DamagedError),
        ({"size_bytes": 5}, FrameError),
        ({"size_bytes": len(DATA) + 5}, DamagedError),
    ],
)
def test_what_is_not_a_part_or_not_whole_leaves_nothing(
    change: dict[str, Any], error: type[Exception], tmp_path: Path
) -> None:
    async def test() -> None:
        async with nodes(tmp_path, "server-0", "server-1") as made:
            part = write(tmp_path / "server-0")
            source = tmp_path / "server-0" / "job-a" / part.path
            for name, value in change.items():
                setattr(part, name, value)
            if part.path != source.name:  # there is something to get under that name
                (source.parent / part.path).parent.mkdir(parents=True, exist_ok=True)
                (source.parent / part.path).write_bytes(DATA)
            with pytest.raises(error):
                await made.take("server-1", part)
            assert [path for path in (tmp_path / "server-1").rglob("*") if path.is_file()] == []

    run(test())


def test_a_job_id_that_leads_elsewhere_and_a_wrong_token_are_refused(tmp_path: Path) -> None:
    async def test() -> None:
        async with nodes(tmp_path, "server-0", "server-1") as made:
            part, here = write(tmp_path / "server-0"), tmp_path / "here"
            for job_id in ("../x", "", ".hidden", "a/b"):
                with pytest.raises(FrameError):
                    await made.take("server-1", part, job_id=job_id)
                with pytest.raises(FrameError):
                    await depot.get(made.addresses["server-0"], ACCESS, job_id, part, here)
            with pytest.raises(AuthError):
                await made.take("server-1", part, access=Access(token="wrong"))
            with pytest.raises(AuthError):
                await depot.get(made.addresses["server-0"], Access(token="wrong"), "job-a", part, here)
            with pytest.raises(NotFoundError):
                await depot.get(made.addresses["server-1"], ACCESS, "job-a", part, here)
            assert not (tmp_path / "server-1").exists()
            assert not list(here.glob("*"))

    run(test())


def test_who_cannot_reach_the_source_says_so(tmp_path: Path) -> None:
    async def test() -> None:
        async with nodes(tmp_path, "server-0", "server-1") as made:
            part, address = write(tmp_path / "server-0"), made.addresses["server-0"]
            await made.stop("server-0")
            with pytest.raises(UnreachableError, match=address):
                await made.take("server-1", part)
            assert [path for path in (tmp_path / "server-1").rglob("*") if path.is_file()] == []
            await made.stop("server-1")
            with pytest.raises(UnreachableError, match=made.addresses["server-1"]):
                await made.take("server-1", part)

    run(test())


def test_psctl_gets_a_part_from_whichever_node_answers(tmp_path: Path) -> None:
    async def test() -> None:
        async with nodes(tmp_path, "server-0", "server-1") as made:
            part = write(tmp_path / "server-1")
            await made.stop("server-0")
            record = PartRecord(
                partition=0, path=part.path, size_bytes=part.size_bytes, checksum=part.checksum,
                nodes=("server-0", "server-1"),
            )  # fmt: skip
            found = await asyncio.to_thread(calls.fetch, made.addresses, ACCESS, "job-a", record, tmp_path / "here")
            assert found.read_bytes() == DATA
            with pytest.raises(NotFoundError, match="is on server-0, server-1"):
                await asyncio.to_thread(calls.fetch, {}, ACCESS, "job-a", record, tmp_path / "here")

    run(test())


def test_what_is_left_of_deleted_jobs_goes(tmp_path: Path) -> None:
    async def test() -> None:
        async with nodes(tmp_path, "server-0") as made:
            held = made.copies("server-0")
            write(tmp_path / "server-0")
            open_store(tmp_path / "server-0" / "job-b").write("x", [b"x"])
            held.forget(["job-a", "job-never", "../server-0"])
            await asyncio.wait(held._tasks)
            assert [path.name for path in (tmp_path / "server-0").iterdir()] == ["job-b"]

    run(test())
