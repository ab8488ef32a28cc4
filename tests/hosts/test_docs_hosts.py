"""The ten commands of docs/hosts.md, as printed, each on its machine."""

from __future__ import annotations

import re
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import psutil
import pytest

from harness.hosts import Host, HostNetwork

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "hosts.md"
READY_S = 60.0
UNREACHABLE = 3  # psctl's exit code


def printed_commands() -> list[tuple[str, str]]:
    """(machine, command) of each line of the page's first section that has a prompt."""
    section = PAGE.read_text().split("\n## ")[1]
    return re.findall(r"^    ([abc])\$ (.+)$", section, flags=re.MULTILINE)


@contextmanager
def machines() -> Iterator[dict[str, Host]]:
    """The page's machines by letter; the daemons that were started there are ended, agents first."""
    with HostNetwork(3) as network:
        assert network.hosts[0].address in PAGE.read_text()
        yield dict(zip("abc", network.hosts, strict=True))


class Terminal:
    """Types commands on machines; those that go on running are ended at the end, the last one first."""

    def __init__(self, directory: Path, stack: ExitStack) -> None:
        self._directory = directory
        self._stack = stack
        self.tokens: dict[str, str] = {}
        self.logs: list[Path] = []

    def start(self, host: Host, command: str) -> None:
        """Start a daemon. Fails at the end when it has ended by itself."""
        log = self._directory / f"{len(self.logs)}.log"
        self.logs.append(log)
        process = host.start("sh", "-c", f"exec env {command}", log=log, environment=self.tokens)
        self._stack.callback(_end, process, log)

    def run(self, host: Host, command: str) -> tuple[str, str]:
        """Run a command in the checkout, again while the master does not answer yet; what it prints."""
        deadline = time.monotonic() + READY_S
        while True:
            done = host.run("sh", "-c", command, environment=self.tokens, cwd=ROOT)
            if done.returncode != UNREACHABLE or time.monotonic() > deadline:
                break
        shown = "\n".join(log.read_text()[-1500:] for log in self.logs)
        assert done.returncode == 0, f"{command}: {done.returncode}\n{done.stdout}\n{done.stderr}\n{shown}"
        return done.stdout, done.stderr


def _end(process: subprocess.Popen[bytes], log: Path) -> None:
    if process.poll() is not None:
        raise AssertionError(f"ended by itself: {log.read_text()[-2000:]}")
    children = psutil.Process(process.pid).children(recursive=True)
    process.send_signal(signal.SIGTERM)
    assert process.wait(30) == 0, log.read_text()[-2000:]
    assert not psutil.wait_procs(children, timeout=10)[1]


@pytest.mark.slow
def test_the_first_cluster_takes_ten_commands(tmp_path: Path) -> None:
    commands = printed_commands()
    assert len(commands) == 10
    with machines() as hosts, ExitStack() as stack:
        terminal = Terminal(tmp_path, stack)
        shown = ""
        for letter, command in commands:
            if command.endswith("&"):
                terminal.start(hosts[letter], command.removesuffix("&").strip())
                continue
            answer, messages = terminal.run(hosts[letter], command)
            if found := re.search(r"token create --role (\w+)", command):
                terminal.tokens[f"{found[1].upper()}_TOKEN"] = answer.strip()
            if command.endswith("--follow"):
                (job,) = re.findall(r"^(stdlib-lm-\w+) SUCCEEDED at step 40\b", answer + messages, flags=re.MULTILINE)
                shown, _ = terminal.run(hosts[letter], f"psctl --context lab describe {job}")
    assert "tcp: trainer-partition 0-1, 1-0" in shown
