"""What django_ws promises, section by section, in the order of the module.

    python -m pytest

Needs pytest and uvicorn[standard]. Tests that need more (Redis, PostgreSQL, Chromium,
other servers, packages) skip and say what is missing; with CI=true in the environment
they fail instead. `.tests/stages.py` holds what they run on, `.tests/project.py` the
views and the middleware that they share.
"""

import array
import asyncio
import contextlib
import contextvars
import copy
import datetime
import decimal
import enum
import functools
import gc
import io
import itertools
import json
import logging
import math
import os
import pickle
import re
import selectors
import signal
import socket as sockets
import subprocess
import sys
import threading
import time
import tracemalloc
import uuid
import weakref
from collections.abc import AsyncIterator
from concurrent import futures
from typing import Any
from urllib.parse import quote

import pytest

from project import *
from stages import *
from validator import FAILURES, validated

# isort: split
from asgiref.sync import async_to_sync, iscoroutinefunction, sync_to_async
from django.conf import settings
from django.contrib.auth import login, logout
from django.contrib.auth.decorators import (
    login_required,
    permission_required,
    user_passes_test,
)
from django.contrib.auth.models import Permission, User
from django.core import signals
from django.core.exceptions import (
    BadRequest,
    ImproperlyConfigured,
    PermissionDenied,
    SuspiciousOperation,
)
from django.db import (
    DatabaseError,
    OperationalError,
    connection,
    connections,
    transaction,
)
from django.http import (
    FileResponse,
    Http404,
    HttpRequest,
    HttpResponse,
    StreamingHttpResponse,
)
from django.shortcuts import redirect
from django.template import engines
from django.template.response import TemplateResponse
from django.test import (
    AsyncClient,
    AsyncRequestFactory,
    Client,
    SimpleTestCase,
    TestCase,
    TransactionTestCase,
    override_settings,
)
from django.test.utils import CaptureQueriesContext
from django.urls import include, path, reverse
from django.utils import translation
from django.utils.functional import lazy
from django.utils.translation import gettext_lazy
from django.views import View
from django.views.decorators.csrf import csrf_exempt
from django.views.decorators.http import require_GET, require_POST
from websockets.exceptions import ConnectionClosed

from django_ws import (
    CloseCode,
    InvalidMessage,
    ReceiveEvent,
    SendEvent,
    WebSocket,
    WebSocketDenied,
    WebSocketDisconnect,
    broadcast,
    close_group,
    connect,
    re_websocket,
    websocket,
    websockets,
)

# Events, close codes, errors


class TestWords:
    def test_events_are_the_strings_of_asgi(self) -> None:
        kinds: list[tuple[Any, list[str]]] = [
            (SendEvent, ["accept", "send", "close"]),
            (ReceiveEvent, ["connect", "receive", "disconnect"]),
        ]
        for words, names in kinds:
            assert issubclass(words, enum.StrEnum)
            assert [str(word) for word in words] == [f"websocket.{n}" for n in names]

    def test_close_codes_are_the_registered_ones(self) -> None:
        assert issubclass(CloseCode, enum.IntEnum)
        registered = {*range(1000, 1004), *range(1005, 1016), 3000, 3003, 3008}
        assert {int(code) for code in CloseCode} == registered

    @pytest.mark.parametrize("words", [SendEvent, ReceiveEvent, CloseCode])
    def test_each_word_says_when_it_occurs(self, words: Any) -> None:
        source = (HERE / "django_ws.py").read_text()
        for word in words:
            comment = re.search(rf"\n    {word.name} = \S+  # \w+", source)
            assert comment or re.search(rf"\b{word.name} \w+", words.__doc__), word

    @pytest.mark.parametrize(
        "error, shown",
        [
            (WebSocketDisconnect(4001, "bye"), "the WebSocket has ended: 4001 bye"),
            (InvalidMessage(1003, "expected text"), "expected text"),
            (WebSocketDenied(HttpResponse(status=403)), "answered with 403 Forbidden"),
        ],
    )
    def test_errors_tell_and_can_be_pickled(self, error: Any, shown: str) -> None:
        """As test runners in several processes do."""
        again = pickle.loads(pickle.dumps(error))
        assert type(again) is type(error) and shown in str(again) == str(error)
        assert vars(again).keys() == vars(error).keys()

    def test_an_invalid_message_has_a_valid_code(self) -> None:
        with pytest.raises(ValueError, match="400 is not a valid close code"):
            InvalidMessage(400, "as in HTTP")


# The socket

NAN, INFINITY = float("nan"), float("inf")


class TestAccept:
    def test_it_completes_the_handshake(self) -> None:
        accept: Any = {"type": "websocket.accept", "subprotocol": None, "headers": []}
        assert play(WebSocket.accept).sent == [accept, NORMAL]

    @pytest.mark.parametrize(
        "headers, sent",
        [
            ({"X-One": "1", "X-Two": "é"}, [(b"x-one", b"1"), (b"x-two", b"\xe9")]),
            ([(b"X-One", "é".encode("latin-1"))], [(b"x-one", b"\xe9")]),
            ((pair for pair in [("X-One", b"1")]), [(b"x-one", b"1")]),
            ({"X-One": " a b\t"}, [(b"x-one", b"a b")]),
            ([("X-One", "1"), ["X-One", "2"]], [(b"x-one", b"1"), (b"x-one", b"2")]),
        ],
    )
    @asynchronous(accept=False)
    async def test_headers(
        self, socket: Any, drive: Any, headers: Any, sent: Any
    ) -> None:
        assert not socket.connected
        await socket.accept(headers=headers)
        assert drive.sent[0]["headers"] == sent and socket.connected

    @pytest.mark.parametrize(
        "arguments, message",
        [
            ({"subprotocol": "graphql"}, "did not offer the subprotocol 'graphql'"),
            ({"headers": {"X-One": "a\r\nX-Two: b"}}, "newlines"),
            ({"headers": {"X-One": "a\nb"}}, "newlines"),
            ({"headers": {"X-One\r\nX-Two": "b"}}, "newlines"),
            ({"headers": [(b"X-One", b"a\rb")]}, "newlines"),
            ({"headers": {"": "a"}}, "cannot send the header ''"),
            ({"headers": {"X One": "a"}}, "cannot send the header 'X One'"),
            ({"headers": {":status": "a"}}, "cannot send the header ':status'"),
            ({"headers": {"Sec-WebSocket-Protocol": "chat"}}, "cannot send the header"),
            ({"headers": {"sec-websocket-accept": "x"}}, "cannot send the header"),
            ({"headers": {"Connection": "close"}}, "cannot send the header"),
            ({"headers": {"UPGRADE": "h2c"}}, "cannot send the header"),
            ({"headers": {"Content-Length": "5"}}, "cannot send the header"),
            ({"headers": {"Transfer-Encoding": "chunked"}}, "cannot send the header"),
            ({"headers": {"X-One": "a\0b"}}, "cannot send the header 'X-One'"),
            ({"headers": {"X-One": b"a\x7fb"}}, "cannot send the header 'X-One'"),
        ],
    )
    @asynchronous(accept=False, subprotocols=["chat"], types=["accept", "close"])
    async def test_misuse(self, socket: Any, arguments: Any, message: str) -> None:
        with pytest.raises(ValueError, match=message):
            await socket.accept(**arguments)
        await socket.accept("chat")

    @asynchronous(accept=False, types=["accept", "send", "close"])
    async def test_a_second_accept_is_an_error(self, socket: Any, drive: Any) -> None:
        drive.reads.clear()
        first = asyncio.create_task(socket.accept())
        await asyncio.sleep(0)
        for _ in range(2):  # while the first is under way, and after it
            with pytest.raises(RuntimeError, match="accept.. was called before"):
                await socket.accept()
            drive.reads.set()
            await first
        await socket.send_text("still here")

    @asynchronous(accept=False, types=["accept", "close"])
    async def test_a_server_that_refuses_it(self, socket: Any, drive: Any) -> None:
        drive.error = ValueError("no")
        with pytest.raises(ValueError, match="no"):
            await socket.accept()
        drive.error = None
        await socket.accept()

    @asynchronous(accept=False)
    async def test_a_client_that_has_gone(self, socket: Any, drive: Any) -> None:
        drive.error = OSError()
        with pytest.raises(WebSocketDisconnect):
            await socket.accept()

    @asynchronous(accept=False, types=["accept", "close"])
    async def test_an_accept_that_is_cancelled(self, socket: Any, drive: Any) -> None:
        async def blocked(event: Any) -> None:
            if event["type"] == "websocket.accept":
                drive.sent.append(event)
                await asyncio.sleep(3600)

        drive.before = blocked
        accepting = asyncio.create_task(socket.accept())
        await asyncio.sleep(0)
        await socket.close(4001)
        accepting.cancel()
        await asyncio.wait([accepting])
        assert not socket.connected and "closed" in repr(socket)

    def test_subprotocol_and_headers_reach_the_client(self, ws: str) -> None:
        async def view(socket: WebSocket) -> None:
            assert socket.subprotocols == ["soap", "chat"]
            await socket.accept("chat", {"X-Room": "lobby"})

        with serve(view, ws=ws) as server:
            client = server.dial(subprotocols=["soap", "chat"])
            assert client.subprotocol == "chat"
            assert client.response.headers["X-Room"] == "lobby"


class TestClose:
    @pytest.mark.parametrize("code", [1000, 1001, 1003, 1007, 1014, 3000, 4000, 4999])
    @asynchronous
    async def test_it_sends_code_and_reason_once(self, code: int) -> None:
        async with both_ends() as (socket, client):
            await socket.close(code, "é" * 61 + "x")
            assert not socket.connected
            await socket.close(4001)
            with pytest.raises(WebSocketDisconnect) as caught:
                await client.receive_text()
            assert (caught.value.code, caught.value.reason) == (code, "é" * 61 + "x")

    @pytest.mark.parametrize("accept", [True, False])
    @pytest.mark.parametrize(
        "arguments, error, message",
        [
            *[
                ((code,), ValueError, f"{code} is not a valid close code")
                for code in (0, -1, 999, 1004, 1005, 1006, 1015, 1016, 2999, 5000)
            ],
            ((1000, "é" * 62), ValueError, "123 bytes"),
            (("1000",), TypeError, None),
            ((1000, None), TypeError, "must be str"),
            ((1000, b"bye"), TypeError, "must be str"),
        ],
    )
    @asynchronous(accept=False, types=["accept", "send", "close"])
    async def test_misuse(
        self, socket: Any, arguments: Any, error: Any, message: Any, accept: bool
    ) -> None:
        if accept:
            await socket.accept()
        for call in (socket.close(*arguments), close_group("room", *arguments)):
            with pytest.raises(error, match=message):
                await call
        if not accept:
            await socket.accept()
        await socket.send_text("still here")

    @pytest.mark.parametrize("error", [None, OSError(), RuntimeError("closed")])
    @asynchronous(GONE, types=["accept"])
    async def test_after_the_client_it_does_nothing(
        self, socket: Any, drive: Any, error: Any
    ) -> None:
        if error is None:
            with pytest.raises(WebSocketDisconnect):
                await socket.receive_text()
        drive.error = error  # the client has just left, and nobody knows
        await socket.close()

    def test_both_sides_see_code_and_reason(self, ws: str) -> None:
        ends: list[Any] = []

        async def view(socket: WebSocket) -> None:
            await socket.accept()
            try:
                await socket.close(4002, await socket.receive_text())
            except WebSocketDisconnect as error:
                ends.append((error.code, error.reason))

        with serve(view, ws=ws) as server:
            client = server.dial()
            client.send("théâtre")
            assert closed_with(client) == (4002, "théâtre")
            server.dial().close(4001, "bye")
            wait_for(lambda: ends == [(4001, "bye")])


class TestAttributes:
    @asynchronous
    async def test_a_socket_answers_for_its_request(self) -> None:
        async def view(socket: WebSocket, room: str) -> None:
            assert (socket.scope["type"], socket.scope["scheme"]) == ("websocket", "ws")
            assert (socket.scheme, socket.path) == ("ws", "/ws/lobby/")
            assert socket.query_string == "a=1&a=2&b=%C3%A9"
            assert socket.query_params.getlist("a") == ["1", "2"]
            assert socket.query_params is socket.GET
            assert socket.headers["X-Custom"] == "yes"
            assert socket.COOKIES == {"flavour": "oat"}
            assert socket.subprotocols == []
            assert isinstance(socket.request, HttpRequest)
            assert (socket.method, socket.request.body) == ("GET", b"")
            assert socket.resolver_match.kwargs == {"room": "lobby"}
            uri = "http://testserver/ws/lobby/?a=1&a=2&b=%C3%A9"
            assert socket.build_absolute_uri() == uri
            assert repr(socket) == "<WebSocket connecting '/ws/lobby/'>"
            with pytest.raises(AttributeError, match="nonsense"):
                socket.nonsense
            setattr(socket, "tenant", "blue")  # as decorators do on requests
            assert socket.tenant == "blue"
            await socket.accept()

        place = "/ws/lobby/?a=1&a=2&b=%C3%A9"
        headers = {"x-custom": "yes", "cookie": "flavour=oat"}
        async with connected(websocket("ws/<room>/", view), place, headers=headers):
            pass

    def test_an_unfinished_copy_has_no_endless_recursion(self) -> None:
        with pytest.raises(AttributeError):
            WebSocket.__new__(WebSocket).anything

    @pytest.mark.parametrize(
        "scheme, forwarded, expected",
        [("ws", "", "ws"), ("wss", "", "wss"), ("ws", "https", "wss")]
        + [("wss", "http", "ws")],
    )
    @asynchronous
    async def test_its_scheme(self, scheme: str, forwarded: str, expected: str) -> None:
        async def view(socket: WebSocket) -> None:
            assert socket.scheme == expected
            assert socket.is_secure() == (expected == "wss")
            await socket.accept()

        options: dict[str, Any] = {}
        if forwarded:
            options["headers"] = {"x-forwarded-proto": forwarded, "origin": None}
            options["SECURE_PROXY_SSL_HEADER"] = ("HTTP_X_FORWARDED_PROTO", "https")
        async with connected(view, f"{scheme}://testserver/ws/", **options):
            pass


class TestEvents:
    @asynchronous(text("a"), GONE, accept=False, types=["accept", "send"])
    async def test_receive_gives_every_event_once(self, socket: Any) -> None:
        assert await socket.receive() == CONNECT and not socket.connected
        await socket.send({"type": SendEvent.ACCEPT})
        assert socket.connected and await socket.receive() == text("a")
        await socket.send({"type": SendEvent.SEND, "text": "hi"})
        assert await socket.receive() == GONE and not socket.connected
        with pytest.raises(WebSocketDisconnect, match="4001 bye"):
            await socket.receive()

    @asynchronous(text("a"))
    async def test_accept_takes_the_connect_event(self, socket: Any) -> None:
        assert await socket.receive() == text("a")

    @asynchronous(types=["accept", "close"])
    async def test_a_bare_close_ends_the_socket(self, socket: Any, drive: Any) -> None:
        await socket.send({"type": "websocket.close", "code": 4005, "reason": None})
        assert drive.sent[-1] == {**NORMAL, "code": 4005}
        with pytest.raises(WebSocketDisconnect, match="4005"):
            await socket.receive()

    @asynchronous
    async def test_a_bare_close_before_accept_is_djangos_403(self) -> None:
        async def view(socket: WebSocket) -> None:
            await socket.send({"type": "websocket.close"})

        assert b"403 Forbidden" in (await refusal(view)).content

    @pytest.mark.parametrize("kind", ["send", "connect", "receive", "http.response"])
    @asynchronous(accept=False, types=["accept", "close"])
    async def test_an_event_out_of_turn(self, socket: Any, kind: str) -> None:
        with pytest.raises(RuntimeError, match="call accept.. before"):
            await socket.send({"type": f"websocket.{kind}"})
        await socket.accept()
        if kind != "send":
            with pytest.raises(RuntimeError, match="not an event that can be sent"):
                await socket.send({"type": f"websocket.{kind}"})

    @asynchronous({"type": "websocket.ping"}, text("a"), types=["accept", "close"])
    async def test_an_event_that_asgi_does_not_know(self, socket: Any) -> None:
        with pytest.raises(RuntimeError, match="'websocket.ping' is not an event"):
            await socket.receive()
        assert await socket.receive_text() == "a"

    # The event keeps uvicorn from logging "returned without handshake".
    @asynchronous(GONE, accept=False, types=["close"])
    async def test_a_client_that_leaves_before_accept(self, socket: Any) -> None:
        assert await socket.receive() == CONNECT
        assert await socket.receive() == GONE
        with pytest.raises(WebSocketDisconnect, match="4001"):
            await socket.accept()
        await socket.close()

    @pytest.mark.parametrize("ahead", [False, True])
    @asynchronous(hasty=True)
    async def test_a_receive_that_fails(self, ahead: bool, caplog: Log) -> None:
        async def view(socket: WebSocket) -> None:
            await socket.accept()
            if ahead:
                try:
                    await asyncio.sleep(3600)
                finally:
                    states.append(repr(socket))
            with pytest.raises(ValueError, match="the server's"):
                await socket.receive_text()

        states: list[str] = []
        async with driven(view, ValueError("the server's")) as drive:
            await drive.end()
        assert states == ["<WebSocket closed '/ws/'>"] * ahead
        assert ("receive() failed" in caplog.text) == ahead


def all_calls(socket: Any) -> list[Any]:
    receives = [socket.receive_text(), socket.receive_bytes(), socket.receive_json()]
    sends = [socket.send_text("x"), socket.send_bytes(b"x"), socket.send_json(1)]
    return [*receives, *sends, socket.join("room")]


class TestMessages:
    @asynchronous(text("1"), accept=False, types=["accept", "close"])
    async def test_before_accept_all_is_a_runtime_error(self, socket: Any) -> None:
        for call in [*all_calls(socket), anext(aiter(socket))]:
            with pytest.raises(RuntimeError, match="call accept.. before"):
                await call
        await socket.accept()
        assert await socket.receive_json() == 1

    @pytest.mark.parametrize(
        "end, told",
        [("client", "4001 bye"), ("server", "4002 so long")]
        + [("OSError", "4001 bye"), ("RuntimeError", "4001 bye")],
    )
    @asynchronous(text("before it left"), GONE)
    async def test_after_the_end_all_raises_disconnect(
        self, socket: Any, drive: Any, end: str, told: str
    ) -> None:
        if end == "client":
            assert await socket.receive_text() == "before it left"
            with pytest.raises(WebSocketDisconnect):
                await socket.receive_text()
        elif end == "server":
            await socket.close(4002, "so long")
        else:  # which only receiving tells
            drive.error = OSError() if end == "OSError" else RuntimeError()
            with pytest.raises(WebSocketDisconnect, match="1006"):
                await socket.send_text("late")
            assert await socket.receive_text() == "before it left"
        drive.error = AssertionError("the server was asked")
        bare = socket.send({"type": "websocket.send", "text": "x"})
        for call in [*all_calls(socket), bare]:
            with pytest.raises(WebSocketDisconnect, match=told):
                await call
        await socket.leave("room")

    @pytest.mark.parametrize(
        "method, data, error",
        [
            *[("send_text", data, TypeError) for data in (b"bytes", 5, None)],
            *[("send_bytes", data, TypeError) for data in ("text", 5, [1, 2])],
            *[("send_json", data, TypeError) for data in ({1, 2}, object())],
            *[
                ("send_json", data, ValueError)
                for data in (NAN, [INFINITY], {"a": -INFINITY})
            ],
        ],
    )
    @asynchronous
    async def test_unsendable_data(self, method: str, data: Any, error: Any) -> None:
        async with both_ends() as ends:
            for here, there in (ends, ends[::-1]):
                with pytest.raises(error):
                    await getattr(here, method)(data)
                await here.send_text("still here")
                assert await there.receive_text() == "still here"
            if method == "send_json":
                with pytest.raises(error):
                    await broadcast("room", data)

    @pytest.mark.parametrize("data", [b"ab", bytearray(b"ab"), memoryview(b"ab")])
    @asynchronous
    async def test_send_bytes_takes_what_is_bytes_like(self, data: Any) -> None:
        async with both_ends() as ends:
            for here, there in (ends, ends[::-1]):
                await here.send_bytes(data)
                received = await there.receive_bytes()
                assert type(received) is bytes and received == b"ab"

    @asynchronous(
        *[
            {**text(data), **none}
            for none in ({}, {"bytes": None})
            for data in ("", "0")
        ],
        {"type": "websocket.receive", "text": None, "bytes": b"1"},
        {"type": "websocket.receive"},
    )
    async def test_a_server_may_leave_out_a_key_or_send_none(self, socket: Any) -> None:
        for _ in range(2):
            assert await socket.receive_text() == ""
            assert await socket.receive_json() == 0
        assert await anext(aiter(socket)) == b"1"
        with pytest.raises(InvalidMessage, match="expected a message"):
            await anext(aiter(socket))

    @asynchronous
    async def test_iterating_goes_on_until_the_other_end_is_gone(self) -> None:
        async with both_ends() as ends:
            for here, there in (ends, ends[::-1]):
                for message in ("a", "[1]", "", "b"):
                    await there.send_text(message)
                for data in (b"c", b"2", b"", b"d"):
                    await there.send_bytes(data)
                assert await anext(here.iter_text()) == "a"
                assert await anext(here.iter_json()) == [1]
                assert [await anext(here.iter_text()) for _ in "12"] == ["", "b"]
                assert await anext(here.iter_bytes()) == b"c"
                assert await anext(here.iter_json()) == 2
                either = aiter(here)
                assert [await anext(either) for _ in "12"] == [b"", b"d"]
            socket, client = ends
            await client.send_text("last")
            await client.close()
            assert [message async for message in socket] == ["last"]
            for kind in ("iter_text", "iter_bytes", "iter_json", "__aiter__"):
                assert [message async for message in getattr(socket, kind)()] == []

    @pytest.mark.parametrize(
        "method, message, code, reason",
        [
            ("receive_text", b"x", 1003, "expected text, got bytes"),
            ("receive_bytes", "x", 1003, "expected bytes, got text"),
            *[
                ("receive_json", message, 1007, "expected JSON")
                for message in (
                    *("{", "", "NaN", "[-Infinity]", "1e999", "9" * 10_000),
                    *("[" * 200_000, b'{"a":' * 200_000, b'"\xff"'),
                    '"a"'.encode("utf-16"),
                )
            ],
        ],
    )
    @asynchronous
    async def test_a_bad_message(
        self, method: str, message: Any, code: int, reason: str
    ) -> None:
        async def view(socket: WebSocket) -> None:
            await socket.accept()
            with pytest.raises(InvalidMessage, match=reason) as caught:
                await getattr(socket, method)()
            assert caught.value.code == code
            await getattr(socket, method)()  # and uncaught it closes with its code

        async with connected(view, DATA_UPLOAD_MAX_MEMORY_SIZE=2**21) as client:
            send = client.send_text if isinstance(message, str) else client.send_bytes
            await send(message)
            await send(message)
            with pytest.raises(WebSocketDisconnect) as caught:
                await client.receive_text()
        assert (caught.value.code, caught.value.reason) == (code, reason)

    @pytest.mark.parametrize(
        "message, limit, code",
        [
            ("[" * 50 + "]" * 50, 100, 1000),
            ("[" * 50 + "1" + "]" * 50, 100, 1009),
            ("[" * 50 + "1" + "]" * 50, None, 1000),
            ('"' + "𝄞" * 24 + 'xx"', 100, 1000),
            ('"' + "𝄞" * 24 + 'xxx"', 100, 1009),  # it counts bytes
            ("[" * 10 + " " * 2_621_420 + "]" * 10, 2_621_440, 1000),
        ],
    )
    def test_json_has_a_limit(self, message: str, limit: Any, code: int) -> None:
        async def view(socket: WebSocket) -> None:
            await socket.accept()
            await socket.receive_json()

        assert 2_621_440 == settings.DATA_UPLOAD_MAX_MEMORY_SIZE
        drive = play(view, text(message), DATA_UPLOAD_MAX_MEMORY_SIZE=limit)
        assert drive.code == code

    @pytest.mark.parametrize(
        "data, expected",
        [
            ({"a": [1, None, True]}, '{"a":[1,null,true]}'),
            ("déjà vu 🙂", '"déjà vu 🙂"'),
            (datetime.date(2026, 1, 2), '"2026-01-02"'),
            (datetime.datetime(2026, 1, 2, tzinfo=datetime.UTC),)
            + ('"2026-01-02T00:00:00Z"',),
            (datetime.timedelta(days=1), '"P1DT00H00M00S"'),
            (decimal.Decimal("1.10"), '"1.10"'),
            (uuid.UUID(int=5), '"00000000-0000-0000-0000-000000000005"'),
            (gettext_lazy("Monday"), '"Monday"'),
            ("\ud800é", '"\\ud800é"'),
        ],
    )
    @asynchronous
    async def test_json_as_django_writes_it(self, data: Any, expected: str) -> None:
        async with both_ends() as ends:
            for here, there in (ends, ends[::-1]):
                await here.send_json(data)
                assert await there.receive_text() == expected
                await here.send_json(data, binary=True)
                assert await there.receive_bytes() == expected.encode()

    @asynchronous
    async def test_text_that_utf8_cannot_encode_is_sent_as_json_escapes_it(
        self, socket: Any, drive: Any
    ) -> None:
        await socket.send_text("é \ud800")  # a client may have sent it in JSON
        assert drive.messages == ["é \\ud800"]

    @asynchronous
    async def test_a_forgotten_await_is_told_by_its_public_name(
        self, socket: Any
    ) -> None:
        with pytest.warns(RuntimeWarning, match="'WebSocket.send_text' was never"):
            socket.send_text("x")

    def test_every_kind_crosses_the_wire(self, ws: str, caplog: Log) -> None:
        """And send_json() can send what receive_json() gave."""

        async def view(socket: WebSocket) -> None:
            await socket.accept()
            async for message in socket:
                if message == "json":
                    break
                await (
                    socket.send_text(message)
                    if isinstance(message, str)
                    else socket.send_bytes(message)
                )
            async for value in socket.iter_json():
                await socket.send_json(value)
                await socket.send_json(value, binary=True)

        with serve(view, ws=ws) as server:
            client = server.dial(max_size=None)
            for message in ("", "déjà 🙂", b"", b"\x00\xff", "x" * 2**20, b"y" * 2**20):
                client.send(message)
                assert client.recv(20) == message
            client.send("json")
            values = ['"\\ud800"', '{"\\udfff":1.5e300}', "9" * 4300, '"é\\u0000"']
            for value in values:
                client.send(value)
                assert seen(client) == seen(client) == json.loads(value)
            client.send("{")
            assert closed_with(client) == (1007, "expected JSON")
        assert quiet(caplog)


class TestRoutes:
    @pytest.mark.parametrize(
        "pattern, place, expected, back",
        [
            (
                websocket("<int:pk>/<slug:s>/", accepting, {"extra": 1}, name="room"),
                "/5/a-b/",
                [[], {"pk": 5, "s": "a-b", "extra": 1}],
                {"viewname": "room", "args": [5, "a-b"]},
            ),
            (
                re_websocket(r"^(?P<year>[0-9]{4})/$", accepting, name="year"),
                "/2026/",
                [[], {"year": "2026"}],
                {"viewname": "year", "kwargs": {"year": "2026"}},
            ),
            (
                re_websocket(r"^([0-9]{4})/$", accepting, {"extra": 1}, "y"),
                "/2026/",
                [["2026"], {"extra": 1}],
                {"viewname": "y", "args": [2026]},
            ),
            (
                path(
                    "in/<int:pk>/",
                    include(([websocket("x/", accepting, name="x")], "a"), "talk"),
                ),
                "/in/3/x/",
                [[], {"pk": 3}],
                {"viewname": "talk:x", "args": [3]},
            ),
        ],
    )
    @asynchronous
    async def test_arguments_names_and_namespaces(
        self, pattern: Any, place: str, expected: Any, back: Any
    ) -> None:
        assert await answer(pattern, place) == expected
        with configured([pattern], {}):
            assert reverse(**back) == place

    @asynchronous
    async def test_any_name_of_an_argument(self) -> None:
        async def view(socket: WebSocket, request: str, view: str) -> None:
            await accepting(socket, request, view)

        found = await answer(websocket("<request>/<view>/", view), "/a/b/")
        assert found == [["a", "b"], {}]

    @asynchronous
    async def test_i18n_patterns(self) -> None:
        from django.conf.urls.i18n import i18n_patterns

        [pattern] = i18n_patterns(websocket(gettext_lazy("ws/"), where, name="here"))
        found = await answer(pattern, "/de/ws/", MIDDLEWARE=[LOCALE])
        assert found == [["de", "/de/ws/", "/de/ws/"], {}]

    @pytest.mark.parametrize("route", [websocket, re_websocket])
    @pytest.mark.parametrize(
        "view, expected",
        [
            (accepting, [[], {}]),
            (functools.partial(accepting, room="x"), [[], {"room": "x"}]),
            (passing(accepting), [[], {}]),
            (functools.partial(passing(accepting), a=1), [[], {"a": 1}]),
            (AsyncCallable(), [["object"], {}]),
            (functools.partial(AsyncCallable()), [["object"], {}]),
            (passing(functools.partial(AsyncCallable())), [["object"], {}]),
            (AsyncCallable().__call__, [["object"], {}]),
            (Accepting.as_view(), [["hello"], {}]),
            (Accepting.as_view(greeting="hi"), [["hi"], {}]),
            (passing(Accepting.as_view()), [["hello"], {}]),
            (functools.update_wrapper(lambda s: Lazy(s), accepting), [["lazy"], {}]),
        ],
    )
    @asynchronous
    async def test_any_kind_of_view(self, route: Any, view: Any, expected: Any) -> None:
        assert await answer(route("ws/", view)) == expected

    @pytest.mark.parametrize("route", [websocket, re_websocket])
    @pytest.mark.parametrize(
        "view, name",
        [(passing, "passing"), (functools.partial(passing), "passing")]
        + [(Accepting, "Accepting"), (AsyncCallable, "AsyncCallable")]
        + [(Synchronous.as_view(), "view"), (object(), "<object")]
        + [("views.chat", "'views.chat'"), (include([]), "\\(")],
    )
    def test_a_view_that_is_not_async(self, route: Any, view: Any, name: str) -> None:
        with pytest.raises(TypeError, match=f"write 'async def' for .*{name}"):
            route("ws/", view)

    @asynchronous
    async def test_a_class_without_get_is_a_405(self) -> None:
        class Posting(View):
            async def post(self, request: Any) -> HttpResponse:
                raise AssertionError

        assert await status(Posting.as_view()) == 405

    def test_the_route_shows_the_view_but_not_that_it_is_async(self) -> None:
        assert iscoroutinefunction(Accepting.as_view())
        callback: Any = websocket("ws/", Accepting.as_view()).callback
        assert not iscoroutinefunction(callback)
        assert callback.view_class is Accepting
        assert websocket("ws/", accepting).callback.__name__ == "accepting"

    def test_plain_http_is_426_under_asgi(self, ws: str, caplog: Log) -> None:
        with serve(accepting, ws=ws) as server:
            for headers in ({}, {"Connection": "Upgrade", "Upgrade": "h2c"}):
                response = server.get("/ws/", **headers)
                assert response.status == 426
                assert response.headers["Upgrade"] == "websocket"
                assert response.headers["Connection"] == "Upgrade"
        assert "lacks WebSocket support" not in caplog.text

    def test_it_has_no_hop_by_hop_headers_in_http_2(self) -> None:
        request = AsyncRequestFactory(http_version="2").get("/ws/")
        response: Any = websocket("ws/", accepting).callback(request)
        assert response.status_code == 426
        assert not {"Upgrade", "Connection"} & set(response.headers)

    @pytest.mark.parametrize("software", ["gunicorn/25", "WSGIServer/0.2"])
    def test_it_has_no_hop_by_hop_headers_under_wsgi(
        self, software: str, caplog: Log
    ) -> None:
        from wsgiref.handlers import SimpleHandler
        from wsgiref.util import setup_testing_defaults

        from django.core.handlers.wsgi import WSGIHandler

        environ: dict[str, Any] = {"PATH_INFO": "/ws/", "HTTP_HOST": "localhost"}
        environ["HTTP_UPGRADE"] = "websocket"
        setup_testing_defaults(environ)
        out = io.BytesIO()
        with configured([accepting], {}):
            handler = SimpleHandler(io.BytesIO(), out, io.StringIO(), environ)
            handler.server_software = software
            handler.run(WSGIHandler())
        # wsgiref fails an assertion, a 500, on hop-by-hop headers.
        assert b" 426 Upgrade Required" in out.getvalue()
        by_runserver = "Django's runserver speaks no WebSocket" in caplog.text
        assert by_runserver == software.startswith("WSGIServer")

    @pytest.mark.parametrize(
        "headers",
        [
            {"Connection": "Upgrade", "Upgrade": "websocket"},
            {"Sec-WebSocket-Key": "dGhlIHNhbXBsZSBub25jZQ=="},  # nginx dropped Upgrade
        ],
    )
    def test_a_handshake_that_arrives_as_http_is_a_warning_that_helps(
        self, headers: Any, caplog: Log
    ) -> None:
        with serve(accepting, ws="none") as server:
            assert server.get("/ws/", **headers).status == 426
        [record] = [r for r in caplog.records if r.name == "django.request"]
        assert (record.levelname, vars(record)["status_code"]) == ("WARNING", 426)
        for word in ("lacks WebSocket support", "uvicorn[standard]", "ASGI server"):
            assert word in record.getMessage()


SSL: dict[str, Any] = {"MIDDLEWARE": [SECURITY], "SECURE_SSL_REDIRECT": True}
PROXY = {"SECURE_PROXY_SSL_HEADER": ("HTTP_X_FORWARDED_PROTO", "https")}
BY_HTTP = {**PROXY, "headers": {"x-forwarded-proto": "http", "origin": None}}
BY_HTTPS = {**PROXY, "headers": {"x-forwarded-proto": "https", "origin": None}}
IN_GERMAN = {"MIDDLEWARE": [LOCALE], "headers": {"accept-language": "de"}}


class TestHandshake:
    @pytest.mark.parametrize(
        "view, anonymous, ann",
        [
            (whoami, [["AnonymousUser"], {}], [["ann"], {}]),
            (login_required(whoami), "/in/?next=/ws/%3Fa%3D1", [["ann"], {}]),
            (Mixed.as_view(), "/in/?next=/ws/%3Fa%3D1", [["hello"], {}]),
            (Decorated.as_view(), "/in/?next=/ws/%3Fa%3D1", [["hello"], {}]),
            (permission_required("auth.x", raise_exception=True)(whoami), 403, 403),
            (
                user_passes_test(lambda user: str(user) == "ann")(whoami),
                *("/in/?next=/ws/%3Fa%3D1", [["ann"], {}]),
            ),
            (require_GET(whoami), [["AnonymousUser"], {}], [["ann"], {}]),
            (require_POST(whoami), 405, 405),
        ],
    )
    @pytest.mark.parametrize("atomic", [False, True])
    def test_djangos_decorators_and_the_sessions_user(
        self, user: Any, view: Any, anonymous: Any, ann: Any, atomic: bool
    ) -> None:
        async def ask(client: Any) -> Any:
            options: Any = {"MIDDLEWARE": SESSIONS, "LOGIN_URL": "/in/"}
            found = await answer(view, "/ws/?a=1", client=client, **options)
            return getattr(found, "url", getattr(found, "status_code", found))

        forged = Client(raise_request_exception=False)
        forged.cookies["sessionid"] = "forged"
        with database_options(ATOMIC_REQUESTS=atomic):
            for client, expected in ((forged, anonymous), (logged_in(user), ann)):
                assert async_to_sync(ask)(client) == expected

    def test_permission_required(self, user: Any) -> None:
        view = permission_required("auth.add_user", raise_exception=True)(whoami)
        user.user_permissions.add(Permission.objects.get(codename="add_user"))
        client = logged_in(user)
        found = async_to_sync(answer)(view, client=client, MIDDLEWARE=SESSIONS)
        assert found == [["ann"], {}]

    def test_login_required_middleware_and_its_exit(self, ws: str, user: Any) -> None:
        patterns = [
            websocket("ws/", whoami),
            websocket("public/", public),
            websocket("own/", login_required(whoami, login_url="/own-login/")),
        ]
        required = "django.contrib.auth.middleware.LoginRequiredMiddleware"
        options: Any = {"MIDDLEWARE": [*SESSIONS, required], "LOGIN_URL": "/in/"}
        with serve(*patterns, ws=ws, **options) as server:
            assert server.handshake().headers["Location"] == "/in/?next=/ws/"
            location = server.handshake("/own/").headers["Location"]
            assert location == "/own-login/?next=/own/"
            assert seen(server.dial("/public/")) == [[], {}]
            client = server.dial(additional_headers=cookies(user))
            assert seen(client) == [["ann"], {}]

    @pytest.mark.parametrize("name", ["login", "logout"])
    def test_the_user_after_logging_in_or_out(self, user: Any, name: str) -> None:
        async def view(socket: Any) -> None:
            job = {"login": lambda: login(socket.request, user)}
            await sync_to_async(job.get(name, lambda: logout(socket.request)))()
            names = [str(socket.user), str(await socket.auser())]
            await accepting(socket, *names)

        client = logged_in(user) if name == "logout" else None
        found = async_to_sync(answer)(view, client=client, MIDDLEWARE=SESSIONS)
        assert found[0] == ["ann" if name == "login" else "AnonymousUser"] * 2

    @asynchronous
    async def test_a_page_and_a_socket_on_one_path(self) -> None:
        """The first route counts, whatever it is: Django's resolver knows no kinds."""
        pattern = path("", include([path("x/", announce), websocket("x/", accepting)]))
        assert await status(pattern, "/x/") == 404

    @pytest.mark.parametrize(
        "place, options, expected",
        [
            ("/ws", {"MIDDLEWARE": [COMMON]}, "301 /ws/"),
            ("/ws/", {"MIDDLEWARE": middleware("teapot")}, "418 short and stout"),
            ("/ws/", {"MIDDLEWARE": middleware("unavailable")}, "503"),
            ("/ws/", {"MIDDLEWARE": middleware("other_urls")}, "404"),
            ("/o/", {"MIDDLEWARE": middleware("other_urls")}, "en-us /o/ /o/"),
            ("/nowhere/", {}, "404"),
            ("/ws/", SSL, "301 https://testserver/ws/"),
            ("wss://testserver/ws/", SSL, "en-us /ws/ /ws/"),
            ("/ws/", {**SSL, **BY_HTTPS}, "en-us /ws/ /ws/"),
            ("wss://testserver/ws/", {**SSL, **BY_HTTP}, "301 https:"),
            ("/app/ws/", {"FORCE_SCRIPT_NAME": "/app"}, "en-us /app/ws/ /app/ws/"),
            ("/ws/", IN_GERMAN, "de /ws/ /ws/"),
        ],
    )
    @asynchronous
    async def test_its_decisions(self, place: str, options: Any, expected: str) -> None:
        options = dict(options)
        found = await answer(websocket("ws/", where, name="here"), place, **options)
        if isinstance(found, HttpResponse):
            location = found.get("Location") or found.content.decode()
            assert f"{found.status_code} {location}".startswith(expected)
        else:
            assert " ".join(found[0]) == expected

    def test_root_path(self, ws: str) -> None:
        pattern = websocket("ws/", where, name="here")
        with serve(pattern, ws=ws, root_path="/app") as server:
            # As a proxy that strips /app does.
            assert seen(server.dial("/ws/"))[0] == ["en-us", "/app/ws/", "/app/ws/"]

    @pytest.mark.parametrize("length", [b"99999999", b"abc"])
    def test_a_content_length_means_nothing(self, length: bytes) -> None:
        headers = [(b"host", b"testserver"), (b"content-length", length)]
        assert play(accepting, headers=headers).status == 101

    def test_a_query_string_that_is_no_utf8_is_a_400(self) -> None:
        assert play(accepting, query_string=b"a=\xff").status == 400

    def test_cookies_and_headers_of_the_middleware_travel_along(self, ws: str) -> None:
        async def view(socket: WebSocket) -> None:
            if socket.GET.get("deny"):
                raise PermissionDenied
            await socket.accept(headers={"Set-Cookie": "own=1"})

        with serve(view, ws=ws, MIDDLEWARE=middleware("tagging")) as server:
            headers = server.dial().response.headers
            assert headers["X-Tag"] == "tagged"
            names = [one.split("=")[0] for one in headers.get_all("Set-Cookie")]
            assert names == ["flavour", "size", "own"]
            assert not {"Content-Type", "Content-Length"} & set(headers)
            # The middleware refuses nothing here: the URLconf and the view do.
            for place in ("/nowhere/", "/ws/?deny=1"):
                headers = server.handshake(place).headers
                assert headers["X-Tag"] == "tagged"
                assert len(headers.get_all("Set-Cookie")) == 2
                assert headers["Content-Type"].startswith("text/html")

    @asynchronous
    async def test_what_the_middleware_does_to_the_request(self) -> None:
        async def view(socket: WebSocket) -> None:
            assert socket.tag is not threading.main_thread()  # one hop to a thread
            found = [socket.asynchronous, socket.synchronous, socket.tenant]
            await accepting(socket, *found)

        chain = middleware("tagging", "async_only", "both_ways", "replacing")
        found = await answer(view, MIDDLEWARE=chain)
        assert found == [[True, True, "blue"], {}]

    def test_an_http_route_is_a_404_and_never_runs(self, ws: str, caplog: Log) -> None:
        ran = []

        def view(request: HttpRequest) -> HttpResponse:
            ran.append(request.path)
            return HttpResponse("page")

        with serve(path("page/", view), ws=ws) as server:
            assert server.handshake("/page/").status == 404
            assert "'/page/' is no WebSocket: route it with websocket()" in caplog.text
            assert not ran
            assert server.get("/page/").body == b"page"

    def test_the_signals_of_a_request_are_sent_once(self) -> None:
        got: list[str] = []

        def started(sender: Any, scope: Any, **kwargs: Any) -> None:
            assert sender.__module__ == "django_ws" and scope["type"] == "websocket"
            got.append("started")

        def finished(sender: Any, **kwargs: Any) -> None:
            assert sender.__module__ == "django_ws"
            got.append("finished")

        async def view(socket: WebSocket) -> None:
            got.append("view")
            await socket.accept()

        signals.request_started.connect(started)
        signals.request_finished.connect(finished)
        try:
            play(view)
            assert got == ["started", "finished", "view"]
            for options in ({"path": "/nowhere/"}, {"query_string": b"\xff"}, {}):
                got.clear()
                play(closing, **options)
                assert got == ["started", "finished"]
        finally:
            signals.request_started.disconnect(started)
            signals.request_finished.disconnect(finished)

    def test_a_connection_that_ends_before_it_begins(self) -> None:
        def prepare(drive: Drive) -> None:
            drive.queue.get_nowait()
            drive.put(GONE)

        assert play(accepting, prepare=prepare).sent == []

    @asynchronous
    async def test_http_and_lifespan_pass_untouched(self) -> None:
        async def app(*args: Any) -> None:
            calls.append(args)

        calls: list[Any] = []
        for kind in ("http", "lifespan", "something new"):
            scope = {"type": kind}
            await websockets(app)(scope, print, print)  # type: ignore[arg-type]
            assert calls.pop() == (scope, print, print)
            assert scope == {"type": kind}


class TestOrigins:
    @pytest.mark.parametrize("origin, host, options, expected", ORIGINS)
    def test_the_table(
        self, origin: Any, host: str, options: Any, expected: int, caplog: Log
    ) -> None:
        headers = [(b"host", host.encode("latin-1"))]
        if origin is not None:
            headers.append((b"origin", origin.encode("latin-1")))
        more = options.get("more", [])
        rest = {name: options[name] for name in options if name != "more"}
        drive = play(accepting, headers=headers + more, **rest)
        assert drive.status == expected
        security = [r for r in caplog.records if r.name.startswith("django.security")]
        if expected == 101:
            assert quiet(caplog)
        else:
            offender = (origin if expected == 403 else host).encode("unicode_escape")
            assert any(offender.decode() in record.getMessage() for record in security)

    @asynchronous
    async def test_the_page_is_the_projects_own(self) -> None:
        evil: Any = {"origin": "http://evil.org"}
        view = "project.failed_csrf"
        found = await answer(accepting, headers=evil, CSRF_FAILURE_VIEW=view)
        assert (found.status_code, found.content[:21]) == (
            418,
            b"Origin checking faile",
        )

    def test_it_holds_on_the_wire(self, ws: str) -> None:
        with serve(accepting, ws=ws) as server:
            assert seen(server.dial(origin=None)) == [[], {}]
            response = server.handshake(Origin="http://evil.org")
            assert response.status == 403
            assert b"CSRF verification failed" in response.body
            assert server.handshake(Host="evil.org").status == 400
            rebinding = {"Host": "evil.org", "Origin": "http://evil.org"}
            assert server.handshake(**rebinding).status == 400

    @pytest.mark.parametrize(
        "view",
        [csrf_exempt(accepting), csrf_exempt(Accepting.as_view()), Exempt.as_view()],
    )
    @asynchronous
    async def test_csrf_exempt_is_the_way_out_for_one_view(self, view: Any) -> None:
        evil = {"origin": "http://evil.org"}
        assert await status(view, headers=evil) == 101
        assert await status(view, headers={**evil, "host": "evil.org"}) == 400


# Django's own tests "middleware_exceptions", for handshakes: what the middleware does,
# what the view does, and the status and body of the answer. `LookupError` is what
# Rescue, the innermost, answers with 409.
HOOKS: list[tuple[Any, Any, int, str]] = [
    (hooked(process_view=lambda *a: HttpResponse("v", status=402)), None, 402, "v"),
    (hooked(process_view=template_response), None, 402, "rendered very late"),
    (hooked(process_view=refuses), None, 403, "custom 403: by middleware"),
    (hooked(process_view=fails), None, 500, "custom 500"),
    (hooked(__call__=refuses), None, 403, "custom 403: by middleware"),
    (hooked(__call__=fails), None, 500, "custom 500"),
    (hooked(process_exception=fails), raising(KeyError()), 409, "rescued"),
    (hooked(process_exception=fails), raising(OSError()), 500, "custom 500"),
    (
        hooked(process_exception=lambda *a: HttpResponse("e", status=401)),
        *(raising(OSError()), 401, "e"),
    ),
    (
        hooked(process_template_response=lambda *a: None),
        *(returning(template_response), 500, "custom 500"),
    ),
    (takes(lambda response: HttpResponse("replaced")), None, 200, "replaced"),
    (takes(lambda response: HttpResponse(status=101)), None, 500, "custom 500"),
    (takes(copy.copy), None, 101, ""),
    (takes(fails), None, 500, "custom 500"),
]


class TestBeforeAccept:
    @pytest.mark.parametrize(
        "view, expected, body",
        [
            (returning(with_everything), 401, '{"detail": "no"}'),
            (returning(streaming), 503, "part 0 part 1 part 2 "),
            (returning(template_response), 402, "rendered very late"),
            (returning(failing_response), 409, "rescued"),  # by process_exception
            (returning(lambda socket: HttpResponse(b"")), 200, ""),
            (returning(lambda socket: HttpResponse("x" * 100_000)), 200, "x" * 100_000),
            (raising(Http404("gone")), 404, "custom 404: gone"),
            (Dispatching.as_view(), 404, "custom 404: dispatched"),
            (raising(PermissionDenied("no")), 403, "custom 403: no"),
            (raising(BadRequest("bad")), 400, "Bad Request"),
            (raising(SuspiciousOperation("odd")), 400, "Bad Request"),
            (raising(ValueError("bug")), 500, "custom 500"),
            (raising(ExceptionGroup("g", [Http404("in")])), 404, "custom 404: in"),
            (raising(LookupError()), 409, "rescued"),
            (raising(WebSocketDisconnect()), 403, "custom 403: "),
            (closing, 403, "custom 403: "),
            (forgetting, 403, "custom 403: "),
            (returning(lambda socket: "a string"), 500, "custom 500"),
            (returning(lambda socket: HttpResponse(status=101)), 500, "custom 500"),
            (returning(lambda socket: broken_stream()), 500, "custom 500"),
            (returning(lambda socket: FileResponse(open(__file__, "rb"))), 200, '"""'),
        ],
    )
    @asynchronous
    async def test_it_is_the_answer(self, view: Any, expected: int, body: str) -> None:
        options: Any = {"MIDDLEWARE": middleware("Rescue"), "TEMPLATES": TEMPLATES}
        response = await answer(view, **HANDLERS, **options)
        assert response.status_code == expected
        assert body in response.content.decode()

    @pytest.mark.parametrize("hook, view, expected, body", HOOKS)
    @asynchronous
    async def test_the_hooks_of_middleware(
        self, hook: Any, view: Any, expected: int, body: str
    ) -> None:
        own.hook = hook
        chain = middleware("hook", "Rescue")
        options: Any = {**HANDLERS, "MIDDLEWARE": chain, "TEMPLATES": TEMPLATES}
        found = await answer(view or accepting, **options)
        if expected == 101:
            assert found == [[], {}]
        else:
            assert found.status_code == expected
            assert body in found.content.decode()

    def test_it_passes_by_the_middleware_of_startproject(self, ws: str) -> None:
        """CommonMiddleware puts a Content-Length on the handshake's empty response."""
        views = returning(with_everything), websocket("stream/", returning(streaming))
        with serve(*views, ws=ws, MIDDLEWARE=STARTPROJECT) as server:
            response = server.handshake()
            assert (response.status, response.body) == (401, b'{"detail": "no"}')
            assert response.headers["X-Why"] == "because"
            assert response.headers["Content-Length"] == "16"
            assert response.headers["X-Frame-Options"] == "DENY"
            assert response.headers["Vary"] == "X-Own, Accept-Language, Cookie"
            assert response.headers["Set-Cookie"] == "seen=1; Path=/"
            assert response.headers["Content-Type"] == "application/json"
            assert server.handshake("/stream/").body == b"part 0 part 1 part 2 "

    @pytest.mark.parametrize("extensions", [{}, None])
    @pytest.mark.parametrize("view", [raising(Http404()), closing, forgetting])
    def test_the_server_may_make_a_bare_403(self, view: Any, extensions: Any) -> None:
        assert play(view, extensions=extensions).sent == [{"type": "websocket.close"}]

    @pytest.mark.parametrize(
        "error, code",
        [(Http404("gone"), 404), (ValueError("a bug"), 500), (BadRequest("bad"), 400)],
    )
    @asynchronous
    async def test_debug_shows_djangos_page(self, error: Exception, code: int) -> None:
        found = await answer(raising(error), DEBUG=True, TEMPLATES=TEMPLATES)
        assert found.status_code == code
        assert f"{error}".encode() in found.content
        assert b"DEBUG = True" in found.content

    @pytest.mark.parametrize(
        "view, name, level, message",
        [
            (raising(ValueError("bug")), "request", "ERROR", "Internal Server Error"),
            (raising(PermissionDenied("no")), "request", "WARNING", "Forbidden (Perm"),
            (raising(Http404("no")), "request", "WARNING", "Not Found: /ws/"),
            (raising(SuspiciousOperation("odd")), "security", "ERROR", "odd"),
            (closing, "request", "WARNING", "Forbidden: /ws/"),
            (forgetting, "request", "WARNING", "Forbidden: /ws/"),
        ],
    )
    def test_it_is_logged_once_as_django_logs_it(
        self, view: Any, name: str, level: str, message: str, caplog: Log
    ) -> None:
        play(view)
        [record] = [r for r in caplog.records if r.name.startswith("django.")]
        assert (record.name.split(".")[1], record.levelname) == (name, level)
        assert record.getMessage().startswith(message)
        assert vars(record)["request"].path == "/ws/"
        without = message.startswith(("Not Found", "Forbidden:"))
        assert bool(record.exc_info) != without
        told = (
            "'/ws/': refused, since the view returned without accept()" in caplog.text
        )
        assert told == (view is forgetting)

    def test_a_response_is_closed(self) -> None:
        closed = []

        class Closing(HttpResponse):
            def __init__(self) -> None:
                super().__init__(status=403)
                vars(self)["_resource_closers"].append(lambda: closed.append(self))

        play(returning(lambda socket: Closing()))
        assert len(closed) == 1

    @pytest.mark.parametrize("then", ["cancelled", "again", "returns", "raises"])
    def test_a_refusal_comes_to_its_end_once(self, then: str, caplog: Log) -> None:
        async def view(socket: WebSocket) -> None:
            if then == "cancelled":
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(0):
                        await socket.close()
                return
            tasks.append(asyncio.create_task(socket.close(4001, "why")))
            await asyncio.sleep(0)
            if then == "again":
                await socket.close()
                await tasks[0]
                with pytest.raises(WebSocketDisconnect, match="4001 why"):
                    await socket.accept()
            await asyncio.sleep(0.02)
            if then == "raises":
                raise ValueError("a bug")

        async def slowly(event: Any) -> None:
            await asyncio.sleep(0.05)

        def prepare(drive: Drive) -> None:
            drive.before = slowly

        tasks: list[Any] = []
        drive = play(view, prepare=prepare)
        assert drive.types == ["http.response.start", "http.response.body"]
        assert drive.status == 403
        assert ("a bug" in caplog.text) == (then == "raises")
        if then != "cancelled":
            assert caplog.text.count("Forbidden: /ws/") == 1

    @pytest.mark.parametrize("error", [OSError(), RuntimeError("flow error")])
    def test_a_client_that_left_before_it(self, error: Any, caplog: Log) -> None:
        def prepare(drive: Drive) -> None:
            drive.error = error

        play(closing, prepare=prepare)
        assert [record.getMessage() for record in caplog.records] == ["Forbidden: /ws/"]

    @asynchronous(hasty=True)
    async def test_a_client_that_leaves_while_it_is_refused(self, caplog: Log) -> None:
        async def before(event: Any) -> None:
            if event["type"] != "websocket.close":
                drive.put(GONE)
                await asyncio.sleep(3600)

        async with driven(closing) as drive:
            drive.before = before
            await drive.end()
        assert drive.sent == [{"type": "websocket.close"}]
        assert [record.getMessage() for record in caplog.records] == ["Forbidden: /ws/"]

    @pytest.mark.parametrize("view", [closing, raising(ValueError())])
    def test_what_precedes_it_runs_once(self, view: Any, monkeypatch: Patch) -> None:
        def opening(using: Any) -> Any:
            viewed.append("atomic")
            return atomic(using)

        atomic = transaction.atomic
        monkeypatch.setattr(transaction, "atomic", opening)
        viewed.clear()
        with database_options(ATOMIC_REQUESTS=True):
            play(view, MIDDLEWARE=middleware("Rescue"))
        assert viewed == ["process_view", "atomic"]


class TestAfterAccept:
    @pytest.mark.parametrize("debug", [True, False])
    @pytest.mark.parametrize(
        "error, code, reason",
        [
            (PermissionDenied("not you"), 1008, "PermissionDenied: not you"),
            (ValueError("a bug"), 1011, "ValueError: a bug"),
            (Http404("no"), 1011, "Http404: no"),
            (BadRequest("no"), 1011, "BadRequest: no"),
            (ValueError("é" * 100), 1011, "ValueError: " + "é" * 55),
            (ValueError("\ud800"), 1011, "ValueError: ?"),
            (ExceptionGroup("g", [ValueError("a")]), 1011, "ValueError: a"),
            (InvalidMessage(1007, "odd"), 1007, "odd"),
            (InvalidMessage(1003, "x" * 200), 1003, "x" * 123),
            (WebSocketDisconnect(4001, "why"), 4001, "why"),
            (ExceptionGroup("g", [WebSocketDisconnect(4001)]), 4001, ""),
            (
                ExceptionGroup("g", [ExceptionGroup("h", [WebSocketDisconnect(4001)])]),
                *(4001, ""),
            ),
            *[  # what no frame can carry
                (WebSocketDisconnect(*end), 1000, "")
                for end in ((1006, ""), ("x", ""), (4000, 5), (4000, "\ud800"))
            ],
        ],
    )
    def test_an_exception_closes_with_its_code(
        self, error: Exception, code: int, reason: str, debug: bool, caplog: Log
    ) -> None:
        [_, close] = play(raising(error, accept=True), DEBUG=debug).sent
        if not debug and code in (1008, 1011):
            reason = ""
        assert close == {"type": "websocket.close", "code": code, "reason": reason}
        assert quiet(caplog) == (code not in (1008, 1011))

    @pytest.mark.parametrize(
        "error, level, message",
        [
            (ValueError("a bug"), "ERROR", "Internal Server Error: /ws/"),
            (
                ExceptionGroup("g", [ValueError("a"), KeyError("b")]),
                *("ERROR", "Internal Server Error: /ws/"),
            ),
            (
                PermissionDenied("no"),
                *("WARNING", "Forbidden (Permission denied): /ws/"),
            ),
        ],
    )
    def test_it_is_logged_and_signalled_once(
        self, ws: str, error: Exception, level: str, message: str, caplog: Log
    ) -> None:
        got = []

        def signalled(sender: Any, request: HttpRequest, **kwargs: Any) -> None:
            got.append((request.path, sys.exc_info()[1]))

        signals.got_request_exception.connect(signalled)
        try:
            with serve(raising(error, accept=True), ws=ws) as server:
                code, _ = closed_with(server.dial())
        finally:
            signals.got_request_exception.disconnect(signalled)
        assert code == (1011 if level == "ERROR" else 1008)
        assert repr(got) == repr([("/ws/", error)] if level == "ERROR" else [])
        [record] = [r for r in caplog.records if r.levelno > logging.INFO]
        assert (record.name, record.levelname) == ("django.request", level)
        assert record.getMessage() == message
        about = vars(record)
        assert about["request"].path == "/ws/"
        assert about["status_code"] == (500 if level == "ERROR" else 403)
        assert record.exc_info and repr(record.exc_info[1]) == repr(error)

    @asynchronous
    async def test_a_value_that_nobody_gets_is_told(self, caplog: Log) -> None:
        async def view(socket: WebSocket) -> Any:
            await socket.accept()
            return HttpResponse()

        async with connected(view) as client:
            with pytest.raises(WebSocketDisconnect, match="1000"):
                await client.receive_text()
        assert "returned a value after accept()" in caplog.text

    @pytest.mark.parametrize("accept", [True, False])
    def test_propagated_exceptions_reach_the_server(self, accept: bool) -> None:
        view = raising(ValueError("a bug"), accept)
        with pytest.raises(ValueError, match="a bug"):
            play(view, DEBUG_PROPAGATE_EXCEPTIONS=True)

    @pytest.mark.parametrize("moment", ["handshake", "accept", "receive", "send"])
    @pytest.mark.parametrize("how", ["close", "reset"])
    def test_a_client_that_goes_away_leaves_no_log(
        self, ws: str, moment: str, how: str, caplog: Log
    ) -> None:
        at, go, ended = (threading.Event() for _ in range(3))

        async def pause(name: str) -> None:
            if name == moment:
                at.set()
                await until(go.is_set)

        async def view(socket: WebSocket) -> None:
            try:
                await pause("handshake")
                await socket.accept()
                await pause("accept")
                await socket.send_text("hello")
                await pause("receive")
                await socket.receive_text()
                await pause("send")
                for _ in range(100):
                    await socket.send_text("x" * 10_000)
                    await asyncio.sleep(0)
                await socket.receive_text()
            finally:
                ended.set()

        with serve(view, ws=ws) as server:
            raw = server.open_raw(wait=moment != "handshake")
            if moment != "handshake":
                raw.sendall(frame(1, b"hi"))
            assert at.wait(20)
            (reset if how == "reset" else sockets.socket.close)(raw)
            time.sleep(0.05)  # the server's turn to see it; either order is tested
            go.set()
            assert ended.wait(20)
        assert quiet(caplog)


class TestContext:
    @pytest.mark.parametrize(
        "chain",
        [
            ["around", "own_urls"],
            ["around_async", "own_urls"],
            ["own_urls", "around", "async_only"],
            ["async_only", "own_urls", "around"],
            ["own_urls", "around", "async_only", "synchronous"],
        ],
    )
    def test_the_view_runs_in_the_context_of_its_middleware(self, chain: Any) -> None:
        async def view(socket: WebSocket) -> None:
            async def everywhere() -> None:
                found.append(surroundings())
                found.append(await asyncio.create_task(on_a_task()))
                found.append(await sync_to_async(surroundings)())
                found.append(await sync_to_async(async_to_sync(on_a_task))())

            async def on_a_task() -> list[Any]:
                return surroundings()

            found: list[Any] = []
            await everywhere()
            await socket.accept()
            await everywhere()
            async for _ in socket:
                await everywhere()
                await socket.send_json(found)

        pattern = websocket("ws/", view)
        own.urls = urlconf(pattern, __name__="own")
        with serve(
            pattern, MIDDLEWARE=middleware(*chain), LANGUAGE_CODE="en"
        ) as server:
            clients = [server.dial(f"/ws/?who={number}") for number in range(10)]
            for client in clients:
                client.send("look")
            for number, client in enumerate(clients):
                expected = [str(number), str(number), "de", "Asia/Tokyo", "own"]
                assert seen(client) == [expected] * 12

    def test_and_leaves_nothing_of_it_to_the_next_handshake(self) -> None:
        async def view(socket: WebSocket) -> None:
            found.append(surroundings())

        found: list[Any] = []
        own.urls = urlconf(websocket("ws/", view))
        for chain in (middleware("around", "own_urls"), []):
            for _ in range(SIZE + 1):
                play(view, query_string=b"who=1", MIDDLEWARE=chain)
        assert found[-1] == [None, None, "en-us", "America/Chicago", "urlconf"]

    @pytest.mark.parametrize("chain", [middleware("just_a_user"), SESSIONS])
    def test_the_user_is_loaded_once_for_all_code(self, user: Any, chain: Any) -> None:
        async def view(socket: Any) -> None:
            def everything() -> list[str]:
                with CaptureQueriesContext(connection) as queries:
                    page = engines["django"].from_string("{{ user }}")
                    names = [socket.user.username, socket.request.user.username]
                    names.append(page.render({}, socket.request))
                assert not queries.captured_queries
                return names

            assert await socket.auser() is socket.user
            assert await socket.request.auser() is socket.user
            await socket.accept()
            page = engines["django"].from_string("{{ user }}")
            names = [socket.user.username, page.render({}, socket.request)]
            names += await sync_to_async(everything)()
            assert await socket.auser() is socket.user
            await socket.send_json([socket.user.is_authenticated, *names])

        anybody = Client(raise_request_exception=False)
        templates = [{**TEMPLATES[0], "OPTIONS": WHO}]
        options: Any = {"MIDDLEWARE": chain, "TEMPLATES": templates}
        ask = async_to_sync(answer)
        found = ask(view, client=logged_in(user), **options)
        assert found == [True, *["ann"] * 5]
        if chain is SESSIONS:
            names = ["", "AnonymousUser", "", "", "AnonymousUser"]
            assert ask(view, client=anybody, **options) == [False, *names]


# The life of a view


class TestLifeOfAView:
    """How it learns of the end, and what nobody can do to the process."""

    def test_the_limits_that_the_table_rests_on(self) -> None:
        assert WebSocket.WATCH + WebSocket.GRACE == 11 and WebSocket.FLUSH == 5

    @pytest.mark.parametrize("end", ["leaves", "fails to send", "close_group"])
    @pytest.mark.parametrize("name", LIVES)
    @asynchronous(hasty=True)
    async def test_the_table(self, name: str, end: str, caplog: Log) -> None:
        view, expected, earliest, latest = LIVES[name]
        outcome: list[str] = []
        loop, begun = asyncio.get_running_loop(), asyncio.Event()

        async def living(socket: WebSocket) -> None:
            await socket.accept()
            await socket.join("living")
            begun.set()
            try:
                await view(socket)
                outcome.append("returned")
            except BaseException as error:
                outcome.append(type(error).__name__)
                raise

        heard = name in ("sleeps", "reads once", "listens in between")
        events = [text("beat")] if heard else []
        async with driven(living, *events) as drive:
            await begun.wait()
            await asyncio.sleep(2)
            begins = loop.time()
            if end == "close_group":
                await close_group("living", 4001)
            else:
                if end == "fails to send":
                    drive.error = OSError()
                    await broadcast("living", "x")
                drive.put(GONE)
                await until(lambda: drive.queue.empty() or "close" in drive.types)
            noted = loop.time()
            await asyncio.sleep(begins + earliest - 0.5 - loop.time())
            assert not (outcome and earliest), outcome
            assert not drive.asked or end != "leaves"  # nobody asks after the end
            await asyncio.sleep(noted + latest - loop.time())
            await turns(50)
            assert outcome == [expected]
            drive.error = None
            await drive.end()
        assert not drive.task.cancelled() and not drive.task.cancelling()
        assert quiet(caplog)

    @pytest.mark.parametrize(
        "name", ["reads", "sleeps", "cleans up for ever", "swallows", "wait_for"]
    )
    @pytest.mark.parametrize("when", ["before", "after", "twice"])
    @asynchronous(hasty=True)
    async def test_the_servers_cancellation_ends_it(
        self, name: str, when: str, caplog: Log
    ) -> None:
        async def view(socket: WebSocket) -> None:
            await socket.accept()
            try:
                await LIVES.get(name, LIVES["wait_for, then cleans up"])[0](socket)
            finally:
                ended.append(name)

        ended: list[str] = []
        async with driven(view) as drive:
            await until(lambda: drive.sent)
            if when != "before":
                drive.put(GONE)
                await asyncio.sleep(0.5)
            drive.task.cancel()
            if when == "twice":
                await turns(1)
                drive.task.cancel()
            await asyncio.sleep(23)
            assert ended and drive.task.done()
        assert drive.task.cancelled() or name == "reads" and when != "before"
        assert quiet(caplog)

    @pytest.mark.parametrize("when", ["raises", "refuses", "just ended"])
    @asynchronous(hasty=True)
    async def test_a_cancellation_is_passed_on(self, when: str, caplog: Log) -> None:
        async def view(socket: WebSocket) -> None:
            if when == "refuses":
                return
            await socket.accept()
            begun.set()
            try:
                await end.wait()
            finally:
                if when == "raises":
                    raise ValueError("in the cleanup")

        async def before(event: Any) -> None:
            if event["type"].startswith("websocket.http"):
                begun.set()
                await asyncio.sleep(3600)

        begun, end = asyncio.Event(), asyncio.Event()
        async with driven(view) as drive:
            drive.before = before
            await begun.wait()
            await turns()
            if when == "just ended":
                end.set()
                await asyncio.sleep(0)  # the view has ended, and nobody knows yet
            drive.task.cancel()
            await drive.end()
        assert drive.task.cancelled()
        assert ("in the cleanup" in caplog.text) == (when == "raises")

    @pytest.mark.parametrize("how", ["returns", "raises", "is cancelled"])
    @pytest.mark.parametrize("seconds", [0, 5])
    @asynchronous(hasty=True)
    async def test_a_task_that_outlives_its_view(self, how: str, seconds: int) -> None:
        async def view(socket: WebSocket) -> None:
            sockets.append(socket)
            await socket.accept()
            await asyncio.sleep(seconds)  # it is read ahead
            tasks.append(asyncio.create_task(socket.receive_text()))
            await turns()
            if how == "raises":  # which is logged before the socket is closed
                raise ValueError
            await asyncio.sleep(3600 * (how == "is cancelled"))

        async def join_in_vain() -> None:
            for _ in range(12):
                with pytest.raises(WebSocketDisconnect):
                    await sockets[0].join("late")

        tasks: list[Any] = []
        sockets: list[WebSocket] = []
        logged, joined = threading.Event(), threading.Event()

        def emit(record: Any) -> None:
            logged.set()
            assert joined.wait(20)

        with logging_to(emit):
            async with driven(view) as drive:
                await until(lambda: tasks)
                await turns()
                if how == "raises":
                    await until(logged.is_set)
                    assert sockets[0].connected
                    await join_in_vain()
                    drive.error = OSError()
                    with pytest.raises(WebSocketDisconnect, match="1006"):
                        await sockets[0].send_text("x")
                    drive.error = None
                    joined.set()
                elif how == "is cancelled":
                    drive.task.cancel()
                await drive.end()
                await join_in_vain()
                with pytest.raises(WebSocketDisconnect):
                    await tasks[0]

    @pytest.mark.parametrize("how", ["close", "reset", "shutdown", "before accept"])
    def test_a_busy_view_cleans_up(
        self, ws: str, how: str, caplog: Log, monkeypatch: Patch
    ) -> None:
        monkeypatch.setattr(WebSocket, "WATCH", 0.1)
        steps: list[str] = []
        asleep = threading.Event()

        @contextlib.asynccontextmanager
        async def resource() -> AsyncIterator[None]:
            try:
                yield
            finally:
                await asyncio.sleep(0.01)
                steps.append("async with")

        async def view(socket: WebSocket) -> None:
            if how != "before accept":
                await socket.accept()
                assert await socket.receive_text() == "hi"
            try:
                async with resource():
                    asleep.set()
                    await asyncio.sleep(3600)
            except asyncio.CancelledError:
                steps.append("except")
                with pytest.raises(WebSocketDisconnect):
                    await socket.send_text("late")
                raise
            finally:
                await asyncio.sleep(0.01)
                steps.append("finally")

        with serve(view, ws=ws) as server:
            raw = server.open_raw(wait=how != "before accept")
            if how != "before accept":
                raw.sendall(frame(1, b"hi"))
            assert asleep.wait(20)
            if how == "reset":
                reset(raw)
            elif how == "shutdown":
                server.uvicorn.should_exit = True
            else:
                if how == "close":
                    raw.sendall(frame(8, b"\x03\xe8"))
                raw.close()
            wait_for(lambda: len(steps) == 3, 5)
        assert steps == ["async with", "except", "finally"]
        assert quiet(caplog)

    @asynchronous(hasty=True)
    async def test_who_fails_to_send_was_told(self, socket: Any, drive: Any) -> None:
        drive.error = OSError()
        with pytest.raises(WebSocketDisconnect):
            await socket.send_text("x")
        drive.put(GONE)
        await asyncio.sleep(5)  # and may clean up

    @asynchronous(hasty=True)
    async def test_an_error_in_the_cleanup_is_logged(self, caplog: Log) -> None:
        async def failing() -> None:
            try:
                await asyncio.sleep(3600)
            finally:
                raise ValueError("in the cleanup")

        async def in_a_group() -> None:
            async with asyncio.TaskGroup() as group:
                group.create_task(failing())

        for job in (failing, in_a_group):
            caplog.clear()

            async def view(socket: WebSocket) -> None:
                await socket.accept()
                await job()

            with logging_to(lambda record: time.sleep(0.1)):  # a mail server, say
                async with driven(view) as drive:
                    await until(lambda: drive.sent)
                    drive.put(GONE)
                    await drive.end()
            [record] = [r for r in caplog.records if r.name == "django.request"]
            assert record.exc_info and str(record.exc_info[1]) == "in the cleanup"

    def test_a_cancellation_nobody_asked_for_is_an_error(self, caplog: Log) -> None:
        async def view(socket: WebSocket) -> None:
            await socket.accept()
            future = asyncio.get_running_loop().create_future()
            future.cancel()
            await future

        assert play(view).code == 1011
        [record] = caplog.records
        assert record.exc_info and "cancelled" in str(record.exc_info[1])

    def test_but_not_what_a_view_cancels_when_it_has_ended(self, caplog: Log) -> None:
        async def view(socket: WebSocket) -> None:
            await socket.accept()
            task = asyncio.create_task(asyncio.sleep(3600))
            try:
                await socket.receive_text()
            finally:
                task.cancel()
                await task

        play(view, GONE)
        assert quiet(caplog)

    @asynchronous(hasty=True)
    async def test_timeouts_in_the_view_keep_their_meaning(self, socket: Any) -> None:
        await socket.join("room")
        for _ in range(3):
            for call in (asyncio.sleep(3600), socket.receive_text()):
                with pytest.raises(TimeoutError):
                    async with asyncio.timeout(2):
                        await call
        task = asyncio.current_task()
        assert task is not None and task.cancelling() == 0
        closing = asyncio.create_task(close_group("room", 4001))
        with pytest.raises(WebSocketDisconnect, match="4001"):
            await socket.receive_text()
        assert task.cancelling() == 0
        await closing

    @asynchronous
    async def test_a_cancellation_beside_the_end_goes_on(self, socket: Any) -> None:
        task = asyncio.create_task(reader(socket))
        await turns()
        task.cancel()
        await socket.close()
        await asyncio.wait([task])
        assert task.cancelled()

    @pytest.mark.parametrize("ahead", [False, True])
    @asynchronous(hasty=True)
    async def test_one_disconnect(self, socket: Any, drive: Any, ahead: bool) -> None:
        if ahead:
            await asyncio.sleep(5)
        drive.put(GONE)
        assert await socket.receive() == GONE
        with pytest.raises(WebSocketDisconnect, match="4001"):
            await socket.receive()

    @pytest.mark.parametrize(
        "event, told",
        [({}, (1005, "")), ({"code": None, "reason": None}, (1005, ""))]
        + [({"code": 1006}, (1006, "")), ({"code": 1012, "reason": "r"}, (1012, "r"))],
    )
    @asynchronous
    async def test_what_a_server_may_leave_out(
        self, socket: Any, drive: Any, event: Any, told: Any
    ) -> None:
        drive.put({"type": "websocket.disconnect", **event})
        with pytest.raises(WebSocketDisconnect) as caught:
            await socket.receive_text()
        assert (caught.value.code, caught.value.reason) == told

    @pytest.mark.parametrize("what", ["receive", "send", "join", "close", "accept"])
    @asynchronous
    async def test_whatever_it_catches_all_go_on(self, socket: Any, what: str) -> None:
        async def others() -> None:
            while True:
                await asyncio.sleep(0)
                count.append(1)

        count: list[int] = []
        task = asyncio.create_task(others())
        if what in ("receive", "send", "close"):
            await socket.close()
        calls: Any = {
            "receive": socket.receive_text,
            "send": lambda: socket.send_text("x"),
            "join": lambda: (
                socket.join("room") if len(count) % 2 else socket.leave("a")
            ),
            "close": socket.close,
            "accept": socket.accept,
        }
        for _ in range(100):
            with contextlib.suppress(BaseException):
                await calls[what]()
        task.cancel()
        assert len(count) > 50

    @asynchronous
    async def test_views_that_send_and_send_leave_others_their_turn(
        self,
    ) -> None:
        async def view(socket: WebSocket) -> None:
            await socket.accept()
            while True:
                await socket.send_text("x")

        async def counted(event: Any) -> None:
            sent[-1] += 1
            assert sent[-1] < 10_000, "the loop stands still"

        sent = [0]
        async with driven(view, count=10) as drives:
            for drive in drives:
                drive.before = counted
            while sum(map(bool, sent)) < 20:
                sent.append(0)
                await asyncio.sleep(0)
            for drive in drives:
                drive.error = OSError()
        assert max(sent[:-1]) <= 10 * (32 + 1)  # of each view between two turns

    @asynchronous
    async def test_sends_keep_their_order_and_nothing_follows_a_close(
        self, socket: Any, drive: Any
    ) -> None:
        async def pump() -> None:
            with contextlib.suppress(WebSocketDisconnect):
                while True:
                    await socket.send_text("x")

        async def slowly(event: Any) -> None:
            if event["type"] == "websocket.close":
                await asyncio.sleep(0.01)

        drive.before = slowly
        await asyncio.gather(*(socket.send_text(str(n)) for n in range(100)))
        assert drive.messages == [str(number) for number in range(100)]
        tasks = [asyncio.create_task(pump()) for _ in range(3)]
        await asyncio.sleep(0.01)
        await socket.close(4000)
        await asyncio.wait(tasks)
        assert drive.types.index("close") == len(drive.types) - 1

    @asynchronous(types=["accept", "close"])
    async def test_cancelling_either_is_safe(self, socket: Any, drive: Any) -> None:
        drive.reads.clear()
        for call in (socket.send_text("never"), socket.close(4001)):
            with pytest.raises(TimeoutError):
                async with asyncio.timeout(0.01):
                    await call
        assert not socket.connected
        drive.reads.set()
        await socket.close(4002)  # waits for the first one
        assert drive.code == 4001

    @pytest.mark.skipif(sys.version_info < (3, 12), reason="3.12 has eager tasks")
    @asynchronous
    async def test_eager_tasks_change_nothing(self) -> None:
        factory = getattr(asyncio, "eager_task_factory")
        asyncio.get_running_loop().set_task_factory(factory)
        async with connected(member) as client:
            assert await client.receive_text() == "joined"
            await client.send_text("a")
            assert await client.receive_text() == "a"

    @pytest.mark.parametrize(
        "how",
        ["raises", "denied", "cancelled", "gone", "ahead", "reader", "group", "thread"]
        + ["stream", "handler", "handler raises"],
    )
    def test_a_socket_is_freed_without_the_garbage_collector(self, how: str) -> None:
        kept: list[Any] = []
        variable: Any = contextvars.ContextVar("variable")

        class Precious(Exception):
            pass

        async def failing() -> AsyncIterator[str]:
            yield "a part"
            raise Precious

        async def view(socket: WebSocket) -> Any:
            kept.extend([weakref.ref(socket), weakref.ref(socket.request)])
            if how == "denied":
                raise Precious
            if how == "stream":
                return StreamingHttpResponse(failing())
            await socket.accept()
            await socket.join("room")
            if how == "raises":
                raise Precious
            if how == "cancelled":
                future = asyncio.get_running_loop().create_future()
                future.cancel()
                await future
            if how == "ahead":
                return await asyncio.sleep(5)
            if how == "reader":
                reader = asyncio.create_task(socket.receive_text())
                await asyncio.sleep(1)
                reader.cancel()
                await asyncio.wait([reader])
            elif how == "group":
                await broadcast("room", "x")
            elif how == "thread":
                await sync_to_async(repr)(socket)
            elif how.startswith("handler"):

                async def handler(message: Any) -> None:
                    await socket.leave("none")
                    if how == "handler raises":
                        raise Precious

                variable.set(socket)  # join() copies the context
                await socket.join("room", handler)
                await broadcast("room", "x")
                await close_group("room", spread=0.1)
                await asyncio.Event().wait()
            else:
                await socket.receive_text()

        with without_collector():
            with asyncio.Runner(loop_factory=Hasty) as runner:
                runner.run(self.serve_once(view))
                # A thread lets go of its last job after it has told of its end.
                wait_for(lambda: [reference() for reference in kept] == [None, None])
                wait_for(lambda: Precious not in map(type, gc.get_objects()))

    async def serve_once(self, view: Any) -> None:
        async with driven(view, GONE) as drive:
            await drive.end()


class TestReadingAhead:
    @asynchronous(*[text(f"{number:>100}") for number in range(1000)], GONE, hasty=True)
    async def test_64_kib_and_nothing_is_lost(self, socket: Any, drive: Any) -> None:
        assert (await socket.receive_text()).strip() == "0"
        await asyncio.sleep(5)
        # CONNECT, the first, what is read ahead.
        assert drive.taken == 2 + 65536 // 114 + 1
        got = [message.strip() async for message in socket.iter_text()]
        assert got == [str(number) for number in range(1, 1000)]

    @asynchronous(text("read ahead"), hasty=True)
    async def test_nothing_comes_after_ones_close(
        self, socket: Any, drive: Any
    ) -> None:
        await asyncio.sleep(5)
        assert drive.taken == 2
        await socket.close(4001)
        for _ in range(2):
            with pytest.raises(WebSocketDisconnect, match="4001"):
                await socket.receive_text()

    @asynchronous(hasty=True)
    async def test_it_goes_to_whoever_comes(self, socket: Any, drive: Any) -> None:
        await asyncio.sleep(5)  # it is read ahead, and nothing comes
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(1):
                await socket.receive_text()
        drive.put(text("a"), text("b"))
        await asyncio.sleep(5)
        assert await socket.receive_text() == "a"
        assert await asyncio.create_task(socket.receive()) == text("b")

    @pytest.mark.parametrize("timeout", [0, 0.001])
    @asynchronous(hasty=True)
    async def test_a_timeout_around_receive_loses_nothing(
        self, socket: Any, drive: Any, timeout: float
    ) -> None:
        got: list[Any] = []
        loop = asyncio.get_running_loop()
        events = text("a"), binary(b"b"), *(text(str(n)) for n in range(50))
        loop.call_later(2, drive.put, *events)
        while len(got) < 52:
            try:
                async with asyncio.timeout(timeout):
                    got.append(await socket.receive_text())
            except TimeoutError:
                await asyncio.sleep(0.001)
            except InvalidMessage as error:
                got.append(error.code)
        assert got == ["a", 1003, *map(str, range(50))]

    @asynchronous
    async def test_two_tasks_may_not_receive_at_once(self) -> None:
        async with both_ends() as (socket, client):
            first = asyncio.create_task(socket.receive_text())
            await asyncio.sleep(0)
            with pytest.raises(RuntimeError, match="another task is receiving"):
                await socket.receive_text()
            await client.send_text("a")
            assert await first == "a"

    @pytest.mark.parametrize("receives, expected", [(False, 1), (True, 10)])
    @asynchronous(hasty=True)
    async def test_a_client_that_floods_is_closed_with_1008(
        self, receives: bool, expected: int, caplog: Log
    ) -> None:
        """At once where the view never receives, else after a minute."""

        async def view(socket: WebSocket) -> None:
            await socket.accept()
            for _ in range(3 * receives):  # in time
                await socket.receive_text()
                await asyncio.sleep(50)
            start = loop.time()
            try:
                await asyncio.sleep(3600)
            finally:
                took.append(loop.time() - start)

        took: list[float] = []
        loop = asyncio.get_running_loop()
        async with driven(view, *[text("x" * 100)] * 1000) as drive:
            await drive.end()
        assert drive.code == 1008 and expected <= took[0] < expected + 30
        assert "closed with 1008" in caplog.text

    @asynchronous(hasty=True)
    async def test_a_failed_broadcast_does_not_cut_off_what_came_before(self) -> None:
        async def view(socket: WebSocket) -> None:
            await socket.accept()
            await socket.join("room")
            async for message in socket.iter_text():
                await asyncio.sleep(2)
                got.append(message)

        got: list[str] = []
        async with driven(view) as drive:
            await turns()
            drive.put(*map(text, "abc"), GONE)
            await asyncio.sleep(1)
            drive.error = OSError()
            await broadcast("room", "x")
            await drive.end()
        assert got == ["a", "b", "c"]

    @asynchronous(hasty=True)
    async def test_a_socket_that_waits_costs_one_task_and_no_timer(self) -> None:
        async def view(socket: WebSocket) -> None:
            await socket.accept()
            await socket.receive_text()
            await socket.receive_text()

        async with driven(view) as drive:
            await until(lambda: drive.sent)
            for _ in range(2):
                await asyncio.sleep(5)
                assert len(asyncio.all_tasks()) == 3  # the connection's, the view's
                assert not due_timers()
                drive.put(text("a"))
            await drive.end()


class TestThreads:
    @asynchronous
    async def test_the_pool_is_bounded_and_nobody_deadlocks(self) -> None:
        lock = threading.Lock()
        busy, most, names = 0, 0, set()

        def job() -> None:
            nonlocal busy, most
            with lock:
                busy += 1
                most = max(most, busy)
                names.add(threading.current_thread().name)
            time.sleep(0.03)
            with lock:
                busy -= 1

        async def view(socket: WebSocket) -> None:
            await socket.accept()
            await sync_to_async(job)()
            await socket.send_text("done")

        async with driven(view, count=200) as drives:
            await asyncio.wait([drive.task for drive in drives])
        assert all(drive.messages == ["done"] for drive in drives)
        assert len(names) <= SIZE and most == SIZE

    @asynchronous
    async def test_sockets_with_many_calls_starve_no_other(self) -> None:
        calls, before = itertools.count(), 0

        def job() -> None:
            time.sleep(0.005)
            next(calls)

        async def view(socket: WebSocket) -> None:
            nonlocal before
            await socket.accept()
            if socket.GET:
                await asyncio.gather(*[sync_to_async(job)() for _ in range(300)])
            else:
                await asyncio.sleep(0.2)
                await sync_to_async(int)()
                before = next(calls)

        async with driven(view, count=SIZE, query_string=b"busy=1") as busy:
            async with driven(view) as other:
                await asyncio.wait([drive.task for drive in [*busy, other]])
        assert 0 < before < SIZE * 250  # of SIZE * 300

    @asynchronous
    async def test_sockets_that_never_idle_give_threads_to_one_that_waits(
        self,
    ) -> None:
        async def view(socket: WebSocket) -> None:
            await socket.accept()
            while True:
                await sync_to_async(int)()
                await socket.send_text("a call")
                await asyncio.sleep(0.01)

        async with driven(view, count=2 * SIZE) as drives:
            for drive in drives:
                await until(lambda: drive.messages)
            for drive in drives:
                drive.put(GONE)

    def test_a_call_that_was_cancelled_in_time_does_not_run(self) -> None:
        async def view(socket: WebSocket) -> None:
            await socket.accept()
            first = asyncio.create_task(sync_to_async(go_on.wait)(20))
            second = asyncio.create_task(sync_to_async(ran.append)("second"))
            await asyncio.sleep(0.05)
            second.cancel()
            await asyncio.wait([second])
            go_on.set()
            assert await first
            start = time.monotonic()
            await sync_to_async(ran.append)("third")
            await asyncio.gather(*[sync_to_async(int)() for _ in range(300)])
            assert time.monotonic() - start < 20  # none waits for the turn to be idle

        go_on, ran = threading.Event(), list[str]()
        play(view)
        assert ran == ["third"]

    def test_a_transaction_left_open_fails_nobody_else(self) -> None:
        async def view(socket: WebSocket) -> None:
            await socket.accept()
            assert not await sync_to_async(lambda: connection.in_atomic_block)()
            await sync_to_async(transaction.atomic().__enter__)()
            await User.objects.acount()

        for _ in range(SIZE):
            assert play(view).code == 1000

    def test_a_connection_that_cannot_be_closed_stops_nothing(
        self, monkeypatch: Patch, caplog: Log
    ) -> None:
        def fail(self: Any) -> None:
            if threading.current_thread().name.startswith("django_ws_view"):
                if self.connection:
                    self.connection.close()
                raise ValueError("cannot close")

        async def view(socket: WebSocket) -> None:
            await socket.accept()
            for _ in range(2):
                assert not await sync_to_async(lambda: connection.in_atomic_block)()
                await sync_to_async(transaction.atomic().__enter__)()
                await User.objects.acount()
                await asyncio.sleep(0.3)  # the turn ends

        name = "close_if_unusable_or_obsolete"
        with monkeypatch.context() as patched:
            patched.setattr(type(connections["default"]), name, fail)
            assert play(view).code == 1000
        assert "could not be closed" in caplog.text

    @pytest.mark.parametrize("age", [0, 60])
    def test_a_connection_that_failed_is_closed_within_a_turn(self, age: int) -> None:
        async def view(socket: WebSocket) -> None:
            await socket.accept()
            with pytest.raises(DatabaseError):
                await sync_to_async(query)("SELECT nothing FROM nowhere")
            assert not await sync_to_async(lambda: connection.errors_occurred)()
            await sync_to_async(lambda: connection.close())()

        with database_options(CONN_MAX_AGE=age):
            assert play(view).code == 1000

    def test_other_ways_to_threads_work(self, database: None) -> None:
        def count() -> int:
            try:
                return User.objects.count()
            finally:
                connection.close()  # nobody else does on threads that are not ours

        async def view(socket: WebSocket) -> None:
            await socket.accept()
            expected = await User.objects.acount()
            assert await sync_to_async(count, thread_sensitive=False)() == expected
            assert await asyncio.to_thread(count) == expected
            async with asyncio.TaskGroup() as group:
                tasks = [group.create_task(User.objects.acount()) for _ in range(5)]
            assert {task.result() for task in tasks} == {expected}
            assert len([user async for user in User.objects.all()]) == expected
            await sync_to_async(async_to_sync(socket.send_text))("from a thread")

        assert play(view).messages == ["from a thread"]

    @pytest.mark.parametrize("age", [0, 600])
    def test_no_look_of_a_view_finds_the_mark_of_another_client(self, age: int) -> None:
        async def view(socket: WebSocket) -> None:
            looks = [await sync_to_async(look)()]
            await socket.accept()
            looks.append(await sync_to_async(look)())
            await socket.receive_text()
            looks.append(await sync_to_async(look)())
            found.extend(one - {socket.GET["who"]} for one in looks)

        found: list[Any] = []
        chain = middleware("marking")
        with database_options(CONN_MAX_AGE=age):
            with serve(view, MIDDLEWARE=chain) as server:
                clients = [server.dial(f"/ws/?who={n}") for n in range(40)]
                for client in clients:
                    client.send("look")
                wait_for(lambda: len(found) == 120)
        assert not set().union(*found)

    @pytest.mark.parametrize("kind", ["lazy page", "stream", "error page"])
    def test_no_page_that_refuses_shows_the_mark_of_another(self, kind: str) -> None:
        class Page(TemplateResponse):
            @property
            def rendered_content(self) -> Any:
                return str(look())

        def handler403(request: HttpRequest, exception: Any) -> HttpResponse:
            return HttpResponse(str(look()), status=403)

        async def view(socket: WebSocket) -> Any:
            if kind == "lazy page":
                return Page(socket.request, "", status=403)
            if kind == "stream":
                return StreamingHttpResponse((str(look()) for _ in "1"), status=403)
            return None

        options: Any = {"MIDDLEWARE": middleware("marking"), "handler403": handler403}
        with serve(view, **options) as server:
            names = [f"n{number:02}" for number in range(40)]
            waiting = [server.open_raw(f"/ws/?who={n}", wait=False) for n in names]
            for name, raw in zip(names, waiting):
                body = b""
                while not (b"}" in body or b"set()" in body):
                    body += raw.recv(4000)
                assert set(re.findall(r"n\d\d", body.decode())) <= {name}

    def test_handshakes_that_wait_delay_no_view(self) -> None:
        own.release = threading.Event()
        with serve(counting, MIDDLEWARE=middleware("stuck")) as server:
            clients = server.dial_all(10, "/ws/")
            for _ in range(50):
                server.open_raw("/ws/?slow=1", wait=False)
            try:
                for client in clients * 5:
                    client.send("count")
                    assert client.recv(5).isdigit()
            finally:
                own.release.set()

    @pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork()")
    def test_a_child_of_a_parent_that_served_sockets_runs_views(self) -> None:
        async def view(socket: WebSocket) -> None:
            await socket.accept()
            await socket.join("room")
            await broadcast("room", str(await sync_to_async(os.getpid)()))
            assert await sync_to_async(os.getpid)() == os.getpid()

        assert play(view).messages == [str(os.getpid())]
        with serve(member) as server:  # a loop that runs in the parent alone
            server.dial().recv(20)
            pid = os.fork()
            if pid == 0:
                messages = []
                with contextlib.suppress(BaseException):
                    messages = play(view).messages
                os._exit(messages != [str(os.getpid())])
            try:
                ended: list[Any] = []

                def has_ended() -> bool:
                    child, code = os.waitpid(pid, os.WNOHANG)
                    ended.extend([code] if child else [])
                    return bool(child)

                wait_for(has_ended, 20)
            finally:
                if not ended:
                    os.kill(pid, signal.SIGKILL)
                    os.waitpid(pid, 0)
        assert ended == [0]


class InATestCase:
    """What is not committed is seen, and the test's connection stays as it is."""

    @override_settings(MIDDLEWARE=SESSIONS, ROOT_URLCONF=IN_TEST)
    async def test_a_user_who_is_not_committed_comes_in(self) -> None:
        raw = await sync_to_async(lambda: connection.connection)()
        user = await User.objects.acreate(username="uncommitted")
        clients: list[Any] = [Client(), AsyncClient()]
        await sync_to_async(clients[0].force_login)(user)
        await clients[1].aforce_login(user)
        application = validated(websockets(no_http))
        for client in clients * 2:
            with contextlib.suppress(LookupError):
                async with connect(application, "/ws/", client=client) as socket:
                    for _ in range(2):
                        await socket.send_text("who")
                        found = await socket.receive_json()
                        assert found[0] == "uncommitted" and "uncommitted" in found[1:]
                    await socket.send_text("fail")
            for place in ("/refused/", "/nowhere/"):
                with contextlib.suppress(WebSocketDenied):
                    async with connect(application, place, client=client):
                        raise AssertionError("it was accepted")
        if isinstance(self, TestCase):
            assert await sync_to_async(lambda: connection.connection is raw)()
        assert await User.objects.filter(username="uncommitted").aexists()
        await user.adelete()


class TestInTestCase(InATestCase, TestCase):
    pass


class TestInTransactionTestCase(InATestCase, TransactionTestCase):
    def _fixture_teardown(self) -> None:
        pass  # flush nothing: the tables serve all tests


@override_settings(ROOT_URLCONF=urlconf(websocket("ws/", echo)))
class TestInSimpleTestCase(SimpleTestCase):
    async def test_a_socket(self) -> None:
        async with connect(websockets(no_http), "/ws/") as socket:
            await socket.send_text("hi")
            assert await socket.receive_text() == "hi"


class TestPostgres:
    @pytest.mark.parametrize("age", [0, 60])
    def test_a_burst_holds_no_more_than_the_pool_has_threads(
        self, postgres: Any, tmp_path: Path, age: int
    ) -> None:
        most, done = [0], threading.Event()

        def watch() -> None:
            while not done.is_set():
                most.append(postgres.connections)

        with postgres.serve_views(tmp_path, CONN_MAX_AGE=age) as server:
            clients = server.dial_all(150, "/query/")
            watcher = threading.Thread(target=watch)
            watcher.start()
            try:
                for _ in range(4):
                    ask_all(clients, BACKEND)
            finally:
                done.set()
                watcher.join()
            # A connection that was closed is gone a moment later.
            assert 0 < max(most) <= (SIZE if age else 3 * SIZE)
            if age:  # they are kept, and used again
                used = [ask_all(clients[:5], BACKEND) for _ in range(10)]
                assert len(set().union(*used)) <= SIZE
                assert len({ask_all(clients[:1], BACKEND)[0] for _ in range(20)}) == 1
            else:  # idle sockets, and those that push, hold none
                pushing = server.dial_all(50, "/tick/")
                for client in pushing:
                    client.send("go")
                wait_for(lambda: postgres.connections == 0)

    def test_they_go_back_to_the_pool(self, postgres: Any, tmp_path: Path) -> None:
        with postgres.serve_views(tmp_path, **SMALL_POOL) as server:
            for place in ("/refuse/", "/leave/"):
                for raw in [server.open_raw(place, wait=False) for _ in range(12)]:
                    assert raw.recv(1000).startswith(b"HTTP/1.1 403")
            for client in server.dial_all(30, "/query/") * 3:
                assert ask_all([client], "SELECT 1") == [1]
            assert postgres.connections <= 2

    @pytest.mark.parametrize("age", [0, 600])
    def test_transactions_of_one_view_disturb_no_other(
        self, postgres: Postgres, notes: None, tmp_path: Path, age: int
    ) -> None:
        insert = "INSERT INTO notes VALUES ('kept')"
        with postgres.serve_views(tmp_path, CONN_MAX_AGE=age) as server:
            for client in server.dial_all(6, "/forbear/"):
                assert client.recv(20) == "uncommitted"
            clients = server.dial_all(30, "/transact/")
            inserting = server.dial_all(12, "/query/")
            ask_all(inserting, insert)
            for how in ("exit", "exit", "leave it"):
                for client in clients:
                    client.send(how)
                for client in clients:
                    assert client.recv(20) == "in it"
                for one in inserting:
                    ask_all([one], insert)
                for client in clients:
                    client.send("go")
                for client in clients if how == "exit" else ():
                    assert client.recv(20) == "out of it"
            # No transaction is open.
            assigned = "SELECT pg_current_xact_id_if_assigned()::text"
            assert ask_all(inserting, assigned) == [None] * 12
        kept = "SELECT count(*), count(*) FILTER (WHERE note = 'kept') FROM notes"
        assert postgres.ask(kept) == [(48, 48)]

    @pytest.mark.parametrize("count", [30, 3])
    @pytest.mark.parametrize(
        "options",
        [*({"CONN_MAX_AGE": age} for age in (0, 60, None)), POOL, SMALL_POOL],
        ids=["0", "60", "None", "pool", "small pool"],
    )
    def test_polling_views_are_well_again_soon_after_a_restart_of_the_database(
        self, postgres: Any, tmp_path: Path, options: Any, count: int
    ) -> None:
        with postgres.serve_views(tmp_path, **options) as server:
            clients = server.dial_all(count, "/always/", max_queue=None)
            for client in clients:
                assert seen(client) == 1
            postgres.ask(
                f"SELECT pg_terminate_backend(pid) FROM pg_stat_activity {OTHERS}"
            )
            deadline = time.monotonic() + 5
            for client in clients:
                well = 0
                while well < 5:  # a second and a half without a failure
                    well = well + 1 if seen(client) == 1 else 0
                    assert time.monotonic() < deadline

    def test_no_query_waits_for_a_slow_one(self, postgres: Any, tmp_path: Path) -> None:
        sleeping = "SELECT pid FROM pg_stat_activity WHERE query LIKE '%pg_sleep(1%'"
        sleeping += " AND pid <> pg_backend_pid()"
        with postgres.serve_views(tmp_path) as server:
            clients = server.dial_all(200, "/query/")
            server.dial("/query/").send("SELECT 1 FROM pg_sleep(10)")
            wait_for(lambda: postgres.ask(sleeping))
            assert ask_all(clients, "SELECT 2") == [2] * 200
            [(pid,)] = postgres.ask(sleeping)  # none has waited for it
            postgres.ask(f"SELECT pg_terminate_backend({pid})")

    @pytest.mark.parametrize("options", [{"CONN_MAX_AGE": 0}, POOL])
    def test_a_query_that_is_read_in_chunks_is_read_to_its_end(
        self, postgres: Any, tmp_path: Path, options: Any
    ) -> None:
        """While no socket waits for a thread. README tells about the other case."""
        with postgres.serve_views(tmp_path, **options) as server:
            clients = server.dial_all(SIZE, "/chunks/")
            assert [len(set(names)) for names in ask_all(clients, "go")] == [200] * SIZE


class TestGroups:
    @asynchronous
    async def test_every_kind_of_message_reaches_every_member(self, layer: Any) -> None:
        def encode() -> str:
            encoded.append("once")
            return "lazy"

        encoded: list[str] = []
        sent: list[Any] = ["é", b"\x00", bytearray(b"a"), array.array("B", b"b")]
        sent += ["", {"a": [1]}, None, 5, lazy(encode, str)(), ["\ud800"], "\ud800"]
        async with driven(member, count=3, **layer) as drives:
            await joined(drives)
            for message in sent:
                await broadcast("room", message)
            expected: list[Any] = ["é", b"\x00", b"a", b"b", "", '{"a":[1]}', "null"]
            expected += ["5", '"lazy"', '["\\ud800"]', "\\ud800"]
            await deliver(drives, expected)
            drives[0].put(text("from a member"))
            await deliver(drives, [*expected, "from a member"])
            await close_group("room", 4001, "the end é")
            for drive in drives:
                await drive.end()
                assert drive.sent[-1] == {**NORMAL, "code": 4001, "reason": "the end é"}
        assert encoded == ["once"]

    @asynchronous
    async def test_misuse_is_the_callers_error(self, layer: Any) -> None:
        async with driven(member, count=1, **layer) as drives:
            await joined(drives)
            for bad, error in ((object(), TypeError), (float("nan"), ValueError)):
                with pytest.raises(error):
                    await broadcast("room", bad)
            group: Any
            for group in (5, None, b"room"):
                for call in (broadcast(group, "x"), close_group(group)):
                    with pytest.raises(TypeError, match="name must be str"):
                        await call
            await broadcast("room", "x")
            await deliver(drives, ["x"])

    @pytest.mark.parametrize(
        "name", ["", "é 🙂", "a:b*?[c]", "\n", "\ud800", "x" * 999]
    )
    @asynchronous
    async def test_joining_and_leaving_by_any_name(self, layer: Any, name: str) -> None:
        async def view(socket: Any) -> None:
            await socket.accept()
            with pytest.raises(TypeError, match="name must be str"):
                await socket.join(5)
            for _ in range(3):
                await socket.join("other")
                await socket.join(name)
                await socket.join(name)
                await broadcast(name, "here")
                await broadcast(f"{name}.", "elsewhere")
                await until(lambda: drive.messages)
                assert drive.messages == ["here"]
                drive.sent.pop()
                await socket.leave(name)
                await socket.leave(name)
                await socket.leave("elsewhere")
                await broadcast(name, "never")
                await broadcast("other", "still here")
                await until(lambda: drive.messages)
                assert drive.messages == ["still here"]
                drive.sent.pop()

        async with driven(view, **layer) as drive:
            await drive.end()

    @pytest.mark.parametrize("count", [20, 300])
    @asynchronous
    async def test_many_at_once_and_from_another_loop_keep_their_order(
        self, layer: Any, count: int
    ) -> None:
        async def in_a_row() -> None:
            for number in range(count):
                await broadcast("room", str(number))

        async with driven(member, count=2, **layer) as drives:
            await joined(drives)
            numbers = [str(number) for number in range(count)]
            if count < 300:
                await asyncio.to_thread(asyncio.run, in_a_row())
                await deliver(drives, numbers)
            else:
                await asyncio.gather(*(broadcast("room", n) for n in numbers))
                await until(lambda: len(drives[0].messages) == count)
                assert sorted(drives[0].messages) == sorted(numbers)
                assert drives[0].messages == drives[1].messages

    @asynchronous(hasty=True)
    async def test_a_member_in_trouble_troubles_nobody_else(self, caplog: Log) -> None:
        async with driven(member, count=6) as drives:
            await joined(drives)
            errors = [OSError("gone"), RuntimeError("closed"), KeyError("a bug")]
            for drive, error in zip(drives, [*errors, asyncio.CancelledError()]):
                drive.error = error
            await broadcast("room", "a")
            await turns()
            for drive in drives[:4]:
                drive.error = AssertionError("the server is asked again")
            await broadcast("room", "b")
            for drive in drives[:4]:
                drive.put(GONE)
                await drive.end()
            assert [drive.messages for drive in drives] == [[]] * 4 + [["a", "b"]] * 2
        kinds = [type(r.exc_info[1]).__name__ for r in caplog.records if r.exc_info]
        assert kinds == ["KeyError"]

    @asynchronous
    async def test_who_leaves_during_a_broadcast_gets_nothing(
        self,
    ) -> None:
        async def view(socket: WebSocket) -> None:
            await socket.accept()
            await socket.join("room")
            await socket.send_text("joined")
            await socket.receive_text()
            await socket.leave("room")
            await socket.receive_text()

        async with driven(view, count=1000) as drives:
            await joined(drives)
            sending = asyncio.create_task(broadcast("room", "x"))
            while not any(drive.messages for drive in drives):
                await asyncio.sleep(0)  # it takes some more turns of the loop
            for drive in drives:
                drive.put(text("leave"))
            await sending
            assert 0 < sum(drive.messages == ["x"] for drive in drives) < 1000
            await until(lambda: all(drive.taken == 2 for drive in drives))
            await turns()
            await close_group("room")
        assert all("close" not in drive.types for drive in drives)

    @pytest.mark.parametrize("how", ["close_group", "broadcast"])
    @asynchronous
    async def test_what_a_member_sends_reaches_all_the_others(self, how: str) -> None:
        async def view(socket: WebSocket) -> None:
            await socket.accept()
            await socket.join("room")
            await socket.send_text("joined")
            if await socket.receive_text() == "you":
                if how == "close_group":
                    await close_group("room", 4006)
                while True:
                    await broadcast("room", "x")
            await socket.receive_text()

        async with driven(view, count=300) as drives:

            async def before(event: Any) -> None:
                drives[0].put(GONE)
                if event.get("text") == "x":
                    raise OSError("gone")

            await joined(drives)
            drives[0].before = before
            drives[0].put(text("you"))
            await drives[0].end()
            if how == "close_group":
                for drive in drives:
                    await drive.end()
                    assert drive.code == 4006
            else:
                assert all(drive.messages[:1] == ["x"] for drive in drives[1:])

    @asynchronous
    async def test_a_broadcast_that_is_cancelled_reaches_all_or_none(self) -> None:
        async with driven(member, count=600) as drives:
            await joined(drives)
            sending = asyncio.create_task(broadcast("room", "x"))
            await asyncio.sleep(0)  # it is on its way, and gives others a turn
            sending.cancel()
            await asyncio.wait([sending])
            assert sending.cancelled()
            await deliver(drives, ["x"])

    @asynchronous
    async def test_a_cancellation_from_before_a_close_is_not_swallowed(self) -> None:
        async with driven(member, count=1) as [drive]:
            await joined([drive])
            await turns()
            drive.task.cancel()
            await close_group("room")
            await drive.end()
        assert drive.task.cancelled()

    @pytest.mark.parametrize("stands", [True, False])
    def test_a_loop_that_does_not_run_is_passed_over(self, stands: bool) -> None:
        async def view(socket: WebSocket) -> None:
            await socket.accept()
            await socket.join("room")
            await broadcast("room", "here")

        async def member_elsewhere() -> None:
            async with contextlib.AsyncExitStack() as entered:
                drives = await entered.enter_async_context(driven(member, count=1))
                await joined(drives)
                kept.extend([entered.pop_all(), drives[0]])

        kept: list[Any] = []
        loop: Any = asyncio.new_event_loop()
        loop.run_until_complete(member_elsewhere())
        if not stands:  # it was closed before its sockets ended
            loop.is_closed = lambda: True
        for _ in range(2):
            assert play(view).messages == ["here"]
        vars(loop).pop("is_closed", None)
        loop.run_until_complete(kept[0].aclose())
        loop.close()
        assert kept[1].messages == []

    @asynchronous
    async def test_a_close_that_cannot_be_sent_is_the_end(self, caplog: Log) -> None:
        async with driven(member) as drive:
            await joined([drive])
            drive.error = KeyError("a server's bug")
            await close_group("room", 4001)
            await drive.end()
        assert "The server's send() failed" in caplog.text

    @asynchronous
    async def test_a_code_that_cannot_be_sent_is_private(self, caplog: Log) -> None:
        """daphne takes 1000 and 3000 to 4999 alone, and raises for the others."""

        async def before(event: Any) -> None:
            if 1000 < event.get("code", 0) < 3000:
                raise Exception("invalid close code")

        async with driven(member, count=3) as drives:
            await joined(drives)
            drives[0].before = before
            drives[2].error = OSError("the client has gone")
            await close_group("room", 1008, "why")
            for drive in drives:
                await drive.end()
        assert [drive.code for drive in drives[:2]] == [4008, 1008]
        assert drives[2].tried == 3  # accept, "joined" and one close
        assert drives[0].sent[-1]["reason"] == "why" and quiet(caplog)

    def test_who_can_reach_nobody_is_told_once(self) -> None:
        """In `manage.py shell`, say, or in a second worker without a service."""
        script = (
            "import project; from asgiref.sync import async_to_sync\n"
            "for n in range(2):\n"
            "    print(async_to_sync(project.broadcast)('room', 'x'))\n"
        )
        environment = {**os.environ, "PYTHONPATH": f"{HERE}:{HERE / '.tests'}"}
        more: Any = {"capture_output": False, "stdout": -1, "stderr": -2}
        told = run("python", "-c", script, env=environment, **more)
        assert told.count("reached nobody: this process has no sockets") == 1
        assert told.count("False") == 2

    def test_on_the_wire(self, ws: str, caplog: Log) -> None:
        async def chat(socket: WebSocket) -> None:
            await socket.accept()
            await socket.join("room")
            async for message in socket.iter_json():
                await broadcast("room", message)

        with serve(chat, ws=ws) as server:
            clients = server.dial_all(3, "/ws/")
            for message in ('"\\ud800"', '{"a":"\\ud800"}', '"joined"'):
                clients[0].send(message)  # no client can make the chat fail
            for client in clients:
                while client.recv(20) != "joined":
                    pass
            # From a thread without an event loop, as a signal's receiver is.
            async_to_sync(broadcast)("room", "bye")
            async_to_sync(close_group)("room", 4001, "logged out")
            for client in clients:
                assert client.recv(20) == "bye"
                assert closed_with(client) == (4001, "logged out")
        assert quiet(caplog)


class TestHandlers:
    @asynchronous
    async def test_it_gets_what_was_broadcast(self, layer: Any) -> None:
        """One after another, in order; JSON is its own to change."""
        sent: list[Any] = ["é\0", b"\x00\xff", "", '{"a":1}', {"a": [1]}, None, 5, [""]]
        heard: list[Any] = []

        async def view(socket: WebSocket) -> None:
            handling: list[Any] = []

            async def handler(message: Any) -> None:
                assert not handling
                handling.append(message)
                await asyncio.sleep(0)
                heard.append(copy.deepcopy(handling.pop()))
                if isinstance(message, dict):
                    message["a"].append(2)
                await socket.send_text("handled")

            await socket.accept()
            await socket.join("room", handler)
            await socket.join("room 2", functools.partial(handler))
            await socket.send_text("joined")
            await socket.receive_text()

        async with driven(view, count=2, **layer) as drives:
            await joined(drives)
            for message in sent:
                heard_by = await broadcast("room", message)
                assert heard_by is True
            await until(lambda: len(heard) == 2 * len(sent))
            assert sorted(map(repr, heard)) == sorted(map(repr, sent * 2))
            await broadcast("room 2", "the last")
            for drive in drives:
                await until(lambda: drive.messages == ["handled"] * (1 + len(sent)))
            assert heard[-2:] == ["the last"] * 2

    @asynchronous
    async def test_everything_in_its_order(self, layer: Any) -> None:
        async def view(socket: WebSocket) -> None:
            async def handler(message: Any) -> None:
                await asyncio.sleep(0.001 * (message % 3))
                await socket.send_json(message)

            await socket.accept()
            await socket.join("room", handler)
            await socket.send_text("joined")
            await socket.receive_text()

        async with driven(view, count=1, **layer) as [drive]:
            await joined([drive])
            for number in range(50):
                await broadcast("room", number)
            await close_group("room", 4001, "the end")
            await drive.end()
        assert drive.messages == [str(number) for number in range(50)]
        assert (drive.code, drive.sent[-1]["reason"]) == (4001, "the end")

    @pytest.mark.parametrize(
        "error, code, logged",
        [
            (KeyError("a bug"), 1011, "KeyError"),
            (WebSocketDisconnect(4001, "why"), 4001, ""),
            (InvalidMessage(1003, "not this"), 1003, ""),
            (PermissionDenied(), 1008, "PermissionDenied"),
            (asyncio.CancelledError(), 1011, "RuntimeError"),
            (ExceptionGroup("", [WebSocketDisconnect(4001)]), 4001, ""),
        ],
    )
    @pytest.mark.parametrize("view_fails", [False, True])
    @asynchronous
    async def test_what_it_raises_ends_the_view(
        self, error: Any, code: int, logged: str, view_fails: bool, caplog: Log
    ) -> None:
        ended: list[Any] = []

        async def view(socket: WebSocket) -> None:
            async def handler(message: Any) -> None:
                ended.append(message)
                raise error

            await socket.accept()
            await socket.join("room", handler)
            await socket.send_text("joined")
            try:
                await asyncio.sleep(3600)
            finally:
                assert socket.connected  # it can say good-bye
                await broadcast("room", "it is called no more")
                await asyncio.sleep(0.01)
                if view_fails:
                    raise ValueError("in the view's cleanup")

        async with driven(view, count=1) as [drive]:
            await joined([drive])
            await broadcast("room", "x")
            await drive.end()
        assert ended == ["x"]
        kinds = [type(r.exc_info[1]) for r in caplog.records if r.exc_info]
        if not view_fails:
            assert drive.code == code
            assert [kind.__name__ for kind in kinds] == [logged] * bool(logged)
        else:  # an end is no failure
            expected = ValueError if code == 4001 else ExceptionGroup
            assert (drive.code, kinds) == (1011, [expected])

    @asynchronous
    async def test_leaving_and_joining_change_it(self) -> None:
        async def view(socket: WebSocket) -> None:
            async def first(message: Any) -> None:
                heard.append(("first", message))
                if message == 0:
                    await socket.leave("room")
                await go_on.wait()

            async def second(message: Any) -> None:
                heard.append(("second", message))

            await socket.accept()
            wrong: Any = print
            with pytest.raises(TypeError, match="'async def' for .* print"):
                await socket.join("room", wrong)
            await socket.join("room", first)
            await socket.join("kept", second)
            for number in range(3):
                await broadcast("room", number)  # two wait, for a group that it left
                await broadcast("kept", number)
            await socket.join("room", second)  # it gets none of them
            await close_group("room", 4001)
            await socket.leave("room")  # it is closed no more, neither now nor later
            go_on.set()
            await turns()
            await socket.leave("kept")
            await socket.join("room", first)
            await socket.join("room", second)
            await broadcast("room", 3)
            await turns()
            go_on.clear()
            await socket.join("other", first)
            await broadcast("other", 4)
            await broadcast("room", 5)  # it waits, and the handler goes
            await socket.join("room")
            go_on.set()
            await broadcast("room", 6)
            await turns()

        heard: list[Any] = []
        go_on = asyncio.Event()
        async with driven(view) as drive:
            await drive.end()
        kept = [("second", number) for number in range(3)]
        assert heard == [("first", 0), *kept, ("second", 3), ("first", 4)]
        assert drive.messages == ["5", "6"]

    @pytest.mark.parametrize("cancelled", [False, True])
    @asynchronous
    async def test_an_end_meanwhile_is_no_error(
        self, cancelled: bool, caplog: Log
    ) -> None:
        """Nor does a handler that cleans up swallow the server's cancellation."""

        async def view(socket: WebSocket) -> None:
            async def handler(message: Any) -> None:
                try:
                    await handled.wait()
                    await socket.send_text("too late")
                finally:
                    cleaning.set()
                    await cleaned.wait()

            await socket.accept()
            await socket.join("room", handler)
            await broadcast("room", "x")
            with contextlib.suppress(WebSocketDisconnect):
                await socket.receive_text()
            if not cancelled:
                handled.set()
                await cleaning.wait()

        handled, cleaning, cleaned = asyncio.Event(), asyncio.Event(), asyncio.Event()
        async with driven(view, GONE) as drive:
            await cleaning.wait()
            if cancelled:
                drive.task.cancel()
                await turns()
            cleaned.set()
            await drive.end()
        assert drive.task.cancelled() == cancelled and drive.types == ["accept"]
        assert quiet(caplog)

    @asynchronous(hasty=True)
    async def test_one_that_closes_its_socket_tells_no_view_that_sleeps(self) -> None:
        """It is cancelled at once, not only when GRACE has passed."""

        async def view(socket: WebSocket) -> None:
            async def handler(message: Any) -> None:
                await socket.close(4003, "not any more")

            await socket.accept()
            await socket.join("room", handler)
            await broadcast("room", "x")
            await asyncio.sleep(3600)

        start = asyncio.get_running_loop().time()
        async with driven(view) as drive:
            await drive.end()
        assert asyncio.get_running_loop().time() - start < 8 and drive.code == 4003

    @asynchronous
    async def test_one_may_fail_the_test(self) -> None:
        async def view(socket: WebSocket) -> None:
            async def handler(message: Any) -> None:
                pytest.fail("it is told")

            await socket.accept()
            await socket.join("room", handler)
            await broadcast("room", "x")
            await socket.receive_text()

        with pytest.raises(pytest.fail.Exception, match="it is told"):
            async with connected(view) as client:
                await client.receive_text()
        FAILURES.clear()

    def test_a_loop_that_ends_leaves_nothing_open(
        self, layer: Any, caplog: Log
    ) -> None:
        """Neither a connection nor an error, though a handler runs."""

        async def view(socket: WebSocket) -> None:
            async def handler(message: Any) -> None:
                await asyncio.sleep(3600)

            await socket.accept()
            await socket.join("room", handler)
            await broadcast("room", "x")
            await socket.send_text("joined")
            await socket.receive_text()

        async def main() -> None:
            with configured([view], dict(layer)):
                drive = Drive(websockets(no_http))
                drive.start()
                await joined([drive])
                await turns()

        asyncio.run(main())
        gc.collect()  # which would warn of a connection that is still open
        assert quiet(caplog)

    @asynchronous(hasty=True)
    async def test_one_that_is_too_slow_is_closed_with_1013(self) -> None:
        async def view(socket: WebSocket) -> None:
            async def handler(message: Any) -> None:
                await socket.send_json(len(message))

            await socket.accept()
            await socket.join("room", handler)
            await socket.send_text("joined")
            await socket.receive_text()

        options = {"WEBSOCKETS": {"OUTBOX": 10_000}}
        async with driven(view, count=2, **options) as [slow, other]:
            await joined([slow, other])
            await broadcast("room", "x" * 50_000)  # nothing waited before it
            await deliver([slow, other], ["50000"])
            slow.reads.clear()
            for number in range(12):
                await broadcast("room", "x" * 1000)
                await until(lambda: len(other.messages) == 2 + number)
            slow.reads.set()
            await slow.end()
            assert (slow.code, slow.messages) == (1013, ["50000"])
            assert other.types[-1] == "send"

    @pytest.mark.parametrize("end", ["the view", "the client", "close_group"])
    @asynchronous(hasty=True)
    async def test_it_ends_with_its_socket(self, end: str, caplog: Log) -> None:
        loop = asyncio.get_running_loop()

        async def view(socket: WebSocket) -> None:
            async def handler(message: Any) -> None:
                handled.append(message)
                try:
                    await asyncio.sleep(3600)
                finally:
                    handled.append(loop.time() - start)
                    if end == "the view":
                        with pytest.raises(WebSocketDisconnect):
                            await socket.join("another")
                        raise KeyError("in its cleanup")

            await socket.accept()
            await socket.join("room", handler)
            await socket.send_text("joined")
            if end == "the view":
                await asyncio.sleep(3)
            else:
                await socket.receive_text()

        handled: list[Any] = []
        async with driven(view, count=1) as [drive]:
            await joined([drive])
            start = loop.time()
            await broadcast("room", "a")
            await broadcast("room", "it is dropped")
            await turns()
            if end == "the client":
                drive.put(GONE)
            elif end == "close_group":
                await close_group("room", 4001)  # it has FLUSH seconds for the rest
            await drive.end()
        seconds = {"the view": 3, "the client": 0, "close_group": 5}[end]
        assert handled[0] == "a" and seconds <= handled[1] <= seconds + 1
        assert drive.code == {"the view": 1011, "close_group": 4001}.get(end)
        assert ("KeyError" in caplog.text) == (end == "the view")

    @asynchronous
    async def test_it_is_the_views_in_everything_else(self) -> None:
        """It has the view's context and thread, not those of who broadcasts."""

        async def view(socket: WebSocket) -> None:
            async def handler(message: Any) -> None:
                seen.append(surroundings())
                seen.append(await sync_to_async(threading.get_ident)())
                await broadcast("other", "the socket's own context, entered again")

            await socket.accept()
            translation.activate("it")
            seen.append(surroundings())
            seen.append(await sync_to_async(threading.get_ident)())
            await socket.join("room", handler)
            await socket.join("other")
            with translation.override("fr"):
                await broadcast("room", "x")
            await until(lambda: drive.messages)

        seen: list[Any] = []
        own.urls = urlconf(websocket("ws/", view), __name__="own")
        options: Any = {"MIDDLEWARE": middleware("around", "own_urls")}
        async with driven(view, query_string=b"who=1", **options) as drive:
            await drive.end()
        assert seen[0] == seen[2] and seen[0][:3] == ["1", "1", "it"]
        assert seen[1] == seen[3]

    @asynchronous
    async def test_handlers_that_never_wait_leave_others_their_turn(self) -> None:
        async def view(socket: WebSocket) -> None:
            async def handler(message: Any) -> None:
                handled.append(len(handled))

            await socket.accept()
            await socket.join("room", handler)
            await socket.send_text("joined")
            await socket.receive_text()

        handled: list[int] = []
        async with driven(view, count=1) as drives:
            await joined(drives)
            await asyncio.gather(*(broadcast("room", "x") for _ in range(100)))
            assert len(handled) < 50
            await until(lambda: len(handled) == 100)


class TestSpread:
    @asynchronous(hasty=True)
    async def test_members_are_closed_one_after_another(self, layer: Any) -> None:
        async def view(socket: WebSocket) -> None:
            await socket.accept()
            await socket.join("room", socket.send_text if next(odd) % 2 else None)
            await socket.send_text("joined")
            try:
                await socket.receive_text()
            finally:
                times.append(loop.time() - start)

        odd = itertools.count()
        loop = asyncio.get_running_loop()
        times: list[float] = []
        async with driven(view, count=21, **layer) as drives:
            await joined(drives)
            for wrong in (-1, math.inf, math.nan):
                with pytest.raises(ValueError, match="spread must be a number"):
                    await close_group("room", spread=wrong)
            start = loop.time()
            await close_group("room", 4001, "deploy", spread=210)
            assert len(times) < 10  # it does not wait for the end
            drives[0].put(GONE)  # who leaves by himself is not kept until his time
            await drives[0].end()
            async with driven(member, count=1, **layer) as newcomers:
                await joined(newcomers)
                for drive in drives[1:]:
                    await drive.end()
                    assert (drive.code, drive.sent[-1]["reason"]) == (4001, "deploy")
                assert "close" not in newcomers[0].types
        times.remove(min(times))
        assert all(time >= 10 * number for number, time in enumerate(times)), times


class TestOutbox:
    @asynchronous
    async def test_what_waits_arrives_in_order_when_the_client_reads(self) -> None:
        async with driven(member, count=1) as [drive]:
            await joined([drive])
            drive.reads.clear()
            numbers = [str(number) for number in range(1000)]
            for number in numbers[:500]:
                await broadcast("room", number)
            await asyncio.gather(*(broadcast("room", n) for n in numbers[500:]))
            assert drive.messages == []
            drive.reads.set()
            await deliver([drive], numbers)
            await broadcast("room", "direct")
            assert drive.messages[-1] == "direct"

    @pytest.mark.parametrize("bound", [54, None])
    @pytest.mark.parametrize("letter, more", [("x", 0), ("x", 1), ("𝄞", 0), ("𝄞", 1)])
    @asynchronous
    async def test_one_that_overflows(self, bound: Any, letter: str, more: int) -> None:
        """It is closed with 1013. Bytes count, and 14 for the header of each frame."""
        async with driven(member, count=1) as drives:
            await joined(drives)  # and the options are read anew when all have left
        message = letter * (((bound or 2**20) - 14) // len(letter.encode()) + more)
        options: Any = {"WEBSOCKETS": {"OUTBOX": bound}} if bound else {}
        async with driven(member, count=1, **options) as [drive]:
            await joined([drive])
            drive.reads.clear()
            await broadcast("room", "0")  # is with the server
            await broadcast("room", message)
            if more:
                await broadcast("room", "nobody")
            drive.reads.set()
            await until(lambda: len(drive.sent) == 3)
            if not more:
                assert drive.messages == ["0", message]
                return
            await drive.end()
        assert drive.messages == ["0"] and drive.code == 1013
        assert drive.sent[-1]["reason"] == "reads too slowly"

    @asynchronous
    async def test_a_message_larger_than_the_outbox_reaches_who_reads(self) -> None:
        async with driven(member, count=1, WEBSOCKETS={"OUTBOX": 1}) as [drive]:
            await joined([drive])
            for _ in range(5):
                await asyncio.gather(*(broadcast("room", "x" * 99) for _ in range(5)))
            await deliver([drive], ["x" * 99] * 25)

    ENDS: dict[str, tuple[Any, Any]] = {
        "returns": (lambda socket: asyncio.sleep(0), 1000),
        "raises": (lambda socket: raising(ValueError("a bug"))(socket), 1011),
        "closes": (lambda socket: socket.close(4004), 4004),
        "sends close": (
            lambda socket: socket.send({"type": "websocket.close", "code": 4005}),
            4005,
        ),
        "close_group": (lambda socket: close_group("room", 4006), 4006),
        "gives up": (
            lambda socket: asyncio.wait_for(socket.close(4007), 0.01),
            4007,
        ),
    }

    @pytest.mark.parametrize("reads", [True, False])
    @pytest.mark.parametrize("how", ENDS)
    @asynchronous(hasty=True)
    async def test_an_end_waits_for_what_was_broadcast_before_but_not_for_ever(
        self, how: str, reads: bool, caplog: Log
    ) -> None:
        end, code = self.ENDS[how]

        async def view(socket: WebSocket) -> None:
            await stop_reading(socket, drive)
            with contextlib.suppress(TimeoutError):
                await end(socket)

        async with driven(view) as drive:
            await until(lambda: not drive.reads.is_set())
            start = asyncio.get_running_loop().time()
            await turns()
            await broadcast("room", "never")
            if how == "raises":  # reported before the client has read all
                await until(lambda: "a bug" in caplog.text)
            if reads:
                drive.reads.set()
            await drive.end()
            took = asyncio.get_running_loop().time() - start
            drive.reads.set()
            await turns()
        if reads:
            assert drive.messages == ["a", "b"] and drive.code == code
        else:  # and the server ends the connection
            assert drive.types == ["accept"] and took >= WebSocket.FLUSH

    @asynchronous(hasty=True)
    async def test_one_that_leaves_without_reading_is_not_waited_for(self) -> None:
        async with driven(member, count=1) as [drive]:
            await joined([drive])
            drive.reads.clear()
            await broadcast("room", "a")
            await broadcast("room", "b")
            drive.put(GONE)
            loop = asyncio.get_running_loop()
            start = loop.time()
            await drive.end()
            assert loop.time() - start < WebSocket.FLUSH
        assert drive.messages == []

    @asynchronous(hasty=True)
    async def test_nor_is_anything_sent_by_a_send_that_swallows_that(self) -> None:
        async def swallow(event: Any) -> None:
            with contextlib.suppress(asyncio.CancelledError):
                await asyncio.sleep(3600)

        async with driven(member, count=1) as [drive]:
            await joined([drive])
            drive.before = swallow
            for message in "abc":
                await broadcast("room", message)
            drive.put(GONE)
            await drive.end()
        assert drive.messages == ["a"]

    @asynchronous
    async def test_the_views_own_messages_are_no_overflow(self) -> None:
        async def view(socket: WebSocket) -> None:
            await stop_reading(socket, drive)
            with pytest.raises(TimeoutError):
                async with asyncio.timeout(0.01):
                    await socket.send_text("never sent")
            async with asyncio.TaskGroup() as tasks:
                for _ in range(20):  # which are no overflow
                    tasks.create_task(socket.send_text("own"))
                await turns()
                await broadcast("room", "c")
                drive.reads.set()

        async with driven(view, WEBSOCKETS={"OUTBOX": 40}) as drive:
            await drive.end()
        assert sorted(drive.messages) == ["a", "b", "c", *["own"] * 20]

    @asynchronous
    async def test_what_waits_in_vain_raises(self) -> None:
        async def own(socket: WebSocket) -> None:
            with pytest.raises(WebSocketDisconnect, match="1006"):
                await socket.send_text("own")
            raised.append("own")

        async def view(socket: WebSocket) -> None:
            await stop_reading(socket, drive)
            async with asyncio.TaskGroup() as tasks:
                for _ in range(3):
                    given_up = tasks.create_task(own(socket))
                await turns()
                given_up.cancel()
                drive.error = OSError("gone")
                drive.reads.set()
            await socket.close()

        raised: list[str] = []
        async with driven(view) as drive:
            await drive.end()
        assert raised == ["own"] * 2 and drive.messages == []

    @asynchronous(hasty=True)
    async def test_what_the_servers_send_does_is_its_own(self, caplog: Log) -> None:
        """It may wait, catch, time out, broadcast; it sends in the socket's context."""
        who = contextvars.ContextVar("who", default="nobody")

        async def before(event: Any) -> None:
            found.append(who.get())
            if event.get("text") == "nested":
                await broadcast("room", "by the server")
            elif event.get("text") == "caught":
                future = asyncio.get_running_loop().create_future()
                asyncio.get_running_loop().call_later(
                    1, future.set_exception, OSError()
                )
                with contextlib.suppress(OSError):
                    await future
            elif event.get("text") == "too slow":
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(2):
                        await asyncio.sleep(3600)
                raise OSError("too slow")

        found: list[str] = []
        async with driven(member, count=1) as [drive]:
            await joined([drive])
            drive.before = before
            who.set("who broadcasts")
            for message in ("nested", "caught", "plain"):
                await broadcast("room", message)
            await until(lambda: len(drive.messages) == 4)
            assert drive.messages[0] == "nested" and "by the server" in drive.messages
            await broadcast("room", "too slow")
            await asyncio.sleep(5)  # nobody cancels this
            drive.put(GONE)
            await drive.end()
        assert set(found) == {"nobody"} and quiet(caplog)

    @asynchronous
    async def test_slow_clients_of_many_groups_leave_others_their_turn(self) -> None:
        async def view(socket: WebSocket) -> None:
            await socket.accept()
            for number in range(5):
                await socket.join(f"group {number}")
            await socket.send_text("joined")
            await socket.receive_text()

        async def slowly(event: Any) -> None:
            await asyncio.sleep(0)

        async def others() -> None:
            while True:
                await asyncio.sleep(0)
                count.append(1)

        count: list[int] = []
        async with driven(view, count=1000) as drives:
            await joined(drives)
            for drive in drives:
                drive.before = slowly
            task = asyncio.create_task(others())
            await broadcast("group 0", "0")
            assert 4 <= len(count) < 100  # of 250 members each
            names = [str(number) for number in range(1, 5)]
            await asyncio.gather(*(broadcast(f"group {name}", name) for name in names))
            await until(lambda: all(len(drive.messages) == 5 for drive in drives))
            task.cancel()

    @asynchronous(hasty=True)
    async def test_two_that_do_not_read_fill_no_memory(self) -> None:
        async with driven(member, count=2) as drives:
            await joined(drives)
            for drive in drives:
                drive.reads.clear()
            tracemalloc.start()
            try:
                for _ in range(60):
                    await broadcast("room", "x" * 8_000_000)
                assert tracemalloc.get_traced_memory()[1] < 100_000_000
            finally:
                tracemalloc.stop()

    @asynchronous(hasty=True)
    async def test_sixty_that_do_not_read_delay_nobody(self, layer: Any) -> None:
        """Those that read are served before anybody has given up the others."""
        layer = {"WEBSOCKETS": {**layer.get("WEBSOCKETS", {}), "OUTBOX": 100_000}}
        async with driven(member, count=65, **layer) as drives:
            await joined(drives)
            for drive in drives[:60]:
                drive.reads.clear()
            for number in range(25):
                await broadcast("room", f"{number} " + "x" * 5000)
                await until(lambda: len(drives[-1].messages) > number)
                if number == 15:
                    assert not any(drive.task.done() for drive in drives[:60])
            for drive in drives[:60]:
                await drive.end()
                assert drive.types == ["accept"]
            for drive in drives[60:]:
                await until(lambda: len(drive.messages) == 25)


class TestOptions:
    @pytest.mark.parametrize(
        "options, message",
        [
            ({"REDIS": "redis://"}, "only REDIS_URL, DATABASE, LISTEN, PREFIX, OUTBOX"),
            ({"OUTBOX": "100"}, "WEBSOCKETS\\['OUTBOX'\\] must be int"),
            ({"OUTBOX": True}, "WEBSOCKETS\\['OUTBOX'\\] must be int"),
            ({"OUTBOX": 0}, "must be at least 1"),
            ({"REDIS_URL": None}, "WEBSOCKETS\\['REDIS_URL'\\] must be str"),
            ({"PREFIX": b"x"}, "WEBSOCKETS\\['PREFIX'\\] must be str"),
            ({"PREFIX": "a:b"}, "WEBSOCKETS\\['PREFIX'\\] must not contain a colon"),
            (["REDIS_URL"], "must be a dict"),
            (None, "must be a dict"),
            ({"REDIS_URL": "localhost:6379"}, "WEBSOCKETS\\['REDIS_URL'\\]: "),
            ({"REDIS_URL": "redis://localhost?foo=1"}, "\\['REDIS_URL'\\]: .*foo"),
            ({"REDIS_URL": "redis://here"}, "pip install redis"),
            ({"REDIS_URL": "redis://here", "DATABASE": "default"}, "not both"),
            ({"LISTEN": "default"}, "\\['LISTEN'\\] needs .*\\['DATABASE'\\]"),
            ({"DATABASE": "none"}, "DATABASES has no 'none'"),
            ({"DATABASE": "default"}, "'default' is sqlite: .* REDIS_URL"),
            ({"DATABASE": "postgres", "LISTEN": "no"}, "'LISTEN'.*: DATABASES has no"),
            ({"DATABASE": "postgres", "PREFIX": ""}, "must be 1 to 63 bytes of"),
            ({"DATABASE": "postgres", "PREFIX": "é" * 32}, "must be 1 to 63 bytes"),
            ({"DATABASE": "postgres"}, "pip install 'psycopg"),
            ({"DATABASE": "postgres", "OUTBOX": 9}, "psycopg 3.2.4 or later"),
        ],
    )
    def test_what_is_wrong_is_said_at_the_start(
        self, options: Any, message: str, monkeypatch: Patch, request: Any
    ) -> None:
        if "localhost" in str(options):
            needs("redis")
        if "postgres" in str(options):
            request.getfixturevalue("postgres")
        if "pip" in message:
            monkeypatch.setitem(sys.modules, "redis", None)
        if "pip install 'psycopg" == message:
            monkeypatch.setitem(sys.modules, "psycopg", None)
        elif "psycopg" in message:  # an older one, which Django takes
            monkeypatch.setattr("psycopg.__version__", "3.2.3")
        with override_settings(WEBSOCKETS=options):
            with pytest.raises(ImproperlyConfigured, match=message):
                websockets(no_http)


class TestServices:
    @asynchronous
    async def test_redis_is_asked_for_no_more_than_needed(self, redis: Redis) -> None:
        async with driven(member, **redis.options()) as drive:
            await until(lambda: drive.messages)
            assert redis.ask("pubsub", "channels").split() == ["tests:room"]
        await until(lambda: not redis.ask("pubsub", "channels").strip())
        connected = redis.ask("client", "list").count("\n")
        with override_settings(**redis.options()):  # a loop without sockets
            for _ in range(3):
                await asyncio.to_thread(asyncio.run, broadcast("room", "x"))
        assert redis.ask("client", "list").count("\n") <= connected + 1  # it is kept

    @asynchronous
    async def test_joins_that_are_given_up(self, redis: Redis) -> None:
        async def view(socket: WebSocket) -> None:
            async def give_up(group: str, seconds: float) -> None:
                with pytest.raises(TimeoutError):
                    async with asyncio.timeout(seconds):
                        await socket.join(group)

            await socket.accept()
            joining = asyncio.create_task(socket.join("none"))
            await asyncio.sleep(0)
            await socket.leave("none")  # nobody is left who could hear of it
            await asyncio.wait_for(joining, 20)
            await give_up("first", 0)  # before the listener has begun
            await socket.join("other")
            redis.signal(signal.SIGSTOP)  # it confirms nothing more
            await give_up("second", 0.2)
            redis.signal(signal.SIGCONT)
            joining = asyncio.create_task(socket.join("third"))
            await asyncio.sleep(0)
            await socket.leave("third")  # while another task joins
            await asyncio.wait_for(joining, 20)
            await until(lambda: "third" not in redis.ask("pubsub", "channels"))
            for _ in range(20):
                await socket.leave("other")
                await asyncio.wait_for(socket.join("other"), 20)
            for group in ("first", "second", "third", "other"):
                await broadcast(group, group)
            await socket.receive_text()

        async with driven(view, **redis.options()) as drive:
            await deliver([drive], ["first", "second", "other"])

    @asynchronous(hasty=True)
    async def test_it_goes_away_and_comes_back(self, service: Any, caplog: Log) -> None:
        async def joining_in_vain(socket: WebSocket) -> None:
            await socket.accept()
            await socket.join("room")
            await socket.receive_text()
            for number in range(100):
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(0.1):
                        await socket.join(f"room {number}")
            await socket.send_text("joined in vain")
            await socket.receive_text()

        name = service.name
        future = type(asyncio.get_running_loop().create_future())
        service.stop()
        async with driven(joining_in_vain, count=3, **service.options()) as drives:
            await until(lambda: f"{name} is away" in caplog.text)
            tried: list[Any] = []

            async def hang_up(reader: Any, writer: Any) -> None:
                tried.append(writer.close())

            async with await asyncio.start_server(hang_up, "127.0.0.1", service.port):
                await asyncio.sleep(20)  # it tries again and again, and says it once
            assert 1 <= len(tried) < 30 and caplog.text.count(f"{name} is away") == 1
            assert [drive.types for drive in drives] == [["accept"]] * 3
            with pytest.raises(service.error):
                await broadcast("room", "lost")
            for lost in (False, True):
                await asyncio.to_thread(service.start)
                await until(lambda: caplog.text.count(f"{name} is back") == 1 + lost)
                if name == "Redis":
                    await until(
                        lambda: "tests:room" in service.ask("pubsub", "channels")
                    )
                await broadcast("room", f"here {lost}")
                await until(lambda: f"here {lost}" in drives[0].messages)
                if not lost:
                    await asyncio.to_thread(service.stop)
                    await until(lambda: caplog.text.count(f"{name} is away") == 2)
                    drives[0].put(text("join"))
                    await until(lambda: "joined in vain" in drives[0].messages)
                    await asyncio.sleep(20)  # who has given up is forgotten
                    kept = [one for one in gc.get_objects() if type(one) is future]
                    assert len(kept) < 50
            await broadcast("room 99", "it is a member all the same")
            await until(lambda: "it is a member all the same" in drives[0].messages)

    @asynchronous(hasty=True)
    async def test_silence_is_broken_by_a_ping(self, service: Any, caplog: Log) -> None:
        async with driven(member, count=1, **service.options()) as drives:
            await joined(drives)
            await asyncio.sleep(60)
            assert quiet(caplog)
            service.signal(signal.SIGSTOP)  # there, but mute
            try:
                await until(lambda: f"{service.name} is away" in caplog.text)
            finally:
                service.signal(signal.SIGCONT)
            await until(lambda: f"{service.name} is back" in caplog.text)
            await broadcast("room", "here")
            await deliver(drives, ["here"])

    @asynchronous
    async def test_what_redis_itself_does(self, redis: Redis, caplog: Log) -> None:
        """It closes connections, hands over what is not ours."""
        async with driven(member, count=1, **redis.options()) as drives:
            await joined(drives)
            for rubbish in ("c-rubbish", "c[1, 2, 3]", 'c["a", "", 0]', "x", "é"):
                redis.ask("publish", "tests:room", rubbish)
            redis.ask("publish", "tests:room", "tgood")
            for number in range(3):
                await broadcast("room", str(number))
                redis.ask("client", "kill", "type", "normal")
            await deliver(drives, ["good", "0", "1", "2"])
            assert caplog.text.count("Not a message of django_ws") == 5

    def test_all_processes_of_a_prefix(
        self, service: Any, tmp_path: Path, stack: contextlib.ExitStack
    ) -> None:
        sites = [
            stack.enter_context(service.serve(tmp_path, "--workers", "2"))
            for _ in range(2)
        ]
        other = stack.enter_context(service.serve(tmp_path, prefix="other"))
        stranger = other.dial("/room/")
        assert stranger.recv(20) == "joined"
        clients: dict[int, Any] = {}
        deadline = time.monotonic() + 30
        while len(clients) < 4:
            assert time.monotonic() < deadline, "not every worker got a connection"
            for site in sites:
                client = site.dial("/room/", max_queue=None)
                assert client.recv(20) == "joined"
                client.send("pid")
                if clients.setdefault(seen(client), client) is not client:
                    client.close()
        assert service.count_listeners() == 4 + (service.name == "PostgreSQL")
        members = list(clients.values())
        for message in ("é", b"\x00\xff", ""):
            members[0].send(message)
            assert [client.recv(20) for client in members] == [message] * 4
        assert sites[1].get("/announce/?text=hi").body == b"announced"
        script = (
            "import warnings; warnings.simplefilter('error')\n"
            "import project; from asgiref.sync import async_to_sync\n"
            "for n in range(3):\n"
            "    print(async_to_sync(project.broadcast)('room', {'sync': n}))\n"
            "print(async_to_sync(project.broadcast)('elsewhere', 'x'))\n"
        )
        told = run("python", "-c", script, env=sites[0].environment).split()
        known = service.name == "Redis"  # PostgreSQL does not tell
        assert told == (["True"] * 3 + ["False"] if known else ["None"] * 4)
        members[0].send("count 10000")
        for client in members:
            assert [seen(client)["sync"] for _ in range(4)] == ["hi", 0, 1, 2]
            assert [seen(client) for _ in range(10_000)] == [*range(10_000)]
        with pytest.raises(TimeoutError):
            stranger.recv(0)

    @asynchronous
    async def test_a_thousand_groups(self, service: Any) -> None:
        async def view(socket: WebSocket) -> None:
            await socket.accept()
            for number in range(1000):
                await socket.join(f"group {number}")
            await socket.send_text("joined")
            await socket.receive_text()

        async with driven(view, count=1, **service.options()) as drives:
            await joined(drives)
            for number in (0, 500, 999):
                assert await broadcast(f"group {number}", str(number))
            assert not await broadcast("group 1000", "nobody")
            await deliver(drives, ["0", "500", "999"])

    def test_publishing_keeps_its_connection(self, redis: Redis) -> None:
        """From any thread, event loop and fork, also when Redis was away."""

        def publish() -> None:
            assert async_to_sync(broadcast)("room", {"text": "x"}) is False

        def count_connections() -> int:
            found = re.search(r"connections_received:(\d+)", redis.ask("info"))
            assert found is not None
            return int(found[1])

        with override_settings(**redis.options()):
            publish()
            first = count_connections()
            with futures.ThreadPoolExecutor(20) as pool:
                for done in [pool.submit(publish) for _ in range(300)]:
                    done.result()
            asyncio.run(broadcast("room", "x"))
            assert count_connections() - first <= 10 + 1  # the 1 asks
            child = os.fork()
            if not child:
                status = 1
                with contextlib.suppress(BaseException):
                    publish()
                    status = 0
                os._exit(status)
            assert os.waitpid(child, 0)[1] == 0
            publish()
            redis.stop()
            with pytest.raises(redis.error):
                publish()
            redis.start()
            publish()

    def test_publishing_costs_little(self, redis: Redis) -> None:
        """Channels makes a connection a message, for five times as much as nothing."""

        async def nothing() -> None:
            pass

        def cost(function: Any, *args: Any) -> float:
            began = time.process_time()
            for _ in range(100):
                async_to_sync(function)(*args)
            return time.process_time() - began

        with override_settings(**redis.options()):
            async_to_sync(broadcast)("room", "x")
            ratios = [cost(broadcast, "room", "x") / cost(nothing) for _ in range(5)]
        assert sorted(ratios)[2] < 2.5, ratios

    def test_publishing_waits_two_seconds_at_most(self, redis: Redis) -> None:
        async def publish() -> float:
            began = time.monotonic()
            with pytest.raises(redis.error):
                await broadcast("room", "x")
            return time.monotonic() - began

        async def publish_beside_a_query() -> list[float]:
            began = time.monotonic()
            publishing = [asyncio.create_task(publish()) for _ in range(6)]
            await asyncio.sleep(0.1)
            await sync_to_async(time.sleep)(0)  # "a query", on the only thread
            took = time.monotonic() - began
            assert took < 1, "it had to wait"
            return list(await asyncio.gather(*publishing))

        async def view(socket: WebSocket) -> None:
            await socket.accept()
            await socket.join("room")
            await broadcast("room", "here")
            await sync_to_async(async_to_sync(broadcast))("room", "here")
            redis.signal(signal.SIGSTOP)
            waited.append(await publish())
            with futures.ThreadPoolExecutor(20) as pool:
                done = [pool.submit(async_to_sync(publish)) for _ in range(20)]
                await asyncio.gather(*map(asyncio.wrap_future, done))
            waited.extend(one.result() for one in done)
            waited.extend(
                await asyncio.to_thread(asyncio.run, publish_beside_a_query())
            )
            redis.signal(signal.SIGCONT)
            await broadcast("room", "here again")
            await sync_to_async(async_to_sync(broadcast))("room", "here again")

        waited: list[float] = []
        play(view, **redis.options())
        assert len(waited) == 27 and max(waited) < 2, waited

    @asynchronous
    async def test_a_task_that_outlives_its_synchronous_code(self, layer: Any) -> None:
        async def start() -> None:
            tasks.append(asyncio.create_task(later()))

        async def later() -> None:
            await go_on.wait()
            await broadcast("room", "later")

        tasks: list[Any] = []
        go_on = asyncio.Event()
        async with driven(member, count=1, **layer) as drives:
            await joined(drives)
            await sync_to_async(async_to_sync(start))()
            go_on.set()
            await tasks[0]
            await deliver(drives, ["later"])

    def test_urls_are_redis_pys(self, tmp_path: Path) -> None:
        needs("redis")
        path_ = tmp_path / "redis.sock"
        server = Redis("--unixsocket", str(path_), "--requirepass", "secret")
        try:
            for url in (
                f"redis://:secret@127.0.0.1:{server.port}/0?decode_responses=True",
                f"unix://:secret@{path_}",
            ):
                server.url = url
                with server.serve(tmp_path) as site:
                    client = site.dial("/room/")
                    assert client.recv(20) == "joined"
                    client.send(b"hi")
                    assert client.recv(20) == b"hi"
        finally:
            server.stop()


class TestPostgresGroups:
    def test_transactions(self, postgres: Postgres) -> None:
        """What synchronous code broadcasts is sent by its transaction's COMMIT."""
        publish: Any = async_to_sync(broadcast)

        def in_transactions() -> None:
            connected = connections["postgres"]
            with transaction.atomic("postgres"):
                publish("room", "equal")
                publish("room", "equal")
                with contextlib.suppress(KeyError), transaction.atomic("postgres"):
                    publish("room", "rolled back to a savepoint")
                    raise KeyError
                with pytest.raises(ValueError, match="PostgreSQL carries 7999: save"):
                    publish("room", "x" * 8000)
                with connected.cursor() as cursor:  # it is well
                    cursor.execute("SELECT 1")
                seen.append(list(drive.messages))
            with contextlib.suppress(KeyError), transaction.atomic("postgres"):
                publish("room", "rolled back")
                raise KeyError
            publish("room", "in no transaction")
            connected.close()

        async def view(socket: WebSocket) -> None:
            await socket.accept()
            await socket.join("room")
            await sync_to_async(in_transactions)()
            await broadcast("room", "x" * 7950)  # a header goes with it
            await until(lambda: len(drive.messages) == 4)

        seen: list[Any] = []
        drive = Drive(None)
        with pytest.raises(ValueError, match="takes 80.. bytes"):
            with override_settings(**postgres.options()):
                asyncio.run(broadcast("room", "x" * 8000))

        async def main() -> None:
            nonlocal drive
            async with driven(view, **postgres.options()) as drive:
                await drive.end()

        asyncio.run(main())
        assert seen == [[]]
        assert drive.messages[:3] == ["equal", "equal", "in no transaction"]

    @asynchronous
    async def test_its_connections(self, postgres: Postgres, caplog: Log) -> None:
        """One listens and one publishes; both are made again and go with the groups."""

        def count() -> int:
            own = "query LIKE 'LISTEN%' OR query LIKE 'SELECT pg_notify($1%'"
            return len(postgres.ask(f"SELECT 1 FROM pg_stat_activity WHERE {own}"))

        async with driven(member, count=3, **postgres.options()) as drives:
            await joined(drives)
            await asyncio.gather(*(broadcast("room", "x") for _ in range(20)))
            await deliver(drives, ["x"] * 20)
            await until(lambda: count() == 2)  # others may be closing
            kill = "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE query"
            postgres.ask(f"{kill} LIKE '%pg_notify%' AND pid <> pg_backend_pid()")
            await broadcast("room", "y")  # on a new one, and nobody hears of it
            await deliver(drives, ["x"] * 20 + ["y"])
            assert quiet(caplog)
            rubbish = [
                "x",
                "[1, 2]",
                '[1, "room", "c"]["a", "", 0]',
                '[1, "room", "x"]x',
            ]
            rubbish += ['[1, "room", "t"]5', '[1, ["x"], "t"]"x"', '[1, 2, 3]""']
            for payload in [*rubbish, '[1, "room", "c"][1000, "", {}]']:
                postgres.ask(f"SELECT pg_notify('tests', '{payload}')")
            postgres.ask("""SELECT pg_notify('tests', '[1, "room", "b"]"eA=="')""")
            await deliver(drives, ["x"] * 20 + ["y", b"x"])
            assert caplog.text.count("Not a message of django_ws") == 8
        await until(lambda: count() == 0)

    def test_synchronous_code_finds_it_again_after_a_restart(
        self, postgres: Postgres
    ) -> None:
        publish: Any = async_to_sync(broadcast)
        with override_settings(**postgres.options()):
            publish("room", "x")
            postgres.stop()
            for _ in range(2):
                with pytest.raises(OperationalError):
                    publish("room", "x")
            postgres.start()
            publish("room", "x")
            postgres.stop()
            postgres.start()
            publish("room", "x")
            with transaction.atomic("postgres"):
                postgres.stop()
                postgres.start()
                with pytest.raises(OperationalError):  # what came before is lost
                    publish("room", "x")
                transaction.set_rollback(True, "postgres")
        connections["postgres"].close()

    @asynchronous(hasty=True)
    async def test_a_pooler_needs_a_direct_connection_to_listen(
        self, postgres: Postgres, caplog: Log
    ) -> None:
        entry = {
            **connections.settings["postgres"],
            "OPTIONS": {"application_name": "b"},
        }
        connections.settings["direct"] = entry
        options = {"WEBSOCKETS": {"DATABASE": "postgres", "LISTEN": "direct"}}
        found = "SELECT query FROM pg_stat_activity WHERE application_name = 'b'"
        try:
            async with driven(member, count=1, **options) as drives:
                await joined(drives)
                await broadcast("room", "x")
                await deliver(drives, ["x"])
                [[query]] = postgres.ask(found)
                assert query == 'LISTEN "django_ws"'
        finally:
            del connections.settings["direct"]
        # What a pooler does that gives the connection to somebody else meanwhile.
        with pytest.MonkeyPatch.context() as patched:
            patched.setattr("psycopg.sql.SQL.format", lambda self, name: "SELECT 1")
            async with driven(member, count=1, **postgres.options()) as drives:
                await joined(drives)
                await until(lambda: "a pooler is not in session mode" in caplog.text)


@pytest.mark.usefixtures("postgres")
class TestPostgresGroupsInTestCase(TestCase):
    databases = {"default", "postgres"}

    async def test_what_is_broadcast_arrives_though_nothing_is_committed(self) -> None:
        def in_a_transaction() -> None:
            with transaction.atomic("postgres"):
                async_to_sync(broadcast)("room", "not committed")

        options: Any = {"WEBSOCKETS": {"DATABASE": "postgres"}}
        async with driven(member, count=1, **options) as drives:
            await joined(drives)
            await sync_to_async(in_a_transaction)()
            await sync_to_async(async_to_sync(broadcast))("room", "from sync code")
            await broadcast("room", "from async code")
            await deliver(drives, ["from sync code", "from async code"])


EXAMPLE: list[Any] = ["a.example.com", "http://a.example.com", None, None, []]


class TestConnect:
    @asynchronous
    async def test_messages_go_both_ways(self) -> None:
        async with connected(echo) as socket:
            assert socket.connected
            assert repr(socket) == "<the client's end of '/ws/'>"
            await socket.send_text("é")
            assert await socket.receive_text() == "é"
            await socket.send_json([1], binary=True)
            event = {"type": SendEvent.SEND, "bytes": b"[1]"}
            assert await socket.receive() == event
            await socket.send_text("x")
            with pytest.raises(InvalidMessage):
                await socket.receive_bytes()
            with pytest.raises(ValueError, match="not a valid close code"):
                await socket.close(1005)
        assert not socket.connected

    @pytest.mark.parametrize("by", ["view", "client", "block"])
    @asynchronous
    async def test_each_end_hears_how_the_other_closed(self, by: str) -> None:
        ends: list[Any] = []

        async def view(socket: WebSocket) -> None:
            await socket.accept()
            if by == "view":
                await socket.send_text("1")
                await socket.close(4001, "enough")
            with pytest.raises(WebSocketDisconnect) as caught:
                await socket.receive_text()
            ends.append((caught.value.code, caught.value.reason))

        async with connected(view) as client:
            if by == "view":
                assert [message async for message in client] == ["1"]
                for late in (client.receive_text(), client.send_text("x")):
                    with pytest.raises(WebSocketDisconnect, match="4001 enough"):
                        await late
            if by != "block":
                await client.close(4002, "bye")
        expected = {"view": (4001, "enough"), "client": (4002, "bye")}
        assert ends == [expected.get(by, (1000, ""))]

    @pytest.mark.parametrize(
        "place, options, expected",
        [
            ("/ws/?q=%C3%A9", {}, ["testserver", "http://testserver", "é", None, []]),
            (
                "/ws/",
                {
                    "headers": {"x-token": "secret"},
                    "client": Client(headers={"User-Agent": "test", "X-Token": "no"}),
                    "subprotocols": ("other", "chat"),
                },
                ["testserver", "http://testserver", None, "test secret"]
                + [["other", "chat"]],
            ),
            (
                "/ws/",
                {"client": AsyncClient(headers={"User-Agent": "async"})}
                | {"headers": {"Origin": None, "X-Token": 5}},
                ["testserver", None, None, "async 5", []],
            ),
            ("/ws/", {"headers": {"Host": "a.example.com"}}, EXAMPLE),
            ("/ws/", {"client": Client(HTTP_HOST="a.example.com")}, EXAMPLE),
            ("/ws/", {"client": Client(SERVER_NAME="a.example.com")}, EXAMPLE),
            (
                "/ws/",
                {"client": AsyncClient(headers={"host": "a.example.com"})},
                EXAMPLE,
            ),
            ("ws://a.example.com/ws/", {}, EXAMPLE),
            (
                "wss://a.example.com:99/ws/",
                {"subprotocols": ["chat"]},
                ["a.example.com:99", "https://a.example.com:99", None, None, ["chat"]],
            ),
        ],
    )
    @asynchronous
    async def test_what_the_view_sees_of_the_handshake(
        self, place: str, options: Any, expected: Any
    ) -> None:
        async def view(socket: Any) -> None:
            agent, token = socket.headers.get("User-Agent"), socket.headers.get(
                "X-Token"
            )
            both = f"{agent} {token}" if agent else token
            found = [socket.get_host(), socket.headers.get("Origin")]
            found += [socket.GET.get("q"), both, socket.subprotocols]
            chosen = "chat" if "chat" in socket.subprotocols else None
            await socket.accept(chosen, headers={"X-Answer": "42"})
            await socket.send_json(found)

        async with connected(view, place, **options) as socket:
            assert await socket.receive_json() == expected
            assert socket.subprotocol == ("chat" if "chat" in expected[-1] else None)
            assert socket.headers["x-answer"] == "42"

    @asynchronous
    async def test_a_refusal_is_an_http_response(self) -> None:
        client = AsyncClient()
        response = await refusal(returning(with_everything), client=client)
        assert isinstance(response, HttpResponse)
        assert response.content == b'{"detail": "no"}'
        assert (response.status_code, response["X-Why"]) == (401, "because")
        assert response.cookies["seen"].value == client.cookies["seen"].value == "1"
        found = await refusal(returning(lambda socket: redirect("/login/")))
        SimpleTestCase().assertRedirects(
            found, "/login/", fetch_redirect_response=False
        )
        for place, code, body in (("/closes/", 403, b""), ("/parts/", 401, b"not you")):
            with pytest.raises(WebSocketDenied, match=str(code)) as caught:
                async with connect(bare, place):
                    raise AssertionError("it was refused")
            response = caught.value.response
            assert (response.status_code, response.content) == (code, body)

    @pytest.mark.parametrize("given", [AsyncClient(), Client(), None])
    @asynchronous
    async def test_the_answers_cookies(self, given: Any) -> None:
        options: Any = {"MIDDLEWARE": middleware("tagging"), "client": given}
        async with connected(echo, **options) as socket:
            assert socket.cookies["flavour"]["max-age"] == "60"
        if given is not None:
            assert given.cookies["flavour"].value == "oat"

    @pytest.mark.parametrize("propagate", [True, False])
    @pytest.mark.parametrize(
        "view, words, error, message",
        [
            (raising(KeyError("before accept")), [], KeyError, "before accept"),
            (repeating_as_error, ["boom", "receive"], ValueError, "boom"),
            (repeating_as_error, ["at the end"], ValueError, "at the end"),
            (greeting_as_error, ["receive", "receive"], KeyError, "after"),
            (greeting_as_error, ["wait", "x"], KeyError, "after"),
            (closing_as_error, [], ValueError, "later"),
            (raising(PermissionDenied("no"), True), ["receive"], None, "1008"),
            (accepting, ["receive", "receive"], None, "1000"),
        ],
    )
    @asynchronous
    async def test_what_the_view_raises_is_raised(
        self, view: Any, words: Any, error: Any, message: str, propagate: bool
    ) -> None:
        with pytest.raises(error or WebSocketDisconnect, match=message) as caught:
            async with connected(view, DEBUG_PROPAGATE_EXCEPTIONS=propagate) as socket:
                for word in words:
                    if word == "receive":
                        await socket.receive_text()
                    elif word == "wait":
                        await asyncio.sleep(0.05)  # it has failed by then
                    else:
                        await socket.send_text(word)
        names = [one.name for one in caught.traceback]
        assert error is None or {"view", view.__name__} & set(names)

    @asynchronous
    async def test_and_not_twice_and_not_of_another_socket(self) -> None:
        async with connected(echo) as one, connected(greeting_as_error) as other:
            assert await other.receive_text() == "first"
            with pytest.raises(KeyError, match="after"):
                await other.receive_text()
            with pytest.raises(WebSocketDisconnect, match="1011"):
                await other.receive_text()
            await one.send_text("fine")
            assert await one.receive_text() == "fine"

    @asynchronous
    async def test_raise_request_exception_turns_that_off(self) -> None:
        client = Client(raise_request_exception=False)
        async with connected(repeating_as_error, client=client) as socket:
            await socket.send_text("boom")
            with pytest.raises(WebSocketDisconnect, match="1011"):
                await socket.receive_text()
        assert await status(raising(ValueError()), client=client) == 500

    @pytest.mark.parametrize("inner", [LookupError("mine"), None])
    @asynchronous
    async def test_the_blocks_own_error_is_the_one_to_see(self, inner: Any) -> None:
        with pytest.raises(LookupError if inner else WebSocketDenied):
            async with connected(repeating_as_error) as socket:
                await socket.send_text("the view's")
                if inner:
                    raise inner
                async with connected(closing):
                    raise AssertionError("it was refused")

    @pytest.mark.parametrize("accept", [False, True])
    @asynchronous
    async def test_a_view_may_fail_the_test(self, accept: bool) -> None:
        failure = pytest.fail.Exception("by the view")  # which is no Exception
        with pytest.raises(pytest.fail.Exception, match="by the view"):
            async with connected(raising(failure, accept)):
                pass
        FAILURES.clear()

    @asynchronous
    async def test_any_asgi_application(self) -> None:
        async with connect(bare, "/") as socket:
            await socket.send_text("hi")
            with pytest.raises(WebSocketDisconnect, match="1006"):
                await socket.receive_text()
        with pytest.raises(OSError, match="its own"):
            async with connect(bare, "/error/") as socket:
                await socket.send_text("hi")

    @pytest.mark.parametrize(
        "view, message",
        [
            (echo, "waited 0.5 s for a message from the view of /ws/"),
            (silent, "waited 0.5 s for the answer to the handshake"),
            (stubborn, "waited 0.5 s for a message from the view of /ws/"),
        ],
    )
    @asynchronous
    async def test_it_waits_only_so_long(self, view: Any, message: str) -> None:
        with pytest.raises(TimeoutError, match=message):
            async with connected(view, timeout=0.5) as socket:
                with pytest.raises(TimeoutError, match=message):
                    await socket.receive_json()
                await socket.send_text("nothing is lost")
                assert await socket.receive_text() == "nothing is lost"
                await socket.receive_json()

    @asynchronous
    async def test_a_view_that_does_not_end_is_named(self, monkeypatch: Patch) -> None:
        monkeypatch.setattr(WebSocket, "WATCH", 0.1)

        async def hangs(socket: WebSocket) -> None:
            await socket.close()
            await silent(socket)

        for view in (stubborn, hangs):
            with pytest.raises(TimeoutError, match="the view of /ws/ has not ended"):
                async with connected(view, timeout=0.5):
                    pass
        with pytest.raises(TimeoutError, match="the view of /hangs/ has not ended"):
            async with connect(bare, "/hangs/") as socket:
                await socket.send_text("hi")

    @asynchronous(hasty=True)
    async def test_without_a_limit_it_waits_as_long_as_it_takes(self) -> None:
        async def view(socket: WebSocket) -> None:
            await socket.accept()
            try:
                await asyncio.sleep(100)
                await socket.send_text("late")
                await silent(socket)
            finally:
                await asyncio.sleep(5)
                ended.append("cleaned up")

        ended: list[str] = []
        async with connected(view, timeout=None) as socket:
            assert await socket.receive_text() == "late"
        assert ended == ["cleaned up"]

    @asynchronous
    async def test_a_view_that_sends_without_end_is_held_up(self) -> None:
        sent = 0

        async def view(socket: WebSocket) -> None:
            nonlocal sent
            await socket.accept()
            while True:
                await socket.send_text("x")
                sent += 1

        async with connected(view) as socket:
            await turns(5_000)
            for _ in range(100):
                assert await socket.receive_text() == "x"
            assert 10_000 <= sent < 20_000

    @asynchronous
    async def test_a_test_that_sends_without_a_pause_lets_the_view_run(self) -> None:
        async def view(socket: WebSocket) -> None:
            await socket.accept()
            async for message in socket:
                got.append(message)

        got: list[Any] = []
        async with connected(view) as socket:
            for _ in range(100):
                await socket.send_text("x")
            assert len(got) > 50

    @asynchronous(hasty=True)
    async def test_who_gives_up_during_the_handshake_leaves_nothing(self) -> None:
        made: list[Any] = []

        def view(socket: WebSocket) -> Any:
            coroutine = echo(socket)
            made.append(weakref.ref(coroutine))
            return coroutine

        views = [functools.update_wrapper(view, echo)]
        with configured(views, {"MIDDLEWARE": middleware("slowly")}):
            with pytest.raises(TimeoutError):
                async with connect(websockets(no_http), "/ws/", timeout=0.01):
                    raise AssertionError("it was accepted")
            await until(lambda: made and made[0]() is None)
        gc.collect()  # or else: a coroutine was never awaited

    @asynchronous
    async def test_who_is_cancelled_leaves_nothing(self) -> None:
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.1):
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(0.05):
                        async with connected(silent_after_accept):
                            await asyncio.sleep(3600)
                await turns()
                assert len(asyncio.all_tasks()) == 1
                await asyncio.sleep(3600)

    @asynchronous
    async def test_groups_work(self) -> None:
        async with connected(member) as one, connected(member) as two:
            for socket in (one, two):
                assert await socket.receive_text() == "joined"
            await broadcast("room", {"to": "all"})
            for socket in (one, two):
                assert await socket.receive_json() == {"to": "all"}


# What a server does not do for any ASGI application; README's table says the same.
FALLS_SHORT: dict[tuple[str, str], str] = {
    ("hypercorn", "the client's code"): "reports 1006",
    ("hypercorn", "the client's reason"): "reports none",
    ("daphne", "empty messages"): "drops them",
    ("daphne", "refusal with a page"): "answers a bare 403",
    ("daphne", "headers of the answer"): "sends none",
    ("granian", "headers of the answer"): "sends none",
    ("daphne", "reason"): "sends none",
    ("daphne", "standard code"): "sends 1000 and 3000 to 4999 only",
    ("daphne", "the client's reason"): "reports none",
    ("daphne", "back-pressure on the view"): "buffers without bound",
    ("daphne", "back-pressure on the client"): "buffers without bound",
    ("gunicorn", "back-pressure on the client"): "buffers without bound",
    ("granian", "cancel-safe receive"): "loses messages",
    ("granian", "the client's reason"): "reports none",
    ("gunicorn", "refusal with a page"): "answers a bare 403",
    ("gunicorn", "the client's reason"): "reports none",
}


class TestServers:
    @pytest.mark.parametrize("behaviour", BEHAVIOURS)
    def test_it(self, served: Served, behaviour: str) -> None:
        name, server = served
        why = FALLS_SHORT.get((name, behaviour))
        if why is None:
            BEHAVIOURS[behaviour](server, "")
        else:
            with pytest.raises((AssertionError, OSError, pytest.fail.Exception)):
                BEHAVIOURS[behaviour](server, "/raw")
            pytest.skip(f"{name} itself {why}")

    @pytest.mark.parametrize("how", ["close frame", "reset"])
    def test_every_view_ends_and_stops_nobody(self, served: Served, how: str) -> None:
        name, server = served

        def running() -> list[str]:
            output = server.output[before:]
            return [life for life in LIVES if f"{life} has ended." not in output]

        before = len(server.output)
        clients = []
        for life in LIVES:
            clients.append(server.open_raw(f"/live/{quote(life)}/"))
            if life in ("reads once", "listens in between"):
                clients[-1].sendall(frame(1, b"beat"))
        echoes(server, "", "while they are there")
        for raw in clients:
            if how == "reset":
                reset(raw)
            else:
                with contextlib.suppress(OSError):
                    raw.sendall(frame(8, b"\x03\xe8"))
                raw.close()
        echoes(server, "", "when they are gone")
        # WATCH and four times GRACE, for the one that swallows thrice; some clean up.
        deadline = time.monotonic() + 15
        while running():
            assert time.monotonic() < deadline, running()
            time.sleep(0.1)

    def test_readers_of_a_group_get_everything_and_stay(self, served: Served) -> None:
        name, server = served
        message, count = 2 + 20, 400  # a frame's header and its text
        got = {}
        with selectors.DefaultSelector() as selector:
            for _ in range(200 if name == "granian" else 50):
                raw = server.open_raw("/room/", wait=False)
                answer = b""
                while not answer.endswith(b"joined"):
                    answer += raw.recv(1000)
                selector.register(raw, selectors.EVENT_READ)
                got[raw] = 0
            client = server.dial("/room/", max_queue=None)
            assert client.recv(20) == "joined"
            client.send(f"count {count}")
            deadline = time.monotonic() + 30
            while min(got.values()) < message * count:
                assert time.monotonic() < deadline
                for key, _ in selector.select(1):
                    one: Any = key.fileobj
                    data = one.recv(2**16)
                    assert data, "a reader was closed"
                    got[one] += len(data)
        assert set(got.values()) == {message * count}
        for raw in got:
            raw.close()

    def test_a_flooded_view_is_closed_with_1008(self, served: Served) -> None:
        name, server = served
        before = len(server.output)
        client = server.dial("/live/sleeps/")
        with contextlib.suppress(ConnectionClosed):
            for _ in range(700):
                client.send("x" * 100)
        wait_for(lambda: "sleeps has ended." in server.output[before:])
        if name not in ("hypercorn", "gunicorn", "daphne"):  # these read on too late
            assert closed_with(client)[0] == 1008
        assert "closed with 1008" in server.output[before:]

    def test_standard_codes_leave_no_traceback(self, served: Served) -> None:
        name, server = served
        before = len(server.output)
        for code in (1003, 1007, 1008, 1011, 1013):
            found, _ = closed_with(server.dial(f"/close/{code}/"))
            assert found == code + 3000 * (name == "daphne")
        assert "Traceback" not in server.output[before:]

    @pytest.mark.parametrize(
        "name, number",
        [(name, signal.SIGTERM) for name in SERVERS]
        + [(name, signal.SIGINT) for name in SERVERS if "uvicorn" in name],
    )
    def test_it_stops_gracefully(self, name: str, number: Any, tmp_path: Path) -> None:
        with serve_by(name, tmp_path) as server:
            for life in STOPPED:
                server.open_raw(f"/live/{quote(life)}/")
            wait_for(lambda: server.output.count("has begun.") == 3)
            server.process.send_signal(number)
            stays = name in ("hypercorn", "gunicorn")
            try:
                server.process.wait(5 if stays else 20)
            except subprocess.TimeoutExpired:
                assert stays
                server.process.kill()
                pytest.skip(f"{name} itself waits for the client, or for 30 s")
        if "uvicorn" in name:
            has_stopped_well(server)

    def test_the_log_is_clean(self, served: Served) -> None:
        # Tracebacks of the raw application, which shows what a server itself cannot do,
        # are not ours.
        output = served[1].output
        assert "django_ws.py" not in output.replace("test_django_ws.py", "")
        assert "Internal Server Error" not in output
