"""First values are made for partitions that hold none, and never stay where a version was held."""

from __future__ import annotations

from harness.played import Network, played_plan, played_spec
from harness.played_job import LAYOUT
from harness.trained_job import PlayedTrainer
from pscluster.wire.protocol import Directive
from psworker.trainer.exchange import Exchange


def made() -> Exchange:
    """The exchange of the only trainer, which has a plan."""
    exchange = PlayedTrainer(Network(), played_spec(2), 0).exchange
    exchange.adopt(played_plan(LAYOUT, {0: [0, 1]}))
    return exchange


def test_after_a_directive_no_partition_waits_for_first_values() -> None:
    """Else a trainer that did not make them would make them when the coordinator is another one, over what it computes
    on."""
    exchange = made()
    exchange.agenda.welcomed(0, needs_values=True)
    work = exchange.agenda.find_work({})
    assert work is not None and work.action == "initialise"

    exchange._direct(Directive(1, 1, "train"))

    exchange.agenda.directive = None  # as another coordinator's plan has it
    assert exchange.agenda.find_work({}) is None


def test_a_trainer_that_makes_first_values_again_holds_no_version() -> None:
    exchange = made()
    landing = exchange.values.landing
    landing.want(2)
    landing._missing.clear()
    assert landing.want(2) == "held"

    exchange.forget_values()

    assert landing.want(2) == "missing"
