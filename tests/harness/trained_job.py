"""A whole job: real partitions, real exchanges, and trainers whose gradients are arithmetic."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from harness.played import JOB, Network, PlayedLink, played_spec
from harness.played_job import COUNT, LAYOUT, MEAN, B, PlayedJob, W
from pscluster.job.spec import JobSpec
from pscluster.step.codec import DTYPES, as_bytes
from pscluster.step.tree import Statistics, Summary, TreeNode, add_statistics, touched_bits, tree_of
from pscluster.v1.plan_pb2 import ProcessSpec
from pscluster.wire.protocol import Outcome
from psworker.replica import BucketMemory
from psworker.trainer.exchange import Exchange
from psworker.trainer.gradients.accumulate import Counter, Gradients, add_gradients
from psworker.trainer.telemetry import TrainerCounters
from psworker.trainer.work import Work, WorkKey

FINAL_STEP = 3


class PlayedTrainer:
    """One act at a time: `turn`. Its exchange lives on the played network; its thread is never started."""

    def __init__(self, network: Network, spec: JobSpec, rank: int) -> None:
        self.rank = rank
        self.link = PlayedLink(ProcessSpec(job_id=JOB, rank=rank))
        self.memory = BucketMemory(LAYOUT)
        self.exchange = Exchange(
            self.link,  # type: ignore[arg-type]
            spec,
            LAYOUT,
            self.memory,
            TrainerCounters(),
            reactor=network,  # type: ignore[arg-type]
        )
        self._tree = tree_of(spec.train.num_shards)
        self._dtype = DTYPES[spec.network.push_codec]
        self._done: dict[WorkKey, set[int]] = {}
        self._run: Work | None = None
        self._sums: dict[int, Counter[Gradients]] = {
            b.index: Counter(self._tree, add_gradients) for b in LAYOUT.buckets if b.kind == "trained"
        }
        self._statistics: Counter[Statistics] = Counter(self._tree, add_statistics)

    def turn(self) -> bool:
        """Do the next thing there is to do; False: there is none now."""
        exchange, run = self.exchange, self._run
        if run is not None and not exchange.agenda.is_current(run):
            self._end(run)
        work = exchange.agenda.find_work(self._done)
        if work is None:
            return False
        self._done = {work.key: self._done.get(work.key, set())} | {
            key: shards for key, shards in self._done.items() if key[:2] == work.key[:2] and key != work.key
        }
        if work.action == "initialise":
            self.memory.close_windows()
            _fill(self.memory)
            exchange.forget_values()
            exchange.send_initial(work)
            self._done[work.key].update(work.shards)
            return True
        if self._run is None:
            if not exchange.want(work, work.version, exact=work.action != "train"):
                self._give_up(work)
                return True
            self._begin(work)
        if not exchange.has_landed:
            if exchange.values.landing.is_superseded:
                self._give_up(work)
            return exchange.values.landing.is_superseded
        {"train": self._train, "evaluate": self._evaluate, "finalise": self._finalise, "finish": self._finish}[
            work.action
        ](work)
        return True

    def dismiss(self) -> None:
        """The process is gone: its connections break, its shared memory is unmapped."""
        for peer in self.exchange.pusher.peers:
            peer.close()
            peer.pushes.queue.__init__()  # type: ignore[misc]
        self.memory.close_windows()
        self.exchange.values.restart()
        self.exchange._lanes._lanes.clear()

    def _counters(self) -> list[Counter[Any]]:
        return [*self._sums.values(), self._statistics]

    def _begin(self, work: Work) -> None:
        self._run = work
        roots = self._tree.cover(work.shards)
        for counter in self._counters():
            counter.begin(roots)

    def _end(self, work: Work) -> None:
        """Push what is held although its root is not whole."""
        self._run = None
        for bucket, counter in self._sums.items():
            for node, gradients in counter.flush():
                self.exchange.pusher.gradients(work, bucket, node, gradients)
        for node, statistics in self._statistics.flush():
            self.exchange.pusher.statistics(work, node, statistics)

    def _give_up(self, work: Work) -> None:
        self._run = None
        for counter in self._counters():
            counter.flush()
        self._done[work.key].update(work.shards)

    def _tensor(self, number: int) -> torch.Tensor:
        bucket, offset = LAYOUT.bucket_of[number]
        return self.memory.flats[bucket][offset : offset + LAYOUT.tensors[number].num_words]

    def _train(self, work: Work) -> None:
        """One shard. Odd ones touch neither `b` nor the buffers."""
        shard, exchange = work.shards[0], self.exchange
        node, weight, moves = TreeNode(shard, 1), 1.0 + shard, shard % 2 == 0
        for bucket, counter in sorted(self._sums.items(), reverse=True):
            placed = LAYOUT.buckets[bucket].placed
            gradients = [self._gradient(p.tensor, shard) if moves or p.tensor != B else None for p in placed]
            for root, value in counter.carry(node, gradients):
                exchange.pusher.gradients(work, bucket, root, value)
        self._push_buffers(work, node, weight, moves)
        touched = touched_bits([W, B, MEAN] if moves else [W], len(LAYOUT.tensors))
        exchange.pusher.summary(work, node, Summary(loss_sum=weight, weight=weight, samples=1, touched=touched))
        self._done[work.key].add(shard)
        if self._run is not None and self._done[work.key].issuperset(self._run.shards):
            self._end(work)
            exchange.want(work, work.version + 1)

    def _gradient(self, number: int, shard: int) -> torch.Tensor:
        values = self._tensor(number)
        ramp = torch.arange(values.numel()).remainder(7).sub(3.0)
        return (values * (0.25 + shard / 8) + ramp * (1 + shard / 3)).to(self._dtype)

    def _push_buffers(self, work: Work, node: TreeNode, weight: float, moves: bool) -> None:
        averaged, carried = LAYOUT.bucket_of[MEAN][0], LAYOUT.bucket_of[COUNT][0]
        if moves:
            words = torch.zeros(LAYOUT.buckets[averaged].num_words)
            words[: LAYOUT.tensors[MEAN].num_words] = (self._tensor(MEAN) * 0.75 + node.first / 3) * weight
            self.exchange.pusher.words(work, averaged, node, words)
        else:
            self.exchange.pusher.unchanged(work, averaged, node, weight)
        if node.first == 0:
            counted = self.memory.flats[carried].clone()
            counted[0] += 1
            self.exchange.pusher.words(work, carried, node, counted)

    def _evaluate(self, work: Work) -> None:
        """A shard's statistics: sums over its part of the parameters, exact ones."""
        shard = work.shards[0]
        found = np.array([float(self._tensor(n)[shard::4].double().sum()) for n in (W, B, MEAN)])
        for node, value in self._statistics.carry(TreeNode(shard, 1), found):
            self.exchange.pusher.statistics(work, node, value)
        self._done[work.key].add(shard)
        if self._run is not None and self._done[work.key].issuperset(self._run.shards):
            self._end(work)

    def _finalise(self, work: Work) -> None:
        assert work.statistics is not None
        self._run = None
        self.exchange.pusher.outcome(work, Outcome(metrics={"loss": float(work.statistics.sum())}))
        self._done[work.key].update(work.shards)

    def _finish(self, work: Work) -> None:
        self._run = None
        digest = hashlib.sha256(b"".join(bytes(as_bytes(flat)) for flat in self.memory.flats)).hexdigest()
        self.exchange.pusher.outcome(work, Outcome(sha256=digest))
        self._done[work.key].update(work.shards)


def _fill(memory: BucketMemory) -> None:
    """The seeded first values."""
    for flat in memory.flats:
        flat.zero_()
    for number, spec in enumerate(LAYOUT.tensors):
        bucket, offset = LAYOUT.bucket_of[number]
        part = memory.flats[bucket][offset : offset + spec.num_words]
        part.copy_(torch.arange(spec.num_words).remainder(11).sub(5) / (3 if spec.dtype == "float32" else 1))


class TrainedJob(PlayedJob):
    """`partitions` partitions and a trainer for each transport named, which they reach the partitions by."""

    def __init__(
        self,
        partitions: int = 1,
        transports: Sequence[str] = ("tcp",),
        *,
        num_shards: int = 4,
        standbys: bool = False,
        **network: str,
    ) -> None:
        train = {"max_steps": FINAL_STEP, "optimizer": {"name": "adamw", "lr": 0.1}, "clip_norm": 1000.0}
        spec = played_spec(num_shards, partitions, train=train, evaluate={"every_steps": 2}, network=network)
        super().__init__(spec, LAYOUT, {}, standbys=standbys)
        self.trainers: dict[int, PlayedTrainer] = {}
        self.transports = list(transports)
        for transport in transports:
            self.join(transport)
        self.assign()
        self.publish(restore=True)

    def join(self, transport: str) -> None:
        """Another trainer; it has no plan yet."""
        rank = max(self.trainers, default=-1) + 1
        section = self.spec.network.model_copy(update={"transport": transport})
        spec = self.spec.model_copy(update={"network": section})
        self.trainers[rank] = PlayedTrainer(self.network, spec, rank)

    def assign(self, turned_by: int = 0) -> None:
        """The next plan assigns the shards to the trainers there are."""
        ranks, num_shards = sorted(self.trainers), self.spec.train.num_shards

        def place(shard: int) -> int:
            """Neighbours together, whose sums a trainer makes itself, or one by one."""
            turned = (shard + turned_by) % num_shards
            return turned % len(ranks) if turned_by % 2 else turned * len(ranks) // num_shards

        self.shards = {rank: [s for s in range(num_shards) if place(s) == at] for at, rank in enumerate(ranks)}

    def members(self) -> list[Any]:
        return [*super().members(), *(trainer.exchange for trainer in self.trainers.values())]

    def turn(self, index: int) -> bool:
        return list(self.trainers.values())[index % len(self.trainers)].turn()

    def take_over(self, index: int) -> None:
        """A partition is gone and its standby, if it is in sync, has its place; else nothing happens."""
        self.hear_reports()
        if self.master.synced[index]:
            self.lose_partition(index)
            self.place_standby(index)
            self.publish()

    def lose_trainer(self, index: int) -> None:
        """A trainer is gone; another one comes in its place, and every shard is assigned anew."""
        rank = sorted(self.trainers)[index % len(self.trainers)]
        self.join(self.transports[index % len(self.transports)])
        self.trainers.pop(rank).dismiss()
        self.assign()
        self.publish()

    def check(self) -> None:
        """Nothing that came was refused either."""
        super().check()
        assert self.network.refused == []

    def run_to_the_end(self) -> tuple[str, dict[int, float]]:
        """Without further faults. Returns the digest of the final values, and the evaluations by step."""
        coordinator: Any = self.partition(0).link
        for _ in range(8 * FINAL_STEP):
            self.everybody_adopts()
            self.network.settle()
            while [trainer for trainer in self.trainers.values() if trainer.turn()]:
                self.network.settle()
            self.check()
            if finished := coordinator.reported("finished"):
                evaluated = {e.step: e.metrics["loss"] for e in coordinator.reported("evaluated")}
                return finished[-1].parameters_sha256, evaluated
        raise AssertionError(f"stuck at {[(p.version, p.member) for p in self.partitions]}")

    def taken_lanes(self) -> int:
        """Places in shared memory that are in use over the connections there are."""
        lanes = [lanes for trainer in self.trainers.values() for lanes in trainer.exchange._lanes._lanes.values()]
        return sum(bool(taken) for each in lanes for taken in each._taken)

    def close(self) -> None:
        for trainer in self.trainers.values():
            trainer.dismiss()
        super().close()
