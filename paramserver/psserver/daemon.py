"""psserver: the agent of a server node. Imports no torch; its partitions do."""

from __future__ import annotations

import sys

from pscluster.agent.daemon import AgentRole, run

SERVER = AgentRole(name="server", module="psserver.partition", runs="partitions", default_slots=4, keeps_snapshots=True)


def main() -> None:
    sys.exit(run(SERVER, sys.argv[1:]))


if __name__ == "__main__":
    main()
