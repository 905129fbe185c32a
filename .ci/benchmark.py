"""What things cost, as ratios to raw ASGI on the same uvicorn; README has a copy.

    python .ci/benchmark.py            # three rounds; with --once, one

Starlette and Channels stand beside where they are installed. Each does the same small
jobs in a process of its own, which serves this module.
"""

import asyncio
import contextlib
import importlib.util
import json
import pathlib
import statistics
import sys
import tempfile
import time
from typing import Any

HERE = pathlib.Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE.parent / ".tests")]
urlpatterns: list[Any] = []

import django  # noqa: E402
from django.conf import settings  # noqa: E402


def set_up() -> None:
    """Set up Django with the middleware of startproject."""
    names = "contrib.sessions.middleware.SessionMiddleware"
    names += " middleware.common.CommonMiddleware middleware.csrf.CsrfViewMiddleware"
    names += " contrib.auth.middleware.AuthenticationMiddleware"
    names += " contrib.messages.middleware.MessageMiddleware"
    names += " middleware.clickjacking.XFrameOptionsMiddleware"
    layer = "channels.layers.InMemoryChannelLayer"
    settings.configure(
        SECRET_KEY="benchmark" * 6,
        ALLOWED_HOSTS=["127.0.0.1"],
        ROOT_URLCONF="benchmark",
        SESSION_ENGINE="django.contrib.sessions.backends.signed_cookies",
        INSTALLED_APPS=["django.contrib.auth", "django.contrib.contenttypes"],
        DATABASES={
            "default": {"ENGINE": "django.db.backends.sqlite3", "NAME": ":memory:"}
        },
        CHANNEL_LAYERS={"default": {"BACKEND": layer, "CONFIG": {"capacity": 100_000}}},
        MIDDLEWARE=["django.middleware.security.SecurityMiddleware"]
        + [f"django.{name}" for name in names.split()],
    )
    django.setup()


async def figures(scope: Any, receive: Any, send: Any) -> None:
    """Tell by HTTP what this process has used: seconds of CPU, bytes of memory."""
    import resource

    pages = int(pathlib.Path("/proc/self/statm").read_text().split()[1])
    used = [time.process_time(), pages * resource.getpagesize()]
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": json.dumps(used).encode()})


def beside_figures(application: Any) -> Any:
    async def either(scope: Any, receive: Any, send: Any) -> None:
        chosen = figures if scope["type"] == "http" else application
        await chosen(scope, receive, send)

    return either


def raw_peer() -> Any:
    members = set()

    async def application(scope: Any, receive: Any, send: Any) -> None:
        await receive()
        await send({"type": "websocket.accept"})
        place = scope["path"]
        if place == "/room/":
            members.add(send)
        try:
            while (event := await receive())["type"] == "websocket.receive":
                data = event["text"]
                if place == "/json/":
                    data = json.dumps(json.loads(data))
                message = {"type": "websocket.send", "text": data}
                for member in tuple(members) if place == "/room/" else [send]:
                    await member(message)
        finally:
            members.discard(send)

    return beside_figures(application)


async def echo_for_ever(socket: Any) -> None:
    """A view of django_ws and of Starlette."""
    await socket.accept()
    with contextlib.suppress(Exception):
        while True:
            await socket.send_text(await socket.receive_text())


async def echo_json_for_ever(socket: Any) -> None:
    await socket.accept()
    with contextlib.suppress(Exception):
        while True:
            await socket.send_json(await socket.receive_json())


def django_ws_peer() -> Any:
    set_up()
    from django_ws import WebSocket, broadcast, websocket, websockets

    async def repeating(socket: WebSocket) -> None:
        await socket.accept()
        await socket.join("room")
        async for message in socket.iter_text():
            await broadcast("room", message)

    jobs = {"echo": echo_for_ever, "json": echo_json_for_ever, "room": repeating}
    urlpatterns[:] = [websocket(f"{name}/", view) for name, view in jobs.items()]
    return websockets(figures)


def starlette_peer() -> Any:
    from starlette.applications import Starlette
    from starlette.routing import WebSocketRoute

    jobs = {"echo": echo_for_ever, "json": echo_json_for_ever}
    routes = [WebSocketRoute(f"/{name}/", view) for name, view in jobs.items()]
    return beside_figures(Starlette(routes=routes))


def channels_peer() -> Any:
    set_up()
    from channels.auth import AuthMiddlewareStack
    from channels.generic.websocket import AsyncJsonWebsocketConsumer as Json
    from channels.generic.websocket import AsyncWebsocketConsumer as Text
    from channels.routing import URLRouter
    from channels.security.websocket import AllowedHostsOriginValidator
    from django.urls import path

    class Echo(Text):  # type: ignore[misc]
        async def receive(self, text_data: Any = None, bytes_data: Any = None) -> None:
            await self.send(text_data=text_data)

    class EchoJson(Json):  # type: ignore[misc]
        async def receive_json(self, content: Any) -> None:
            await self.send_json(content)

    class Room(Text):  # type: ignore[misc]
        groups = ["room"]

        async def receive(self, text_data: Any = None, bytes_data: Any = None) -> None:
            event = {"type": "chat.message", "text": text_data}
            await self.channel_layer.group_send("room", event)

        async def chat_message(self, event: Any) -> None:
            await self.send(text_data=event["text"])

    jobs: dict[str, Any] = {"echo": Echo, "json": EchoJson, "room": Room}
    routes = [path(f"{name}/", job.as_asgi()) for name, job in jobs.items()]
    stack = AuthMiddlewareStack(URLRouter(routes))
    return beside_figures(AllowedHostsOriginValidator(stack))


def open_socket(server: Any, place: str) -> Any:
    from websockets.asyncio.client import connect as dial_async

    origin: Any = f"http://127.0.0.1:{server.port}"
    address = f"ws://127.0.0.1:{server.port}{place}"
    return dial_async(address, origin=origin, proxy=None, compression=None)


def used(server: Any) -> Any:
    return json.loads(server.get("/figures").body)


async def echoes(server: Any, place: str, message: str, count: int = 1000) -> float:
    """Return microseconds of CPU for each message that is echoed."""

    async def play() -> None:
        async with open_socket(server, place) as client:
            for _ in range(count):
                await client.send(message)
                await client.recv()

    before = used(server)[0]
    await asyncio.gather(*[play() for _ in range(10)])
    return float(used(server)[0] - before) / (10 * count) * 1e6


async def echoes_text(server: Any) -> float:
    return await echoes(server, "/echo/", "x" * 32)


async def echoes_json(server: Any) -> float:
    return await echoes(server, "/json/", '{"text": "hello", "to": [1, 2, 3]}')


async def shakes_hands(server: Any, count: int = 200) -> float:
    """Return microseconds of CPU for each connection, opened and closed."""
    before = used(server)[0]
    for _ in range(count):
        async with open_socket(server, "/echo/"):
            pass
    return float(used(server)[0] - before) / count * 1e6


async def delivers(server: Any, members: int = 100, count: int = 50) -> float:
    """Return microseconds of CPU for each message to each member of a group."""
    async with contextlib.AsyncExitStack() as stack:
        opened = [open_socket(server, "/room/") for _ in range(members)]
        clients = [await stack.enter_async_context(one) for one in opened]
        joined = False
        while not joined:  # a socket is accepted a little before it is a member
            await clients[0].send("anybody?")
            heard = [asyncio.wait_for(one.recv(), 0.5) for one in clients]
            answers = await asyncio.gather(*heard, return_exceptions=True)
            joined = answers == ["anybody?"] * members
        before = used(server)[0]
        for _ in range(count):
            await clients[0].send("x" * 32)
            await asyncio.gather(*[one.recv() for one in clients])
        return float(used(server)[0] - before) / (members * count) * 1e6


async def idles(server: Any, count: int = 500) -> float:
    """Return KiB of memory for each idle connection."""
    async with contextlib.AsyncExitStack() as stack:
        for _ in range(count // 2):  # these take what was free before
            await stack.enter_async_context(open_socket(server, "/echo/"))
        before = used(server)[1]
        for _ in range(count):
            await stack.enter_async_context(open_socket(server, "/echo/"))
        return float(used(server)[1] - before) / count / 1024


# What is measured, in which unit, and whether Starlette has it, too.
ROWS: dict[str, tuple[Any, str, bool]] = {
    "echo of a text": (echoes_text, "µs", True),
    "echo of JSON": (echoes_json, "µs", True),
    "handshake, Django's default middleware": (shakes_hands, "µs", False),
    "a delivery in a group of 100": (delivers, "µs", False),
    "idle connection, same middleware": (idles, "KiB", False),
}


def main() -> None:
    from importlib.metadata import version

    import stages as tests

    peers = ["raw", "django_ws"]
    peers += [one for one in ("starlette", "channels") if importlib.util.find_spec(one)]
    command = (*tests.UVICORN, "--log-level", "warning", "--factory")
    found: dict[tuple[str, str], list[float]] = {}
    for title, (job, _, everybody) in ROWS.items():
        fresh = job is idles  # what was freed before would be used again
        with contextlib.ExitStack() as stack:
            directory = pathlib.Path(stack.enter_context(tempfile.TemporaryDirectory()))
            servers = {}
            for peer in peers:
                if everybody or peer != "starlette":
                    factory = f"benchmark:{peer}_peer"
                    server = tests.Process(directory, *command, factory)
                    server.environment["PYTHONPATH"] = f"{HERE}:{HERE.parent}"
                    servers[peer] = stack.enter_context(server)
            for _ in range(1 if fresh or "--once" in sys.argv else 3):  # in turns
                for peer, server in servers.items():
                    if not fresh:
                        asyncio.run(echoes(server, "/echo/", "warm up", 20))
                    figure = asyncio.run(job(server))
                    found.setdefault((title, peer), []).append(figure)
    medians = {where: statistics.median(values) for where, values in found.items()}
    lines = [["", "raw ASGI", *peers[1:]], ["---"] * (1 + len(peers))]
    for title, (_, unit, _) in ROWS.items():
        base = medians[title, "raw"]
        lines.append([title, f"1.00 ({base:.1f} {unit})"])
        for peer in peers[1:]:
            figure = medians.get((title, peer), 0)
            lines[-1].append(f"{figure / base:.2f}" if figure else "–")
    for cells in lines:
        print("|", " | ".join(cells), "|")
    used = [f"Python {sys.version.split()[0]}"]
    for package in ("django", "uvicorn", "starlette", "channels"):
        if importlib.util.find_spec(package):
            used.append(f"{package} {version(package)}")
    print("\n`python .ci/benchmark.py`:", ", ".join(used))


if __name__ == "__main__":
    main()
