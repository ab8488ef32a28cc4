"""init: a job that runs as it is."""

from __future__ import annotations

from pathlib import Path

import pytest

from pscluster.cli.submission import job_name
from pscluster.job.spec import load_spec
from tests.unit.cli.conftest import Psctl

FILES = [".gitignore", "README.md", "spec.yaml", "task.py", "text.txt"]


def test_init_writes_a_valid_job(run_alone: Psctl, tmp_path: Path) -> None:
    directory = tmp_path / "My Job"
    result = run_alone("init", str(directory))
    assert (result.exit_code, result.stdout) == (0, f"{directory}/spec.yaml\n")
    assert sorted(p.name for p in directory.iterdir()) == FILES
    assert load_spec(directory / "spec.yaml").name == "my-job"
    assert "# my-job" in (directory / "README.md").read_text()
    dry = run_alone("submit", str(directory), "--dry-run")
    assert dry.exit_code == 0
    assert "code: 5 files" in dry.stdout


def test_init_refuses_a_directory_that_is_not_empty(run_alone: Psctl, tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("keep")
    result = run_alone("init", str(tmp_path))
    assert (result.exit_code, result.stdout) == (1, "")
    assert "PS-1004" in result.stderr
    assert [p.name for p in tmp_path.iterdir()] == ["mine.txt"]


@pytest.mark.parametrize("existing", [True, False])
@pytest.mark.parametrize("failure", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_init_writes_all_files_or_none(
    run_alone: Psctl, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failure: BaseException, existing: bool
) -> None:
    directory, write = tmp_path / "job", Path.write_text
    if existing:
        directory.mkdir()

    def fails(path: Path, text: str, encoding: str) -> int:
        written = write(path, text, encoding=encoding)
        if path.name == "text.txt":
            raise failure
        return written

    monkeypatch.setattr(Path, "write_text", fails)
    result = run_alone("init", str(directory))
    assert (result.exit_code, result.stdout) == (1 if isinstance(failure, OSError) else 130, "")
    assert [path.name for path in tmp_path.rglob("*")] == (["job"] if existing else [])


def test_init_where_nothing_can_be_written(run_alone: Psctl, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    result = run_alone("init", str(tmp_path / "file" / "job"))
    assert result.exit_code == 1
    assert "PS-4002" in result.stderr


@pytest.mark.parametrize(
    ("directory", "name"), [("My Job!", "my-job"), ("übung", "bung"), ("___", "my-first-job"), ("x" * 80, "x" * 63)]
)
def test_job_names_are_made_from_directories(directory: str, name: str) -> None:
    assert job_name(directory) == name


def test_the_task_of_the_template_keeps_the_contract(
    run_alone: Psctl, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Loss as a sum that halves exactly, a sample that can be generated, data that can be indexed."""
    torch = pytest.importorskip("torch")
    run_alone("init", str(tmp_path / "job"))
    monkeypatch.chdir(tmp_path / "job")
    scope: dict[str, object] = {"__name__": "task"}
    exec(compile((tmp_path / "job/task.py").read_text(), "task.py", "exec"), scope)
    task = scope["CharacterLm"](context=16, width=16, layers=1)  # type: ignore[operator]
    task.data_uri = "text.txt"
    torch.manual_seed(0)
    model = task.build_model().eval()
    data = task.train_data()
    assert len(data) > 100
    assert len(task.eval_data()) > 10
    whole, weight = task.loss(model, task.collate([data[i] for i in range(8)]))
    halves = [task.loss(model, task.collate([data[i] for i in rows])) for rows in (range(4), range(4, 8))]
    assert weight == 8 * 16 == sum(w for _, w in halves)
    assert whole.item() == pytest.approx(sum(part.item() for part, _ in halves), rel=1e-5)
    with torch.no_grad():
        text = task.generate(model, "The boat", 10, 0.8, 1)
        assert text.startswith("The boat")
        assert text == task.generate(model, "The boat", 10, 0.8, 1)
