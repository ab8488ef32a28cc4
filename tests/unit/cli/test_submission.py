"""submit and follow: what is checked, sent, printed, and what psctl exits with."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from click.testing import Result

from pscluster.cli.following import PlainView, outage_note
from pscluster.cli.local import record
from pscluster.cli.submission import calculate
from pscluster.errors import NotFoundError, UnreachableError
from pscluster.job.bundle import extract
from pscluster.job.spec import parse_spec
from pscluster.settings import ClientSettings
from pscluster.v1 import jobs_pb2, plan_pb2
from tests.unit.cli.conftest import Psctl
from tests.unit.cli.fake_master import FakeMaster, Serving, ended_message, job_message

BUILT_IN = {
    "name": "lm",
    "task": {"entrypoint": "psworker.tasks.text_lm:TextLm"},
    "train": {"global_batch": 64, "microbatch": 16, "max_steps": 200},
}


@pytest.fixture
def spec(tmp_path: Path) -> Path:
    path = tmp_path / "job" / "spec.yaml"
    path.parent.mkdir()
    path.write_text(yaml.safe_dump(BUILT_IN))
    return path


@pytest.fixture
def own(spec: Path) -> Path:
    """The spec of a task in the spec's directory."""
    spec.write_text(yaml.safe_dump({**BUILT_IN, "task": {"entrypoint": "task:MyTask"}}))
    (spec.parent / "task.py").write_text("import torch\nfrom pscluster import Task\nclass MyTask(Task): ...\n")
    return spec


def test_stdout_is_the_id_alone(run: Psctl, fake: FakeMaster, spec: Path) -> None:
    result = run("submit", str(spec), "--set", "train.max_steps=20", "--set", "train.clip_norm=null", "--name", "other")
    assert (result.exit_code, result.stdout) == (0, "lm-abc123\n")
    assert "psctl follow lm-abc123" in result.stderr
    (request,) = fake.submitted
    sent = json.loads(request.spec_json)
    assert (sent["name"], sent["train"]["max_steps"], request.bundle_sha256) == ("other", 20, "")


def test_a_directory_stands_for_the_spec_in_it(run: Psctl, spec: Path) -> None:
    assert run("submit", str(spec.parent)).exit_code == 0
    result = run("submit", str(spec.parent.parent))
    assert result.exit_code == 2
    assert "no spec.yaml" in result.stderr


def test_ones_own_task_is_bundled(run: Psctl, fake: FakeMaster, own: Path, tmp_path: Path) -> None:
    (own.parent / ".gitignore").write_text("*.bin\n")
    (own.parent / "data.bin").write_text("big")
    assert run("submit", str(own)).exit_code == 0
    ((digest, data),) = fake.bundles.items()
    assert fake.submitted[0].bundle_sha256 == digest
    (tmp_path / "b").write_bytes(data)
    extract(tmp_path / "b", tmp_path / "out")
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == [".gitignore", "spec.yaml", "task.py"]


@pytest.mark.parametrize(
    ("entrypoint", "words", "hint"),
    [
        ("tsak:MyTask", "no module tsak", "did you mean task:MyTask?"),
        ("tsk:MyTask", "no module tsk", "did you mean task:MyTask?"),
        ("task:MyTusk", "task.py defines no MyTusk", "did you mean task:MyTask?"),
        ("pkg.modle:T", "no module pkg.modle", "did you mean pkg.model:T?"),
        ("zzz:T", "no module zzz", "put zzz.py there"),
        ("broken:T", "broken.py, line 1", ""),
        ("hidden:T", "hidden.py is left out", "!hidden.py"),
    ],
)
def test_an_entrypoint_that_is_not_there_is_refused_at_once(
    run: Psctl, fake: FakeMaster, own: Path, entrypoint: str, words: str, hint: str
) -> None:
    directory = own.parent
    (directory / "pkg").mkdir()
    (directory / "pkg/model.py").write_text("class T: ...")
    (directory / "broken.py").write_text("def (")
    (directory / "hidden.py").write_text("class T: ...")
    (directory / ".gitignore").write_text("hidden.py\n")
    result = run("submit", str(own), "--set", f"task.entrypoint={entrypoint}")
    assert (result.exit_code, result.stdout) == (2, "")
    assert words in result.stderr
    assert hint in result.stderr
    assert fake.submitted == []
    assert fake.bundles == {}


OWN_TASKS = """
import dataclasses, torch, base
from torch import nn
from torch.utils.data import Dataset
from pscluster import Task as Base
from psworker.tasks.byte_lm import ByteLm
from base import Mixed, Plain
class Data(Dataset): ...
class Model(nn.Module): ...
class Mine(Base): ...
class Bytes(nn.Identity, ByteLm): ...
class Heir(Mine): ...
class Mixture(Mixed): ...
"""


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("Hair", "did you mean task:Heir?"),
        ("Mix", "did you mean task:Mixed?"),
        ("NoSuch", "its tasks: task:Bytes, task:Heir, task:Mine, task:Mixed, task:Mixture"),
        ("Torch", "its tasks: "),
        ("Modle", "its tasks: "),
    ],
)
def test_only_tasks_of_the_users_own_are_suggested(run: Psctl, own: Path, name: str, hint: str) -> None:
    (own.parent / "task.py").write_text(OWN_TASKS)
    base = "import pscluster, task\nclass Plain: ...\nclass Mixed(Plain, pscluster.Task): ...\n"
    (own.parent / "base.py").write_text(base)
    result = run("submit", str(own), "--set", f"task.entrypoint=task:{name}")
    assert result.exit_code == 2
    assert f"hint: {hint}" in result.stderr
    assert "torch" not in result.stderr


def test_a_module_without_a_task_is_told_what_it_lacks(run: Psctl, own: Path) -> None:
    (own.parent / "task.py").write_text("import torch\nclass Model(torch.nn.Module): ...\n")
    result = run("submit", str(own))
    assert "hint: define a subclass of pscluster.Task" in result.stderr


@pytest.mark.parametrize(
    "text", ["from base import *", "from base import MyTask", "MyTask = make()", "def __getattr__(n): ..."]
)
def test_a_class_that_may_be_there_is_left_to_the_trainer(run: Psctl, own: Path, text: str) -> None:
    (own.parent / "task.py").write_text(text)
    assert run("submit", str(own)).exit_code == 0


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("train.max_stesp=3", "did you mean max_steps?"),
        ("train.global_batch=65", "not divisible by microbatch"),
        ("train.max_steps=many", "train.max_steps"),
        ("nonsense", "not of the form key=value"),
        ("name=Not Allowed", "name"),
    ],
)
def test_a_bad_spec_exits_2_and_submits_nothing(
    run: Psctl, fake: FakeMaster, spec: Path, override: str, words: str
) -> None:
    result = run("submit", str(spec), "--set", override)
    assert (result.exit_code, result.stdout) == (2, "")
    assert "error: PS-1001: " in result.stderr
    assert words in result.stderr
    assert fake.submitted == []


def test_a_missing_spec_is_named(run: Psctl, tmp_path: Path) -> None:
    result = run("submit", str(tmp_path / "absent.yaml"))
    assert result.exit_code == 2
    assert "no spec file at" in result.stderr


# --- dry run ---


def test_dry_run_touches_nothing_and_prints_the_arithmetic(run_alone: Psctl, own: Path, tmp_path: Path) -> None:
    result = run_alone("--state-dir", str(tmp_path / "none"), "submit", str(own), "--dry-run")
    assert result.exit_code == 0
    assert "4 shards x 16 samples = global batch 64" in result.stdout
    assert "200 steps (12,800 samples)" in result.stdout
    assert "code: 2 files" in result.stdout
    assert [line.split() for line in result.stdout.splitlines()[-4:]] == [
        ["1", "4", "100", "%"],
        ["2", "2", "100", "%"],
        ["3", "1", "or", "2", "67", "%"],
        ["4", "1", "100", "%"],
    ]
    assert not (tmp_path / "none").exists()
    document = json.loads(run_alone("submit", str(own), "--dry-run", "-o", "json").stdout)
    assert (document["kind"], document["num_shards"], document["bundle"]["files"]) == ("DryRun", 4, 2)


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("from pscluster import Task\nclass MyTask(Task): ...", "no evaluation: the task has no eval_data"),
        ("import pscluster\nclass MyTask(pscluster.Task): ...", "no evaluation"),
        ("from pscluster.task import Task as T\nclass MyTask(T): ...", "no evaluation"),
        ("from pscluster import Task\nclass MyTask(Task):\n    def eval_data(self): ...", "evaluation at the end"),
        ("from base import Task\nclass MyTask(Task): ...", "evaluation at the end"),
        ("from pscluster import Task\nclass MyTask(Mixed, Task): ...", "evaluation at the end"),
        ("MyTask = make()", "evaluation at the end"),
    ],
)
def test_dry_run_speaks_of_no_evaluation_where_there_is_surely_none(
    run_alone: Psctl, own: Path, source: str, words: str
) -> None:
    (own.parent / "task.py").write_text(source)
    lines = run_alone("submit", str(own), "--dry-run").stdout.splitlines()
    assert [line for line in lines if "evaluation" in line and line.startswith(words)], lines


def test_dry_run_says_how_many_samples_an_epoch_may_leave_out(run_alone: Psctl, own: Path) -> None:
    assert "leaves out" not in run_alone("submit", str(own), "--dry-run").stdout
    drop = ("submit", str(own), "--dry-run", "--set", "data.drop_last=true")
    assert "each epoch leaves out what does not fill a microbatch, at most 15 samples" in run_alone(*drop).stdout
    assert json.loads(run_alone(*drop, "-o", "json").stdout)["left_out_at_most"] == 15


def test_dry_run_says_what_is_frozen_until_when(run_alone: Psctl, own: Path) -> None:
    changes = ["--set", "train.freeze=[embed.*, norm]", "--set", "train.unfreeze_at={'head.*': 30}"]
    result = run_alone("submit", str(own), "--dry-run", *changes)
    assert "frozen: embed.*, norm, head.* until step 30" in result.stdout.splitlines()
    document = json.loads(run_alone("submit", str(own), "--dry-run", "-o", "json", *changes).stdout)
    assert (document["freeze"], document["unfreeze_at"]) == (["embed.*", "norm"], {"head.*": 30})


def test_dry_run_of_many_workers_shows_doublings() -> None:
    train = {"global_batch": 1000, "microbatch": 1, "epochs": 1}
    found = calculate(parse_spec({**BUILT_IN, "train": train, "workers": {"min": 3, "max": 100}}), None)
    assert [row["workers"] for row in found["workers"]] == [3, 4, 8, 16, 32, 64, 100]
    assert found["samples"] is None
    assert found["workers"][0] == {"workers": 3, "microbatches_most": 334, "microbatches_fewest": 333, "balance": 0.998}


# --- following ---


def training() -> Iterator[jobs_pb2.Job]:
    lost = jobs_pb2.Event(time_s=5.0, reason="TrainerLost", message="trainer-1: SIGKILL", warning=True)
    queued = jobs_pb2.JOB_STATE_QUEUED
    yield job_message(state=queued, step=0, revision=1, reason="waits for 2 workers: 1 ready", weight_per_s=0.0)
    yield job_message(revision=2)
    yield job_message(step=21, revision=3)
    yield job_message(step=40, revision=4, events=[lost], workers_active=1)
    yield job_message(step=50, revision=5, events=[lost], metrics={"loss": 2.0}, metrics_step=50)
    yield ended_message(loss=1.5, events=[lost], metrics={"loss": 2.0}, metrics_step=50)


def evaluation(step: int, loss: float | None) -> str:
    """A line of the metrics that the master keeps."""
    return json.dumps({"step": step, "eval": {"loss": loss}})


def evaluated(result: Result) -> list[tuple[int, bool]]:
    """(step, whether it is called the best) of each evaluation that was printed."""
    lines = [line.split() for line in result.stderr.splitlines() if line.startswith("evaluated step")]
    return [(int(words[2].rstrip(":")), words[-1] == "(best)") for words in lines]


def test_follow_tells_states_events_and_the_end_in_plain_lines(run: Psctl, fake: FakeMaster, spec: Path) -> None:
    fake.watches = [training]
    fake.metric_reads, fake.metric_lines = [[]], [evaluation(50, 2.0)]
    result = run("submit", str(spec), "--follow")
    assert (result.exit_code, result.stdout) == (0, "lm-abc123\n")
    assert result.stderr.splitlines() == [
        "QUEUED: waits for 2 workers: 1 ready",
        "RUNNING",
        "step 20/100  loss 2.5000  8192 tokens/s  20s left  2/2 workers",
        "! TrainerLost: trainer-1: SIGKILL",
        "evaluated step 50: loss 2.0000 (best)",
        "lm-abc123 SUCCEEDED at step 100 after 25s, loss 1.5000, parameters ffffffffffff",
    ]


@pytest.mark.parametrize(
    ("state", "code", "words"),
    [(jobs_pb2.JOB_STATE_FAILED, 100, "PS-4100"), (jobs_pb2.JOB_STATE_STOPPED, 103, "PS-4103")],
)
@pytest.mark.parametrize("how", ["--follow", "--wait"])
def test_submit_exits_with_the_jobs_code(
    run: Psctl, fake: FakeMaster, spec: Path, state: int, code: int, words: str, how: str
) -> None:
    error = plan_pb2.ErrorDetail(code="PS-2001", cause="ValueError: x", action="correct the task")
    fake.watches = [lambda: iter([ended_message(state, error=error)])]
    result = run("submit", str(spec), how)
    assert (result.exit_code, result.stdout) == (code, "lm-abc123\n")
    assert words in result.stderr


def test_a_failure_is_told_once_with_the_place_in_ones_own_code(run: Psctl, fake: FakeMaster, spec: Path) -> None:
    cause = "loss raised ValueError: no such colour"
    ending = {
        "error": plan_pb2.ErrorDetail(
            code="PS-2001",
            cause=cause,
            action="the traceback is in `psctl describe`",
            details={"file": "task.py", "line": "16", "function": "loss"},
        ),
        "events": [jobs_pb2.Event(time_s=5.0, reason="Failed", message=f"PS-2001: {cause}", warning=True)],
        "traceback": 'Traceback (most recent call last):\n  File "task.py", line 16, in loss\n    x()\n',
    }
    fake.watches = [lambda: iter([job_message(), ended_message(jobs_pb2.JOB_STATE_FAILED, step=0, **ending)])]
    result = run("submit", str(spec), "--follow")
    assert result.stderr.splitlines()[2:] == [
        "lm-abc123 FAILED at step 0 after 25s, parameters ffffffffffff",
        f"error: PS-4100: lm-abc123 failed at step 0: PS-2001: {cause}",
        "at: task.py:16 in loss",
        "hint: the traceback is in `psctl describe lm-abc123`",
    ]


def test_wait_with_a_timeout_exits_101(run: Psctl, fake: FakeMaster, spec: Path) -> None:
    hold = threading.Event()

    def endless() -> Iterator[jobs_pb2.Job]:
        yield job_message()
        hold.wait(30)

    fake.watches = [endless]
    result = run("submit", str(spec), "--wait", "--timeout", "300ms")
    hold.set()
    assert result.exit_code == 101
    assert "RUNNING at step 20" in result.stderr


def test_follow_goes_on_while_the_master_is_away(run: Psctl, fake: FakeMaster) -> None:
    def breaks() -> Iterator[jobs_pb2.Job]:
        yield job_message()
        raise UnreachableError("restarting")

    fake.jobs["x"] = job_message()
    fake.watches = [breaks, lambda: iter([ended_message()])]
    result = run("follow", "lm")
    assert result.exit_code == 0
    assert "the master does not answer" in result.stderr
    assert result.stderr.splitlines()[-1].startswith("lm-abc123 SUCCEEDED")


def test_every_evaluation_is_printed_once_however_few_states_arrive(run: Psctl, fake: FakeMaster) -> None:
    """Several between two states, across a break with a rollback, and the last one together with the end."""
    fake.jobs["x"] = job_message()

    def breaks() -> Iterator[jobs_pb2.Job]:
        fake.metric_lines = ['{"step": 9, "loss": 2.5}', evaluation(10, 2.0)]
        yield job_message(step=15, metrics={"loss": 2.0}, metrics_step=10, revision=2)
        fake.metric_lines += [evaluation(20, 3.0), evaluation(30, 1.5), evaluation(40, None)]
        yield job_message(step=44, metrics={"loss": 1.5}, metrics_step=40, revision=3)
        raise UnreachableError("restarting")

    def returns() -> Iterator[jobs_pb2.Job]:
        fake.metric_lines = [evaluation(10, 2.0), evaluation(20, 3.0)]  # back at a snapshot of step 25
        yield job_message(step=25, metrics_step=0, revision=4)
        fake.metric_lines += [evaluation(step, loss) for step, loss in ((30, 1.5), (40, None), (50, 1.5), (60, 1.0))]
        yield job_message(step=60, metrics={"loss": 1.0}, metrics_step=60, revision=5)
        fake.metric_lines += [evaluation(90, 0.9), evaluation(100, 0.8)]
        yield ended_message(metrics={"loss": 0.8}, metrics_step=100)

    fake.watches = [breaks, returns]
    result = run("follow", "lm")
    assert result.exit_code == 0
    best = {10, 30, 60, 90, 100}
    assert evaluated(result) == [(step, step in best) for step in (10, 20, 30, 40, 50, 60, 90, 100)]


def test_a_follower_that_comes_after_the_end_sees_the_evaluations_too(run: Psctl, fake: FakeMaster) -> None:
    fake.jobs["x"] = ended_message()
    fake.jobs["x"].spec_json = json.dumps({**BUILT_IN, "evaluate": {"metric": "loss", "goal": "max"}})
    fake.metric_lines = [evaluation(50, 2.0), evaluation(100, 1.0)]
    result = run("follow", "lm")
    assert (result.exit_code, evaluated(result)) == (0, [(50, True), (100, False)])
    assert result.stderr.splitlines()[-1].startswith("lm-abc123 SUCCEEDED")


def test_evaluations_are_read_again_when_the_master_goes_away_in_between(run: Psctl, fake: FakeMaster) -> None:
    fake.jobs["x"] = job_message()
    fake.watches = [lambda: iter([ended_message()])]
    fake.metric_lines = [evaluation(100, 1.0)]
    fake.failures["ReadMetrics"] = [UnreachableError("restarting"), UnreachableError("restarting")]
    result = run("follow", "lm")
    assert (result.exit_code, evaluated(result)) == (0, [(100, True)])
    assert fake.failures["ReadMetrics"] == []


def test_a_job_that_is_deleted_as_soon_as_it_ended_keeps_its_exit_code(run: Psctl, fake: FakeMaster) -> None:
    fake.jobs["x"] = job_message()
    fake.watches = [lambda: iter([ended_message(jobs_pb2.JOB_STATE_STOPPED)])]
    fake.failures["ReadMetrics"] = [NotFoundError("no job lm-abc123")]
    assert run("follow", "lm").exit_code == 103


def test_a_follower_knows_that_the_local_cluster_was_taken_down(serving: Serving, tmp_path: Path) -> None:
    elsewhere = ClientSettings(address=serving.address).located({})
    local = ClientSettings(state_dir=tmp_path).located({})
    record.save(tmp_path, local.address, ())
    assert outage_note(local, 600.0) == outage_note(elsewhere, 600.0)
    record.record_path(tmp_path).unlink()
    assert "psctl up" in outage_note(local, 600.0) and "10 min" in outage_note(local, 600.0)
    assert outage_note(elsewhere, 600.0).startswith("the master does not answer")


def test_a_remark_is_a_line_only_when_it_is_a_new_one(capsys: pytest.CaptureFixture[str]) -> None:
    view = PlainView()
    for text, since in (("away", "0 s"), ("away", "5 s"), ("down", "9 s"), ("", ""), ("down", "0 s")):
        view.note(text, since)
    assert capsys.readouterr().err == "away\ndown\ndown\n"


def interrupted(serving: Serving, *arguments: str) -> tuple[int, bytes, bytes]:
    """psctl's exit status, first line and rest of stderr, when Ctrl-C comes while it follows a job."""
    hold, watched = threading.Event(), threading.Event()

    def endless() -> Iterator[jobs_pb2.Job]:
        yield job_message()
        watched.set()
        hold.wait(60)

    serving.fake.jobs["x"] = job_message()
    serving.fake.watches = [endless]
    command = [sys.executable, "-m", "pscluster.cli", *serving.arguments, *arguments]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        try:
            assert process.stderr is not None
            assert watched.wait(30)
            first = process.stderr.readline()
            process.send_signal(signal.SIGINT)
            _, rest = process.communicate(timeout=30)
        finally:
            hold.set()
            process.kill()
    return process.returncode, first, rest


def test_ctrl_c_detaches_says_so_and_exits_130(serving: Serving) -> None:
    status, first, rest = interrupted(serving, "follow", "lm")
    assert status == 130
    assert b"RUNNING" in first
    assert b"detached; lm-abc123" in rest
    assert b"psctl stop lm-abc123" in rest
    assert b"Traceback" not in rest


def test_ctrl_c_says_nothing_where_the_caller_ends_the_cluster(
    serving: Serving, spec: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PS_TIED", "1")
    status, first, rest = interrupted(serving, "submit", str(spec), "--follow")
    assert status == 130
    assert b"RUNNING" in first
    assert b"detached" not in rest
    assert b"psctl" not in rest


def test_on_a_terminal_the_bar_goes_to_stderr_and_the_news_above_it(serving: Serving) -> None:
    serving.fake.jobs["x"] = job_message()
    serving.fake.watches = [training]
    serving.fake.metric_lines = [evaluation(50, 2.0)]
    ours, theirs = os.openpty()
    environ = {**os.environ, "TERM": "xterm", "COLUMNS": "150"}
    environ.pop("NO_COLOR", None)
    command = [sys.executable, "-m", "pscluster.cli", *serving.arguments, "follow", "lm"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=theirs, env=environ)
    os.close(theirs)
    shown = b""
    try:
        while chunk := os.read(ours, 4096):
            shown += chunk
    except OSError:  # how a terminal says that the other side is closed
        pass
    finally:
        os.close(ours)
    stdout, _ = process.communicate(timeout=30)
    assert (process.returncode, stdout) == (0, b"")
    text = shown.decode()
    assert "! TrainerLost: trainer-1: SIGKILL" in text
    assert "evaluated step 50: loss 2.0000" in text
    assert "lm-abc123 SUCCEEDED at step 100" in text
    assert "psctl export lm-abc123 -o model.safetensors" in text, "what one may want next"
    assert "\x1b[" in text
