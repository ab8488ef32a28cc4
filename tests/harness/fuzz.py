"""A plain mutating fuzzer: seeds in, changed copies out, for a bounded time. Every outcome must be a value or a named
PsError, soon, in bounded memory. What is not is written to the corpus, which every later run begins with."""

from __future__ import annotations

import hashlib
import os
import random
import resource
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from pscluster.errors import PsError

CORPUS = Path(__file__).parents[1] / "fixtures" / "fuzz"
MAX_CASE_S = 5.0
MAX_GROWTH_BYTES = 512 << 20
MAX_BYTES = 64 << 10  # of a changed input: what comes in one write of a socket
Target = Callable[[bytes], object]
Repair = Callable[[bytes, random.Random], bytes]

_EDGES = [bytes(8), b"\xff" * 8, b"\xff" * 4, b"\x7f" + b"\xff" * 7, b"\x80" + bytes(7), b"\x01" + bytes(7)]
_WORDS = [
    b"{", b"}", b"[", b"]", b'"', b"\n", b": ", b"- ", b"null", b"true", b"-1", b"1e999", b"NaN", b".nan", b"-.inf",
    b"9" * 30, b"9" * 5000, b"0x" + b"f" * 40, b"1_0", b"2001-99-99", b"12:99:99", b"\\ud800", b"\xff\xfe",
    b"\xed\xa0\x80", b"\x00", b"..", b"/", b"../../x", b"&a [*a, *a]", b"&b {*b: *b}", b"!!binary x", b"!!set {}",
    b"!!python/object/apply:os.system [id]", b"!!timestamp 9", b"? [a]\n: b\n", b"<<: *a", b"%YAML 9.9\n---\n",
    b"[" * 2000, b"{a: " * 2000, b"[[a]]\n", b"a.b.c = 1\n", b"''' ", b"1979-05-27T07:32:00Z", b"23:61:00", b"inf",
    b"__class__", b"1:2:3", b"0b", b"!!int x", b"!!float y", b"\xef\xbb\xbf",
]  # fmt: skip


class Hung(BaseException):
    """A case took longer than MAX_CASE_S. Not an Exception: nothing under test may catch it."""


def changed(data: bytes, others: Sequence[bytes], chance: random.Random) -> bytes:
    """`data` with a few changes; parts of `others` may come into it."""
    found = bytearray(data)
    for _ in range(chance.choice((1, 1, 1, 2, 3, 6))):
        at = chance.randrange(len(found) + 1)
        size = min(chance.choice((1, 1, 2, 4, 8, 64, 512)), len(found) - at)
        match chance.randrange(8):
            case 0 if size:
                found[at] ^= 1 << chance.randrange(8)
            case 1 if size:
                found[at : at + size] = chance.randbytes(size)
            case 2:
                del found[at : at + size]
            case 3:
                found[at:at] = found[at : at + size] * chance.choice((1, 2, 40))
            case 4:
                found[at:at] = chance.choice(_WORDS)
            case 5:
                edge = chance.choice(_EDGES)
                found[at : at + len(edge)] = edge
            case 6:
                other = chance.choice(others)
                start = chance.randrange(len(other) + 1)
                found[at : at + size] = other[start : start + chance.choice((8, 64, 1024))]
            case _:
                del found[at:]
    return bytes(found[:MAX_BYTES])


def as_it_is(data: bytes, _chance: random.Random) -> bytes:
    return data


def fuzz(name: str, target: Target, seeds: Sequence[bytes], repair: Repair = as_it_is) -> int:
    """Run `target` on its corpus, on the seeds, and on changed ones for PS_FUZZ_SECONDS (20); how many cases that were.
    `repair` makes checksums fit again in half of them. PS_FUZZ_SEED repeats a run. Fails with the file of the input."""
    directory = CORPUS / name
    kept = [path.read_bytes() for path in sorted(directory.iterdir()) if path.is_file()] if directory.is_dir() else []
    seed = int(os.environ.get("PS_FUZZ_SEED") or random.randrange(1 << 32))
    chance, known = random.Random(seed), [*kept, *seeds]
    before, count = _peak_bytes(), 0
    for data in _cases(known, chance, repair):
        try:
            with _limited():
                target(data)
        except PsError:
            pass
        except BaseException as error:
            path = _keep(directory, data)
            raise AssertionError(f"{type(error).__name__} for {path} (PS_FUZZ_SEED={seed}): {error}") from error
        count += 1
        growth = _peak_bytes() - before
        assert growth < MAX_GROWTH_BYTES, f"{growth} bytes more after {_keep(directory, data)} (PS_FUZZ_SEED={seed})"
    return count


def _cases(known: Sequence[bytes], chance: random.Random, repair: Repair) -> Iterator[bytes]:
    yield from known
    end_s = time.monotonic() + float(os.environ.get("PS_FUZZ_SECONDS") or 20)
    while time.monotonic() < end_s:
        data = changed(chance.choice(known), known, chance)
        yield repair(data, chance) if chance.random() < 0.5 else data


@contextmanager
def _limited() -> Iterator[None]:
    def hang(_number: int, _frame: object) -> None:
        raise Hung(f"longer than {MAX_CASE_S} s")

    before = signal.signal(signal.SIGALRM, hang)
    signal.setitimer(signal.ITIMER_REAL, MAX_CASE_S)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def _keep(directory: Path, data: bytes) -> Path:
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / f"found-{hashlib.sha256(data).hexdigest()[:12]}"
    path.write_bytes(data)
    return path


def _peak_bytes() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
