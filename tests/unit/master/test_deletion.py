"""What a deletion takes with it, and what it leaves alone: as clients, and a master that starts again, meet it."""

from __future__ import annotations

import asyncio
import hashlib
import threading
from pathlib import Path
from typing import Any

import pytest

from pscluster.errors import NotFoundError
from pscluster.v1 import jobs_pb2
from psmaster.bundles import BundleShelf
from psmaster.core import Core
from psmaster.jobs_service import Identity, JobsService
from psmaster.settings import MasterSettings
from tests.unit.master.fake_agent import DEADLINE_S
from tests.unit.master.test_service import TOKEN, Client, with_master
from tests.unit.master.world import make_spec

CODE = b"code"
SHA256 = hashlib.sha256(CODE).hexdigest()


@pytest.fixture
def settings(tmp_path: Path) -> MasterSettings:
    token_file = tmp_path / "token"
    token_file.touch(mode=0o600)
    token_file.write_text(TOKEN)
    return MasterSettings(
        state_dir=tmp_path / "state", token_file=token_file, listen=(f"unix:{tmp_path}/m.sock",), suspicion_s=30.0
    )


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
    settings: MasterSettings, monkeypatch: pytest.MonkeyPatch, hangs_up: bool
) -> None:
    """The last job with a bundle is deleted, by somebody who waits for the answer or does not; another is submitted
    just before the file is removed."""
    removing, go_on, remove = threading.Event(), threading.Event(), BundleShelf.remove

    def slowly(shelf: BundleShelf, sha256: str) -> None:
        removing.set()
        assert go_on.wait(DEADLINE_S)
        remove(shelf, sha256)

    async def test(client: Client, core: Core) -> None:
        shelf = BundleShelf(settings.state_dir / "bundles")
        service = JobsService(core, shelf, Identity(started_s=0.0, metrics_address=""))
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
    with_master(settings, test)
