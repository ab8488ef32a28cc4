"""The process psmaster: flags, settings, exit code."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any


def main() -> None:
    """Entry point of `psmaster`."""
    sys.exit(run(sys.argv[1:]))


def run(argv: Sequence[str]) -> int:
    """Be the master that `argv` describes; returns the exit code. On the main thread. What keeps it from starting is
    one line on stderr."""
    rebuilds = list(argv[:1]) == ["rebuild"]
    arguments = vars(parse_rebuild(argv[1:]) if rebuilds else parse(argv))
    # Read when grpc is imported: its core logs every broken connection, which we do ourselves.
    os.environ.setdefault("GRPC_VERBOSITY", "ERROR")
    from pscluster.errors import InternalError, PsError  # late, so that --help answers at once

    try:
        return _rebuild(arguments) if rebuilds else _serve(arguments)
    except PsError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    except OSError as error:
        failure = InternalError(f"the master failed: {error}")
        print(failure, file=sys.stderr)
        return failure.exit_code


def _serve(arguments: dict[str, Any]) -> int:
    import asyncio

    import pscluster
    from pscluster import settings_report, telemetry
    from pscluster.settings import resolve
    from psmaster.server import MasterSettings, serve

    file, shows = arguments.pop("config"), arguments.pop("show_settings")
    if shows:
        print(settings_report.to_json(MasterSettings, arguments, os.environ, file))
        return 0
    settings = resolve(MasterSettings, arguments, os.environ, file)
    os.umask(0o077)  # state, sockets and tokens are this user's alone
    telemetry.configure_logging("master", settings.log_level)
    telemetry.record_build("master", pscluster.__version__)
    asyncio.run(serve(settings))
    return 0


def _rebuild(arguments: dict[str, Any]) -> int:
    import time

    from pscluster.settings import resolve
    from psmaster.control.security import CERTIFICATES
    from psmaster.server import claim
    from psmaster.storage import rebuild
    from psmaster.storage.rebuild import RebuildSettings

    settings = resolve(RebuildSettings, arguments, os.environ)
    os.umask(0o077)
    with claim(settings.state_dir):
        found = rebuild.rebuild(settings.state_dir, settings.store, time.time())
    print(rebuild.report(found))
    if (settings.state_dir / CERTIFICATES).is_dir():
        print("revocations are not in snapshots: repeat `psctl certs revoke`; join tokens must be made again")
    return 0


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """The flags, None where not given; argparse exits with 2 on a wrong one."""
    parser = argparse.ArgumentParser(
        prog="psmaster",
        description="Keeps the cluster's jobs: admits, plans, recovers. Settings come from flags, PS_* environment "
        "variables and a TOML file, in this order. `psmaster rebuild` makes a lost or damaged database again.",
    )
    parser.add_argument("--state-dir", type=Path, metavar="DIR", help="what the master keeps on disk")
    parser.add_argument(
        "--listen",
        action="append",
        metavar="ADDR",
        help="unix:/path or host:port (default 127.0.0.1:7070), [::]:7070 for IPv6; repeatable. Other hosts reach the "
        "master only if the state directory has certificates: psctl certs init",
    )
    parser.add_argument("--join-listen", metavar="HOST:PORT", help="where new members join (default: the next port)")
    parser.add_argument(
        "--certificate-lifetime-s", type=float, metavar="S", help="of nodes and users (default 604800, 7 days)"
    )
    parser.add_argument(
        "--data-security",
        choices=("tls", "plain"),
        help="of data connections between hosts; plain: only their handshake is encrypted (default tls)",
    )
    parser.add_argument("--metrics-listen", metavar="HOST:PORT", help="where to serve /metrics (default 127.0.0.1:0)")
    parser.add_argument(
        "--token-file",
        type=Path,
        metavar="FILE",
        help="the token for Unix sockets, mode 0600 (default: in --state-dir)",
    )
    parser.add_argument("--suspicion-s", type=float, metavar="S", help="silence that means a node is dead (default 3)")
    parser.add_argument("--log-level", metavar="LEVEL", help="debug, info, warning, error or critical (default info)")
    parser.add_argument("--config", type=Path, metavar="FILE", help="TOML file of the same settings")
    parser.add_argument(
        "--show-settings", action="store_true", help="print the settings and where each comes from, as JSON, and exit"
    )
    return parser.parse_args(argv)


def parse_rebuild(argv: Sequence[str]) -> argparse.Namespace:
    """The flags of `psmaster rebuild`, None where not given."""
    parser = argparse.ArgumentParser(
        prog="psmaster rebuild",
        description="Makes the master's database again from the snapshots, while no master runs. Jobs that had not "
        "ended come back stopped; `psctl resume` goes on with them. A damaged database is kept beside the new one.",
    )
    parser.add_argument("--state-dir", type=Path, metavar="DIR", help="the master's, whose database is lost")
    parser.add_argument(
        "--store", action="append", metavar="STORE", help="a durability.store that jobs used; repeatable"
    )
    return parser.parse_args(argv)


if __name__ == "__main__":
    main()
