"""Tasks of the agent's loop that nobody awaits."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any

import structlog

_log = structlog.get_logger(__name__)


def spawn(tasks: set[asyncio.Task[None]], work: Coroutine[Any, Any, None], failure: str) -> None:
    """Run `work` as one of `tasks`; if it raises, `failure` is logged with the traceback."""

    def finished(task: asyncio.Task[None]) -> None:
        tasks.discard(task)
        if not task.cancelled() and task.exception() is not None:
            _log.error(failure, exc_info=task.exception())

    task = asyncio.create_task(work)
    tasks.add(task)
    task.add_done_callback(finished)
