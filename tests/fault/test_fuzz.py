"""Input of strangers and of members that lie, but for data connections (test_fuzz_wire): every outcome is a value or a
named error, soon, in bounded memory."""

from __future__ import annotations

import base64
import binascii
import gzip
import io
import json
import os
import random
import shutil
import struct
import tarfile
import zlib
from pathlib import Path

import pytest

from harness.fuzz import changed, fuzz
from harness.jobs import lm_spec
from pscluster.errors import PsError
from pscluster.job.bundle import CAP_BYTES, extract, pack
from pscluster.job.spec import load_spec
from pscluster.security.authority import Authority
from pscluster.security.credentials import identity_in, new_request, parse_certificate
from pscluster.security.identity import Identity, Role
from pscluster.security.join_protocol import (
    JoinAnswer,
    JoinRequest,
    pack_answer,
    pack_request,
    unpack_answer,
    unpack_request,
)
from pscluster.security.join_token import JoinToken

pytestmark = pytest.mark.timeout(60 + 3 * float(os.environ.get("PS_FUZZ_SECONDS") or 20))

CLUSTER = "0123456789abcdef"


# ---- bundles ----


def with_gzip(data: bytes, chance: random.Random) -> bytes:
    """The archive changed below its compression."""
    try:
        inner = gzip.decompress(data)
    except (OSError, EOFError, ValueError, struct.error, zlib.error):
        return data
    found = bytearray(inner)
    for _ in range(chance.randrange(1, 4)):
        at = chance.randrange(len(found) or 1)
        found[at : at + 1] = chance.randbytes(1)
    for start in range(0, len(found) - 511, 512):  # tar's checksum of each header
        block = found[start : start + 512]
        if block[257:262] == b"ustar":
            total = sum(block[:148]) + 8 * 32 + sum(block[156:])
            found[start + 148 : start + 156] = b"%06o\0 " % total
    return gzip.compress(bytes(found), mtime=0)


def archive(*members: tuple[str, bytes, str]) -> bytes:
    """An archive of empty members: name, type, and where a link leads."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as made:
        for name, kind, target in members:
            info = tarfile.TarInfo(name)
            info.type, info.linkname = kind, target
            made.addfile(info, io.BytesIO(b"") if kind == tarfile.REGTYPE else None)
    return buffer.getvalue()


def test_a_bundle_is_extracted_whole_and_inside_or_refused(tmp_path: Path) -> None:
    (tmp_path / "source/part").mkdir(parents=True)
    (tmp_path / "source/task.py").write_text("print('hello')\n" * 20)
    (tmp_path / "source/part/data.bin").write_bytes(bytes(range(256)))
    place = tmp_path / "place"
    place.mkdir()
    packed, target = place / "bundle.tar.gz", place / "inside/code"

    def extracted(data: bytes) -> None:
        packed.write_bytes(data)
        try:
            extract(packed, target)
        finally:
            assert {path.name for path in place.iterdir()} <= {"bundle.tar.gz", "inside"}
            inside = [path for path in (place / "inside").rglob("*") if path != target]
            shutil.rmtree(place / "inside", ignore_errors=True)
        assert all(path.is_relative_to(target) for path in inside)

    hostile = [
        archive(("a", tarfile.SYMTYPE, "/etc"), ("a/b", tarfile.REGTYPE, "")),
        archive(("../a", tarfile.REGTYPE, "")),
        archive(("/a", tarfile.REGTYPE, "")),
        archive(("a", tarfile.LNKTYPE, "/etc/passwd")),
        archive(("a", tarfile.CHRTYPE, "")),
        archive(("a", tarfile.REGTYPE, ""), ("a", tarfile.REGTYPE, ""), ("a/b", tarfile.REGTYPE, "")),
        gzip.compress(bytes(CAP_BYTES + (64 << 20)), compresslevel=9),
    ]
    seeds = [pack(tmp_path / "source").data, *hostile]
    assert fuzz("bundles", extracted, seeds, with_gzip) > len(seeds)


# ---- specs ----


def specs() -> dict[str, list[bytes]]:
    plain = lm_spec(steps=2)
    examples = [path.read_bytes() for path in sorted((Path(__file__).parents[2] / "examples").rglob("*.yaml"))]
    toml = b'name = "a"\n[task]\nentrypoint = "task:Sine"\n[task.args]\nwidth = 64\n[train]\nglobal_batch = 32\n'
    toml += b'microbatch = 8\nepochs = 2\n[train.optimizer]\nname = "adamw"\nlr = 3.0e-3\n'
    return {".yaml": [*examples, json.dumps(plain).encode()], ".toml": [toml]}


@pytest.mark.parametrize("suffix", [".yaml", ".toml"])
def test_a_spec_is_read_or_refused(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"spec{suffix}"

    def read(data: bytes) -> None:
        path.write_bytes(data)
        load_spec(path, ["train.steps=5"]).canonical_json()

    seeds = specs()[suffix]
    assert fuzz(f"specs{suffix.replace('.', '-')}", read, seeds) > len(seeds)


# ---- joining ----

PREFIX = b"psj1-"
_PEM = (b"-----BEGIN CERTIFICATE-----\n", b"\n-----END CERTIFICATE-----\n")


def recoded(data: bytes, chance: random.Random) -> bytes:
    """Changed below the text encoding of a token or a certificate."""
    try:
        if data.startswith(PREFIX):
            inner = base64.urlsafe_b64decode(data.removeprefix(PREFIX) + b"==")
            return PREFIX + base64.urlsafe_b64encode(changed(inner, [inner], chance))
        inner = base64.b64decode(data.removeprefix(_PEM[0]).partition(b"-----")[0])
    except (binascii.Error, ValueError):
        return data
    return _PEM[0] + base64.encodebytes(changed(inner, [inner], chance)) + _PEM[1]


def test_what_a_member_shows_is_read_or_refused(tmp_path: Path) -> None:
    """Join tokens, identities, certificates, requests for them, and lines to the join endpoint."""
    authority = Authority.create(tmp_path / "certs", CLUSTER)
    identity = Identity(cluster_id=CLUSTER, role=Role.WORKER, name="worker-0")
    token = JoinToken(
        secret="s" * 32,
        authority_sha256=authority.sha256,
        cluster_id=CLUSTER,
        role=Role.WORKER,
        addresses=("10.0.0.1:7071",),
    )
    request = new_request("worker-0")[1]
    line = pack_request(JoinRequest(secret="s", name="worker-0", csr_pem=request.decode(), protocol=1))
    answer = pack_answer(JoinAnswer(authority_pem="a", certificate_pem="c"))
    seeds = [
        token.encode().encode(),
        identity.uri.encode(),
        authority.issue(identity, 60.0).certificate_pem,
        request,
        line,
        answer,
    ]

    def read(data: bytes) -> None:
        text = data.decode("utf-8", "replace")
        readers = (
            lambda: JoinToken.parse(text),
            lambda: Identity.parse(text),
            lambda: identity_in(parse_certificate(data)),
            lambda: authority.sign(data, identity, 60.0),
            lambda: unpack_request(data),
            lambda: unpack_answer(data, "10.0.0.1:7071"),
        )
        for reader in readers:
            try:
                reader()
            except PsError:
                continue

    assert fuzz("joining", read, seeds, recoded) > len(seeds)
