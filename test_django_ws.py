"""What django_ws promises, section by section, in the order of the module.

    python -m pytest

Needs pytest and uvicorn[standard]. Tests that need more (wsproto, hypothesis, selenium
with Chromium) skip and say why; with CI=true in the environment they fail instead.
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
import http.client
import importlib
import importlib.util
import inspect
import itertools
import json
import logging
import os
import pathlib
import pickle
import random
import re
import selectors
import shutil
import signal
import socket as sockets
import statistics
import struct
import subprocess
import sys
import tempfile
import threading
import time
import types
import uuid
import weakref
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Any, Self

import django
import pytest
import uvicorn
from asgiref.local import Local
from asgiref.sync import async_to_sync, sync_to_async
from django.conf import settings
from django.core import signals
from django.core.asgi import get_asgi_application
from django.core.exceptions import (
    BadRequest,
    ImproperlyConfigured,
    PermissionDenied,
    SuspiciousOperation,
)
from django.http import (
    Http404,
    HttpRequest,
    HttpResponse,
    JsonResponse,
    StreamingHttpResponse,
)
from django.shortcuts import redirect
from django.test import (
    AsyncClient,
    Client,
    SimpleTestCase,
    TestCase,
    TransactionTestCase,
    override_settings,
)
from django.urls import include, path, reverse
from django.utils import timezone, translation
from django.utils.decorators import (
    async_only_middleware,
    method_decorator,
    sync_and_async_middleware,
)
from django.utils.translation import get_language, gettext_lazy
from django.views import View
from websockets.exceptions import ConnectionClosed, InvalidStatus
from websockets.sync.client import ClientConnection
from websockets.sync.client import connect as dial
from websockets.typing import Origin

HERE = pathlib.Path(__file__).resolve().parent
TEMPORARY = tempfile.TemporaryDirectory()
CI = bool(os.environ.get("CI"))

settings.configure(
    SECRET_KEY="test",
    ALLOWED_HOSTS=["127.0.0.1", "localhost", "testserver", ".example.com", "[::1]"],
    INSTALLED_APPS=[
        "django.contrib.auth",
        "django.contrib.contenttypes",
        "django.contrib.sessions",
    ],
    DATABASES={
        "default": {
            "ENGINE": "django.db.backends.sqlite3",
            "NAME": f"{TEMPORARY.name}/test.sqlite3",
            "OPTIONS": {"timeout": 30},
        }
    },
    PASSWORD_HASHERS=["django.contrib.auth.hashers.MD5PasswordHasher"],
    LOGGING_CONFIG=None,
    USE_TZ=True,
)
django.setup()

import django_ws  # noqa: E402
from django_ws import (  # noqa: E402
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

SESSIONS = [
    "django.contrib.sessions.middleware.SessionMiddleware",
    "django.contrib.auth.middleware.AuthenticationMiddleware",
]
COMMON = "django.middleware.common.CommonMiddleware"


# The tools


def missing(what: str) -> None:
    """Skip a test that needs what is not installed; in CI everything is."""
    (pytest.fail if CI else pytest.skip)(f"{what} is not installed")


def needs(module: str) -> None:
    if not importlib.util.find_spec(module):
        missing(module)


def wait_for(condition: Callable[[], Any], seconds: float = 10) -> Any:
    """Wait until the condition holds; fail when it does not in time."""
    deadline = time.monotonic() + seconds
    while not (result := condition()):
        assert time.monotonic() < deadline, f"{condition} did not come true"
        time.sleep(0.01)
    return result


@pytest.fixture(scope="session", autouse=True)
def database() -> None:
    from django.core.management import call_command

    call_command("migrate", verbosity=0)


@pytest.fixture(autouse=True)
def assertions_in_views() -> Iterator[None]:
    """Raise what failed in a view, where all that the client saw was its end."""
    failed: list[AssertionError] = []

    def note(**kwargs: Any) -> None:
        error = sys.exc_info()[1]
        if isinstance(error, AssertionError):
            failed.append(error)

    signals.got_request_exception.connect(note)
    yield
    signals.got_request_exception.disconnect(note)
    for error in failed:
        raise error


@pytest.fixture(params=["websockets-sansio", "websockets", "wsproto"])
def ws(request: pytest.FixtureRequest) -> str:
    """Each of uvicorn's WebSocket implementations."""
    name: str = request.param
    if name == "wsproto" and not importlib.util.find_spec("wsproto"):
        missing("wsproto")
    return name


def urlconf(*urlpatterns: Any, **names: Any) -> types.ModuleType:
    module = types.ModuleType("urlconf")
    vars(module).update(names, urlpatterns=list(urlpatterns))
    return module


class Site:
    """Something that serves 127.0.0.1:port, and the ways to ask it."""

    port: int

    def dial(self, path: str = "/ws/", **options: Any) -> ClientConnection:
        """Open a WebSocket as a browser on this site does."""
        options = {"origin": f"http://127.0.0.1:{self.port}", "proxy": None, **options}
        client: ClientConnection = dial(f"ws://127.0.0.1:{self.port}{path}", **options)
        return client

    def handshake(self, path: str = "/ws/", **headers: str) -> Any:
        """Return the HTTP response to a handshake, with a browser's headers.

        By hand, since the client library follows redirects.
        """
        return self.get(
            path,
            **{
                "Connection": "Upgrade",
                "Upgrade": "websocket",
                "Sec-WebSocket-Version": "13",
                "Sec-WebSocket-Key": "dGhlIHNhbXBsZSBub25jZQ==",
                "Origin": f"http://127.0.0.1:{self.port}",
                **headers,
            },
        )

    def get(self, path: str, **headers: str) -> Any:
        """Return the HTTP response to a GET request."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=10)
        connection.request("GET", path, headers=headers)
        response = connection.getresponse()
        setattr(response, "body", response.read())
        response.close()
        connection.close()
        return response


class Uvicorn(uvicorn.Server):
    async def main_loop(self) -> None:
        while not self.should_exit:  # ten times as often as it is, for quicker tests
            await asyncio.sleep(0.01)


class Server(Site):
    """A real uvicorn on a thread, serving `application` on 127.0.0.1."""

    def __init__(self, application: Any, **options: Any) -> None:
        options = {"log_config": None, "lifespan": "off", **options}
        self.uvicorn = Uvicorn(uvicorn.Config(application, **options))
        self.socket = sockets.create_server(("127.0.0.1", 0))
        self.port = self.socket.getsockname()[1]
        self.thread = threading.Thread(
            target=self.uvicorn.run, kwargs={"sockets": [self.socket]}
        )

    def __enter__(self) -> "Server":
        self.thread.start()
        wait_for(lambda: self.uvicorn.started)
        return self

    def __exit__(self, *exc_info: Any) -> None:
        self.uvicorn.should_exit = True
        self.thread.join(20)
        assert not self.thread.is_alive(), "the server did not stop"


class Process(Site):
    """A command that serves 127.0.0.1:port, its output in a file."""

    def __init__(self, directory: pathlib.Path, *command: Any, port: int = 0) -> None:
        self.port = port or free_port()
        self.log = directory / f"output-{self.port}.log"
        self.command = [str(word).format(port=self.port) for word in command]
        self.directory = directory

    def __enter__(self) -> Self:
        environment = {**os.environ, "PYTHONPATH": str(HERE), "PYTHONUNBUFFERED": "1"}
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                self.command,
                cwd=self.directory,
                env=environment,
                stdout=log,
                stderr=subprocess.STDOUT,
            )
        wait_for(self.answers, 30)
        return self

    def answers(self) -> bool:
        assert self.process.poll() is None, self.log.read_text()[-3000:]
        with contextlib.suppress(OSError):
            sockets.create_connection(("127.0.0.1", self.port)).close()
            return True
        return False

    def __exit__(self, *exc_info: Any) -> None:
        self.process.terminate()
        try:
            self.process.wait(5)
        except subprocess.TimeoutExpired:  # shutting down has tests of its own
            self.process.kill()
            self.process.wait()


RESERVED: list[sockets.socket] = []


def free_port() -> int:
    """Return a port for a server, which no other run of these tests will return.

    They may run at once, and would then talk to each other's servers: UDP reserves it.
    """
    while True:
        port = random.randint(10_000, 30_000)  # none that the system gives to clients
        with contextlib.suppress(OSError):
            reserved = sockets.socket(type=sockets.SOCK_DGRAM)
            RESERVED.append(reserved)
            reserved.bind(("127.0.0.1", port))
            sockets.create_server(("127.0.0.1", port)).close()
            return port


UVICORN = (sys.executable, "-m", "uvicorn", "--port", "{port}")


@contextlib.contextmanager
def serve(*patterns: Any, ws: str = "auto", **options: Any) -> Iterator[Server]:
    """Serve URL patterns, or one view at /ws/; upper-case options are settings."""
    patterns = tuple(
        pattern if hasattr(pattern, "pattern") else websocket("ws/", pattern)
        for pattern in patterns
    )
    names = {name: options.pop(name) for name in list(options) if "handler" in name}
    overrides = {name: options.pop(name) for name in list(options) if name.isupper()}
    overrides.setdefault("ROOT_URLCONF", urlconf(*patterns, **names))
    with override_settings(**overrides):
        application = websockets(get_asgi_application())
        failures: list[BaseException] = []

        async def failing(scope: Any, receive: Any, send: Any) -> None:
            try:
                await application(scope, receive, send)
            except pytest.fail.Exception as failure:
                failures.append(failure)
                raise

        with Server(failing, ws=ws, **options) as server:
            yield server
        for failure in failures:
            raise failure


def quiet(caplog: pytest.LogCaptureFixture) -> bool:
    """Whether nothing above INFO was logged; prints what was."""
    loud = [record for record in caplog.records if record.levelno > logging.INFO]
    for record in loud:
        print(record.name, record.levelname, record.getMessage(), record.exc_info)
    return not loud


async def echo(socket: WebSocket) -> None:
    await socket.accept()
    async for message in socket:
        if isinstance(message, str):
            await socket.send_text(message)
        else:
            await socket.send_bytes(message)


def text(data: str) -> dict[str, Any]:
    return {"type": "websocket.receive", "text": data}


def binary(data: bytes) -> dict[str, Any]:
    return {"type": "websocket.receive", "bytes": data}


CONNECT = {"type": "websocket.connect"}
GONE = {"type": "websocket.disconnect", "code": 4001, "reason": "bye"}
NORMAL = {"type": "websocket.close", "code": 1000, "reason": ""}


# What a client that is no browser sends first.
HANDSHAKE = (
    b"GET /ws/ HTTP/1.1\r\nHost: 127.0.0.1\r\nConnection: Upgrade\r\n"
    b"Upgrade: websocket\r\nSec-WebSocket-Version: 13\r\n"
    b"Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n"
)


def open_raw(port: int, path: str = "/ws/") -> sockets.socket:
    """Open a WebSocket by hand and return its socket after the server's answer."""
    raw = sockets.create_connection(("127.0.0.1", port))
    raw.sendall(HANDSHAKE.replace(b"/ws/", path.encode()))
    raw.recv(1000)
    return raw


def frame(opcode: int, data: bytes) -> bytes:
    """A client's frame, masked with zeros (RFC 6455, section 5.2)."""
    return bytes([0x80 | opcode, 0x80 | len(data), 0, 0, 0, 0]) + data


class Drive:
    """A connection whose ASGI events are given by hand, and what the view sent."""

    def __init__(self, *events: dict[str, Any], **scope: Any) -> None:
        self.events = [CONNECT, *events]
        self.sent: list[dict[str, Any]] = []
        self.error: BaseException | None = None
        self.scope = {
            "type": "websocket",
            "scheme": "ws",
            "path": "/ws/",
            "query_string": b"",
            "headers": [(b"host", b"testserver")],
            "extensions": {"websocket.http.response": {}},
            **scope,
        }

    async def receive(self) -> dict[str, Any]:
        if self.events:
            return self.events.pop(0)
        await asyncio.get_running_loop().create_future()
        raise AssertionError

    async def send(self, event: dict[str, Any]) -> None:
        if self.error:
            raise self.error
        self.sent.append(event)

    def run(self, view: Any, **overrides: Any) -> list[dict[str, Any]]:
        """Serve the connection by `view` to its end and return what was sent."""

        async def main() -> None:
            application: Any = websockets(no_http)
            async with asyncio.timeout(10):
                await application(self.scope, self.receive, self.send)

        if "ROOT_URLCONF" not in overrides:
            overrides["ROOT_URLCONF"] = urlconf(websocket("ws/", view))
        with override_settings(**overrides):
            asyncio.run(main())
        return self.sent

    @property
    def types(self) -> list[str]:
        return [event["type"] for event in self.sent]

    @property
    def status(self) -> int:
        return int(self.sent[0]["status"])


async def no_http(scope: Any, receive: Any, send: Any) -> None:
    raise AssertionError("not a WebSocket")


# The words of the wire


class TestWords:
    def test_events_are_the_strings_of_asgi(self) -> None:
        assert [str(event) for event in SendEvent] == [
            "websocket.accept",
            "websocket.send",
            "websocket.close",
        ]
        assert [str(event) for event in ReceiveEvent] == [
            "websocket.connect",
            "websocket.receive",
            "websocket.disconnect",
        ]
        assert issubclass(SendEvent, enum.StrEnum)
        assert issubclass(ReceiveEvent, enum.StrEnum)

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


class TestErrors:
    def test_disconnect_carries_code_and_reason(self) -> None:
        error = WebSocketDisconnect(4001, "bye")
        assert (error.code, error.reason) == (4001, "bye")
        assert str(error) == "the WebSocket has ended: 4001 bye"

    def test_invalid_message_carries_its_close_code(self) -> None:
        error = InvalidMessage(1007, "expected JSON")
        assert (error.code, str(error)) == (1007, "expected JSON")
        with pytest.raises(ValueError, match="400 is not a valid close code"):
            InvalidMessage(400, "as in HTTP")

    # The socket

    @pytest.mark.parametrize(
        "error",
        [
            WebSocketDisconnect(4001, "bye"),
            InvalidMessage(1003, "expected text, got bytes"),
            WebSocketDenied(HttpResponse(status=403)),
        ],
    )
    def test_they_can_be_pickled(self, error: Any) -> None:
        """As test runners in several processes do."""
        again = pickle.loads(pickle.dumps(error))
        assert (type(again), str(again)) == (type(error), str(error))
        assert vars(again).keys() == vars(error).keys()


class TestAccept:
    def test_it_completes_the_handshake(self) -> None:
        async def view(socket: WebSocket) -> None:
            assert not socket.connected
            await socket.accept()
            assert socket.connected

        drive = Drive()
        drive.run(view)
        assert drive.sent == [
            {"type": "websocket.accept", "subprotocol": None, "headers": []},
            {"type": "websocket.close", "code": 1000, "reason": ""},
        ]

    @pytest.mark.parametrize(
        "headers",
        [
            {"X-One": "1", "X-Two": "é"},
            [("X-One", "1"), ("X-Two", "é")],
            [(b"X-One", b"1"), (b"X-Two", "é".encode("latin-1"))],
            (pair for pair in [("X-One", b"1"), (b"X-Two", "é")]),
        ],
    )
    def test_headers_may_be_a_mapping_or_pairs_of_str_or_bytes(
        self, headers: Any
    ) -> None:
        async def view(socket: WebSocket) -> None:
            await socket.accept(headers=headers)

        sent = Drive().run(view)
        assert sent[0]["headers"] == [(b"x-one", b"1"), (b"x-two", b"\xe9")]

    def test_space_around_a_value_is_no_part_of_it(self) -> None:
        async def view(socket: WebSocket) -> None:
            await socket.accept(headers={"X-One": " a b\t"})

        assert Drive().run(view)[0]["headers"] == [(b"x-one", b"a b")]

    def test_two_tasks_cannot_answer_one_handshake(self) -> None:
        async def view(socket: WebSocket) -> None:
            first = asyncio.create_task(socket.accept())
            await asyncio.sleep(0)
            with pytest.raises(RuntimeError, match="accept.. was called before"):
                await socket.accept()
            await first

        class Slow(Drive):
            async def send(self, event: dict[str, Any]) -> None:
                await asyncio.sleep(0.01)
                await super().send(event)

        drive = Slow()
        drive.run(view)
        assert drive.types == ["websocket.accept", "websocket.close"]

    def test_a_header_may_come_twice(self) -> None:
        async def view(socket: WebSocket) -> None:
            await socket.accept(headers=[("X-One", "1"), ("X-One", "2")])

        assert len(Drive().run(view)[0]["headers"]) == 2

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
    def test_misuse_is_a_value_error_and_the_socket_stays_usable(
        self, arguments: Any, message: str
    ) -> None:
        async def view(socket: WebSocket) -> None:
            with pytest.raises(ValueError, match=message):
                await socket.accept(**arguments)
            assert not drive.sent
            await socket.accept("chat")

        drive = Drive(subprotocols=["chat"])
        drive.run(view)
        assert drive.types == ["websocket.accept", "websocket.close"]
        assert drive.sent[0]["subprotocol"] == "chat"

    def test_a_second_accept_is_a_runtime_error(self) -> None:
        async def view(socket: WebSocket) -> None:
            await socket.accept()
            with pytest.raises(RuntimeError, match="accept.. was called before"):
                await socket.accept()
            await socket.send_text("still here")

        drive = Drive()
        drive.run(view)
        assert drive.types[1:] == ["websocket.send", "websocket.close"]

    def test_a_server_that_refuses_the_event_leaves_the_socket_as_it_was(self) -> None:
        async def view(socket: WebSocket) -> None:
            drive.error = ValueError("no")
            with pytest.raises(ValueError, match="no"):
                await socket.accept()
            drive.error = None
            await socket.accept()

        drive = Drive()
        drive.run(view)
        assert drive.types == ["websocket.accept", "websocket.close"]

    def test_subprotocol_and_headers_reach_the_client(self, ws: str) -> None:
        async def view(socket: WebSocket) -> None:
            assert socket.subprotocols == ["soap", "chat"]
            await socket.accept("chat", {"X-Room": "lobby"})

        with serve(view, ws=ws) as server:
            with server.dial(subprotocols=["soap", "chat"]) as client:
                assert client.subprotocol == "chat"
                assert client.response is not None
                assert client.response.headers["X-Room"] == "lobby"


class TestClose:
    @pytest.mark.parametrize("code", [1000, 1001, 1003, 1007, 1014, 3000, 4000, 4999])
    def test_it_sends_code_and_reason(self, code: int) -> None:
        async def view(socket: WebSocket) -> None:
            await socket.accept()
            await socket.close(code, "because")
            assert not socket.connected

        close = {"type": "websocket.close", "code": code, "reason": "because"}
        assert Drive().run(view)[1:] == [close]

    @pytest.mark.parametrize(
        "code", [0, -1, 999, 1004, 1005, 1006, 1015, 1016, 2999, 5000]
    )
    def test_a_forbidden_code_is_a_value_error(self, code: int) -> None:
        async def view(socket: WebSocket) -> None:
            with pytest.raises(ValueError, match=f"{code} is not a valid close code"):
                await socket.close(code)
            await socket.accept()
            with pytest.raises(ValueError, match=f"{code} is not a valid close code"):
                await socket.close(code)
            await socket.send_text("still here")

        drive = Drive()
        drive.run(view)
        assert drive.types[1:] == ["websocket.send", "websocket.close"]

    def test_an_overlong_reason_is_a_value_error(self) -> None:
        async def view(socket: WebSocket) -> None:
            await socket.accept()
            with pytest.raises(ValueError, match="123 bytes"):
                await socket.close(1000, "é" * 62)
            await socket.close(1000, "é" * 61 + "x")

        assert Drive().run(view)[1:] == [{**NORMAL, "reason": "é" * 61 + "x"}]

    @pytest.mark.parametrize("arguments", [("1000",), (1000, None), (1000, b"bye")])
    def test_a_wrong_type_is_a_type_error(self, arguments: Any) -> None:
        async def view(socket: WebSocket) -> None:
            await socket.accept()
            with pytest.raises(TypeError):
                await socket.close(*arguments)
            assert socket.connected

        assert Drive().run(view)[1:] == [NORMAL]

    def test_closing_again_does_nothing(self) -> None:
        async def view(socket: WebSocket) -> None:
            await socket.accept()
            await socket.close(4000)
            await socket.close(4001)

        assert Drive().run(view)[1:] == [{**NORMAL, "code": 4000}]

    def test_closing_after_the_client_does_nothing(self) -> None:
        async def view(socket: WebSocket) -> None:
            await socket.accept()
            with pytest.raises(WebSocketDisconnect):
                await socket.receive_text()
            await socket.close()

        assert len(Drive(GONE).run(view)) == 1

    @pytest.mark.parametrize("error", [OSError(), RuntimeError("closed")])
    def test_a_client_that_has_just_gone_is_no_error(self, error: Exception) -> None:
        async def view(socket: WebSocket) -> None:
            await socket.accept()
            drive.error = error
            await socket.close()

        drive = Drive()
        assert len(drive.run(view)) == 1

    def test_both_sides_see_code_and_reason(self, ws: str) -> None:
        ends: list[Any] = []

        async def view(socket: WebSocket) -> None:
            await socket.accept()
            try:
                message = await socket.receive_text()
                await socket.close(4002, message)
            except WebSocketDisconnect as error:
                ends.append((error.code, error.reason))

        with serve(view, ws=ws) as server:
            with server.dial() as client:
                client.send("théâtre")
                with pytest.raises(ConnectionClosed) as caught:
                    client.recv(10)
                assert caught.value.rcvd is not None
                assert caught.value.rcvd.code == 4002
                assert caught.value.rcvd.reason == "théâtre"
            with server.dial() as client:
                client.close(4001, "bye")
            wait_for(lambda: ends == [(4001, "bye")])


class TestAttributes:
    def test_a_socket_answers_for_its_request(self) -> None:
        async def view(socket: WebSocket, room: str) -> None:
            assert socket.scope["type"] == "websocket"
            assert socket.scope["scheme"] == "ws"
            assert socket.scheme == "ws"
            assert socket.path == "/ws/lobby/"
            assert socket.query_string == "a=1&a=2&b=%C3%A9"
            assert socket.query_params.getlist("a") == ["1", "2"]
            assert socket.query_params is socket.GET
            assert socket.headers["X-Custom"] == "yes"
            assert socket.COOKIES == {"flavour": "oat"}
            assert socket.subprotocols == []
            assert isinstance(socket.request, HttpRequest)
            assert socket.method == "GET"
            assert socket.resolver_match.kwargs == {"room": "lobby"}
            assert socket.build_absolute_uri() == (
                "http://testserver/ws/lobby/?a=1&a=2&b=%C3%A9"
            )
            assert repr(socket) == "<WebSocket connecting '/ws/lobby/'>"
            with pytest.raises(AttributeError, match="nonsense"):
                socket.nonsense
            setattr(socket, "tenant", "blue")  # as decorators do on requests
            assert socket.tenant == "blue"
            await socket.accept()

        drive = Drive(
            path="/ws/lobby/",
            query_string=b"a=1&a=2&b=%C3%A9",
            headers=[
                (b"host", b"testserver"),
                (b"x-custom", b"yes"),
                (b"cookie", b"flavour=oat"),
            ],
        )
        drive.run(
            view, ROOT_URLCONF=urlconf(websocket("ws/<room>/", view, name="room"))
        )
        assert drive.types == ["websocket.accept", "websocket.close"]

    def test_an_unfinished_copy_has_no_endless_recursion(self) -> None:
        with pytest.raises(AttributeError):
            WebSocket.__new__(WebSocket).anything

    @pytest.mark.parametrize(
        "scheme, headers, expected",
        [
            ("ws", [], "ws"),
            ("wss", [], "wss"),
            ("ws", [(b"x-forwarded-proto", b"https")], "wss"),
            ("wss", [(b"x-forwarded-proto", b"http")], "ws"),
        ],
    )
    def test_scheme_tells_what_the_client_uses(
        self, scheme: str, headers: Any, expected: str
    ) -> None:
        async def view(socket: WebSocket) -> None:
            assert socket.scheme == expected
            assert socket.is_secure() == (expected == "wss")
            await socket.accept()

        drive = Drive(scheme=scheme, headers=[(b"host", b"testserver"), *headers])
        proxied = ("HTTP_X_FORWARDED_PROTO", "https")
        drive.run(view, SECURE_PROXY_SSL_HEADER=proxied if headers else None)
        assert drive.types == ["websocket.accept", "websocket.close"]


class TestEvents:
    def test_receive_gives_every_event_once(self) -> None:
        events = []
        connected = []

        async def view(socket: WebSocket) -> None:
            events.append(await socket.receive())
            connected.append(socket.connected)
            await socket.send({"type": SendEvent.ACCEPT})
            connected.append(socket.connected)
            events.append(await socket.receive())
            await socket.send({"type": SendEvent.SEND, "text": "hi"})
            events.append(await socket.receive())
            connected.append(socket.connected)
            with pytest.raises(WebSocketDisconnect) as caught:
                await socket.receive()
            assert (caught.value.code, caught.value.reason) == (4001, "bye")

        drive = Drive(text("a"), GONE)
        drive.run(view)
        assert events == [CONNECT, text("a"), GONE]
        assert connected == [False, True, False]
        assert drive.types == ["websocket.accept", "websocket.send"]

    def test_accept_takes_the_connect_event(self) -> None:
        async def view(socket: WebSocket) -> None:
            await socket.accept()
            assert await socket.receive() == text("a")

        Drive(text("a")).run(view)

    def test_a_bare_close_ends_the_socket(self) -> None:
        async def view(socket: WebSocket) -> None:
            await socket.accept()
            await socket.send({"type": "websocket.close", "code": 4005})
            with pytest.raises(WebSocketDisconnect) as caught:
                await socket.receive()
            assert caught.value.code == 4005

        assert Drive().run(view)[1:] == [{**NORMAL, "code": 4005}]

    def test_a_bare_close_before_accept_is_djangos_403(self) -> None:
        async def view(socket: WebSocket) -> None:
            await socket.send({"type": "websocket.close"})

        drive = Drive()
        drive.run(view)
        assert drive.status == 403

    @pytest.mark.parametrize(
        "event", ["websocket.send", "websocket.connect", "http.response.start"]
    )
    def test_an_event_out_of_turn_is_a_runtime_error(self, event: str) -> None:
        async def view(socket: WebSocket) -> None:
            with pytest.raises(RuntimeError, match="call accept.. before"):
                await socket.send({"type": event})
            await socket.accept()
            if event != "websocket.send":
                with pytest.raises(RuntimeError, match="not an event that can be sent"):
                    await socket.send({"type": event})

        drive = Drive()
        drive.run(view)
        assert drive.types == ["websocket.accept", "websocket.close"]

    def test_an_event_that_asgi_does_not_know_is_a_runtime_error(self) -> None:
        async def view(socket: WebSocket) -> None:
            await socket.accept()
            with pytest.raises(RuntimeError, match="'websocket.ping' is not an event"):
                await socket.receive()
            assert await socket.receive_text() == "a"

        assert Drive({"type": "websocket.ping"}, text("a")).run(view)[1:] == [NORMAL]

    def test_a_client_that_leaves_before_accept(self) -> None:
        async def view(socket: WebSocket) -> None:
            assert await socket.receive() == CONNECT
            assert await socket.receive() == GONE
            with pytest.raises(WebSocketDisconnect) as caught:
                await socket.accept()
            assert caught.value.code == 4001

        # The event that keeps uvicorn from logging "returned without handshake".
        assert Drive(GONE).run(view) == [{"type": "websocket.close"}]


RECEIVERS = ["receive_text", "receive_bytes", "receive_json"]
SENDERS = [("send_text", "x"), ("send_bytes", b"x"), ("send_json", 1)]


class TestMessages:
    @pytest.mark.parametrize("method", RECEIVERS)
    def test_receiving_before_accept_is_a_runtime_error(self, method: str) -> None:
        async def view(socket: WebSocket) -> None:
            with pytest.raises(RuntimeError, match="call accept.. before"):
                await getattr(socket, method)()
            with pytest.raises(RuntimeError, match="call accept.. before"):
                async for _ in socket:
                    raise AssertionError
            await socket.accept()
            assert await socket.receive_json() == 1

        assert Drive(text("1")).run(view)[1:] == [NORMAL]

    @pytest.mark.parametrize("method, data", SENDERS)
    def test_sending_before_accept_is_a_runtime_error(
        self, method: str, data: Any
    ) -> None:
        async def view(socket: WebSocket) -> None:
            with pytest.raises(RuntimeError, match="call accept.. before"):
                await getattr(socket, method)(data)
            assert not drive.sent
            await socket.accept()

        drive = Drive()
        assert drive.run(view)[1:] == [NORMAL]

    @pytest.mark.parametrize(
        "end, code, reason",
        [
            ("client", 4001, "bye"),
            ("server", 4002, "so long"),
            ("OSError", 4001, "bye"),  # which only receiving tells
            ("RuntimeError", 4001, "bye"),
        ],
    )
    def test_after_the_end_everything_raises_disconnect_with_the_code(
        self, end: str, code: int, reason: str
    ) -> None:
        async def view(socket: WebSocket) -> None:
            await socket.accept()
            if end == "client":
                assert await socket.receive_text() == "before it left"
                with pytest.raises(WebSocketDisconnect):
                    await socket.receive_text()
            elif end == "server":
                await socket.close(4002, "so long")
            else:
                drive.error = OSError() if end == "OSError" else RuntimeError()
                with pytest.raises(WebSocketDisconnect, match="1006"):
                    await socket.send_text("late")
                assert await socket.receive_text() == "before it left"
            drive.error = AssertionError("the server was asked")
            calls = [getattr(socket, name)() for name in [*RECEIVERS, "receive"]]
            calls += [getattr(socket, name)(data) for name, data in SENDERS]
            calls.append(socket.send({"type": "websocket.send", "text": "x"}))
            for call in calls:
                with pytest.raises(WebSocketDisconnect) as caught:
                    await call
                assert (caught.value.code, caught.value.reason) == (code, reason)
            checked.append(end)

        checked: list[str] = []
        drive = Drive(text("before it left"), GONE)
        drive.run(view)
        assert checked == [end]

    @pytest.mark.parametrize(
        "method, data",
        [
            ("send_text", b"bytes"),
            ("send_text", 5),
            ("send_text", None),
            ("send_bytes", "text"),
            ("send_bytes", 5),
            ("send_bytes", [1, 2]),
            ("send_json", {1, 2}),
            ("send_json", object()),
        ],
    )
    def test_a_wrong_type_is_a_type_error(self, method: str, data: Any) -> None:
        async def view(socket: WebSocket) -> None:
            await socket.accept()
            with pytest.raises(TypeError):
                await getattr(socket, method)(data)
            await socket.send_text("still here")

        assert [event.get("text") for event in Drive().run(view)[1:2]] == ["still here"]

    @pytest.mark.parametrize("data", [b"ab", bytearray(b"ab"), memoryview(b"ab")])
    def test_send_bytes_takes_what_is_bytes_like(self, data: Any) -> None:
        async def view(socket: WebSocket) -> None:
            await socket.accept()
            await socket.send_bytes(data)

        sent = Drive().run(view)[1]
        assert sent == {"type": "websocket.send", "bytes": b"ab"}
        assert type(sent["bytes"]) is bytes

    @pytest.mark.parametrize("none", [{}, {"bytes": None}])
    def test_a_server_may_leave_out_the_other_key_or_send_none(self, none: Any) -> None:
        async def view(socket: WebSocket) -> None:
            await socket.accept()
            assert await socket.receive_text() == ""
            assert await socket.receive_json() == 0
            assert await anext(socket.__aiter__()) == ""

        zero, empty = {**text("0"), **none}, {**text(""), **none}
        assert Drive(empty, zero, empty).run(view)[1:] == [NORMAL]

    def test_empty_messages_are_messages(self) -> None:
        async def view(socket: WebSocket) -> None:
            await socket.accept()
            assert await socket.receive_bytes() == b""
            assert [message async for message in socket] == ["", b""]

        assert len(Drive(binary(b""), text(""), binary(b""), GONE).run(view)) == 1

    def test_iterating_goes_on_until_the_client_is_gone(self) -> None:
        got: list[Any] = []

        async def view(socket: WebSocket) -> None:
            await socket.accept()
            async for message in socket.iter_text():
                got.append(message)
                if len(got) == 2:
                    break
            async for data in socket.iter_bytes():
                got.append(data)
                if len(got) == 4:
                    break
            async for value in socket.iter_json():
                got.append(value)
                if len(got) == 6:
                    break
            async for either in socket:
                got.append(either)
            for leftover in (socket.iter_text, socket.iter_bytes, socket.iter_json):
                assert [message async for message in leftover()] == []

        drive = Drive(
            *(text("a"), text("b"), binary(b"c"), binary(b"d")),
            *(text("[1]"), binary(b"2"), text("e"), binary(b"f"), GONE),
        )
        drive.run(view)
        assert got == ["a", "b", b"c", b"d", [1], 2, "e", b"f"]

    @pytest.mark.parametrize(
        "method, event, code",
        [
            ("receive_text", binary(b"x"), 1003),
            ("receive_bytes", text("x"), 1003),
            ("receive_json", text("{"), 1007),
            ("receive_json", text(""), 1007),
            ("receive_json", text("NaN"), 1007),
            ("receive_json", text("[-Infinity]"), 1007),
            ("receive_json", text("1e999"), 1007),
            ("receive_json", binary(b'"\xff"'), 1007),
            ("receive_json", binary('"a"'.encode("utf-16")), 1007),
            ("receive_json", text("[" * 200_000), 1007),
            ("receive_json", binary(b'{"a":' * 200_000), 1007),
            ("receive_json", text("9" * 10_000), 1007),
        ],
    )
    def test_a_bad_message_is_named_and_the_socket_stays_usable(
        self, method: str, event: Any, code: int
    ) -> None:
        async def view(socket: WebSocket) -> None:
            await socket.accept()
            with pytest.raises(InvalidMessage) as caught:
                await getattr(socket, method)()
            assert caught.value.code == code
            assert await socket.receive_text() == "next"

        assert Drive(event, text("next")).run(view)[1:] == [NORMAL]

    @pytest.mark.parametrize("size, code", [(100, 1000), (101, 1009)])
    def test_json_has_an_upper_limit(self, size: int, code: int) -> None:
        async def view(socket: WebSocket) -> None:
            await socket.accept()
            await socket.receive_json()

        brackets = text("[" * (size // 2) + "1" * (size % 2) + "]" * (size // 2))
        sent = Drive(brackets).run(view, DATA_UPLOAD_MAX_MEMORY_SIZE=100)
        assert sent[-1]["code"] == code
        assert Drive(brackets).run(view, DATA_UPLOAD_MAX_MEMORY_SIZE=None)[-1] == NORMAL
        clef = text(
            '"' + "𝄞" * (size // 4 - 1) + "x" * (size - 4 * (size // 4) + 2) + '"'
        )
        sent = Drive(clef).run(view, DATA_UPLOAD_MAX_MEMORY_SIZE=100)
        assert sent[-1]["code"] == code  # the limit is in bytes

    @pytest.mark.parametrize(
        "method, message, code, reason",
        [
            ("receive_text", b"x", 1003, "expected text, got bytes"),
            ("receive_bytes", "x", 1003, "expected bytes, got text"),
            ("receive_json", "x", 1007, "expected JSON"),
            ("receive_json", "[" * 200_000, 1007, "expected JSON"),
            ("receive_json", b"\xff", 1007, "expected JSON"),
        ],
    )
    def test_uncaught_it_closes_with_its_code_and_no_log(
        self,
        ws: str,
        caplog: pytest.LogCaptureFixture,
        method: str,
        message: Any,
        code: int,
        reason: str,
    ) -> None:
        async def view(socket: WebSocket) -> None:
            await socket.accept()
            await getattr(socket, method)()

        with serve(view, ws=ws) as server, server.dial() as client:
            client.send(message)
            with pytest.raises(ConnectionClosed) as caught:
                client.recv(10)
        assert caught.value.rcvd is not None
        assert (caught.value.rcvd.code, caught.value.rcvd.reason) == (code, reason)
        assert quiet(caplog)

    @pytest.mark.parametrize(
        "data, expected",
        [
            ({"a": [1, None, True]}, '{"a":[1,null,true]}'),
            ("déjà vu 🙂", '"déjà vu 🙂"'),
            (datetime.date(2026, 1, 2), '"2026-01-02"'),
            (
                datetime.datetime(2026, 1, 2, 3, 4, tzinfo=datetime.UTC),
                '"2026-01-02T03:04:00Z"',
            ),
            (datetime.timedelta(days=1), '"P1DT00H00M00S"'),
            (decimal.Decimal("1.10"), '"1.10"'),
            (uuid.UUID(int=5), '"00000000-0000-0000-0000-000000000005"'),
            (gettext_lazy("Monday"), '"Monday"'),
            ("\ud800é", '"\\ud800é"'),
        ],
    )
    def test_send_json_writes_as_django_does(self, data: Any, expected: str) -> None:
        async def view(socket: WebSocket) -> None:
            await socket.accept()
            await socket.send_json(data)
            await socket.send_json(data, binary=True)

        accept, as_text, as_bytes, close = Drive().run(view)
        assert as_text == {"type": "websocket.send", "text": expected}
        assert as_bytes == {"type": "websocket.send", "bytes": expected.encode()}

    @pytest.mark.parametrize("data", [float("nan"), [float("inf")], {"a": -1e999}])
    def test_what_json_cannot_carry_is_a_value_error(self, data: Any) -> None:
        async def view(socket: WebSocket) -> None:
            await socket.accept()
            with pytest.raises(ValueError):
                await socket.send_json(data)
            assert socket.connected

        assert Drive().run(view)[1:] == [NORMAL]

    @pytest.mark.parametrize(
        "message",
        ['"\\ud800"', '{"\\udfff":1.5e300}', "9" * 4300, '"é\\u0000"', "[[],{}]"],
    )
    def test_send_json_can_send_what_receive_json_gave(
        self, ws: str, message: str
    ) -> None:
        async def view(socket: WebSocket) -> None:
            await socket.accept()
            async for value in socket.iter_json():
                await socket.send_json(value)
                await socket.send_json(value, binary=True)

        with serve(view, ws=ws) as server, server.dial() as client:
            client.send(message)
            assert json.loads(client.recv(10)) == json.loads(message)
            assert json.loads(client.recv(10)) == json.loads(message)

    def test_every_kind_crosses_the_wire(
        self, ws: str, caplog: pytest.LogCaptureFixture
    ) -> None:
        with serve(echo, ws=ws) as server, server.dial(max_size=None) as client:
            for message in ("", "déjà 🙂", b"", b"\x00\xff", "x" * 2**20, b"y" * 2**20):
                client.send(message)
                assert client.recv(10) == message
        assert quiet(caplog)


# URLs


async def accepting(socket: WebSocket, *args: Any, **kwargs: Any) -> None:
    await socket.accept()
    await socket.send_json([args, kwargs])


class Accepting(View):
    greeting = "hello"

    async def get(self, socket: WebSocket, **kwargs: Any) -> None:
        await socket.accept()
        await socket.send_json([self.greeting, kwargs])


class Synchronous(View):
    def get(self, socket: WebSocket) -> None:
        raise AssertionError


class AsyncCallable:
    async def __call__(self, socket: WebSocket) -> None:
        await socket.accept()
        await socket.send_json("object")


def passing(view: Any) -> Any:
    """A decorator that knows nothing of async."""

    @functools.wraps(view)
    def wrapper(request: Any, *args: Any, **kwargs: Any) -> Any:
        return view(request, *args, **kwargs)

    return wrapper


def first_message(pattern: Any, path: str, **overrides: Any) -> Any:
    drive = Drive(path=path)
    drive.run(None, ROOT_URLCONF=urlconf(pattern), **overrides)
    assert drive.types == ["websocket.accept", "websocket.send", "websocket.close"]
    return json.loads(drive.sent[1]["text"])


class TestRoutes:
    def test_websocket_takes_converters_arguments_and_a_name(self) -> None:
        pattern = websocket("<int:pk>/<slug:s>/", accepting, {"extra": 1}, name="room")
        assert first_message(pattern, "/5/a-b/") == [
            [],
            {"pk": 5, "s": "a-b", "extra": 1},
        ]
        with override_settings(ROOT_URLCONF=urlconf(pattern)):
            assert reverse("room", args=[7, "x"]) == "/7/x/"
        assert pattern.name == "room"

    def test_re_websocket_takes_a_regular_expression(self) -> None:
        pattern = re_websocket(r"^(?P<year>[0-9]{4})/$", accepting, name="year")
        assert first_message(pattern, "/2026/") == [[], {"year": "2026"}]
        pattern = re_websocket(r"^([0-9]{4})/$", accepting, {"extra": 1})
        assert first_message(pattern, "/2026/") == [["2026"], {"extra": 1}]

    def test_include_and_namespaces(self) -> None:
        inner = ([websocket("room/", accepting, name="room")], "chat")
        pattern = path("in/<int:pk>/", include(inner, namespace="talk"))
        assert first_message(pattern, "/in/3/room/") == [[], {"pk": 3}]
        with override_settings(ROOT_URLCONF=urlconf(pattern)):
            assert reverse("talk:room", args=[3]) == "/in/3/room/"

    def test_i18n_patterns(self) -> None:
        from django.conf.urls.i18n import i18n_patterns

        async def view(socket: WebSocket) -> None:
            await socket.accept()
            await socket.send_json(get_language())

        [pattern] = i18n_patterns(websocket(gettext_lazy("ws/"), view))
        locale = ["django.middleware.locale.LocaleMiddleware"]
        assert first_message(pattern, "/de/ws/", MIDDLEWARE=locale) == "de"

    @pytest.mark.parametrize(
        "view, expected",
        [
            (accepting, [[], {}]),
            (functools.partial(accepting, room="x"), [[], {"room": "x"}]),
            (passing(accepting), [[], {}]),
            (functools.partial(passing(accepting), a=1), [[], {"a": 1}]),
            (AsyncCallable(), "object"),
            (functools.partial(AsyncCallable()), "object"),
            (passing(functools.partial(AsyncCallable())), "object"),
            (AsyncCallable().__call__, "object"),
            (Accepting.as_view(), ["hello", {}]),
            (Accepting.as_view(greeting="hi"), ["hi", {}]),
            (passing(Accepting.as_view()), ["hello", {}]),
        ],
    )
    @pytest.mark.parametrize("route", [websocket, re_websocket])
    def test_every_kind_of_view(self, route: Any, view: Any, expected: Any) -> None:
        assert first_message(route("ws/", view), "/ws/") == expected

    def test_a_decorator_may_return_any_awaitable(self) -> None:
        class Lazy:
            def __init__(self, socket: WebSocket) -> None:
                self.socket = socket

            def __await__(self) -> Any:
                return accepting(self.socket).__await__()

        @functools.wraps(accepting)
        def view(socket: WebSocket) -> Lazy:
            return Lazy(socket)

        assert first_message(websocket("ws/", view), "/ws/") == [[], {}]

    @pytest.mark.parametrize(
        "view",
        [
            lambda socket: None,
            functools.partial(lambda socket: None),
            Accepting,
            AsyncCallable,
            Synchronous.as_view(),
            object(),
            "views.chat",
            include([]),
        ],
    )
    @pytest.mark.parametrize("route", [websocket, re_websocket])
    def test_a_view_that_is_not_async_is_refused(self, route: Any, view: Any) -> None:
        with pytest.raises(TypeError, match="write 'async def'"):
            route("ws/", view)

    def test_the_error_names_the_view(self) -> None:
        def chat(socket: WebSocket) -> None:
            raise AssertionError

        with pytest.raises(TypeError, match="chat"):
            websocket("ws/", chat)

    def test_any_name_of_an_argument(self) -> None:
        async def view(socket: WebSocket, request: str, view: str) -> None:
            await socket.accept()
            await socket.send_json([request, view])

        assert first_message(websocket("<request>/<view>/", view), "/a/b/") == [
            "a",
            "b",
        ]

    def test_a_class_without_get_is_a_405(self) -> None:
        class Posting(View):
            async def post(self, request: Any) -> HttpResponse:
                raise AssertionError

        drive = Drive()
        drive.run(Posting.as_view())
        assert drive.status == 405

    def test_the_marker_of_an_async_view_is_not_copied(self) -> None:
        from asgiref.sync import iscoroutinefunction

        view = Accepting.as_view()
        assert iscoroutinefunction(view)
        callback: Any = websocket("ws/", view).callback
        assert not iscoroutinefunction(callback)
        assert callback.view_class is Accepting

    def test_the_route_shows_the_name_of_the_view(self) -> None:
        assert websocket("ws/", accepting).callback.__name__ == "accepting"


# ASGI: the handshake


def seen(client: ClientConnection) -> Any:
    return json.loads(client.recv(10))


@pytest.fixture
def user(database: None) -> Iterator[Any]:
    from django.contrib.auth.models import User

    user = User.objects.create_user("ann", password="pass")
    yield user
    user.delete()


def cookies(user: Any) -> dict[str, str]:
    client = Client()
    client.force_login(user)
    return {"Cookie": f"sessionid={client.cookies['sessionid'].value}"}


# Any, since django-stubs' decorators want views that take an HttpRequest.
async def whoami(socket: Any) -> Any:
    user = await socket.auser()
    await socket.accept()
    await socket.send_json(str(user))


def tagging(get_response: Any) -> Any:
    def middleware(request: HttpRequest) -> Any:
        request.tag = threading.current_thread().name  # type: ignore[attr-defined]
        response = get_response(request)
        response["X-Tag"] = "tagged"
        response["Content-Length"] = str(len(response.content))
        response.set_cookie("flavour", "oat", httponly=True)
        response.set_cookie("size", "small")
        return response

    return middleware


@async_only_middleware
def async_only(get_response: Any) -> Any:
    async def middleware(request: HttpRequest) -> Any:
        request.asynchronous = True  # type: ignore[attr-defined]
        await asyncio.sleep(0)
        response = await get_response(request)
        response["X-Async"] = "yes"
        return response

    return middleware


@sync_and_async_middleware
def both_ways(get_response: Any) -> Any:
    from asgiref.sync import iscoroutinefunction

    def middleware(request: HttpRequest) -> Any:
        setattr(request, "synchronous", not iscoroutinefunction(get_response))
        return get_response(request)

    return middleware


def replacing(get_response: Any) -> Any:
    def middleware(request: HttpRequest) -> Any:
        request = copy.copy(request)
        setattr(request, "tenant", "blue")
        return get_response(request)

    return middleware


def tenants(get_response: Any) -> Any:
    def middleware(request: HttpRequest) -> Any:
        from django.db import connection

        connection.ensure_connection()
        setattr(connection, "tenant", request.GET["tenant"])
        return get_response(request)

    return middleware


def teapot(get_response: Any) -> Any:
    return lambda request: HttpResponse("short and stout", status=418)


def other_urls(get_response: Any) -> Any:
    def middleware(request: HttpRequest) -> Any:
        urls: Any = urlconf(websocket("other/", where, name="here"))
        request.urlconf = urls
        return get_response(request)

    return middleware


async def where(socket: WebSocket) -> None:
    await socket.accept()
    await socket.send_json([socket.path, reverse("here")])


class Rescue:
    def __init__(self, get_response: Any) -> None:
        self.get_response = get_response

    def __call__(self, request: HttpRequest) -> Any:
        return self.get_response(request)

    def process_exception(self, request: HttpRequest, error: Exception) -> Any:
        if isinstance(error, LookupError):
            return HttpResponse("rescued", status=409)
        return None


def unavailable(get_response: Any) -> Any:
    def middleware(request: HttpRequest) -> Any:
        response = get_response(request)
        response.status_code = 503
        return response

    return middleware


class TestHandshake:
    def test_the_session_user_is_there(self, ws: str, user: Any) -> None:
        with serve(whoami, ws=ws, MIDDLEWARE=SESSIONS) as server:
            with server.dial(additional_headers=cookies(user)) as client:
                assert seen(client) == "ann"
            with server.dial() as client:
                assert seen(client) == "AnonymousUser"
            forged = {"Cookie": "sessionid=forged"}
            with server.dial(additional_headers=forged) as client:
                assert seen(client) == "AnonymousUser"

    def test_login_required(self, ws: str, user: Any) -> None:
        from django.contrib.auth.decorators import login_required

        view = login_required(whoami)
        with serve(view, ws=ws, MIDDLEWARE=SESSIONS, LOGIN_URL="/in/") as server:
            response = server.handshake("/ws/?a=1")
            assert response.status == 302
            assert response.headers["Location"] == "/in/?next=/ws/%3Fa%3D1"
            with server.dial(additional_headers=cookies(user)) as client:
                assert seen(client) == "ann"

    def test_login_required_on_a_class(self, user: Any) -> None:
        from django.contrib.auth.decorators import login_required
        from django.contrib.auth.mixins import LoginRequiredMixin

        class Mixed(LoginRequiredMixin, Accepting):
            pass

        @method_decorator(login_required, name="dispatch")
        class Decorated(Accepting):
            pass

        for view in (Mixed.as_view(), Decorated.as_view()):
            with serve(view, MIDDLEWARE=SESSIONS, LOGIN_URL="/in/") as server:
                assert server.handshake().status == 302
                with server.dial(additional_headers=cookies(user)) as client:
                    assert seen(client) == ["hello", {}]

    def test_permission_required(self, ws: str, user: Any) -> None:
        from django.contrib.auth.decorators import permission_required
        from django.contrib.auth.models import Permission

        view = permission_required("auth.add_user", raise_exception=True)(whoami)
        with serve(view, ws=ws, MIDDLEWARE=SESSIONS) as server:
            assert server.handshake().status == 403
            headers = cookies(user)
            assert server.handshake(**headers).status == 403
            user.user_permissions.add(Permission.objects.get(codename="add_user"))
            with server.dial(additional_headers=headers) as client:
                assert seen(client) == "ann"

    def test_login_required_middleware_and_its_way_out(
        self, ws: str, user: Any
    ) -> None:
        from django.contrib.auth.decorators import login_not_required, login_required

        @login_not_required
        async def public(socket: Any) -> Any:
            await accepting(socket)

        middleware = "django.contrib.auth.middleware.LoginRequiredMiddleware"
        patterns = [
            websocket("ws/", whoami),
            websocket("public/", public),
            websocket("own/", login_required(whoami, login_url="/own-login/")),
        ]
        options: Any = {"MIDDLEWARE": [*SESSIONS, middleware], "LOGIN_URL": "/in/"}
        with serve(*patterns, ws=ws, **options) as server:
            assert server.handshake().headers["Location"] == "/in/?next=/ws/"
            location = server.handshake("/own/").headers["Location"]
            assert location == "/own-login/?next=/own/"
            with server.dial("/public/") as client:
                assert seen(client) == [[], {}]
            with server.dial(additional_headers=cookies(user)) as client:
                assert seen(client) == "ann"

    def test_the_language_is_active_in_the_view(self, ws: str) -> None:
        async def view(socket: WebSocket) -> None:
            await socket.accept()
            await socket.send_json([get_language(), gettext_lazy("Monday")])

        locale = ["django.middleware.locale.LocaleMiddleware"]
        with serve(view, ws=ws, MIDDLEWARE=locale) as server:
            for code, day in [("de", "Montag"), ("fr", "lundi"), ("en", "Monday")]:
                headers = {"Accept-Language": code}
                with server.dial(additional_headers=headers) as client:
                    assert seen(client) == [code, day]

    def test_append_slash_redirects(self, ws: str) -> None:
        with serve(echo, ws=ws, MIDDLEWARE=[COMMON]) as server:
            response = server.handshake("/ws")
            assert response.status == 301
            assert response.headers["Location"] == "/ws/"

    @pytest.mark.parametrize(
        "scheme, forwarded, status",
        [
            ("ws", None, 301),
            ("wss", None, 101),
            ("ws", b"https", 101),
            ("wss", b"http", 301),
        ],
    )
    def test_secure_ssl_redirect(
        self, scheme: str, forwarded: bytes | None, status: int
    ) -> None:
        headers = [(b"host", b"testserver")]
        if forwarded:
            headers.append((b"x-forwarded-proto", forwarded))
        drive = Drive(scheme=scheme, headers=headers)
        drive.run(
            accepting,
            MIDDLEWARE=["django.middleware.security.SecurityMiddleware"],
            SECURE_SSL_REDIRECT=True,
            SECURE_PROXY_SSL_HEADER=(
                ("HTTP_X_FORWARDED_PROTO", "https") if forwarded else None
            ),
        )
        if status == 101:
            assert drive.types[0] == "websocket.accept"
        else:
            assert drive.status == status
            location = dict(drive.sent[0]["headers"])[b"location"]
            assert location == b"https://testserver/ws/"

    def test_secure_ssl_redirect_on_the_wire(self, ws: str) -> None:
        options: Any = {
            "MIDDLEWARE": ["django.middleware.security.SecurityMiddleware"],
            "SECURE_SSL_REDIRECT": True,
            "SECURE_PROXY_SSL_HEADER": ("HTTP_X_FORWARDED_PROTO", "https"),
        }
        # uvicorn itself takes X-Forwarded-Proto from 127.0.0.1: here Django shall.
        with serve(accepting, ws=ws, proxy_headers=False, **options) as server:
            assert server.handshake().status == 301
            secure: Any = {
                "additional_headers": {"X-Forwarded-Proto": "https"},
                "origin": f"https://127.0.0.1:{server.port}",
            }
            with server.dial(**secure) as client:
                assert seen(client) == [[], {}]

    def test_cookies_and_headers_of_the_middleware_travel_along(self, ws: str) -> None:
        async def view(socket: WebSocket) -> None:
            if socket.GET.get("deny"):
                raise PermissionDenied
            await socket.accept(headers={"Set-Cookie": "own=1"})

        with serve(view, ws=ws, MIDDLEWARE=[f"{__name__}.tagging"]) as server:
            with server.dial() as client:
                assert client.response is not None
                headers = client.response.headers
            assert headers["X-Tag"] == "tagged"
            assert headers.get_all("Set-Cookie") == [
                "flavour=oat; HttpOnly; Path=/",
                "size=small; Path=/",
                "own=1",
            ]
            assert "Content-Type" not in headers
            assert "Content-Length" not in headers
            # The middleware refuses nothing here: the URLconf and the view do.
            for path_ in ("/nowhere/", "/ws/?deny=1"):
                headers = server.handshake(path_).headers
                assert headers["X-Tag"] == "tagged"
                assert len(headers.get_all("Set-Cookie")) == 2
                assert headers["Content-Type"].startswith("text/html")

    def test_the_chain_runs_in_one_hop_to_a_thread(self) -> None:
        names = []

        async def view(socket: WebSocket) -> None:
            names.append(socket.tag)
            await socket.accept()

        Drive().run(view, MIDDLEWARE=[f"{__name__}.tagging"])
        assert names and names != [threading.main_thread().name]

    def test_async_only_middleware(self, ws: str) -> None:
        async def view(socket: WebSocket) -> None:
            await socket.accept()
            await socket.send_json([socket.asynchronous, socket.synchronous])

        middleware = [f"{__name__}.{name}" for name in ("async_only", "both_ways")]
        with serve(view, ws=ws, MIDDLEWARE=middleware) as server:
            with server.dial() as client:
                assert seen(client) == [True, True]
                assert client.response is not None
                assert client.response.headers["X-Async"] == "yes"

    def test_a_middleware_that_answers_itself(self, ws: str) -> None:
        with serve(accepting, ws=ws, MIDDLEWARE=[f"{__name__}.teapot"]) as server:
            response = server.handshake()
            assert response.status == 418
            assert response.body == b"short and stout"

    def test_a_middleware_that_sets_the_status_refuses(self) -> None:
        async def view(socket: WebSocket) -> None:
            ran.append(socket)

        ran: list[Any] = []
        drive = Drive()
        drive.run(view, MIDDLEWARE=[f"{__name__}.unavailable"])
        assert drive.status == 503 and not ran

    def test_a_middleware_that_sets_the_urlconf(self, ws: str) -> None:
        with serve(accepting, ws=ws, MIDDLEWARE=[f"{__name__}.other_urls"]) as server:
            assert server.handshake("/ws/").status == 404
            with server.dial("/other/") as client:
                assert seen(client) == ["/other/", "/other/"]

    def test_atomic_requests(self, ws: str, user: Any) -> None:
        from django.db import connections

        connections.settings["default"]["ATOMIC_REQUESTS"] = True
        try:
            with serve(whoami, ws=ws, MIDDLEWARE=SESSIONS) as server:
                with server.dial(additional_headers=cookies(user)) as client:
                    assert seen(client) == "ann"
        finally:
            connections.settings["default"]["ATOMIC_REQUESTS"] = False

    def test_force_script_name(self, ws: str) -> None:
        pattern = websocket("ws/", where, name="here")
        with serve(pattern, ws=ws, FORCE_SCRIPT_NAME="/app") as server:
            with server.dial("/app/ws/") as client:
                assert seen(client) == ["/app/ws/", "/app/ws/"]

    def test_root_path(self, ws: str) -> None:
        pattern = websocket("ws/", where, name="here")
        with serve(pattern, ws=ws, root_path="/app") as server:
            with server.dial("/ws/") as client:  # as a proxy that strips /app does
                assert seen(client) == ["/app/ws/", "/app/ws/"]

    def test_an_unknown_route_is_a_404(self, ws: str) -> None:
        with serve(accepting, ws=ws) as server:
            assert server.handshake("/nowhere/").status == 404

    def test_an_http_route_is_a_404_and_its_view_never_runs(
        self, ws: str, caplog: pytest.LogCaptureFixture
    ) -> None:
        ran = []

        def view(request: HttpRequest) -> HttpResponse:
            ran.append(request.path)
            return HttpResponse("page")

        with serve(path("page/", view), ws=ws) as server:
            assert server.handshake("/page/").status == 404
            assert "/page/ is no WebSocket: route it with websocket()" in caplog.text
            assert not ran
            assert server.get("/page/").body == b"page"
            assert ran == ["/page/"]

    def test_the_socket_has_the_request_that_the_middleware_handed_on(self) -> None:
        async def view(socket: WebSocket) -> None:
            await socket.accept()
            await socket.send_json(socket.tenant)

        pattern = websocket("ws/", view)
        middleware = [f"{__name__}.replacing"]
        assert first_message(pattern, "/ws/", MIDDLEWARE=middleware) == "blue"

    def test_a_query_string_that_is_no_utf8_is_a_400(self) -> None:
        drive = Drive(query_string=b"a=\xff")
        drive.run(accepting)
        assert drive.status == 400

    def test_the_signals_of_a_request(self) -> None:
        got: list[str] = []

        def started(sender: Any, **kwargs: Any) -> None:
            assert issubclass(sender, django_ws.WebSocketHandler)
            assert kwargs["scope"]["type"] == "websocket"
            got.append("started")

        def finished(sender: Any, **kwargs: Any) -> None:
            assert issubclass(sender, django_ws.WebSocketHandler)
            got.append("finished")

        async def view(socket: WebSocket) -> None:
            got.append("view")
            await socket.accept()

        signals.request_started.connect(started)
        signals.request_finished.connect(finished)
        try:
            Drive().run(view)
            assert got == ["started", "finished", "view"]
            got.clear()
            Drive(path="/nowhere/").run(view)
            assert got == ["started", "finished"]
            got.clear()
            Drive(query_string=b"\xff").run(view)
            assert got == ["started", "finished"]
            got.clear()
            Drive().run(closing)
            assert got == ["started", "finished"]  # those of the handshake
        finally:
            signals.request_started.disconnect(started)
            signals.request_finished.disconnect(finished)

    def test_a_connection_that_ends_before_it_begins(self) -> None:
        drive = Drive()
        drive.events = [GONE]
        assert drive.run(accepting) == []


class TestPlainHttp:
    def test_it_is_426_under_asgi(
        self, ws: str, caplog: pytest.LogCaptureFixture
    ) -> None:
        with serve(accepting, ws=ws) as server:
            response = server.get("/ws/")
        assert response.status == 426
        assert response.headers["Upgrade"] == "websocket"
        assert response.headers["Connection"] == "Upgrade"
        assert "lacks WebSocket support" not in caplog.text

    def test_it_has_no_hop_by_hop_headers_in_http_2(self) -> None:
        from django.test import AsyncRequestFactory

        request = AsyncRequestFactory(http_version="2").get("/ws/")
        response: Any = websocket("ws/", accepting).callback(request)
        assert response.status_code == 426
        assert not {"Upgrade", "Connection"} & set(response.headers)

    def test_it_has_no_hop_by_hop_headers_under_wsgi(self) -> None:
        from wsgiref.simple_server import WSGIRequestHandler, make_server
        from wsgiref.validate import validator

        from django.core.wsgi import get_wsgi_application

        class Handler(WSGIRequestHandler):
            def log_message(self, format: str, *args: Any) -> None:
                pass

        with override_settings(ROOT_URLCONF=urlconf(websocket("ws/", accepting))):
            application = validator(get_wsgi_application())
            server = make_server("127.0.0.1", 0, application, handler_class=Handler)
            thread = threading.Thread(target=server.handle_request)
            thread.start()
            connection = http.client.HTTPConnection("127.0.0.1", server.server_port)
            connection.request("GET", "/ws/")
            response = connection.getresponse()
            thread.join()
            server.server_close()
            connection.close()
        # wsgiref's server fails an assertion, a 500, on hop-by-hop headers.
        assert response.status == 426
        assert "Upgrade" not in response.headers

    def test_other_upgrades_are_no_handshake(self, caplog: Any) -> None:
        with serve(accepting, ws="none") as server:
            headers = {"Connection": "Upgrade", "Upgrade": "h2c"}
            assert server.get("/ws/", **headers).status == 426
        assert "lacks WebSocket support" not in caplog.text

    @pytest.mark.parametrize(
        "headers",
        [
            {"Connection": "Upgrade", "Upgrade": "websocket"},
            {"Sec-WebSocket-Key": "dGhlIHNhbXBsZSBub25jZQ=="},  # nginx dropped Upgrade
        ],
    )
    def test_a_handshake_that_arrives_as_http_is_a_warning_that_helps(
        self, headers: Any, caplog: pytest.LogCaptureFixture
    ) -> None:
        with serve(accepting, ws="none") as server:
            response = server.get("/ws/", **headers)
        assert response.status == 426
        [record] = [r for r in caplog.records if r.name == "django.request"]
        assert record.levelno == logging.WARNING
        assert "lacks WebSocket support" in record.getMessage()
        assert "uvicorn[standard]" in record.getMessage()
        assert "ASGI server" in record.getMessage()
        assert record.status_code == 426  # type: ignore[attr-defined]


# ASGI: origins

TRUSTED: dict[str, Any] = {"CSRF_TRUSTED_ORIGINS": ["https://app.org"]}
WILDCARD: dict[str, Any] = {"CSRF_TRUSTED_ORIGINS": ["https://*.app.org"]}
LOCAL: dict[str, Any] = {"ALLOWED_HOSTS": [], "DEBUG": True}
ANY: dict[str, Any] = {"ALLOWED_HOSTS": ["*"]}
CHECKED: dict[str, Any] = {"MIDDLEWARE": [COMMON]}

#: The Origin, the Host, settings, and the status of the answer.
ORIGINS: list[tuple[str | None, str, dict[str, Any], int]] = [
    # This site, and clients that are no browsers.
    ("http://example.com", "example.com", {}, 101),
    ("http://example.com:8000", "example.com:8000", {}, 101),
    ("http://127.0.0.1", "127.0.0.1", {}, 101),
    ("http://[::1]:8000", "[::1]:8000", {}, 101),
    ("http://chat.example.com", "chat.example.com", {}, 101),
    (None, "example.com", {}, 101),
    # Other ports, schemes and hosts.
    ("http://example.com:8001", "example.com:8000", {}, 403),
    ("http://example.com", "example.com:8000", {}, 403),
    ("http://example.com:80", "example.com", {}, 403),
    ("https://example.com", "example.com", {}, 403),
    ("ws://example.com", "example.com", {}, 403),
    ("http://evil.org", "example.com", {}, 403),
    ("http://chat.example.com", "example.com", {}, 403),
    ("http://example.com.evil.org", "example.com", {}, 403),
    ("http://evilexample.com", "example.com", {}, 403),
    ("http://example.co", "example.com", {}, 403),
    ("http://example.com@evil.org", "example.com", {}, 403),
    ("http://evil.org/http://example.com", "example.com", {}, 403),
    ("http://example.com/", "example.com", {}, 403),
    ("http://[::2]:8000", "[::1]:8000", {}, 403),
    # What is no origin.
    ("null", "example.com", {}, 403),
    ("", "example.com", {}, 403),
    ("example.com", "example.com", {}, 403),
    ("http://", "example.com", {}, 403),
    ("http://[", "example.com", {}, 403),
    ("http://[::1", "[::1]", {}, 403),
    ("http://example.com, http://evil.org", "example.com", {}, 403),
    ("*", "example.com", {}, 403),
    ("file://", "example.com", {}, 403),
    # Browsers write schemes and hosts in lower case; Django compares as is.
    ("HTTP://EXAMPLE.COM", "example.com", {}, 403),
    # CSRF_TRUSTED_ORIGINS.
    ("https://app.org", "example.com", TRUSTED, 101),
    ("http://app.org", "example.com", TRUSTED, 403),
    ("https://a.app.org", "example.com", TRUSTED, 403),
    ("https://a.app.org", "example.com", WILDCARD, 101),
    ("https://a.b.app.org", "example.com", WILDCARD, 101),
    ("http://a.app.org", "example.com", WILDCARD, 403),
    ("https://evilapp.org", "example.com", WILDCARD, 403),
    ("https://a.app.org:8443", "example.com", WILDCARD, 403),
    ("null", "example.com", WILDCARD, 403),
    # The Host; a rebinding attempt names a foreign one in both.
    (None, "evil.org", {}, 400),
    (None, "evil.org", CHECKED, 400),
    ("http://evil.org", "evil.org", {}, 400),
    ("http://evil.org", "evil.org", CHECKED, 400),
    ("https://app.org", "evil.org", TRUSTED, 400),
    ("http://example.com", "example.com:bad", {}, 400),
    ("http://localhost", "localhost", LOCAL, 101),
    ("http://evil.org", "evil.org", LOCAL, 400),
    ("http://evil.org", "localhost", LOCAL, 403),
    ("http://any.org", "any.org", ANY, 101),
    ("http://evil.org", "any.org", ANY, 403),
]


class TestOrigins:
    @pytest.mark.parametrize("origin, host, overrides, status", ORIGINS)
    def test_the_table(
        self,
        origin: str | None,
        host: str,
        overrides: Any,
        status: int,
        caplog: pytest.LogCaptureFixture,
    ) -> None:
        headers = [(b"host", host.encode())]
        if origin is not None:
            headers.append((b"origin", origin.encode()))
        drive = Drive(headers=headers)
        drive.run(accepting, **overrides)
        if status == 101:
            assert drive.types[0] == "websocket.accept"
            assert quiet(caplog)
        else:
            assert drive.status == status
            assert "websocket.accept" not in drive.types
            offender = origin if status == 403 else host
            security = [
                record.getMessage()
                for record in caplog.records
                if record.name.startswith("django.security")
            ]
            assert any(str(offender) in message for message in security), security

    @pytest.mark.parametrize("origin, status", [("http://evil.org", 403), (None, 101)])
    def test_it_holds_on_the_wire(
        self, ws: str, origin: str | None, status: int
    ) -> None:
        with serve(accepting, ws=ws) as server:
            if status == 101:
                with server.dial(origin=None) as client:
                    assert seen(client) == [[], {}]
            else:
                response = server.handshake(Origin=str(origin))
                assert response.status == 403
                assert b"CSRF verification failed" in response.body
            assert server.handshake(Host="evil.org").status == 400
            rebinding = {"Host": "evil.org", "Origin": "http://evil.org"}
            assert server.handshake(**rebinding).status == 400

    def test_csrf_exempt_is_the_way_out_for_one_view(self) -> None:
        from django.views.decorators.csrf import csrf_exempt

        @method_decorator(csrf_exempt, name="dispatch")
        class Exempt(Accepting):
            pass

        evil = [(b"host", b"testserver"), (b"origin", b"http://evil.org")]
        for view in (
            csrf_exempt(accepting),
            csrf_exempt(Accepting.as_view()),
            Exempt.as_view(),
        ):
            drive = Drive(headers=evil)
            drive.run(view)
            assert drive.types[0] == "websocket.accept"
        foreign = [(b"host", b"evil.org"), (b"origin", b"http://evil.org")]
        drive = Drive(headers=foreign)
        drive.run(csrf_exempt(accepting))
        assert drive.status == 400

    def test_the_private_names_of_django_that_it_rests_on(self) -> None:
        from django.middleware.csrf import CsrfViewMiddleware

        assert callable(CsrfViewMiddleware._origin_verified)  # type: ignore
        assert callable(CsrfViewMiddleware._reject)  # type: ignore


# ASGI: refusals and errors


def template_response(request: HttpRequest) -> HttpResponse:
    from django.template import engines
    from django.template.response import TemplateResponse

    template = engines["django"].from_string("rendered {{ what }}")
    return TemplateResponse(request, template, {"what": "late"}, status=402)


def streaming(request: HttpRequest) -> StreamingHttpResponse:
    async def parts() -> AsyncIterator[str]:
        for number in range(3):
            await asyncio.sleep(0)
            yield f"part {number} "

    return StreamingHttpResponse(parts(), status=503)


def with_everything(request: HttpRequest) -> HttpResponse:
    response = JsonResponse({"detail": "no"}, status=401, headers={"X-Why": "because"})
    response.set_cookie("seen", "1")
    return response


def custom_403(request: HttpRequest, exception: Exception) -> HttpResponse:
    return HttpResponse(f"custom 403: {exception}", status=403)


def custom_404(request: HttpRequest, exception: Exception) -> HttpResponse:
    return HttpResponse(f"custom 404: {exception}", status=404)


def custom_500(request: HttpRequest) -> HttpResponse:
    return HttpResponse("custom 500", status=500)


def returning(response: Callable[[Any], Any]) -> Any:
    async def view(socket: WebSocket) -> Any:
        return response(socket)

    return view


def raising(error: BaseException, accept: bool = False) -> Any:
    async def view(socket: WebSocket) -> None:
        if accept:
            await socket.accept()
        raise error

    return view


async def closing(socket: WebSocket) -> None:
    await socket.close()


async def just_returning(socket: WebSocket) -> None:
    pass


HANDLERS: dict[str, Any] = {
    "handler403": custom_403,
    "handler404": custom_404,
    "handler500": custom_500,
}
TEMPLATES = [{"BACKEND": "django.template.backends.django.DjangoTemplates"}]


class TestBeforeAccept:
    @pytest.mark.parametrize(
        "view, status, body",
        [
            (returning(with_everything), 401, b'{"detail": "no"}'),
            (returning(streaming), 503, b"part 0 part 1 part 2 "),
            (returning(template_response), 402, b"rendered late"),
            (returning(lambda socket: HttpResponse(b"")), 200, b""),
            (raising(Http404("gone")), 404, b"custom 404: gone"),
            (raising(PermissionDenied("no")), 403, b"custom 403: no"),
            (raising(BadRequest("bad")), 400, b"Bad Request"),
            (raising(SuspiciousOperation("odd")), 400, b"Bad Request"),
            (raising(ValueError("bug")), 500, b"custom 500"),
            (raising(ExceptionGroup("g", [Http404("in")])), 404, b"custom 404: in"),
            (raising(LookupError()), 409, b"rescued"),
            (raising(WebSocketDisconnect()), 403, b"custom 403: "),
            (closing, 403, b"custom 403: "),
            (just_returning, 403, b"custom 403: "),
            (returning(lambda socket: "a string"), 500, b"custom 500"),
        ],
    )
    def test_it_becomes_the_http_answer(
        self, ws: str, view: Any, status: int, body: bytes
    ) -> None:
        options: Any = {"MIDDLEWARE": [f"{__name__}.Rescue"], "TEMPLATES": TEMPLATES}
        with serve(view, ws=ws, **HANDLERS, **options) as server:
            response = server.handshake()
        assert response.status == status
        assert body in response.body

    def test_it_passes_by_the_middleware_of_startproject(
        self, ws: str, caplog: pytest.LogCaptureFixture
    ) -> None:
        """CommonMiddleware puts a Content-Length on the handshake's empty response."""
        middleware = [
            "django.middleware.security.SecurityMiddleware",
            *SESSIONS[:1],
            "django.middleware.locale.LocaleMiddleware",
            COMMON,
            "django.middleware.csrf.CsrfViewMiddleware",
            *SESSIONS[1:],
            "django.middleware.clickjacking.XFrameOptionsMiddleware",
        ]

        def varying(socket: WebSocket) -> HttpResponse:
            return HttpResponse("a page", status=402, headers={"Vary": "X-Own"})

        with serve(returning(varying), ws=ws, MIDDLEWARE=middleware) as server:
            response = server.handshake()
        assert (response.status, response.body) == (402, b"a page")
        assert response.headers["X-Frame-Options"] == "DENY"
        assert response.headers["Vary"] == "X-Own, Accept-Language, Cookie"
        assert "LocalProtocolError" not in caplog.text

    def test_headers_and_cookies_go_out_too(self, ws: str) -> None:
        with serve(returning(with_everything), ws=ws) as server:
            headers = server.handshake().headers
        assert headers["X-Why"] == "because"
        assert headers["Set-Cookie"] == "seen=1; Path=/"
        assert headers["Content-Type"] == "application/json"

    @pytest.mark.parametrize(
        "error, status, text",
        [
            (Http404("gone"), 404, b"gone"),
            (ValueError("a bug"), 500, b"a bug"),
            (BadRequest("bad"), 400, b"bad"),
        ],
    )
    def test_debug_shows_djangos_page(
        self, error: Exception, status: int, text: bytes
    ) -> None:
        drive = Drive()
        drive.run(raising(error), DEBUG=True, TEMPLATES=TEMPLATES)
        assert drive.status == status
        assert text in drive.sent[1]["body"]
        assert b"DEBUG = True" in b"".join(event["body"] for event in drive.sent[1:])

    @pytest.mark.parametrize("extensions", [{}, None])
    def test_without_the_extension_the_server_makes_a_403(
        self, extensions: Any
    ) -> None:
        for view in (raising(Http404()), closing, just_returning):
            drive = Drive(extensions=extensions)
            assert drive.run(view) == [{"type": "websocket.close"}]

    def test_the_events_are_those_of_the_extension(self) -> None:
        drive = Drive()
        drive.run(returning(lambda socket: HttpResponse("x" * 100_000, status=403)))
        assert drive.types[0] == "websocket.http.response.start"
        [body] = drive.sent[1:]
        assert body["type"] == "websocket.http.response.body"
        assert body["body"] == b"x" * 100_000
        assert not body.get("more_body")

    def test_a_response_is_closed(self) -> None:
        closed = []

        def response(socket: WebSocket) -> HttpResponse:
            response = HttpResponse(status=403)
            response._resource_closers.append(  # type: ignore[attr-defined]
                lambda: closed.append("response")
            )
            return response

        Drive().run(returning(response))
        assert closed == ["response"]

    @pytest.mark.parametrize(
        "error, name, level",
        [
            (ValueError("a bug"), "django.request", logging.ERROR),
            (PermissionDenied("no"), "django.request", logging.WARNING),
            (Http404("no"), "django.request", logging.WARNING),
            (SuspiciousOperation("odd"), "django.security", logging.ERROR),
        ],
    )
    def test_it_is_logged_once_as_django_logs_it(
        self, error: Exception, name: str, level: int, caplog: Any
    ) -> None:
        Drive().run(raising(error))
        [record] = [r for r in caplog.records if r.name.startswith("django.")]
        assert (record.name.startswith(name), record.levelno) == (True, level)
        assert record.request.path == "/ws/"
        if isinstance(error, ValueError):
            assert record.exc_info[1] is error

    def test_a_refusal_without_an_exception_has_no_traceback(self, caplog: Any) -> None:
        for view in (closing, just_returning):
            Drive().run(view)
            [record] = [r for r in caplog.records if r.name == "django.request"]
            assert record.getMessage() == "Forbidden: /ws/"
            assert record.levelname == "WARNING" and not record.exc_info
            caplog.clear()

    def test_a_refusal_that_was_cancelled_is_made_up_for(self) -> None:
        async def view(socket: WebSocket) -> None:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(0):
                    await socket.close()

        drive = Drive()
        drive.run(view)
        assert drive.status == 403

    @pytest.mark.parametrize("view", [closing, just_returning])
    def test_a_view_that_forgot_accept_is_told_so(
        self, view: Any, caplog: pytest.LogCaptureFixture
    ) -> None:
        drive = Drive()
        drive.run(view)
        assert drive.status == 403
        told = "/ws/: refused, since the view returned without accept()" in caplog.text
        assert told == (view is just_returning)

    def test_a_refused_exception_leaves_no_reference_cycle(self) -> None:
        class Precious(Exception):
            pass

        async def view(socket: WebSocket) -> None:
            raise Precious

        gc.collect()
        gc.disable()
        try:
            logging.disable(logging.CRITICAL)
            Drive().run(view)
            # A thread lets go of its last call after it has told of its end.
            wait_for(lambda: Precious not in map(type, gc.get_objects()), 2)
        finally:
            logging.disable(logging.NOTSET)
            gc.enable()

    @pytest.mark.parametrize("error", [OSError(), RuntimeError("flow error")])
    def test_a_client_that_left_before_the_refusal(
        self, error: Exception, caplog: pytest.LogCaptureFixture
    ) -> None:
        class Left(Drive):
            async def send(self, event: dict[str, Any]) -> None:
                raise error

        Left().run(closing)
        assert [record.getMessage() for record in caplog.records] == ["Forbidden: /ws/"]

    def test_closing_again_after_a_refusal_does_nothing(self) -> None:
        async def view(socket: WebSocket) -> None:
            await socket.close()
            await socket.close()
            with pytest.raises(WebSocketDisconnect):
                await socket.accept()

        drive = Drive()
        drive.run(view)
        assert drive.status == 403
        assert len(drive.sent) == 2

    def test_an_error_of_the_synchronous_part_of_a_view(self) -> None:
        class Dispatching(Accepting):
            def dispatch(self, request: Any, *args: Any, **kwargs: Any) -> Any:
                raise Http404("dispatched")

        drive = Drive()
        drive.run(Dispatching.as_view())
        assert drive.status == 404

    @pytest.mark.parametrize("view", [closing, raising(ValueError())])
    def test_what_precedes_a_view_runs_once(
        self, view: Any, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        from django.db import connections, transaction

        def opening(using: Any) -> Any:
            viewed.append("atomic")
            return atomic(using)

        atomic = transaction.atomic
        monkeypatch.setattr(transaction, "atomic", opening)
        entry = connections.settings["default"]
        monkeypatch.setitem(entry, "ATOMIC_REQUESTS", True)
        viewed.clear()
        Drive().run(view, MIDDLEWARE=[f"{__name__}.Viewing"])
        assert viewed == ["process_view", "atomic"]


viewed: list[str] = []


class Viewing:
    def __init__(self, get_response: Any) -> None:
        self.get_response = get_response

    def __call__(self, request: HttpRequest) -> Any:
        return self.get_response(request)

    def process_view(self, *args: Any) -> None:
        viewed.append("process_view")


class TestAfterAccept:
    @pytest.mark.parametrize(
        "error, code, reason",
        [
            (PermissionDenied("not you"), 1008, "PermissionDenied: not you"),
            (ValueError("a bug"), 1011, "ValueError: a bug"),
            (Http404("no"), 1011, "Http404: no"),
            (BadRequest("no"), 1011, "BadRequest: no"),
            (ValueError("é" * 100), 1011, "ValueError: " + "é" * 55),
            (ValueError("\ud800"), 1011, "ValueError: ?"),
            (InvalidMessage(1007, "odd"), 1007, "odd"),
            (InvalidMessage(1003, "x" * 200), 1003, "x" * 123),
            (ExceptionGroup("g", [ValueError("a")]), 1011, "ValueError: a"),
        ],
    )
    @pytest.mark.parametrize("debug", [True, False])
    def test_an_exception_closes_with_its_code(
        self, error: Exception, code: int, reason: str, debug: bool
    ) -> None:
        sent = Drive().run(raising(error, accept=True), DEBUG=debug)
        if not (debug or code in (1003, 1007)):
            reason = ""
        assert sent[1] == {"type": "websocket.close", "code": code, "reason": reason}

    def test_a_value_that_nobody_gets_is_told(
        self, caplog: pytest.LogCaptureFixture
    ) -> None:
        async def view(socket: WebSocket) -> Any:
            await socket.accept()
            return HttpResponse()

        assert Drive().run(view)[1:] == [NORMAL]
        assert "returned a value after accept()" in caplog.text

    def test_returning_closes_with_1000(self, ws: str) -> None:
        with serve(accepting, ws=ws) as server, server.dial() as client:
            client.recv(10)
            with pytest.raises(ConnectionClosed) as caught:
                client.recv(10)
        assert caught.value.rcvd is not None
        assert caught.value.rcvd.code == 1000

    def test_an_exception_is_logged_once_with_traceback_and_request(
        self, ws: str, caplog: pytest.LogCaptureFixture
    ) -> None:
        got = []

        def signalled(sender: Any, request: HttpRequest, **kwargs: Any) -> None:
            got.append((request.path, sys.exc_info()[1]))

        error = ValueError("a bug")
        signals.got_request_exception.connect(signalled)
        try:
            with serve(raising(error, accept=True), ws=ws) as server:
                with server.dial() as client:
                    with pytest.raises(ConnectionClosed) as caught:
                        client.recv(10)
        finally:
            signals.got_request_exception.disconnect(signalled)
        assert caught.value.rcvd is not None
        assert caught.value.rcvd.code == 1011
        assert got == [("/ws/", error)]
        [record] = [r for r in caplog.records if r.levelno > logging.INFO]
        assert (record.name, record.levelname) == ("django.request", "ERROR")
        assert record.exc_info is not None and record.exc_info[1] is error
        assert record.getMessage() == "Internal Server Error: /ws/"
        assert record.request.path == "/ws/"  # type: ignore[attr-defined]
        assert record.status_code == 500  # type: ignore[attr-defined]

    def test_permission_denied_is_a_warning_and_no_signal(
        self, caplog: pytest.LogCaptureFixture
    ) -> None:
        got = []

        def signalled(**kwargs: Any) -> None:
            got.append(kwargs)

        signals.got_request_exception.connect(signalled)
        try:
            Drive().run(raising(PermissionDenied("no"), accept=True))
        finally:
            signals.got_request_exception.disconnect(signalled)
        [record] = caplog.records
        assert (record.name, record.levelname) == ("django.request", "WARNING")
        assert not got

    def test_an_exception_is_mailed_to_the_admins(self) -> None:
        from django.core import mail
        from django.utils.log import AdminEmailHandler

        handler = AdminEmailHandler()
        logger = logging.getLogger("django.request")
        logger.addHandler(handler)
        backend = "django.core.mail.backends.locmem.EmailBackend"
        mailing: dict[str, Any] = {"EMAIL_BACKEND": backend}
        if django.VERSION >= (6, 1):
            mailing = {"MAILERS": {"default": {"BACKEND": backend}}}
        admins: Any = [("Admin", "admin@example.com")]
        if django.VERSION >= (6, 0):
            admins = ["admin@example.com"]
        outbox: list[Any] = []
        setattr(mail, "outbox", outbox)
        try:
            Drive().run(
                raising(ValueError("a bug"), accept=True),
                ADMINS=admins,
                TEMPLATES=TEMPLATES,
                **mailing,
            )
        finally:
            logger.removeHandler(handler)
        [message] = outbox
        assert "Internal Server Error: /ws/" in message.subject
        assert "a bug" in message.body

    def test_propagated_exceptions_reach_the_server(self) -> None:
        error = ValueError("a bug")
        for accept in (True, False):
            with pytest.raises(ValueError, match="a bug"):
                Drive().run(raising(error, accept), DEBUG_PROPAGATE_EXCEPTIONS=True)

    def test_what_several_tasks_raise_is_logged_as_a_group(
        self, caplog: pytest.LogCaptureFixture
    ) -> None:
        group = ExceptionGroup("g", [ValueError("a"), KeyError("b")])
        assert Drive().run(raising(group, accept=True))[1]["code"] == 1011
        [record] = caplog.records
        assert record.exc_info and isinstance(record.exc_info[1], ExceptionGroup)

    @pytest.mark.parametrize(
        "error",
        [
            WebSocketDisconnect(4001),
            ExceptionGroup("g", [WebSocketDisconnect(4001)]),
            ExceptionGroup("g", [ExceptionGroup("h", [WebSocketDisconnect(4001)])]),
        ],
    )
    def test_a_disconnect_closes_with_its_code(
        self, error: Exception, caplog: pytest.LogCaptureFixture
    ) -> None:
        assert Drive().run(raising(error, accept=True))[1]["code"] == 4001
        assert quiet(caplog)

    @pytest.mark.parametrize(
        "code, reason", [(1006, ""), ("x", ""), (4000, 5), (4000, "\ud800")]
    )
    def test_one_that_cannot_be_sent_closes_with_1000(
        self, code: Any, reason: Any
    ) -> None:
        error = WebSocketDisconnect(code, reason)
        assert Drive().run(raising(error, accept=True))[1] == NORMAL

    @pytest.mark.parametrize("moment", ["handshake", "accept", "receive", "send"])
    @pytest.mark.parametrize("how", ["close", "reset"])
    def test_a_client_that_goes_away_leaves_no_log(
        self, ws: str, moment: str, how: str, caplog: pytest.LogCaptureFixture
    ) -> None:
        at, ended = threading.Event(), threading.Event()
        go = threading.Event()

        async def pause(name: str) -> None:
            if name == moment:
                at.set()
                while not go.is_set():
                    await asyncio.sleep(0.01)

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
            raw = sockets.create_connection(("127.0.0.1", server.port))
            raw.sendall(HANDSHAKE)
            if moment != "handshake":
                assert raw.recv(1000).startswith(b"HTTP/1.1 101")
                raw.sendall(b"\x81\x82\x00\x00\x00\x00hi")  # a masked "hi"
            assert at.wait(10)
            if how == "reset":
                linger = struct.pack("ii", 1, 0)
                raw.setsockopt(sockets.SOL_SOCKET, sockets.SO_LINGER, linger)
            raw.close()
            time.sleep(0.05)  # the server's turn to see it; either order is tested
            go.set()
            assert ended.wait(10)
        assert quiet(caplog)


# ASGI: the lifetime


def raise_failure(task: asyncio.Task[Any]) -> None:
    """Raise what pytest.raises() and pytest.fail() raise in a view: no Exception."""
    if not task.cancelled() and isinstance(task.exception(), pytest.fail.Exception):
        task.result()


class Live(Drive):
    """A connection whose client's events come when the test says so."""

    def __init__(self, *events: dict[str, Any], **scope: Any) -> None:
        super().__init__(*events, **scope)
        self.queue: asyncio.Queue[dict[str, Any]] = asyncio.Queue()
        self.taken = 0

    async def receive(self) -> dict[str, Any]:
        event = await self.queue.get()
        self.taken += 1
        return event

    def play(self, view: Any, client: Any, **overrides: Any) -> list[dict[str, Any]]:
        """Serve by `view` while `client(self)` runs; both must end."""

        async def main() -> None:
            for event in self.events:
                self.queue.put_nowait(event)
            application: Any = websockets(no_http)
            async with asyncio.timeout(20):
                self.task = asyncio.create_task(
                    application(self.scope, self.receive, self.send)
                )
                await client(self)
                await asyncio.wait([self.task])
            raise_failure(self.task)
            assert asyncio.all_tasks() == {asyncio.current_task()}

        overrides.setdefault("ROOT_URLCONF", urlconf(websocket("ws/", view)))
        with override_settings(**overrides):
            asyncio.run(main())
        return self.sent

    async def until(self, condition: Callable[[], Any]) -> None:
        async with asyncio.timeout(10):
            while not condition():
                await asyncio.sleep(0.001)


async def client_leaves(live: Live) -> None:
    """The client leaves as soon as it has an answer."""
    await live.until(lambda: live.sent)
    live.queue.put_nowait(GONE)


async def client_waits(live: Live) -> None:
    """The client does nothing but what was put into its queue before."""


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Look after busy views sooner than after a second, and wait less."""
    monkeypatch.setattr(WebSocket, "WATCH", 0.02)
    monkeypatch.setattr(WebSocket, "GRACE", 1.0)


class TestGoneIsGone:
    @pytest.mark.parametrize("how", ["close", "reset", "shutdown"])
    def test_a_busy_view_is_cancelled_when_its_client_leaves(
        self, ws: str, how: str, caplog: pytest.LogCaptureFixture
    ) -> None:
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
                steps.append(f"finally {time.monotonic() - left:.2f}")

        with serve(view, ws=ws) as server:
            with contextlib.ExitStack() as stack:
                client = stack.enter_context(server.dial())
                client.send("hi")
                assert asleep.wait(10)
                left = time.monotonic()
                if how == "close":
                    client.close(4001)
                elif how == "reset":
                    linger = struct.pack("ii", 1, 0)
                    raw = client.socket
                    raw.setsockopt(sockets.SOL_SOCKET, sockets.SO_LINGER, linger)
                    os.close(raw.detach())
                else:
                    server.uvicorn.should_exit = True
                wait_for(lambda: len(steps) == 3)
        assert steps[:2] == ["async with", "except"]
        assert float(steps[2].split()[1]) < 5
        assert quiet(caplog)

    def test_before_accept_too(self, ws: str, caplog: Any) -> None:
        ended = threading.Event()
        begun = threading.Event()

        async def view(socket: WebSocket) -> None:
            try:
                begun.set()
                await asyncio.sleep(3600)
            finally:
                ended.set()

        with serve(view, ws=ws) as server:
            raw = sockets.create_connection(("127.0.0.1", server.port))
            raw.sendall(HANDSHAKE)
            assert begun.wait(10)
            raw.close()
            assert ended.wait(5)
        assert quiet(caplog)

    def test_a_view_that_only_sends_stops_nobody(self, ws: str) -> None:
        """A server's send need not wait, least of all when the client has gone."""
        ended = threading.Event()

        async def view(socket: WebSocket) -> None:
            await socket.accept()
            try:
                while True:
                    await socket.send_text("x" * 10_000)
            finally:
                ended.set()

        with serve(view, ws=ws) as server, contextlib.ExitStack() as stack:
            client = stack.enter_context(server.dial())
            for _ in range(50):
                client.recv(10)
            linger = struct.pack("ii", 1, 0)
            client.socket.setsockopt(sockets.SOL_SOCKET, sockets.SO_LINGER, linger)
            os.close(client.socket.detach())
            assert ended.wait(5)
            assert server.get("/nowhere/").status == 404

    def test_one_that_swallows_it_again_and_again_ends_all_the_same(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(WebSocket, "WATCH", 0.02)
        monkeypatch.setattr(WebSocket, "GRACE", 0.05)
        swallowed = 0

        async def view(socket: WebSocket) -> None:
            nonlocal swallowed
            await socket.accept()
            while swallowed < 3:
                try:
                    await asyncio.sleep(3600)
                except asyncio.CancelledError:
                    swallowed += 1

        Live().play(view, client_leaves)
        assert swallowed == 3

    def test_a_view_that_swallows_the_cancellation_may_go_on(
        self, quick: None, caplog: pytest.LogCaptureFixture
    ) -> None:
        steps: list[str] = []

        async def view(socket: WebSocket) -> None:
            await socket.accept()
            try:
                await asyncio.sleep(3600)
            except asyncio.CancelledError:
                steps.append("cancelled")
            await asyncio.sleep(0.2)
            steps.append("ended")

        live = Live()
        live.play(view, client_leaves)
        assert steps == ["cancelled", "ended"]
        assert not live.task.cancelled()
        assert quiet(caplog)

    def test_an_error_in_the_cleanup_is_logged(
        self, quick: None, caplog: pytest.LogCaptureFixture
    ) -> None:
        async def view(socket: WebSocket) -> None:
            await socket.accept()
            try:
                await asyncio.sleep(3600)
            finally:
                raise ValueError("cleanup")

        live = Live()
        live.play(view, client_leaves)
        assert live.task.exception() is None
        assert not live.task.cancelling()
        [record] = caplog.records
        assert record.exc_info and str(record.exc_info[1]) == "cleanup"

    @pytest.mark.parametrize("too", [False, True])
    def test_the_servers_own_cancellation_passes_through(
        self, quick: None, too: bool
    ) -> None:
        seen: list[str] = []

        async def view(socket: WebSocket) -> None:
            await socket.accept()
            try:
                await asyncio.sleep(3600)
            except asyncio.CancelledError:
                seen.append("cancelled")
                if too:
                    with contextlib.suppress(asyncio.CancelledError):
                        await asyncio.sleep(3600)
                raise

        async def client(live: Live) -> None:
            await live.until(lambda: live.sent)
            if too:
                live.queue.put_nowait(GONE)
                await live.until(lambda: seen)
            live.task.cancel()

        live = Live()
        live.play(view, client)
        assert live.task.cancelled()
        assert seen == ["cancelled"]

    def test_awaiting_what_was_cancelled_is_an_error_of_the_view(
        self, caplog: pytest.LogCaptureFixture
    ) -> None:
        async def view(socket: WebSocket) -> None:
            await socket.accept()
            future = asyncio.get_running_loop().create_future()
            future.cancel()
            await future

        assert Drive().run(view)[1]["code"] == 1011
        [record] = caplog.records
        assert record.exc_info and "cancelled" in str(record.exc_info[1])

    def test_timeouts_in_the_view_keep_their_meaning(self, quick: None) -> None:
        seen: list[str] = []

        async def view(socket: WebSocket) -> None:
            await socket.accept()
            with pytest.raises(TimeoutError):
                async with asyncio.timeout(0.05):
                    await asyncio.sleep(3600)
            task = asyncio.current_task()
            assert task is not None and task.cancelling() == 0
            await socket.send_text("still here")
            seen.append("timeout")
            try:
                async with asyncio.timeout(60):
                    await asyncio.sleep(3600)
            except TimeoutError:
                seen.append("wrong")
            except asyncio.CancelledError:
                seen.append("cancelled")
                assert task.cancelling() == 1
                raise

        async def client(live: Live) -> None:
            await live.until(lambda: seen)
            live.queue.put_nowait(GONE)

        live = Live()
        live.play(view, client)
        assert seen == ["timeout", "cancelled"]
        assert live.task.exception() is None and not live.task.cancelling()

    def test_cancelling_a_send_is_safe(self) -> None:
        class Slow(Drive):
            async def send(self, event: dict[str, Any]) -> None:
                if event.get("text") == "slow":
                    await asyncio.sleep(3600)
                await super().send(event)

        async def view(socket: WebSocket) -> None:
            await socket.accept()
            with pytest.raises(TimeoutError):
                async with asyncio.timeout(0.01):
                    await socket.send_text("slow")
            await socket.send_text("still here")

        assert Slow().run(view)[1]["text"] == "still here"

    def test_a_client_that_leaves_while_it_is_refused(
        self, quick: None, caplog: pytest.LogCaptureFixture
    ) -> None:
        class Slow(Live):
            async def send(self, event: dict[str, Any]) -> None:
                if event["type"] != "websocket.close":
                    self.queue.put_nowait(GONE)
                    await asyncio.sleep(3600)
                await super().send(event)

        async def view(socket: WebSocket) -> None:
            await socket.close()

        slow = Slow()
        assert slow.play(view, client_waits) == [{"type": "websocket.close"}]
        assert slow.task.exception() is None
        assert [record.getMessage() for record in caplog.records] == ["Forbidden: /ws/"]

    def test_a_view_that_was_told_may_take_its_time(self, quick: None) -> None:
        seen: list[str] = []

        async def view(socket: WebSocket) -> None:
            await socket.accept()
            async for _ in socket:
                pass
            await asyncio.sleep(0.2)
            seen.append("saved")

        async def client(live: Live) -> None:
            live.queue.put_nowait(GONE)

        Live().play(view, client)
        assert seen == ["saved"]

    def test_so_may_one_that_closed_by_itself(self, quick: None) -> None:
        seen: list[str] = []

        async def view(socket: WebSocket) -> None:
            await socket.accept()
            await socket.close()
            await asyncio.sleep(0.2)
            seen.append("saved")

        async def client(live: Live) -> None:
            await live.until(lambda: len(live.sent) == 2)
            live.queue.put_nowait(GONE)

        Live().play(view, client)
        assert seen == ["saved"]

    @pytest.mark.parametrize("quit", ["returns", "raises", "closes"])
    def test_a_child_task_that_learns_of_the_end_does_not_keep_it(
        self, quick: None, quit: str, caplog: pytest.LogCaptureFixture
    ) -> None:
        seen: list[str] = []

        async def reader(socket: WebSocket) -> None:
            if quit == "closes":
                await socket.receive_text()
                await socket.close(4005)
            elif quit == "raises":
                while True:
                    await socket.receive_text()
            else:
                async for _ in socket:
                    pass

        async def writer() -> None:
            try:
                await asyncio.sleep(3600)
            finally:
                seen.append("writer ended")

        async def view(socket: WebSocket) -> None:
            await socket.accept()
            async with asyncio.TaskGroup() as group:
                group.create_task(reader(socket))
                group.create_task(writer())

        async def client(live: Live) -> None:
            live.queue.put_nowait(text("a"))
            if quit != "closes":
                live.queue.put_nowait(GONE)

        live = Live()
        live.play(view, client)
        assert seen == ["writer ended"]
        assert live.task.exception() is None
        assert quiet(caplog)

    def test_a_task_group_that_failed_before_does_not_matter(self, quick: None) -> None:
        """Until Python 3.13 it leaves a cancellation of the view's task behind."""
        steps: list[str] = []

        async def failing() -> None:
            raise ValueError

        async def view(socket: WebSocket) -> None:
            await socket.accept()
            with pytest.raises(ExceptionGroup):
                async with asyncio.TaskGroup() as group:
                    group.create_task(asyncio.sleep(3600))
                    group.create_task(failing())
            steps.append("failed")
            try:
                await asyncio.sleep(3600)
            finally:
                steps.append("cancelled")

        async def client(live: Live) -> None:
            await live.until(lambda: steps)
            live.queue.put_nowait(GONE)

        live = Live()
        live.play(view, client)
        assert steps == ["failed", "cancelled"]
        assert not live.task.cancelled() and live.task.exception() is None

    @pytest.mark.parametrize("how", ["wait", "wait_for", "close", "first", "group"])
    def test_a_view_that_waits_for_a_task_that_hears_of_the_end_may_clean_up(
        self, quick: None, how: str
    ) -> None:
        steps: list[str] = []

        async def reader(socket: WebSocket) -> None:
            async for _ in socket:
                pass

        async def view(socket: WebSocket) -> None:
            await socket.accept()
            try:
                if how == "wait":
                    task = asyncio.create_task(socket.receive_text())
                    await asyncio.wait([task])
                    task.result()
                elif how == "wait_for":
                    await asyncio.wait_for(socket.receive_text(), 10)
                elif how == "close":
                    await asyncio.create_task(socket.close())
                elif how == "first":
                    jobs = [reader(socket), asyncio.sleep(3600)]
                    tasks = {asyncio.create_task(job) for job in jobs}
                    _, rest = await asyncio.wait(tasks, return_when="FIRST_COMPLETED")
                    rest.pop().cancel()
                else:
                    async with asyncio.TaskGroup() as group:
                        group.create_task(socket.receive_text())
                        group.create_task(asyncio.sleep(3600))
            except (WebSocketDisconnect, ExceptionGroup):
                pass
            await asyncio.sleep(0.2)
            steps.append("saved")

        Live().play(view, client_leaves)
        assert steps == ["saved"]

    def test_so_may_the_task_itself(self, quick: None) -> None:
        steps: list[str] = []

        async def reader(socket: WebSocket) -> None:
            async for _ in socket:
                pass
            await asyncio.sleep(0.2)
            steps.append("saved")

        async def view(socket: WebSocket) -> None:
            await socket.accept()
            try:
                async with asyncio.TaskGroup() as group:
                    group.create_task(reader(socket))
                    group.create_task(asyncio.sleep(3600))
            finally:
                steps.append("ended")

        Live().play(view, client_leaves)
        assert steps == ["saved", "ended"]

    def test_but_not_for_ever(
        self, quick: None, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(WebSocket, "GRACE", 0.1)
        steps: list[str] = []

        async def view(socket: WebSocket) -> None:
            await socket.accept()
            await asyncio.wait([asyncio.create_task(socket.receive_text())])
            try:
                await asyncio.sleep(3600)
            finally:
                steps.append("cancelled")

        Live().play(view, client_leaves)
        assert steps == ["cancelled"]

    def test_a_task_left_behind_does_not_keep_the_view(self, quick: None) -> None:
        steps: list[str] = []

        async def view(socket: WebSocket) -> None:
            await socket.accept()
            task = asyncio.create_task(socket.receive_text())
            try:
                await asyncio.sleep(3600)
            finally:
                with pytest.raises(WebSocketDisconnect):
                    await task
                steps.append("child")

        Live().play(view, client_leaves)
        assert steps == ["child"]

    def test_what_a_view_cancels_when_it_has_ended_is_no_error(
        self, caplog: Any
    ) -> None:
        async def view(socket: WebSocket) -> None:
            await socket.accept()
            task = asyncio.create_task(asyncio.sleep(3600))
            try:
                await socket.receive_text()
            finally:
                task.cancel()
                await task

        Drive(GONE).run(view)
        assert quiet(caplog)

    @pytest.mark.parametrize(
        "how", ["raises", "denied", "cancelled", "gone", "ahead", "reader"]
    )
    def test_a_socket_is_freed_without_the_garbage_collector(
        self, quick: None, how: str
    ) -> None:
        kept: list[Any] = []

        async def view(socket: WebSocket) -> None:
            kept.extend([weakref.ref(socket), weakref.ref(socket.request)])
            if how == "denied":
                raise PermissionDenied
            await socket.accept()
            if how == "raises":
                raise ValueError
            if how == "cancelled":
                future = asyncio.get_running_loop().create_future()
                future.cancel()
                await future
            if how == "ahead":
                return await asyncio.sleep(0.1)
            if how == "reader":
                reader = asyncio.create_task(socket.receive_text())
                await asyncio.sleep(0.01)
                reader.cancel()
                await asyncio.wait([reader])
                return None
            await socket.receive_text()

        async def client(live: Live) -> None:
            if how == "gone":
                live.queue.put_nowait(GONE)

        gc.collect()
        gc.disable()
        logging.disable(logging.CRITICAL)
        try:
            Live().play(view, client)
            # A thread of the pool lets go of its last job after it has told of its end.
            wait_for(lambda: [reference() for reference in kept] == [None, None], 2)
        finally:
            logging.disable(logging.NOTSET)
            gc.enable()

    @pytest.mark.parametrize("raises", [False, True])
    def test_a_task_that_outlives_its_view_hears_of_the_end(
        self, quick: None, raises: bool
    ) -> None:
        tasks: list[asyncio.Task[str]] = []

        async def view(socket: WebSocket) -> None:
            await socket.accept()
            await asyncio.sleep(0.1)  # it is read ahead
            tasks.append(asyncio.create_task(socket.receive_text()))
            await asyncio.sleep(0.01)
            if raises:  # which is logged before the socket is closed
                raise ValueError

        async def client(live: Live) -> None:
            await asyncio.wait([live.task])
            with pytest.raises(WebSocketDisconnect):
                await tasks[0]

        Live().play(view, client)

    @pytest.mark.parametrize("raised", ["view", "group"])
    def test_an_error_is_reported_though_the_client_leaves_meanwhile(
        self, quick: None, raised: str, caplog: pytest.LogCaptureFixture
    ) -> None:
        class SlowHandler(logging.Handler):
            def emit(self, record: logging.LogRecord) -> None:
                time.sleep(0.2)  # a mail server, say

        async def failing() -> None:
            try:
                await asyncio.sleep(3600)
            finally:
                raise ValueError("a bug")

        async def view(socket: WebSocket) -> None:
            await socket.accept()
            if raised == "view":
                raise ValueError("a bug")
            async with asyncio.TaskGroup() as group:
                group.create_task(failing())

        logger = logging.getLogger("django.request")
        handler = SlowHandler()
        logger.addHandler(handler)
        live = Live()
        try:
            live.play(view, client_leaves)
        finally:
            logger.removeHandler(handler)
        assert live.task.exception() is None and not live.task.cancelling()
        [record] = [r for r in caplog.records if r.name == "django.request"]
        assert record.exc_info
        error: Any = record.exc_info[1]
        assert str(error) == "a bug"

    def test_what_was_read_ahead_is_not_received_after_ones_own_close(
        self, quick: None
    ) -> None:
        async def view(socket: WebSocket) -> None:
            await socket.accept()
            await live.until(lambda: socket._ahead and socket._ahead.events)
            await socket.close(4001)
            for _ in range(2):
                with pytest.raises(WebSocketDisconnect, match="4001"):
                    await socket.receive_text()

        async def client(live: Live) -> None:
            await live.until(lambda: len(live.sent) == 2)

        live = Live(text("read ahead"))
        live.play(view, client)

    def test_a_view_that_listens_in_between_is_watched_on(self, quick: None) -> None:
        """A heartbeat: receive for a while, then do something else, and again."""
        steps: list[str] = []

        async def view(socket: WebSocket) -> None:
            await socket.accept()
            with pytest.raises(TimeoutError):
                async with asyncio.timeout(0.1):
                    await socket.receive_text()
            steps.append("timeout")
            try:
                await asyncio.sleep(3600)
            finally:
                steps.append("cancelled")

        async def client(live: Live) -> None:
            await live.until(lambda: steps)
            live.queue.put_nowait(GONE)

        Live().play(view, client)
        assert steps == ["timeout", "cancelled"]


class TestTheEnd:
    """How a view learns of it, and what nobody can do to the process."""

    def test_a_view_is_gone_eleven_seconds_after_its_client(self) -> None:
        assert WebSocket.WATCH + WebSocket.GRACE == 11 and WebSocket.FLUSH == 5

    def test_accept_of_a_client_that_has_gone_raises_disconnect(self) -> None:
        async def view(socket: WebSocket) -> None:
            drive.error = OSError()
            with pytest.raises(WebSocketDisconnect):
                await socket.accept()
            drive.error = None
            ends.append("heard")

        ends: list[str] = []
        drive = Drive()
        drive.run(view)
        assert ends == ["heard"]

    def test_gathered_sends_keep_their_order(self) -> None:
        async def view(socket: WebSocket) -> None:
            await socket.accept()
            await asyncio.gather(*(socket.send_text(str(n)) for n in range(100)))

        sent = Drive().run(view)[1:-1]
        assert [event["text"] for event in sent] == [str(n) for n in range(100)]

    def test_polling_with_a_timeout_of_zero_loses_nothing(self, quick: None) -> None:
        got: list[Any] = []

        async def view(socket: WebSocket) -> None:
            await socket.accept()
            while True:
                try:
                    async with asyncio.timeout(0):
                        got.append(await socket.receive_text())
                except TimeoutError:
                    await asyncio.sleep(0.001)
                except InvalidMessage as error:
                    got.append(error.code)
                except WebSocketDisconnect as end:
                    got.append(end.code)
                    break

        async def client(live: Live) -> None:
            for event in (text("a"), binary(b"b"), text("c"), GONE):
                live.queue.put_nowait(event)

        Live().play(view, client)
        assert got == ["a", 1003, "c", 4001]

    def test_one_that_asks_again_and_again_is_cancelled(self) -> None:
        asked = 0

        async def view(socket: WebSocket) -> None:
            nonlocal asked
            await socket.accept()
            while True:
                asked += 1
                with contextlib.suppress(Exception):
                    await socket.receive_json()

        Live().play(view, client_leaves)
        assert 10 <= asked <= 11

    @pytest.mark.parametrize(
        "what", ["receive", "send", "join", "leave", "close", "accept"]
    )
    def test_whatever_it_catches_others_go_on(self, what: str) -> None:
        turns = 0

        async def others() -> None:
            nonlocal turns
            while True:
                await asyncio.sleep(0)
                turns += 1

        async def view(socket: WebSocket) -> None:
            await socket.accept()
            task = asyncio.create_task(others())
            if what in ("receive", "send", "close"):
                await socket.close()
            calls: Any = {
                "receive": socket.receive_text,
                "send": lambda: socket.send_text("x"),
                "join": lambda: socket.join("room"),
                "leave": lambda: socket.leave("room"),
                "close": socket.close,
                "accept": socket.accept,
            }
            for _ in range(100):
                try:
                    await calls[what]()
                except BaseException:
                    continue
            task.cancel()

        Drive().run(view)
        assert turns > 50

    def test_nothing_goes_out_after_another_tasks_close(self) -> None:
        class Slow(Drive):
            async def send(self, event: dict[str, Any]) -> None:
                await super().send(event)
                if event["type"] == "websocket.close":
                    await asyncio.sleep(0.01)

        async def pump(socket: WebSocket) -> None:
            with contextlib.suppress(WebSocketDisconnect):
                while True:
                    await socket.send_text("x")

        async def view(socket: WebSocket) -> None:
            await socket.accept()
            tasks = [asyncio.create_task(pump(socket)) for _ in range(3)]
            await asyncio.sleep(0.01)
            await socket.close(4000)
            await asyncio.wait(tasks)

        drive = Slow()
        drive.run(view)
        assert drive.types.index("websocket.close") == len(drive.types) - 1

    def test_a_close_that_was_cancelled_may_be_called_again(self) -> None:
        class Blocked(Drive):
            blocked = asyncio.Event()

            async def send(self, event: dict[str, Any]) -> None:
                if event["type"] == "websocket.close":
                    await self.blocked.wait()
                await super().send(event)

        async def view(socket: WebSocket) -> None:
            await socket.accept()
            with pytest.raises(TimeoutError):
                async with asyncio.timeout(0.01):
                    await socket.close(4001)
            assert not socket.connected
            drive.blocked.set()
            await socket.close(4002)  # waits for the first one

        drive = Blocked()
        drive.run(view)
        assert [event.get("code") for event in drive.sent] == [None, 4001]

    def test_an_accept_that_was_cancelled_does_not_open_it_again(self) -> None:
        class Blocked(Drive):
            async def send(self, event: dict[str, Any]) -> None:
                await super().send(event)
                if event["type"] == "websocket.accept":
                    await asyncio.sleep(3600)

        async def view(socket: WebSocket) -> None:
            accepting = asyncio.create_task(socket.accept())
            await asyncio.sleep(0)
            await socket.close(4001)
            accepting.cancel()
            await asyncio.wait([accepting])
            assert not socket.connected and "closed" in repr(socket)

        assert Blocked().run(view)[-1]["code"] == 4001

    def test_a_close_waits_for_a_client_that_does_not_read_only_so_long(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(WebSocket, "FLUSH", 0.1)

        async def view(socket: WebSocket) -> None:
            await slow.stuck(socket)
            start = time.monotonic()
            await socket.close(4001)
            took.append(time.monotonic() - start)
            slow.reads.set()
            await asyncio.sleep(0.05)  # nothing goes out that was given up

        async def client(slow: Any) -> None:
            slow.queue.put_nowait(text("go"))

        took: list[float] = []
        slow = Slow()
        slow.play(view, client)
        assert 0.05 < took[0] < 5
        assert len(slow.sent) == 2

    @pytest.mark.parametrize("receives", [False, True])
    def test_a_client_that_floods_is_closed_with_1008(
        self,
        quick: None,
        receives: bool,
        monkeypatch: pytest.MonkeyPatch,
        caplog: pytest.LogCaptureFixture,
    ) -> None:
        """At once where the view never receives, else after a minute."""
        assert django_ws._ReadAhead.STALE == 60
        monkeypatch.setattr(django_ws._ReadAhead, "STALE", 0.1)
        monkeypatch.setattr(WebSocket, "WATCH", 0.01)
        steps: list[str] = []

        async def view(socket: WebSocket) -> None:
            await socket.accept()
            if receives:
                for _ in range(3):  # in time
                    await socket.receive_text()
                    await asyncio.sleep(0.05)
            try:
                await asyncio.sleep(3600)
            finally:
                steps.append("cancelled")

        async def client(live: Live) -> None:
            for _ in range(1000):
                live.queue.put_nowait(text("x" * 100))
            await asyncio.wait([live.task])

        assert Live().play(view, client)[-1]["code"] == 1008
        assert steps == ["cancelled"]
        assert "closed with 1008" in caplog.text

    def test_a_task_left_behind_may_fail_to_send(
        self, caplog: pytest.LogCaptureFixture
    ) -> None:
        """While the exception of its view is being reported."""
        heard: list[int] = []

        class SlowHandler(logging.Handler):
            def emit(self, record: logging.LogRecord) -> None:
                wait_for(lambda: heard)

        async def late(socket: WebSocket) -> None:
            await live.until(lambda: socket._view.task is None)
            live.error = OSError()
            try:
                await socket.send_text("x")
            except WebSocketDisconnect as end:
                heard.append(end.code)
            live.error = None

        async def view(socket: WebSocket) -> None:
            await socket.accept()
            tasks.append(asyncio.create_task(late(socket)))
            raise ValueError

        tasks: list[asyncio.Task[None]] = []
        live = Live()
        logger, handler = logging.getLogger("django.request"), SlowHandler()
        logger.addHandler(handler)
        try:
            live.play(view, client_waits)
        finally:
            logger.removeHandler(handler)
        assert heard == [1006]

    def test_being_told_leaves_no_cancellation_behind(self) -> None:
        counts: list[int] = []

        async def view(socket: WebSocket) -> None:
            await socket.accept()
            await socket.join("room")
            await socket.send_text("joined")
            with pytest.raises(WebSocketDisconnect, match="4001"):
                await socket.receive_text()
            task = asyncio.current_task()
            assert task is not None
            counts.append(task.cancelling())

        async def client(live: Live) -> None:
            await live.until(lambda: len(live.sent) == 2)
            await asyncio.sleep(0.01)  # it waits for a message
            await close_group("room", 4001)

        Live().play(view, client)
        assert counts == [0]

    def test_what_came_before_the_end_is_received(self, quick: None) -> None:
        got: list[str] = []

        async def view(socket: WebSocket) -> None:
            await socket.accept()
            async for message in socket.iter_text():
                await asyncio.sleep(0.05)
                got.append(message)

        async def client(live: Live) -> None:
            for event in (*map(text, "abc"), GONE):
                live.queue.put_nowait(event)

        Live().play(view, client)
        assert got == ["a", "b", "c"]

    def test_a_connection_that_cannot_send_is_at_its_end(self, quick: None) -> None:
        steps: list[str] = []

        async def view(socket: WebSocket) -> None:
            await socket.accept()
            await socket.join("room")
            await socket.send_text("joined")
            try:
                await asyncio.sleep(3600)
            finally:
                steps.append("cancelled")

        async def client(live: Live) -> None:
            await live.until(lambda: len(live.sent) == 2)
            live.error = OSError()
            await broadcast("room", "x")
            await live.until(lambda: steps)
            live.error = None

        Live().play(view, client)

    @pytest.mark.parametrize("when", ["view", "cleanup", "twice", "raises", "refusal"])
    def test_the_servers_cancellation_at_any_time(
        self, when: str, caplog: pytest.LogCaptureFixture
    ) -> None:
        steps: list[str] = []

        class Refusing(Live):
            async def send(self, event: dict[str, Any]) -> None:
                if event["type"].startswith("websocket.http"):
                    steps.append("begun")
                    await asyncio.sleep(3600)
                await super().send(event)

        async def view(socket: WebSocket) -> None:
            if when == "refusal":
                return
            await socket.accept()
            steps.append("begun")
            try:
                if when != "cleanup":
                    await asyncio.sleep(3600)
            finally:
                if when == "raises":
                    raise ValueError("in the cleanup")
                if when in ("cleanup", "twice"):
                    steps.append("cleaning up")
                    await asyncio.sleep(3600)

        async def client(live: Live) -> None:
            await live.until(lambda: steps)
            if when == "cleanup":
                await live.until(lambda: len(steps) == 2)
            live.task.cancel()
            if when == "twice":
                await live.until(lambda: len(steps) == 2)
                live.task.cancel()
            await asyncio.wait([live.task], timeout=5)
            assert live.task.done()

        live = Refusing()
        live.play(view, client)
        assert live.task.cancelled()
        assert ("in the cleanup" in caplog.text) == (when == "raises")

    def test_the_servers_cancellation_of_a_view_that_has_just_ended(
        self, caplog: pytest.LogCaptureFixture
    ) -> None:
        async def view(socket: WebSocket) -> None:
            await socket.accept()
            await end.wait()

        async def client(live: Live) -> None:
            await live.until(lambda: live.sent)
            await asyncio.sleep(0.01)
            end.set()
            await asyncio.sleep(0)  # the view has ended, and nobody knows yet
            live.task.cancel()
            await asyncio.wait([live.task])

        end = asyncio.Event()
        live = Live()
        live.play(view, client)
        assert live.task.cancelled() and quiet(caplog)

    def test_a_receive_left_behind_hears_of_the_servers_cancellation(self) -> None:
        heard: list[str] = []

        async def view(socket: WebSocket) -> None:
            async def receive() -> None:
                with pytest.raises(WebSocketDisconnect):
                    await socket.receive_text()
                heard.append("1006")

            await socket.accept()
            tasks.append(asyncio.create_task(receive()))
            await asyncio.sleep(3600)

        async def client(live: Live) -> None:
            await live.until(lambda: tasks)
            await asyncio.sleep(0.01)
            live.task.cancel()
            await live.until(lambda: heard)

        tasks: list[asyncio.Task[None]] = []
        Live().play(view, client)

    def test_ten_views_that_send_without_a_pause_leave_others_their_turn(
        self, quick: None
    ) -> None:
        sent: list[int] = []

        class Counting(Live):
            """A server that takes everything at once."""

            async def send(self, event: dict[str, Any]) -> None:
                if self.error:
                    raise self.error
                sent[-1] += 1
                assert sent[-1] < 10_000, "the loop stands still"

        async def view(socket: WebSocket) -> None:
            await socket.accept()
            while True:
                await socket.send_text("x")

        async def client(lives: list[Live]) -> None:
            while len([count for count in sent if count]) < 20:
                sent.append(0)
                await asyncio.sleep(0)
            for live in lives:
                live.error = OSError()

        serve_all(10, view, client, kind=Counting)
        assert max(sent[:-1]) <= 10 * (32 + 1)  # of each view between two turns

    def test_a_failed_broadcast_does_not_cut_off_what_came_before(
        self, quick: None
    ) -> None:
        saved: list[str] = []

        async def view(socket: WebSocket) -> None:
            await socket.accept()
            await socket.join("room")
            await socket.send_text("joined")
            async for message in socket.iter_text():
                await asyncio.sleep(0.05)
                saved.append(message)

        async def client(live: Live) -> None:
            await live.until(lambda: len(live.sent) == 2)
            live.error = OSError()
            for event in (*map(text, "abc"), GONE):
                live.queue.put_nowait(event)
            await live.until(lambda: live.taken > 1)
            await broadcast("room", "x")
            await asyncio.wait([live.task])

        Live().play(view, client)
        assert saved == ["a", "b", "c"]

    def test_tasks_that_hear_of_it_once_each_do_not_keep_asking(
        self, quick: None
    ) -> None:
        steps: list[str] = []

        async def pusher(socket: WebSocket) -> None:
            with contextlib.suppress(WebSocketDisconnect):
                while True:
                    await socket.send_text("x")
                    await asyncio.sleep(0.001)

        async def view(socket: WebSocket) -> None:
            await socket.accept()
            tasks = [asyncio.create_task(pusher(socket)) for _ in range(20)]
            try:
                async for _ in socket:
                    pass
            finally:
                await asyncio.wait(tasks)
                await asyncio.sleep(0.1)
                steps.append("saved")

        Live().play(view, client_leaves)
        assert steps == ["saved"]

    def test_a_cancellation_beside_the_end_is_passed_on(self) -> None:
        steps: list[str] = []

        async def reader(socket: WebSocket) -> None:
            async for _ in socket:
                pass
            steps.append("went on")

        async def view(socket: WebSocket) -> None:
            await socket.accept()
            task = asyncio.create_task(reader(socket))
            await asyncio.sleep(0.01)
            task.cancel()
            await socket.close()
            await asyncio.wait([task])
            assert task.cancelled()

        Live().play(view, client_waits)
        assert not steps

    @pytest.mark.parametrize("idle", [False, True])
    def test_the_disconnect_event_comes_once(self, quick: None, idle: bool) -> None:
        ends: list[Any] = []

        async def view(socket: WebSocket) -> None:
            await socket.accept()
            await asyncio.sleep(0.1 * idle)  # the socket reads ahead
            ends.append(await socket.receive())
            with pytest.raises(WebSocketDisconnect, match="4001"):
                await socket.receive()

        async def client(live: Live) -> None:
            await asyncio.sleep(0.2 * idle)
            live.queue.put_nowait(GONE)

        Live().play(view, client)
        assert ends == [GONE]

    @pytest.mark.parametrize("then", ["returns", "raises"])
    def test_a_refusal_in_another_task_comes_to_its_end(
        self, then: str, caplog: pytest.LogCaptureFixture
    ) -> None:
        class Slow(Drive):
            async def send(self, event: dict[str, Any]) -> None:
                await asyncio.sleep(0.05)
                await super().send(event)

        async def view(socket: WebSocket) -> None:
            tasks.append(asyncio.create_task(socket.close()))
            await asyncio.sleep(0.02)
            if then == "raises":
                raise ValueError("a bug")

        tasks: list[asyncio.Task[None]] = []
        drive = Slow()
        drive.run(view)
        assert drive.types == [
            "websocket.http.response.start",
            "websocket.http.response.body",
        ]
        assert ("a bug" in caplog.text) == (then == "raises")
        assert caplog.text.count("Forbidden: /ws/") == 1

    @pytest.mark.skipif(
        sys.version_info < (3, 12), reason="Python 3.12 has eager tasks"
    )
    def test_eager_tasks_change_nothing(self, quick: None) -> None:
        async def view(socket: WebSocket) -> None:
            await socket.accept()
            await socket.join("room")
            async for message in socket.iter_text():
                await broadcast("room", message)

        async def client(live: Live) -> None:
            factory = getattr(asyncio, "eager_task_factory")
            asyncio.get_running_loop().set_task_factory(factory)
            live.task.cancel()
            application: Any = websockets(no_http)
            again = asyncio.create_task(
                application(live.scope, live.receive, live.send)
            )
            for event in (CONNECT, text("a")):
                live.queue.put_nowait(event)
            await live.until(lambda: len(live.sent) == 2)
            live.queue.put_nowait(GONE)
            await asyncio.wait([again])

        live = Live()
        live.events = []
        live.play(view, client)
        assert live.sent[1:] == [{"type": "websocket.send", "text": "a"}]


class TestMessagesOfABusyView:
    def test_none_is_lost_and_64_kib_are_read_ahead(self, quick: None) -> None:
        got: list[str] = []
        ahead: list[int] = []

        async def view(socket: WebSocket) -> None:
            await socket.accept()
            assert (await socket.receive_text()).strip() == "0"
            await live.until(lambda: live.taken > 500)
            await asyncio.sleep(0.1)
            ahead.append(live.taken)
            got.extend([message.strip() async for message in socket.iter_text()])

        async def client(live: Live) -> None:
            for number in range(1000):
                live.queue.put_nowait(text(f"{number:>100}"))
            live.queue.put_nowait(GONE)

        live = Live()
        live.play(view, client)
        assert ahead == [2 + 65536 // 114 + 1]  # connect, the first, what is read ahead
        assert got == [str(number) for number in range(1, 1000)]

    def test_a_thousand_messages_to_a_view_that_sleeps(self, ws: str) -> None:
        async def view(socket: WebSocket) -> None:
            await socket.accept()
            await socket.receive_text()
            await asyncio.sleep(1.2)
            async for message in socket.iter_text():
                await socket.send_text(message)

        with serve(view, ws=ws) as server, server.dial() as client:
            client.send("go")
            for number in range(1000):
                client.send(str(number))
            for number in range(1000):
                assert client.recv(10) == str(number)

    def test_a_timeout_around_receive_loses_nothing(self, ws: str, quick: None) -> None:
        async def view(socket: WebSocket) -> None:
            await socket.accept()
            timeouts = 0
            while True:
                try:
                    async with asyncio.timeout(0.001):
                        message = await socket.receive_text()
                except TimeoutError:
                    timeouts += 1
                else:
                    await socket.send_text(f"{message} {timeouts > 0}")

        with serve(view, ws=ws) as server, server.dial() as client:
            client.send("first")
            time.sleep(0.1)
            for number in range(1000):
                client.send(str(number))
                if number % 100 == 0:
                    time.sleep(0.01)
            assert str(client.recv(10)).startswith("first")
            got = [client.recv(10) for _ in range(1000)]
        assert got == [f"{number} True" for number in range(1000)]

    def test_receiving_in_a_child_task(self, quick: None) -> None:
        got: list[str] = []

        async def view(socket: WebSocket) -> None:
            await socket.accept()
            queue: asyncio.Queue[str] = asyncio.Queue()

            async def reader() -> None:
                async for message in socket.iter_text():
                    await queue.put(message)

            async with asyncio.TaskGroup() as group:
                group.create_task(reader())
                while len(got) < 100:
                    await asyncio.sleep(0.001)
                    got.append(await queue.get())

        async def client(live: Live) -> None:
            for number in range(100):
                live.queue.put_nowait(text(str(number)))
                await asyncio.sleep(0.001)
            await live.until(lambda: len(got) == 100)
            live.queue.put_nowait(GONE)

        Live().play(view, client)
        assert got == [str(number) for number in range(100)]

    def test_a_message_read_ahead_is_handed_over_whoever_comes(
        self, quick: None
    ) -> None:
        got: list[Any] = []

        async def view(socket: WebSocket) -> None:
            await socket.accept()
            await asyncio.sleep(0.1)  # it is read ahead, and nothing comes
            with pytest.raises(TimeoutError):
                async with asyncio.timeout(0.01):
                    await socket.receive_text()
            await asyncio.sleep(0.1)
            arrived.set()
            got.append(await socket.receive_text())
            await asyncio.sleep(0.1)
            got.append(await socket.receive())
            await asyncio.sleep(3600)

        arrived = asyncio.Event()

        async def client(live: Live) -> None:
            await arrived.wait()
            for event in (text("a"), text("b"), GONE):
                live.queue.put_nowait(event)

        Live().play(view, client)
        assert got == ["a", text("b")]

    def test_two_tasks_may_not_receive_at_once(self) -> None:
        async def view(socket: WebSocket) -> None:
            await socket.accept()
            first = asyncio.create_task(socket.receive_text())
            await asyncio.sleep(0)
            with pytest.raises(RuntimeError, match="another task is receiving"):
                await socket.receive_text()
            assert await first == "a"

        async def client(live: Live) -> None:
            await live.until(lambda: live.sent)
            await asyncio.sleep(0.01)
            live.queue.put_nowait(text("a"))

        assert len(Live().play(view, client)) == 2

    @pytest.mark.parametrize("ahead", [False, True])
    def test_a_receive_of_the_server_that_fails(
        self, quick: None, ahead: bool, caplog: pytest.LogCaptureFixture
    ) -> None:
        class Failing(Live):
            async def receive(self) -> dict[str, Any]:
                event = await super().receive()
                if event is GONE:
                    raise ValueError("server")
                return event

        async def view(socket: WebSocket) -> None:
            await socket.accept()
            if ahead:
                try:
                    await asyncio.sleep(3600)
                finally:
                    ends.append(repr(socket))
            with pytest.raises(ValueError, match="server"):
                await socket.receive_text()

        ends: list[str] = []
        Failing().play(view, client_leaves)
        assert ends == (["<WebSocket closed '/ws/'>"] if ahead else [])
        assert ("receive() failed" in caplog.text) == ahead

    def test_a_socket_that_waits_costs_no_timer_and_no_task(self, quick: None) -> None:
        counts: list[int] = []

        async def view(socket: WebSocket) -> None:
            await socket.accept()
            await socket.receive_text()

        async def client(live: Live) -> None:
            await live.until(lambda: live.sent)
            await asyncio.sleep(0.1)
            loop: Any = asyncio.get_running_loop()
            tasks = len(asyncio.all_tasks())
            for _ in range(20):
                await asyncio.sleep(0)
                # Nothing is due but what this test itself may have scheduled.
                due = [timer for timer in loop._scheduled if not timer.cancelled()]
                counts.append(sum("reading_ahead" in repr(timer) for timer in due))
            counts.append(len(asyncio.all_tasks()) - tasks)
            assert tasks == 3  # this one, the connection's and the view's
            live.queue.put_nowait(text("a"))

        Live().play(view, client)
        assert set(counts) == {0}

    def test_no_timer_is_left_of_a_view_that_was_told(self) -> None:
        async def client(live: Live) -> None:
            live.queue.put_nowait(GONE)
            await asyncio.wait([live.task])
            loop: Any = asyncio.get_running_loop()
            due = [timer for timer in loop._scheduled if not timer.cancelled()]
            assert not [timer for timer in due if "_View" in repr(timer)]

        Live().play(echo, client)

    def test_nothing_is_left_when_a_view_has_ended(self, quick: None) -> None:
        async def view(socket: WebSocket) -> None:
            await socket.accept()
            await asyncio.sleep(0.1)
            assert socket._ahead is not None and socket._timer is None
            assert await socket.receive_text() == "a"
            assert socket._timer is not None

        async def client(live: Live) -> None:
            await asyncio.sleep(0.15)
            live.queue.put_nowait(text("a"))
            await asyncio.wait([live.task])
            loop: Any = asyncio.get_running_loop()
            await asyncio.sleep(0)
            due = [timer for timer in loop._scheduled if not timer.cancelled()]
            assert not [timer for timer in due if "reading_ahead" in repr(timer)]

        Live().play(view, client)


# ASGI: threads and database connections

SIZE = min(32, (os.cpu_count() or 1) + 4)


async def just_querying(socket: WebSocket) -> None:
    from django.db import connection

    await socket.accept()
    await sync_to_async(lambda: connection.close())()


def thread_name() -> str:
    return threading.current_thread().name


class TestThreads:
    def test_the_pool_is_bounded_and_nobody_deadlocks(self) -> None:
        names: set[str] = set()
        busy = 0
        most = 0
        lock = threading.Lock()

        def query() -> None:
            nonlocal busy, most
            with lock:
                busy += 1
                most = max(most, busy)
            time.sleep(0.05)
            names.add(thread_name())
            with lock:
                busy -= 1

        async def view(socket: WebSocket) -> None:
            await socket.accept()
            await sync_to_async(query)()
            await socket.send_text("answer")

        async def main() -> list[list[dict[str, Any]]]:
            application: Any = websockets(no_http)
            drives = [Drive() for _ in range(500)]
            async with asyncio.timeout(50):
                await asyncio.gather(
                    *[application(d.scope, d.receive, d.send) for d in drives]
                )
            return [drive.sent for drive in drives]

        with override_settings(ROOT_URLCONF=urlconf(websocket("ws/", view))):
            sent = asyncio.run(main())
        assert all(events[1]["text"] == "answer" for events in sent)
        assert len(names) <= SIZE and most == SIZE
        wait_for(lambda: django_ws._threads.turns == 0)

    def test_a_transaction_left_open_fails_nobody_else(self) -> None:
        from django.contrib.auth.models import User
        from django.db import transaction

        async def leaving(socket: WebSocket) -> None:
            await socket.accept()
            await sync_to_async(transaction.atomic().__enter__)()
            await User.objects.acount()
            await socket.receive_text()

        async def counting(socket: WebSocket) -> None:
            await socket.accept()
            await socket.send_json(await User.objects.acount() >= 0)

        Drive(text("a")).run(leaving)
        for _ in range(3):
            assert Drive().run(counting)[1]["text"] == "true"

    def test_sockets_with_many_calls_starve_no_other(self) -> None:
        calls, before = itertools.count(), 0

        def call() -> None:
            time.sleep(0.005)
            next(calls)

        async def busy(socket: WebSocket) -> None:
            await socket.accept()
            await asyncio.gather(*[sync_to_async(call)() for _ in range(300)])

        async def other(socket: WebSocket) -> None:
            nonlocal before
            await socket.accept()
            await asyncio.sleep(0.2)
            await sync_to_async(int)()
            before = next(calls)

        async def main() -> None:
            application: Any = websockets(no_http)
            drives = [Drive(path="/busy/") for _ in range(SIZE)] + [Drive()]
            async with asyncio.timeout(50):
                await asyncio.gather(
                    *[application(d.scope, d.receive, d.send) for d in drives]
                )

        routes = websocket("busy/", busy), websocket("ws/", other)
        with override_settings(ROOT_URLCONF=urlconf(*routes)):
            asyncio.run(main())
        assert 0 < before < SIZE * 250  # of SIZE * 300

    def test_an_idle_socket_gives_its_thread_to_one_that_waits(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(django_ws._ViewExecutor, "IDLE", 60)

        async def view(socket: WebSocket) -> None:
            await socket.accept()
            await socket.send_json(await sync_to_async(int)(5))
            await socket.receive_text()

        async def client(lives: list[Live]) -> None:
            for live in lives:
                await live.until(lambda: len(live.sent) == 2)

        serve_all(2 * SIZE, view, client)

    def test_a_call_that_was_cancelled_in_time_does_not_run(self) -> None:
        async def view(socket: WebSocket) -> None:
            await socket.accept()
            first = asyncio.create_task(sync_to_async(go_on.wait)(10))
            second = asyncio.create_task(sync_to_async(ran.append)("second"))
            await asyncio.sleep(0.05)
            second.cancel()
            await asyncio.wait([second])
            go_on.set()
            assert await first
            await sync_to_async(ran.append)("third")

        go_on, ran = threading.Event(), list[str]()
        assert Drive().run(view)[1:] == [NORMAL]
        assert ran == ["third"]

    def test_a_socket_that_ends_gives_its_thread_back(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(django_ws._ViewExecutor, "IDLE", 60)
        Drive().run(just_querying)
        wait_for(lambda: django_ws._threads.turns == 0)

    def test_a_connection_that_cannot_be_closed_stops_nothing(
        self, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
    ) -> None:
        from django.contrib.auth.models import User
        from django.db import connections

        def fail(self: Any) -> None:
            if threading.current_thread().name.startswith("django_ws_view"):
                raise ValueError("cannot close")

        async def view(socket: WebSocket) -> None:
            await socket.accept()
            for _ in range(2):
                await User.objects.acount()
                await asyncio.sleep(0.2)  # the turn ends

        name = "close_if_unusable_or_obsolete"
        with monkeypatch.context() as patch:
            patch.setattr(type(connections["default"]), name, fail)
            Drive().run(view)
        assert "could not be closed" in caplog.text

    @pytest.mark.parametrize("age", [0, 60])
    def test_a_connection_that_failed_is_looked_after_within_a_turn(
        self, age: int
    ) -> None:
        from django.db import DatabaseError, connection, connections

        def fail() -> None:
            with connection.cursor() as cursor:
                cursor.execute("SELECT nothing FROM nowhere")

        async def view(socket: WebSocket) -> None:
            await socket.accept()
            with pytest.raises(DatabaseError):
                await sync_to_async(fail)()
            found.append(await sync_to_async(lambda: connection.errors_occurred)())

        found: list[bool] = []
        connections.settings["default"]["CONN_MAX_AGE"] = age
        try:
            Drive().run(view)
        finally:
            connections.settings["default"]["CONN_MAX_AGE"] = 0
            Drive().run(just_querying)
        assert found == [False]

    def test_other_ways_to_threads_work(self, database: None) -> None:
        from django.contrib.auth.models import User
        from django.db import connection

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
            users = [user async for user in User.objects.all()]
            assert len(users) == expected
            await sync_to_async(async_to_sync(socket.send_text))("from a thread")

        assert Drive().run(view)[1]["text"] == "from a thread"


def serve_here(view: Any, *events: Any, **scope: Any) -> Any:
    """A coroutine that serves one connection in the caller's task."""
    drive = Drive(*events, **scope)

    async def run() -> list[dict[str, Any]]:
        with override_settings(ROOT_URLCONF=urlconf(websocket("ws/", view))):
            application: Any = websockets(no_http)
            await application(drive.scope, drive.receive, drive.send)
        return drive.sent

    return run()


async def names_of_users(socket: Any) -> None:
    from django.contrib.auth.models import User

    await socket.accept()
    async for _ in socket:
        names = [user.username async for user in User.objects.order_by("id")]
        await socket.send_json([str(await socket.auser()), *names])


class InATestCase:
    async def test_a_socket_sees_what_is_not_committed(self) -> None:
        from django.contrib.auth.models import User

        await User.objects.filter(username__startswith="uncommitted").adelete()
        user = await User.objects.acreate(username="uncommitted")
        client = AsyncClient()
        await client.aforce_login(user)
        cookie = f"sessionid={client.cookies['sessionid'].value}".encode()
        headers = [(b"host", b"testserver"), (b"cookie", cookie)]
        with override_settings(MIDDLEWARE=SESSIONS):
            for run in (lambda job: job, asyncio.create_task):
                served = serve_here(names_of_users, text(""), GONE, headers=headers)
                sent = await run(served)
                assert json.loads(sent[1]["text"])[0] == "uncommitted"
                assert "uncommitted" in json.loads(sent[1]["text"])[1:]
        await user.adelete()


class TestInTestCase(InATestCase, TestCase):
    pass


class TestInTransactionTestCase(InATestCase, TransactionTestCase):
    def _fixture_teardown(self) -> None:
        pass  # flush nothing: the tables serve all tests


# Marks on threads and connections

marks = threading.local()


def marking(get_response: Any) -> Any:
    """As packages for tenants and for the "current user" do."""
    from django.db import connection

    def middleware(request: HttpRequest) -> Any:
        marks.who = request.GET["who"]
        setattr(connection, "tenant", request.GET["who"])
        return get_response(request)

    return middleware


def look() -> set[Any]:
    from django.db import connection

    connection.ensure_connection()
    return {getattr(marks, "who", None), getattr(connection, "tenant", None)}


class TestMarks:
    @pytest.mark.parametrize("age", [0, 600])
    def test_no_look_of_a_view_finds_the_mark_of_another_client(self, age: int) -> None:
        from django.db import connections

        async def view(socket: WebSocket) -> None:
            looks = [await sync_to_async(look)()]
            await socket.accept()
            looks.append(await sync_to_async(look)())
            await socket.receive_text()
            looks.append(await sync_to_async(look)())
            for found in looks:
                wrong.extend(found - {None, socket.GET["who"]})
            seen_by.append(len(looks))

        wrong: list[Any] = []
        seen_by: list[int] = []
        middleware = [f"{__name__}.marking"]
        connections.settings["default"]["CONN_MAX_AGE"] = age
        try:
            with serve(view, MIDDLEWARE=middleware) as server:
                with contextlib.ExitStack() as stack:
                    clients = [
                        stack.enter_context(server.dial(f"/ws/?who={number}"))
                        for number in range(40)
                    ]
                    for client in clients:
                        client.send("look")
                    wait_for(lambda: len(seen_by) == 40, 30)
        finally:
            connections.settings["default"]["CONN_MAX_AGE"] = 0
        assert sum(seen_by) == 120
        assert len(wrong) == 0


class TestMarksOfRefusals:
    @pytest.mark.parametrize("kind", ["lazy page", "stream", "error page"])
    def test_no_page_that_refuses_shows_the_mark_of_another_client(
        self, kind: str
    ) -> None:
        from django.http import HttpResponse, StreamingHttpResponse
        from django.template.response import SimpleTemplateResponse

        class Page(SimpleTemplateResponse):
            @property
            def rendered_content(self) -> str:
                return str(look())

        def handler403(request: HttpRequest, exception: Any) -> HttpResponse:
            return HttpResponse(str(look()), status=403)

        async def view(socket: WebSocket) -> Any:
            if kind == "lazy page":
                return Page("", status=403)
            if kind == "stream":
                return StreamingHttpResponse((str(look()) for _ in "1"), status=403)
            return None

        middleware = [f"{__name__}.marking"]
        with serve(view, MIDDLEWARE=middleware, handler403=handler403) as server:
            waiting = []
            for number in range(40):
                raw = sockets.create_connection(("127.0.0.1", server.port))
                query = f"/ws/?who=n{number:02}".encode()
                raw.sendall(HANDSHAKE.replace(b"/ws/", query))
                waiting.append(raw)
            foreign: list[str] = []
            for number, raw in enumerate(waiting):
                answer = b""
                while b"}" not in answer:
                    answer += raw.recv(4000)
                raw.close()
                body = answer.decode().partition("\r\n\r\n")[2]
                found = set(re.findall(r"n\d\d", body)) - {f"n{number:02}"}
                foreign.extend(found)
        assert len(foreign) == 0


# Slow middleware


release = threading.Event()


def open_waiting(port: int) -> sockets.socket:
    """Ask for a handshake and do not wait for the answer."""
    raw = sockets.create_connection(("127.0.0.1", port))
    raw.sendall(HANDSHAKE.replace(b"/ws/", b"/ws/?slow=1"))
    return raw


def stuck(get_response: Any) -> Any:
    def middleware(request: HttpRequest) -> Any:
        if request.GET:
            release.wait(60)
        return get_response(request)

    return middleware


class TestSlowMiddleware:
    def test_handshakes_that_wait_delay_no_view(self) -> None:
        from django.contrib.auth.models import User

        async def counting(socket: WebSocket) -> None:
            await socket.accept()
            async for _ in socket:
                await socket.send_json(await User.objects.acount() >= 0)

        release.clear()
        with serve(counting, MIDDLEWARE=[f"{__name__}.stuck"]) as server:
            with contextlib.ExitStack() as stack:
                clients = [stack.enter_context(server.dial()) for _ in range(10)]
                waiting = [open_waiting(server.port) for _ in range(50)]
                try:
                    for client in clients * 5:
                        client.send("count")
                        assert json.loads(client.recv(5)) is True
                finally:
                    release.set()
                    for raw in waiting:
                        raw.recv(1000)
                        raw.close()


# The context of the middleware

request_id: contextvars.ContextVar[str] = contextvars.ContextVar("request_id")
local = Local()
own = types.SimpleNamespace()


def around(get_response: Any) -> Any:
    """Set what middleware sets, and set it back afterwards."""

    def middleware(request: HttpRequest) -> Any:
        who = request.GET["who"]
        token = request_id.set(who)
        local.who = who
        try:
            with translation.override("de"), timezone.override("Asia/Tokyo"):
                return get_response(request)
        finally:
            request_id.reset(token)
            del local.who

    return middleware


@async_only_middleware
def around_async(get_response: Any) -> Any:
    async def middleware(request: HttpRequest) -> Any:
        token = request_id.set(request.GET["who"])
        local.who = request.GET["who"]
        try:
            with translation.override("de"), timezone.override("Asia/Tokyo"):
                return await get_response(request)
        finally:
            request_id.reset(token)
            del local.who

    return middleware


def own_urls(get_response: Any) -> Any:
    def middleware(request: HttpRequest) -> Any:
        setattr(request, "urlconf", own.urls)
        return get_response(request)

    return middleware


def surroundings() -> list[Any]:
    from django.urls import get_urlconf

    urls = getattr(get_urlconf(), "__name__", None)
    zone = timezone.get_current_timezone_name()
    who = [request_id.get(None), getattr(local, "who", None)]
    return [*who, translation.get_language(), zone, urls]


CHAINS = {
    "sync": ["around", "own_urls"],
    "async": ["around_async", "own_urls"],
    "async inside": ["own_urls", "around", "asynchronous"],
    "async outside": ["asynchronous", "own_urls", "around"],
    "async between": ["own_urls", "around", "asynchronous", "synchronous"],
}


@async_only_middleware
def asynchronous(get_response: Any) -> Any:
    async def middleware(request: HttpRequest) -> Any:
        await asyncio.sleep(0)
        return await get_response(request)

    return middleware


def synchronous(get_response: Any) -> Any:
    return lambda request: get_response(request)


class TestContext:
    @pytest.mark.parametrize("chain", CHAINS)
    def test_the_view_runs_in_the_context_of_its_middleware(self, chain: str) -> None:
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
        middleware = [f"{__name__}.{name}" for name in CHAINS[chain]]
        with serve(pattern, MIDDLEWARE=middleware, LANGUAGE_CODE="en") as server:
            with contextlib.ExitStack() as stack:
                clients = [
                    stack.enter_context(server.dial(f"/ws/?who={number}"))
                    for number in range(10)
                ]
                for client in clients:
                    client.send("look")
                for number, client in enumerate(clients):
                    expected = [str(number), str(number), "de", "Asia/Tokyo", "own"]
                    for found in seen(client):
                        assert found == expected

    def test_and_leaves_nothing_of_it_to_the_next_handshake(self) -> None:
        async def view(socket: WebSocket) -> None:
            found.append(surroundings())

        found: list[Any] = []
        middleware = [f"{__name__}.around", f"{__name__}.own_urls"]
        pattern = websocket("ws/", view)
        own.urls = urlconf(pattern, __name__="own")
        for chain in (middleware, []):
            for _ in range(SIZE + 1):
                Drive(query_string=b"who=1").run(view, MIDDLEWARE=chain)
        assert found[-1] == [None, None, "en-us", "America/Chicago", "urlconf"]


# The user

WHO_TEMPLATES = [
    {
        "BACKEND": "django.template.backends.django.DjangoTemplates",
        "OPTIONS": {
            "context_processors": ["django.contrib.auth.context_processors.auth"],
            "loaders": [
                ("django.template.loaders.locmem.Loader", {"who.html": "{{ user }}"})
            ],
        },
    }
]


def just_a_user(get_response: Any) -> Any:
    """As middleware for tokens does."""
    from django.contrib.auth.models import User
    from django.utils.functional import SimpleLazyObject

    def middleware(request: HttpRequest) -> Any:
        setattr(request, "user", SimpleLazyObject(User.objects.first))
        return get_response(request)

    return middleware


class TestUser:
    @pytest.mark.parametrize("own", [False, True])
    def test_the_user_is_loaded_once_for_every_kind_of_code(
        self, user: Any, own: bool
    ) -> None:
        from django.db import connection
        from django.template.loader import render_to_string
        from django.test.utils import CaptureQueriesContext

        async def view(socket: Any) -> None:
            def everything() -> list[Any]:
                with CaptureQueriesContext(connection) as queries:
                    page = render_to_string("who.html", {}, socket.request)
                    names = [socket.user.username, socket.request.user.username, page]
                assert not queries.captured_queries
                return names

            assert await socket.auser() is socket.user
            assert await socket.request.auser() is socket.user
            await socket.accept()
            page = render_to_string("who.html", {}, socket.request)
            names = [socket.user.username, page, *await sync_to_async(everything)()]
            assert await socket.auser() is socket.user
            await socket.send_json([socket.user.is_authenticated, *names])

        middleware = [f"{__name__}.just_a_user"] if own else SESSIONS
        options: Any = {"MIDDLEWARE": middleware, "TEMPLATES": WHO_TEMPLATES}
        with serve(view, **options) as server:
            with server.dial(additional_headers=cookies(user)) as client:
                assert seen(client) == [True, *["ann"] * 5]
            if not own:
                with server.dial() as client:
                    names = ["", "AnonymousUser", "", "", "AnonymousUser"]
                    assert seen(client) == [False, *names]


# Forks and tests


class TestFork:
    @pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork()")
    def test_a_child_of_a_parent_that_served_sockets_runs_views(self) -> None:
        async def view(socket: WebSocket) -> None:
            await socket.accept()
            await socket.send_json(await sync_to_async(os.getpid)())
            assert await sync_to_async(os.getpid)() == os.getpid()

        parent = Drive()
        assert parent.run(view)[1]["text"] == str(os.getpid())
        # A member, on a loop that runs in the parent: nobody else's in the child.
        loop: Any = asyncio.new_event_loop()
        loop.is_running = lambda: True
        django_ws._Groups.loops[loop] = django_ws._new_groups()
        pid = os.fork()
        if pid == 0:
            drive = Drive()
            with contextlib.suppress(BaseException):
                drive.run(view)
                os._exit(0 if drive.sent[1:] and not django_ws._Groups.loops else 1)
            os._exit(2)
        del django_ws._Groups.loops[loop], loop.is_running
        loop.close()
        try:
            ended: list[int] = []

            def has_ended() -> bool:
                child, status = os.waitpid(pid, os.WNOHANG)
                ended.extend([status] if child else [])
                return bool(child)

            wait_for(has_ended, 15)
            assert ended == [0]
        finally:
            if not ended:
                os.kill(pid, signal.SIGKILL)
                os.waitpid(pid, 0)


class TestTransactionOfATestCase(TestCase):
    def application(self, view: Any) -> Any:
        override = self.settings(ROOT_URLCONF=urlconf(websocket("ws/", view)))
        self.enterContext(override)
        return websockets(no_http)

    async def test_synchronous_code_sees_it_and_nothing_closes_it(self) -> None:
        from django.contrib.auth.models import User
        from django.db import connection

        raw = await sync_to_async(lambda: connection.connection)()
        await User.objects.acreate(username="uncommitted")

        async def view(socket: WebSocket) -> None:
            await socket.accept()
            while await socket.receive_text() != "fail":
                await socket.send_json(
                    [user.username async for user in User.objects.all()]
                )
            raise LookupError

        application = self.application(view)
        for _ in range(2):
            with contextlib.suppress(LookupError):
                async with connect(application, "/ws/") as socket:
                    for _ in range(2):
                        await socket.send_text("who")
                        self.assertIn("uncommitted", await socket.receive_json())
                    await socket.send_text("fail")
        same = await sync_to_async(lambda: connection.connection is raw)()
        self.assertTrue(same)
        self.assertTrue(await User.objects.filter(username="uncommitted").aexists())

    async def test_a_refusal_leaves_it_alone(self) -> None:
        from django.contrib.auth.models import User
        from django.db import connection

        raw = await sync_to_async(lambda: connection.connection)()
        await User.objects.acreate(username="uncommitted")

        async def view(socket: WebSocket) -> None:
            await User.objects.acount()

        application = self.application(view)
        for place in ("/ws/", "/nowhere/"):
            with contextlib.suppress(WebSocketDenied):
                async with connect(application, place):
                    self.fail("accepted")
        same = await sync_to_async(lambda: connection.connection is raw)()
        self.assertTrue(same)
        self.assertTrue(await User.objects.filter(username="uncommitted").aexists())


# On a real PostgreSQL


@pytest.fixture(scope="session")
def postgres() -> Iterator[dict[str, Any]]:
    """A real PostgreSQL of the tests' own, as an entry for DATABASES."""
    if not importlib.util.find_spec("psycopg"):
        missing("psycopg")
    places = [*pathlib.Path("/usr/lib/postgresql").glob("*/bin"), None]
    initdb = shutil.which("initdb", path=str(places[0])) or shutil.which("initdb")
    if initdb is None:
        missing("PostgreSQL")
    assert initdb is not None
    user = ["runuser", "-u", "postgres", "--"] if os.geteuid() == 0 else []
    port = free_port()
    with tempfile.TemporaryDirectory() as directory:
        os.chmod(directory, 0o777)
        data = f"{directory}/data"
        quietly: Any = {"check": True, "stdout": subprocess.DEVNULL, "cwd": directory}
        auth = ("--auth=trust", "--username=postgres", "--no-sync")
        subprocess.run([*user, initdb, "-D", data, *auth], **quietly)
        program = pathlib.Path(initdb).with_name("postgres")
        options = ("-c", "max_connections=100", "-c", "fsync=off", "-k", directory)
        with open(f"{directory}/log", "wb") as log:
            server = subprocess.Popen(
                [*user, program, "-D", data, "-p", str(port), *options],
                cwd=directory,
                stdout=log,
                stderr=log,
            )
        entry = {
            "ENGINE": "django.db.backends.postgresql",
            "NAME": "postgres",
            "USER": "postgres",
            "HOST": "127.0.0.1",
            "PORT": str(port),
        }
        import psycopg

        def up() -> bool:
            assert server.poll() is None, open(f"{directory}/log").read()
            with contextlib.suppress(psycopg.OperationalError):
                administer(entry, "SELECT 1")
                return True
            return False

        wait_for(up, 30)
        yield entry
        control = pathlib.Path(initdb).with_name("pg_ctl")
        subprocess.run([*user, control, "-D", data, "-m", "fast", "stop"], **quietly)
        server.wait(20)


def administer(entry: dict[str, Any], query: str) -> list[Any]:
    """Run a query beside Django, on a connection of its own."""
    import psycopg

    address = f"host={entry['HOST']} port={entry['PORT']} user=postgres"
    with psycopg.connect(
        address, dbname="postgres", application_name="admin", autocommit=True
    ) as connection:
        return connection.execute(query).fetchall()


OTHERS = "backend_type = 'client backend' AND application_name <> 'admin'"


def connection_count(entry: dict[str, Any]) -> int:
    [(count,)] = administer(
        entry, f"SELECT count(*) FROM pg_stat_activity WHERE {OTHERS}"
    )
    return int(count)


SQL_APPLICATION = """
import asyncio, json, os, sys
from asgiref.sync import sync_to_async
from django.conf import settings
settings.configure(
    SECRET_KEY="x", ALLOWED_HOSTS=["*"], ROOT_URLCONF="sql",
    DATABASES={"default": json.loads(os.environ["DATABASE"])},
    MIDDLEWARE=["sql.refusing"],
)
import django
django.setup()
from django.core.asgi import get_asgi_application
from django.db import connection, models, transaction
from django.http import HttpResponse
from django_ws import websocket, websockets


def backend():
    with connection.cursor() as cursor:
        cursor.execute("SELECT pg_backend_pid()")
        return cursor.fetchone()[0]


async def asking(socket):
    await socket.accept()
    async for count in socket.iter_json():
        for _ in range(count):
            answer = await sync_to_async(backend)()
        await socket.send_json(answer)


async def pushing(socket):
    await socket.accept()
    await socket.send_json(await sync_to_async(backend)())
    while True:
        await asyncio.sleep(0.2)
        await socket.send_json("tick")


urlpatterns = [websocket("ask/", asking), websocket("push/", pushing)]
def query(sql):
    with connection.cursor() as cursor:
        cursor.execute(sql)
        return cursor.fetchone()[0] if cursor.description else None


async def querying(socket):
    '''Run what the client sends, statement for statement.'''
    await socket.accept()
    async for sql in socket.iter_text():
        await socket.send_json(await sync_to_async(query)(sql))


async def polling(socket):
    await socket.accept()
    while True:
        try:
            await socket.send_json(await sync_to_async(query)("SELECT 1"))
        except Exception as error:
            await socket.send_json(str(error))
        await asyncio.sleep(0.3)


async def forbearing(socket):
    '''Leave autocommit off over an await.'''
    await socket.accept()
    await sync_to_async(transaction.set_autocommit)(False)
    await sync_to_async(query)("INSERT INTO notes VALUES ('forbearing')")
    await socket.send_text("uncommitted")
    await asyncio.Event().wait()


async def transacting(socket):
    '''Open a transaction, and leave it or leave it open.'''
    await socket.accept()
    async for how in socket.iter_text():
        atomic = transaction.atomic()
        await sync_to_async(atomic.__enter__)()
        await socket.send_text("in it")
        await socket.receive_text()
        if how == "leave it":
            return
        await sync_to_async(atomic.__exit__)(None, None, None)
        await socket.send_text("out of it")



class Setting(models.Model):
    name = models.TextField(primary_key=True)

    class Meta:
        app_label, managed, db_table = "sql", False, "pg_settings"


async def iterating(socket):
    '''Read rows in chunks, each in a hop of its own.'''
    await socket.accept()
    await socket.receive_text()
    try:
        names = [
            setting.name
            async for setting in Setting.objects.order_by("name")[:200].aiterator(20)
        ]
    except Exception as error:
        names = str(error)
    await socket.send_json(names)


urlpatterns += [
    websocket("iterate/", iterating),
    websocket("query/", querying),
    websocket("poll/", polling),
    websocket("forbear/", forbearing),
    websocket("transact/", transacting),
]


def refusing(get_response):
    def middleware(request):
        if request.path == "/refuse/":
            return HttpResponse(str(query("SELECT 1")), status=403)
        return get_response(request)

    return middleware


async def leaving(socket):
    await sync_to_async(query)("SELECT 1")


urlpatterns += [websocket("leave/", leaving)]
application = websockets(get_asgi_application())
"""


@contextlib.contextmanager
def sql_server(directory: pathlib.Path, entry: Any, **more: Any) -> Iterator[Process]:
    (directory / "sql.py").write_text(SQL_APPLICATION)
    os.environ["DATABASE"] = json.dumps({**entry, **more})
    try:
        with Process(directory, *UVICORN, "sql:application") as server:
            yield server
    finally:
        del os.environ["DATABASE"]


def burst(clients: list[ClientConnection], count: int) -> list[Any]:
    """Let each client ask for `count` queries at once, and return the answers."""
    for client in clients:
        client.send(str(count))
    return [json.loads(client.recv(60)) for client in clients]


class TestPostgres:
    def test_idle_sockets_hold_no_connection(
        self, postgres: Any, tmp_path: pathlib.Path
    ) -> None:
        with sql_server(tmp_path, postgres) as server, contextlib.ExitStack() as stack:
            asking = [stack.enter_context(server.dial("/ask/")) for _ in range(150)]
            burst(asking, 1)
            wait_for(lambda: connection_count(postgres) == 0)
            pushing = [
                stack.enter_context(server.dial("/push/", max_queue=None))
                for _ in range(150)
            ]
            for client in pushing:
                client.recv(60)
            wait_for(lambda: connection_count(postgres) == 0, 8)
            for client in pushing:
                assert json.loads(client.recv(10)) == "tick"

    @pytest.mark.parametrize("age", [0, 60])
    def test_a_burst_holds_no_more_than_the_pool_has_threads(
        self, postgres: Any, tmp_path: pathlib.Path, age: int
    ) -> None:
        most = 0
        done = threading.Event()

        def watch() -> None:
            nonlocal most
            while not done.is_set():
                most = max(most, connection_count(postgres))

        with sql_server(tmp_path, postgres, CONN_MAX_AGE=age) as server:
            with contextlib.ExitStack() as stack:
                clients = [
                    stack.enter_context(server.dial("/ask/")) for _ in range(150)
                ]
                watcher = threading.Thread(target=watch)
                watcher.start()
                try:
                    burst(clients, 4)
                finally:
                    done.set()
                    watcher.join()
                # A connection that was closed is gone a moment later.
                assert 0 < most <= (SIZE if age else 3 * SIZE)
                if age:
                    backends = {pid for _ in range(5) for pid in burst(clients[:5], 2)}
                    assert len(backends) <= SIZE  # reused
                    one = {burst(clients[:1], 1)[0] for _ in range(20)}
                    assert len(one) == 1
                else:
                    wait_for(lambda: connection_count(postgres) == 0)

    def test_connections_go_back_to_psycopgs_pool(
        self, postgres: Any, tmp_path: pathlib.Path
    ) -> None:
        if not importlib.util.find_spec("psycopg_pool"):
            missing("psycopg_pool")
        pool = {"pool": {"min_size": 1, "max_size": 2, "timeout": 5}}
        with sql_server(tmp_path, postgres, OPTIONS=pool) as server:
            with contextlib.ExitStack() as stack:
                clients = [stack.enter_context(server.dial("/ask/")) for _ in range(30)]
                for _ in range(3):
                    for client in clients:
                        assert burst([client], 1)
                assert connection_count(postgres) <= 2


@contextlib.contextmanager
def notes(server: Process) -> Iterator[None]:
    """A table that is there for one test."""
    with server.dial("/query/") as client:
        client.send("CREATE TABLE notes (note text)")
        assert seen(client) is None
        try:
            yield
        finally:
            client.send("DROP TABLE notes")
            assert seen(client) is None


POOL = {"pool": {"min_size": 1, "max_size": 20, "timeout": 5}}
SMALL_POOL = {"pool": {"min_size": 1, "max_size": 2, "timeout": 5}}


class TestPostgresUnderLoad:
    @pytest.mark.parametrize("age", [0, 600])
    def test_a_view_that_does_not_commit_takes_no_other_views_rows_with_it(
        self, postgres: Any, tmp_path: pathlib.Path, age: int
    ) -> None:
        with (
            sql_server(tmp_path, postgres, CONN_MAX_AGE=age) as server,
            notes(server),
            contextlib.ExitStack() as stack,
        ):
            forbearing = [
                stack.enter_context(server.dial("/forbear/")) for _ in range(6)
            ]
            for client in forbearing:
                assert client.recv(10) == "uncommitted"
            inserting = [stack.enter_context(server.dial("/query/")) for _ in range(12)]
            for client in inserting:
                client.send("INSERT INTO notes VALUES ('kept')")
            for client in inserting:
                assert client.recv(10) == "null"
            query = "SELECT count(*) FROM notes WHERE note = 'kept'"
            assert administer(postgres, query) == [(12,)]

    @pytest.mark.parametrize("sockets", [30, 3])
    @pytest.mark.parametrize(
        "options",
        [
            {"CONN_MAX_AGE": 0},
            {"CONN_MAX_AGE": 60},
            {"CONN_MAX_AGE": None},
            {"OPTIONS": POOL},
            {"OPTIONS": SMALL_POOL},
        ],
        ids=["0", "60", "None", "pool", "small pool"],
    )
    def test_polling_views_are_well_again_soon_after_a_restart_of_the_database(
        self, postgres: Any, tmp_path: pathlib.Path, options: Any, sockets: int
    ) -> None:
        kill = "SELECT pg_terminate_backend(pid) FROM pg_stat_activity"
        with (
            sql_server(tmp_path, postgres, **options) as server,
            contextlib.ExitStack() as stack,
        ):
            clients = [
                stack.enter_context(server.dial("/poll/", max_queue=None))
                for _ in range(sockets)
            ]
            for client in clients:
                assert seen(client) == 1
            assert administer(postgres, f"{kill} WHERE {OTHERS}") or sockets < 30
            deadline = time.monotonic() + 5
            for client in clients:
                well = 0
                while well < 5:  # a second and a half without a failure
                    well = well + 1 if seen(client) == 1 else 0
                    assert time.monotonic() < deadline

    def test_no_query_waits_for_a_slow_one_while_a_thread_is_free(
        self, postgres: Any, tmp_path: pathlib.Path
    ) -> None:
        sleeping = "SELECT pid FROM pg_stat_activity WHERE query LIKE '%pg_sleep(10%'"
        sleeping += " AND pid <> pg_backend_pid()"
        with (
            sql_server(tmp_path, postgres) as server,
            contextlib.ExitStack() as stack,
        ):
            slow = stack.enter_context(server.dial("/query/"))
            clients = [stack.enter_context(server.dial("/query/")) for _ in range(200)]
            slow.send("SELECT 1 FROM pg_sleep(10)")
            wait_for(lambda: administer(postgres, sleeping))
            for client in clients:
                client.send("SELECT 2")
            for client in clients:
                assert seen(client) == 2
            [(pid,)] = administer(postgres, sleeping)  # none has waited for it
            administer(postgres, f"SELECT pg_terminate_backend({pid})")

    @pytest.mark.parametrize("options", [{"CONN_MAX_AGE": 0}, {"OPTIONS": POOL}])
    def test_a_query_that_is_read_in_chunks_is_read_to_its_end(
        self, postgres: Any, tmp_path: pathlib.Path, options: Any
    ) -> None:
        """While no socket waits for a thread. README tells about the other case."""
        count = SIZE
        with (
            sql_server(tmp_path, postgres, **options) as server,
            contextlib.ExitStack() as stack,
        ):
            clients = [
                stack.enter_context(server.dial("/iterate/")) for _ in range(count)
            ]
            for client in clients:
                client.send("go")
            answers = [seen(client) for client in clients]
        assert [len(set(answer)) for answer in answers] == [200] * count, answers[0]

    @pytest.mark.parametrize("path", ["/refuse/", "/leave/"])
    def test_refused_handshakes_hold_no_connection(
        self, postgres: Any, tmp_path: pathlib.Path, path: str
    ) -> None:
        request = HANDSHAKE.replace(b"/ws/", path.encode())
        with sql_server(tmp_path, postgres) as server:
            waiting = []
            for _ in range(30):
                waiting.append(sockets.create_connection(("127.0.0.1", server.port)))
                waiting[-1].sendall(request)
            for raw in waiting:
                assert raw.recv(1000).startswith(b"HTTP/1.1 403")
                raw.close()
            wait_for(lambda: connection_count(postgres) == 0, 5)

    def test_nor_do_they_empty_psycopgs_pool(
        self, postgres: Any, tmp_path: pathlib.Path
    ) -> None:
        with (
            sql_server(tmp_path, postgres, OPTIONS=SMALL_POOL) as server,
            server.dial("/query/") as client,
        ):
            for _ in range(3):
                waiting = [
                    sockets.create_connection(("127.0.0.1", server.port))
                    for _ in range(12)
                ]
                for raw in waiting:
                    raw.sendall(HANDSHAKE.replace(b"/ws/", b"/refuse/"))
                for raw in waiting:
                    assert raw.recv(1000).startswith(b"HTTP/1.1 403")
                    raw.close()
            client.send("SELECT 1")
            assert seen(client) == 1

    @pytest.mark.parametrize("age", [0, 600])
    def test_transactions_of_one_view_disturb_no_other(
        self, postgres: Any, tmp_path: pathlib.Path, age: int
    ) -> None:
        with (
            sql_server(tmp_path, postgres, CONN_MAX_AGE=age) as server,
            notes(server),
            contextlib.ExitStack() as stack,
        ):
            clients = [
                stack.enter_context(server.dial("/transact/")) for _ in range(30)
            ]
            inserting = [stack.enter_context(server.dial("/query/")) for _ in range(12)]
            for how in ("exit", "exit", "leave it"):
                for client in clients:
                    client.send(how)
                for client in clients:
                    assert client.recv(10) == "in it"
                for client in inserting:
                    client.send("INSERT INTO notes VALUES ('kept')")
                    assert client.recv(10) == "null"
                for client in clients:
                    client.send("go")
                for client in clients if how == "exit" else ():
                    assert client.recv(10) == "out of it"
            for client in inserting:
                client.send("SELECT pg_current_xact_id_if_assigned()::text")
                assert seen(client) is None  # no transaction is open
            assert administer(postgres, "SELECT count(*) FROM notes") == [(36,)]


# Sentry, as people install it

SENTRY_APPLICATION = """
import asyncio, json, os, pathlib, sys
import sentry_sdk
from asgiref.sync import sync_to_async
from sentry_sdk.transport import Transport

EVENTS = pathlib.Path(__file__).with_name("events")


class ToFile(Transport):
    def capture_envelope(self, envelope):
        with EVENTS.open("a") as file:
            for item in envelope.items:
                if item.type in ("event", "transaction"):
                    file.write(json.dumps(item.payload.json) + "\\n")


sentry_sdk.init(
    dsn="http://key@127.0.0.1:9/1",
    transport=ToFile,
    send_default_pii=True,
    traces_sample_rate=1.0 if "traces" in os.environ["SENTRY"] else None,
)

from django.conf import settings
from django.http import HttpResponse
settings.configure(
    SECRET_KEY="x", ALLOWED_HOSTS=["*"], ROOT_URLCONF="sentry", LOGGING_CONFIG=None,
    MIDDLEWARE=["sentry.tagging"],
    INSTALLED_APPS=["django.contrib.auth", "django.contrib.contenttypes"],
)
import django
django.setup()
from django.contrib.auth.models import User
from django.core.asgi import get_asgi_application
from django.urls import path
from django_ws import websocket, websockets


def tagging(get_response):
    def middleware(request):
        who = request.GET.get("who")
        if who:
            request.user = User(pk=1, username=who)
            sentry_sdk.set_user({"username": who})
            sentry_sdk.set_tag("middleware", who)
        return get_response(request)
    return middleware


async def view(socket):
    who = socket.GET.get("who")
    if who:
        sentry_sdk.set_tag("before", who)
        sentry_sdk.add_breadcrumb(message=f"breadcrumb of {who}")
    if socket.GET.get("fail"):
        raise LookupError(who)
    await socket.accept()
    if who:
        sentry_sdk.set_tag("after", who)
        sentry_sdk.set_context("own", {"who": who})
        await sync_to_async(sentry_sdk.set_tag)("thread", who)
    await socket.send_text("tagged")
    await socket.receive_text()
    raise LookupError(who)


def page(request):
    sentry_sdk.set_tag("page", request.GET.get("who"))
    raise LookupError(request.GET.get("who"))


urlpatterns = [websocket("ws/", view), path("page/", page)]
application = websockets(get_asgi_application())
if "middleware" in os.environ["SENTRY"]:
    from sentry_sdk.integrations.asgi import SentryAsgiMiddleware
    application = SentryAsgiMiddleware(application)
"""


class TestSentry:
    @pytest.mark.parametrize("how", ["init", "init traces", "middleware traces"])
    def test_an_error_carries_what_is_its_own_clients(
        self, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch, how: str
    ) -> None:
        def events() -> list[Any]:
            file = tmp_path / "events"
            written = file.read_text() if file.exists() else ""
            whole = written.rpartition("\n")[0]  # the last line may be under way
            return [json.loads(line) for line in whole.splitlines()]

        def errors() -> list[Any]:
            return [event for event in events() if "exception" in event]

        needs("sentry_sdk")
        (tmp_path / "sentry.py").write_text(SENTRY_APPLICATION)
        monkeypatch.setenv("SENTRY", how)
        names = ["ann", "bob", "eve", ""]
        command = [*UVICORN, "--lifespan", "off", "sentry:application"]
        with Process(tmp_path, *command) as server, contextlib.ExitStack() as stack:
            clients = [
                stack.enter_context(server.dial(f"/ws/?who={name}")) for name in names
            ]
            for client in clients:
                assert client.recv(10) == "tagged"
            for name in names:
                assert server.get(f"/page/?who={name}web").status == 500
                refused = server.handshake(f"/ws/?fail=1&who={name}refused")
                assert refused.status == 500
            for client in clients:
                client.send("fail")
            wait_for(lambda: len(errors()) >= 12)
            if "middleware" in how:
                wait_for(lambda: len(events()) >= 24)
        own = {f"{name}{how}" for name in names for how in ("", "web", "refused")}
        raised = {
            error["exception"]["values"][-1]["value"]: error for error in errors()
        }
        assert len(errors()) == 12
        for name, error in raised.items():
            about = {
                **error,
                "exception": None,
                "breadcrumbs": error.get("breadcrumbs"),
            }
            for part in ("modules", "extra", "server_name"):
                about.pop(part, None)
            words = set(re.findall(r"[a-z]+", json.dumps(about)))
            others = {"ann", "bob", "eve", *own} - {name, name or "None", ""}
            assert not words & others, (name, words & others, about)
        if "middleware" in how:
            kinds = [
                event["contexts"]["trace"]["op"]
                for event in events()
                if "exception" not in event
            ]
            assert kinds.count("websocket.server") == 8
            assert kinds.count("http.server") == 4


# The middleware that people really have, in one stack

ZOO = [
    "allauth",
    "corsheaders",
    "csp",
    "debug_toolbar",
    "django_hosts",
    "django_htmx",
    "django_structlog",
    "opentelemetry.instrumentation.asgi",
    "opentelemetry.instrumentation.django",
    "opentelemetry.sdk",
    "sentry_sdk",
    "silk",
    "simple_history",
    "waffle",
    "whitenoise",
]
ZOO_MODELS = """
from django.db import models
from simple_history.models import HistoricalRecords


class Note(models.Model):
    text = models.TextField()
    history = HistoricalRecords()
"""
ZOO_APPLICATION = '''
import json, pathlib
import sentry_sdk
from sentry_sdk.transport import Transport

HERE = pathlib.Path(__file__).parent


class ToFile(Transport):
    def capture_envelope(self, envelope):
        with (HERE / "events").open("a") as file:
            for item in envelope.items:
                if item.type == "event":
                    file.write(json.dumps(item.payload.json) + "\\n")


sentry_sdk.init(dsn="http://key@127.0.0.1:9/1", transport=ToFile, send_default_pii=True)

from django.conf import settings

settings.configure(
    SECRET_KEY="x", DEBUG=True, ALLOWED_HOSTS=["*"], INTERNAL_IPS=["127.0.0.1"],
    ROOT_URLCONF="zoo", ROOT_HOSTCONF="zoo", DEFAULT_HOST="www", USE_TZ=True,
    DATABASES={"default": {
        "ENGINE": "django.db.backends.sqlite3", "NAME": HERE / "zoo.sqlite3",
        "OPTIONS": {"timeout": 30, "transaction_mode": "IMMEDIATE"},
    }},
    DEFAULT_AUTO_FIELD="django.db.models.BigAutoField",
    STATIC_URL="static/", STATIC_ROOT=HERE / "static",
    CORS_ALLOW_ALL_ORIGINS=True,
    CONTENT_SECURITY_POLICY={"DIRECTIVES": {"default-src": ["'self'"]}},
    DEBUG_TOOLBAR_CONFIG={"IS_RUNNING_TESTS": False},
    AUTHENTICATION_BACKENDS=[
        "django.contrib.auth.backends.ModelBackend",
        "allauth.account.auth_backends.AuthenticationBackend",
    ],
    TEMPLATES=[{
        "BACKEND": "django.template.backends.django.DjangoTemplates",
        "APP_DIRS": True,
        "OPTIONS": {"context_processors": [
            "django.template.context_processors.request",
            "django.contrib.auth.context_processors.auth",
            "django.contrib.messages.context_processors.messages",
        ]},
    }],
    INSTALLED_APPS=[
        *(f"django.contrib.{name}" for name in
          ("auth", "contenttypes", "sessions", "messages", "staticfiles")),
        "allauth", "allauth.account", "corsheaders", "csp", "debug_toolbar",
        "django_hosts", "django_htmx", "django_structlog", "notes", "silk",
        "simple_history", "waffle",
    ],
    MIDDLEWARE=[
        "django_hosts.middleware.HostsRequestMiddleware",
        "debug_toolbar.middleware.DebugToolbarMiddleware",
        "corsheaders.middleware.CorsMiddleware",
        "django.middleware.security.SecurityMiddleware",
        "whitenoise.middleware.WhiteNoiseMiddleware",
        "csp.middleware.CSPMiddleware",
        "django.contrib.sessions.middleware.SessionMiddleware",
        "django.middleware.locale.LocaleMiddleware",
        "django.middleware.common.CommonMiddleware",
        "django.middleware.csrf.CsrfViewMiddleware",
        "django.contrib.auth.middleware.AuthenticationMiddleware",
        "allauth.account.middleware.AccountMiddleware",
        "django.contrib.messages.middleware.MessageMiddleware",
        "django.middleware.clickjacking.XFrameOptionsMiddleware",
        "django_htmx.middleware.HtmxMiddleware",
        "django_structlog.middlewares.RequestMiddleware",
        "simple_history.middleware.HistoryRequestMiddleware",
        "waffle.middleware.WaffleMiddleware",
        "silk.middleware.SilkyMiddleware",
        "django_hosts.middleware.HostsResponseMiddleware",
    ],
)
from opentelemetry import trace
from opentelemetry.instrumentation.django import DjangoInstrumentor
from opentelemetry.sdk.trace import TracerProvider

trace.set_tracer_provider(TracerProvider())
DjangoInstrumentor().instrument()
import django

django.setup()
import structlog, waffle
from asgiref.sync import sync_to_async
from debug_toolbar.toolbar import debug_toolbar_urls
from django.contrib.auth import login
from django.contrib.auth.models import User
from django.core.asgi import get_asgi_application
from django.core.management import call_command
from django.db import connection
from django.http import HttpResponse
from django.urls import include, path
from django_hosts import host, patterns
from notes.models import Note
from waffle.models import Flag
from django_ws import websocket, websockets


open_sockets = set()


def look(socket):
    """What the middleware left, seen from a view's synchronous code."""
    note = Note.objects.create(text=socket.GET["who"])
    return {
        "history": note.history.get().history_user.username,
        "flag": waffle.flag_is_active(socket.request, "beta"),
    }


async def report(socket):
    return {
        "user": socket.user.username,
        "request_id": structlog.contextvars.get_contextvars().get("request_id"),
        "htmx": bool(socket.htmx),
        "trace": trace.get_current_span().get_span_context().trace_id,
        "host": socket.host.name,
        **await sync_to_async(look)(socket),
    }


async def view(socket):
    open_sockets.add(socket)
    try:
        if socket.GET["how"] == "close":
            return await socket.close()
        if socket.GET["how"] == "raise":
            raise LookupError(socket.GET["who"])
        await socket.accept()
        async for text in socket.iter_text():
            if text == "raise":
                raise LookupError(socket.GET["who"])
            await socket.send_json(await report(socket))
    finally:
        open_sockets.discard(socket)


async def other(socket):
    await socket.accept()
    await socket.send_text(socket.host.name)


def enter(request):
    login(request, User.objects.get(username=request.GET["who"]),
          "django.contrib.auth.backends.ModelBackend")
    return HttpResponse("in")


def page(request):
    if request.GET.get("how") == "raise":
        raise LookupError(request.GET["who"])
    return HttpResponse(f"<body>{len(open_sockets)} open</body>")


class other_urls:
    urlpatterns = [websocket("ws/", other), *debug_toolbar_urls()]


urlpatterns = [
    path("", page), path("enter/", enter), websocket("ws/", view),
    *debug_toolbar_urls(),
    path("accounts/", include("allauth.urls")), path("silk/", include("silk.urls")),
]
host_patterns = patterns(
    "", host("other", other_urls, name="other"), host("www", "zoo", name="www"),
)
if not (HERE / "zoo.sqlite3").exists():
    call_command("migrate", verbosity=0)
    with connection.schema_editor() as editor:
        editor.create_model(Note)
        editor.create_model(Note.history.model)
    for name in ("ann", "bob", "eve"):
        User.objects.create(username=name)
    Flag.objects.create(name="beta", everyone=True)
    connection.close()
application = websockets(get_asgi_application())
'''


class TestZoo:
    def test_a_stack_of_everything(self, tmp_path: pathlib.Path) -> None:
        for package in ZOO:
            needs(package)
        (tmp_path / "notes").mkdir()
        (tmp_path / "notes" / "models.py").write_text(ZOO_MODELS)
        (tmp_path / "notes" / "__init__.py").touch()
        (tmp_path / "static").mkdir()
        (tmp_path / "static" / "a.txt").write_text("static")
        (tmp_path / "zoo.py").write_text(ZOO_APPLICATION)
        command = [*UVICORN, "--lifespan", "off", "zoo:application"]
        names = ["ann", "bob", "eve"] * 3
        with Process(tmp_path, *command) as server, contextlib.ExitStack() as stack:
            assert b"djDebug" in server.get("/").body  # the toolbar's
            assert server.get("/static/a.txt").body == b"static"
            cookies = {}
            for name in set(names):
                answer = str(server.get(f"/enter/?who={name}").msg)
                [cookies[name]] = re.findall(r"sessionid=\w+", answer)
            clients = [
                stack.enter_context(
                    server.dial(
                        f"/ws/?how=accept&who={name}",
                        additional_headers={"Cookie": cookies[name], "HX-Request": "1"},
                    )
                )
                for name in names
            ]
            looks = []
            for _ in range(2):
                for client in clients:
                    client.send("look")
                looks.append([json.loads(client.recv(20)) for client in clients])
            assert looks[0] == looks[1]  # the same for the whole life of a view
            for name, look in zip(names, looks[0], strict=True):
                assert (look["user"], look["history"]) == (name, name)
                assert (look["host"], look["flag"]) == ("www", True)
            for own in ("request_id", "trace"):
                assert len({look[own] for look in looks[0] if look[own]}) == len(names)
            for how, status in (("close", 403), ("raise", 500)):
                refused = server.handshake(f"/ws/?how={how}&who={how}")
                assert refused.status == status
                assert refused.getheader("Content-Security-Policy")
            assert server.get("/?how=raise&who=page").status == 500
            clients[0].send("raise")
            with pytest.raises(ConnectionClosed):
                clients[0].recv(10)
            for client in clients:
                client.close()
            wait_for(lambda: b"<body>0 open" in server.get("/").body)
            raw = sockets.create_connection(("127.0.0.1", server.port))
            uri = f"other.example.com:{server.port}"
            origin = Origin(f"http://{uri}")
            with dial(f"ws://{uri}/ws/", sock=raw, origin=origin) as client:
                assert client.recv(10) == "other"
        log = server.log.read_text()
        raised = re.findall(r"^(\w+(?:Error|Exception|Warning).*)$", log, re.M)
        expected = {"LookupError: raise", "LookupError: page", "LookupError: ann"}
        assert set(raised) == expected
        events = map(json.loads, (tmp_path / "events").read_text().splitlines())
        values = [event["exception"]["values"][-1]["value"] for event in events]
        assert sorted(values) == ["ann", "page", "raise"]


# django-tenants

TENANTS_MODELS = """
from django_tenants.models import DomainMixin, TenantMixin


class Client(TenantMixin):
    auto_create_schema = False


class Domain(DomainMixin):
    pass
"""
TENANTS_APPLICATION = '''
import json, os
from asgiref.sync import sync_to_async
from django.conf import settings
settings.configure(
    SECRET_KEY="x", ALLOWED_HOSTS=["*"], ROOT_URLCONF="tenanted",
    DATABASES={"default": json.loads(os.environ["DATABASE"])},
    DATABASE_ROUTERS=["django_tenants.routers.TenantSyncRouter"],
    MIDDLEWARE=["django_tenants.middleware.main.TenantMainMiddleware"],
    INSTALLED_APPS=["django.contrib.contenttypes", "django_tenants", "tenants"],
    SHARED_APPS=["django.contrib.contenttypes", "django_tenants", "tenants"],
    TENANT_APPS=["django.contrib.contenttypes"],
    TENANT_MODEL="tenants.Client", TENANT_DOMAIN_MODEL="tenants.Domain",
    DEFAULT_AUTO_FIELD="django.db.models.BigAutoField",
)
import django
django.setup()
from django.core.asgi import get_asgi_application
from django.db import connection, models
from django_tenants.utils import tenant_context
from django_ws import websocket, websockets
from tenants.models import Client, Domain


def query(sql):
    with connection.cursor() as cursor:
        cursor.execute(sql)
        return cursor.fetchone()[0]


def whose(tenant=None):
    try:
        if tenant is None:
            return query("SELECT owner FROM notes")
        with tenant_context(tenant):
            return query("SELECT owner FROM notes")
    except django.db.ProgrammingError:
        return None  # the public schema has no such table


def select(tenant):
    connection.set_tenant(tenant)
    whose()


async def look(socket, looks):
    looks.append(await sync_to_async(whose)())
    looks.append(await sync_to_async(whose)(socket.tenant))


async def view(socket):
    """Look with and without asking for the tenant."""
    looks = []
    await look(socket, looks)
    await socket.accept()
    await socket.receive_text()
    await look(socket, looks)
    await socket.send_json([socket.tenant.schema_name, *looks])


async def selecting(socket):
    """Ask for the tenant once, as middleware does, and look later."""
    await socket.accept()
    await sync_to_async(select)(socket.tenant)
    await socket.send_text("selected")
    await socket.receive_text()
    look = await sync_to_async(whose)()
    await socket.send_json([socket.tenant.schema_name, look])


def set_up():
    with connection.schema_editor() as editor:
        editor.create_model(Client)
        editor.create_model(Domain)
    for number in range(30):
        name = f"t{number}"
        client = Client.objects.create(schema_name=name)
        Domain.objects.create(domain=f"{name}.example.com", tenant=client)
        with connection.cursor() as cursor:
            cursor.execute(f"CREATE SCHEMA {name}")
            cursor.execute(f"CREATE TABLE {name}.notes AS SELECT '{name}' AS owner")
    connection.close()


if os.environ.get("SET_UP"):
    set_up()
urlpatterns = [websocket("ws/", view), websocket("select/", selecting)]
application = websockets(get_asgi_application())
'''


class TestTenants:
    @pytest.mark.parametrize("path, age", [("/ws/", 0), ("/ws/", 600), ("/select/", 0)])
    def test_no_row_of_another_tenant(
        self,
        postgres: Any,
        tmp_path: pathlib.Path,
        monkeypatch: pytest.MonkeyPatch,
        path: str,
        age: int,
    ) -> None:
        needs("django_tenants")
        engine = "django_tenants.postgresql_backend"
        entry = {**postgres, "ENGINE": engine, "CONN_MAX_AGE": age}
        (tmp_path / "tenants").mkdir()
        (tmp_path / "tenants" / "models.py").write_text(TENANTS_MODELS)
        (tmp_path / "tenants" / "__init__.py").touch()
        (tmp_path / "tenanted.py").write_text(TENANTS_APPLICATION)
        monkeypatch.setenv("DATABASE", json.dumps(entry))
        if not administer(
            postgres, "SELECT 1 FROM pg_tables WHERE tablename = 'tenants_client'"
        ):
            monkeypatch.setenv("SET_UP", "yes")
        with (
            Process(tmp_path, *UVICORN, "tenanted:application") as server,
            contextlib.ExitStack() as stack,
        ):
            clients = []
            for number in range(30):
                origin = f"http://t{number}.example.com:{server.port}"
                raw = sockets.create_connection(("127.0.0.1", server.port))
                uri = f"ws://t{number}.example.com:{server.port}{path}"
                clients.append(
                    stack.enter_context(dial(uri, sock=raw, origin=Origin(origin)))
                )
            if path == "/select/":
                for client in clients:
                    assert client.recv(10) == "selected"
            for client in clients:
                client.send("look")
            answers = [seen(client) for client in clients]
        assert [answer[0] for answer in answers] == [f"t{n}" for n in range(30)]
        foreign = [
            (own, look)
            for own, *looks in answers
            for look in looks
            if look not in (None, own)
        ]
        assert not foreign
        if path == "/ws/":
            assert all(own == looks[1] == looks[3] for own, *looks in answers)


# Groups


def serve_all(
    count: int, view: Any, client: Any, kind: type[Live] = Live, **overrides: Any
) -> list[Live]:
    """Serve `count` connections by `view` on one loop while `client(lives)` runs."""
    lives = [kind() for _ in range(count)]

    async def main() -> None:
        application: Any = websockets(no_http)
        async with asyncio.timeout(50):
            for live in lives:
                live.queue.put_nowait(CONNECT)
                live.task = asyncio.create_task(
                    application(live.scope, live.receive, live.send)
                )
            await client(lives)
            for live in lives:
                live.queue.put_nowait(GONE)
            await asyncio.wait([live.task for live in lives])
        for live in lives:
            raise_failure(live.task)
        assert not django_ws._Groups.loops  # nobody is left in any group
        assert asyncio.all_tasks() == {asyncio.current_task()}

    overrides.setdefault("ROOT_URLCONF", urlconf(websocket("ws/", view)))
    with override_settings(**overrides):
        asyncio.run(main())
    return lives


async def member(socket: WebSocket) -> None:
    await socket.accept()
    await socket.join("room")
    await socket.send_text("joined")
    async for message in socket.iter_text():
        await broadcast("room", message)


def messages(live: Live) -> list[Any]:
    """What was sent on a connection after "joined"."""
    kept = [event for event in live.sent if event["type"] == "websocket.send"]
    return [event.get("text", event.get("bytes")) for event in kept[1:]]


async def all_joined(lives: list[Live]) -> None:
    for live in lives:
        await live.until(lambda: len(live.sent) > 1)


class TestGroups:
    def test_a_broadcast_reaches_every_member(self) -> None:
        async def client(lives: list[Live]) -> None:
            await all_joined(lives)
            lives[0].queue.put_nowait(text("hello"))
            for live in lives:
                await live.until(lambda: messages(live) == ["hello"])

        serve_all(5, member, client)

    def test_text_bytes_and_json_encoded_once(self, monkeypatch: Any) -> None:
        encoded: list[Any] = []
        encode = django_ws._encode_json

        def counting(data: Any) -> str:
            encoded.append(data)
            return encode(data)

        monkeypatch.setattr(django_ws, "_encode_json", counting)
        sent = [
            "é",
            b"\x00",
            bytearray(b"a"),
            array.array("B", b"b"),
            {"a": [1]},
            None,
            5,
        ]

        async def client(lives: list[Live]) -> None:
            await all_joined(lives)
            for message in sent:
                await broadcast("room", message)

        expected = ["é", b"\x00", b"a", b"b", '{"a":[1]}', "null", "5"]
        for live in serve_all(3, member, client):
            assert messages(live) == expected
        assert encoded == [{"a": [1]}, None, 5]

    def test_what_cannot_be_sent_is_the_callers_error(self) -> None:
        async def client(lives: list[Live]) -> None:
            await all_joined(lives)
            for bad, error in (
                (object(), TypeError),
                (float("nan"), ValueError),
            ):
                with pytest.raises(error):
                    await broadcast("room", bad)
            group: Any
            for group in (5, None, b"room"):
                with pytest.raises(TypeError, match="name must be str"):
                    await broadcast(group, "x")
                with pytest.raises(TypeError, match="name must be str"):
                    await close_group(group)
            with pytest.raises(ValueError, match="not a valid close code"):
                await close_group("room", 1005)
            with pytest.raises(ValueError, match="123 bytes"):
                await close_group("room", 1000, "x" * 124)

        for live in serve_all(1, member, client):
            assert messages(live) == []

    def test_join_needs_an_accepted_socket(self) -> None:
        async def view(socket: Any) -> None:
            with pytest.raises(RuntimeError, match="call accept.. before join"):
                await socket.join("room")
            await socket.accept()
            with pytest.raises(TypeError, match="name must be str"):
                await socket.join(5)
            await socket.join("room")
            await socket.join("room")
            await broadcast("room", "once")
            await socket.leave("room")
            await socket.leave("room")
            await socket.leave("elsewhere")
            await broadcast("room", "never")
            await socket.join("again")
            await socket.close()
            with pytest.raises(WebSocketDisconnect):
                await socket.join("room")
            await socket.leave("again")
            assert not django_ws._Groups.loops

        texts = [event.get("text") for event in Drive().run(view)]
        assert texts == [None, "once", None]

    @pytest.mark.parametrize(
        "group", ["", "é 🙂", "a:b*?[c]", "\n", "\ud800", "x" * 9999]
    )
    def test_a_groups_name_is_any_text(self, group: str) -> None:
        async def view(socket: WebSocket) -> None:
            await socket.accept()
            await socket.join(group)
            await broadcast(group, "here")
            await broadcast(f"{group}.", "elsewhere")

        assert [e.get("text") for e in Drive().run(view)] == [None, "here", None]

    @pytest.mark.parametrize(
        "end", ["returns", "raises", "closes", "gone", "cancelled"]
    )
    def test_leaving_is_automatic(self, end: str, caplog: Any) -> None:
        async def view(socket: WebSocket) -> None:
            await socket.accept()
            await socket.join("one")
            await socket.join("two")
            assert django_ws._Groups.loops
            if end == "raises":
                raise ValueError
            if end == "closes":
                await socket.close()
            if end in ("gone", "cancelled"):
                await socket.receive_text()

        async def client(live: Live) -> None:
            await live.until(lambda: live.sent)
            await asyncio.sleep(0.01)
            if end == "cancelled":
                live.task.cancel()
            live.queue.put_nowait(GONE)

        Live().play(view, client)
        assert not django_ws._Groups.loops

    def test_a_member_in_trouble_troubles_nobody_else(
        self, quick: None, caplog: pytest.LogCaptureFixture
    ) -> None:
        async def client(lives: list[Live]) -> None:
            await all_joined(lives)
            lives[0].error = OSError("gone")
            lives[1].error = RuntimeError("closed")
            lives[2].error = KeyError("a server's bug")
            lives[3].error = asyncio.CancelledError()
            await broadcast("room", "a")
            for live in lives[:2]:
                live.queue.put_nowait(GONE)
            for live in lives[:4]:
                await asyncio.wait([live.task])
                live.error = None
            await broadcast("room", "b")

        lives = serve_all(6, member, client)
        assert [messages(live) for live in lives] == [[]] * 4 + [["a", "b"]] * 2
        kinds = [type(r.exc_info[1]).__name__ for r in caplog.records if r.exc_info]
        assert kinds == ["KeyError"]

    def test_a_server_that_failed_is_not_asked_again(self) -> None:
        asked: list[Any] = []

        class Failing(Live):
            async def send(self, event: dict[str, Any]) -> None:
                asked.append(event.get("text", event["type"]))
                if event.get("text") == "x":
                    raise OSError("gone")
                await super().send(event)

        async def client(live: Live) -> None:
            await live.until(lambda: len(live.sent) == 2)
            await broadcast("room", "x")
            await broadcast("room", "y")
            live.queue.put_nowait(GONE)

        Failing().play(member, client)
        assert asked == ["websocket.accept", "joined", "x"]

    def test_members_that_leave_while_a_broadcast_is_under_way(self) -> None:
        async def client(lives: list[Live]) -> None:
            await all_joined(lives)
            sending = asyncio.create_task(broadcast("room", "x"))
            await asyncio.sleep(0)
            for live in lives[::2]:
                live.queue.put_nowait(GONE)
            await sending
            await asyncio.wait([live.task for live in lives[::2]])
            await broadcast("room", "y")

        lives = serve_all(500, member, client)
        assert all(messages(live) == ["x", "y"] for live in lives[1::2])

    def test_who_has_left_meanwhile_gets_nothing(self) -> None:
        left: list[str] = []

        async def view(socket: WebSocket) -> None:
            await socket.accept()
            await socket.join("room")
            await socket.send_text("joined")
            await socket.receive_text()
            await socket.leave("room")
            left.append(socket.path)
            await socket.receive_text()

        async def client(lives: list[Live]) -> None:
            await all_joined(lives)
            sending = asyncio.create_task(broadcast("room", "x"))
            while not any(messages(live) for live in lives):
                await asyncio.sleep(0)  # it takes some more turns of the loop
            for live in lives:
                live.queue.put_nowait(text("leave"))
            await sending
            await lives[0].until(lambda: len(left) == 2000)
            assert 0 < sum(messages(live) == ["x"] for live in lives) < 2000
            await close_group("room")
            for live in lives:
                live.queue.put_nowait(GONE)

        for live in serve_all(2000, view, client):
            assert live.sent[-1]["type"] == "websocket.send"

    @pytest.mark.parametrize("how", ["broadcasts", "closes its group"])
    def test_who_broadcasts_to_itself_is_cancelled_when_its_client_leaves(
        self, quick: None, how: str
    ) -> None:
        ended: list[bool] = []

        async def view(socket: WebSocket) -> None:
            await socket.accept()
            await socket.join("room")
            try:
                if how == "closes its group":
                    await close_group("room")
                while True:
                    await broadcast("room", "tick")
                    await asyncio.sleep(0.001)
            finally:
                ended.append(True)

        class Leaving(Live):
            async def send(self, event: dict[str, Any]) -> None:
                await super().send(event)
                if event.get("text") == "tick":
                    self.queue.put_nowait(GONE)
                    raise OSError("gone")

        Leaving().play(view, client_waits)
        assert ended == [True]

    def test_an_event_loop_that_stands_still_is_passed_over(self) -> None:
        async def view(socket: WebSocket) -> None:
            await socket.accept()
            await socket.join("room")
            await broadcast("room", "here")

        loops = django_ws._Groups.loops
        loop = asyncio.new_event_loop()
        loops[loop] = django_ws._new_groups()
        assert Drive().run(view)[1]["text"] == "here"
        assert loop in loops
        loop.close()
        assert Drive().run(view)[1]["text"] == "here"
        assert loop not in loops

    def test_a_group_of_ten_thousand(self) -> None:
        sent = 0

        class Counting:
            def __init__(self) -> None:
                self.queue: asyncio.Queue[Any] = asyncio.Queue()

            async def send(self, event: Any) -> None:
                nonlocal sent
                sent += event.get("text") == "x"

        async def view(socket: WebSocket) -> None:
            await socket.accept()
            await socket.join("room")
            await socket.receive_text()

        async def main() -> None:
            application: Any = websockets(no_http)
            ends = [Counting() for _ in range(10_000)]
            scope = Drive().scope
            tasks = []
            for end in ends:
                end.queue.put_nowait(CONNECT)
                tasks.append(
                    asyncio.create_task(application(scope, end.queue.get, end.send))
                )

            def members() -> int:
                groups = django_ws._Groups.loops.get(asyncio.get_running_loop())
                return len(groups.members.get("room", ())) if groups else 0

            async with asyncio.timeout(50):
                while members() < 10_000:
                    await asyncio.sleep(0.05)
                await broadcast("room", "x")
                await close_group("room", 4000)
                await asyncio.wait(tasks)

        with override_settings(ROOT_URLCONF=urlconf(websocket("ws/", view))):
            asyncio.run(main())
        assert sent == 10_000
        assert not django_ws._Groups.loops


class TestCloseGroup:
    @pytest.mark.parametrize("what", ["reads", "sleeps", "child reads"])
    def test_it_ends_every_socket_and_its_view(self, quick: None, what: str) -> None:
        ends: list[Any] = []

        async def view(socket: WebSocket) -> None:
            await socket.accept()
            await socket.join("room")
            await socket.send_text("joined")
            try:
                if what == "reads":
                    await socket.receive_text()
                elif what == "sleeps":
                    await asyncio.sleep(3600)
                else:
                    async with asyncio.TaskGroup() as group:
                        group.create_task(socket.receive_text())
                        group.create_task(asyncio.sleep(3600))
            except WebSocketDisconnect as error:
                ends.append((error.code, error.reason))
                raise
            except ExceptionGroup as group_:
                ends.append(str(group_.exceptions[0]))
                raise
            except asyncio.CancelledError:
                ends.append("cancelled")
                raise

        async def client(lives: list[Live]) -> None:
            await all_joined(lives)
            await asyncio.sleep(0.1)
            await broadcast("room", "last words")
            await close_group("room", 4001, "logged out")
            await asyncio.wait([live.task for live in lives])

        lives = serve_all(3, view, client)
        for live in lives:
            assert messages(live) == ["last words"]
            close = {"type": "websocket.close", "code": 4001, "reason": "logged out"}
            assert live.sent[-1] == close
            assert live.task.exception() is None
        child = "the WebSocket has ended: 4001 logged out"
        end = {"reads": (4001, "logged out"), "sleeps": "cancelled"}.get(what, child)
        assert ends == [end] * 3

    @pytest.mark.parametrize("ahead", [False, True])
    def test_a_member_that_closes_its_group_closes_all_of_it(self, ahead: bool) -> None:
        """Though its own client has gone when it comes to the others."""

        class Answering(Live):
            async def send(self, event: dict[str, Any]) -> None:
                await super().send(event)
                if event["type"] == "websocket.close":
                    self.queue.put_nowait(GONE)

        async def view(socket: WebSocket) -> None:
            await socket.accept()
            await socket.join("room")
            await socket.send_text("joined")
            if await socket.receive_text() == "you":
                if ahead:
                    await asyncio.sleep(0.1)  # it is read ahead
                await close_group("room", 4006)
            await socket.receive_text()

        async def client(lives: list[Live]) -> None:
            await all_joined(lives)
            lives[0].queue.put_nowait(text("you"))
            await asyncio.wait([live.task for live in lives])

        watch, WebSocket.WATCH = WebSocket.WATCH, 0.05
        try:
            lives = serve_all(250, view, client, Answering)
        finally:
            WebSocket.WATCH = watch
        assert all(live.sent[-1].get("code") == 4006 for live in lives)

    def test_a_sender_whose_own_send_fails_reaches_the_others(self) -> None:
        async def view(socket: WebSocket) -> None:
            await socket.accept()
            await socket.join("room")
            await socket.send_text("joined")
            async for message in socket.iter_text():
                await broadcast("room", message)

        class Failing(Live):
            async def send(self, event: dict[str, Any]) -> None:
                if event.get("text") == "x" and self is lives[0]:
                    raise OSError("gone")
                await super().send(event)

        lives: list[Live] = []

        async def client(all_: list[Live]) -> None:
            lives.extend(all_)
            await all_joined(lives)
            lives[0].queue.put_nowait(text("x"))
            await lives[1].until(lambda: sum(map(len, map(messages, lives))) == 249)
            for live in lives:
                live.queue.put_nowait(GONE)

        serve_all(250, view, client, Failing)

    def test_a_cancellation_from_before_is_not_swallowed(self) -> None:
        async def client(lives: list[Live]) -> None:
            await all_joined(lives)
            await asyncio.sleep(0.01)  # it is read
            lives[0].task.cancel()
            await close_group("room")
            await asyncio.wait([lives[0].task])

        [live] = serve_all(1, member, client)
        assert live.task.cancelled()

    @pytest.mark.parametrize("waiting", [1, 99])
    def test_a_client_that_does_not_read_is_closed_too(self, waiting: int) -> None:

        async def client(slow: Any) -> None:
            await slow.stops()
            for number in range(1 + waiting):
                await broadcast("room", str(number))
            await close_group("room", 4001)
            await slow.until(lambda: not django_ws._Groups.loops)  # the view has ended
            slow.reads.set()
            await asyncio.wait([slow.task])

        slow = serve_slow(member, client)
        assert messages(slow) == [*map(str, range(1 + waiting))]
        assert slow.sent[-1]["code"] == 4001

    def test_a_task_that_outlives_its_view_cannot_join(self) -> None:
        tasks: list[Any] = []

        async def late(socket: WebSocket) -> None:
            await asyncio.sleep(0.01)
            with pytest.raises(WebSocketDisconnect):
                await socket.join("late")

        async def view(socket: WebSocket) -> None:
            await socket.accept()
            tasks.append(asyncio.create_task(late(socket)))

        class Slowly(Live):
            async def send(self, event: dict[str, Any]) -> None:
                await super().send(event)
                if event["type"] == "websocket.close":
                    await tasks[0]

        Slowly().play(view, client_waits)
        assert not django_ws._Groups.loops

    def test_on_the_wire(self, ws: str, caplog: pytest.LogCaptureFixture) -> None:
        with serve(member, ws=ws) as server, contextlib.ExitStack() as stack:
            clients = [stack.enter_context(server.dial()) for _ in range(3)]
            for client in clients:
                assert client.recv(10) == "joined"
            # From a thread without an event loop, as a signal's receiver is.
            async_to_sync(broadcast)("room", "bye")
            async_to_sync(close_group)("room", 4001, "logged out")
            for client in clients:
                assert client.recv(10) == "bye"
                with pytest.raises(ConnectionClosed) as caught:
                    client.recv(10)
                assert caught.value.rcvd is not None
                assert caught.value.rcvd.code == 4001
                assert caught.value.rcvd.reason == "logged out"
        assert quiet(caplog)

    def test_a_close_that_the_server_fails_to_send_is_still_the_end(
        self, caplog: pytest.LogCaptureFixture
    ) -> None:
        ends: list[int] = []

        async def view(socket: WebSocket) -> None:
            await socket.accept()
            await socket.join("room")
            await socket.send_text("joined")
            try:
                await socket.receive_text()
            except WebSocketDisconnect as end:
                ends.append(end.code)

        class Failing(Live):
            async def send(self, event: dict[str, Any]) -> None:
                if event["type"] == "websocket.close":
                    raise KeyError("a server's bug")
                await super().send(event)

        async def client(live: Live) -> None:
            await live.until(lambda: len(live.sent) == 2)
            await close_group("room", 4001)
            await asyncio.wait([live.task])

        Failing().play(view, client)
        assert ends == [4001]
        assert "The server's send() failed" in caplog.text


class Slow(Live):
    """A client that reads when the test lets it: the server's send waits until then."""

    def __init__(self) -> None:
        super().__init__()
        self.reads = asyncio.Event()
        self.reads.set()

    async def send(self, event: dict[str, Any]) -> None:
        await self.reads.wait()
        await super().send(event)

    async def stops(self) -> None:
        """It got what a member sends when it has joined, and reads no more."""
        await self.until(lambda: len(self.sent) > 1)
        self.reads.clear()

    async def stuck(self, socket: WebSocket) -> None:
        """Be a member whose client did not read what was broadcast just now."""
        await socket.accept()
        await socket.join("room")
        await socket.send_text("joined")
        await socket.receive_text()
        self.reads.clear()
        await broadcast("room", "a")


def serve_slow(view: Any, client: Any, **overrides: Any) -> Slow:
    slow = Slow()
    slow.play(view, client, **overrides)
    return slow


class TestOutbox:
    def test_what_waits_arrives_in_order_when_the_client_reads(self) -> None:
        async def client(slow: Any) -> None:
            await slow.stops()
            for number in range(50):
                await broadcast("room", str(number))
            assert messages(slow) == []
            slow.reads.set()
            await slow.until(lambda: len(messages(slow)) == 50)
            await broadcast("room", "direct")
            slow.queue.put_nowait(GONE)

        slow = serve_slow(member, client)
        assert messages(slow) == [*map(str, range(50)), "direct"]

    @pytest.mark.parametrize("bound", [5, None])
    def test_one_that_overflows_is_closed_with_1013(self, bound: int | None) -> None:
        size = bound or 2**20

        async def client(slow: Any) -> None:
            await slow.stops()
            await broadcast("room", "0")  # is with the server
            await broadcast("room", "x" * (size - 14 * (bound is None)))
            assert bound or not slow.task.done()
            start = time.monotonic()
            await broadcast("room", "too much")
            await broadcast("room", "nobody")
            assert time.monotonic() - start < 4
            slow.reads.set()
            await asyncio.wait([slow.task])

        options = {"WEBSOCKETS": {"OUTBOX": bound}} if bound else {}
        slow = serve_slow(member, client, **options)
        assert messages(slow) == ["0"]
        assert slow.sent[-1]["code"] == 1013
        assert slow.task.exception() is None

    def test_a_message_larger_than_the_outbox_reaches_who_reads(self) -> None:
        async def client(lives: list[Live]) -> None:
            await all_joined(lives)
            for _ in range(5):
                await asyncio.gather(*(broadcast("room", "x" * 99) for _ in range(5)))
            await lives[0].until(lambda: len(messages(lives[0])) == 25)

        [live] = serve_all(1, member, client, WEBSOCKETS={"OUTBOX": 9})
        assert messages(live) == ["x" * 99] * 25

    def test_one_that_never_reads_again_does_not_keep_its_socket(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        assert WebSocket.FLUSH == 5
        monkeypatch.setattr(WebSocket, "FLUSH", 0.05)

        async def client(slow: Any) -> None:
            await slow.stops()
            for number in range(7):
                await broadcast("room", str(number))
            await asyncio.wait([slow.task])

        slow = serve_slow(member, client, WEBSOCKETS={"OUTBOX": 50})
        assert messages(slow) == []

    def test_a_client_that_reads_is_waited_for_a_moment(self) -> None:
        async def client(slow: Any) -> None:
            await slow.stops()
            asyncio.get_running_loop().call_later(0.01, slow.reads.set)
            for number in range(1000):
                await broadcast("room", str(number))
            await slow.until(lambda: len(messages(slow)) == 1000)
            slow.queue.put_nowait(GONE)

        slow = serve_slow(member, client)
        assert messages(slow) == [*map(str, range(1000))]

    def test_one_that_leaves_without_reading_is_not_waited_for(
        self, quick: None, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(WebSocket, "FLUSH", 60)

        async def client(slow: Any) -> None:
            await slow.stops()
            await broadcast("room", "a")
            slow.queue.put_nowait(GONE)
            await asyncio.wait([slow.task], timeout=10)
            assert slow.task.done()

        assert messages(serve_slow(member, client)) == []

    def test_a_bare_close_waits_too(self) -> None:
        async def view(socket: WebSocket) -> None:
            await slow.stuck(socket)
            await broadcast("room", "b")
            asyncio.get_running_loop().call_later(0.05, slow.reads.set)
            await socket.send({"type": "websocket.close", "code": 4005})

        async def client(slow: Any) -> None:
            slow.queue.put_nowait(text("go"))

        class OneByOne(Slow):
            async def send(self, event: dict[str, Any]) -> None:
                await self.reads.wait()
                await asyncio.sleep(0)
                await super().send(event)

        slow = OneByOne()
        slow.play(view, client)
        assert messages(slow) == ["a", "b"]
        assert slow.sent[-1]["code"] == 4005

    def test_an_exception_is_reported_before_the_client_has_read_all(
        self, caplog: pytest.LogCaptureFixture
    ) -> None:
        async def view(socket: WebSocket) -> None:
            await slow.stuck(socket)
            raise ValueError("a bug")

        async def client(slow: Any) -> None:
            slow.queue.put_nowait(text("go"))
            await slow.until(lambda: "a bug" in caplog.text)
            slow.reads.set()

        slow = Slow()
        slow.play(view, client)
        assert messages(slow) == ["a"] and slow.sent[-1]["code"] == 1011

    def test_a_large_group_of_slow_clients_leaves_others_their_turn(self) -> None:
        turns = 0

        async def others() -> None:
            nonlocal turns
            while True:
                await asyncio.sleep(0)
                turns += 1

        class OneByOne(Live):
            async def send(self, event: dict[str, Any]) -> None:
                await asyncio.sleep(0)
                await super().send(event)

        async def client(lives: list[Live]) -> None:
            await all_joined(lives)
            task = asyncio.create_task(others())
            await asyncio.sleep(0)
            before = turns
            await broadcast("room", "x")
            assert 4 <= turns - before < 100  # of 250 members each
            task.cancel()

        for live in serve_all(1000, member, client, kind=OneByOne):
            assert messages(live) == ["x"]

    def test_a_close_waits_for_what_was_broadcast_before(self) -> None:
        async def client(slow: Any) -> None:
            await slow.stops()
            await broadcast("room", "a")
            await broadcast("room", "b")
            await close_group("room", 4003)
            await broadcast("room", "never")
            slow.reads.set()
            await asyncio.wait([slow.task])

        slow = serve_slow(member, client)
        assert messages(slow) == ["a", "b"]
        assert slow.sent[-1]["code"] == 4003

    def test_the_end_of_a_view_waits_for_what_was_broadcast_before(self) -> None:
        async def view(socket: WebSocket) -> None:
            await slow.stuck(socket)
            await broadcast("room", "b")
            asyncio.get_running_loop().call_later(0.05, slow.reads.set)

        async def client(slow: Any) -> None:
            slow.queue.put_nowait(text("go"))

        slow = Slow()
        slow.play(view, client)
        assert messages(slow) == ["a", "b"]
        assert slow.sent[-1]["code"] == 1000

    def test_the_views_own_messages_need_not_wait_for_the_groups(self) -> None:
        async def view(socket: WebSocket) -> None:
            await slow.stuck(socket)
            await broadcast("room", "b")
            with pytest.raises(TimeoutError):
                async with asyncio.timeout(0.01):
                    await socket.send_text("never sent")
            own = asyncio.create_task(socket.send_text("own"))
            await asyncio.sleep(0)
            slow.reads.set()
            await own

        async def client(slow: Any) -> None:
            slow.queue.put_nowait(text("go"))

        slow = Slow()
        slow.play(view, client)
        assert sorted(messages(slow)) == ["a", "b", "own"]
        assert slow.sent[-1]["code"] == 1000

    def test_the_views_own_close_waits_for_what_was_broadcast_before(self) -> None:
        async def view(socket: WebSocket) -> None:
            await slow.stuck(socket)
            await broadcast("room", "b")
            asyncio.get_running_loop().call_later(0.05, slow.reads.set)
            await socket.close(4004)

        async def client(slow: Any) -> None:
            slow.queue.put_nowait(text("go"))

        slow = Slow()
        slow.play(view, client)
        assert messages(slow) == ["a", "b"]
        assert slow.sent[-1]["code"] == 4004

    def test_a_message_of_the_views_own_that_waits_in_vain(self) -> None:
        raised: list[int] = []

        async def own(socket: WebSocket) -> None:
            try:
                await socket.send_text("own")
            except WebSocketDisconnect as end:
                raised.append(end.code)

        async def view(socket: WebSocket) -> None:
            await slow.stuck(socket)
            async with asyncio.TaskGroup() as tasks:
                for _ in range(3):
                    given_up = tasks.create_task(own(socket))
                await asyncio.sleep(0)
                given_up.cancel()
                slow.error = OSError("gone")
                slow.reads.set()

        async def client(slow: Any) -> None:
            slow.queue.put_nowait(text("go"))

        slow = Slow()
        slow.play(view, client)
        assert raised == [1006] * 2

    @pytest.mark.parametrize("what", ["send_text", "close"])
    def test_a_server_that_fails_in_the_views_turn(self, what: str) -> None:
        ends: list[str] = []

        async def view(socket: WebSocket) -> None:
            await slow.stuck(socket)
            loop = asyncio.get_running_loop()
            loop.call_later(0.01, slow.reads.set)
            try:
                await (socket.send_text("b") if what == "send_text" else socket.close())
                ends.append("closed")
            except WebSocketDisconnect:
                ends.append("raised")

        class Breaking(Slow):
            async def send(self, event: dict[str, Any]) -> None:
                await super().send(event)
                if event.get("text") == "b" or event["type"] == "websocket.close":
                    raise OSError("gone")

        async def client(slow: Any) -> None:
            slow.queue.put_nowait(text("go"))

        slow = Breaking()
        slow.play(view, client)
        assert ends == ["raised" if what == "send_text" else "closed"]

    def test_a_close_that_was_given_up_loses_nothing(self) -> None:
        async def view(socket: WebSocket) -> None:
            await slow.stuck(socket)
            with pytest.raises(TimeoutError):
                async with asyncio.timeout(0.01):
                    await socket.close(4005)
            slow.reads.set()

        async def client(slow: Any) -> None:
            slow.queue.put_nowait(text("go"))

        slow = Slow()
        slow.play(view, client)
        assert messages(slow) == ["a"] and slow.sent[-1]["code"] == 4005

    def test_a_timeout_in_the_servers_send_is_not_the_broadcasters(self) -> None:
        class Impatient(Live):
            async def send(self, event: dict[str, Any]) -> None:
                if event.get("text") == "stuck":
                    try:
                        async with asyncio.timeout(0.02):
                            await asyncio.sleep(3600)
                    except TimeoutError as error:
                        raise OSError("too slow") from error
                await super().send(event)

        async def client(live: Live) -> None:
            await live.until(lambda: len(live.sent) > 1)
            await broadcast("room", "stuck")
            live.queue.put_nowait(GONE)
            await asyncio.wait([live.task])
            await asyncio.sleep(0.1)  # nobody cancels this

        live = Impatient()
        live.play(member, client)
        assert live.task.exception() is None

    def test_a_server_that_cancels_a_send_ends_that_socket(
        self, quick: None, caplog: pytest.LogCaptureFixture
    ) -> None:
        async def client(slow: Any) -> None:
            await slow.stops()
            await broadcast("room", "a")
            slow.error = asyncio.CancelledError()
            slow.reads.set()
            await asyncio.wait([slow.task])

        serve_slow(member, client)
        assert quiet(caplog)

    def test_broadcasts_at_once_wait_for_each_other(self) -> None:
        async def client(slow: Any) -> None:
            await slow.stops()
            asyncio.get_running_loop().call_later(0.01, slow.reads.set)
            await asyncio.gather(*(broadcast("room", str(n)) for n in range(400)))
            await slow.until(lambda: len(messages(slow)) == 400)
            slow.queue.put_nowait(GONE)

        slow = serve_slow(member, client)
        assert messages(slow) == [*map(str, range(400))]

    def test_the_views_own_messages_are_no_overflow(self) -> None:
        async def view(socket: WebSocket) -> None:
            await slow.stuck(socket)
            async with asyncio.TaskGroup() as tasks:
                for _ in range(20):
                    tasks.create_task(socket.send_text("own"))
                await asyncio.sleep(0)
                await broadcast("room", "b")
                slow.reads.set()

        async def client(slow: Any) -> None:
            slow.queue.put_nowait(text("go"))

        slow = Slow()
        slow.play(view, client, WEBSOCKETS={"OUTBOX": 30})
        assert sorted(messages(slow)) == ["a", "b", *["own"] * 20]
        assert slow.sent[-1]["code"] == 1000

    def test_one_socket_in_many_groups(self) -> None:
        async def view(socket: WebSocket) -> None:
            await socket.accept()
            for number in range(50):
                await socket.join(f"group {number}")
            await socket.send_text("joined")
            await socket.receive_text()

        class OneByOne(Live):
            async def send(self, event: dict[str, Any]) -> None:
                await asyncio.sleep(0)
                await super().send(event)

        async def client(live: Live) -> None:
            await live.until(lambda: len(live.sent) == 2)
            groups = [f"group {number}" for number in range(50)]
            await asyncio.gather(*(broadcast(group, group) for group in groups))
            await live.until(lambda: len(live.sent) == 52)
            live.queue.put_nowait(GONE)

        OneByOne().play(view, client)

    def test_a_broadcast_by_the_servers_send_comes_after(self) -> None:
        class Nesting(Slow):
            async def send(self, event: dict[str, Any]) -> None:
                if event.get("text") == "a":
                    await broadcast("room", "nested")
                await super().send(event)

        async def client(slow: Any) -> None:
            await slow.until(lambda: len(slow.sent) > 1)
            await asyncio.gather(*(broadcast("room", one) for one in "abc"))
            await slow.until(lambda: len(messages(slow)) == 4)
            slow.queue.put_nowait(GONE)

        slow = Nesting()
        slow.play(member, client)
        assert messages(slow)[0] == "a"

    @pytest.mark.parametrize("how", ["returns", "raises"])
    def test_a_view_that_ends_waits_only_so_long(
        self, monkeypatch: pytest.MonkeyPatch, how: str
    ) -> None:
        monkeypatch.setattr(WebSocket, "FLUSH", 0.05)

        async def view(socket: WebSocket) -> None:
            await slow.stuck(socket)
            await broadcast("room", "b")
            if how == "raises":
                raise ValueError

        async def client(slow: Any) -> None:
            slow.queue.put_nowait(text("go"))

        slow = Slow()
        slow.play(view, client)
        assert len(slow.sent) == 2  # and the server ends the connection

    def test_the_servers_send_sees_what_happens_to_what_it_waits_for(self) -> None:
        handled: list[str] = []

        class Handling(Live):
            async def send(self, event: dict[str, Any]) -> None:
                if event.get("text") == "x":
                    future = asyncio.get_running_loop().create_future()
                    asyncio.get_running_loop().call_later(
                        0.01, future.set_exception, OSError("lost")
                    )
                    try:
                        await future
                    except OSError as error:
                        handled.append(str(error))
                    await asyncio.sleep(0.01)
                await super().send(event)

        async def client(live: Live) -> None:
            await live.until(lambda: len(live.sent) > 1)
            await broadcast("room", "x")
            await live.until(lambda: messages(live) == ["x"])
            live.queue.put_nowait(GONE)

        Handling().play(member, client)
        assert handled == ["lost"]

    def test_a_failure_while_something_waits(self) -> None:
        async def client(slow: Any) -> None:
            await slow.stops()
            await broadcast("room", "a")
            await broadcast("room", "b")
            slow.error = OSError()
            slow.reads.set()
            slow.queue.put_nowait(GONE)
            await asyncio.wait([slow.task])

        slow = serve_slow(member, client)
        assert messages(slow) == [] and slow.task.exception() is None

    def test_a_thousand_in_a_row_reach_every_member_that_reads(
        self, ws: str, caplog: pytest.LogCaptureFixture
    ) -> None:
        async def view(socket: WebSocket) -> None:
            await socket.accept()
            await socket.join("room")
            await socket.send_text("joined")
            async for size in socket.iter_json():
                for number in range(1000):
                    await broadcast("room", f"{number} " + "x" * size)

        with serve(view, ws=ws) as server, contextlib.ExitStack() as stack:
            clients = [
                stack.enter_context(server.dial(max_queue=None)) for _ in range(4)
            ]
            for client in clients:
                assert client.recv(10) == "joined"
            for size in (10, 10_000):
                clients[0].send(str(size))
                for client in clients:
                    got = [str(client.recv(20)).split()[0] for _ in range(1000)]
                    assert got == [str(number) for number in range(1000)]
        assert quiet(caplog)

    def test_the_server_sends_in_the_context_of_the_socket(self) -> None:
        """Not of who broadcasts: what is logged there would name another client."""
        who = contextvars.ContextVar("who", default="nobody")
        seen: list[str] = []

        class Telling(Live):
            async def send(self, event: dict[str, Any]) -> None:
                if event["type"] == "websocket.send":
                    seen.append(who.get())
                await super().send(event)

        async def client(live: Live) -> None:
            await live.until(lambda: len(live.sent) > 1)
            who.set("who broadcasts")
            await broadcast("room", "x")
            await live.until(lambda: len(seen) == 2)
            live.queue.put_nowait(GONE)

        Telling().play(member, client)
        assert seen == ["nobody", "nobody"]

    def test_the_outbox_counts_bytes(self) -> None:
        async def client(slow: Any) -> None:
            await slow.stops()
            await broadcast("room", "0")  # is with the server
            await broadcast("room", "𝄞" * 10)  # 40 bytes, and 14 of the frame
            slow.reads.set()
            await asyncio.wait([slow.task])

        slow = serve_slow(member, client, WEBSOCKETS={"OUTBOX": 50})
        assert slow.sent[-1]["code"] == 1013


ROOM_APPLICATION = """
import asyncio, os, pathlib, re
from django.conf import settings
settings.configure(
    SECRET_KEY="x", ALLOWED_HOSTS=["*"], ROOT_URLCONF="room",
    WEBSOCKETS={k: v for k, v in {
        "REDIS_URL": os.environ.get("REDIS", ""),
        "PREFIX": os.environ.get("PREFIX", "tests"),
    }.items()},
)
from asgiref.sync import async_to_sync
from django.core.asgi import get_asgi_application
from django.http import HttpResponse
from django.urls import path
from django_ws import broadcast, websocket, websockets


async def room(socket):
    await socket.accept()
    await socket.join("room")
    await socket.send_text(f"joined {os.getpid()}")
    async for message in socket:
        if message == "memory":
            # Not ru_maxrss, which counts what the parent process had at the fork.
            status = pathlib.Path("/proc/self/status").read_text()
            await socket.send_text(re.search(r"VmHWM:\\s+(\\d+) kB", status)[1])
        else:
            await broadcast("room", message)


async def counting(socket):
    await socket.accept()
    await socket.receive_text()
    for number in range(10_000):
        await broadcast("room", {"number": number})
    await socket.send_text("done")


async def echo(socket):
    await socket.accept()
    async for message in socket:
        await socket.send_text(message)


async def ticking(socket):
    await socket.accept()
    await socket.receive_text()
    for number in range(60):
        await broadcast("room", str(number))
        await asyncio.sleep(0.05)


def announce(request):
    try:
        async_to_sync(broadcast)("room", {"sync": request.GET["text"]})
    except Exception as error:
        return HttpResponse(f"{type(error).__module__}.{type(error).__name__}")
    return HttpResponse("announced")


urlpatterns = [
    websocket("room/", room), websocket("count/", counting), websocket("echo/", echo),
    websocket("tick/", ticking), path("announce/", announce),
]
application = websockets(get_asgi_application())
"""


@contextlib.contextmanager
def room_server(
    directory: pathlib.Path, *options: str, **environment: str
) -> Iterator[Process]:
    (directory / "room.py").write_text(ROOM_APPLICATION)
    with pytest.MonkeyPatch.context() as patch:
        for name, value in environment.items():
            patch.setenv(name, value)
        with Process(directory, *UVICORN, *options, "room:application") as server:
            yield server


class TestNobodyIsHeldUp:
    def test_two_that_do_not_read_fill_no_memory(self) -> None:
        class Sized(Slow):
            held = 0

            async def send(self, event: dict[str, Any]) -> None:
                await super().send(event)
                if event.get("text") == "joined":
                    self.reads.clear()

        async def client(lives: list[Live]) -> None:
            await all_joined(lives)
            groups = django_ws._Groups.loops[asyncio.get_running_loop()]
            members = list(groups.members["room"])
            message = "x" * 8_000_000
            for _ in range(60):
                await broadcast("room", message)
            assert all(one._outbox and one._outbox.size < 99 for one in members)
            await asyncio.wait([live.task for live in lives])

        FLUSH, WebSocket.FLUSH = WebSocket.FLUSH, 0.1
        try:
            serve_all(2, member, client, Sized)
        finally:
            WebSocket.FLUSH = FLUSH

    @pytest.mark.parametrize("redis_too", [False, True], ids=["here", "redis"])
    def test_sixty_that_do_not_read_delay_nobody(
        self, redis_too: bool, request: pytest.FixtureRequest
    ) -> None:
        class Member(Slow):
            """Every second client stops reading when it has joined."""

            count = 0

            def __init__(self) -> None:
                super().__init__()
                Member.count += 1
                self.stops_reading = Member.count <= 60

            async def send(self, event: dict[str, Any]) -> None:
                await super().send(event)
                if event.get("text") == "joined" and self.stops_reading:
                    self.reads.clear()

        async def client(lives: list[Live]) -> None:
            await all_joined(lives)
            reading = lives[60:]
            delays, noise = [], []
            for number in range(100):
                start = time.monotonic()
                await asyncio.sleep(0.001)
                noise.append(time.monotonic() - start)
                start = time.monotonic()
                await broadcast("room", f"{number} " + "x" * 20_000)
                for live in reading:
                    await live.until(lambda: len(messages(live)) > number)
                delays.append(time.monotonic() - start)
            # A machine that is busy otherwise needs longer for everything.
            assert sorted(delays)[94] < 0.05 + 10 * (sorted(noise)[94] - 0.001)
            for live in reading:
                live.queue.put_nowait(GONE)
            await asyncio.wait([live.task for live in lives])
            await lives[0].until(lambda: len(asyncio.all_tasks()) == 1)

        options: Any = {}
        if redis_too:
            options = redis_settings(request.getfixturevalue("redis"))
        FLUSH, WebSocket.FLUSH = WebSocket.FLUSH, 0.1
        try:
            lives = serve_all(65, member, client, Member, **options)
        finally:
            WebSocket.FLUSH = FLUSH
        for live in lives[:60]:
            assert len(messages(live)) < 2  # and the server ends the connection

    def test_a_broadcast_that_is_cancelled_reaches_all_or_none(self) -> None:
        async def client(lives: list[Live]) -> None:
            await all_joined(lives)
            sending = asyncio.create_task(broadcast("room", "x"))
            await asyncio.sleep(0)  # it is on its way, and gives others a turn
            sending.cancel()
            await asyncio.wait([sending])
            assert sending.cancelled()
            for live in lives:
                await live.until(lambda: messages(live) == ["x"])

        serve_all(600, member, client)

    def test_what_another_loop_broadcasts_arrives_in_order(self) -> None:
        async def client(lives: list[Live]) -> None:
            async def all_of_them() -> None:
                for number in range(20):
                    await broadcast("room", str(number))

            await all_joined(lives)
            await asyncio.to_thread(asyncio.run, all_of_them())
            await lives[0].until(lambda: len(messages(lives[0])) == 20)
            assert messages(lives[0]) == [str(number) for number in range(20)]

        serve_all(1, member, client)

    def test_no_client_can_break_a_chat_by_a_lone_surrogate(self, ws: str) -> None:
        async def chat(socket: WebSocket) -> None:
            await socket.accept()
            await socket.join("room")
            async for message in socket.iter_json():
                await broadcast("room", message)

        with serve(chat, ws=ws) as server, server.dial() as client:
            client.send('"\\ud800"')
            assert client.recv(10) == "\\ud800"
            client.send('{"a":"\\ud800"}')
            assert client.recv(10) == '{"a":"\\ud800"}'


class TestCrowds:
    @pytest.mark.parametrize("implementation", ["websockets-sansio", "wsproto"])
    def test_a_slow_client_delays_nobody(
        self, tmp_path: pathlib.Path, implementation: str
    ) -> None:
        if not importlib.util.find_spec("wsproto"):
            missing("wsproto")
        options = ("--ws", implementation, "--ws-per-message-deflate", "false")
        with room_server(tmp_path, *options) as server:
            with contextlib.ExitStack() as stack:
                others = [stack.enter_context(server.dial("/room/")) for _ in range(3)]
                for client in others:
                    client.recv(10)
                slow = stack.enter_context(open_raw(server.port, "/room/"))
                late = []
                for number in range(600):
                    message = f"{number} " + "x" * 50_000
                    start = time.monotonic()
                    others[0].send(message)
                    for client in others:
                        assert client.recv(10) == message
                    late.append(time.monotonic() - start)
                assert max(late) < 2
                others[0].send("memory")
                assert json.loads(others[0].recv(10)) < 250_000  # KiB
                slow.settimeout(30)  # the server waits 10 s for its answer
                received = b""
                while part := slow.recv(2**20):
                    received = received[-200:] + part
                assert struct.pack("!H", 1013) + b"reads too slowly" in received
        assert "Traceback" not in server.log.read_text()

    def test_broadcasts_to_two_thousand_do_not_starve_others(
        self, tmp_path: pathlib.Path
    ) -> None:
        drained = threading.Event()
        options = ("--ws-per-message-deflate", "false")
        with room_server(tmp_path, *options) as server, contextlib.ExitStack() as stack:
            crowd = [
                stack.enter_context(open_raw(server.port, "/room/"))
                for _ in range(2000)
            ]

            def drain() -> None:
                with selectors.DefaultSelector() as selector:
                    for raw in crowd:
                        selector.register(raw, selectors.EVENT_READ)
                    while not drained.is_set():
                        for key, _ in selector.select(0.1):
                            key.fileobj.recv(2**16)  # type: ignore[union-attr]

            thread = threading.Thread(target=drain)
            thread.start()
            try:
                client = stack.enter_context(server.dial("/echo/"))
                ticking = stack.enter_context(server.dial("/tick/"))
                ticking.send("go")
                times = []
                deadline = time.monotonic() + 3
                while time.monotonic() < deadline:
                    start = time.monotonic()
                    client.send("x")
                    client.recv(10)
                    times.append(time.monotonic() - start)
                    time.sleep(0.005)
            finally:
                drained.set()
                thread.join()
        times.sort()
        assert times[int(len(times) * 0.99)] < 3  # without turns there is no answer


class TestOptions:
    @pytest.mark.parametrize(
        "options, message",
        [
            ({"REDIS": "redis://"}, "use only REDIS_URL, PREFIX, OUTBOX"),
            ({"OUTBOX": "100"}, "WEBSOCKETS\\['OUTBOX'\\] must be int"),
            ({"OUTBOX": True}, "WEBSOCKETS\\['OUTBOX'\\] must be int"),
            ({"OUTBOX": 0}, "must be at least 1"),
            ({"REDIS_URL": None}, "WEBSOCKETS\\['REDIS_URL'\\] must be str"),
            ({"PREFIX": b"x"}, "WEBSOCKETS\\['PREFIX'\\] must be str"),
            (["REDIS_URL"], "must be a dict"),
            ({"REDIS_URL": "localhost:6379"}, "WEBSOCKETS\\['REDIS_URL'\\]: "),
            ({"REDIS_URL": "redis://localhost?foo=1"}, "\\['REDIS_URL'\\]: .*foo"),
            ({"PREFIX": "a:b"}, "WEBSOCKETS\\['PREFIX'\\] must not contain a colon"),
        ],
    )
    def test_what_is_wrong_is_said_at_the_start(
        self, options: Any, message: str
    ) -> None:
        if "localhost" in str(options):
            needs_redis()
        with override_settings(WEBSOCKETS=options):
            with pytest.raises(ImproperlyConfigured, match=message):
                websockets(no_http)

    def test_a_missing_package_is_named(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setitem(sys.modules, "redis.asyncio", None)
        with override_settings(WEBSOCKETS={"REDIS_URL": "redis://127.0.0.1"}):
            with pytest.raises(ImproperlyConfigured, match="pip install redis"):
                websockets(no_http)


# Groups on a real Redis


class Redis:
    """A redis-server of the tests' own, which can be killed and started again."""

    def __init__(self, *options: str) -> None:
        self.port = free_port()
        self.url = f"redis://127.0.0.1:{self.port}"
        self.command = [
            "redis-server",
            "--port",
            str(self.port),
            "--save",
            "",
            *options,
        ]
        self.start()

    def start(self) -> None:
        quietly: Any = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        self.process = subprocess.Popen(self.command, **quietly)

        def answers() -> bool:
            with contextlib.suppress(OSError):
                sockets.create_connection(("127.0.0.1", self.port)).close()
                return True
            return False

        wait_for(answers)

    def stop(self) -> None:
        self.process.kill()
        self.process.wait()

    def ask(self, *words: str) -> str:
        command = ["redis-cli", "-p", str(self.port), *words]
        return subprocess.run(command, capture_output=True, text=True).stdout


def needs_redis() -> None:
    if not shutil.which("redis-server"):
        missing("redis-server")
    if not importlib.util.find_spec("redis"):
        missing("redis-py")


@pytest.fixture
def redis() -> Iterator[Redis]:
    needs_redis()
    server = Redis()
    yield server
    server.stop()


@pytest.fixture
def sites(redis: Redis, tmp_path: pathlib.Path) -> Iterator[list[Process]]:
    """Two uvicorns with two workers each, on one Redis."""
    with contextlib.ExitStack() as stack:
        yield [
            stack.enter_context(
                room_server(tmp_path, "--workers", "2", REDIS=redis.url)
            )
            for _ in range(2)
        ]


def join_all(sites: list[Process], stack: contextlib.ExitStack) -> Any:
    """Members in every worker process, one each."""
    found: dict[str, ClientConnection] = {}
    deadline = time.monotonic() + 20
    while len(found) < 4:
        assert time.monotonic() < deadline, "not every worker got a connection"
        for site in sites:
            client = stack.enter_context(server_dial(site))
            found.setdefault(str(client.recv(10)), client)
    return list(found.values())


def server_dial(site: Process) -> ClientConnection:
    return site.dial("/room/", max_queue=None)


class TestRedis:
    def test_text_binary_and_json_cross_all_processes(
        self, redis: Redis, sites: list[Process]
    ) -> None:
        with contextlib.ExitStack() as stack:
            clients = join_all(sites, stack)
            for message in ("é", b"\x00\xff", ""):
                clients[0].send(message)
                for client in clients:
                    assert client.recv(10) == message
            # From a synchronous view.
            assert sites[1].get("/announce/?text=hi").body == b"announced"
            for client in clients:
                assert json.loads(client.recv(10)) == {"sync": "hi"}
            # From a plain script, which leaves nothing behind.
            script = (
                "import warnings; warnings.simplefilter('error')\n"
                "import room, threading, django_ws\n"
                "from asgiref.sync import async_to_sync\n"
                "for n in range(3):\n"
                "    async_to_sync(django_ws.broadcast)('room', {'n': n})\n"
                "assert not django_ws._Groups.loops\n"
            )
            environment = {**os.environ, "PYTHONPATH": str(HERE), "REDIS": redis.url}
            before = redis.ask("client", "list").count("\n")
            run = subprocess.run(
                [sys.executable, "-c", script],
                cwd=sites[0].directory,
                env=environment,
                capture_output=True,
                text=True,
            )
            assert (run.returncode, run.stderr) == (0, "")
            for client in clients:
                for n in range(3):
                    assert json.loads(client.recv(10)) == {"n": n}
            assert redis.ask("client", "list").count("\n") <= before
            # One subscriber in each process, on just this group.
            subscribers = redis.ask("pubsub", "numsub", "tests:room")
            assert subscribers.split() == ["tests:room", "4"]
            assert redis.ask("pubsub", "channels").split() == ["tests:room"]
        # Groups without sockets cost nothing.
        wait_for(lambda: not redis.ask("pubsub", "channels").strip())

    def test_ten_thousand_messages_in_order(self, sites: list[Process]) -> None:
        with contextlib.ExitStack() as stack:
            clients = join_all(sites, stack)
            counter = stack.enter_context(sites[0].dial("/count/"))
            counter.send("go")
            for client in clients:
                got = [json.loads(client.recv(30))["number"] for _ in range(10_000)]
                assert got == [*range(10_000)]
            assert counter.recv(10) == "done"

    def test_redis_goes_away_and_comes_back(
        self, redis: Redis, tmp_path: pathlib.Path
    ) -> None:
        with room_server(tmp_path, REDIS=redis.url) as site:
            with contextlib.ExitStack() as stack:
                listener = stack.enter_context(server_dial(site))
                listener.recv(10)
                redis.stop()
                wait_for(lambda: "Redis is away" in site.log.read_text())
                answer = site.get("/announce/?text=lost").body
                assert answer == b"redis.exceptions.ConnectionError"
                redis.start()
                wait_for(lambda: "Redis is back" in site.log.read_text(), 20)
                assert site.get("/announce/?text=again").body == b"announced"
                assert json.loads(listener.recv(10)) == {"sync": "again"}
                late = stack.enter_context(server_dial(site))
                late.recv(10)
                assert site.get("/announce/?text=all").body == b"announced"
                for client in (listener, late):
                    assert json.loads(client.recv(10)) == {"sync": "all"}
        assert site.log.read_text().count("Redis is away") == 1

    def test_a_prefix_keeps_two_sites_apart(
        self, redis: Redis, tmp_path: pathlib.Path
    ) -> None:
        with contextlib.ExitStack() as stack:
            one, two = (
                stack.enter_context(
                    room_server(tmp_path, REDIS=redis.url, PREFIX=prefix)
                )
                for prefix in ("one", "two")
            )
            clients = [stack.enter_context(server_dial(site)) for site in (one, two)]
            for client in clients:
                client.recv(10)
            one.get("/announce/?text=one")
            two.get("/announce/?text=two")
            for client, word in zip(clients, ("one", "two")):
                assert json.loads(client.recv(10)) == {"sync": word}

    def test_urls_are_redis_pys(self, tmp_path: pathlib.Path) -> None:
        needs_redis()
        path_ = tmp_path / "redis.sock"
        server = Redis("--unixsocket", str(path_), "--requirepass", "secret")
        try:
            for url in (
                f"redis://:secret@127.0.0.1:{server.port}/0",
                f"unix://:secret@{path_}",
            ):
                with room_server(tmp_path, REDIS=url) as site:
                    with server_dial(site) as client:
                        client.recv(10)
                        client.send("hi")
                        assert client.recv(10) == "hi"
        finally:
            server.stop()

    def test_what_is_no_message_of_ours_is_named_and_left(
        self, redis: Redis, tmp_path: pathlib.Path
    ) -> None:
        with room_server(tmp_path, REDIS=redis.url) as site:
            with server_dial(site) as client:
                client.recv(10)
                redis.ask("publish", "tests:room", "c-rubbish")
                redis.ask("publish", "tests:room", "tgood")
                assert client.recv(10) == "good"
        assert "Not a message of django_ws" in site.log.read_text()


def redis_settings(redis: Redis) -> dict[str, Any]:
    return {"WEBSOCKETS": {"REDIS_URL": redis.url, "PREFIX": "here"}}


class TestRedisHere:
    """The same on hand-driven connections, for what has to be exact."""

    def test_it_does_what_groups_do(self, redis: Redis) -> None:
        async def client(lives: list[Live]) -> None:
            await all_joined(lives)
            for message in ("a", b"b", {"c": 1}):
                await broadcast("room", message)
            await close_group("room", 4001, "the end é")
            await asyncio.wait([live.task for live in lives])
            await lives[0].until(lambda: len(asyncio.all_tasks()) == 1)

        for live in serve_all(3, member, client, **redis_settings(redis)):
            assert messages(live) == ["a", b"b", '{"c":1}']
            assert live.sent[-1]["code"] == 4001
            assert live.sent[-1]["reason"] == "the end é"

    def test_groups_come_and_go(self, redis: Redis) -> None:
        async def view(socket: WebSocket) -> None:
            await socket.accept()
            for number in range(30):
                await socket.join("stays")
                await socket.join(f"group {number % 3}")
                await broadcast(f"group {number % 3}", str(number))
                assert await got.get() == str(number)
                await socket.leave(f"group {number % 3}")
            await socket.leave("stays")
            while len(asyncio.all_tasks()) > 3:
                await asyncio.sleep(0.001)

        got: asyncio.Queue[str] = asyncio.Queue()

        class Putting(Live):
            async def send(self, event: dict[str, Any]) -> None:
                await super().send(event)
                if "text" in event:
                    got.put_nowait(event["text"])

        Putting().play(view, client_waits, **redis_settings(redis))
        assert not redis.ask("pubsub", "channels").strip()

    def test_leaving_and_joining_at_once(self, redis: Redis) -> None:
        async def view(socket: WebSocket) -> None:
            await socket.accept()
            await socket.join("other")
            await socket.join("room")
            async with asyncio.timeout(10):
                for _ in range(20):
                    await socket.leave("room")
                    await socket.join("room")
            await broadcast("room", "here")
            await socket.receive_text()

        async def client(live: Live) -> None:
            await live.until(lambda: len(live.sent) > 1)
            live.queue.put_nowait(GONE)
            await asyncio.wait([live.task])
            await live.until(lambda: len(asyncio.all_tasks()) == 1)

        live = Live()
        live.play(view, client, **redis_settings(redis))
        assert live.sent[1]["text"] == "here"

    def test_a_join_that_was_given_up(self, redis: Redis) -> None:
        async def view(socket: WebSocket) -> None:
            await socket.accept()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(0):
                    await socket.join("room")
            await socket.join("other")
            await broadcast("room", "it is a member even so")
            await asyncio.wait_for(socket.receive_text(), 10)

        async def client(live: Live) -> None:
            await live.until(lambda: len(live.sent) == 2)
            live.queue.put_nowait(GONE)
            await live.until(lambda: len(asyncio.all_tasks()) == 1)

        live = Live()
        live.play(view, client, **redis_settings(redis))
        assert messages(live) == []  # the first is left out there

    def test_a_join_that_was_given_up_before_redis_confirmed_it(
        self, redis: Redis
    ) -> None:
        async def view(socket: WebSocket) -> None:
            await socket.accept()
            await socket.join("other")
            redis.process.send_signal(signal.SIGSTOP)  # it confirms nothing more
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(0.2):
                    await socket.join("room")
                    raise AssertionError("Redis is stopped")
            redis.process.send_signal(signal.SIGCONT)
            await asyncio.wait_for(socket.join("third"), 10)
            await broadcast("room", "it is a member even so")
            await asyncio.wait_for(socket.receive_text(), 10)

        async def client(live: Live) -> None:
            await live.until(lambda: len(live.sent) == 2)
            live.queue.put_nowait(GONE)
            await live.until(lambda: len(asyncio.all_tasks()) == 1)

        live = Live()
        live.play(view, client, **redis_settings(redis))
        assert live.sent[1]["text"] == "it is a member even so"

    def test_leaving_while_another_task_joins(self, redis: Redis) -> None:
        async def view(socket: WebSocket) -> None:
            await socket.accept()
            joining = asyncio.create_task(socket.join("room"))
            await asyncio.sleep(0)
            await socket.leave("room")
            await joining
            while len(asyncio.all_tasks()) > 3:
                await asyncio.sleep(0.001)

        live = Live()
        live.play(view, client_waits, **redis_settings(redis))
        assert live.sent[-1]["code"] == 1000

    def test_closing_a_group_cancels_a_sleeping_view(self, redis: Redis) -> None:
        """Also that of the socket which made the listener start."""

        async def view(socket: WebSocket) -> None:
            await socket.accept()
            await socket.join("room")
            await socket.send_text("joined")
            await asyncio.sleep(3600)

        async def client(lives: list[Live]) -> None:
            await all_joined(lives)
            start = time.monotonic()
            await close_group("room")
            await asyncio.wait([live.task for live in lives])
            assert time.monotonic() - start < 5
            await lives[0].until(lambda: len(asyncio.all_tasks()) == 1)

        serve_all(2, view, client, **redis_settings(redis))

    def test_a_connection_that_redis_closed_is_made_anew(self, redis: Redis) -> None:
        async def client(lives: list[Live]) -> None:
            await all_joined(lives)
            for number in range(3):
                await broadcast("room", str(number))
                kill = ("client", "kill", "type", "normal")
                await asyncio.to_thread(redis.ask, *kill)
            await lives[0].until(lambda: messages(lives[0]) == ["0", "1", "2"])
            lives[0].queue.put_nowait(GONE)
            await lives[0].until(lambda: len(asyncio.all_tasks()) == 1)

        serve_all(1, member, client, **redis_settings(redis))

    def test_hundreds_of_broadcasts_at_once(self, redis: Redis) -> None:
        async def client(lives: list[Live]) -> None:
            await all_joined(lives)
            await asyncio.gather(*(broadcast("room", str(n)) for n in range(300)))
            await lives[0].until(lambda: len(messages(lives[0])) == 300)
            lives[0].queue.put_nowait(GONE)
            await lives[0].until(lambda: len(asyncio.all_tasks()) == 1)

        serve_all(1, member, client, **redis_settings(redis))

    def test_a_redis_that_does_not_answer_is_a_connection_error(
        self, redis: Redis
    ) -> None:
        from redis.exceptions import ConnectionError as RedisConnectionError

        url = f"{redis.url}?socket_timeout=0.2"
        redis.process.send_signal(signal.SIGSTOP)
        with override_settings(WEBSOCKETS={"REDIS_URL": url}):
            with pytest.raises(RedisConnectionError):
                asyncio.run(broadcast("room", "x"))

    def test_joining_while_redis_is_away_waits_for_it(
        self,
        redis: Redis,
        caplog: pytest.LogCaptureFixture,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        assert list(django_ws._RedisGroups.PAUSES) == [0.1, 10]
        monkeypatch.setattr(django_ws._RedisGroups, "PAUSES", (0.01, 0.02))
        redis.stop()

        async def client(lives: list[Live]) -> None:
            await lives[0].until(lambda: "Redis is away" in caplog.text)
            await asyncio.sleep(0.2)  # it tries again and again, and says it once
            assert caplog.text.count("Redis is away") == 1
            assert len(lives[0].sent) == 1  # accepted, not joined
            from redis.exceptions import ConnectionError as RedisConnectionError

            with pytest.raises(RedisConnectionError):
                await broadcast("room", "lost")
            await asyncio.to_thread(redis.start)
            await all_joined(lives)
            await broadcast("room", "here")
            for live in lives:
                await live.until(lambda: messages(live) == ["here"])
            for live in lives:
                live.queue.put_nowait(GONE)
            await lives[0].until(lambda: len(asyncio.all_tasks()) == 1)

        serve_all(2, member, client, **redis_settings(redis))

    def test_joins_that_were_given_up_while_it_is_away_are_forgotten(
        self, redis: Redis, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(django_ws._RedisGroups, "PAUSES", (0.01, 0.02))
        redis.stop()
        tried: list[int] = []

        async def view(socket: WebSocket) -> None:
            await socket.accept()
            for number in range(100):
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(0.001):
                        await socket.join(f"room {number}")
                tried.append(number)
            await socket.receive()

        async def client(live: Live) -> None:
            await live.until(lambda: len(tried) == 100)
            groups: Any = django_ws._Groups.loops[asyncio.get_running_loop()]
            await live.until(lambda: len(groups.joining) < 10)
            live.queue.put_nowait(GONE)
            await live.until(lambda: len(asyncio.all_tasks()) == 1)

        Live().play(view, client, **redis_settings(redis))

    def test_a_loop_without_sockets_publishes_and_leaves_nothing(
        self, redis: Redis
    ) -> None:
        with override_settings(**redis_settings(redis)):
            before = redis.ask("client", "list").count("\n")
            asyncio.run(broadcast("room", "x"))
            asyncio.run(close_group("room"))
            assert redis.ask("client", "list").count("\n") <= before
        assert not django_ws._Groups.loops

    def test_rubbish_is_left(
        self, redis: Redis, caplog: pytest.LogCaptureFixture
    ) -> None:
        async def client(lives: list[Live]) -> None:
            await all_joined(lives)
            for data in ("c-rubbish", "tgood"):
                await asyncio.to_thread(redis.ask, "publish", "here:room", data)
            await lives[0].until(lambda: messages(lives[0]) == ["good"])
            lives[0].queue.put_nowait(GONE)
            await lives[0].until(lambda: len(asyncio.all_tasks()) == 1)

        serve_all(1, member, client, **redis_settings(redis))
        assert "Not a message of django_ws" in caplog.text

    def test_silence_is_broken_by_a_ping(
        self,
        redis: Redis,
        monkeypatch: pytest.MonkeyPatch,
        caplog: pytest.LogCaptureFixture,
    ) -> None:
        monkeypatch.setattr(django_ws._RedisGroups, "SILENCE", 0.1)

        async def client(lives: list[Live]) -> None:
            await all_joined(lives)
            await asyncio.sleep(0.5)
            assert quiet(caplog)
            redis.process.send_signal(signal.SIGSTOP)  # there, but mute
            await lives[0].until(lambda: "does not answer" in caplog.text)
            redis.process.send_signal(signal.SIGCONT)
            await lives[0].until(lambda: "Redis is back" in caplog.text)
            await broadcast("room", "here")
            await lives[0].until(lambda: messages(lives[0]) == ["here"])
            lives[0].queue.put_nowait(GONE)
            await lives[0].until(lambda: len(asyncio.all_tasks()) == 1)

        serve_all(1, member, client, **redis_settings(redis))


# Testing


def connected(
    view: Any, path_: str = "/ws/", route: str = "ws/", **options: Any
) -> Any:
    """Connect to one view; upper-case options are settings."""
    overrides = {name: options.pop(name) for name in list(options) if name.isupper()}
    overrides.setdefault("ROOT_URLCONF", urlconf(websocket(route, view)))

    @contextlib.asynccontextmanager
    async def connecting() -> AsyncIterator[Any]:
        with override_settings(**overrides):
            async with connect(websockets(no_http), path_, **options) as socket:
                yield socket

    return connecting()


def run_test(test: Any) -> None:
    """Run an async test, and see that it leaves no task and no receiver behind."""
    receivers = len(signals.got_request_exception.receivers)

    async def main() -> None:
        await test()
        assert asyncio.all_tasks() == {asyncio.current_task()}

    asyncio.run(main())
    assert len(signals.got_request_exception.receivers) == receivers


async def repeating_as_error(socket: WebSocket) -> None:
    await socket.accept()
    raise ValueError(await socket.receive_text())


def baking(get_response: Any) -> Any:
    def middleware(request: HttpRequest) -> Any:
        response = get_response(request)
        response.set_cookie("flavour", "oat", max_age=60)
        return response

    return middleware


def slowly(get_response: Any) -> Any:
    def middleware(request: HttpRequest) -> Any:
        time.sleep(0.5)
        return get_response(request)

    return middleware


class TestConnect:
    def test_messages_go_both_ways(self) -> None:
        async def test() -> None:
            async with connected(echo) as socket:
                assert socket.connected
                await socket.send_text("é")
                assert await socket.receive_text() == "é"
                await socket.send_bytes(bytearray(b"\xff"))
                assert await socket.receive_bytes() == b"\xff"
                await socket.send_json({"at": datetime.date(2026, 1, 2)})
                assert await socket.receive_json() == {"at": "2026-01-02"}
                await socket.send_json([1], binary=True)
                assert await socket.receive() == {
                    "type": SendEvent.SEND,
                    "bytes": b"[1]",
                }
                await socket.send_text("x")
                with pytest.raises(InvalidMessage):
                    await socket.receive_bytes()
                with pytest.raises(TypeError):
                    await socket.send_text(b"x")
            assert not socket.connected

        run_test(test)

    def test_iteration_ends_when_the_view_closes(self) -> None:
        async def view(socket: WebSocket) -> None:
            await socket.accept()
            await socket.send_text("1")
            await socket.send_bytes(b"2")
            await socket.close(4001, "enough")

        async def test() -> None:
            async with connected(view) as socket:
                assert [message async for message in socket] == ["1", b"2"]
                for late in (socket.receive_text(), socket.send_text("x")):
                    with pytest.raises(WebSocketDisconnect) as caught:
                        await late
                    assert (caught.value.code, caught.value.reason) == (4001, "enough")
                await socket.close()
            for kind, expected in (("text", "3"), ("json", 3)):
                async with connected(three) as socket:
                    got = [one async for one in getattr(socket, f"iter_{kind}")()]
                    assert got == [expected] * 2

        async def three(socket: WebSocket) -> None:
            await socket.accept()
            await socket.send_text("3")
            await socket.send_text("3")

        run_test(test)

    def test_the_view_hears_how_its_client_closed(self) -> None:
        ends: list[Any] = []

        async def view(socket: WebSocket) -> None:
            await socket.accept()
            try:
                await socket.receive_text()
            except WebSocketDisconnect as end:
                ends.append((end.code, end.reason))
                with pytest.raises(WebSocketDisconnect):
                    await socket.send_text("late")

        async def test() -> None:
            async with connected(view) as socket:
                with pytest.raises(ValueError, match="not a valid close code"):
                    await socket.close(1005)
                await socket.close(4002, "bye")
            assert ends.pop() == (4002, "bye")
            async with connected(view):
                pass
            assert ends.pop() == (1000, "")

        run_test(test)

    def test_what_the_view_sees_of_the_handshake(self) -> None:
        seen: dict[str, Any] = {}

        async def view(socket: Any, name: str) -> None:
            seen.update(
                name=name,
                query=socket.GET["q"],
                host=socket.get_host(),
                origin=socket.headers.get("Origin"),
                token=socket.headers.get("X-Token"),
                agent=socket.headers.get("User-Agent"),
                offered=socket.subprotocols,
            )
            await socket.accept("chat", headers={"X-Answer": "42"})

        async def test() -> None:
            route, path_ = "<name>/", "/a%20b/?q=%C3%A9"
            async with connected(
                view,
                path_,
                route,
                headers={"x-token": "secret"},
                subprotocols=("other", "chat"),
                client=Client(headers={"User-Agent": "test", "X-Token": "no"}),
            ) as socket:
                assert socket.subprotocol == "chat"
                assert socket.headers["x-answer"] == "42"
            assert seen == {
                "name": "a b",
                "query": "é",
                "host": "testserver",
                "origin": "http://testserver",
                "token": "secret",
                "agent": "test",
                "offered": ["other", "chat"],
            }
            client = AsyncClient(headers={"User-Agent": "async"})
            async with connected(
                view,
                path_,
                route,
                client=client,
                headers={"Origin": None},
                subprotocols=["chat"],
            ):
                assert (seen["agent"], seen["origin"]) == ("async", None)

        run_test(test)

    def test_a_refusal(self) -> None:
        async def view(socket: Any) -> HttpResponse:
            response = HttpResponse("no tea", status=418, headers={"X-Pot": "yes"})
            response.set_cookie("seen", "1")
            return response

        async def only_closes(scope: Any, receive: Any, send: Any) -> None:
            await send({"type": "websocket.close"})

        async def in_parts(scope: Any, receive: Any, send: Any) -> None:
            await send({"type": "websocket.http.response.start", "status": 401})
            for part in (b"not ", b"you"):
                event = {"type": "websocket.http.response.body", "body": part}
                await send({**event, "more_body": part == b"not "})

        async def test() -> None:
            client = AsyncClient()
            with pytest.raises(WebSocketDenied, match="418") as caught:
                async with connected(view, client=client):
                    raise AssertionError("it was refused")
            response = caught.value.response
            assert isinstance(response, HttpResponse)
            assert (response.status_code, response.content) == (418, b"no tea")
            assert response["X-Pot"] == "yes"
            assert response.cookies["seen"].value == "1"
            assert client.cookies["seen"].value == "1"
            for application, status, content in (
                (only_closes, 403, b""),
                (in_parts, 401, b"not you"),
            ):
                with pytest.raises(WebSocketDenied) as caught:
                    async with connect(application, "/"):
                        raise AssertionError("it was refused")
                response = caught.value.response
                assert (response.status_code, response.content) == (status, content)
            with pytest.raises(WebSocketDenied, match="403"):
                origin = {"origin": "https://elsewhere.example"}
                async with connected(echo, headers=origin):
                    raise AssertionError("it was refused")
            with pytest.raises(WebSocketDenied, match="404"):
                async with connected(echo, "/elsewhere/"):
                    raise AssertionError("it was refused")

        run_test(test)

    def test_what_the_view_raises_is_raised(self) -> None:
        async def at_once(socket: WebSocket) -> None:
            raise KeyError("before accept")

        async def after_a_message(socket: WebSocket) -> None:
            await socket.accept()
            await socket.send_text("first")
            raise KeyError("after")

        async def test() -> None:
            with pytest.raises(KeyError, match="before accept"):
                async with connected(at_once):
                    raise AssertionError("it was refused")
            with pytest.raises(ValueError, match="boom"):
                async with connected(repeating_as_error) as socket:
                    await socket.send_text("boom")
                    await socket.receive_text()
                    raise AssertionError("not reached")
            with pytest.raises(ValueError, match="at the end"):
                async with connected(repeating_as_error) as socket:
                    await socket.send_text("at the end")
            async with connected(after_a_message) as socket:
                assert await socket.receive_text() == "first"
                with pytest.raises(KeyError, match="after"):
                    await socket.receive_text()
                with pytest.raises(WebSocketDisconnect, match="1011"):
                    await socket.receive_text()
            async with connected(after_a_message) as socket:
                async with asyncio.timeout(5):
                    while socket._error is None:
                        await asyncio.sleep(0.001)
                with pytest.raises(KeyError, match="after"):
                    await socket.send_text("x")

        run_test(test)

    def test_each_end_hears_of_its_own_view_only(self) -> None:
        async def test() -> None:
            async with connected(echo) as one:
                with pytest.raises(ValueError, match="boom"):
                    async with connected(repeating_as_error) as other:
                        await other.send_text("boom")
                await one.send_text("fine")
                assert await one.receive_text() == "fine"

        run_test(test)

    def test_raise_request_exception_turns_that_off(self) -> None:
        async def test() -> None:
            client = Client(raise_request_exception=False)
            async with connected(repeating_as_error, client=client) as socket:
                await socket.send_text("boom")
                with pytest.raises(WebSocketDisconnect, match="1011"):
                    await socket.receive_text()
            with pytest.raises(WebSocketDenied, match="500"):
                async with connected(raising(ValueError()), client=client):
                    raise AssertionError("it was refused")

        run_test(test)

    def test_any_asgi_application(self) -> None:
        async def application(scope: Any, receive: Any, send: Any) -> None:
            assert (await receive())["type"] == "websocket.connect"
            await send({"type": "websocket.accept", "subprotocol": None})
            assert (await receive())["text"] == "hi"
            if scope["path"] == "/error/":
                raise OSError("its own")

        async def test() -> None:
            async with connect(application, "/") as socket:
                await socket.send_text("hi")
                with pytest.raises(WebSocketDisconnect) as caught:
                    await socket.receive_text()
                assert caught.value.code == 1006
            with pytest.raises(OSError, match="its own"):
                async with connect(application, "/error/") as socket:
                    await socket.send_text("hi")

        run_test(test)

    def test_it_waits_for_a_message_only_so_long(self) -> None:
        async def test() -> None:
            async with connected(echo, timeout=0.05) as socket:
                start = time.monotonic()
                waited = "waited 0.05 s for a message from the view of /ws/"
                for method in (socket.receive_text, socket.receive_json):
                    with pytest.raises(TimeoutError, match=waited):
                        await method()
                assert time.monotonic() - start < 5
                await socket.send_text("nothing is lost")
                assert await socket.receive_text() == "nothing is lost"

        run_test(test)

    def test_it_waits_for_the_handshake_only_so_long(self, quick: None) -> None:
        async def view(socket: WebSocket) -> None:
            await asyncio.sleep(3600)

        async def test() -> None:
            waited = "waited 0.05 s for the answer to the handshake"
            with pytest.raises(TimeoutError, match=waited):
                async with connected(view, timeout=0.05):
                    raise AssertionError("it was not answered")

        run_test(test)

    def test_the_end_waits_for_the_view(self, quick: None) -> None:
        steps: list[str] = []

        async def view(socket: WebSocket) -> None:
            await socket.accept()
            try:
                await asyncio.sleep(3600)
            finally:
                await asyncio.sleep(0.05)
                steps.append("cleaned up")

        async def test() -> None:
            async with connected(view):
                pass
            assert steps == ["cleaned up"]

        run_test(test)

    def test_a_view_that_does_not_end_is_named(self, quick: None) -> None:
        async def stubborn(socket: WebSocket) -> None:
            await socket.accept()
            with contextlib.suppress(asyncio.CancelledError):
                await asyncio.sleep(3600)
            await asyncio.sleep(3600)

        async def raw(scope: Any, receive: Any, send: Any) -> None:
            await send({"type": "websocket.accept"})
            await asyncio.sleep(3600)

        async def test() -> None:
            with pytest.raises(TimeoutError, match="the view of /ws/ has not ended"):
                async with connected(stubborn, timeout=0.05):
                    pass
            with pytest.raises(TimeoutError, match="the view of / has not ended"):
                async with connect(raw, "/", timeout=0.05):
                    pass

        run_test(test)

    def test_the_blocks_own_error_is_the_one_to_see(self) -> None:
        async def test() -> None:
            with pytest.raises(LookupError, match="mine"):
                async with connected(repeating_as_error) as socket:
                    await socket.send_text("the view's")
                    raise LookupError("mine")

        run_test(test)

    @pytest.mark.parametrize("accept", [False, True])
    def test_the_traceback_leads_to_the_view(self, accept: bool) -> None:
        async def view(socket: WebSocket) -> None:
            if accept:
                await socket.accept()
            raise ValueError("here")

        async def test() -> None:
            with pytest.raises(ValueError, match="here") as caught:
                async with connected(view):
                    pass
            assert "view" in [one.name for one in caught.traceback]

        run_test(test)

    @pytest.mark.parametrize("accept", [False, True])
    def test_a_view_may_fail_the_test(self, accept: bool) -> None:
        async def view(socket: WebSocket) -> None:
            if accept:
                await socket.accept()
            pytest.fail("by the view")  # is no Exception

        async def test() -> None:
            with pytest.raises(pytest.fail.Exception, match="by the view"):
                async with connected(view):
                    pass

        run_test(test)

    def test_a_view_that_sends_without_end_is_held_up(self) -> None:
        sent = 0

        async def view(socket: WebSocket) -> None:
            nonlocal sent
            await socket.accept()
            while True:
                await socket.send_text("x")
                sent += 1

        async def test() -> None:
            async with connected(view) as socket:
                for _ in range(100):
                    assert await socket.receive_text() == "x"
            assert sent < 20_000

        run_test(test)

    def test_who_gives_up_during_the_handshake_leaves_nothing(
        self, quick: None
    ) -> None:
        made: list[Any] = []

        def view(socket: WebSocket) -> Any:
            coroutine = echo(socket)
            made.append(weakref.ref(coroutine))
            return coroutine

        async def test() -> None:
            with pytest.raises(TimeoutError):
                async with connect(websockets(no_http), "/ws/", timeout=0.01):
                    pass
            while not made or made[0]() is not None:
                await asyncio.sleep(0.01)
            gc.collect()  # or else: a coroutine was never awaited

        functools.update_wrapper(view, echo)
        settings_ = {
            "MIDDLEWARE": ["test_django_ws.slowly"],
            "ROOT_URLCONF": urlconf(websocket("ws/", view)),
        }
        with override_settings(**settings_):
            run_test(test)

    def test_who_is_cancelled_leaves_nothing(self) -> None:
        async def view(socket: WebSocket) -> None:
            await socket.accept()
            await asyncio.sleep(3600)

        async def test() -> None:
            with pytest.raises(TimeoutError):
                async with asyncio.timeout(0.1):
                    with contextlib.suppress(TimeoutError):
                        async with asyncio.timeout(0.05):
                            async with connected(view):
                                await asyncio.sleep(3600)

        run_test(test)

    def test_what_a_view_does_after_refusing(self, quick: None) -> None:
        async def raises(socket: WebSocket) -> None:
            await socket.close()
            raise ValueError("later")

        async def hangs(socket: WebSocket) -> None:
            await socket.close()
            await asyncio.sleep(3600)

        async def test() -> None:
            with pytest.raises(ValueError, match="later"):
                async with connected(raises):
                    pass
            with pytest.raises(TimeoutError, match="the view of /ws/ has not ended"):
                async with connected(hangs, timeout=0.1):
                    pass

        run_test(test)

    @pytest.mark.parametrize(
        "options",
        [
            {"headers": {"Host": "a.example.com"}},
            {"client": Client(HTTP_HOST="a.example.com")},
            {"client": Client(SERVER_NAME="a.example.com")},
            {"client": AsyncClient(headers={"host": "a.example.com"})},
            {"path_": "ws://a.example.com/ws/"},
            {"path_": "wss://a.example.com/ws/"},
        ],
    )
    def test_the_origin_is_the_hosts(self, options: Any) -> None:
        async def view(socket: WebSocket) -> None:
            await socket.accept()
            await socket.send_text(socket.build_absolute_uri("/"))

        async def test() -> None:
            async with connected(view, **options) as socket:
                scheme = "https" if "wss" in str(options) else "http"
                assert await socket.receive_text() == f"{scheme}://a.example.com/"

        run_test(test)

    def test_headers_are_any_values(self) -> None:
        async def view(socket: WebSocket) -> None:
            await socket.accept()
            names = ("X-Number", "X-Empty", "X-Other", "Upgrade")
            await socket.send_json([socket.headers.get(name) for name in names])

        async def test() -> None:
            headers: Any = {"X-Number": 5, "X-Empty": "", "X-Other": None}
            async with connected(view, headers=headers) as socket:
                assert await socket.receive_json() == ["5", "", None, "websocket"]

        run_test(test)

    def test_without_a_limit(self) -> None:
        async def view(socket: WebSocket) -> None:
            await socket.accept()
            await asyncio.sleep(0.05)
            await socket.send_text("late")

        async def test() -> None:
            async with connected(view, timeout=None) as socket:
                assert await socket.receive_text() == "late"

        run_test(test)

    def test_the_answers_cookies(self) -> None:
        async def test() -> None:
            client = AsyncClient()
            middleware = ["test_django_ws.baking"]
            async with connected(echo, client=client, MIDDLEWARE=middleware) as socket:
                assert socket.cookies["flavour"].value == "oat"
            assert client.cookies["flavour"].value == "oat"
            async with connected(echo, MIDDLEWARE=middleware) as socket:
                assert socket.cookies["flavour"]["max-age"] == "60"

        run_test(test)

    def test_a_redirection_can_be_asserted(self) -> None:
        async def view(socket: Any) -> HttpResponse:
            return redirect("/login/")

        async def test() -> None:
            with pytest.raises(WebSocketDenied, match="302 Found") as caught:
                async with connected(view):
                    pass
            SimpleTestCase().assertRedirects(
                caught.value.response, "/login/", fetch_redirect_response=False
            )

        run_test(test)

    def test_propagated_exceptions(self) -> None:
        async def test() -> None:
            options: Any = {"DEBUG_PROPAGATE_EXCEPTIONS": True}
            with pytest.raises(ValueError, match="boom"):
                async with connected(repeating_as_error, **options) as socket:
                    await socket.send_text("boom")
            denied = raising(PermissionDenied(), accept=True)
            async with connected(denied, **options) as socket:
                with pytest.raises(WebSocketDisconnect, match="1008"):
                    await socket.receive_text()

        run_test(test)

    def test_the_views_error_is_why_it_closed(self) -> None:
        async def view(socket: WebSocket) -> None:
            await socket.accept()
            await socket.close(4001)
            await asyncio.sleep(0.1)  # the client has seen the close by then
            raise ValueError("why")

        async def test() -> None:
            with pytest.raises(ValueError, match="why"):
                async with connected(view) as socket:
                    await socket.receive_text()
            with pytest.raises(WebSocketDisconnect, match="1000"):
                async with connected(accepting) as socket:
                    await socket.receive_json()
                    await socket.receive_text()

        run_test(test)

    def test_a_denial_of_the_blocks_own(self) -> None:
        async def test() -> None:
            with pytest.raises(WebSocketDenied, match="403"):
                async with connected(repeating_as_error) as socket:
                    await socket.send_text("the view's")
                    async with connected(closing):
                        pass

        run_test(test)

    def test_groups_work(self) -> None:
        async def test() -> None:
            async with connected(member) as one, connected(member) as two:
                for socket in (one, two):
                    assert await socket.receive_text() == "joined"
                await broadcast("room", {"to": "all"})
                for socket in (one, two):
                    assert await socket.receive_json() == {"to": "all"}
            assert not django_ws._Groups.loops

        run_test(test)

    def test_it_shows_what_it_is(self) -> None:
        async def test() -> None:
            async with connected(echo) as socket:
                assert repr(socket) == "<the client's end of '/ws/'>"

        run_test(test)


class ConnectInATestCase:
    @override_settings(
        MIDDLEWARE=SESSIONS, ROOT_URLCONF=urlconf(websocket("ws/", names_of_users))
    )
    async def test_a_user_who_is_not_committed_comes_in(self) -> None:
        from django.contrib.auth.models import User

        user = await User.objects.acreate(username="not committed")
        client = Client()
        await sync_to_async(client.force_login)(user)
        async_client = AsyncClient()
        await async_client.aforce_login(user)
        for one in (client, async_client):
            async with connect(websockets(no_http), "/ws/", client=one) as socket:
                await socket.send_text("")
                assert (await socket.receive_json())[0] == "not committed"
        await user.adelete()


class TestConnectInTestCase(ConnectInATestCase, TestCase):
    pass


class TestConnectInTransactionTestCase(ConnectInATestCase, TransactionTestCase):
    def _fixture_teardown(self) -> None:
        pass  # flush nothing: the tables serve all tests


@override_settings(ROOT_URLCONF=urlconf(websocket("ws/", echo)))
class TestConnectInSimpleTestCase(SimpleTestCase):
    async def test_a_socket(self) -> None:
        async with connect(websockets(no_http), "/ws/") as socket:
            await socket.send_text("hi")
            assert await socket.receive_text() == "hi"


# Proof of speed

# The same small jobs by each peer, and what its process has used so far, over HTTP.
PEERS = """
import json, os, resource, time

async def figures(scope, receive, send):
    pages = 0
    if os.path.exists("/proc/self/statm"):
        pages = int(open("/proc/self/statm").read().split()[1])
    body = json.dumps([time.process_time(), pages * resource.getpagesize()]).encode()
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": body})

def beside_figures(application):
    async def either(scope, receive, send):
        chosen = figures if scope["type"] == "http" else application
        await chosen(scope, receive, send)
    return either

def raw():
    members = set()

    async def application(scope, receive, send):
        await receive()
        await send({"type": "websocket.accept"})
        if scope["path"] == "/room/":
            members.add(send)
        try:
            while (event := await receive())["type"] == "websocket.receive":
                text = event["text"]
                if scope["path"] == "/json/":
                    text = json.dumps(json.loads(text))
                message = {"type": "websocket.send", "text": text}
                if scope["path"] == "/room/":
                    for member in tuple(members):
                        await member(message)
                else:
                    await send(message)
        finally:
            members.discard(send)

    return beside_figures(application)

def django_with_its_default_middleware():
    import django
    from django.conf import settings

    settings.configure(
        SECRET_KEY="benchmark" * 6,
        ALLOWED_HOSTS=["127.0.0.1"],
        ROOT_URLCONF="peers",
        SESSION_ENGINE="django.contrib.sessions.backends.signed_cookies",
        INSTALLED_APPS=["django.contrib.auth", "django.contrib.contenttypes"],
        DATABASES={
            "default": {"ENGINE": "django.db.backends.sqlite3", "NAME": ":memory:"}
        },
        CHANNEL_LAYERS={
            "default": {
                "BACKEND": "channels.layers.InMemoryChannelLayer",
                "CONFIG": {"capacity": 100_000},
            }
        },
        MIDDLEWARE=[
            "django.middleware.security.SecurityMiddleware",
            "django.contrib.sessions.middleware.SessionMiddleware",
            "django.middleware.common.CommonMiddleware",
            "django.middleware.csrf.CsrfViewMiddleware",
            "django.contrib.auth.middleware.AuthenticationMiddleware",
            "django.contrib.messages.middleware.MessageMiddleware",
            "django.middleware.clickjacking.XFrameOptionsMiddleware",
        ],
    )
    django.setup()

urlpatterns = []

def django_ws():
    django_with_its_default_middleware()
    from django_ws import broadcast, websocket, websockets

    async def echo(socket):
        await socket.accept()
        while True:
            await socket.send_text(await socket.receive_text())

    async def echo_json(socket):
        await socket.accept()
        while True:
            await socket.send_json(await socket.receive_json())

    async def room(socket):
        await socket.accept()
        await socket.join("room")
        async for text in socket.iter_text():
            await broadcast("room", text)

    urlpatterns.append(websocket("echo/", echo))
    urlpatterns.append(websocket("json/", echo_json))
    urlpatterns.append(websocket("room/", room))
    return websockets(figures)

def starlette():
    from starlette.applications import Starlette
    from starlette.routing import WebSocketRoute
    from starlette.websockets import WebSocketDisconnect

    async def echo(socket):
        await socket.accept()
        try:
            while True:
                await socket.send_text(await socket.receive_text())
        except WebSocketDisconnect:
            pass

    async def echo_json(socket):
        await socket.accept()
        try:
            while True:
                await socket.send_json(await socket.receive_json())
        except WebSocketDisconnect:
            pass

    routes = [WebSocketRoute("/echo/", echo), WebSocketRoute("/json/", echo_json)]
    return beside_figures(Starlette(routes=routes))

def channels():
    django_with_its_default_middleware()
    from channels.auth import AuthMiddlewareStack
    from channels.generic.websocket import AsyncJsonWebsocketConsumer
    from channels.generic.websocket import AsyncWebsocketConsumer
    from channels.routing import URLRouter
    from channels.security.websocket import AllowedHostsOriginValidator
    from django.urls import path

    class Echo(AsyncWebsocketConsumer):
        async def receive(self, text_data=None, bytes_data=None):
            await self.send(text_data=text_data)

    class EchoJson(AsyncJsonWebsocketConsumer):
        async def receive_json(self, content):
            await self.send_json(content)

    class Room(AsyncWebsocketConsumer):
        groups = ["room"]

        async def receive(self, text_data=None, bytes_data=None):
            event = {"type": "chat.message", "text": text_data}
            await self.channel_layer.group_send("room", event)

        async def chat_message(self, event):
            await self.send(text_data=event["text"])

    routes = URLRouter([
        path("echo/", Echo.as_asgi()),
        path("json/", EchoJson.as_asgi()),
        path("room/", Room.as_asgi()),
    ])
    return beside_figures(AllowedHostsOriginValidator(AuthMiddlewareStack(routes)))
"""


class Peer(Process):
    def open(self, path_: str) -> Any:
        from websockets.asyncio.client import connect as dial_async

        origin: Any = f"http://127.0.0.1:{self.port}"
        address = f"ws://127.0.0.1:{self.port}{path_}"
        return dial_async(address, origin=origin, proxy=None, compression=None)

    def used(self) -> tuple[float, int]:
        """Return the process's own CPU time in seconds and its memory in bytes."""
        cpu, memory = json.loads(self.get("/figures").body)
        return cpu, memory

    async def echoes(self, path_: str, message: str, count: int = 1000) -> float:
        """Return microseconds of CPU for each message that is echoed."""

        async def play() -> None:
            async with self.open(path_) as client:
                for _ in range(count):
                    await client.send(message)
                    await client.recv()

        before = self.used()[0]
        await asyncio.gather(*[play() for _ in range(10)])
        return (self.used()[0] - before) / (10 * count) * 1e6

    async def echoes_text(self) -> float:
        return await self.echoes("/echo/", "x" * 32)

    async def echoes_json(self) -> float:
        return await self.echoes("/json/", '{"text": "hello", "to": [1, 2, 3]}')

    async def shakes_hands(self, count: int = 200) -> float:
        """Return microseconds of CPU for each connection, opened and closed."""
        before = self.used()[0]
        for _ in range(count):
            async with self.open("/echo/"):
                pass
        return (self.used()[0] - before) / count * 1e6

    async def delivers(self, members: int = 100, count: int = 50) -> float:
        """Return microseconds of CPU for each message to each member of a group."""
        async with contextlib.AsyncExitStack() as stack:
            clients = [
                await stack.enter_async_context(self.open("/room/"))
                for _ in range(members)
            ]
            joined = False
            while not joined:  # a socket is accepted a little before it is a member
                await clients[0].send("anybody?")
                heard = [asyncio.wait_for(one.recv(), 0.5) for one in clients]
                answers = await asyncio.gather(*heard, return_exceptions=True)
                joined = answers == ["anybody?"] * members
            before = self.used()[0]
            for _ in range(count):
                await clients[0].send("x" * 32)
                await asyncio.gather(*[one.recv() for one in clients])
            return (self.used()[0] - before) / (members * count) * 1e6

    async def idles(self, count: int = 500) -> float:
        """Return KiB of memory for each idle connection; 0 where it cannot be known."""
        async with contextlib.AsyncExitStack() as stack:
            before = self.used()[1]
            for _ in range(count):
                await stack.enter_async_context(self.open("/echo/"))
            return (self.used()[1] - before) / count / 1024


# What is measured, in which unit, and whether Starlette has it, too.
ROWS: dict[str, tuple[Any, str, bool]] = {
    "echo of a text": (Peer.echoes_text, "µs", True),
    "echo of JSON": (Peer.echoes_json, "µs", True),
    "handshake, Django's default middleware": (Peer.shakes_hands, "µs", False),
    "a delivery in a group of 100": (Peer.delivers, "µs", False),
    "idle connection, same middleware": (Peer.idles, "KiB", False),
}


@pytest.mark.benchmark
def test_the_figures(
    tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Print a table of ratios to raw ASGI on the same uvicorn; README has a copy."""
    from importlib.metadata import version

    peers = ["raw", "django_ws"]
    peers += [one for one in ("starlette", "channels") if importlib.util.find_spec(one)]
    (tmp_path / "peers.py").write_text(PEERS)
    command = (*UVICORN, "--log-level", "warning", "--factory")
    found: dict[tuple[str, str], list[float]] = {}
    for title, (job, _, everybody) in ROWS.items():
        fresh = job is Peer.idles  # what was freed before would be used again
        with contextlib.ExitStack() as stack:
            servers = {
                peer: stack.enter_context(Peer(tmp_path, *command, f"peers:{peer}"))
                for peer in peers
                if everybody or peer != "starlette"
            }
            for _ in range(1 if fresh or CI else 3):  # they take turns
                for peer, server in servers.items():
                    if not fresh:
                        asyncio.run(server.echoes("/echo/", "warm up", 20))
                    figure = asyncio.run(job(server))
                    found.setdefault((title, peer), []).append(figure)
    figures = {where: statistics.median(values) for where, values in found.items()}
    lines = [["", "raw ASGI", *peers[1:]], ["---"] * (1 + len(peers))]
    for title, (_, unit, _) in ROWS.items():
        base = figures[title, "raw"]
        lines.append([title, f"1.00 ({base:.1f} {unit})" if base else "–"])
        for peer in peers[1:]:
            figure = figures.get((title, peer), 0)
            lines[-1].append(f"{figure / base:.2f}" if figure and base else "–")
    used = [f"Python {sys.version.split()[0]}"]
    for package in ("django", "uvicorn", "starlette", "channels"):
        if importlib.util.find_spec(package):
            used.append(f"{package} {version(package)}")
    with capsys.disabled():
        print()
        for cells in lines:
            print("|", " | ".join(cells), "|")
        print()
        print("`python -m pytest -m benchmark`:", ", ".join(used))
    assert {title for title, _ in figures} == set(ROWS)


# Over time, and from outside


class TestSoak:
    def test_ten_thousand_connections_leave_nothing_behind(self) -> None:
        loops: list[asyncio.AbstractEventLoop] = []

        async def ending(socket: WebSocket, how: str) -> Any:
            loops[:] = [asyncio.get_running_loop()]
            if how == "returned":
                return HttpResponse(status=401)
            if how == "denied":
                raise PermissionDenied
            await socket.accept()
            message = await socket.receive_text()
            if how == "query":
                await sync_to_async(int)(5)
            elif how == "bad":
                await socket.receive_bytes()
            elif how == "error":
                raise ValueError(message)
            elif how == "close":
                await socket.close(4000)
                await socket.close(4001)
            elif how == "asleep":
                await asyncio.sleep(3600)
            elif how == "group":
                async with asyncio.TaskGroup() as group:
                    group.create_task(asyncio.sleep(3600))
                    group.create_task(socket.receive_text())
            elif how == "gone":
                async for _ in socket:
                    pass
            return None

        ways = (
            *("returned", "denied", "query", "bad", "error", "close", "group"),
            *("gone", "leave", "nowhere/at/all"),
        )

        def connect(how: str, count: int) -> None:
            with open_raw(server.port, f"/ws/{how}/") as raw:
                if how in ("returned", "denied", "nowhere/at/all"):
                    return
                raw.sendall(frame(1, b"hi"))
                if how == "bad":
                    raw.sendall(frame(1, b"hi"))
                if count % 3 == 0:
                    raw.sendall(frame(8, b"\x03\xe8"))  # close 1000
                elif count % 3 == 1:
                    linger = struct.pack("ii", 1, 0)  # reset
                    raw.setsockopt(sockets.SOL_SOCKET, sockets.SO_LINGER, linger)

        def census() -> tuple[int, int, int]:
            [loop] = loops

            def tasks() -> int:
                return len(asyncio.all_tasks(loop))

            # The server's own, and what is still ending.
            wait_for(
                lambda: tasks() <= 1 and len(server.uvicorn.server_state.tasks) == 0
            )
            wait_for(lambda: not server.uvicorn.server_state.connections)
            gc.collect()
            files = len(os.listdir("/proc/self/fd"))
            return tasks(), files, len(gc.get_objects())

        logging.disable(logging.CRITICAL)
        try:
            with serve(websocket("ws/<how>/", ending)) as server:
                for count in range(300):
                    connect(ways[count % len(ways)], count)
                before = census()
                for count in range(9_700):
                    connect(ways[count % len(ways)], count)
                    if count % 100 == 0:
                        connect("asleep", count)
                after = census()
        finally:
            logging.disable(logging.NOTSET)
        assert after[0] <= before[0] and after[1] <= before[1]
        # Some hundred objects more may be caches; one for each connection is a leak.
        assert after[2] - before[2] < 2_000


SLEEPY_APPLICATION = """
import asyncio
from django.conf import settings
settings.configure(SECRET_KEY="x", ALLOWED_HOSTS=["*"], ROOT_URLCONF="sleepy")
from django.core.asgi import get_asgi_application
from django_ws import websocket, websockets


async def asleep(socket):
    await socket.accept()
    try:
        await socket.send_text("ready")
        await asyncio.sleep(3600)
    finally:
        print("finally asleep", flush=True)


async def reading(socket):
    await socket.accept()
    try:
        await socket.send_text("ready")
        await socket.receive_text()
    finally:
        print("finally reading", flush=True)


async def sending(socket):
    await socket.accept()
    try:
        while True:
            await socket.send_text("ready")
            await asyncio.sleep(0.01)
    finally:
        print("finally sending", flush=True)


urlpatterns = [
    websocket(f"{view.__name__}/", view) for view in (asleep, reading, sending)
]
application = websockets(get_asgi_application())
"""


class TestShutdown:
    def open(self, server: Process, stack: contextlib.ExitStack) -> None:
        for name in ("asleep", "reading", "sending"):
            client = stack.enter_context(server.dial(f"/{name}/", max_queue=None))
            assert client.recv(10) == "ready"

    def check(self, log: str) -> None:
        for name in ("asleep", "reading", "sending"):
            assert log.count(f"finally {name}") == 1, log
        assert "Traceback" not in log and "ERROR" not in log, log

    def test_ctrl_c_with_open_sockets(self, ws: str, tmp_path: pathlib.Path) -> None:
        (tmp_path / "sleepy.py").write_text(SLEEPY_APPLICATION)
        command = (*UVICORN, "--ws", ws, "sleepy:application")
        with Process(tmp_path, *command) as server, contextlib.ExitStack() as stack:
            self.open(server, stack)
            start = time.monotonic()
            server.process.send_signal(signal.SIGINT)
            server.process.wait(20)
            assert time.monotonic() - start < 8
        self.check(server.log.read_text())

    def test_reload_with_open_sockets(self, tmp_path: pathlib.Path) -> None:
        (tmp_path / "sleepy.py").write_text(SLEEPY_APPLICATION)
        command = (*UVICORN, "--reload", "sleepy:application")
        with Process(tmp_path, *command) as server, contextlib.ExitStack() as stack:
            self.open(server, stack)
            writes = itertools.count(1)

            def detected() -> bool:
                """Write again until the reloader, which begins late, has seen it."""
                if "Reloading" in server.log.read_text():
                    return True
                change = f"# changed {next(writes)}\n"
                (tmp_path / "sleepy.py").write_text(SLEEPY_APPLICATION + change)
                with contextlib.suppress(AssertionError):
                    wait_for(lambda: "Reloading" in server.log.read_text(), 1)
                return False

            wait_for(detected, 60)
            wait_for(lambda: "Shutting down" in server.log.read_text(), 20)
            start = time.monotonic()
            wait_for(lambda: "Finished server process" in server.log.read_text())
            assert time.monotonic() - start < 8
            self.check(server.log.read_text())

            def ready() -> bool:
                with contextlib.suppress(OSError, ConnectionClosed):
                    with server.dial("/reading/") as client:
                        return bool(client.recv(10) == "ready")
                return False

            wait_for(ready, 30)


# On every server

SERVERS: dict[str, tuple[str, ...]] = {
    "uvicorn websockets": ("uvicorn", "--ws", "websockets-sansio", "--port", "{port}"),
    "uvicorn wsproto": ("uvicorn", "--ws", "wsproto", "--port", "{port}"),
    "hypercorn": ("hypercorn", "--bind", "127.0.0.1:{port}"),
    "daphne": ("daphne", "--port", "{port}"),
    "granian": ("granian", "--interface", "asgi", "--port", "{port}"),
    "gunicorn": ("gunicorn", "--worker-class", "asgi", "--bind", "127.0.0.1:{port}"),
}

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

SERVERS_APPLICATION = """
import asyncio, contextlib
from django.conf import settings
settings.configure(SECRET_KEY="x", ALLOWED_HOSTS=["*"], ROOT_URLCONF="served")
from django.core.asgi import get_asgi_application
from django.http import HttpResponse
from django_ws import WebSocket, WebSocketDisconnect, broadcast
from django_ws import websocket, websockets

WebSocket.GRACE = 1  # not 10


async def echo(socket):
    await socket.accept(headers={"X-Echo": "yes"})
    async for message in socket:
        if isinstance(message, str):
            await socket.send_text(message)
        else:
            await socket.send_bytes(message)


async def member(socket):
    await socket.accept()
    await socket.join("room")
    await socket.send_text("joined")
    async for count in socket.iter_json():
        for number in range(count):
            await broadcast("room", f"{number:20}")


async def deny(socket):
    return HttpResponse("a page", status=401, headers={"X-Why": "because"})


async def closing(socket, code):
    await socket.accept()
    await socket.close(code, "because")


async def leaving(socket):
    await socket.accept()
    try:
        await socket.receive_text()
    except WebSocketDisconnect as end:
        print(f"left {end.code} {end.reason}.", flush=True)


async def busy(socket):
    await socket.accept()
    await socket.receive_text()
    try:
        await asyncio.sleep(3600)
    finally:
        print("busy ended", flush=True)


async def timeouts(socket):
    await socket.accept()
    while True:
        try:
            async with asyncio.timeout(0.001):
                message = await socket.receive_text()
        except TimeoutError:
            continue
        await socket.send_text(message)


async def idle(socket):
    await socket.accept()
    await socket.receive()
    await asyncio.sleep(5)


async def reader(socket):
    async for _ in socket:
        pass


async def pusher(socket):
    await socket.send_text(await asyncio.Queue().get())


async def group_in_view(socket):
    async with asyncio.TaskGroup() as group:
        group.create_task(pusher(socket))
        await reader(socket)


async def group_of_tasks(socket):
    async with asyncio.TaskGroup() as group:
        group.create_task(reader(socket))
        await pusher(socket)


async def waits(socket):
    tasks = [asyncio.create_task(one(socket)) for one in (reader, pusher)]
    try:
        await asyncio.wait(tasks)
    finally:
        for task in tasks:
            task.cancel()


async def gathers(socket):
    await asyncio.gather(reader(socket), pusher(socket))


async def silent(socket):
    await asyncio.sleep(3600)


async def subscribes(socket):
    await socket.receive_text()
    await asyncio.sleep(3600)


async def swallows(socket):
    with contextlib.suppress(asyncio.CancelledError):
        await asyncio.sleep(3600)
    await asyncio.sleep(3600)


def for_ever(call):
    async def view(socket):
        while True:
            try:
                await call(socket)
            except Exception:
                continue
    return view


VIEWS = {
    "group in view": group_in_view, "group of tasks": group_of_tasks, "wait": waits,
    "gather": gathers, "silent": silent, "swallows": swallows,
    "subscribes": subscribes,
    "receive_json": for_ever(lambda socket: socket.receive_json()),
    "send_text": for_ever(lambda socket: socket.send_text("x")),
    "broadcast": for_ever(lambda socket: broadcast("empty", "x")),
    "join": for_ever(lambda socket: socket.join("alone")),
    "close": for_ever(lambda socket: socket.close()),
}


async def ending(socket, name):
    await socket.accept()
    try:
        await VIEWS[name](socket)
    finally:
        print(f"{name} has ended", flush=True)


async def flood(socket):
    await socket.accept()
    for number in range(64):
        await socket.send_bytes(bytes(2**20))
    print("flooded", flush=True)


urlpatterns = [
    websocket("ours/timeouts/", timeouts), websocket("ours/idle/", idle),
    websocket("ours/ends/<name>/", ending),
    websocket("ours/flood/", flood),
    websocket("ours/echo/", echo), websocket("ours/deny/", deny),
    websocket("ours/close/<int:code>/", closing), websocket("ours/left/", leaving),
    websocket("ours/busy/", busy), websocket("ours/room/", member),
]
ours = websockets(get_asgi_application())


async def raw(scope, receive, send):
    await receive()
    what = scope["path"].split("/")[2]
    if what == "deny":
        if "websocket.http.response" not in scope.get("extensions", {}):
            return await send({"type": "websocket.close"})
        headers = [(b"x-why", b"because")]
        start = {"type": "websocket.http.response.start", "status": 401}
        await send({**start, "headers": headers})
        body = {"type": "websocket.http.response.body", "body": b"a page"}
        return await send({**body, "more_body": False})
    headers = [(b"x-echo", b"yes")]
    await send({"type": "websocket.accept", "subprotocol": None, "headers": headers})
    if what == "close":
        code = int(scope["path"].split("/")[3])
        close = {"type": "websocket.close", "code": code, "reason": "because"}
        return await send(close)
    if what == "idle":
        await asyncio.sleep(5)
    if what == "flood":
        for number in range(64):
            await send({"type": "websocket.send", "bytes": bytes(2**20)})
        return print("flooded", flush=True)
    while True:
        try:
            async with asyncio.timeout(0.001 if what == "timeouts" else None):
                event = await receive()
        except TimeoutError:
            continue
        if event["type"] != "websocket.receive":
            break
        text, data = event.get("text"), event.get("bytes")
        message = {"bytes": data} if text is None else {"text": text}
        await send({"type": "websocket.send", **message})
    if what == "left":
        print(f"left {event.get('code')} {event.get('reason') or ''}.", flush=True)


async def application(scope, receive, send):
    if scope["type"] == "websocket" and scope["path"].startswith("/raw/"):
        await raw(scope, receive, send)
    else:
        await ours(scope, receive, send)
"""


@contextlib.contextmanager
def serve_by(name: str, directory: pathlib.Path) -> Iterator[Process]:
    module, *options = SERVERS[name]
    for needed in {module, name.split()[-1]}:
        if not importlib.util.find_spec(needed):
            missing(needed)
    (directory / "served.py").write_text(SERVERS_APPLICATION)
    script = pathlib.Path(sys.executable).with_name(module)
    with Process(directory, script, *options, "served:application") as server:

        def answers() -> bool:
            with contextlib.suppress(OSError):
                return bool(server.get("/ours/echo/").status == 426)
            return False

        wait_for(answers, 20)
        yield server


@pytest.fixture(scope="module", params=SERVERS)
def served(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[str, Process]]:
    """Each server as a process, and its name."""
    with serve_by(request.param, tmp_path_factory.mktemp("served")) as server:
        yield request.param, server


def closed_with(server: Process, path: str) -> Any:
    with server.dial(path) as client:
        with pytest.raises(ConnectionClosed) as caught:
            client.recv(10)
    return caught.value.rcvd


def echoes(server: Process, path: str, *messages: str | bytes) -> None:
    with server.dial(f"{path}echo/", max_size=None) as client:
        for message in messages:
            client.send(message)
            assert client.recv(5) == message


def leaves(server: Process, path: str, pattern: str) -> None:
    with server.log.open() as log:
        log.seek(0, os.SEEK_END)
        with server.dial(f"{path}left/") as client:
            client.close(4001, "bye")
        printed = ""

        def line() -> Any:
            nonlocal printed
            printed += log.read()
            return re.search(r"left (\d+) (.*)\.", printed)

        found = wait_for(line)
        assert re.search(pattern, found[0]), found[0]


def refuses_with_a_page(server: Process, path: str) -> None:
    response = server.handshake(f"{path}deny/")
    assert (response.status, response.body) == (401, b"a page")
    assert response.headers["X-Why"] == "because"


def keeps_order(server: Process, path: str) -> None:
    with server.dial(f"{path}echo/", max_queue=None) as client:
        for number in range(2000):
            client.send(str(number))
        assert [client.recv(10) for _ in range(2000)] == [str(n) for n in range(2000)]


def loses_nothing(server: Process, path: str) -> None:
    with server.dial(f"{path}timeouts/", max_queue=None) as client:
        for number in range(200):
            client.send(str(number))
            time.sleep(0.002)
        assert [client.recv(2) for _ in range(200)] == [str(n) for n in range(200)]


def stops_reading(server: Process, path: str) -> None:
    message = struct.pack("!BBQ4x", 0x82, 0x80 | 127, 2**20) + bytes(2**20)
    with open_raw(server.port, f"{path}idle/") as raw:
        raw.sendall(frame(1, b"go"))
        raw.settimeout(1)
        with pytest.raises(TimeoutError):
            for _ in range(32):
                raw.sendall(message)


def stops_sending(server: Process, path: str) -> None:
    before = server.log.read_text().count("flooded")
    with open_raw(server.port, f"{path}flood/"):
        time.sleep(1)  # what it could do by then, it has done
        assert server.log.read_text().count("flooded") == before


def refuses(server: Process, path: str) -> None:
    assert server.handshake(f"{path}deny/").status in (401, 403)


def answers_with_headers(server: Process, path: str) -> None:
    with server.dial(f"{path}echo/") as client:
        assert client.response and client.response.headers.get("X-Echo") == "yes"


BEHAVIOURS: dict[str, Callable[[Process, str], Any]] = {
    "text": lambda server, path: echoes(server, path, "hello", "déjà vu 🙂"),
    "binary": lambda server, path: echoes(server, path, b"\x00\xff"),
    "1 MiB": lambda server, path: echoes(server, path, "é" * 2**19, b"x" * 2**20),
    "empty messages": lambda server, path: echoes(server, path, "", b""),
    "order under load": keeps_order,
    "cancel-safe receive": loses_nothing,
    "back-pressure on the client": stops_reading,
    "back-pressure on the view": stops_sending,
    "refusal": refuses,
    "refusal with a page": refuses_with_a_page,
    "headers of the answer": answers_with_headers,
    "code": lambda server, path: check(closed_with(server, f"{path}close/4002/"), 4002),
    "standard code": lambda server, path: check(
        closed_with(server, f"{path}close/1008/"), 1008
    ),
    "reason": lambda server, path: check(
        closed_with(server, f"{path}close/4002/"), 4002, "because"
    ),
    "the client's code": lambda server, path: leaves(server, path, "left 4001"),
    "the client's reason": lambda server, path: leaves(server, path, "left .* bye"),
}


def check(received: Any, code: int, reason: str | None = None) -> None:
    assert received.code == code
    assert reason is None or received.reason == reason


class TestServers:
    @pytest.mark.parametrize("behaviour", BEHAVIOURS)
    def test_it(self, served: tuple[str, Process], behaviour: str) -> None:
        name, server = served
        run = BEHAVIOURS[behaviour]
        why = FALLS_SHORT.get((name, behaviour))
        if why is None:
            run(server, "/ours/")
        else:
            with pytest.raises((AssertionError, OSError, pytest.fail.Exception)):
                run(server, "/raw/")
            pytest.skip(f"{name} itself {why}")

    def test_a_busy_view_is_cancelled(self, served: tuple[str, Process]) -> None:
        name, server = served
        with server.dial("/ours/busy/") as client:
            client.send("go")
            time.sleep(0.1)
        left = time.monotonic()
        wait_for(lambda: "busy ended" in server.log.read_text())
        assert time.monotonic() - left < 5

    @pytest.mark.parametrize("how", ["close frame", "reset"])
    def test_every_view_ends_and_stops_nobody(
        self, served: tuple[str, Process], how: str
    ) -> None:
        views = (
            "group in view,group of tasks,wait,gather,silent,swallows,subscribes,"
            "receive_json,send_text,broadcast,join,close"
        ).split(",")
        name, server = served

        def running() -> list[str]:
            log = server.log.read_text()
            return [
                one for one in views if log.count(f"{one} has ended") == before[one]
            ]

        log = server.log.read_text()
        before = {view: log.count(f"{view} has ended") for view in views}
        clients = []
        for view in views:
            path = f"/ours/ends/{view.replace(' ', '%20')}/"
            clients.append(open_raw(server.port, path))
            if view not in ("send_text", "close"):
                clients[-1].sendall(frame(1, b"beat") * 3)
        echoes(server, "/ours/", "while they are there")
        for raw in clients:
            if how == "reset":
                linger = struct.pack("ii", 1, 0)
                raw.setsockopt(sockets.SOL_SOCKET, sockets.SO_LINGER, linger)
            else:
                with contextlib.suppress(OSError):
                    raw.sendall(frame(8, b"\x03\xe8"))
            raw.close()
        echoes(server, "/ours/", "when they are gone")
        # WATCH and twice GRACE, for the one that swallows its cancellation.
        wait_for(lambda: not running(), 6)

    def test_readers_of_a_group_get_everything_and_stay(
        self, served: tuple[str, Process]
    ) -> None:
        name, server = served
        message, count = 2 + 20, 400  # a frame's header and its text
        readers = 200 if name == "granian" else 50
        with contextlib.ExitStack() as stack:
            reads = selectors.DefaultSelector()
            got = {}
            for _ in range(readers):
                raw = sockets.create_connection(("127.0.0.1", server.port))
                stack.enter_context(raw)
                raw.sendall(HANDSHAKE.replace(b"/ws/", b"/ours/room/"))
                answer = b""
                while not answer.endswith(b"joined"):
                    answer += raw.recv(1000)
                reads.register(raw, selectors.EVENT_READ)
                got[raw] = 0
            sender = server.dial("/ours/room/", max_queue=None)
            client = stack.enter_context(sender)
            assert client.recv(10) == "joined"
            client.send(str(count))
            deadline = time.monotonic() + 20
            while min(got.values()) < message * count:
                assert time.monotonic() < deadline
                for key, _ in reads.select(1):
                    raw = key.fileobj  # type: ignore[assignment]
                    data = raw.recv(2**16)
                    assert data, "a reader was closed"
                    got[raw] += len(data)
        assert set(got.values()) == {message * count}

    def test_a_flooded_view_that_never_receives_is_closed_with_1008(
        self, served: tuple[str, Process]
    ) -> None:
        name, server = served
        if name == "daphne":
            pytest.skip("daphne itself cannot send 1008, and logs that it cannot")
        before = server.log.read_text().count("silent has ended")
        with server.dial("/ours/ends/silent/") as client:
            with contextlib.suppress(ConnectionClosed):
                for _ in range(700):
                    client.send("x" * 100)
            wait_for(
                lambda: server.log.read_text().count("silent has ended") > before, 5
            )
            if name not in ("hypercorn", "gunicorn"):  # these read on too late
                with pytest.raises(ConnectionClosed) as caught:
                    client.recv(10)
                assert caught.value.rcvd and caught.value.rcvd.code == 1008
        assert "silent/: closed with 1008" in server.log.read_text()

    @pytest.mark.parametrize("name", SERVERS)
    def test_it_stops_with_open_sockets(
        self, name: str, tmp_path: pathlib.Path
    ) -> None:
        with serve_by(name, tmp_path) as server, server.dial("/ours/busy/") as client:
            client.send("go")
            time.sleep(0.1)
            server.process.terminate()
            try:
                server.process.wait(5)
            except subprocess.TimeoutExpired:
                assert name in ("hypercorn", "gunicorn")
                server.process.kill()
                pytest.skip(f"{name} itself waits for the client, or for 30 s")
            client.close_socket()

    def test_the_log_is_clean(self, served: tuple[str, Process]) -> None:
        _, server = served
        # Tracebacks of the raw application, which shows what a server itself cannot do,
        # are not ours.
        log = server.log.read_text()
        assert "django_ws.py" not in log and "Internal Server Error" not in log


class TestEverythingElse:
    def test_http_and_lifespan_pass_untouched(self) -> None:
        calls = []

        async def app(scope: Any, receive: Any, send: Any) -> None:
            calls.append((scope, receive, send))

        async def receive() -> Any:
            raise AssertionError

        async def send(event: Any) -> None:
            raise AssertionError

        application: Any = websockets(app)
        for kind in ("http", "lifespan", "something new"):
            scope = {"type": kind}
            asyncio.run(application(scope, receive, send))
            assert calls.pop() == (scope, receive, send)
            assert scope == {"type": kind}


# Whatever comes


MISUSE = (RuntimeError, ValueError, TypeError)
CLIENT = [text("a"), text("[1]"), binary(b"b"), binary(b"{}"), text("{"), binary(b"")]
ACTIONS: list[tuple[Any, ...]] = [
    *[("accept",), ("accept", "chat"), ("accept", "other")],
    *[("accept", None, {"X-A": "1"}), ("accept", None, {"X-A": "\n"})],
    *[("close",), ("close", 4000, "bye"), ("close", 1005), ("close", 1000, "x" * 200)],
    *[("send_text", "x"), ("send_text", 1), ("send_bytes", b"x"), ("send_bytes", "x")],
    *[("send_json", [1]), ("send_json", object()), ("send_json", float("nan"))],
    *[("receive_text",), ("receive_bytes",), ("receive_json",), ("receive",)],
    *[("send", {"type": "websocket.accept"}), ("send", {"type": "websocket.close"})],
    *[("send", {"type": "websocket.send", "text": "x"}), ("send", {"type": "?"})],
    *[("raise", ValueError()), ("raise", PermissionDenied()), ("raise", Http404())],
    *[("raise", WebSocketDisconnect()), ("raise", InvalidMessage(1007, "x"))],
    ("return", HttpResponse("no", status=418)),
]


class TestAnySequence:
    def test_events_never_break_the_asgi_specification(self) -> None:
        if not importlib.util.find_spec("hypothesis"):
            missing("hypothesis")
        from hypothesis import given
        from hypothesis import settings as hypothesis_settings
        from hypothesis import strategies as st

        @hypothesis_settings(max_examples=400, deadline=None, database=None)
        @given(
            st.lists(st.sampled_from(CLIENT), max_size=5),
            st.lists(st.sampled_from(ACTIONS), max_size=8),
            st.booleans(),
            st.booleans(),
            st.booleans(),
        )
        def check(
            events: Any, actions: Any, strict: bool, denial: bool, catching: bool
        ) -> None:
            async def view(socket: WebSocket) -> Any:
                for name, *arguments in actions:
                    try:
                        if name == "raise":
                            raise arguments[0]
                        if name == "return":
                            return arguments[0]
                        await getattr(socket, name)(*arguments)
                    except (WebSocketDisconnect, InvalidMessage, *MISUSE):
                        if not catching:
                            raise

            class Strict(Drive):
                """A server that raises after the end, as ASGI 2.4 wants."""

                async def send(self, event: dict[str, Any]) -> None:
                    if strict and not self.events:
                        raise OSError("the client has gone")
                    await super().send(event)

            extensions: Any = {"websocket.http.response": {}} if denial else {}
            drive = Strict(*events, GONE, subprotocols=["chat"], extensions=extensions)
            drive.run(view)
            grammar = re.compile(
                r"(accept (send )*(close )?"
                r"|close |http.response.start http.response.body )"
                + ("|" if strict else "")
            )
            words = [event["type"].removeprefix("websocket.") for event in drive.sent]
            assert grammar.fullmatch("".join(f"{word} " for word in words)), words

        logging.disable(logging.CRITICAL)
        try:
            check()
        finally:
            logging.disable(logging.NOTSET)


# The whole, as strangers meet it


def start_project(directory: pathlib.Path, name: str = "project_name") -> pathlib.Path:
    command = [sys.executable, "-m", "django", "startproject", name, "."]
    subprocess.run(command, cwd=directory, check=True)
    (directory / "django_ws.py").write_text((HERE / "django_ws.py").read_text())
    return directory / name


class TestTutorial:
    def test_verbatim(self, tmp_path: pathlib.Path) -> None:
        project = start_project(tmp_path)
        with (project / "asgi.py").open("a") as file:
            file.write("from django_ws import websockets\n")
            file.write("application = websockets(application)\n")
        (project / "urls.py").write_text("""
from django.urls import path
from django_ws import websocket
from . import views
urlpatterns = [
    path("", views.IndexView.as_view()), websocket("ws/", views.websocket_view)
]
""")
        (project / "views.py").write_text("""
from django.http import HttpResponse
from django.views import View
class IndexView(View):
    def get(self, request):
        return HttpResponse("index")
async def websocket_view(socket):
    await socket.accept()
    while True:
        message = await socket.receive_text()
        await socket.send_text(message)
""")
        application = "project_name.asgi:application"
        with Process(tmp_path, *UVICORN, application) as server:
            assert server.get("/").body == b"index"
            for origin in (f"http://127.0.0.1:{server.port}", None):
                with server.dial("/ws/", origin=origin) as client:
                    for message in ("hello", "déjà", ""):
                        client.send(message)
                        assert client.recv(10) == message
            with server.dial("/ws/") as client:
                client.send("and gone")
                client.close_socket()
        assert "Traceback" not in server.log.read_text()
        assert "ERROR" not in server.log.read_text()


def readme_blocks(language: str) -> list[str]:
    text = (HERE / "README.md").read_text()
    return re.findall(rf"^```{language}\n(.*?)^```$", text, re.M | re.S)


@functools.cache
def make_readme_project(directory: pathlib.Path) -> list[str]:
    project = start_project(directory)
    (project / "urls.py").unlink()
    for block in readme_blocks("python"):
        name = re.match(r"# ((project_name/|test_|conf)\w+\.py)", block)
        if name:
            with (directory / name[1]).open("a") as file:
                file.write(block)
    manage = [sys.executable, "manage.py"]
    subprocess.run([*manage, "migrate", "-v0"], cwd=directory, check=True)
    login = (
        "from django.contrib.auth.models import User\n"
        "from django.test import Client\n"
        "for staff in (False, True):\n"
        "    user = User.objects.create_user(f'ann{staff}', is_staff=staff)\n"
        "    client = Client()\n"
        "    client.force_login(user)\n"
        "    print(client.cookies['sessionid'].value)\n"
    )
    return subprocess.run(
        [*manage, "shell", "-v0", "-c", login],
        cwd=directory,
        check=True,
        capture_output=True,
        text=True,
    ).stdout.split()


def readme_project(directory: pathlib.Path) -> list[str]:
    """Make the project of README's blocks; return the sessions of two users."""
    made = pathlib.Path(TEMPORARY.name) / "readme"
    made.mkdir(exist_ok=True)
    sessions = make_readme_project(made)
    shutil.copytree(made, directory, dirs_exist_ok=True)
    return sessions


class TestReadme:
    def test_every_python_block_names_its_file(self) -> None:
        for block in readme_blocks("python"):
            name = r"hello|chat|conftest|test_with_\w+|mysite/\w+|project_name/\w+"
            assert re.match(rf"# ({name})\.py", block)

    def test_a_chat_in_ten_minutes(self, browser: Any, tmp_path: pathlib.Path) -> None:
        from selenium.webdriver.common.by import By
        from selenium.webdriver.common.keys import Keys

        [commands, serve_it] = [b for b in readme_blocks("sh") if "mysite" in b]
        assert "django-admin startproject mysite .\n" in commands
        assert serve_it == "uvicorn mysite.asgi:application --reload\n"
        blocks = [b for b in readme_blocks("python") if b.startswith("# mysite/")]
        assert sum(len(block.strip().split("\n")) for block in blocks) <= 60
        start_project(tmp_path, "mysite")
        for name, mode, block in zip(("asgi", "urls", "views"), "aww", blocks):
            assert block.startswith(f"# mysite/{name}.py")
            with (tmp_path / "mysite" / f"{name}.py").open(mode) as file:
                file.write(block)
        with Process(tmp_path, *UVICORN, "mysite.asgi:application") as server:
            address = f"http://127.0.0.1:{server.port}/"
            tabs = []
            for who in ("Ann", "Ben"):
                browser.switch_to.new_window("tab")
                browser.get(address)
                tabs.append((browser.current_window_handle, who))
                wait_for(
                    lambda: browser.execute_script("return socket.readyState") == 1
                )
                browser.find_element(By.NAME, "who").send_keys(who)
            for tab, who in tabs:
                browser.switch_to.window(tab)
                browser.find_element(By.NAME, "text").send_keys("<b>hi", Keys.ENTER)
                for other, _ in tabs:
                    browser.switch_to.window(other)
                    wait_for(
                        lambda: f"{who}: <b>hi"
                        in browser.find_element(By.TAG_NAME, "ul").text
                    )
            with server.dial("/ws/lobby/") as client:
                client.send("rubbish")
                with pytest.raises(ConnectionClosed, match="1007"):
                    client.recv(10)
        assert "Traceback" not in server.log.read_text()

    def test_its_recipes_for_tests(self, tmp_path: pathlib.Path) -> None:
        readme_project(tmp_path)
        for command in ("manage.py test", "-m pytest test_with_pytest.py"):
            ran = subprocess.run(
                [sys.executable, *command.split()],
                cwd=tmp_path,
                capture_output=True,
                text=True,
            )
            assert ran.returncode == 0, ran.stdout + ran.stderr
        assert "1 passed" in ran.stdout

    def test_its_recipe_for_pytest_asyncio(self, tmp_path: pathlib.Path) -> None:
        if not importlib.util.find_spec("pytest_asyncio"):
            missing("pytest-asyncio")
        readme_project(tmp_path)
        command = [sys.executable, "-m", "pytest", "test_with_pytest_asyncio.py"]
        ran = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
        assert "1 passed" in ran.stdout, ran.stdout + ran.stderr

    def test_its_celery_task(self, redis: Redis, tmp_path: pathlib.Path) -> None:
        if not importlib.util.find_spec("celery"):
            missing("celery")
        session, _ = readme_project(tmp_path)
        with (tmp_path / "project_name" / "settings.py").open("a") as file:
            file.write(f"WEBSOCKETS['REDIS_URL'] = {redis.url!r}\n")
        program = (
            "import os, django\n"
            "os.environ['DJANGO_SETTINGS_MODULE'] = 'project_name.settings'\n"
            "django.setup()\n"
            "from project_name.tasks import report\n"
            "report.apply(args=[1], throw=True)\n"
        )
        headers = {"Cookie": f"sessionid={session}"}
        with Process(tmp_path, *UVICORN, "project_name.asgi:application") as server:
            with server.dial("/notifications/", additional_headers=headers) as client:
                wait_for(
                    lambda: "1" in redis.ask("pubsub", "numsub", "myproject:user-1")
                )
                command = [sys.executable, "-c", program]
                subprocess.run(command, cwd=tmp_path, check=True)
                told = json.loads(client.recv(10))
                assert told == {"text": "the report for 1 is ready"}

    def test_its_token_middleware(self, tmp_path: pathlib.Path) -> None:
        readme_project(tmp_path)
        sign = (
            "from django.core import signing\n"
            "print(signing.dumps(1, salt='api'), signing.dumps(1, salt='other'))\n"
        )
        manage = [sys.executable, "manage.py", "shell", "-v0", "-c", sign]
        made = subprocess.run(manage, cwd=tmp_path, capture_output=True, text=True)
        good, bad = made.stdout.split()
        with Process(tmp_path, *UVICORN, "project_name.asgi:application") as server:
            headers = {"Authorization": f"Bearer {good}"}
            with server.dial("/whoami/", additional_headers=headers) as client:
                assert json.loads(client.recv(10)) == {"user": "annFalse"}
            refused = server.handshake("/whoami/", Authorization=f"Bearer {bad}")
            assert (refused.status, refused.body) == (401, b"this token is not valid")
            assert server.handshake("/whoami/").status == 302

    def test_behind_its_nginx(self, tmp_path: pathlib.Path) -> None:
        import ssl

        for program in ("nginx", "openssl"):
            if not shutil.which(program, path=f"{os.environ['PATH']}:/usr/sbin"):
                missing(f"Debian's {program}")
        session, _ = readme_project(tmp_path)
        [configuration] = readme_blocks("nginx")
        port, key, certificate = free_port(), tmp_path / "key", tmp_path / "certificate"
        subprocess.run(
            ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes"]
            + ["-subj", "/CN=localhost", "-keyout", str(key), "-out", str(certificate)],
            check=True,
            capture_output=True,
        )
        with Process(tmp_path, *UVICORN, "project_name.asgi:application") as server:
            for here, there in (
                ("listen 443", f"listen 127.0.0.1:{port}"),
                ("/etc/ssl/example.com.pem", str(certificate)),
                ("/etc/ssl/example.com.key", str(key)),
                ("127.0.0.1:8000", f"127.0.0.1:{server.port}"),
            ):
                assert here in configuration
                configuration = configuration.replace(here, there)
            (tmp_path / "nginx.conf").write_text(
                f"daemon off; pid {tmp_path}/nginx.pid; error_log {tmp_path}/error.log;"
                f"events {{}} http {{ access_log off; {configuration} }}"
            )
            nginx = shutil.which("nginx", path=f"{os.environ['PATH']}:/usr/sbin")
            command = [nginx, "-p", tmp_path, "-c", tmp_path / "nginx.conf"]
            with Process(tmp_path, *command, port=port):
                context = ssl.create_default_context(cafile=str(certificate))
                context.check_hostname = False
                options: Any = {"ssl": context, "proxy": None}
                address = f"wss://localhost:{port}"
                headers = {"Cookie": f"sessionid={session}"}
                with dial(
                    f"{address}/whoami/",
                    origin=Origin(f"https://localhost:{port}"),
                    additional_headers=headers,
                    **options,
                ) as client:
                    assert json.loads(client.recv(10)) == {"user": "annFalse"}
                for origin in (f"http://localhost:{port}", "https://evil.example"):
                    with pytest.raises(InvalidStatus, match="403"):
                        dial(f"{address}/ws/", origin=Origin(origin), **options)

    def test_the_shortest_program(self, tmp_path: pathlib.Path) -> None:
        [program] = [b for b in readme_blocks("python") if b.startswith("# hello.py")]
        (tmp_path / "hello.py").write_text(program)
        with Process(tmp_path, *UVICORN, "hello:application") as server:
            with server.dial("/ws/") as client:
                client.send("hi")
                assert client.recv(10) == "hi"

    def test_the_project_that_its_blocks_make(self, tmp_path: pathlib.Path) -> None:
        ann, staff = readme_project(tmp_path)
        application = "project_name.asgi:application"
        with Process(tmp_path, *UVICORN, application) as server:

            def first(path: str, session: str = "", **options: Any) -> Any:
                headers = {"Cookie": f"sessionid={session}"}
                with server.dial(path, additional_headers=headers, **options) as client:
                    return client.recv(10)

            def refused(path: str, session: str = "") -> Any:
                return server.handshake(path, Cookie=f"sessionid={session}").status

            assert b"new WebSocket" in server.get("/").body
            assert server.get("/static/admin/css/base.css").status == 200
            with server.dial("/ws/") as client:
                client.send("hello")
                assert client.recv(10) == "hello"
            assert json.loads(first("/whoami/", ann)) == {"user": "annFalse"}
            assert refused("/whoami/") == 302
            assert refused("/staff/", ann) == 403
            headers = {"Cookie": f"sessionid={staff}"}
            with server.dial("/staff/", additional_headers=headers) as client:
                client.send("1")
                assert json.loads(client.recv(10)) == {"staff": 1}
            assert first("/public/", origin="http://evil.org") == "for everyone"
            with server.dial("/careful/") as client:
                client.send('{"a":1}')
                assert client.recv(10) == '{"a":1}'
                client.send("{")
                with pytest.raises(ConnectionClosed) as caught:
                    client.recv(10)
            assert caught.value.rcvd is not None
            assert caught.value.rcvd.code == 1003
            assert json.loads(first("/room/lobby/", ann)) == {"room": "lobby"}
            assert refused("/room/lobby/") == 302
            headers = {"Cookie": f"sessionid={ann}"}
            with server.dial("/notifications/", additional_headers=headers) as client:
                wait_for(lambda: b"1" in server.get("/order/", **headers).body)
                assert json.loads(client.recv(10)) == {"text": "ordered"}
            wait_for(lambda: "closed with 1003" in server.log.read_text())
        assert "Internal Server Error" not in server.log.read_text()

    def test_logging_out_closes_the_sockets_in_every_process(
        self, redis: Redis, tmp_path: pathlib.Path
    ) -> None:
        session, _ = readme_project(tmp_path)
        project = tmp_path / "project_name"
        with (project / "settings.py").open("a") as file:
            file.write(f"WEBSOCKETS['REDIS_URL'] = {redis.url!r}\n")
        with (project / "urls.py").open("a") as file:
            file.write(
                "from django.contrib.auth import logout\n"
                "from django.http import HttpResponse\n"
                "def out(request):\n"
                "    logout(request)\n"
                "    return HttpResponse('out')\n"
                "urlpatterns.append(path('out/', out))\n"
            )
        headers = {"Cookie": f"sessionid={session}"}
        application = "project_name.asgi:application"
        with contextlib.ExitStack() as stack:
            one, two = (
                stack.enter_context(Process(tmp_path, *UVICORN, application))
                for _ in range(2)
            )
            clients = [
                stack.enter_context(
                    site.dial("/notifications/", additional_headers=headers)
                )
                for site in (one, two)
            ]
            wait_for(lambda: "2" in redis.ask("pubsub", "numsub", "myproject:user-1"))
            assert one.get("/out/", **headers).body == b"out"
            for client in clients:
                with pytest.raises(ConnectionClosed) as caught:
                    client.recv(10)
                assert caught.value.rcvd is not None
                assert caught.value.rcvd.code == 4001
                assert caught.value.rcvd.reason == "logged out"
            assert one.handshake("/notifications/", **headers).status == 302

    def test_the_chat_in_two_tabs(self, browser: Any, tmp_path: pathlib.Path) -> None:
        from selenium.webdriver.common.by import By
        from selenium.webdriver.common.keys import Keys

        [program] = [b for b in readme_blocks("python") if b.startswith("# chat.py")]
        (tmp_path / "chat.py").write_text(program)
        with Process(tmp_path, *UVICORN, "chat:application") as server:
            address = f"http://127.0.0.1:{server.port}/"
            tabs = []
            for _ in range(2):
                browser.switch_to.new_window("tab")
                browser.get(address)
                wait_for(
                    lambda: browser.execute_script("return socket.readyState") == 1
                )
                tabs.append(browser.current_window_handle)
            for number, tab in enumerate(tabs):
                browser.switch_to.window(tab)
                field = browser.find_element(By.TAG_NAME, "input")
                field.send_keys(f"hello from {number}", Keys.ENTER)
                for other in tabs:
                    browser.switch_to.window(other)
                    wait_for(
                        lambda: f"hello from {number}"
                        in browser.find_element(By.TAG_NAME, "ul").text
                    )
            assert not [
                entry
                for entry in browser.get_log("browser")
                if "favicon" not in entry["message"]
            ]

    def test_it_has_the_two_commands(self) -> None:
        commands = [block for block in readme_blocks("sh") if "--python" in block]
        assert [command.count("\n") for command in commands] == [1, 1]
        assert commands[0].rstrip().endswith(".venv/bin/python example.py")
        assert commands[1].rstrip().endswith(".venv/bin/python -m pytest")

    def test_every_public_name_is_in_the_manual_and_in_the_reference(self) -> None:
        """The manual is what pydoc prints, in a shell without any settings."""
        environment = {**os.environ, "PYTHONPATH": str(HERE)}
        environment.pop("DJANGO_SETTINGS_MODULE", None)
        manual = subprocess.run(
            [sys.executable, "-m", "pydoc", "django_ws"],
            capture_output=True,
            text=True,
            env=environment,
        ).stdout
        assert manual.startswith("Help on module django_ws")
        reference = (HERE / "README.md").read_text().split("## Reference")[1]
        reference = reference.split("\n## ")[0]
        for name in django_ws.__all__:
            assert re.search(rf"^    (async |class )?{name}\b", manual, re.M), name
            if name != "WebSocket":  # its methods are
                assert name in reference, name
            if inspect.isfunction(getattr(django_ws, name)):
                assert inspect.getdoc(getattr(django_ws, name))
        for name in vars(WebSocket) | vars(django_ws._Endpoint):
            if not name.startswith("_") and not name.isupper():
                assert name in reference, name
                assert inspect.getdoc(getattr(WebSocket, name)), name

    def test_it_has_the_figures(self) -> None:
        speed = (HERE / "README.md").read_text().split("## Speed")[1].split("\n## ")[0]
        for title in ROWS:
            assert f"| {title} | 1.00 (" in speed
        assert "python -m pytest -m benchmark" in speed

    def test_its_changes_begin_with_this_version(self) -> None:
        changes = (HERE / "README.md").read_text().split("### Changes\n\n")[1]
        assert changes.startswith(f"{django_ws.__version__} (")

    def test_the_licence(self) -> None:
        assert "SPDX-License-Identifier: MIT" in (HERE / "django_ws.py").read_text()
        assert "MIT License" in (HERE / "README.md").read_text()


@pytest.fixture
def browser() -> Iterator[Any]:
    """A real Chromium without a window."""
    if not importlib.util.find_spec("selenium"):
        missing("selenium")
    if not pathlib.Path("/usr/bin/chromedriver").exists():
        missing("Debian's chromium-driver")
    from selenium import webdriver

    options = webdriver.ChromeOptions()
    options.binary_location = "/usr/bin/chromium"
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    for flag in (
        *("headless", "no-sandbox", "disable-gpu", "disable-quic", "no-first-run"),
        *("disable-background-networking", "disable-component-update", "disable-sync"),
    ):
        options.add_argument(f"--{flag}")
    service = webdriver.ChromeService("/usr/bin/chromedriver")
    driver = webdriver.Chrome(options=options, service=service)
    yield driver
    driver.quit()


class TestExample:
    def test_the_page_in_a_browser(self, browser: Any, tmp_path: pathlib.Path) -> None:
        from selenium.webdriver.common.by import By
        from selenium.webdriver.common.keys import Keys

        def state() -> str:
            return str(browser.find_element(By.ID, "state").text)

        def echoes() -> str:
            return str(browser.find_element(By.ID, "log").text)

        example = (sys.executable, HERE / "example.py", "{port}")
        with Process(tmp_path, *example) as server:
            browser.get(f"http://127.0.0.1:{server.port}/")
            wait_for(lambda: state() == "connected")
            wait_for(lambda: "hello" in echoes())
            # By keyboard alone: the first stop is the field, the third is Pause.
            keys = browser.switch_to.active_element
            keys.send_keys(Keys.TAB)
            browser.switch_to.active_element.send_keys("Grüße", Keys.ENTER)
            wait_for(lambda: re.search(r"Grüße\s+[0-9.]+ ms", echoes()))
            news = browser.find_element(By.ID, "news")
            assert news.get_attribute("aria-live") == "polite"
            assert "Grüße" in news.get_attribute("textContent")
            pause = browser.find_element(By.ID, "pause")
            pause.send_keys(Keys.SPACE)
            assert pause.text == "Resume"
            assert not [e for e in browser.get_log("browser") if e["level"] == "SEVERE"]
        wait_for(lambda: state() == "reconnecting")
        with Process(tmp_path, *example, port=server.port):
            wait_for(lambda: state() == "connected", 30)
            field = browser.find_element(By.ID, "text")
            field.send_keys("again", Keys.ENTER)
            wait_for(lambda: "again" in echoes())
        # While the server was down the browser itself says that it found nobody.
        for entry in browser.get_log("browser"):
            assert "WebSocket connection to" in entry["message"], entry
        requests = browser.execute_script(
            "return performance.getEntriesByType('resource').map(entry => entry.name)"
        )
        assert requests == []
        assert "Traceback" not in server.log.read_text()

    def test_a_port_in_use_gets_one_clear_line(self) -> None:
        with sockets.create_server(("127.0.0.1", 0)) as taken:
            port = taken.getsockname()[1]
            run = subprocess.run(
                [sys.executable, HERE / "example.py", str(port)],
                capture_output=True,
                text=True,
                timeout=30,
            )
        assert run.returncode == 1
        [line] = (run.stdout + run.stderr).splitlines()
        assert f"Cannot listen on 127.0.0.1:{port}: Address already in use" in line

    @pytest.mark.parametrize("port", ["abc", "-1", "65536"])
    def test_what_is_no_port_gets_one_clear_line(self, port: str) -> None:
        run = subprocess.run(
            [sys.executable, HERE / "example.py", port],
            capture_output=True,
            text=True,
            timeout=30,
        )
        assert run.returncode == 1
        assert run.stderr == f"{port} is no port: python example.py [1-65535]\n"

    def test_the_default_port_is_8000(self) -> None:
        with contextlib.ExitStack() as stack:
            for _ in range(100):  # another run of the tests holds it for a moment
                with contextlib.suppress(OSError):
                    stack.enter_context(sockets.create_server(("127.0.0.1", 8000)))
                    break
                time.sleep(0.1)
            # Where somebody else has taken it, that is as good.
            run = subprocess.run(
                [sys.executable, HERE / "example.py"],
                capture_output=True,
                text=True,
                timeout=30,
            )
        assert "Cannot listen on 127.0.0.1:8000" in run.stderr


class TestTheCard:
    def test_the_top_level_holds_five_files(self) -> None:
        tracked = subprocess.run(
            ["git", "ls-files"], cwd=HERE, capture_output=True, text=True
        ).stdout.split()
        if not tracked:
            pytest.skip("not a git checkout")
        assert {name.split("/")[0] for name in tracked if name[0] != "."} == {
            *("README.md", "django_ws.py", "example.py", "setup.cfg"),
            "test_django_ws.py",
        }

    def test_the_module_needs_django_and_asgiref_only(self) -> None:
        program = (
            "import sys, django, django.core.handlers.asgi, django.middleware.csrf;"
            "import django.core.serializers.json, django.urls, asgiref.sync;"
            "import django.conf; django.conf.settings.configure();"
            "before = set(sys.modules); import django_ws;"
            "print(*{name.split('.')[0] for name in set(sys.modules) - before})"
        )
        run = subprocess.run(
            [sys.executable, "-c", program],
            cwd=HERE,
            check=True,
            capture_output=True,
            text=True,
        )
        assert set(run.stdout.split()) <= {"django_ws", "django", "asgiref"} | set(
            sys.stdlib_module_names
        )
