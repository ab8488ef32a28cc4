"""What user code does to its job: each fault is told as the author's, at once, once, with file, line and step."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from harness import author_task
from harness.author_task import author_spec, line_of
from harness.cluster import LocalCluster, local_cluster
from pscluster.client import Job
from pscluster.job.bundle import pack
from pscluster.job.spec import parse_spec

STEP, SHARD = 13, 1

# Way, where, workers: code of the error, the line that does it, the function that has it.
RAISED = "PS-2001", 'raise ValueError("no such colour")', "go_wrong"
EXITED = "PS-2001", "sys.exit(3)", "go_wrong"
LEFT = "PS-2009", "os._exit(int(self.way[-2]))", "go_wrong"
FAULTS: dict[tuple[str, str, int], tuple[str, str, str]] = {
    ("raise", "loss", 2): RAISED,
    ("raise", "backward", 1): RAISED,
    ("raise", "getitem", 1): RAISED,
    ("exit", "loss", 2): EXITED,
    ("interrupt", "collate", 1): ("PS-2001", "raise KeyboardInterrupt", "go_wrong"),
    ("os._exit(3)", "loss", 2): LEFT,
    ("os._exit(0)", "loss", 1): LEFT,
    ("thread", "loss", 1): ("PS-2009", "os._exit(4)", "end_all"),
    ("SIGSEGV", "loss", 1): ("PS-2009", "ctypes.string_at(0)", "go_wrong"),
    ("SIGSEGV", "getitem", 2): ("PS-2009", "ctypes.string_at(0)", "go_wrong"),
    ("SIGABRT", "collate", 1): ("PS-2009", "os.abort()", "go_wrong"),
}
EVALUATED = [("raise", "metrics", 1), ("exit", "finalise", 1)]


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalCluster]:
    with local_cluster(tmp_path_factory.mktemp("cluster"), workers=2, servers=1) as cluster:
        yield cluster


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("authors")
    (root / "author_task.py").write_text(Path(author_task.__file__).read_text())
    return root


@pytest.fixture(scope="module")
def jobs(cluster: LocalCluster, directory: Path) -> dict[tuple[str, str, int], str]:
    """Every job, submitted at once; each test waits for its own."""
    bundle = pack(directory)
    with cluster.client() as client:
        return {
            case: client.submit(parse_spec(author_spec(*case[:2], STEP, SHARD, case[2])), bundle)
            for case in [*FAULTS, *EVALUATED]
        }


def failed(cluster: LocalCluster, job: str) -> Job:
    found = cluster.until(job, lambda found: found.ended)
    assert found.state == "FAILED", found.reason
    return found


def recorded(cluster: LocalCluster, job: str) -> list[int]:
    """The steps that the job's metrics have."""
    lines: list[dict[str, Any]] = json.loads(cluster.psctl("metrics", job, "-o", "json").stdout)["items"]
    return [line["step"] for line in lines if "loss" in line and "metrics" not in line]


@pytest.mark.slow
@pytest.mark.parametrize("case", FAULTS, ids=lambda case: "-".join(map(str, case)))
def test_a_fault_of_user_code_fails_the_job_with_its_place(
    case: tuple[str, str, int], cluster: LocalCluster, jobs: dict[tuple[str, str, int], str]
) -> None:
    code, text, function = FAULTS[case]
    found = failed(cluster, jobs[case])
    assert found.error is not None
    details = found.error.details
    assert found.error.code == code, found.error
    place = (details["file"], int(details["line"]), details["function"], int(details["step"]), int(details["shard"]))
    assert place == ("author_task.py", line_of(text), function, STEP, SHARD)
    assert set(re.findall(r'File "([^"]+)"', found.traceback)) == {"author_task.py"}
    assert found.step == STEP - 1
    assert recorded(cluster, found.job_id) == list(range(1, STEP))
    signals = case[0] in ("SIGSEGV", "SIGABRT")
    losses = [event for event in found.events if event.reason == "TrainerLost"]
    assert len(losses) == signals  # a fatal signal is given one more try, the rest none
    assert details.get("signal") == (case[0] if signals else None)


@pytest.mark.slow
@pytest.mark.parametrize("case", EVALUATED, ids=lambda case: "-".join(map(str, case)))
def test_a_fault_in_an_evaluation_names_the_evaluated_step(
    case: tuple[str, str, int], cluster: LocalCluster, jobs: dict[tuple[str, str, int], str]
) -> None:
    found = failed(cluster, jobs[case])
    assert found.error is not None
    text = RAISED[1] if case[0] == "raise" else EXITED[1]
    place = (found.error.details["file"], int(found.error.details["line"]), int(found.error.details["step"]))
    assert place == ("author_task.py", line_of(text), 20)
    assert found.error.cause.startswith(case[1])
    assert (found.step, recorded(cluster, found.job_id)) == (20, list(range(1, 21)))


def test_an_exception_that_ends_a_thread_is_a_warning_with_its_place(cluster: LocalCluster, directory: Path) -> None:
    job = cluster.submit(author_spec("thread raises", "loss", 2, SHARD, 1), directory, "--wait")
    line = line_of('raise ValueError("no such thread")')
    (message,) = [event["message"] for event in cluster.describe(job)["events"] if event["warning"]]
    place = f"no such thread in author_task.py:{line} in raise_in_thread"
    assert re.match(r"trainer-0, step 2: PS-2001: a thread of the task raised ValueError", message)
    assert place in message


@pytest.mark.slow
def test_follow_and_describe_show_it_once(cluster: LocalCluster, directory: Path) -> None:
    job = author_spec("raise", "loss", STEP, SHARD, 1)
    (directory / "spec.json").write_text(json.dumps({**job, "name": "shown"}))
    followed = cluster.psctl("submit", str(directory / "spec.json"), "--follow", expect=100).stderr
    place = f"at: author_task.py:{line_of(RAISED[1])} in go_wrong"
    assert followed.count("no such colour") == 1
    assert followed.count(place) == 1
    assert f"failed at step {STEP - 1}: PS-2001" in followed
    with cluster.client() as client:
        (shown,) = [found for found in client.jobs() if found.name == "shown"]
    sections = cluster.psctl("describe", shown.job_id).stdout.partition("\nTraceback:\n")
    assert [part.count("ValueError: no such colour") for part in (sections[0], sections[2])] == [1, 1]
    assert sections[0].count(place) == 1
