"""A trainer that computes nothing: it pushes prepared gradients and receives the values.

goodput.py starts it in place of a trainer. With `--touch` the summary marks every tensor as touched, so that the
partitions run the optimizer; without it they gate, sum, vote and send the values, but update nothing.
"""

from __future__ import annotations

import json
import sys

import numpy as np
import torch

from pscluster.agent.link import ProcessLink
from pscluster.job.spec import parse_spec
from pscluster.step.tree import Summary, TreeNode, touched_bits
from pscluster.v1.plan_pb2 import ProcessReport, TrainerReady
from pscluster.wire.protocol import Outcome
from psworker.numerics import settle_numerics
from psworker.replica import Replica
from psworker.staging import keep_freed_memory
from psworker.trainer.data.loading import build_model, load_task
from psworker.trainer.exchange import Exchange
from psworker.trainer.telemetry import TrainerCounters
from psworker.trainer.work import Work


class Driver:
    """Does what a trainer does with the exchange, but for forward and backward. On the main thread."""

    def __init__(self, exchange: Exchange, replica: Replica, touches: bool) -> None:
        self._exchange = exchange
        self._replica = replica
        self._done: dict[tuple[int, int, str], set[int]] = {}
        layout = replica.layout
        self._gradients = {
            bucket.index: [torch.full(layout.tensors[p.tensor].shape, 1e-3) for p in bucket.placed]
            for bucket in reversed(layout.buckets)  # in backward's order
            if bucket.kind == "trained"
        }
        touched = touched_bits(replica.parameters if touches else (), len(layout.tensors))
        self._summary = Summary(loss_sum=1.0, weight=1.0, samples=1.0, touched=touched)

    def run(self) -> None:
        """Work until the harness ends this process."""
        while (work := self._exchange.agenda.next_work(self._done)) is not None:
            self._done = {work.key: set(work.shards)}
            self._carry_out(work)
            self._exchange.progress += 1

    def _carry_out(self, work: Work) -> None:
        if work.action == "initialise":
            self._exchange.send_initial(work)
            return
        assert self._exchange.want(work, work.version, exact=work.action != "train")
        self._exchange.wait_values(work)
        if work.action == "train":
            self._train(work)
        elif work.action == "evaluate":
            for shard in work.shards:
                self._exchange.pusher.statistics(work, TreeNode(shard, 1), np.zeros(0))
        elif work.action == "finalise":
            self._exchange.pusher.outcome(work, Outcome(metrics={}))
        else:
            self._exchange.pusher.outcome(work, Outcome(sha256=self._replica.sha256()))

    def _train(self, work: Work) -> None:
        for shard in work.shards:
            for bucket, gradients in self._gradients.items():
                self._exchange.pusher.gradients(work, bucket, TreeNode(shard, 1), list(gradients))
            self._exchange.pusher.summary(work, TreeNode(shard, 1), self._summary)
        self._exchange.want(work, work.version + 1)
        self._exchange.wait_values(work)


def main() -> None:
    link = ProcessLink.from_environment()
    spec = parse_spec(json.loads(link.start.spec_json))
    keep_freed_memory()
    settle_numerics(spec.workers.threads, "cpu")
    replica = Replica(build_model(load_task(spec, None)), spec.train.optimizer)
    layout = replica.layout
    ready = TrainerReady(
        layout_json=layout.to_json(), layout_sha256=layout.sha256, device="cpu", final_step=spec.train.max_steps or 0
    )
    link.report(ProcessReport(trainer_ready=ready))
    exchange = Exchange(link, spec, layout, replica.memory, TrainerCounters())
    exchange.start()
    try:
        Driver(exchange, replica, "--touch" in sys.argv).run()
    finally:
        exchange.close()


if __name__ == "__main__":
    main()
