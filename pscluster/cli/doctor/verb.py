"""The verb doctor."""

from __future__ import annotations

import os

import click

from pscluster.cli.output import output_option, print_answer, print_document
from pscluster.cli.session import Session, Verb, pass_session
from pscluster.errors import UnhealthyError

_COLOURS = {"ok": "green", "warn": "yellow", "fail": "red"}


@click.command("doctor", cls=Verb)
@output_option("text", "json", "yaml")
@pass_session
def doctor(session: Session, form: str) -> None:
    """Check this host, the master and all nodes, and say what to do.

    Versions, clocks, heartbeats, addresses, certificates, isolation of user code, GPUs, disks. Exits 5 when a check
    fails.
    """
    from pscluster.cli.doctor.checks import findings
    from pscluster.cli.doctor.facts import gather

    found = findings(gather(session.located(), os.environ))
    if form == "text":
        width = max(len(finding.check) for finding in found)
        for finding in found:
            level = click.style(f"{finding.level:<4}", fg=_COLOURS[finding.level])
            action = f" -> {finding.action}" if finding.action else ""
            print_answer(f"{level}  {finding.check:<{width}}  {finding.text}{action}")
    else:
        print_document("Doctor", {"findings": [finding.to_dict() for finding in found]}, form)
    failed = [finding for finding in found if finding.level == "fail"]
    if failed:
        raise UnhealthyError(f"{len(failed)} of {len(found)} checks failed: {', '.join(f.check for f in failed)}")


COMMANDS = (doctor,)
