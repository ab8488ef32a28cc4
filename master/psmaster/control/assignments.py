"""What one node is to run, as the state wants it."""

from __future__ import annotations

from psmaster.control.agent_stream import Assignment
from psmaster.control.security import ClusterSecurity
from psmaster.model.state import State
from psmaster.scheduling.reconcile import desired


def assignment_of(
    state: State, node_id: str, all_deleted: tuple[str, ...], security: ClusterSecurity, now_s: float
) -> Assignment:
    """A node's assignment, still without a revision. Its processes get their credentials here."""
    wanted = tuple(
        process for job in state.jobs.values() for process in desired(job) if process.placement.node_id == node_id
    )
    has_depot = bool(state.nodes[node_id].depot_address)
    nodes = state.nodes.values() if has_depot else ()
    issued = {own.process_id: security.process_credentials(own.process_id, now_s) for own in wanted}
    return Assignment(
        revision=0,
        processes=wanted,
        depots=tuple(sorted((other.node_id, other.depot_address) for other in nodes if other.depot_address)),
        deleted=all_deleted if has_depot else (),
        revoked=state.access.revoked_serials if has_depot else (),
        cluster_id=security.cluster_id,
        data_security=security.data_security if security.secured else "",
        credentials={process_id: held for process_id, held in issued.items() if held is not None},
    )
