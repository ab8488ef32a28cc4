"""The data plane's frame: a fixed header, then `length` bytes of body.

    magic 4s | protocol u16 | kind u8 | codec u8 | flags u16 | sender u16 | job u64 | generation u64 | step u64
    | bucket u32 | node first u32 | node count u32 | length u64 | body checksum u32 | header checksum u32

Little-endian, 64 bytes. Checksums are CRC-32C (hardware-assisted). The header's own checksum is verified before any
field is used, and `length` against what the receiver expects before a byte is allocated."""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Iterable
from dataclasses import dataclass
from enum import IntEnum

import crc32c

from pscluster.errors import FrameError, VersionSkewError
from pscluster.step.tree import TreeNode

MAGIC = b"PSDP"
PROTOCOL = 3  # 3: HELLO names the cluster
SUMMARY = 0xFFFF_FFFF  # the bucket number of a step's summary: loss, weight, touched bits
MAX_SMALL_BYTES = 1 << 20  # of the kinds whose size the layout does not fix
_HEADER = struct.Struct("<4sHBBHHQQQIIIQI")
_CHECKSUM = struct.Struct("<I")
HEADER_BYTES = _HEADER.size + _CHECKSUM.size

Buffer = bytes | bytearray | memoryview


class FrameKind(IntEnum):
    HELLO = 1  # the first frame of the side that dials, with the job's token
    WELCOME = 2  # the answer, with what the partition holds
    INIT = 3  # a bucket's first values, from the trainer that made them
    PUSH = 4  # a node of the gradient tree
    ACK = 5  # the result of a push or other frame, and credit
    PULL = 6  # asks for every bucket at version `step` or newer
    VALUES = 7  # a bucket's values at version `step`
    DIRECTIVE = 8  # coordinator to trainers: what to do at version `step`
    VOTE = 9  # partition to coordinator
    DECISION = 10  # coordinator to partitions
    JOIN = 11  # partition to coordinator: it holds version `step`; coordinator to partition: it asks for the vote
    STATISTICS = 12  # a node of an evaluation's tree, to the coordinator
    MERGED = 13  # coordinator to the trainer of shard 0: an evaluation's root
    OUTCOME = 14  # trainer of shard 0 to coordinator: finalised metrics, or the digest
    FENCED = 15  # the receiver's generation is out of date; the header has the newer one
    SYNC = 16  # partition to standby: its state at version `step` follows, in PIECEs; body: what goes with it
    PIECE = 17  # words of a bucket of that state: its values, or the moment whose number is in the flags, from 1
    HELD = 18  # standby to partition: it can make version `step` of what it holds
    METADATA = 19  # partition to standby: what it must know beyond the state, when an evaluation was finalised
    AUDIT = 20  # trainer to coordinator: the digest of a leaf, its node; bucket: the sender's step.audit.AuditRole
    ARBITRATE = 21  # coordinator to a trainer: it asks for the digest of a leaf of the open step, the node


class Codec(IntEnum):
    """How the words of a trained bucket travel."""

    FP32 = 0
    BF16 = 1

    @classmethod
    def of(cls, name: str) -> Codec:
        return cls[name.upper()]


class AckResult(IntEnum):
    """In the flags of an ACK."""

    APPLIED = 0
    DUPLICATE = 1
    STALE = 2


UNCHANGED = 1  # flag of a PUSH of an averaged bucket: the body is the node's weight (float64), the buffers did not move
IN_MEMORY = 2  # flag of a PUSH or VALUES without a body: it lies in the memory that both sides share. Such VALUES are
# of as many buckets, from `bucket` on, as their node has leaves
_LANE_SHIFT = 8  # above the flags of a PUSH that is IN_MEMORY: which lane it lies in
NO_NODE = TreeNode(0, 0)  # of the kinds that carry none
WITH_FROZEN = 1  # flag of a PULL: send the buckets that never change, too
EXACT = 4  # flag of a PULL, and of the VALUES it brings: fp32 whatever the codec


@dataclass(frozen=True, kw_only=True)
class Header:
    """Everything of a frame but its body. `sender`: rank or partition index. `job`: `job_number` of the job's id."""

    kind: FrameKind
    job: int
    generation: int = 0
    step: int = 0
    bucket: int = 0
    node: TreeNode = NO_NODE
    flags: int = 0
    sender: int = 0
    codec: Codec = Codec.FP32
    length: int = 0
    checksum: int = 0


def in_lane(lane: int) -> int:
    """The flags of a PUSH that lies in this lane."""
    return IN_MEMORY | lane << _LANE_SHIFT


def lane_of(header: Header) -> int:
    """The lane of a PUSH that is IN_MEMORY."""
    return header.flags >> _LANE_SHIFT


def job_number(job_id: str) -> int:
    """64 bits of the job's id, by which frames of another job are told apart."""
    return int.from_bytes(hashlib.blake2b(job_id.encode(), digest_size=8).digest(), "little")


def checksum(buffers: Iterable[Buffer], value: int = 0) -> int:
    """CRC-32C over the concatenation of the buffers; `value`: of what comes before them."""
    for buffer in buffers:
        value = crc32c.crc32c(buffer, value)
    return value


def pack(header: Header) -> bytes:
    """The header's wire form. `length` and `checksum` must describe the body that follows."""
    kind = (header.kind, header.codec, header.flags, header.sender)
    place = (header.job, header.generation, header.step, header.bucket, *header.node)
    fields = _HEADER.pack(MAGIC, PROTOCOL, *kind, *place, header.length, header.checksum)
    return fields + _CHECKSUM.pack(crc32c.crc32c(fields))


def unpack(data: Buffer) -> Header:
    """The header in `data` (HEADER_BYTES long). Raises FrameError or VersionSkewError; uses nothing before the
    checksum fits, except the magic and the protocol number, so that an older peer is not called corrupt."""
    view = memoryview(data)
    magic, protocol, kind, codec, flags, sender, job, generation, step, bucket, first, count, length, body = (
        _HEADER.unpack_from(view)
    )
    if magic != MAGIC:
        raise FrameError("a frame does not start with the magic number", details={"field": "magic"})
    if protocol != PROTOCOL:
        raise VersionSkewError(
            f"the peer uses data-plane protocol {protocol}, this process {PROTOCOL}", details={"field": "protocol"}
        )
    if _CHECKSUM.unpack_from(view, _HEADER.size)[0] != crc32c.crc32c(view[: _HEADER.size]):
        raise FrameError("a frame's header does not fit its checksum", details={"field": "header"})
    try:
        return Header(
            kind=FrameKind(kind), codec=Codec(codec), flags=flags, sender=sender, job=job, generation=generation,
            step=step, bucket=bucket, node=TreeNode(first, count), length=length, checksum=body,
        )  # fmt: skip
    except ValueError as error:
        raise FrameError(f"a frame has an unknown kind or codec: {error}", details={"field": "kind"}) from None
