"""How an agent keeps its key from the user code that its processes run.

Where the agent is root, its trainers run as another user; that is the one way that also protects what the agent's user
owns. Otherwise a mount namespace hides the key from them, or Landlock does. docs/security.md compares them, and
`isolation_trial` chooses."""

from __future__ import annotations

import os
import pwd
import shutil
import stat
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from pscluster.agent.confine import CONFINEMENT, Confinement, Mode
from pscluster.errors import SettingsError, StorageError

AUTO = "auto"
CHOICES = (AUTO, *Mode)
"""What the setting `isolation` may be."""
IDENTITY = "identity"
"""The directory of an agent's key, in its state directory."""
DEFAULT_USERS = ("pscluster", "nobody")
"""Whose account trainers of a root agent get if no setting names one: the first that exists."""
_SECRETS = (IDENTITY, "certs", "token")  # in the state directory of a daemon
_DEVICES = ("mem", "kmem", "port")  # by which root reads what files protect


@dataclass(frozen=True, kw_only=True)
class Account:
    """A user of this host that is not root."""

    name: str
    uid: int
    gid: int
    home: str


@dataclass(frozen=True, kw_only=True)
class Isolation:
    """What the agent does for a process. `hidden`: what `namespace` and `landlock` put out of reach. `account`: another
    user's, whom trainers run as in mode `uid`, and whose group may connect to the sockets of partitions. `home`: for an
    account without one. `look`: finds what is to be hidden anew for each process: keys may be made after the start."""

    mode: Mode
    hidden: tuple[str, ...]
    account: Account | None
    home: str
    look: Callable[[], tuple[str, ...]] = tuple

    def environment(self) -> dict[str, str]:
        """The variables of a process with user code, beside those of every process. Reads some directories."""
        if self.mode is Mode.NONE:
            return {}
        if self.mode is not Mode.UID or self.account is None:
            hidden = tuple(sorted({*self.hidden, *self.look()}))
            return {CONFINEMENT: Confinement(mode=self.mode, hidden=hidden).to_json()}
        home = self.account.home if os.path.isdir(self.account.home) else self.home
        confinement = Confinement(mode=self.mode, uid=self.account.uid, gid=self.account.gid)
        named = {"HOME": home, "USER": self.account.name, "LOGNAME": self.account.name}
        return {CONFINEMENT: confinement.to_json(), **named}

    def give(self, directory: Path) -> None:
        """Make a directory that this agent made the trainers' own, with all in it. What another user's trainers left
        there is removed first. Blocks on the disk. Raises StorageError."""
        uid, gid = (self.account.uid, self.account.gid) if self.mode is Mode.UID and self.account else _own()
        try:
            owner = directory.lstat().st_uid
            if owner == uid:
                return
            if owner != os.geteuid():
                _empty(directory)
            for folder, _, files in os.walk(directory):
                for path in (Path(folder), *(Path(folder, name) for name in files)):
                    os.chown(path, uid, gid, follow_symlinks=False)
        except OSError as error:
            raise StorageError(f"cannot give {directory} to user {uid}: {error.strerror}") from None

    def admit(self, directory: Path) -> None:
        """Let trainers of the account connect to the sockets that a partition binds in `directory`. Raises
        StorageError."""
        if self.account is None:
            return
        try:
            os.chown(directory, -1, self.account.gid)
            directory.chmod(stat.S_ISGID | 0o710)  # sockets get the directory's group
        except OSError as error:
            raise StorageError(f"cannot admit group {self.account.gid} to {directory}: {error.strerror}") from None


def _own() -> tuple[int, int]:
    return os.geteuid(), os.getegid()


def _empty(directory: Path) -> None:
    for path in directory.iterdir():
        shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()


# ---- which way ----


def ways(wanted: str, *, is_root: bool, has_identity: bool, account: Account | None) -> tuple[Mode, ...]:
    """The modes to try, the best first. Pure."""
    if wanted != AUTO:
        return (Mode(wanted),)
    if not has_identity and account is None:
        return (Mode.NONE,)
    return (*((Mode.UID,) if is_root else ()), Mode.NAMESPACE, Mode.LANDLOCK, Mode.NONE)


def account_of(run_as: str | None, *, default: bool) -> Account | None:
    """The account that a setting names; without one, and with `default`, the first of DEFAULT_USERS. Raises
    SettingsError."""
    if run_as is None:
        names = [user.pw_name for user in pwd.getpwall()] if default and os.geteuid() == 0 else []
        run_as = next((name for name in DEFAULT_USERS if name in names), None)
    if run_as is None:
        return None
    if os.geteuid() != 0:
        raise SettingsError("only root can start trainers as another user", action="leave --run-as out")
    try:
        user = pwd.getpwnam(run_as)
    except KeyError:
        raise SettingsError(f"run_as: there is no user {run_as!r}", action=f"useradd --system {run_as}") from None
    if user.pw_uid == 0:
        raise SettingsError("run_as is root, whom nothing keeps from the agent's key", action="name another user")
    return Account(name=run_as, uid=user.pw_uid, gid=user.pw_gid, home=user.pw_dir)


def hidden_paths(state_dir: Path, environ: Mapping[str, str], *secrets: Path | None) -> tuple[str, ...]:
    """What trainers of the agent's own user must not reach, if it exists: the keys of this agent, of daemons whose
    state directories lie beside its own, and of the user, and the files `secrets`; for root the devices that hold the
    disk or the memory."""
    neighbours = [path for path in _listed(state_dir.parent) if path.is_dir()]
    found = [directory / name for directory in (state_dir.parent, *neighbours, state_dir) for name in _SECRETS]
    config = environ.get("XDG_CONFIG_HOME") or os.path.join(environ.get("HOME", "/"), ".config")
    found.append(Path(config) / "pscluster")
    found += [path for path in secrets if path is not None]
    if os.geteuid() == 0:
        devices = _listed(Path("/dev"))
        found += [path for path in devices if path.is_block_device() or path.name in _DEVICES]
    state = state_dir.resolve()
    resolved = {path.resolve() for path in found} - {state, *state.parents}
    return tuple(sorted(str(path) for path in resolved if path.exists() or path == state / IDENTITY))


def _listed(directory: Path) -> Iterable[Path]:
    try:
        return list(directory.iterdir())
    except OSError:
        return ()
