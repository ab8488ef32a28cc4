"""psctl: all verbs in one group."""

from __future__ import annotations

import os

import click

from pscluster import __version__
from pscluster.cli import access, contexts, control, logs, network, results, settings, show, submission, updown
from pscluster.cli.doctor import verb as doctor
from pscluster.cli.session import Psctl


@click.group(
    cls=Psctl,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
    epilog=(
        "Exit codes: 0 done, 1 other, 2 usage, 3 unreachable, 4 not authorised, 5 unhealthy, 100 job failed, "
        "101 not finished in time, 102 not found, 103 stopped, 130 interrupted."
    ),
)
@click.version_option(__version__, prog_name="psctl", message="%(prog)s %(version)s")
def psctl() -> None:
    """Train models on a pscluster: start a cluster, submit jobs, watch them, use the trained models.

    Without --context and --address it uses the context that `psctl context use` selected, else the local cluster of
    --state-dir (default ~/.local/state/pscluster), which `psctl up` starts.
    """


for _module in (updown, submission, show, logs, control, results, contexts, access, network, doctor, settings):
    for _command in _module.COMMANDS:
        psctl.add_command(_command)


def main() -> None:
    # psctl itself reports a restarting master; grpc's own log would tear the progress bar.
    os.environ.setdefault("GRPC_VERBOSITY", "NONE")
    psctl.main(prog_name="psctl")
