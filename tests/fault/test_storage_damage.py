"""Torn and bit-flipped snapshots: the job goes back to the newest intact one, or its seed, and reports what it lost."""

from __future__ import annotations

from pathlib import Path

import pytest

from harness.cluster import local_cluster
from harness.jobs import lm_spec
from harness.plain import train_plainly
from pscluster.client import Job

STEPS = 24


@pytest.fixture(scope="module")
def digest() -> str:
    return train_plainly(lm_spec(steps=STEPS, d_model=64)).digest


def slow_spec(store: Path) -> dict[str, object]:
    spec = lm_spec(steps=STEPS, d_model=64, pause_s=0.1, partitions=2)
    return spec | {"workers": {"min": 1, "max": 2}, "durability": {"every_steps": 4, "store": str(store)}}


def damage(path: Path, how: str) -> None:
    data = path.read_bytes()
    if how == "torn":
        path.write_bytes(data[: len(data) // 2])
    else:
        path.write_bytes(data[:-9] + bytes([data[-9] ^ 0x40]) + data[-8:])


def complete(answer: Job) -> set[int]:
    """The steps whose snapshots were reported complete."""
    words = [event.message.split() for event in answer.events if event.reason == "Snapshot"]
    return {int(message[4]) for message in words}


def files(store: Path, job: str, step: int) -> list[Path]:
    return sorted(store.glob(f"*/{job}/step-{step:010d}.part-*.snapshot"))


@pytest.mark.parametrize("how", ["torn", "flipped"])
@pytest.mark.parametrize("sound", [True, False], ids=["an older one is sound", "none is sound"])
def test_the_newest_snapshots_are_damaged_when_they_are_needed(
    how: str, sound: bool, digest: str, tmp_path: Path
) -> None:
    store = tmp_path / "store"
    with local_cluster(tmp_path, workers=2, servers=2) as cluster:
        job = cluster.submit(slow_spec(store), tmp_path)
        answer = cluster.until(job, lambda answer: {4, 8} <= complete(answer))
        cluster.psctl("stop", job)
        steps = sorted(int(part.name[5:15]) for part in store.glob(f"*/{job}/step-*.part-0001.*.snapshot"))
        damaged = [step for step in steps if step and not (sound and step == steps[-2])]
        assert steps[-1] in damaged
        for step in damaged:
            damage(files(store, job, step)[-1], how)
        cluster.psctl("resume", job)
        cluster.wait(job, "succeeded")
        answer = cluster.describe(job)
    messages = {
        reason: [e["message"] for e in answer["events"] if e["reason"] == reason]
        for reason in ("SnapshotVoid", "Restored", "RolledBack")
    }
    assert any(f"step {steps[-1]} " in text for text in messages["SnapshotVoid"])
    went_back = messages["RolledBack"] + messages["Restored"]
    assert any("computed again" in text for text in went_back), went_back
    if sound:
        assert any(f"the snapshot of step {steps[-2]}" in text for text in went_back)
    else:
        assert any("the seed" in text for text in went_back)
    assert answer["parameters_sha256"] == digest
    assert answer["step"] == STEPS
