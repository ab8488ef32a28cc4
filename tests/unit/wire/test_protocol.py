"""Bodies of frames: what is packed reads back, and everything else is refused by name."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest

from pscluster.errors import AuthError, FrameError
from pscluster.wire.frame import FrameKind, Header
from pscluster.wire.partition_protocol import CommitDecision, Evaluation, Join, Metadata, Sync
from pscluster.wire.protocol import (
    Ack,
    Directive,
    Hello,
    LeafDigest,
    Outcome,
    StandbyWelcome,
    Welcome,
    pack_statistics,
    pack_weight,
    unpack_statistics,
    unpack_weight,
)

HELLO = Hello(token="00ff", role="trainer", channel="push", attempt=3, restore_generation=2, share=True, num_lanes=4)
DECISION = CommitDecision(generation=2, step=7, kind="commit", scale=0.1, norm=1 / 3, snapshot=True)
METADATA = Metadata(saved=4, evaluations=(Evaluation(2, {"loss": 0.1}), Evaluation(4, {})))
BODIES: list[Any] = [
    HELLO,
    Welcome(granted_bytes=1 << 40, open_bucket=-1, needs_values=True, num_lanes=0),
    StandbyWelcome(reach=-1, applied=3),
    Ack(FrameKind.PUSH, 1 << 40, 3),
    Ack(None, 0, -1),
    DECISION,
    Join(DECISION),
    Join(),
    Outcome(metrics={"loss": 0.1, "accuracy": 1.0}),
    Outcome(sha256="ab"),
    LeafDigest(loss_sum=0.1, weight=2.0, tensors={0: 0xFFFF_FFFF, 7: 0}),
    LeafDigest(loss_sum=-0.0, weight=0.0, tensors={}),
    METADATA,
    Sync(update_counts=[3, 0, 2], decision=DECISION, metadata=METADATA),
    Sync(update_counts=[], decision=None, metadata=METADATA),
]


@pytest.mark.parametrize("body", BODIES, ids=lambda body: type(body).__name__)
def test_what_is_packed_reads_back(body: Any) -> None:
    assert type(body).unpack(memoryview(body.pack())) == body


def test_a_directive_and_vectors_read_back() -> None:
    header = Header(kind=FrameKind.DIRECTIVE, job=1, generation=3, step=8)
    directive = Directive(3, 8, "evaluate")
    assert Directive.unpack(header, directive.pack()) == directive
    assert unpack_weight(pack_weight(1 / 3)) == 1 / 3
    assert unpack_statistics(pack_statistics(np.array([1 / 3, -2.0]))).tolist() == [1 / 3, -2.0]


def changed(body: Any, **fields: object) -> bytes:
    """The packed body with other fields; None takes one away."""
    found = json.loads(body.pack()) | fields
    return json.dumps({name: value for name, value in found.items() if value is not None}).encode()


REFUSED: dict[str, tuple[Any, bytes]] = {
    "a HELLO of no channel": (Hello, changed(HELLO, channel="shell")),
    "a HELLO without a generation": (Hello, changed(HELLO, restore_generation=None)),
    "a HELLO whose attempt is text": (Hello, changed(HELLO, attempt="1")),
    "a HELLO that shares a number": (Hello, changed(HELLO, share=1)),
    "a HELLO with more": (Hello, changed(HELLO, more=1)),
    "a WELCOME without credit": (Welcome, b'{"open_bucket": 1, "needs_values": false, "num_lanes": 0}'),
    "a standby that holds true": (StandbyWelcome, b'{"reach": true, "applied": 0}'),
    "an ACK of no kind": (Ack, b"\xff" + bytes(12)),
    "a short ACK": (Ack, bytes(12)),
    "a decision of no kind": (CommitDecision, changed(DECISION, kind="maybe")),
    "a decision without a step": (CommitDecision, changed(DECISION, step=None)),
    "a scale that is text": (CommitDecision, changed(DECISION, scale="1")),
    "a JOIN with half a decision": (Join, b'{"generation": 1}'),
    "a short digest of a leaf": (LeafDigest, bytes(15)),
    "half a tensor's digest": (LeafDigest, bytes(16 + 4)),
    "an outcome of nothing": (Outcome, b"{}"),
    "a digest that is a number": (Outcome, b'{"sha256": 1}'),
    "metrics that are a list": (Outcome, b'{"metrics": []}'),
    "a metric that is text": (Outcome, b'{"metrics": {"loss": "low"}}'),
    "metadata of half an evaluation": (Metadata, b'{"saved": 1, "evaluations": [[1]]}'),
    "metadata without a version": (Metadata, b'{"evaluations": []}'),
    "a state without counts": (Sync, changed(BODIES[-1], update_counts=None)),
    "a state whose counts are text": (Sync, changed(BODIES[-1], update_counts=["1"])),
    "a state without metadata": (Sync, changed(BODIES[-1], metadata=None)),
    "a state of half a decision": (Sync, changed(BODIES[-1], decision={"step": 1})),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_was_not_packed_is_refused(name: str) -> None:
    kind, body = REFUSED[name]
    with pytest.raises(FrameError):
        kind.unpack(memoryview(body))


@pytest.mark.parametrize("kind", [Hello, Welcome, StandbyWelcome, CommitDecision, Outcome, Metadata, Sync])
@pytest.mark.parametrize("body", [b"", b"\xff", b"{", b"[]", b"1", b"[" * 4000], ids=range(6))
def test_a_body_that_is_no_mapping_is_refused(kind: Any, body: bytes) -> None:
    with pytest.raises(FrameError):
        kind.unpack(memoryview(body))


@pytest.mark.parametrize("action", [None, "rest", 1])
def test_a_directive_of_no_action_is_refused(action: object) -> None:
    with pytest.raises(FrameError):
        Directive.unpack(Header(kind=FrameKind.DIRECTIVE, job=1), json.dumps({"action": action}).encode())


@pytest.mark.parametrize("token", [None, 1, [1], {}])
def test_a_hello_without_a_token_is_not_read_further(token: object) -> None:
    with pytest.raises(AuthError):
        Hello.unpack(changed(HELLO, token=token, attempt="x"))
