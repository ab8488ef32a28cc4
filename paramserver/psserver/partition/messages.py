"""Votes and decisions as frame bodies."""

from __future__ import annotations

import json
import struct
from dataclasses import asdict

from pscluster.errors import FrameError
from pscluster.wire.frame import Header
from psserver.partition.step.commit import CommitDecision, Vote

_FINITE = struct.Struct("<B")
_SQUARE = struct.Struct("<Id")
_WEIGHT = struct.Struct("<d")
WEIGHT_BYTES = _WEIGHT.size


def vote_bytes(num_blocks: int) -> int:
    """Largest length of a packed vote over `num_blocks` blocks."""
    return _FINITE.size + _SQUARE.size * num_blocks


def pack_vote(vote: Vote) -> bytes:
    """The body; generation, step and partition travel in the header."""
    squares = b"".join(_SQUARE.pack(block, square) for block, square in vote.squares.items())
    return _FINITE.pack(vote.finite) + squares


def unpack_vote(header: Header, body: memoryview) -> Vote:
    """Raises FrameError when the length does not fit."""
    if len(body) < _FINITE.size or (len(body) - _FINITE.size) % _SQUARE.size:
        raise FrameError(f"a vote of {len(body)} bytes", details={"field": "length"})
    return Vote(
        generation=header.generation,
        step=header.step,
        partition=header.sender,
        finite=bool(_FINITE.unpack_from(body)[0]),
        squares=dict(_SQUARE.iter_unpack(body[_FINITE.size :])),
    )


def pack_decision(decision: CommitDecision) -> bytes:
    """JSON: Python writes floats so that they read back exactly."""
    return json.dumps(decision_json(decision)).encode()


def unpack_decision(body: memoryview) -> CommitDecision:
    """Raises FrameError for what `pack_decision` did not write."""
    try:
        decision = decision_of(json.loads(bytes(body)))
    except ValueError as error:
        raise FrameError(f"a decision does not parse: {error}", details={"field": "body"}) from None
    if decision is None:
        raise FrameError("a decision that is none", details={"field": "body"})
    return decision


def decision_json(decision: CommitDecision | None) -> dict[str, object] | None:
    """A decision as part of a JSON body."""
    return None if decision is None else asdict(decision)


def decision_of(told: object) -> CommitDecision | None:
    """What `decision_json` gave. Raises FrameError for anything else."""
    try:
        if told is not None and not isinstance(told, dict):
            raise TypeError("it is no mapping")
        return None if told is None else CommitDecision(**told)
    except TypeError as error:
        raise FrameError(f"a decision does not parse: {error}", details={"field": "body"}) from None


def pack_weight(weight: float) -> bytes:
    """The body of a PUSH that is UNCHANGED."""
    return _WEIGHT.pack(weight)


def unpack_weight(body: memoryview) -> float:
    """What `pack_weight` gave; the length was checked."""
    return float(_WEIGHT.unpack(body)[0])


def json_mapping(body: memoryview) -> dict[str, object]:
    """A frame's body as the JSON mapping it must be. Raises FrameError."""
    try:
        told = json.loads(bytes(body))
    except (ValueError, RecursionError) as error:
        raise FrameError(f"a body does not parse: {error}", details={"field": "body"}) from None
    if not isinstance(told, dict):
        raise FrameError("a body is no mapping", details={"field": "body"})
    return told
