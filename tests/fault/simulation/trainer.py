"""A trainer's process: the real `Exchange` and the real `Trainer` loop, around a model whose gradients are arithmetic.

The loop blocks, as it does in the product; it runs on a strand of its own and may be overtaken by the exchange whenever
it takes their lock, and while it computes.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from pscluster.job.spec import JobSpec, parse_spec
from pscluster.step.tree import Statistics, Summary, Tree, TreeNode, tree_of
from pscluster.v1.plan_pb2 import ProcessReport, ProcessSpec, TrainerReady
from pscluster.wire.protocol import Outcome
from psworker.replica import BucketMemory
from psworker.trainer.exchange import Exchange
from psworker.trainer.gradients.accumulate import Counter, Gradients, add_gradients
from psworker.trainer.loop import Trainer
from psworker.trainer.telemetry import ComputeTimer, TrainerCounters
from psworker.trainer.work import Work
from tests.fault.simulation import model
from tests.fault.simulation.dataplane import Link, Reactor
from tests.fault.simulation.model import LAYOUT
from tests.fault.simulation.schedule import SOON_S, Condition, Life, Strand

NUMERICS = "1" * 16
PREEMPTION = 0.3  # how often others come first when the loop takes the lock


class _Buffers:
    """Stands in for `psworker.live_buffers.LiveBuffers`: there are none beside the committed ones."""

    def __init__(self, memory: BucketMemory) -> None:
        self._memory = memory

    def weighted(self, bucket: int, weight: float) -> torch.Tensor:
        return self._memory.flats[bucket] * weight

    def carried(self, bucket: int) -> torch.Tensor:
        return self._memory.flats[bucket]


class _Replica:
    """Stands in for `psworker.replica.Replica`: the memory, and no module over it."""

    def __init__(self) -> None:
        self.layout = LAYOUT
        self.memory = BucketMemory(LAYOUT)
        self.buffers = _Buffers(self.memory)
        model.first_values(self.memory.flats)

    def load_bucket(self, bucket: int) -> None:
        """What landed is what is computed on."""

    def rebuild(self) -> None:
        self.memory.close_windows()
        model.first_values(self.memory.flats)

    def sha256(self) -> str:
        return model.digest(self.memory.flats)


class _Accumulation:
    """Stands in for `Accumulator`, whose hooks need autograd: the same counters, fed by hand."""

    def __init__(self, tree: Tree, push: Callable[[Work, int, TreeNode, Gradients], None]) -> None:
        self._push = push
        self._work: Any = None
        trained = (bucket.index for bucket in LAYOUT.buckets if bucket.kind == "trained")
        self._counters = {index: Counter[Gradients](tree, add_gradients) for index in trained}

    def begin_run(self, work: Work, roots: list[TreeNode]) -> None:
        self._work = work
        for counter in self._counters.values():
            counter.begin(roots)

    def carry(self, bucket: int, shard: int, gradients: Gradients) -> None:
        for node, value in self._counters[bucket].carry(model.leaf(shard), gradients):
            self._push(self._work, bucket, node, value)

    def flush(self) -> None:
        for index, counter in self._counters.items():
            for node, value in counter.flush():
                self._push(self._work, index, node, value)

    def abandon(self) -> None:
        for counter in self._counters.values():
            counter.flush()

    @property
    def buckets(self) -> list[int]:
        """In the order in which backward gives them."""
        return sorted(self._counters, reverse=True)


class _NoBuffers:
    """Stands in for `BufferSums`: each microbatch's buffers are pushed as they are."""

    def begin_run(self, roots: list[TreeNode]) -> None:
        """Nothing is summed here."""

    def flush(self) -> list[Any]:
        return []

    def abandon(self) -> None:
        """Nothing is held."""


class _NoModules:
    """A model without modules: there is no mode to enter."""

    def enter_train_mode(self) -> None:
        return


class ArithmeticTrainer(Trainer):
    """The product's loop; only what touches torch modules and user code is replaced."""

    def __init__(
        self, spec: JobSpec, exchange: Exchange, replica: _Replica, counters: TrainerCounters, strand: Strand, sim: Any
    ) -> None:
        self._spec = spec
        self._replica: Any = replica
        self._exchange = exchange
        self._counters = counters
        self._rebuild = replica.rebuild
        self._has_first_values = True
        self._tree = tree_of(spec.train.num_shards)
        self._accumulator: Any = _Accumulation(self._tree, exchange.pusher.gradients)
        self._summaries = Counter(self._tree, Summary.plus)
        self._buffers: Any = _NoBuffers()
        self._watch: Any = _NoModules()
        self._done: dict[tuple[int, int, str], set[int]] = {}
        self._loaded: set[int] = set()
        self._may_overlap = False
        self._strand = strand
        self._sim = sim

    def _microbatch(self, work: Work, shard: int) -> bool:
        flats = self._replica.memory.flats
        self._strand.spend(self._sim.compute_s(self._strand.life))
        self._exchange.wait_values(work)
        self._sim.monitor.computes(self._strand.life.name, work, flats)
        digests = self._digests(work, shard)
        for bucket in self._accumulator.buckets:
            gradients = model.gradients(flats, bucket, work.version, shard)
            if digests is not None:
                digests.take_gradients(bucket, gradients)
            if work.action == "train":
                self._accumulator.carry(bucket, shard, gradients)
        self._strand.spend(SOON_S)
        self._exchange.wait_values(work)
        if digests is not None:
            self._send_digest(work, shard, digests, model.summary(flats, shard).loss_sum, model.weight_of(shard))
        if work.action == "train":
            self._push_moved(work, shard)
        return False

    def _push_moved(self, work: Work, shard: int) -> None:
        flats, node = self._replica.memory.flats, model.leaf(shard)
        averaged, carried = LAYOUT.bucket_of[model.MEAN][0], LAYOUT.bucket_of[model.COUNT][0]
        words = model.buffer_words(flats, shard)
        if words is None:
            self._exchange.pusher.unchanged(work, averaged, node, model.weight_of(shard))
        else:
            self._exchange.pusher.words(work, averaged, node, words)
        if shard == 0:
            self._exchange.pusher.words(work, carried, node, model.carried_words(flats))
        for root, value in self._summaries.carry(node, model.summary(flats, shard)):
            self._exchange.pusher.summary(work, root, value)

    def _shard_statistics(self, shard: int) -> Statistics:
        """Sums over a shard's part of the parameters."""
        self._strand.spend(self._sim.compute_s(self._strand.life))
        flats = self._replica.memory.flats
        tensors = [model.tensor_of(flats, number) for number in (model.W, model.B, model.MEAN)]
        return np.array([float(tensor[shard::4].double().sum()) for tensor in tensors])

    def _finalise(self, work: Work) -> None:
        assert work.statistics is not None
        self._exchange.pusher.outcome(work, Outcome(metrics={"loss": float(work.statistics.sum())}))
        self._done[work.key].update(work.shards)


class TrainerProcess:
    """`ended` hears the exit code when the process ends by itself; `report` takes what it tells its agent."""

    def __init__(
        self,
        sim: Any,
        life: Life,
        host: str,
        start: ProcessSpec,
        report: Callable[[ProcessReport], None],
        ended: Callable[[int], None],
    ) -> None:
        self.sim = sim
        self.life = life
        self.process_id = start.process_id
        self.job_id = start.job_id
        self._ended = ended
        self.spec = parse_spec(json.loads(start.spec_json))
        self.link = Link(life, start, report)
        self.strand = Strand(life, self._run)
        self._replica = _Replica()
        self._counters = TrainerCounters()
        self._counters.timer = ComputeTimer(lambda: sim.schedule.now_s)
        self.exchange = Exchange(
            self.link,  # type: ignore[arg-type]
            self.spec,
            LAYOUT,
            self._replica.memory,
            self._counters,
            reactor=Reactor(sim.network, life, host, self.strand.notify),  # type: ignore[arg-type]
        )
        changed: Any = Condition(self.strand, PREEMPTION)
        self.exchange.agenda.changed = self.exchange.values._changed = changed
        sim.monitor.watch_trainer(self)
        life.at_end.append(lambda: sim.monitor.forget_trainer(self))

    def begin(self) -> None:
        """Say what was built, listen to the agent, and work."""
        self.link.report(ProcessReport(trainer_ready=self._ready()))
        if self.link.start.HasField("plan"):
            self.exchange.adopt(self.link.start.plan)
        self.exchange._report_counters()
        self.exchange._heartbeat.start()
        self.strand.begin()

    def hear_orders(self) -> None:
        """Orders are there."""
        self.exchange._receive_orders()

    def _run(self) -> None:
        trainer = ArithmeticTrainer(self.spec, self.exchange, self._replica, self._counters, self.strand, self.sim)
        trainer.run()
        self.life.after(SOON_S, "returns from its loop", lambda: self._ended(0))

    def _ready(self) -> TrainerReady:
        return TrainerReady(
            layout_json=LAYOUT.to_json(),
            layout_sha256=LAYOUT.sha256,
            data_fingerprint="2" * 64,
            numerics_class=NUMERICS,
            numerics_detail="simulated",
            device="cpu",
            final_step=self.spec.train.max_steps or 0,
        )
