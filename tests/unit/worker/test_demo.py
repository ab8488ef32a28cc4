"""The demo takes its cluster down whatever happens. A stand-in for psctl notes how it is called."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[3] / "examples"

PSCTL = """#!{python}
import os, pathlib, signal, sys
calls = pathlib.Path({calls!r})
verb = sys.argv[1]
with calls.open("a") as file:
    file.write(" ".join(sys.argv[1:]) + "\\n")
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    with calls.open("a") as file:
        file.write("SIGINT is ignored\\n")
if os.environ.get("DEMO_TEST_FAIL") == verb:
    sys.exit(100)
if os.environ.get("DEMO_TEST_HANG") == verb:
    signal.pthread_sigmask(signal.SIG_BLOCK, {{signal.SIGINT}})
    with open({started!r}, "w") as pipe:
        pipe.write("started")
    if signal.sigtimedwait({{signal.SIGINT}}, 60) is None:
        sys.exit(1)
    with calls.open("a") as file:
        file.write(verb + " was interrupted and ended in order\\n")
    sys.exit(130)
print("job-1")
"""

RUN = """
import sys
from pathlib import Path
sys.path.insert(0, sys.argv.pop(1))
import demo
demo.PSCTL = Path(sys.argv.pop(1))
sys.exit(demo.main(sys.argv[1:]))
"""


class Demo:
    """A demo process whose psctl is the stand-in."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.calls_file = directory / "calls"
        self.started = directory / "started"
        os.mkfifo(self.started)
        self.psctl = directory / "psctl"
        text = PSCTL.format(python=sys.executable, calls=str(self.calls_file), started=str(self.started))
        self.psctl.write_text(text)
        self.psctl.chmod(0o755)
        self.process: subprocess.Popen[str] | None = None

    def start(self, *arguments: str, **environment: str) -> subprocess.Popen[str]:
        command = [sys.executable, "-c", RUN, str(EXAMPLES), str(self.psctl), *arguments]
        self.process = subprocess.Popen(
            command,
            env={**os.environ, "XDG_STATE_HOME": str(self.directory / "home"), **environment},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        return self.process

    def wait_started(self) -> None:
        """Block until the verb that hangs has begun."""
        assert self.started.read_text() == "started"

    def calls(self) -> list[str]:
        return self.calls_file.read_text().splitlines()


@pytest.fixture
def demo(tmp_path: Path) -> Iterator[Demo]:
    demo = Demo(tmp_path)
    yield demo
    if demo.process is not None and demo.process.poll() is None:
        demo.process.kill()
        demo.process.wait()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
@pytest.mark.parametrize("verb", ["up", "submit"])
def test_a_signal_ends_the_running_command_in_order_and_then_the_cluster(
    demo: Demo, verb: str, number: signal.Signals
) -> None:
    process = demo.start(DEMO_TEST_HANG=verb)
    demo.wait_started()

    process.send_signal(number)
    _, errors = process.communicate(timeout=60)

    assert process.returncode == 130
    assert demo.calls()[-2:] == [f"{verb} was interrupted and ended in order", "down"]
    assert errors.endswith("the demo was interrupted; its cluster is down\n")


def test_sigterm_ends_a_demo_that_was_started_with_sigint_ignored(demo: Demo) -> None:
    """As `make demo &` in a script: psctl must not inherit that SIGINT is ignored, or it could not be ended."""
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        process = demo.start(DEMO_TEST_HANG="submit")
    finally:
        signal.signal(signal.SIGINT, before)
    demo.wait_started()

    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=60)

    assert process.returncode == 130
    assert demo.calls()[-2:] == ["submit was interrupted and ended in order", "down"]
    assert "SIGINT is ignored" not in demo.calls()


def test_a_failed_command_ends_the_cluster_and_gives_its_exit_status(demo: Demo) -> None:
    process = demo.start(DEMO_TEST_FAIL="submit")

    _, errors = process.communicate(timeout=60)

    assert process.returncode == 100
    assert demo.calls()[-1] == "down"
    assert "the logs are in" in errors


def test_what_a_killed_run_left_is_taken_down_first_and_overrides_go_through(demo: Demo) -> None:
    left = demo.directory / "home" / "pscluster-demo" / "cluster" / "left"
    left.parent.mkdir(parents=True)
    left.touch()

    process = demo.start("--set", "train.seed=3", DEMO_SET="train.max_steps=20 a=b", DEMO_TEST_FAIL="submit")
    process.communicate(timeout=60)

    calls = demo.calls()
    assert calls[:2] == ["down", "up --workers 2 --servers 2"]
    assert calls[2].endswith("stdlib-lm.yaml --follow --set train.seed=3 --set train.max_steps=20 --set a=b")
    assert not left.exists()


def test_a_second_demo_at_the_same_time_is_refused(demo: Demo, tmp_path: Path) -> None:
    process = demo.start(DEMO_TEST_HANG="submit")
    demo.wait_started()
    (tmp_path / "other").mkdir()
    other = Demo(tmp_path / "other")

    second = other.start(XDG_STATE_HOME=str(tmp_path / "home"))
    _, errors = second.communicate(timeout=60)

    assert second.returncode == 1
    assert "another demo is running" in errors
    assert not other.calls_file.exists()
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=60)
