"""Errors cross gRPC unchanged, both kinds of channel carry the token, and nobody enters without it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any
from unittest.mock import patch

import grpc
import pytest

from harness.proxy import CuttingProxy
from pscluster import errors
from pscluster.rpc import SERVER_OPTIONS, Access, error_of, open_aio_channel, open_channel, read_token, status_of
from pscluster.rpc.server import ErrorInterceptor, TokenInterceptor

TOKEN = "t0ken"


def echo(data: bytes) -> bytes:
    return data


class Service:
    """One handler of each kind; a request of b"<name>" makes it raise what `failures` names."""

    failures: dict[bytes, Exception] = {
        b"spec": errors.SpecError("no such key", action="mend it", details={"key": "trian"}),
        b"bug": ValueError("oops"),
        b"long": errors.StorageError("x" * 100_000, details={"a": "ü" * 50_000}),
    }

    def _check(self, request: bytes) -> None:
        if request in self.failures:
            raise self.failures[request]

    async def unary(self, request: bytes, _context: Any) -> bytes:
        self._check(request)
        return request

    async def down(self, request: bytes, _context: Any) -> AsyncIterator[bytes]:
        yield b"first"
        self._check(request)
        yield request

    async def up(self, requests: AsyncIterator[bytes], _context: Any) -> bytes:
        got = [request async for request in requests]
        self._check(got[-1])
        return b"".join(got)

    async def both(self, requests: AsyncIterator[bytes], _context: Any) -> AsyncIterator[bytes]:
        async for request in requests:
            self._check(request)
            yield request

    async def writer(self, request: bytes, context: Any) -> None:
        await context.write(request)
        self._check(request)


def handlers(service: Service) -> grpc.GenericRpcHandler:
    made = {
        "Unary": grpc.unary_unary_rpc_method_handler(service.unary, echo, echo),
        "Down": grpc.unary_stream_rpc_method_handler(service.down, echo, echo),
        "Up": grpc.stream_unary_rpc_method_handler(service.up, echo, echo),
        "Both": grpc.stream_stream_rpc_method_handler(service.both, echo, echo),
        "Writer": grpc.unary_stream_rpc_method_handler(service.writer, echo, echo),
    }
    return grpc.method_handlers_generic_handler("test.Echo", made)


Calls = list[tuple[str, bool, str]]


def serve(tmp_path: Path, body: Callable[[str, Calls], Awaitable[None]]) -> None:
    """Run `body(address, observed calls)` against a server on a Unix socket."""

    async def run() -> None:
        calls: Calls = []

        def observe(method: str, seconds: float | None, code: str) -> None:
            calls.append((method.rpartition("/")[2], seconds is not None, code))

        server = grpc.aio.server(interceptors=[ErrorInterceptor(), TokenInterceptor(TOKEN)], options=SERVER_OPTIONS)
        server.add_generic_rpc_handlers([handlers(Service())])
        address = f"unix:{tmp_path}/s"
        server.add_insecure_port(address)
        await server.start()
        with patch("pscluster.rpc.server.observe_rpc", observe):
            try:
                await asyncio.wait_for(body(address, calls), 30)
            finally:
                await server.stop(None)

    asyncio.run(run())


async def call_every_kind(address: str, payload: bytes, token: str = TOKEN) -> list[Any]:
    """What each kind of call gave, as bytes or as the error mapped."""
    outcomes: list[Any] = []
    async with open_aio_channel(address, Access(token=token)) as untyped:
        channel: Any = untyped

        async def stream() -> AsyncIterator[bytes]:
            yield b"a"
            yield payload

        async def attempt(result: Awaitable[Any]) -> None:
            try:
                outcomes.append(await result)
            except grpc.RpcError as error:
                outcomes.append(error_of(error))

        async def drain(call: Any) -> list[bytes]:
            return [message async for message in call]

        await attempt(channel.unary_unary("/test.Echo/Unary")(payload))
        await attempt(drain(channel.unary_stream("/test.Echo/Down")(payload)))
        await attempt(channel.stream_unary("/test.Echo/Up")(stream()))
        await attempt(drain(channel.stream_stream("/test.Echo/Both")(stream())))
        await attempt(drain(channel.unary_stream("/test.Echo/Writer")(payload)))
    return outcomes


def test_every_kind_of_call_passes_with_the_token(tmp_path: Path) -> None:
    async def body(address: str, calls: Calls) -> None:
        assert await call_every_kind(address, b"x") == [b"x", [b"first", b"x"], b"ax", [b"a", b"x"], [b"x"]]
        assert sorted(calls) == [
            ("Both", False, "OK"),
            ("Down", False, "OK"),
            ("Unary", True, "OK"),
            ("Up", False, "OK"),
            ("Writer", False, "OK"),
        ]

    serve(tmp_path, body)


def test_a_raised_error_arrives_equal_from_every_kind_of_call(tmp_path: Path) -> None:
    async def body(address: str, calls: Calls) -> None:
        expected = Service.failures[b"spec"]
        assert isinstance(expected, errors.PsError)
        for outcome in await call_every_kind(address, b"spec"):
            assert type(outcome) is errors.SpecError
            assert outcome.to_dict() == expected.to_dict()
        assert {code for _, _, code in calls} == {"INVALID_ARGUMENT"}

    serve(tmp_path, body)


def test_a_bug_becomes_an_internal_error(tmp_path: Path) -> None:
    async def body(address: str, _calls: Calls) -> None:
        for outcome in await call_every_kind(address, b"bug"):
            assert type(outcome) is errors.InternalError
            assert "ValueError: oops" in outcome.cause

    serve(tmp_path, body)


def test_a_long_error_still_arrives(tmp_path: Path) -> None:
    async def body(address: str, _calls: Calls) -> None:
        for outcome in await call_every_kind(address, b"long"):
            assert type(outcome) is errors.StorageError
            assert outcome.cause.startswith("xxx")

    serve(tmp_path, body)


@pytest.mark.parametrize("token", ["", "wrong", "t0ken2"])
def test_nobody_enters_without_the_token(tmp_path: Path, token: str) -> None:
    def refused(address: str) -> list[type[errors.PsError]]:
        outcomes = []
        with open_channel(address, Access(token=token)) as untyped:
            channel: Any = untyped
            for start in (
                lambda: channel.unary_unary("/test.Echo/Unary")(b"x", timeout=5),
                lambda: list(channel.unary_stream("/test.Echo/Down")(b"x", timeout=5)),
                lambda: channel.stream_unary("/test.Echo/Up")(iter([b"x"]), timeout=5),
                lambda: list(channel.stream_stream("/test.Echo/Both")(iter([b"x"]), timeout=5)),
            ):
                with pytest.raises(grpc.RpcError) as caught:
                    start()
                outcomes.append(type(error_of(caught.value)))
        return outcomes

    async def body(address: str, calls: Calls) -> None:
        assert await asyncio.to_thread(refused, address) == [errors.AuthError] * 4
        assert {code for _, _, code in calls} == {"UNAUTHENTICATED"}

    serve(tmp_path, body)


def test_a_stream_that_sends_nothing_is_refused_at_once(tmp_path: Path) -> None:
    async def body(address: str, _calls: Calls) -> None:
        async with open_aio_channel(address, Access(token="wrong")) as untyped:
            channel: Any = untyped
            call = channel.stream_stream("/test.Echo/Both")()
            with pytest.raises(grpc.RpcError) as caught:
                await call.read()
            assert type(error_of(caught.value)) is errors.AuthError

    serve(tmp_path, body)


def test_a_blocking_channel_carries_token_and_errors(tmp_path: Path) -> None:
    def blocking(address: str) -> None:
        with open_channel(address, Access(token=TOKEN)) as untyped:
            channel: Any = untyped
            assert channel.unary_unary("/test.Echo/Unary")(b"x", timeout=5) == b"x"
            assert list(channel.stream_stream("/test.Echo/Both")(iter([b"a", b"b"]), timeout=5)) == [b"a", b"b"]
            assert channel.stream_unary("/test.Echo/Up")(iter([b"a", b"b"]), timeout=5) == b"ab"
            with pytest.raises(grpc.RpcError) as caught:
                list(channel.unary_stream("/test.Echo/Down")(b"spec", timeout=5))
            assert type(error_of(caught.value)) is errors.SpecError
            with pytest.raises(grpc.RpcError) as caught:
                channel.unary_unary("/test.Echo/Missing")(b"x", timeout=5)
            assert type(error_of(caught.value)) is errors.VersionSkewError

    async def body(address: str, _calls: Calls) -> None:
        await asyncio.to_thread(blocking, address)

    serve(tmp_path, body)


def test_a_master_half_a_world_away_is_reached_at_the_first_try(tmp_path: Path) -> None:
    """A connection takes more than one round trip, of 0.4 s here; who asks once does not try again."""

    async def body(address: str, _calls: Calls) -> None:
        proxy = CuttingProxy(address)
        proxy.slow_down(bytes_per_s=1e9, delay_s=0.2)
        try:
            async with open_aio_channel(proxy.address, Access(token=TOKEN)) as untyped:
                channel: Any = untyped
                assert await channel.unary_unary("/test.Echo/Unary", echo, echo)(b"far", timeout=10) == b"far"
        finally:
            proxy.close()

    serve(tmp_path, body)


def test_nobody_listening_is_unreachable(tmp_path: Path) -> None:
    with open_channel(f"unix:{tmp_path}/nobody", Access(token=TOKEN)) as untyped:
        channel: Any = untyped
        with pytest.raises(grpc.RpcError) as caught:
            channel.unary_unary("/test.Echo/Unary")(b"x", timeout=5)
    error = error_of(caught.value)
    assert type(error) is errors.UnreachableError
    assert error.exit_code == 3


def every_kind(kind: type[errors.PsError] = errors.PsError) -> list[type[errors.PsError]]:
    return [kind, *(found for below in kind.__subclasses__() for found in every_kind(below))]


@pytest.mark.parametrize("kind", every_kind())
def test_every_error_has_a_status_and_comes_back_equal(kind: type[errors.PsError]) -> None:
    error = kind("what happened", action="do this", details={"step": "4"})
    status = status_of(error)

    class Failed(grpc.RpcError):
        def trailing_metadata(self) -> Any:
            return status.trailing_metadata

    back = error_of(Failed())
    assert type(back) is kind
    assert back.to_dict() == error.to_dict()


def test_a_bare_rpc_error_is_internal() -> None:
    assert type(error_of(grpc.RpcError())) is errors.InternalError


def test_a_call_that_ended_while_something_was_sent_may_be_tried_again() -> None:
    nothing = grpc.aio.Metadata()
    failure = grpc.aio.AioRpcError(grpc.StatusCode.INTERNAL, nothing, nothing, "Internal error from Core")
    error = error_of(failure, "the depot at a:1")
    assert type(error) is errors.UnreachableError
    assert "a:1" in error.cause


def test_token_file(tmp_path: Path) -> None:
    path = tmp_path / "token"
    with pytest.raises(errors.AuthError, match="no token file"):
        read_token(path)
    path.write_text("secret\n")
    path.chmod(0o640)
    with pytest.raises(errors.AuthError, match="others may read"):
        read_token(path)
    path.chmod(0o600)
    assert read_token(path) == "secret"
    path.write_text(" \n")
    with pytest.raises(errors.AuthError, match="empty"):
        read_token(path)
    path.write_bytes("tökén".encode())
    with pytest.raises(errors.AuthError, match="cannot read"):
        read_token(path)
