"""Verbs that use a trained model: export, eval, generate. They run `psworker.tools` in a process, which loads torch."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import click

from pscluster.agent.cache import DEFAULT_BYTES, evict
from pscluster.cli import formatting as fmt
from pscluster.cli.output import output_option, print_answer, print_document, print_info
from pscluster.cli.session import Session, Verb, pass_session
from pscluster.errors import InternalError, ProcessLostError, StorageError, from_dict
from pscluster.storage.exports import DEFAULT_FORMAT, SUFFIXES, aside, check_free, format_of

COMMAND = (sys.executable, "-P", "-m", "psworker.tools")
_LINES = 12


def _read_step(_ctx: click.Context, param: click.Parameter, value: str) -> int | str:
    text = value.lower()
    if text in ("last", "best"):
        return text
    if not text.isdecimal():
        raise click.BadParameter(f"{value!r} is neither a step nor last nor best", param=param)
    return int(text)


_step = click.option(
    "--step", callback=_read_step, default="last", show_default=True, metavar="N|best|last", help="which snapshot"
)


@click.command("export", cls=Verb)
@click.argument("job")
@_step
@click.option(
    "--format",
    "form",
    type=click.Choice(tuple(SUFFIXES)),
    default=None,
    help="by default that of PATH's suffix, else safetensors; pth is a plain state_dict",
)
@click.option("-o", "--output", default=None, metavar="PATH", help="file to write, or a directory for model.FORMAT")
@click.option("--force", is_flag=True, help="overwrite PATH")
@pass_session
def export(session: Session, job: str, step: int | str, form: str | None, output: str | None, force: bool) -> None:
    """Write the parameters of JOB to a file. Prints its path.

    The file appears once it is complete. An existing one is kept, unless --force is given.
    """
    path, form = _target(job, form, output)
    check_free(path, force=force)
    request = {"command": "export", "format": form, "output": str(path), "force": force}
    with aside(path) as directory:
        found = _run(session, job, step, {**request, "aside": directory})
    print_info(
        f"step {found['step']}: {found.get('tensors', '?')} tensors, {fmt.size(found.get('size_bytes', 0))}, "
        f"parameters_sha256 {found['parameters_sha256']}"
    )
    print_answer(str(found.get("path", path)))


def _target(job: str, form: str | None, output: str | None) -> tuple[Path, str]:
    """The absolute path to write, and the format. Raises SettingsError, StorageError."""
    if output is None:
        form = form or DEFAULT_FORMAT
        return Path(f"{job}.{form}").absolute(), form
    path = Path(output).absolute()
    if path.is_dir():
        form = form or DEFAULT_FORMAT
        return path / f"model.{form}", form
    if output.endswith(os.sep):
        raise StorageError(f"there is no directory {path}", action=f"mkdir -p {path}")
    return path, format_of(path, form)


@click.command("eval", cls=Verb)
@click.argument("job")
@_step
@click.option("--data-uri", default=None, metavar="URI", help="other data than the job's")
@output_option("table", "json", "yaml")
@pass_session
def evaluate(session: Session, job: str, step: int | str, data_uri: str | None, form: str) -> None:
    """Evaluate a snapshot of JOB, exactly as training did.

    It uses the job's held-out data, or that of --data-uri.
    """
    request: dict[str, Any] = {"command": "eval"}
    if data_uri is not None:
        request["data_uri"] = data_uri
    found = _run(session, job, step, request)
    if form != "table":
        print_document("Evaluation", found, form)
        return
    print_info(f"step {found['step']}, {found.get('num_samples', '?')} samples")
    rows = [[name, fmt.number(value)] for name, value in sorted(found["metrics"].items())]
    print_answer(fmt.table(("METRIC", "VALUE"), rows))


@click.command("generate", cls=Verb)
@click.argument("job")
@click.option("--prompt", required=True, help="text to continue")
@click.option("--max-new-tokens", type=click.IntRange(min=1), default=200, show_default=True)
@click.option("--temperature", type=click.FloatRange(min=0), default=0.8, show_default=True, help="0 is greedy")
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True)
@_step
@pass_session
def generate(
    session: Session, job: str, prompt: str, max_new_tokens: int, temperature: float, seed: int, step: int | str
) -> None:
    """Continue a prompt with the model of JOB.

    The job's task must support it.
    """
    request = {
        "command": "generate",
        "prompt": prompt,
        "max_new_tokens": max_new_tokens,
        "temperature": temperature,
        "seed": seed,
    }
    print_answer(str(_run(session, job, step, request)["text"]))


def _run(session: Session, job: str, step: int | str, request: dict[str, Any]) -> dict[str, Any]:
    """Add the job's spec, bundle and the snapshot's files to a request and run it. Blocks."""
    cache = session.located().state_dir / "cache"
    if request["command"] != "export":  # which runs no user code
        request = {**request, "cache_dir": str(_prepared(cache))}
    with tempfile.TemporaryDirectory(prefix="psctl-") as temporary:
        with session.connect() as cluster:
            found = cluster.job(job)
            snapshot = cluster.snapshot(found.job_id, step)
            bundle = None
            if found.bundle_sha256:
                bundle = str(Path(temporary) / "bundle.tar.gz")
                cluster.download_bundle(found.bundle_sha256, Path(bundle))
            parts = cluster.locate_parts(found, snapshot, Path(temporary) / "parts")
        result = run_tool({**request, "job": found.job_id, "spec": found.spec, "bundle": bundle, "parts": parts})
    return {"job": found.job_id, "job_id": found.job_id, "name": found.name, "step": snapshot.step, **result}


def _prepared(cache: Path) -> Path:
    """The directory that user code shares here, as on a worker. Raises StorageError."""
    try:
        cache.mkdir(mode=0o700, parents=True, exist_ok=True)
        evict(cache, DEFAULT_BYTES)
    except OSError as error:
        raise StorageError(f"cannot use {cache}: {error.strerror}") from None
    return cache


def run_tool(request: dict[str, Any], command: tuple[str, ...] = COMMAND) -> dict[str, Any]:
    """Send a request to `psworker.tools`; its reply, without "ok". Blocks; Ctrl-C ends it, too.

    Raises the error in the reply. Without a reply: ProcessLostError when a signal ended it, else InternalError with its
    last output."""
    environment = {**os.environ, "PYTHONHASHSEED": "0"}  # as in trainers: the order of a set of words is the same
    process = subprocess.run(
        command, input=json.dumps(request).encode(), capture_output=True, check=False, env=environment
    )
    stderr = process.stderr.decode("utf-8", "replace").splitlines()[-_LINES:]
    try:
        reply = json.loads(process.stdout)
    except ValueError:
        reply = None
    if not isinstance(reply, dict) or "ok" not in reply:
        if process.returncode < 0:
            number = signal.Signals(-process.returncode)
            action = "check how much memory is free" if number is signal.SIGKILL else ""
            raise ProcessLostError(f"psworker.tools was ended by signal {number} ({number.name})", action=action)
        raise InternalError(
            f"psworker.tools ended with status {process.returncode} and no reply; its last output:\n  "
            + "\n  ".join(stderr or ["(none)"])
        )
    if not reply.pop("ok"):
        raise from_dict(reply.get("error") or {})
    return reply


COMMANDS = (export, evaluate, generate)
