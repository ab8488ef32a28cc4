"""A trainer computes where its agent said, if torch can; on another device only where the job left it open."""

from __future__ import annotations

import pytest
import torch

from pscluster.errors import DeviceError
from psworker.trainer.device import usable_device


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
