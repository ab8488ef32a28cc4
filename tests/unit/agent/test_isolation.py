"""Whether user code reaches its agent's key: every way of isolation that this machine gives is attacked, as root and as
another user."""

from __future__ import annotations

import json
import os
import secrets
import shutil
import stat
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from pscluster.agent.confine import CONFINEMENT, Mode, ancestors_of
from pscluster.agent.isolation import Account, Isolation, account_of, hidden_paths, ways
from pscluster.errors import SettingsError
from pscluster.user_frames import open_below

pytestmark = pytest.mark.timeout(120)

ROOT = Path(__file__).parents[3]
NOBODY = 65534
IS_ROOT = os.geteuid() == 0
SOMEBODY = Account(name="nobody", uid=NOBODY, gid=NOBODY, home="/nonexistent")
WITHOUT = {"path", "relative path", "link", "descriptors", "memory file", "memory", "environment", "ptrace"}
"""What at least succeeds where nothing prevents it: the attempts themselves work."""


@pytest.fixture
def place() -> Iterator[Path]:
    """A directory where every user may make what only that user can rename; pytest's own are for one user."""
    directory = Path(tempfile.mkdtemp(prefix="ps-isolation-"))
    directory.chmod(0o1777)
    try:
        yield directory
    finally:
        shutil.rmtree(directory)


def _python_for_all() -> str:
    """A Python that every user can run, as pscluster's part without dependencies needs it; empty: none here."""
    code = "import sys, pscluster.agent.isolation; sys.exit(sys.version_info < (3, 11))"
    environ = {"PYTHONPATH": str(ROOT), "PYTHONDONTWRITEBYTECODE": "1"}
    for python in (sys.executable, "/usr/bin/python3"):
        try:
            tried = subprocess.run([python, "-c", code], env=environ, cwd="/", capture_output=True, **_other_user())
        except OSError:
            continue
        if tried.returncode == 0:
            return python
    return ""


def _other_user() -> dict[str, Any]:
    return {"user": NOBODY, "group": NOBODY, "extra_groups": []} if IS_ROOT else {}


def _attack(mode: Mode, place: Path, as_root: bool) -> Mapping[str, Any]:
    python = _python_for_all()
    if not python:
        pytest.skip("no Python here that every user can run")
    secret = secrets.token_hex(24)
    environ = {"PATH": os.environ["PATH"], "PYTHONPATH": str(ROOT), "PYTHONDONTWRITEBYTECODE": "1"}
    done = subprocess.run(
        [python, "-m", "tests.harness.attacked_agent", str(mode), str(place / "state"), "nobody"],
        env={**environ, "PLAYED_SECRET": secret},
        cwd=ROOT,
        capture_output=True,
        text=True,
        **({} if as_root == IS_ROOT else _other_user()),
    )
    if done.returncode and mode is not Mode.NONE and "OSError" in done.stderr + done.stdout:
        pytest.skip(f"this machine does not give {mode}: {done.stderr.splitlines()[-1]}")
    assert done.returncode == 0, done.stderr
    found: Mapping[str, Any] = json.loads(done.stdout)
    return found


USERS = [pytest.param(False, id="user"), *([pytest.param(True, id="root")] if IS_ROOT else [])]


@pytest.mark.parametrize("as_root", USERS)
def test_the_attack_succeeds_where_nothing_prevents_it(place: Path, as_root: bool) -> None:
    found = _attack(Mode.NONE, place, as_root)
    assert {name for name, got in found["got"].items() if got} >= WITHOUT
    assert not found["intact"]


@pytest.mark.parametrize("as_root", USERS)
@pytest.mark.parametrize("mode", [Mode.NAMESPACE, Mode.LANDLOCK])
def test_user_code_does_not_get_the_key_of_its_own_user(place: Path, mode: Mode, as_root: bool) -> None:
    found = _attack(mode, place, as_root)
    assert not {name for name, got in found["got"].items() if got}
    assert found["intact"]


@pytest.mark.skipif(not IS_ROOT, reason="only root becomes another user")
def test_user_code_does_not_get_the_key_of_another_user(place: Path) -> None:
    found = _attack(Mode.UID, place, as_root=True)
    assert not {name for name, got in found["got"].items() if got}
    assert found["intact"]


# ---- which way, and what it hides ----


@pytest.mark.parametrize(
    ("wanted", "is_root", "has_identity", "account", "expected"),
    [
        ("auto", False, False, None, [Mode.NONE]),
        ("auto", True, False, None, [Mode.NONE]),
        ("auto", True, False, SOMEBODY, [Mode.UID, Mode.NAMESPACE, Mode.LANDLOCK, Mode.NONE]),
        ("auto", True, True, SOMEBODY, [Mode.UID, Mode.NAMESPACE, Mode.LANDLOCK, Mode.NONE]),
        ("auto", False, True, None, [Mode.NAMESPACE, Mode.LANDLOCK, Mode.NONE]),
        ("landlock", False, False, None, [Mode.LANDLOCK]),
        ("none", True, True, SOMEBODY, [Mode.NONE]),
    ],
)
def test_the_ways_in_their_order(
    wanted: str, is_root: bool, has_identity: bool, account: Account | None, expected: list[Mode]
) -> None:
    assert list(ways(wanted, is_root=is_root, has_identity=has_identity, account=account)) == expected


@pytest.mark.parametrize("user", ["root", "no-such-user-here"])
def test_a_user_that_protects_nothing_is_refused(user: str) -> None:
    with pytest.raises(SettingsError):
        account_of(user, default=True)


def test_a_key_that_is_made_later_is_hidden_from_the_next_process(place: Path) -> None:
    (place / "worker-0/identity").mkdir(parents=True)
    look = partial(hidden_paths, place / "worker-0", {"HOME": str(place / "home")})
    isolation = Isolation(mode=Mode.NAMESPACE, hidden=look(), account=None, home="", look=look)
    later = [place / "server-0/identity", place / "home/.config/pscluster"]
    for path in later:
        path.mkdir(parents=True)
    assert {str(path) for path in later} <= set(json.loads(isolation.environment()[CONFINEMENT])["hidden"])


def test_keys_of_neighbours_and_of_the_user_are_hidden(place: Path) -> None:
    for name in ("worker-0/identity", "server-0/identity", "master/certs", "home/.config/pscluster", "data"):
        (place / name).mkdir(parents=True)
    (place / "master/token").touch()
    (place / "link").symlink_to(place / "worker-0")
    token = place / "other-token"
    token.touch()
    hidden = hidden_paths(place / "worker-0", {"HOME": str(place / "home")}, token)
    expected = ("worker-0/identity", "server-0/identity", "master/certs", "master/token", "home/.config/pscluster")
    assert {path for path in hidden if path.startswith(f"{place}/")} == {str(place / name) for name in expected} | {
        str(token)
    }


def test_a_hidden_path_never_holds_the_state_directory(place: Path) -> None:
    """The state directory may lie where a user's keys do."""
    state_dir = place / "home/.config/pscluster/worker-0"
    state_dir.mkdir(parents=True)
    hidden = hidden_paths(state_dir, {"HOME": str(place / "home")}, None)
    assert not {str(path) for path in (state_dir, *state_dir.parents)} & set(hidden)
    assert str(state_dir / "identity") in hidden


def test_ancestors_come_before_what_is_below_them() -> None:
    found = ancestors_of([Path("/a/b/c"), Path("/a/x")])
    assert found == [Path("/"), Path("/a"), Path("/a/b")]


# ---- directories ----


@pytest.mark.skipif(not IS_ROOT, reason="only root gives files away")
def test_directories_are_given_to_the_account_and_taken_back_empty(place: Path) -> None:
    cache = place / "cache"
    (cache / "sub").mkdir(parents=True)
    (cache / "sub" / "file").touch()
    outside = place / "outside"
    outside.touch()
    (cache / "link").symlink_to(outside)
    theirs = Isolation(mode=Mode.UID, hidden=(), account=SOMEBODY, home=str(cache))
    theirs.give(cache)
    assert {path.lstat().st_uid for path in (cache, *cache.rglob("*"))} == {NOBODY}
    assert outside.stat().st_uid == 0
    Isolation(mode=Mode.NAMESPACE, hidden=(), account=SOMEBODY, home="").give(cache)
    assert cache.stat().st_uid == 0
    assert not list(cache.iterdir())


@pytest.mark.skipif(not IS_ROOT, reason="only root admits another group")
def test_the_account_is_admitted_to_sockets(place: Path) -> None:
    sockets = place / "p1"
    sockets.mkdir(mode=0o700)
    Isolation(mode=Mode.NONE, hidden=(), account=SOMEBODY, home="").admit(sockets)
    assert (sockets.stat().st_gid, stat.S_IMODE(sockets.stat().st_mode)) == (NOBODY, 0o2710)


# ---- what the agent reads of what user code wrote ----


@pytest.mark.parametrize("relative", ["link", "folder/key", "../key", "folder/../../key", "pipe", "", "none"])
def test_only_regular_files_below_the_directory_are_read(place: Path, relative: str) -> None:
    """Or an agent would report its own key as the stack of a trainer, or as a line of its code."""
    below = place / "below"
    below.mkdir()
    (place / "key").write_text("secret")
    (below / "link").symlink_to(place / "key")
    (below / "folder").symlink_to(place)
    os.mkfifo(below / "pipe")
    with pytest.raises(OSError):  # noqa: PT011 - a link is ELOOP, which has no class of its own
        open_below(below, relative)


def test_a_file_below_is_read_but_not_below_a_link(place: Path) -> None:
    (place / "below/folder").mkdir(parents=True)
    (place / "below/folder/file").write_text("text")
    (place / "link").symlink_to(place / "below")
    with open_below(place / "below", "folder/file") as file:
        assert file.read() == b"text"
    with pytest.raises(OSError):  # noqa: PT011 - a link is ELOOP, which has no class of its own
        open_below(place / "link", "folder/file")


def test_a_join_token_on_the_command_line_is_overwritten() -> None:
    code = (
        "import sys; from pathlib import Path; from pscluster.agent.confine import conceal_argument;"
        "conceal_argument(sys.argv[1].partition('=')[2]); print(Path('/proc/self/cmdline').read_bytes())"
    )
    shown = subprocess.run(
        [sys.executable, "-c", code, "--join=psj1-secret", "other"], capture_output=True, text=True, check=True
    ).stdout
    assert "psj1" not in shown
    assert "--join=xxxxxxxxxxx" in shown
    assert "other" in shown
