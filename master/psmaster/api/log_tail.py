"""Reading a job's logs and metrics, and following them as they grow."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from pathlib import Path

from pscluster.v1 import agents_pb2, jobs_pb2
from psmaster.control.loop import ControlLoop
from psmaster.storage.logs import LogReader, whole_lines
from psmaster.storage.metrics_file import FILE_NAME, step_and_kind

_LINES_PER_MESSAGE = 500
_MIN_PAUSE_S = 0.2  # between two reads of growing files, however busy the cluster
_LINGER_S = 1.0  # after a job's end, for the last output of its processes


async def wait(news: asyncio.Event, seconds: float | None) -> None:
    """Until `news`, at most `seconds`."""
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(seconds):
            await news.wait()


async def logs(core: ControlLoop, job_id: str, request: jobs_pb2.ReadLogsRequest) -> AsyncIterator[jobs_pb2.LogRecord]:
    """A job's output, oldest first; with `follow`, on until the job has ended. Of `request`, not the job."""
    reader = LogReader(core.archive.logs_directory(job_id), request.kind, request.rank)
    first, lingered = True, False
    while True:
        news, job = core.news, core.state.jobs.get(job_id)
        entries = [entry for entry in await asyncio.to_thread(reader.read) if entry.time_s >= request.since_s]
        if first and request.tail:
            entries = entries[-request.tail :]
        first = False
        for entry in entries:
            line = agents_pb2.LogLine(time_s=entry.time_s, stream=entry.stream, text=entry.text)
            yield jobs_pb2.LogRecord(source=entry.source, line=line)
        if not request.follow or job is None or lingered:
            return
        if job.state.ended:
            lingered = True
            await asyncio.sleep(_LINGER_S)
            continue
        await asyncio.sleep(_MIN_PAUSE_S)
        await wait(news, None)


async def metrics(
    core: ControlLoop, job_id: str, request: jobs_pb2.ReadMetricsRequest
) -> AsyncIterator[jobs_pb2.MetricsLines]:
    """The lines of a job's metrics.jsonl above a step; with `follow`, on until the job has ended.

    A step after a rollback is sent again only if the file has a new line for it."""
    tail = MetricsTail(core.archive.directory(job_id) / FILE_NAME, request.from_step, request.position)
    while True:
        news, job = core.news, core.state.jobs.get(job_id)
        lines = await asyncio.to_thread(tail.read)
        for start in range(0, len(lines), _LINES_PER_MESSAGE):
            yield jobs_pb2.MetricsLines(lines=lines[start : start + _LINES_PER_MESSAGE])
        if not request.follow:
            yield jobs_pb2.MetricsLines(position=tail.position)
        if not request.follow or job is None or job.state.ended:
            return
        await asyncio.sleep(_MIN_PAUSE_S)
        await wait(news, None)


class MetricsTail:
    """Reads a growing metrics.jsonl; a file that was cut back and replaced is read on without repeating steps."""

    def __init__(self, path: Path, from_step: int, position: str = "") -> None:
        """`position`: where another one has ended; what is none is as if there were none."""
        self._path = path
        self._sent = {False: from_step, True: from_step}  # the last step sent, by whether it is an evaluation
        inode, _, offset = position.partition(":")
        known = inode.isdecimal() and offset.isdecimal()
        self._inode, self._offset = (int(inode), int(offset)) if known else (0, 0)

    @property
    def position(self) -> str:
        """Of the end of what was read."""
        return f"{self._inode}:{self._offset}"

    def read(self) -> list[str]:
        """The lines that were not read yet. Blocks on the disk."""
        fresh: list[str] = []
        try:
            inode = self._path.stat().st_ino
            lines, self._offset = whole_lines(self._path, self._offset if inode == self._inode else 0)
            self._inode = inode
        except FileNotFoundError:
            return []
        for line in map(bytes.decode, lines):
            step, evaluation = step_and_kind(line)
            if step > self._sent[evaluation]:
                self._sent[evaluation] = step
                fresh.append(line)
        return fresh
