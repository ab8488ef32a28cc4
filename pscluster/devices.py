"""Where a trainer computes: the words for it, and its agent's choice. Pure.

What `workers.device` may say:

    auto     a CUDA device of the node while one is free, else the CPU
    cpu      the CPU
    cuda     a CUDA device of the node, whichever is free
    cuda:N   the node's N-th CUDA device, counted from 0
"""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence

from pscluster.errors import DeviceError

AUTO, CPU, CUDA = "auto", "cpu", "cuda"

_LAWFUL = re.compile(r"auto|cpu|cuda(:(0|[1-9][0-9]{0,2}))?")


def is_valid_device(wanted: str) -> bool:
    """Whether `wanted` is a word for a device."""
    return _LAWFUL.fullmatch(wanted) is not None


def device_priority(wanted: str) -> int:
    """Sorts those who are to choose at the same time: whoever would take anything comes last."""
    return (CUDA, AUTO).index(wanted) + 1 if wanted in (CUDA, AUTO) else 0


def fitting(wanted: str, present: Sequence[str]) -> tuple[str, ...]:
    """Those of a node's CUDA devices that would do, in their order."""
    if wanted in (AUTO, CUDA):
        return tuple(present)
    return tuple(device for device in present if device == wanted)


def choose_device(
    wanted: str, present: Sequence[str], held: Collection[str], leaving: Collection[str] = ()
) -> str | None:
    """The device of a node's next trainer: the first of its CUDA devices (`present`) that fits and that none of the
    others has, or "cpu". None: wait for one of `leaving`, whose holders are being ended; `held` are the others'.

    Raises DeviceError when no device of the node will do.
    """
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
        return f"the job wants {wanted}, and there is no CUDA device here"
    if not fit:
        there = present[0] if len(present) == 1 else f"{present[0]}..{present[-1].partition(':')[2]}"
        return f"{wanted} does not exist here: this node has {there}"
    if len(fit) == 1:
        return f"the job wants {wanted}, and {fit[0]} is taken by another trainer"
    return f"all {len(fit)} CUDA devices here are taken by other trainers"
