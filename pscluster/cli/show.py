"""Verbs that show the state of jobs, nodes and versions: list, status, describe, nodes, health, version."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

import click

from pscluster import __version__
from pscluster.cli import formatting as fmt
from pscluster.cli.output import DOCUMENTS, output_option, print_answer, print_document, print_info, print_records
from pscluster.cli.session import Session, Verb, pass_session
from pscluster.errors import PsError, UnhealthyError

if TYPE_CHECKING:
    from pscluster.client import Job, Node


_JOB_COLUMNS = ("NAME", "STATE", "STEP", "LOSS", "AGE")
_JOB_COLUMNS_WIDE = (*_JOB_COLUMNS, "WORKERS", "SAMPLES/S", "GENERATION", "NUMERICS", "REASON")
_NODE_COLUMNS = ("NAME", "ROLE", "READY", "USED", "LAST-BEAT", "VERSION")
_NODE_COLUMNS_WIDE = (*_NODE_COLUMNS, "HOST", "CORES", "MEMORY", "DEVICES", "ISOLATION", "METRICS", "INCARNATION")


@click.command("list", cls=Verb)
@output_option()
@pass_session
def list_jobs(session: Session, form: str) -> None:
    """List all jobs, newest first."""
    with session.connect() as cluster:
        jobs = cluster.jobs()
    print_records("Job", jobs, form, "job_id", jobs_table, "no jobs; submit one with `psctl submit SPEC`")


@click.command("status", cls=Verb)
@click.argument("job")
@output_option()
@pass_session
def status(session: Session, job: str, form: str) -> None:
    """Show the state and progress of JOB in a few lines."""
    with session.connect() as cluster:
        found = cluster.job(job)
    if form == "name":
        print_answer(found.job_id)
    elif form in DOCUMENTS:
        print_document("Job", found.to_dict(), form)
    elif form == "wide":
        print_answer(jobs_table([found], True, time.time()))
    else:
        from pscluster.cli.describe import summary

        print_answer(summary(found, time.time()))


@click.command("describe", cls=Verb)
@click.argument("job")
@output_option("text", "json", "yaml")
@pass_session
def describe(session: Session, job: str, form: str) -> None:
    """Show all details of JOB.

    These are its conditions, plan, transports, checks, events, and the last error with its traceback.
    """
    with session.connect() as cluster:
        found = cluster.job(job)
    if form in DOCUMENTS:
        print_document("Job", found.to_dict(), form)
        return
    from pscluster.cli.describe import description

    print_answer(description(found, time.time()))


@click.command("nodes", cls=Verb)
@click.option("--probe", is_flag=True, help="measure the network between nodes and how fast workers compute")
@click.option("--yes", is_flag=True, help="with --probe: also while jobs run, which it slows down")
@output_option()
@pass_session
def nodes(session: Session, probe: bool, yes: bool, form: str) -> None:
    """List the nodes of the cluster.

    With --probe, measure each connection that jobs may use (bandwidth both ways, round trip) and the devices of each
    worker, and name what is out of line with the rest. It takes a few seconds for each pair of nodes, and slows down
    jobs that run meanwhile.
    """
    if yes and not probe:
        raise click.UsageError("--yes belongs to --probe")
    if probe:
        from pscluster.cli import probing

        probing.probe(session, form, beside_jobs=yes)
        return
    with session.connect() as cluster:
        found = cluster.nodes()
    print_records("Node", found, form, "node_id", nodes_table, "no nodes have registered")


@click.command("health", cls=Verb)
@output_option("table", "json", "yaml")
@pass_session
def health(session: Session, form: str) -> None:
    """Check the master and all nodes; exit 5 when any is unhealthy."""
    with session.connect() as cluster:
        found = cluster.health()
    if form in DOCUMENTS:
        print_document("Health", {"address": session.located().address, **found.to_dict()}, form)
    elif found.healthy:
        print_answer("healthy")
    if not found.healthy:
        raise UnhealthyError(
            "; ".join(found.problems) or "the master reports the cluster as unhealthy",
            action="see `psctl nodes`; restart the daemon of a lost node (`psctl up` on this machine), "
            "or remove the node with `psctl drain NODE`",
        )


def jobs_table(jobs: list[Job], wide: bool, now_s: float) -> str:
    rows = []
    for job in jobs:
        row = [job.job_id, job.state, steps(job), fmt.number(job.loss), fmt.age(job.created_s, now_s)]
        if wide:
            workers = f"{job.workers_active}/{job.workers_wanted}"
            numerics = job.numerics.split()[0].strip(":,;") if job.numerics else "-"
            row += [workers, fmt.count(job.samples_per_s), str(job.generation), numerics, job.reason]
        rows.append(row)
    return fmt.table(_JOB_COLUMNS_WIDE if wide else _JOB_COLUMNS, rows)


def steps(job: Job) -> str:
    """Committed step and the last one: "120/500", "120" while that is unknown."""
    return f"{job.step}/{job.final_step}" if job.final_step else str(job.step)


def nodes_table(found: list[Node], wide: bool, now_s: float) -> str:
    rows = []
    for node in found:
        used = f"{len(node.processes)}/{node.slots}"
        beat = fmt.age(node.last_beat_s, now_s)
        ready = ("yes" if node.ready else "no") + (f",{node.drain}" if node.drain else "")
        row = [node.node_id, node.role, ready, used, beat, node.version]
        if wide:
            devices = ",".join(node.devices) or "cpu"
            memory = fmt.size(node.memory_bytes)
            row += [node.hostname, str(node.cpu_cores), memory, devices, node.isolation or "-", node.metrics_address]
            row.append(node.incarnation[:8])
        rows.append(row)
    return fmt.table(_NODE_COLUMNS_WIDE if wide else _NODE_COLUMNS, rows)


@click.command("version", cls=Verb)
@click.option("--client", is_flag=True, help="do not contact the master")
@output_option("table", "json", "yaml")
@pass_session
def version(session: Session, client: bool, form: str) -> None:
    """Print the versions of psctl and, if it answers, the master."""
    body: dict[str, Any] = {"client": __version__, "address": None, "master": None, "protocol": None}
    if not client:
        body.update(address=session.located().address)
        try:
            with session.connect() as cluster:
                health = cluster.health()
            body.update(master=health.version, protocol=health.protocol)
        except PsError as error:
            print_info(f"no master: {error.cause}")
    if form != "table":
        print_document("Version", body, form)
        return
    print_answer(f"psctl {__version__}")
    if body["master"]:
        print_answer(f"psmaster {body['master']} (protocol {body['protocol']})")


COMMANDS = (list_jobs, status, describe, nodes, health, version)
