"""A job that computes no step beyond a limit which a test sets, so that it cannot end before the test is done with it.

`metered_spec` writes this file into the directory that is submitted. The job has the task and the bits of the spec that
it is made from.
"""

from __future__ import annotations

import importlib
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pscluster.task import Task
from psworker.trainer.loop import Trainer
from psworker.trainer.work import Work

BRAKE_STEPS = 24
_POLL_S = 0.02


class Metered(Task):
    """Constructs the task at `entrypoint` with `args`, and makes this process observe the file `limit`.

    The file holds a step number. A trainer waits before each microbatch of a later step, and slows down over the last
    `BRAKE_STEPS` steps, so that a process that is hit there computes rather than waits; its preflight, which tries
    microbatches of late steps, does not wait. Without the file nothing ever waits."""

    def __new__(cls, limit: str, entrypoint: str, args: dict[str, Any]) -> Any:
        Trainer._microbatch = _metered(Trainer._microbatch, Path(limit))  # type: ignore[method-assign]
        module, _, name = entrypoint.partition(":")
        return getattr(importlib.import_module(module), name)(**args)


def _metered(microbatch: Callable[..., Any], limit: Path) -> Callable[..., Any]:
    def limited(trainer: Trainer, work: Work, shard: int) -> Any:
        while (left := _steps_left(limit, work.version)) is not None:
            if left > 0:
                time.sleep(0.3 / left if left <= BRAKE_STEPS else 0)
                break
            time.sleep(_POLL_S)
        return microbatch(trainer, work, shard)

    return limited


def _steps_left(limit: Path, version: int) -> int | None:
    """How many steps may follow version `version`; None: any number."""
    try:
        return int(limit.read_text()) - version
    except FileNotFoundError:
        return None


def set_limit(limit: Path, step: int | None) -> None:
    """Let the job compute up to `step`; None: to its end. Trainers see the old value or the new one."""
    if step is None:
        limit.unlink(missing_ok=True)
        return
    written = limit.with_suffix(".new")
    written.write_text(str(step))
    os.replace(written, limit)


def metered_spec(spec: dict[str, Any], directory: Path) -> tuple[dict[str, Any], Path]:
    """`spec` with a limit, to be submitted from `directory`; and the limit's file, which does not exist yet."""
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "metered_task.py").write_text(Path(__file__).read_text())
    limit = directory.with_name(f"{directory.name}-limit")
    args = {"limit": str(limit), "entrypoint": spec["task"]["entrypoint"], "args": spec["task"].get("args", {})}
    return {**spec, "task": {"entrypoint": "metered_task:Metered", "args": args}}, limit
