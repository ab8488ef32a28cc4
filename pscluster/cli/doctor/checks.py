"""The checks of `psctl doctor`: pure functions from facts to findings."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from typing import Any, Literal

from pscluster.address import is_loopback
from pscluster.cli import formatting as fmt
from pscluster.client.records import Health, Node
from pscluster.errors import PsError

Level = Literal["ok", "warn", "fail"]

CLOCK_WARN_S, CLOCK_FAIL_S = 2.0, 120.0
"""Logs and ages mislead beyond the first; a certificate may be refused as not valid yet beyond a few minutes."""
DISK_WARN, DISK_FAIL = 0.10, 0.02
DISK_ENOUGH_BYTES, DISK_FAIL_BYTES = 100 << 30, 1 << 30
_ISOLATED = {
    "uid": "user code runs as another user",
    "landlock": "Landlock keeps user code from the node's key",
    "namespace": "a mount namespace keeps user code from the node's key",
}


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One line for a person. `action`: what to do; empty if it is ok."""

    check: str
    level: Level
    text: str
    action: str = ""

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True, kw_only=True)
class Disk:
    """The file system that holds `path`, for `purpose`."""

    path: str
    purpose: str
    free_bytes: int
    total_bytes: int


@dataclass(frozen=True, kw_only=True)
class CertificateFact:
    """A certificate of `owner`, and when it should have been renewed; None: it is not renewed."""

    owner: str
    expires_s: float
    renew_at_s: float | None


@dataclass(frozen=True, kw_only=True)
class Dialled:
    """An address of `what` that was dialled from here, and why it could not be reached."""

    what: str
    address: str
    error: PsError | None


@dataclass(frozen=True, kw_only=True)
class Facts:
    """What was gathered, on this host and from the master. `health`: None when `failure` kept it from being asked.
    `clock_offset_s`: the master's clock less this one's, known to within half of `round_trip_s`. `unread`: what could
    not be gathered, each with its reason. `gpus_here`: how many the driver of this host lists."""

    now_s: float
    version: str
    hostname: str
    address: str
    health: Health | None = None
    failure: PsError | None = None
    clock_offset_s: float | None = None
    round_trip_s: float = 0.0
    nodes: tuple[Node, ...] = ()
    disks: tuple[Disk, ...] = ()
    certificates: tuple[CertificateFact, ...] = ()
    dialled: tuple[Dialled, ...] = ()
    gpus_here: int = 0
    unread: tuple[tuple[str, str], ...] = ()


def findings(facts: Facts) -> list[Finding]:
    """Every check in turn, the master's first."""
    checks = (master, versions, clock, heartbeats, addresses, certificates, isolation, devices, disks, unread)
    return [finding for check in checks for finding in check(facts)]


def master(facts: Facts) -> Iterator[Finding]:
    if facts.failure is not None:
        yield Finding(check="master", level="fail", text=facts.failure.cause, action=facts.failure.action)
    elif facts.health is not None:
        how = "certificates" if facts.health.secured else "a token, on this machine alone"
        yield Finding(check="master", level="ok", text=f"answers at {facts.address}; members show {how}")


def versions(facts: Facts) -> Iterator[Finding]:
    if facts.health is None:
        return
    theirs = {"master": facts.health.version, **{node.node_id: node.version for node in facts.nodes}}
    others = {name: version for name, version in theirs.items() if version != facts.version}
    if not others:
        yield Finding(check="versions", level="ok", text=f"psctl, master and {_nodes(facts.nodes)}: {facts.version}")
        return
    named = ", ".join(f"{name} {version or 'unknown'}" for name, version in others.items())
    yield Finding(
        check="versions", level="warn", text=f"psctl is {facts.version}, but {named}",
        action="install the same version everywhere, the master's host first",
    )  # fmt: skip


def clock(facts: Facts) -> Iterator[Finding]:
    if facts.clock_offset_s is None:
        return
    certain_s = max(0.0, abs(facts.clock_offset_s) - facts.round_trip_s / 2)
    level: Level = "fail" if certain_s > CLOCK_FAIL_S else "warn" if certain_s > CLOCK_WARN_S else "ok"
    where = "ahead of" if facts.clock_offset_s > 0 else "behind"
    text = f"the master's clock is {abs(facts.clock_offset_s):.1f} s {where} this host's"
    action = "run a time service (chrony, systemd-timesyncd) on both hosts" if level != "ok" else ""
    yield Finding(check="clock", level=level, text=text, action=action)


def heartbeats(facts: Facts) -> Iterator[Finding]:
    if facts.health is None:
        return
    if not facts.nodes:
        action = "start psworker and psserver, with a token of `psctl token create`, or `psctl up` on this machine"
        yield Finding(check="nodes", level="warn", text="no nodes have registered", action=action)
        return
    silent = [node for node in facts.nodes if not node.ready]
    for node in silent:
        since = f"for {fmt.age(node.last_beat_s, facts.now_s)}" if node.last_beat_s else "since the master started"
        yield Finding(
            check="nodes", level="fail", text=f"{node.node_id} on {node.hostname} has sent no heartbeat {since}",
            action="look at its log there and restart it, or remove it: psctl drain " + node.node_id,
        )  # fmt: skip
    if not silent:
        yield Finding(check="nodes", level="ok", text=f"heartbeats come from {_nodes(facts.nodes)}")


def addresses(facts: Facts) -> Iterator[Finding]:
    """What was dialled from here, and what no other host can dial."""
    for dialled in facts.dialled:
        if dialled.error is not None:
            error = dialled.error
            yield Finding(check="addresses", level="fail", text=error.cause, action=error.action)
    for node in facts.nodes:
        if node.hostname != facts.hostname and is_loopback(node.depot_address.rpartition(":")[0]):
            yield Finding(
                check="addresses", level="fail",
                text=f"{node.node_id} on {node.hostname} advertises {node.depot_address}, which no other host reaches",
                action=f"start it with --advertise, or --interface, on {node.hostname}",
            )  # fmt: skip
    reached = [dialled for dialled in facts.dialled if dialled.error is None]
    if reached:
        named = ", ".join(f"{dialled.what} at {dialled.address}" for dialled in reached)
        yield Finding(check="addresses", level="ok", text=f"reached from here: {named}")


def certificates(facts: Facts) -> Iterator[Finding]:
    """A certificate that is past its renewal is a member that cannot renew, or does not run."""
    soonest: CertificateFact | None = None
    for held in facts.certificates:
        left_s = held.expires_s - facts.now_s
        if left_s <= 0:
            yield Finding(
                check="certificates", level="fail",
                text=f"that of {held.owner} expired {fmt.duration(-left_s)} ago",
                action="join again with a new token: psctl token create",
            )  # fmt: skip
        elif held.renew_at_s is not None and facts.now_s > held.renew_at_s + (held.expires_s - held.renew_at_s) / 4:
            yield Finding(
                check="certificates", level="warn",
                text=f"that of {held.owner} expires in {fmt.duration(left_s)} and has not been renewed",
                action="check that it runs and reaches the master, or revoke it if it is gone: psctl certs revoke",
            )  # fmt: skip
        else:
            soonest = min(soonest or held, held, key=_expires_s)
    if soonest is not None:
        left = fmt.duration(soonest.expires_s - facts.now_s)
        yield Finding(
            check="certificates", level="ok", text=f"the next to expire is that of {soonest.owner}: in {left}"
        )


def isolation(facts: Facts) -> Iterator[Finding]:
    """Whether user code can read its node's key. Servers run no user code; without certificates there are no keys."""
    if facts.health is None or not facts.health.secured:
        return
    for mode, nodes in _by([node for node in facts.nodes if node.role == "worker"], "isolation").items():
        named = ", ".join(node.node_id for node in nodes)
        if mode in _ISOLATED:
            yield Finding(check="isolation", level="ok", text=f"{named}: {_ISOLATED[mode]}")
            continue
        text = "nothing keeps user code from the node's key" if mode == "none" else "how user code is kept is not known"
        action = "run the agent as root, or on a kernel with Landlock (Linux 5.19): see docs/security.md"
        yield Finding(check="isolation", level="warn", text=f"{named}: {text}", action=action)


def devices(facts: Facts) -> Iterator[Finding]:
    workers = [node for node in facts.nodes if node.role == "worker"]
    here = [node for node in workers if node.hostname == facts.hostname]
    if facts.gpus_here and here and not any(node.devices for node in here):
        yield Finding(
            check="devices", level="warn",
            text=f"this host's driver lists {facts.gpus_here} GPUs, but {', '.join(n.node_id for n in here)} use none",
            action="check CUDA_VISIBLE_DEVICES of psworker, and that torch there is a CUDA build",
        )  # fmt: skip
    for node in workers:
        if node.devices:
            yield Finding(check="devices", level="ok", text=f"{node.node_id}: {', '.join(node.devices)}")
    if workers and not any(node.devices for node in workers):
        yield Finding(check="devices", level="ok", text=f"no worker of {len(workers)} has a GPU: they compute on CPUs")


def disks(facts: Facts) -> Iterator[Finding]:
    for disk in facts.disks:
        share = disk.free_bytes / max(1, disk.total_bytes)
        level: Level = "ok"
        if share < DISK_FAIL or disk.free_bytes < DISK_FAIL_BYTES:
            level = "fail"
        elif share < DISK_WARN and disk.free_bytes < DISK_ENOUGH_BYTES:
            level = "warn"
        text = f"{fmt.size(disk.free_bytes)} of {fmt.size(disk.total_bytes)} are free for {disk.purpose} in {disk.path}"
        action = "free space: `psctl delete` removes ended jobs with their snapshots" if level != "ok" else ""
        yield Finding(check="disk", level=level, text=text, action=action)


def unread(facts: Facts) -> Iterator[Finding]:
    for what, why in facts.unread:
        yield Finding(check=what, level="warn", text=f"not checked: {why}", action="run psctl doctor as an admin")


def _expires_s(held: CertificateFact) -> float:
    return held.expires_s


def _by(nodes: Iterable[Node], field: str) -> dict[str, list[Node]]:
    found: dict[str, list[Node]] = {}
    for node in nodes:
        found.setdefault(getattr(node, field), []).append(node)
    return found


def _nodes(nodes: Iterable[Node]) -> str:
    count = len(list(nodes))
    return f"{count} node{'s' * (count != 1)}"
