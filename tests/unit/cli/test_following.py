"""Following a job: what the bar shows at which width."""

from __future__ import annotations

import io
from typing import Any

import pytest
from rich.console import Console

from pscluster.cli.following import BarView
from pscluster.client import Job
from pscluster.client.decode import job_of
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
