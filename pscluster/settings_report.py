"""Settings as people read them: each value with its origin, secrets masked. The daemons print theirs as JSON, which
`psctl config show --daemon` reads."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pscluster.settings import Resolved, resolve_with_origins

MASK = "***"
_JOIN_TOKEN = "psj1-"  # how a join token begins
_SECRETS = frozenset({"token", "join"})


def rows(resolved: Resolved[Any], values: Any = None) -> list[dict[str, str | None]]:
    """Name, value and origin of each field. `values`: an object whose attributes are shown in place of the settings'
    own, because defaults are filled in there."""
    shown = []
    for field in dataclasses.fields(resolved.settings):
        value = getattr(values if values is not None else resolved.settings, field.name)
        origin = resolved.origins[field.name]
        text = _text(field.name, value)
        shown.append({"key": field.name, "value": text, "origin": f"{origin.kind} {origin.name}".strip()})
    return shown


def to_json(cls: type[Any], flags: Mapping[str, Any], environ: Mapping[str, str], file: Path | None) -> str:
    """The rows of a daemon that was started so. Raises SettingsError as its start would."""
    return json.dumps(rows(resolve_with_origins(cls, flags, environ, file)))


def _text(name: str, value: Any) -> str | None:
    if value is None:
        return None
    text = ",".join(map(str, value)) if isinstance(value, tuple) else str(value)
    return MASK if _is_secret(name, text) else text


def _is_secret(name: str, text: str) -> bool:
    """A token given as text; one given as @FILE, or the path of its file, is none."""
    return text.startswith(_JOIN_TOKEN) or (name in _SECRETS and not text.startswith("@"))
