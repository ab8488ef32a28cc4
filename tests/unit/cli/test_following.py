"""Following a job: what is told at first sight, and what the bar shows at which width."""

from __future__ import annotations

import io
from typing import Any

import pytest
from rich.console import Console

from pscluster.cli.following import BarView, Narrator
from pscluster.client import Job
from pscluster.client.records import job_of
from pscluster.v1 import jobs_pb2
from tests.unit.cli.fake_master import job_message

LACKING = "trains on 1 worker; hears nothing of trainer-0 on worker-0; no worker is free for 1 more"


def running(**changes: Any) -> Job:
    """A job that lacks a worker, and says so at length."""
    return job_of(job_message(**{"workers_active": 1, "reason": LACKING, "name": "lm-long", **changes}))


def shown(job: Job, width: int) -> str:
    """The bar's line on a terminal of this width."""
    console = Console(width=width, file=io.StringIO(), force_terminal=True, color_system=None)
    view = BarView(console)
    view.update(job)
    with console.capture() as capture:
        console.print(view.progress)
    (line,) = capture.get().splitlines()
    return line.rstrip()


@pytest.mark.parametrize("width", [80, 100, 150])
def test_the_bar_keeps_name_and_progress_when_a_worker_is_missing(width: int) -> None:
    line = shown(running(), width)
    assert line.startswith("lm-long \u2501")
    assert line.endswith("step 20/100  loss 2.5000  8192 tokens/s  20s left  1/2 workers")
    assert 4 <= line.index("step") - len("lm-long  ") <= 28, "the bar's columns"


def test_where_the_bar_cannot_shrink_further_the_text_says_less_and_the_name_stays() -> None:
    name = "a-language-model-of-some-size"
    line = shown(running(name=name), 80)
    assert line.startswith(name + " \u2501\u2501")
    assert line.endswith("step 20/100  loss 2.5000  1/2 workers")
    narrow = shown(running(name=name), 50)
    assert narrow.startswith(name + " \u2501")
    assert narrow.endswith(" step 20/100")


def event(time_s: float, reason: str, *, warning: bool = True) -> jobs_pb2.Event:
    return jobs_pb2.Event(time_s=time_s, reason=reason, message=f"of {time_s:g}", warning=warning)


def warned(narrator: Narrator, now_s: float, *events: jobs_pb2.Event) -> list[str]:
    return [line for line in narrator.news(running(events=events), now_s) if line.startswith("!")]


def test_at_first_sight_warnings_of_an_earlier_life_are_not_told_and_older_ones_with_their_age() -> None:
    narrator = Narrator()
    events = [event(100, "TrainerLost"), event(200, "Resumed", warning=False)]
    events += [event(210, "Restored"), event(280, "Planned", warning=False), event(299, "TrainerLost")]
    assert warned(narrator, 300, *events) == ["! 1m30s ago: Restored: of 210", "! TrainerLost: of 299"]
    assert warned(narrator, 400, *events) == []
    assert warned(narrator, 400, *events, event(310, "NodeLeftOut")) == ["! NodeLeftOut: of 310"], "it is new to us"


def test_a_job_that_was_never_resumed_tells_all_its_warnings() -> None:
    assert warned(Narrator(), 161, event(100, "TrainerLost")) == ["! 1m1s ago: TrainerLost: of 100"]
