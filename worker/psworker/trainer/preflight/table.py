"""The table of named checks, and the error that carries it."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import TypeVar

from pscluster.errors import PreflightError, PsError

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class CheckResult:
    """One line of the table. A check that does not apply is ok, with a detail that starts with "skipped".

    `warning`: it is ok, and its detail must be read all the same."""

    name: str
    ok: bool
    detail: str
    warning: bool = False


class Table:
    """Runs checks one after another, keeps each result, and raises at the end."""

    def __init__(self) -> None:
        self.checks: list[CheckResult] = []
        self._failures: list[tuple[str, PsError]] = []

    def run(
        self, name: str, check: Callable[[], tuple[T, str]], *, accepted: tuple[type[PsError], ...] = ()
    ) -> T | None:
        """The first of what `check` returns; its second is the detail. None when it raised a PsError, which is a
        warning where the user has `accepted` errors of that type."""
        try:
            value, detail = check()
        except accepted as error:
            self.warn(name, error.cause)
            return None
        except PsError as error:
            self.checks.append(CheckResult(name=name, ok=False, detail=error.cause))
            self._failures.append((name, error))
            return None
        self.checks.append(CheckResult(name=name, ok=True, detail=detail))
        return value

    def warn(self, name: str, detail: str) -> None:
        """Note what a person must read, though the job may run."""
        self.checks.append(CheckResult(name=name, ok=True, detail=detail, warning=True))

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
