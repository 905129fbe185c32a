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
        await socket.join(room)
        async for message in socket.iter_json():
            await broadcast(room, {"from": str(user), **message})

The handshake is a Django request: it passes your MIDDLEWARE, is resolved by your
URLconf, is checked against ALLOWED_HOSTS and CSRF_TRUSTED_ORIGINS, and is refused with
your error pages. Serve it with an ASGI server that speaks WebSocket, for example
`pip install 'uvicorn[standard]'` and `uvicorn project.asgi:application`.
"""

import asyncio
import contextvars
import enum
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
from collections import abc, deque
from concurrent import futures
from contextlib import ExitStack, asynccontextmanager, suppress
from functools import partial, update_wrapper
from typing import Any, ClassVar, Literal
from urllib.parse import unquote, urlsplit

from asgiref.sync import SyncToAsync, ThreadSensitiveContext
from asgiref.sync import iscoroutinefunction as is_async
from asgiref.sync import sync_to_async
from django import conf, http, urls
from django.core import signals
from django.core.exceptions import ImproperlyConfigured, PermissionDenied
from django.core.handlers import asgi, exception
from django.core.serializers.json import DjangoJSONEncoder
from django.db import close_old_connections, connections
from django.http.response import HttpResponseBase, ResponseHeaders
from django.middleware.csrf import REASON_BAD_ORIGIN, CsrfViewMiddleware
from django.utils.cache import patch_vary_headers
from django.utils.log import log_response

__version__ = "1.0"
__all__ = [
    "CloseCode",
    "InvalidMessage",
    "ReceiveEvent",
    "SendEvent",
    "WebSocket",
    "WebSocketDenied",
    "WebSocketDisconnect",
    "broadcast",
    "close_group",
    "connect",
    "re_websocket",
    "websocket",
    "websockets",
]

_logger = logging.getLogger("django_ws")

Scope = dict[str, Any]
Event = abc.Mapping[str, Any]
Receive = abc.Callable[[], abc.Awaitable[Event]]
Send = abc.Callable[[Event], abc.Awaitable[None]]
Application = abc.Callable[[Scope, Receive, Send], abc.Coroutine[Any, Any, None]]
View = abc.Callable[..., Any]
Headers = abc.Mapping[Any, str | bytes] | abc.Iterable[tuple[str | bytes, str | bytes]]


# The words of the wire


class SendEvent(enum.StrEnum):
    """What an application sends to the server (ASGI, "WebSocket").

    ACCEPT completes the handshake, once, before any message. SEND is one message to the
    client, text or bytes. CLOSE refuses before ACCEPT (HTTP 403) and ends after it.
    """

    ACCEPT = "websocket.accept"
    SEND = "websocket.send"
    CLOSE = "websocket.close"


class ReceiveEvent(enum.StrEnum):
    """What an application receives from the server (ASGI, "WebSocket").

    CONNECT is the first: a client asks for a handshake. RECEIVE is one message from the
    client, text or bytes. DISCONNECT is the last: the connection has ended.
    """

    CONNECT = "websocket.connect"
    RECEIVE = "websocket.receive"
    DISCONNECT = "websocket.disconnect"


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


def _close_event(code: int, reason: str = "") -> dict[str, Any]:
    """Return the event for a close frame (RFC 6455, sections 5.5.1 and 7.4)."""
    if not (1000 <= code <= 1003 or 1007 <= code <= 1014 or 3000 <= code <= 4999):
        raise ValueError(f"{code!r} is no close code that may be sent")
    if not isinstance(reason, str):
        raise TypeError(f"a close reason is a str, not {type(reason).__name__}")
    if len(reason.encode()) > 123:
        raise ValueError("a close reason has at most 123 bytes of UTF-8")
    return {"type": SendEvent.CLOSE, "code": int(code), "reason": reason}


class WebSocketDisconnect(Exception):
    """The connection has ended; left uncaught in a view, it is a normal end.

    `code` is the close code (int) and `reason` its text (str, often empty), of
    whichever side closed; 1005 where the close frame had no code, 1006 where the
    connection broke without one (RFC 6455, section 7.1.5), or where sending failed and
    receiving has yet to tell more.
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
        super().__init__(code, message)
        self.code: int = _close_event(code)["code"]

    def __str__(self) -> str:
        return str(self.args[1])


class WebSocketDenied(Exception):
    """The handshake was refused, says `connect`.

    `response` (HttpResponse) is the answer: its status, content, headers and cookies.
    """

    def __init__(self, response: http.HttpResponse) -> None:
        super().__init__(response)
        self.response = response

    def __str__(self) -> str:
        status = f"{self.response.status_code} {self.response.reason_phrase}"
        return f"the handshake was answered with {status}"


# The socket


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


class _End:
    """One end of a WebSocket: messages, on top of `receive` and `send`."""

    # "lost" is a connection on which sending failed; receiving has yet to tell why.
    _state: Literal["connecting", "open", "lost", "closed"]
    _end: tuple[int, str] = (CloseCode.ABNORMAL_CLOSURE, "")
    # What each end adds: the primitives, and the type of the events that carry its
    # messages.
    receive: Receive
    send: Send
    _message: str

    @property
    def connected(self) -> bool:
        """Whether messages can go by: after `accept()`, until either side's end."""
        return self._state == "open"

    def _disconnect(self) -> WebSocketDisconnect:
        return WebSocketDisconnect(*self._end)

    def _unexpected(self, expected: str) -> Exception:
        """Return why the event that `receive` just gave is not the one expected."""
        if self._state == "closed":
            return self._disconnect()
        return InvalidMessage(CloseCode.UNSUPPORTED_DATA, f"{expected} expected")

    async def receive_text(self) -> str:
        """Return the next message, which must be text (str). Cancelling it is safe.

        Raises `WebSocketDisconnect` when the connection has ended; `InvalidMessage`
        (1003) when the message is binary; `RuntimeError` before `accept()`.
        Source: RFC 6455, section 5.6.
        """
        if self._state == "connecting":
            raise RuntimeError("call accept() before receive_text()")
        text: str | None = (await self.receive()).get("text")
        if text is None:
            raise self._unexpected("text was")
        return text

    async def receive_bytes(self) -> bytes:
        """Return the next message, which must be binary (bytes). Cancelling it is safe.

        Raises `WebSocketDisconnect` when the connection has ended; `InvalidMessage`
        (1003) when the message is text; `RuntimeError` before `accept()`.
        Source: RFC 6455, section 5.6.
        """
        if self._state == "connecting":
            raise RuntimeError("call accept() before receive_bytes()")
        data: bytes | None = (await self.receive()).get("bytes")
        if data is None:
            raise self._unexpected("bytes were")
        return data

    async def _receive_any(self) -> str | bytes:
        if self._state == "connecting":
            raise RuntimeError("call accept() before receiving messages")
        event = await self.receive()
        message: str | bytes | None = event.get("text")
        if message is None:
            message = event.get("bytes")
        if message is None:
            raise self._unexpected("a message was")
        return message

    async def receive_json(self) -> Any:
        """Return the next message's value: JSON, in text or in bytes of UTF-8.

        Cancelling it is safe. Raises `WebSocketDisconnect` when the connection has
        ended; `InvalidMessage` (1007) when the message is no JSON, is nested too deeply
        for Python or has a number out of its range; `RuntimeError` before `accept()`.
        Source: RFC 8259.
        """
        message = await self._receive_any()
        try:
            if isinstance(message, bytes):
                message = message.decode()
            return _decode_json(message)
        except (ValueError, RecursionError) as error:
            code = CloseCode.INVALID_FRAME_PAYLOAD_DATA
            raise InvalidMessage(code, "JSON was expected") from error

    async def _iter(
        self, receive: abc.Callable[[], abc.Awaitable[Any]]
    ) -> abc.AsyncIterator[Any]:
        with suppress(WebSocketDisconnect):
            while True:
                yield await receive()

    def iter_text(self) -> abc.AsyncIterator[str]:
        """Yield messages as `receive_text()` does, until the connection has ended."""
        return self._iter(self.receive_text)

    def iter_bytes(self) -> abc.AsyncIterator[bytes]:
        """Yield messages as `receive_bytes()` does, until the connection has ended."""
        return self._iter(self.receive_bytes)

    def iter_json(self) -> abc.AsyncIterator[Any]:
        """Yield messages as `receive_json()` does, until the connection has ended."""
        return self._iter(self.receive_json)

    def __aiter__(self) -> abc.AsyncIterator[str | bytes]:
        """Yield messages as they were sent, until the connection has ended."""
        return self._iter(self._receive_any)

    async def send_text(self, text: str) -> None:
        """Send `text` (str) as one text message. Cancelling it is safe.

        Raises `TypeError` for anything but str and `RuntimeError` before `accept()`,
        with nothing sent; `WebSocketDisconnect` when the connection has ended.
        Source: RFC 6455, section 5.6.
        """
        if not isinstance(text, str):
            raise TypeError(f"send_text() takes str, not {type(text).__name__}")
        await self.send({"type": self._message, "text": text})

    async def send_bytes(self, data: bytes | bytearray | memoryview) -> None:
        """Send `data` (bytes-like) as one binary message. Cancelling it is safe.

        Raises `TypeError` for anything that is not bytes-like and `RuntimeError` before
        `accept()`, with nothing sent; `WebSocketDisconnect` when the connection has
        ended. Source: RFC 6455, section 5.6.
        """
        if not isinstance(data, bytes):
            data = bytes(memoryview(data))  # bytes(5) would be five zeros
        await self.send({"type": self._message, "bytes": data})

    async def send_json(self, data: Any, *, binary: bool = False) -> None:
        """Send `data` as JSON, in one text message or, with `binary`, in a binary one.

        Dates, times, UUIDs, decimals and lazy strings are written as Django's
        `DjangoJSONEncoder` does, without spaces, non-ASCII characters as themselves.

        Cancelling it is safe. Raises `TypeError` for what JSON cannot carry,
        `ValueError` for NaN, infinity and circular data, `RuntimeError` before
        `accept()`, with nothing sent; `WebSocketDisconnect` when the connection has
        ended. Source: RFC 8259.
        """
        text = _json(data)
        if binary:
            await self.send_bytes(text.encode())
        else:
            await self.send_text(text)


# A header's name and value (RFC 9110, sections 5.1 and 5.5).
_TOKEN = re.compile(r"[!#$%&'*+.^_`|~0-9A-Za-z-]+")
_VALUE = re.compile(r"[\t -~\x80-\xff]*")
# What the server itself writes on the answer to a handshake: ASGI reserves
# Sec-WebSocket-Protocol ("Accept - send event"), RFC 6455 (section 4.2.2) the others,
# and an answer with the status 101 has no body.
_SERVERS_OWN = re.compile(
    r"connection|upgrade|content-length|transfer-encoding|sec-websocket-.*", re.I
)


def _frames(coroutine: Any) -> abc.Iterator[Any]:
    """Yield the frames of a suspended coroutine and of all that it awaits."""
    while frame := getattr(coroutine, "cr_frame", None):
        yield frame
        coroutine = coroutine.cr_await


def _position(task: asyncio.Task[Any]) -> list[tuple[int, int]]:
    return [(id(frame), frame.f_lasti) for frame in _frames(task.get_coro())]


class WebSocket(_End):
    """The server's end of one WebSocket, handed to a view as its first argument.

    Every attribute that is not listed here is that of `request`, the HttpRequest of the
    handshake as the middleware left it: `socket.user`, `await socket.auser()`,
    `socket.session`, `socket.path`, `socket.headers`, `socket.COOKIES`, `socket.GET`,
    `socket.resolver_match`, `socket.build_absolute_uri()`. `scope` is the ASGI
    connection scope as the server made it.

    One task at a time may receive; any number may send. Sending waits while the client
    reads too slowly. Cancelling any of it, by `asyncio.timeout()` say, is safe: no
    message is lost (but on granian, whose own `receive` loses some), and one that was
    being sent was sent whole, or not at all.
    """

    #: Seconds after which it is asked whether a busy view's client has left; those that
    #: a view has to clean up where it is not certain that it knows of the end; and
    #: those that a slow client has to read what was sent to groups before the end.
    WATCH = 1.0
    GRACE = 30.0
    FLUSH = 5.0

    _message = "websocket.send"

    def __init__(
        self, scope: Scope, connect: Event, receive: Receive, send: Send, lease: Any
    ) -> None:
        self.scope = scope
        self.request: asgi.ASGIRequest
        self._receive = receive
        self._send = send
        self._lease = lease
        # What tells the view's tasks from others: child tasks inherit it.
        self._context = SyncToAsync.thread_sensitive_context.get(None)
        # Not the class's: Python reads an attribute slower that hides one of a class.
        self._state = "connecting"
        # Until the handshake is answered: the event that began it, what refuses it, and
        # the headers that the middleware adds to its answer.
        self._connect: Event | None = connect
        self._refuse: Any = None
        self._headers: abc.Iterable[tuple[bytes, bytes]] = ()
        # The view's task; whether it knows of the end, by an exception or its own
        # close(); and, where it was cancelled for the end, how often it was by then.
        # Not always once: until Python 3.13 a TaskGroup that failed leaves one behind.
        self._task: asyncio.Task[Any] | None = None
        self._told = False
        self._cancelling = 0
        # A task of the view's that learned of the end and may be cleaning up, when that
        # was, and where the view itself was then: if it has moved on since, it may
        # know, too.
        self._heard: tuple[asyncio.Task[Any], float, list[Any]] | None = None
        # The task that waits in receive(), what reads ahead where none waits for
        # a second, and the timer for that second.
        self._receiver: asyncio.Task[Any] | None = None
        self._ahead: asyncio.Future[Event] | None = None
        self._timer: asyncio.TimerHandle | None = None
        # How often the view sent; the groups that it is in, and what these send.
        self._sends = 0
        self._groups: set[str] = set()
        self._outbox: _Outbox | None = None

    def __getattr__(self, name: str) -> Any:
        if name == "request":  # not set yet, as in copy.copy(): no endless recursion
            raise AttributeError(name)
        return getattr(self.request, name)

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self._state} {self.path!r}>"

    @property
    def scheme(self) -> str:
        """`"wss"` (encrypted, heeding SECURE_PROXY_SSL_HEADER) or `"ws"` (str)."""
        return "wss" if self.request.is_secure() else "ws"

    @property
    def query_params(self) -> http.QueryDict:
        """The parameters of the query string (QueryDict), as `request.GET`."""
        return self.request.GET

    @property
    def query_string(self) -> str:
        """The query string as it was sent, without the question mark (str)."""
        return str(self.request.META["QUERY_STRING"])

    @property
    def subprotocols(self) -> list[str]:
        """What the client offers (list of str), best first (RFC 6455, section 1.9)."""
        return list(self.scope.get("subprotocols") or ())

    async def receive(self) -> Event:
        """Return the next ASGI event (a mapping), as the server gave it.

        First `websocket.connect`, unless `accept()` was called before; then
        `websocket.receive` for each message; at last one `websocket.disconnect`.

        Cancelling it is safe on servers whose own `receive` is: no event is lost.

        Raises `WebSocketDisconnect` after the end.
        Source: ASGI, "WebSocket".
        """
        if self._receiver is not None:
            raise RuntimeError("another task is receiving from this WebSocket")
        if self._lease.worker is not None:
            self._lease.release()
        if self._connect is not None:
            event, self._connect = self._connect, None
            return event
        task: Any = asyncio.current_task()
        self._receiver, cancelling = task, task.cancelling()
        try:
            ahead = self._ahead
            if self._state == "closed" and (ahead is None or not ahead.done()):
                raise self._disconnect()
            if ahead is not None:
                if not ahead.done():
                    await asyncio.wait([ahead])  # cancelling this leaves it alone
                self._ahead = None
                if ahead.cancelled():  # the view has ended, this is a task it left
                    raise self._disconnect()
                event = ahead.result()
                if self._state == "closed" and event["type"] != "websocket.disconnect":
                    raise self._disconnect()
            else:
                event = await self._receive()
        except asyncio.CancelledError:
            # By _ended(), if another task ended it: as when the client leaves.
            if self._state != "closed" or task.uncancel() > cancelling:
                raise
            raise self._disconnect() from None
        finally:
            self._receiver = None
            if self._timer is None:
                self._watch()
        if event["type"] == "websocket.disconnect":
            self._ended(event)
            self._disconnect()  # whoever receives it, knows
        return event

    def _watch(self) -> None:
        if self._task is not None and self._timer is None:
            loop = asyncio.get_running_loop()
            self._timer = loop.call_later(self.WATCH, self._look)

    def _look(self, ahead: asyncio.Future[Event] | None = None) -> None:
        """See after a view that did not wait for its client just now.

        After a second, and when the event that was read `ahead` then has come.
        """
        if ahead not in (None, self._ahead):
            return  # receive() took it
        if ahead is None and self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if self._task is None or self._receiver is not None:
            return
        ahead = self._ahead
        if self._state != "closed":
            if ahead is None:
                # One event ahead of the view: it may be the end. Any more would take
                # the server's back-pressure away.
                self._ahead = asyncio.ensure_future(self._receive())
                self._ahead.add_done_callback(self._look)
            elif ahead.done() and not ahead.cancelled() and not ahead.exception():
                if ahead.result()["type"] == "websocket.disconnect":
                    self._ended(ahead.result())
        if self._state != "closed" or self._told or self._cancelling:
            return
        # Cancel the view, unless it may know of the end and be cleaning up.
        if self._heard is not None:
            hearer, then, position = self._heard
            busy = not hearer.done() or position != _position(self._task)
            if busy and time.monotonic() < then + self.GRACE:
                return self._watch()
        if self._task.cancelling() and sys.version_info >= (3, 13):
            return self._watch()  # somebody else did
        self._task.cancel()
        self._cancelling = self._task.cancelling()

    def _ended(self, event: Event, default: int = 1005) -> None:
        """Note the end; whoever receives hears of it, others are looked after."""
        if self._state != "closed":
            self._state = "closed"
            self._end = event.get("code") or default, event.get("reason") or ""
            if self._receiver is not None:
                self._receiver.cancel()
            self._watch()  # over the view's task, where another task learns of it

    def _disconnect(self) -> WebSocketDisconnect:
        """Return the exception for the end, which the task that runs now learns of."""
        task: Any = asyncio.current_task()
        context = SyncToAsync.thread_sensitive_context.get(None)
        if task is self._task:
            self._told = True
        elif self._task and not self._heard and context is self._context:
            self._heard = task, time.monotonic(), _position(self._task)
        return super()._disconnect()

    def _stop(self) -> None:
        """Leave nothing behind when the view has ended."""
        self._task = self._heard = None
        if self._timer is not None:
            self._timer.cancel()
        if self._ahead is not None:
            self._ahead.cancel()
        while self._groups:
            group = self._groups.pop()
            _groups(group).leave(group, self)

    async def send(self, event: Event) -> None:
        """Send one ASGI event (a mapping) to the server.

        `websocket.accept` or `websocket.close` before the handshake's end,
        `websocket.send` or `websocket.close` after it. It waits while the client reads
        more slowly than the view sends (the server's back-pressure), and may then
        overtake what was sent to the socket's groups.

        Cancelling it is safe: the event was sent, or it was not; part of it never.

        Raises `RuntimeError` for an event that is out of turn, with nothing sent;
        `WebSocketDisconnect` after the end, with the code 1006 where only the server
        knows of it yet: `receive` tells more.
        Source: ASGI, "WebSocket".
        """
        if self._state != "open" or event["type"] != "websocket.send":
            kind = event["type"]
            if kind == "websocket.close":
                await self._flush()
            if self._state in ("lost", "closed"):
                raise self._disconnect()
            if kind == "websocket.close":
                self._ended(event, 1000)
                self._disconnect()  # whoever closes, knows
            elif self._state == "open":
                if kind == "websocket.accept":
                    raise RuntimeError("accept() was called before")
                raise RuntimeError(f"{kind!r} is no event that can be sent")
            elif kind == "websocket.accept":
                self._state = "open"
            else:
                raise RuntimeError(f"call accept() before sending a {kind}")
        self._sends += 1
        try:
            if not self._sends & 1023:
                # The turn of others. A server's send need not wait, least of all when
                # its client has gone: a view that only sends would stop the process.
                await asyncio.sleep(0)
            await self._send(event)
        except (OSError, RuntimeError) as error:
            # OSError is what a server raises when the client has gone (ASGI 2.4), and
            # RuntimeError what some raise where they closed by themselves (no answer to
            # a ping, a message too big). What the client sent before, and why it went,
            # `receive` has yet to tell.
            if self._refuse is not None:
                self._ended({"code": CloseCode.ABNORMAL_CLOSURE})
            elif self._state == "open":
                self._state = "lost"
            raise self._disconnect() from error
        except BaseException:
            if self._refuse is not None and self._state == "open":
                self._state = "connecting"  # no answer to the handshake went out
            raise
        if self._refuse is not None:  # that was the answer
            self._connect = self._refuse = None
            self._headers = ()

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
        lines = list(self._headers)
        pairs: Any = headers.items() if isinstance(headers, abc.Mapping) else headers
        for pair in pairs:
            # Django's own rules for a header: no line breaks, ASCII, latin-1.
            [(name, value)] = ResponseHeaders(dict([pair])).items()
            value = value.strip(" \t")
            valid = _TOKEN.fullmatch(name) and _VALUE.fullmatch(value)
            if not valid or _SERVERS_OWN.fullmatch(name):
                raise ValueError(f"accept() cannot send the header {name!r}")
            lines.append((name.lower().encode("ascii"), value.encode("latin-1")))
        accept = {"type": SendEvent.ACCEPT, "subprotocol": subprotocol}
        await self.send({**accept, "headers": lines})

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
        close = _close_event(code, reason)
        if self._state == "connecting" and self._refuse:
            await self._refuse(None)
            self._ended(close)
            self._disconnect()
        elif self._state != "closed":
            with suppress(WebSocketDisconnect):
                await self.send(close)

    async def _flush(self) -> None:
        """Let the client read what was sent to groups, for some seconds at most."""
        if self._outbox is not None and self._outbox.task is not None:
            task = self._outbox.task
            await asyncio.wait([task], timeout=self.FLUSH)
            task.cancel()

    async def join(self, group: str) -> None:
        """Put the socket into a group (str) until it leaves or ends.

        What is sent to the group after `join()` has returned arrives. Joining again
        does nothing. With Redis it waits until Redis has confirmed the subscription,
        so for as long as Redis is down. Cancelling it is safe; `leave()` takes it back.

        Raises `RuntimeError` before `accept()`, `WebSocketDisconnect` after the end.
        """
        if self._state == "connecting":
            raise RuntimeError("call accept() before join()")
        if self._state != "open" or self._task is None:  # a task outlived the view
            raise self._disconnect()
        groups = _groups(group)
        self._groups.add(group)
        await groups.join(group, self)

    async def leave(self, group: str) -> None:
        """Take the socket out of a group (str); nothing happens where it is in none.

        Cancelling it is safe. It raises nothing, also after the end.
        """
        if group in self._groups:
            self._groups.remove(group)
            _groups(group).leave(group, self)


# Groups


class _Outbox:
    """What groups send to one socket, in order.

    Without back-pressure from the server nothing waits here.
    """

    # Seconds that broadcasts wait for a client that has no room left; what they waited
    # comes back a hundred times more slowly. One that reads makes room in a fraction of
    # it, and is only outrun by a view that broadcasts without a pause.
    PATIENCE = 0.25

    def __init__(self, socket: WebSocket) -> None:
        self.socket = socket
        self.events: deque[Event] = deque()
        self.task: asyncio.Task[None] | None = None  # that sends them just now
        self.changed = asyncio.Event()  # something was sent
        self.patient_again = 0.0  # when all of the patience will have come back

    async def drain(self) -> None:
        """Send all that waits, as fast as the client reads."""
        task: Any = asyncio.current_task()
        self.task = task
        try:
            while self.events:
                await self.socket._send(self.events.popleft())
                self.changed.set()
        except (Exception, asyncio.CancelledError) as error:
            self.events.clear()
            self.changed.set()
            if isinstance(error, (OSError, RuntimeError)):  # as in WebSocket.send()
                if self.socket._state == "open":
                    self.socket._state = "lost"
            elif not task.cancelling():  # by the socket's end
                _logger.error("A message to a group was not sent", exc_info=error)
                self.socket._ended({"code": CloseCode.ABNORMAL_CLOSURE})
        finally:
            self.task = None

    async def make_room(self, limit: int) -> None:
        """Wait a moment for room; without it, give the client up, and tell it so."""
        start = time.monotonic()
        spent = max(0.0, self.patient_again - start) / 100
        with suppress(TimeoutError):
            async with asyncio.timeout(self.PATIENCE - spent):
                while len(self.events) >= limit:
                    self.changed.clear()
                    await self.changed.wait()
        spent += time.monotonic() - start
        self.patient_again = start + 100 * spent
        if len(self.events) >= limit and self.socket._state == "open":
            close = _close_event(CloseCode.TRY_AGAIN_LATER, "reads too slowly")
            self.socket._ended(close)
            self.events = deque([close])


class _Group(set[WebSocket]):
    """The sockets of a group on one event loop; one broadcast after another."""

    def __init__(self) -> None:
        super().__init__()
        self.lock = asyncio.Lock()


class _Groups:
    """The groups of one event loop; messages stay in this process."""

    # The event loops of this process that have sockets in groups.
    loops: ClassVar[dict[asyncio.AbstractEventLoop, "_Groups"]] = {}
    # A task that starts at once shows whether it has to wait for a client; if not, it
    # can go on with the next.
    EAGER: Any = {"eager_start": True} if sys.version_info >= (3, 12) else {}

    def __init__(self, options: dict[str, Any]) -> None:
        self.limit: int = options["OUTBOX"]
        self.members: dict[str, _Group] = {}

    async def join(self, group: str, socket: WebSocket) -> None:
        """Add a socket; what is published from now on reaches it."""
        self.loops[asyncio.get_running_loop()] = self
        if group not in self.members:
            self.members[group] = _Group()
        self.members[group].add(socket)

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
                # Whole, also where the client of the view that broadcasts leaves now.
                await asyncio.shield(groups.deliver(group, event))
            elif loop.is_running():
                delivery = groups.deliver(group, event)
                future = asyncio.run_coroutine_threadsafe(delivery, loop)
                # Not longer: a loop that stops just now never answers.
                await asyncio.wait([asyncio.wrap_future(future)], timeout=1)
            elif loop.is_closed():
                self.loops.pop(loop, None)

    async def deliver(self, group: str, event: Event) -> None:
        """Send an event to the group's sockets on this loop."""
        members = self.members.get(group, _Group())
        close = event["type"] == SendEvent.CLOSE
        full = []

        async def send_to(batch: list[WebSocket]) -> None:
            while batch:
                socket = batch.pop()
                if socket._state == "open" and socket in members:
                    outbox = socket._outbox = socket._outbox or _Outbox(socket)
                    if close:  # at once, also for a client that does not read
                        socket._ended(event)
                    outbox.events.append(event)
                    if outbox.task is None:
                        await outbox.drain()
                    elif not close and len(outbox.events) >= self.limit:
                        full.append(outbox)

        async with members.lock:
            waiting, size, sends = list(members), 250, 0
            while waiting:
                batch = waiting[-size:]
                del waiting[-size:]
                sends += len(batch)
                loop = asyncio.get_running_loop()
                asyncio.Task(send_to(batch), loop=loop, **self.EAGER)
                if not self.EAGER and (size > 1 or not waiting):
                    await asyncio.sleep(0)  # only now it starts
                if size > 1 and batch:
                    # The server waits for a client: the task is that one's from now on.
                    sends -= len(batch)
                    waiting += batch
                    batch.clear()
                    size = 250 if self.EAGER else 1  # else each cost a turn of the loop
                if sends >= 250:
                    sends = 0
                    await asyncio.sleep(0)  # the turn of the sockets outside the group
            if full:  # all at once: none waits for another's sake
                await asyncio.gather(*[one.make_room(self.limit) for one in full])


class _RedisGroups(_Groups):
    """Groups that span all processes on one Redis, by publish/subscribe."""

    # Seconds of silence after which Redis is asked whether it is still there, and the
    # bounds between which the pause before a new connection doubles.
    SILENCE = 15.0
    PAUSES = (0.1, 10.0)

    def __init__(self, options: dict[str, Any]) -> None:
        from redis.asyncio import BlockingConnectionPool, Redis
        from redis.asyncio.retry import Retry
        from redis.backoff import NoBackoff

        super().__init__(options)
        self.prefix = options["PREFIX"]
        url = options["REDIS_URL"]
        # Who listens must know when the connection breaks.
        self.subscriber: Any = Redis.from_url(url, retry=Retry(NoBackoff(), 0))
        # To publish there is a second try, since Redis may have closed a connection
        # that was idle; many broadcasts at once wait for each other.
        retry = Retry(NoBackoff(), 1)
        pool = BlockingConnectionPool.from_url(url, max_connections=10, retry=retry)
        self.client: Any = Redis.from_pool(pool)
        self.listener: asyncio.Task[None] | None = None
        self.pause = 0.0  # while Redis is away
        # The groups that were joined or lost their last socket since Redis was asked;
        # for each ping on its way, and the next one, who waits for its answer.
        self.changed: set[str] = set()
        self.pings: deque[list[asyncio.Future[None]]] = deque([[]])
        self.wake = asyncio.Event()
        self.room = asyncio.Semaphore(100)
        self.deliveries: set[asyncio.Task[None]] = set()

    def channel(self, group: str) -> bytes:
        return f"{self.prefix}:{group}".encode("utf-8", "surrogatepass")

    async def join(self, group: str, socket: WebSocket) -> None:
        """Add a socket, and wait until Redis has confirmed the subscription."""
        await super().join(group, socket)
        loop = asyncio.get_running_loop()
        confirmed = loop.create_future()
        self.pings[-1].append(confirmed)
        self.changed.add(group)
        self.wake.set()
        if self.listener is None:
            # Not the view's own doing: without its context.
            context = contextvars.Context()
            self.listener = loop.create_task(self.listen(), context=context)
        await confirmed

    def leave(self, group: str, socket: WebSocket) -> None:
        """Remove a socket, and unsubscribe from a group without any."""
        super().leave(group, socket)
        if group not in self.members:
            self.changed.add(group)
            self.wake.set()

    async def listen(self) -> None:
        """Listen to Redis while there are members; connect again and again."""
        while self.members:
            try:
                # All over again; who has given up is forgotten.
                joining = [one for one in sum(self.pings, []) if not one.done()]
                self.pings = deque([joining])
                async with self.subscriber.pubsub() as pubsub:
                    await pubsub.connect()
                    async with asyncio.TaskGroup() as tasks:
                        reader = tasks.create_task(self.read(pubsub))
                        await self.subscribe(pubsub)
                        reader.cancel()
            except* Exception as group:  # whatever it is, sockets wait for their groups
                if not self.pause:
                    error = group.exceptions[0]
                    _logger.warning("Redis is away, groups get no messages: %s", error)
                self.pause = min(max(2 * self.pause, self.PAUSES[0]), self.PAUSES[1])
                await asyncio.sleep(self.pause * random.uniform(0.5, 1))
        self.listener = None
        self.confirm(sum(self.pings, []))  # whoever left before
        await self.client.connection_pool.disconnect(inuse_connections=False)

    def confirm(self, joining: abc.Iterable[asyncio.Future[None]]) -> None:
        """Let those who join go on, but for who has given up."""
        for future in joining:
            if not future.done():
                future.set_result(None)

    async def subscribe(self, pubsub: Any) -> None:
        """Let Redis send what the groups that have sockets here get, and no more.

        Redis answers in order: the answer to a ping confirms all that was asked before.
        """
        asked, self.changed = set[str](), set(self.members)
        while self.members:
            changed, self.changed = self.changed, set()
            new = (changed & self.members.keys()) - asked
            old = (changed & asked) - self.members.keys()
            asked = (asked | new) - old
            self.pings.append([])
            if new:
                await pubsub.subscribe(*map(self.channel, new))
            if old:
                await pubsub.unsubscribe(*map(self.channel, old))
            await pubsub.ping()
            await self.wake.wait()
            self.wake.clear()

    async def read(self, pubsub: Any) -> None:
        """Handle what Redis sends."""
        while True:
            message = await pubsub.get_message(timeout=self.SILENCE)
            if message is None:
                self.wake.set()  # for a ping
                message = await pubsub.get_message(timeout=self.SILENCE)
            if message is None:
                raise ConnectionError("Redis does not answer")
            await self.handle(message)

    async def handle(self, message: dict[str, Any]) -> None:
        if message["type"] == "pong":
            if self.pause:
                _logger.warning("Redis is back: groups work again")
                self.pause = 0.0
            self.confirm(self.pings.popleft())
        elif message["type"] == "message":
            channel = message["channel"].decode("utf-8", "surrogatepass")
            group = channel.removeprefix(f"{self.prefix}:")
            kind, data = message["data"][:1], message["data"][1:]
            try:
                event = {"type": SendEvent.SEND, "bytes": data}
                if kind == b"t":
                    event = {"type": SendEvent.SEND, "text": data.decode()}
                elif kind == b"c":
                    number, _, reason = data.decode().partition(" ")
                    event = _close_event(int(number), reason)
            except ValueError:
                return _logger.warning("No message of django_ws: %r", message)
            # Who waits for a slow client in one group does not hold up the others; only
            # so many do, for memory's sake.
            await self.room.acquire()
            task = asyncio.ensure_future(self.deliver(group, event))
            self.deliveries.add(task)
            task.add_done_callback(self.delivered)

    def delivered(self, task: asyncio.Task[None]) -> None:
        self.deliveries.discard(task)
        self.room.release()

    async def publish(self, group: str, event: Event) -> None:
        """Publish an event on Redis; the listeners of all processes deliver it."""
        from redis import exceptions

        if event["type"] == SendEvent.CLOSE:
            data = b"c" + f"{event['code']} {event['reason']}".encode()
        elif "text" in event:
            data = b"t" + event["text"].encode()
        else:
            data = b"b" + event["bytes"]
        try:
            await self.client.publish(self.channel(group), data)
        except exceptions.TimeoutError as error:
            raise exceptions.ConnectionError("Redis does not answer") from error
        finally:
            if self.listener is None:  # a process, or a loop, without sockets
                await self.client.connection_pool.disconnect(inuse_connections=False)


def _new_groups() -> _Groups:
    """Make what `settings.WEBSOCKETS` asks for, or raise for what is wrong there."""
    options: dict[str, Any] = {"REDIS_URL": "", "PREFIX": "django_ws", "OUTBOX": 100}
    given = getattr(conf.settings, "WEBSOCKETS", {})
    if not isinstance(given, dict):
        raise ImproperlyConfigured("WEBSOCKETS must be a dict")
    for name, value in given.items():
        wrong = f"WEBSOCKETS[{name!r}]"
        if name not in options:
            raise ImproperlyConfigured(f"{wrong}: there are only {', '.join(options)}")
        kind = type(options[name])
        if type(value) is not kind:
            raise ImproperlyConfigured(f"{wrong} must be {kind.__name__}")
        options[name] = value
    if options["OUTBOX"] < 1:
        raise ImproperlyConfigured("WEBSOCKETS['OUTBOX'] must be 1 or more")
    if ":" in options["PREFIX"]:  # else "a" with the group "b:c" were "a:b" with "c"
        raise ImproperlyConfigured("WEBSOCKETS['PREFIX'] must have no colon")
    if not options["REDIS_URL"]:
        return _Groups(options)
    try:
        groups = _RedisGroups(options)
        groups.client.connection_pool.make_connection()
    except ImportError as error:
        wrong = "WEBSOCKETS['REDIS_URL'] needs redis-py: pip install redis"
        raise ImproperlyConfigured(wrong) from error
    except (ValueError, TypeError, AttributeError) as error:
        raise ImproperlyConfigured(f"WEBSOCKETS['REDIS_URL']: {error}") from error
    return groups


def _groups(group: str) -> _Groups:
    """Return the groups of the running event loop, among them one of this name."""
    if not isinstance(group, str):
        raise TypeError(f"a group's name is a str, not {type(group).__name__}")
    return _Groups.loops.get(asyncio.get_running_loop()) or _new_groups()


async def broadcast(group: str, message: Any) -> None:
    """Send a message to every socket in a group (str), wherever it is.

    str goes out as text, bytes-like as binary, anything else as JSON, as `send_json`
    writes it; it is encoded once. From synchronous code: `async_to_sync(broadcast)(…)`.
    A client that reads more slowly than WEBSOCKETS["OUTBOX"] messages allow is waited
    for, a quarter of a second and then a hundredth of the time, and else closed with
    1013; neither that nor any other trouble of a member raises anything here.

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
    await _groups(group).publish(group, {"type": SendEvent.SEND, **body})


async def close_group(
    group: str, code: int = CloseCode.NORMAL_CLOSURE, reason: str = ""
) -> None:
    """Close every socket in a group (str) with a code (int) and a reason (str).

    After what was broadcast to the group before; the views end as when their clients
    leave. For a session that ended, a person who lost a permission, a room that closed.

    Cancelling it is safe, though some members may have been closed.

    Raises `ValueError` as `WebSocket.close` does, and redis-py's `ConnectionError`.
    """
    await _groups(group).publish(group, _close_event(code, reason))


# URLs


class _SwitchingProtocols(http.HttpResponse):
    """What the middleware sees of an accepted handshake; it never goes out itself."""

    status_code = 101
    # What calling the view gave: its coroutine, a response, or None.
    result: Any = None

    def __init__(self, *call: Any) -> None:
        super().__init__()
        self.call = call

    def __del__(self) -> None:  # nobody waits any more: the server cancelled
        if inspect.iscoroutine(self.result):
            self.result.close()


def _upgrade_required(request: http.HttpRequest) -> http.HttpResponse:
    """Answer plain HTTP on a WebSocket route (RFC 9110, section 15.5.22)."""
    response = http.HttpResponse(
        "This address speaks WebSocket.", status=426, content_type="text/plain"
    )
    # Hop-by-hop headers belong to the server under WSGI (PEP 3333) and do not exist in
    # HTTP/2 and later (RFC 9113, section 8.2.2).
    if getattr(request, "scope", {}).get("http_version", "2").startswith("1"):
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


def _handshake_view(view: View) -> abc.Callable[..., http.HttpResponse]:
    """Make the ordinary, synchronous Django view that stands for a socket view."""
    target: Any = view
    while isinstance(target, partial) or hasattr(target, "__wrapped__"):
        target = target.func if isinstance(target, partial) else target.__wrapped__
    called = None if isinstance(target, type) else getattr(target, "__call__", None)
    if not (is_async(target) or is_async(view) or is_async(called)):
        name = getattr(target, "__qualname__", repr(target))
        raise TypeError(
            f"a WebSocket view is asynchronous: write 'async def' for {name}, "
            "as in 'async def view(socket)' or, in a View class, "
            "'async def get(self, socket)', and pass View.as_view()"
        )

    def handshake(request: http.HttpRequest, /, *args: Any, **kwargs: Any) -> Any:
        if getattr(request, "scope", {}).get("type") != "websocket":
            return _upgrade_required(request)
        request.get_host()  # ALLOWED_HOSTS, also where no middleware asks
        # A browser lets any page open a WebSocket to any site and sends that site's
        # cookies along; only the Origin header tells (RFC 6455, section 10.2). Clients
        # that are no browsers send none, and carry nobody's cookies by themselves.
        origin = request.META.get("HTTP_ORIGIN")
        if origin is not None and not getattr(handshake, "csrf_exempt", False):
            # Private, but nothing public compares an origin without asking for a CSRF
            # token too.
            csrf: Any = CsrfViewMiddleware(lambda request: http.HttpResponse())
            if not csrf._origin_verified(request):
                return csrf._reject(request, REASON_BAD_ORIGIN % origin)
        return _SwitchingProtocols(request, view, args, kwargs)

    update_wrapper(handshake, view, updated=())
    for name, value in getattr(view, "__dict__", {}).items():
        # What decorators leave for the middleware (csrf_exempt, login_required), not
        # the marker of View.as_view(): Django would await a synchronous view for it.
        setattr(handshake, name, value)
        if is_async(handshake):
            delattr(handshake, name)
    setattr(handshake, "websocket_view", view)
    return handshake


def websocket(
    route: Any,
    view: View,
    kwargs: dict[str, Any] | None = None,
    name: str | None = None,
) -> urls.URLPattern:
    """Route a WebSocket to `view`: `django.urls.path` for sockets.

    It takes what `path()` takes (converters, extra arguments, a name) and works under
    `include()`, namespaces and `i18n_patterns()`. `view` is called with a `WebSocket`
    and the route's arguments: an `async def`, decorated or not, a `functools.partial`
    of one, an object with an async `__call__`, or `View.as_view()` of a class with
    `async def get(self, socket, …)`.

    Raises `TypeError` for a view that is not asynchronous.
    """
    return urls.path(route, _handshake_view(view), kwargs, name)


def re_websocket(
    route: Any,
    view: View,
    kwargs: dict[str, Any] | None = None,
    name: str | None = None,
) -> urls.URLPattern:
    """Route a WebSocket to `view` by a regular expression: `django.urls.re_path`.

    As `websocket()` in everything else.
    """
    return urls.re_path(route, _handshake_view(view), kwargs, name)


# ASGI


class _Worker(futures.ThreadPoolExecutor):
    """One thread of the pool, the number of sockets that hold it, and of their jobs."""

    def __init__(self) -> None:
        super().__init__(1, "django_ws")
        self.holders = self.jobs = 0
        self.used = 0.0  # when a socket gave it back
        self.dirty = False  # whether it ran anything since its connections were tended


def _tend_connections(held: bool = False) -> None:
    """Close this thread's database connections that are too old, as after a request.

    Unless the socket goes on (`held`), forget what was set on them, too: middleware of
    many tenants sets the tenant there; the next socket's is another.
    """
    for connection in connections.all(initialized_only=True):
        if held and connection.in_atomic_block:
            continue
        connection.close_if_unusable_or_obsolete()
        # Makes Django ask the server before the next query, so that a restart of the
        # database fails none: a WebSocket cannot be asked again as a browser asks for
        # a page.
        setattr(connection, "health_check_enabled", True)
        # A transaction that was left open was just cut off, which Django remembers.
        gone = connection.connection is None or connection.closed_in_transaction
        if gone and not held:
            del connections[connection.alias]


class _Lease(futures.Executor):
    """The worker thread of one socket, held only while it runs synchronous code.

    asgiref takes it for the executor of the connection's thread-sensitive context. One
    thread for all sockets would run one query at a time; one for each would hold
    a database connection for each. So a socket borrows one of a few.
    """

    SIZE = min(32, (os.cpu_count() or 1) + 4)
    IDLE = 5.0  # seconds without synchronous code, after which the thread goes back

    workers: ClassVar[list[_Worker]] = []  # of the process
    lock = threading.Lock()

    def __init__(self) -> None:
        self.worker: _Worker | None = None
        self.jobs = 0
        self.timer: asyncio.TimerHandle | None = None
        self.used = 0.0  # when a job ended
        self.ended = False  # the socket has ended; a job of it may still run

    def submit(self, fn: abc.Callable[..., Any], /, *args: Any, **kwargs: Any) -> Any:
        """Run `fn` on the thread that this socket holds (concurrent.futures)."""
        with self.lock:
            if self.worker is None:
                workers = self.workers
                if len(workers) < self.SIZE and all(w.holders for w in workers):
                    workers.append(_Worker())
                # The first that is free: so few threads, with warm connections, do all
                # the work of a quiet site. Where all are taken, sockets share.
                self.worker = min(workers, key=lambda w: (w.jobs, w.holders))
                self.worker.holders += 1
                idle = time.monotonic() - self.worker.used
                if self.worker.holders == 1 and idle > self.IDLE:
                    # Connections on it may have grown too old meanwhile.
                    self.worker.submit(_tend_connections)
            worker = self.worker
            worker.dirty = True
            self.jobs += 1
            worker.jobs += 1
        if self.timer is None and not self.ended:
            self.look()
        job = worker.submit(fn, *args, **kwargs)
        job.add_done_callback(partial(self.done, worker))
        return job

    def done(self, worker: _Worker, job: futures.Future[Any]) -> None:
        """Note that a job has ended; called on whatever thread it ended."""
        with self.lock:
            self.jobs -= 1
            worker.jobs -= 1
        self.used = time.monotonic()
        if self.ended:
            self.release()

    def look(self) -> None:
        """Give the thread back when it has run nothing for a while."""
        idle = 0.0 if self.jobs else time.monotonic() - self.used
        if idle < self.IDLE:
            loop = asyncio.get_running_loop()
            self.timer = loop.call_later(self.IDLE - idle, self.look)
            if self.worker and self.worker.holders == 1 and not self.jobs:
                # Now and then, for a view that never lets it go.
                self.worker.submit(_tend_connections, held=True)
        else:
            self.release()

    def release(self, end: bool = False) -> None:
        """Give the thread back, with its old connections closed as after a request.

        It stays while a job runs, a child task's say; at the socket's end until then.
        """
        with self.lock:
            self.ended = self.ended or end
            # No other thread cancels it: at the end there is none any more.
            if self.timer is not None and (end or not self.jobs):
                self.timer.cancel()
                self.timer = None
            worker = self.worker
            if self.jobs or worker is None:
                return
            self.worker = None
            worker.holders -= 1
            worker.used = time.monotonic()
            # What another socket reads from an open cursor is not cut off.
            if worker.dirty and not worker.holders:
                worker.submit(_tend_connections)

    def tend(self) -> None:
        """Tend the thread's connections from within a job, if it is this socket's."""
        with self.lock:
            worker = self.worker
            if worker is None or worker.holders > 1:
                return
            worker.dirty = False
        _tend_connections()

    @sync_to_async
    def run(self, function: abc.Callable[..., Any], *args: Any) -> Any:
        """Run a synchronous part of Django's, which sends its signals of a request."""
        with ExitStack() as stack:
            if self.worker is None:
                # In the thread of a TestCase, whose transaction the signals must not
                # end: Django's own test client takes the same care.
                for signal in (signals.request_started, signals.request_finished):
                    signal.disconnect(close_old_connections)
                    stack.callback(signal.connect, close_old_connections)
            return function(*args)


class WebSocketHandler(asgi.ASGIHandler):
    """Django's request handler, for handshakes, and what comes after them."""

    def __init__(self, app: Application) -> None:
        self.app = app
        # Synchronous, unlike ASGIHandler: each of Django's middlewares in async mode
        # hops to a thread and back, the whole chain in sync mode hops once.
        self.load_middleware()

    def resolve_request(self, request: http.HttpRequest) -> urls.ResolverMatch:
        """Resolve as Django does, but to no view that is none for WebSockets."""
        match = super().resolve_request(request)
        if not hasattr(match.func, "websocket_view"):
            raise http.Http404(f"{request.path} is no WebSocket route")
        return match

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one WebSocket connection (ASGI, "WebSocket"), or let `app` serve."""
        if scope["type"] != "websocket":
            return await self.app(scope, receive, send)
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
            await self.serve(WebSocket(scope, connect, receive, send, lease))
        finally:
            SyncToAsync.thread_sensitive_context.reset(token)
            lease.release(end=True)

    async def serve(self, socket: WebSocket) -> None:
        """Run the handshake and the view of one connection."""
        response = await socket._lease.run(self.start, socket)
        if not isinstance(response, _SwitchingProtocols):
            return await self.refuse(socket, response)
        socket._lease.release()
        socket._refuse = partial(self.refuse_by_view, socket, response)
        cookies = [("Set-Cookie", c.OutputString()) for c in response.cookies.values()]
        socket._headers = [
            (name.lower().encode("ascii"), value.encode("latin-1"))
            for name, value in [*response.items(), *cookies]
            if name != "Content-Type" and not _SERVERS_OWN.fullmatch(name)
        ]
        result, response.result = response.result, None
        del response  # an idle socket has no use for them
        result = await self.run_view(socket, result)
        await socket._flush()
        if socket._refuse is None:
            await socket.close()
        elif socket._state == "closed":
            # The client left during the handshake; uvicorn logs an error where it gets
            # no answer even so.
            socket._refuse = None
            with suppress(OSError, RuntimeError):
                await socket._send({"type": SendEvent.CLOSE})
        else:
            try:
                await socket._refuse(result)
            finally:
                del result  # an exception, whose traceback leads back to this frame

    async def run_view(self, socket: WebSocket, result: Any) -> Any:
        """Await a view; return what refuses the handshake where it did not accept."""
        task: Any = asyncio.current_task()
        socket._task = task
        socket._watch()
        try:
            try:
                return await result if inspect.isawaitable(result) else result
            except asyncio.CancelledError as error:
                if task.cancelling() > socket._cancelling:
                    raise  # somebody else's cancellation goes on its way
                if socket._state == "closed":
                    return None
                message = "the view awaited something that was cancelled"
                raise RuntimeError(message) from error
            finally:
                socket._stop()
                if socket._cancelling:
                    task.uncancel()
        except Exception as error:
            return await self.handle_exception(socket, error)

    def start(self, socket: WebSocket) -> Any:
        """Do all of a handshake that is synchronous; it runs in a worker thread."""
        # What a handshake is to Django: a GET, over http or https.
        scheme = "https" if socket.scope.get("scheme") == "wss" else "http"
        scope = {**socket.scope, "method": "GET", "scheme": scheme}
        urls.set_script_prefix(asgi.get_script_prefix(scope))
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
            # For an `async def` this only makes the coroutine. The synchronous part of
            # others (dispatch() of a class-based view with LoginRequiredMixin, say) may
            # query the database, since it runs here.
            response.result = view(socket, *args, **kwargs)
        except Exception as error:
            response.result = error
        # The request is finished where the socket begins (signal request_finished).
        response.close()
        socket._lease.tend()
        urls.set_urlconf(getattr(socket.request, "urlconf", None))
        return response

    async def refuse_by_view(
        self, socket: WebSocket, handshake: http.HttpResponse, result: Any
    ) -> None:
        """Refuse for what a view returned or raised before accept()."""
        call = self.get_refusal, socket.request, result, handshake
        await self.refuse(socket, await socket._lease.run(*call))

    def get_refusal(
        self, request: asgi.ASGIRequest, result: Any, handshake: http.HttpResponse
    ) -> Any:
        """Return the response to what a view returned or raised before accept()."""

        def get_response(request: http.HttpRequest) -> Any:
            if result is None:
                resolver = urls.get_resolver(urls.get_urlconf())
                denied = PermissionDenied()
                return exception.get_exception_response(request, resolver, 403, denied)
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

        traceback = getattr(result, "__traceback__", None)
        signals.request_started.send(sender=self.__class__, scope=request.scope)
        response: Any = exception.convert_exception_to_response(get_response)(request)
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
            message = "%s: %s", response.reason_phrase, request.path
            log_response(*message, response=response, request=request)
        if isinstance(result, Exception):
            result.__traceback__ = traceback  # without this frame: no cycle
        return response

    async def handle_exception(self, socket: WebSocket, error: Exception) -> Any:
        """Close an accepted socket for its view's exception; return one from before."""
        # What is left of it besides that the client has gone: a TaskGroup in a view
        # wraps what its tasks raise into a group.
        rest: Any = ExceptionGroup("", [error]).split(WebSocketDisconnect)[1]
        while isinstance(rest, ExceptionGroup) and len(rest.exceptions) == 1:
            [rest] = rest.exceptions
        if rest is None or socket._state == "connecting":
            return rest
        code, reason = int(CloseCode.INTERNAL_ERROR), ""
        if isinstance(rest, InvalidMessage):  # the client's fault: nothing to log
            code, reason = rest.code, str(rest)
        else:
            denied = isinstance(rest, PermissionDenied)
            if conf.settings.DEBUG_PROPAGATE_EXCEPTIONS and not denied:
                raise rest
            traceback = error.__traceback__
            await self.report(socket.request, error, denied)
            error.__traceback__ = traceback  # without a frame of asgiref's: no cycle
            if conf.settings.DEBUG:
                reason = f"{type(rest).__name__}: {rest}"
            if denied:
                code = CloseCode.POLICY_VIOLATION
        # A frame takes 123 bytes (RFC 6455, section 5.5).
        reason = reason.encode("utf-8", "replace")[:123].decode("utf-8", "ignore")
        await socket.close(code, reason)
        return None

    @sync_to_async
    def report(self, request: asgi.ASGIRequest, error: Exception, denied: bool) -> None:
        """Log and signal an exception after accept() as Django does those of views."""
        if denied:
            message, status = "Forbidden (Permission denied): %s", 403
        else:
            message, status = "Internal Server Error: %s", 500
            # Receivers look at sys.exc_info(), which asgiref hands on to this thread.
            signals.got_request_exception.send(sender=None, request=request)
        response = http.HttpResponse(status=status)
        log_response(
            message, request.path, response=response, request=request, exception=error
        )

    async def refuse(self, socket: WebSocket, response: Any) -> None:
        """Answer a handshake by an HTTP response that is not 101.

        By ASGI's extension "WebSocket Denial Response"; a server without it makes
        a 403 of `websocket.close`.
        """
        events: list[dict[str, Any]] = []

        async def send(event: Event) -> None:
            events.append(dict(event))

        try:
            # Complete before it starts, and in one piece: uvicorn's older
            # implementation sends what it has when the event loop turns.
            await self.send_response(response, send)
            extension = "websocket.http.response"
            if extension in (socket.scope.get("extensions") or ()):
                start, *parts = events
                body = b"".join(part.get("body", b"") for part in parts)
                start["type"] = f"{extension}.start"
                events = [start, {"type": f"{extension}.body", "body": body}]
            else:
                events = [{"type": SendEvent.CLOSE}]
            with suppress(OSError, RuntimeError):  # the client has gone
                for event in events:
                    await socket._send(event)
            socket._refuse = None
        finally:
            await socket._lease.run(response.close)


def websockets(app: Application) -> Application:
    """Serve WebSockets by Django, and everything else by `app` (ASGI applications).

    Wrap what `get_asgi_application()` returned. Each handshake passes
    `settings.MIDDLEWARE`, of which this makes instances of its own.
    """
    _new_groups()  # what is wrong in WEBSOCKETS, now and not at the first join()
    return WebSocketHandler(app)


# Testing


class _Client(_End):
    """The client's end of a WebSocket, for tests; `connect` makes and describes it."""

    _message = "websocket.receive"

    def __init__(self, scope: Scope, timeout: float | None) -> None:
        self.scope = scope
        self.timeout = timeout
        self.subprotocol: str | None = None
        self._answer = http.HttpResponse()
        self.headers: abc.Mapping[str, str] = self._answer.headers
        self.cookies = self._answer.cookies
        self._state = "connecting"
        self._error: BaseException | None = None
        # A view that sends far more than is received waits, as for a slow client.
        self._received: asyncio.Queue[Event] = asyncio.Queue(10_000)
        self._sent: asyncio.Queue[Event] = asyncio.Queue()
        self._sent.put_nowait({"type": ReceiveEvent.CONNECT})

    def __repr__(self) -> str:
        return f"<the client's end of {self.scope['path']!r}>"

    async def _run(self, application: Application) -> None:
        """Be the server."""
        try:
            await application(self.scope, self._sent.get, self._take)
        except asyncio.CancelledError:
            raise
        except BaseException as error:  # pytest.fail() is no Exception
            self._error = error
        finally:  # where the application has not closed, the connection breaks
            await self._received.put({"type": SendEvent.CLOSE, "code": 1006})

    async def _take(self, event: Event) -> None:
        if self._state == "closed":
            raise OSError("the client has gone")  # as servers do (ASGI 2.4)
        await self._received.put(event)

    def _store_error(self, request: Any = None, **kwargs: Any) -> None:
        """Keep what a view raised, as the receiver of a signal of Django's."""
        if getattr(request, "scope", {}).get("django_ws") is self:
            self._error = sys.exc_info()[1]

    def _raise_error(self) -> None:
        error, self._error = self._error, None
        if error is not None:
            raise error

    async def receive(self, wanted: str = "a message") -> Event:
        """Return the next event of the view (a mapping): a message, or the end."""
        if self._state == "closed":
            self._raise_error()
            raise self._disconnect()
        try:
            async with asyncio.timeout(self.timeout):
                event = await self._received.get()
        except TimeoutError:
            path, seconds = self.scope["path"], self.timeout
            message = f"waited {seconds} s for {wanted} from the view of {path}"
            raise TimeoutError(message) from None
        if event["type"] == SendEvent.CLOSE:
            code = event.get("code") or CloseCode.NORMAL_CLOSURE
            self._closed(code, event.get("reason") or "")
            self._raise_error()
        return event

    def _closed(self, code: int, reason: str) -> None:
        self._state, self._end = "closed", (code, reason)
        gone = {"type": ReceiveEvent.DISCONNECT, "code": code, "reason": reason}
        self._sent.put_nowait(gone)
        while not self._received.empty():  # a view that waits to send waits no longer
            self._received.get_nowait()

    async def send(self, event: Event) -> None:
        """Send one event (a mapping) to the view: a message."""
        self._raise_error()
        if self._state == "closed":
            raise self._disconnect()
        self._sent.put_nowait(event)
        await asyncio.sleep(0)  # the view's turn

    async def close(
        self, code: int = CloseCode.NORMAL_CLOSURE, reason: str = ""
    ) -> None:
        """Close the connection, as `WebSocket.close` does."""
        event = _close_event(code, reason)
        if self._state != "closed":
            self._closed(event["code"], reason)

    async def _handshake(self) -> None:
        event = await self.receive("the answer to the handshake")
        answer = self._answer
        answer.status_code = event.get("status", 403)
        more = event["type"] == "websocket.http.response.start"
        while more:
            part = await self.receive("the rest of the answer to the handshake")
            answer.write(part.get("body", b""))
            more = part.get("more_body", False)
        del answer.headers["Content-Type"]
        for name, value in event.get("headers") or ():
            if name.lower() == b"set-cookie":
                answer.cookies.load(value.decode("latin-1"))
            else:
                answer.headers[name.decode("ascii")] = value.decode("latin-1")
        if "Location" in answer:
            setattr(answer, "url", answer["Location"])  # for assertRedirects()
        if event["type"] == SendEvent.ACCEPT:
            self._state = "open"
            self.subprotocol = event.get("subprotocol")


@asynccontextmanager
async def connect(
    application: Application,
    path: str,
    *,
    client: Any = None,
    headers: abc.Mapping[str, str] | None = None,
    subprotocols: abc.Iterable[str] = (),
    timeout: float | None = 1,
) -> abc.AsyncIterator[_Client]:
    """Open a WebSocket to an ASGI application in a test, without a server.

        async with connect(application, "/ws/", client=self.async_client) as socket:
            await socket.send_text("hi")
            assert await socket.receive_text() == "hi"

    `path` (str) may carry a query string, and with `wss://testserver` before it, the
    connection is encrypted. `client`, one of Django's test clients, lends its cookies
    (so `force_login()` works) and keeps those of the answer, lends its default headers
    and `raise_request_exception`. `headers` (a mapping of str) adds to them or
    overrides; None takes one away. Host is `testserver` and Origin the same site.
    `subprotocols` (of str) are offered.

    `socket` has the `send_…`, `receive_…`, `iter_…` and `close` of `WebSocket`, and
    of the answer `subprotocol` (str or None), `headers` (a mapping that ignores case)
    and `cookies` (SimpleCookie). It waits `timeout` seconds at most for each message
    (None: for ever), and so long for the view when the block has ended and the socket
    was closed with 1000. Cancelling the block closes it, too.

    Raises `WebSocketDenied` for a refusal, `TimeoutError`, and what the view raised,
    unless the client's `raise_request_exception` is off.
    """
    from django.test import AsyncClient

    client = client or AsyncClient()
    url = urlsplit(str(path))
    lines: dict[str, Any] = {
        "host": url.netloc or client.defaults.get("SERVER_NAME", "testserver"),
        "connection": "Upgrade",
        "upgrade": "websocket",
        "cookie": client.cookies.output([], "", ";").strip() or None,
    }
    for name, value in client.defaults.items():
        if name.startswith("HTTP_") or is_async(client.request):
            lines[name.removeprefix("HTTP_").replace("_", "-").lower()] = value
    lines |= {name.lower(): value for name, value in (headers or {}).items()}
    scheme = "https" if url.scheme in ("https", "wss") else "http"
    lines.setdefault("origin", f"{scheme}://{lines['host']}")
    scope: Scope = {
        "type": "websocket",
        "asgi": {"version": "3.0", "spec_version": "2.5"},
        "scheme": scheme.replace("http", "ws"),
        "path": unquote(url.path),
        "query_string": url.query.encode(),
        "headers": [
            (name.encode("ascii"), str(value).encode("latin-1"))
            for name, value in lines.items()
            if value is not None
        ],
        "client": ("127.0.0.1", 0),
        "server": ("testserver", 443 if scheme == "https" else 80),
        "subprotocols": list(subprotocols),
        "extensions": {"websocket.http.response": {}},
    }
    socket = scope["django_ws"] = _Client(scope, timeout)
    if client.raise_request_exception:
        signals.got_request_exception.connect(socket._store_error)
    # In the test's own context: its transaction is seen.
    task = asyncio.create_task(socket._run(application))
    try:
        try:
            await socket._handshake()
            accepted = socket.connected
            if accepted:
                yield socket
        finally:
            await socket.close()
            # A view that waits for something else is cancelled after a while.
            seconds = None if timeout is None else timeout + WebSocket.WATCH
            await asyncio.wait([task], timeout=seconds)
    except WebSocketDisconnect:
        socket._raise_error()  # what it ended for
        raise
    finally:
        signals.got_request_exception.disconnect(socket._store_error)
        if not task.done():
            where = " > ".join(one.f_code.co_name for one in _frames(task.get_coro()))
            hanging = TimeoutError(f"the view has not ended, it stands in {where}")
            socket._error = socket._error or hanging
            task.cancel()
            await asyncio.wait([task], timeout=1)
    client.cookies.update(socket.cookies)
    socket._raise_error()
    if not accepted:
        raise WebSocketDenied(socket._answer)
