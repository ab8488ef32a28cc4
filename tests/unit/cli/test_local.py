"""The local cluster's decisions: whose process it is, why it ended, who may act."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest

from pscluster.cli.local.cluster import LocalCluster
from pscluster.cli.local.processes import command, count_of, exit_error, name_of, variables
from pscluster.cli.local.record import locked
from pscluster.errors import StateError, UnhealthyError
from pscluster.settings import ClientSettings, make_runtime_dir


def test_nodes_are_counted_by_their_highest_number() -> None:
    assert count_of(["master", "worker-0", "worker-3", "server-1", "worker-x"], "worker") == 4
    assert count_of(["master"], "worker") == 0


def test_local_workers_share_no_cuda_device() -> None:
    """Each has one of those that the machine shows; those beyond the last compute on the CPU."""
    visible = ["2", "GPU-7f"]

    assert variables("worker-0", visible)["CUDA_VISIBLE_DEVICES"] == "2"
    assert variables("worker-1", visible)["CUDA_VISIBLE_DEVICES"] == "GPU-7f"
    assert variables("worker-2", visible)["CUDA_VISIBLE_DEVICES"] == ""
    assert "CUDA_VISIBLE_DEVICES" not in variables("server-0", visible)
    assert "CUDA_VISIBLE_DEVICES" not in variables("worker-0", [])


def test_the_lock_makes_others_wait(tmp_path: Path) -> None:
    held, release, lines = threading.Event(), threading.Event(), []

    def holder() -> None:
        with locked(tmp_path, lines.append):
            held.set()
            release.wait(30)

    thread = threading.Thread(target=holder)
    thread.start()
    held.wait(30)
    with pytest.raises(StateError, match="another psctl"), locked(tmp_path, lines.append, timeout_s=0):
        pass
    release.set()
    thread.join()
    with locked(tmp_path, lines.append, timeout_s=0):
        pass
    assert lines == []


def test_daemons_are_known_by_their_command_line(tmp_path: Path) -> None:
    for name in ("master", "worker-3", "server-0"):
        words = command(name, tmp_path, "unix:/x", tmp_path / "token")
        assert name_of(words, tmp_path) == name
        assert name_of(words, tmp_path / "other") is None
        assert name_of(words[:3], tmp_path) is None
    assert name_of(["python", "-m", "x", "--state-dir", str(tmp_path / "worker-3")], tmp_path) is None


@pytest.mark.parametrize(
    ("line", "code", "cause", "action"),
    [
        ("PS-4001: a port is taken (choose another)", "PS-4001", "a port is taken", "choose another"),
        ("PS-4002: disk (sda) is full (free space (now))", "PS-4002", "disk (sda) is full", "free space (now)"),
        ("PS-1006: bad flag", "PS-1006", "bad flag", "see "),
    ],
)
def test_the_last_named_error_of_a_log_is_the_reason(
    tmp_path: Path, line: str, code: str, cause: str, action: str
) -> None:
    log = tmp_path / "x.log"
    log.write_text(f"PS-9001: an older start\nnoise\n{line}\n")
    error = exit_error("worker-0", log, 24)
    assert error.code == code
    assert error.cause.startswith("worker-0 ") and error.cause.endswith(cause)
    assert error.action.startswith(action)


def test_a_log_without_a_named_error_is_shown(tmp_path: Path) -> None:
    (tmp_path / "x.log").write_text("Traceback\nKeyError: 3\n")
    error = exit_error("worker-0", tmp_path / "x.log", 0)
    assert isinstance(error, UnhealthyError)
    assert "KeyError: 3" in error.cause
    assert "no output" in exit_error("worker-0", tmp_path / "absent.log", 0).cause


def test_down_removes_the_sockets_of_nodes_that_were_killed(tmp_path: Path) -> None:
    state_dir = tmp_path / "state"
    for name in ("worker-0", "worker-12", "server-0"):
        (state_dir / name).mkdir(parents=True)
    left = [make_runtime_dir(state_dir / name) for name in ("worker-0", "worker-12", "server-0")]
    (left[0] / "job.trainer-0.1").mkdir()
    (left[0] / "job.trainer-0.1" / "s").touch()
    stranger = make_runtime_dir(tmp_path / "worker-0")
    try:
        cluster = LocalCluster(located=ClientSettings(state_dir=state_dir).located({}), print_info=lambda _: None)
        assert cluster.down() is False
        assert [path.exists() for path in left] == [False, False, False]
        assert stranger.is_dir()
    finally:
        stranger.rmdir()
