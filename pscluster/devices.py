"""The device of a trainer: the values of `workers.device`, and the choice among a node's devices. Pure.

Values of `workers.device`:

    auto     a free CUDA device of the node, else the CPU
    cpu      the CPU
    cuda     any free CUDA device of the node
    cuda:N   the node's N-th CUDA device, counted from 0
"""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence

from pscluster.errors import DeviceError

AUTO, CPU, CUDA = "auto", "cpu", "cuda"

_DEVICE = re.compile(r"auto|cpu|cuda(:(0|[1-9][0-9]{0,2}))?")


def is_valid_device(wanted: str) -> bool:
    """Whether `wanted` is a value of `workers.device`."""
    return _DEVICE.fullmatch(wanted) is not None


def device_priority(wanted: str) -> int:
    """Sort key of trainers that choose a device at the same time: the least specific request comes last."""
    return (CUDA, AUTO).index(wanted) + 1 if wanted in (CUDA, AUTO) else 0


def fitting(wanted: str, present: Sequence[str]) -> tuple[str, ...]:
    """Those of a node's CUDA devices that satisfy `wanted`, in their order."""
    if wanted in (AUTO, CUDA):
        return tuple(present)
    return tuple(device for device in present if device == wanted)


def choose_device(
    wanted: str, present: Sequence[str], held: Collection[str], leaving: Collection[str] = ()
) -> str | None:
    """The device of a node's next trainer: the first of its CUDA devices (`present`) that fits and is not in `held`, or
    "cpu". None: wait for one of `leaving`, whose holders are being ended. Raises DeviceError when none fits."""
    fit = fitting(wanted, present)
    free = [device for device in fit if device not in held and device not in leaving]
    if free:
        return free[0]
    if any(device in leaving for device in fit):
        return None
    if wanted in (AUTO, CPU):
        return CPU
    raise DeviceError(_why_none(wanted, present, fit))


def _why_none(wanted: str, present: Sequence[str], fit: Sequence[str]) -> str:
    if not present:
        return f"the job wants {wanted}, and this node has no CUDA device"
    if not fit:
        there = present[0] if len(present) == 1 else f"{present[0]}..{present[-1].partition(':')[2]}"
        return f"this node has no {wanted}: it has {there}"
    if len(fit) == 1:
        return f"the job wants {wanted}, and {fit[0]} is taken by another trainer"
    return f"all {len(fit)} CUDA devices of this node are taken by other trainers"
