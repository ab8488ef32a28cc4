"""Verbs that write, submit and follow a job: init, submit, follow; and the arithmetic of a spec for --dry-run."""

from __future__ import annotations

import importlib.resources
import json
import re
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from pscluster.cli import formatting as fmt
from pscluster.cli.control import duration_option
from pscluster.cli.output import print_answer, print_document, print_info
from pscluster.cli.session import Session, Verb, pass_session
from pscluster.errors import SpecError, StateError, StorageError

if TYPE_CHECKING:
    from pscluster.job.bundle import Bundle
    from pscluster.job.spec import JobSpec


_MOST_ROWS = 16  # of worker counts in a dry run
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
@click.option("--follow", is_flag=True, help="show progress until the job ends; exit with the job's code")
@click.option("--wait", is_flag=True, help="wait until the job ends, without output; exit with the job's code")
@duration_option("--timeout", None, "with --wait: give up after this long, exit 101")
@click.option("--dry-run", is_flag=True, help="check the spec and print what follows from it; submit nothing")
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
    """Submit the job that SPEC describes.

    SPEC is a YAML or TOML file, or a directory with a spec.yaml. Prints the new job's id, alone, on stdout. A task that
    is not built in is uploaded: the spec's directory, without what its .gitignore names. Ctrl-C during --follow
    detaches; the job continues.
    """
    parsed, bundle = prepare(spec, overrides, name)
    if dry_run:
        _show_arithmetic(spec, parsed, bundle, form)
        return
    with session.connect() as cluster:
        job_id = cluster.submit(parsed, bundle)
        print_answer(job_id)
        if follow:
            from pscluster.cli.following import follow_to_end

            follow_to_end(cluster, job_id, session.located(), tied=tied)
        elif wait:
            cluster.wait(job_id, "succeeded", timeout)
    if not follow and not wait:
        print_info(f"submitted {job_id}; next:")
        print_info(f"  psctl follow {job_id}     show progress until it ends")
        print_info(f"  psctl logs -f {job_id}    show its output")
        print_info(f"  psctl describe {job_id}   show all details")


def _show_arithmetic(path: Path, spec: JobSpec, bundle: Bundle | None, form: str) -> None:
    from pscluster.cli.task_entrypoint import never_evaluates

    evaluates = not never_evaluates(spec.task.entrypoint, _spec_file(path).absolute().parent)
    found = calculate(spec, bundle, evaluates=evaluates)
    if form == "text":
        print_answer(text(found))
    else:
        print_document("DryRun", found, form)


@click.command("follow", cls=Verb)
@click.argument("job")
@pass_session
def follow_job(session: Session, job: str) -> None:
    """Show JOB's progress until it ends; exit with the job's code. Ctrl-C detaches."""
    from pscluster.cli.following import follow_to_end

    with session.connect() as cluster:
        found = cluster.job(job)
        follow_to_end(cluster, found.job_id, session.located())


def prepare(path: Path, overrides: tuple[str, ...], name: str | None) -> tuple[JobSpec, Bundle | None]:
    """The validated spec and, unless its task is built in, the bundle of its directory, which holds the task's file."""
    from pscluster.cli.task_entrypoint import check_entrypoint, is_built_in
    from pscluster.job.bundle import pack
    from pscluster.job.spec import load_spec

    file = _spec_file(path)
    spec = load_spec(file, overrides if name is None else [*overrides, f"name={json.dumps(name, ensure_ascii=False)}"])
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
    raise SpecError(f"no {_SPEC_NAMES[0]} in {path}", action="give the path of a spec, or write one: psctl init DIR")


@click.command("init", cls=Verb)
@click.argument("directory", type=click.Path(path_type=Path))
def init(directory: Path) -> None:
    """Write an example job into DIRECTORY.

    It runs unchanged: a spec, a task, a text to learn. DIRECTORY must be empty or missing. Prints the path of the spec.
    """
    written = write_job(directory)
    print_info(f"wrote {', '.join(_FILES.values())} to {directory}; next:")
    print_info("  psctl up")
    print_info(f"  psctl submit {written} --follow")
    print_answer(str(written))


def write_job(directory: Path) -> Path:
    """Write the templates, all or none; returns the spec's path. Raises StateError for a directory that is not empty,
    StorageError when it cannot be written."""
    name = job_name(directory.absolute().name)
    templates = importlib.resources.files("pscluster.cli") / "templates"
    with ExitStack() as undo:
        try:
            if not directory.exists():
                directory.mkdir(parents=True)
                undo.callback(directory.rmdir)
            if any(directory.iterdir()):
                raise StateError(f"{directory} is not empty", action="give a new directory")
            for source, target in _FILES.items():
                text = (templates / source).read_text(encoding="utf-8")
                undo.callback((directory / target).unlink, missing_ok=True)
                (directory / target).write_text(text.replace("my-first-job", name), encoding="utf-8")
        except OSError as error:
            raise StorageError(f"cannot write to {directory}: {error.strerror}") from None
        undo.pop_all()  # all are written: they stay
    return directory / "spec.yaml"


def job_name(text: str) -> str:
    """A valid job name from a directory's: lower case, digits and hyphens."""
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")[:63].strip("-") or "my-first-job"


def calculate(spec: JobSpec, bundle: Bundle | None, *, evaluates: bool = True) -> dict[str, Any]:
    """What follows from a spec, as plain data; `text` formats it. `evaluates`: the task may have evaluation data."""
    train, steps = spec.train, spec.train.max_steps
    return {
        "name": spec.name,
        "entrypoint": spec.task.entrypoint,
        "num_shards": train.num_shards,
        "microbatch": train.microbatch,
        "global_batch": train.global_batch,
        "max_steps": steps,
        "epochs": train.epochs,
        "samples": steps * train.global_batch if steps is not None else None,
        "left_out_at_most": train.microbatch - 1 if spec.data.drop_last else 0,
        "partitions": spec.servers.partitions,
        "standbys": spec.servers.partitions if spec.durability.tier == "replica" else 0,
        "workers": [_split(train.num_shards, workers) for workers in _worker_counts(spec)],
        "snapshot_every_steps": spec.durability.every_steps,
        "snapshots": steps // spec.durability.every_steps if steps is not None else None,
        "freeze": list(train.freeze),
        "unfreeze_at": dict(train.unfreeze_at),
        "evaluates": evaluates,
        "evaluate_every_steps": spec.evaluate.every_steps,
        "bundle": bundle and {"files": len(bundle.files), "size_bytes": len(bundle.data), "sha256": bundle.sha256},
        "spec": spec.model_dump(mode="json"),
    }


def _worker_counts(spec: JobSpec) -> list[int]:
    """The worker counts that get a row: from min to max, at most one for each shard, many thinned to powers of two."""
    low, high = spec.workers.min, min(spec.workers.max or spec.train.num_shards, spec.train.num_shards)
    counts = list(range(low, high + 1))
    if len(counts) > _MOST_ROWS:
        counts = sorted({low, high, *(2**n for n in range(high.bit_length()) if low <= 2**n <= high)})
    return counts


def _split(shards: int, workers: int) -> dict[str, Any]:
    most, fewest = -(-shards // workers), shards // workers
    return {
        "workers": workers,
        "microbatches_most": most,
        "microbatches_fewest": fewest,
        "balance": round(shards / (workers * most), 4),
    }


def text(found: dict[str, Any]) -> str:
    batch, micro, shards = found["global_batch"], found["microbatch"], found["num_shards"]
    lines = [
        f"{found['name']}: {found['entrypoint']}",
        f"a step: {shards} shards x {micro} samples = global batch {batch}",
        _length(found),
        f"parameters over {found['partitions']} partition{'s' if found['partitions'] > 1 else ''}"
        + (", each with a standby on another server" if found["standbys"] else "")
        + "; snapshots every "
        f"{found['snapshot_every_steps']} steps" + (f" ({found['snapshots']})" if found["snapshots"] else ""),
        *_freezing(found),
        _evaluation(found),
        _code(found["bundle"]),
        "",
        fmt.table(("WORKERS", "MICROBATCHES EACH", "BUSY"), [_row(row) for row in found["workers"]]),
    ]
    return "\n".join(lines)


def _length(found: dict[str, Any]) -> str:
    parts = []
    if found["max_steps"]:
        parts.append(f"{found['max_steps']} steps ({found['samples']:,} samples)")
    if found["epochs"]:
        parts.append(f"{found['epochs']} epochs (steps are known once the data is loaded)")
    left_out = found["left_out_at_most"]
    return (
        "length: "
        + ", or ".join(parts)
        + (", whichever ends first" if len(parts) > 1 else "")
        + (f"; each epoch leaves out what does not fill a microbatch, at most {left_out} samples" if left_out else "")
    )


def _freezing(found: dict[str, Any]) -> list[str]:
    """What the spec freezes; the parameters are counted where the model is built, in `describe`'s checks."""
    parts = [f"{glob} until step {step}" for glob, step in found["unfreeze_at"].items()]
    return ["frozen: " + ", ".join([*found["freeze"], *parts])] if found["freeze"] or parts else []


def _evaluation(found: dict[str, Any]) -> str:
    if not found["evaluates"]:
        return "no evaluation: the task has no eval_data"
    every = found["evaluate_every_steps"]
    return f"evaluation every {every} steps and at the end" if every else "evaluation at the end"


def _code(bundle: dict[str, Any] | None) -> str:
    if bundle is None:
        return "code: built in, nothing to upload"
    return f"code: {bundle['files']} files, {fmt.size(bundle['size_bytes'])} packed, sha256 {bundle['sha256'][:12]}"


def _row(row: dict[str, Any]) -> list[str]:
    most, fewest = row["microbatches_most"], row["microbatches_fewest"]
    each = str(most) if most == fewest else f"{fewest} or {most}"
    return [str(row["workers"]), each, f"{100 * row['balance']:.0f} %"]


COMMANDS = (init, submit, follow_job)
