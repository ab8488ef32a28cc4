"""Tests on several hosts are skipped, by name, where the machine cannot have them."""

from __future__ import annotations

from pathlib import Path

import pytest

from harness import hosts


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    here = [item for item in items if Path(__file__).parent in item.path.parents]
    if here and (reason := hosts.missing()):
        for item in here:
            item.add_marker(pytest.mark.skip(reason=reason))
