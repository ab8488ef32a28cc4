"""What ties a partition to its standby, as pure functions: which votes wait for it, and when the pair may be relied on.

The master has a standby take over without going back only if it was told that the two are in sync. So the tie comes
before the word: as soon as the standby holds a state, the partition votes on nothing that the standby has not
acknowledged; it tells the master once all it ever voted on is acknowledged. Only a plan unties them: one that names
another standby or none, or has everybody go back. Hence what the master believes is true, however late it hears.
(The same order as a replica's way into the in-sync set of Kafka's logs.)
"""

from __future__ import annotations

from dataclasses import dataclass, replace


@dataclass(frozen=True, kw_only=True)
class InSyncState:
    """`attempt`: the standby that the plan names; 0: none. `reach`: the version that it can make of what it
    acknowledged; -1: it holds nothing. `is_bound`: votes wait for it. `is_told`: the master knows it to be in sync."""

    attempt: int = 0
    reach: int = -1
    is_bound: bool = False
    is_told: bool = False


def adopt(bond: InSyncState, attempt: int, *, restored: bool) -> InSyncState:
    """A plan names its standby: another one, or another timeline, begins with nothing."""
    return bond if attempt == bond.attempt and not restored else InSyncState(attempt=attempt)


def may_vote(bond: InSyncState, step: int) -> bool:
    """Whether the standby does not keep a complete step from being voted on."""
    return not bond.is_bound or bond.reach > step


def acknowledge(bond: InSyncState, reach: int, promised: int) -> tuple[InSyncState, bool]:
    """The standby can make version `reach`: the bond, and whether the master is to be told now that they are in sync.

    `promised`: the version that the votes cast so far may lead to."""
    reach = max(bond.reach, reach)
    tells = not bond.is_told and reach >= promised
    return replace(bond, reach=reach, is_bound=True, is_told=bond.is_told or tells), tells


def begin(bond: InSyncState) -> InSyncState | None:
    """A standby needs the whole state: the bond to begin again with. None: never, for the master relies on the pair."""
    return None if bond.is_told else InSyncState(attempt=bond.attempt)


def resumes(bond: InSyncState, reach: int, applied: int, step: int) -> bool:
    """Whether a standby that comes back over a new connection can be told what is missing, rather than everything.

    It can make version `reach` and has made `applied`; the partition's open step is `step`. At most the decision on the
    step before is missing, which the partition still has, and the sums of the open one."""
    return bond.is_bound and reach in (step, step + 1) and applied >= step - 1
