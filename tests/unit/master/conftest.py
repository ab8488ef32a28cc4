"""Where a master of the tests lives."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from pscluster.security.authority import Authority, cluster_id_of
from psmaster.control.security import CERTIFICATES
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


@pytest.fixture
def secured(site: MasterSettings) -> MasterSettings:
    """A master's settings in a state directory with certificates."""
    Authority.create(site.state_dir / CERTIFICATES, cluster_id_of(site.state_dir))
    return replace(site, listen=(*site.listen, "127.0.0.1:0"), join_listen="127.0.0.1:0")
