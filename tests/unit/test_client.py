"""The client library against a master in this process: calls, errors, streams that outlive the master."""

from __future__ import annotations

import hashlib
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from pscluster.client import Cluster, Goal, LogLine, ReconnectingStream, Snapshot, end_error, parse_goal, reached
from pscluster.client.calls import OVERLAP_S, LogCursor, Outage
from pscluster.client.goals import last_frame
from pscluster.client.records import choose, job_of
from pscluster.errors import (
    AuthError,
    BundleError,
    JobFailedError,
    JobStoppedError,
    NotFoundError,
    PsError,
    SettingsError,
    StateError,
    TaskError,
    UnreachableError,
    VersionSkewError,
    WaitTimeoutError,
)
from pscluster.job.bundle import Bundle
from pscluster.job.spec import parse_spec
from pscluster.v1 import jobs_pb2, plan_pb2
from tests.unit.cli.fake_master import FakeMaster, Serving, ended_message, job_message, log_record, snapshot_message

SPEC = parse_spec(
    {"name": "lm", "task": {"entrypoint": "task:Lm"}, "train": {"global_batch": 8, "microbatch": 4, "max_steps": 5}}
)


@pytest.fixture
def serving(tmp_path: Path) -> Iterator[Serving]:
    served = Serving(FakeMaster(), tmp_path)
    yield served
    served.stop()


@pytest.fixture
def cluster(serving: Serving) -> Iterator[Cluster]:
    with Cluster.connect(serving.address, token_file=serving.token_file) as connected:
        yield connected


def quick_stream(**changes: object) -> ReconnectingStream:
    """A stream that reconnects without waiting."""
    return ReconnectingStream(**{"sleep": lambda _s: None, **changes})  # type: ignore[arg-type]


# --- importing ---


def test_importing_pscluster_imports_neither_torch_nor_grpc() -> None:
    program = (
        "import sys, pscluster; pscluster.__version__; "
        "heavy = {'torch', 'grpc', 'pydantic', 'google.protobuf', 'numpy'} & set(sys.modules); "
        "from pscluster import Task; heavy |= {'torch', 'grpc'} & set(sys.modules); "
        "print(sorted(heavy), Task.__name__, 'Cluster' in dir(pscluster))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout.strip() == "[] Task True"


def test_unknown_names_of_the_package_are_attribute_errors() -> None:
    import pscluster

    with pytest.raises(AttributeError, match="Tsk"):
        _ = pscluster.Tsk
    assert pscluster.Cluster is Cluster


def test_the_version_is_the_distributions() -> None:
    import tomllib

    import pscluster

    project = tomllib.loads((Path(pscluster.__file__).parents[1] / "pyproject.toml").read_text())
    assert project["project"]["version"] == pscluster.__version__


# --- connecting ---


def test_no_cluster_is_unreachable_and_says_how_to_start_one(tmp_path: Path) -> None:
    with pytest.raises(UnreachableError, match="no cluster runs") as caught:
        Cluster.connect(state_dir=tmp_path)
    assert "psctl up" in caught.value.action
    with pytest.raises(UnreachableError):
        Cluster.connect("127.0.0.1:1", "token")


def test_a_wrong_or_missing_token_is_refused(serving: Serving, tmp_path: Path) -> None:
    with pytest.raises(AuthError):
        Cluster.connect(serving.address, "wrong")
    with pytest.raises(AuthError, match="no token file"):
        Cluster.connect(serving.address, token_file=tmp_path / "absent")


def test_a_master_of_another_protocol_is_refused_by_name(serving: Serving) -> None:
    serving.fake.cluster.protocol = 99
    with pytest.raises(VersionSkewError, match="protocol 99"):
        Cluster.connect(serving.address, token_file=serving.token_file)


# --- jobs ---


def test_submit_uploads_the_bundle_once(cluster: Cluster, serving: Serving) -> None:
    data = bytes(range(256)) * 10_000
    bundle = Bundle(data=data, sha256=hashlib.sha256(data).hexdigest(), files=("task.py",))
    assert cluster.submit(SPEC, bundle) == "lm-abc123"
    assert serving.fake.bundles == {bundle.sha256: data}
    serving.fake.failures["UploadBundle"] = [StateError("must not be asked again")]
    assert cluster.submit(SPEC, bundle) == "lm-abc123"
    first, second = serving.fake.submitted
    assert first.bundle_sha256 == bundle.sha256
    assert first.spec_json == SPEC.canonical_json()
    assert first.request_id != second.request_id


def test_a_submission_is_repeated_under_one_request_id(cluster: Cluster, serving: Serving) -> None:
    serving.fake.failures["Submit"] = [UnreachableError("restarting")]
    assert cluster.submit(SPEC, request_id="r1") == "lm-abc123"
    assert [request.request_id for request in serving.fake.submitted] == ["r1"]


@pytest.mark.parametrize("losses", [2, 9])
def test_a_bundle_that_was_deleted_in_between_is_uploaded_again(tmp_path: Path, losses: int) -> None:
    bundle = Bundle(data=b"code", sha256=hashlib.sha256(b"code").hexdigest(), files=("task.py",))
    asked: list[str] = []

    class Forgetful(FakeMaster):
        """Somebody deletes the last job with the bundle, each time before the submission comes."""

        def Submit(self, request: jobs_pb2.SubmitRequest, context: object) -> object:  # noqa: N802
            asked.append(request.request_id)
            if len(asked) <= losses:
                self.bundles.clear()
            return super().Submit(request, context)

    served = Serving(Forgetful(), tmp_path)
    try:
        with Cluster.connect(served.address, token_file=served.token_file) as cluster:
            if losses == 2:
                assert cluster.submit(SPEC, bundle, request_id="r1") == "lm-abc123"
            else:
                with pytest.raises(NotFoundError, match="no such bundle"):
                    cluster.submit(SPEC, bundle, request_id="r1")
    finally:
        served.stop()
    assert asked == ["r1"] * 3, "one request, and not for ever"


def test_a_refused_submission_is_the_masters_very_error(cluster: Cluster, serving: Serving) -> None:
    serving.fake.failures["Submit"] = [TaskError("no", action="do", details={"node": "worker-0"})]
    with pytest.raises(TaskError) as caught:
        cluster.submit(SPEC)
    assert caught.value.to_dict() == TaskError("no", action="do", details={"node": "worker-0"}).to_dict()


def test_a_job_is_read_whole(cluster: Cluster, serving: Serving) -> None:
    plan = plan_pb2.Plan(
        generation=3,
        trainers=[
            plan_pb2.TrainerPlacement(
                rank=0, node_id="worker-0", attempt=1, active=True, shards=[plan_pb2.ShardRange(first=0, count=4)]
            )
        ],
        partitions=[plan_pb2.PartitionPlacement(index=0, node_id="server-0", attempt=1, addresses=["unix:/x"])],
    )
    error = plan_pb2.ErrorDetail(code="PS-2005", cause="NaN", action="clip", details={"step": "7"})
    serving.fake.jobs["x"] = job_message(
        plan=plan, error=error, loss=float("nan"), best=plan_pb2.BestSnapshot(step=10, value=1.5)
    )
    job = cluster.job("lm")
    assert (job.job_id, job.state, job.step, job.final_step, job.loss) == ("lm-abc123", "RUNNING", 20, 100, None)
    assert job.plan is not None
    assert job.plan.trainers[0].shards == ((0, 4),)
    assert job.error is not None
    assert (job.error.code, job.error.details) == ("PS-2005", {"step": "7"})
    assert job.spec["task"]["args"] == {"layers": 2}
    found = job.to_dict()
    assert found["state"] == "RUNNING"
    assert found["loss"] is None
    assert found["error"]["action"] == "clip"
    assert found["best"] == {"step": 10, "value": 1.5}
    assert found["ended_s"] is None


def test_an_unknown_job_is_not_found(cluster: Cluster) -> None:
    with pytest.raises(NotFoundError, match="no job nope"):
        cluster.job("nope")


def test_stop_resume_delete_reach_the_master(cluster: Cluster, serving: Serving) -> None:
    serving.fake.jobs["x"] = job_message()
    assert cluster.stop("lm").job_id == cluster.resume("lm").job_id == "lm-abc123"
    assert cluster.delete("lm") == "lm-abc123"
    serving.fake.failures["Delete"] = [StateError("it runs")]
    with pytest.raises(StateError):
        cluster.delete("lm")


# --- watching ---


def test_watch_goes_on_after_the_master_was_away(cluster: Cluster, serving: Serving) -> None:
    def breaks() -> Iterator[jobs_pb2.Job]:
        yield job_message(step=20, revision=1)
        raise UnreachableError("the master ends")

    def comes_back() -> Iterator[jobs_pb2.Job]:
        yield job_message(step=20, revision=1)
        yield job_message(step=60, revision=2)
        yield ended_message()

    serving.fake.watches = [breaks, comes_back]
    lines: list[str] = []
    stream = quick_stream(on_outage=lambda e, _s: lines.append(e.cause), on_reconnect=lambda: lines.append("back"))
    steps = [(job.state, job.step) for job in cluster.watch("lm", stream)]
    assert steps == [("RUNNING", 20), ("RUNNING", 60), ("SUCCEEDED", 100)]
    assert lines == ["the master ends", "back"]
    assert serving.fake.watched == ["lm", "lm-abc123"]


def test_watch_survives_a_restart_of_the_master(cluster: Cluster, serving: Serving) -> None:
    seen = threading.Event()

    def first() -> Iterator[jobs_pb2.Job]:
        yield job_message()
        seen.wait(30)

    serving.fake.watches = [first, lambda: iter([ended_message()])]
    states: list[str] = []
    for job in cluster.watch("lm"):
        states.append(job.state)
        if len(states) == 1:
            seen.set()
            serving.stop()
            serving.start()
    assert states == ["RUNNING", "SUCCEEDED"]


def test_watch_gives_up_after_the_longest_outage(cluster: Cluster, serving: Serving) -> None:
    def broken() -> Iterator[jobs_pb2.Job]:
        raise UnreachableError("away")
        yield

    serving.fake.watches = [broken]
    clock = iter(float(n) for n in range(1000))
    stream = quick_stream(max_outage_s=20, monotonic=lambda: next(clock))
    with pytest.raises(UnreachableError, match="away"):
        list(cluster.watch("lm", stream))


def test_watch_raises_other_errors_at_once(cluster: Cluster) -> None:
    with pytest.raises(NotFoundError):
        list(cluster.watch("nope"))


def test_wait_returns_raises_or_times_out(cluster: Cluster, serving: Serving) -> None:
    hold = threading.Event()

    def endless() -> Iterator[jobs_pb2.Job]:
        yield job_message(step=20)
        hold.wait(30)

    serving.fake.watches = [endless]
    assert cluster.wait("lm", "step=20").step == 20
    assert cluster.wait("lm", "running").state == "RUNNING"
    with pytest.raises(WaitTimeoutError, match="RUNNING at step 20"):
        cluster.wait("lm", timeout_s=0.3)
    hold.set()
    serving.fake.watches = [lambda: iter([ended_message(jobs_pb2.JOB_STATE_FAILED)])]
    with pytest.raises(JobFailedError):
        cluster.wait("lm")


@pytest.mark.parametrize(
    ("state", "goal", "outcome"),
    [
        ("RUNNING", "step=20", True),
        ("RUNNING", "step=21", False),
        ("QUEUED", "running", False),
        ("RUNNING", "running", True),
        ("SUCCEEDED", "running", True),
        ("SUCCEEDED", "succeeded", True),
        ("SUCCEEDED", "step=101", StateError),
        ("FAILED", "succeeded", JobFailedError),
        ("FAILED", "failed", True),
        ("FAILED", "ended", True),
        ("STOPPED", "succeeded", JobStoppedError),
        ("STOPPED", "stopped", True),
        ("SUCCEEDED", "stopped", StateError),
    ],
)
def test_goals(state: str, goal: str, outcome: bool | type[PsError]) -> None:
    step = 20 if state in ("RUNNING", "FAILED", "STOPPED") else 0 if state == "QUEUED" else 100
    job = job_of(job_message(state=jobs_pb2.JobState.Value(f"JOB_STATE_{state}"), step=step))
    if isinstance(outcome, bool):
        assert reached(job, parse_goal(goal)) is outcome
    else:
        with pytest.raises(outcome):
            reached(job, parse_goal(goal))


@pytest.mark.parametrize("text", ["done", "step", "step=", "step=-1", "step=x", ""])
def test_what_is_no_goal_is_refused(text: str) -> None:
    with pytest.raises(SettingsError, match="cannot wait for"):
        parse_goal(text)


def test_goals_read_back() -> None:
    assert parse_goal(" STEP=7 ") == Goal(state="step", step=7)
    assert str(parse_goal("step=7")) == "step=7"


def test_the_end_says_why() -> None:
    error = plan_pb2.ErrorDetail(code="PS-2005", cause="NaN at step 7", action="clip")
    failed = end_error(job_of(ended_message(jobs_pb2.JOB_STATE_FAILED, error=error)))
    assert failed is not None
    assert "PS-2005: NaN at step 7" in failed.cause
    assert failed.action == "clip"
    assert "frame" not in failed.details
    stopped = end_error(job_of(ended_message(jobs_pb2.JOB_STATE_STOPPED)))
    assert stopped is not None
    assert "psctl resume lm-abc123" in stopped.action
    assert end_error(job_of(ended_message())) is None


RAISED = """Traceback (most recent call last):
  File "/state/bundles/ab/task.py", line 30, in batches
    item = self[7]
KeyError: 7

During handling of the above exception, another exception occurred:

Traceback (most recent call last):
  File "/state/bundles/ab/task.py", line 16, in loss
    return shrink(model(batch))
           ^^^^^^^^^^^^^^^^^^^^
  File "/state/bundles/ab/parts/shrinking.py", line 4, in shrink
    return nn.functional.relu(x)
  File "/usr/lib/python3/site-packages/torch/nn/functional.py", line 1500, in relu
    result = torch.relu(input)
ValueError: no such colour
"""


@pytest.mark.parametrize(
    ("traceback", "frame"),
    [
        (RAISED, "parts/shrinking.py:4 in shrink"),
        ('Traceback (most recent call last):\n  File "/b/task.py", line 16, in loss\n', "task.py:16 in loss"),
        ('  File "/b/task.py", line 1, in <module>\n  File "/b/typo.py", line 3\n    def (\n', "typo.py:3"),
        ("ImportError: not there", ""),
        ("", ""),
    ],
)
def test_the_last_frame_is_the_last_in_the_users_own_files(traceback: str, frame: str) -> None:
    assert last_frame(traceback) == frame


def test_what_the_users_code_raised_is_told_with_its_place_and_the_jobs_name() -> None:
    error = plan_pb2.ErrorDetail(code="PS-2001", cause="loss raised", action="the traceback is in `psctl describe`")
    failed = end_error(job_of(ended_message(jobs_pb2.JOB_STATE_FAILED, error=error, traceback=RAISED)))
    assert failed is not None
    assert "`psctl describe lm-abc123`" in failed.action
    assert failed.details["frame"] == "parts/shrinking.py:4 in shrink"


# --- logs, metrics, snapshots ---


def test_followed_logs_lose_and_repeat_nothing_over_a_break(cluster: Cluster, serving: Serving) -> None:
    lines = [log_record("trainer-0", 100.0, "a"), log_record("trainer-0", 100.0, "a"), log_record("t", 101.0, "b")]
    later = [*lines, log_record("trainer-1", 99.0, "late"), log_record("t", 102.0, "c")]
    serving.fake.log_streams = [[*lines, UnreachableError("away")], later]
    serving.fake.jobs["x"] = ended_message()
    found = [line.text for line in cluster.logs("lm", follow=True, tail=3, stream=quick_stream())]
    assert found == ["a", "a", "b", "late", "c"]
    first, second = serving.fake.log_requests
    assert (first.tail, first.since_s, first.rank) == (3, 0.0, -1)
    assert (second.tail, second.since_s) == (0, 101.0 - OVERLAP_S)


def test_logs_without_follow_end_with_the_error(cluster: Cluster, serving: Serving) -> None:
    serving.fake.log_streams = [[log_record("t", 1.0, "a"), UnreachableError("away")]]
    with pytest.raises(UnreachableError):
        list(cluster.logs("lm"))


def test_the_log_cursor_forgets_old_lines() -> None:
    cursor = LogCursor(5.0)
    assert cursor.open() == 5.0
    for second in range(1000):
        assert cursor.is_new(LogLine(source="t", time_s=float(second), stream="stdout", text="x"))
    assert len(cursor._recent) <= 2 * OVERLAP_S + 1
    assert cursor.open() == 999.0 - OVERLAP_S


def test_metrics_are_read_as_records(cluster: Cluster, serving: Serving) -> None:
    serving.fake.metric_lines = ['{"step": 1, "loss": 2.5}', '{"step": 2, "loss": 2.25}']
    assert [record["loss"] for record in cluster.metrics("lm")] == [2.5, 2.25]


def snapshot(step: int, best: bool = False) -> Snapshot:
    return Snapshot(step=step, best=best, parts=())


def test_choosing_a_snapshot() -> None:
    there = [snapshot(10, best=True), snapshot(20), snapshot(30)]
    assert choose(there, "last", "lm").step == 30
    assert choose(there, "best", "lm").step == 10
    assert choose(there, 20, "lm").step == 20
    with pytest.raises(NotFoundError, match="of step 25") as caught:
        choose(there, 25, "lm")
    assert caught.value.action.endswith("10 (best), 20, 30")
    with pytest.raises(NotFoundError, match="yet"):
        choose([], "last", "lm")


def test_snapshot_parts_come_in_order(cluster: Cluster, serving: Serving) -> None:
    serving.fake.snapshots = [snapshot_message(10)]
    assert [part.path for part in cluster.snapshot("lm").parts] == ["10/part-0", "10/part-1"]


def test_a_downloaded_bundle_is_verified(cluster: Cluster, serving: Serving, tmp_path: Path) -> None:
    import hashlib

    digest = hashlib.sha256(b"code").hexdigest()
    serving.fake.bundles[digest] = b"code"
    cluster.download_bundle(digest, tmp_path / "b")
    assert (tmp_path / "b").read_bytes() == b"code"
    serving.fake.bundles[digest] = b"evil"
    with pytest.raises(BundleError, match="digest"):
        cluster.download_bundle(digest, tmp_path / "b")


# --- retries ---


def test_delays_grow_with_jitter_and_end() -> None:
    outage = Outage(since_s=0)
    assert [outage.next_delay_s(0.0, 600.0, 0.0) for _ in range(8)] == [0.05, 0.1, 0.2, 0.4, 0.8, 1.6, 2.5, 2.5]
    assert outage.attempts == 8
    assert Outage(since_s=0).next_delay_s(0.0, 600.0, 0.999) == pytest.approx(0.1, rel=0.01)
    assert Outage(since_s=0, attempts=9).next_delay_s(599.9, 600.0, 0.5) == pytest.approx(0.1)
    assert Outage(since_s=0).next_delay_s(600.0, 600.0, 0.5) is None
