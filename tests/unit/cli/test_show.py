"""list, status, describe, nodes, health: tables for people, versioned documents for programs."""

from __future__ import annotations

import json
import re

import pytest
import yaml

from pscluster.v1 import agents_pb2, jobs_pb2, plan_pb2
from tests.unit.cli.conftest import Psctl
from tests.unit.cli.fake_master import FakeMaster, Serving, ended_message, job_message


def node_message(node_id: str = "worker-0", **changes: object) -> jobs_pb2.Node:
    fields: dict[str, object] = {
        "node_id": node_id,
        "role": agents_pb2.ROLE_WORKER,
        "ready": True,
        "incarnation": "0123456789abcdef",
        "resources": agents_pb2.Resources(cpu_cores=2, memory_bytes=8 << 30, slots=1),
        "version": "0.1.0",
        "hostname": "box",
        "processes": ["lm-abc123/trainer-0/1"],
        "metrics_address": "127.0.0.1:9000",
    }
    return jobs_pb2.Node(**{**fields, **changes})  # type: ignore[arg-type]


def full_job() -> jobs_pb2.Job:
    shards = [plan_pb2.ShardRange(first=0, count=3), plan_pb2.ShardRange(first=5, count=1)]
    return ended_message(
        jobs_pb2.JOB_STATE_FAILED,
        reason="NaN in the loss",
        conditions=[
            jobs_pb2.Condition(type="Ready", status=False, reason="Failed", message="it failed", since_s=1.7e9)
        ],
        events=[
            jobs_pb2.Event(time_s=1.7e9, reason="Submitted", message="by psctl"),
            jobs_pb2.Event(time_s=1.7e9, reason="TrainerLost", message="trainer-1: SIGKILL", warning=True),
        ],
        plan=plan_pb2.Plan(
            generation=3,
            resume_step=50,
            trainers=[
                plan_pb2.TrainerPlacement(
                    rank=0,
                    node_id="worker-0",
                    attempt=1,
                    active=True,
                    shards=shards,
                    device="cuda:0",
                    microbatch_s=0.21,
                ),
                plan_pb2.TrainerPlacement(rank=1, node_id="worker-1", attempt=2),
            ],
            partitions=[plan_pb2.PartitionPlacement(index=0, node_id="server-0", attempt=2, addresses=["unix:/x"])],
        ),
        connections=[plan_pb2.Connection(trainer=0, partition=0, transport="unix")],
        checks=[
            plan_pb2.PreflightCheck(name="imports", ok=True, detail="fine", node_id="worker-0"),
            plan_pb2.PreflightCheck(name="purity", ok=True, detail="impure", node_id="worker-0", warning=True),
        ],
        error=plan_pb2.ErrorDetail(
            code="PS-2005", cause="NaN at step 7", action="clip", details={"step": "7", "file": "task.py", "line": "3"}
        ),
        traceback='Traceback:\n  File "task.py", line 3\nValueError: x\n',
        metrics={"loss": 2.25, "bits_per_byte": 3.5},
        metrics_step=50,
        best=plan_pb2.BestSnapshot(step=50, value=2.25),
        store="/state/store",
        directory="/state/job",
        bundle_sha256="b" * 64,
    )


def test_list_reads_like_kubectl(run: Psctl, fake: FakeMaster) -> None:
    fake.jobs["a"] = job_message()
    fake.jobs["b"] = job_message(
        job_id="imdb-xyz789", state=jobs_pb2.JOB_STATE_QUEUED, step=0, final_step=0, reason="waits"
    )
    lines = run("list").stdout.splitlines()
    assert lines[0].split() == ["NAME", "STATE", "STEP", "LOSS", "AGE"]
    assert lines[1].split()[:4] == ["lm-abc123", "RUNNING", "20/100", "2.5000"]
    assert lines[2].split()[:4] == ["imdb-xyz789", "QUEUED", "0", "-"]
    wide = run("list", "-o", "wide").stdout.splitlines()
    assert wide[0].split()[5:] == ["WORKERS", "SAMPLES/S", "GENERATION", "NUMERICS", "REASON"]
    assert wide[1].split()[5:9] == ["2/2", "128", "3", "strict"]
    assert run("list", "-o", "name").stdout == "lm-abc123\nimdb-xyz789\n"


def test_list_of_nothing_keeps_stdout_empty(run: Psctl) -> None:
    result = run("list")
    assert (result.exit_code, result.stdout) == (0, "")
    assert "psctl submit" in result.stderr
    empty = {"apiVersion": "ps/v1", "kind": "JobList", "items": []}
    assert json.loads(run("list", "-o", "json").stdout) == empty


def test_documents_are_versioned_and_words(run: Psctl, fake: FakeMaster) -> None:
    fake.jobs["a"] = full_job()
    found = json.loads(run("describe", "lm", "-o", "json").stdout)
    assert (found["apiVersion"], found["kind"], found["state"]) == ("ps/v1", "Job", "FAILED")
    assert found["parameters_sha256"] == "f" * 64
    assert found["plan"]["trainers"][0]["shards"] == [[0, 3], [5, 1]]
    assert [placement["device"] for placement in found["plan"]["trainers"]] == ["cuda:0", None]
    details = {"step": "7", "file": "task.py", "line": "3"}
    assert found["error"] == {"code": "PS-2005", "cause": "NaN at step 7", "action": "clip", "details": details}
    assert found["spec"]["name"] == "lm"
    assert json.loads(run("status", "lm", "-o", "json").stdout) == found
    assert yaml.safe_load(run("describe", "lm", "-o", "yaml").stdout) == found
    listed = json.loads(run("list", "-o", "json").stdout)
    assert listed["kind"] == "JobList"
    assert listed["items"][0]["job_id"] == "lm-abc123"
    assert all(re.fullmatch(r"[a-z0-9_]+|apiVersion", key) for key in found)


def test_status_is_a_few_lines(run: Psctl, fake: FakeMaster) -> None:
    fake.jobs["a"] = job_message(reason="training")
    lines = run("status", "lm").stdout.splitlines()
    assert len(lines) <= 12
    found = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)}
    assert found["State"] == "RUNNING"
    assert found["Step"] == "20 of 100"
    assert found["Speed"] == "4.0 steps/s, 128 samples/s, 8192 tokens/s"
    assert found["Time left"] == "20s"
    assert run("status", "lm", "-o", "name").stdout == "lm-abc123\n"


def test_describe_has_a_section_for_everything(run: Psctl, fake: FakeMaster) -> None:
    fake.jobs["a"] = full_job()
    text = run("describe", "lm").stdout
    titles = [line for line in text.splitlines() if re.fullmatch(r"[A-Z][A-Za-z ]+:", line)]
    wanted = ["Last error", "Task", "Conditions", "Evaluation", "Last plan", "Last transports"]
    wanted += ["Checks", "Events", "Traceback"]
    assert [title.rstrip(":") for title in titles] == wanted
    for piece in (
        "sha256:" + "f" * 64,
        "32 = 4 shards x 8",
        "Generation 3, resumed from step 50",
        "shards 0-2,5",
        "trainer-partition 0-0",
        "PS-2005: NaN at step 7",
        "at: task.py:3",
        "hint: clip",
        'File "task.py", line 3',
        "loss 2.2500 at step 50",
    ):
        assert piece in text, piece
    placements = [line.split() for line in text.splitlines() if line.startswith(("  trainer-", "  partition-"))]
    assert placements == [
        ["trainer-0", "worker-0", "1", "active", "cuda:0", "0.21", "s", "shards", "0-2,5"],
        ["trainer-1", "worker-1", "2", "standing", "by", "-", "-", "none"],
        ["partition-0", "server-0", "2", "coordinator", "-", "-", "unix:/x"],
    ]
    check = next(line for line in text.splitlines() if "imports" in line)
    assert check.split() == ["worker-0", "imports", "ok", "fine"]
    check = next(line for line in text.splitlines() if "purity" in line)
    assert check.split() == ["worker-0", "purity", "warning", "impure"]
    warning = next(line for line in text.splitlines() if "TrainerLost" in line)
    assert "Warning" in warning


def test_describe_of_a_running_job_shows_the_plan_that_holds(run: Psctl, fake: FakeMaster) -> None:
    fake.jobs["a"] = full_job()
    fake.jobs["a"].state = jobs_pb2.JOB_STATE_RUNNING
    titles = set(run("describe", "lm").stdout.splitlines())
    assert {"Plan:", "Transports:"} <= titles
    assert not {"Last plan:", "Last transports:"} & titles


def test_describe_says_how_far_audits_vouch(run: Psctl, fake: FakeMaster) -> None:
    fake.jobs["a"] = full_job()
    assert "Audits:" not in run("describe", "lm").stdout
    vouched = [
        jobs_pb2.VouchedNode(node_id="worker-0", step=98),
        jobs_pb2.VouchedNode(node_id="w-1", step=7, alone=True),
    ]
    fake.jobs["a"].audits.CopyFrom(jobs_pb2.Audits(equal=4, differing=1, unfinished=2, vouched=vouched))
    text = run("describe", "lm").stdout
    section = text[text.index("Audits:") : text.index("Events:")].split()
    assert [word.strip(",") for word in section if word.strip(",").isdecimal()] == ["5", "1", "2", "98", "7"]
    assert section[section.index("w-1:") + 3 :] == ["by", "itself"]
    found = json.loads(run("describe", "lm", "-o", "json").stdout)["audits"]
    assert (found["equal"], found["vouched"][1]) == (4, {"node_id": "w-1", "step": 7, "alone": True})


def test_describe_of_a_fresh_job_leaves_out_what_is_not_known(run: Psctl, fake: FakeMaster) -> None:
    fake.jobs["a"] = jobs_pb2.Job(job_id="lm-abc123", name="lm", state=jobs_pb2.JOB_STATE_QUEUED, created_s=1.7e9)
    text = run("describe", "lm").stdout
    assert "Plan:" not in text
    assert "Events:" not in text
    assert "QUEUED" in text


def test_text_of_a_task_cannot_forge_lines(run: Psctl, fake: FakeMaster) -> None:
    fake.jobs["a"] = job_message(reason="x\nState: SUCCEEDED\x1b[2J")
    assert "x State: SUCCEEDED [2J" in run("status", "lm").stdout


def test_nodes(run: Psctl, fake: FakeMaster) -> None:
    assert "no nodes" in run("nodes").stderr
    fake.node_list = [node_message(), node_message("server-0", role=agents_pb2.ROLE_SERVER, ready=False)]
    lines = run("nodes").stdout.splitlines()
    assert lines[0].split() == ["NAME", "ROLE", "READY", "USED", "LAST-BEAT", "VERSION"]
    assert lines[1].split() == ["worker-0", "worker", "yes", "1/1", "-", "0.1.0"]
    assert lines[2].split()[:3] == ["server-0", "server", "no"]
    wide = run("nodes", "-o", "wide").stdout.splitlines()[1].split()
    assert wide[6:] == ["box", "2", "8.0", "GiB", "cpu", "-", "127.0.0.1:9000", "01234567"]
    found = json.loads(run("nodes", "-o", "json").stdout)
    assert [item["role"] for item in found["items"]] == ["worker", "server"]
    assert run("nodes", "-o", "name").stdout == "worker-0\nserver-0\n"


def test_health_exits_5_when_any_is_sick(run: Psctl, serving: Serving) -> None:
    fake = serving.fake
    assert (run("health").exit_code, run("health").stdout) == (0, "healthy\n")
    fake.cluster.healthy = False
    fake.cluster.problems.extend(["worker-1 is silent"])
    result = run("health")
    assert (result.exit_code, result.stdout) == (5, "")
    assert "PS-4003: worker-1 is silent" in result.stderr
    assert "psctl drain NODE" in result.stderr
    document = run("health", "-o", "json")
    assert document.exit_code == 5
    found = json.loads(document.stdout)
    assert (found["address"], found["problems"]) == (serving.address, ["worker-1 is silent"])


@pytest.mark.parametrize("verb", ["status", "describe", "stop", "resume", "delete", "wait", "follow", "logs", "export"])
def test_an_unknown_job_exits_102(run: Psctl, fake: FakeMaster, verb: str) -> None:
    from pscluster.errors import NotFoundError

    fake.failures["ReadLogs"] = [NotFoundError("no job nope")]
    result = run(verb, "nope")
    assert result.exit_code == 102
    assert result.stdout == ""
    assert "PS-1003" in result.stderr


def test_describe_names_a_slow_trainer(run: Psctl, fake: FakeMaster) -> None:
    job = full_job()
    del job.plan.trainers[:]
    for rank, microbatch_s in enumerate((0.1, 0.11, 0.25)):
        shards = [plan_pb2.ShardRange(first=rank, count=1)]
        job.plan.trainers.add(rank=rank, node_id=f"w-{rank}", active=True, shards=shards, microbatch_s=microbatch_s)
    fake.jobs["a"] = job
    placements = [line for line in run("describe", "lm").stdout.splitlines() if line.startswith("  trainer-")]
    assert ["0.25 s, 2.3x" in line for line in placements] == [False, False, True]
    assert "x" not in placements[1].partition("0.11 s")[2]
