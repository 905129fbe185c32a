"""A validator of ASGI's rules for applications, as wsgiref.validate is of WSGI's."""

import sys
from typing import Any

import pytest

FAILURES: list[BaseException] = []


def check_headers(headers: Any) -> None:
    for name, value in headers:
        assert type(name) is bytes and type(value) is bytes and name == name.lower()
        assert not set(b"\r\n\0") & {*name, *value}


def check_event(event: Any) -> None:
    """Check an application's event by the ASGI specification, "WebSocket" (2.5)."""
    kind = event["type"]
    if kind == "websocket.accept":
        assert isinstance(event.get("subprotocol"), str | None)
        check_headers(event.get("headers", ()))
    elif kind == "websocket.send":
        text, data = event.get("text"), event.get("bytes")
        assert (text is None) != (data is None)
        assert type(data) is bytes if text is None else text.encode() is not None
    elif kind == "websocket.close":
        code = event.get("code", 1000)
        assert code in {*range(1000, 1004), *range(1007, 1015), *range(3000, 5000)}
        assert len((event.get("reason") or "").encode()) <= 123
    elif kind == "websocket.http.response.start":
        assert type(event["status"]) is int and 200 <= event["status"] < 600
        check_headers(event.get("headers", ()))
    else:
        assert kind == "websocket.http.response.body" and type(event["body"]) is bytes


# Which events may follow, and what comes after each of them.
ANSWER = {
    "websocket.accept": "open",
    "websocket.close": "closed",
    "websocket.http.response.start": "refusing",
}


GRAMMAR: dict[str, dict[str, str]] = {
    "connecting": ANSWER,
    "open": {"websocket.send": "open", "websocket.close": "closed"},
    "refusing": {"websocket.http.response.body": "closed"},
    # The client left; an answer to the handshake does no harm, and uvicorn wants one.
    "left connecting": ANSWER,
    "left refusing": {"websocket.http.response.body": "", "websocket.close": ""},
}


def validated(application: Any) -> Any:
    """Wrap an application by a validator of ASGI's rules, as wsgiref.validate does."""

    async def validator(scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "websocket":
            await application(scope, receive, send)
            return
        state, receiving, tried = "connecting", False, False

        async def checked_receive() -> Any:
            nonlocal state, receiving
            assert not receiving, "receive() was called twice at once"
            receiving = True
            try:
                event = await receive()
            finally:
                receiving = False
            if event["type"] == "websocket.disconnect":
                state = f"left {state}"
            return event

        async def checked_send(event: Any) -> None:
            nonlocal state, tried
            before, tried = state, True
            try:
                allowed = GRAMMAR.get(state, {})
                assert event["type"] in allowed, f"{state}: {event}"
                check_event(event)
            except BaseException as error:
                print("ASGI violated:", repr(error), file=sys.stderr, flush=True)
                FAILURES.append(error)
                raise
            if not event.get("more_body"):
                state = allowed[event["type"]]
            try:
                await send(event)
            except Exception:
                state = before  # the server did not take it
                raise

        try:
            await application(scope, checked_receive, checked_send)
        except pytest.fail.Exception as failure:  # which is no Exception
            FAILURES.append(failure)
            raise
        else:
            if state == "connecting" and not tried:
                print("ASGI violated: no answer", scope["path"], file=sys.stderr)
                FAILURES.append(AssertionError("no answer to the handshake"))
        finally:
            state = "over"

    return validator
