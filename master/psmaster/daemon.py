"""The process psmaster: flags, settings, exit code."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path


def main() -> None:
    """Entry point of `psmaster`."""
    sys.exit(run(sys.argv[1:]))


def run(argv: Sequence[str]) -> int:
    """Be the master that `argv` describes; returns the exit code. Must be called on the main thread.

    What keeps it from starting is one line on stderr.
    """
    arguments = vars(parse(argv))
    # Read when grpc is imported: its core tells every broken connection, which we do ourselves.
    os.environ.setdefault("GRPC_VERBOSITY", "ERROR")
    from pscluster.errors import InternalError, PsError  # late, so that --help answers at once

    try:
        return _serve(arguments)
    except PsError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    except OSError as error:
        failure = InternalError(f"the master failed: {error}")
        print(failure, file=sys.stderr)
        return failure.exit_code


def _serve(arguments: dict[str, object]) -> int:
    import asyncio

    import pscluster
    from pscluster import telemetry
    from pscluster.settings import resolve
    from psmaster.server import serve
    from psmaster.settings import MasterSettings

    file = arguments.pop("config")
    settings = resolve(MasterSettings, arguments, os.environ, file if isinstance(file, Path) else None)
    os.umask(0o077)  # state, sockets and tokens are this user's alone
    telemetry.configure_logging("master", settings.log_level)
    telemetry.record_build("master", pscluster.__version__)
    asyncio.run(serve(settings))
    return 0


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """The flags, None where not given; argparse exits with 2 on a wrong one."""
    parser = argparse.ArgumentParser(
        prog="psmaster",
        description="Keeps the cluster's jobs: admits, plans, recovers. Settings come from flags, PS_* environment "
        "variables and a TOML file, in this order.",
    )
    parser.add_argument("--state-dir", type=Path, metavar="DIR", help="what the master keeps on disk")
    parser.add_argument(
        "--listen", action="append", metavar="ADDR", help="unix:/path or host:port (default 127.0.0.1:7070); repeatable"
    )
    parser.add_argument("--metrics-listen", metavar="HOST:PORT", help="where to serve /metrics (default 127.0.0.1:0)")
    parser.add_argument("--token-file", type=Path, metavar="FILE", help="the cluster's token, mode 0600")
    parser.add_argument("--suspicion-s", type=float, metavar="S", help="silence that means a node is dead (default 3)")
    parser.add_argument("--log-level", metavar="LEVEL", help="debug, info, warning, error or critical (default info)")
    parser.add_argument("--config", type=Path, metavar="FILE", help="TOML file of the same settings")
    return parser.parse_args(argv)


if __name__ == "__main__":
    main()
