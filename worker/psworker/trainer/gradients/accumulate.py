"""Accumulation: from autograd's gradients to nodes of the gradient tree, bucket by bucket, while backward runs.

A hook takes each parameter's gradient as soon as it is there and leaves `grad = None`. When a bucket of the current
microbatch is closed, its node carries upward like a binary counter: siblings add, left.add_(right), until the node
is a root of what this worker owns; that one is handed to `push`.

From the second backward on, a bucket closes early when each of its parameters has fired once. Re-entrant
checkpointing fires a parameter several times: a parameter seen to do so closes its buckets only when backward has
returned, and one that fires after its bucket was pushed fails the step by name rather than giving a wrong gradient."""

from __future__ import annotations

import collections
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Generic, TypeVar

import torch
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef

from pscluster.errors import TaskError
from pscluster.step.codec import BufferNode, add_optional
from pscluster.step.layout import Layout
from pscluster.step.tree import Tree, TreeNode
from psworker.replica import Replica
from psworker.trainer.gradients.digests import TensorDigests
from psworker.trainer.work import Work

Gradients = list[torch.Tensor | None]  # of a bucket's tensors in order; None: no microbatch of the node touched it
PushGradients = Callable[[Work, int, TreeNode, Gradients], None]  # as Pusher.gradients
Ready = list[tuple[int, TreeNode, float, torch.Tensor | None]]  # bucket, node, weight, words (None: unchanged)


def add_gradients(left: Gradients, right: Gradients) -> Gradients:
    """The parent of two nodes; reuses their memory."""
    return [add_optional(a, b) for a, b in zip(left, right, strict=True)]


T = TypeVar("T")


class Counter(Generic[T]):
    """The binary counter of one bucket: adds nodes of type T upward until they are wanted roots."""

    def __init__(self, tree: Tree, add: Callable[[T, T], T]) -> None:
        self._tree = tree
        self._add = add
        self._held: dict[TreeNode, T] = {}
        self._roots: frozenset[TreeNode] = frozenset()

    def begin(self, roots: Iterable[TreeNode]) -> None:
        """Start a run of microbatches whose maximal nodes are `roots`. Nothing may be held."""
        assert not self._held
        self._roots = frozenset(roots)

    def carry(self, node: TreeNode, value: T) -> list[tuple[TreeNode, T]]:
        """Take a node; return the roots that it completes (none or one)."""
        while node not in self._roots:
            merge = self._tree.merge_of(node)
            assert merge is not None
            sibling = merge.right if node == merge.left else merge.left
            other = self._held.pop(sibling, None)
            if other is None:
                self._held[node] = value
                return []
            value = self._add(value, other) if node == merge.left else self._add(other, value)
            node = merge.parent
        return [(node, value)]

    def flush(self) -> list[tuple[TreeNode, T]]:
        """Give up what is held, as nodes of their own: the run ended before its roots were whole."""
        held = sorted(self._held.items(), key=lambda item: item[0])
        self._held.clear()
        return held


class Accumulator:
    """Hooks a model's trained parameters. One per trainer; on the thread that runs forward and backward."""

    def __init__(
        self,
        layout: Layout,
        parameters: Mapping[nn.Parameter, int],
        tree: Tree,
        push: PushGradients,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        """`parameters`: each, and the number of its tensor. `dtype`: the push codec's, to which a microbatch's
        gradients are rounded."""
        self._layout = layout
        self._push = push
        self._dtype = dtype
        self._buckets = [b for b in layout.buckets if b.kind == "trained"]
        self._counters = {b.index: Counter[Gradients](tree, add_gradients) for b in self._buckets}
        self._place = {p.tensor: (b.index, i) for b in self._buckets for i, p in enumerate(b.placed)}
        fires = collections.Counter(parameters.values())
        # Buckets with a parameter that was seen to fire more than once, or with a tensor that is several parameters.
        self._late = {self._place[number][0] for number, count in fires.items() if count > 1 and number in self._place}
        self._observed = False  # one whole backward was watched
        self._fired: dict[int, int] = {}
        self._open: dict[int, Gradients] = {}
        self._storages: dict[int, StorageWeakRef] = {}  # memory of the gradients taken in this backward, by address
        self._leaf: TreeNode | None = None
        self._digests: TensorDigests | None = None  # of an audited microbatch
        self._discards = False
        self._work: Work | None = None
        self._handles = [
            parameter.register_post_accumulate_grad_hook(self._hook(number))  # type: ignore[no-untyped-call]
            for parameter, number in parameters.items()
            if number in self._place  # one without elements may have no place
        ]

    def begin_run(self, work: Work, roots: Iterable[TreeNode]) -> None:
        """The next microbatches are the leaves of these nodes, which are pushed as a part of `work`."""
        wanted, self._work = list(roots), work
        for counter in self._counters.values():
            counter.begin(wanted)

    def begin(self, shard: int, digests: TensorDigests | None = None, *, discards: bool = False) -> None:
        """The next backward is this shard's microbatch. `digests` take its gradients before they are added to anything;
        `discards`: nothing else does."""
        self._leaf = TreeNode(shard, 1)
        self._digests, self._discards = digests, discards
        self._fired = {}
        self._storages.clear()
        self._open = {b.index: [None] * len(b.placed) for b in self._buckets}

    def finish(self) -> set[int]:
        """Backward has returned: close what is open; returns the numbers of the tensors it touched."""
        for bucket in reversed(self._buckets):
            if bucket.index in self._open:
                self._close(bucket.index)
        self._leaf = None
        self._observed = True
        self._late |= {self._place[number][0] for number, count in self._fired.items() if count > 1}
        return set(self._fired)

    def abandon(self) -> None:
        """Forget the current microbatch and everything held: the step is no longer wanted."""
        self._leaf = None
        self._open = {}
        for counter in self._counters.values():
            counter.flush()

    def flush(self) -> None:
        """Push what is held although its root is not whole: the shards beside it went to another worker."""
        for index, counter in self._counters.items():
            self._push_all(index, counter.flush())

    def close(self) -> None:
        """Unhook the model."""
        for handle in self._handles:
            handle.remove()

    def _hook(self, number: int) -> Callable[[torch.Tensor], None]:
        bucket, place = self._place[number]

        def take(parameter: torch.Tensor) -> None:
            gradient, parameter.grad = parameter.grad, None
            if self._leaf is None or gradient is None:
                return
            gradients = self._open.get(bucket)
            if gradients is None:
                raise TaskError(
                    f"the gradient of {self._layout.tensors[number].name} arrived twice in one backward, "
                    "after its bucket was sent",
                    action="use torch.utils.checkpoint with use_reentrant=False",
                )
            dense = self._own(gradient.to_dense() if gradient.is_sparse else gradient)
            present = gradients[place]
            gradients[place] = dense if present is None else present.add_(dense)
            self._fired[number] = self._fired.get(number, 0) + 1
            may_close = self._observed and bucket not in self._late
            if may_close and all(g is not None for g in gradients):
                self._close(bucket)

        return take

    def _own(self, gradient: torch.Tensor) -> torch.Tensor:
        """The gradient in memory that no other gradient of this backward shares: sums are made in place, and autograd
        gives the parameters of `a.view(-1) + b.view(-1)` two views of one tensor."""
        storage = gradient.untyped_storage()
        known = self._storages.get(storage.data_ptr())
        # The address of one that was sent and freed may be used again.
        if known is not None and not known.expired():  # type: ignore[no-untyped-call]
            return gradient.clone()
        self._storages[storage.data_ptr()] = StorageWeakRef(storage)  # type: ignore[no-untyped-call]
        return gradient

    def _close(self, bucket: int) -> None:
        gradients = [None if g is None else g.to(self._dtype) for g in self._open.pop(bucket)]
        assert self._leaf is not None
        if self._digests is not None:
            self._digests.take_gradients(bucket, gradients)
        if not self._discards:
            self._push_all(bucket, self._counters[bucket].carry(self._leaf, gradients))

    def _push_all(self, bucket: int, nodes: Iterable[tuple[TreeNode, Gradients]]) -> None:
        for node, gradients in nodes:
            assert self._work is not None
            self._push(self._work, bucket, node, gradients)


class BufferSums:
    """Carries the buffers of a run of microbatches up the tree."""

    def __init__(self, replica: Replica, tree: Tree) -> None:
        self._replica = replica
        buckets = replica.layout.buckets
        self._averaged = {
            b.index: Counter[BufferNode](tree, partial(_plus, replica.flats[b.index]))
            for b in buckets
            if b.kind == "averaged"
        }
        self._carried = [b.index for b in buckets if b.kind == "carried"]

    def begin_run(self, roots: list[TreeNode]) -> None:
        """The next microbatches are the leaves of these nodes."""
        for counter in self._averaged.values():
            counter.begin(roots)

    def carry(self, shard: int, weight: float, moved: list[int]) -> Ready:
        """Take the live buffers after a microbatch of `weight` that moved the tensors numbered; give what is whole."""
        ready: Ready = []
        buckets_moved = {self._replica.layout.bucket_of[number][0] for number in moved}
        for bucket, counter in self._averaged.items():
            words = self._replica.buffers.weighted(bucket, weight) if bucket in buckets_moved else None
            leaf = BufferNode(weight, words)
            ready += [
                (bucket, node, whole.weight, whole.words) for node, whole in counter.carry(TreeNode(shard, 1), leaf)
            ]
        if shard == 0:
            for bucket in self._carried:
                words = self._replica.buffers.carried(bucket)
                same = torch.equal(words, self._replica.flats[bucket])
                ready.append((bucket, TreeNode(0, 1), weight, None if same else words))
        return ready

    def flush(self) -> Ready:
        """Give up what is held, as nodes of their own."""
        return [
            (bucket, node, value.weight, value.words)
            for bucket, counter in self._averaged.items()
            for node, value in counter.flush()
        ]


def _plus(committed: torch.Tensor, left: BufferNode, right: BufferNode) -> BufferNode:
    return left.plus(right, committed)
