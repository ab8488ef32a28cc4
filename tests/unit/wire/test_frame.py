"""Headers: what is packed is unpacked, and everything else is refused by name."""

from __future__ import annotations

import dataclasses

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pscluster.errors import FrameError, PsError, VersionSkewError
from pscluster.step.tree import TreeNode
from pscluster.wire.frame import (
    EXACT,
    HEADER_BYTES,
    IN_MEMORY,
    MAGIC,
    PROTOCOL,
    UNCHANGED,
    WITH_FROZEN,
    Codec,
    FrameKind,
    Header,
    checksum,
    in_lane,
    job_number,
    lane_of,
    pack,
    unpack,
)

U16, U32, U64 = st.integers(0, 2**16 - 1), st.integers(0, 2**32 - 1), st.integers(0, 2**64 - 1)
HEADERS = st.builds(
    Header,
    kind=st.sampled_from(FrameKind),
    job=U64,
    generation=U64,
    step=U64,
    bucket=U32,
    node=st.builds(TreeNode, U32, U32),
    flags=U16,
    sender=U16,
    codec=st.sampled_from(Codec),
    length=U64,
    checksum=U32,
)
HEADER = Header(kind=FrameKind.PUSH, job=7, generation=3, step=9, bucket=2, node=TreeNode(4, 4), length=64, checksum=1)


def forged(offset: int, value: bytes, header: Header = HEADER) -> bytes:
    """A header with a field overwritten and its own checksum made to fit again."""
    fields = bytearray(pack(header)[:-4])
    fields[offset : offset + len(value)] = value
    return bytes(fields) + checksum([fields]).to_bytes(4, "little")


@given(header=HEADERS)
def test_a_header_reads_back_as_it_was_written(header: Header) -> None:
    packed = pack(header)

    assert len(packed) == HEADER_BYTES == 64
    assert unpack(packed) == header
    assert unpack(memoryview(bytearray(packed))) == header


def test_the_wire_form_is_what_the_protocol_number_stands_for() -> None:
    """Another layout of the header, or of a body, needs another number."""
    assert PROTOCOL == 3
    assert pack(HEADER).hex() == (
        "505344500300040000000000070000000000000003000000000000000900000000000000"
        "020000000400000004000000400000000000000001000000d6b7cf3c"
    )


def test_every_flipped_bit_is_refused() -> None:
    packed = pack(HEADER)
    for bit in range(8 * HEADER_BYTES):
        torn = bytearray(packed)
        torn[bit // 8] ^= 1 << bit % 8
        with pytest.raises((FrameError, VersionSkewError)):
            unpack(torn)


@pytest.mark.parametrize(
    ("data", "error", "field"),
    [
        (b"GET / HT" + bytes(56), FrameError, "magic"),
        (MAGIC + (PROTOCOL + 1).to_bytes(2, "little") + bytes(58), VersionSkewError, "protocol"),
        (pack(HEADER)[:-1] + b"\0", FrameError, "header"),
        (forged(6, b"\0"), FrameError, "kind"),
        (forged(6, b"\x63"), FrameError, "kind"),
        (forged(7, b"\x09"), FrameError, "kind"),
    ],
    ids=["magic", "protocol", "checksum", "kind 0", "kind 99", "codec 9"],
)
def test_a_wrong_field_is_named(data: bytes, error: type[PsError], field: str) -> None:
    with pytest.raises(error) as refused:
        unpack(data)

    assert refused.value.details["field"] == field


def test_an_older_or_newer_peer_is_named_even_if_its_checksum_is_elsewhere() -> None:
    with pytest.raises(VersionSkewError, match=f"protocol {PROTOCOL + 1}, this process {PROTOCOL}"):
        unpack(forged(4, (PROTOCOL + 1).to_bytes(2, "little"))[:-4] + b"abcd")


@given(parts=st.lists(st.binary(max_size=50), max_size=5))
def test_a_checksum_is_over_the_concatenation(parts: list[bytes]) -> None:
    assert checksum(parts) == checksum([b"".join(parts)])


def test_the_checksum_is_crc32c() -> None:
    assert checksum([b"123456789"]) == 0xE3069283  # the check value of CRC-32C (RFC 3720, B.4)


def test_jobs_have_numbers_of_their_own() -> None:
    assert job_number("job-a") == job_number("job-a") < 2**64
    assert job_number("job-a") != job_number("job-b")


def test_a_header_is_immutable() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        HEADER.step = 1  # type: ignore[misc]


@given(lane=st.integers(0, 255))
def test_a_lane_travels_beside_the_flags(lane: int) -> None:
    header = unpack(pack(dataclasses.replace(HEADER, flags=in_lane(lane), length=0)))

    assert lane_of(header) == lane
    assert header.flags & IN_MEMORY and not header.flags & UNCHANGED


def test_flags_of_one_kind_of_frame_are_told_apart() -> None:
    for together in ((UNCHANGED, IN_MEMORY), (IN_MEMORY, EXACT), (WITH_FROZEN, EXACT)):
        assert sum(together) == together[0] | together[1]


def test_a_codec_is_found_by_the_name_that_a_spec_gives_it() -> None:
    assert [Codec.of(name) for name in ("fp32", "bf16")] == [Codec.FP32, Codec.BF16]
    assert [codec.value for codec in (Codec.FP32, Codec.BF16)] == [0, 1], "on the wire"
