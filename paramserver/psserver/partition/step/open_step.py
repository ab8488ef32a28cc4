"""The open step of one partition: nodes in, vote out; decision in, update done. No sockets here."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

import torch

from pscluster.job.optimizer import OptimizerSection
from pscluster.job.schedule import learning_rate, momentum
from pscluster.job.spec import JobSpec
from pscluster.step.codec import DTYPES, BufferNode
from pscluster.step.layout import Span
from pscluster.step.tree import Summary, Tree, TreeNode, tree_of
from pscluster.wire.frame import SUMMARY
from psserver.partition.step.optimizer import Run, runs, update_span
from psserver.partition.step.state import PartitionState
from psserver.partition.step.sums import Entry, Pool, Sums, block_squares
from psserver.partition.step.voting import CommitDecision

Root = Entry[torch.Tensor] | Entry[BufferNode]


@dataclass
class _Update:
    """One bucket's root, waiting to be applied."""

    span: Span
    root: Root
    run_list: list[Run]


class OpenStep:
    """Sums of the step being collected, and the updates of the step that was just decided.

    Gradient nodes are tensors of the push codec's dtype, of the length of their span."""

    def __init__(self, state: PartitionState, spec: JobSpec, final_step: int) -> None:
        self.state = state
        self._spec = spec
        self._final_step = final_step
        self._groups = [spec.train.optimizer.group_of(tensor.names) for tensor in state.layout.tensors]
        self.pool = Pool(DTYPES[spec.network.push_codec])
        tree = tree_of(spec.train.num_shards)
        kinds = [state.layout.buckets[span.bucket].kind for span in state.spans]
        spans = [(s, k) for s, k in zip(state.spans, kinds, strict=True) if s.num_words]
        self.trained = {s.bucket: self._trained(tree, s) for s, k in spans if k == "trained"}
        self.averaged = {s.bucket: self._averaged(tree, s.bucket) for s, k in spans if k == "averaged"}
        self.carried: dict[int, Sums[BufferNode]] = {
            s.bucket: Sums(tree_of(1), lambda left, _, __: left) for s, k in spans if k == "carried"
        }
        self.summary: Sums[Summary] = Sums(tree, lambda a, b, _: a.plus(b))
        self._squares: dict[int, dict[int, float]] = {}
        self._updates: deque[_Update] = deque()
        self._applied: Summary | None = None
        self._decision: CommitDecision | None = None

    @property
    def open_bucket(self) -> int:
        """The first bucket, in the order in which backward gives them, that is not complete; -1: none."""
        return next((b for b in reversed(self.trained) if not self.trained[b].is_complete), -1)

    @property
    def is_complete(self) -> bool:
        """Every microbatch of the step is in, for every bucket that this partition holds."""
        kinds = (self.trained, self.averaged, self.carried)
        return self.summary.is_complete and all(s.is_complete for sums in kinds for s in sums.values())

    def sums(self, bucket: int) -> Sums[torch.Tensor] | Sums[BufferNode]:
        """What there is of one bucket."""
        return self.trained.get(bucket) or self.averaged.get(bucket) or self.carried[bucket]

    def complete_buckets(self) -> list[int]:
        """The buckets whose root is there, in the order in which backward gives them; SUMMARY for the summary."""
        mine = (*reversed(self.trained), *self.averaged, *self.carried)
        complete = [bucket for bucket in mine if self.sums(bucket).is_complete]
        return [*complete, SUMMARY] if self.summary.is_complete else complete

    def offer_trained(self, bucket: int, node: TreeNode, words: torch.Tensor, release: Callable[[], None]) -> bool:
        """Take a gradient node; sums are made in its memory, which is owned until `release` is called. False: a
        duplicate."""
        sums = self.trained[bucket]
        fresh = sums.offer(node, Entry(words, release))
        if fresh and sums.is_complete and bucket not in self._squares:  # it came whole
            self._squares[bucket] = block_squares(sums.root, self.state.spans[bucket].first_block)
        return fresh

    def offer_buffers(self, bucket: int, node: TreeNode, value: BufferNode) -> bool:
        """Take a node of an averaged or carried bucket. False: a duplicate."""
        sums = self.averaged.get(bucket) or self.carried[bucket]
        return sums.offer(node, Entry(value))

    def offer_summary(self, node: TreeNode, summary: Summary) -> bool:
        """Take a node of the step's summary. False: a duplicate."""
        return self.summary.offer(node, Entry(summary))

    def make_vote(self) -> tuple[dict[int, float], bool]:
        """What to vote: squares by block, and whether everything that changes is finite. Only when complete."""
        squares = {block: square for found in self._squares.values() for block, square in found.items()}
        finite = all(math.isfinite(square) for square in squares.values())
        return squares, finite and all(self._moved_is_finite(bucket) for bucket in self.averaged)

    def _moved_is_finite(self, bucket: int) -> bool:
        """Whether the buffers of an averaged bucket that moved are finite. A mask of -inf beside them is no fault."""
        words = self.averaged[bucket].root.words
        if words is None:
            return True
        moved = self._runs(self.state.spans[bucket], self._touched(self.summary.root))
        return all(bool(torch.isfinite(words[run.start : run.stop]).all()) for run in moved)

    def decide(self, decision: CommitDecision) -> None:
        """Carry out a decision: the sums become updates (or are dropped), and the next step begins empty."""
        summary = self.summary.take_root().value
        touched = self._touched(summary)
        roots: dict[int, Root] = {b: s.take_root() for b, s in self.trained.items()}
        roots |= {b: s.take_root() for sums in (self.averaged, self.carried) for b, s in sums.items()}
        self._squares.clear()
        self._applied, self._decision = summary, decision
        for span in self.state.spans:
            root = roots.get(span.bucket)
            if root is None:
                continue
            if decision.kind != "commit":
                root.release()
                continue
            self._updates.append(_Update(span, root, self._runs(span, touched)))
        if decision.kind == "commit":
            trained = (t.kind == "trained" for t in self.state.layout.tensors)
            self.state.update_counts = [
                update_count + 1 if hit and learns else update_count
                for update_count, hit, learns in zip(self.state.update_counts, touched, trained, strict=True)
            ]

    def next_update(self) -> int | None:
        """The bucket that `update` will overwrite; None: the step is done."""
        return self._updates[0].span.bucket if self._updates else None

    def update(self) -> None:
        """Apply the next bucket's root to its values (CPU-bound, about a millisecond a MiB)."""
        item = self._updates.popleft()
        bucket, decision, root = item.span.bucket, self._decision, item.root.value
        assert decision is not None
        if isinstance(root, torch.Tensor):
            optimizer, rates = self._in_force(decision.step)
            update_span(
                optimizer,
                item.run_list,
                self.state.values[bucket],
                root,
                self.state.moments[bucket],
                scale=decision.scale,
                rates=rates,
                clip_value=self._spec.train.clip_value,
            )
        elif root.words is not None:
            self._update_buffers(item, root.words)
        self.state.publish(bucket)
        item.root.release()

    def _touched(self, summary: Summary) -> list[bool]:
        """By tensor of the layout, whether a microbatch of the step touched it."""
        return [summary.is_touched(number) for number in range(len(self.state.layout.tensors))]

    def _runs(self, span: Span, touched: list[bool]) -> list[Run]:
        return runs(self.state.layout, span, self.state.update_counts, touched, self._groups)

    def _in_force(self, step: int) -> tuple[OptimizerSection, list[float]]:
        """The optimizer of a step, and the learning rate of each of its groups, the rest last."""
        train, final_step = self._spec.train, self._final_step
        optimizer = train.optimizer
        rates = [learning_rate(one.lr, train.schedule, step, final_step) for one in optimizer.of_groups]
        cycled = momentum(optimizer, train.schedule, step, final_step)
        return optimizer if cycled is None else optimizer.with_momentum(cycled), rates

    def _update_buffers(self, item: _Update, words: torch.Tensor) -> None:
        bucket = item.span.bucket
        if bucket in self.carried:
            self.state.values[bucket].copy_(words)
            return
        assert self._applied is not None
        if not self._applied.weight:
            return  # no weight: there is no mean, and 0 / 0 would stay for ever
        for run in item.run_list:  # tensors that no microbatch moved keep their bits
            part = slice(run.start, run.stop)
            torch.div(words[part], self._applied.weight, out=self.state.values[bucket][part])

    def _trained(self, tree: Tree, span: Span) -> Sums[torch.Tensor]:
        def add(left: torch.Tensor, right: torch.Tensor, parent: TreeNode) -> torch.Tensor:
            if parent == tree.root:  # the norm in the same pass
                self._squares[span.bucket] = block_squares(left, span.first_block, right)
                return left
            return left.add_(right)

        return Sums(tree, add)

    def _averaged(self, tree: Tree, bucket: int) -> Sums[BufferNode]:
        return Sums(tree, lambda a, b, _: a.plus(b, self.state.values[bucket]))
