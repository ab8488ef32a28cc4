"""Between device and host memory: on a stand-in for torch.cuda everywhere, on a CUDA device where there is one."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch

from pscluster.errors import InternalError
from psworker.staging import CudaStaging, HostStaging, staging_for

DEADLINE_S = 20.0


class FakeCuda:
    """torch.cuda as far as staging uses it: copies happen at once, events when the test lets them."""

    def __init__(self) -> None:
        self.waits: list[tuple[str, str]] = []
        self.pinned: list[tuple[int, int]] = []
        self.may_pass = threading.Event()
        self.failure: Exception | None = None
        self._names = iter(("out", "in"))

    def Stream(self, device: Any) -> FakeStream:  # noqa: ARG002, N802 - torch's name
        return FakeStream(next(self._names), self)

    def current_stream(self, device: Any) -> FakeStream:  # noqa: ARG002
        return FakeStream("computing", self)

    @contextmanager
    def stream(self, stream: FakeStream) -> Iterator[None]:  # noqa: ARG002
        yield

    def Event(self) -> FakeEvent:  # noqa: N802 - torch's name
        return FakeEvent(self)

    def cudart(self) -> FakeCuda:
        return self

    def cudaHostRegister(self, address: int, size: int, flags: int) -> int:  # noqa: ARG002, N802 - CUDA's name
        self.pinned.append((address, size))
        return 0


class FakeStream:
    def __init__(self, name: str, cuda: FakeCuda) -> None:
        self.name, self.cuda = name, cuda

    def wait_stream(self, other: FakeStream) -> None:
        self.cuda.waits.append((self.name, other.name))


class FakeEvent:
    def __init__(self, cuda: FakeCuda) -> None:
        self.cuda = cuda

    def record(self, stream: FakeStream) -> None:
        assert stream.name == "out"

    def synchronize(self) -> None:
        assert self.cuda.may_pass.wait(DEADLINE_S)
        if self.cuda.failure is not None:
            raise self.cuda.failure


def test_host_memory_is_copied_at_once_and_needs_no_bringing_in() -> None:
    staging, source, target, calls = HostStaging(), torch.ones(3), torch.zeros(3), []
    staging.copy_out(source, target)
    staging.after(lambda: calls.append(target.clone()), None)

    assert torch.equal(calls[0], source)
    assert staging_for("cpu").is_host


def test_what_was_taken_out_is_seen_off_in_order_when_it_is_there() -> None:
    cuda, seen, all_seen = FakeCuda(), [], threading.Event()
    staging = CudaStaging(torch.device("cuda:0"), cuda)
    target = torch.zeros(2)
    staging.copy_out(torch.ones(2), target)
    staging.after(lambda: seen.append(1), target)
    staging.after(lambda: (seen.append(2), all_seen.set()), target)
    assert seen == [], "the copy is under way"
    cuda.may_pass.set()

    assert all_seen.wait(DEADLINE_S) and seen == [1, 2]
    assert cuda.waits == [("out", "computing")], "the copy waits for what computes the gradient"
    staging.close()


def test_values_wait_for_their_readers_and_readers_for_values() -> None:
    cuda = FakeCuda()
    staging, target = CudaStaging(torch.device("cuda:0"), cuda), torch.zeros(2)
    staging.copy_in(torch.ones(2), target)
    staging.pin(target)
    staging.pin(torch.zeros(0))

    assert cuda.waits == [("in", "computing"), ("computing", "in")]
    assert target.tolist() == [1.0, 1.0]
    assert cuda.pinned == [(target.data_ptr(), target.nbytes)]
    staging.close()


def test_a_failed_copy_is_raised_on_the_computing_thread() -> None:
    cuda, called = FakeCuda(), []
    cuda.failure = RuntimeError("device gone")
    cuda.may_pass.set()
    staging = CudaStaging(torch.device("cuda:0"), cuda)
    staging.after(lambda: called.append(1), None)
    staging.close()

    with pytest.raises(InternalError, match="device gone"):
        staging.after(lambda: called.append(2), None)
    assert called == []


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_device_takes_and_gives_the_same_bits() -> None:
    staging, done = staging_for("cuda:0"), threading.Event()
    source = torch.randn(1 << 20)
    on_device, back = torch.zeros(1 << 20, device="cuda:0"), torch.zeros(1 << 20)
    staging.pin(back)
    staging.copy_in(source, on_device)
    staging.copy_out(on_device, back)
    staging.after(done.set, on_device)

    assert done.wait(DEADLINE_S) and torch.equal(back, source)
    staging.close()
