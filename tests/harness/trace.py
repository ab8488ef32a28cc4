"""The product's own calls in a process, in order: what the walks in docs/walks.md are checked against.

python -m harness.trace FILE MODULE     runs MODULE's main() and writes its calls to FILE at the end
"""

from __future__ import annotations

import atexit
import importlib
import os
import subprocess
import sys
import threading
from collections.abc import Mapping
from pathlib import Path
from types import FrameType
from typing import Any

ROOT = Path(__file__).parents[2]
PACKAGES = ("pscluster", "psmaster", "psworker", "psserver")


class Recorder:
    """Appends "file: function" for every call of a function of the product, from any thread.

    Repeats of the same call one after the other count once."""

    def __init__(self) -> None:
        self.calls: list[str] = []
        self._names: dict[object, str | None] = {}

    def __call__(self, frame: FrameType, event: str, _argument: object) -> None:
        """The profile function: see sys.setprofile."""
        if event != "call":
            return
        code = frame.f_code
        if code not in self._names:
            self._names[code] = _named(code)
        name = self._names[code]
        if name is not None and (not self.calls or self.calls[-1] != name):
            self.calls.append(name)

    def start(self) -> None:
        """Record this thread and those that start from now on."""
        threading.setprofile(self)
        sys.setprofile(self)


def _named(code: Any) -> str | None:
    """ "psserver/partition/step/sums.py: Sums.offer"; None for what is not the product's, or has no name."""
    function = code.co_qualname.replace(".<locals>", "")
    parts = Path(code.co_filename).parts
    homes = [parts.index(package) for package in PACKAGES if package in parts[:-1]]
    if not homes or "v1" in parts or "<" in function:
        return None
    return f"{'/'.join(parts[min(homes) :])}: {function}"


def traced(directory: Path) -> Any:
    """A `Launch` for StaticJob whose processes write their calls to `directory`/<name>.calls when they end."""

    def launch(name: str, environment: Mapping[str, str], control: int, output: int) -> subprocess.Popen[bytes]:
        module = "psworker.trainer" if name.startswith("trainer") else "psserver.partition"
        path = os.pathsep.join([str(ROOT / "tests"), os.environ.get("PYTHONPATH", "")])
        variables = {**os.environ, **environment, "PYTHONPATH": path, "PS_CONTROL_FD": str(control)}
        variables |= {"PS_AGENT_PID": str(os.getpid()), "OMP_NUM_THREADS": "1", "OMP_DYNAMIC": "false"}
        command = [sys.executable, "-m", "harness.trace", str(directory / f"{name}.calls"), module]
        return subprocess.Popen(command, env=variables, pass_fds=[control], stdout=output, stderr=output)

    return launch


def main() -> None:
    path, module = Path(sys.argv[1]), sys.argv[2]
    entry = importlib.import_module(f"{module}.__main__").main
    recorder = Recorder()

    def write() -> None:
        sys.setprofile(None)
        path.write_text("\n".join(recorder.calls))

    atexit.register(write)
    sys.argv = [module]
    recorder.start()
    sys.exit(entry())


if __name__ == "__main__":
    main()
