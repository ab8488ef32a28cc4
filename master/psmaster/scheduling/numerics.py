"""Which numerics a job runs under: strict when everything agrees, mixed when it may not. Pure."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from psmaster.model.plan import Placement
from psmaster.model.process import PartitionFacts, TrainerFacts

Facts = TrainerFacts | PartitionFacts
Ready = Sequence[tuple[Placement, Facts]]
"""Placements whose process is ready, with what it reported."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Choice:
    """`left_out` maps nodes to why. `explanation` is for people: the mode and its consequence."""

    mode: str  # "strict" or "mixed"
    trainer_class: str
    partition_class: str
    left_out: tuple[tuple[str, str], ...]
    explanation: str


def choose(wanted: str, trainers: Ready, partitions: Ready, required: tuple[str, str] = ("", "")) -> Choice:
    """Decide for `wanted` ("strict", "mixed" or "auto"), given at least one process of each kind.

    Strict keeps the class that most nodes are in (the lowest hash among equals) and names the others left out.
    `required`: the classes (trainers', partitions') that a strict job already has bits of; they win over the majority.
    """
    trainer_class = required[0] or _majority(trainers)
    partition_class = required[1] or _majority(partitions)
    left_out = (*_others(trainers, trainer_class), *_others(partitions, partition_class))
    if wanted == "mixed" or (wanted == "auto" and left_out):
        return Choice(
            mode="mixed",
            trainer_class="",
            partition_class="",
            left_out=(),
            explanation=_explain_mixed(wanted, trainers, partitions),
        )
    return Choice(
        mode="strict",
        trainer_class=trainer_class,
        partition_class=partition_class,
        left_out=left_out,
        explanation=f"strict: same bits on any number of workers (class {short(trainer_class)})",
    )


def differs(mode: str, wanted_class: str, facts: Facts) -> str:
    """Why a node that joins later is left out; empty: it is welcome."""
    if mode != "strict" or facts.numerics_class == wanted_class:
        return ""
    detail = f" ({facts.numerics_detail})" if facts.numerics_detail else ""
    return f"numerics class {short(facts.numerics_class)}{detail} differs from the job's {short(wanted_class)}"


def short(numerics_class: str) -> str:
    return numerics_class[:8]


def _majority(ready: Ready) -> str:
    counts = Counter(facts.numerics_class for _, facts in ready)
    return min(counts, key=lambda name: (-counts[name], name))


def _others(ready: Ready, kept: str) -> tuple[tuple[str, str], ...]:
    return tuple(sorted({own.node_id: why for own, facts in ready if (why := differs("strict", kept, facts))}.items()))


def _explain_mixed(wanted: str, trainers: Ready, partitions: Ready) -> str:
    promise = "mixed: each sample counts exactly once, but bits depend on which node computes what"
    classes = {(own.node_id, short(facts.numerics_class)) for own, facts in (*trainers, *partitions)}
    if wanted == "mixed":
        return promise + " (asked for)"
    listed = ", ".join(f"{node_id} {name}" for node_id, name in sorted(classes))
    return f"{promise}; the nodes differ: {listed}"
