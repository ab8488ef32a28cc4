"""A partition process: started by an agent, ends with it. `python -m psserver.partition`"""

from __future__ import annotations

import faulthandler
import json
import os
import secrets
import sys
from pathlib import Path

import torch

from pscluster.agent.link import ProcessLink
from pscluster.errors import AddressInUseError, PsError
from pscluster.job.spec import JobSpec, parse_spec
from pscluster.v1.plan_pb2 import PartitionReady, ProcessReport, ProcessSpec
from pscluster.wire.connection import ConnectionHandler
from pscluster.wire.reactor import Reactor
from pscluster.wire.tls import DataSecurity
from pscluster.wire.transport import check_congestion_control, tcp_address
from psserver.partition.process import PartitionService
from psserver.partition.step.optimizer import numerics_class
from psserver.partition.telemetry import PartitionCounters

HANDSHAKE_S = 10.0  # in which a caller must have sent its HELLO


def main() -> int:
    """Be the partition that the agent's start order describes; returns the exit code."""
    faulthandler.enable()
    link = ProcessLink.from_environment()
    spec = parse_spec(json.loads(link.start.spec_json))
    _settle_numerics()
    counters = PartitionCounters()
    security = DataSecurity.of(link.start)
    reactor = Reactor(counters.phase, spec.network.congestion_control, security)
    service = PartitionService(link, spec, reactor, counters, security)
    try:
        check_congestion_control(spec.network.congestion_control)
        wanted = _addresses(spec, link.start)
        addresses = [_listen(reactor, address, service.handler) for address in wanted]
        digest, detail = numerics_class()
        ready = PartitionReady(addresses=addresses, numerics_class=digest, numerics_detail=detail)
        link.report(ProcessReport(partition_ready=ready))
        service.start()
        reactor.run()
    except PsError as error:
        service.give_up(error)
    finally:
        service.close()
        reactor.close()
    return 1 if service.failed else 0


def _settle_numerics() -> None:
    """One intra-op thread, deterministic kernels. Before the first use of torch."""
    torch.set_num_threads(1)
    torch.set_num_interop_threads(1)
    torch.set_deterministic_debug_mode("error")  # the same switch, without importing the compiler (1.3 s)


def _addresses(spec: JobSpec, start: ProcessSpec) -> list[str]:
    """Where to listen: a Unix socket, TCP on the data host (empty: loopback) and a port of its range, or both, best
    first.

    Shared memory is arranged over the Unix socket. Its name is random: where it exists, it is this one. The directories
    of two hosts have the same paths."""
    path = Path(os.environ["PS_SOCKET_DIR"]) / f"data-{secrets.token_hex(4)}.sock"
    port = f"{start.data_port_first}-{start.data_port_last}" if start.data_port_first else 0
    choice = {"unix": f"unix:{path}", "tcp": tcp_address(start.data_host or "127.0.0.1", port)}
    wanted = "unix" if spec.network.transport == "shm" else spec.network.transport
    return [address for kind, address in choice.items() if wanted in ("auto", kind)]


def _listen(reactor: Reactor, address: str, handler: ConnectionHandler) -> str:
    """Listen at an address; returns the one that peers dial. Raises AddressInUseError."""
    try:
        return reactor.listen(address, handler, HANDSHAKE_S)
    except AddressInUseError as error:
        if address.startswith("tcp:"):
            error.action = "widen the --data-ports of this server"
        raise
    except OSError as error:
        raise AddressInUseError(f"cannot listen on {address}: {error.strerror}") from None


if __name__ == "__main__":
    sys.exit(main())
