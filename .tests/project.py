"""The project of the tests: its settings, views, middleware and URLs.

The tests import it, and servers in processes of their own serve `application`, with
settings from their environment (PROJECT). `LIVES` is the table of what views await.
"""

import asyncio
import contextlib
import contextvars
import copy
import functools
import json
import os
import pathlib
import re
import tempfile
import threading
import time
import types
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Any

import django
from asgiref.local import Local
from asgiref.sync import async_to_sync, iscoroutinefunction, sync_to_async
from django.conf import settings
from django.core.asgi import get_asgi_application
from django.core.exceptions import PermissionDenied
from django.db import DatabaseError, connection, models, transaction
from django.http import (
    Http404,
    HttpRequest,
    HttpResponse,
    JsonResponse,
    StreamingHttpResponse,
)
from django.template import engines
from django.template.response import TemplateResponse
from django.urls import get_urlconf, path, reverse
from django.utils import timezone, translation
from django.utils.decorators import (
    async_only_middleware,
    method_decorator,
    sync_and_async_middleware,
)
from django.utils.functional import SimpleLazyObject
from django.utils.translation import get_language
from django.views import View
from django.views.decorators.csrf import csrf_exempt

from django_ws import WebSocket, WebSocketDisconnect, broadcast, websocket, websockets
from validator import validated

HERE = pathlib.Path(__file__).resolve().parents[1]
TEMPORARY = tempfile.TemporaryDirectory()


DATABASE: dict[str, Any] = {
    "ENGINE": "django.db.backends.sqlite3",
    "NAME": f"{TEMPORARY.name}/test.sqlite3",
    "OPTIONS": {"timeout": 30},
}


APPS = [f"django.contrib.{name}" for name in ("auth", "contenttypes", "sessions")]
SENTRY = os.environ.get("SENTRY")  # where a process of the tests keeps Sentry's events


if SENTRY:
    import sentry_sdk
    from sentry_sdk.transport import Transport

    class ToFile(Transport):
        def capture_envelope(self, envelope: Any) -> None:
            with open(str(SENTRY), "a") as file:
                for item in envelope.items:
                    if item.type in ("event", "transaction"):
                        file.write(json.dumps(item.payload.json) + "\n")

    rate = 1.0 if "SENTRY_TRACES" in os.environ else None
    dsn = "http://key@127.0.0.1:9/1"
    sentry_sdk.init(
        dsn, transport=ToFile, send_default_pii=True, traces_sample_rate=rate
    )


# A process of the tests has settings of its own in its environment.
PROJECT: dict[str, Any] = json.loads(os.environ.get("PROJECT", "{}"))


settings.configure(
    **{
        "SECRET_KEY": "test" * 9,
        "ALLOWED_HOSTS": ["127.0.0.1", "localhost", "testserver", ".example.com"]
        + ["[::1]"],
        "ROOT_URLCONF": "project",
        "INSTALLED_APPS": APPS,
        "DATABASES": {"default": DATABASE},
        "PASSWORD_HASHERS": ["django.contrib.auth.hashers.MD5PasswordHasher"],
        "LOGGING_CONFIG": None,
        "USE_TZ": True,
        **PROJECT,
    }
)


if "opentelemetry" in os.environ.get("INSTRUMENT", ""):
    from opentelemetry import trace
    from opentelemetry.instrumentation.django import DjangoInstrumentor
    from opentelemetry.sdk.trace import TracerProvider

    trace.set_tracer_provider(TracerProvider())
    DjangoInstrumentor().instrument()


django.setup()

from django.contrib.auth import login  # noqa: E402
from django.contrib.auth.decorators import (  # noqa: E402
    login_not_required,
    login_required,
)
from django.contrib.auth.mixins import LoginRequiredMixin  # noqa: E402
from django.contrib.auth.models import User  # noqa: E402

CONTRIB = "django.contrib"


SESSIONS = [
    "django.contrib.sessions.middleware.SessionMiddleware",
    "django.contrib.auth.middleware.AuthenticationMiddleware",
]


COMMON = "django.middleware.common.CommonMiddleware"
SECURITY = "django.middleware.security.SecurityMiddleware"
LOCALE = "django.middleware.locale.LocaleMiddleware"
SIZE = min(32, (os.cpu_count() or 1) + 4)  # of the pools of threads
TEMPLATES = [{"BACKEND": "django.template.backends.django.DjangoTemplates"}]
own = types.SimpleNamespace()  # what middleware of a test uses


def around_view(function: Any) -> Any:
    """Make middleware of a function of the request and of get_response."""
    return lambda get_response: lambda request: function(request, get_response)


def middleware(*names: str) -> list[str]:
    return [f"{__name__}.{name}" for name in names]


def urlconf(*urlpatterns: Any, **names: Any) -> Any:
    module = types.ModuleType("urlconf")
    vars(module).update(names, urlpatterns=urlpatterns)
    return module


async def echo(socket: WebSocket) -> None:
    await socket.accept(headers={"X-Echo": "yes"})
    async for message in socket:
        if isinstance(message, str):
            await socket.send_text(message)
        else:
            await socket.send_bytes(message)


async def accepting(socket: WebSocket, *args: Any, **kwargs: Any) -> None:
    await socket.accept()
    await socket.send_json([args, kwargs])


async def member(socket: WebSocket) -> None:
    """A member of the group "room", who obeys some commands."""
    await socket.accept()
    await socket.join("room")
    await socket.send_text("joined")
    async for message in socket:
        if message == "pid":
            await socket.send_json(os.getpid())
        elif message == "memory":  # not ru_maxrss: that is the parent's at the fork
            status = pathlib.Path("/proc/self/status").read_text()
            [kilobytes] = re.findall(r"VmHWM:\s+(\d+) kB", status)
            await socket.send_text(kilobytes)
        elif isinstance(message, str) and message.startswith("count "):
            for number in range(int(message.split()[1])):
                await broadcast("room", f"{number:20}")
        else:
            await broadcast("room", message)


async def ticking(socket: WebSocket) -> None:
    await socket.accept()
    await socket.receive_text()
    for number in range(60):
        await broadcast("room", str(number))
        await asyncio.sleep(0.05)


def announce(request: HttpRequest) -> HttpResponse:
    try:
        async_to_sync(broadcast)("room", {"sync": request.GET["text"]})
    except Exception as error:
        return HttpResponse(f"{type(error).__module__}.{type(error).__name__}")
    return HttpResponse("announced")


async def denying(socket: WebSocket) -> HttpResponse:
    return HttpResponse("a page", status=401, headers={"X-Why": "because"})


async def closing(socket: WebSocket, code: int = 0) -> None:
    if code:
        await socket.accept()
    await socket.close(code or 1000, "because")


async def leaving(socket: WebSocket) -> None:
    await socket.accept()
    try:
        await socket.receive_text()
    except WebSocketDisconnect as end:
        print(f"left {end.code} {end.reason}.", flush=True)


async def polling(socket: WebSocket) -> None:
    await socket.accept()
    while True:
        try:
            async with asyncio.timeout(0.001):
                message = await socket.receive_text()
        except TimeoutError:
            continue
        await socket.send_text(message)


async def idling(socket: WebSocket) -> None:
    await socket.accept()
    await socket.receive()
    await asyncio.sleep(5)


async def flooding(socket: WebSocket) -> None:
    await socket.accept()
    for number in range(64):
        await socket.send_bytes(bytes(2**20))
    print("flooded", flush=True)


async def raw_asgi(scope: Any, receive: Any, send: Any) -> None:
    """What some of these views do, by ASGI alone: what a server itself cannot do."""
    await receive()
    what, *code = scope["path"].strip("/").split("/")[1:]
    if what == "deny":
        if "websocket.http.response" not in scope.get("extensions", {}):
            await send({"type": "websocket.close"})
            return
        start = {"type": "websocket.http.response.start", "status": 401}
        await send({**start, "headers": [(b"x-why", b"because")]})
        await send({"type": "websocket.http.response.body", "body": b"a page"})
        return
    await send({"type": "websocket.accept", "headers": [(b"x-echo", b"yes")]})
    if what == "close":
        close = {"type": "websocket.close", "code": int(code[0]), "reason": "because"}
        await send(close)
        return
    if what == "idle":
        await asyncio.sleep(5)
    if what == "flood":
        for number in range(64):
            await send({"type": "websocket.send", "bytes": bytes(2**20)})
        return print("flooded", flush=True)
    event = None
    while event is None or event["type"] == "websocket.receive":
        if event is not None:
            message = {name: event.get(name) for name in ("text", "bytes")}
            await send({"type": "websocket.send", **message})
        try:
            async with asyncio.timeout(0.001 if what == "poll" else None):
                event = await receive()
        except TimeoutError:
            event = None
    if what == "left":
        print(f"left {event.get('code')} {event.get('reason') or ''}.", flush=True)


async def reader(socket: Any) -> None:
    async for _ in socket:
        pass


async def pusher(socket: Any) -> None:
    await socket.send_text(await asyncio.Queue[str]().get())


async def reads(socket: Any) -> None:
    await socket.receive_text()


async def silent(socket: Any) -> None:
    await asyncio.sleep(3600)


async def subscribes(socket: Any) -> None:
    await socket.receive_text()
    await asyncio.sleep(3600)


async def reads_in_view(socket: Any) -> None:
    async with asyncio.TaskGroup() as group:
        group.create_task(pusher(socket))
        await reader(socket)


async def reads_in_task(socket: Any) -> None:
    async with asyncio.TaskGroup() as group:
        group.create_task(reader(socket))
        await pusher(socket)


async def raises_in_task(socket: Any) -> None:
    async with asyncio.TaskGroup() as group:
        group.create_task(reads(socket))
        group.create_task(pusher(socket))


async def waits(socket: Any) -> None:
    tasks = [asyncio.create_task(one(socket)) for one in (reader, pusher)]
    try:
        await asyncio.wait(tasks)
    finally:
        for task in tasks:
            task.cancel()


async def gathers(socket: Any) -> None:
    await asyncio.gather(reader(socket), pusher(socket))


async def waits_for(socket: Any) -> None:
    with contextlib.suppress(WebSocketDisconnect):
        await asyncio.wait_for(socket.receive_text(), 7200)
    await asyncio.sleep(5)


async def waits_for_one(socket: Any) -> None:
    jobs = [asyncio.create_task(one(socket)) for one in (reader, silent)]
    _, [other] = await asyncio.wait(jobs, return_when=asyncio.FIRST_COMPLETED)
    other.cancel()
    await asyncio.sleep(5)


async def child_cleans_up(socket: Any) -> None:
    async def child() -> None:
        await reader(socket)
        await asyncio.sleep(5)

    async with asyncio.TaskGroup() as group:
        group.create_task(child())
        group.create_task(silent(socket))


async def cleans_up(socket: Any) -> None:
    await reader(socket)
    await asyncio.sleep(5)


async def cleans_up_for_ever(socket: Any) -> None:
    await reader(socket)
    await asyncio.sleep(3600)


async def swallows(socket: Any, times: int = 1) -> None:
    for _ in range(times):
        with contextlib.suppress(asyncio.CancelledError):
            await asyncio.sleep(3600)
    await asyncio.sleep(3600)


async def leaves_a_reader(socket: Any) -> None:
    task = asyncio.create_task(reads(socket))
    try:
        await asyncio.sleep(3600)
    finally:
        with contextlib.suppress(WebSocketDisconnect):
            await task


async def fails_in_a_group_before(socket: Any) -> None:
    """Until Python 3.13 that leaves a cancellation of the view's task behind."""

    async def failing() -> None:
        raise ValueError

    with contextlib.suppress(ExceptionGroup):
        async with asyncio.TaskGroup() as group:
            group.create_task(silent(socket))
            group.create_task(failing())
    await asyncio.sleep(3600)


async def listens_in_between(socket: Any) -> None:
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(0.1):
            while True:
                await socket.receive_text()
    await asyncio.sleep(3600)


async def expires(socket: Any) -> None:
    async with asyncio.timeout(7200):
        await asyncio.sleep(3600)


async def pushers_hear(socket: Any) -> None:
    """Each of many tasks hears of the end once; that is not asking again and again."""

    async def push() -> None:
        with contextlib.suppress(WebSocketDisconnect):
            while True:
                await socket.send_text("x")
                await asyncio.sleep(0.5)

    tasks = [asyncio.create_task(push()) for _ in range(20)]
    await reader(socket)
    await asyncio.wait(tasks)
    await asyncio.sleep(5)


def for_ever(call: Any) -> Any:
    async def view(socket: Any) -> None:
        while True:
            try:
                await call(socket)
            except Exception:
                continue

    return view


# What a view does; how it is to end when its client leaves; and how many seconds after
# that at the earliest and at the latest. A view that was told of the end may clean up;
# one that was not is cancelled, and so is one that keeps asking.
LIVES: dict[str, tuple[Any, str, float, float]] = {
    "reads": (reads, "WebSocketDisconnect", 0, 0),
    "iterates": (reader, "returned", 0, 0),
    "sleeps": (silent, "CancelledError", 0, 1),
    "reads once": (subscribes, "CancelledError", 0, 1),
    "group, reads in view": (reads_in_view, "CancelledError", 10, 10),
    "group, reads in task": (reads_in_task, "CancelledError", 10, 10),
    "group, raises in task": (raises_in_task, "ExceptionGroup", 0, 0),
    "wait": (waits, "CancelledError", 10, 10),
    "gather": (gathers, "CancelledError", 10, 10),
    "wait_for, then cleans up": (waits_for, "returned", 5, 5),
    "wait for one, then cleans up": (waits_for_one, "returned", 5, 5),
    "its child cleans up": (child_cleans_up, "CancelledError", 10, 10),
    "cleans up": (cleans_up, "returned", 5, 5),
    "cleans up for ever": (cleans_up_for_ever, "CancelledError", 10, 10),
    "swallows": (swallows, "CancelledError", 10, 11),
    "swallows thrice": (lambda s: swallows(s, 3), "CancelledError", 30, 31),
    "leaves a reader behind": (leaves_a_reader, "CancelledError", 10, 10),
    "failed in a group before": (fails_in_a_group_before, "CancelledError", 0, 1),
    "listens in between": (listens_in_between, "CancelledError", 0, 1),
    "has a timeout of its own": (expires, "CancelledError", 0, 1),
    "many hear of it": (pushers_hear, "returned", 5, 6),
    "receives for ever": (for_ever(WebSocket.receive_json), "CancelledError", 0, 0),
    "sends for ever": (
        for_ever(lambda socket: socket.send_text("x")),
        *("CancelledError", 0, 0),
    ),
    "broadcasts for ever": (
        for_ever(lambda socket: broadcast("empty", "x")),
        *("CancelledError", 0, 1),
    ),
    "joins for ever": (
        for_ever(lambda socket: socket.join("alone")),
        *("CancelledError", 0, 1),
    ),
    "closes for ever": (for_ever(WebSocket.close), "CancelledError", 0, 10),
}


async def living(socket: WebSocket, name: str) -> None:
    """Live a life, and tell how it ended."""
    await socket.accept()
    print(f"{name} has begun.", flush=True)
    try:
        await LIVES[name][0](socket)
    finally:
        print(f"{name} has ended.", flush=True)


def query(sql: str) -> Any:
    with connection.cursor() as cursor:
        cursor.execute(sql)
        return cursor.fetchone()[0] if cursor.description else None


async def querying(socket: WebSocket) -> None:
    """Run what the client sends, statement for statement."""
    await socket.accept()
    async for sql in socket.iter_text():
        await socket.send_json(await sync_to_async(query)(sql))


async def querying_always(socket: WebSocket) -> None:
    await socket.accept()
    while True:
        try:
            await socket.send_json(await sync_to_async(query)("SELECT 1"))
        except Exception as error:
            await socket.send_json(str(error))
        await asyncio.sleep(0.3)


async def forbearing(socket: WebSocket) -> None:
    """Leave autocommit off over an await."""
    await socket.accept()
    await sync_to_async(transaction.set_autocommit)(False)
    await sync_to_async(query)("INSERT INTO notes VALUES ('forbearing')")
    await socket.send_text("uncommitted")
    await asyncio.Event().wait()


async def transacting(socket: WebSocket) -> None:
    """Open a transaction, and leave it or leave it open."""
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
    """A table that every PostgreSQL has."""

    name: Any = models.TextField(primary_key=True)

    class Meta:
        app_label, managed, db_table = "tests", False, "pg_settings"


async def chunking(socket: WebSocket) -> None:
    """Read rows in chunks, each in a hop of its own."""
    await socket.accept()
    await socket.receive_text()
    rows = Setting.objects.order_by("name")[:200].aiterator(20)
    await socket.send_json([row.name async for row in rows])


async def querying_before(socket: WebSocket) -> None:
    await sync_to_async(query)("SELECT 1")


@around_view
def refusing(request: Any, get_response: Any) -> Any:
    if request.path == "/refuse/":
        return HttpResponse(str(query("SELECT 1")), status=403)
    return get_response(request)


urlpatterns = [
    websocket("echo/", echo),
    websocket("room/", member),
    websocket("tick/", ticking),
    path("announce/", announce),
    websocket("deny/", denying),
    websocket("close/<int:code>/", closing),
    websocket("left/", leaving),
    websocket("poll/", polling),
    websocket("idle/", idling),
    websocket("flood/", flooding),
    websocket("live/<name>/", living),
    websocket("query/", querying),
    websocket("always/", querying_always),
    websocket("forbear/", forbearing),
    websocket("transact/", transacting),
    websocket("chunks/", chunking),
    websocket("leave/", querying_before),
]


async def ending(socket: WebSocket, how: str) -> Any:
    """End in one of many ways."""
    own.loop = asyncio.get_running_loop()
    if how == "returned":
        return HttpResponse(status=401)
    if how == "denied":
        raise PermissionDenied
    await socket.accept()
    await socket.join("room")
    message = await socket.receive_text()
    jobs: dict[str, Any] = {
        "query": lambda: sync_to_async(int)(5),
        "bad": socket.receive_bytes,
        "close": lambda: socket.close(4000),
        "asleep": lambda: asyncio.sleep(3600),
        "group": lambda: raises_in_task(socket),
        "gone": lambda: reader(socket),
        "error": lambda: raising(ValueError(message))(socket),
    }
    await jobs.get(how, lambda: broadcast("empty", "x"))()


@functools.cache
def ours() -> Any:
    """Made when it is first asked, for middleware is defined further down."""
    return validated(websockets(get_asgi_application()))


async def application(scope: Any, receive: Any, send: Any) -> None:
    raw = scope.get("path", "").startswith("/raw/")
    await (raw_asgi if raw else ours())(scope, receive, send)


WebSocket.GRACE = float(os.environ.get("GRACE", WebSocket.GRACE))


class Accepting(View):
    greeting = "hello"

    async def get(self, socket: WebSocket, **kwargs: Any) -> None:
        await accepting(socket, self.greeting, **kwargs)


class Synchronous(View):
    def get(self, socket: WebSocket) -> None:
        raise AssertionError


class AsyncCallable:
    async def __call__(self, socket: WebSocket) -> None:
        await accepting(socket, "object")


def passing(view: Any) -> Any:
    """A decorator that knows nothing of async."""

    @functools.wraps(view)
    def wrapper(request: Any, *args: Any, **kwargs: Any) -> Any:
        return view(request, *args, **kwargs)

    return wrapper


class Lazy:
    """An awaitable that is no coroutine."""

    def __init__(self, socket: WebSocket) -> None:
        self.socket = socket

    def __await__(self) -> Any:
        return accepting(self.socket, "lazy").__await__()


async def where(socket: WebSocket, pk: int = 0) -> None:
    await accepting(socket, get_language(), socket.path, reverse("here"))


async def whoami(socket: Any) -> Any:
    user = await socket.auser()
    await accepting(socket, str(user))


@login_not_required
async def public(socket: Any) -> Any:
    await accepting(socket)


class Mixed(LoginRequiredMixin, Accepting):
    pass


@method_decorator(login_required, name="dispatch")
class Decorated(Accepting):
    pass


@method_decorator(csrf_exempt, name="dispatch")
class Exempt(Accepting):
    pass


@around_view
def tagging(request: Any, get_response: Any) -> Any:
    request.tag = threading.current_thread()
    response = get_response(request)
    response["X-Tag"] = "tagged"
    response["Content-Length"] = str(len(response.content))
    response.set_cookie("flavour", "oat", httponly=True, max_age=60)
    response.set_cookie("size", "small")
    return response


@async_only_middleware
def async_only(get_response: Any) -> Any:
    async def middleware(request: HttpRequest) -> Any:
        setattr(request, "asynchronous", True)
        await asyncio.sleep(0)
        response = await get_response(request)
        response["X-Async"] = "yes"
        return response

    return middleware


@sync_and_async_middleware
@around_view
def both_ways(request: Any, get_response: Any) -> Any:
    request.synchronous = not iscoroutinefunction(get_response)
    return get_response(request)


@around_view
def replacing(request: Any, get_response: Any) -> Any:
    request = copy.copy(request)
    request.tenant = "blue"
    return get_response(request)


def other_urls(get_response: Any) -> Any:
    other = urlconf(websocket("o/", where, name="here"))

    def middleware(request: HttpRequest) -> Any:
        setattr(request, "urlconf", other)
        return get_response(request)

    return middleware


def teapot(get_response: Any) -> Any:
    return lambda request: HttpResponse("short and stout", status=418)


@around_view
def unavailable(request: Any, get_response: Any) -> Any:
    response = get_response(request)
    response.status_code = 503
    return response


def failed_csrf(request: HttpRequest, reason: str) -> HttpResponse:
    return HttpResponse(reason, status=418)


def template_response(request: Any, *view: Any) -> HttpResponse:
    template = engines["django"].from_string("rendered {{ what }}")
    return TemplateResponse(request, template, {"what": "late"}, status=402)


def failing_response(request: Any) -> HttpResponse:
    class Failing(TemplateResponse):
        @property
        def rendered_content(self) -> Any:
            raise LookupError("while it is rendered")

    return Failing(request, "page.html", {})


def streaming(request: Any) -> StreamingHttpResponse:
    async def parts() -> AsyncIterator[str]:
        for number in range(3):
            await asyncio.sleep(0)
            yield f"part {number} "

    return StreamingHttpResponse(parts(), status=503)


def broken_stream() -> StreamingHttpResponse:
    def parts() -> Iterator[str]:
        yield "part 0"
        raise ValueError("while it is read")

    return StreamingHttpResponse(parts(), status=403)


def with_everything(request: Any) -> HttpResponse:
    about = {"X-Why": "because", "Vary": "X-Own", "Content-Length": "16"}
    response = JsonResponse({"detail": "no"}, status=401, headers=about)
    response.set_cookie("seen", "1")
    return response


def custom(code: int) -> Any:
    """An error handler; the one for 403 renders as late as it can."""

    def handler(request: HttpRequest, exception: Any = None) -> HttpResponse:
        if code != 403:
            return HttpResponse(f"custom {code}: {exception}", status=code)
        template = engines["django"].from_string("custom 403: {{ why }}")
        return TemplateResponse(request, template, {"why": exception}, status=403)

    return handler


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


async def forgetting(socket: WebSocket) -> None:
    pass


class Dispatching(Accepting):
    def dispatch(self, request: Any, *args: Any, **kwargs: Any) -> Any:
        raise Http404("dispatched")


HANDLERS = {f"handler{code}": custom(code) for code in (403, 404, 500)}
viewed: list[str] = []


class Rescue:
    """Middleware with all of Django's hooks."""

    def __init__(self, get_response: Any) -> None:
        self.get_response = get_response

    def __call__(self, request: HttpRequest) -> Any:
        return self.get_response(request)

    def process_view(self, *args: Any) -> None:
        viewed.append("process_view")

    def process_template_response(self, request: HttpRequest, response: Any) -> Any:
        response.context_data["what"] = "very late"
        return response

    def process_exception(self, request: HttpRequest, error: Exception) -> Any:
        if isinstance(error, LookupError):
            return HttpResponse("rescued", status=409)
        return None


def hooked(**hooks: Any) -> Any:
    """Middleware whose class has just these hooks."""

    class Hooked:
        def __init__(self, get_response: Any) -> None:
            self.get_response = get_response

        def __call__(self, request: HttpRequest) -> Any:
            return self.get_response(request)

    for name, hook in hooks.items():
        setattr(Hooked, name, lambda self, *args, hook=hook, **kwargs: hook(*args))
    return Hooked


def hook(get_response: Any) -> Any:
    return own.hook(get_response)


def refuses(*args: Any) -> None:
    raise PermissionDenied("by middleware")


def fails(*args: Any) -> None:
    raise ValueError("in middleware")


def takes(what: Any) -> Any:
    return lambda get_response: lambda request: what(get_response(request))


STARTPROJECT = [SECURITY, SESSIONS[0], LOCALE, COMMON]
STARTPROJECT += ["django.middleware.csrf.CsrfViewMiddleware", SESSIONS[1]]
STARTPROJECT += ["django.middleware.clickjacking.XFrameOptionsMiddleware"]
request_id: contextvars.ContextVar[str] = contextvars.ContextVar("request_id")
local = Local()


@contextlib.contextmanager
def surrounded(request: HttpRequest) -> Iterator[None]:
    """Set what middleware sets, and set it back afterwards."""
    token = request_id.set(request.GET["who"])
    local.who = request.GET["who"]
    try:
        with translation.override("de"), timezone.override("Asia/Tokyo"):
            yield
    finally:
        request_id.reset(token)
        del local.who


@around_view
def around(request: Any, get_response: Any) -> Any:
    with surrounded(request):
        return get_response(request)


@async_only_middleware
def around_async(get_response: Any) -> Any:
    async def middleware(request: HttpRequest) -> Any:
        with surrounded(request):
            return await get_response(request)

    return middleware


@around_view
def own_urls(request: Any, get_response: Any) -> Any:
    request.urlconf = own.urls
    return get_response(request)


def synchronous(get_response: Any) -> Any:
    return lambda request: get_response(request)


def surroundings() -> list[Any]:
    urls = getattr(get_urlconf(), "__name__", None)
    zone = timezone.get_current_timezone_name()
    who = [request_id.get(None), getattr(local, "who", None)]
    return [*who, get_language(), zone, urls]


@around_view
def just_a_user(request: Any, get_response: Any) -> Any:
    """As middleware for tokens does."""
    request.user = SimpleLazyObject(User.objects.first)
    return get_response(request)


AUTH = f"{CONTRIB}.auth.context_processors.auth"
WHO = {"context_processors": [AUTH]}
marks = threading.local()


@around_view
def marking(request: Any, get_response: Any) -> Any:
    """As packages for tenants and for the "current user" do."""
    marks.who = request.GET["who"]
    setattr(connection, "tenant", request.GET["who"])
    return get_response(request)


def look() -> set[Any]:
    connection.ensure_connection()
    return {getattr(marks, "who", None), getattr(connection, "tenant", None)} - {None}


@around_view
def stuck(request: Any, get_response: Any) -> Any:
    if request.GET:
        own.release.wait(60)
    return get_response(request)


async def counting(socket: WebSocket) -> None:
    await socket.accept()
    async for _ in socket:
        await socket.send_json(await User.objects.acount())


async def names_of_users(socket: Any) -> None:
    user = await socket.auser()
    await socket.accept()
    async for message in socket.iter_text():
        if message == "fail":
            raise LookupError
        users = [user.username async for user in User.objects.order_by("id")]
        await socket.send_json([str(user), *users])


async def refusing_users(socket: Any) -> None:
    await User.objects.acount()


IN_TEST = urlconf(
    websocket("ws/", names_of_users), websocket("refused/", refusing_users)
)


TENANTS_MODELS = """
from django_tenants.models import DomainMixin, TenantMixin


class Client(TenantMixin):
    auto_create_schema = False


class Domain(DomainMixin):
    pass
"""


TENANTS = {
    "DATABASE_ROUTERS": ["django_tenants.routers.TenantSyncRouter"],
    "MIDDLEWARE": ["django_tenants.middleware.main.TenantMainMiddleware"],
    "INSTALLED_APPS": [*APPS, "django_tenants", "tenants"],
    "SHARED_APPS": ["django_tenants", "tenants"],
    "TENANT_APPS": ["django.contrib.contenttypes"],
    "TENANT_MODEL": "tenants.Client",
    "TENANT_DOMAIN_MODEL": "tenants.Domain",
    "DEFAULT_AUTO_FIELD": "django.db.models.BigAutoField",
}


def whose(tenant: Any = None) -> Any:
    """Whose notes there are, on the connection as it is or for one tenant."""
    from django_tenants.utils import tenant_context

    with tenant_context(tenant) if tenant else contextlib.nullcontext():
        try:
            return query("SELECT owner FROM notes")
        except DatabaseError:
            return None  # the public schema has no such table


async def tenanted(socket: Any) -> None:
    """Look with and without asking for the tenant."""
    looks = [await sync_to_async(whose)(tenant) for tenant in (None, socket.tenant)]
    await socket.accept()
    if socket.GET:  # ask for the tenant once, as middleware does, and look later
        await sync_to_async(lambda: getattr(connection, "set_tenant")(socket.tenant))()
    await socket.send_text("ready")
    await socket.receive_text()
    looks += [await sync_to_async(whose)(tenant) for tenant in (None, socket.tenant)]
    await socket.send_json([socket.tenant.schema_name, *looks])


urlpatterns.append(websocket("tenant/", tenanted))


async def stop_reading(socket: WebSocket, drive: Any) -> None:
    """Join, stop the client from reading, and broadcast two messages."""
    await socket.accept()
    await socket.join("room")
    drive.reads.clear()
    for message in "ab":
        await broadcast("room", message)


async def repeating_as_error(socket: WebSocket) -> None:
    await socket.accept()
    raise ValueError(await socket.receive_text())


async def greeting_as_error(socket: WebSocket) -> None:
    await socket.accept()
    await socket.send_text("first")
    raise KeyError("after")


async def closing_as_error(socket: WebSocket) -> None:
    await socket.close()
    raise ValueError("later")


@around_view
def slowly(request: Any, get_response: Any) -> Any:
    time.sleep(0.5)
    return get_response(request)


async def silent_after_accept(socket: WebSocket) -> None:
    await socket.accept()
    await silent(socket)


async def stubborn(socket: WebSocket) -> None:
    await socket.accept()
    await swallows(socket)


async def bare(scope: Any, receive: Any, send: Any) -> None:
    """Any ASGI application: what it does is its path."""
    if scope["path"] == "/closes/":
        await send({"type": "websocket.close"})
    elif scope["path"] == "/parts/":
        await send({"type": "websocket.http.response.start", "status": 401})
        for part in (b"not ", b"you"):
            event = {"type": "websocket.http.response.body", "body": part}
            await send({**event, "more_body": part == b"not "})
    else:
        assert (await receive())["type"] == "websocket.connect"
        await send({"type": "websocket.accept", "subprotocol": None})
        assert (await receive())["text"] == "hi"
        if scope["path"] == "/hangs/":
            await asyncio.sleep(3600)
        if scope["path"] == "/error/":
            raise OSError("its own")


@around_view
def tag_sentry(request: Any, get_response: Any) -> Any:
    if who := request.GET.get("who"):
        request.user = User(pk=1, username=who)
        sentry_sdk.set_user({"username": who})
        sentry_sdk.set_tag("middleware", who)
    return get_response(request)


async def tagged(socket: WebSocket) -> None:
    who = socket.GET.get("who")
    if who:
        sentry_sdk.set_tag("before", who)
        sentry_sdk.add_breadcrumb(message=f"breadcrumb of {who}")
    if socket.GET.get("fail"):
        raise LookupError(who)
    await socket.accept()
    if who:
        sentry_sdk.set_context("own", {"who": who})
        await sync_to_async(sentry_sdk.set_tag)("thread", who)
    await socket.send_text("tagged")
    await socket.receive_text()
    raise LookupError(who)


def failing_page(request: HttpRequest) -> HttpResponse:
    raise LookupError(request.GET.get("who"))


urlpatterns += [websocket("tagged/", tagged), path("fails/", failing_page)]


if "SENTRY_MIDDLEWARE" in os.environ:
    from sentry_sdk.integrations.asgi import SentryAsgiMiddleware

    application = SentryAsgiMiddleware(application)


ZOO_PACKAGES = """allauth corsheaders csp debug_toolbar django_hosts django_htmx
    django_structlog opentelemetry.instrumentation.asgi sentry_sdk silk simple_history
    opentelemetry.instrumentation.django opentelemetry.sdk waffle whitenoise""".split()


ZOO_MODELS = """
from django.db import models
from simple_history.models import HistoricalRecords


class Note(models.Model):
    text = models.TextField()
    history = HistoricalRecords()
"""


ZOO: dict[str, Any] = {
    "DEBUG": True,
    "INTERNAL_IPS": ["127.0.0.1"],
    "ROOT_HOSTCONF": "zoo",
    "ROOT_URLCONF": "zoo",
    "DEFAULT_HOST": "www",
    "DEFAULT_AUTO_FIELD": "django.db.models.BigAutoField",
    "STATIC_URL": "static/",
    "CORS_ALLOW_ALL_ORIGINS": True,
    "CONTENT_SECURITY_POLICY": {"DIRECTIVES": {"default-src": ["'self'"]}},
    "DEBUG_TOOLBAR_CONFIG": {"IS_RUNNING_TESTS": False},
    "AUTHENTICATION_BACKENDS": [
        "django.contrib.auth.backends.ModelBackend",
        "allauth.account.auth_backends.AuthenticationBackend",
    ],
    "TEMPLATES": [
        {
            **TEMPLATES[0],
            "APP_DIRS": True,
            "OPTIONS": {
                "context_processors": [
                    "django.template.context_processors.request",
                    AUTH,
                    f"{CONTRIB}.messages.context_processors.messages",
                ]
            },
        }
    ],
    "INSTALLED_APPS": [*APPS, f"{CONTRIB}.messages", f"{CONTRIB}.staticfiles"]
    + "allauth allauth.account corsheaders csp debug_toolbar django_hosts".split()
    + "django_htmx django_structlog notes silk simple_history waffle".split(),
    "MIDDLEWARE": [
        "django_hosts.middleware.HostsRequestMiddleware",
        "debug_toolbar.middleware.DebugToolbarMiddleware",
        "corsheaders.middleware.CorsMiddleware",
        SECURITY,
        "whitenoise.middleware.WhiteNoiseMiddleware",
        "csp.middleware.CSPMiddleware",
        *STARTPROJECT[1:],
        "allauth.account.middleware.AccountMiddleware",
        "django.contrib.messages.middleware.MessageMiddleware",
        "django_htmx.middleware.HtmxMiddleware",
        "django_structlog.middlewares.RequestMiddleware",
        "simple_history.middleware.HistoryRequestMiddleware",
        "waffle.middleware.WaffleMiddleware",
        "silk.middleware.SilkyMiddleware",
        "django_hosts.middleware.HostsResponseMiddleware",
    ],
}


ZOO_URLS = """
import project as tests
from debug_toolbar.toolbar import debug_toolbar_urls
from django.urls import include, path
from django_hosts import host, patterns
from django_ws import websocket


class other:
    urlpatterns = [websocket("ws/", tests.echo), *debug_toolbar_urls()]


urlpatterns = [
    path("", tests.zoo_page), websocket("ws/", tests.zoo_view), *debug_toolbar_urls(),
    path("accounts/", include("allauth.urls")), path("silk/", include("silk.urls")),
]
host_patterns = patterns(
    "", host("other", other, name="other"), host("www", "zoo", name="www")
)
"""


open_sockets: set[Any] = set()


def zoo_look(socket: Any) -> dict[str, Any]:
    """What the middleware left, seen from a view's synchronous code."""
    import waffle
    from notes.models import Note

    note = Note.objects.create(text=socket.GET["who"])
    user = note.history.get().history_user
    return {"history": str(user), "flag": waffle.flag_is_active(socket.request, "beta")}


async def zoo_view(socket: Any) -> Any:
    import structlog

    open_sockets.add(socket)
    try:
        if socket.GET["how"] == "close":
            return await socket.close()
        if socket.GET["how"] == "raise":
            raise LookupError(socket.GET["who"])
        await socket.accept()
        async for message in socket.iter_text():
            if message == "raise":
                raise LookupError(socket.GET["who"])
            span = trace.get_current_span().get_span_context()
            variables = structlog.contextvars.get_contextvars()
            await socket.send_json(
                {
                    "user": socket.user.username,
                    "request_id": variables.get("request_id"),
                    "htmx": bool(socket.htmx),
                    "trace": span.trace_id,
                    "host": socket.host.name,
                    **await sync_to_async(zoo_look)(socket),
                }
            )
    finally:
        open_sockets.discard(socket)


def zoo_page(request: HttpRequest) -> HttpResponse:
    how, who = request.GET.get("how"), request.GET.get("who", "")
    if how == "raise":
        raise LookupError(who)
    if how == "enter":
        backend = "django.contrib.auth.backends.ModelBackend"
        login(request, User.objects.get(username=who), backend)
    return HttpResponse(f"<body>{len(open_sockets)} open</body>")


# The origins of handshakes: Origin, Host, settings, and the status of the answer.
TRUSTED: dict[str, Any] = {"CSRF_TRUSTED_ORIGINS": ["https://app.org"]}
WILDCARD: dict[str, Any] = {"CSRF_TRUSTED_ORIGINS": ["https://*.app.org"]}
LOCAL: dict[str, Any] = {"ALLOWED_HOSTS": [], "DEBUG": True}
ANY: dict[str, Any] = {"ALLOWED_HOSTS": ["*"]}
CHECKED: dict[str, Any] = {"MIDDLEWARE": [COMMON]}
SECURE: dict[str, Any] = {"scheme": "wss"}


PORTS: dict[str, Any] = {
    "CSRF_TRUSTED_ORIGINS": ["https://app.org:8443", "https://*.app.net:8443"]
}


PROXIED: dict[str, Any] = {
    "more": [(b"x-forwarded-host", b"example.com"), (b"x-forwarded-proto", b"https")]
}


BY_PROTO = {**PROXIED, "SECURE_PROXY_SSL_HEADER": ("HTTP_X_FORWARDED_PROTO", "https")}
BY_BOTH = {**BY_PROTO, "USE_X_FORWARDED_HOST": True}
SPOOFED = {"more": [(b"x_forwarded_proto", b"https")]}


#: The Origin, the Host, options, and the status of the answer; among them are what the
#: tests of Django (csrf_tests) and of Channels (security) ask. Channels lets every
#: origin in at ALLOWED_HOSTS = ["*"], and nobody without one: we do not.
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
    ("https://app.org", "example.com", WILDCARD, 101),  # the apex, as in Django
    ("https://app.org:8443", "example.com", PORTS, 101),
    ("https://app.org", "example.com", PORTS, 403),
    ("https://a.app.net:8443", "example.com", PORTS, 101),
    ("https://a.app.net", "example.com", PORTS, 403),
    # Over TLS.
    ("https://example.com", "example.com", SECURE, 101),
    ("http://example.com", "example.com", SECURE, 403),
    ("wss://example.com", "example.com", SECURE, 403),
    ("https://example.com:443", "example.com", SECURE, 403),
    ("https://example.com", "example.com:443", SECURE, 403),
    ("http://a.app.org", "example.com", {**SECURE, **WILDCARD}, 403),
    ("https://a.app.org", "example.com", {**SECURE, **WILDCARD}, 101),
    (None, "example.com", SECURE, 101),
    # Behind a proxy, and pretending it.
    ("https://example.com", "127.0.0.1:8000", BY_BOTH, 101),
    ("https://example.com", "127.0.0.1:8000", BY_PROTO, 403),
    ("https://example.com", "127.0.0.1:8000", PROXIED, 403),
    ("https://example.com", "example.com", {**BY_PROTO, **SPOOFED}, 403),
    # Headers that come twice, and those that are no ASCII.
    ("http://example.com", "example.com", {"more": [(b"origin", b"http://a.b")]}, 403),
    ("http://example.com", "example.com", {"more": [(b"host", b"evil.org")]}, 400),
    ("\xff\xfe", "example.com", {}, 403),
    (None, "ex mple.com", {}, 400),
    ("https://www.evil.org", "@malformed", {}, 400),
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
