"""gRPC between our processes: errors mapped in one place, both ways; the token; channels and their options.

Server side, for grpc.aio:

    grpc.aio.server(interceptors=[ErrorInterceptor(), TokenInterceptor(token)], options=SERVER_OPTIONS)

Handlers are coroutine functions or asynchronous generators and raise PsError; callers pass the grpc error to
`error_of` and get an equal PsError.
"""

from pscluster.rpc.channel import (
    CHANNEL_OPTIONS,
    DEADLINE_S,
    MAX_MESSAGE_BYTES,
    PROTOCOL,
    SERVER_OPTIONS,
    TRANSFER_DEADLINE_S,
    open_aio_channel,
    open_channel,
    read_token,
)
from pscluster.rpc.server import ErrorInterceptor, Observer, TokenInterceptor
from pscluster.rpc.status import error_of, status_of

__all__ = [
    "CHANNEL_OPTIONS",
    "DEADLINE_S",
    "MAX_MESSAGE_BYTES",
    "PROTOCOL",
    "SERVER_OPTIONS",
    "TRANSFER_DEADLINE_S",
    "ErrorInterceptor",
    "Observer",
    "TokenInterceptor",
    "error_of",
    "open_aio_channel",
    "open_channel",
    "read_token",
    "status_of",
]
