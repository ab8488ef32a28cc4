"""The verb that writes a first job: init."""

from __future__ import annotations

import importlib.resources
import re
from pathlib import Path

import click

from pscluster.cli.session import Verb, answer, say
from pscluster.errors import StateError, StorageError

_FILES = {
    "spec.yaml": "spec.yaml",
    "task.py": "task.py",
    "text.txt": "text.txt",
    "README.md": "README.md",
    "gitignore": ".gitignore",
}


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


COMMANDS = (init,)
