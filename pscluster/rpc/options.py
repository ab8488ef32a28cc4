"""Numbers that both ends of a call agree on."""

from __future__ import annotations

from typing import Any

PROTOCOL = 1
"""Number of the control and data protocol; two processes work together only when theirs are equal."""

DEADLINE_S = 10.0
"""For a call that reads or changes a record."""
TRANSFER_DEADLINE_S = 300.0
"""For a call that moves a bundle."""

MAX_MESSAGE_BYTES = 64 * 1024 * 1024

_SIZES: list[tuple[str, Any]] = [
    ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
    ("grpc.max_metadata_size", 64 * 1024),
    ("grpc.absolute_max_metadata_size", 128 * 1024),
]
SERVER_OPTIONS: list[tuple[str, Any]] = [
    *_SIZES,
    ("grpc.so_reuseport", 0),  # else two masters would share a port without noticing
    ("grpc.http2.min_recv_ping_interval_without_data_ms", 5_000),
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.keepalive_time_ms", 20_000),
    ("grpc.keepalive_timeout_ms", 10_000),
]
CHANNEL_OPTIONS: list[tuple[str, Any]] = [
    *_SIZES,
    ("grpc.enable_http_proxy", 0),  # a proxy in the environment is never meant for the cluster
    ("grpc.use_local_subchannel_pool", 1),  # a new channel does not inherit an old one's back-off
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.min_reconnect_backoff_ms", 5_000),  # how long an attempt may take, in truth: far hosts need it
    ("grpc.max_reconnect_backoff_ms", 2_000),
    ("grpc.keepalive_time_ms", 20_000),
    ("grpc.keepalive_timeout_ms", 10_000),
]
