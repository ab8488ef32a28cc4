"""Bodies of the frames between partitions: votes, decisions, and what a partition sends to its standby.

As in `protocol`, which lists all of them: every `unpack` raises FrameError for a body that `pack` does not produce."""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Literal, Self

from pscluster.errors import FrameError
from pscluster.wire.frame import MAX_SMALL_BYTES, Buffer, Header
from pscluster.wire.protocol import JsonBody, check_choice, mapping_of, metrics_of, refusal

DecisionKind = Literal["commit", "skip", "stop"]

# ---- votes and decisions ----

_FINITE = struct.Struct("<B")
_SQUARE = struct.Struct("<Id")


@dataclass(frozen=True, kw_only=True)
class Vote:
    """One partition's vote on the open step. `squares`: the sum of squares of each of its blocks of trained buckets,
    keyed by global block number; `finite`: every sum in them, and in its averaged buffers, is a finite number."""

    generation: int
    step: int
    partition: int
    squares: Mapping[int, float] = field(default_factory=dict)
    finite: bool = True

    @staticmethod
    def max_bytes(num_blocks: int) -> int:
        """Length of a packed vote on `num_blocks` blocks."""
        return _FINITE.size + _SQUARE.size * num_blocks

    def pack(self) -> bytes:
        squares = b"".join(_SQUARE.pack(block, square) for block, square in self.squares.items())
        return _FINITE.pack(self.finite) + squares

    @classmethod
    def unpack(cls, header: Header, body: Buffer) -> Vote:
        if len(body) < _FINITE.size or (len(body) - _FINITE.size) % _SQUARE.size:
            raise FrameError(f"a vote of {len(body)} bytes", details={"field": "length"})
        return cls(
            generation=header.generation,
            step=header.step,
            partition=header.sender,
            finite=bool(_FINITE.unpack_from(body)[0]),
            squares=dict(_SQUARE.iter_unpack(memoryview(body)[_FINITE.size :])),
        )


@dataclass(frozen=True, kw_only=True)
class CommitDecision(JsonBody):
    """What becomes of a step. `scale` multiplies the summed gradient; `norm` is the mean gradient's, before clipping.

    `snapshot`: the version it makes is to be written; `last`: training ends with it."""

    generation: int
    step: int
    kind: DecisionKind
    scale: float = 1.0
    norm: float = 0.0
    snapshot: bool = False
    last: bool = False

    @classmethod
    def from_json(cls, found: object) -> Self:
        decision = super().from_json(found)
        check_choice(DecisionKind, decision.kind, cls.__name__)
        return decision


@dataclass(frozen=True)
class Join:
    """From a partition: it holds the header's step, which `last` made. From the coordinator: it asks for the vote."""

    last: CommitDecision | None = None

    def pack(self) -> bytes:
        return self.last.pack() if self.last is not None else b""

    @classmethod
    def unpack(cls, body: Buffer) -> Join:
        return cls(CommitDecision.unpack(body) if len(body) else None)


# ---- a partition to its standby ----

_COUNT_BYTES = 24  # of JSON, at most, for each tensor


@dataclass(frozen=True)
class Evaluation:
    """Of version `step`; finalised."""

    step: int
    metrics: Mapping[str, float]


@dataclass(frozen=True, kw_only=True)
class Metadata:
    """What a standby must know beyond its state. `saved`: the newest version that was to be written. `evaluations`: the
    newest ones, in order."""

    saved: int
    evaluations: tuple[Evaluation, ...]

    def to_json(self) -> dict[str, object]:
        """As part of a JSON body."""
        return {"saved": self.saved, "evaluations": [[each.step, dict(each.metrics)] for each in self.evaluations]}

    @classmethod
    def from_json(cls, found: object) -> Metadata:
        """What `to_json` gave. Raises FrameError for anything else."""
        try:
            saved, listed = found["saved"], found["evaluations"]  # type: ignore[index]
            if type(saved) is not int or not isinstance(listed, list):
                raise TypeError("a field of another type")
            steps = [(int(step), metrics) for step, metrics in listed]
        except (KeyError, TypeError, ValueError) as error:
            raise refusal(cls.__name__, repr(error)) from None
        made = tuple(Evaluation(step, metrics_of(metrics, cls.__name__)) for step, metrics in steps)
        return cls(saved=saved, evaluations=made)

    def pack(self) -> bytes:
        return json.dumps(self.to_json()).encode()

    @classmethod
    def unpack(cls, body: Buffer) -> Metadata:
        return cls.from_json(mapping_of(body, cls.__name__))


@dataclass(frozen=True, kw_only=True)
class Sync:
    """A state follows, in PIECEs. `update_counts`: of each tensor of the layout; `decision`: the one that made it."""

    update_counts: list[int]
    decision: CommitDecision | None
    metadata: Metadata

    @staticmethod
    def max_bytes(num_tensors: int) -> int:
        """Above the length of every packed one."""
        return MAX_SMALL_BYTES + _COUNT_BYTES * num_tensors

    def pack(self) -> bytes:
        decision = asdict(self.decision) if self.decision is not None else None
        found = {"update_counts": self.update_counts, "decision": decision, "metadata": self.metadata.to_json()}
        return json.dumps(found).encode()

    @classmethod
    def unpack(cls, body: Buffer) -> Sync:
        found = mapping_of(body, cls.__name__)
        counts, decision = found.get("update_counts"), found.get("decision")
        if not isinstance(counts, list) or any(type(count) is not int for count in counts):
            raise refusal(cls.__name__, "its update_counts are no integers")
        return cls(
            update_counts=counts,
            decision=CommitDecision.from_json(decision) if decision is not None else None,
            metadata=Metadata.from_json(found.get("metadata")),
        )
