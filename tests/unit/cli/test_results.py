"""export, eval, generate: what is asked of psworker.tools, and what its answers become."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from pscluster.cli import results
from pscluster.cli.results import run_tool
from pscluster.errors import InternalError, TaskError
from pscluster.storage.exports import aside
from tests.unit.cli.conftest import Psctl
from tests.unit.cli.fake_master import FakeMaster, ended_message, snapshot_message

ANSWERS: dict[str, dict[str, Any]] = {
    "export": {"step": 50, "parameters_sha256": "f" * 64, "tensors": 7, "size_bytes": 2048},
    "eval": {"step": 50, "parameters_sha256": "f" * 64, "metrics": {"loss": 2.0, "accuracy": 0.5}, "num_samples": 9},
    "generate": {"step": 50, "parameters_sha256": "f" * 64, "text": "once upon"},
}


@pytest.fixture
def asked(fake: FakeMaster, monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """The requests made of the tool, which answers from ANSWERS."""
    code = b"the bundle"
    digest = hashlib.sha256(code).hexdigest()
    fake.bundles[digest] = code
    fake.jobs["x"] = ended_message(store="/store", bundle_sha256=digest)
    fake.snapshots = [snapshot_message(25, best=True), snapshot_message(50)]
    requests: list[dict[str, Any]] = []

    def run_tool(request: dict[str, Any]) -> dict[str, Any]:
        assert Path(request["bundle"]).read_bytes() == code
        requests.append(request)
        return ANSWERS[request["command"]]

    monkeypatch.setattr(results, "run_tool", run_tool)
    return requests


def test_export_prints_the_path(run: Psctl, asked: list[dict[str, Any]], tmp_path: Path) -> None:
    result = run("export", "lm", "-o", str(tmp_path / "model.pth"))
    assert (result.exit_code, result.stdout) == (0, f"{tmp_path / 'model.pth'}\n")
    assert "7 tensors, 2.0 KiB" in result.stderr
    (request,) = asked
    assert (request["command"], request["format"], request["output"]) == ("export", "pth", str(tmp_path / "model.pth"))
    assert request["parts"] == ["/store/50/part-0", "/store/50/part-1"]
    assert request["spec"]["name"] == "lm"
    assert not Path(request["bundle"]).exists()


@pytest.mark.parametrize(
    ("arguments", "form"),
    [
        (["-o", "m.safetensors"], "safetensors"),
        (["-o", "m"], "safetensors"),
        (["-o", "m", "--format", "pth"], "pth"),
        (["-o", "m.pt"], "pth"),
        (["-o", "m.PTH"], "pth"),
        (["-o", "m.v2.pth"], "pth"),
        (["--format", "pth"], "pth"),
        (["-o", "."], "safetensors"),
        ([], "safetensors"),
    ],
)
def test_the_format_follows_the_path_unless_given(
    run: Psctl,
    asked: list[dict[str, Any]],
    arguments: list[str],
    form: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    assert run("export", "lm", *arguments).exit_code == 0
    assert (asked[0]["format"], asked[0]["force"]) == (form, False)
    assert Path(asked[0]["aside"]).parent == Path(asked[0]["output"]).parent == tmp_path
    assert not Path(asked[0]["aside"]).exists()


@pytest.mark.parametrize(
    ("arguments", "suffixes"),
    [
        (["-o", "m.onnx"], [".safetensors", ".pth", ".pt"]),
        (["-o", "m.gguf"], [".safetensors", ".pth", ".pt"]),
        (["-o", "m.h5", "--format", "pth"], [".pth", ".pt"]),
        (["-o", "m.pth", "--format", "safetensors"], [".safetensors"]),
        (["-o", "m.safetensors", "--format", "pth", "--force"], [".pth", ".pt"]),
    ],
)
def test_a_suffix_that_is_not_what_is_written_is_refused(
    run: Psctl, asked: list[dict[str, Any]], tmp_path: Path, arguments: list[str], suffixes: list[str]
) -> None:
    name, *options = arguments[1:]
    result = run("export", "lm", "-o", str(tmp_path / name), *options)
    assert (result.exit_code, result.stdout, asked) == (2, "", [])
    assert f"PS-1006: {name}: {Path(name).suffix} is not" in result.stderr
    assert f"give one of {', '.join(suffixes)}, or none" in result.stderr


def test_an_existing_file_is_overwritten_by_force_alone(
    run: Psctl, asked: list[dict[str, Any]], tmp_path: Path
) -> None:
    (tmp_path / "m.pth").write_text("mine")
    (tmp_path / "dangling.pth").symlink_to("nowhere")
    (tmp_path / "model.safetensors").write_text("mine")
    for name in ("m.pth", "dangling.pth", "."):
        result = run("export", "lm", "-o", str(tmp_path / name))
        assert (result.exit_code, result.stdout, asked) == (1, "", [])
        assert "PS-1004" in result.stderr
        assert "--force" in result.stderr
    assert run("export", "lm", "-o", str(tmp_path / "m.pth"), "--force").exit_code == 0
    assert asked[0]["force"] is True


def test_what_is_no_regular_file_is_not_overwritten_at_all(run: Psctl, asked: list[dict[str, Any]]) -> None:
    result = run("export", "lm", "-o", "/dev/null", "--force")
    assert (result.exit_code, asked) == (1, [])
    assert "PS-1004: /dev/null is not a regular file" in result.stderr


@pytest.mark.parametrize("name", ["none/m.pth", "none/"])
def test_a_directory_that_is_missing_is_named_at_once(
    run: Psctl, asked: list[dict[str, Any]], tmp_path: Path, name: str
) -> None:
    result = run("export", "lm", "-o", f"{tmp_path}/{name}")
    assert (result.exit_code, asked) == (1, [])
    assert "PS-4002" in result.stderr
    assert f"mkdir -p {tmp_path}/none" in result.stderr


@pytest.mark.parametrize("ending", ["os.kill(os.getpid(), 9)", "sys.exit(3)"])
def test_a_tool_that_is_killed_while_it_writes_leaves_nothing(
    run: Psctl, asked: list[dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ending: str
) -> None:
    write = f"import json, os, sys; open(json.load(sys.stdin)['aside'] + '/half', 'w').write('half'); {ending}"
    monkeypatch.setattr(results, "run_tool", lambda request: run_tool(request, program(write)))
    (tmp_path / "out").mkdir()
    result = run("export", "lm", "-o", str(tmp_path / "out/m.pth"))
    assert result.exit_code == 1
    assert ("PS-3005" if "kill" in ending else "PS-9001") in result.stderr
    assert list((tmp_path / "out").iterdir()) == []
    assert asked == []


def test_ctrl_c_during_an_export_leaves_nothing(
    run: Psctl, asked: list[dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(request: dict[str, Any]) -> dict[str, Any]:
        (Path(request["aside"]) / ".tmp-of-a-library").write_text("half")
        raise KeyboardInterrupt

    monkeypatch.setattr(results, "run_tool", interrupted)
    (tmp_path / "out").mkdir()
    assert run("export", "lm", "-o", str(tmp_path / "out")).exit_code == 130
    assert list((tmp_path / "out").iterdir()) == []
    assert asked == []


def test_what_a_killed_export_has_left_goes_with_the_next_one_to_the_same_file(
    run: Psctl, asked: list[dict[str, Any]], tmp_path: Path
) -> None:
    path = tmp_path / "m[1].pth"
    killed = "import os, sys; from pathlib import Path; from pscluster.storage.exports import aside\n"
    killed += "with aside(Path(sys.argv[1])) as d: open(d + '/half', 'w').write('half'); os.kill(os.getpid(), 9)"
    for target in (path, tmp_path / "other.pth"):
        assert subprocess.run([sys.executable, "-c", killed, str(target)], check=False).returncode == -9
    (tmp_path / ".m[1].pth.file.writing").touch()
    assert len(list(tmp_path.glob(".*.writing/half"))) == 2
    with aside(path) as writing:
        assert run("export", "lm", "-o", str(path)).exit_code == 0
        assert Path(writing).is_dir() and asked[0]["aside"] != writing
        assert sorted(p.name.split(".")[1] for p in tmp_path.glob(".*.writing")) == ["m[1]", "m[1]", "other"]
    assert [p.name for p in tmp_path.glob(".m*.writing")] == [".m[1].pth.file.writing"], "which is no directory"


def test_the_step_chooses_the_snapshot(run: Psctl, asked: list[dict[str, Any]]) -> None:
    assert run("eval", "lm", "--step", "best").exit_code == 0
    assert run("eval", "lm", "--step", "50").exit_code == 0
    assert [request["parts"][0] for request in asked] == ["/store/25/part-0", "/store/50/part-0"]
    result = run("eval", "lm", "--step", "49")
    assert result.exit_code == 102
    assert "there are: 25 (best), 50" in result.stderr


def test_eval_prints_metrics(run: Psctl, asked: list[dict[str, Any]]) -> None:
    result = run("eval", "lm", "--data-uri", "other")
    assert [line.split() for line in result.stdout.splitlines()] == [
        ["METRIC", "VALUE"],
        ["accuracy", "0.5000"],
        ["loss", "2.0000"],
    ]
    assert asked[0]["data_uri"] == "other"
    document = json.loads(run("eval", "lm", "-o", "json").stdout)
    assert (document["kind"], document["metrics"]) == ("Evaluation", {"loss": 2.0, "accuracy": 0.5})
    assert (document["job_id"], document["name"], document["step"]) == ("lm-abc123", "lm", 50)
    assert "data_uri" not in asked[1]


def test_generate_prints_the_text_alone(run: Psctl, asked: list[dict[str, Any]]) -> None:
    result = run("generate", "lm", "--prompt", "once", "--max-new-tokens", "5", "--temperature", "0", "--seed", "3")
    assert (result.stdout, result.stderr) == ("once upon\n", "")
    request = asked[0]
    assert (request["prompt"], request["max_new_tokens"], request["temperature"], request["seed"]) == (
        "once",
        5,
        0.0,
        3,
    )


# --- the subprocess ---


def program(text: str) -> tuple[str, ...]:
    return (sys.executable, "-c", text)


def test_the_tool_gets_the_request_and_its_answer_comes_back() -> None:
    echo = program("import json, sys; print(json.dumps({'ok': True, 'got': json.load(sys.stdin)}))")
    assert results.run_tool({"command": "x"}, echo) == {"got": {"command": "x"}}


def test_the_tools_error_is_raised_as_itself() -> None:
    error = TaskError("no generate()", action="write one").to_dict()
    failing = program(f"import json, sys; print(json.dumps({{'ok': False, 'error': {error!r}}})); sys.exit(100)")
    with pytest.raises(TaskError, match="no generate") as caught:
        results.run_tool({}, failing)
    assert caught.value.action == "write one"


@pytest.mark.parametrize("text", ["", "print('half an ans')", "print('[]')", "print('{}')"])
def test_a_tool_without_an_answer_shows_its_last_words(text: str) -> None:
    dying = program(f"import sys; {text or 'pass'}; sys.stderr.write('the last word\\n'); sys.exit(7)")
    with pytest.raises(InternalError, match="status 7") as caught:
        results.run_tool({}, dying)
    assert "the last word" in caught.value.cause
