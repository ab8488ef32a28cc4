"""The preflight's table of named checks, which go on after a failure, and the check that a task leaves its model's
parameters alone.

Every shard of a step must start from the same committed values. They are also mapped read-only where trainer and
partition share memory: a write would end the process by a signal.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import TypeVar

import crc32c
import torch
from torch import nn

from pscluster.errors import LossContractError, PreflightError, PsError

_MOST_NAMED = 3
T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class CheckResult:
    """One line of the table. A check that does not apply is ok, with a detail that starts with "skipped"."""

    name: str
    ok: bool
    detail: str


class Table:
    """Runs checks one after another, keeps each result, and raises at the end."""

    def __init__(self) -> None:
        self.checks: list[CheckResult] = []
        self._failures: list[tuple[str, PsError]] = []

    def run(self, name: str, check: Callable[[], tuple[T, str]]) -> T | None:
        """The first of what `check` returns; its second is the detail. None when it raised a PsError."""
        try:
            value, detail = check()
        except PsError as error:
            self.checks.append(CheckResult(name=name, ok=False, detail=error.cause))
            self._failures.append((name, error))
            return None
        self.checks.append(CheckResult(name=name, ok=True, detail=detail))
        return value

    def skip(self, name: str, reason: str) -> None:
        """Note that a check could not be made."""
        self.checks.append(CheckResult(name=name, ok=True, detail=f"skipped: {reason}"))

    def raise_failures(self) -> None:
        """Raise the one failing check's own error, or PreflightError for several; `checks_of` reads the table back."""
        if not self._failures:
            return
        carried = json.dumps([asdict(check) for check in self.checks])
        if len(self._failures) == 1:
            error = self._failures[0][1]
            error.details["checks"] = carried
            raise error
        causes = "; ".join(f"{name}: {error.cause}" for name, error in self._failures)
        tracebacks = [error.details.get("traceback", "") for _, error in self._failures]
        raise PreflightError(
            f"{len(self._failures)} of {len(self.checks)} checks failed: {causes}",
            details={"checks": carried, "traceback": "\n".join(filter(None, tracebacks))},
        )


def checks_of(error: PsError) -> tuple[CheckResult, ...]:
    """The table that an error of the preflight carries; empty for any other error."""
    return tuple(CheckResult(**check) for check in json.loads(error.details.get("checks", "[]")))


# ---- writes to parameters ----


@dataclass(frozen=True, kw_only=True)
class Trace:
    """What a write to a parameter changes. Keeps the parameter alive, so that another cannot take its address.

    `version` also shows a write of the same bytes, as clamping within bounds is; `checksum` shows a write through
    `.data`, which torch does not count.
    """

    parameter: nn.Parameter
    address: int
    version: int
    checksum: int

    def is_of(self, other: Trace | None) -> bool:
        """Whether nothing was written between the two."""
        if other is None or other.parameter is not self.parameter:
            return False
        return (self.address, self.version, self.checksum) == (other.address, other.version, other.checksum)


def traces(model: nn.Module) -> dict[str, Trace]:
    """A trace of each parameter, frozen ones included. Left out are lazy ones, which have no values yet, and sparse
    ones, which no layout will have.

    Reads every parameter once, a CUDA model's through host memory, one tensor at a time.
    """
    return {
        name: Trace(
            parameter=parameter,
            address=parameter.data_ptr(),
            version=0 if parameter.is_inference() else parameter._version,
            checksum=_checksum(parameter),
        )
        for name, parameter in model.named_parameters()
        if not isinstance(parameter, nn.UninitializedParameter) and parameter.layout == torch.strided
    }


def check_unwritten(before: Mapping[str, Trace], after: Mapping[str, Trace]) -> str:
    """What was compared, in words. Raises LossContractError naming the parameters that were written to or replaced."""
    written = [name for name, trace in before.items() if not trace.is_of(after.get(name))]
    if written:
        named = ", ".join(written[:_MOST_NAMED]) + (", ..." if len(written) > _MOST_NAMED else "")
        raise LossContractError(
            f"forward or backward writes to the parameter{'s' if len(written) > 1 else ''} {named}",
            action="constrain weights in the task's loss by computing a new tensor, e.g. "
            "torch.nn.functional.normalize(weight), instead of writing to the parameter (as max_norm of nn.Embedding "
            "does)",
        )
    return f"{len(before)} unchanged by forward and backward"


def _checksum(parameter: nn.Parameter) -> int:
    content = parameter.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
    return crc32c.crc32c(content.numpy().data)
