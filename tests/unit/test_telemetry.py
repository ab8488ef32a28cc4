"""Logs are one line each and counted; /metrics binds its own address or says by name why not."""

from __future__ import annotations

import json
import logging
import urllib.error
import urllib.request
from collections.abc import Iterator

import pytest
import structlog
from prometheus_client import CollectorRegistry, Counter

from pscluster import telemetry
from pscluster.errors import AddressInUseError, SettingsError


@pytest.fixture
def _logging() -> Iterator[None]:
    root = logging.getLogger()
    handlers, level = root.handlers, root.level
    yield
    root.handlers, root.level = handlers, level
    structlog.reset_defaults()


def counted(level: str) -> float:
    return telemetry.LOG_MESSAGES.labels(level=level)._value.get()


@pytest.mark.usefixtures("_logging")
def test_log_lines_are_json_away_from_a_terminal_and_counted(capsys: pytest.CaptureFixture[str]) -> None:
    telemetry.configure_logging("worker", "info")
    before = counted("warning"), counted("debug")
    structlog.get_logger().warning("looks odd", step=3)
    structlog.get_logger().debug("unseen")
    logging.getLogger("asyncio").error("from %s", "a library")
    captured = capsys.readouterr()
    first, second = (json.loads(line) for line in captured.err.splitlines())
    assert (first["event"], first["step"], first["role"], first["level"]) == ("looks odd", 3, "worker", "warning")
    assert (second["event"], second["logger"]) == ("from a library", "asyncio")
    assert captured.out == ""
    assert (counted("warning"), counted("debug")) == (before[0] + 1, before[1])


def test_an_unknown_level_is_refused() -> None:
    with pytest.raises(SettingsError, match="loud"):
        telemetry.configure_logging("worker", "loud")


def scrape(address: str, path: str = "/metrics") -> str:
    with urllib.request.urlopen(f"http://{address}{path}", timeout=5) as answer:
        return str(answer.read().decode())


def test_serves_a_registry_until_closed() -> None:
    registry = CollectorRegistry()
    Counter("ps_things", "Things.", registry=registry).inc(2)
    endpoint = telemetry.MetricsEndpoint("127.0.0.1:0", registry)
    try:
        assert "ps_things_total 2.0" in scrape(endpoint.address)
        with pytest.raises(urllib.error.HTTPError):
            scrape(endpoint.address, "/secrets")
        with pytest.raises(AddressInUseError, match="is taken"):
            telemetry.MetricsEndpoint(endpoint.address, registry)
    finally:
        endpoint.close()
    with pytest.raises(urllib.error.URLError):
        scrape(endpoint.address)
    telemetry.MetricsEndpoint(endpoint.address, registry).close()


@pytest.mark.parametrize("listen", ["", "9090", "host:", ":80", "127.0.0.1:70000", "127.0.0.1:x"])
def test_a_wrong_address_is_refused(listen: str) -> None:
    with pytest.raises(SettingsError, match="is not HOST:PORT"):
        telemetry.MetricsEndpoint(listen, CollectorRegistry())


def test_an_address_of_another_machine_is_refused() -> None:
    with pytest.raises(SettingsError, match="cannot be served"):
        telemetry.MetricsEndpoint("192.0.2.1:0", CollectorRegistry())


def test_calls_are_observed() -> None:
    telemetry.observe_rpc("/a/B", 0.2, "OK")
    telemetry.observe_rpc("/a/B", None, "NOT_FOUND")
    telemetry.record_build("worker", "1.2.3")
    assert telemetry.RPC_ERRORS.labels(method="/a/B", code="NOT_FOUND")._value.get() == 1
