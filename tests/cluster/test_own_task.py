"""A user's own files run on a cluster unchanged; each fault of user code has a named error."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from harness.cluster import LocalCluster, local_cluster
from pscluster.client import Job
from pscluster.job.bundle import pack
from pscluster.job.spec import parse_spec

STEPS = 5
MAX_LOSSES = 5

# One shard, so that call number k of the loss in train mode is step k - 3: the first three are the preflight's.
TASK = """
import ctypes, os, signal
from pathlib import Path

import torch
from torch import nn

from pscluster import Task
from shapes.square import squares


class Mine(Task):
    def __init__(self, trick="", at=3, diary=""):
        self.trick, self.at, self.diary, self.calls = trick, at, diary, 0
        print("files:", *sorted(str(path) for path in Path().rglob("*") if path.is_file()))

    def build_model(self):
        model = nn.Linear(2, 1)
        return model.double() if self.trick == "float64" else model

    def train_data(self):
        numbers = [float(word) for word in Path(self.data_uri).read_text().split()]
        return [torch.tensor([number, 1.0]) for number in numbers]

    def loss(self, model, batch):
        total = squares(model(batch.to(next(model.parameters()).dtype)))
        if self.trick == "mean":
            return total / len(batch), 1.0
        self.calls += model.training
        if model.training and self.calls == 3 + self.at:
            total = self.mischief(total)
        return total, len(batch)

    def mischief(self, total):
        if self.trick == "raise":
            raise ValueError("no such colour")
        if self.trick == "nan":
            return total * float("nan")
        if self.trick == "die":
            self.die()
        return total

    def die(self):
        diary = Path(self.diary)
        attempt = len(diary.read_text()) if diary.exists() else 0
        diary.write_text("x" * (attempt + 1))
        if attempt == 0:
            ctypes.string_at(0)
        if attempt == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        if attempt < 5:
            os.kill(os.getpid(), signal.SIGKILL)
        raise MemoryError("no room")
"""
FILES = {
    "mine.py": TASK,
    "shapes/__init__.py": "",
    "shapes/square.py": "def squares(x):\n    return x.square().sum()\n",
    "numbers.txt": " ".join(str(n / 8) for n in range(24)),
    "untidy.py": "import nothing_like_this\nfrom mine import Mine\n",
    "typo.py": "from mine import Mine\nimport broken\n",
    "broken.py": "def f(:\n",
    "secret.key": "1234",
    "drafts/old.py": "",
    "drafts/keep.py": "",
    ".gitignore": "*.key\ndrafts/*\n!drafts/keep.py\n",
}


def spec(name: str, entrypoint: str = "mine:Mine", uri: str = "numbers.txt", **args: Any) -> dict[str, Any]:
    return {
        "name": name,
        "task": {"entrypoint": entrypoint, "args": args},
        "data": {"uri": uri},
        "train": {"global_batch": 4, "microbatch": 4, "max_steps": STEPS, "optimizer": {"name": "sgd", "lr": 0.01}},
        "workers": {"max": 1},
        "durability": {"every_steps": STEPS},
    }


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("own") / "work"
    for name, text in FILES.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalCluster]:
    with local_cluster(tmp_path_factory.mktemp("cluster"), workers=2, servers=1) as cluster:
        yield cluster


@pytest.fixture(scope="module")
def jobs(cluster: LocalCluster, directory: Path) -> dict[str, str]:
    """Every job of this file, submitted at once: two run at a time, and each test waits for its own."""
    specs = [
        spec("die", trick="die", diary=str(directory.parent / "diary"), at=1),
        spec("raise", trick="raise"),
        spec("mean", trick="mean"),
        spec("nan", trick="nan"),
        spec("skip", trick="nan") | {"on_nonfinite": "skip"},
        spec("float64", trick="float64"),
        spec("nodata", uri="numbers.csv"),
        spec("untidy", entrypoint="untidy:Mine"),
        spec("typo", entrypoint="typo:Mine"),
    ]
    bundle = pack(directory)
    with cluster.client() as client:
        return {found["name"]: client.submit(parse_spec(found), bundle) for found in specs}


def failed(cluster: LocalCluster, job: str, code: str) -> Job:
    """The job, once it has FAILED with that code."""
    found = cluster.until(job, lambda found: found.ended)
    assert (found.state, found.error.code if found.error else "") == ("FAILED", code), found.reason
    assert cluster.psctl("wait", job, expect=100).stdout == ""
    return found


def never_started(found: Job) -> None:
    """The job failed before the first plan, and names the node of each check."""
    assert (found.step, found.generation) == (0, 0)
    assert {check.node_id for check in found.checks} <= {"worker-0", "worker-1"}


def wrong_check(cluster: LocalCluster, found: Job, name: str) -> str:
    """The one check that failed, as `psctl describe` shows it."""
    never_started(found)
    assert [check.name for check in found.checks if not check.ok] == [name]
    lines = cluster.psctl("describe", found.job_id).stdout.splitlines()
    (line,) = [line for line in lines if re.match(rf"\s+worker-[01]\s+{name}\s+FAILED ", line)]
    return line


def files_of(traceback: str) -> list[str]:
    return [Path(name).name for name in re.findall(r'File "([^"]+)"', traceback)]


# ---- what runs ----


@pytest.mark.slow
def test_init_writes_a_job_that_runs_from_any_directory(cluster: LocalCluster, tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    cluster.psctl("init", "first", cwd=tmp_path)
    options = ["--set", "train.max_steps=3", "--set", "task.args={width: 16, layers: 1}", "--wait"]
    job = cluster.psctl("submit", "../first", *options, cwd=tmp_path / "elsewhere").stdout.strip()
    answer = cluster.describe(job)
    assert (answer["state"], answer["step"]) == ("SUCCEEDED", 3)
    assert set(answer["metrics"]) == {"bits_per_character", "loss"}
    assert list((tmp_path / "elsewhere").iterdir()) == []
    evaluated = json.loads(cluster.psctl("eval", job, "-o", "json").stdout)  # its code and data are in the bundle
    assert evaluated["metrics"] == answer["metrics"]


@pytest.mark.slow
def test_the_bundle_is_the_directory_without_what_git_ignores(cluster: LocalCluster, jobs: dict[str, str]) -> None:
    """Two modules and a relative path to data work; the logs have what the task prints, and end with the job."""
    followed = cluster.psctl("logs", "-f", jobs["skip"]).stdout
    assert cluster.describe(jobs["skip"])["state"] == "SUCCEEDED"
    assert cluster.psctl("logs", jobs["skip"]).stdout == followed
    (line,) = [line for line in followed.splitlines() if "files:" in line]
    source, _, text = line.partition(" | ")
    assert source.strip() == "trainer-0"
    listed = text.split()[1:]
    assert {"mine.py", "shapes/square.py", "numbers.txt", "drafts/keep.py", ".gitignore"} <= set(listed)
    assert not {"secret.key", "drafts/old.py"} & set(listed)


@pytest.mark.slow
def test_a_step_that_is_not_finite_is_skipped_and_counted_when_asked(
    cluster: LocalCluster, jobs: dict[str, str]
) -> None:
    cluster.wait(jobs["skip"], "succeeded")
    steps = json.loads(cluster.psctl("metrics", jobs["skip"], "-o", "json").stdout)["items"]
    assert [step["skipped"] for step in steps] == [False, False, True, False, False]
    assert all(step["loss"] > 0 for step in steps if not step["skipped"])


# ---- what does not ----


def test_what_a_task_raises_is_reported_with_its_file_and_line_alone(
    cluster: LocalCluster, jobs: dict[str, str]
) -> None:
    found = failed(cluster, jobs["raise"], "PS-2001")
    assert found.error is not None
    assert "ValueError: no such colour" in found.error.cause
    assert files_of(found.traceback) == ["mine.py", "mine.py"]
    line = TASK.splitlines().index('            raise ValueError("no such colour")') + 1
    assert f'File "mine.py", line {line}, in mischief' in found.traceback
    details = found.error.details
    assert (details["file"], details["line"], details["function"], details["step"]) == (
        "mine.py", str(line), "mischief", "3",
    )  # fmt: skip
    assert found.traceback.rstrip().endswith("ValueError: no such colour")
    assert found.traceback.rstrip() in cluster.psctl("describe", found.job_id).stdout.replace("\n  ", "\n")


@pytest.mark.slow
def test_a_missing_import_fails_before_step_0_with_its_node(cluster: LocalCluster, jobs: dict[str, str]) -> None:
    found = failed(cluster, jobs["untidy"], "PS-2001")
    assert "No module named 'nothing_like_this'" in wrong_check(cluster, found, "imports")
    assert files_of(found.traceback) == ["untidy.py"]


def test_a_syntax_error_in_a_second_module_fails_before_step_0(cluster: LocalCluster, jobs: dict[str, str]) -> None:
    found = failed(cluster, jobs["typo"], "PS-2001")
    assert "SyntaxError" in wrong_check(cluster, found, "imports")
    assert files_of(found.traceback) == ["typo.py", "broken.py"]


def test_a_syntax_error_in_the_entrypoint_is_refused_before_the_upload(cluster: LocalCluster, directory: Path) -> None:
    path = directory.parent / "work" / "broken.json"
    path.write_text(json.dumps(spec("broken", entrypoint="broken:Mine")))
    done = cluster.psctl("submit", str(path), expect=2)
    path.unlink()
    assert "PS-1001" in done.stderr
    assert "broken.py, line 1" in done.stderr
    assert "broken-" not in cluster.psctl("list", "-o", "name").stdout


def test_a_mean_for_a_sum_is_caught_before_step_0(cluster: LocalCluster, jobs: dict[str, str]) -> None:
    found = failed(cluster, jobs["mean"], "PS-2002")
    assert "mean" in wrong_check(cluster, found, "halving") or "weight" in wrong_check(cluster, found, "halving")


def test_a_loss_that_is_not_finite_stops_the_job_and_names_the_step(
    cluster: LocalCluster, jobs: dict[str, str]
) -> None:
    found = failed(cluster, jobs["nan"], "PS-2005")
    assert found.error is not None
    assert "step 3" in found.error.cause
    assert found.error.details["step"] == "3"
    assert "on_nonfinite: skip" in found.error.action
    assert found.step == 2
    steps = json.loads(cluster.psctl("metrics", jobs["nan"], "-o", "json").stdout)["items"]
    assert [step["step"] for step in steps] == [1, 2]  # the steps before the failure are recorded


def test_missing_data_are_named(cluster: LocalCluster, jobs: dict[str, str]) -> None:
    found = failed(cluster, jobs["nodata"], "PS-2003")
    assert "numbers.csv" in wrong_check(cluster, found, "data")
    assert files_of(found.traceback) == ["mine.py"]


def test_parameters_of_another_dtype_are_refused_by_name(cluster: LocalCluster, jobs: dict[str, str]) -> None:
    found = failed(cluster, jobs["float64"], "PS-2004")
    line = wrong_check(cluster, found, "layout")
    assert "weight" in line
    assert "float64" in line


def test_each_kind_of_exit_is_reported_and_attempts_are_limited(cluster: LocalCluster, jobs: dict[str, str]) -> None:
    """Each attempt ends in step 1, in another way."""
    found = failed(cluster, jobs["die"], "PS-3006")
    losses = [event.message for event in found.events if event.reason == "TrainerLost"]
    assert len(losses) == MAX_LOSSES + 1
    ways = ["SIGSEGV", "SIGTERM", "SIGKILL", "SIGKILL", "SIGKILL", "memory"]
    for answer, wanted in zip(losses, ways, strict=True):
        assert wanted in answer
    assert found.error is not None
    assert f"lost {MAX_LOSSES + 1} times" in found.error.cause
    assert "Fatal Python error: Segmentation fault" in cluster.psctl("logs", found.job_id).stdout
    assert found.step == 0


def test_the_cluster_is_healthy_after_all_of_it(cluster: LocalCluster, jobs: dict[str, str]) -> None:
    with cluster.client() as client:
        for job in jobs.values():
            assert client.wait(job, "ended", 100).ended
        assert client.health().problems == ()
        assert all(not node.processes for node in client.nodes())
