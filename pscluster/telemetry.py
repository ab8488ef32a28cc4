"""A daemon's log lines on stderr and its metrics over HTTP.

Metrics are in prometheus_client's default registry. Unlike its own HTTP server, MetricsEndpoint resolves no host names,
limits the time of a scrape and serves no other path."""

from __future__ import annotations

import errno
import logging
import socket
import socketserver
import sys
import threading
from collections.abc import MutableMapping
from typing import Any
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer

import prometheus_client as prometheus
import structlog
from prometheus_client import REGISTRY, CollectorRegistry, Counter, Gauge, Histogram

from pscluster.address import join_address, split_address
from pscluster.errors import AddressInUseError, SettingsError

LEVELS = ("debug", "info", "warning", "error", "critical")
_SCRAPE_TIMEOUT_S = 10.0
_POLL_S = 0.2

prometheus.disable_created_metrics()  # type: ignore[no-untyped-call]  # half of the series, without use

BUILD_INFO = Gauge("ps_build_info", "Always 1; the labels identify the build.", ["version", "role", "python"])
LOG_MESSAGES = Counter("ps_log_messages_total", "Log lines written.", ["level"])
CERTIFICATE_EXPIRES = Gauge(
    "ps_cert_expiry_timestamp_seconds", "When the daemon's certificate expires; 0: it has none."
)
RPC_SECONDS = Histogram("ps_rpc_seconds", "Duration of answered calls that are not streams.", ["method"])
RPC_ERRORS = Counter("ps_rpc_errors_total", "Calls that ended in an error.", ["method", "code"])


def configure_logging(role: str, level: str = "info") -> None:
    """Send structlog's and the standard library's log lines to stderr: key=value on a terminal, else JSON. Counts them
    in ps_log_messages_total. Raises SettingsError for an unknown level. Safe to repeat."""
    if level not in LEVELS:
        raise SettingsError(f"log level {level!r} is not one of {', '.join(LEVELS)}")
    threshold = getattr(logging, level.upper())
    for name in LEVELS:
        LOG_MESSAGES.labels(level=name)
    render: Any = structlog.processors.JSONRenderer()
    if sys.stderr.isatty():
        render = structlog.processors.KeyValueRenderer(key_order=["timestamp", "level", "event"])
    structlog.configure(
        processors=[
            structlog.contextvars.merge_contextvars,
            structlog.processors.add_log_level,
            _stamp_role(role),
            structlog.processors.TimeStamper(fmt="iso", utc=True),
            structlog.processors.format_exc_info,
            _count,
            render,
        ],
        wrapper_class=structlog.make_filtering_bound_logger(threshold),
        logger_factory=structlog.WriteLoggerFactory(file=sys.stderr),
        cache_logger_on_first_use=False,
    )
    root = logging.getLogger()
    root.handlers = [_ToStructlog()]
    root.setLevel(max(threshold, logging.WARNING))


def record_build(role: str, version: str) -> None:
    python = ".".join(str(part) for part in sys.version_info[:3])
    BUILD_INFO.labels(version=version, role=role, python=python).set(1)


def observe_rpc(method: str, seconds: float | None, code: str) -> None:
    """Record one served call, with the name of its status code. `seconds` is None for a stream."""
    if seconds is not None:
        RPC_SECONDS.labels(method=method).observe(seconds)
    if code != "OK":
        RPC_ERRORS.labels(method=method, code=code).inc()


class MetricsEndpoint:
    """Serves a registry as Prometheus text on http://<address>/metrics, from its own thread."""

    def __init__(self, listen: str, registry: CollectorRegistry = REGISTRY) -> None:
        """Bind `listen` ("host:port"; port 0 takes a free one) and serve. Raises AddressInUseError when it is taken,
        SettingsError when it cannot be an address of this machine."""
        host, port = split_address(listen)
        metrics = prometheus.make_wsgi_app(registry)

        def application(environ: dict[str, Any], start_response: Any) -> Any:
            if environ.get("PATH_INFO") == "/metrics":
                return metrics(environ, start_response)
            start_response("404 Not Found", [("Content-Type", "text/plain")])
            return [b"see /metrics\n"]

        self._server = _bind(host, port)
        self._server.set_app(application)
        self.address = join_address(host, self._server.server_address[1])
        self._thread = threading.Thread(target=self._server.serve_forever, args=(_POLL_S,), name="metrics", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Stop serving and free the port. Blocks until a running scrape is answered. Safe to repeat."""
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()


def _bind(host: str, port: int) -> _Server:
    try:
        return _ServerIPv6((host, port), _Quiet) if ":" in host else _Server((host, port), _Quiet)
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            raise AddressInUseError(f"{host}:{port} is taken; metrics cannot be served there") from None
        raise SettingsError(f"metrics cannot be served on {host}:{port}: {error}") from None


class _Server(socketserver.ThreadingMixIn, WSGIServer):
    daemon_threads = True
    block_on_close = False

    def server_bind(self) -> None:
        """As WSGIServer, but without its reverse look-up of the host name, which can block for seconds."""
        socketserver.TCPServer.server_bind(self)
        self.server_name, self.server_port = str(self.server_address[0]), int(self.server_address[1])
        self.setup_environ()


class _ServerIPv6(_Server):
    address_family = socket.AF_INET6


class _Quiet(WSGIRequestHandler):
    timeout = _SCRAPE_TIMEOUT_S

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002 - the base class's name
        """Do not log scrapes."""


class _ToStructlog(logging.Handler):
    """Hands the standard library's records (asyncio, grpc) to structlog, so that a daemon has one log."""

    def emit(self, record: logging.LogRecord) -> None:
        logger = structlog.get_logger()
        fields: dict[str, Any] = {"logger": record.name}
        if record.exc_info:
            fields["exc_info"] = record.exc_info
        logger.log(record.levelno, record.getMessage(), **fields)


def _stamp_role(role: str) -> structlog.typing.Processor:
    def stamp(_logger: Any, _method: str, event: MutableMapping[str, Any]) -> MutableMapping[str, Any]:
        event.setdefault("role", role)
        return event

    return stamp


def _count(_logger: Any, method: str, event: MutableMapping[str, Any]) -> MutableMapping[str, Any]:
    LOG_MESSAGES.labels(level=str(event.get("level", method))).inc()
    return event
