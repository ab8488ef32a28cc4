"""The same job gives the same bits for any workers, partitions, transport and changes of plan."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest
import torch

from harness.jobs import crossed_split, even_split, lm_spec, norm_spec
from harness.plain import train_in_large_batches, train_plainly
from harness.proxy import CuttingProxy
from harness.static_job import StaticJob, final_tensors
from pscluster.step.layout import parameters_sha256
from psworker.replica import named_bytes

NUM_SHARDS = 7


@pytest.fixture(scope="module")
def lm_digest() -> str:
    """Digest of a plain single-process loop over the same microbatches, in tree order."""
    return train_plainly(lm_spec()).digest


# Pairwise: every pair of (workers, partitions), (workers, transport), (partitions, transport) occurs.
PAIRS = [
    *((1, 1, "shm"), (2, 2, "shm"), (3, 3, "shm"), (4, 2, "shm"), (3, 1, "shm")),
    *((1, 2, "unix"), (2, 3, "unix"), (3, 3, "unix")),
    *((4, 1, "tcp"), (2, 2, "tcp"), (3, 2, "tcp")),
]


@pytest.mark.parametrize(("workers", "partitions", "transport"), PAIRS)
def test_language_model_has_the_bits_of_a_plain_loop(
    workers: int, partitions: int, transport: str, lm_digest: str, tmp_path: Path
) -> None:
    with StaticJob(lm_spec(partitions=partitions, transport=transport), workers, tmp_path) as job:
        job.wait_ready()
        job.publish(even_split(NUM_SHARDS, workers))
        assert job.wait_finished() == lm_digest
        job.wait(lambda: bool(job.reported("trainer-0", "connected")))
        seen = [(c.partition, c.transport) for c in job.reported("trainer-0", "connected")[-1].connections]
        assert seen == [(index, transport) for index in range(partitions)]


CODECS = [
    pytest.param("bf16", "fp32", marks=pytest.mark.slow),
    pytest.param("fp32", "bf16", marks=pytest.mark.slow),
    ("bf16", "bf16"),
]


@pytest.mark.parametrize(("push", "pull"), CODECS)
def test_rounding_on_the_wire_is_part_of_the_step(push: str, pull: str, lm_digest: str, tmp_path: Path) -> None:
    """The bits are those of a plain loop that rounds in the same places, for any assignment and transport."""
    spec = lm_spec()
    spec["network"] |= {"push_codec": push, "pull_codec": pull}
    plain = train_plainly(spec)
    for workers, partitions, transport in [(1, 1, "shm"), (3, 2, "tcp"), (2, 3, "shm")]:
        spec = lm_spec(partitions=partitions, transport=transport)
        spec["network"] |= {"push_codec": push, "pull_codec": pull}
        with StaticJob(spec, workers, tmp_path / f"{workers}-{transport}") as job:
            job.wait_ready()
            job.publish(crossed_split(NUM_SHARDS, workers))
            assert job.wait_finished() == plain.digest, (workers, partitions, transport)
            seen = {e.step: dict(e.metrics) for e in job.reported("partition-0", "evaluated")}
        assert seen == plain.evaluations
    assert plain.digest != lm_digest


def test_bf16_autocast_gives_the_same_bits_for_any_number_of_workers(tmp_path: Path) -> None:
    digests = set()
    for workers in (1, 3):
        spec = lm_spec(partitions=2, steps=4, d_model=64)
        spec["train"] |= {"autocast": "bf16"}
        with StaticJob(spec, workers, tmp_path / str(workers)) as job:
            job.wait_ready()
            job.publish(crossed_split(NUM_SHARDS, workers))
            digests.add(job.wait_finished())
    assert len(digests) == 1
    assert digests != {train_plainly(lm_spec(steps=4, d_model=64)).digest}


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_one_and_two_trainers_on_a_device_give_the_same_bits(tmp_path: Path) -> None:
    digests = set()
    for workers in (1, 2):
        spec = lm_spec(partitions=2, steps=6)
        spec["workers"] |= {"device": "cuda"}
        with StaticJob(spec, workers, tmp_path / str(workers), device="cuda:0") as job:
            job.wait_ready()
            job.publish(crossed_split(NUM_SHARDS, workers))
            digests.add(job.wait_finished())
    assert len(digests) == 1


def test_shards_that_move_in_every_generation_change_no_bit(lm_digest: str, tmp_path: Path) -> None:
    with StaticJob(lm_spec(partitions=2, pause_s=0.05), 3, tmp_path) as job:
        job.wait_ready()
        splits = [
            even_split(NUM_SHARDS, 3),
            crossed_split(NUM_SHARDS, 3),
            [[(0, 7)], [], []],
            [[(3, 2)], [(0, 3)], [(5, 2)]],
        ]
        moved = 0
        while not job.reported("partition-0", "finished"):
            job.publish(splits[moved % len(splits)])
            moved += 1
            next_s = time.monotonic() + 0.03  # about a microbatch: every plan takes effect
            job.wait(lambda next_s=next_s: bool(job.reported("partition-0", "finished")) or time.monotonic() >= next_s)
        assert moved > 4
        assert job.wait_finished() == lm_digest


def test_buffers_and_rarely_touched_parameters_are_exact(tmp_path: Path) -> None:
    """One digest for all; against the plain loop within 1e-6, since torch's fused kernel takes the last elements of a
    tensor that is no multiple of its vector length through other instructions, and the layout pads them."""
    digests = set()
    for workers, partitions in [(1, 1), (2, 3), (3, 2)]:
        with StaticJob(norm_spec(partitions=partitions), workers, tmp_path / f"{workers}-{partitions}") as job:
            job.wait_ready()
            job.publish(crossed_split(NUM_SHARDS, workers))
            digests.add(job.wait_finished())
            tensors = final_tensors(job)
    assert len(digests) == 1
    assert digests == {parameters_sha256(named_bytes(tensors))}
    plain = train_plainly(norm_spec()).model.state_dict()
    assert tensors.keys() == plain.keys()
    for name, tensor in plain.items():
        torch.testing.assert_close(tensors[name], tensor, rtol=0, atol=1e-6, msg=name)


def test_evaluation_is_exact_too(tmp_path: Path) -> None:
    plain = train_plainly(lm_spec())
    with StaticJob(lm_spec(partitions=2), 2, tmp_path) as job:
        job.wait_ready()
        job.publish(crossed_split(NUM_SHARDS, 2))
        job.wait_finished()
        seen = {e.step: dict(e.metrics) for e in job.reported("partition-0", "evaluated")}
    assert seen == plain.evaluations
    assert sorted(seen) == [5, 10]


def test_the_loss_curve_is_that_of_an_ordinary_large_batch_loop(tmp_path: Path) -> None:
    spec = lm_spec(partitions=2, steps=20, d_model=64, dropout=0.0)
    ordinary = train_in_large_batches(spec)
    with StaticJob(spec, 2, tmp_path) as job:
        job.wait_ready()
        job.publish(even_split(NUM_SHARDS, 2))
        job.wait_finished()
        records = [r for p in job.reported("partition-0", "progress") for r in p.records]
    assert [r.step for r in records] == list(range(1, 21))
    assert ordinary[-1] < ordinary[0] - 0.1  # it learns
    assert [r.loss for r in records] == pytest.approx(ordinary, abs=2e-4)


@pytest.mark.parametrize(
    ("optimizer", "schedule"),
    [
        ({"name": "adam", "lr": 3e-3, "weight_decay": 0.05}, {"name": "constant"}),
        ({"name": "sgd", "lr": 0.1}, {"name": "constant", "warmup_steps": 2}),
        ({"name": "sgd", "lr": 0.1, "momentum": 0.9, "weight_decay": 0.01}, {"name": "cosine", "final_ratio": 0.1}),
        ({"name": "sgd", "lr": 0.1, "momentum": 0.9, "nesterov": True}, {"name": "cosine", "warmup_steps": 4}),
    ],
)
def test_every_optimizer_and_schedule_follows_torch(
    optimizer: dict[str, Any], schedule: dict[str, Any], tmp_path: Path
) -> None:
    spec = lm_spec(partitions=2, steps=6, d_model=128)
    spec["train"] |= {"optimizer": optimizer, "schedule": schedule, "clip_norm": None}
    plain = train_plainly(spec).model.state_dict()
    with StaticJob(spec, 1, tmp_path) as job:
        job.wait_ready()
        job.publish(even_split(NUM_SHARDS, 1))
        job.wait_finished()
        tensors = final_tensors(job)
    for name, tensor in plain.items():
        torch.testing.assert_close(tensors[name], tensor, rtol=0, atol=1e-6, msg=name)


def test_a_trainer_killed_in_mid_step_changes_no_bit(lm_digest: str, tmp_path: Path) -> None:
    with StaticJob(lm_spec(partitions=2, pause_s=0.05), 2, tmp_path) as job:
        job.wait_ready()
        job.publish(even_split(NUM_SHARDS, 2))
        job.wait_step(2)
        job.kill("trainer-1")
        before = job.step
        job.publish([[(0, NUM_SHARDS)], []])
        job.wait_step(before + 2)
        job.start("trainer", 1)
        job.wait(lambda: bool(job.reported("trainer-1", "trainer_ready")))
        job.publish(crossed_split(NUM_SHARDS, 2))
        assert job.wait_finished() == lm_digest


@pytest.mark.parametrize("victim", [0, 1])
def test_a_partition_killed_takes_the_job_back_to_a_snapshot(victim: int, lm_digest: str, tmp_path: Path) -> None:
    with StaticJob(lm_spec(partitions=2, pause_s=0.05), 2, tmp_path) as job:
        job.wait_ready()
        job.publish(even_split(NUM_SHARDS, 2))
        job.wait(lambda: 4 in job.complete_steps(), "snapshot 4")
        job.kill(f"partition-{victim}")
        job.start("partition", victim)
        job.wait(lambda: bool(job.reported(f"partition-{victim}", "partition_ready")))
        job.publish(even_split(NUM_SHARDS, 2), restore=True)
        assert job.resume_step >= 4
        assert job.wait_finished() == lm_digest


@pytest.mark.slow
def test_a_partition_killed_before_any_snapshot_starts_again_from_the_seed(lm_digest: str, tmp_path: Path) -> None:
    spec = lm_spec(partitions=2, pause_s=0.1) | {"durability": {"every_steps": 100}, "evaluate": {"every_steps": 100}}
    with StaticJob(spec, 2, tmp_path) as job:
        job.wait_ready()
        job.publish(even_split(NUM_SHARDS, 2))
        job.wait_step(1)
        job.kill("partition-1")
        job.start("partition", 1)
        job.wait(lambda: bool(job.reported("partition-1", "partition_ready")))
        job.publish(even_split(NUM_SHARDS, 2), restore=True)
        assert job.resume_step == 0
        assert job.wait_finished() == lm_digest


@pytest.mark.parametrize("transport", ["tcp", "shm"])
def test_connections_that_break_again_and_again_change_no_bit(transport: str, lm_digest: str, tmp_path: Path) -> None:
    spec = lm_spec(partitions=2, transport=transport, pause_s=0.03)
    proxies: dict[str, CuttingProxy] = {}

    def through_proxy(address: str) -> str:
        if address not in proxies:
            proxies[address] = CuttingProxy(address)
        return proxies[address].address

    with StaticJob(spec, 2, tmp_path) as job:
        job.reroute = through_proxy
        job.wait_ready()
        job.publish(even_split(NUM_SHARDS, 2))
        cuts = []
        for step in range(1, 9):
            job.wait_step(step)
            cuts.append(sum(proxy.cut() for proxy in proxies.values()))
        # Nine where all are connected: four pushes, four pulls and a vote. A slow machine has few of them back in time.
        assert cuts[0] >= 5 and sum(cuts[1:]) >= 5, cuts
        assert job.wait_finished() == lm_digest
    for proxy in proxies.values():
        assert proxy.accepted > 3
        proxy.close()


@pytest.mark.slow
def test_stop_ends_at_a_written_step_and_resume_goes_on_with_the_same_bits(lm_digest: str, tmp_path: Path) -> None:
    with StaticJob(lm_spec(partitions=2, pause_s=0.05), 2, tmp_path) as job:
        job.wait_ready()
        job.publish(even_split(NUM_SHARDS, 2))
        job.wait_step(1)
        job.publish(even_split(NUM_SHARDS, 2), stop=True)
        job.wait_finished()
        finished = job.reported("partition-0", "finished")[-1]
        assert finished.stopped
        job.wait(lambda: finished.step in job.complete_steps())
        job.publish(even_split(NUM_SHARDS, 2), restore=True)
        assert job.resume_step == finished.step
        job.wait(lambda: len(job.reported("partition-0", "finished")) == 2)
        assert job.wait_finished() == lm_digest
