"""psctl config show: values and origins, of psctl and of daemons; secrets are masked."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import pytest

from pscluster import settings_report
from pscluster.settings import resolve_with_origins
from tests.unit.cli.conftest import Psctl


def shown(result_text: str) -> dict[str, tuple[str | None, str]]:
    body = json.loads(result_text)
    return {key: (value, body["origins"][key]) for key, value in body["values"].items()}


def test_each_setting_of_psctl_has_its_origin(
    run_alone: Psctl, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_alone("context", "add", "lab", "--address", "lab:7070", "--token-file", "/t")
    run_alone("context", "use", "lab")
    config = tmp_path / "home" / ".config" / "pscluster" / "config.toml"
    found = shown(run_alone("config", "show", "--origin", "-o", "json").stdout)
    assert found["context"] == ("lab", f"file {config}")
    assert found["address"] == ("lab:7070", "context lab")
    assert found["token_file"] == ("/t", "context lab")
    assert found["credentials_dir"] == (None, "default")
    monkeypatch.setenv("PS_ADDRESS", "b:1")
    found = shown(run_alone("--token-file", "/u", "config", "show", "--origin", "-o", "json").stdout)
    assert found["address"] == ("b:1", "environment PS_ADDRESS")
    assert found["token_file"] == ("/u", "flag --token-file")
    assert found["context"] == (None, "default")


@pytest.mark.parametrize("daemon", ["master", "worker", "server"])
def test_the_settings_of_a_daemon(run_alone: Psctl, tmp_path: Path, daemon: str) -> None:
    file = tmp_path / "daemon.toml"
    file.write_text('log_level = "debug"\n')
    flags = ["--state-dir", "/s", "--metrics-listen", "127.0.0.1:9"]
    flags += [] if daemon == "master" else ["--node-id", "n", "--master", "unix:/m", "--token-file", "/t"]
    words = ["config", "show", "--origin", "--daemon", daemon, "--config", str(file), "-o", "json", "--", *flags]
    result = run_alone(*words)
    assert result.exit_code == 0, result.stderr
    found = shown(result.stdout)
    assert found["log_level"] == ("debug", f"file {file}")
    assert found["state_dir"] == ("/s", "flag --state-dir")
    assert found["metrics_listen"] == ("127.0.0.1:9", "flag --metrics-listen")


def test_a_daemon_that_would_not_start_says_why(run_alone: Psctl, tmp_path: Path) -> None:
    file = tmp_path / "daemon.toml"
    file.write_text('lisen = "127.0.0.1:1"\nstate_dir = "/s"\n')
    result = run_alone("config", "show", "--daemon", "master", "--config", str(file))
    assert (result.exit_code, result.stdout) == (2, "")
    assert "lisen" in result.stderr
    assert run_alone("config", "show", "--config", str(file)).exit_code == 2


@dataclass(frozen=True, kw_only=True)
class Joining:
    join: str | None = None
    listen: tuple[str, ...] = ()
    note: str = ""


@pytest.mark.parametrize(
    ("variables", "values"),
    [
        ({"PS_JOIN": "psj1-secret"}, ["***", "", ""]),
        ({"PS_JOIN": "@/file", "PS_LISTEN": "a:1,b:2"}, ["@/file", "a:1,b:2", ""]),
        ({"PS_NOTE": "psj1-misplaced"}, [None, "", "***"]),
    ],
)
def test_secrets_are_masked_and_files_are_not(variables: dict[str, str], values: list[str | None]) -> None:
    rows = settings_report.rows(resolve_with_origins(Joining, {}, variables))
    assert [row["value"] for row in rows] == values
