"""psworker: the agent of a worker node. Imports no torch; its trainers do."""

from __future__ import annotations

import sys

from pscluster.agent.daemon import AgentRole, run

WORKER = AgentRole(
    name="worker",
    module="psworker.trainer",
    runs="trainers",
    default_slots=1,
    one_per_device=True,
    runs_user_code=True,
    compute_probe="psworker.compute_probe",
)


def main() -> None:
    sys.exit(run(WORKER, sys.argv[1:]))


if __name__ == "__main__":
    main()
