"""Bundles on a node and the agent's directories: verified, bounded, cleaned after a killed predecessor."""

from __future__ import annotations

import asyncio
import hashlib
import os
import stat
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest

from pscluster.agent import directories
from pscluster.agent.directories import AgentDirectories, BundleCache
from pscluster.errors import BundleError, StorageError
from pscluster.job.bundle import pack
from pscluster.settings import make_runtime_dir, remove_runtime_dir, runtime_dir


class Shelf:
    """Bundles by digest, and how often each was fetched."""

    def __init__(self) -> None:
        self.held: dict[str, bytes] = {}
        self.fetched: list[str] = []

    def put(self, directory: Path, name: str) -> str:
        code = directory / name
        code.mkdir(parents=True)
        (code / "task.py").write_text(f"NAME = {name!r}\n")
        bundle = pack(code)
        self.held[bundle.sha256] = bundle.data
        return bundle.sha256

    async def fetch(self, sha256: str) -> AsyncIterator[bytes]:
        self.fetched.append(sha256)
        data = self.held[sha256]
        for start in range(0, len(data), 64):
            await asyncio.sleep(0)
            yield data[start : start + 64]


@pytest.fixture
def shelf() -> Shelf:
    return Shelf()


@pytest.fixture
def store(tmp_path: Path) -> Path:
    (tmp_path / "bundles").mkdir()
    return tmp_path / "bundles"


def test_is_fetched_once_however_many_ask(tmp_path: Path, store: Path, shelf: Shelf) -> None:
    sha256 = shelf.put(tmp_path, "one")
    targets = [tmp_path / f"p{number}" for number in range(5)]

    async def body() -> None:
        cache = BundleCache(store, shelf.fetch)
        await asyncio.gather(*(cache.unpack(sha256, target) for target in targets))
        await BundleCache(store, shelf.fetch).unpack(sha256, tmp_path / "later")

    asyncio.run(body())
    assert {(target / "task.py").read_text() for target in [*targets, tmp_path / "later"]} == {"NAME = 'one'\n"}
    assert shelf.fetched == [sha256]
    assert [path.name for path in store.iterdir()] == [f"{sha256}.tar.gz"]


def test_what_one_process_writes_no_other_sees(tmp_path: Path, store: Path, shelf: Shelf) -> None:
    sha256 = shelf.put(tmp_path, "one")

    async def body() -> None:
        cache = BundleCache(store, shelf.fetch)
        await cache.unpack(sha256, tmp_path / "first")
        (tmp_path / "first" / "task.py").write_text("changed")
        (tmp_path / "first" / "cache.txt").write_text("seen")
        await cache.unpack(sha256, tmp_path / "second")

    asyncio.run(body())
    assert {path.name: path.read_text() for path in (tmp_path / "second").iterdir()} == {"task.py": "NAME = 'one'\n"}


def test_an_archive_that_was_changed_is_fetched_again(tmp_path: Path, store: Path, shelf: Shelf) -> None:
    sha256 = shelf.put(tmp_path, "one")
    archive = store / f"{sha256}.tar.gz"

    async def body() -> None:
        cache = BundleCache(store, shelf.fetch)
        await cache.unpack(sha256, tmp_path / "first")
        assert stat.S_IMODE(archive.stat().st_mode) == 0o400
        archive.chmod(0o600)
        archive.write_bytes(archive.read_bytes() + b"x")
        await cache.unpack(sha256, tmp_path / "second")

    asyncio.run(body())
    assert shelf.fetched == [sha256, sha256]
    assert (tmp_path / "second" / "task.py").read_text() == "NAME = 'one'\n"


def test_a_bundle_that_was_removed_is_fetched_again(tmp_path: Path, store: Path, shelf: Shelf) -> None:
    sha256 = shelf.put(tmp_path, "one")

    async def body() -> None:
        cache = BundleCache(store, shelf.fetch)
        await cache.unpack(sha256, tmp_path / "first")
        assert cache.held == (sha256,)
        await cache.remove([sha256])
        assert cache.held == ()
        assert os.listdir(store) == []
        await cache.unpack(sha256, tmp_path / "second")
        assert cache.held == (sha256,)

    asyncio.run(body())
    assert shelf.fetched == [sha256, sha256]


def test_a_removal_lets_nobody_fetch_beside_another(
    tmp_path: Path, store: Path, shelf: Shelf, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One process waits for the removal, and a third asks after it while the second fetches."""

    async def at_once(call: Callable[..., Any], *arguments: Any) -> Any:
        return call(*arguments)

    monkeypatch.setattr(asyncio, "to_thread", at_once)
    sha256 = shelf.put(tmp_path, "one")
    fetching = most = 0
    goes_on = asyncio.Event()
    second = asyncio.Event()

    async def fetch(name: str) -> AsyncIterator[bytes]:
        nonlocal fetching, most
        fetching += 1
        most = max(most, fetching)
        if shelf.fetched:
            second.set()
            await goes_on.wait()
        async for chunk in shelf.fetch(name):
            yield chunk
        fetching -= 1

    async def body() -> None:
        cache = BundleCache(store, fetch)
        async with asyncio.TaskGroup() as group:
            group.create_task(cache.unpack(sha256, tmp_path / "first"))
            await asyncio.sleep(0)  # each waits behind the one before
            group.create_task(cache.remove([sha256]))
            await asyncio.sleep(0)
            group.create_task(cache.unpack(sha256, tmp_path / "second"))
            await second.wait()
            third = group.create_task(cache.unpack(sha256, tmp_path / "third"))
            for _ in range(10):
                await asyncio.sleep(0)
            assert not third.done()
            goes_on.set()
        assert cache.held == (sha256,)

    asyncio.run(body())
    assert (shelf.fetched, most) == ([sha256, sha256], 1)


def test_other_content_than_the_name_says_leaves_nothing(store: Path, shelf: Shelf) -> None:
    shelf.held["0" * 64] = b"other"
    with pytest.raises(BundleError, match="digest"):
        asyncio.run(BundleCache(store, shelf.fetch).unpack("0" * 64, store / "target"))
    assert list(store.iterdir()) == []


def test_what_is_no_archive_is_refused(store: Path, shelf: Shelf) -> None:
    data = b"no archive"
    sha256 = hashlib.sha256(data).hexdigest()
    shelf.held[sha256] = data
    with pytest.raises(BundleError):
        asyncio.run(BundleCache(store, shelf.fetch).unpack(sha256, store / "target"))
    assert list(store.iterdir()) == []


def test_an_endless_bundle_is_cut_off(store: Path, monkeypatch: pytest.MonkeyPatch, shelf: Shelf) -> None:
    monkeypatch.setattr(directories, "CAP_BYTES", 1000)
    shelf.held["0" * 64] = bytes(5000)
    with pytest.raises(BundleError, match="longer than 1000"):
        asyncio.run(BundleCache(store, shelf.fetch).unpack("0" * 64, store / "target"))
    assert list(store.iterdir()) == []


def test_the_least_recently_used_goes_first_and_never_one_in_use(
    tmp_path: Path, store: Path, shelf: Shelf, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(directories, "KEPT", 2)
    names = [shelf.put(tmp_path, f"b{number}") for number in range(5)]

    async def body() -> None:
        cache = BundleCache(store, shelf.fetch)
        for sha256 in names:
            await cache.unpack(sha256, tmp_path / sha256)
        await cache.unpack(names[1], tmp_path / "again")
        await cache.trim(in_use={names[0]})

    asyncio.run(body())
    assert {path.name for path in store.iterdir()} == {f"{names[number]}.tar.gz" for number in (0, 4, 1)}


def test_a_predecessors_files_are_removed(tmp_path: Path) -> None:
    state = tmp_path / "state"
    runtime = make_runtime_dir(state)
    (runtime / "p1").mkdir()
    (runtime / "p1" / "data.sock").touch()
    (state / "jobs" / "p1").mkdir(parents=True)
    (state / "bundles" / ("a" * 64)).mkdir(parents=True)  # as older versions had them
    (state / "bundles" / ("a" * 64 + ".tar.gz")).touch()
    (state / "bundles" / ".extract-x").mkdir()
    (state / "bundles" / ("b" * 64 + ".part")).touch()
    snapshots = state / "snapshots" / "job-a"
    snapshots.mkdir(parents=True)
    part = "step-4.part-0001.generation-1.snapshot"
    (snapshots / part).touch()
    (snapshots / f".{part}.writing").touch()
    directories = AgentDirectories.claim(state)
    try:
        assert [path.name for path in directories.snapshots.rglob("*")] == ["job-a", part]
        assert list(directories.runtime.iterdir()) == []
        assert list(directories.jobs.iterdir()) == []
        assert [path.name for path in directories.bundles.iterdir()] == ["a" * 64 + ".tar.gz"]
    finally:
        directories.release()
    assert not runtime.exists()
    AgentDirectories.claim(state).release()


def test_a_link_in_place_of_the_runtime_directory_is_not_followed(tmp_path: Path) -> None:
    precious = tmp_path / "precious"
    precious.mkdir()
    (precious / "file").touch()
    state = tmp_path / "state"
    link = runtime_dir(state)
    link.symlink_to(precious)
    try:
        with pytest.raises(StorageError) as refused:
            AgentDirectories.claim(state)
        assert str(link) in refused.value.action
        remove_runtime_dir(state)
        assert (precious / "file").exists()
    finally:
        link.unlink()


def test_a_state_directory_that_is_a_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "state").touch()
    with pytest.raises(StorageError, match="state directory"):
        AgentDirectories.claim(tmp_path / "state")


def test_removing_what_is_not_there_is_fine(tmp_path: Path) -> None:
    remove_runtime_dir(tmp_path)


def test_many_processes_leave_no_descriptor_thread_or_directory(bench: Any) -> None:
    def used() -> tuple[int, int]:
        return len(list(Path("/proc/self/fd").iterdir())), len(list(Path("/proc/self/task").iterdir()))

    async def body(master: Any) -> None:
        async def play(names: list[str]) -> None:
            await master.assign(*(bench.trainer(name, "fail") for name in names))
            await master.until(lambda: all(master.exit_of(f"job/{name}/1") for name in names))

        await play(["warm-0", "warm-1", "warm-2"])
        descriptors, threads = used()
        for number in range(4):
            await play([f"t{number}-{n}" for n in range(3)])
        assert used()[0] <= descriptors + 2
        assert used()[1] <= threads + 2

    bench.run(body)
    assert list((bench.state_dir / "jobs").iterdir()) == []
