"""The master's `ControlLoop` without an event loop: a test says when it commits, and drives whatever waits."""

from __future__ import annotations

from collections.abc import Callable, Coroutine
from typing import Any

from pscluster.errors import PsError
from psmaster.control.loop import ControlLoop, Input
from psmaster.control.transaction import Transaction

_MAX_BATCH = 512


class Awaited:
    """Something that a coroutine waits for: an answer, or work on the disk. Stands in for asyncio's futures."""

    def __init__(self) -> None:
        self._is_done = False
        self._result: Any = None
        self._error: BaseException | None = None
        self._then: Callable[[], None] | None = None

    def done(self) -> bool:
        return self._is_done

    def set_result(self, result: Any) -> None:
        self._finish(result, None)

    def set_exception(self, error: BaseException) -> None:
        self._finish(None, error)

    def _finish(self, result: Any, error: BaseException | None) -> None:
        self._is_done, self._result, self._error = True, result, error
        if self._then is not None:
            self._then()

    def __await__(self) -> Any:
        if not self._is_done:
            yield self
        if self._error is not None:
            raise self._error
        return self._result

    def then(self, call: Callable[[], None]) -> None:
        self._then = call
        if self._is_done:
            call()


def drive(
    coroutine: Coroutine[Any, Any, Any], done: Callable[[Any], None], failed: Callable[[PsError], None] | None = None
) -> None:
    """Run a coroutine of the master until it ends, over whatever it waits for. Without `failed` it may not fail."""
    try:
        awaited = coroutine.send(None)
    except StopIteration as end:
        done(end.value)
    except PsError as error:
        if failed is None:
            raise
        failed(error)
    else:
        awaited.then(lambda: drive(coroutine, done, failed))


class DrivenLoop(ControlLoop):
    """Its disk work is done at once, and its callers are no tasks of a loop. A subclass may take its time."""

    def write(self, work: Callable[[], Any]) -> Awaited:
        """Have work done on the disk."""
        awaited = Awaited()
        awaited.set_result(work())
        return awaited

    def wake(self) -> None:
        """Called when an input waits to be committed."""

    async def on_disk(self, work: Callable[..., Any], *arguments: Any) -> Any:
        return await self.write(lambda: work(*arguments))

    async def ask(self, apply: Callable[[Transaction], Any]) -> Any:
        reply = Awaited()
        self._put(Input(apply=apply, reply=reply))  # type: ignore[arg-type]
        self.wake()
        return await reply

    def has_inputs(self) -> bool:
        return bool(self._inputs)

    def commit(self, done: Callable[[bool], None]) -> None:
        """Commit a transaction of what waits. `done` learns whether it is durable."""
        drive(self._commit([self._inputs.popleft() for _ in range(min(len(self._inputs), _MAX_BATCH))]), done)
