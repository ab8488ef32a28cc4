"""How fast a node computes: a child process, which alone imports torch, measures one device and prints one line."""

from __future__ import annotations

import asyncio
import json
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from pscluster.agent.launch import AGENT_PID
from pscluster.agent.status import detail_of
from pscluster.errors import DeviceError, InternalError, PsError
from pscluster.v1.probe_pb2 import DeviceFigures

DEADLINE_S = 60.0
"""Of one device: a cold start of torch takes most of it."""
_STDERR_BYTES = 2000


@dataclass(frozen=True, kw_only=True)
class DeviceMeter:
    """`module` is what the child runs; empty on a node that does not compute. `devices`: its CUDA devices; a node
    without any computes on the CPU, with `threads` at once."""

    module: str
    devices: Sequence[str]
    threads: int
    environ: Mapping[str, str]

    async def measure(self) -> list[DeviceFigures]:
        """Each device in turn; one that cannot be measured has the error. Ends its child when it is cancelled. Raises
        DeviceError where nothing computes."""
        if not self.module:
            raise DeviceError("this node runs no trainers", action="probe the workers")
        return [await self._measure(device) for device in self.devices or ("cpu",)]

    async def _measure(self, device: str) -> DeviceFigures:
        try:
            figures = json.loads(await self._output(device))
            return DeviceFigures(device=device, **figures)
        except PsError as error:
            return DeviceFigures(device=device, error=detail_of(error))

    async def _output(self, device: str) -> bytes:
        """What the child prints. Raises DeviceError. The kernel ends it with this agent's thread."""
        command = (sys.executable, "-P", "-m", "pscluster.agent.launch", self.module, device, str(self.threads))
        child = await asyncio.create_subprocess_exec(
            *command,
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
            env={**self.environ, AGENT_PID: str(os.getpid())},
            start_new_session=True,
        )
        try:
            async with asyncio.timeout(DEADLINE_S):
                output, errors = await child.communicate()
        except TimeoutError:
            raise DeviceError(f"{device} was not measured within {DEADLINE_S:g} s") from None
        finally:
            if child.returncode is None:
                child.kill()
                await child.wait()
        if child.returncode:
            tail = errors[-_STDERR_BYTES:].decode(errors="replace").strip().splitlines() or ["no output"]
            raise DeviceError(f"cannot compute on {device}: {tail[-1]}")
        if not output:
            raise InternalError(f"the measurement of {device} printed nothing")
        return output
