# SPDX-License-Identifier: MIT
"""WebSockets for Django, in one file: copy it into your project.

    # asgi.py
    from django_ws import websockets

    application = websockets(get_asgi_application())

    # urls.py
    from django_ws import websocket

    urlpatterns = [path("", index), websocket("ws/<room>/", chat)]

    # views.py
    async def chat(socket, room):
        user = await socket.auser()
        await socket.accept()
        async for message in socket.iter_json():
            await socket.send_json({"room": room, "from": str(user), **message})

The handshake is a Django request: it passes your MIDDLEWARE, is resolved by your
URLconf, is checked against ALLOWED_HOSTS and CSRF_TRUSTED_ORIGINS, and is refused with
your error pages. Serve it with an ASGI server that speaks WebSocket, for example
`pip install 'uvicorn[standard]'` and `uvicorn project.asgi:application`.
"""

import asyncio
import collections
import contextvars
import enum
import importlib.util
import inspect
import io
import json
import logging
import math
import os
import random
import re
import sys
import threading
import time
import types
from collections.abc import (
    AsyncIterator,
    Awaitable,
    Callable,
    Coroutine,
    Iterable,
    Iterator,
    Mapping,
)
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from functools import partial, update_wrapper
from typing import Any, ClassVar, Literal

from asgiref.sync import (
    SyncToAsync,
    ThreadSensitiveContext,
    iscoroutinefunction,
    sync_to_async,
)
from django.conf import settings
from django.core import signals
from django.core.exceptions import ImproperlyConfigured, PermissionDenied
from django.core.handlers.asgi import ASGIHandler, ASGIRequest, get_script_prefix
from django.core.handlers.exception import (
    convert_exception_to_response,
    get_exception_response,
)
from django.core.serializers.json import DjangoJSONEncoder
from django.db import close_old_connections, connections
from django.http import (
    Http404,
    HttpRequest,
    HttpResponse,
    HttpResponseForbidden,
    HttpResponseServerError,
    QueryDict,
)
from django.http.response import HttpResponseBase, ResponseHeaders
from django.middleware.csrf import REASON_BAD_ORIGIN, CsrfViewMiddleware
from django.urls import (
    ResolverMatch,
    URLPattern,
    get_resolver,
    get_urlconf,
    path,
    re_path,
    set_script_prefix,
    set_urlconf,
)
from django.utils.cache import patch_vary_headers
from django.utils.log import log_response

__all__ = [
    "CloseCode",
    "InvalidMessage",
    "ReceiveEvent",
    "SendEvent",
    "WebSocket",
    "WebSocketDisconnect",
    "broadcast",
    "close_group",
    "re_websocket",
    "websocket",
    "websockets",
]

_logger = logging.getLogger("django_ws")
# Tasks that nobody waits for: the event loop itself would not keep them alive.
_background: set[asyncio.Task[None]] = set()

Scope = dict[str, Any]
Event = Mapping[str, Any]
Receive = Callable[[], Awaitable[Event]]
Send = Callable[[Event], Awaitable[None]]
Application = Callable[[Scope, Receive, Send], Coroutine[Any, Any, None]]
View = Callable[..., Any]
Headers = Mapping[Any, str | bytes] | Iterable[tuple[str | bytes, str | bytes]]


# The words of the wire


class SendEvent(enum.StrEnum):
    """What an application sends to the server (ASGI, "WebSocket")."""

    ACCEPT = "websocket.accept"  # completes the handshake, once, before any message
    SEND = "websocket.send"  # one message to the client, text or bytes
    CLOSE = "websocket.close"  # refuses before ACCEPT (HTTP 403), ends after it


class ReceiveEvent(enum.StrEnum):
    """What an application receives from the server (ASGI, "WebSocket")."""

    CONNECT = "websocket.connect"  # first: a client asks for a handshake
    RECEIVE = "websocket.receive"  # one message from the client, text or bytes
    DISCONNECT = "websocket.disconnect"  # last: the connection has ended


class CloseCode(enum.IntEnum):
    """Why a connection ended (RFC 6455, section 7.4, and IANA's registry).

    Codes from 4000 to 4999 are yours to define. Those marked "never sent" are only
    reported, and `WebSocket.close` refuses them.
    """

    NORMAL_CLOSURE = 1000  # what the connection was opened for is done
    GOING_AWAY = 1001  # the page was left, or the server goes down
    PROTOCOL_ERROR = 1002  # a frame broke RFC 6455
    UNSUPPORTED_DATA = 1003  # text where bytes were wanted, or the reverse
    NO_STATUS_RECEIVED = 1005  # never sent: the close frame had no code
    ABNORMAL_CLOSURE = 1006  # never sent: the connection broke without a close frame
    INVALID_FRAME_PAYLOAD_DATA = 1007  # no UTF-8 in a text message, or no JSON
    POLICY_VIOLATION = 1008  # not allowed: what PermissionDenied becomes
    MESSAGE_TOO_BIG = 1009  # larger than the receiver takes
    MANDATORY_EXTENSION = 1010  # the client needs an extension that was not agreed
    INTERNAL_ERROR = 1011  # the server failed: what an exception in a view becomes
    SERVICE_RESTART = 1012  # the server restarts: reconnect after a random 5 to 30 s
    TRY_AGAIN_LATER = 1013  # overload: try again later, or with less
    BAD_GATEWAY = 1014  # a gateway got an invalid response from its upstream
    TLS_HANDSHAKE = 1015  # never sent: the TLS handshake failed
    UNAUTHORIZED = 3000  # like HTTP 401
    FORBIDDEN = 3003  # like HTTP 403
    TIMEOUT = 3008  # like HTTP 408


# What can go wrong


class WebSocketDisconnect(Exception):
    """The connection has ended; left uncaught in a view, it is a normal end.

    `code` is the close code (int) and `reason` its text (str, often empty), of
    whichever side closed; 1005 where the close frame had no code, 1006 where the
    connection broke without one (RFC 6455, section 7.1.5).
    """

    def __init__(self, code: int = CloseCode.NORMAL_CLOSURE, reason: str = "") -> None:
        super().__init__(code, reason)
        self.code = code
        self.reason = reason

    def __str__(self) -> str:
        return f"the WebSocket has ended: {self.code} {self.reason}".rstrip()


class InvalidMessage(Exception):
    """The client sent what the view did not ask for; the socket stays usable.

    `code` (int) is what the connection is closed with where a view leaves it uncaught:
    1003 for bytes in place of text or the reverse, 1007 for what is no JSON
    (RFC 6455, section 7.4.1).
    """

    def __init__(self, code: int, message: str) -> None:
        super().__init__(message)
        self.code = _sendable(code)


def _sendable(code: int) -> int:
    """Return a close code as it may stand in a close frame (RFC 6455, section 7.4)."""
    if 1000 <= code <= 1003 or 1007 <= code <= 1014 or 3000 <= code <= 4999:
        return int(code)
    raise ValueError(f"{code!r} is no close code that may be sent")


def _close_arguments(code: int, reason: str) -> tuple[int, str]:
    if len(reason.encode()) > 123:
        raise ValueError("a close reason has at most 123 bytes of UTF-8")
    return _sendable(code), reason


def _short(reason: str) -> str:
    """Cut a close reason to the 123 bytes that a frame takes (section 5.5)."""
    return reason.encode("utf-8", "replace")[:123].decode("utf-8", "ignore")


# The socket

# A header's name and value (RFC 9110, sections 5.1 and 5.5).
_TOKEN = re.compile(r"[!#$%&'*+.^_`|~0-9A-Za-z-]+")
_VALUE = re.compile(r"[\t -~\x80-\xff]*")
# What the server itself writes on the answer to a handshake: ASGI reserves
# Sec-WebSocket-Protocol ("Accept - send event"), RFC 6455 (section 4.2.2) the others,
# and an answer with the status 101 has no body.
_SERVERS_OWN = re.compile(
    r"connection|upgrade|content-length|transfer-encoding|sec-websocket-.*", re.I
)


def _finite(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise ValueError(f"{text} is no number that JSON can carry")
    return number


# JSON has no NaN and no Infinity (RFC 8259, section 6), though Python's parser takes
# them; the browser at the other end would not.
_decode_json = json.JSONDecoder(parse_float=_finite, parse_constant=_finite).decode
_encode_json = DjangoJSONEncoder(
    separators=(",", ":"), ensure_ascii=False, allow_nan=False
).encode


def _json(data: Any) -> str:
    text = _encode_json(data)
    if not text.isascii():
        # A lone surrogate ("\ud800" in a client's JSON) is no UTF-8. What Python calls
        # backslashreplace writes it as JSON does.
        text = text.encode("utf-8", "backslashreplace").decode()
    return text


def _position(coroutine: Any) -> list[tuple[int, int]]:
    """Tell where a suspended coroutine, and all that it awaits, stands in its code."""
    position = []
    while frame := getattr(coroutine, "cr_frame", None):
        position.append((id(frame), frame.f_lasti))
        coroutine = coroutine.cr_await
    return position


# The lease of the socket whose view a task belongs to; child tasks inherit it. Not the
# socket itself, which timers would keep alive: each holds the context it was made in.
_current: contextvars.ContextVar[Any] = contextvars.ContextVar("django_ws")

# "answering": accept() or close() has not come back from the server yet.
_State = Literal["connecting", "answering", "open", "closed"]


class WebSocket:
    """The server's end of one WebSocket, handed to a view as its first argument.

    Every attribute that is not listed here is that of `request`, the HttpRequest of the
    handshake as the middleware left it: `socket.user`, `await socket.auser()`,
    `socket.session`, `socket.headers`, `socket.COOKIES`, `socket.GET`,
    `socket.resolver_match`, `socket.build_absolute_uri()`. `scope` is the ASGI
    connection scope as the server made it.

    One task at a time may receive; any number may send.
    """

    # Seconds after which it is asked whether a busy view's client has left, and those
    # that a view has to clean up where it is not certain that it knows of the end.
    WATCH = 1.0
    GRACE = 30.0

    __slots__ = (
        "scope",
        "request",
        "_receive",
        "_send",
        "_lease",
        "_connect",
        "_refuse",
        "_headers",
        "_state",
        "_end",
        "_task",
        "_told",
        "_cancelling",
        "_view",
        "_hearer",
        "_position",
        "_deadline",
        "_waiting",
        "_ahead",
        "_timer",
        "_groups",
        "_outbox",
        "__dict__",  # what decorators set on a request; made when first needed
        "__weakref__",
    )

    def __init__(
        self,
        scope: Scope,
        receive: Receive,
        send: Send,
        lease: Any,
    ) -> None:
        self.scope = scope
        self.request: ASGIRequest
        self._receive = receive
        self._send = send
        self._lease = lease
        # Of the handshake, until it is answered: the event that began it, what refuses
        # it, and the headers that the middleware adds to its answer.
        self._connect: Event | None = None
        self._refuse: Callable[[Any], Awaitable[None]] | None = None
        self._headers: Iterable[tuple[bytes, bytes]] = ()
        self._state: _State = "connecting"
        self._end: tuple[int, str] = (CloseCode.ABNORMAL_CLOSURE, "")
        # The view's task and coroutine, and how it knows of the end: by an exception or
        # its own close(), or because it was cancelled.
        self._task: asyncio.Task[Any] | None = None
        self._view: Any = None
        self._told: Literal["", "raised", "cancelled"] = ""
        # How often it was cancelled before that. Not always 0: until Python 3.13
        # a TaskGroup that failed leaves one behind.
        self._cancelling = 0
        # A task of the view's that learned of the end and may be cleaning up, and where
        # the view itself was then: if it has moved on since, it may know, too.
        self._hearer: asyncio.Task[Any] | None = None
        self._position: Iterable[tuple[int, int]] = ()
        self._deadline = 0.0
        # Whether a task waits in receive(), what reads ahead where none does for
        # a second, and the timer for that second.
        self._waiting = False
        self._ahead: asyncio.Future[Event] | None = None
        self._timer: asyncio.TimerHandle | None = None
        # The groups that it is in, and what waits for its client to read.
        self._groups: set[str] | None = None
        self._outbox: _Outbox | None = None

    def __getattr__(self, name: str) -> Any:
        if name == "request":  # not set yet, as in copy.copy(): no endless recursion
            raise AttributeError(name)
        return getattr(self.request, name)

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self._state} {self.path!r}>"

    @property
    def scheme(self) -> str:
        """`"wss"` where the connection is encrypted, `"ws"` where it is not (str).

        SECURE_PROXY_SSL_HEADER is heeded, as in `HttpRequest.is_secure()`.
        """
        return "wss" if self.request.is_secure() else "ws"

    @property
    def path(self) -> str:
        """The path that was asked for, without the query string (str)."""
        return self.request.path

    @property
    def query_params(self) -> QueryDict:
        """The parameters of the query string (QueryDict), as `request.GET`."""
        return self.request.GET

    @property
    def query_string(self) -> str:
        """The query string as it was sent, without the question mark (str)."""
        return str(self.request.META["QUERY_STRING"])

    @property
    def subprotocols(self) -> list[str]:
        """The subprotocols that the client offers, its favourite first (list of str).

        RFC 6455, section 1.9.
        """
        return list(self.scope.get("subprotocols") or ())

    @property
    def connected(self) -> bool:
        """Whether messages can go by: after `accept()`, until either side's end."""
        return self._state == "open"

    async def receive(self) -> Event:
        """Return the next ASGI event (a mapping), as the server gave it.

        First `websocket.connect`, unless `accept()` was called before; then
        `websocket.receive` for each message; at last one `websocket.disconnect`.

        Cancelling it is safe on servers whose own `receive` is: no event is lost.

        Raises `WebSocketDisconnect` after the end.
        Source: ASGI, "WebSocket".
        """
        if self._waiting:
            raise RuntimeError("another task is receiving from this WebSocket")
        if self._lease.worker is not None:
            self._lease.release()
        if self._connect is not None:
            event, self._connect = self._connect, None
            return event
        self._waiting = True
        try:
            if self._ahead is not None:
                await asyncio.wait([self._ahead])  # cancelling this leaves it alone
                ahead, self._ahead = self._ahead, None
                if ahead.cancelled():  # the view has ended, this is a task it left
                    raise self._disconnect()
                event = ahead.result()
            elif self._state == "closed":
                raise self._disconnect()
            else:
                event = await self._receive()
        except asyncio.CancelledError:
            if self._told == "cancelled" and asyncio.current_task() is self._task:
                # Ended from outside, by close_group() say: as when the client leaves.
                self._told = "raised"
                if self._task and self._task.uncancel() <= self._cancelling:
                    raise self._disconnect() from None
            raise
        finally:
            self._waiting = False
            if self._timer is None:
                self._watch()
        if event["type"] == "websocket.disconnect":
            self._left(event)
        return event

    def _watch(self) -> None:
        if self._task is not None:
            loop = asyncio.get_running_loop()
            self._timer = loop.call_later(self.WATCH, self._look)

    def _look(self) -> None:
        """See after a view that did not wait for its client just now."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if self._state == "closed":
            if not self._told and self._task is not None:
                self._cancel(self._task)
        elif not self._waiting:
            if self._ahead is None:
                # One event ahead of the view: it may be the end. Any more would take
                # the server's back-pressure away.
                self._ahead = asyncio.ensure_future(self._receive())
                self._ahead.add_done_callback(self._looked)
            elif self._ahead.done():
                self._looked(self._ahead)

    def _cancel(self, task: asyncio.Task[Any]) -> None:
        """Cancel the view, unless it may know of the end and be cleaning up."""
        now = asyncio.get_running_loop().time()
        if self._hearer is not None and now < self._deadline:
            if not self._hearer.done() or self._position != _position(self._view):
                return self._watch()
        if task.cancelling() and sys.version_info >= (3, 13):
            return  # somebody else did
        self._told, self._cancelling = "cancelled", task.cancelling()
        task.cancel()

    def _looked(self, ahead: asyncio.Future[Event]) -> None:
        if self._task is None or self._waiting or self._ahead is not ahead:
            return
        if ahead.cancelled() or ahead.exception() is not None:
            self._ahead = None  # the view will see when it asks the server itself
        elif ahead.result()["type"] == "websocket.disconnect":
            self._left(ahead.result())
            self._look()

    def _left(self, event: Event) -> None:
        self._ended(event.get("code") or 1005, event.get("reason") or "")

    def _ended(self, code: int, reason: str) -> None:
        if self._state != "closed":
            self._state, self._end = "closed", (code, reason)
            if self._timer is None:
                self._watch()  # over the view's task, where another task learns of it
        self._disconnect()

    def _end_from_outside(self, code: int, reason: str) -> None:
        """End the socket, and its view as when the client leaves."""
        if self._state == "open":
            self._state, self._end = "closed", (code, reason)
            if asyncio.current_task() is self._task:
                self._told = "raised"
            self._look()

    def _disconnect(self) -> WebSocketDisconnect:
        """Return the exception for the end, which the task that runs now learns of."""
        if not self._told and _current.get(None) is self._lease:
            task = asyncio.current_task()
            if task is self._task:
                self._told = "raised"
            elif self._hearer is None:
                self._hearer, self._position = task, _position(self._view)
                loop = asyncio.get_running_loop()
                self._deadline = loop.time() + self.GRACE
        return WebSocketDisconnect(*self._end)

    def _stop(self) -> None:
        """Leave nothing behind when the view has ended."""
        self._task = self._hearer = self._view = None
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if self._ahead is not None:
            self._ahead.cancel()
        for group in self._groups or ():
            _groups().leave(group, self)
        self._groups = None

    async def send(self, event: Event) -> None:
        """Send one ASGI event (a mapping) to the server.

        `websocket.accept` or `websocket.close` before the handshake's end,
        `websocket.send` or `websocket.close` after it. It waits while the client reads
        more slowly than the view sends (the server's back-pressure).

        Cancelling it is safe: the event was sent, or it was not; part of it never.

        Raises `RuntimeError` for an event that is out of turn, with nothing sent;
        `WebSocketDisconnect` after the end.
        Source: ASGI, "WebSocket".
        """
        kind = event["type"]
        if self._state != "open" or kind != "websocket.send":
            self._check(kind, event)
        try:
            await self._send(event)
        except BaseException as error:
            if isinstance(error, (OSError, RuntimeError)):
                # OSError is what a server raises when the client has gone (ASGI 2.4),
                # and RuntimeError what some raise where they closed by themselves (no
                # answer to a ping, a message too big) and `receive` has not told yet.
                self._ended(CloseCode.ABNORMAL_CLOSURE, "")
                raise self._disconnect() from error
            self._unanswered()
            raise
        if self._state == "answering":
            self._answered()
            if kind == "websocket.accept":
                self._state = "open"
            else:
                self._ended(event.get("code") or 1000, event.get("reason") or "")

    def _check(self, kind: str, event: Event) -> None:
        """Let an event other than a message pass, or raise."""
        if self._state == "closed":
            raise self._disconnect()
        if self._state == "answering":
            raise RuntimeError("another task is in accept() or close(): await it first")
        if self._state == "connecting":
            if kind not in ("websocket.accept", "websocket.close"):
                raise RuntimeError(f"call accept() before sending a {kind}")
            self._state = "answering"
        elif kind == "websocket.close":
            self._ended(event.get("code") or 1000, event.get("reason") or "")
        elif kind == "websocket.accept":
            raise RuntimeError("accept() was called before")
        else:
            raise RuntimeError(f"{kind!r} is no event that can be sent")

    def _handshake(
        self,
        connect: Event,
        refuse: Callable[[Any], Awaitable[None]],
        headers: list[tuple[bytes, bytes]],
    ) -> None:
        self._connect, self._refuse, self._headers = connect, refuse, headers

    def _unanswered(self) -> None:
        if self._state == "answering":  # the client may have left meanwhile
            self._state = "connecting"

    def _answered(self) -> None:
        self._connect, self._refuse, self._headers = None, None, ()

    async def accept(
        self, subprotocol: str | None = None, headers: Headers = ()
    ) -> None:
        """Complete the handshake.

        `subprotocol` (str) must be one of `subprotocols`; without one, none is agreed.
        `headers` (a mapping, or pairs, of str or bytes) go on the answer, after those
        and the cookies that the middleware put on its response.

        Raises `RuntimeError` when called twice; `ValueError` for a subprotocol that was
        not offered, for a header with a line break or a malformed name, and for one
        that the server writes itself (Connection, Upgrade, Sec-WebSocket-…), with
        nothing sent; `WebSocketDisconnect` when the client has gone. Do not cancel it.
        Source: RFC 6455, section 4.2.2; ASGI, "Accept - send event".
        """
        if subprotocol is not None and subprotocol not in self.subprotocols:
            raise ValueError(
                f"the client did not offer the subprotocol {subprotocol!r}, "
                f"but {self.subprotocols}"
            )
        pairs: Iterable[Any] = headers
        if isinstance(headers, Mapping):
            pairs = headers.items()
        added: list[tuple[bytes, bytes]] = []
        for pair in pairs:
            # Django's own rules for a header: no line breaks, ASCII, latin-1.
            for name, value in ResponseHeaders(dict([pair])).items():
                value = value.strip(" \t")
                if (
                    not _TOKEN.fullmatch(name)
                    or not _VALUE.fullmatch(value)
                    or _SERVERS_OWN.fullmatch(name)
                ):
                    raise ValueError(f"accept() cannot send the header {name!r}")
                added.append((name.lower().encode("ascii"), value.encode("latin-1")))
        await self.send(
            {
                "type": SendEvent.ACCEPT,
                "subprotocol": subprotocol,
                "headers": [*self._headers, *added],
            }
        )

    async def close(
        self, code: int = CloseCode.NORMAL_CLOSURE, reason: str = ""
    ) -> None:
        """End the connection.

        Before `accept()` it refuses the handshake, with Django's page for HTTP 403;
        after it, it sends `code` (int) and `reason` (str, up to 123 bytes of UTF-8).
        Once the connection has ended, it does nothing. Cancelling it is safe.

        Raises `ValueError` for a code that may not be sent (RFC 6455, section 7.4: it
        takes 1000 to 1003, 1007 to 1014 and 3000 to 4999) and for a longer reason, with
        nothing sent.
        Source: RFC 6455, sections 5.5.1 and 7; ASGI, "Close - send event".
        """
        code, reason = _close_arguments(code, reason)
        if self._state == "connecting" and self._refuse is not None:
            self._state = "answering"
            try:
                await self._refuse(None)
            finally:
                self._unanswered()
            self._ended(code, reason)
        elif self._state != "closed":
            with suppress(WebSocketDisconnect):
                await self.send(
                    {"type": SendEvent.CLOSE, "code": code, "reason": reason}
                )

    def _unexpected(self, expected: str) -> Exception:
        """Return why the event that `receive` just gave is not the one expected."""
        if self._state == "closed":
            return self._disconnect()
        return InvalidMessage(CloseCode.UNSUPPORTED_DATA, f"{expected} expected")

    async def _receive_message(self) -> str | bytes:
        if self._state not in ("open", "closed"):
            raise RuntimeError("call accept() before receiving messages")
        event = await self.receive()
        message: str | bytes | None = event.get("text")
        if message is None:
            message = event.get("bytes")
        if message is None:
            raise self._unexpected("a message was")
        return message

    async def receive_text(self) -> str:
        """Return the client's next message, which must be text (str).

        Cancelling it is safe, by `asyncio.timeout()` for example: no message is lost
        (granian's own `receive` loses some).

        Raises `WebSocketDisconnect` when the connection has ended; `InvalidMessage`
        (1003) when the message is binary; `RuntimeError` before `accept()`.
        Source: RFC 6455, section 5.6.
        """
        if self._state not in ("open", "closed"):
            raise RuntimeError("call accept() before receive_text()")
        text: str | None = (await self.receive()).get("text")
        if text is None:
            raise self._unexpected("text was")
        return text

    async def receive_bytes(self) -> bytes:
        """Return the client's next message, which must be binary (bytes).

        Cancelling it is safe, by `asyncio.timeout()` for example: no message is lost
        (granian's own `receive` loses some).

        Raises `WebSocketDisconnect` when the connection has ended; `InvalidMessage`
        (1003) when the message is text; `RuntimeError` before `accept()`.
        Source: RFC 6455, section 5.6.
        """
        if self._state not in ("open", "closed"):
            raise RuntimeError("call accept() before receive_bytes()")
        data: bytes | None = (await self.receive()).get("bytes")
        if data is None:
            raise self._unexpected("bytes were")
        return data

    async def receive_json(self) -> Any:
        """Return the value of the client's next message, JSON in text or in bytes.

        Cancelling it is safe, by `asyncio.timeout()` for example: no message is lost
        (granian's own `receive` loses some).

        Raises `WebSocketDisconnect` when the connection has ended; `InvalidMessage`
        (1007) when the message is no JSON in UTF-8, is nested too deeply for Python or
        has a number out of Python's range; `RuntimeError` before `accept()`.
        Source: RFC 8259.
        """
        message = await self._receive_message()
        try:
            return _decode_json(
                message if isinstance(message, str) else message.decode()
            )
        except (ValueError, RecursionError) as error:
            raise InvalidMessage(
                CloseCode.INVALID_FRAME_PAYLOAD_DATA, "JSON was expected"
            ) from error

    async def iter_text(self) -> AsyncIterator[str]:
        """Yield the client's messages as `receive_text()` does, until it is gone."""
        with suppress(WebSocketDisconnect):
            while True:
                yield await self.receive_text()

    async def iter_bytes(self) -> AsyncIterator[bytes]:
        """Yield the client's messages as `receive_bytes()` does, until it is gone."""
        with suppress(WebSocketDisconnect):
            while True:
                yield await self.receive_bytes()

    async def iter_json(self) -> AsyncIterator[Any]:
        """Yield the client's messages as `receive_json()` does, until it is gone."""
        with suppress(WebSocketDisconnect):
            while True:
                yield await self.receive_json()

    async def __aiter__(self) -> AsyncIterator[str | bytes]:
        """Yield the client's messages as they were sent, until it is gone."""
        with suppress(WebSocketDisconnect):
            while True:
                yield await self._receive_message()

    async def send_text(self, text: str) -> None:
        """Send `text` (str) as one text message.

        It waits while the client reads too slowly. Cancelling it is safe: the message
        was sent, or it was not.

        Raises `TypeError` for anything but str and `RuntimeError` before `accept()`,
        with nothing sent; `WebSocketDisconnect` when the connection has ended.
        Source: RFC 6455, section 5.6.
        """
        if not isinstance(text, str):
            raise TypeError(f"send_text() takes str, not {type(text).__name__}")
        await self.send({"type": "websocket.send", "text": text})

    async def send_bytes(self, data: bytes | bytearray | memoryview) -> None:
        """Send `data` (bytes, bytearray, memoryview or alike) as one binary message.

        It waits while the client reads too slowly. Cancelling it is safe: the message
        was sent, or it was not.

        Raises `TypeError` for anything that is not bytes-like and `RuntimeError` before
        `accept()`, with nothing sent; `WebSocketDisconnect` when the connection has
        ended.
        Source: RFC 6455, section 5.6.
        """
        if not isinstance(data, bytes):
            data = bytes(memoryview(data))  # bytes(5) would be five zeros
        await self.send({"type": "websocket.send", "bytes": data})

    async def send_json(self, data: Any, *, binary: bool = False) -> None:
        """Send `data` as JSON, in one text message or, with `binary`, in a binary one.

        Dates, times, UUIDs, decimals and lazy strings are written as Django's
        `DjangoJSONEncoder` does, without spaces, non-ASCII characters as themselves.
        It waits while the client reads too slowly. Cancelling it is safe: the message
        was sent, or it was not.

        Raises `TypeError` for what JSON cannot carry, `ValueError` for NaN, infinity
        and circular data, `RuntimeError` before `accept()`, with nothing sent;
        `WebSocketDisconnect` when the connection has ended.
        Source: RFC 8259.
        """
        text = _json(data)
        if binary:
            await self.send_bytes(text.encode())
        else:
            await self.send_text(text)

    async def join(self, group: str) -> None:
        """Put the socket into a group (str) until it leaves or ends.

        What is sent to the group after `join()` has returned arrives. Joining again
        does nothing. With Redis it waits until Redis has confirmed the subscription,
        so for as long as Redis is down. Cancelling it is safe; `leave()` takes it back.

        Raises `RuntimeError` before `accept()`, `WebSocketDisconnect` after the end.
        """
        if self._state not in ("open", "closed"):
            raise RuntimeError("call accept() before join()")
        if self._state == "closed" or self._task is None:  # a task outlived the view
            raise self._disconnect()
        groups = _groups()
        if self._groups is None:
            self._groups = set()
        self._groups.add(_name(group))
        await groups.join(group, self)

    async def leave(self, group: str) -> None:
        """Take the socket out of a group (str); nothing happens where it is in none.

        Cancelling it is safe. It raises nothing, also after the end.
        """
        if self._groups and group in self._groups:
            self._groups.remove(group)
            _groups().leave(group, self)

    def _push(self, event: Event, limit: int) -> bool:
        """Send an event of a group; return whether there is room for another.

        The server's `send` is run by hand up to where it would wait. Mostly it does
        not, and then no task was needed; otherwise the outbox takes over.
        """
        if self._state != "open":
            return True
        close = event["type"] == "websocket.close"
        if close:  # at once, also for a client that does not read
            self._end_from_outside(event["code"], event["reason"])
        if self._outbox is not None:
            self._outbox.events.append(event)
            if len(self._outbox.events) > 2 * limit:
                self._outbox.overflow(self)  # whoever broadcast did not wait for room
            return close or len(self._outbox.events) < limit
        sending = self._send(event).__await__()
        try:
            future = next(sending)
        except StopIteration:
            pass
        except (Exception, asyncio.CancelledError) as error:
            self._failed(error)
        else:
            self._outbox = _Outbox(self, _rest(sending, future))
        return True

    def _failed(self, error: BaseException) -> None:
        """End for an exception that the server raised at a message to a group."""
        if not isinstance(error, (OSError, RuntimeError)):
            _logger.error("A message to a group was not sent", exc_info=error)
        self._end_from_outside(CloseCode.ABNORMAL_CLOSURE, "")


# Groups


def _name(group: str) -> str:
    if not isinstance(group, str):
        raise TypeError(f"a group's name is a str, not {type(group).__name__}")
    return group


@types.coroutine
def _rest(sending: Any, future: Any) -> Iterator[Any]:
    """Go on with a coroutine that was run by hand up to where it waits for `future`."""
    while True:
        try:
            yield future
        except BaseException as error:
            step = partial(sending.throw, error)
        else:
            step = partial(next, sending)
        try:
            future = step()
        except StopIteration:
            return


class _Outbox:
    """What waits for one client, from when the server reports back-pressure."""

    # Seconds, in all, that broadcasts wait for a client that has no room left. One that
    # reads makes some in a fraction of it, and is only outrun by a view that broadcasts
    # without a pause.
    PATIENCE = 0.25

    def __init__(self, socket: WebSocket, first: Awaitable[None]) -> None:
        self.events: collections.deque[Event] = collections.deque()
        self.room = asyncio.Event()
        self.patience = self.PATIENCE
        self.task = asyncio.get_running_loop().create_task(self.drain(socket, first))

    async def drain(self, socket: WebSocket, first: Awaitable[None]) -> None:
        """Send all that waits, in order, as fast as the client reads."""
        try:
            await first
            while self.events:
                event = self.events.popleft()
                self.room.set()
                if event["type"] == "websocket.close":
                    self.events.clear()
                    socket._end_from_outside(event["code"], event["reason"])
                await socket._send(event)
        except Exception as error:
            socket._failed(error)
        finally:
            self.room.set()
            socket._outbox = None

    async def make_room(self, socket: WebSocket, limit: int) -> None:
        """Wait a moment for room; without it, the client loses its connection."""
        start = time.monotonic()
        with suppress(TimeoutError):
            async with asyncio.timeout(self.patience):
                while socket._outbox is self and len(self.events) >= limit:
                    self.room.clear()
                    await self.room.wait()
        self.patience -= time.monotonic() - start
        if socket._outbox is self and len(self.events) >= limit:
            self.overflow(socket)

    def overflow(self, socket: WebSocket) -> None:
        """Give up a client that reads too slowly, but for the news that it was."""
        if socket._state == "open":
            code, reason = CloseCode.TRY_AGAIN_LATER, "reads too slowly"
            self.events.clear()
            self.events.append(
                {"type": SendEvent.CLOSE, "code": code, "reason": reason}
            )
            socket._end_from_outside(code, reason)


class _Groups:
    """The groups of one event loop; messages stay in this process."""

    # The event loops of this process that have sockets in groups.
    loops: ClassVar[dict[asyncio.AbstractEventLoop, "_Groups"]] = {}

    def __init__(self, options: dict[str, Any]) -> None:
        self.limit: int = options["OUTBOX"]
        self.members: dict[str, set[WebSocket]] = {}
        self.pushes = 0

    async def join(self, group: str, socket: WebSocket) -> None:
        """Add a socket; what is published from now on reaches it."""
        self.loops[asyncio.get_running_loop()] = self
        self.members.setdefault(group, set()).add(socket)

    def leave(self, group: str, socket: WebSocket) -> None:
        """Remove a socket; an empty group leaves no trace."""
        self.members[group].discard(socket)
        if not self.members[group]:
            del self.members[group]
        if not self.members:
            self.loops.pop(asyncio.get_running_loop(), None)

    async def publish(self, group: str, event: Event) -> None:
        """Send an event to the group's sockets, whichever loop they are on."""
        for loop, groups in list(self.loops.items()):
            if loop is asyncio.get_running_loop():
                await groups.deliver(group, event)
            elif loop.is_running():
                delivery = groups.deliver(group, event)
                future = asyncio.run_coroutine_threadsafe(delivery, loop)
                # Not longer: a loop that stops just now never answers.
                await asyncio.wait([asyncio.wrap_future(future)], timeout=1)

    async def deliver(self, group: str, event: Event) -> None:
        """Send an event to the group's sockets on this loop."""
        full = []
        for socket in tuple(self.members.get(group, ())):
            if not socket._push(event, self.limit):
                full.append(socket)
            self.pushes += 1
            if self.pushes % 100 == 0:
                await asyncio.sleep(0)  # the turn of the sockets outside the group
        if full:  # all at once: none waits for another's sake
            outboxes = [(socket, socket._outbox) for socket in full]
            rooms = [box.make_room(one, self.limit) for one, box in outboxes if box]
            await asyncio.gather(*rooms)


class _RedisGroups(_Groups):
    """Groups that span all processes on one Redis, by publish/subscribe."""

    # Seconds of silence after which Redis is asked whether it is still there, and the
    # bounds between which the pause before a new connection doubles.
    SILENCE = 15.0
    PAUSES = (0.1, 10.0)

    def __init__(self, options: dict[str, Any]) -> None:
        super().__init__(options)
        self.url, self.prefix = options["REDIS_URL"], options["PREFIX"]
        self.client, self.subscriber = self.connect(), self.connect()
        self.listener: asyncio.Task[None] | None = None
        self.pubsub: Any = None
        self.lock = asyncio.Lock()
        # The groups that Redis was asked for, and those that it has confirmed.
        self.asked: set[str] = set()
        self.confirmed: dict[str, asyncio.Event] = {}

    def connect(self) -> Any:
        from redis.asyncio import BlockingConnectionPool, Redis
        from redis.asyncio.retry import Retry
        from redis.backoff import NoBackoff

        # Many broadcasts at once wait for each other. No second try for any of them: it
        # could send a message twice.
        retry = Retry(NoBackoff(), 0)
        pool = BlockingConnectionPool.from_url(
            self.url, max_connections=10, timeout=20, retry=retry
        )
        return Redis.from_pool(pool)

    def channel(self, group: str) -> bytes:
        return f"{self.prefix}:{group}".encode("utf-8", "surrogatepass")

    async def join(self, group: str, socket: WebSocket) -> None:
        """Add a socket, and wait until Redis has confirmed the subscription."""
        await super().join(group, socket)
        confirmed = self.confirmed.setdefault(group, asyncio.Event())
        if self.listener is None:
            self.listener = asyncio.get_running_loop().create_task(self.listen())
        elif group not in self.asked:
            await self.subscribe()
        await confirmed.wait()

    def leave(self, group: str, socket: WebSocket) -> None:
        """Remove a socket, and unsubscribe from a group without any."""
        super().leave(group, socket)
        if group not in self.members:
            loop = asyncio.get_running_loop()
            task = loop.create_task(self.subscribe())
            _background.add(task)
            task.add_done_callback(_background.discard)

    async def subscribe(self) -> None:
        """Let Redis send what the groups that have sockets here get, and no more."""
        from redis.exceptions import RedisError

        async with self.lock:
            if self.pubsub is None:
                return  # the listener subscribes to all when it is connected
            wanted = set(self.members)
            new, old = wanted - self.asked, self.asked - wanted
            self.asked = wanted
            for group in old:
                self.confirmed.pop(group, None)
            with suppress(RedisError, OSError):  # the listener sees it too
                if new:
                    await self.pubsub.subscribe(*map(self.channel, new))
                if old:
                    await self.pubsub.unsubscribe(*map(self.channel, old))

    async def listen(self) -> None:
        """Receive from Redis while there are members, and connect again and again."""
        pause, down = self.PAUSES[0], False
        while self.members:
            pubsub = self.subscriber.pubsub()
            try:
                self.asked = set(self.members)
                await pubsub.subscribe(*map(self.channel, self.asked))
                self.pubsub = pubsub
                await self.subscribe()  # who came meanwhile
                silent = False
                while self.members:
                    message = await pubsub.get_message(timeout=self.SILENCE)
                    if message is None:
                        if silent:
                            raise ConnectionError("Redis does not answer")
                        await pubsub.ping()
                    elif down:
                        _logger.warning("Redis is back: groups work again")
                        pause, down = self.PAUSES[0], False
                    silent = message is None
                    if message is not None:
                        try:
                            await self.handle(message)
                        except ValueError:
                            _logger.warning("No message of django_ws: %r", message)
            except Exception as error:  # whatever it is, sockets wait for their groups
                if not down:
                    _logger.warning("Redis is away, groups get no messages: %s", error)
                down = True
                for confirmed in self.confirmed.values():
                    confirmed.clear()
                await asyncio.sleep(pause * random.uniform(0.5, 1))
                pause = min(2 * pause, self.PAUSES[1])
            finally:
                self.pubsub = None
                await pubsub.aclose()
        self.listener = None
        for client in (self.client, self.subscriber):
            await client.connection_pool.disconnect(inuse_connections=False)

    async def handle(self, message: dict[str, Any]) -> None:
        channel = message["channel"] or b""
        group = channel.decode("utf-8", "surrogatepass").removeprefix(f"{self.prefix}:")
        if message["type"] == "subscribe" and group in self.confirmed:
            self.confirmed[group].set()
        elif message["type"] == "message":
            kind, data = message["data"][:1], message["data"][1:]
            if kind == b"c":
                code, _, reason = data.decode().partition(" ")
                close = {"type": SendEvent.CLOSE, "code": int(code), "reason": reason}
                await self.deliver(group, close)
            else:
                body = {"text": data.decode()} if kind == b"t" else {"bytes": data}
                await self.deliver(group, {"type": SendEvent.SEND, **body})

    async def publish(self, group: str, event: Event) -> None:
        """Publish an event on Redis; the listeners of all processes deliver it."""
        if event["type"] == SendEvent.CLOSE:
            data = b"c" + f"{event['code']} {event['reason']}".encode()
        elif "text" in event:
            data = b"t" + event["text"].encode()
        else:
            data = b"b" + event["bytes"]
        from redis.exceptions import ConnectionError as RedisConnectionError
        from redis.exceptions import TimeoutError as RedisTimeoutError

        try:
            if self.listener is not None:
                await self.client.publish(self.channel(group), data)
            else:  # a process, or an event loop of a moment, without sockets
                async with self.client:
                    await self.client.publish(self.channel(group), data)
        except RedisTimeoutError as error:
            raise RedisConnectionError("Redis does not answer") from error


def _options() -> dict[str, Any]:
    """Return `settings.WEBSOCKETS` with its defaults; raise for what is wrong there."""
    options: dict[str, Any] = {"REDIS_URL": "", "PREFIX": "django_ws", "OUTBOX": 100}
    given = getattr(settings, "WEBSOCKETS", {})
    if not isinstance(given, dict):
        raise ImproperlyConfigured("WEBSOCKETS must be a dict")
    for name, value in given.items():
        if name not in options:
            known = ", ".join(options)
            raise ImproperlyConfigured(f"WEBSOCKETS[{name!r}]: there are only {known}")
        if type(value) is not type(options[name]):
            wanted = type(options[name]).__name__
            raise ImproperlyConfigured(f"WEBSOCKETS[{name!r}] must be {wanted}")
        options[name] = value
    if options["OUTBOX"] < 1:
        raise ImproperlyConfigured("WEBSOCKETS['OUTBOX'] must be 1 or more")
    if options["REDIS_URL"]:
        if not importlib.util.find_spec("redis"):
            raise ImproperlyConfigured("WEBSOCKETS['REDIS_URL']: pip install redis")
        from redis.asyncio.connection import parse_url

        try:
            parsed: Any = parse_url(options["REDIS_URL"])
        except ValueError as error:
            raise ImproperlyConfigured(f"WEBSOCKETS['REDIS_URL']: {error}") from error
        if "decode_responses" in parsed:
            message = "WEBSOCKETS['REDIS_URL'] cannot have decode_responses"
            raise ImproperlyConfigured(message)
    return options


def _groups() -> _Groups:
    """Return the groups of the running event loop."""
    here = _Groups.loops.get(asyncio.get_running_loop())
    if here is None:
        options = _options()
        here = _RedisGroups(options) if options["REDIS_URL"] else _Groups(options)
    return here


async def broadcast(group: str, message: Any) -> None:
    """Send a message to every socket in a group (str), wherever it is.

    str goes out as text, bytes-like as binary, anything else as JSON, as `send_json`
    writes it; it is encoded once. From synchronous code: `async_to_sync(broadcast)(…)`.
    A client that reads more slowly than WEBSOCKETS["OUTBOX"] messages allow is waited
    for, a quarter of a second in all, and then closed with 1013; neither that nor any
    other trouble of a member raises anything here.

    Cancelling it is safe, though some members may have got the message.

    Raises `TypeError` and `ValueError` for what JSON cannot carry or UTF-8 cannot
    encode; with Redis also redis-py's `ConnectionError`, and then the message is lost.
    """
    if isinstance(message, str):
        message.encode()  # a lone surrogate is the caller's fault, not a member's
        body: dict[str, Any] = {"text": message}
    else:
        try:
            body = {"bytes": bytes(memoryview(message))}
        except TypeError:  # not bytes-like
            body = {"text": _json(message)}
    await _groups().publish(_name(group), {"type": SendEvent.SEND, **body})


async def close_group(
    group: str, code: int = CloseCode.NORMAL_CLOSURE, reason: str = ""
) -> None:
    """Close every socket in a group (str) with a code (int) and a reason (str).

    After what was broadcast to the group before; the views end as when their clients
    leave. For a session that ended, a person who lost a permission, a room that closed.

    Cancelling it is safe, though some members may have been closed.

    Raises `ValueError` as `WebSocket.close` does, and redis-py's `ConnectionError`.
    """
    code, reason = _close_arguments(code, reason)
    event = {"type": SendEvent.CLOSE, "code": code, "reason": reason}
    await _groups().publish(_name(group), event)


# URLs


class _SwitchingProtocols(HttpResponse):
    """What the middleware sees of an accepted handshake; it never goes out itself."""

    status_code = 101
    # What calling the view gave: its coroutine, a response, or None.
    result: Any = None

    def __init__(self, *call: Any) -> None:
        super().__init__()
        self.call = call


def _refuse_origin(request: HttpRequest) -> HttpResponse | None:
    """Apply Django's origin check, which it runs on POST only, to a handshake.

    A browser lets any page open a WebSocket to any site and sends that site's cookies
    along; only the Origin header tells (RFC 6455, section 10.2). Clients that are no
    browsers send none, and carry nobody's cookies by themselves.
    """
    origin = request.META.get("HTTP_ORIGIN")
    # The one private corner of Django in this file: nothing public compares an origin
    # without asking for a CSRF token too.
    middleware: Any = CsrfViewMiddleware(lambda request: HttpResponse())
    if origin is None or middleware._origin_verified(request):
        return None
    response: HttpResponse = middleware._reject(request, REASON_BAD_ORIGIN % origin)
    return response


def _handshake_view(view: View) -> Callable[..., HttpResponse]:
    """Make the ordinary, synchronous Django view that stands for a socket view."""
    target: Any = view
    while isinstance(target, partial) or hasattr(target, "__wrapped__"):
        target = target.func if isinstance(target, partial) else target.__wrapped__
    if not (iscoroutinefunction(target) or iscoroutinefunction(view)):
        called = getattr(target, "__call__", None)
        if isinstance(target, type) or not iscoroutinefunction(called):
            name = getattr(target, "__qualname__", repr(target))
            raise TypeError(
                f"a WebSocket view is asynchronous: write 'async def' for {name}, "
                "as in 'async def view(socket)' or, in a View class, "
                "'async def get(self, socket)', and pass View.as_view()"
            )

    def handshake(request: HttpRequest, /, *args: Any, **kwargs: Any) -> HttpResponse:
        if not _is_handshake(request):
            return _upgrade_required(request)
        request.get_host()  # ALLOWED_HOSTS, also where no middleware asks
        refusal = None
        if not getattr(handshake, "csrf_exempt", False):
            refusal = _refuse_origin(request)
        return refusal or _SwitchingProtocols(request, view, args, kwargs)

    update_wrapper(handshake, view, updated=())
    for name, value in vars(view).items() if hasattr(view, "__dict__") else ():
        # What decorators leave for the middleware (csrf_exempt, login_required), not
        # the marker of View.as_view(): Django would await a synchronous view for it.
        setattr(handshake, name, value)
        if iscoroutinefunction(handshake):
            delattr(handshake, name)
    setattr(handshake, "websocket_view", view)
    return handshake


def _is_handshake(request: HttpRequest) -> bool:
    return isinstance(request, ASGIRequest) and request.scope["type"] == "websocket"


def _upgrade_required(request: HttpRequest) -> HttpResponse:
    """Answer plain HTTP on a WebSocket route (RFC 9110, section 15.5.22)."""
    response = HttpResponse(
        "This address speaks WebSocket.", status=426, content_type="text/plain"
    )
    # Hop-by-hop headers belong to the server under WSGI (PEP 3333) and do not exist in
    # HTTP/2 and later (RFC 9113, section 8.2.2).
    scope = request.scope if isinstance(request, ASGIRequest) else {}
    if scope.get("http_version", "2").startswith("1"):
        response["Connection"] = "Upgrade"
        response["Upgrade"] = "websocket"
    # A proxy that does not pass the hop-by-hop Upgrade on still passes the key.
    asked = request.headers.get("Upgrade", "").lower() == "websocket"
    if asked or "Sec-WebSocket-Key" in request.headers:
        log_response(
            "The WebSocket handshake for %s arrived as plain HTTP: the server, or "
            "a proxy in front of it, lacks WebSocket support. Install "
            "uvicorn[standard] or use another ASGI server that speaks WebSocket, wrap "
            "the ASGI application in websockets(), and let proxies pass the headers "
            "Upgrade and Connection.",
            request.path,
            response=response,
            request=request,
        )
    return response


def websocket(
    route: Any,
    view: View,
    kwargs: dict[str, Any] | None = None,
    name: str | None = None,
) -> URLPattern:
    """Route a WebSocket to `view`: `django.urls.path` for sockets.

    It takes what `path()` takes (converters, extra arguments, a name) and works under
    `include()`, namespaces and `i18n_patterns()`. `view` is called with a `WebSocket`
    and the route's arguments: an `async def`, decorated or not, a `functools.partial`
    of one, an object with an async `__call__`, or `View.as_view()` of a class with
    `async def get(self, socket, …)`.

    Raises `TypeError` for a view that is not asynchronous.
    """
    return path(route, _handshake_view(view), kwargs, name)


def re_websocket(
    route: Any,
    view: View,
    kwargs: dict[str, Any] | None = None,
    name: str | None = None,
) -> URLPattern:
    """Route a WebSocket to `view` by a regular expression: `django.urls.re_path`.

    As `websocket()` in everything else.
    """
    return re_path(route, _handshake_view(view), kwargs, name)


# ASGI


class _Worker(ThreadPoolExecutor):
    """One thread of the pool, the number of sockets that hold it, and their jobs."""

    def __init__(self) -> None:
        super().__init__(1, "django_ws")
        self.holders = 0
        self.jobs: set[Future[Any]] = set()


def _reconnect() -> None:
    """Drop the database connections of this thread that are too old or were cut."""
    for connection in connections.all(initialized_only=True):
        if not connection.in_atomic_block:
            # Makes Django ask the server, so that a restart of the database fails no
            # query: a WebSocket cannot be asked again as a browser asks for a page.
            connection.errors_occurred = True
            connection.close_if_unusable_or_obsolete()


def _give_back() -> None:
    """Close this thread's old database connections, and forget what was set on them.

    Middleware of many tenants sets the tenant there; the next socket's is another.
    """
    close_old_connections()
    for connection in connections.all(initialized_only=True):
        # A transaction that was left open was just cut off, which Django remembers.
        if connection.connection is None or connection.closed_in_transaction:
            del connections[connection.alias]


class _Lease(Executor):
    """The worker thread of one socket, held only while it runs synchronous code.

    asgiref takes it for the executor of the connection's thread-sensitive context. One
    thread for all sockets would run one query at a time; one for each would hold
    a database connection for each. So a socket borrows one of a few.
    """

    SIZE = min(32, (os.cpu_count() or 1) + 4)
    IDLE = 5.0  # seconds without synchronous code, after which the thread goes back

    # Of the process: every worker, and those that no socket holds, the last used last,
    # so that few threads, with warm connections, do all the work of a quiet site.
    workers: ClassVar[list[_Worker]] = []
    free: ClassVar[list[_Worker]] = []
    lock = threading.Lock()

    def __init__(self) -> None:
        self.worker: _Worker | None = None
        self.jobs: set[Future[Any]] = set()
        self.timer: asyncio.TimerHandle | None = None
        self.used = self.checked = 0.0  # when a job ended, and the connections were
        self.ended = False  # the socket has ended; a job of it may still run

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Any:
        """Run `fn` on the thread that this socket holds (concurrent.futures)."""
        with self.lock:
            if self.worker is None:
                if not self.free and len(self.workers) < self.SIZE:
                    self.free.append(_Worker())
                    self.workers.extend(self.free)
                if self.free:
                    self.worker = self.free.pop()
                else:  # all are taken: share
                    self.worker = min(
                        self.workers, key=lambda one: (len(one.jobs), one.holders)
                    )
                self.worker.holders += 1
                self.checked = 0.0
            worker = self.worker
        # Before the first job, and now and then for a view that never gives it back.
        if worker.holders == 1 and not self.jobs:
            if time.monotonic() - self.checked > self.IDLE:
                self.checked = time.monotonic()
                worker.submit(_reconnect)
        if self.timer is None and not self.ended:
            loop = asyncio.get_running_loop()
            self.timer = loop.call_later(self.IDLE, self.check)
        job = worker.submit(fn, *args, **kwargs)
        self.jobs.add(job)
        worker.jobs.add(job)
        job.add_done_callback(partial(self.done, worker))
        return job

    def done(self, worker: _Worker, job: Future[Any]) -> None:
        """Note that a job has ended; called on whatever thread it ended."""
        self.used = time.monotonic()
        worker.jobs.discard(job)
        self.jobs.discard(job)
        if self.ended:
            self.release()

    def check(self) -> None:
        """Give the thread back when it ran nothing for a while."""
        self.timer = None
        idle = 0.0 if self.jobs else time.monotonic() - self.used
        if idle < self.IDLE:
            loop = asyncio.get_running_loop()
            self.timer = loop.call_later(self.IDLE - idle, self.check)
        else:
            self.release()

    def release(self, clean: bool = False) -> None:
        """Give the thread back, with its old connections closed as after a request."""
        if self.jobs:
            return  # not from under a child task of the view
        if self.timer is not None:
            self.timer.cancel()
            self.timer = None
        with self.lock:
            worker, self.worker = self.worker, None
            if worker is not None:
                worker.holders -= 1
                # What another socket reads from an open cursor is not cut off.
                if not worker.holders:
                    self.free.append(worker)
                    if not clean:
                        worker.submit(_give_back)

    def end(self) -> None:
        """Give the thread back now, or when its last job has ended."""
        self.ended = True
        if self.timer is not None:
            self.timer.cancel()
            self.timer = None
        self.release()

    @classmethod
    def forked(cls) -> None:
        """Forget threads and event loops that a child process does not have."""
        cls.workers.clear()
        cls.free.clear()
        _Groups.loops.clear()


# Where there is a fork at all.
getattr(os, "register_at_fork", lambda **_: None)(after_in_child=_Lease.forked)


def _without_disconnect(error: Exception) -> Exception | None:
    """Return what is left of a view's exception besides that its client has gone.

    A TaskGroup in a view wraps what its tasks raise into a group.
    """
    rest: Exception | None = error
    if isinstance(error, ExceptionGroup):
        rest = error.split(WebSocketDisconnect)[1]
        while isinstance(rest, ExceptionGroup) and len(rest.exceptions) == 1:
            rest = rest.exceptions[0]
    return None if isinstance(rest, WebSocketDisconnect) else rest


@contextmanager
def _request_signals(lease: _Lease) -> Iterator[None]:
    """Let request_started and request_finished close this thread's old connections.

    But not those of a TestCase, in whose thread and transaction its sockets run:
    Django's own test client takes the same care.
    """
    both = (signals.request_started, signals.request_finished)
    if lease.worker is None:
        for signal in both:
            signal.disconnect(close_old_connections)
    try:
        yield
    finally:
        if lease.worker is None:
            for signal in both:
                signal.connect(close_old_connections)


class WebSocketHandler(ASGIHandler):
    """Django's request handler, for handshakes, and what comes after them."""

    #: Seconds that a client has, when its view has ended, to read what waits for it.
    FLUSH = 5.0

    def __init__(self) -> None:
        # Synchronous, unlike ASGIHandler: each of Django's middlewares in async mode
        # hops to a thread and back, the whole chain in sync mode hops once.
        self.load_middleware()

    def resolve_request(self, request: HttpRequest) -> ResolverMatch:
        """Resolve as Django does, but to no view that is none for WebSockets."""
        match = super().resolve_request(request)
        if not hasattr(match.func, "websocket_view"):
            raise Http404(f"{request.path} is no WebSocket route")
        return match

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one WebSocket connection (ASGI, "WebSocket")."""
        connect = await receive()
        if connect["type"] != ReceiveEvent.CONNECT:
            return
        lease = _Lease()
        context = ThreadSensitiveContext()
        # The mapping that `ThreadSensitiveContext(executor=…)` of newer asgirefs fills;
        # Django 5.2 is content with one that does not have it.
        SyncToAsync.context_to_thread_executor[context] = lease
        token = SyncToAsync.thread_sensitive_context.set(context)
        try:
            await self.serve(WebSocket(scope, receive, send, lease), connect)
        finally:
            SyncToAsync.thread_sensitive_context.reset(token)
            lease.end()

    async def serve(self, socket: WebSocket, connect: Event) -> None:
        """Run the handshake and the view of one connection."""
        response = await sync_to_async(self.start)(socket)
        if not isinstance(response, _SwitchingProtocols):
            return await self.refuse(socket, response)
        socket._lease.release(clean=True)
        headers = [
            (name.lower(), value)
            for name, value in (await self.encode(response))[0]["headers"]
            if name.lower() != b"content-type"
            and not _SERVERS_OWN.fullmatch(name.decode("latin-1"))
        ]
        refuse = partial(self.refuse_by_view, socket, response)
        socket._handshake(connect, refuse, headers)
        result = response.result
        del response, refuse, headers  # an idle socket has no use for them
        result = await self.run_view(socket, result)
        if socket._refuse is None:
            if socket._outbox is not None:  # what was broadcast before the end
                await asyncio.wait([socket._outbox.task], timeout=self.FLUSH)
            await socket.close()
            if socket._outbox is not None:
                socket._outbox.task.cancel()
        elif socket._state == "closed":
            # The client left during the handshake; uvicorn logs an error where it gets
            # no answer even so.
            socket._answered()
            with suppress(OSError, RuntimeError):
                await socket._send({"type": SendEvent.CLOSE})
        else:
            await socket._refuse(result)

    async def run_view(self, socket: WebSocket, result: Any) -> Any:
        """Await a view; return what refuses the handshake where it did not accept."""
        task = asyncio.current_task()
        assert task is not None
        error: Exception | None = None
        token = _current.set(socket._lease)
        try:
            socket._task, socket._view = task, result
            socket._watch()
            try:
                return await result if inspect.isawaitable(result) else result
            finally:
                socket._stop()
                if socket._told == "cancelled":
                    task.uncancel()
        except asyncio.CancelledError as cancelled:
            if task.cancelling() > socket._cancelling:
                raise  # somebody else's cancellation goes on its way
            if socket._state == "closed":
                return None
            error = RuntimeError("the view awaited something that was cancelled")
            error.__cause__ = cancelled
        except Exception as raised:
            error = raised
        finally:
            _current.reset(token)
        try:
            return await self.handle_exception(socket, error)
        finally:
            del error, result  # the traceback has this frame

    async def refuse_by_view(
        self, socket: WebSocket, handshake: HttpResponse, result: Any
    ) -> None:
        """Refuse for what a view returned or raised before accept()."""
        get_refusal = sync_to_async(self.get_refusal)
        response = await get_refusal(socket, result, handshake)
        await self.refuse(socket, response)

    def start(self, socket: WebSocket) -> Any:
        """Do all of a handshake that is synchronous; it runs in a worker thread."""
        # What a handshake is to Django: a GET, over http or https.
        scheme = "https" if socket.scope.get("scheme") == "wss" else "http"
        scope = {**socket.scope, "method": "GET", "scheme": scheme}
        set_script_prefix(get_script_prefix(scope))
        with _request_signals(socket._lease):
            signals.request_started.send(sender=self.__class__, scope=scope)
            request, response = self.create_request(scope, io.BytesIO())
            if request is not None:  # else the query string is no UTF-8
                socket.request = request
                response = self.get_response(request)
            setattr(response, "_handler_class", self.__class__)
            if not isinstance(response, _SwitchingProtocols):
                return response
            # Middleware may have handed on a request of its own.
            socket.request, view, args, kwargs = response.call
            try:
                # For an `async def` this only makes the coroutine. The synchronous
                # part of others (dispatch() of a class-based view with
                # LoginRequiredMixin, say) may query the database, since it runs here.
                response.result = view(socket, *args, **kwargs)
            except Exception as error:
                response.result = error
            # The request is finished where the socket begins (signal request_finished).
            response.close()
        if socket._lease.worker is not None and socket._lease.worker.holders == 1:
            _give_back()
        set_urlconf(getattr(socket.request, "urlconf", None))
        return response

    def get_refusal(
        self, socket: WebSocket, result: Any, handshake: HttpResponse
    ) -> Any:
        """Return the response to what a view returned or raised before accept()."""

        def get_response(request: HttpRequest) -> Any:
            if result is None:
                urls, error = get_resolver(get_urlconf()), PermissionDenied()
                return get_exception_response(request, urls, 403, error)
            if isinstance(result, Exception):
                response = self.process_exception_by_middleware(result, request)
                if response is None:
                    raise result
                return response
            if not isinstance(result, HttpResponseBase):
                raise TypeError(
                    f"the view of {request.path} returned {result!r} before accept(): "
                    "return an HttpResponse to refuse, or None"
                )
            render = getattr(result, "render", None)
            return render() if callable(render) else result

        request = socket.request
        with _request_signals(socket._lease):
            signals.request_started.send(sender=self.__class__, scope=request.scope)
        response: Any = convert_exception_to_response(get_response)(request)
        response._handler_class = self.__class__
        response._resource_closers.append(request.close)
        for name, value in handshake.items():
            if name == "Vary":
                patch_vary_headers(response, value.split(", "))
            elif name not in ("Content-Type", "Content-Length", "ETag"):
                response.headers.setdefault(name, value)
        for name, cookie in handshake.cookies.items():
            response.cookies.setdefault(name, cookie)
        if response.status_code >= 400:
            log_response(
                "%s: %s",
                response.reason_phrase,
                request.path,
                response=response,
                request=request,
            )
        if isinstance(result, Exception):
            result.__traceback__ = None  # it holds this frame, which holds it
        return response

    async def handle_exception(
        self, socket: WebSocket, error: Exception
    ) -> Exception | None:
        """Close an accepted socket for its view's exception; return one from before."""
        rest = _without_disconnect(error)
        if rest is None or socket._state == "connecting":
            return rest
        if isinstance(rest, InvalidMessage):  # the client's fault: nothing to log
            await socket.close(rest.code, _short(str(rest)))
            return None
        if settings.DEBUG_PROPAGATE_EXCEPTIONS:
            raise rest
        await sync_to_async(self.report)(socket.request, rest)
        reason = f"{type(rest).__name__}: {rest}" if settings.DEBUG else ""
        denied = isinstance(rest, PermissionDenied)
        await socket.close(
            CloseCode.POLICY_VIOLATION if denied else CloseCode.INTERNAL_ERROR,
            _short(reason),
        )
        return None

    def report(self, request: ASGIRequest, error: Exception) -> None:
        """Log and signal an exception after accept() as Django does those of views."""
        response: HttpResponse = HttpResponseForbidden()
        message = "Forbidden (Permission denied): %s"
        if not isinstance(error, PermissionDenied):
            response = HttpResponseServerError()
            message = "Internal Server Error: %s"
            traceback = error.__traceback__
            try:
                raise error  # receivers look at sys.exc_info()
            except Exception:
                signals.got_request_exception.send(sender=None, request=request)
            finally:  # of this frame, which would make a cycle
                error.__traceback__ = traceback
        log_response(
            message, request.path, response=response, request=request, exception=error
        )

    async def encode(self, response: HttpResponse) -> list[dict[str, Any]]:
        """Return the ASGI events that Django sends for a response, the start first."""
        events: list[dict[str, Any]] = []

        async def send(event: Event) -> None:
            events.append(dict(event))

        await self.send_response(response, send)
        return events

    async def refuse(self, socket: WebSocket, response: Any) -> None:
        """Answer a handshake by an HTTP response that is not 101.

        By ASGI's extension "WebSocket Denial Response"; a server without it makes
        a 403 of `websocket.close`.
        """
        try:
            events: list[Event] = [{"type": SendEvent.CLOSE}]
            if "websocket.http.response" in (socket.scope.get("extensions") or ()):
                # Complete before it starts, and in one piece: uvicorn's older
                # implementation sends what it has when the event loop turns.
                start, *parts = await self.encode(response)
                body = b"".join(part.get("body", b"") for part in parts)
                events = [
                    {**start, "type": "websocket.http.response.start"},
                    {"type": "websocket.http.response.body", "body": body},
                ]
            with suppress(OSError, RuntimeError):  # the client has gone
                for event in events:
                    await socket._send(event)
            socket._answered()
        finally:

            def close() -> None:
                with _request_signals(socket._lease):
                    response.close()

            await sync_to_async(close)()


def websockets(app: Application) -> Any:
    """Serve WebSockets by Django, and everything else by `app` (ASGI applications).

    Wrap what `get_asgi_application()` returned. Each handshake passes
    `settings.MIDDLEWARE`, of which this makes instances of its own.
    """
    _options()  # what is wrong in WEBSOCKETS, at the start and not at the first join()
    handler = WebSocketHandler()

    async def application(scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "websocket":
            await handler(scope, receive, send)
        else:
            await app(scope, receive, send)

    return application
