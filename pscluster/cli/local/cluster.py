"""Starts and stops a local cluster; both are idempotent, and an interrupted one leaves nothing half done."""

from __future__ import annotations

import os
import secrets
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING

from pscluster.agent.resources import visible_devices
from pscluster.cli.local import processes, record
from pscluster.cli.local.processes import command, count_of, daemon_dir, exit_error, node_names, variables
from pscluster.cli.local.record import Daemon, locked
from pscluster.errors import StorageError, UnhealthyError, UnreachableError
from pscluster.settings import LocatedCluster, make_runtime_dir, remove_runtime_dir

if TYPE_CHECKING:
    from pscluster.client import Cluster

READY_DEADLINE_S = 60.0
_POLL_S = 0.05
_PRINT_AFTER_S = 3.0
_NUMBERS = (signal.SIGINT, signal.SIGTERM)
DEFAULT_WORKERS = 2
DEFAULT_SERVERS = 1

PrintInfo = Callable[[str], None]


@dataclass(kw_only=True)
class LocalCluster:
    """The local cluster of one state directory. Methods block; `print_info` prints a line for a person."""

    located: LocatedCluster
    print_info: PrintInfo
    running: tuple[Daemon, ...] = ()
    _started: list[Daemon] = field(default_factory=list)
    _log_offsets: dict[str, int] = field(default_factory=dict)

    @property
    def state_dir(self) -> Path:
        return self.located.state_dir

    @property
    def master_started(self) -> bool:
        """Whether this object's `up` started the master."""
        return any(daemon.role == "master" for daemon in self._started)

    @property
    def all_started(self) -> bool:
        """Whether it started everything that runs."""
        return {daemon.name for daemon in self._started} == {daemon.name for daemon in self.running}

    def log_of(self, name: str) -> Path:
        return self.state_dir / "logs" / f"{name}.log"

    def up(self, workers: int | None, servers: int | None) -> bool:
        """Start missing daemons, end surplus ones, and return when all are ready; returns whether anything was started.

        None keeps a running cluster's count. What this call started is ended again when it fails or is interrupted.
        Raises StorageError, UnhealthyError, or the error that a daemon ended with.
        """
        prepare(self.state_dir, self.located.token_file)
        with locked(self.state_dir, self.print_info):
            self.running = processes.find(self.state_dir)
            names = self._wanted(workers, servers)
            try:
                self._reconcile(names)
                wait_ready(self.located, names, self.check, self.print_info, READY_DEADLINE_S)
            except BaseException:
                self._undo()
                raise
            return bool(self._started)

    def down(self) -> bool:
        """End every daemon and remove the sockets; the state of jobs is kept. Returns whether anything ran."""
        if not self.state_dir.is_dir():
            return False
        with locked(self.state_dir, self.print_info):
            found = processes.find(self.state_dir)
            # The master first: it must not treat the end of the nodes as their loss.
            self._end([daemon for daemon in found if daemon.role == "master"])
            self._end([daemon for daemon in found if daemon.role != "master"])
            self.running = ()
            remove_runtime_dirs(self.state_dir)
            record.record_path(self.state_dir).unlink(missing_ok=True)
            return bool(found)

    def check(self) -> None:
        """If a daemon of this cluster has ended, raise an error with the reason."""
        for daemon in self.running:
            if not processes.is_alive(daemon, self.state_dir):
                log = self.log_of(daemon.name)
                raise exit_error(daemon.name, log, self._log_offsets.get(daemon.name, 0))

    def _wanted(self, workers: int | None, servers: int | None) -> tuple[str, ...]:
        # Recorded ones, too: a killed node is restarted.
        names = [daemon.name for daemon in (*self.running, *record.load(self.state_dir))]
        return node_names(
            workers if workers is not None else count_of(names, "worker") or DEFAULT_WORKERS,
            servers if servers is not None else count_of(names, "server") or DEFAULT_SERVERS,
        )

    def _reconcile(self, names: Sequence[str]) -> None:
        surplus = [daemon for daemon in self.running if daemon.name not in (*names, "master")]
        if surplus:
            self.print_info(f"stopping {', '.join(daemon.name for daemon in surplus)}")
        self._end([*surplus, *self._unreachable_master()])
        here = {daemon.name for daemon in self.running}
        for name in ("master", *names):
            if name not in here:
                self._start(name)
        record.save(self.state_dir, self.located.address, self.running)

    def _unreachable_master(self) -> list[Daemon]:
        """A running master whose socket is gone (a cleaned /tmp), so that it cannot be reached any more."""
        if Path(self.located.address.removeprefix("unix:")).exists():
            return []
        return [daemon for daemon in self.running if daemon.role == "master"]

    def _start(self, name: str) -> None:
        log = self.log_of(name)
        self._log_offsets[name] = log.stat().st_size if log.exists() else 0  # what follows belongs to this start
        words = command(name, self.state_dir, self.located.address, self.located.token_file)
        with deferred():  # a process that is started but not recorded would never be ended
            own = variables(name, visible_devices(os.environ))
            daemon = processes.start(name, words, own, daemon_dir(name, self.state_dir), log)
            self._started.append(daemon)
        self.running = (*self.running, daemon)
        record.save(self.state_dir, self.located.address, self.running)

    def _end(self, daemons: Sequence[Daemon]) -> None:
        killed = processes.end(daemons, self.state_dir)
        if killed:
            self.print_info(f"{', '.join(killed)} did not stop in time and was killed")
        for daemon in daemons:
            remove_runtime_dir(daemon_dir(daemon.name, self.state_dir))
        self.running = tuple(daemon for daemon in self.running if daemon not in daemons)

    def _undo(self) -> None:
        """End what this call started; leave what ran before."""
        self._end(self._started)
        if self.running:
            record.save(self.state_dir, self.located.address, self.running)
            return
        remove_runtime_dirs(self.state_dir)
        record.record_path(self.state_dir).unlink(missing_ok=True)


def prepare(state_dir: Path, token_file: Path) -> None:
    """Create the state directory, its token and the runtime directory, where missing. Raises StorageError."""
    try:
        state_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
        if not token_file.exists():
            write_token(token_file)
    except OSError as error:
        raise StorageError(f"cannot write in the state directory {state_dir}: {error.strerror}") from None
    if not os.access(state_dir, os.W_OK | os.X_OK):
        raise StorageError(f"the state directory {state_dir} is not writable")
    make_runtime_dir(state_dir)


def write_token(token_file: Path) -> None:
    """Make a token, mode 0600, unless there is one. Written to a temporary file and linked: nobody reads half a token,
    and two writers agree on one. Raises OSError."""
    temporary = token_file.with_name(f".{token_file.name}.{secrets.token_hex(4)}")
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    try:
        with open(descriptor, "w", encoding="ascii") as sink:
            sink.write(secrets.token_urlsafe(32) + "\n")
        os.link(temporary, token_file)
    except FileExistsError:
        return
    finally:
        temporary.unlink(missing_ok=True)


def remove_runtime_dirs(state_dir: Path) -> None:
    """Remove the sockets' directories of the cluster and of all nodes: a killed one could not. Idempotent."""
    nodes = [path for role in ("worker", "server") for path in sorted(state_dir.glob(f"{role}-*"))]
    for directory in (state_dir, *nodes):
        remove_runtime_dir(directory)


def wait_ready(
    located: LocatedCluster,
    names: Sequence[str],
    check: Callable[[], None],
    print_info: Callable[[str], None],
    deadline_s: float,
) -> None:
    """Block until the master answers and all nodes in `names` are ready. `check` is called between polls and raises
    when a daemon has ended. Prints what is waited for after 3 seconds. Raises UnhealthyError after `deadline_s`."""
    started = time.monotonic()
    printed = ""
    with ExitStack() as stack:
        for missing in _poll(located, names, stack):
            if not missing:
                return
            check()
            elapsed = time.monotonic() - started
            waits = f"waiting for {', '.join(missing)}"
            if elapsed > deadline_s:
                raise UnhealthyError(f"not ready after {deadline_s:g} s: {waits}")
            if elapsed > _PRINT_AFTER_S and waits != printed:
                print_info(waits)
                printed = waits
            time.sleep(_POLL_S)


def _poll(located: LocatedCluster, names: Sequence[str], stack: ExitStack) -> Iterator[list[str]]:
    """What is missing, at each poll; ["master"] while it does not answer."""
    from pscluster.client import Cluster

    cluster: Cluster | None = None
    while True:
        try:
            cluster = cluster or stack.enter_context(Cluster.connect_to(located))
            ready = {node.node_id for node in cluster.nodes() if node.ready}
            yield [name for name in names if name not in ready]
        except UnreachableError:
            yield ["master"]


@contextmanager
def interruptible_once() -> Iterator[None]:
    """The first SIGINT or SIGTERM raises KeyboardInterrupt; from then on both are ignored until the block is left, so
    that the cleanup is not interrupted. Call on the main thread."""

    def interrupt(_number: int, _frame: FrameType | None) -> None:
        for number in _NUMBERS:
            signal.signal(number, signal.SIG_IGN)
        raise KeyboardInterrupt

    with _handled_by(interrupt):
        yield


@contextmanager
def deferred() -> Iterator[None]:
    """Defer SIGINT and SIGTERM until the block is done. Does nothing outside the main thread."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    came: list[int] = []
    try:
        with _handled_by(lambda number, _: came.append(number)):
            yield
    finally:
        if came:
            signal.raise_signal(came[0])


@contextmanager
def _handled_by(handler: Callable[[int, FrameType | None], None]) -> Iterator[None]:
    """Have both signals handled so in the block."""
    before = {number: signal.signal(number, handler) for number in _NUMBERS}
    try:
        yield
    finally:
        for number, earlier in before.items():
            signal.signal(number, earlier)
