"""psctl against a master in this process."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from pscluster.cli.main import psctl
from tests.unit.cli.fake_master import FakeMaster, Serving

Psctl = Callable[..., Result]


@pytest.fixture(autouse=True)
def _no_settings_of_the_user(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in (
        "PS_ADDRESS",
        "PS_TOKEN_FILE",
        "PS_STATE_DIR",
        "PS_CONFIG",
        "PS_CONTEXT",
        "PS_JOIN",
        "PS_CREDENTIALS_DIR",
    ):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.delenv("XDG_STATE_HOME", raising=False)
    monkeypatch.delenv("XDG_CONFIG_HOME", raising=False)


@pytest.fixture
def serving(tmp_path: Path) -> Iterator[Serving]:
    served = Serving(FakeMaster(), tmp_path)
    yield served
    served.stop()


@pytest.fixture
def fake(serving: Serving) -> FakeMaster:
    return serving.fake


@pytest.fixture
def run(serving: Serving) -> Psctl:
    """Run psctl against the fake master."""

    def runner(*arguments: str) -> Result:
        return CliRunner().invoke(psctl, [*serving.arguments, *arguments])

    return runner


@pytest.fixture
def run_alone() -> Psctl:
    """Run psctl with no cluster named."""

    def runner(*arguments: str) -> Result:
        return CliRunner().invoke(psctl, list(arguments))

    return runner
