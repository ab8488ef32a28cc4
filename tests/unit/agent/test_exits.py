"""An exit is told by its status, the kernel's counters and the last words."""

from __future__ import annotations

import re
import signal

import pytest

from pscluster.agent.status import Exit, classify
from pscluster.v1.agents_pb2 import ProcessStatus
from pscluster.v1.plan_pb2 import ErrorDetail, Failure


def status_of(returncode: int, **facts: object) -> ProcessStatus:
    seen = Exit(**{"returncode": returncode, "expected": False, **facts})  # type: ignore[arg-type]
    return classify("job-1/trainer-0/2", 77, seen)


def test_a_clean_exit_carries_no_error() -> None:
    status = status_of(0)
    assert (status.exit_code, status.signal, status.out_of_memory, status.pid) == (0, 0, False, 77)
    assert not status.HasField("error")


def test_an_exit_code_carries_the_last_words() -> None:
    status = status_of(3, stderr_tail=["first", "ValueError: no", "  "])
    assert status.exit_code == 3
    assert status.error.code == "PS-3005"
    assert status.error.cause == 'trainer-0 exited with code 3: "ValueError: no"'
    assert status.error.details["stderr"].startswith("first\n")


def test_a_signal_is_named() -> None:
    status = status_of(-signal.SIGSEGV)
    assert (status.exit_code, status.signal) == (0, signal.SIGSEGV)
    assert re.search("trainer-0 .*SIGSEGV", status.error.cause)
    assert "shared memory" in status.error.action  # a write to a parameter is the likeliest fault


def test_an_expected_end_is_no_error_whatever_ended_it() -> None:
    for returncode in (0, 1, -signal.SIGTERM, -signal.SIGKILL):
        status = status_of(returncode, expected=True, oom_kills=1)
        assert status.expected
        assert not status.HasField("error")
        assert not status.out_of_memory


def test_sigkill_is_out_of_memory_only_with_the_kernels_word() -> None:
    assert status_of(-signal.SIGKILL).error.code == "PS-3005"
    status = status_of(-signal.SIGKILL, oom_kills=1)
    assert status.out_of_memory
    assert status.error.code == "PS-3006"


@pytest.mark.parametrize(
    "words",
    [
        "MemoryError",
        "MemoryError: Unable to allocate 3 GiB",
        "RuntimeError: [enforce fail at alloc_cpu.cpp:117] DefaultCPUAllocator: can't allocate memory: you tried",
        "torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 20.00 MiB",
        "terminate called after throwing an instance of 'std::bad_alloc'",
        "OSError: [Errno 12] Cannot allocate memory",
    ],
)
def test_out_of_memory_is_read_from_the_last_words_or_the_failure(words: str) -> None:
    assert status_of(1, stderr_tail=["Traceback", words]).out_of_memory
    failure = Failure(error=ErrorDetail(code="PS-2001", cause="the task raised"), traceback=f"Trace\n{words}\n")
    assert status_of(1, failure=failure).error.code == "PS-3006"


def test_out_of_memory_is_read_from_the_failures_code() -> None:
    assert status_of(1, failure=Failure(error=ErrorDetail(code="PS-3006"))).out_of_memory


def test_a_clean_exit_that_mentions_memory_is_clean() -> None:
    assert not status_of(0, stderr_tail=["MemoryError"]).out_of_memory


def test_long_last_words_are_bounded() -> None:
    assert len(status_of(1, stderr_tail=["x" * 16_000] * 40).error.details["stderr"]) <= 4096
