"""What the cluster tests report beside their results."""

from __future__ import annotations

from typing import Any


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """Say that golden hashes were not compared: among hundreds of passed tests a skip is easily overlooked."""
    skipped = [report for report in terminalreporter.stats.get("skipped", []) if "test_golden.py" in report.nodeid]
    if skipped:
        terminalreporter.section("golden hashes NOT compared", red=True)
        reasons = {report.longrepr[2].removeprefix("Skipped: ") for report in skipped if report.longrepr}
        for reason in sorted(reasons):
            terminalreporter.line(reason)
