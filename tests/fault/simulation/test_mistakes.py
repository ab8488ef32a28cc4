"""The simulation can fail: each of these mistakes, planted in the product, breaks a promise within a few seeds."""

from __future__ import annotations

import re
import traceback
from collections.abc import Mapping
from contextlib import ExitStack
from typing import Any

import pytest

from tests.fault.simulation import standby_mistakes  # noqa: F401 - they are in the catalogue too
from tests.fault.simulation.invariants import Violation
from tests.fault.simulation.mistakes import MISTAKES
from tests.fault.simulation.simulation import reference_of, run_seed

WITHIN = 60  # seeds
# The seed to begin with, where the first 100 histories break nothing.
FIRST = {"votes_do_not_wait_for_the_standby": 100}
LIVENESS_S = 40.0  # more than any history takes that has no mistake in it

LASTS = "not over"  # a job does not end after the last fault
NO_SUMMARY = "no summary in (_decide|_decided|_record)$"
DIFFERS = "differ from the undisturbed run's"


@pytest.fixture(autouse=True, scope="module")
def _references() -> None:
    """What is right is known before anything is wrong."""
    for shards in (2, 3, 4, 5):
        reference_of(shards)


BREAKS = {
    "incomplete_snapshots_count": "is called complete without",
    "older_generations_count": "the catalogue takes",
    "answers_before_it_is_durable": "was used twice|acknowledged and lost",
    "a_shard_is_assigned_to_nobody": "(deals|assigns) the shards",
    "restarted_daemons_are_not_noticed": LASTS,
    "older_lives_displace_newer_ones": LASTS,
    "the_coordinator_forgets_its_last_decision": LASTS,
    "members_obey_any_decision": f"a decision on another step|two steps apart|{DIFFERS}|{NO_SUMMARY}",
    "a_vote_keeps_its_generation": LASTS,
    "the_coordinator_decides_without_the_last_vote": f"two steps apart|{DIFFERS}|{NO_SUMMARY}",
    "the_gate_takes_duplicates": f"shards count|{DIFFERS}",
    "gradients_of_any_step_are_taken": f"shards count|{DIFFERS}",
    "a_partition_goes_back_alone": f"{LASTS}|two steps apart|{DIFFERS}",
    "parts_are_reported_before_they_are_written": "a part that cannot be read|is counted and not there",
    "parts_are_not_synced": "a part that cannot be read|is counted and not there",
    "parts_that_count_are_deleted": "is counted and not there|a part that cannot be read",
    "snapshots_are_written_from_what_changes": f"the snapshot part .*{DIFFERS}",
    "values_of_an_older_restore_are_kept": f"computes step .* on another version|{LASTS}",
    "versions_are_asked_for_across_restores": f"computes step .* on another version|{LASTS}",
    "votes_do_not_wait_for_the_standby": f"computes step .* on another version|{DIFFERS}|{LASTS}|two steps apart",
    "a_standby_is_relied_on_before_it_is_in_sync": f"{DIFFERS}|{LASTS}|holds nothing|two steps apart|{NO_SUMMARY}",
    "a_standby_begins_without_the_update_counts": f"(ages|update counts) differ|{DIFFERS}",
    "draining_nodes_are_given_processes": "is to start on .*, which drains",
}


def broken_by(seed: int, changes: Mapping[str, Any]) -> str:
    """The promise that a history breaks, or the function of the coordinator that looks for a summary which it never
    received; empty: none. Any other error is raised."""
    try:
        run_seed(seed, **{"liveness_s": LIVENESS_S, "audit_share": 0.0, **changes})
    except Violation as violation:
        return str(violation)
    except KeyError as error:
        last = traceback.extract_tb(error.__traceback__)[-1]
        if last.filename.endswith("coordinator/coordinator.py"):
            return f"no summary in {last.name}"
        raise
    return ""


@pytest.mark.parametrize("name", MISTAKES)
@pytest.mark.slow
def test_a_planted_mistake_is_found(name: str) -> None:
    mistake = MISTAKES[name]
    with ExitStack() as stack:
        for planted in mistake.plant():
            stack.enter_context(planted)
        first = FIRST.get(name, 0)
        for seed in range(first, first + WITHIN):
            if broken := broken_by(seed, mistake.changes):
                assert re.search(BREAKS[name], broken), f"{name} broke another promise: {broken}"
                return
    pytest.fail(f"{name} broke no promise in {WITHIN} histories")
