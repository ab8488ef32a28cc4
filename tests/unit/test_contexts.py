"""Contexts: the settings file is edited in place, and which setting beats which."""

from __future__ import annotations

import stat
import threading
import tomllib
from pathlib import Path

import pytest

from pscluster.client.contexts import Context, ContextFile, register_local, resolve_client
from pscluster.errors import NotFoundError, SettingsError, StateError
from pscluster.settings import Origin

WRITTEN = """\
# mine
state-dir = "/kept"  # also mine

[contexts.old]
# about old
address = "old:1"
token-file = "/old"
"""


@pytest.fixture
def file(tmp_path: Path) -> ContextFile:
    return ContextFile(tmp_path / "pscluster" / "config.toml")


def lab(file: ContextFile) -> Context:
    return Context(name="lab", address="10.0.0.5:7070", credentials_dir=file.credentials_dir("lab"))


def test_what_is_added_is_read_again_and_private(file: ContextFile) -> None:
    file.add(lab(file))
    assert file.read().by_name == {"lab": lab(file)}
    assert stat.S_IMODE(file.path.stat().st_mode) == 0o600
    assert stat.S_IMODE(file.path.parent.stat().st_mode) == 0o700
    with pytest.raises(StateError):
        file.add(lab(file))


def test_a_directory_that_is_there_keeps_its_mode(tmp_path: Path) -> None:
    tmp_path.chmod(0o755)
    file = ContextFile(tmp_path / "mine.toml")  # PS_CONFIG may lie in a home directory, or in /etc
    file.replace(Context(name="local"))
    assert stat.S_IMODE(tmp_path.stat().st_mode) == 0o755
    assert stat.S_IMODE(file.path.stat().st_mode) == 0o600


def test_what_else_the_file_says_stays(file: ContextFile) -> None:
    file.path.parent.mkdir()
    file.path.write_text(WRITTEN)
    file.add(lab(file))
    assert file.path.read_text().startswith(WRITTEN)
    file.use("lab")
    assert file.read().current == "lab"
    file.use("old")
    found = file.read()
    assert (found.current, found.overridden_by) == ("old", ("state_dir",))
    assert found.by_name["old"] == Context(name="old", address="old:1", token_file=Path("/old"))
    file.remove("old")
    text = file.path.read_text()
    assert "# mine" in text and "also mine" in text and "old" not in text
    assert tomllib.loads(text)["contexts"] == {"lab": lab(file).values()}


def test_a_layout_that_cannot_be_edited_is_left_alone(file: ContextFile) -> None:
    file.path.parent.mkdir()
    text = 'contexts = { lab = { address = "a:1" } }\n'
    file.path.write_text(text)
    assert file.read().by_name["lab"].address == "a:1"
    for change in (lambda: file.remove("lab"), lambda: file.add(Context(name="b", address="b:1"))):
        with pytest.raises(SettingsError):
            change()
        assert file.path.read_text() == text


def test_removing_the_selected_context_selects_nothing_and_deletes_its_key(file: ContextFile) -> None:
    file.add(lab(file))
    file.use("lab")
    kept, elsewhere = file.credentials_dir("lab"), file.path.parent / "elsewhere"
    kept.mkdir(parents=True)
    elsewhere.mkdir()
    file.add(Context(name="other", address="a:1", credentials_dir=elsewhere))
    file.remove("lab")
    file.remove("other")
    assert (file.read().current, file.read().by_name) == (None, {})
    assert not kept.exists() and elsewhere.exists()
    for change in (file.remove, file.use):
        with pytest.raises(NotFoundError):
            change("lab")


@pytest.mark.parametrize("name", ["", "a b", "../x", "x]", "a.b", "-x", "x" * 65])
def test_a_name_that_is_no_key_or_directory_is_refused(name: str) -> None:
    with pytest.raises(SettingsError):
        Context(name=name, address="a:1")


@pytest.mark.parametrize(
    "text",
    [
        "contexts = 1",
        "context = 1",
        "[contexts]\nlab = 1",
        '[contexts.lab]\nadress = "a:1"',
        "[contexts.lab]\naddress = 1",
    ],
)
def test_a_wrong_section_is_refused(file: ContextFile, text: str) -> None:
    file.path.parent.mkdir()
    file.path.write_text(text)
    with pytest.raises(SettingsError):
        file.read()


def test_writers_exclude_each_other(file: ContextFile) -> None:
    names = [f"c{number}" for number in range(8)]
    threads = [
        threading.Thread(target=file.add, args=(Context(name=name, address=f"{name}:1"),), daemon=True)
        for name in names
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert sorted(file.read().by_name) == names


# --- which beats which ---


def environ_of(file: ContextFile, **variables: str) -> dict[str, str]:
    return {"XDG_CONFIG_HOME": str(file.path.parents[1]), **variables}


def test_the_selected_context_gives_address_and_credentials(file: ContextFile) -> None:
    file.add(lab(file))
    assert resolve_client({}, environ_of(file)).settings.address is None
    file.use("lab")
    found = resolve_client({}, environ_of(file))
    assert found.settings.address == "10.0.0.5:7070"
    assert found.settings.credentials_dir == file.credentials_dir("lab")
    assert found.origins["address"] == Origin(kind="context", name="lab")
    assert found.origins["context"] == Origin(kind="file", name=str(file.path))


def test_what_has_a_higher_rank_beats_the_context(file: ContextFile) -> None:
    file.add(lab(file))
    file.use("lab")
    by_flag = resolve_client({"address": "b:1"}, environ_of(file))
    by_variable = resolve_client({}, environ_of(file, PS_STATE_DIR="/s"))
    for found in (by_flag, by_variable):
        assert found.settings.context is None and found.settings.credentials_dir is None
    assert (by_flag.settings.address, by_variable.settings.address) == ("b:1", None)


def test_a_context_that_a_flag_selects_is_not_led_elsewhere(file: ContextFile) -> None:
    """Its key must not be shown to another cluster, nor another's token to it."""
    file.add(lab(file))
    environ = environ_of(file, PS_ADDRESS="b:1", PS_TOKEN_FILE="/t", PS_CONTEXT="none")
    found = resolve_client({"context": "lab"}, environ)
    assert (found.settings.address, found.settings.token_file) == ("10.0.0.5:7070", None)
    assert found.settings.credentials_dir == file.credentials_dir("lab")
    tunnel = resolve_client({"context": "lab", "address": "127.0.0.1:1"}, environ)
    assert (tunnel.settings.address, tunnel.settings.credentials_dir) == ("127.0.0.1:1", file.credentials_dir("lab"))
    with_token = resolve_client({"context": "lab", "token_file": "/u"}, environ)
    assert (with_token.settings.token_file, with_token.settings.credentials_dir) == (Path("/u"), None)


def test_local_exists_without_being_written(file: ContextFile) -> None:
    file.add(lab(file))
    file.use("lab")
    assert resolve_client({"context": "local"}, environ_of(file)).settings.located({}).local
    with pytest.raises(NotFoundError):
        resolve_client({"context": "labb"}, environ_of(file))


def test_only_the_default_state_directory_is_registered(file: ContextFile, tmp_path: Path) -> None:
    state = tmp_path / "state" / "pscluster"
    environ = environ_of(file, XDG_STATE_HOME=str(tmp_path / "state"), PS_STATE_DIR=str(tmp_path / "other"))
    register_local(tmp_path / "other", environ)
    assert not file.path.exists()
    register_local(state, environ)
    written = file.path.stat().st_mtime_ns
    register_local(state, environ)
    assert file.read().by_name == {"local": Context(name="local", state_dir=state)}
    assert file.path.stat().st_mtime_ns == written
