"""psctl as a program: light to start, global options, usage errors, exit codes."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import click
import pytest
from click.testing import CliRunner

from pscluster.cli.main import psctl
from pscluster.cli.session import Psctl as Group
from pscluster.errors import FrameError, NotFoundError, PsError
from tests.unit.cli.conftest import Psctl
from tests.unit.cli.fake_master import FakeMaster, Serving, job_message

HEAVY = ("torch", "grpc", "google.protobuf", "pydantic", "rich", "yaml", "numpy", "psutil", "structlog")


@pytest.mark.parametrize("arguments", [["--help"], ["submit", "--help"], ["up", "--help"], ["--version"]])
def test_help_imports_nothing_heavy(arguments: list[str]) -> None:
    program = (
        "import sys\n"
        "from pscluster.cli.main import psctl\n"
        f"psctl.main({arguments!r}, prog_name='psctl', standalone_mode=False)\n"
        f"print(sorted(set({HEAVY!r}) & set(sys.modules)), file=sys.stderr)\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=60)
    assert done.stderr.strip() == "[]"
    assert "psctl" in done.stdout


def test_every_verb_of_the_manual_is_there(run_alone: Psctl) -> None:
    daily = {"up", "down", "submit", "follow", "list", "status", "describe", "logs", "metrics", "wait"}
    rest = {"stop", "resume", "delete", "nodes", "health", "export", "eval", "generate", "init", "version", "config"}
    shown = {
        line.split()[0] for line in run_alone("--help").stdout.splitlines() if line.startswith("  ") and line.strip()
    }
    assert daily | rest <= shown


def test_every_verb_explains_itself() -> None:
    for name, command in psctl.commands.items():
        assert command.help, name
        for param in command.params:
            if isinstance(param, click.Option) and not param.hidden:
                assert param.help or param.name in ("seed", "max_new_tokens", "help"), (name, param.name)


@pytest.mark.parametrize(
    "arguments",
    [
        ["sumbit", "x"],
        ["wait"],
        ["wait", "lm", "--timeout", "soon"],
        ["list", "-o", "xml"],
        ["logs", "lm", "--worker", "0", "--server", "0"],
        ["logs", "lm", "--since", "yesteryear"],
        ["export", "lm", "--step", "newest"],
        ["up", "--workers", "0"],
        ["delete"],
    ],
)
def test_wrong_usage_exits_2_and_says_so_on_stderr(run: Psctl, arguments: list[str]) -> None:
    result = run(*arguments)
    assert result.exit_code == 2
    assert result.stdout == ""
    assert "Error: " in result.stderr


def test_a_misspelt_verb_is_corrected(run_alone: Psctl) -> None:
    assert "Did you mean submit?" in run_alone("sumbit").stderr
    assert "Did you mean show?" in run_alone("config", "shwo").stderr
    for stranger in ("get", "top"):
        result = run_alone(stranger, "jobs")
        assert result.exit_code == 2
        assert f"No such verb {stranger!r}" in result.stderr
        assert "Did you mean" not in result.stderr


@pytest.mark.parametrize(
    ("arguments", "option"),
    [
        (["submit", "x", "--folow"], "follow"),
        (["submit", "x", "--adress", "a"], "address"),
        (["--adress", "a", "list"], "address"),
        (["config", "show", "--orign"], "origin"),
        (["submit", "x", "--tide"], None),
        (["list", "--get"], None),
    ],
)
def test_a_misspelt_option_is_corrected_with_one_that_is_shown(
    run_alone: Psctl, arguments: list[str], option: str | None
) -> None:
    result = run_alone(*arguments)
    assert result.exit_code == 2
    assert "No such option" in result.stderr
    suggested = result.stderr.partition("Did you mean ")[2]
    assert suggested.strip() == (f"--{option}?" if option else "")


def test_no_cluster_exits_3(run_alone: Psctl, tmp_path: Path) -> None:
    result = run_alone("--state-dir", str(tmp_path), "list")
    assert result.exit_code == 3
    assert result.stdout == ""
    assert result.stderr.splitlines() == [
        f"error: PS-3001: no cluster runs with state directory {tmp_path}",
        "hint: start one with `psctl up`, or choose another with --address",
    ]


def test_an_address_that_nobody_answers_says_who_gave_it(
    run_alone: Psctl, serving: Serving, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And not to start a local cluster, which `psctl up` would then refuse."""
    serving.stop()
    address = serving.address
    config = tmp_path / "config.toml"
    config.write_text(f'address = "{address}"\n')
    monkeypatch.setenv("PS_TOKEN_FILE", str(serving.token_file))

    def hints(*arguments: str) -> list[str]:
        printed = [run_alone(*arguments, verb).stderr for verb in ("list", "up", "down")]
        assert address in printed[0]
        lines = [text.splitlines()[-1] for text in printed]
        assert lines[0].startswith("hint: ")
        assert lines[1] == lines[2]
        return [
            lines[0].partition("(")[2].rstrip(")").partition(":")[0],
            lines[1].removeprefix("hint: ").partition(":")[0],
        ]

    assert hints("--address", address) == ["--address sets it"] * 2
    monkeypatch.setenv("PS_CONFIG", str(config))
    assert hints() == [f"{config} sets it"] * 2
    monkeypatch.setenv("PS_ADDRESS", address)
    assert hints() == ["PS_ADDRESS is set"] * 2


def test_a_wrong_token_exits_4(run_alone: Psctl, serving: Serving, tmp_path: Path) -> None:
    (tmp_path / "wrong").write_text("wrong")
    (tmp_path / "wrong").chmod(0o600)
    result = run_alone("--address", serving.address, "--token-file", str(tmp_path / "wrong"), "list")
    assert result.exit_code == 4
    assert "PS-1005" in result.stderr


def test_global_options_may_come_last_and_from_the_environment(
    run_alone: Psctl, serving: Serving, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert run_alone("list", *serving.arguments).exit_code == 0
    monkeypatch.setenv("PS_ADDRESS", serving.address)
    monkeypatch.setenv("PS_TOKEN_FILE", str(serving.token_file))
    assert run_alone("list").exit_code == 0


def test_every_kind_of_error_gives_its_own_exit_code() -> None:
    kinds: list[type[PsError]] = [PsError]
    for kind in kinds:
        kinds.extend(kind.__subclasses__())

    for kind in kinds:

        @click.group(cls=Group)
        def group() -> None: ...

        @group.command()
        def fail(kind: type[PsError] = kind) -> None:
            raise kind("the cause", action="the action")

        result = CliRunner().invoke(group, ["fail"])
        assert result.exit_code == kind.exit_code, kind
        assert result.stderr == f"error: {kind.code}: the cause\nhint: the action\n"
        assert result.stdout == ""


def test_an_unforeseen_exception_is_an_internal_error_with_its_traceback() -> None:
    @click.group(cls=Group)
    def group() -> None: ...

    @group.command()
    def fail() -> None:
        raise ZeroDivisionError("oops")

    result = CliRunner().invoke(group, ["fail"])
    assert result.exit_code == 1
    assert "Traceback" in result.stderr
    assert "error: PS-9001: ZeroDivisionError: oops" in result.stderr


def test_ctrl_c_exits_130() -> None:
    @click.group(cls=Group)
    def group() -> None: ...

    @group.command()
    def fail() -> None:
        raise KeyboardInterrupt

    result = CliRunner().invoke(group, ["fail"])
    assert (result.exit_code, result.stderr) == (130, "interrupted\n")


def test_an_error_of_the_master_keeps_its_code(run: Psctl, fake: FakeMaster) -> None:
    fake.failures["List"] = [FrameError("odd")]
    result = run("list")
    assert result.exit_code == 1
    assert "error: PS-3002: odd" in result.stderr
    fake.failures["Get"] = [NotFoundError("no job x", action="look")]
    result = run("status", "x")
    assert (result.exit_code, result.stderr) == (102, "error: PS-1003: no job x\nhint: look\n")


def test_config_show_tells_origins(run_alone: Psctl, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "config.toml"
    file.write_text('address = "host:7000"\n')
    monkeypatch.setenv("PS_CONFIG", str(file))
    monkeypatch.setenv("PS_TOKEN_FILE", "/t")
    result = run_alone("--state-dir", "/s", "config", "show", "--origin", "-o", "json")
    found = json.loads(result.stdout)
    values = {key: value for key, value in found["values"].items() if value is not None}
    assert values == {"state_dir": "/s", "address": "host:7000", "token_file": "/t"}
    assert {key: found["origins"][key] for key in values} == {
        "state_dir": "flag --state-dir",
        "address": f"file {file}",
        "token_file": "environment PS_TOKEN_FILE",
    }
    file.write_text('adress = "host:7000"\n')
    result = run_alone("config", "show")
    assert result.exit_code == 2
    assert "did you mean address?" in result.stderr


def test_version_with_and_without_a_master(run: Psctl, run_alone: Psctl, tmp_path: Path) -> None:
    assert run("version").stdout == "psctl 0.1.0\npsmaster 0.1.0 (protocol 1)\n"
    alone = run_alone("--state-dir", str(tmp_path), "version")
    assert (alone.exit_code, alone.stdout) == (0, "psctl 0.1.0\n")
    assert "no master" in alone.stderr
    assert run_alone("version", "--client").stderr == ""
    assert run_alone("--version").stdout == "psctl 0.1.0\n"


def test_a_job_that_is_gone_when_the_pipe_is_closed_makes_no_noise(serving: Serving) -> None:
    serving.fake.jobs["x"] = job_message()
    command = [sys.executable, "-m", "pscluster.cli", *serving.arguments, "list"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.close()
        assert b"Traceback" not in process.stderr.read()
