"""Trainer and partition processes in milliseconds: a parent that has imported torch forks one for each request.

They are processes of their own, with their own sockets, memory and exit codes; only the imports are shared. The parent
has one thread and never loads grpc, so forking it is safe. Run as a module it is that parent; `fork` asks it.
"""

from __future__ import annotations

import atexit
import importlib
import json
import os
import selectors
import signal
import socket
import subprocess
import sys
import threading
import traceback
from collections.abc import Mapping
from pathlib import Path

MODULES = {"trainer": "psworker.trainer.__main__", "partition": "psserver.partition.__main__"}
_ONE_THREAD = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "OMP_DYNAMIC": "false"}


class Forked:
    """One forked process, with what the tests need of subprocess.Popen."""

    def __init__(self, pid: int) -> None:
        self.pid = pid
        self.returncode: int | None = None
        self._ended = threading.Event()

    def wait(self, timeout: float | None = None) -> int:
        """Exit code, negative for a signal. Raises subprocess.TimeoutExpired."""
        if not self._ended.wait(timeout):
            raise subprocess.TimeoutExpired(f"process {self.pid}", timeout or 0)
        assert self.returncode is not None
        return self.returncode

    def send_signal(self, number: int) -> None:
        if self.returncode is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)

    def end(self, code: int) -> None:
        self.returncode = code
        self._ended.set()


class _Parent:
    """The pytest side of the one forking parent."""

    def __init__(self) -> None:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        root = Path(__file__).parent.parent
        environment = os.environ | _ONE_THREAD | {"PYTHONPATH": f"{root}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"}
        self._process = subprocess.Popen(
            [sys.executable, "-m", "harness.zygote", str(theirs.fileno())], env=environment, pass_fds=[theirs.fileno()]
        )
        theirs.close()
        self._socket = ours
        self._lock = threading.Lock()
        self._started = threading.Condition()
        self._new: list[Forked] = []
        self._running: dict[int, Forked] = {}
        threading.Thread(target=self._read, daemon=True).start()
        atexit.register(self.close)

    def fork(self, kind: str, environment: Mapping[str, str], control: int, log: int) -> Forked:
        request = json.dumps({"kind": kind, "environment": dict(environment)}).encode()
        with self._lock, self._started:
            socket.send_fds(self._socket, [request], [control, log])
            assert self._started.wait_for(lambda: bool(self._new), timeout=60), "the forking parent does not answer"
            return self._new.pop()

    def close(self) -> None:
        self._socket.shutdown(socket.SHUT_RDWR)  # close() alone would wait for the reading thread
        self._process.wait(10)
        self._socket.close()

    def _read(self) -> None:
        while True:
            try:
                data = self._socket.recv(1 << 16)
            except OSError:
                return
            if not data:
                return
            message = json.loads(data)
            with self._started:
                if "started" in message:
                    child = self._running[message["started"]] = Forked(message["started"])
                    self._new.append(child)
                    self._started.notify()
                else:
                    self._running.pop(message["ended"]).end(message["code"])


_parent: _Parent | None = None


def fork(kind: str, environment: Mapping[str, str], control: int, log: int) -> Forked:
    """A trainer or partition process with these variables on top; `control` and `log` are descriptors it gets."""
    global _parent
    if _parent is None:
        _parent = _Parent()
    return _parent.fork(kind, environment, control, log)


def _serve(channel: socket.socket) -> None:
    modules = {kind: importlib.import_module(name) for kind, name in MODULES.items()}
    waking, waker = os.pipe()
    os.set_blocking(waker, False)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    signal.set_wakeup_fd(waker)
    selector = selectors.DefaultSelector()
    selector.register(channel, selectors.EVENT_READ)
    selector.register(waking, selectors.EVENT_READ)
    while True:
        for key, _ in selector.select():
            if key.fileobj is not channel:
                os.read(waking, 4096)
                _reap(channel)
                continue
            data, descriptors, _, _ = socket.recv_fds(channel, 1 << 16, 2)
            if not data:
                return
            request = json.loads(data)
            pid = os.fork()
            if pid == 0:
                signal.set_wakeup_fd(-1)
                signal.signal(signal.SIGCHLD, signal.SIG_DFL)
                channel.close()
                _become(modules[request["kind"]], request["environment"], *descriptors)
            for descriptor in descriptors:
                os.close(descriptor)
            channel.send(json.dumps({"started": pid}).encode())


def _reap(channel: socket.socket) -> None:
    while True:
        try:
            pid, status = os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:
            return
        if pid == 0:
            return
        channel.send(json.dumps({"ended": pid, "code": os.waitstatus_to_exitcode(status)}).encode())


def _become(module: object, environment: Mapping[str, str], control: int, log: int) -> None:
    code = 1
    try:
        os.setsid()
        os.dup2(log, 1)
        os.dup2(log, 2)
        os.environ.update(environment)
        os.environ["PS_CONTROL_FD"] = str(control)
        code = module.main()  # type: ignore[attr-defined]
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else 1
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


if __name__ == "__main__":
    _serve(socket.socket(fileno=int(sys.argv[1])))
