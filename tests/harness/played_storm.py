"""What may befall a job with standbys, in any order: events by name, and storms of them by seed."""

from __future__ import annotations

import random

from harness.played_standbys import PlayedJob


def play(job: PlayedJob, event: str, number: int) -> None:
    index = number % job.count
    if event == "deliver":
        job.network.go_on(number)
    elif event == "adopt":
        job.adopt(number)
    elif event == "push":
        job.push(index)
    elif event == "cut":
        job.cut(number)
    elif event == "break":
        job.network.break_soon(number)
    elif event == "redial":
        job.network.fire_timers()
    elif event == "partition lost":
        job.lose_partition(index)
    elif event == "taken for lost":
        job.lose_partition(index, lives_on=True)
    elif event == "standby lost":
        job.lose_standby(index)
    elif event == "standby comes":
        job.placement_standby(index)
        job.publish(restore=False)
    elif event == "plan":
        job.publish(restore=False)
    elif event == "everybody adopts":
        job.everybody_adopts()
    elif event == "evaluate":
        job.evaluate()
    elif event == "everybody pushes":
        for each in range(job.count):
            job.push(each)
    elif event == "settle":
        job.settle()


KINDS = {
    "deliver": 8, "everybody adopts": 6, "everybody pushes": 6, "push": 4, "evaluate": 4, "settle": 4, "adopt": 3,
    "cut": 2, "break": 4, "redial": 2, "standby comes": 2, "plan": 1, "partition lost": 1, "taken for lost": 1,
    "standby lost": 1,
}  # fmt: skip


def seeded(seed: int) -> PlayedJob:
    """A storm that begins mostly with what a healthy job does; the job it was, before its end."""
    chance = random.Random(seed)
    kinds = chance.choices(list(KINDS), list(KINDS.values()), k=chance.randrange(10, 80))
    job = PlayedJob(chance.randint(1, 3), chance.choice(["fp32", "bf16"]))
    try:
        for kind in kinds:
            play(job, kind, chance.randrange({"deliver": 31, "break": 80}.get(kind, 6)))
            job.hear_reports()
            job.check()
        job.values_at_the_end = job.run_to_the_end()
    finally:
        job.close()
    return job
