"""What the tests run on: event loops, connections by hand, servers, services.

There are two stages. The first is the test's own event loop: `connected()` (our own
`connect()`), or `driven()` where the order of ASGI events is the point. The second is a
real server: `serve()` is uvicorn on a thread, `Process` any server in a process.
"""

import asyncio
import contextlib
import functools
import gc
import http.client
import importlib.util
import inspect
import json
import logging
import os
import pathlib
import random
import re
import selectors
import shutil
import signal
import socket as sockets
import struct
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Any, Self

import pytest
import uvicorn

from project import (  # sets Django up
    DATABASE,
    HERE,
    TEMPORARY,
    TENANTS,
    TENANTS_MODELS,
    ZOO,
    ZOO_MODELS,
    ZOO_PACKAGES,
    ZOO_URLS,
    middleware,
    urlconf,
)
from validator import FAILURES, validated

# isort: split
from django.contrib.auth.models import User
from django.core import signals
from django.core.asgi import get_asgi_application
from django.core.management import call_command
from django.db import OperationalError, close_old_connections, connections
from django.http import HttpResponse
from django.test import AsyncClient, Client, override_settings
from websockets.exceptions import ConnectionClosed
from websockets.sync.client import ClientConnection
from websockets.sync.client import connect as dial

from django_ws import (
    WebSocket,
    WebSocketDenied,
    broadcast,
    connect,
    websocket,
    websockets,
)

CI = bool(os.environ.get("CI"))
Log = pytest.LogCaptureFixture
Patch = pytest.MonkeyPatch
Path = pathlib.Path


def missing(what: str) -> None:
    """Skip a test that needs what is not installed; in CI everything is."""
    (pytest.fail if CI else pytest.skip)(f"{what} is not installed")


def needs(*modules: str) -> None:
    for module in modules:
        if not importlib.util.find_spec(module):
            missing(module)


def find_program(name: str, *places: str) -> str:
    search = os.pathsep.join([os.environ["PATH"], "/usr/sbin", *places])
    found = shutil.which(name, path=search)
    if found is None:
        missing(f"Debian's {name}")
    return str(found)


def wait_for(condition: Callable[[], Any], seconds: float = 20) -> Any:
    """Wait until the condition holds; fail when it does not in time."""
    deadline = time.monotonic() + seconds
    while not (result := condition()):
        assert time.monotonic() < deadline, f"{condition} did not come true"
        time.sleep(0.01)
    return result


async def until(condition: Callable[[], Any], seconds: float = 20) -> Any:
    """Wait, on the event loop, until the condition holds."""
    deadline = time.monotonic() + seconds
    while not (result := condition()):
        assert time.monotonic() < deadline, f"{condition} did not come true"
        await asyncio.sleep(0.001)
    return result


async def turns(count: int = 20) -> None:
    """Let everything go on that need not wait for a timer."""
    for _ in range(count):
        await asyncio.sleep(0)


class Hasty(asyncio.SelectorEventLoop):
    """An event loop whose seconds take 10 ms; its timers keep their order."""

    SPEED = 100

    def __init__(self) -> None:
        class Selector(selectors.DefaultSelector):
            def select(self, timeout: float | None = None) -> Any:
                return super().select(timeout and timeout / Hasty.SPEED)

        super().__init__(Selector())

    def time(self) -> float:
        return super().time() * self.SPEED


TIMERS: list[asyncio.TimerHandle] = []


def note_timers() -> None:
    """From now on, note the timers that the module sets on the running loop."""

    def call_later(delay: float, callback: Any, *args: Any, **more: Any) -> Any:
        timer = original(delay, callback, *args, **more)
        if type(getattr(callback, "__self__", None)).__module__ == "django_ws":
            TIMERS.append(timer)
        return timer

    loop: Any = asyncio.get_running_loop()
    original, loop.call_later = loop.call_later, call_later
    TIMERS.clear()


def due_timers() -> list[asyncio.TimerHandle]:
    now = asyncio.get_running_loop().time()
    return [one for one in TIMERS if one.when() > now and not one.cancelled()]


def asynchronous(
    *events: Any,
    hasty: bool = False,
    accept: bool = True,
    types: Any = None,
    **options: Any,
) -> Callable[..., Callable[..., Any]]:
    """Run an async test on an event loop of its own, which nothing may outlive.

    A test with an argument `socket` is the view of a connection that is driven by hand
    (see there), after accept(), with these events and options; it has a server as
    `drive`, to which it sends events of these types and no others.
    """
    if events and callable(events[0]):
        decorated: Callable[..., Any] = asynchronous()(events[0])
        return decorated

    def decorate(test: Any) -> Any:
        signature = inspect.signature(test)
        own = {"socket", "drive"} & signature.parameters.keys()

        async def as_view(call: Any) -> None:
            outcome: list[Any] = []

            async def view(socket: WebSocket) -> None:
                if accept:
                    await socket.accept()
                known = {"socket": socket, "drive": drive}
                try:
                    await call(**{name: known[name] for name in own})
                    outcome.append(None)
                except BaseException as error:
                    outcome.append(error)
                    raise

            async with driven(view, *events, **options) as drive:
                await drive.end()
            if outcome != [None]:
                raise outcome[0] if outcome else AssertionError("it did not run")
            assert types is None or drive.types == types

        @functools.wraps(test)
        def run(*args: Any, **kwargs: Any) -> None:
            async def main() -> None:
                note_timers()
                async with asyncio.timeout(60 * (Hasty.SPEED if hasty else 1)):
                    call = functools.partial(test, *args, **kwargs)
                    await (as_view(call) if own else call())
                await until(lambda: len(asyncio.all_tasks()) == 1)
                assert not due_timers()

            with asyncio.Runner(loop_factory=Hasty if hasty else None) as runner:
                runner.run(main())

        kept = [one for one in signature.parameters.values() if one.name not in own]
        setattr(run, "__signature__", signature.replace(parameters=kept))
        return run

    return decorate


@pytest.fixture(autouse=True)
def failures() -> Iterator[None]:
    """Raise what failed in a view or in the validator: a client sees only an end."""

    def note(**kwargs: Any) -> None:
        if isinstance(error := sys.exc_info()[1], AssertionError):
            FAILURES.append(error)

    receivers = len(signals.got_request_exception.receivers)
    signals.got_request_exception.connect(note)
    yield
    signals.got_request_exception.disconnect(note)
    assert len(signals.got_request_exception.receivers) == receivers
    for one in (signals.request_started, signals.request_finished):
        assert one.disconnect(close_old_connections)  # it was connected
        one.connect(close_old_connections)
    while FAILURES:
        raise FAILURES.pop()


@pytest.fixture(scope="session", autouse=True)
def database() -> None:
    call_command("migrate", verbosity=0)
    with without_logs():  # the warning that comes once shall be in no test's log
        asyncio.run(broadcast("nobody", "x"))


@pytest.fixture
def user(database: None) -> Iterator[Any]:
    user = User.objects.create_user("ann", password="pass")
    yield user
    user.delete()


@pytest.fixture(params=["websockets-sansio", "websockets", "wsproto"])
def ws(request: pytest.FixtureRequest) -> str:
    """Each of uvicorn's WebSocket implementations."""
    needs(request.param.split("-")[0])
    return str(request.param)


@pytest.fixture
def stack() -> Iterator[contextlib.ExitStack]:
    with contextlib.ExitStack() as stack:
        yield stack


@contextlib.contextmanager
def database_options(**options: Any) -> Iterator[None]:
    """Change the entry of the default database: CONN_MAX_AGE, ATOMIC_REQUESTS."""
    entry = connections.settings["default"]
    before = {name: entry[name] for name in options}
    entry.update(options)
    try:
        yield
    finally:
        entry.update(before)


@contextlib.contextmanager
def without_logs() -> Iterator[None]:
    logging.disable(logging.CRITICAL)
    try:
        yield
    finally:
        logging.disable(logging.NOTSET)


@contextlib.contextmanager
def without_collector() -> Iterator[None]:
    gc.collect()
    gc.disable()
    try:
        with without_logs():  # caplog keeps records, and they the requests
            yield
    finally:
        gc.enable()


@contextlib.contextmanager
def logging_to(emit: Callable[[logging.LogRecord], Any]) -> Iterator[None]:
    """Call a function, in place of a mail server say, for what Django logs."""
    handler, logger = logging.Handler(), logging.getLogger("django.request")
    setattr(handler, "emit", emit)
    logger.addHandler(handler)
    try:
        yield
    finally:
        logger.removeHandler(handler)


def quiet(caplog: Log) -> bool:
    """Whether nothing above INFO was logged; prints what was."""
    loud = [record for record in caplog.records if record.levelno > logging.INFO]
    for record in loud:
        print(record.name, record.levelname, record.getMessage(), record.exc_info)
    return not loud


def configured(views: Any, options: dict[str, Any]) -> Any:
    """Take settings (upper case) and error handlers out of options, for views.

    A view is routed at /ws/; a URL pattern is used as it is.
    """
    patterns = [
        view if hasattr(view, "pattern") else websocket("ws/", view) for view in views
    ]
    names = [name for name in options if name.startswith("handler")]
    urls = urlconf(*patterns, **{name: options.pop(name) for name in names})
    found = {name: options.pop(name) for name in list(options) if name.isupper()}
    return override_settings(**{"ROOT_URLCONF": urls, **found})


async def no_http(scope: Any, receive: Any, send: Any) -> None:
    raise AssertionError("not a WebSocket")


def connected(view: Any, place: str = "/ws/", **options: Any) -> Any:
    """Connect to one view by `connect()`; upper-case options are settings."""

    @contextlib.asynccontextmanager
    async def connecting() -> AsyncIterator[Any]:
        with configured([view], options):
            application = validated(websockets(no_http))
            options.setdefault("timeout", 20)
            async with connect(application, place, **options) as client:
                yield client

    return connecting()


@contextlib.asynccontextmanager
async def both_ends(**options: Any) -> AsyncIterator[Any]:
    """Both ends of an accepted WebSocket; the block stands for the view, too."""
    opened: asyncio.Future[WebSocket] = asyncio.get_running_loop().create_future()
    done = asyncio.Event()

    async def view(socket: WebSocket) -> None:
        await socket.accept()
        opened.set_result(socket)
        await done.wait()

    async with connected(view, **options) as client:
        try:
            yield await opened, client
        finally:
            done.set()


async def refusal(view: Any, *args: Any, **options: Any) -> Any:
    """Return the response of a handshake that is refused."""
    options.setdefault("client", AsyncClient(raise_request_exception=False))
    with pytest.raises(WebSocketDenied) as caught:
        async with connected(view, *args, **options):
            raise AssertionError("it was accepted")
    return caught.value.response


def text(data: str) -> dict[str, Any]:
    return {"type": "websocket.receive", "text": data}


def binary(data: bytes) -> dict[str, Any]:
    return {"type": "websocket.receive", "bytes": data}


CONNECT = {"type": "websocket.connect"}
GONE = {"type": "websocket.disconnect", "code": 4001, "reason": "bye"}
NORMAL = {"type": "websocket.close", "code": 1000, "reason": ""}


class Drive:
    """A connection whose ASGI events are given by hand, and what was sent on it."""

    def __init__(self, application: Any, *events: Any, **scope: Any) -> None:
        self.application = application
        self.queue: asyncio.Queue[Any] = asyncio.Queue()
        self.put(CONNECT, *events)
        self.taken = 0  # how many events the server has handed over
        self.tried = 0  # how often it was to send
        self.asked = 0  # how many calls of receive() wait for one
        self.sent: list[dict[str, Any]] = []
        self.reads = asyncio.Event()  # what the server's send waits for
        self.reads.set()
        self.before: Any = None  # what it does before it sends
        self.error: BaseException | None = None  # what it raises
        self.scope = {
            "type": "websocket",
            "scheme": "ws",
            "path": "/ws/",
            "query_string": b"",
            "headers": [(b"host", b"testserver")],
            "extensions": {"websocket.http.response": {}},
            **scope,
        }

    def put(self, *events: Any) -> None:
        for event in events:
            self.queue.put_nowait(event)

    async def receive(self) -> Any:
        self.asked += 1
        try:
            event = await self.queue.get()
        finally:
            self.asked -= 1
        self.taken += 1
        if isinstance(event, Exception):
            raise event
        return event

    async def send(self, event: dict[str, Any]) -> None:
        self.tried += 1
        await self.reads.wait()
        if self.before is not None:
            await self.before(event)
        if self.error is not None:
            raise self.error
        self.sent.append(event)

    def start(self) -> None:
        served = self.application(self.scope, self.receive, self.send)
        self.task = asyncio.create_task(served)

    async def end(self) -> None:
        """Wait for the end of the connection; raise what the application raised."""
        await asyncio.wait([self.task])
        await turns()
        assert not self.asked, "somebody still waits for the server"
        if not self.task.cancelled():
            self.task.result()

    @property
    def types(self) -> list[str]:
        return [event["type"].removeprefix("websocket.") for event in self.sent]

    @property
    def messages(self) -> list[Any]:
        kept = [event for event in self.sent if event["type"] == "websocket.send"]
        return [event.get("text", event.get("bytes")) for event in kept]

    @property
    def code(self) -> Any:
        return self.sent[-1].get("code")

    @property
    def status(self) -> Any:
        return 101 if self.types[:1] == ["accept"] else self.sent[0].get("status")


@contextlib.asynccontextmanager
async def driven(
    view: Any, *events: Any, count: int = 0, **options: Any
) -> AsyncIterator[Any]:
    """Serve one connection, or a list of `count`; clients leave when the block ends."""
    with configured([view], options):
        application = validated(websockets(no_http))
        every = [Drive(application, *events, **options) for _ in range(count or 1)]
        for drive in every:
            drive.start()
        tasks = [drive.task for drive in every]
        try:
            yield every if count else every[0]
            for drive in every:
                drive.put(GONE)
            await asyncio.wait(tasks)
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.wait(tasks)
        for drive in every:
            await drive.end()


def play(view: Any, *events: Any, prepare: Any = None, **options: Any) -> Drive:
    """Serve one connection by a view that ends by itself."""

    async def main() -> Drive:
        drive: Drive
        async with asyncio.timeout(20), driven(view, *events, **options) as drive:
            if prepare is not None:
                prepare(drive)
            await drive.end()
        return drive

    return asyncio.run(main())


class Site:
    """Something that serves 127.0.0.1:port, and the ways to ask it."""

    port: int

    def __init__(self) -> None:
        self.clients = contextlib.ExitStack()  # they end before the server does

    def dial(self, path: str = "/ws/", host: str = "", **options: Any) -> Any:
        """Open a WebSocket as a browser on this site does."""
        host = f"{host or '127.0.0.1'}:{self.port}"
        known = {"origin": f"http://{host}", "proxy": None, "close_timeout": 2}
        raw = sockets.create_connection(("127.0.0.1", self.port))
        client = dial(f"ws://{host}{path}", sock=raw, **{**known, **options})
        return self.clients.enter_context(client)

    def dial_all(self, count: int, path: str, **options: Any) -> list[Any]:
        return [self.dial(path, **options) for _ in range(count)]

    def handshake(self, path: str = "/ws/", **headers: str) -> Any:
        """Return the HTTP response to a handshake, with a browser's headers.

        By hand, since the client library follows redirects.
        """
        asked = {
            "Connection": "Upgrade",
            "Upgrade": "websocket",
            "Sec-WebSocket-Version": "13",
            "Sec-WebSocket-Key": "dGhlIHNhbXBsZSBub25jZQ==",
            "Origin": f"http://127.0.0.1:{self.port}",
        }
        return self.get(path, **{**asked, **headers})

    def get(self, path: str, **headers: str) -> Any:
        """Return the HTTP response to a GET request."""
        client = http.client.HTTPConnection("127.0.0.1", self.port, timeout=20)
        client.request("GET", path, headers=headers)
        response = client.getresponse()
        setattr(response, "body", response.read())
        response.close()
        client.close()
        return response

    def open_raw(self, path: str = "/ws/", wait: bool = True) -> sockets.socket:
        """Open a WebSocket by hand and return its socket, after the server's answer."""
        raw = sockets.create_connection(("127.0.0.1", self.port))
        self.clients.enter_context(raw)
        raw.sendall(
            f"GET {path} HTTP/1.1\r\nHost: 127.0.0.1\r\nConnection: Upgrade\r\n"
            "Upgrade: websocket\r\nSec-WebSocket-Version: 13\r\n"
            "Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n".encode()
        )
        if wait:
            raw.recv(1000)
        return raw


def frame(opcode: int, data: bytes) -> bytes:
    """A client's frame, masked with zeros (RFC 6455, section 5.2)."""
    return bytes([0x80 | opcode, 0x80 | len(data), 0, 0, 0, 0]) + data


def reset(raw: sockets.socket) -> None:
    """End a TCP connection by RST, as a machine that crashed does."""
    raw.setsockopt(sockets.SOL_SOCKET, sockets.SO_LINGER, struct.pack("ii", 1, 0))
    os.close(raw.detach())


def closed_with(client: ClientConnection) -> tuple[int, str]:
    """Return the code and reason that the server closes with."""
    with pytest.raises(ConnectionClosed) as caught:
        while True:
            client.recv(20)
    received = caught.value.rcvd
    return (received.code, received.reason) if received else (1006, "")


def seen(client: ClientConnection) -> Any:
    return json.loads(client.recv(20))


class Uvicorn(uvicorn.Server):
    async def main_loop(self) -> None:
        while not self.should_exit:  # uvicorn looks every 0.1 s
            await asyncio.sleep(0.01)


class Server(Site):
    """A real uvicorn on a thread."""

    def __init__(self, application: Any, **options: Any) -> None:
        super().__init__()
        options = {"log_config": None, "lifespan": "off", **options}
        self.uvicorn = Uvicorn(uvicorn.Config(application, **options))
        self.socket = sockets.create_server(("127.0.0.1", 0))
        self.port = self.socket.getsockname()[1]
        self.thread = threading.Thread(target=self.uvicorn.run, args=([self.socket],))

    def __enter__(self) -> Self:
        self.thread.start()
        wait_for(lambda: self.uvicorn.started)
        return self

    def __exit__(self, *exc_info: Any) -> None:
        self.clients.close()
        self.uvicorn.should_exit = True
        self.thread.join(20)
        assert not self.thread.is_alive(), "the server did not stop"


@contextlib.contextmanager
def serve(*views: Any, ws: str = "auto", **options: Any) -> Iterator[Server]:
    """Serve views or URL patterns; upper-case options are settings."""
    with configured(views, options):
        application = validated(websockets(get_asgi_application()))
        with Server(application, ws=ws, **options) as server:
            yield server


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


class Process(Site):
    """A command that serves 127.0.0.1:port, its output in a file.

    Most commands serve `project:application`; upper-case options are its settings.
    """

    def __init__(
        self,
        directory: Path,
        *command: Any,
        port: int = 0,
        env: dict[str, str] | None = None,
        **options: Any,
    ) -> None:
        super().__init__()
        self.port = port or free_port()
        self.log = directory / f"output-{self.port}.log"
        self.command = [str(word).format(port=self.port) for word in command]
        self.directory = directory
        places = [str(HERE), str(HERE / ".tests"), str(directory)]
        own = {"PYTHONPATH": os.pathsep.join(places), "PYTHONUNBUFFERED": "1"}
        own["PROJECT"] = json.dumps({"ALLOWED_HOSTS": ["*"], **options})
        self.environment = {**os.environ, **own, **(env or {})}

    def __enter__(self) -> Self:
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                self.command,
                cwd=self.directory,
                env=self.environment,
                stdout=log,
                stderr=subprocess.STDOUT,
            )
        wait_for(self.answers, 60)
        return self

    def answers(self) -> bool:
        assert self.process.poll() is None, self.output[-3000:]
        with contextlib.suppress(OSError):
            sockets.create_connection(("127.0.0.1", self.port)).close()
            return True
        return False

    @property
    def output(self) -> str:
        return self.log.read_text()

    def __exit__(self, *exc_info: Any) -> None:
        self.clients.close()
        self.process.terminate()
        try:
            self.process.wait(5)
        except subprocess.TimeoutExpired:  # shutting down has tests of its own
            self.process.kill()
            self.process.wait()
        assert "ASGI violated" not in self.output


def run(*command: Any, fails: bool = False, **options: Any) -> str:
    """Run a command to its end and return what it printed."""
    ran = subprocess.run(
        [sys.executable if word == "python" else str(word) for word in command],
        **{"capture_output": True, "text": True, "timeout": 120, **options},
    )
    assert bool(ran.returncode) == fails, f"{ran.stdout}{ran.stderr}"
    return str(ran.stdout + ran.stderr if fails else ran.stdout)


async def answer(view: Any, place: str = "/ws/", **options: Any) -> Any:
    """Return the view's first message, which is JSON, or the response of a refusal."""
    options.setdefault("client", AsyncClient(raise_request_exception=False))
    try:
        async with connected(view, place, **options) as client:
            return await client.receive_json()
    except WebSocketDenied as denied:
        return denied.response


async def status(view: Any, place: str = "/ws/", **options: Any) -> int:
    """Return the status of the answer to a handshake."""
    found = await answer(view, place, **options)
    return found.status_code if isinstance(found, HttpResponse) else 101


def logged_in(user: Any) -> Client:
    client = Client(raise_request_exception=False)
    client.force_login(user)
    return client


def cookies(user: Any) -> dict[str, str]:
    return {"Cookie": f"sessionid={logged_in(user).cookies['sessionid'].value}"}


class Service:
    """What carries groups between processes: it can be stopped and started."""

    name: str
    start: Callable[[], None]
    stop: Callable[[], None]
    signal: Callable[[signal.Signals], None]
    options: Callable[..., dict[str, Any]]  # settings, for a prefix
    databases: dict[str, Any]  # that its servers have

    @property
    def error(self) -> type[Exception]:
        """What broadcast() raises while the service is away."""
        raise NotImplementedError

    def serve(self, directory: Path, *more: str, prefix: str = "tests") -> Process:
        command = (*UVICORN, *more, "project:application")
        options = {"DATABASES": self.databases, **self.options(prefix)}
        return Process(directory, *command, **options)


class Postgres(Service):
    """A real PostgreSQL of the tests' own."""

    name = "PostgreSQL"
    error = OperationalError

    def __init__(self, directory: str) -> None:
        places = [*map(str, pathlib.Path("/usr/lib/postgresql").glob("*/bin"))]
        self.bin = pathlib.Path(find_program("initdb", *places)).parent
        self.user = ["runuser", "-u", "postgres", "--"] if os.geteuid() == 0 else []
        self.directory, self.port = directory, free_port()
        os.chmod(directory, 0o777)
        auth = ("--auth=trust", "--username=postgres", "--no-sync")
        self.run("initdb", *auth)
        self.entry = {
            "ENGINE": "django.db.backends.postgresql",
            **{"NAME": "postgres", "USER": "postgres", "HOST": "127.0.0.1"},
            "PORT": str(self.port),
        }
        self.databases = {"default": DATABASE, "postgres": self.entry}
        self.start()

    def run(self, name: str, *options: str) -> None:
        command = [*self.user, self.bin / name, "-D", f"{self.directory}/data"]
        run(*command, *options, cwd=self.directory, capture_output=False)

    def start(self) -> None:
        options = f"-p {self.port} -c fsync=off -k {self.directory}"
        log = f"{self.directory}/log"
        self.run("pg_ctl", "-w", "-l", log, "-o", options, "start")

    def stop(self) -> None:
        self.run("pg_ctl", "-w", "-m", "immediate", "stop")

    def ask(self, sql: str) -> list[Any]:
        """Run a query beside Django, on a connection of its own."""
        import psycopg

        address = f"host=127.0.0.1 port={self.port} user=postgres dbname=postgres"
        with psycopg.connect(address, application_name="a", autocommit=True) as asked:
            found = asked.execute(sql)
            return found.fetchall() if found.description else []

    def signal(self, number: signal.Signals) -> None:
        """Send a signal to all processes of the server."""
        first = (pathlib.Path(self.directory) / "data" / "postmaster.pid").read_text()
        parent = first.split()[0]
        children = pathlib.Path(f"/proc/{parent}/task/{parent}/children").read_text()
        run(*self.user, "kill", f"-{number.name[3:]}", parent, *children.split())

    def options(self, prefix: str = "tests") -> dict[str, Any]:
        return {"WEBSOCKETS": {"DATABASE": "postgres", "PREFIX": prefix}}

    def count_listeners(self) -> int:
        listeners = "SELECT 1 FROM pg_stat_activity WHERE query LIKE 'LISTEN%'"
        return len(self.ask(listeners))

    @property
    def connections(self) -> int:
        return int(self.ask(f"SELECT count(*) FROM pg_stat_activity {OTHERS}")[0][0])

    def serve_views(self, directory: Path, **entry: Any) -> Process:
        """Serve a project whose own database this is."""
        return Process(
            directory,
            *UVICORN,
            "project:application",
            DATABASES={"default": {**self.entry, **entry}},
            MIDDLEWARE=middleware("refusing"),
        )


OTHERS = "WHERE backend_type = 'client backend' AND application_name <> 'a'"
POOL = {"OPTIONS": {"pool": {"min_size": 1, "max_size": 20, "timeout": 5}}}
SMALL_POOL = {"OPTIONS": {"pool": {"min_size": 1, "max_size": 2, "timeout": 5}}}


@pytest.fixture(scope="session")
def postgres() -> Iterator[Postgres]:
    needs("psycopg", "psycopg_pool")
    with tempfile.TemporaryDirectory() as directory:
        server = Postgres(directory)
        entries = connections.configure_settings(server.databases)
        connections.settings["postgres"] = entries["postgres"]
        yield server
        connections.settings.pop("postgres", None)  # each module has a server
        server.stop()


@pytest.fixture
def notes(postgres: Postgres) -> Iterator[None]:
    """A table that is there for one test."""
    postgres.ask("CREATE TABLE notes (note text)")
    yield
    postgres.ask("DROP TABLE notes")


def ask_all(clients: list[Any], sql: str) -> list[Any]:
    """Let all clients ask the same at once."""
    for client in clients:
        client.send(sql)
    return [seen(client) for client in clients]


BACKEND = "SELECT pg_backend_pid()"


class Redis(Service):
    """A redis-server of the tests' own."""

    name = "Redis"
    databases = {"default": DATABASE}

    def __init__(self, *options: str) -> None:
        self.port = free_port()
        self.url = f"redis://127.0.0.1:{self.port}"
        program = find_program("redis-server")
        self.command = [program, "--port", str(self.port), "--save", "", *options]
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

    def signal(self, number: signal.Signals) -> None:
        self.process.send_signal(number)

    def ask(self, *words: str) -> str:
        return run("redis-cli", "-p", self.port, *words)

    def options(self, prefix: str = "tests") -> dict[str, Any]:
        return {"WEBSOCKETS": {"REDIS_URL": self.url, "PREFIX": prefix}}

    def count_listeners(self) -> int:
        return int(self.ask("pubsub", "numsub", "tests:room").split()[1])

    @property
    def error(self) -> type[Exception]:
        from redis import exceptions

        found: type[Exception] = exceptions.ConnectionError
        return found


@pytest.fixture
def redis() -> Iterator[Redis]:
    needs("redis")
    server = Redis()
    yield server
    server.stop()


@pytest.fixture(params=["redis", "postgres"])
def service(request: pytest.FixtureRequest) -> Any:
    return request.getfixturevalue(request.param)


@pytest.fixture(params=["here", "redis", "postgres"])
def layer(request: pytest.FixtureRequest) -> dict[str, Any]:
    """The settings for each way in which groups travel."""
    if request.param == "here":
        return {}
    found: dict[str, Any] = request.getfixturevalue(request.param).options()
    return found


async def joined(drives: list[Drive]) -> None:
    """Wait until each view has sent "joined", and drop that message."""
    for drive in drives:
        await until(lambda: drive.messages[:1] == ["joined"])
        del drive.sent[1]


async def deliver(drives: list[Drive], expected: list[Any]) -> None:
    for drive in drives:
        await until(lambda: len(drive.messages) >= len(expected))
        assert drive.messages == expected


SERVERS: dict[str, tuple[str, ...]] = {
    "uvicorn websockets": ("uvicorn", "--ws", "websockets-sansio", "--port", "{port}"),
    "uvicorn wsproto": ("uvicorn", "--ws", "wsproto", "--port", "{port}"),
    "hypercorn": ("hypercorn", "--bind", "127.0.0.1:{port}"),
    "daphne": ("daphne", "--port", "{port}"),
    "granian": ("granian", "--interface", "asgi", "--port", "{port}"),
    "gunicorn": ("gunicorn", "--worker-class", "asgi", "--bind", "127.0.0.1:{port}"),
}


@contextlib.contextmanager
def serve_by(name: str, directory: Path) -> Iterator[Process]:
    module, *options = SERVERS[name]
    needs(module, name.split()[-1])
    script = pathlib.Path(sys.executable).with_name(module)
    command = (script, *options, "project:application")
    with Process(directory, *command, env={"GRACE": "0.5"}) as server:

        def answers() -> bool:
            with contextlib.suppress(OSError):
                return bool(server.get("/echo/").status == 426)
            return False

        wait_for(answers, 60)
        yield server


Served = tuple[str, Process]


@pytest.fixture(scope="module", params=SERVERS)
def served(request: Any, tmp_path_factory: Any) -> Iterator[Served]:
    """Each server as a process, and its name."""
    with serve_by(request.param, tmp_path_factory.mktemp("served")) as server:
        yield request.param, server


def start_project(directory: Path, name: str) -> Path:
    run("python", "-m", "django", "startproject", name, ".", cwd=directory)
    shutil.copy(HERE / "django_ws.py", directory)
    return directory / name


def readme_blocks(language: str, beginning: str = "") -> list[str]:
    found = (HERE / "README.md").read_text()
    blocks = re.findall(rf"^```{language}\n(.*?)^```$", found, re.M | re.S)
    return [block for block in blocks if block.startswith(beginning)]


def write_readme(directory: Path, *parts: str) -> None:
    """Write the files of README's sections with these titles, as their readers do.

    A block whose first line ends with "anew" replaces the file; a diff adds lines.
    """
    text = (HERE / "README.md").read_text()
    for title in parts:
        [section] = re.findall(rf"^#+ {title}\n(.*?)(?=^##|\Z)", text, re.M | re.S)
        blocks = r"^```(python|html|diff)\n(.*?)^```$"
        for language, block in re.findall(blocks, section, re.M | re.S):
            name = re.match(r"# (\S+\.py)(, anew)?\n", block)
            if language == "html":
                templates = directory / "mysite" / "templates"
                templates.mkdir(exist_ok=True)
                (templates / "index.html").write_text(block)
            elif language == "diff":
                views = directory / "mysite" / "views.py"
                views.write_text(apply_diff(views.read_text(), block))
            elif name is not None:
                file = directory / name[1]
                with file.open("w" if name[2] else "a") as opened:
                    opened.write(block)


def apply_diff(source: str, diff: str) -> str:
    """Add the lines with "+", each before the line that follows it."""
    added = ""
    for line in diff.splitlines(keepends=True):
        if line.startswith("+"):
            added += line[1:]
        else:
            assert source.count(line[1:]) == 1, line
            source = source.replace(line[1:], added + line[1:])
            added = ""
    return source


# Views of README's sections, which say nothing of their routes.
README_ROUTES = """
from django.http import HttpResponse
from . import notify, orders, recipes
def order(request):
    notify.notify(request.user, "ordered")
    return HttpResponse("1 order")
urlpatterns += [
    path("live/", lambda request: HttpResponse(recipes.LIVE)), path("order/", order),
    websocket("ws/staff/", views.staff_only), websocket("ws/account/", views.account),
    websocket("ws/room/<slug:name>/", views.Room.as_view()),
    websocket("ws/talk/<room>/", views.talk), websocket("ws/audit/", views.audit),
    websocket("ws/clock/", recipes.clock), websocket("ws/live/", recipes.live),
    websocket("ws/news/<int:last>/", recipes.news),
    websocket("ws/presence/", recipes.lobby),
    websocket("ws/limited/", recipes.limited), websocket("ws/orders/", orders.orders),
]
"""


@functools.cache
def make_readme_project() -> tuple[Path, list[str]]:
    """Make the project of README's blocks; log two users in."""
    needs("pydantic")
    directory = pathlib.Path(TEMPORARY.name) / "readme"
    directory.mkdir()
    start_project(directory, "mysite")
    titles = [
        "Tutorial: a chat",
        "Let users log in",
        "Test it",
        "Authenticate",
        "Groups",
    ]
    titles += ["Messages that the view handles", "Recipes", "Test", "Serve"]
    write_readme(directory, *titles)
    with (directory / "mysite" / "urls.py").open("a") as file:
        file.write(README_ROUTES)
    told = (HERE / "README.md").read_text()
    with (directory / "mysite" / "settings.py").open("a") as file:
        token = "mysite.middleware.token_middleware"
        assert f'`"{token}"` at the end of `MIDDLEWARE`' in told
        file.write(f"MIDDLEWARE += [{token!r}]\n")
        [proxy] = re.findall(r"`(SECURE_PROXY_SSL_HEADER = .*?)`", told)
        file.write(f"{proxy}\n")
    for command in (["makemigrations", "mysite"], ["migrate"]):
        run("python", "manage.py", *command, "-v0", cwd=directory)
    login = (
        "from django.contrib.auth.models import User\n"
        "from django.core import signing\n"
        "from django.test import Client\n"
        "for name in ('ann', 'staff'):\n"
        "    user = User.objects.create_user(\n"
        "        name, 'a@b.cd', 'pass', is_staff=name == 'staff')\n"
        "    client = Client()\n"
        "    client.force_login(user)\n"
        "    print(client.cookies['sessionid'].value)\n"
        "gone = User.objects.create_user('gone', is_active=False)\n"
        "print(*[signing.dumps(pk, salt='api') for pk in (1, gone.pk, 99)])\n"
        "print(signing.dumps(1, salt='other'))\n"
        "import time; now = time.time(); time.time = lambda: now - 3700\n"
        "print(signing.dumps(1, salt='api'))\n"
    )
    command = ["python", "manage.py", "shell", "-v0", "-c", login]
    return directory, run(*command, cwd=directory).split()


class ReadmeProject:
    """A copy of README's project for one test."""

    def __init__(self, directory: Path) -> None:
        made, known = make_readme_project()
        self.ann, self.staff, self.good_token, *self.bad_tokens = known
        shutil.copytree(made, directory, dirs_exist_ok=True)
        self.directory = directory

    def add(self, name: str, *lines: str) -> None:
        with (self.directory / "mysite" / name).open("a") as file:
            file.write("\n".join(lines) + "\n")

    def serve(self) -> Process:
        return Process(self.directory, *UVICORN, "mysite.asgi:application")


def session(value: str) -> dict[str, Any]:
    return {"additional_headers": {"Cookie": f"sessionid={value}"}}


@pytest.fixture
def readme(tmp_path: Path) -> ReadmeProject:
    return ReadmeProject(tmp_path)


@pytest.fixture
def browser() -> Iterator[Any]:
    """A real Chromium without a window."""
    needs("selenium")
    driver, chromium = find_program("chromedriver"), find_program("chromium")
    from selenium import webdriver

    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    for flag in (
        *("headless", "no-sandbox", "disable-gpu", "disable-quic", "no-first-run"),
        *("disable-background-networking", "disable-component-update", "disable-sync"),
    ):
        options.add_argument(f"--{flag}")
    browser = webdriver.Chrome(options=options, service=webdriver.ChromeService(driver))
    yield browser
    browser.quit()


def open_tabs(browser: Any, server: Process, count: int) -> list[str]:
    tabs = []
    for _ in range(count):
        browser.switch_to.new_window("tab")
        browser.get(f"http://127.0.0.1:{server.port}/")
        wait_for(lambda: browser.execute_script("return socket.readyState") == 1)
        tabs.append(browser.current_window_handle)
    return tabs


def chat_in_tabs(browser: Any, tabs: list[str], field: str) -> None:
    """Say something in each tab, and find it in all."""
    for number, tab in enumerate(tabs):
        browser.switch_to.window(tab)
        words = f"<b>hello from {number}"
        browser.find_element("css selector", field).send_keys(words, "\ue007")
        for other in tabs:
            browser.switch_to.window(other)
            wait_for(lambda: words in browser.find_element("tag name", "ul").text)


def echoes(server: Process, raw: str, *messages: str | bytes) -> None:
    with server.dial(f"{raw}/echo/", max_size=None) as client:
        for message in messages:
            client.send(message)
            assert client.recv(5) == message


def keeps_order(
    server: Process, raw: str, place: str = "echo", count: int = 2000
) -> None:
    numbers = [str(number) for number in range(count)]
    with server.dial(f"{raw}/{place}/", max_queue=None) as client:
        for number in numbers:
            client.send(number)
            time.sleep(0.002 * (place == "poll"))
        assert [client.recv(5) for _ in numbers] == numbers


def stops_reading(server: Process, raw: str) -> None:
    message = struct.pack("!BBQ4x", 0x82, 0x80 | 127, 2**20) + bytes(2**20)
    with server.open_raw(f"{raw}/idle/") as client:
        client.sendall(frame(1, b"go"))
        client.settimeout(20 if raw else 1)  # for a server that buffers all of it
        with pytest.raises(TimeoutError):
            for _ in range(32):
                client.sendall(message)


def stops_sending(server: Process, raw: str) -> None:
    before = server.output.count("flooded")
    with server.open_raw(f"{raw}/flood/"):
        with pytest.raises(AssertionError):  # a server that buffers all has time
            wait_for(lambda: server.output.count("flooded") > before, 20 if raw else 1)


def denies(server: Process, raw: str, page: bool = False) -> None:
    response = server.handshake(f"{raw}/deny/")
    assert response.status == 401 or not page and response.status == 403
    if page:
        assert (response.body, response.headers["X-Why"]) == (b"a page", "because")


def answers_with_headers(server: Process, raw: str) -> None:
    assert server.dial(f"{raw}/echo/").response.headers.get("X-Echo") == "yes"


def closes(server: Process, raw: str, code: int, reason: str = "") -> None:
    found = closed_with(server.dial(f"{raw}/close/{code}/"))
    assert found[0] == code and reason in found[1]


def hears(server: Process, raw: str, pattern: str) -> None:
    before = len(server.output)
    with server.dial(f"{raw}/left/") as client:
        client.close(4001, "bye")
    found = wait_for(lambda: re.search(r"left (\d+) (.*)\.", server.output[before:]))
    assert re.search(pattern, found[0]), found[0]


BEHAVIOURS: dict[str, Callable[[Process, str], Any]] = {
    "text": lambda server, raw: echoes(server, raw, "hello", "déjà vu 🙂"),
    "binary": lambda server, raw: echoes(server, raw, b"\x00\xff"),
    "1 MiB": lambda server, raw: echoes(server, raw, "é" * 2**19, b"x" * 2**20),
    "empty messages": lambda server, raw: echoes(server, raw, "", b""),
    "order under load": keeps_order,
    "cancel-safe receive": lambda server, raw: keeps_order(server, raw, "poll", 200),
    "back-pressure on the client": stops_reading,
    "back-pressure on the view": stops_sending,
    "refusal": denies,
    "refusal with a page": lambda server, raw: denies(server, raw, True),
    "headers of the answer": answers_with_headers,
    "code": lambda server, raw: closes(server, raw, 4002),
    "standard code": lambda server, raw: closes(server, raw, 1008),
    "reason": lambda server, raw: closes(server, raw, 4002, "because"),
    "the client's code": lambda server, raw: hears(server, raw, "left 4001"),
    "the client's reason": lambda server, raw: hears(server, raw, "left .* bye"),
}
STOPPED = ["sleeps", "reads", "sends for ever"]


def has_stopped_well(server: Process) -> None:
    for life in STOPPED:
        assert server.output.count(f"{life} has ended.") == 1
    assert not re.search("Traceback|ERROR", server.output)


def prepare_tenants(postgres: Postgres, tmp_path: Path, **options: Any) -> Process:
    """Make the tables of django-tenants and thirty tenants, t0 to t29, once."""
    needs("django_tenants")
    engine = "django_tenants.postgresql_backend"
    entry = {**postgres.entry, "ENGINE": engine, **options}
    (tmp_path / "tenants").mkdir()
    (tmp_path / "tenants" / "models.py").write_text(TENANTS_MODELS)
    (tmp_path / "tenants" / "__init__.py").touch()
    settings: Any = {**TENANTS, "DATABASES": {"default": entry}}
    # No contenttypes etc. are made: the views ask by SQL.
    program = (
        "import project; from django.db import connection;"
        "from tenants.models import Client, Domain;"
        "editor = connection.schema_editor(); editor.__enter__();"
        "editor.create_model(Client); editor.create_model(Domain);"
        "editor.__exit__(None, None, None)"
    )
    exists = "SELECT 1 FROM pg_tables WHERE tablename = 'tenants_client'"
    command = (*UVICORN, "project:application")
    process = Process(tmp_path, *command, **settings)
    names = [f"t{number}" for number in range(30)]
    if not postgres.ask(exists):
        run("python", "-c", program, env=process.environment)
        for name in names:
            postgres.ask(
                f"INSERT INTO tenants_client (schema_name) VALUES ('{name}');"
                "INSERT INTO tenants_domain (domain, is_primary, tenant_id)"
                f" SELECT '{name}.example.com', true, max(id) FROM tenants_client;"
                f"CREATE SCHEMA {name};"
                f"CREATE TABLE {name}.notes AS SELECT '{name}' AS owner"
            )
    return process


def prepare_zoo(tmp_path: Path) -> Process:
    """Make the project of the middleware zoo."""
    needs(*ZOO_PACKAGES)
    for directory in ("notes", "static"):
        (tmp_path / directory).mkdir()
    (tmp_path / "notes" / "models.py").write_text(ZOO_MODELS)
    (tmp_path / "notes" / "__init__.py").touch()
    (tmp_path / "static" / "a.txt").write_text("static")
    (tmp_path / "zoo.py").write_text(ZOO_URLS)
    options = {"timeout": 30, "transaction_mode": "IMMEDIATE"}
    entry = {**DATABASE, "NAME": f"{tmp_path}/zoo.sqlite3", "OPTIONS": options}
    more: Any = {
        "DATABASES": {"default": entry},
        "STATIC_ROOT": f"{tmp_path}/static",
    }
    env = {"SENTRY": f"{tmp_path}/events", "INSTRUMENT": "opentelemetry"}
    command = (*UVICORN, "--lifespan", "off", "project:application")
    process = Process(tmp_path, *command, env=env, **ZOO, **more)
    prepare = (
        "import project; from django.core.management import call_command\n"
        "from django.db import connection; call_command('migrate', verbosity=0)\n"
        "from notes.models import Note; from waffle.models import Flag\n"
        "with connection.schema_editor() as editor:\n"
        "    editor.create_model(Note); editor.create_model(Note.history.model)\n"
        "for n in ('ann', 'bob', 'eve'): project.User.objects.create(username=n)\n"
        "Flag.objects.create(name='beta', everyone=True)\n"
    )
    run("python", "-c", prepare, env=process.environment)
    return process
