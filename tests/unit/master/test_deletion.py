"""What a deletion takes with it, and what it leaves alone: as clients, and a master that starts again, meet it."""

from __future__ import annotations

import asyncio
import hashlib
import shutil
import threading
import time
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from pscluster.errors import NotFoundError, StateError
from pscluster.rpc.access import CALLER
from pscluster.rpc.access import LOCAL as LOCAL_CALLER
from pscluster.v1 import jobs_pb2
from psmaster.api.jobs import JobsService
from psmaster.control.loop import ControlLoop
from psmaster.control.security import Addresses
from psmaster.model.job import Instant, Job, JobState
from psmaster.model.plan import Part
from psmaster.model.state import MAX_DELETED_SENT, NODE_WAIT_S, Deletion, newest_deleted
from psmaster.server import MasterSettings
from psmaster.storage import manifest, rebuild
from psmaster.storage.bundles import BundleShelf
from psmaster.storage.manifest_publisher import Publisher
from psmaster.storage.sqlite import DATABASE, SqliteStore
from psmaster.storage.store import Batch
from tests.harness.master_world import World, make_job, make_spec
from tests.unit.master.fake_agent import DEADLINE_S, FakeAgent
from tests.unit.master.test_rebuild import save
from tests.unit.master.test_service import LOCAL, Client, with_master

CODE = b"code"
SHA256 = hashlib.sha256(CODE).hexdigest()


async def upload(client: Client) -> None:
    header = jobs_pb2.BundleHeader(sha256=SHA256, size_bytes=len(CODE))
    messages = [jobs_pb2.UploadBundleRequest(header=header), jobs_pb2.UploadBundleRequest(data=CODE)]
    await client.call("UploadBundle", iter(messages))


async def submit(client: Client, **changes: Any) -> str:
    """A job with the bundle, stopped before it ever ran."""
    spec = make_spec(**changes).canonical_json()
    job_id = (await client.call("Submit", jobs_pb2.SubmitRequest(spec_json=spec, bundle_sha256=SHA256))).job_id
    await client.call("Stop", jobs_pb2.GetRequest(job=job_id))
    return str(job_id)


# ---- the code bundle ----


class WatchedLock(asyncio.Lock):
    """Says when somebody has to wait for it."""

    waited_for = threading.Event()

    async def acquire(self) -> Any:
        if self.locked():
            self.waited_for.set()
        return await super().acquire()


@pytest.mark.parametrize("hangs_up", [False, True], ids=["waits", "hangs up"])
def test_a_job_submitted_while_its_bundle_goes_has_it_or_is_refused(
    site: MasterSettings, monkeypatch: pytest.MonkeyPatch, hangs_up: bool
) -> None:
    """The last job with a bundle is deleted, by somebody who waits for the answer or does not; another is submitted
    just before the file is removed."""
    removing, go_on, remove = threading.Event(), threading.Event(), BundleShelf.remove

    def slowly(shelf: BundleShelf, sha256: str) -> None:
        removing.set()
        assert go_on.wait(DEADLINE_S)
        remove(shelf, sha256)

    async def test(client: Client, core: ControlLoop) -> None:
        shelf = BundleShelf(site.state_dir / "bundles")
        service = JobsService(core, shelf, "", Addresses())
        CALLER.set(LOCAL_CALLER)
        await upload(client)
        deleting = asyncio.create_task(service.Delete(jobs_pb2.GetRequest(job=await submit(client)), None))
        assert await asyncio.to_thread(removing.wait, DEADLINE_S)
        if hangs_up:
            deleting.cancel()
            await asyncio.gather(deleting, return_exceptions=True)
        request = jobs_pb2.SubmitRequest(spec_json=make_spec().canonical_json(), bundle_sha256=SHA256)
        submitting = asyncio.create_task(service.Submit(request, None))
        submitting.add_done_callback(lambda _: WatchedLock.waited_for.set())
        assert await asyncio.to_thread(WatchedLock.waited_for.wait, DEADLINE_S)
        go_on.set()
        _, refused = await asyncio.gather(deleting, submitting, return_exceptions=True)
        assert isinstance(refused, NotFoundError) and core.state.jobs == {}
        assert not shelf.has(SHA256) and core.archive.store.bundles() == ()

    WatchedLock.waited_for.clear()
    monkeypatch.setattr(BundleShelf, "remove", slowly)
    monkeypatch.setattr(asyncio, "Lock", WatchedLock)
    with_master(site, test)


# ---- what is remembered of it ----


def test_a_deletion_is_remembered_until_its_store_is_gone_and_no_node_is_waited_for(world: World) -> None:
    world.running()
    job = world.job()
    world.take(lambda tx: tx.stop(job.job_id))
    world.snapshot(5)
    world.finish(5, stopped=True)
    world.take(lambda tx: tx.delete(job.job_id))
    world.restart()
    (held,) = world.state.deletions.values()
    assert held == Deletion(job_id=job.job_id, store=job.store, deleted_s=world.now.unix_s)
    with pytest.raises(StateError, match="is taken"):
        world.submit(job.job_id)
    later(world, 2 * NODE_WAIT_S)
    assert list(world.state.deletions) == [job.job_id], "its store may be full still"
    world.take(lambda tx: tx.removed(job.job_id), lambda tx: tx.removed("nobody"))
    assert world.store.deletions() == {}


def test_a_store_that_is_gone_is_remembered_for_the_nodes_that_are_away(world: World) -> None:
    world.submit()
    world.take(lambda tx: tx.stop("job-aaaaaa"))
    world.take(lambda tx: tx.delete("job-aaaaaa"))
    world.restart()
    assert world.state.deletions["job-aaaaaa"].removed, "it never ran: nobody wrote there"
    later(world, NODE_WAIT_S)
    assert list(world.store.deletions()) == ["job-aaaaaa"]
    later(world, 1.0)
    assert world.store.deletions() == {}


@pytest.fixture
def world() -> World:
    return World()


def later(world: World, seconds: float) -> None:
    world.now = Instant(mono_s=world.now.mono_s, unix_s=world.now.unix_s + seconds)
    world.take()


def test_nodes_are_told_of_the_newest_ones() -> None:
    many = {
        f"job-{number}": deletion(f"job-{number}", deleted_s=float(number)) for number in range(MAX_DELETED_SENT + 7)
    }
    received = newest_deleted(many)
    assert (len(received), received[0], received[-1]) == (MAX_DELETED_SENT, f"job-{MAX_DELETED_SENT + 6}", "job-7")


def deletion(job_id: str, deleted_s: float, store: str = "/store") -> Deletion:
    return Deletion(job_id=job_id, store=store, deleted_s=deleted_s)


def test_a_node_that_was_away_hears_from_another_master_of_all_that_was_deleted(site: MasterSettings) -> None:
    now_s = time.time()
    site.state_dir.mkdir()
    with closing(SqliteStore(site.state_dir / DATABASE)) as store:
        gone = tuple(replace(deletion(f"gone-{number}", now_s - 300 + number), removed=True) for number in range(150))
        store.write(Batch(deletions=gone))

    async def test(client: Client, _core: ControlLoop) -> None:
        await upload(client)
        job_id = await submit(client)
        await client.call("Delete", jobs_pb2.GetRequest(job=job_id))
        agent = FakeAgent(site.listen[0], LOCAL, "server-0")
        agent.node.depot_address = "127.0.0.1:1"
        await agent.open_stream()
        await agent.until(lambda _: bool(agent.deleted))
        assert agent.deleted == [job_id, *(one.job_id for one in reversed(gone))]
        await agent.leave()

    with_master(site, test)


# ---- what a kill leaves half done ----


def test_a_removal_that_a_kill_prevented_is_done_by_the_next_master(
    site: MasterSettings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The job is deleted in the database; the master is killed before it removes anything."""
    job, outside = stopped_job(site, tmp_path / "shared")
    directory = site.state_dir / "jobs" / job.job_id

    async def delete(client: Client, core: ControlLoop) -> None:
        await client.call("Delete", jobs_pb2.GetRequest(job=job.job_id))
        assert not core.state.deletions[job.job_id].removed

    with monkeypatch.context() as killed:
        killed.setattr(Publisher, "_request", lambda *_, **__: None)
        with_master(site, delete)
    assert outside.exists() and directory.exists()
    copy = shutil.copytree(site.state_dir, tmp_path / "copy")
    assert rebuild.rebuild(copy, (str(tmp_path / "shared"),), 1.0) == [], "it was deleted"

    async def look(_client: Client, core: ControlLoop) -> None:
        while not core.state.deletions[job.job_id].removed:
            await core.news.wait()

    with_master(site, look)
    assert not outside.exists() and not directory.exists()


def stopped_job(site: MasterSettings, root: Path) -> tuple[Job, Path]:
    """A stored job with a snapshot in a store of its own, and that store."""
    outside = root / "job-aaaaaa"
    job = replace(make_job(), store=str(outside), state=JobState.STOPPED, generation=1)
    save(outside, job, 10)
    (site.state_dir / "jobs" / job.job_id / "logs").mkdir(parents=True)
    with closing(SqliteStore(site.state_dir / DATABASE)) as store:
        store.write(Batch(jobs=(job,), parts=parts_of(outside, job)))
    return job, outside


def parts_of(outside: Path, job: Job) -> tuple[tuple[str, Part], ...]:
    path = outside / manifest.manifest_name(10)
    return tuple((job.job_id, part) for part in manifest.decode(path.read_bytes(), str(path)).point.parts)
