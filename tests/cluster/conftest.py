"""The summary of the cluster tests."""

from __future__ import annotations

from typing import Any


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """Report that golden hashes were not compared: a skip among hundreds of tests is easily overlooked."""
    skipped = [report for report in terminalreporter.stats.get("skipped", []) if "test_golden.py" in report.nodeid]
    if skipped:
        terminalreporter.section("golden hashes NOT compared", red=True)
        reasons = {report.longrepr[2].removeprefix("Skipped: ") for report in skipped if report.longrepr}
        for reason in sorted(reasons):
            terminalreporter.line(reason)
