"""A trainer uses the device that its agent chose, if torch can, and another one only where the job left it open.

It keeps freed memory where the C library can; asking is harmless where it cannot, and when it was done before."""

from __future__ import annotations

import ctypes
import subprocess
import sys

import pytest
import torch

from pscluster.errors import DeviceError
from psworker.trainer.device import keep_freed_memory, usable_device


def have(monkeypatch: pytest.MonkeyPatch, count: int) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: count > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)


@pytest.mark.parametrize(
    ("chosen", "device"), [("", "cpu"), ("cpu", "cpu"), ("cuda:0", "cuda:0"), ("cuda:1", "cuda:1")]
)
def test_what_torch_sees_is_used(monkeypatch: pytest.MonkeyPatch, chosen: str, device: str) -> None:
    have(monkeypatch, 2)
    assert usable_device(chosen, "auto") == device


@pytest.mark.parametrize(
    ("count", "wanted", "sees"), [(0, "cuda", "sees no CUDA device"), (2, "cuda:2", "sees cuda:0, cuda:1")]
)
def test_what_was_asked_for_and_is_not_there_is_an_error(
    monkeypatch: pytest.MonkeyPatch, count: int, wanted: str, sees: str
) -> None:
    have(monkeypatch, count)
    with pytest.raises(DeviceError) as caught:
        usable_device("cuda:2", wanted)
    assert caught.value.code == "PS-4004"
    assert caught.value.cause.startswith("the agent counts cuda:2 here, but torch ")
    assert caught.value.cause.endswith(sees)


def test_where_the_job_leaves_it_open_the_cpu_takes_its_place(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    have(monkeypatch, 0)
    assert usable_device("cuda:0", "auto") == "cpu"
    assert capsys.readouterr().err.endswith("sees no CUDA device; computes on the CPU\n")


# ---- freed memory ----

CODE = """
import ctypes, resource
from psworker.trainer.device import keep_freed_memory

def faults(size_bytes):
    "Page faults of taking, touching and freeing that much, over and over, the first time not counted."
    libc = ctypes.CDLL(None)
    libc.malloc.restype = ctypes.c_void_p
    libc.malloc.argtypes, libc.free.argtypes = (ctypes.c_size_t,), (ctypes.c_void_p,)
    before = 0
    for turn in range(30):
        if turn == 1:
            before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        memory = libc.malloc(size_bytes)
        ctypes.memset(memory, 1, size_bytes)
        libc.free(memory)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

fresh = faults(4 << 20)
print([keep_freed_memory() for _ in range(3)], fresh, faults(4 << 20))
"""


def test_memory_that_was_freed_is_used_again_without_page_faults() -> None:
    """In a process of its own: what is set stays set."""
    ran = subprocess.run([sys.executable, "-c", CODE], capture_output=True, text=True, check=True)
    kept, _, numbers = ran.stdout.partition("]")
    answers = kept.strip("[").split(", ")
    fresh, reused = (int(number) for number in numbers.split())

    assert answers in (["True"] * 3, ["False"] * 3), "the same whenever it is asked"
    if answers[0] == "True":
        assert reused < fresh / 2, "by default each time begins with pages from the kernel, small or huge ones"


def test_a_c_library_without_the_call_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ctypes, "CDLL", lambda _: object())

    assert keep_freed_memory() is False


class Library:
    """A C library that takes thresholds up to a limit."""

    def __init__(self, limit_bytes: int) -> None:
        self.limit_bytes = limit_bytes
        self.asked: list[tuple[int, int]] = []

    def mallopt(self, parameter: int, value: int) -> int:
        self.asked.append((parameter, value))
        return int(parameter != -3 or value <= self.limit_bytes)


@pytest.mark.parametrize(("limit_mib", "kept"), [(1024, True), (32, True), (16, False)])
def test_an_older_c_library_is_asked_for_less(limit_mib: int, kept: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    library = Library(limit_mib << 20)
    monkeypatch.setattr(ctypes, "CDLL", lambda _: library)

    assert keep_freed_memory() is kept
    assert len(library.asked) == {1024: 3, 32: 4, 16: 2}[limit_mib]
