"""The whole state of the master as one value, and views of it. Pure."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice

from pscluster.devices import AUTO, CPU, CUDA
from pscluster.errors import NotFoundError
from psmaster.model import membership
from psmaster.model.access import AccessRecords
from psmaster.model.job import Event, Instant, Job, JobState
from psmaster.model.membership import Health, Node, Nodes, NodeView, Role
from psmaster.model.plan import ProcessKind
from psmaster.model.process import Processes
from psmaster.model.reports import MetricLine
from psmaster.model.snapshot_catalog import Catalogue

MAX_NAMESAKES = 8  # that an error lists
NODE_WAIT_S = 30 * 24 * 3600.0  # how long an absent node may keep parts of a deleted job
STORE_WAIT_S = 365 * 24 * 3600.0  # the same for a store
MAX_DELETED_SENT = 1000  # in an assignment, which must stay small


@dataclass(frozen=True, kw_only=True, slots=True)
class Deletion:
    """One deleted job. `store`: where its snapshots were. `deleted_s`: Unix time. `removed`: nothing is left there."""

    job_id: str
    store: str
    deleted_s: float
    removed: bool = False


Deletions = Mapping[str, Deletion]
"""By job, the newest last."""


def prune_deletions(deletions: Deletions, now_s: float) -> Deletions:
    """Drop the deletions that are complete or past their wait."""
    kept = {
        job_id: one
        for job_id, one in deletions.items()
        if now_s - one.deleted_s <= (NODE_WAIT_S if one.removed else STORE_WAIT_S)
    }
    return deletions if len(kept) == len(deletions) else kept


def newest_deleted(deletions: Deletions) -> tuple[str, ...]:
    """The job ids that assignments name, the newest first."""
    return tuple(islice(reversed(list(deletions)), MAX_DELETED_SENT))


@dataclass(frozen=True, kw_only=True)
class State:
    """All that the master knows. `nodes` and `processes` live in memory; the rest is stored."""

    jobs: Mapping[str, Job] = field(default_factory=dict)
    catalogues: Mapping[str, Catalogue] = field(default_factory=dict)
    events: Mapping[str, tuple[Event, ...]] = field(default_factory=dict)
    nodes: Nodes = field(default_factory=dict)
    processes: Processes = field(default_factory=dict)
    drains: Mapping[str, float] = field(default_factory=dict)  # on request, with the Unix time of that
    deletions: Deletions = field(default_factory=dict)  # of which a store or a node may still have something
    access: AccessRecords = field(default_factory=AccessRecords)


@dataclass(frozen=True, kw_only=True)
class Changes:
    """The outcome of a transaction: the next state, and what must be durable before it takes effect."""

    state: State
    events: tuple[tuple[str, Event], ...]
    lines: tuple[tuple[str, MetricLine], ...]
    cuts: Mapping[str, int]  # by job: the step after which its metrics are void


def node_views(
    jobs: Mapping[str, Job],
    nodes: Nodes,
    job_id: str,
    now: Instant,
    suspicion_s: float,
    drains: Container[str] = frozenset(),
) -> Mapping[str, NodeView]:
    """The nodes as the planning of one job sees them: what other jobs hold is taken. `drains`: those to be emptied.

    A worker where another job's trainer waits to start that needs a CUDA device has no slot free: an agent gives its
    devices to those who start, and might give that one away."""
    taken: dict[tuple[Role, str], list[str]] = defaultdict(list)
    full: set[str] = set()
    for job in jobs.values():
        for placement in job.placements if job.job_id != job_id else ():
            if placement.placed:
                wanted = job.spec.workers.device if placement.kind is ProcessKind.TRAINER else CPU
                taken[Role.of(placement.kind), placement.node_id].append(placement.device or wanted)
                if placement.held_back and wanted not in (AUTO, CPU):
                    full.add(placement.node_id)
    views = {
        node.node_id: _view(
            node, now, suspicion_s, taken[node.role, node.node_id], node.leaving or node.node_id in drains
        )
        for node in nodes.values()
    }
    return views | {node_id: replace(views[node_id], available=0) for node_id in full & views.keys()}


def _view(node: Node, now: Instant, suspicion_s: float, taken: Sequence[str], draining: bool) -> NodeView:
    """`taken`: for each slot that others hold, where it computes, or what was wanted of a process that is starting."""
    health = membership.health(node, now.mono_s, suspicion_s)
    return NodeView(
        node_id=node.node_id,
        role=node.role,
        incarnation=node.incarnation,
        alive=health is not Health.DEAD,
        ready=health is Health.READY and not draining,
        draining=draining,
        slots=node.slots,
        available=node.slots - len(taken),
        devices=node.devices,
        held=frozenset(taken) & frozenset(node.devices),
        undecided=sum(1 for device in taken if device in (AUTO, CUDA)),
    )


def queue_key(job: Job) -> tuple[int, float, str]:
    return -job.spec.priority, job.created_s, job.job_id


def queue(all_jobs: Mapping[str, Job]) -> list[Job]:
    """The queued jobs in order."""
    return sorted((job for job in all_jobs.values() if job.state is JobState.QUEUED), key=queue_key)


def find(all_jobs: Mapping[str, Job], name: str, now: Instant) -> Job:
    """The job of that id, or of a name that only one job has. Raises NotFoundError; for an ambiguous name it
    lists the candidates."""
    if name in all_jobs:
        return all_jobs[name]
    named = [job for job in all_jobs.values() if job.name == name]
    if len(named) == 1:
        return named[0]
    if named:
        raise NotFoundError(f"{len(named)} jobs are called {name!r}", action=_list_namesakes(named, now))
    raise NotFoundError(f"there is no job {name!r}")


def _list_namesakes(named: Sequence[Job], now: Instant) -> str:
    newest_first = sorted(named, key=lambda job: (-job.created_s, job.job_id))
    shown = [
        f"{job.job_id} ({job.state.name}, submitted {_age(now.unix_s - job.created_s)} ago)"
        for job in newest_first[:MAX_NAMESAKES]
    ]
    older = f", and {len(named) - len(shown)} older ones" if len(named) > len(shown) else ""
    return f"give one of their ids: {', '.join(shown)}{older}"


def _age(seconds: float) -> str:
    for size, unit in ((86400, "d"), (3600, "h"), (60, "m")):
        if seconds >= size:
            return f"{seconds // size:.0f}{unit}"
    return f"{max(0.0, seconds):.0f}s"
