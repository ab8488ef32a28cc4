"""What a history is about, drawn from its seed."""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from typing import get_args

from pscluster.job.spec import DurabilitySection
from tests.fault.simulation import model
from tests.fault.simulation.faults import KINDS

TIERS = get_args(DurabilitySection.model_fields["tier"].annotation)  # all that there are


@dataclass(frozen=True, kw_only=True)
class Setting:
    """What one seed is about. `faults`: the kinds that occur in it, each with its weight; `every_s`: how often one
    strikes, on average, for `storm_s`."""

    seed: int = 0
    workers: int = 1
    servers: int = 1
    partitions: int = 1
    shards: int = 2
    steps: int = model.MOST_STEPS
    snapshot_every: int = 2
    evaluate_every: int | None = None
    tier: str = "snapshot"
    audit_share: float = 0.0
    jobs: int = 1
    compute_s: float = 0.01
    latency_s: float = 0.001
    unruly: float = 0.0
    sqlite: bool = False
    storm_s: float = 0.0
    every_s: float = 1.0
    liveness_s: float = 60.0  # in which jobs end once nothing goes wrong any more
    faults: dict[str, float] = field(default_factory=dict)

    @classmethod
    def of(cls, seed: int) -> Setting:
        """Drawn from the seed. Few kinds of faults at a time: among all of them, none goes deep."""
        draw = random.Random(f"setting of {seed}")
        workers, partitions, shards = draw.choice((1, 2, 2, 3)), draw.choice((1, 2, 2, 3)), draw.choice((2, 3, 4, 5))
        steps, storm_s = draw.randint(3, model.MOST_STEPS), draw.choice((2.0, 4.0, 8.0))
        lasts_s = storm_s * draw.choice((0.1, 0.5, 0.5, 1.0, 1.0))  # the job, if it were left alone
        servers, tier = draw.choice((max(1, (partitions + 1) // 2), partitions)), draw.choice(TIERS)
        kinds = draw.sample(KINDS, draw.choice((1, 2, 3, 5, len(KINDS))))
        return cls(
            seed=seed,
            workers=workers,
            servers=servers if tier == "snapshot" else partitions + 1,
            partitions=partitions,
            shards=shards,
            steps=steps,
            snapshot_every=draw.choice((1, 2, 2, 3)),
            evaluate_every=draw.choice((None, None, 2, 3)),
            tier=tier,
            audit_share=1.0 if seed % 3 == 2 else 0.0,
            jobs=draw.choice((1, 1, 1, 1, 2)),
            compute_s=lasts_s * min(workers, shards) / (steps * shards),
            latency_s=draw.choice((0.0002, 0.002, 0.02)),
            unruly=draw.choice((0.0, 0.05, 0.3)),
            sqlite=seed % 25 == 0,
            storm_s=storm_s,
            every_s=draw.choice((0.2, 0.5, 1.0, 2.0)),
            faults={kind: draw.choice((1.0, 3.0)) for kind in kinds},
        )
