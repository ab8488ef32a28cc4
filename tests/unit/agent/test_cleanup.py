"""What a node removes: bundles and scratch directories that no job needs, the oldest of a cache that is too big."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from pscluster.agent.cache import CacheEntry, evict, evicted, hold
from pscluster.agent.cleanup import Cleanup
from pscluster.agent.directories import AgentDirectories, BundleCache
from pscluster.errors import UnreachableError

A, B, C = ("a" * 64, "b" * 64, "c" * 64)


def test_the_least_recently_used_goes_until_the_rest_fits() -> None:
    entries = [CacheEntry(name=name, size_bytes=10, used_s=used_s) for name, used_s in (("x", 3), ("y", 1), ("z", 2))]
    assert evicted(entries, 30) == []
    assert evicted(entries, 29) == ["y"]
    assert evicted(entries, 10) == ["y", "z"]
    assert evicted(entries, 0) == ["y", "z", "x"]


def test_nothing_is_evicted_while_somebody_holds_the_cache(tmp_path: Path) -> None:
    for number, name in enumerate(("old", "new")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "data").write_bytes(bytes(100_000))
        for path in (tmp_path / name / "data", tmp_path / name):
            os.utime(path, (1000 + number, 1000 + number))
    with hold(tmp_path), hold(tmp_path):
        assert evict(tmp_path, 0) == []
    assert evict(tmp_path, 150_000) == ["old"]
    assert [path.name for path in tmp_path.iterdir()] == ["new"]


class Node:
    """An agent's directories with three bundles and the scratch directories of three jobs, and a master to ask."""

    def __init__(self, directory: Path) -> None:
        self.directories = AgentDirectories.claim(directory)
        for digest in (A, B, C):
            (self.directories.bundles / f"{digest}.tar.gz").touch()
        for job_id in ("job-a", "job-b", "job-c"):
            (self.directories.scratch / job_id / "deep").mkdir(parents=True)
        self.asked: list[tuple[list[str], list[str]]] = []
        self.unused: tuple[list[str], list[str]] | None = ([], [])

    def clean(self, *, bundles: set[str], jobs: set[str]) -> None:
        """One round while processes with these bundles, of these jobs, run."""
        supervisor: Any = SimpleNamespace(bundles=frozenset(bundles), jobs=frozenset(jobs))

        async def round_() -> None:
            cache = BundleCache(self.directories.bundles, self.fetch)
            await Cleanup(self.directories, cache, 0, self.find_unused).clean(supervisor)

        asyncio.run(round_())

    def fetch(self, _sha256: str) -> AsyncIterator[bytes]:
        raise AssertionError("nothing is fetched here")

    async def find_unused(self, bundles: Sequence[str], jobs: Sequence[str]) -> tuple[list[str], list[str]]:
        self.asked.append((sorted(bundles), sorted(jobs)))
        if self.unused is None:
            raise UnreachableError("no master")
        return self.unused

    def kept(self) -> tuple[list[str], list[str]]:
        bundles = sorted(path.name.removesuffix(".tar.gz") for path in self.directories.bundles.iterdir())
        return bundles, sorted(path.name for path in self.directories.scratch.iterdir())


@pytest.fixture
def node(tmp_path: Path) -> Any:
    found = Node(tmp_path / "state")
    yield found
    found.directories.release()


def test_what_the_master_calls_unused_goes_and_never_what_is_in_use(node: Node) -> None:
    node.unused = ([A, B], ["job-a", "job-b"])
    node.clean(bundles={A}, jobs={"job-a"})
    assert node.asked == [([B, C], ["job-b", "job-c"])]
    assert node.kept() == ([A, C], ["job-a", "job-c"])


def test_without_an_answer_everything_stays(node: Node) -> None:
    node.unused = None
    with pytest.raises(UnreachableError):
        node.clean(bundles=set(), jobs=set())
    assert node.kept() == ([A, B, C], ["job-a", "job-b", "job-c"])


def test_a_node_that_uses_all_it_has_does_not_ask(node: Node) -> None:
    node.clean(bundles={A, B, C}, jobs={"job-a", "job-b", "job-c"})
    assert node.asked == []


def test_the_cache_is_bounded(node: Node) -> None:
    (node.directories.cache / "download").write_bytes(bytes(10_000))
    node.clean(bundles={A, B, C}, jobs={"job-a", "job-b", "job-c"})
    assert list(node.directories.cache.iterdir()) == []
