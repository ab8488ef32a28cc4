"""`make demo`: a local cluster trains a language model on Python's own source, shows results, and is taken down.

Everything runs through the psctl command line, as a person would type it; each command is printed before it runs.

    python examples/demo.py [--set KEY=VALUE]... [--output DIR]

DEMO_SET in the environment holds more KEY=VALUE pairs, separated by spaces: DEMO_SET="train.max_steps=20" make demo.
Ctrl-C at any moment takes the cluster down first.
"""

from __future__ import annotations

import argparse
import fcntl
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

import ngram

SPEC = Path(__file__).resolve().parent / "stdlib-lm.yaml"
PSCTL = Path(sys.executable).with_name("psctl")
PROMPT = '    """Return '
_INTERRUPTED = 130


class CommandFailed(Exception):
    """A psctl command ended with another exit status than 0."""

    def __init__(self, status: int) -> None:
        super().__init__(f"exit status {status}")
        self.status = status


class Psctl:
    """Runs psctl against the demo's own cluster, with its state in `state_dir`."""

    def __init__(self, state_dir: Path) -> None:
        config = state_dir.parent / "config.toml"
        config.touch()
        # The demo ignores any cluster that the user has configured.
        clean = {key: value for key, value in os.environ.items() if not key.startswith("PS_")}
        # Tied: Ctrl-C also ends the job's cluster, so psctl must not report that the job continues.
        own = {"PS_STATE_DIR": str(state_dir), "PS_CONFIG": str(config), "PS_TIED": "1"}
        self._environment = {**clean, **own}

    def __call__(self, *arguments: str, shown: bool = True) -> str:
        """Run one command; its stderr goes to ours. Returns its stdout. Raises CommandFailed.

        The command has its own process group, so that Ctrl-C reaches it once, through this process, and it ends in
        order before this call returns.
        """
        if shown:
            print(f"\n$ psctl {shlex.join(arguments)}", flush=True)
        command = [str(PSCTL), *arguments]
        with subprocess.Popen(
            command,
            env=self._environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=None if shown else subprocess.DEVNULL,
            text=True,
            process_group=0,
        ) as process:
            try:
                output, _ = process.communicate()
            except KeyboardInterrupt:
                with _undisturbed():
                    process.send_signal(signal.SIGINT)
                    process.communicate()
                raise
        if process.returncode:
            raise CommandFailed(process.returncode)
        return output


def main(argv: Sequence[str]) -> int:
    arguments = _parse(argv)
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, _interrupt)
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        # Started in the background of a shell, which ignores SIGINT. The commands must not inherit that: SIGINT is how
        # they are ended when SIGTERM comes. Unlike SIG_IGN, a handler is not inherited.
        signal.signal(signal.SIGINT, lambda *_: None)
    try:
        with _own_directory() as directory:
            return _with_cluster(directory / "cluster", arguments.overrides, arguments.output.absolute())
    except KeyboardInterrupt:
        print("the demo was interrupted; its cluster is down", file=sys.stderr)
        return _INTERRUPTED


def _with_cluster(state_dir: Path, overrides: Sequence[str], output: Path) -> int:
    psctl = Psctl(state_dir)
    # A killed run may have left a cluster with an unfinished job.
    psctl("down", shown=False)
    shutil.rmtree(state_dir, ignore_errors=True)
    shown = True
    try:
        show(psctl, overrides, output)
        status = 0
    except CommandFailed as error:
        print(f"\nthe demo failed; the logs are in {state_dir / 'logs'}", file=sys.stderr)
        status = error.status
    except KeyboardInterrupt:
        shown = False  # `psctl down` reports that the job continues after the next `up`, but a demo starts afresh
        print("\ninterrupted; taking the cluster down", file=sys.stderr)
        raise
    finally:
        with _undisturbed():
            psctl("down", shown=shown)
    if status == 0:
        shutil.rmtree(state_dir)
    return status


def show(psctl: Psctl, overrides: Sequence[str], output: Path) -> None:
    """Start, train, compare, generate, export. Raises CommandFailed."""
    psctl("up", "--workers", "2", "--servers", "2")
    sets = [part for pair in overrides for part in ("--set", pair)]
    job_id = psctl("submit", str(SPEC), "--follow", *sets).strip()
    compare(json.loads(psctl("describe", job_id, "-o", "json", shown=False)))
    sample = psctl("generate", job_id, "--prompt", PROMPT, "--max-new-tokens", "400", "--temperature", "0.8")
    # A byte-level model may write control characters, which must not reach the terminal.
    print("".join(c if c.isprintable() or c in "\n\t" else "\N{REPLACEMENT CHARACTER}" for c in sample), flush=True)
    output.mkdir(parents=True, exist_ok=True)
    for form in ("safetensors", "pth"):
        psctl("export", job_id, "--format", form, "-o", str(output / f"model.{form}"), "--force")
    print(f"\nthe trained model is in\n  {output / 'model.safetensors'}\n  {output / 'model.pth'}", flush=True)


def compare(job: dict[str, object]) -> None:
    """Print the job's held-out bits per byte beside those of n-gram models fitted on the same training text."""
    from psworker.tasks.stdlib_lm import StdlibLm  # imports torch, which nothing before needs

    spec, metrics = job["spec"], job["metrics"]
    if not isinstance(spec, dict) or not isinstance(metrics, dict):
        raise CommandFailed(1)
    task = StdlibLm(**spec["task"]["args"])
    task.data_uri = spec["data"]["uri"]
    train, held_out = task.texts()
    print(f"\nheld-out bits per byte ({len(held_out):,} bytes of files that were not trained on):")
    print(f"  byte bigram    {ngram.bits_per_byte(train, held_out, 2):.3f}")
    print(f"  byte trigram   {ngram.bits_per_byte(train, held_out, 3):.3f}")
    print(f"  this model     {metrics['bits_per_byte']:.3f}   after {job['step']} steps", flush=True)


def _parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--set", dest="overrides", action="append", default=[], metavar="KEY=VALUE")
    parser.add_argument("--output", type=Path, default=Path("demo-output"), help="where the model is exported to")
    arguments = parser.parse_args(argv)
    arguments.overrides += shlex.split(os.environ.get("DEMO_SET", ""))
    return arguments


@contextmanager
def _own_directory() -> Iterator[Path]:
    """The demo's directory under the user's state home, locked: a second demo would end the first one's cluster."""
    home = Path(os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state")
    directory = home / "pscluster-demo"
    directory.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            sys.exit("another demo is running; wait until it ends, or end it with Ctrl-C")
        yield directory
    finally:
        os.close(descriptor)


@contextmanager
def _undisturbed() -> Iterator[None]:
    """Ignore further signals here, but not in the commands that are started, so that cleaning up is completed."""
    signals = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    before = [signal.signal(number, lambda *_: None) for number in signals]
    try:
        yield
    finally:
        for number, handler in zip(signals, before, strict=True):
            signal.signal(number, handler)


def _interrupt(_number: int, _frame: FrameType | None) -> None:
    raise KeyboardInterrupt


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
