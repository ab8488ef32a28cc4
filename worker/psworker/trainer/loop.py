"""The training loop: one gradient from its batch to the wire, readable from the top down."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch

from pscluster.agent.position import position
from pscluster.errors import TaskError
from pscluster.job.spec import JobSpec
from pscluster.step.audit import AuditRole
from pscluster.step.codec import DTYPES
from pscluster.step.tree import Statistics, Summary, TreeNode, add_statistics, touched_bits, tree_of
from pscluster.task import Task
from pscluster.wire.protocol import LeafDigest, Outcome
from psworker.numerics import precision
from psworker.replica import Replica
from psworker.trainer.data.batches import Batches, EvalBatches, seed_step
from psworker.trainer.data.loading import user_code
from psworker.trainer.data.moving import to_device
from psworker.trainer.evaluation import Shapes, check_metric, loss_of, shard_statistics, unpack_metrics
from psworker.trainer.exchange import Exchange, SupersededError
from psworker.trainer.gradients.accumulate import Accumulator, BufferSums, Counter
from psworker.trainer.gradients.digests import TensorDigests
from psworker.trainer.model_watch import ModelWatch
from psworker.trainer.telemetry import TrainerCounters
from psworker.trainer.values import PullGuard, sees_everything
from psworker.trainer.work import Work, WorkKey


class Trainer:
    """Computes what the exchange asks for until it asks for nothing more. On the main thread."""

    def __init__(
        self,
        spec: JobSpec,
        task: Task,
        replica: Replica,
        batches: Batches,
        held_out: EvalBatches | None,
        exchange: Exchange,
        counters: TrainerCounters,
        rebuild: Callable[[], None],
    ) -> None:
        self._spec = spec
        self._task = task
        self._replica = replica
        self._device = replica.device
        self._batches = batches
        self._held_out = held_out
        self._exchange = exchange
        self._counters = counters
        self._rebuild = rebuild  # sets the replica's memory to the seeded first values
        self._has_first_values = True
        self._tree = tree_of(spec.train.num_shards)
        dtype = DTYPES[spec.network.push_codec]
        push = exchange.pusher.gradients
        self._accumulator = Accumulator(replica.layout, replica.parameters, self._tree, push, dtype)
        self._summaries = Counter(self._tree, Summary.plus)
        self._buffers = BufferSums(replica, self._tree)
        self._shapes: Shapes = ()  # of the task's statistics, learnt from the first evaluated batch
        self._done: dict[WorkKey, set[int]] = {}
        self._loaded: set[int] = set()  # buckets of the current version that the model sees
        self._watch = ModelWatch(replica)
        self._bucket_of = replica.trained_buckets()
        self._may_overlap = sees_everything(replica.model) and not spec.train.compile

    def run(self) -> None:
        """Work until the agent ends this process. Raises what user code raised, as a TaskError."""
        while True:
            with self._counters.phase("wait"):
                work = self._exchange.agenda.next_work(self._done)
            if work is None:
                return
            # Past work at this version can be asked for again.
            self._done = {key: shards for key, shards in self._done.items() if key[:2] == work.key[:2]}
            self._done.setdefault(work.key, set())
            self._exchange.progress += 1
            try:
                self._carry_out(work)
            except SupersededError:
                self._accumulator.abandon()
                self._summaries.flush()
                self._buffers.flush()
                self._done[work.key].update(work.shards)  # a newer directive is on its way

    def _carry_out(self, work: Work) -> None:
        if work.action == "initialise":
            if not self._has_first_values:
                self._rebuild()
                self._exchange.forget_values()  # also when this was not needed: a partition's WELCOME came late
            self._exchange.send_initial(work)
            self._done[work.key].update(work.shards)
            return
        self._has_first_values = False
        if not self._exchange.want(work, work.version, exact=not work.is_step):
            raise SupersededError(f"version {work.version} is gone")
        with self._counters.phase("pull"):
            self._wait_for_start(work)
        {
            "train": self._train, "audit": self._audit, "arbitrate": self._audit,
            "evaluate": self._evaluate, "finalise": self._finalise, "finish": self._finish,
        }[work.action](work)  # fmt: skip

    def _wait_for_start(self, work: Work) -> None:
        """Block until the work may start: training as soon as the buffers are here, the rest when everything is."""
        self._loaded.clear()
        if not work.is_step or not self._may_overlap:
            self._need_all(work)
            return
        for bucket in self._replica.layout.buckets:
            if bucket.kind != "trained":
                self._need(work, bucket.index)

    def _need(self, work: Work, bucket: int) -> None:
        """Block until a bucket has landed; from here on the model sees it."""
        self._exchange.wait_bucket(work, bucket)
        if bucket not in self._loaded:
            self._loaded.add(bucket)
            self._replica.load_bucket(bucket)

    def _need_all(self, work: Work) -> None:
        self._exchange.wait_values(work)
        if len(self._loaded) < len(self._replica.layout.buckets):
            for bucket in self._replica.layout.buckets:
                self._need(work, bucket.index)

    # ---- training ----

    def _train(self, work: Work) -> None:
        roots = self._tree.cover(work.shards)
        self._accumulator.begin_run(work, roots)
        self._summaries.begin(roots)
        self._buffers.begin_run(roots)
        self._watch.enter_train_mode()
        for shard in work.shards:
            if not self._exchange.agenda.is_current(work):
                break
            with self._counters.timer.computing("train"):
                is_full = self._microbatch(work, shard)
            if is_full:
                self._counters.measure(work.version)
            self._done[work.key].add(shard)
            self._exchange.progress += 1
        self._accumulator.flush()
        for node, summary in self._summaries.flush():
            self._exchange.pusher.summary(work, node, summary)
        self._push_buffers(work, self._buffers.flush())
        if self._done[work.key].issuperset(work.shards):
            self._exchange.want(work, work.version + 1)

    def _audit(self, work: Work) -> None:
        """Compute one shard for its digest alone: nothing of it is pushed or counted."""
        self._watch.enter_train_mode()
        for shard in work.shards:
            with self._counters.timer.computing("train"):
                self._microbatch(work, shard)
            self._done[work.key].add(shard)
            self._exchange.progress += 1

    def _microbatch(self, work: Work, shard: int) -> bool:
        """One shard's gradient, from batch to `push`, or to its digest; whether it had all its samples. One without any
        contributes zeros."""
        position.begin("train", work.version, shard)
        seed_step(self._spec.train.seed, work.version, shard)
        self._watch.begin(work.version)
        with self._counters.phase("data"):
            batch, num_samples = self._batches.microbatch(work.version, shard)
        digests = self._digests(work, shard)
        self._accumulator.begin(shard, digests, discards=work.action != "train")
        loss_sum, weight = self._forward_backward(work, batch) if num_samples else (0.0, 0.0)
        with self._counters.phase("pull"):
            self._exchange.wait_values(work)  # nothing is pushed before every partition has sent its values
        touched = self._accumulator.finish()
        if digests is not None:
            self._send_digest(work, shard, digests, loss_sum, weight)
        if work.action != "train":
            return False
        with self._counters.phase("push"):
            self._push_rest(work, shard, loss_sum, weight, num_samples, touched)
        self._counters.microbatch(num_samples, weight)
        return num_samples == self._spec.train.microbatch

    def _digests(self, work: Work, shard: int) -> TensorDigests | None:
        """What takes the digests of a shard's gradient; None: it is not audited."""
        audited = work.action != "train" or self._exchange.agenda.audits.shard_of(work.version) == shard
        return TensorDigests(self._replica.layout) if audited else None

    def _send_digest(self, work: Work, shard: int, digests: TensorDigests, loss_sum: float, weight: float) -> None:
        """Before the shard's summary: the coordinator has the digest by the time that the step can be complete."""
        digests.take_buffers(self._replica, weight)
        role = {"train": AuditRole.OWNER, "audit": AuditRole.AUDITOR, "arbitrate": AuditRole.ARBITER}[work.action]
        digest = LeafDigest(loss_sum=loss_sum, weight=weight, tensors=digests.found)
        self._exchange.pusher.digest(work, shard, role, digest)

    def _forward_backward(self, work: Work, batch: object) -> tuple[float, float]:
        with self._counters.phase("forward"):
            loss_sum, weight = self._forward(work, to_device(batch, self._device))
        self._watch.check_parameters(work.version)
        with self._counters.phase("backward"), user_code("backward"):
            loss_sum.backward()  # type: ignore[no-untyped-call]
            loss = float(loss_sum.detach())  # waits for the device
        self._replica.model.zero_grad(set_to_none=True)
        return loss, weight

    def _forward(self, work: Work, batch: object) -> tuple[torch.Tensor, float]:
        """The loss; while values are still landing, each operation waits for its own parameters."""
        if self._exchange.has_landed:
            self._need_all(work)
            with precision(self._spec, self._device):
                return loss_of(self._task, self._replica.model, batch)
        guard = PullGuard(self._bucket_of, lambda bucket: self._wait_bucket(work, bucket))
        with guard, precision(self._spec, self._device):
            loss = loss_of(self._task, self._replica.model, batch)
        with self._counters.phase("pull"):
            self._need_all(work)  # backward reads parameters, too
        return loss

    def _wait_bucket(self, work: Work, bucket: int) -> None:
        with self._counters.phase("pull"):
            self._need(work, bucket)

    def _push_rest(
        self, work: Work, shard: int, loss_sum: float, weight: float, num_samples: int, touched: set[int]
    ) -> None:
        moved = self._watch.moved_buffers(work.version) if num_samples else []
        num_tensors = len(self._replica.layout.tensors)
        summary = Summary(
            loss_sum=loss_sum, weight=weight, samples=num_samples, touched=touched_bits([*touched, *moved], num_tensors)
        )
        self._push_buffers(work, self._buffers.carry(shard, weight, moved))
        for node, value in self._summaries.carry(TreeNode(shard, 1), summary):
            self._exchange.pusher.summary(work, node, value)

    def _push_buffers(self, work: Work, ready: list[tuple[int, TreeNode, float, torch.Tensor | None]]) -> None:
        for bucket, node, weight, words in ready:
            if words is None:
                self._exchange.pusher.unchanged(work, bucket, node, weight)
            else:
                self._exchange.pusher.words(work, bucket, node, words)

    # ---- evaluation and the end ----

    def _evaluate(self, work: Work) -> None:
        counter: Counter[Statistics] = Counter(self._tree, add_statistics)
        counter.begin(self._tree.cover(work.shards))
        for shard in work.shards:
            if not self._exchange.agenda.is_current(work):
                break
            position.begin("evaluate", work.version, shard)
            with self._counters.phase("evaluate"), self._counters.timer.computing("evaluate"):
                statistics = self._shard_statistics(shard)
            self._done[work.key].add(shard)
            for node, value in counter.carry(TreeNode(shard, 1), statistics):
                self._exchange.pusher.statistics(work, node, value)
        for node, value in counter.flush():
            self._exchange.pusher.statistics(work, node, value)

    def _shard_statistics(self, shard: int) -> Statistics:
        """The sum over a shard's evaluation batches, in order; empty when it has none."""
        total: Statistics = np.zeros(0)
        if self._held_out is not None:
            self._replica.buffers.restore()
            running = shard_statistics(self._task, self._replica.model, self._held_out, shard, self._device)
            with precision(self._spec, self._device):
                for so_far, shapes in running:
                    if self._shapes and shapes != self._shapes:
                        raise TaskError(f"metrics() returned {shapes} where it returned {self._shapes} before")
                    total, self._shapes = so_far, shapes
                    self._exchange.progress += 1
        return total

    def _finalise(self, work: Work) -> None:
        assert work.statistics is not None
        position.begin("finalise", work.version)
        metrics: dict[str, float] = {}
        if work.statistics.size:
            if not self._shapes:
                self._shard_statistics(0)  # another trainer evaluated shard 0: learn what the numbers are
            metrics = unpack_metrics(self._task, work.statistics, self._shapes)
            check_metric(metrics, self._spec.evaluate.metric)
        self._exchange.pusher.outcome(work, Outcome(metrics=metrics))
        self._done[work.key].update(work.shards)

    def _finish(self, work: Work) -> None:
        self._exchange.pusher.outcome(work, Outcome(sha256=self._replica.sha256()))
        self._done[work.key].update(work.shards)
