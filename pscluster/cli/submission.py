"""Verbs that bring a job in and watch it: submit, follow."""

from __future__ import annotations

import importlib.resources
import re
from pathlib import Path
from typing import TYPE_CHECKING

import click

from pscluster.cli.control import duration_option
from pscluster.cli.session import Session, Verb, answer, document, pass_session, print_document, say
from pscluster.errors import SpecError, StateError, StorageError

if TYPE_CHECKING:
    from pscluster.job.bundle import Bundle
    from pscluster.job.spec import JobSpec


_SPEC_NAMES = ("spec.yaml", "spec.yml", "spec.toml")
_FILES = {
    "spec.yaml": "spec.yaml",
    "task.py": "task.py",
    "text.txt": "text.txt",
    "README.md": "README.md",
    "gitignore": ".gitignore",
}


@click.command("submit", cls=Verb)
@click.argument("spec", type=click.Path(path_type=Path))
@click.option("--set", "overrides", multiple=True, metavar="KEY=VALUE", help="change the spec: train.max_steps=20")
@click.option("--name", default=None, help="the job's name, instead of the spec's")
@click.option("--follow", is_flag=True, help="show progress until the end; exit with the job's code")
@click.option("--wait", is_flag=True, help="wait for the end in silence; exit with the job's code")
@duration_option("--timeout", None, "with --wait: give up after this long, exit 101")
@click.option("--dry-run", is_flag=True, help="check the spec and print the arithmetic; touch nothing")
@click.option(
    "-o",
    "--output",
    "form",
    type=click.Choice(("text", "json", "yaml")),
    default="text",
    help="form of --dry-run's answer",
)
@click.option("--tied", is_flag=True, envvar="PS_TIED", hidden=True)  # the caller ends the cluster on Ctrl-C
@pass_session
def submit(
    session: Session,
    spec: Path,
    overrides: tuple[str, ...],
    name: str | None,
    follow: bool,
    wait: bool,
    timeout: float | None,
    dry_run: bool,
    form: str,
    tied: bool,
) -> None:
    """Submit the job that SPEC describes (a YAML or TOML file, or a directory with a spec.yaml).

    Prints the new job's id, alone, on stdout. A task that is not built in is bundled: the spec's directory, without
    what its .gitignore names. Ctrl-C during --follow detaches; the job goes on.
    """
    parsed, bundle = prepare(spec, overrides, name)
    if dry_run:
        _show_arithmetic(spec, parsed, bundle, form)
        return
    with session.connect() as cluster:
        job_id = cluster.submit(parsed, bundle)
        answer(job_id)
        if follow:
            from pscluster.cli.following import follow_to_end

            follow_to_end(cluster, job_id, session.located(), tied=tied)
        elif wait:
            cluster.wait(job_id, "succeeded", timeout)
    if not follow and not wait:
        say(f"submitted {job_id}; what you may want next:")
        say(f"  psctl follow {job_id}     progress until the end")
        say(f"  psctl logs -f {job_id}    what its processes write")
        say(f"  psctl describe {job_id}   everything known of it")


def _show_arithmetic(path: Path, spec: JobSpec, bundle: Bundle | None, form: str) -> None:
    from pscluster.cli import arithmetic
    from pscluster.cli.entrypoint import never_evaluates

    evaluates = not never_evaluates(spec.task.entrypoint, _spec_file(path).absolute().parent)
    found = arithmetic.summarize(spec, bundle, evaluates=evaluates)
    if form == "text":
        answer(arithmetic.text(found))
    else:
        print_document(document("DryRun", found), form)


@click.command("follow", cls=Verb)
@click.argument("job")
@pass_session
def follow_job(session: Session, job: str) -> None:
    """Show JOB's progress until its end; exit with the job's code. Ctrl-C detaches."""
    from pscluster.cli.following import follow_to_end

    with session.connect() as cluster:
        found = cluster.job(job)
        follow_to_end(cluster, found.job_id, session.located())


def prepare(path: Path, overrides: tuple[str, ...], name: str | None) -> tuple[JobSpec, Bundle | None]:
    """The validated spec and, unless its task is built in, the bundle of its directory with the task's file in it."""
    from pscluster.cli.entrypoint import check_entrypoint, is_built_in
    from pscluster.job.bundle import pack
    from pscluster.job.spec import apply_override, parse_spec, read_spec_file

    file = _spec_file(path)
    data = read_spec_file(file)
    for pair in overrides:
        apply_override(data, pair)
    if name is not None:
        data["name"] = name
    spec = parse_spec(data)
    if is_built_in(spec.task.entrypoint):
        return spec, None
    directory = file.absolute().parent
    check_entrypoint(spec.task.entrypoint, directory)
    bundle = pack(directory)
    check_entrypoint(spec.task.entrypoint, directory, bundle.files)
    return spec, bundle


def _spec_file(path: Path) -> Path:
    if not path.is_dir():
        return path
    for name in _SPEC_NAMES:
        if (path / name).is_file():
            return path / name
    raise SpecError(f"no {_SPEC_NAMES[0]} in {path}", action="name the spec file, or make one: psctl init DIR")


@click.command("init", cls=Verb)
@click.argument("directory", type=click.Path(path_type=Path))
def init(directory: Path) -> None:
    """Write a small job that runs as it is into DIRECTORY: a spec, a task, a text to learn.

    Refuses a directory that is not empty. Prints the path of the spec.
    """
    written = write_job(directory)
    say(f"wrote {', '.join(_FILES.values())} to {directory}; next:")
    say("  psctl up")
    say(f"  psctl submit {written} --follow")
    answer(str(written))


def write_job(directory: Path) -> Path:
    """Write the templates; returns the spec's path. StateError for a directory with anything in it."""
    name = job_name(directory.absolute().name)
    templates = importlib.resources.files("pscluster.cli") / "templates"
    try:
        directory.mkdir(parents=True, exist_ok=True)
        if any(directory.iterdir()):
            raise StateError(f"{directory} is not empty", action="name a new directory")
        for source, target in _FILES.items():
            text = (templates / source).read_text(encoding="utf-8")
            (directory / target).write_text(text.replace("my-first-job", name), encoding="utf-8")
    except OSError as error:
        raise StorageError(f"cannot write to {directory}: {error.strerror}") from None
    return directory / "spec.yaml"


def job_name(text: str) -> str:
    """A lawful job name from a directory's: lower case, digits and hyphens."""
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")[:63].strip("-") or "my-first-job"


COMMANDS = (init, submit, follow_job)
