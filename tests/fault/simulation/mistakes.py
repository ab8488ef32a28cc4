"""Mistakes to plant in the product, to see that the simulation finds them. Each gives the patches that make it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import Any
from unittest.mock import patch

from pscluster.step.tree import TreeNode
from pscluster.storage import Written, directory, snapshot
from psmaster.model.job import Job
from psmaster.model.membership import Node as ClusterNode
from psmaster.model.plan import RestorePoint
from psmaster.model.snapshot_catalog import Catalogue
from psmaster.scheduling import process_losses, rebalance, recovery
from psmaster.storage.persistence import Archive
from psserver.partition.checkpoint.saving import Frozen
from psserver.partition.checkpoint.snapshot_writer import SnapshotWriter
from psserver.partition.ingress.frame_handler import FrameHandler
from psserver.partition.process import PartitionService
from psserver.partition.step import voting
from psserver.partition.step.sums import Entry, Sums
from psserver.partition.step.voting import CommitDecision, CoordinatorState, Decide, Member, Vote
from psworker.trainer.exchange import Exchange
from psworker.trainer.values import Landing
from tests.harness.wrong_decisions import forgets_decisions, keeps_its_old_vote

Patch = AbstractContextManager[Any]


@dataclass(frozen=True)
class Mistake:
    """`plant` gives its patches; `changes` are made to the settings in which it is looked for."""

    plant: Callable[[], Iterable[Patch]]
    changes: Mapping[str, Any]


MISTAKES: dict[str, Mistake] = {}


def mistake(plant: Callable[[], Iterable[Patch]]) -> Callable[[], Iterable[Patch]]:
    MISTAKES[plant.__name__] = Mistake(plant, {})
    return plant


def mistake_in(**changes: Any) -> Callable[[Callable[[], Iterable[Patch]]], Callable[[], Iterable[Patch]]]:
    def enter(plant: Callable[[], Iterable[Patch]]) -> Callable[[], Iterable[Patch]]:
        MISTAKES[plant.__name__] = Mistake(plant, changes)
        return plant

    return enter


# the master


@mistake
def incomplete_snapshots_count() -> Iterable[Patch]:
    yield patch.object(Catalogue, "complete_steps", lambda self: tuple(sorted({step for step, _ in self.parts})))
    yield patch.object(Catalogue, "complete", lambda self, step: any(held == step for held, _ in self.parts))
    yield patch.object(Catalogue, "restore_point", _what_there_is)


def _what_there_is(snapshots: Catalogue, step: int) -> RestorePoint:
    return RestorePoint(step=step, parts=tuple(part for (held, _), part in snapshots.parts.items() if held == step))


@mistake_in(
    tier="snapshot",
    partitions=3,
    servers=3,
    storm_s=8.0,
    faults={"kill_partition": 1.0, "slow_host": 3.0, "slow_disk": 1.0},
)
def older_generations_count() -> Iterable[Patch]:
    yield patch.object(Job, "counts", lambda self, generation: self.plan is not None and generation >= 0)


@mistake_in(every_s=0.2, faults={"kill_while_writing": 1.0, "kill_master": 1.0})
def answers_before_it_is_durable() -> Iterable[Patch]:
    save = Archive.save

    def save_the_one_before(self: Any, writes: Any) -> None:
        late, self.late = getattr(self, "late", None), writes
        if late is not None:
            save(self, late)

    yield patch.object(Archive, "save", save_the_one_before)


@mistake
def a_shard_is_assigned_to_nobody() -> Iterable[Patch]:
    split = rebalance.split_shards

    def split_fewer(num_shards: int, *arguments: Any, **how: Any) -> dict[int, Any]:
        runs = split(num_shards, *arguments, **how)
        return {rank: () if len(runs) > 1 and rank == max(runs) else run for rank, run in runs.items()}

    yield patch.object(rebalance, "split_shards", split_fewer)


@mistake
def restarted_daemons_are_not_noticed() -> Iterable[Patch]:
    def loss_of(placement: Any, job: Any, view: Any) -> Any:
        same = {node_id: replace(node, incarnation=placement.incarnation) for node_id, node in view.nodes.items()}
        return process_losses.loss_of(placement, job, replace(view, nodes=same))

    yield patch.object(recovery, "loss_of", loss_of)


@mistake_in(every_s=1.0, storm_s=8.0, liveness_s=25.0, faults={"replace_node": 1.0})
def older_lives_displace_newer_ones() -> Iterable[Patch]:
    def register(nodes: Mapping[str, ClusterNode], node: ClusterNode, now: Any, _suspicion_s: float) -> Any:
        return {**nodes, node.node_id: replace(node, connected=True, seen_s=now.mono_s)}

    yield patch("psmaster.model.membership.register", register)
    yield patch("psmaster.model.membership.open_stream", lambda nodes, *_: nodes)


# votes and decisions


@mistake_in(partitions=3, servers=3, every_s=0.05, storm_s=4.0, faults={"cut_votes": 1.0})
def the_coordinator_forgets_its_last_decision() -> Iterable[Patch]:
    yield patch.object(voting, "receive_vote", forgets_decisions)


@mistake
def members_obey_any_decision() -> Iterable[Patch]:
    def obey(member: Member, decision: CommitDecision) -> tuple[Member, bool]:
        if member.vote is None:
            return member, False
        return replace(member, step=member.step + 1, vote=None, last_decision=decision), True

    yield patch.object(voting, "receive_decision", obey)


@mistake_in(
    workers=3, partitions=3, servers=3, every_s=0.3, storm_s=8.0, faults={"kill_trainer": 1.0, "kill_worker": 1.0}
)
def a_vote_keeps_its_generation() -> Iterable[Patch]:
    yield patch.object(voting, "member_adopts", keeps_its_old_vote)


@mistake
def the_coordinator_decides_without_the_last_vote() -> Iterable[Patch]:
    receive = voting.receive_vote

    def hurry(
        coordinator: CoordinatorState, vote: Vote, decide: Decide
    ) -> tuple[CoordinatorState, CommitDecision | None, bool]:
        knows_the_loss = vote.partition == 0 or 0 in coordinator.votes  # which comes with the coordinator's own vote
        fewer = replace(coordinator, num_partitions=max(1, coordinator.num_partitions - knows_the_loss))
        after, decision, to_all = receive(fewer, vote, decide)
        return replace(after, num_partitions=coordinator.num_partitions), decision, to_all

    yield patch.object(voting, "receive_vote", hurry)


# partitions


@mistake
def the_gate_takes_duplicates() -> Iterable[Patch]:
    offer = Sums.offer

    def add_again(self: Sums[Any], node: TreeNode, entry: Entry[Any]) -> bool:
        holder = next((held for held in self._entries if held.covers(node)), None)
        if holder is None:
            return offer(self, node, entry)
        held = self._entries[holder]
        held.value = self.add(held.value, entry.value, holder)
        return True

    yield patch.object(Sums, "offer", add_again)
    yield patch.object(Sums, "holds", lambda _self, _node: False)


@mistake
def gradients_of_any_step_are_taken() -> Iterable[Patch]:
    yield patch.object(FrameHandler, "_is_open", lambda _self, _header: True)


@mistake
def a_partition_goes_back_alone() -> Iterable[Patch]:
    adopt = PartitionService.adopt

    def stay(self: PartitionService, plan: Any) -> None:
        if self.plan is not None and plan.restore_generation != self.plan.restore_generation:
            plan.restore_generation = self.plan.restore_generation
        adopt(self, plan)

    yield patch.object(PartitionService, "adopt", stay)


@mistake
def parts_are_reported_before_they_are_written() -> Iterable[Patch]:
    write = SnapshotWriter.write

    def tell_first(self: Any, meta: Any, layout: Any, pieces: Any, done: Any, **how: Any) -> None:
        name = snapshot.part_name(meta.step, meta.partition, meta.generation)
        self._post(lambda: done(Written(name=name, size_bytes=1, checksum="crc32c:0"), None))
        write(self, meta, layout, pieces, lambda *_: None, **how)

    yield patch.object(SnapshotWriter, "write", tell_first)


@mistake_in(every_s=1.0, storm_s=8.0, faults={"power_loss": 1.0})
def parts_are_not_synced() -> Iterable[Patch]:
    def commit(self: Any, expected: Any = None) -> Written:  # noqa: ARG001 - the product's signature
        self._file.flush()
        self._file.close()
        directory.os.replace(self._temporary, self._path)
        return Written(name=self._path.name, size_bytes=self._size, checksum=f"crc32c:{self._total:08x}")

    yield patch.object(directory.Incoming, "commit", commit)


@mistake
def parts_that_count_are_deleted() -> Iterable[Patch]:
    retain = SnapshotWriter.retain
    yield patch.object(SnapshotWriter, "retain", lambda self, kept: retain(self, [*kept][-1:]))


@mistake_in(workers=2, compute_s=0.002, snapshot_every=1, every_s=0.3, storm_s=3.0, faults={"slow_disk": 1.0})
def snapshots_are_written_from_what_changes() -> Iterable[Patch]:
    yield patch.object(Frozen, "preserve", lambda _self, _bucket: None)


# trainers


@mistake_in(workers=2, compute_s=0.3, every_s=0.3, storm_s=8.0, faults={"kill_partition": 2.0, "kill_server": 1.0})
def values_of_an_older_restore_are_kept() -> Iterable[Patch]:
    yield patch.object(Landing, "restart", lambda _self: None)


@mistake_in(workers=2, compute_s=0.3, every_s=0.3, storm_s=8.0, faults={"kill_partition": 2.0, "kill_server": 1.0})
def versions_are_asked_for_across_restores() -> Iterable[Patch]:
    want = Exchange.want

    def want_anyway(self: Exchange, work: Any, version: int, exact: bool = False) -> bool:
        with self.agenda.changed:
            newer = replace(work, restore_generation=self.agenda.restore_generation)
            return want(self, newer, version, exact)

    yield patch.object(Exchange, "want", want_anyway)
