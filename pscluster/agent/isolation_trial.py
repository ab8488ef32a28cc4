"""Chooses at an agent's start how its key is kept from user code: the first way that holds and works here, tried with a
process that starts as trainers do."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import structlog

from pscluster.agent.confine import Mode, protect_memory
from pscluster.agent.directories import AgentDirectories
from pscluster.agent.isolation import AUTO, IDENTITY, Isolation, account_of, hidden_paths, ways
from pscluster.agent.launch import AGENT_PID
from pscluster.errors import StateError

if TYPE_CHECKING:
    from pscluster.agent.daemon import AgentSettings

_PROBE = "pscluster.agent.isolation_probe"
_PROBE_S = 60.0
_NEEDED = {"CHOWN": 0, "DAC_OVERRIDE": 1, "KILL": 5, "SETGID": 6, "SETUID": 7}  # capabilities of linux/capability.h

_log = structlog.get_logger(__name__)


@dataclass(frozen=True, kw_only=True)
class Trial:
    """How a process with user code is started: `launch` is the command up to its module, one of `modules`, which it
    must be able to load."""

    launch: Sequence[str]
    modules: Sequence[str]
    environ: Mapping[str, str]
    directories: AgentDirectories

    def failure(self, isolation: Isolation) -> str:
        """Why this way does not hold or does not work here; empty: it does both. Starts a process, and blocks until it
        has ended."""
        if isolation.mode is Mode.UID and isolation.account is None:
            return "only root can start trainers as another user, which must exist"
        if isolation.mode is Mode.UID and (missing := _missing_capabilities()):
            return f"this root lacks the capabilities {', '.join(missing)}"
        own = self.directories
        question = {
            "agent": os.getpid(),
            "hidden": isolation.hidden,
            "fixed": [str(own.state_dir)] if isolation.mode is Mode.UID else [],
            "usable": [str(own.cache)],
            "passable": [str(path) for path in (own.jobs, own.scratch, own.runtime)],
            "modules": list(self.modules),
        }
        environ = {**self.environ, **isolation.environment(), AGENT_PID: str(os.getpid())}
        try:
            done = subprocess.run(
                [*self.launch, _PROBE, json.dumps(question)],
                env=environ,
                cwd=own.cache,
                stdin=subprocess.DEVNULL,
                capture_output=True,
                text=True,
                timeout=_PROBE_S,
                check=False,
            )
        except (OSError, subprocess.TimeoutExpired) as error:
            return f"a process cannot be started: {error}"
        lines = (done.stdout.strip() or done.stderr.strip()).splitlines() or [f"exit code {done.returncode}"]
        return lines[-1] if done.returncode else ""


def _missing_capabilities() -> list[str]:
    status = Path("/proc/self/status").read_text()
    held = int(next(line for line in status.splitlines() if line.startswith("CapEff:")).split()[1], 16)
    return [name for name, number in _NEEDED.items() if not held >> number & 1]


def isolation_of(settings: AgentSettings, trial: Trial) -> Isolation:
    """The first way that holds, its directories prepared. From then on no other process reaches this one's memory,
    unless there is nothing to protect. Blocks for up to some seconds. Raises SettingsError, and StateError when the way
    that the settings name does not work here."""
    has_identity = (settings.state_dir / IDENTITY).is_dir()
    account = account_of(settings.run_as, default=has_identity or settings.isolation == Mode.UID)
    modes = ways(settings.isolation, is_root=os.geteuid() == 0, has_identity=has_identity, account=account)
    if has_identity or modes != (Mode.NONE,):
        protect_memory()
    failures: list[str] = []
    look = partial(hidden_paths, settings.state_dir, trial.environ, settings.token_file, settings.join_file)
    for mode in modes:
        hidden, home = look() if mode is not Mode.NONE else (), str(trial.directories.cache)
        isolation = Isolation(mode=mode, hidden=hidden, account=account, home=home, look=look)
        trial.directories.let_others_pass(mode is Mode.UID)
        isolation.give(trial.directories.cache)
        failure = trial.failure(isolation) if mode is not Mode.NONE else ""
        if not failure:
            _report(mode, failures, has_identity)
            return isolation
        failures.append(f"{mode}: {failure}")
    raise StateError(
        f"this host does not give the isolation that was asked for: {'; '.join(failures)}",
        action=f"choose --isolation {AUTO}, or see docs/security.md",
    )


def without_user_code(settings: AgentSettings, directories: AgentDirectories) -> Isolation:
    """For an agent whose processes run none: a root agent admits those of other users to their sockets. Raises
    SettingsError, StorageError."""
    has_identity = (settings.state_dir / IDENTITY).is_dir()
    if has_identity:
        protect_memory()
    account = account_of(settings.run_as, default=has_identity)
    if account is not None:
        directories.let_others_pass_to_sockets()
    return Isolation(mode=Mode.NONE, hidden=(), account=account, home="")


def _report(mode: Mode, failures: Sequence[str], has_identity: bool) -> None:
    if mode is Mode.NONE and has_identity:
        _log.warning("user code can read this node's key: see docs/security.md", isolation=str(mode), failures=failures)
    elif mode is not Mode.UID and os.geteuid() == 0 and has_identity:
        _log.warning(
            "trainers run as root: user code may change what root runs, so name a user with --run-as",
            isolation=str(mode),
            failures=failures,
        )
    elif has_identity or mode is not Mode.NONE:
        _log.info("user code is kept from this node's key", isolation=str(mode), failures=failures)
