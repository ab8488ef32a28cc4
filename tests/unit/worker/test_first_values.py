"""First values are made for partitions that hold none, and never stay where a version was held."""

from __future__ import annotations

from harness.played import Network, played_plan, played_spec
from harness.played_job import LAYOUT, PlayedTrainer
from pscluster.wire.protocol import Directive, Welcome
from psworker.trainer.exchange import Exchange
from psworker.trainer.work import find_work


def made() -> Exchange:
    """The exchange of the only trainer, which has a plan."""
    exchange = PlayedTrainer(Network(), played_spec(2), 0).exchange
    exchange.adopt(played_plan(LAYOUT, {0: [0, 1]}))
    return exchange


def test_once_the_coordinator_speaks_no_partition_waits_for_first_values() -> None:
    """Else a trainer that did not make them would make them when the coordinator is another one, over what it computes
    on."""
    exchange = made()
    exchange.welcomed(0, Welcome(granted_bytes=0, open_bucket=-1, needs_values=True, num_lanes=0))
    assert exchange._plan is not None
    work = find_work(exchange._plan, None, None, exchange._needs_values, 0, {})
    assert work is not None and work.action == "initialise"

    exchange._direct(Directive(1, 1, "train"))

    assert find_work(exchange._plan, None, None, exchange._needs_values, 0, {}) is None


def test_who_makes_first_values_again_holds_no_version() -> None:
    exchange = made()
    landing = exchange._landing
    landing.want(2)
    landing._missing.clear()
    assert landing.want(2) == "held"

    exchange.forget_values()

    assert landing.want(2) == "missing"
