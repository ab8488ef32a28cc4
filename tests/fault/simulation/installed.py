"""The clock, the dice, the memory and the disk of a history, where the product has its own.

They are put in place of what they stand in for in every module of partitions and trainers that uses it, wherever that
is: what moves between those modules needs no change here.
"""

from __future__ import annotations

import asyncio
import random
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest.mock import patch

import psmaster.control.loop
import psmaster.storage.persistence
import psserver.partition.process
import psserver.partition.step.sums
import psworker.trainer.loop  # noqa: F401 - with all that belongs to a trainer
from pscluster.agent.link import HeartbeatThread
from pscluster.step import layout
from pscluster.storage import directory, snapshot
from pscluster.wire.memory import Segment
from psserver.partition.checkpoint.snapshot_writer import SnapshotWriter
from tests.fault.simulation import dataplane, model
from tests.fault.simulation.disk import ImmediatePublisher

_HOMES = ("psserver.partition.", "psworker.trainer.", "pscluster.wire.dialer")


@contextmanager
def installed(sim: Any) -> Iterator[None]:
    """Have the product live in the world of `sim`."""
    stand_ins: list[tuple[object, object]] = [
        (time, dataplane.Clock(sim.schedule)),
        (random, dataplane.Dice(sim.schedule.random)),
        (HeartbeatThread, dataplane.HeartbeatThread),
        (Segment, dataplane.PrivateMemory),
        (SnapshotWriter, sim.disk.writer),
        (snapshot.write_part, sim.disk.write_part),
    ]
    silent = _Silent()
    with ExitStack() as stack:
        for name, module in list(sys.modules.items()):
            if name.startswith(_HOMES):
                _replace_in(stack, module, stand_ins)
        for module, name, value in (
            (layout, "BLOCK_WORDS", model.BLOCK_WORDS),
            (layout, "BUCKET_WORDS", model.BUCKET_WORDS),
            (psserver.partition.step.sums, "BLOCK_WORDS", model.BLOCK_WORDS),
            (directory, "os", sim.disk.syncs),
            (psmaster.storage.persistence, "Publisher", ImmediatePublisher),
            (psmaster.control.loop, "_log", silent),
            (psmaster.control.loop, "asyncio", _OneThread()),
            (psmaster.storage.persistence, "_log", silent),
        ):
            stack.enter_context(patch.object(module, name, value))
        yield


def _replace_in(stack: ExitStack, module: Any, stand_ins: list[tuple[object, object]]) -> None:
    for name, value in list(vars(module).items()):
        if name == "SLICE_S":  # updates take turns with frames after each bucket, not when a clock says so
            stack.enter_context(patch.object(module, name, 0.0))
        for real, stand_in in stand_ins:
            if value is real and getattr(value, "__module__", "") != module.__name__:
                stack.enter_context(patch.object(module, name, stand_in))


class _OneThread:
    """Stands in for `asyncio`, and for its running loop: what other threads would ask of it happens at once."""

    def __getattr__(self, name: str) -> Any:
        return getattr(asyncio, name)

    def get_running_loop(self) -> _OneThread:
        return self

    def call_soon_threadsafe(self, call: Callable[..., None], *arguments: Any) -> None:
        call(*arguments)


class _Silent:
    """Stands in for a logger."""

    def _nothing(self, *_args: Any, **_fields: Any) -> None:
        """Nobody reads it."""

    info = warning = error = debug = _nothing
