"""Where a master of the tests lives."""

from __future__ import annotations

from pathlib import Path

import pytest

from psmaster.server import MasterSettings
from tests.unit.master.test_service import TOKEN


@pytest.fixture
def site(tmp_path: Path) -> MasterSettings:
    token_file = tmp_path / "token"
    token_file.touch(mode=0o600)
    token_file.write_text(TOKEN)
    return MasterSettings(
        state_dir=tmp_path / "state", token_file=token_file, listen=(f"unix:{tmp_path}/m.sock",), suspicion_s=30.0
    )
