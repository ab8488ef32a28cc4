"""From what the master wants and what there is to what to do. Pure."""

from __future__ import annotations

from collections.abc import Container, Iterable, Mapping
from dataclasses import dataclass

from pscluster.v1.plan_pb2 import Plan, ProcessSpec


@dataclass(frozen=True, kw_only=True)
class Actions:
    """What an agent does to become what the assignment says; the three lists name disjoint processes."""

    start: tuple[ProcessSpec, ...] = ()
    stop: tuple[str, ...] = ()
    forward: tuple[tuple[str, Plan], ...] = ()


def reconcile(desired: Iterable[ProcessSpec], running: Mapping[str, Plan | None], ever_ran: Container[str]) -> Actions:
    """The actions that make `running` what is `desired`.

    `running` maps the process ids that live (or are being started) to the newest plan handed to each, None
    before the first. `ever_ran` holds every id started here before, whatever became of it: none is started
    twice, because a new attempt is the master's to decide. Applying the actions and asking again gives none.
    """
    wanted: dict[str, ProcessSpec] = {}
    for spec in desired:
        wanted.setdefault(spec.process_id, spec)
    return Actions(
        start=tuple(spec for id_, spec in wanted.items() if id_ not in running and id_ not in ever_ran),
        stop=tuple(id_ for id_ in running if id_ not in wanted),
        forward=tuple(
            (id_, wanted[id_].plan) for id_, held in running.items() if id_ in wanted and _is_news(wanted[id_], held)
        ),
    )


def _is_news(spec: ProcessSpec, held: Plan | None) -> bool:
    """A plan never goes back to an older generation: a late message must not undo a newer one."""
    if not spec.HasField("plan"):
        return False
    return held is None or (spec.plan.generation >= held.generation and spec.plan != held)
