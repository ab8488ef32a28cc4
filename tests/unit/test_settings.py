"""Settings: precedence, types, refusals, and where a local cluster lives."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import pytest

from pscluster import settings
from pscluster.errors import SettingsError, StorageError
from pscluster.settings import ClientSettings, Origin, resolve, resolve_with_origins


@dataclass(frozen=True, kw_only=True)
class Sample:
    state_dir: Path
    slots: int = 1
    ratio: float = 0.5
    listen: tuple[str, ...] = ()
    note: str | None = None
    eager: bool = False

    def __post_init__(self) -> None:
        if self.slots < 1:
            raise ValueError("slots must be at least 1")


def test_flag_beats_environment_beats_file_beats_default(tmp_path: Path) -> None:
    file = tmp_path / "settings.toml"
    file.write_text('slots = 2\nratio = 2\nlisten = ["a", "b"]\nstate-dir = "/from/file"\n')
    environ = {"PS_SLOTS": "3", "PS_RATIO": "0.25", "PS_UNRELATED": "x"}
    resolved = resolve_with_origins(Sample, {"slots": 4, "ratio": None}, environ, file)
    assert resolved.settings == Sample(state_dir=Path("/from/file"), slots=4, ratio=0.25, listen=("a", "b"), note=None)
    assert resolved.origins == {
        "state_dir": Origin(kind="file", name=str(file)),
        "slots": Origin(kind="flag", name="--slots"),
        "ratio": Origin(kind="environment", name="PS_RATIO"),
        "listen": Origin(kind="file", name=str(file)),
        "note": Origin(kind="default", name=""),
        "eager": Origin(kind="default", name=""),
    }


def test_environment_text_becomes_the_annotated_type() -> None:
    environ = {"PS_STATE_DIR": "~/x", "PS_LISTEN": "unix:/a, h:1,", "PS_EAGER": "Yes", "PS_NOTE": "5"}
    found = resolve(Sample, {}, environ)
    assert found == Sample(state_dir=Path("~/x").expanduser(), listen=("unix:/a", "h:1"), eager=True, note="5")


def test_a_relative_path_becomes_absolute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert resolve(Sample, {"state_dir": "state"}, {}).state_dir == tmp_path / "state"


@pytest.mark.parametrize(
    ("environ", "words"),
    [
        ({"PS_SLOTS": "many"}, ["slots", "int", "'many'", "PS_SLOTS"]),
        ({"PS_EAGER": "perhaps"}, ["eager", "bool"]),
        ({"PS_RATIO": "half"}, ["ratio", "float"]),
        ({"PS_SLOTS": "0"}, ["slots must be at least 1"]),
    ],
)
def test_a_bad_value_names_its_key_and_origin(environ: dict[str, str], words: list[str]) -> None:
    with pytest.raises(SettingsError) as caught:
        resolve(Sample, {"state_dir": "/x"}, environ)
    assert all(text in caught.value.cause for text in words)


@pytest.mark.parametrize("text", ["slots = 1.5", "slots = true", "eager = 1", "note = 3", "listen = [1]"])
def test_a_file_value_of_the_wrong_type_is_refused(tmp_path: Path, text: str) -> None:
    file = tmp_path / "settings.toml"
    file.write_text(text)
    with pytest.raises(SettingsError):
        resolve(Sample, {"state_dir": "/x"}, {}, file)


def test_an_unknown_key_is_refused_with_a_suggestion(tmp_path: Path) -> None:
    file = tmp_path / "settings.toml"
    file.write_text("slotz = 2")
    with pytest.raises(SettingsError, match="slotz") as caught:
        resolve(Sample, {"state_dir": "/x"}, {}, file)
    assert caught.value.action == "did you mean slots?"
    with pytest.raises(SettingsError, match="command line"):
        resolve(Sample, {"stat_dir": "/x"}, {})


def test_a_missing_key_says_how_to_give_it() -> None:
    with pytest.raises(SettingsError, match="state_dir is not set") as caught:
        resolve(Sample, {}, {})
    assert "--state-dir" in caught.value.action
    assert "PS_STATE_DIR" in caught.value.action


def test_a_file_that_is_missing_or_torn_is_named(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="absent"):
        resolve(Sample, {}, {}, tmp_path / "absent.toml")
    (tmp_path / "torn.toml").write_text("slots =")
    with pytest.raises(SettingsError, match="does not parse"):
        resolve(Sample, {}, {}, tmp_path / "torn.toml")


def test_the_default_state_dir_follows_the_environment() -> None:
    assert settings.default_state_dir({"PS_STATE_DIR": "/a"}) == Path("/a")
    assert settings.default_state_dir({"XDG_STATE_HOME": "/b"}) == Path("/b/pscluster")
    assert settings.default_state_dir({}) == Path("~/.local/state/pscluster").expanduser()


def test_the_runtime_dir_is_short_and_stable_for_any_state_dir(tmp_path: Path) -> None:
    deep = tmp_path / ("d" * 120)
    found = settings.runtime_dir(deep)
    assert found == settings.runtime_dir(deep)
    assert found != settings.runtime_dir(tmp_path)
    assert len(os.fsencode(found)) <= 80
    assert settings.master_address(deep) == f"unix:{found}/master.sock"


def test_the_runtime_dir_is_private_and_made_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", "/tmp")
    path = settings.make_runtime_dir(tmp_path)
    try:
        assert path.stat().st_mode & 0o777 == 0o700
        assert settings.make_runtime_dir(tmp_path) == path
        path.chmod(0o755)
        with pytest.raises(StorageError, match="only this user"):
            settings.make_runtime_dir(tmp_path)
    finally:
        path.rmdir()
    path.symlink_to(tmp_path)
    try:
        with pytest.raises(StorageError, match="only this user"):
            settings.make_runtime_dir(tmp_path)
    finally:
        path.unlink()


def test_a_client_with_no_settings_means_the_local_cluster() -> None:
    located = ClientSettings().located({"PS_STATE_DIR": "/s"})
    assert located.local
    assert located.state_dir == Path("/s")
    assert located.token_file == Path("/s/token")
    assert located.address == settings.master_address(Path("/s"))


def test_a_client_with_an_address_means_that_cluster() -> None:
    located = ClientSettings(address="host:1", token_file=Path("/t")).located({})
    assert not located.local
    assert (located.address, located.token_file) == ("host:1", Path("/t"))
    with pytest.raises(SettingsError, match="neither host:port"):
        resolve(ClientSettings, {"address": "host"}, {})
