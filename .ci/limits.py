"""What groups carry, in process, over Redis and PostgreSQL, and what `spread` does.

    python .ci/limits.py             # README has a copy; with --once, small and quick

Members are spread over two servers where there is a service. Each row tells how many
messages reach members in a second when one view broadcasts without a pause, and how
long 99 of 100 take at a third of that. Clients, servers, services share a machine.
"""

import asyncio
import contextlib
import json
import os
import pathlib
import resource
import statistics
import sys
import tempfile
import time
from typing import Any

HERE = pathlib.Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE.parent / ".tests")]
SIZE = 25  # of a message, in bytes


def serve() -> Any:
    """Return the application of a server: a factory for uvicorn."""
    import django
    from django.conf import settings
    from django.core.asgi import get_asgi_application

    settings.configure(
        ALLOWED_HOSTS=["*"], ROOT_URLCONF="limits", **json.loads(os.environ["LIMITS"])
    )
    django.setup()
    from django_ws import WebSocket, broadcast, close_group, websocket, websockets

    async def member(socket: WebSocket) -> None:
        await socket.accept()
        await socket.join("room")
        await socket.send_text("joined".ljust(SIZE))
        async for _ in socket:
            pass

    async def sender(socket: WebSocket) -> None:
        """Broadcast `count` times by each of some tasks, every `pause` seconds."""

        async def send(count: int, pause: float) -> None:
            begin = time.monotonic()
            for number in range(count):
                await broadcast("room", f"{time.monotonic():.6f}".ljust(SIZE))
                if pause:
                    later = begin + number * pause - time.monotonic()
                    await asyncio.sleep(max(0, later))

        await socket.accept()
        async for count, pause, tasks in socket.iter_json():
            async with asyncio.TaskGroup() as group:
                for _ in range(tasks):
                    group.create_task(send(count, pause))
            await socket.send_text("sent")

    async def closer(socket: WebSocket) -> None:
        await socket.accept()
        await close_group("room", 1012, "restart", spread=await socket.receive_json())
        await socket.receive_text()

    views = {"member/": member, "sender/": sender, "closer/": closer}
    global urlpatterns
    urlpatterns = [websocket(route, view) for route, view in views.items()]
    return websockets(get_asgi_application())


urlpatterns: list[Any] = []


class Client(asyncio.Protocol):
    """A member, cheap enough for 5,000 of them: it counts what it gets."""

    def __init__(self, clients: "Clients", port: int) -> None:
        self.clients, self.port = clients, port
        self.data = b""
        self.answered = False

    def connection_made(self, transport: Any) -> None:
        self.transport = transport
        self.asked = time.monotonic()
        transport.write(
            f"GET /member/ HTTP/1.1\r\nHost: 127.0.0.1:{self.port}\r\n"
            "Connection: Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Version: 13\r\n"
            "Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n".encode()
        )

    def data_received(self, data: bytes) -> None:
        self.data += data
        if not self.answered:
            head, found, self.data = self.data.partition(b"\r\n\r\n")
            if not found:
                self.data = head
                return
            assert head.startswith(b"HTTP/1.1 101"), head
            self.answered = True
            self.clients.handshakes.append((time.monotonic(), self.asked))
        while len(self.data) >= SIZE + 2 and self.data[0] == 0x81:
            message, self.data = self.data[2 : SIZE + 2], self.data[SIZE + 2 :]
            if message.startswith(b"joined"):
                self.clients.joined += 1
            else:
                self.clients.note(time.monotonic() - float(message))
        if self.data[:1] == b"\x88":  # the server closes
            self.transport.write(bytes([0x88, 0x80, 0, 0, 0, 0]))
            self.transport.close()

    def connection_lost(self, error: Any) -> None:
        if self.clients.again:
            self.clients.open(self.port)


class Clients:
    def __init__(self) -> None:
        self.handshakes: list[tuple[float, float]] = []  # when answered, when asked
        self.delays: list[float] = []  # of messages, in seconds
        self.joined = 0
        self.again = False  # whether they connect again at once
        self.last = 0.0  # when the last message came
        self.tasks: set[Any] = set()

    def note(self, delay: float) -> None:
        self.delays.append(delay)
        self.last = time.monotonic()

    def open(self, port: int) -> Any:
        loop = asyncio.get_running_loop()
        dialed = loop.create_connection(lambda: Client(self, port), "127.0.0.1", port)
        task = loop.create_task(dialed)
        self.tasks.add(task)
        task.add_done_callback(self.tasks.discard)
        return task

    async def open_all(self, servers: list[Any], count: int) -> None:
        for number in range(count):
            await self.open(servers[number % len(servers)].port)
            while number - self.joined > 100:
                await asyncio.sleep(0.001)
        while self.joined < count:
            await asyncio.sleep(0.01)

    async def heard(self, count: int) -> None:
        deadline = time.monotonic() + 120
        while len(self.delays) < count:
            assert time.monotonic() < deadline, f"{len(self.delays)} of {count} came"
            await asyncio.sleep(0.01)


def dial(server: Any, place: str) -> Any:
    from websockets.asyncio.client import connect

    address = f"ws://127.0.0.1:{server.port}/{place}/"
    return connect(address, proxy=None, ping_interval=None)


async def send(clients: Clients, sender: Any, members: int, *job: Any) -> float:
    """Let a view broadcast; return deliveries a second."""
    clients.delays.clear()
    begin = time.monotonic()
    await sender.send(json.dumps(job))
    assert await sender.recv() == "sent"
    expected = job[0] * job[2] * members
    await clients.heard(expected)
    return float(expected / (clients.last - begin))


async def measure(servers: list[Any], members: int) -> tuple[float, float, float]:
    """Return deliveries a second, a percentile in ms, and broadcasts of ten tasks."""
    clients = Clients()
    await clients.open_all(servers, members)
    count = max(5, (2000 if "--once" in sys.argv else 20_000) // members)
    async with dial(servers[0], "sender") as sender:
        await send(clients, sender, members, min(count, 50), 0, 1)  # warm up
        rates = [await send(clients, sender, members, count, 0, 1) for _ in range(3)]
        rate = statistics.median(rates)
        pause = 3 * members / rate
        few = max(3, min(count, round(5 / pause)))
        await send(clients, sender, members, few, pause, 1)
        slowest = sorted(clients.delays)[int(len(clients.delays) * 0.99)]
        many = await send(clients, sender, members, max(1, count // 10), 0, 10)
    return rate, slowest * 1000, many / members


async def storm(server: Any, members: int, spread: float) -> tuple[int, float]:
    """Close all members, who come back at once: handshakes a second, slowest in s."""
    clients = Clients()
    await clients.open_all([server], members)
    clients.handshakes.clear()
    clients.again = True
    async with dial(server, "closer") as closer:
        await closer.send(json.dumps(spread))
        deadline = time.monotonic() + spread + 120
        while len(clients.handshakes) < members:
            assert time.monotonic() < deadline, len(clients.handshakes)
            await asyncio.sleep(0.1)
    clients.again = False
    seconds: dict[int, int] = {}
    for answered, _ in clients.handshakes:
        seconds[int(answered)] = seconds.get(int(answered), 0) + 1
    return max(seconds.values()), max(end - start for end, start in clients.handshakes)


def main() -> None:
    import stages

    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    sizes = [1, 100, 500 if "--once" in sys.argv else 5000]

    def start(stack: Any, directory: Any, count: int, options: Any) -> list[Any]:
        command = (*stages.UVICORN, "--log-level", "warning", "--factory")
        env = {"LIMITS": json.dumps(options)}
        made = []
        for _ in range(count):
            server = stages.Process(directory, *command, "limits:serve", env=env)
            server.environment["PYTHONPATH"] = f"{HERE}:{HERE.parent}"
            made.append(stack.enter_context(server))
        return made

    with contextlib.ExitStack() as stack:
        directory = pathlib.Path(stack.enter_context(tempfile.TemporaryDirectory()))
        redis, postgres = stages.Redis(), stages.Postgres(str(directory))
        stack.callback(redis.stop)
        stack.callback(postgres.stop)
        entry = {"DATABASES": postgres.databases}
        ways = {
            "in process": (1, {}),
            "Redis, two processes": (2, redis.options()),
            "PostgreSQL, two processes": (2, {**entry, **postgres.options()}),
        }
        print("| groups | members | deliveries/s | 99 % within | broadcasts/s by ten |")
        print("| --- | --- | --- | --- | --- |")
        for name, (count, options) in ways.items():
            for members in sizes:
                with contextlib.ExitStack() as servers:
                    made = start(servers, directory, count, options)
                    rate, slowest, many = asyncio.run(measure(made, members))
                cells = f"{members:,} | {rate:,.0f} | {slowest:.1f} ms | {many:,.0f}"
                print(f"| {name} | {cells} |", flush=True)
        print("\n| `close_group` | handshakes/s at most | the slowest took |")
        print("| --- | --- | --- |")
        for spread in (0, 3 if "--once" in sys.argv else 30):
            with contextlib.ExitStack() as servers:
                made = start(servers, directory, 1, {})
                peak, slowest = asyncio.run(storm(made[0], sizes[-1], spread))
            print(f"| `spread={spread}` | {peak} | {slowest:.1f} s |", flush=True)
    print("\n`python .ci/limits.py`: Python", sys.version.split()[0])


if __name__ == "__main__":
    main()
