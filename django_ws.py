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
        await socket.accept()
        await socket.join(f"chat-{room}")
        async for text in socket.iter_text():
            await broadcast(f"chat-{room}", {"who": socket.user.username, "text": text})

The handshake is a Django request: it passes your MIDDLEWARE, is resolved by your
URLconf, is checked against ALLOWED_HOSTS and CSRF_TRUSTED_ORIGINS, and is refused with
your error pages. Serve it with an ASGI server that speaks WebSocket, for example
`pip install 'uvicorn[standard]'` and `uvicorn project.asgi:application`.
"""

import asyncio
import base64
import contextvars
import copy
import enum
import functools
import inspect
import io
import itertools
import json
import logging
import math
import os
import random
import re
import sys
import threading
import time
import weakref
from collections import abc, deque
from concurrent import futures
from contextlib import asynccontextmanager, closing, nullcontext, suppress
from typing import Any, ClassVar, Literal, NamedTuple, NoReturn
from urllib.parse import unquote, urlsplit

from asgiref.sync import AsyncToSync, SyncToAsync, ThreadSensitiveContext, async_to_sync
from asgiref.sync import iscoroutinefunction as is_async
from asgiref.sync import sync_to_async
from django import conf, http, urls
from django.core import signals
from django.core.exceptions import ImproperlyConfigured, PermissionDenied
from django.core.handlers import asgi, base, exception
from django.core.serializers.json import DjangoJSONEncoder
from django.db import DatabaseError, close_old_connections, connections
from django.db.utils import load_backend
from django.http.response import HttpResponseBase, ResponseHeaders
from django.middleware.csrf import REASON_BAD_ORIGIN, CsrfViewMiddleware
from django.utils.cache import patch_vary_headers
from django.utils.log import log_response

__version__ = "2.0"
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
Handler = abc.Callable[[Any], abc.Awaitable[Any]]
Headers = abc.Mapping[Any, str | bytes] | abc.Iterable[tuple[str | bytes, str | bytes]]


# Events and close codes


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

    CONNECT comes first: a client asks for a handshake. RECEIVE is one message from the
    client, text or bytes. DISCONNECT comes last: the connection has ended.
    """

    CONNECT = "websocket.connect"
    RECEIVE = "websocket.receive"
    DISCONNECT = "websocket.disconnect"


class CloseCode(enum.IntEnum):
    """Why a connection ended (RFC 6455, section 7.4, and IANA's registry).

    Codes from 4000 to 4999 are yours to define. Those marked "never sent" are only
    reported, and `WebSocket.close` refuses them.
    """

    NORMAL_CLOSURE = 1000  # the connection has served its purpose
    GOING_AWAY = 1001  # the user left the page, or the server is shutting down
    PROTOCOL_ERROR = 1002  # a frame violated RFC 6455
    UNSUPPORTED_DATA = 1003  # text where bytes were expected, or the reverse
    NO_STATUS_RECEIVED = 1005  # never sent: the close frame had no code
    ABNORMAL_CLOSURE = 1006  # never sent: the connection broke without a close frame
    INVALID_FRAME_PAYLOAD_DATA = 1007  # text that is not UTF-8, or not JSON
    POLICY_VIOLATION = 1008  # not allowed: what PermissionDenied becomes
    MESSAGE_TOO_BIG = 1009  # larger than the receiver accepts
    MANDATORY_EXTENSION = 1010  # the client needs an extension that was not agreed
    INTERNAL_ERROR = 1011  # the server failed: what an exception in a view becomes
    SERVICE_RESTART = 1012  # the server restarts: reconnect after a random 5 to 30 s
    TRY_AGAIN_LATER = 1013  # overloaded: try again later, or send less
    BAD_GATEWAY = 1014  # a gateway got an invalid response from its upstream
    TLS_HANDSHAKE = 1015  # never sent: the TLS handshake failed
    UNAUTHORIZED = 3000  # like HTTP 401
    FORBIDDEN = 3003  # like HTTP 403
    TIMEOUT = 3008  # like HTTP 408


# What can go wrong


def _close_event(code: int, reason: str = "") -> dict[str, Any]:
    """Return the event for a close frame (RFC 6455, sections 5.5.1 and 7.4)."""
    if not (1000 <= code <= 1003 or 1007 <= code <= 1014 or 3000 <= code <= 4999):
        raise ValueError(f"{code!r} is not a valid close code")
    if not isinstance(reason, str):
        raise TypeError(f"a close reason must be str, not {type(reason).__name__}")
    if len(reason.encode()) > 123:
        raise ValueError("a close reason must not exceed 123 bytes of UTF-8")
    return {"type": SendEvent.CLOSE, "code": int(code), "reason": reason}


class WebSocketDisconnect(Exception):
    """The connection has ended. Raise it in a view to close with its code and reason.

    `code` is the close code (int) and `reason` its text (str, often empty), from
    whichever side closed; 1005 if the close frame had no code, 1006 if the connection
    broke without one (RFC 6455, section 7.1.5) or if sending failed and `receive` has
    not told why yet. A view need not catch it: that is a normal end.
    """

    def __init__(self, code: int = CloseCode.NORMAL_CLOSURE, reason: str = "") -> None:
        super().__init__(code, reason)
        self.code = code
        self.reason = reason

    def __str__(self) -> str:
        return f"the WebSocket has ended: {self.code} {self.reason}".rstrip()


class InvalidMessage(Exception):
    """The client sent something that the view did not ask for.

    The socket stays usable. If a view leaves the exception uncaught, the connection is
    closed with `code` (int): 1003 for bytes instead of text or the reverse, 1007 for
    invalid JSON, 1009 for a message that is too large (RFC 6455, section 7.4.1).
    """

    def __init__(self, code: int, message: str) -> None:
        super().__init__(code, message)
        self.code: int = _close_event(code)["code"]

    def __str__(self) -> str:
        return str(self.args[1])


class WebSocketDenied(Exception):
    """The server refused the handshake; `connect` raises it.

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
        raise ValueError(f"{text} is not a number that JSON can represent")
    return number


# JSON has no NaN and no Infinity (RFC 8259, section 6), though Python's parser accepts
# them; browsers do not.
_decode_json = json.JSONDecoder(parse_float=_finite, parse_constant=_finite).decode
_encode_json = DjangoJSONEncoder(
    separators=(",", ":"), ensure_ascii=False, allow_nan=False
).encode


def _escape_surrogates(text: str) -> str:
    """Return text that UTF-8 can encode, with lone surrogates escaped as in JSON.

    A client can send one: the JSON string "\\ud800". Python's backslashreplace writes
    it as JSON does.
    """
    if text.isascii():
        return text
    return text.encode("utf-8", "backslashreplace").decode()


def _byte_length(message: str | bytes) -> int:
    if isinstance(message, str) and not message.isascii():
        message = message.encode("utf-8", "replace")
    return len(message)


class _Endpoint:
    """Either end of a WebSocket: message methods on top of `receive` and `send`."""

    # "closing": nothing more can be sent, because a refusal is under way, or because a
    # send has failed and `receive` has not told why yet.
    _state: Literal["connecting", "open", "closing", "closed"]
    # What each end adds: the primitives, the type of the events that carry its
    # messages, and whether the size of JSON is limited.
    receive: Receive
    send: Send
    _raise_disconnect: abc.Callable[[], abc.Awaitable[NoReturn]]
    _message: str
    _limits_json: bool

    @property
    def connected(self) -> bool:
        """Whether messages can be exchanged: from `accept()` to either side's end."""
        return self._state == "open"

    async def _raise_misuse(self, message: str) -> NoReturn:
        await asyncio.sleep(0)  # a view that catches everything must not block
        raise RuntimeError(message)

    async def _raise_unexpected(self, expected: str) -> NoReturn:
        """Raise because `receive` did not return the event that was expected."""
        if self._state == "closed":
            await self._raise_disconnect()
        raise InvalidMessage(CloseCode.UNSUPPORTED_DATA, f"expected {expected}")

    async def receive_text(self) -> str:
        """Return the next message, which must be text (str). Cancelling it is safe.

        Raises `WebSocketDisconnect` when the connection has ended; `InvalidMessage`
        (1003) when the message is binary; `RuntimeError` before `accept()` and while
        another task receives. Source: RFC 6455, section 5.6.
        """
        if self._state == "connecting":
            await self._raise_misuse("call accept() before receive_text()")
        text: str | None = (await self.receive()).get("text")
        if text is None:
            await self._raise_unexpected("text, got bytes")
        return text

    async def receive_bytes(self) -> bytes:
        """Return the next message, which must be binary (bytes). Cancelling it is safe.

        Raises what `receive_text()` raises, with text and bytes exchanged.
        Source: RFC 6455, section 5.6.
        """
        if self._state == "connecting":
            await self._raise_misuse("call accept() before receive_bytes()")
        data: bytes | None = (await self.receive()).get("bytes")
        if data is None:
            await self._raise_unexpected("bytes, got text")
        return data

    async def _receive_any(self) -> str | bytes:
        if self._state == "connecting":
            await self._raise_misuse("call accept() before receiving messages")
        event = await self.receive()
        message: str | bytes | None = event.get("text")
        if message is None:
            message = event.get("bytes")
        if message is None:
            await self._raise_unexpected("a message")
        return message

    async def receive_json(self) -> Any:
        """Return the next message's value: JSON, in text or in bytes of UTF-8.

        Cancelling it is safe. Raises what `receive_text()` raises, but `InvalidMessage`
        when the message is longer than Django's setting DATA_UPLOAD_MAX_MEMORY_SIZE
        (1009), and when it is not JSON, is nested too deeply for Python or has a number
        out of range (1007). Source: RFC 8259.
        """
        message = await self._receive_any()
        limit = conf.settings.DATA_UPLOAD_MAX_MEMORY_SIZE
        if self._limits_json and limit is not None and _byte_length(message) > limit:
            too_big = f"JSON must not exceed {limit} bytes"
            raise InvalidMessage(CloseCode.MESSAGE_TOO_BIG, too_big)
        try:
            text = message if isinstance(message, str) else message.decode()
            return _decode_json(text)
        except (ValueError, RecursionError) as error:
            code = CloseCode.INVALID_FRAME_PAYLOAD_DATA
            raise InvalidMessage(code, "expected JSON") from error

    async def _iter(self, receive: Any) -> abc.AsyncIterator[Any]:
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

        Lone surrogates, which UTF-8 cannot encode, are sent as JSON escapes them.

        Raises `TypeError` for anything but str and `RuntimeError` before `accept()`,
        with nothing sent; `WebSocketDisconnect` when the connection has ended.
        Source: RFC 6455, section 5.6.
        """
        if not isinstance(text, str):
            raise TypeError(f"send_text() takes str, not {type(text).__name__}")
        await self.send({"type": self._message, "text": _escape_surrogates(text)})

    async def send_bytes(self, data: bytes | bytearray | memoryview) -> None:
        """Send `data` (bytes-like) as one binary message. Cancelling it is safe.

        Raises what `send_text()` raises, `TypeError` for anything not bytes-like.
        Source: RFC 6455, section 5.6.
        """
        if not isinstance(data, bytes):
            data = bytes(memoryview(data))  # bytes(5) would be five zeros
        await self.send({"type": self._message, "bytes": data})

    async def send_json(self, data: Any, *, binary: bool = False) -> None:
        """Send `data` as JSON, in one text message or, with `binary`, in a binary one.

        Dates, times, UUIDs, decimals and lazy strings are written as Django's
        `DjangoJSONEncoder` does, without spaces, non-ASCII characters as themselves.

        Cancelling it is safe. Raises what `send_text()` raises, `TypeError` for data
        that JSON cannot represent and `ValueError` for NaN, infinity and circular data.
        Source: RFC 8259.
        """
        text = _escape_surrogates(_encode_json(data))
        if binary:
            await self.send_bytes(text.encode())
        else:
            await self.send_text(text)


for _method in vars(_Endpoint).values():
    if is_async(_method):  # a forgotten `await` is reported by this name
        _method.__qualname__ = f"WebSocket.{_method.__name__}"
del _method


class _View:
    """The task that runs a view, and how it ends once the connection has ended.

    If no task of the view has been told of the end, the view is cancelled, as Django
    cancels its asynchronous HTTP views. Otherwise it has `grace` seconds to clean up.
    """

    __slots__ = (
        *("grace", "task", "told", "asker", "knows", "timer", "context"),
        *("handling", "error"),
    )

    def __init__(self, grace: float) -> None:
        self.grace = grace
        self.task: asyncio.Future[Any] | None = None  # None before and after it runs
        self.told = 0  # how often in a row a task of the view was told of the end
        self.asker = 0  # the identity of that task
        self.knows = False  # whether a task was told that runs no handlers
        self.timer: asyncio.TimerHandle | None = None  # for the next cancellation
        # The view's; group messages are sent in it, not in the broadcaster's.
        self.context: contextvars.Context | None = None
        self.handling: asyncio.Task[None] | None = None  # runs the handlers of groups
        self.error: BaseException | None = None  # what one of them raised

    def tell(self) -> None:
        """Count that a task was told of the end; cancel a view that keeps asking."""
        task = asyncio.current_task()
        self.knows = self.knows or task is not self.handling
        asker = id(task)
        self.told = self.told + 1 if asker == self.asker else 1
        self.asker = asker
        if self.told > 10 and self.task is not None:
            self.task.cancel()

    def end(self, will_be_told: bool) -> None:
        """Cancel the view, now or later, because the connection has ended."""
        if self.task is not None:
            if not (self.knows or will_be_told):
                self.cancel()
            elif self.timer is None:
                self.cancel_later()

    def cancel(self) -> None:
        """Cancel the view, and again every `grace` seconds until it has ended.

        Python 3.11's `asyncio.wait_for` can lose a cancellation (python/cpython#86296).
        """
        assert self.task is not None
        self.task.cancel()
        self.cancel_later()

    def cancel_later(self) -> None:
        self.stop()
        self.timer = asyncio.get_running_loop().call_later(self.grace, self.cancel)

    def stop(self) -> None:
        if self.timer is not None:
            self.timer.cancel()
            self.timer = None  # its context may refer to the socket


def _size_of(event: Event) -> int:
    """Return what an event counts towards a limit: bytes, as on the wire.

    Every message counts the largest header of a frame, too (RFC 6455, section 5.2).
    """
    return _byte_length(event.get("text") or event.get("bytes") or "") + 14


class _ReadAhead:
    """Events that were read from the server before the view asked for them.

    Reading is the only way to learn from the server that the client has left.
    """

    CONNECT: Event = {"type": ReceiveEvent.CONNECT}  # a view may receive it, too
    LIMIT = 65536  # bytes; after that the server makes the client wait
    STALE = 60.0  # seconds for which LIMIT bytes may stay unread

    def __init__(self, view_receives: bool) -> None:
        self.events: list[Event] = [] if view_receives else [self.CONNECT]
        self.view_receives = view_receives  # whether it has ever asked for a message
        self.task: asyncio.Task[None] | None = None  # reads


class _Outbox:
    """Events that are sent without making anybody wait: group messages and closes.

    They stay here only while the server cannot take more: the client reads slowly.
    """

    # An eager task sends before put() returns, unless the server has to wait.
    EAGER: Any = {"eager_start": True} if sys.version_info >= (3, 12) else {}

    def __init__(self) -> None:
        self.events: deque[Event] = deque()
        self.size = 0  # of the events, in bytes
        self.task: asyncio.Task[Any] | None = None  # sends
        self.blocked = False  # whether a send is waiting for the server

    def put(self, socket: "WebSocket", event: Event) -> None:
        """Send an event now or later, without waiting."""
        self.events.append(event)
        self.size += _size_of(event)
        if self.task is None:
            loop = asyncio.get_running_loop()
            about: Any = {"loop": loop, "context": socket._view.context, **self.EAGER}
            task = asyncio.Task(self.send(socket), **about)
            if not task.done():
                self.task = task

    def cancel(self) -> None:
        self.events.clear()
        if self.task is not None:
            self.task.cancel()
            self.task = None  # no cycle, if it has not begun

    async def send(self, socket: "WebSocket") -> None:
        """Send all events, as fast as the client reads."""
        self.task = asyncio.current_task()
        try:
            while self.events:
                event = self.events.popleft()
                self.size -= _size_of(event)
                self.blocked = True
                try:
                    await socket._send(event)
                except Exception as error:
                    code = event.get("code", 0)
                    if type(error) is not Exception or not 1000 < code < 3000:
                        raise
                    # daphne can send no standard code but 1000: 1011 becomes 4011.
                    await socket._send({**event, "code": code + 3000})
                self.blocked = False
        except (Exception, asyncio.CancelledError) as error:
            self.events.clear()
            socket._note_failed_send()
            expected = OSError, RuntimeError, asyncio.CancelledError
            if not isinstance(error, expected):  # as in WebSocket.send()
                _logger.exception("The server's send() failed")
        finally:
            self.task = None


# A header's name and value (RFC 9110, sections 5.1 and 5.5).
_TOKEN = re.compile(r"[!#$%&'*+.^_`|~0-9A-Za-z-]+")
_VALUE = re.compile(r"[\t -~\x80-\xff]*")
# Headers that the server itself writes on the answer to a handshake: ASGI reserves
# Sec-WebSocket-Protocol ("Accept - send event"), RFC 6455 (section 4.2.2) the others,
# and an answer with the status 101 has no body.
_RESERVED = re.compile(
    r"connection|upgrade|content-length|transfer-encoding|sec-websocket-.*", re.I
)


class WebSocket(_Endpoint):
    """The server's end of one WebSocket, handed to a view as its first argument.

    Any other attribute is looked up on `request`, the HttpRequest of the handshake as
    the middleware left it: `socket.user`, `await socket.auser()`,
    `socket.session`, `socket.path`, `socket.headers`, `socket.COOKIES`, `socket.GET`,
    `socket.resolver_match`, `socket.build_absolute_uri()`. `scope` is the ASGI
    connection scope as the server made it.

    One task at a time may receive; any number may send. Sending waits while the client
    reads too slowly. Cancelling either, for example by `asyncio.timeout()`, is safe: no
    message is lost (except on granian, whose own `receive` loses some), and a message
    was sent completely or not at all.
    """

    #: Seconds without `receive…` after which the socket checks whether its client left.
    WATCH = 1.0
    #: Seconds that a view has to clean up after it was told of the end.
    GRACE = 10.0
    #: Seconds that a slow client has to read what was sent to it before a close.
    FLUSH = 5.0

    _message = "websocket.send"
    _limits_json = True

    def __init__(
        self,
        scope: Scope,
        request: asgi.ASGIRequest,
        receive: Receive,
        send: Send,
        headers: list[tuple[bytes, bytes]],
        refuse: abc.Callable[["WebSocket", Any], abc.Awaitable[None]],
    ) -> None:
        self.scope = scope  # the ASGI connection scope
        self.request = request  # Django's, as the middleware left it
        self._receive = receive  # the server's
        self._send = send  # the server's
        self._headers = headers  # from the middleware, for the answer to the handshake
        self._refuse: Any = refuse  # sends a refusal; None once there is an answer
        self._state = "connecting"  # as _Endpoint lists them
        # The code and the reason with which the connection ended.
        self._end: tuple[int, str] = (CloseCode.ABNORMAL_CLOSURE, "")
        self._receiver: Any = None  # the task in receive()
        # Events read ahead; None while messages go straight to the view.
        self._ahead: _ReadAhead | None = _ReadAhead(view_receives=False)
        # Starts reading ahead, or closes a socket that leaves too much unread.
        self._timer: asyncio.TimerHandle | None = None
        self._view = _View(self.GRACE)  # the task of the view
        self._sends = 0  # how many messages the view has sent
        self._membership: Any = None  # its groups; None until the first join()
        self._outbox: _Outbox | None = None  # None until something was put there

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
        return list(self.scope.get("subprotocols", ()))

    async def receive(self) -> Event:
        """Return the next ASGI event (a mapping), as the server gave it.

        First `websocket.connect`, unless `accept()` was called before; then
        `websocket.receive` for each message; finally one `websocket.disconnect`.

        Cancelling it is safe on servers whose own `receive` is: no event is lost.

        Raises `WebSocketDisconnect` after the end, `RuntimeError` while another task
        receives and for an event that ASGI does not know. Source: ASGI, "WebSocket".
        """
        if self._receiver is not None:
            await self._raise_misuse("another task is receiving from this WebSocket")
        self._receiver = asyncio.current_task()
        try:
            event = None if self._ahead is None else await self._get_ahead(self._ahead)
            if event is None:
                event = await self._receive()
        except asyncio.CancelledError:
            # Did _finish() wake this task, and nobody else cancel it?
            if self._state != "closed" or self._receiver.uncancel():
                raise
            code, reason = self._end
            event = {"type": ReceiveEvent.DISCONNECT, "code": code, "reason": reason}
        finally:
            self._receiver = None
            if self._timer is None:
                self._set_timer(self.WATCH, self._start_reading_ahead)
        if event["type"] != "websocket.receive":
            self._note_other(event)
        return event

    def _note_other(self, event: Event) -> None:
        """Note an event that is no message."""
        if event["type"] == "websocket.disconnect":
            self._view.tell()
            self._note_disconnect(event)
        elif event["type"] != "websocket.connect":
            raise RuntimeError(f"{event['type']!r} is not an event of a WebSocket")

    async def _get_ahead(self, ahead: _ReadAhead) -> Event | None:
        """Return the next event that was read ahead, or None if the server has it."""
        if not ahead.events and self._state == "closed":
            await self._raise_disconnect()
        if not ahead.events and ahead.task is not None:
            await asyncio.wait([ahead.task])
        if self._state != "connecting":
            ahead.view_receives = True
        self._cancel_timer()  # it may be that of _close_unread()
        if ahead.events:
            return ahead.events.pop(0)
        if ahead.view_receives:
            self._ahead = None
        return None

    def _set_timer(self, seconds: float, callback: abc.Callable[[], None]) -> None:
        self._cancel_timer()
        if self._view.task is not None:
            loop = asyncio.get_running_loop()
            self._timer = loop.call_later(seconds, callback)

    def _cancel_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _start_reading_ahead(self) -> None:
        self._timer = None
        if self._receiver is None and self._state != "closed":
            ahead = self._ahead = self._ahead or _ReadAhead(view_receives=True)
            if ahead.task is None or ahead.task.done():
                ahead.task = asyncio.create_task(self._read_ahead(ahead))

    async def _read_ahead(self, ahead: _ReadAhead) -> None:
        """Read events from the server until the view asks for one."""
        size = sum(map(_size_of, ahead.events))
        while size < ahead.LIMIT:
            try:
                event = await self._receive()
            except Exception:
                _logger.exception("The server's receive() failed")
                event = {"type": ReceiveEvent.DISCONNECT, "code": 1006}
            ahead.events.append(event)
            size += _size_of(event)
            if event["type"] == "websocket.disconnect":
                return self._note_disconnect(event)
            if self._receiver is not None:
                return
        # A busy view may rely on the server's back-pressure for a while, but not for
        # ever: nobody would learn that the client has left.
        self._set_timer(ahead.STALE if ahead.view_receives else 0, self._close_unread)

    def _close_unread(self) -> None:
        _logger.warning(
            "%r: closed with 1008, since the view leaves more than %s bytes of its "
            "client's messages unread. Let it receive them.",
            self.request.path,
            _ReadAhead.LIMIT,
        )
        self._deliver(_close_event(1008, "messages are not received"))

    def _note_disconnect(self, event: Event) -> None:
        """Note the end that the server reports; what came before it can be received."""
        if self._outbox is not None and self._state != "closed":
            self._outbox.cancel()
        code = event.get("code") or CloseCode.NO_STATUS_RECEIVED
        self._finish(code, event.get("reason") or "", keep_unread=True)

    def _note_failed_send(self) -> None:
        """Note that sending has failed; `receive`, or reading ahead, will tell why."""
        if self._state == "open":
            self._state = "closing"
            self._view.end(will_be_told=True)

    def _finish(self, code: int, reason: str, keep_unread: bool = False) -> None:
        """Note the end, once; wake the task that receives; let the view end."""
        if self._state == "closed":
            return
        self._state, self._end = "closed", (int(code), reason)
        # While there is a _ReadAhead, `receive` asks it before it asks the server.
        ahead = self._ahead = self._ahead or _ReadAhead(view_receives=True)
        if not keep_unread:
            ahead.events.clear()
            if self._receiver is not None:
                self._receiver.cancel()  # as asyncio.timeout() does
        # A view that receives gets the messages before the disconnect event first.
        unread = ahead.view_receives and len(ahead.events) > 1
        self._view.end(will_be_told=unread or self._receiver is not None)

    async def _raise_disconnect(self) -> NoReturn:
        self._view.tell()
        if self._view.told > 10:
            await asyncio.sleep(0)  # a view that catches everything must not block
        raise WebSocketDisconnect(*self._end)

    async def send(self, event: Event) -> None:
        """Send one ASGI event (a mapping) to the server.

        `websocket.accept` or `websocket.close` before the handshake's end,
        `websocket.send` or `websocket.close` after it. It waits while the client reads
        more slowly than the view sends (the server's back-pressure). The event may then
        arrive before earlier messages of the socket's groups.

        Cancelling it is safe: the event was sent completely or not at all.

        Raises `RuntimeError` for an event that is not allowed now, with nothing sent;
        `WebSocketDisconnect` after the end, with the code 1006 if sending failed and
        the real code is not known yet: `receive` tells it. Source: ASGI, "WebSocket".
        """
        if self._state != "open" or event["type"] != "websocket.send":
            return await self._send_other(event)
        try:
            await self._send(event)
        except (OSError, RuntimeError) as error:
            # OSError is what a server raises when the client has gone (ASGI 2.4), and
            # RuntimeError what some raise after they closed by themselves (no answer
            # to a ping, a message too big).
            self._view.tell()
            self._note_failed_send()
            raise WebSocketDisconnect(*self._end) from error
        self._sends += 1
        if not self._sends & 31:
            # The server's send may never yield: a view that only sends must not block.
            await asyncio.sleep(0)

    async def _send_other(self, event: Event) -> None:
        """Send what is not a message on an open connection."""
        kind = event["type"]
        if self._state in ("closing", "closed"):
            await self._raise_disconnect()
        elif kind == "websocket.close":
            await self.close(event.get("code") or 1000, event.get("reason") or "")
        elif self._state == "connecting" and kind == "websocket.accept":
            await self._send_accept(event)
        elif self._state == "connecting":
            await self._raise_misuse(f"call accept() before sending {kind!r}")
        elif kind == "websocket.accept":
            await self._raise_misuse("accept() was called before")
        else:
            await self._raise_misuse(f"{kind!r} is not an event that can be sent")

    async def _send_accept(self, event: Event) -> None:
        self._state = "open"  # now no other task can answer the handshake
        refuse, self._refuse = self._refuse, None
        try:
            await self._send(event)
        except (OSError, RuntimeError) as error:
            self._view.tell()
            self._finish(CloseCode.ABNORMAL_CLOSURE, "")
            raise WebSocketDisconnect(*self._end) from error
        except BaseException:
            if self._state == "open":  # no answer to the handshake was sent
                self._state, self._refuse = "connecting", refuse
            raise
        self._headers = []
        if self._ahead is not None and self._ahead.events[:1] == [_ReadAhead.CONNECT]:
            del self._ahead.events[0]

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
            wrong = f"the client did not offer the subprotocol {subprotocol!r}"
            raise ValueError(f"{wrong}, but {self.subprotocols}")
        lines = list(self._headers)
        pairs: Any = headers.items() if isinstance(headers, abc.Mapping) else headers
        for pair in pairs:
            # Django's own rules for a header: no line breaks, ASCII, latin-1.
            [(name, value)] = ResponseHeaders(dict([pair])).items()
            value = value.strip(" \t")
            valid = _TOKEN.fullmatch(name) and _VALUE.fullmatch(value)
            if not valid or _RESERVED.fullmatch(name):
                raise ValueError(f"accept() cannot send the header {name!r}")
            lines.append((name.lower().encode("ascii"), value.encode("latin-1")))
        accept = {"type": SendEvent.ACCEPT, "subprotocol": subprotocol}
        await self.send({**accept, "headers": lines})

    async def close(
        self, code: int = CloseCode.NORMAL_CLOSURE, reason: str = ""
    ) -> None:
        """End the connection.

        Before `accept()` it refuses the handshake, with Django's page for HTTP 403;
        after it, it sends `code` (int) and `reason` (str, up to 123 bytes of UTF-8),
        and waits `FLUSH` seconds at most for a client that reads slowly. Once the
        connection has ended, it does nothing.

        Cancelling it is safe: a close is sent anyway, a refusal can be repeated.

        Raises `ValueError` for a code that must not be sent (RFC 6455, section 7.4: it
        takes 1000 to 1003, 1007 to 1014 and 3000 to 4999) and for a longer reason, with
        nothing sent. Source: RFC 6455, sections 5.5.1 and 7; ASGI, "Close".
        """
        event = _close_event(code, reason)
        if self._refuse is not None and self._state != "closed":
            return await self._refuse_for(None, code, reason)
        if self._state == "open":
            self._view.tell()
            self._deliver(event)
        await asyncio.sleep(0)
        await self._flush()

    async def _refuse_for(
        self, result: Any, code: int = CloseCode.NORMAL_CLOSURE, reason: str = ""
    ) -> None:
        """Refuse the handshake for what the view returned or raised."""
        self._state = "closing"
        self._view.tell()
        await self._refuse(self, result)
        self._finish(code, reason)

    def _deliver(self, event: Event, limit: int = 0) -> None:
        """Send an event of a group, or a close; this never waits.

        A client for which more than `limit` bytes wait is closed with 1013.
        """
        if self._state != "open":
            return
        outbox = self._outbox = self._outbox or _Outbox()
        outbox.put(self, event)
        if event["type"] == "websocket.close":
            self._finish(event["code"], event["reason"])
        elif outbox.blocked and outbox.size > limit:
            outbox.events.clear()
            self._deliver(_close_event(CloseCode.TRY_AGAIN_LATER, "reads too slowly"))

    async def _flush(self) -> None:
        """Wait until everything has gone out, for FLUSH seconds at most."""
        if self._outbox is not None and self._outbox.task is not None:
            await asyncio.wait([self._outbox.task], timeout=self.FLUSH)
            self._outbox.cancel()  # the client does not read

    def _fail(self, error: BaseException) -> None:
        """End the view as if it had raised what a handler of a group raised."""
        if self._state == "open" and self._view.task is not None:
            self._view.error = error
            self._view.cancel()
        elif not isinstance(error, WebSocketDisconnect):
            self._view.error = error  # the view ends anyway; this is reported

    async def _run(self, view: abc.Awaitable[Any]) -> tuple[Any, bool]:
        """Run the view; return its result, and whether the server cancelled it."""
        self._view.context = contextvars.copy_context()
        loop = asyncio.get_running_loop()
        if inspect.iscoroutine(view):  # never eager: it would run before the next line
            task: asyncio.Future[Any] = asyncio.Task(view, loop=loop)
        else:
            task = asyncio.ensure_future(view)
        self._view.task = task
        self._set_timer(self.WATCH, self._start_reading_ahead)
        ended, cancelled = loop.create_future(), False

        def wake(task: asyncio.Future[Any]) -> None:
            if not ended.done():
                ended.set_result(None)

        task.add_done_callback(wake)  # asyncio.wait() would need 1 KiB for each socket
        while not task.done():
            try:
                await ended
            except asyncio.CancelledError:  # by the server, never by the view
                ended, cancelled = loop.create_future(), True
                self._view.cancel()
        # Leave nothing behind: no timer, no task, no cycle.
        self._view.stop()
        self._view.task = None
        if self._membership is not None:
            cancelled = await self._membership.end(self) or cancelled
            self._membership = None  # its context may refer to the socket
        error, self._view.error = self._view.error, None
        self._cancel_timer()
        if self._ahead is not None and self._ahead.task is not None:
            self._ahead.task.cancel()
            self._ahead.task = None
        unexpected = not cancelled and self._state in ("connecting", "open")
        return _get_result(task, error, unexpected), cancelled

    def _abandon(self) -> None:
        """Note that the server has gone, unless the connection had ended before."""
        self._finish(CloseCode.ABNORMAL_CLOSURE, "")
        if self._outbox is not None:
            self._outbox.cancel()

    async def join(self, group: str, handler: Handler | None = None) -> None:
        """Put the socket into a group (str) until it leaves or ends.

        Messages sent to the group once `join()` has returned go to the client or, with
        a `handler` (an async callable), to that: `await handler(message)` gets str,
        bytes or, for JSON, the data. Handlers run beside the view, one message at a
        time, in order, in the context of the socket's last `join()`. What a handler
        raises ends the view as if the view had raised it. If more bytes than
        WEBSOCKETS["OUTBOX"] wait for handlers, the socket is closed with 1013.

        Joining again only changes the handler. With Redis or PostgreSQL, `join()` waits
        until the service has confirmed it, however long the service is away; messages
        sent meanwhile are lost. Cancelling it is safe; `leave()` undoes it.

        Raises `RuntimeError` before `accept()`, `WebSocketDisconnect` after the end,
        `TypeError` for a name that is not str or a handler that is not asynchronous.
        """
        if handler is not None and not _is_async(handler):
            raise TypeError(f"write 'async def' for the group's handler {handler!r}")
        if self._state == "connecting":
            await self._raise_misuse("call accept() before join()")
        if self._state != "open" or self._view.task is None:  # a task outlived the view
            await self._raise_disconnect()
        groups = _get_groups(group)
        membership = self._membership = self._membership or _Membership()
        membership.context = contextvars.copy_context()
        membership.groups[group] = groups, handler
        await groups.join(group, self)
        await asyncio.sleep(0)  # a view that joins in a loop must not block

    async def leave(self, group: str) -> None:
        """Take the socket out of a group (str), if it is in it.

        Messages that wait for the group's handler are dropped; a call under way is not
        interrupted. Cancelling it is safe. It raises nothing, not even after the end.
        """
        if self._membership is not None:
            self._membership.leave(group, self)
        await asyncio.sleep(0)


# URLs


class _SwitchingProtocols(http.HttpResponse):
    """What the middleware sees of an accepted handshake; it is never sent."""

    status_code = 101

    def __init__(self, view: abc.Callable[[WebSocket], Any], request: Any) -> None:
        # Not HTML: middleware that injects content into pages leaves it alone.
        super().__init__(content_type="application/octet-stream")
        self.view = view
        self.request = request
        self.context = contextvars.copy_context()  # of the middleware around the view


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
        why = (
            "the server, or a proxy in front of it, lacks WebSocket support. Install "
            "uvicorn[standard] or use another ASGI server that speaks WebSocket, wrap "
            "the ASGI application in websockets(), and let proxies pass the headers "
            "Upgrade and Connection."
        )
        if request.META.get("SERVER_SOFTWARE", "").startswith("WSGIServer"):
            why = (
                "Django's runserver speaks no WebSocket. Run `uvicorn "
                "project.asgi:application --reload` in its place, or install daphne, "
                "put 'daphne' first in INSTALLED_APPS and set ASGI_APPLICATION."
            )
        text = "The WebSocket handshake for %s arrived as plain HTTP: %s"
        log_response(text, request.path, why, response=response, request=request)
    return response


def _refuse_origin(request: http.HttpRequest) -> Any:
    """Return a refusal if a page of another site asks, else None.

    A browser lets any page open a WebSocket to any site and sends that site's cookies
    along; only the Origin header tells (RFC 6455, section 10.2). Clients that are not
    browsers send none, and attach no cookies on their own.
    """
    origin = request.META.get("HTTP_ORIGIN")
    # Private, but nothing public compares an origin without a CSRF token.
    csrf: Any = CsrfViewMiddleware(lambda request: http.HttpResponse())
    if origin is None or csrf._origin_verified(request):
        return None
    return csrf._reject(request, REASON_BAD_ORIGIN % origin)


async def _get_user(reference: abc.Callable[[], Any]) -> Any:
    return reference().user  # also after login() and logout()


def _load_user(request: http.HttpRequest) -> None:
    """Load the session's user, in the thread of the handshake.

    Later, `request.user` would query the database in asynchronous code, and
    `request.auser()` would load a second object.
    """
    if hasattr(request, "user"):
        bool(request.user)  # Django's SimpleLazyObject queries the database now
        with suppress(TypeError):  # a request's proxy may have no weak references
            reference = weakref.ref(request)
            setattr(request, "auser", functools.partial(_get_user, reference))


def _is_async(function: abc.Callable[..., Any]) -> bool:
    target: Any = function
    while isinstance(target, functools.partial) or hasattr(target, "__wrapped__"):
        target = getattr(target, "__wrapped__", None) or target.func
    called = None if isinstance(target, type) else getattr(target, "__call__", None)
    return bool(is_async(target) or is_async(function) or is_async(called))


def _handshake_view(view: View) -> abc.Callable[..., http.HttpResponseBase]:
    """Return the ordinary, synchronous Django view for the handshakes of a view."""
    if not _is_async(view):
        name = getattr(inspect.unwrap(view), "__qualname__", repr(view))
        raise TypeError(
            f"a WebSocket view is asynchronous: write 'async def' for {name}, "
            "as in 'async def view(socket)' or, in a View class, "
            "'async def get(self, socket)', and pass View.as_view()"
        )

    def handshake(request: http.HttpRequest, /, *args: Any, **kwargs: Any) -> Any:
        if getattr(request, "scope", {}).get("type") != "websocket":
            return _upgrade_required(request)
        request.get_host()  # ALLOWED_HOSTS, even if no middleware asks
        if not getattr(handshake, "csrf_exempt", False):
            if refusal := _refuse_origin(request):
                return refusal
        _load_user(request)
        call = lambda socket: view(socket, *args, **kwargs)  # noqa: E731
        return _SwitchingProtocols(call, request)

    functools.update_wrapper(handshake, view, updated=())
    for name, value in getattr(view, "__dict__", {}).items():
        # Attributes that decorators set for the middleware (csrf_exempt), but not the
        # marker of View.as_view(), which would make Django await this synchronous view.
        setattr(handshake, name, value)
        if is_async(handshake):
            delattr(handshake, name)
    setattr(handshake, "websocket_view", view)
    return handshake


def websocket(
    route: Any, view: View, kwargs: Any = None, name: str | None = None
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
    route: Any, view: View, kwargs: Any = None, name: str | None = None
) -> urls.URLPattern:
    """Route a WebSocket to `view` by a regular expression: `django.urls.re_path`.

    As `websocket()` in everything else.
    """
    return urls.re_path(route, _handshake_view(view), kwargs, name)


# The handshake and the life of a connection


def _get_headers(response: HttpResponseBase) -> list[tuple[bytes, bytes]]:
    """Return a response's headers as ASGI wants them: bytes, names in lower case."""
    switching = response.status_code == 101
    cookies = [("Set-Cookie", c.OutputString()) for c in response.cookies.values()]
    return [
        (name.lower().encode("ascii"), value.encode("latin-1"))
        for name, value in [*response.items(), *cookies]
        if not (switching and _RESERVED.fullmatch(name))
    ]


def _run_sync_code_in(
    executor: futures.Executor,
) -> contextvars.Token[ThreadSensitiveContext]:
    """Let `sync_to_async` run thread-sensitive code in `executor`, in this context.

    asgiref 3.13 does it by `ThreadSensitiveContext(executor=…)`. Django 5.2 accepts an
    older one, which finds the executor in the same mapping.
    """
    context = ThreadSensitiveContext()
    SyncToAsync.context_to_thread_executor[context] = executor
    return SyncToAsync.thread_sensitive_context.set(context)


@sync_to_async
def _run_django(function: abc.Callable[..., Any], *args: Any) -> Any:
    """Run a synchronous function that sends Django's request signals."""
    sent: list[Any] = []
    if not threading.current_thread().name.startswith("django_ws"):
        # The thread of a TestCase, whose connection the signals must not close:
        # Django's own test client takes the same care.
        sent = [signals.request_started, signals.request_finished]
    for signal in sent:
        signal.disconnect(close_old_connections)
    try:
        return function(*args)
    finally:
        for signal in sent:
            signal.connect(close_old_connections)


def _set_variables(context: contextvars.Context) -> None:
    """Set the variables of the middleware again, at the end of a hop to a thread.

    asgiref carries them to the task that awaits the hop, and with them the data of
    `asgiref.local.Local` (language, time zone, urlconf), which is tied to a thread.
    """
    executor = getattr(AsyncToSync.executors, "current", None)
    for variable, value in context.items():
        variable.set(value)
    # Asynchronous middleware left an executor there that has ended.
    AsyncToSync.executors.current = executor


async def _join(parts: abc.AsyncIterable[bytes]) -> bytes:
    return b"".join([part async for part in parts])


def _get_body(response: Any) -> bytes:
    """Return the whole body of a response that refuses a handshake."""
    if response.status_code < 200:
        raise ValueError(
            f"a handshake cannot be refused with the status {response.status_code}; "
            "middleware that accepts it returns the response of get_response()"
        )
    if getattr(response, "is_async", False):
        return async_to_sync(_join)(response)
    return bytes(response.getvalue())


def _get_result(
    task: asyncio.Future[Any], error: BaseException | None, unexpected: bool
) -> Any:
    """Return what a view returned or raised; cancellation is an error if `unexpected`.

    `error` is what a handler of a group raised, which has cancelled the view.
    """
    failure = None if task.cancelled() else task.exception()
    failures: list[Any] = [one for one in (error, failure) if one is not None]
    for one in failures:
        if not isinstance(one, Exception):
            raise one  # pytest.fail(), say
    if failures:
        return _unwrap(ExceptionGroup("a handler and the view failed", failures))
    if not task.cancelled():
        return task.result()
    why = "the view awaited something that was cancelled"
    return RuntimeError(why) if unexpected else None


def _unwrap(error: Any) -> Exception:
    """Return the one exception of a group that a TaskGroup made, or the group.

    `WebSocketDisconnect` counts only if there is nothing else.
    """
    while isinstance(error, ExceptionGroup):
        ends, failures = error.split(WebSocketDisconnect)
        error = failures or ends
        if len(error.exceptions) > 1 and error is failures:
            break
        error = error.exceptions[0]
    return error  # type: ignore[no-any-return]


def _end_as(result: Any, request: http.HttpRequest) -> Any:
    """Act as a Django view that returns or raises what a view did before accept()."""
    if isinstance(result, Exception):
        raise result
    if result is None:
        resolver = urls.get_resolver(urls.get_urlconf())
        denied = PermissionDenied()
        return exception.get_exception_response(request, resolver, 403, denied)
    if not isinstance(result, HttpResponseBase):
        raise TypeError(
            f"the view of {request.path} returned {result!r} before accept(): "
            "return an HttpResponse to refuse, or None"
        )
    return result


class _Accepted:
    """A socket, and what its view returned (a coroutine, as a rule) or raised."""

    __slots__ = "socket", "result"

    def __init__(self, socket: WebSocket, result: Any) -> None:
        self.socket = socket
        self.result = result

    def __del__(self) -> None:  # the server cancelled before serve() ran
        if inspect.iscoroutine(self.result):
            self.result.close()


class WebSocketHandler(base.BaseHandler):
    """Django's request handler, for handshakes, and what comes after them.

    It derives from BaseHandler, since instrumentation patches ASGIHandler for HTTP.
    """

    def __init__(self, app: Application) -> None:
        self.app = app
        # Synchronous: each of Django's middlewares in async mode hops to a thread and
        # back, the whole chain in sync mode hops once.
        self.load_middleware()

    def resolve_request(self, request: http.HttpRequest) -> urls.ResolverMatch:
        """Resolve as Django does, but only to views for WebSockets."""
        match = super().resolve_request(request)
        if not hasattr(match.func, "websocket_view"):
            advice = "is no WebSocket: route it with websocket(), not path()"
            text = f"{request.path!r} {advice}"
            _logger.warning(text)
            raise http.Http404(text)
        return match

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one WebSocket connection (ASGI, "WebSocket"), or let `app` serve."""
        if scope["type"] != "websocket":
            return await self.app(scope, receive, send)
        if (await receive())["type"] != ReceiveEvent.CONNECT:
            return
        token = _run_sync_code_in(_threads.handshakes)
        # Keep Sentry's data about one client away from all others. Sentry does this in
        # ASGIHandler, which sockets do not use.
        sentry = sys.modules.get("sentry_sdk")
        try:
            with getattr(sentry, "isolation_scope", nullcontext)():
                answer = await _run_django(self.handshake, scope, receive, send)
                if isinstance(answer, _Accepted):
                    await self.serve(answer)
                else:
                    await self.refuse(answer, send)
        finally:
            SyncToAsync.thread_sensitive_context.reset(token)

    def handshake(self, scope: Scope, receive: Receive, send: Send) -> Any:
        """Return the argument for `serve` or for `refuse`; runs in a worker thread."""
        request, response = self.get_handshake_response(scope)
        response._handler_class = self.__class__
        if not isinstance(response, _SwitchingProtocols) or response.status_code != 101:
            try:  # middleware may set the status
                return self.get_denial(response, scope, request)
            finally:
                response.close()
        del response["Content-Type"]  # of no content
        headers = _get_headers(response)
        lock = asyncio.Lock()  # another task of the view may be refusing

        async def refuse(socket: WebSocket, result: Any) -> None:
            async with lock:
                if socket._refuse is not None:
                    events = await _run_django(self.get_refusal, response, result)
                    await self.refuse(events, send)
                    socket._refuse = None

        socket = WebSocket(scope, response.request, receive, send, headers, refuse)
        try:
            # The synchronous part of a view (dispatch() of a class-based view with
            # LoginRequiredMixin, say) may query the database, since it runs here.
            accepted = _Accepted(socket, response.context.run(response.view, socket))
        except Exception as error:
            accepted = _Accepted(socket, error)
        # The request is finished where the socket begins (signal request_finished).
        response.close()
        _set_variables(response.context)
        return accepted

    def get_handshake_response(self, scope: Scope) -> tuple[Any, Any]:
        """Return a handshake's request, a GET over http or https, and the response."""
        scheme = "https" if scope.get("scheme") == "wss" else "http"
        scope = {**scope, "method": "GET", "scheme": scheme}
        urls.set_script_prefix(asgi.get_script_prefix(scope))
        signals.request_started.send(sender=self.__class__, scope=scope)
        try:
            request = asgi.ASGIRequest(scope, io.BytesIO())
            request.META.pop("CONTENT_LENGTH", None)  # a handshake has no body
            request.body  # b"", also when Django has closed the stream
            return request, self.get_response(request)
        except UnicodeDecodeError:  # in the query string
            return None, http.HttpResponseBadRequest()

    def get_denial(self, response: Any, scope: Event, request: Any) -> list[Event]:
        """Return the events of a refusal (ASGI, "WebSocket Denial Response").

        A server without that extension answers `websocket.close` with a plain 403.
        """
        try:
            body = _get_body(response)
        except Exception as error:
            response = exception.response_for_exception(request, error)
            error.__traceback__ = None  # without these frames: no cycle
            body = _get_body(response)
        extension = "websocket.http.response"
        if extension not in (scope.get("extensions") or ()):
            return [{"type": SendEvent.CLOSE}]
        start = {"type": f"{extension}.start", "status": response.status_code}
        start["headers"] = _get_headers(response)
        return [start, {"type": f"{extension}.body", "body": body}]

    async def refuse(self, events: list[Event], send: Send) -> None:
        with suppress(OSError, RuntimeError):  # the client has gone
            for event in events:
                await send(event)
        # uvicorn logs an error if the application ends before it has closed.
        await asyncio.sleep(0)

    async def serve(self, accepted: _Accepted) -> None:
        """Run the view of a socket, and end the connection as the view ended."""
        socket, result = accepted.socket, accepted.result
        accepted.result = None  # so that __del__() leaves it alone
        executor = _ViewExecutor()
        _run_sync_code_in(executor)
        try:
            if inspect.isawaitable(result):
                result, cancelled = await socket._run(result)
                if cancelled:
                    await self.get_close(socket, result)  # logs it
                    raise asyncio.CancelledError
            if socket._state == "connecting":
                if result is None:
                    _logger.warning(
                        "%r: refused, since the view returned without accept(). Call "
                        "it, or close(), or return an HttpResponse.",
                        socket.request.path,
                    )
                ended = isinstance(result, WebSocketDisconnect)
                await socket._refuse_for(None if ended else result)
            else:
                if socket._refuse is not None and socket._state == "closing":
                    await socket._refuse_for(None)  # a task of the view has begun to
                elif socket._refuse is not None:  # the client left before an answer
                    await self.refuse([{"type": SendEvent.CLOSE}], socket._send)
                code, reason = await self.get_close(socket, result)
                if socket.connected:
                    await socket.close(code, reason)
            await socket._flush()  # a close, which a group may have sent
        finally:
            socket._abandon()
            executor.end()

    async def get_close(self, socket: WebSocket, result: Any) -> tuple[int, str]:
        """Return the code and reason to close with for what a view raised."""
        code, reason = int(CloseCode.NORMAL_CLOSURE), ""
        if isinstance(result, WebSocketDisconnect):
            with suppress(TypeError, ValueError):  # perhaps it is another socket's end
                event = _close_event(result.code, result.reason)
                code, reason = event["code"], event["reason"]
        elif isinstance(result, InvalidMessage):  # the client's fault: nothing to log
            code, reason = result.code, str(result)
        elif isinstance(result, Exception):
            denied = isinstance(result, PermissionDenied)
            code = CloseCode.POLICY_VIOLATION if denied else CloseCode.INTERNAL_ERROR
            if conf.settings.DEBUG_PROPAGATE_EXCEPTIONS and not denied:
                raise result
            await self.report(socket.request, result, denied)
            if conf.settings.DEBUG:
                reason = f"{type(result).__name__}: {result}".rstrip(": ")
        elif result is not None:
            text = "%r: the view returned a value after accept(), where nobody gets it"
            _logger.warning(text, socket.request.path)
        # A frame takes 123 bytes (RFC 6455, section 5.5).
        return code, reason.encode("utf-8", "replace")[:123].decode("utf-8", "ignore")

    @sync_to_async
    def report(self, request: asgi.ASGIRequest, error: Exception, denied: bool) -> None:
        """Log and signal an exception after accept() as Django does those of views."""
        response = http.HttpResponse(status=403 if denied else 500)
        traceback = error.__traceback__
        try:
            raise error  # receivers look at sys.exc_info()
        except Exception:
            about: Any = {"response": response, "request": request, "exception": error}
            if denied:
                log_response("Forbidden (Permission denied): %s", request.path, **about)
            else:
                signals.got_request_exception.send(sender=None, request=request)
                log_response("%s: %s", response.reason_phrase, request.path, **about)
        error.__traceback__ = traceback  # without this frame: no cycle

    def get_refusal(self, handshake: _SwitchingProtocols, result: Any) -> list[Event]:
        """Return the events of a refusal for what a view returned or raised."""
        request = handshake.request
        handler: Any = copy.copy(self)
        # Run the part of the chain that follows a view, with a view that ends likewise.
        view = functools.partial(_end_as, result)
        handler.resolve_request = lambda request: (view, (), {})
        handler.make_view_atomic = lambda view: view
        handler._view_middleware = []
        traceback = getattr(result, "__traceback__", None)
        get_response = exception.convert_exception_to_response(handler._get_response)
        response: Any = get_response(request)
        if isinstance(result, Exception):
            result.__traceback__ = traceback  # without this frame: no cycle
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
        events = self.get_denial(response, request.scope, request)
        for close in response._resource_closers:  # the request was finished before
            close()
        return events


def websockets(app: Application) -> Application:
    """Serve WebSockets by Django, and everything else by `app` (ASGI applications).

    Wrap what `get_asgi_application()` returned. Each handshake passes
    `settings.MIDDLEWARE`, of which this makes instances of its own.

    Raises `ImproperlyConfigured` for mistakes in `settings.WEBSOCKETS`.
    """
    _new_groups()  # report a mistake now and not at the first join()
    return WebSocketHandler(app)


# Threads: where the synchronous code of views runs


_at_fork = getattr(os, "register_at_fork", lambda **hooks: None)  # Windows has none


class _Threads:
    """The threads of one process: some for handshakes, others for views.

    Middleware leaves state on threads and their database connections (the tenant, the
    current user). Each handshake sets its own, as on a WSGI worker's thread. Views run
    on threads that no middleware ever used, so they never see another client's state.
    """

    SIZE = min(32, (os.cpu_count() or 1) + 4)

    def __init__(self) -> None:
        self.start()
        _at_fork(after_in_child=self.start)  # a child has none of its parent's threads

    def start(self) -> None:
        self.handshakes = futures.ThreadPoolExecutor(self.SIZE, "django_ws_handshake")
        self.views = futures.ThreadPoolExecutor(self.SIZE, "django_ws_view")
        self.lock = threading.Lock()  # guards what follows, and `_ViewExecutor`
        self.turns = 0  # sockets that have a thread of `views`, or wait for one
        # The sockets whose threads have nothing to do, the longest idle first.
        self.idle: list[_ViewExecutor] = []


_threads = _Threads()


class _ViewExecutor(futures.Executor):
    """Runs the synchronous code of one socket's view, one call at a time.

    asgiref takes it for the executor of the socket's thread-sensitive context. One
    thread for all sockets would run one query at a time, and one for each would hold
    a database connection for each. So sockets take turns: a socket has one job in the
    pool, its turn, which runs its calls until there is none for IDLE seconds; or, while
    other sockets wait for a thread, until there is none or IDLE seconds have passed.
    """

    __slots__ = "calls", "changed", "has_turn", "ended"
    IDLE = 0.1

    def __init__(self) -> None:
        self.calls: list[Any] = []  # a future and a function each
        self.changed: threading.Condition | None = None  # wakes an idle turn
        self.has_turn = False
        self.ended = False  # the socket

    def submit(self, fn: abc.Callable[..., Any], /, *args: Any, **kwargs: Any) -> Any:
        future: futures.Future[Any] = futures.Future()
        with _threads.lock:
            if not self.has_turn:
                _threads.views.submit(self.take_turn)
                self.has_turn = True
                _threads.turns += 1
                if _threads.turns > _threads.SIZE and _threads.idle:
                    _threads.idle[0].wake()  # it gives its thread back
            self.calls.append((future, functools.partial(fn, *args, **kwargs)))
            self.wake()
        return future

    def end(self) -> None:
        """Give the thread back as soon as no call is left: the socket has ended."""
        with _threads.lock:
            self.ended = True
            self.wake()

    def wake(self) -> None:
        if self.changed is not None:
            self.changed.notify()
            self.changed = None
            _threads.idle.remove(self)

    def take_turn(self) -> None:
        deadline = time.monotonic() + self.IDLE
        while (call := self.get_call(deadline)) is not None:
            _run_call(*call)
            del call  # it refers to the socket
            _tend_connections(end=False)
        _tend_connections(end=True)
        with _threads.lock:
            if self.calls:  # after all who wait now
                _threads.views.submit(self.take_turn)
            else:
                self.has_turn = False
                _threads.turns -= 1

    def get_call(self, deadline: float) -> Any:
        """Return the socket's next call, or None when its turn ends."""
        with _threads.lock:
            others_wait = _threads.turns > _threads.SIZE
            if others_wait and time.monotonic() > deadline:
                return None
            if not (self.calls or self.ended or others_wait):
                _threads.idle.append(self)
                changed = self.changed = threading.Condition(_threads.lock)
                if not changed.wait(self.IDLE):
                    self.wake()
            return self.calls.pop(0) if self.calls else None


def _run_call(future: futures.Future[Any], call: abc.Callable[[], Any]) -> None:
    """Run a call as concurrent.futures does."""
    if future.set_running_or_notify_cancel():
        try:
            future.set_result(call())
        except BaseException as error:
            future.set_exception(error)
    del future, call  # the exception's traceback leads to this frame


def _tend_connections(end: bool) -> None:
    """Close this thread's database connections, as Django does after a request.

    That rolls back a transaction that was left open. At the `end` of a turn, what was
    set on a closed connection is forgotten, too. Before it, only connections that
    failed are closed, for others may be in use from one call to the next.
    """
    for connection in connections.all(initialized_only=True):
        try:
            if end or connection.autocommit and connection.errors_occurred:
                connection.close_if_unusable_or_obsolete()
            if end and (not connection.connection or connection.closed_in_transaction):
                del connections[connection.alias]
        except Exception:
            _logger.exception("A database connection could not be closed")
            with suppress(AttributeError):
                del connections[connection.alias]  # no other socket may get it


# Groups


class _GroupMessage(NamedTuple):
    """What is sent to a group: a message, or a close."""

    event: Event  # as a client gets it
    is_json: bool = False
    spread: float = 0.0  # seconds over which a close reaches the members

    def value(self) -> Any:
        """Return a message as a handler gets it, which may change the data of JSON."""
        if "bytes" in self.event:
            return self.event["bytes"]
        return _decode_json(self.event["text"]) if self.is_json else self.event["text"]


class _Membership:
    """The groups that a socket is in, and what waits for their handlers."""

    __slots__ = "groups", "messages", "size", "busy", "timer", "context"

    def __init__(self) -> None:
        self.groups: dict[str, tuple[_Groups, Handler | None]] = {}  # by name
        # The groups' names, and their messages.
        self.messages: deque[tuple[str, _GroupMessage]] = deque()
        self.size = 0  # of the messages, in bytes
        self.busy = False  # whether a handler runs
        self.timer: asyncio.TimerHandle | None = None  # closes if handlers do not end
        self.context = contextvars.Context()  # for handlers: that of the last join()

    def leave(self, group: str, socket: WebSocket) -> None:
        if group in self.groups:
            groups, _ = self.groups.pop(group)
            groups.leave(group, socket)
            waiting = [one for one in self.messages if one[0] != group]
            timer = self.timer
            self.clear()
            for name, message in waiting:
                self.put(name, socket, message, timer)

    def deliver(self, group: str, socket: WebSocket, message: _GroupMessage) -> None:
        """Send a message to the client, or queue it for the group's handler."""
        groups, handler = self.groups[group]
        # Without a handler now, it still comes after what waited for the last one.
        waits = self.messages and any(name == group for name, _ in self.messages)
        if handler or waits:
            self.put(group, socket, message)
        else:
            socket._deliver(message.event, groups.limit)

    def put(
        self,
        group: str,
        socket: WebSocket,
        message: _GroupMessage,
        timer: asyncio.TimerHandle | None = None,
    ) -> None:
        """Queue a message, or a close behind all messages, for a while at most."""
        loop = asyncio.get_running_loop()
        self.messages.append((group, message))
        self.size += _size_of(message.event)
        if socket._view.handling is None:
            about: Any = {"loop": loop, "context": self.context}
            socket._view.handling = asyncio.Task(self.handle(socket), **about)
        if message.event["type"] == "websocket.close":
            close = functools.partial(socket._deliver, message.event)
            end = timer.when() if timer else loop.time() + socket.FLUSH
            self.timer = self.timer or loop.call_at(end, close)
        elif self.busy and self.size > self.groups[group][0].limit:
            self.clear()
            slow = "messages are handled too slowly"
            socket._deliver(_close_event(CloseCode.TRY_AGAIN_LATER, slow))

    def clear(self) -> None:
        """Drop what waits."""
        self.messages.clear()
        self.size = 0
        if self.timer is not None:
            self.timer.cancel()
            self.timer = None

    async def handle(self, socket: WebSocket) -> None:
        """Let the handlers have the messages, one after another."""
        task: Any = asyncio.current_task()
        try:
            while self.messages and socket.connected:
                group, message = self.messages.popleft()
                self.size -= _size_of(message.event)
                groups, handler = self.groups[group]
                if handler is None or message.event["type"] == "websocket.close":
                    socket._deliver(message.event, groups.limit)
                else:
                    self.busy = True
                    await handler(message.value())
                    self.busy = False
                await asyncio.sleep(0)  # handlers that never wait must not block
        except asyncio.CancelledError:
            if not task.cancelling():
                why = "a group's handler awaited something that was cancelled"
                self.fail(socket, RuntimeError(why))
        except BaseException as error:  # pytest.fail() raises no Exception
            self.fail(socket, error)
        finally:
            self.clear()
            socket._view.handling, self.busy = None, False

    def fail(self, socket: WebSocket, error: BaseException) -> None:
        self.leave_all(socket)
        socket._fail(error)

    def leave_all(self, socket: WebSocket) -> None:
        self.clear()
        for group in tuple(self.groups):
            self.leave(group, socket)

    async def end(self, socket: WebSocket) -> bool:
        """Leave all groups, end the handler; return whether the server cancelled."""
        self.leave_all(socket)
        task, cancelled = socket._view.handling, False
        while task is not None and not task.done():
            task.cancel()  # again and again, as for the view
            try:
                await asyncio.wait([task], timeout=socket.GRACE)
            except asyncio.CancelledError:
                cancelled = True
        return cancelled


@functools.cache  # once
def _warn_that_nobody_hears() -> None:
    _logger.warning(
        "A message to a group reached nobody: this process has no sockets in groups, "
        "and settings.WEBSOCKETS names no REDIS_URL or DATABASE that leads to others."
    )


class _Groups:
    """The groups of one event loop; messages stay in this process."""

    # The event loops of this process that have sockets in groups.
    loops: ClassVar[dict[asyncio.AbstractEventLoop, "_Groups"]] = {}

    def __init__(self, options: dict[str, Any]) -> None:
        self.limit: int = options["OUTBOX"]
        # The sockets of each group, in the order in which they joined: messages that
        # overtake each other within a large group would reach members out of order.
        self.members: dict[str, dict[WebSocket, None]] = {}
        self.closing: set[asyncio.Task[None]] = set()  # groups, over some seconds

    async def join(self, group: str, socket: WebSocket) -> None:
        """Add a socket; what is published from now on reaches it."""
        self.loops[asyncio.get_running_loop()] = self
        self.members.setdefault(group, {})[socket] = None

    def leave(self, group: str, socket: WebSocket) -> None:
        """Remove a socket; an empty group leaves no trace."""
        members = self.members.get(group, {})
        members.pop(socket, None)
        if not members:
            self.members.pop(group, None)
        if not self.members:
            self.loops.pop(asyncio.get_running_loop(), None)

    def has_members(self, group: str) -> bool:
        """Return whether any loop of this process has sockets in the group."""
        loops = list(self.loops.items())
        return any(loop.is_running() and group in one.members for loop, one in loops)

    async def publish(self, group: str, message: _GroupMessage) -> bool | None:
        """Send a message to the group's sockets, whichever loop they are on.

        Return whether there were any, or None if that is not known.
        """
        heard = self.has_members(group)
        for loop, groups in list(self.loops.items()):
            if loop.is_closed():
                self.loops.pop(loop, None)
            elif loop.is_running() and loop is not asyncio.get_running_loop():
                asyncio.run_coroutine_threadsafe(groups.deliver(group, message), loop)
        if not self.loops:
            _warn_that_nobody_hears()
        await self.deliver(group, message)
        # A view that broadcasts without a pause must not block the event loop.
        await asyncio.sleep(0)
        return heard

    async def deliver(self, group: str, message: _GroupMessage) -> None:
        """Hand a message to the group's sockets on this loop; wait for none of them."""
        members = self.members.get(group, {})
        if message.spread:
            # It outlives who asked for it, so it must not run in that context.
            slowly = self.close_slowly(group, message)
            task = asyncio.create_task(slowly, context=contextvars.Context())
            self.closing.add(task)
            return task.add_done_callback(self.closing.discard)
        # Those who are members now, except for those who leave before their turn.
        waiting = filter(members.__contains__, tuple(members))
        try:
            for number, socket in enumerate(waiting, 1):
                socket._membership.deliver(group, socket, message)
                if not number % 250:
                    await asyncio.sleep(0)  # a large group must not block other sockets
        finally:
            for socket in waiting:  # the sender was cancelled
                socket._membership.deliver(group, socket, message)

    async def close_slowly(self, group: str, message: _GroupMessage) -> None:
        """Close those who are members now, at times spread evenly."""
        # A socket that ends meanwhile is not kept in memory.
        members = [weakref.ref(socket) for socket in self.members.get(group, {})]
        loop = asyncio.get_running_loop()
        start = loop.time()
        for number, reference in enumerate(members):
            # At a random moment of its share: other servers have members, too.
            share = (number + random.random()) / len(members)
            await asyncio.sleep(start + share * message.spread - loop.time())
            socket = reference()
            if socket is not None and socket in self.members.get(group, {}):
                socket._membership.deliver(group, socket, message)
            del socket  # not kept while this sleeps


_at_fork(after_in_child=_Groups.loops.clear)  # a child has none of its parent's loops


class _SharedGroups(_Groups):
    """Groups that span all processes, by a service that carries their messages.

    A process listens while it has sockets in groups, on one connection.
    """

    service: str  # its name
    SILENT: str  # what its silence means
    # Seconds of silence after which the service is asked whether it is still there, and
    # the bounds between which the pause before a new connection doubles.
    SILENCE = 15.0
    PAUSES = (0.1, 10.0)

    # What each service adds.
    connect: Any  # returns an async context manager: a connection that listens
    get_messages: Any  # waits for what the connection receives, for SILENCE at most
    receive: Any  # delivers one of those
    ping: Any  # lets the connection receive something
    pack: Any  # returns a group's message as the service takes it
    publish_in_thread: Any  # publishes that, in synchronous code
    publish_on_loop: Any  # the same, on connections that stop_publishing() closes
    stop_publishing: Any
    uses_django = False  # whether publish_in_thread() uses Django's connections

    def __init__(self, options: dict[str, Any]) -> None:
        super().__init__(options)
        self.prefix: str = options["PREFIX"]
        self.listener: asyncio.Task[None] | None = None
        self.pause = 0.0  # while the service is away
        # The groups that have got their first socket or lost their last one, and who
        # joins them.
        self.changed: set[str] = set()
        self.joining: list[asyncio.Future[None]] = []
        # Joins of which the service was told: a list for each answer that it owes.
        self.unconfirmed: deque[list[asyncio.Future[None]]] = deque()
        self.wake = asyncio.Event()

    async def join(self, group: str, socket: WebSocket) -> None:
        await super().join(group, socket)
        loop = asyncio.get_running_loop()
        confirmed = loop.create_future()
        self.joining.append(confirmed)
        self.changed.add(group)
        self.wake.set()
        if self.listener is None:
            # The listener outlives this view, so it must not run in its context.
            context = contextvars.Context()
            self.listener = loop.create_task(self.listen(), context=context)
        await confirmed

    def leave(self, group: str, socket: WebSocket) -> None:
        super().leave(group, socket)
        if group not in self.members:
            self.changed.add(group)
            self.wake.set()

    async def listen(self) -> None:
        """Listen while there are members; connect again whenever that fails."""
        try:
            while self.members:
                try:
                    await self.listen_once()
                except* Exception as group:  # whatever it is, sockets wait
                    if not self.pause:
                        error = group.exceptions[0]
                        text = "%s is away, groups get no messages: %s"
                        _logger.warning(text, self.service, error)
                    least, most = self.PAUSES
                    self.pause = min(max(2 * self.pause, least), most)
                    await asyncio.sleep(self.pause * random.uniform(0.5, 1))
        finally:  # also when the loop ends
            self.listener, self.pause = None, 0.0
            self.confirm(self.take_joins())  # all have left again
            await self.stop_publishing()

    async def listen_once(self) -> None:
        self.joining = [one for one in self.take_joins() if not one.done()]
        self.changed = set(self.members)
        async with self.connect() as connection, asyncio.TaskGroup() as tasks:
            reader = tasks.create_task(self.read(connection))
            await self.follow(connection)
            reader.cancel()

    def take_joins(self) -> list[asyncio.Future[None]]:
        """Return all joins that wait, and forget them."""
        joins = sum(self.unconfirmed, self.joining)
        self.joining = []
        self.unconfirmed.clear()
        return joins

    async def read(self, connection: Any) -> None:
        """Handle what comes; after a silence, ask whether the service is there."""
        silences = 0
        while silences < 2:
            messages = await self.get_messages(connection)
            for message in messages:
                await self.receive(message)
            silences = 0 if messages else silences + 1
            if silences == 1:
                with suppress(TimeoutError):
                    async with asyncio.timeout(self.SILENCE):
                        await self.ping(connection)
        raise ConnectionError(self.SILENT)

    async def follow(self, connection: Any) -> None:
        """Tell the service which groups have sockets here."""
        while self.members:
            changed, self.changed = self.changed, set()
            joins, self.joining = self.joining, []
            old = changed - self.members.keys()
            await self.change(connection, changed - old, old, joins)
            await self.wake.wait()
            self.wake.clear()

    async def change(
        self, connection: Any, new: set[str], old: set[str], joins: list[Any]
    ) -> None:
        """Subscribe to groups, unsubscribe from others; then joins can be confirmed."""
        self.confirm(joins)  # a connection may listen for all groups

    def confirm(self, joins: list[asyncio.Future[None]]) -> None:
        """Complete these joins: the service has answered."""
        if self.pause:
            _logger.warning("%s is back: groups work again", self.service)
            self.pause = 0.0
        for join in joins:
            if not join.done():  # it may be cancelled
                join.set_result(None)

    async def publish(self, group: str, message: _GroupMessage) -> bool | None:
        """Publish a message; the listeners of all processes deliver it.

        Synchronous code that waits for this does it on its own thread: in its database
        transaction, and on a connection that outlives `async_to_sync()`.
        """
        packed = self.pack(group, message)
        # asgiref has an executor there while a thread waits in async_to_sync().
        executor = getattr(AsyncToSync.executors, "current", None)
        from_sync = executor is not None and not executor._broken
        publish = self.publish_on_loop
        if from_sync or self.listener is None:
            same = from_sync or self.uses_django
            publish = sync_to_async(self.publish_in_thread, thread_sensitive=same)
        try:
            heard: bool | None = await publish(group, packed)
        finally:
            if self.listener is None:  # it may have ended meanwhile
                await self.stop_publishing()
        return heard


def _redis_client(url: str, asynchronous: bool, retries: int, **options: Any) -> Any:
    """Return a client of redis-py's."""
    import redis

    module: Any = redis.asyncio if asynchronous else redis
    # A connection may be stale, so another try makes sense, but not after a timeout.
    errors = (redis.ConnectionError,)
    retry = module.retry.Retry(redis.backoff.NoBackoff(), retries, errors)
    options.update(retry=retry, socket_timeout=1.5, socket_connect_timeout=1.5)
    pool = module.BlockingConnectionPool.from_url(url, max_connections=10, **options)
    pool.connection_kwargs["decode_responses"] = False  # messages may be bytes
    pool.make_connection()  # reports mistakes in the URL
    return module.Redis.from_pool(pool)


@functools.cache
def _redis_publisher(url: str) -> Any:
    """Return the client by which all threads of this process, and forks, publish."""
    return _redis_client(url, False, 1, timeout=0.5)  # for one of the 10 connections


class _RedisGroups(_SharedGroups):
    """Groups by Redis's publish/subscribe."""

    service = "Redis"
    SILENT = "it does not answer"

    def __init__(self, options: dict[str, Any]) -> None:
        super().__init__(options)
        self.url: str = options["REDIS_URL"]
        self.publisher = _redis_publisher(self.url)
        self.client: Any = None  # publishes while there are members

    def channel(self, group: str) -> bytes:
        return f"{self.prefix}:{group}".encode("utf-8", "surrogatepass")

    @asynccontextmanager
    async def connect(self) -> abc.AsyncIterator[Any]:
        # Not retried: the listener must know when the connection breaks.
        async with _redis_client(self.url, True, 0) as client:
            async with client.pubsub() as pubsub:
                await pubsub.connect()
                yield pubsub

    async def change(
        self, pubsub: Any, new: set[str], old: set[str], joins: list[Any]
    ) -> None:
        if new:  # Redis confirms one channel after another
            self.unconfirmed += [[] for _ in new]
            self.unconfirmed[-1].extend(joins)
            await pubsub.subscribe(*map(self.channel, new))
        else:  # nothing to subscribe to: they have left again
            self.confirm(joins)
        if old:
            await pubsub.unsubscribe(*map(self.channel, old))

    async def get_messages(self, pubsub: Any) -> list[Any]:
        message = await pubsub.get_message(timeout=self.SILENCE)
        return [] if message is None else [message]

    async def ping(self, pubsub: Any) -> None:
        await pubsub.ping()

    async def receive(self, message: dict[str, Any]) -> None:
        if message["type"] == "subscribe":
            self.confirm(self.unconfirmed.popleft())
        elif message["type"] == "message":
            channel = message["channel"].decode("utf-8", "surrogatepass")
            kind, body = message["data"][:1], message["data"][1:]
            try:
                unpacked = _unpack(
                    kind.decode(), body if kind == b"b" else body.decode()
                )
            except (ValueError, TypeError):
                return _logger.warning("Not a message of django_ws: %r", message)
            await self.deliver(channel.removeprefix(f"{self.prefix}:"), unpacked)

    def pack(self, group: str, message: _GroupMessage) -> bytes:
        kind, body = _pack(message)
        return kind.encode() + (body if isinstance(body, bytes) else body.encode())

    async def publish(self, group: str, message: _GroupMessage) -> bool | None:
        from redis import exceptions

        try:
            return await super().publish(group, message)
        except exceptions.TimeoutError as error:
            raise exceptions.ConnectionError("Redis does not answer") from error

    def publish_in_thread(self, group: str, packed: bytes) -> bool:
        return bool(self.publisher.publish(self.channel(group), packed))

    async def publish_on_loop(self, group: str, packed: bytes) -> bool:
        if self.client is None:
            self.client = _redis_client(self.url, True, 1, timeout=None)
        return bool(await self.client.publish(self.channel(group), packed))

    async def stop_publishing(self) -> None:
        if self.client is not None:
            await self.client.connection_pool.disconnect(inuse_connections=False)


class _PostgresGroups(_SharedGroups):
    """Groups by PostgreSQL's LISTEN and NOTIFY, on one channel for all groups."""

    service = "PostgreSQL"
    SILENT = "it does not answer, or a pooler is not in session mode"
    PING = "ping"
    uses_django = True
    NOTIFY = "SELECT pg_notify(%s, %s)"
    LIMIT = 7999  # bytes of a payload (PostgreSQL, "NOTIFY")
    # Equal payloads in one transaction would arrive once.
    numbers = itertools.count()

    def __init__(self, options: dict[str, Any]) -> None:
        super().__init__(options)
        self.alias: str = options["DATABASE"]
        self.listen_alias: str = options["LISTEN"] or self.alias
        _check_postgres("DATABASE", self.alias)
        _check_postgres("LISTEN", self.listen_alias)
        if not self.prefix.isprintable() or not 0 < len(self.prefix.encode()) < 64:
            wrong = "must be 1 to 63 bytes of printable text, with PostgreSQL"
            raise ImproperlyConfigured(f"WEBSOCKETS['PREFIX'] {wrong}")
        self.connection: Any = None  # publishes while there are members
        self.lock = asyncio.Lock()  # guards that

    async def open(self, alias: str) -> Any:
        """Return a connection of psycopg's, as Django would make it."""
        from psycopg import AsyncConnection

        options = connections[alias].get_connection_params()
        del options["cursor_factory"], options["context"]  # for synchronous code
        return await AsyncConnection.connect(**options, autocommit=True)

    @asynccontextmanager
    async def connect(self) -> abc.AsyncIterator[Any]:
        from psycopg import sql

        connection = await self.open(self.listen_alias)
        try:
            channel = sql.Identifier(self.prefix)
            await connection.execute(sql.SQL("LISTEN {}").format(channel))
            yield connection
        finally:
            await connection.close()

    async def get_messages(self, connection: Any) -> list[str]:
        notifications = connection.notifies(stop_after=1)
        try:
            async with asyncio.timeout(self.SILENCE):
                return [one.payload async for one in notifications]
        except TimeoutError:
            return []

    async def ping(self, connection: Any) -> None:
        # By another connection: behind some poolers this one hears only itself.
        async with self.lock:
            await self.notify(self.PING)

    async def receive(self, payload: str) -> None:
        if payload == self.PING:
            return
        try:
            (_, group, kind), end = json.JSONDecoder().raw_decode(payload)
            body: Any = payload[end:]
            if kind in "tb":
                body = _decode_json(body)
            if not isinstance(group, str) or not isinstance(body, str):
                raise TypeError(group)
            unpacked = _unpack(kind, base64.b64decode(body) if kind == "b" else body)
        except (ValueError, TypeError):
            return _logger.warning("Not a message of django_ws: %r", payload)
        await self.deliver(group, unpacked)

    def pack(self, group: str, message: _GroupMessage) -> str:
        kind, body = _pack(message)
        if isinstance(body, bytes):
            body = base64.b64encode(body).decode()
        if kind in "tb":  # PostgreSQL's text cannot contain NUL, unlike JSON's
            body = _encode_json(body)
        header = _encode_json([next(self.numbers), group, kind])
        packed = _escape_surrogates(header + body)
        if (size := len(packed.encode())) > self.LIMIT:
            raise ValueError(
                f"the message takes {size} bytes, and PostgreSQL carries {self.LIMIT}: "
                "save it and broadcast its id, or use WEBSOCKETS['REDIS_URL']"
            )
        return packed

    def publish_in_thread(self, group: str, packed: str) -> bool | None:
        """Publish on Django's own connection, and so in its transaction."""
        connection: Any = connections[self.alias]
        used: Any = nullcontext(connection)
        blocks = connection.atomic_blocks
        if blocks and all(block._from_testcase for block in blocks):
            used = closing(connection.copy())  # a TestCase's never commits
        with used as connection:
            reused = connection.connection is not None
            try:
                self.notify_by(connection, packed)
            except DatabaseError:
                if not (reused and connection.autocommit) or connection.is_usable():
                    raise
                connection.close()  # PostgreSQL had closed it
                self.notify_by(connection, packed)
        return self.has_members(group) or None

    def notify_by(self, connection: Any, packed: str) -> None:
        with connection.cursor() as cursor:
            cursor.execute(self.NOTIFY, [self.prefix, packed])

    async def publish_on_loop(self, group: str, packed: str) -> bool | None:
        with connections[self.alias].wrap_database_errors:
            async with self.lock:
                await self.notify(packed)
        return self.has_members(group) or None

    async def notify(self, packed: str) -> None:
        from psycopg import OperationalError

        reused = self.connection is not None
        try:
            self.connection = self.connection or await self.open(self.alias)
            await self.connection.execute(self.NOTIFY, [self.prefix, packed])
        except OperationalError:
            await self.close_connection()
            if not reused:
                raise
            await self.notify(packed)  # PostgreSQL had closed it; a new one may work

    async def stop_publishing(self) -> None:
        async with self.lock:
            await self.close_connection()

    async def close_connection(self) -> None:
        connection, self.connection = self.connection, None
        if connection is not None:
            await connection.close()


def _pack(message: _GroupMessage) -> tuple[str, str | bytes]:
    """Return a letter for the kind of a message, and its body."""
    event = message.event
    if event["type"] == SendEvent.CLOSE:
        return "c", _encode_json([event["code"], event["reason"], message.spread])
    if "bytes" in event:
        return "b", event["bytes"]
    return "j" if message.is_json else "t", event["text"]


def _unpack(kind: str, body: Any) -> _GroupMessage:
    """Return what `_pack()` was given; raise ValueError or TypeError for other data."""
    if kind == "c":
        code, reason, spread = _decode_json(body)
        return _GroupMessage(_close_event(code, reason), spread=float(spread))
    if kind not in ("b", "j", "t"):
        raise ValueError(kind)
    event = {"type": SendEvent.SEND, "bytes" if kind == "b" else "text": body}
    return _GroupMessage(event, is_json=kind == "j")


def _check_postgres(option: str, alias: str) -> None:
    wrong = f"WEBSOCKETS[{option!r}]"
    if alias not in connections.settings:
        raise ImproperlyConfigured(f"{wrong}: DATABASES has no {alias!r}")
    backend: Any = load_backend(connections.settings[alias]["ENGINE"])
    vendor = backend.DatabaseWrapper.vendor
    if vendor != "postgresql":
        other = f"{wrong}: groups need PostgreSQL or Redis, and {alias!r} is {vendor}"
        raise ImproperlyConfigured(f"{other}: change it, or set REDIS_URL instead")
    try:
        from psycopg import __version__ as version
    except ImportError:
        version = "0"
    # Older ones lose notifications (psycopg/psycopg#962).
    if tuple(map(int, re.findall(r"\d+", version)[:3])) < (3, 2, 4):
        needed = "needs psycopg 3.2.4 or later: pip install 'psycopg[binary]>=3.2.4'"
        raise ImproperlyConfigured(f"{wrong} {needed}")


def _get_options() -> dict[str, Any]:
    """Return `settings.WEBSOCKETS` with its defaults."""
    options: dict[str, Any] = {"REDIS_URL": "", "DATABASE": "", "LISTEN": ""}
    options.update(PREFIX="django_ws", OUTBOX=2**20)
    given = getattr(conf.settings, "WEBSOCKETS", {})
    if not isinstance(given, dict):
        raise ImproperlyConfigured("WEBSOCKETS must be a dict")
    for name, value in given.items():
        wrong = f"WEBSOCKETS[{name!r}]"
        if name not in options:
            raise ImproperlyConfigured(f"{wrong}: use only {', '.join(options)}")
        if type(value) is not type(options[name]):
            kind = type(options[name]).__name__
            raise ImproperlyConfigured(f"{wrong} must be {kind}")
        options[name] = value
    if options["OUTBOX"] < 1:
        raise ImproperlyConfigured("WEBSOCKETS['OUTBOX'] must be at least 1 (byte)")
    if ":" in options["PREFIX"]:  # or "a" + "b:c" would be "a:b" + "c"
        raise ImproperlyConfigured("WEBSOCKETS['PREFIX'] must not contain a colon")
    return options


def _new_groups() -> _Groups:
    """Return what `settings.WEBSOCKETS` asks for, or raise for a mistake in it."""
    options = _get_options()
    if options["DATABASE"] and options["REDIS_URL"]:
        raise ImproperlyConfigured("WEBSOCKETS takes DATABASE or REDIS_URL, not both")
    if options["LISTEN"] and not options["DATABASE"]:
        raise ImproperlyConfigured("WEBSOCKETS['LISTEN'] needs WEBSOCKETS['DATABASE']")
    if options["DATABASE"]:
        return _PostgresGroups(options)
    if not options["REDIS_URL"]:
        return _Groups(options)
    try:
        return _RedisGroups(options)
    except ImportError as error:
        wrong = "WEBSOCKETS['REDIS_URL'] needs redis-py: pip install redis"
        raise ImproperlyConfigured(wrong) from error
    except Exception as error:  # redis-py raises several for a mistake in the URL
        raise ImproperlyConfigured(f"WEBSOCKETS['REDIS_URL']: {error}") from error


def _get_groups(group: str) -> _Groups:
    """Return the running event loop's groups; raise TypeError unless `group` is str."""
    if not isinstance(group, str):
        raise TypeError(f"a group's name must be str, not {type(group).__name__}")
    return _Groups.loops.get(asyncio.get_running_loop()) or _new_groups()


async def broadcast(group: str, message: Any) -> bool | None:
    """Send a message to every socket in a group (str), on every server.

    str is sent as text, bytes-like as binary, anything else as JSON, as `send_json`
    writes it; it is encoded once. From synchronous code: `async_to_sync(broadcast)(…)`.
    It waits for no client. One that reads so slowly that more than
    WEBSOCKETS["OUTBOX"] bytes wait for it (1 MiB) is closed with 1013.

    Returns whether the group had any socket. PostgreSQL does not tell: with it, the
    answer is True for a socket in this process, else None.

    With PostgreSQL, synchronous code in a transaction sends when that is committed.

    Cancelling it is safe: the message was sent to all members or to none.

    Raises `TypeError` and `ValueError` for data that JSON cannot represent; with Redis
    also redis-py's `ConnectionError`, and then the message is lost; with PostgreSQL
    Django's `DatabaseError`, and `ValueError` for one that takes more than 7,999 bytes
    with its header (bytes as base64: about 5,900).
    """
    is_json = False
    if isinstance(message, str):
        body: dict[str, Any] = {"text": _escape_surrogates(message)}
    else:
        try:
            body = {"bytes": bytes(memoryview(message))}
        except TypeError:  # not bytes-like
            is_json = True
            body = {"text": _escape_surrogates(_encode_json(message))}
    event = {"type": SendEvent.SEND, **body}
    return await _get_groups(group).publish(group, _GroupMessage(event, is_json))


async def close_group(
    group: str,
    code: int = CloseCode.NORMAL_CLOSURE,
    reason: str = "",
    *,
    spread: float = 0,
) -> None:
    """Close every socket in a group (str) with a code (int) and a reason (str).

    Earlier broadcasts to the group arrive first. The views end as when their clients
    leave. Use it when a session ends, a user loses a permission, or a room closes.

    With `spread`, the sockets are closed at times spread evenly over that many seconds
    (float), on every server, so that their clients do not come back all at once. It
    returns without waiting for that.

    Cancelling it is safe: it closes all members or none.

    Raises `ValueError` as `WebSocket.close` does and for a `spread` below 0, and what
    `broadcast` raises.
    """
    if not 0 <= spread < math.inf:
        raise ValueError(f"spread must be a number of seconds, not {spread!r}")
    message = _GroupMessage(_close_event(code, reason), spread=float(spread))
    await _get_groups(group).publish(group, message)


# Testing


class _Client(_Endpoint):
    """The client's end of a WebSocket, for tests; `connect` makes and describes it."""

    _message = "websocket.receive"
    _limits_json = False

    def __init__(self, scope: Scope, timeout: float | None) -> None:
        self.scope = scope
        self.timeout = timeout
        self.subprotocol: str | None = None
        self._state = "connecting"
        self._end = (int(CloseCode.ABNORMAL_CLOSURE), "")
        # The answer to the handshake, also where it is not a refusal.
        self._answer = http.HttpResponse()
        self.headers: abc.Mapping[str, str] = self._answer.headers
        self.cookies = self._answer.cookies
        # What the view raised, or the application that _run() serves.
        self._error: BaseException | None = None
        # When it is full, the view has to wait, as for a slow client.
        self._received: asyncio.Queue[Event] = asyncio.Queue(10_000)
        self._sent: asyncio.Queue[Event] = asyncio.Queue()
        self._sent.put_nowait({"type": ReceiveEvent.CONNECT})

    def __repr__(self) -> str:
        return f"<the client's end of {self.scope['path']!r}>"

    async def _run(self, application: Application) -> None:
        """Run the application, in the place of a server."""
        try:
            await application(self.scope, self._sent.get, self._take)
        except asyncio.CancelledError:
            raise
        except BaseException as error:  # pytest.fail() raises no Exception
            self._error = error
        finally:  # if the application has not closed, the connection breaks
            await self._received.put({"type": SendEvent.CLOSE, "code": 1006})

    async def _take(self, event: Event) -> None:
        if self._state == "closed":
            raise OSError("the client has gone")  # as servers do (ASGI 2.4)
        await self._received.put(event)
        if event["type"] == "websocket.close":  # as servers do (ASGI, "Disconnect")
            self._sent.put_nowait({**event, "type": ReceiveEvent.DISCONNECT})

    def _store_error(self, request: Any = None, **kwargs: Any) -> None:
        """Keep what a view raised: a receiver of got_request_exception."""
        if getattr(request, "scope", {}).get("django_ws") is self:
            self._error = sys.exc_info()[1]

    def _raise_error(self) -> None:
        error, self._error = self._error, None
        if error is not None:
            raise error

    async def _raise_disconnect(self) -> NoReturn:
        self._raise_error()
        raise WebSocketDisconnect(*self._end)

    async def receive(self, wanted: str = "a message") -> Event:
        """Return the next event of the view (a mapping): a message, or the end."""
        if self._state == "closed":
            await self._raise_disconnect()
        try:
            async with asyncio.timeout(self.timeout):
                event = await self._received.get()
        except TimeoutError:
            what = f"{wanted} from the view of {self.scope['path']}"
            raise TimeoutError(f"waited {self.timeout} s for {what}") from None
        if event["type"] == SendEvent.CLOSE:
            code = event.get("code") or CloseCode.NORMAL_CLOSURE
            self._closed(code, event.get("reason") or "")
        return event

    def _closed(self, code: int, reason: str) -> None:
        self._state, self._end = "closed", (code, reason)
        gone = {"type": ReceiveEvent.DISCONNECT, "code": code, "reason": reason}
        self._sent.put_nowait(gone)
        while not self._received.empty():  # let a view go on that waits to send
            self._received.get_nowait()

    async def send(self, event: Event) -> None:
        """Send one event (a mapping) to the view: a message."""
        self._raise_error()
        if self._state == "closed":
            await self._raise_disconnect()
        self._sent.put_nowait(event)
        await asyncio.sleep(0)  # let the view run

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


def _test_headers(client: Any, host: str) -> dict[str, Any]:
    """Return the headers of a handshake by one of Django's test clients, by name."""
    lines = {
        "host": host or client.defaults.get("SERVER_NAME", "testserver"),
        "connection": "Upgrade",
        "upgrade": "websocket",
        "cookie": client.cookies.output([], "", ";").strip() or None,
    }
    for name, value in client.defaults.items():
        if name.startswith("HTTP_") or is_async(client.request):
            lines[name.removeprefix("HTTP_").replace("_", "-").lower()] = value
    return lines


def _test_scope(
    client: Any, path: str, headers: Any, subprotocols: abc.Iterable[str]
) -> Scope:
    """Return the scope of a handshake by one of Django's test clients."""
    url = urlsplit(str(path))
    secure = url.scheme in ("https", "wss")
    lines = _test_headers(client, url.netloc) | {
        name.lower(): value for name, value in (headers or {}).items()
    }
    lines.setdefault("origin", f"http{'s' * secure}://{lines['host']}")
    return {
        "type": "websocket",
        "asgi": {"version": "3.0", "spec_version": "2.5"},
        "scheme": "wss" if secure else "ws",
        "path": unquote(url.path),
        "query_string": url.query.encode(),
        "headers": [
            (name.encode("ascii"), str(value).encode("latin-1"))
            for name, value in lines.items()
            if value is not None
        ],
        "client": ("127.0.0.1", 0),
        "server": ("testserver", 443 if secure else 80),
        "subprotocols": list(subprotocols),
        "extensions": {"websocket.http.response": {}},
    }


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

    `path` (str) may have a query string; `wss://testserver` before it makes
    it encrypted. `client`, one of Django's test clients, lends its cookies
    (so `force_login()` works) and keeps those of the answer, lends its default headers
    and `raise_request_exception`. `headers` (a mapping of str) adds to them or
    overrides; None takes one away. Host is `testserver` and Origin the same site.
    `subprotocols` (of str) are offered.

    `socket` has the `send_…`, `receive_…`, `iter_…` and `close` of `WebSocket`, and
    of the answer `subprotocol` (str or None), `headers` (a mapping that ignores case)
    and `cookies` (SimpleCookie). It waits `timeout` seconds at most for each message
    (None: for ever). When the block ends or is cancelled, the socket is closed with
    1000, and the view has the same time to end.

    Raises `WebSocketDenied` for a refusal, `TimeoutError`, and what the view raised,
    unless the client's `raise_request_exception` is off.
    """
    from django.test import AsyncClient

    client = client or AsyncClient()
    scope = _test_scope(client, path, headers, subprotocols)
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
        socket._raise_error()  # why the connection ended
        raise
    finally:
        signals.got_request_exception.disconnect(socket._store_error)
        if not task.done():
            hanging = TimeoutError(f"the view of {scope['path']} has not ended")
            socket._error = socket._error or hanging
            task.cancel()
            await asyncio.wait([task], timeout=1)
    client.cookies.update(socket.cookies)
    socket._raise_error()
    if not accepted:
        raise WebSocketDenied(socket._answer)
