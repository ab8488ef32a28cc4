"""The process of an agent: flags, settings, signals, exit code. psworker and psserver differ only in their role."""

from __future__ import annotations

import argparse
import asyncio
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path

from pscluster.agent.cache import DEFAULT_BYTES
from pscluster.agent.confine import conceal_argument
from pscluster.agent.isolation import AUTO, CHOICES
from pscluster.errors import InternalError, PsError

LEAVE_S = 4.0
"""How long an agent that ends waits for the master to move its processes: a step or two, or a snapshot."""


@dataclass(frozen=True, kw_only=True)
class AgentRole:
    """`name` is "worker" or "server"; `module` is what its processes run; `runs` names them in the plural.
    `default_slots`: how many run at once; with `one_per_device`, one for each CUDA device if there are more.
    `compute_probe`: the module that measures a device; empty where nothing computes."""

    name: str
    module: str
    runs: str
    default_slots: int
    one_per_device: bool = False
    keeps_snapshots: bool = False
    runs_user_code: bool = False
    compute_probe: str = ""

    def slots(self, num_devices: int) -> int:
        """How many processes run at once on a node with this many CUDA devices, unless a setting says otherwise."""
        return max(self.default_slots, num_devices) if self.one_per_device else self.default_slots


@dataclass(frozen=True, kw_only=True)
class AgentSettings:
    """Settings of psworker and psserver. None, for `slots`: the role's default; for `node_id`: the host's short name;
    for `master` and `token_file`: not needed by a member, whose identity is in `state_dir`.

    `join`: a join token, or "@FILE" with one, for an agent that has no identity yet. `advertise`, `interface`: the
    address at which other hosts reach this one (see `pscluster.agent.addresses`). `data_ports`: where partitions and
    the depot listen; None: any port. `own_store`: a server's disk is not shared; it keeps snapshots of jobs without a
    durability.store there, and copies each to a second node. `cache_bytes`: how much a worker keeps of what tasks put
    into their cache_dir. `isolation`, `run_as`: how a worker keeps user code from its key, and whom a root agent's
    trainers run as; of a root server, whose trainers may connect to its sockets."""

    state_dir: Path
    node_id: str | None = None
    master: str | None = None
    token_file: Path | None = None
    join: str | None = field(default=None, repr=False)
    advertise: str = "auto"
    interface: str = ""
    data_ports: str | None = None
    metrics_listen: str = "127.0.0.1:0"
    slots: int | None = None
    own_store: bool = False
    depot_listen: str | None = None
    log_level: str = "info"
    cache_bytes: int = DEFAULT_BYTES
    isolation: str = AUTO
    run_as: str | None = None

    def __post_init__(self) -> None:
        if self.slots is not None and self.slots < 1:
            raise ValueError(f"slots must be at least 1, not {self.slots}")
        if self.cache_bytes < 0:
            raise ValueError(f"cache_bytes must not be negative, as {self.cache_bytes} is")
        if self.isolation not in CHOICES:
            raise ValueError(f"isolation must be one of {', '.join(CHOICES)}, not {self.isolation!r}")
        if self.node_id is not None and (not self.node_id or "/" in self.node_id):
            raise ValueError(f"node_id {self.node_id!r} is empty or contains a slash")
        if self.master is not None and ":" not in self.master:
            raise ValueError(f"master {self.master!r} is neither host:port nor unix:/path")

    @property
    def join_file(self) -> Path | None:
        """The file of the join token, if `join` names one."""
        return Path(self.join[1:]).expanduser() if self.join is not None and self.join.startswith("@") else None


def run(role: AgentRole, argv: Sequence[str]) -> int:
    """Run the agent that `argv` describes, on the main thread; returns the exit code. An error that keeps it from
    starting is printed on stderr, in one line."""
    arguments = vars(parse(role, argv))
    if arguments["join"]:
        conceal_argument(arguments["join"])
    # Read when grpc is imported: its core logs every broken connection, which we do ourselves.
    os.environ.setdefault("GRPC_VERBOSITY", "ERROR")
    try:
        # Late, so that --help answers without loading grpc.
        from pscluster import settings_report
        from pscluster.settings import environment_name, resolve

        file, shows = arguments.pop("config"), arguments.pop("show_settings")
        if shows:
            print(settings_report.to_json(AgentSettings, arguments, os.environ, file))
            return 0
        settings = resolve(AgentSettings, arguments, os.environ, file)
        own = {environment_name(field.name) for field in fields(AgentSettings)}
        inherited = {name: value for name, value in os.environ.items() if name not in own}
        return _run_agent(role, settings, inherited)
    except PsError as error:
        print(error, file=sys.stderr)
        return error.exit_code


def _run_agent(role: AgentRole, settings: AgentSettings, environ: Mapping[str, str]) -> int:
    import pscluster
    from pscluster import telemetry
    from pscluster.agent.child import GracePeriods
    from pscluster.agent.node import run_agent

    telemetry.configure_logging(role.name, settings.log_level)
    telemetry.record_build(role.name, pscluster.__version__)
    try:
        asyncio.run(run_agent(role, settings, environ, GracePeriods(leave_s=LEAVE_S)))
    except OSError as error:
        raise InternalError(f"the {role.name}'s agent failed: {error}") from error
    return 0


def parse(role: AgentRole, argv: Sequence[str]) -> argparse.Namespace:
    """The flags, None where not given; argparse exits with 2 on a wrong one."""
    program = f"ps{role.name}"
    parser = argparse.ArgumentParser(
        prog=program,
        description=f"Runs {role.runs} on this node, as the master assigns. Settings come from flags, "
        "PS_* environment variables and a TOML file, in this order.",
    )
    parser.add_argument("--state-dir", type=Path, metavar="DIR", help="where this agent keeps its files")
    _add_cluster_flags(parser)
    _add_network_flags(parser)
    default = f"one for each CUDA device, at least {role.default_slots}" if role.one_per_device else role.default_slots
    parser.add_argument("--slots", type=int, metavar="N", help=f"how many {role.runs} at once (default {default})")
    if role.keeps_snapshots:
        _add_store_flags(parser)
    else:
        parser.add_argument(
            "--isolation", choices=CHOICES, help="how user code is kept from this node's key (default auto)"
        )
        parser.add_argument(
            "--cache-bytes", type=int, metavar="N", help="how much to keep of what tasks put into cache_dir (10 GiB)"
        )
    parser.add_argument(
        "--run-as", metavar="USER", help="whom trainers run as, when this agent is root (default pscluster, or nobody)"
    )
    parser.add_argument("--metrics-listen", metavar="HOST:PORT", help="where to serve /metrics (default 127.0.0.1:0)")
    parser.add_argument("--log-level", metavar="LEVEL", help="debug, info, warning, error or critical (default info)")
    parser.add_argument("--config", type=Path, metavar="FILE", help="TOML file of the same settings")
    parser.add_argument(
        "--show-settings", action="store_true", help="print the settings and where each comes from, as JSON, and exit"
    )
    return parser.parse_args(argv)


def _add_cluster_flags(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("the cluster")
    group.add_argument("--node-id", metavar="NAME", help="unique in the cluster (default: this host's short name)")
    group.add_argument(
        "--join",
        metavar="TOKEN|@FILE",
        help="join token (psctl token create) for the first start; the identity is then kept in the state directory. "
        "What stands on a command line can be read by everybody on this host: prefer @FILE",
    )
    group.add_argument(
        "--master", metavar="ADDR", help="where the master listens: unix:/path or host:port (default: as it joined)"
    )
    group.add_argument(
        "--token-file", type=Path, metavar="FILE", help="on the master's host, in place of an identity: its token"
    )


def _add_network_flags(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("the network, in a cluster with certificates")
    group.add_argument(
        "--advertise",
        metavar="ADDRESS|auto",
        help="the address at which other hosts reach this one (default auto: from which it reaches the master)",
    )
    group.add_argument(
        "--interface", metavar="NAME|CIDR", help="take it from this interface or network: eth1, 10.0.0.0/24"
    )
    group.add_argument("--data-ports", metavar="A-B", help="listen for other nodes on these ports alone (default: any)")


def _add_store_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--own-store",
        action="store_true",
        default=None,
        help="no disk is shared with the master: keep snapshots on this node, each copied to a second server",
    )
    parser.add_argument(
        "--depot-listen",
        metavar="HOST:PORT",
        help="where to accept such copies (default: one of --data-ports; without certificates, 127.0.0.1:0)",
    )
