"""Settings: a frozen, keyword-only dataclass beside what it configures, resolved once at start; and the paths of a
local cluster.

A flag beats the `PS_<FIELD>` environment variable, which beats the TOML file, which beats the field's default. Fields
may be str, int, float, bool, Path, tuple[str, ...] (comma-separated in the environment) and each of them `| None`.
Unknown keys of flags and file are errors; environment variables are shared by all processes: unknown ones are ignored.
"""

from __future__ import annotations

import dataclasses
import hashlib
import os
import shutil
import stat
import tempfile
import tomllib
import types
import typing
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

from pscluster.errors import SettingsError, StorageError
from pscluster.spelling import nearest

S = TypeVar("S")

_WORDS = {"1": True, "true": True, "yes": True, "on": True, "0": False, "false": False, "no": False, "off": False}
# A Unix socket's path holds 107 bytes; sockets in the runtime directory have names of up to 27.
_LONGEST_RUNTIME_DIR = 80


@dataclass(frozen=True, kw_only=True)
class Origin:
    """Where a value came from: `kind` is "flag", "environment", "file", "context" or "default", `name` which one."""

    kind: str
    name: str


@dataclass(frozen=True, kw_only=True)
class Resolved(Generic[S]):
    """Settings and, by field name, the origin of each."""

    settings: S
    origins: dict[str, Origin]


def resolve(cls: type[S], flags: Mapping[str, Any], environ: Mapping[str, str], file: Path | None = None) -> S:
    """The settings of dataclass `cls`. See `resolve_with_origins`."""
    return resolve_with_origins(cls, flags, environ, file).settings


def resolve_with_origins(
    cls: type[S],
    flags: Mapping[str, Any],
    environ: Mapping[str, str],
    file: Path | None = None,
    *,
    sections: Collection[str] = (),
) -> Resolved[S]:
    """Fill dataclass `cls` and return where each value came from. `flags`: parsed values by field, None where not
    given. `file`: a TOML file, which must exist; `sections` are keys of it that have another reader. Paths come out
    absolute. Raises SettingsError for an unknown or missing key, a wrong type, or what `cls` refuses by ValueError."""
    fields = {field.name: field for field in dataclasses.fields(cls)}  # type: ignore[arg-type]
    hints = typing.get_type_hints(cls)
    table = read_table(file) if file is not None else {}
    table = {key: value for key, value in table.items() if key not in sections}
    _refuse_unknown(table, fields, f"{file}")
    _refuse_unknown(flags, fields, "the command line")
    values: dict[str, Any] = {}
    origins: dict[str, Origin] = {}
    for name, field in fields.items():
        found = _lookup(name, flags, environ, table, file)
        if found is None:
            origins[name] = Origin(kind="default", name="")
            if field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING:
                action = f"give {_flag(name)} or {environment_name(name)}"
                raise SettingsError(f"{name} is not set", action=action)
            continue
        raw, origins[name] = found
        values[name] = _convert(raw, hints[name], name, origins[name])
    try:
        return Resolved(settings=cls(**values), origins=origins)
    except ValueError as error:
        raise SettingsError(str(error)) from None


def environment_name(field: str) -> str:
    """The environment variable of a field: "state_dir" -> "PS_STATE_DIR"."""
    return "PS_" + field.upper()


def _flag(field: str) -> str:
    return "--" + field.replace("_", "-")


def _lookup(
    name: str, flags: Mapping[str, Any], environ: Mapping[str, str], table: Mapping[str, Any], file: Path | None
) -> tuple[Any, Origin] | None:
    if flags.get(name) is not None:
        return flags[name], Origin(kind="flag", name=_flag(name))
    variable = environment_name(name)
    if environ.get(variable):
        return environ[variable], Origin(kind="environment", name=variable)
    if name in table:
        return table[name], Origin(kind="file", name=str(file))
    return None


def read_table(file: Path) -> dict[str, Any]:
    """The keys of a settings file, with underscores. Raises SettingsError."""
    try:
        table = tomllib.loads(file.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise SettingsError(f"cannot read the settings file {file}: {error}") from None
    except tomllib.TOMLDecodeError as error:
        raise SettingsError(f"{file} does not parse: {error}") from None
    return {key.replace("-", "_"): value for key, value in table.items()}


def _refuse_unknown(given: Mapping[str, Any], fields: Mapping[str, Any], where: str) -> None:
    for key in given:
        if key not in fields:
            near = nearest(key, fields)
            action = f"did you mean {near}?" if near else f"the keys are: {', '.join(fields)}"
            raise SettingsError(f"unknown key {key} in {where}", action=action)


def _convert(raw: Any, hint: Any, name: str, origin: Origin) -> Any:
    """`raw` (text, or a value that TOML or a flag parser gave) as the annotated type."""
    plain = hint
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        (plain,) = (part for part in typing.get_args(hint) if part is not types.NoneType)
    try:
        return _convert_plain(raw, plain)
    except (ValueError, TypeError):
        wanted = getattr(plain, "__name__", str(plain))
        where = f"{origin.kind} {origin.name}".strip()
        raise SettingsError(f"{name} must be {wanted}, not {raw!r} (from {where})") from None


def _convert_plain(raw: Any, hint: Any) -> Any:
    if hint is Path and isinstance(raw, str | Path):
        return Path(raw).expanduser().absolute()  # it is passed to processes that run in other directories
    if typing.get_origin(hint) is tuple:
        parts = [part.strip() for part in raw.split(",")] if isinstance(raw, str) else list(raw)
        if not all(isinstance(part, str) for part in parts):
            raise TypeError
        return tuple(part for part in parts if part)
    if hint is bool:
        if isinstance(raw, str) and raw.lower() in _WORDS:
            return _WORDS[raw.lower()]
        if isinstance(raw, bool):
            return raw
    if hint in (int, float) and isinstance(raw, str | int | float) and not isinstance(raw, bool):
        if hint is int and isinstance(raw, float):
            raise TypeError
        return hint(raw)
    if hint is str and isinstance(raw, str):
        return raw
    raise TypeError


def default_state_dir(environ: Mapping[str, str]) -> Path:
    """The default state directory of the local cluster: $PS_STATE_DIR, else ~/.local/state/pscluster."""
    if environ.get("PS_STATE_DIR"):
        return Path(environ["PS_STATE_DIR"]).expanduser().absolute()
    base = environ.get("XDG_STATE_HOME") or "~/.local/state"
    return (Path(base).expanduser() / "pscluster").absolute()


def runtime_dir(state_dir: Path) -> Path:
    """The path of a local cluster's sockets, derived from the state directory but always short. Raises SettingsError
    when no temporary directory is short enough."""
    digest = hashlib.sha256(os.fsencode(state_dir.expanduser().resolve())).hexdigest()[:8]
    name = f"ps-{os.getuid()}-{digest}"
    for base in (tempfile.gettempdir(), "/tmp"):
        path = Path(base) / name
        if len(os.fsencode(path)) <= _LONGEST_RUNTIME_DIR:
            return path
    raise SettingsError(f"no temporary directory with a short path for sockets: {path}", action="set TMPDIR")


def make_runtime_dir(state_dir: Path) -> Path:
    """Create `runtime_dir(state_dir)` with mode 0700. Idempotent. Raises StorageError when another user owns what is
    there, it is a link, or others may enter it."""
    path = runtime_dir(state_dir)
    try:
        path.mkdir(mode=0o700, exist_ok=True)
        found = path.lstat()
    except OSError as error:
        raise StorageError(f"cannot create {path}: {error.strerror}") from None
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid() or stat.S_IMODE(found.st_mode) & 0o077:
        raise StorageError(f"{path} is not a directory that only this user may enter", action=f"remove {path}")
    return path


def remove_runtime_dir(state_dir: Path) -> None:
    """Remove the sockets' directory of what does not run any more. Idempotent. A link, or what belongs to another user,
    is left: `make_runtime_dir` refuses it."""
    path = runtime_dir(state_dir)
    try:
        if path.lstat().st_uid == os.getuid() and not path.is_symlink():
            shutil.rmtree(path)
    except FileNotFoundError:
        return
    except OSError as error:
        raise StorageError(f"cannot remove {path}: {error.strerror}") from None


def master_address(state_dir: Path) -> str:
    """The address at which a local cluster's master listens, for --listen and --master."""
    return f"unix:{runtime_dir(state_dir) / 'master.sock'}"


def token_file(state_dir: Path) -> Path:
    """The file of a local cluster's token, mode 0600."""
    return state_dir / "token"


def client_config_file(environ: Mapping[str, str]) -> Path:
    """The settings file of psctl and notebooks: $PS_CONFIG, else $XDG_CONFIG_HOME/pscluster/config.toml."""
    if environ.get("PS_CONFIG"):
        return Path(environ["PS_CONFIG"]).expanduser().absolute()
    base = environ.get("XDG_CONFIG_HOME") or "~/.config"
    return (Path(base).expanduser() / "pscluster" / "config.toml").absolute()


@dataclass(frozen=True, kw_only=True)
class ClientSettings:
    """The cluster that a client uses. `context`: a cluster that the settings file describes under a name; what is set
    beside it takes precedence (see `pscluster.client.contexts`). Without address: the local one of `state_dir`."""

    context: str | None = None
    state_dir: Path | None = None
    address: str | None = None
    token_file: Path | None = None
    credentials_dir: Path | None = None

    def __post_init__(self) -> None:
        if self.address is not None and ":" not in self.address:
            raise ValueError(f"address {self.address!r} is neither host:port nor unix:/path")

    def located(self, environ: Mapping[str, str]) -> LocatedCluster:
        """The settings with defaults filled in."""
        state_dir = (self.state_dir or default_state_dir(environ)).expanduser().absolute()
        return LocatedCluster(
            context=self.context,
            state_dir=state_dir,
            address=self.address or master_address(state_dir),
            token_file=self.token_file or token_file(state_dir),
            credentials_dir=self.credentials_dir,
            local=self.address is None,
        )


@dataclass(frozen=True, kw_only=True)
class LocatedCluster:
    """One cluster: its master's address, its token's file or the directory of the user's certificate, and whether it
    is the local one of `state_dir`. `context`: the name under which it was selected, if it was."""

    context: str | None = None
    state_dir: Path
    address: str
    token_file: Path
    credentials_dir: Path | None = None
    local: bool
